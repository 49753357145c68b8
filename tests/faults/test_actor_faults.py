"""Actors are killed and cut off; the run goes on, and every version is what it claims to be."""

import logging
import subprocess
import sys
import time

import fault_world as world
import jax.numpy as jnp
import pytest

from jaxrl.actors import Factory, PoolConfig, Processes, Threads
from jaxrl.sync import (
    FsspecStore,
    MemoryStore,
    Publisher,
    StoreServer,
    Subscriber,
    SyncConfig,
)

SECRET = "a secret of the fault tests"


def trained(loop, steps, *, each=lambda done: None):
    rows = []
    with loop.journal:
        for done, _, metrics, _ in loop.run(world.started(), start=0, steps=steps):
            rows.append(metrics)
            if each(done):
                break
    return rows


def check(folder, steps):
    """What must hold after every fault; returns the actors' claims."""
    updates, acknowledged = world.used(folder)
    trained_on = [item for step in sorted(updates) for item in updates[step]]
    assert sorted(updates) == list(range(steps))
    assert len(trained_on) == len(set(trained_on))  # none twice
    assert set(trained_on) <= set(acknowledged)
    assert len(acknowledged) == len(set(acknowledged))
    claims = world.Claims(folder / "claims.jsonl").read()
    published = world.Claims(folder / "published.jsonl").read()
    assert {claim["item"] for claim in claims} >= set(trained_on)
    assert world.mismatches(published, claims) == []
    return claims


def test_actors_killed_in_a_rollout_a_fetch_and_an_apply(tmp_path, environment, caplog):
    caplog.set_level(logging.INFO)
    config = {
        "store": str(tmp_path / "store"),
        "claims": str(tmp_path / "claims.jsonl"),
        "folder": str(tmp_path),
        "kills": {"actor-0": ["rollout", "apply"], "actor-1": ["fetch"]},
    }
    pool = Processes(
        2,
        Factory(target="fault_world:build", config=config),
        environment=lambda name: {"PYTHONPATH": environment["PYTHONPATH"]},
        config=PoolConfig(backoff_s=0.0),
    )
    killed = [tmp_path / f"killed in {place}" for place in ("rollout", "apply", "fetch")]
    loop = world.trainer(pool, FsspecStore(tmp_path / "store"), tmp_path, stall_s=240.0)

    def restarts():
        return sum(actor.restarts for actor in pool.statistics.values())

    def enough(done):  # all have been killed, which the pool has noticed, and all are back
        if done >= 8:
            time.sleep(0.1)  # who is left need not do hundreds of updates alone
        return done >= 8 and restarts() >= 3 and len(pool._alive) == 2

    steps = len(trained(loop, 10_000, each=enough))
    pool.close()
    assert all(path.exists() for path in killed)
    assert restarts() == 3
    assert caplog.text.count("SIGKILL") >= 3  # the reason, for each
    claims = check(tmp_path, steps)
    assert {claim["actor"] for claim in claims} == {"actor-0", "actor-1"}


def test_connections_cut_at_any_byte(tmp_path, environment, cutter, caplog):
    """An actor in a process of its own, which reaches both the pool and the store by a relay."""
    caplog.set_level(logging.INFO)
    with StoreServer(MemoryStore(), secret=SECRET) as server:
        pool = Processes(0, secret=SECRET)
        items, weights = cutter(pool.address), cutter(server.address)
        config = (
            f'{{"store": "{weights.address}", "secret": "{SECRET}", '
            f'"claims": "{tmp_path / "claims.jsonl"}"}}'
        )
        actor = subprocess.Popen(
            [
                sys.executable, "-m", "jaxrl.actors", "--learner", items.address,
                "--build", "fault_world:build", "--config", config, "--name", "far",
            ],
            env=environment | {"JAXRL_SECRET": SECRET},
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

        def each(done):
            if done in (2, 5):
                items.cut_when_there()
            if done in (3, 5, 7):
                weights.cut()

        trained(world.trainer(pool, server._store, tmp_path), 10, each=each)
        log = actor.communicate(timeout=200)[1]
    assert actor.returncode == 0
    assert items.cuts == 2
    assert "lost its learner and looks for it" in log
    assert "lost far" in caplog.text
    check(tmp_path, 10)


@pytest.mark.parametrize("seed", [0, 1])
def test_versions_late_out_of_order_repeated_truncated_and_flipped(tmp_path, seed):
    """Two actors read through a store that lies about one delivery in three."""
    store = MemoryStore()
    bad = world.BadStore(store, seed)
    pool = Threads(
        2, lambda name: world.build(name, store=bad, claims=str(tmp_path / "claims.jsonl"))
    )
    rows = trained(
        world.trainer(pool, store, tmp_path), 1000,
        each=lambda done: done >= 25 and len(bad.faults) >= 5,
    )  # fmt: skip
    assert len(bad.faults) >= 5
    assert max(row.get("staleness_max", 0) for row in rows) <= 3
    claims = check(tmp_path, len(rows))
    assert len({claim["version"] for claim in claims}) > 5


class RottenAnchor(MemoryStore):
    """The first anchor is damaged as soon as it lies there, and stays so.

    What is complained of is not seen before everybody has complained, of two actors.
    """

    def put(self, key, data):
        if "payloads/000000000000-anchor" in key:
            data = data[:50] + bytes([data[50] ^ 1]) + data[51:]
        super().put(key, data)

    def keys(self, prefix):
        found = super().keys(prefix)
        complaints = [key for key in found if "/damaged-" in key]
        return found if len(complaints) >= 2 else [key for key in found if key not in complaints]


def test_a_damaged_anchor_does_not_keep_actors_waiting_for_a_version_that_waits_for_them(
    tmp_path, caplog
):
    store = RottenAnchor()
    pool = Threads(
        2, lambda name: world.build(name, store=store, claims=str(tmp_path / "claims.jsonl"))
    )
    trained(world.trainer(pool, store, tmp_path, max_staleness=0, stall_s=60.0), 3)
    check(tmp_path, 3)
    published = [claim["version"] for claim in world.Claims(tmp_path / "published.jsonl").read()]
    assert published[:2] == [0, 0]  # the same version again, with another anchor
    assert not any("/damaged-" in key for key in MemoryStore.keys(store, ""))
    for name in ("actor-0", "actor-1"):  # each says why, once
        assert caplog.text.count(f"{name}: version none goes on serving") == 1
    assert "an anchor will lead past it" in caplog.text


def test_an_actor_joins_at_version_1000_and_one_sleeps_past_every_anchor(tmp_path):
    """What the store keeps is bounded, and yet both arrive at the very bits of the newest."""
    store = FsspecStore("memory://faults-1000")
    publisher = Publisher(
        store, run_id=world.RUN, config=SyncConfig(anchor_every=20, ack_expiry_s=0.2)
    )
    params = {"w": jnp.zeros(512)}
    sleeper = Subscriber(store, run_id=world.RUN, like=params, name="sleeper")
    for version in range(1001):
        params = {"w": params["w"].at[version % 512].add(1e-3)}
        publisher.publish(params, version)
        if version == 3:
            assert sleeper.prepare()
            assert sleeper.flip().version == 3
    keys = store.keys("")
    assert len(keys) < 200
    joins = Subscriber(store, run_id=world.RUN, like=params, name="late")
    for subscriber in (sleeper, joins):
        assert subscriber.prepare()
        update = subscriber.flip()
        assert update.version == 1000
        assert update.kinds[0] == "anchor"
        assert world.digest(subscriber.params) == world.digest(params)
