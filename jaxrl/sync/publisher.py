"""The learner's end: numbered versions of the weights, as deltas and anchors."""

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl.sync import trees
from jaxrl.sync.acks import Acks
from jaxrl.sync.collection import collect, floor
from jaxrl.sync.errors import StoreError, Superseded
from jaxrl.sync.index import Index
from jaxrl.sync.manifest import Kind, Manifest, Payload, checked_name, index_key, seal
from jaxrl.sync.stores import Store
from kernels import sparse_delta

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """How versions are published.

    Attributes:
      anchor_every: at least every so many publications have an anchor beside their delta, from
        which whoever joins begins.
      dtype: of the actors' floating point weights; None: as the learner's.
      dense_above: a delta of more than this share of the dense weights is not worth its decoding:
        an anchor is published instead.
      keep_anchors: anchors that stay in the store, with all that follows the oldest of them.
      ack_expiry_s: a subscriber that gave no sign of life for so long holds nothing back.

    Raises:
      ValueError: a number out of its range.
    """

    anchor_every: int = 20
    dtype: Any = None
    dense_above: float = 0.9
    keep_anchors: int = 2
    ack_expiry_s: float = 600.0

    def __post_init__(self) -> None:
        if self.anchor_every < 1 or self.keep_anchors < 1:
            raise ValueError(f"must be at least 1: {self.anchor_every=}, {self.keep_anchors=}")
        if not 0 < self.dense_above <= 1 or self.ack_expiry_s <= 0:
            raise ValueError(
                f"dense_above must be within (0, 1], ack_expiry_s above 0: {self.dense_above=}, "
                f"{self.ack_expiry_s=}"
            )
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating point type or None, got {self.dtype}")


