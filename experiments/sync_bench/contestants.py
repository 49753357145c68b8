"""Ways to bring a version from a learner to an actor, each through the same store."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from experiments.delta_bench.codec import Codec
from experiments.delta_bench.pairs import Bits
from jaxrl import sync


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One version on its way.

    Attributes:
      size_bytes: that the actor fetched.
      send_s: seconds at the learner: comparing, encoding, writing.
      fetch_s: seconds until the bytes are at the actor.
      apply_s: seconds until the weights are rebuilt (and verified, where they are).
      pause_s: seconds for which generation cannot go on.
      requests: round trips of the actor, one after the other.
    """

    size_bytes: int
    send_s: float
    fetch_s: float
    apply_s: float
    pause_s: float
    requests: int

    @property
    def total_s(self) -> float:
        """From the learner's weights to the actor's."""
        return self.send_s + self.fetch_s + self.apply_s


class Contestant(Protocol):
    """A learner and an actor, and the store between them."""

    name: str

    def sync(self, index: int, new: Bits) -> Measured:
        """Brings a version to the actor.

        Args:
          index: 0, 1, …; versions come in order.
          new: bf16 weights as the uint16 of their bits.

        Raises:
          AssertionError: the actor has other bits than the learner.
        """
        ...


def as_arrays(bits: Bits) -> dict[str, jax.Array]:
    """Weights on the device."""
    arrays = {name: jax.numpy.asarray(x.view(ml_dtypes.bfloat16)) for name, x in bits.items()}
    return jax.block_until_ready(arrays)


class Ours:
    """`sync.Publisher` and `sync.Subscriber`."""

    name = "ours"

    def __init__(self, learner: sync.Store, actor: sync.Store, first: Bits) -> None:
        self._publisher = sync.Publisher(learner, run_id="ours")
        like = jax.eval_shape(lambda: as_arrays(first))
        self._subscriber = sync.Subscriber(actor, run_id="ours", like=like, heartbeat_s=1e6)

    def sync(self, index: int, new: Bits) -> Measured:
        weights = as_arrays(new)
        published = self._publisher.publish(weights, index)
        if not self._subscriber.prepare():
            raise AssertionError(f"version {index} did not arrive: {self._subscriber.problem}")
        update = self._subscriber.flip()
        assert update is not None, "what was prepared can be flipped"
        _check(self.name, self._subscriber.params, new)
        return Measured(
            size_bytes=update.size_bytes,
            send_s=published.seconds,
            fetch_s=update.fetch_s,
            apply_s=update.apply_s,
            pause_s=update.pause_s,
            # The listing and beside it the manifest, then each payload.
            requests=1 + len(update.kinds),
        )


class Peer:
    """A codec of `experiments.delta_bench`, with nothing around it: no versions, no checks."""

    def __init__(
        self, name: str, codec: Codec, learner: sync.Store, actor: sync.Store, threads: int
    ) -> None:
        self.name = name
        self._codec, self._threads = codec, threads
        self._learner, self._actor = learner, actor
        self._sent: Bits | None = None
        self._held: Bits | None = None

    def sync(self, index: int, new: Bits) -> Measured:
        key = f"{index:06d}"
        started = time.perf_counter()
        if self._sent is None:
            payload = dense_bytes(new)
        else:
            payload = bytes(self._codec.encode(self._sent, new, self._threads))
        self._learner.put(key, payload)
        sent = time.perf_counter()
        assert key in self._actor.keys("")
        data = self._actor.get(key)
        fetched = time.perf_counter()
        if self._held is None:
            held: Mapping[str, Any] = from_dense(data, new)
        else:
            held = self._codec.apply(self._held, data, self._threads)
        arrays = as_arrays(held)
        applied = time.perf_counter()
        _check(self.name, arrays, new)
        self._sent, self._held = new, held
        return Measured(
            size_bytes=len(data),
            send_s=sent - started,
            fetch_s=fetched - sent,
            apply_s=applied - fetched,
            pause_s=applied - fetched,
            requests=2,
        )


class Dense:
    """All weights, each time."""

    name = "dense"

    def __init__(self, learner: sync.Store, actor: sync.Store) -> None:
        self._learner, self._actor = learner, actor

    def sync(self, index: int, new: Bits) -> Measured:
        key = f"{index:06d}"
        started = time.perf_counter()
        self._learner.put(key, dense_bytes(new))
        sent = time.perf_counter()
        assert key in self._actor.keys("")
        data = self._actor.get(key)
        fetched = time.perf_counter()
        arrays = as_arrays(from_dense(data, new))
        applied = time.perf_counter()
        _check(self.name, arrays, new)
        return Measured(
            size_bytes=len(data),
            send_s=sent - started,
            fetch_s=fetched - sent,
            apply_s=applied - fetched,
            pause_s=applied - fetched,
            requests=2,
        )


def dense_bytes(bits: Bits) -> bytes:
    """All weights, one behind the other."""
    return np.concatenate([x.reshape(-1) for x in bits.values()]).tobytes()


def from_dense(data: bytes, like: Bits) -> dict[str, np.ndarray]:
    """What `dense_bytes` wrote, in the shapes of `like`."""
    flat, found, at = np.frombuffer(data, np.uint16), {}, 0
    for name, x in like.items():
        found[name] = flat[at : at + x.size].reshape(x.shape)
        at += x.size
    return found


def _check(who: str, found: Mapping[str, Any], wanted: Bits) -> None:
    for name, x in wanted.items():
        if np.asarray(found[name]).tobytes() != x.tobytes():
            raise AssertionError(f"{who}: {name} did not arrive bit for bit")
