"""Whatever happens to the blobs or the store: what serves is a published version, bit for bit."""

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrl import sync
from jaxrl.sync import publisher as publisher_module
from jaxrl.sync import subscriber as subscriber_module
from kernels import sparse_delta

_ROOT = Path(__file__).parents[3]
_FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def published(weights, versions: int, **config) -> sync.MemoryStore:
    """A store with versions 0 … versions − 1 of run r."""
    store = sync.MemoryStore()
    publisher = sync.Publisher(store, run_id="r", config=sync.SyncConfig(**config))
    for version in range(versions):
        publisher.publish(weights(version), version)
    return store


def copy(store: sync.Store) -> sync.MemoryStore:
    new = sync.MemoryStore()
    for key in store.keys(""):
        new.put(key, store.get(key))
    return new


def one(store: sync.Store, *parts: str) -> str:
    """The only key that has all the parts."""
    (key,) = [key for key in store.keys("") if all(part in key for part in parts)]
    return key


def at_version(store, like, version=None, **options) -> sync.Subscriber:
    actor = sync.Subscriber(store, run_id="r", like=like, **options)
    assert actor.prepare(version)
    actor.flip()
    return actor


def flipped(data: bytes, place: float = 0.5) -> bytes:
    at = int(place * (len(data) - 1))
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


@pytest.fixture(scope="module")
def eight():
    """Seven versions with anchors at 0, 3 and 6, every manifest kept, and their bits."""
    rng = np.random.default_rng(1)
    store = sync.MemoryStore()
    config = sync.SyncConfig(anchor_every=3, keep_anchors=9)
    publisher = sync.Publisher(store, run_id="r", config=config)
    w = rng.normal(size=2048).astype(np.float32)
    versions = []
    for version in range(8):
        w[rng.integers(0, w.size, 20)] *= np.float32(1.5)
        publisher.publish({"w": jnp.asarray(w)}, version)
        versions.append(w.tobytes())
    return store, versions


@settings(max_examples=40, deadline=None, suppress_health_check=_FIXTURES)
@given(data=st.data())
def test_blobs_lost_late_damaged_or_in_any_order_never_serve_wrong_weights(eight, data):
    """Each look of the actor sees any mixture of good, missing, cut and damaged blobs."""
    whole, versions = eight
    keys = whole.keys("")
    seen = sync.MemoryStore()
    like = {"w": jax.ShapeDtypeStruct((2048,), jnp.float32)}
    actor = sync.Subscriber(seen, run_id="r", like=like)
    last = -1
    for _ in range(data.draw(st.integers(1, 3))):
        for key in data.draw(st.sets(st.sampled_from(keys))):
            match data.draw(st.sampled_from(["good", "good", "gone", "cut", "flipped", "other"])):
                case "good":
                    seen.put(key, whole.get(key))
                case "gone":
                    seen.delete(key)
                case "cut":
                    seen.put(key, whole.get(key)[: data.draw(st.integers(0, 200))])
                case "flipped":
                    seen.put(key, flipped(whole.get(key), data.draw(st.floats(0, 1))))
                case "other":
                    seen.put(key, whole.get(data.draw(st.sampled_from(keys))))
        actor.prepare()
        actor.flip()
        if actor.version is not None:
            assert actor.version >= last
            assert np.asarray(actor.params["w"]).tobytes() == versions[actor.version]
            last = actor.version
    for key in keys:
        seen.put(key, whole.get(key))
    actor.prepare()
    actor.flip()
    assert actor.version == 7
    assert np.asarray(actor.params["w"]).tobytes() == versions[7]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flipped, "damaged"),
        (lambda data: data[:-9], "damaged"),
        (lambda data: b"", "damaged: 0 bytes"),
        (None, "not in the store"),
    ],
)
def test_a_bad_delta_leaves_the_old_version_and_says_why(
    weights, like, bits, caplog, damage, reason
):
    store = published(weights, 3)
    actor = at_version(store, like, 1)
    key = one(store, "payloads", "000000000002-delta")
    good = store.get(key)
    store.delete(key) if damage is None else store.put(key, damage(good))
    with caplog.at_level(logging.WARNING):
        assert not actor.prepare()
    assert actor.flip() is None
    assert actor.version == 1
    assert bits(actor.params) == bits(weights(1))
    assert reason in str(actor.problem)
    assert reason in caplog.text
    assert "version 1 goes on serving" in caplog.text
    store.put(key, good)  # it was on its way, or is written again
    assert actor.prepare()
    actor.flip()
    assert actor.problem is None
    assert bits(actor.params) == bits(weights(2))


