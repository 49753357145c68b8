"""Who joins, sleeps or lags reads little, and the store keeps no more than somebody needs."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl import sync
from jaxrl.sync.manifest import Manifest, Payload
from jaxrl.sync.routes import route


def follow(store, like, name="actor", **options):
    actor = sync.Subscriber(store, run_id="r", like=like, name=name, **options)
    assert actor.prepare()
    return actor, actor.flip()


def test_joining_at_version_1000_is_cheap_and_the_store_stays_small():
    rng = np.random.default_rng(0)
    w = rng.normal(size=2048).astype(np.float32)
    store = sync.MemoryStore()
    publisher = sync.Publisher(store, run_id="r", config=sync.SyncConfig(anchor_every=50))
    most = 0
    for version in range(0, 1001, 4):
        w[rng.integers(0, w.size, 4)] *= np.float32(1.01)
        publisher.publish({"w": jnp.asarray(w)}, version)
        most = max(most, len(store.keys("")))
    actor, update = follow(store, {"w": jax.ShapeDtypeStruct(w.shape, w.dtype)})
    assert actor.version == 1000
    assert np.asarray(actor.params["w"]).tobytes() == w.tobytes()
    # An anchor and the deltas since, which weigh as much at most.
    assert update.kinds[0] == "anchor"
    assert len(update.kinds) <= 50
    assert update.size_bytes <= 2.2 * w.nbytes
    # At most three anchors' worth of publications, of two blobs each, and two more of an anchor.
    assert most <= 3 * (2 * 50 + 1)


def test_a_sleeper_past_every_anchor_begins_with_an_anchor(weights, like, bits):
    store = sync.MemoryStore()
    config = sync.SyncConfig(anchor_every=2, ack_expiry_s=0.02)
    publisher = sync.Publisher(store, run_id="r", config=config)
    publisher.publish(weights(0), 0)
    sleeper, _ = follow(store, like)
    sleeper.prepare()  # says where it is
    for version in range(1, 9):
        publisher.publish(weights(version), version)
        time.sleep(0.005)
    assert min(int(key[-17:-5]) for key in store.keys("r/index/")) > 0
    assert store.keys("r/acks/") == []
    assert bits(sleeper.params) == bits(weights(0))
    assert sleeper.prepare()
    update = sleeper.flip()
    assert update is not None
    assert update.kinds[0] == "anchor"
    assert bits(sleeper.params) == bits(weights(8))
    assert sleeper.problem is None


def test_a_living_subscriber_that_lags_keeps_its_way(weights, like):
    store = sync.MemoryStore()
    config = sync.SyncConfig(anchor_every=2, keep_anchors=1, shortcut_after=0)
    publisher = sync.Publisher(store, run_id="r", config=config)
    publisher.publish(weights(0, 1 << 18), 0)
    like = jax.eval_shape(lambda: weights(0, 1 << 18))
    actor, _ = follow(store, like)
    actor.prepare()
    for version in range(1, 7):
        publisher.publish(weights(version, 1 << 18), version)
    assert store.keys("r/index/")[0] == "r/index/000000000000.json"
    assert actor.prepare()
    update = actor.flip()
    assert update is not None
    assert update.kinds == ("delta",) * 6
    actor.prepare()
    for version in range(7, 9):
        publisher.publish(weights(version, 1 << 18), version)
    assert store.keys("r/index/")[0] == "r/index/000000000006.json"


def test_who_stayed_behind_gets_one_delta_in_place_of_many(weights, bits):
    like = jax.eval_shape(lambda: weights(0, 1 << 18))
    store = sync.MemoryStore()
    publisher = sync.Publisher(store, run_id="r", config=sync.SyncConfig(shortcut_after=3))
    publisher.publish(weights(0, 1 << 18), 0)
    publisher.publish(weights(1, 1 << 18), 1)
    actor, _ = follow(store, like)
    actor.prepare()
    alone = 0
    for version in range(2, 8):
        alone += publisher.publish(weights(version, 1 << 18), version).delta_bytes
    assert any("-from-000000000001" in key for key in store.keys("r/index/"))
    assert actor.prepare()
    update = actor.flip()
    assert update is not None
    assert update.kinds[0] == "squash"
    assert len(update.kinds) <= 3
    assert update.size_bytes < alone
    assert bits(actor.params) == bits(weights(7, 1 << 18))
    # Once it has caught up nothing needs the shortcut.
    actor.prepare()
    for version in range(8, 60):
        publisher.publish(weights(version, 1 << 18), version)
        actor.prepare()
        actor.flip()
    assert not any("-from-" in key for key in store.keys("r/index/"))
    assert not any("squash" in key for key in store.keys("r/payloads/"))


def test_an_older_version_can_be_asked_for(weights, like, bits):
    store = sync.MemoryStore()
    publisher = sync.Publisher(store, run_id="r")
    for version in range(4):
        publisher.publish(weights(version), 10 * version)
    actor = sync.Subscriber(store, run_id="r", like=like)
    for wanted in (10, 30, 20):
        assert actor.prepare(wanted)
        actor.flip()
        assert actor.version == wanted
        assert bits(actor.params) == bits(weights(wanted // 10))
    assert not actor.prepare(20)
    assert not actor.prepare(15)


def test_an_anchor_comes_when_deltas_weigh_as_much_as_it_does(bits):
    store = sync.MemoryStore()
    publisher = sync.Publisher(store, run_id="r", config=sync.SyncConfig(anchor_every=1000))
    rng = np.random.default_rng(0)
    w = rng.normal(size=65536).astype(np.float32)
    chain, kinds = 0, []
    for version in range(12):
        w[rng.random(w.size) < 0.3] *= np.float32(1.001)
        published = publisher.publish({"w": jnp.asarray(w)}, version)
        kinds.append(published.kind)
        chain = 0 if published.kind == "anchor" else chain + published.delta_bytes
        assert chain <= w.nbytes
    assert 2 <= kinds.count("anchor") < 6
    noise = rng.integers(0, 1 << 32, 65536, np.uint32).view(np.float32)
    dense = publisher.publish({"w": jnp.asarray(noise)}, 12)
    assert (dense.kind, dense.delta_bytes) == ("anchor", 0)
    assert dense.density > 0.99
    _, update = follow(store, {"w": jax.ShapeDtypeStruct(w.shape, w.dtype)})
    assert update.kinds == ("anchor",)


# By sequence number: sizes of an anchor, of a delta, and of shortcuts by their base.
_SIZES = st.integers(0, 1 << 20)
_GRAPHS = st.lists(
    st.tuples(st.none() | _SIZES, st.none() | _SIZES, st.dictionaries(st.integers(0, 4), _SIZES)),
    min_size=1,
    max_size=6,
)


def name(sequence: int) -> str:
    return f"{sequence:064x}"


def payload(kind, sequence, size, base):
    key = f"{kind}-{sequence}-{base}-{size}"
    return Payload(kind=kind, key=key, size_bytes=size, sha256="0" * 64, base=base)


def manifest(sequence, payloads):
    return Manifest(
        run="r", sequence=sequence, version=sequence, previous=None, digest="", quantise=None,
        kept=(), payloads=tuple(payloads), id=name(sequence),
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(graph=_GRAPHS, have=st.none() | st.integers(0, 5), bad=st.sets(st.integers(0, 12)))
def test_the_route_is_the_cheapest_of_all(graph, have, bad):
    manifests, shortcuts = [], {}
    for s, (anchor, delta, squashes) in enumerate(graph):
        payloads = [] if anchor is None else [payload("anchor", s, anchor, None)]
        payloads += [payload("delta", s, delta, name(s - 1))] if s and delta is not None else []
        manifests.append(manifest(s, payloads))
        shortcuts[name(s)] = [
            payload("squash", s, size, name(base)) for base, size in squashes.items() if base < s
        ]
    have = None if have is None else name(have)
    keys = [p.key for m in manifests for p in m.payloads]
    bad = {key for place, key in enumerate(keys) if place in bad}
    goal = manifests[-1].id
    into = {
        m.id: [p for p in (*m.payloads, *shortcuts[m.id]) if p.key not in bad] for m in manifests
    }

    def ways(target):
        """Every way that ends at a publication."""
        if target == have:
            yield ()
        for last in into[target]:
            for before in [()] if last.base is None else ways(last.base):
                yield (*before, last)

    def cost(way):
        return sum(p.size_bytes + (1 << 16) for p in way)

    best = min(map(cost, ways(goal)), default=None)
    steps = route(manifests, goal, have=have, shortcuts=shortcuts, avoid=bad)
    if steps is None:
        assert best is None
        return
    at = have
    for step in steps:
        assert step.payload.base in (None, at)
        at = step.target.id
    assert at == goal
    assert cost([step.payload for step in steps]) == best


def test_acks_expire_by_the_publishers_clock():
    from jaxrl.sync.acks import Acker, Acks

    now = [0.0]
    store = sync.MemoryStore()
    acks = Acks(store, "r", expiry_s=10.0, clock=lambda: now[0])
    Acker(store, "r", "a", every_s=0.0).send(3)
    steady = Acker(store, "r", "b", every_s=0.0)
    for _ in range(4):
        steady.send(5)
        assert acks.live()["b"] == 5
        now[0] += 4
        time.sleep(0.002)
    assert acks.live() == {"b": 5}
    assert [key.split("/")[2] for key in store.keys("r/acks/")] == ["b"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"anchor_every": 0},
        {"keep_anchors": 0},
        {"dense_above": 1.5},
        {"ack_expiry_s": 0.0},
        {"shortcut_after": 1},
        {"dtype": jnp.int8},
    ],
)
def test_configs_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sync.SyncConfig(**wrong)
