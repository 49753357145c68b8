"""Actors on a Ray of this machine, which the test starts: killed, and restarted by Ray."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from jaxrl.actors import Factory, PoolConfig, RayActors

ray = pytest.importorskip("ray", reason='needs Ray: pip install -e ".[ray]"')
ROOT = Path(__file__).resolve().parents[3]

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="kills processes"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own, of sockets and of what it deprecates
]


@pytest.fixture
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def options(folder):
    environment = {"PYTHONPATH": f"{folder}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    return {"num_cpus": 1, "runtime_env": {"env_vars": environment}}


def test_ray_restarts_what_dies_and_every_item_is_answered_once(
    cluster, little_actors, make_item, caplog
):
    build = Factory(target="little_actors:build", config={"sleep_s": 0.05})
    with RayActors(
        1, build, options=options(little_actors), config=PoolConfig(backoff_s=0.0, max_failures=2)
    ) as actors:
        actors.start(lambda result: None)
        results, end = [], time.monotonic() + 250
        for last, numbers in ((4, range(5)), (12, range(5, 12))):
            for number in numbers:
                actors.submit(make_item(number, rows=(13 if number == 7 else 0,)))
            while len(results) < last and time.monotonic() < end:
                results += actors.poll(0.2)
            if last == 4:
                handle = actors._hosts[results[0].actor]
                os.kill(results[0].version, signal.SIGKILL)  # little actors tell their process so
        assert actors._hosts[results[0].actor] is handle  # the same to Ray, in a new process
    assert sorted(result.item for result in results) == list(range(12))
    refused = {r.item: r.refusal.reason for r in results if r.refusal is not None}
    assert refused == {7: "fatal"}  # it raised, twice
    assert "unlucky row" in caplog.text
    # Four processes, one after another; the third met item 7 first and delivered nothing.
    assert len({result.version for result in results} - {-1}) == 3
    # Killed once, raised twice; Ray may end a process that raised only after it took another item.
    assert 3 <= actors.statistics["actor-0"].restarts <= 5


def test_what_only_the_pool_can_say_is_refused():
    build = Factory(target="little_actors:build")
    with pytest.raises(ValueError, match=r"leave max_restarts out.*PoolConfig\.max_restarts"):
        RayActors(1, build, options={"num_cpus": 1, "max_restarts": 3})


def test_a_ray_that_was_there_before_stays(cluster, little_actors):
    build = Factory(target="little_actors:build")
    with RayActors(0, build) as actors:
        actors.start(lambda result: None)
    assert ray.is_initialized()


def test_a_ray_that_start_has_begun_ends_with_the_pool(monkeypatch):
    calls = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda: calls.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    pool = RayActors(0, Factory(target="little_actors:build"))
    pool.start(lambda result: None)
    pool.close()
    pool.close()
    assert calls == ["init", "shutdown"]