def test_a_bad_delta_is_passed_by_an_anchor(weights, like, bits):
    store = published(weights, 5, anchor_every=4)
    actor = at_version(store, like, 2)
    store.delete(one(store, "payloads", "000000000003-delta"))
    assert actor.prepare()
    update = actor.flip()
    assert update is not None
    assert update.kinds == ("anchor",)
    assert bits(actor.params) == bits(weights(4))


def test_payloads_under_each_others_keys_are_refused(weights, like, bits):
    store = published(weights, 4)
    actor = at_version(store, like, 1)
    two, three = (one(store, "payloads", f"00000000000{n}-delta") for n in (2, 3))
    swapped = store.get(two), store.get(three)
    store.put(three, swapped[0])
    store.put(two, swapped[1])
    assert not actor.prepare()
    assert bits(actor.params) == bits(weights(1))


def test_a_version_delivered_twice_is_applied_once(weights, like):
    store = published(weights, 3)
    actor = at_version(store, like)
    for key in store.keys(""):
        store.put(key, store.get(key))
    assert not actor.prepare()
    assert actor.flip() is None
    assert actor.problem is None


def test_versions_of_another_run_are_refused(weights, like, caplog):
    store = published(weights, 3)
    other = sync.Publisher(store, run_id="other")
    for version in range(5):
        other.publish(weights(version + 7), version)
    for number in (3, 4):
        manifest = store.get(f"other/index/00000000000{number}.json")
        store.put(f"r/index/00000000000{number}.json", manifest)
    with caplog.at_level(logging.WARNING):
        actor = at_version(store, like)
    assert actor.version == 2
    assert "it is of run 'other', not of 'r'" in caplog.text


def test_a_manifest_of_another_history_leads_nowhere(weights, like, bits):
    """Two stores of one run that parted at version 2: their chains cannot be mixed."""
    ours = published(weights, 2)
    theirs = copy(ours)
    for store, shift in ((ours, 0), (theirs, 20)):
        publisher = sync.Publisher(store, run_id="r")
        publisher.publish(weights(1), 1)  # the very weights of the newest: goes on with a delta
        publisher.publish(weights(2 + shift), 2)
        publisher.publish(weights(3 + shift), 3)
    for key in theirs.keys(""):
        if "000000000004" in key:  # their last publication, which follows another version 2
            ours.put(key, theirs.get(key))
    actor = at_version(ours, like)
    assert actor.version == 2
    assert bits(actor.params) == bits(weights(2))


def test_weights_of_another_model_are_refused_aloud(weights):
    store = published(weights, 2)
    other = {"layer": {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}, "b": jnp.zeros(3, int)}
    with pytest.raises(sparse_delta.WrongModel, match=r"'layer/w' float32\[64, 64\]"):
        sync.Subscriber(store, run_id="r", like=other).prepare()


def test_damaged_memory_is_noticed_and_replaced(weights, like, bits, monkeypatch):
    """The weights that serve are not any more what they were when they were verified."""
    store = published(weights, 3, anchor_every=2)
    actor = at_version(store, like, 1)
    assert actor._serving is not None
    spoilt = {"layer": {"w": weights(1)["layer"]["w"].at[0, 0].set(7.0)}, "b": weights(1)["b"]}
    fields = {"manifest": actor._serving.manifest, "digest": actor._serving.digest}
    actor._serving = subscriber_module._Weights(params=spoilt, usable=spoilt, **fields)
    assert actor.prepare()
    update = actor.flip()
    assert update is not None
    assert update.kinds == ("anchor",)
    assert bits(actor.params) == bits(weights(2))
    assert "damaged" in str(actor.problem)


