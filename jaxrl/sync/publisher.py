"""The learner's end: numbered versions of the weights, as deltas and anchors."""

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxrl.sync import trees
from jaxrl.sync.chain import Chain, State
from jaxrl.sync.config import SyncConfig
from jaxrl.sync.errors import SyncError
from jaxrl.sync.manifest import Kind, Manifest, checked_name, read_manifest, seal
from jaxrl.sync.multihost import on_first, whole, worst
from jaxrl.sync.stores import Store
from kernels import sparse_delta

Local = Callable[[], Any]
Sections = Generator[Local, Any, "Published"]
"""A publication that pauses wherever the next thing to do is this process's own affair; see
`Publisher.sections`."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What one publication cost.

    Attributes:
      version: as given.
      sequence: its number in the run, which counts publications.
      kind: "anchor" where an anchor is among the payloads, else "delta".
      size_bytes: of all payloads.
      delta_bytes: of the delta, which is all that an actor that kept up fetches; 0 without one.
      density: share of the elements that changed; 1 where there was nothing to compare with.
      cast_s: seconds until the cast or quantised copy of the parameters stood.
      encode_s: seconds of encoding.
      store_s: seconds of writing to the store.
      tidy_s: seconds of shortcuts and garbage collection, after the version was there.
    """

    version: int
    sequence: int
    kind: Literal["anchor", "delta"]
    size_bytes: int
    delta_bytes: int
    density: float
    cast_s: float
    encode_s: float
    store_s: float
    tidy_s: float

    @property
    def seconds(self) -> float:
        """Seconds of all of the call."""
        return self.cast_s + self.encode_s + self.store_s + self.tidy_s


@dataclass(frozen=True)
class _Version:
    """Weights, their digest, and the manifest by which they were published."""

    manifest: Manifest
    weights: Any
    digest: sparse_delta.TreeDigest


@dataclass(frozen=True)
class _Coded:
    """The payloads of one version by kind, and what they say of it."""

    payloads: Mapping[Kind, bytes]
    base: str | None
    digest: sparse_delta.TreeDigest
    density: float


