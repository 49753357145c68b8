"""The learner's end: numbered versions of the weights, as deltas and anchors."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxrl.sync import trees
from jaxrl.sync.config import SyncConfig
from jaxrl.sync.ledger import Ledger, State
from jaxrl.sync.manifest import Kind, Manifest, checked_name, read_manifest, seal
from jaxrl.sync.processes import on_first, whole
from jaxrl.sync.stores import Store
from kernels import sparse_delta


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
      cast_s: seconds of casting and quantising.
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
        self._ledger = Ledger(store, run_id, self.config)
        self._last: _Version | None = None
        self._uncertain: _Version | None = None
        self._lock = threading.Lock()

    @property
    def version(self) -> int | None:
        """The version that this publisher published last; None before its first."""
        return None if self._last is None else self._last.manifest.version

    def publish(self, params: Any, version: int) -> Published:
        """Makes a version available; when this returns, it is.

        After a failure the versions before are as they were, and the next call takes the difference
        from the last that is in the store. The same version may be given again.

        Args:
          params: pytree of arrays, sharded or not; copied, so it may be donated afterwards.
          version: what the learner calls them; above all that this publisher has published.

        Raises:
          ValueError: a version that is not above the last.
          StoreError: the store failed.
          Superseded: another publisher has published to this run since.
        """
        with self._lock:
            times = [time.perf_counter()]
            state = self._open()
            self._check(version, again=state.landed is not None)
            weights = trees.actors_view(params, self.config)
            times.append(time.perf_counter())
            receivers = trees.receivers_of(self._receivers, params, self.config)
            coded = self._encode(weights, version, state, receivers)
            times.append(time.perf_counter())
            manifest = self._commit(weights, version, coded)
            times.append(time.perf_counter())
            if jax.process_index() == 0:
                template = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), weights)
                self._ledger.tidy(template, receivers)
            times.append(time.perf_counter())
        cast_s, encode_s, store_s, tidy_s = np.diff(times).tolist()
        return Published(
            version=version,
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

    def _open(self) -> State:
        """What the store says, with a publication that had failed but is there as the last."""

        def act() -> dict[str, Any]:
            state = self._ledger.open()
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

    def _encode(
        self, weights: Any, version: int, state: State, receivers: Sequence[Any] | None
    ) -> _Coded:
        last = self._last or self._continued(weights, state)
        dense = trees.size_bytes(weights)
        payloads: dict[Kind, bytes] = {}
        density, digest = 1.0, None
        if last is not None:
            delta = sparse_delta.encode(
                last.weights,
                weights,
                version=version,
                base_version=last.manifest.version,
                base_digest=last.digest,
                receivers=receivers,
            )
            delta = whole(delta)
            info = sparse_delta.inspect(delta)
            density, digest = info.density, info.target_digest
            if len(delta) <= self.config.dense_above * dense:
                payloads["delta"] = delta
        if self._anchor_is_due(state, payloads, dense):
            anchor = sparse_delta.encode(None, weights, version=version, receivers=receivers)
            payloads["anchor"] = whole(anchor)
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

    def _anchor_is_due(self, state: State, payloads: Mapping[Kind, bytes], dense: int) -> bool:
        if "delta" not in payloads or not state.since_anchor:
            return True
        chain_bytes = state.chain_bytes + len(payloads["delta"])
        return state.since_anchor >= self.config.anchor_every or chain_bytes > dense

    def _commit(self, weights: Any, version: int, coded: _Coded) -> Manifest:
        """Writes the version; it is the last one only once its manifest is in the store."""

        def draft() -> str:
            manifest = self._ledger.draft(
                version, digest=coded.digest.root.hex(), base=coded.base, payloads=coded.payloads
            )
            return seal(manifest)[1].decode()

        manifest = read_manifest(on_first(draft).encode())
        # Should the store fail, the manifest may be there all the same; the next call looks.
        self._uncertain = _Version(manifest, weights, coded.digest)
        on_first(lambda: self._ledger.write(manifest, coded.payloads))
        self._last, self._uncertain = self._uncertain, None
        return manifest