class Failing(sync.MemoryStore):
    """Fails in the n-th request from now on, before or after it has done what was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.after, self.error = -1, False, sync.StoreError("the cable is cut")

    def _fail(self) -> bool:
        self.left -= 1
        return self.left == -1

    def put(self, key: str, data: bytes) -> None:
        fail = self._fail()
        if not fail or self.after:
            super().put(key, data)
        if fail:
            raise self.error

    def keys(self, prefix: str) -> list[str]:
        if self._fail():
            raise self.error
        return super().keys(prefix)

    def delete(self, key: str) -> None:
        if self._fail():
            raise self.error
        super().delete(key)


@settings(max_examples=30, deadline=None, suppress_health_check=_FIXTURES)
@given(
    failures=st.lists(
        st.tuples(st.integers(0, 9), st.booleans()) | st.none(), min_size=1, max_size=5
    )
)
def test_a_store_that_fails_anywhere_never_breaks_the_chain(weights, like, bits, failures):
    store = Failing()
    config = sync.SyncConfig(anchor_every=3, keep_anchors=9)
    publisher = sync.Publisher(store, run_id="r", config=config)
    publisher.publish(weights(0), 0)
    follower = at_version(store, like)
    for version, failure in enumerate(failures, 1):
        store.left, store.after = failure or (-1, False)
        try:
            publisher.publish(weights(version), version)
        except sync.StoreError:
            store.left = -1
            publisher.publish(weights(version), version)  # the same again
        store.left = -1
        assert publisher.version == version
        follower.prepare()
        follower.flip()
        for actor in (follower, at_version(store, like)):
            assert actor.version == version
            assert bits(actor.params) == bits(weights(version))
            assert actor.problem is None


def test_the_baseline_is_what_was_published_not_what_was_tried(weights, like, bits):
    store = Failing()
    publisher = sync.Publisher(store, run_id="r")
    publisher.publish(weights(0), 0)
    actor = at_version(store, like)
    store.left, store.error = 1, sync.StoreFull("no room; free some space")
    with pytest.raises(sync.StoreFull, match="free some space"):
        publisher.publish(weights(1), 1)
    assert publisher.version == 0
    assert not actor.prepare()
    published = publisher.publish(weights(2), 2)
    # Both steps' changes are in the one delta.
    assert published.density == pytest.approx((2 * 40 + 3) / (4096 + 3), rel=0.1)
    assert actor.prepare()
    actor.flip()
    assert bits(actor.params) == bits(weights(2))


def test_a_full_disk_loses_nothing(tmp_path, weights, like, bits, monkeypatch):
    store = sync.FsspecStore(tmp_path)
    publisher = sync.Publisher(store, run_id="r")
    publisher.publish(weights(0), 0)
    actor = at_version(store, like)
    before = store.keys("")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(sync.StoreFull, match="free some space, and publish again"):
            publisher.publish(weights(1), 1)
    assert [key for key in store.keys("") if "acks" not in key] == before
    assert not actor.prepare()
    publisher.publish(weights(1), 1)
    assert actor.prepare()
    actor.flip()
    assert bits(actor.params) == bits(weights(1))


def test_two_learners_of_one_run_are_told(weights):
    store = sync.MemoryStore()
    first, second = (sync.Publisher(store, run_id="r") for _ in range(2))
    first.publish(weights(0), 0)
    second.publish(weights(5), 5)
    with pytest.raises(sync.Superseded, match="two learners must not share a run_id"):
        first.publish(weights(1), 1)
    second.publish(weights(6), 6)


def test_versions_have_to_rise(weights):
    publisher = sync.Publisher(sync.MemoryStore(), run_id="r")
    publisher.publish(weights(0), 4)
    for version in (4, 3, -1):
        with pytest.raises(ValueError, match=r"must be at least 0 and rise.*new Publisher"):
            publisher.publish(weights(1), version)


@pytest.mark.parametrize("run", ["", "a/b", "..", "a b"])
def test_names_that_cannot_stand_in_a_key_are_refused(run):
    with pytest.raises(ValueError, match="run_id must be 1 to 100 letters"):
        sync.Publisher(sync.MemoryStore(), run_id=run)
    with pytest.raises(ValueError, match="name must be 1 to 100 letters"):
        sync.Subscriber(sync.MemoryStore(), run_id="r", like={}, name=run)


def test_a_new_publisher_goes_on_with_the_chain(weights, like, bits):
    store = published(weights, 3)
    actor = at_version(store, like)
    again = sync.Publisher(store, run_id="r")
    # Restored from a checkpoint of version 2, it publishes just that: nothing has changed.
    assert again.publish(weights(2), 2).kind == "delta"
    assert again.publish(weights(3), 3).kind == "delta"
    assert actor.prepare()
    update = actor.flip()
    assert update is not None
    assert update.kinds == ("delta", "delta")
    assert bits(actor.params) == bits(weights(3))


def test_a_learner_that_went_back_takes_its_actors_along(weights, like, bits):
    """Versions 3 and 4 are lost with the learner; it repeats version 3, to another end."""
    store = published(weights, 5)
    actor = at_version(store, like)
    assert actor.version == 4
    again = sync.Publisher(store, run_id="r")
    assert again.publish(weights(30), 3).kind == "anchor"
    assert actor.prepare()
    update = actor.flip()
    assert update is not None
    assert (update.version, update.previous, update.kinds) == (3, 4, ("anchor",))
    assert bits(actor.params) == bits(weights(30))
    assert again.publish(weights(31), 4).kind == "delta"


def test_a_lost_manifest_is_written_again(weights, like):
    store = sync.MemoryStore()
    publisher = sync.Publisher(store, run_id="r")
    for version in range(2):
        publisher.publish(weights(version), version)
    store.delete("r/index/000000000001.json")
    publisher.publish(weights(2), 2)
    assert at_version(store, like).version == 2


_KILLED = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from jaxrl import sync

folder, where = sys.argv[1:]

class Mortal(sync.FsspecStore):
    def put(self, key, data):
        if where in key and "000000000002" in key:
            if where == "payloads":  # half of it is on disk
                (path := self._path(key)) and os.makedirs(os.path.dirname(path), exist_ok=True)
                open(os.path.join(os.path.dirname(path), ".half"), "wb").write(data[:50])
            os.kill(os.getpid(), signal.SIGKILL)
        super().put(key, data)

w = np.random.default_rng(0).normal(size=4096).astype(np.float32)
publisher = sync.Publisher(Mortal(folder), run_id="r")
for version in range(3):
    w[version] = version
    publisher.publish({"w": jnp.asarray(w)}, version)
"""