class Publisher:
    """Publishes versions of the weights of one run; one learner at a time.

    The difference is taken from the version that was *published* last: what is not in the store
    does not count. A new publisher on a store that has versions already continues their chain:
    with a delta if it is given the very weights of the newest, else with an anchor.

    Where the learner has several processes each of them makes a publisher and they call `publish`
    together; the first one speaks with the store.

    >>> from jaxrl.sync import MemoryStore
    >>> publisher = Publisher(MemoryStore(), run_id="docs")
    >>> publisher.publish({"w": jnp.ones(4096)}, version=0).kind
    'anchor'
    >>> publisher.publish({"w": jnp.ones(4096).at[7].set(2.0)}, version=1).kind
    'delta'
    """

    def __init__(
        self,
        store: Store,
        *,
        run_id: str,
        config: SyncConfig | None = None,
        receivers: Sequence[Any] = (),
    ) -> None:
        """Prepares to publish; writes nothing yet.

        Args:
          store: where versions go.
          run_id: names the run; subscribers give the same.
          config: how; defaults where None.
          receivers: trees like the parameters of the subscribers' shardings. Needed where an
            actor's arrays lie over several processes; elsewhere spares them some work.

        Raises:
          ValueError: `run_id` cannot stand in a key.
        """
        self.run_id = checked_name("run_id", run_id)
        self.config = config or SyncConfig()
        self._receivers = tuple(receivers)
        self._chain = Chain(store, run_id, self.config)
        self._last: _Version | None = None
        self._uncertain: _Version | None = None
        self._lock = threading.Lock()

    @property
    def version(self) -> int | None:
        """The version that this publisher published last; None before its first."""
        return None if self._last is None else self._last.manifest.version

    def publish(self, params: Any, version: int, *, anchor: bool = False) -> Published:
        """Makes a version available; when this returns, it is.

        After a failure the versions before are as they were, and the next call takes the difference
        from the last that is in the store. The same version may be given again.

        Args:
          params: pytree of arrays, sharded or not; copied, so it may be donated afterwards.
          version: what the learner calls them; above all that this publisher has published.
          anchor: publish an anchor, whatever the config says of this version: for subscribers to
            whom the last one proved damaged. The version may then be the last one again.

        Raises:
          ValueError: a version that is not above the last.
          StoreError: the store failed.
          Superseded: another publisher has published to this run since.
        """
        sections = self.sections(params, version, anchor=anchor)
        return inline(sections, next(sections))

    def sections(self, params: Any, version: int, *, anchor: bool = False) -> Sections:
        """`publish`, cut into sections so that other work may run beside it.

        What it yields concerns this process alone (coding, the store) and may run in any thread;
        the value, or what was raised, is sent back. All between may be collective: the learner's
        processes resume it together, in the same place of their programs, and never beside
        another computation of theirs. At the first yield `params` are copied, or will be before
        anything that is dispatched later can change them: they may be donated.

        Args:
          params: see `publish`.
          version: see `publish`.
          anchor: see `publish`.

        Yields:
          What to call next, in any thread, while this publisher is locked: no other publication
          begins before this one has ended or is closed.

        Returns:
          What the publication cost.

        Raises:
          Exception: see `publish`; from whichever section it happens in.
        """
        with self._lock:
            times = [time.perf_counter()]
            state = self._open()
            self._check(version, again=anchor or state.landed is not None)
            weights = trees.actors_view(params, self.config)
            receivers = trees.receivers_of(self._receivers, params, self.config)
            last = self._last or self._continued(weights, state)

            def encode() -> tuple[bytes | None, bytes | None]:
                jax.block_until_ready(weights)
                times.append(time.perf_counter())
                delta = None if last is None else _delta(last, weights, version, receivers)
                due = anchor or state.repair or last is None or self._anchor_by_count(state)
                return delta, _anchor(weights, version, receivers) if due else None

            parts = yield from _locally(encode)
            coded = self._coded(weights, version, state, last, parts, receivers)
            times.append(time.perf_counter())
            manifest = self._draft(version, coded)
            # Should the store fail, the manifest may be there all the same; the next call looks.
            self._uncertain = _Version(manifest, weights, coded.digest)

            def write() -> None:
                self._chain.write(manifest, coded.payloads)
                times.append(time.perf_counter())
                template = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), weights)
                self._chain.tidy(template, receivers)

            yield from _on_first_locally(write)
            self._last, self._uncertain = self._uncertain, None
            # Where another process wrote, this one saw it only when all was done.
            times += [time.perf_counter()] * (5 - len(times))
        return _cost(manifest, coded, np.diff(times).tolist())

    def damaged(self) -> bool:
        """Whether a payload that a subscriber complained of is indeed not what was written.

        The next version then has an anchor. Called in the learner's first process, while none is
        being published.

        Raises:
          StoreError: the store failed.
        """
        with self._lock:
            return self._chain.damaged()

    def _open(self) -> State:
        """What the store says, with a publication that had failed but is there as the last."""

        def act() -> dict[str, Any]:
            state = self._chain.open()
            newest = None if state.newest is None else seal(state.newest)[1].decode()
            return asdict(state) | {"newest": newest}

        found = on_first(act)
        newest = None if found["newest"] is None else read_manifest(found["newest"].encode())
        state = State(**(found | {"newest": newest}))
        if self._uncertain is not None and self._uncertain.manifest.id == state.landed:
            self._last = self._uncertain
        self._uncertain = None
        return state

    def _check(self, version: int, *, again: bool) -> None:
        last = self.version
        too_low = last is not None and (version < last or (version == last and not again))
        if version < 0 or too_low:
            raise ValueError(
                f"versions must be at least 0 and rise: {version=} after {last}; a learner that "
                "went back to a checkpoint begins with a new Publisher"
            )

    def _coded(
        self,
        weights: Any,
        version: int,
        state: State,
        last: _Version | None,
        parts: tuple[bytes | None, bytes | None],
        receivers: Sequence[Any] | None,
    ) -> _Coded:
        """The payloads of a version, joined from the processes' parts."""
        dense = trees.size_bytes(weights)
        payloads: dict[Kind, bytes] = {}
        density, digest = 1.0, None
        delta_part, anchor_part = parts
        if delta_part is not None:
            delta = whole(delta_part)
            info = sparse_delta.inspect(delta)
            density, digest = info.density, info.target_digest
            if len(delta) <= self.config.dense_above * dense:
                payloads["delta"] = delta
        if anchor_part is None and self._anchor_by_size(state, payloads, dense):
            anchor_part = _anchor(weights, version, receivers)
        if anchor_part is not None:
            payloads["anchor"] = whole(anchor_part)
            digest = digest or sparse_delta.inspect(payloads["anchor"]).target_digest
        assert digest is not None, "a version without a delta has an anchor"
        return _Coded(payloads, last and last.manifest.id, digest, density)

    def _continued(self, weights: Any, state: State) -> _Version | None:
        """The newest version in the store, if these are its very weights."""
        if state.newest is None:
            return None
        digest = trees.digest(weights)
        alike = digest.root.hex() == state.newest.digest
        return _Version(state.newest, weights, digest) if alike else None

    def _anchor_by_count(self, state: State) -> bool:
        return not state.since_anchor or state.since_anchor >= self.config.anchor_every

    def _anchor_by_size(self, state: State, payloads: Mapping[Kind, bytes], dense: int) -> bool:
        return "delta" not in payloads or state.chain_bytes + len(payloads["delta"]) > dense

    def _draft(self, version: int, coded: _Coded) -> Manifest:
        """The manifest, the same in all processes."""

        def draft() -> str:
            manifest = self._chain.draft(
                version, digest=coded.digest.root.hex(), base=coded.base, payloads=coded.payloads
            )
            return seal(manifest)[1].decode()

        return read_manifest(on_first(draft).encode())


