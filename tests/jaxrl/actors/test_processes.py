"""Actors in processes of their own: started, killed, cut off, joining from outside, refused."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxrl.actors import Factory, Interrupted, NoActorsLeft, PoolConfig, Processes
from jaxrl.actors.remote import serve
from jaxrl.actors.wire import item_to_json
from jaxrl.sync import Refused
from jaxrl.sync.connection import Connection

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def pool(little_actors):
    """Makes pools of little actors, and closes them."""
    pools = []

    def make(size, config=None, **options):
        pools.append(
            Processes(
                size,
                Factory(target="little_actors:build", config=options),
                environment=lambda name: {"PYTHONPATH": str(little_actors)},
                config=config or PoolConfig(backoff_s=0.0),
            )
        )
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def run(pool, make_item, numbers):
    """Results of the items of these numbers."""
    for number in numbers:
        pool.submit(make_item(number, rows=(0,)))
    results, end = [], time.monotonic() + 250
    while len(results) < len(numbers) and time.monotonic() < end:
        results += pool.poll(0.2)
    return results


def poll_for(pool, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pool.poll(0.5)


def accepted(_):
    return None


def test_killed_actors_are_started_again_and_every_item_is_answered_once(
    pool, make_item, tmp_path, caplog
):
    actors = pool(2, die_once=str(tmp_path / "died"))
    actors.start(accepted)
    results = run(actors, make_item, range(12))
    assert sorted(result.item for result in results) == list(range(12))
    for result in results:
        np.testing.assert_array_equal(result.rollouts.tokens, np.full((1, 1, 2), result.item))
    statistics = actors.statistics.values()
    assert sum(actor.restarts for actor in statistics) == 1
    assert "SIGKILL" in caplog.text
    assert "handed out again" in caplog.text
    assert not {result.version for result in results} & {os.getpid()}


def test_an_item_that_ends_every_actor_is_refused_and_the_reason_arrives(pool, make_item, caplog):
    actors = pool(1, config=PoolConfig(backoff_s=0.0, max_failures=2))
    actors.start(accepted)
    actors.submit(make_item(0, rows=(13,)))
    actors.submit(make_item(1, rows=(0,)))
    results, end = [], time.monotonic() + 250
    while len(results) < 2 and time.monotonic() < end:
        results += actors.poll(0.2)
    assert [result.refusal and result.refusal.reason for result in results] == ["fatal", None]
    assert "RuntimeError: unlucky row" in results[0].refusal.detail


def test_a_factory_that_cannot_build_ends_the_run_with_its_reason(make_item):
    with Processes(
        1,
        Factory(target="no_such_module:build"),
        config=PoolConfig(backoff_s=0.0, max_restarts=0),
    ) as actors:
        actors.start(accepted)
        with pytest.raises(NoActorsLeft, match=r"ended before it connected .*exit status 1"):
            poll_for(actors, 250)


def test_an_actor_joins_from_outside_and_strangers_do_not(pool, make_item, little_actors, caplog):
    actors = pool(0)
    actors.start(accepted)
    with pytest.raises(Refused, match="refuses this secret"):
        Connection.connect(actors.address, "x" * 32)
    with socket.create_connection(("127.0.0.1", int(actors.address.rpartition(":")[2]))) as noise:
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
    joined = subprocess.Popen(
        [
            sys.executable, "-m", "jaxrl.actors", "--learner", actors.address, "--name", "guest",
            "--build", "little_actors:build", "--config", '{"sleep_s": 0.05}',
        ],
        cwd=ROOT,
        env=os.environ | {"JAXRL_SECRET": actors.secret, "PYTHONPATH": str(little_actors)},
    )  # fmt: skip
    results = run(actors, make_item, range(2))
    (actor,) = actors._alive.values()
    actor._connection.close()  # as if the network were cut
    results += run(actors, make_item, range(2, 6))
    assert sorted(result.item for result in results) == list(range(6))
    assert {result.actor for result in results} == {"guest"}
    assert actors.statistics["guest"].restarts == 1
    actors.close()
    assert joined.wait(200) == 0  # it was told that all is done
    assert actors.refused == 2
    assert "turned away" in caplog.text


def test_the_launcher_says_what_is_missing(little_actors):
    def started(secret, address):
        environment = {k: v for k, v in os.environ.items() if k != "JAXRL_SECRET"} | secret
        return subprocess.run(
            [
                sys.executable, "-m", "jaxrl.actors", "--learner", address, "--patience", "0.1",
                "--build", "little_actors:build",
            ],
            cwd=ROOT, env=environment | {"PYTHONPATH": str(little_actors)}, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip

    assert "JAXRL_SECRET is not set" in started({}, "127.0.0.1:1").stderr
    done = started({"JAXRL_SECRET": "s" * 32}, "127.0.0.1:1")
    assert done.returncode == 1
    assert "cannot connect to 127.0.0.1:1" in done.stderr


def test_actors_end_with_the_process_that_started_them(little_actors):
    script = """
from jaxrl.actors import Factory, Processes, WorkItem
import time
pool = Processes(1, Factory(target="little_actors:build", config={"sleep_s": 600.0}))
pool.start(lambda result: None)
pool.submit(WorkItem(id=0, rows=(0,), seed=0))
while not pool._alive:
    time.sleep(0.05)
print(next(iter(pool._alive.values()))._process.pid, flush=True)
time.sleep(600)
"""
    learner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{little_actors}:{ROOT}"},
    )  # fmt: skip
    actor = int(learner.stdout.readline())
    os.kill(actor, 0)  # it lives
    learner.send_signal(signal.SIGKILL)
    learner.wait()
    end = time.monotonic() + 200
    while time.monotonic() < end and Path(f"/proc/{actor}").exists():
        time.sleep(0.1)
    assert not Path(f"/proc/{actor}").exists()
    learner.stdout.close()


def test_what_must_be_given_is_asked_for():
    with pytest.raises(ValueError, match="must be built: size=1"):
        Processes(1)
    with pytest.raises(ValueError, match=r"'package\.module:function', got 'module"):
        Factory(target="module.function")
    with pytest.raises(ValueError, match="at least 16 bytes"):
        Processes(0, secret="short")


class Waiting:
    """An actor that waits for weights until somebody interrupts it."""

    def __init__(self):
        self.writing, self.interrupted = threading.Event(), threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def interrupt(self):
        self.interrupted.set()

    def write(self, item):
        self.writing.set()
        assert self.interrupted.wait(100)
        raise Interrupted("told to stop")


def test_an_actor_that_waits_for_weights_hears_that_its_learner_has_ended(make_item):
    """Nobody will publish them: it must not wait for as long as its patience lasts."""
    actor, secret = Waiting(), "0" * 32
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor(1) as beside,
    ):
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        served = beside.submit(
            serve, lambda name: actor, name="far", learner=address, secret=secret, patience_s=100.0
        )
        with Connection(listener.accept()[0], secret, "server") as learner:
            assert learner.receive()[0]["hello"] == "far"
            learner.send({"item": item_to_json(make_item(1))}, b"")
            assert actor.writing.wait(100)
            learner.send({"bye": True}, b"")
        served.result(100)
    assert actor.interrupted.is_set()
