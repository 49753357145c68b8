"""A payload that is damaged where it lies: who cannot use it says so, and gets another way."""

import logging

import jax
import pytest

from jaxrl import sync
from jaxrl.sync.index import Index
from jaxrl.sync.rebuild import rebuild
from jaxrl.sync.routes import route
from kernels import sparse_delta


def one(store, *parts):
    (key,) = [key for key in store.keys("") if all(part in key for part in parts)]
    return key


def spoil(store, key):
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 16
    store.put(key, bytes(data))


def complaints(store):
    return [key for key in store.keys("r/acks/") if "/damaged-" in key]


@pytest.fixture
def three(weights):
    """A store with versions 0 to 2, of which only the first has an anchor, and its publisher."""
    store = sync.MemoryStore()
    publisher = sync.Publisher(store, run_id="r")
    for version in range(3):
        publisher.publish(weights(version), version)
    return store, publisher


def test_an_actor_says_once_that_an_anchor_is_damaged(three, like, caplog):
    store, _ = three
    spoil(store, one(store, "payloads", "anchor"))
    joins = sync.Subscriber(store, run_id="r", like=like, name="joins")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not joins.prepare()
    assert caplog.text.count("version none goes on serving") == 1
    assert "damaged" in str(joins.problem)
    (complaint,) = complaints(store)
    assert complaint.startswith("r/acks/joins/damaged-000000000000-anchor-")


@pytest.mark.parametrize("version", [2, 3], ids=["the same version", "the next version"])
def test_the_publisher_makes_a_way_past_it(three, weights, like, bits, version, caplog):
    store, publisher = three
    follows = sync.Subscriber(store, run_id="r", like=like, name="follows")
    assert follows.prepare()
    follows.flip()
    spoil(store, one(store, "payloads", "anchor"))
    joins = sync.Subscriber(store, run_id="r", like=like, name="joins")
    assert not joins.prepare()
    assert publisher.damaged()
    assert "an anchor will lead past it" in caplog.text
    published = publisher.publish(weights(version), version, anchor=version == 2)
    assert (published.kind, published.version) == ("anchor", version)
    assert complaints(store) == []
    assert not publisher.damaged()
    for actor, kinds in ((joins, ("anchor",)), (follows, ("delta",))):
        assert actor.prepare(), actor.problem
        update = actor.flip()
        assert (update.version, update.kinds) == (version, kinds)
        assert actor.problem is None
        assert bits(actor.params) == bits(weights(version))


def test_damage_on_the_way_to_one_actor_costs_nothing(three, like):
    """What lies in the store is good: the complaint is dropped, and no anchor is made."""
    store, publisher = three

    class Lossy(sync.MemoryStore):
        def __init__(self):
            self.bad = True

        def get(self, key):
            data = store.get(key)
            return data[:-1] if self.bad and "anchor" in key else data

        put, keys, delete = store.put, store.keys, store.delete

    seen = Lossy()
    joins = sync.Subscriber(seen, run_id="r", like=like, name="joins")
    assert not joins.prepare()
    assert len(complaints(store)) == 1
    assert not publisher.damaged()
    assert complaints(store) == []
    seen.bad = False
    assert joins.prepare()


def test_a_version_is_published_again_only_with_an_anchor(three, weights):
    _, publisher = three
    with pytest.raises(ValueError, match="must be at least 0 and rise"):
        publisher.publish(weights(2), 2)
    with pytest.raises(ValueError, match="must be at least 0 and rise"):
        publisher.publish(weights(1), 1, anchor=True)


def test_a_chain_keeps_two_versions_in_memory_not_all(three, weights, like, bits):
    """What lies between is given up as the next stands; what was given stays, shared leaves too."""
    store, _ = three
    index = Index(store, "r")
    index.refresh()
    goal, first = index.manifests[2], index.manifests[0]
    steps = route(index.manifests.values(), goal.id, have=first.id)
    given = jax.tree.map(jax.numpy.asarray, weights(0))
    known = sparse_delta.digest(given)
    between = []
    real = sparse_delta.apply

    def watched(old, *args, **kwargs):
        new = real(old, *args, **kwargs)
        between.append((new, kwargs["donate"]))
        return new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_delta, "apply", watched)
        params, _ = rebuild(given, known, steps, [store.get(s.payload.key) for s in steps])
    assert bits(params) == bits(weights(2))
    assert bits(given) == bits(weights(0))
    (middle, first_donates), (_, second_donates) = between
    assert (first_donates, second_donates) == (False, True)
    assert middle["layer"]["w"].is_deleted()