def inline(sections: Sections, local: Local) -> Published:
    """Runs a publication from its next local part to its end, all of it here."""
    while True:
        try:
            outcome = local()
        except Exception as error:  # it belongs to the publication, which tells all processes
            resume = lambda error=error: sections.throw(error)  # noqa: E731
        else:
            resume = lambda outcome=outcome: sections.send(outcome)  # noqa: E731
        try:
            local = resume()
        except StopIteration as end:
            return end.value


def _locally(act: Local) -> Generator[Local, Any, Any]:
    """A section of each process's own; where it fails in one, it fails in all."""
    value, failure = None, None
    if jax.process_count() > 1 and jax.default_backend() != "cpu":
        # Coding dispatches programs over the devices of all processes, which must come in one
        # order everywhere: it cannot run beside the update there.
        try:
            value = act()
        except Exception as error:  # the other processes wait for word of it
            failure = error
    else:
        try:
            value = yield act
        except Exception as error:  # likewise
            failure = error
    if worst(int(failure is not None), shared=True):
        raise failure or SyncError("another process of the learner failed; see its own error")
    return value


def _on_first_locally(act: Local) -> Generator[Local, Any, None]:
    """A section of the first process; what it raises, all raise."""
    failure: Exception | None = None
    try:
        yield act if jax.process_index() == 0 else lambda: None
    except Exception as error:  # the other processes wait for word of it
        failure = error

    def report() -> None:
        if failure is not None:
            raise failure

    on_first(report)


def _delta(last: _Version, weights: Any, version: int, receivers: Sequence[Any] | None) -> bytes:
    return sparse_delta.encode(
        last.weights,
        weights,
        version=version,
        base_version=last.manifest.version,
        base_digest=last.digest,
        receivers=receivers,
    )


def _anchor(weights: Any, version: int, receivers: Sequence[Any] | None) -> bytes:
    return sparse_delta.encode(None, weights, version=version, receivers=receivers)


def _cost(manifest: Manifest, coded: _Coded, seconds: Sequence[float]) -> Published:
    cast_s, encode_s, store_s, tidy_s = seconds
    return Published(
        version=manifest.version,
        sequence=manifest.sequence,
        kind="anchor" if "anchor" in coded.payloads else "delta",
        size_bytes=sum(map(len, coded.payloads.values())),
        delta_bytes=len(coded.payloads.get("delta", b"")),
        density=coded.density,
        cast_s=cast_s,
        encode_s=encode_s,
        store_s=store_s,
        tidy_s=tidy_s,
    )
