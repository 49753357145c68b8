"""Publisher and subscriber through a store: every version arrives bit for bit, or not at all."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl import sync


@pytest.fixture(params=["memory", "folder", "memory://"])
def store(request, tmp_path):
    if request.param == "memory":
        return sync.MemoryStore()
    return sync.FsspecStore(tmp_path if request.param == "folder" else f"memory://{tmp_path.name}")


def test_an_actor_that_keeps_up_has_every_version_bit_for_bit(store, weights, like, bits):
    publisher = sync.Publisher(store, run_id="r", config=sync.SyncConfig(anchor_every=4))
    actor = sync.Subscriber(store, run_id="r", like=like)
    kinds = []
    for version in range(10):
        published = publisher.publish(weights(version), version * 10)
        assert actor.prepare()
        update = actor.flip()
        assert update is not None
        kinds.append((published.kind, *update.kinds))
        assert actor.version == version * 10
        assert bits(actor.params) == bits(weights(version))
    assert kinds == [
        ("anchor", "anchor"), ("delta", "delta"), ("delta", "delta"), ("delta", "delta"),
        ("anchor", "delta"), ("delta", "delta"), ("delta", "delta"), ("delta", "delta"),
        ("anchor", "delta"), ("delta", "delta"),
    ]  # fmt: skip


def test_the_old_version_serves_until_the_flip(store, weights, like, bits):
    publisher = sync.Publisher(store, run_id="r")
    actor = sync.Subscriber(store, run_id="r", like=like)
    with pytest.raises(sync.SyncError, match="no version serves yet"):
        _ = actor.params
    assert not actor.prepare()
    publisher.publish(weights(0), 0)
    assert actor.prepare()
    assert actor.version is None
    actor.flip()
    publisher.publish(weights(1), 1)
    assert actor.prepare()
    assert actor.version == 0
    assert bits(actor.params) == bits(weights(0))
    actor.flip()
    assert actor.version == 1
    assert actor.flip() is None


def test_a_version_published_is_the_cast_of_the_master_weights(store, weights, bits):
    publisher = sync.Publisher(store, run_id="r", config=sync.SyncConfig(dtype=jnp.bfloat16))
    expected = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, weights(3)
    )
    publisher.publish(weights(2), 2)
    publisher.publish(weights(3), 3)
    actor = sync.Subscriber(store, run_id="r", like=expected)
    assert actor.prepare()
    actor.flip()
    assert bits(actor.params) == bits(expected)


def test_donating_the_parameters_after_publishing_does_no_harm(weights, like, bits):
    store = sync.MemoryStore()
    publisher = sync.Publisher(store, run_id="r")
    params = weights(0)
    publisher.publish(params, 0)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    publisher.publish(weights(1), 1)
    actor = sync.Subscriber(store, run_id="r", like=like)
    actor.prepare()
    actor.flip()
    assert bits(actor.params) == bits(weights(1))