@pytest.mark.parametrize("where", ["payloads", "index"])
def test_a_learner_killed_while_it_publishes(tmp_path, where, bits):
    """SIGKILL in the middle of a payload, and between payload and manifest."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), where],
        cwd=_ROOT,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    store = sync.FsspecStore(tmp_path)
    like = {"w": jax.ShapeDtypeStruct((4096,), jnp.float32)}
    w = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    w[:2] = 0, 1
    actor = at_version(store, like)
    assert actor.version == 1
    assert np.asarray(actor.params["w"]).tobytes() == w.tobytes()
    # The learner comes back from the checkpoint of version 1, and takes another step.
    again = sync.Publisher(store, run_id="r", config=sync.SyncConfig(keep_anchors=1))
    w[2] = 20
    assert again.publish({"w": jnp.asarray(w)}, 2).kind == "anchor"
    assert actor.prepare()
    actor.flip()
    assert actor.version == 2
    assert np.asarray(actor.params["w"]).tobytes() == w.tobytes()
    named = b"".join(store.get(key) for key in store.keys("r/index/")).decode()
    # What the killed one had written is gone.
    assert all(key in named for key in store.keys("r/payloads/"))


def test_published_says_what_it_cost(weights):
    publisher = sync.Publisher(sync.MemoryStore(), run_id="r")
    first = publisher.publish(weights(0), 0)
    second = publisher.publish(weights(1), 1)
    assert isinstance(second, publisher_module.Published)
    assert (first.delta_bytes, first.density) == (0, 1.0)
    assert second.size_bytes == second.delta_bytes < first.size_bytes
    assert second.density == pytest.approx(43 / 4099, rel=0.1)
    assert second.seconds >= second.encode_s > 0
