"""Actors on a Ray of this machine, which the test starts: killed, and restarted by Ray."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from jaxrl.actors import Factory, NoActorsLeft, PoolConfig, RayActors

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
        2, build, options=options(little_actors), config=PoolConfig(backoff_s=0.0)
    ) as actors:
        actors.start(lambda result: None)
        for number in range(30):
            actors.submit(make_item(number, rows=(13 if number == 7 else 0,)))
        results, killed, end = [], None, time.monotonic() + 120
        while len(results) < 30 and time.monotonic() < end:
            results += actors.poll(0.2)
            if killed is None and len(results) >= 4:
                killed = results[0].version  # little actors tell their process so
                handle = actors._hosts[results[0].actor]
                os.kill(killed, signal.SIGKILL)
        assert actors._hosts[results[0].actor] is handle  # the same to Ray, in a new process
    assert sorted(result.item for result in results) == list(range(30))
    refused = {r.item: r.refusal.reason for r in results if r.refusal is not None}
    assert refused == {7: "fatal"}  # it raised in every actor that had it
    assert "unlucky row" in caplog.text
    assert len({r.version for r in results if r.actor == results[0].actor} - {-1}) >= 2
    assert sum(actor.restarts for actor in actors.statistics.values()) == 4  # 1 killed, 3 raised

    broken = Factory(target="no_such_module:build")
    with RayActors(1, broken, config=PoolConfig(max_restarts=0)) as actors:
        actors.start(lambda result: None)
        with pytest.raises(NoActorsLeft, match="no_such_module"):
            poll_for(actors, 60)


def poll_for(pool, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pool.poll(0.5)