@dataclass(frozen=True, kw_only=True)
class Published:
    """What one publication cost.

    Attributes:
      version: as given.
      sequence: publications of the run before this one.
      kind: "anchor" where an anchor is among the payloads, else "delta".
      size_bytes: of all payloads.
      delta_bytes: of the delta, which is all that an actor that kept up fetches; 0 without one.
      density: share of the elements that changed; 1 where there was nothing to compare with.
      cast_s: seconds of casting.
      encode_s: seconds of encoding.
      store_s: seconds of writing to the store.
      seconds: all of the call.
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
    seconds: float


@dataclass(frozen=True)
class _Version:
    """Weights, their digest, and the manifest by which they were published."""

    manifest: Manifest
    weights: Any
    digest: sparse_delta.TreeDigest


@dataclass(frozen=True)
class _Coded:
    """The payloads of one version, by kind, with what they say of it."""

    payloads: Mapping[Kind, bytes]
    base: str | None
    digest: sparse_delta.TreeDigest
    density: float


class Publisher:
    """Publishes versions of the weights of one run; one learner at a time.

    The difference is taken from the version that was *published* last: what is not in the store
    does not count. A new publisher on a store that has versions already continues their chain:
    with a delta if it is given the very weights of the newest, else with an anchor.

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
        self._store = store
        self.run_id = checked_name("run_id", run_id)
        self.config = config or SyncConfig()
        self._receivers = receivers
        self._index = Index(store, run_id)
        self._acks = Acks(store, run_id, expiry_s=self.config.ack_expiry_s)
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
        from the last of them.

        Args:
          params: pytree of arrays, sharded or not; copied, so it may be donated afterwards.
          version: what the learner calls them; above all that this publisher has published.

        Raises:
          ValueError: a version that is not above the last.
          StoreError: the store failed.
          Superseded: another publisher has published to this run since.
        """
        with self._lock:
            started = time.perf_counter()
            again = self._reconcile()
            self._check(version, again)
            weights = jax.block_until_ready(trees.cast(params, self.config.dtype))
            cast = time.perf_counter()
            coded = self._encode(weights, version)
            encoded = time.perf_counter()
            published = self._commit(weights, version, coded)
            stored = time.perf_counter()
            if "anchor" in coded.payloads:
                self._collect()
            return Published(
                version=version,
                sequence=published.sequence,
                kind="anchor" if "anchor" in coded.payloads else "delta",
                size_bytes=sum(map(len, coded.payloads.values())),
                delta_bytes=len(coded.payloads.get("delta", b"")),
                density=coded.density,
                cast_s=cast - started,
                encode_s=encoded - cast,
                store_s=stored - encoded,
                seconds=time.perf_counter() - started,
            )

    def _check(self, version: int, again: bool) -> None:
        last = self.version
        too_low = last is not None and (version < last or (version == last and not again))
        if version < 0 or too_low:
            raise ValueError(
                f"versions must be at least 0 and rise: {version=} after {last}; a learner that "
                "went back to a checkpoint begins with a new Publisher"
            )

    def _reconcile(self) -> bool:
        """Compares with the store what this publisher believes to be there.

        Returns:
          Whether a publication that had failed proved to be in the store.
        """
        self._index.refresh()
        uncertain, self._uncertain = self._uncertain, None
        landed = uncertain is not None and self._index.by_id(uncertain.manifest.id) is not None
        if landed:
            self._last = uncertain
        if self._last is None:
            return landed
        own = self._last.manifest
        found = self._index.manifests.get(own.sequence)
        if self._index.last > own.sequence or (found is not None and found.id != own.id):
            raise Superseded(
                f"run {self.run_id!r} has publication {self._index.last}, of another publisher, "
                f"after number {own.sequence} of this one; two learners must not share a run_id"
            )
        if found is None:
            _log.warning(
                "the manifest of version %d is lost or damaged: wrote it again", own.version
            )
            self._store.put(index_key(self.run_id, own.sequence), seal(own)[1])
            self._index.refresh()
        return landed

    def _encode(self, weights: Any, version: int) -> _Coded:
        last = self._last or self._continued(weights)
        dense = trees.size_bytes(weights)
        payloads: dict[Kind, bytes] = {}
        density, digest = 1.0, None
        receivers = self._receivers or None
        if last is not None:
            delta = sparse_delta.encode(
                last.weights,
                weights,
                version=version,
                base_version=last.manifest.version,
                base_digest=last.digest,
                receivers=receivers,
            )
            info = sparse_delta.inspect(delta)
            density, digest = info.density, info.target_digest
            if len(delta) <= self.config.dense_above * dense:
                payloads["delta"] = delta
        if self._anchor_is_due(payloads, dense):
            anchor = sparse_delta.encode(None, weights, version=version, receivers=receivers)
            digest = digest or sparse_delta.inspect(anchor).target_digest
            payloads["anchor"] = anchor
        assert digest is not None, "a version without a delta has an anchor"
        return _Coded(payloads, last and last.manifest.id, digest, density)

    def _continued(self, weights: Any) -> _Version | None:
        """The newest version in the store, if these are its very weights."""
        newest = self._index.manifests.get(self._index.last)
        if newest is None:
            return None
        digest = trees.digest(weights)
        return _Version(newest, weights, digest) if digest.root.hex() == newest.digest else None

    def _anchor_is_due(self, payloads: Mapping[Kind, bytes], dense: int) -> bool:
        """No delta, or the last anchor is many versions or its own size of deltas ago."""
        chain = 0 if "delta" not in payloads else len(payloads["delta"])
        if not chain:
            return True
        since = 1
        for _, manifest in sorted(self._index.manifests.items(), reverse=True):
            sizes = {payload.kind: payload.size_bytes for payload in manifest.payloads}
            if "anchor" in sizes:
                return since >= self.config.anchor_every or chain > dense
            chain, since = chain + sizes["delta"], since + 1
        return True

    def _commit(self, weights: Any, version: int, coded: _Coded) -> Manifest:
        """Writes payloads, then the manifest; the version is published once that is in the store."""
        sequence = max(self._index.last, -1 if not self._last else self._last.manifest.sequence) + 1
        entries = []
        for kind, data in coded.payloads.items():
            entry = _entry(self.run_id, sequence, kind, data, coded.base)
            self._store.put(entry.key, data)
            entries.append(entry)
        newest = self._index.manifests.get(max(self._index.manifests, default=-1))
        manifest = Manifest(
            run=self.run_id,
            sequence=sequence,
            version=version,
            previous=None if newest is None else newest.id,
            digest=coded.digest.root.hex(),
            quantise=None,
            payloads=tuple(entries),
        )
        identity, data = seal(manifest)
        manifest = dataclasses.replace(manifest, id=identity)
        new = _Version(manifest, weights, coded.digest)
        # Should the store fail now, the manifest may have arrived all the same; the next call looks.
        self._uncertain = new
        self._store.put(index_key(self.run_id, sequence), data)
        self._last, self._uncertain = new, None
        return manifest

    def _collect(self) -> None:
        """Removes what nobody needs; a store that fails here fails later where it matters."""
        try:
            self._index.refresh()
            positions = self._acks.live().values()
            lowest = floor(self._index, positions, keep_anchors=self.config.keep_anchors)
            collect(self._store, self.run_id, self._index, lowest)
        except StoreError as error:
            _log.warning("old versions of %s stay in the store: %s", self.run_id, error)


def _entry(run: str, sequence: int, kind: Kind, data: bytes, base: str | None) -> Payload:
    digest = hashlib.sha256(data).hexdigest()
    return Payload(
        kind=kind,
        key=f"{run}/payloads/{sequence:012d}-{kind}-{digest[:16]}.spd",
        size_bytes=len(data),
        sha256=digest,
        base=None if kind == "anchor" else base,
    )
