"""What a payload says of itself: `inspect`."""

import collections
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kernels.sparse_delta import parse, wire
from kernels.sparse_delta.codec import Mode
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.errors import UnknownFormat
from kernels.sparse_delta.trees import TreeDigest

_LONGEST_TABLE = 40


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor in a payload.

    Attributes:
      name: path of the leaf.
      dtype: of its elements.
      shape: of the whole tensor.
      tile: rows and columns of its tiles.
      tied_to: name of the tensor whose tiles are this one's too, or None.
      changed: elements that the stored tiles change; of dense tiles, all that they hold.
      coded_bytes: of its tiles; 0 where it is tied.
      modes: stored tiles by mode.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tile: tuple[int, int]
    tied_to: str | None
    changed: int
    coded_bytes: int
    modes: Mapping[str, int]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        return self.elements * element_format(jax.numpy.dtype(self.dtype)).width_bits // 8

    @property
    def density(self) -> float:
        """Share of the elements that change, 0 … 1."""
        return self.changed / self.elements if self.elements else 0.0

    @property
    def bits_per_change(self) -> float:
        """Coded bits for each changed element; NaN where none is."""
        return 8 * self.coded_bytes / self.changed if self.changed else math.nan


@dataclass(frozen=True, kw_only=True)
class PayloadInfo:
    """What a payload says of itself, after its checksums were verified.

    Attributes:
      kind: "anchor" or "delta".
      part: whether it is one process's part, to be merged.
      version: what the sender calls the target, or None.
      base_version: what the sender calls the base, or None.
      base_digest: root of the base; None in an anchor and in a part.
      target_digest: of the target, None in a part; `apply(..., base_digest=…)` of the next
        payload takes it.
      size_bytes: of the payload.
      manifest_bytes: of its header and manifest.
      buckets: first byte and size of each, for those who fetch only some.
      tensors: by rising name.
    """

    kind: str
    part: bool
    version: int | None
    base_version: int | None
    base_digest: bytes | None
    target_digest: TreeDigest | None
    size_bytes: int
    manifest_bytes: int
    buckets: tuple[tuple[int, int], ...]
    tensors: tuple[TensorInfo, ...]

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.dense_bytes for tensor in self.tensors)

    @property
    def changed(self) -> int:
        """Changed elements that are coded; those of tied tensors count once."""
        return sum(tensor.changed for tensor in self.tensors if tensor.tied_to is None)

    @property
    def density(self) -> float:
        """Share of all elements that change, 0 … 1."""
        changed = sum(tensor.changed for tensor in self.tensors)
        return changed / self.elements if self.elements else 0.0

    @property
    def bits_per_change(self) -> float:
        """Bits of the whole payload, headers included, for each changed element that is coded."""
        return 8 * self.size_bytes / self.changed if self.changed else math.nan

    @property
    def ratio(self) -> float:
        """How many times smaller than the dense weights."""
        return self.dense_bytes / self.size_bytes

    def __str__(self) -> str:
        versions = f"{_or_dash(self.base_version)} → {_or_dash(self.version)}"
        target = _or_dash(self.target_digest)
        base = _or_dash(self.base_digest and self.base_digest.hex())
        lines = [
            f"{self.kind}{' (part)' if self.part else ''}, versions {versions}",
            f"digests {base} → {target}",
            f"{self.size_bytes} bytes in {len(self.buckets)} buckets, manifest "
            f"{self.manifest_bytes}; dense {self.dense_bytes} ({self.ratio:.4g}×)",
            f"{self.changed} changes, density {self.density:.4%}, "
            f"{self.bits_per_change:.4g} bits each",
        ]
        rows = [("tensor", "dtype", "shape", "density", "bits/change", "bytes", "tiles")]
        largest = sorted(self.tensors, key=lambda t: -t.coded_bytes)[:_LONGEST_TABLE]
        shown = {tensor.name for tensor in largest}
        rows += [_row(tensor) for tensor in self.tensors if tensor.name in shown]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if len(self.tensors) > len(shown):
            lines.append(f"and {len(self.tensors) - len(shown)} smaller ones")
        return "\n".join(lines)


def inspect(payload: Any) -> PayloadInfo:
    """Reads what a payload says of itself, all checksums verified, without any weights.

    Args:
      payload: bytes-like, of `encode`, `merge` or `squash`; parts too. Of a `PartialPayload` the
        manifest is enough, and the buckets that are here are verified.

    Raises:
      CorruptPayload: a subclass says what is wrong with it.
    """
    parsed = parse.read(payload)
    parsed.verify()
    manifest = parsed.manifest
    runs: dict[int, list[wire.Tiles]] = collections.defaultdict(list)
    for run in manifest.runs:
        runs[run.tensor].append(run.tiles)
    tensors = tuple(
        _tensor_info(manifest, index, runs[tensor.same])
        for index, tensor in enumerate(manifest.tensors)
    )
    complete = manifest.part is None
    carried = {t.name: t.target for t in manifest.tensors if t.target is not None}
    return PayloadInfo(
        kind="anchor" if manifest.kind == wire.ANCHOR else "delta",
        part=not complete,
        version=manifest.version,
        base_version=manifest.base_version,
        base_digest=manifest.base_root if complete and manifest.kind == wire.DELTA else None,
        target_digest=TreeDigest(manifest.target_root, carried) if complete else None,
        size_bytes=int(parsed.offsets[-1]),
        manifest_bytes=int(parsed.offsets[0]),
        buckets=tuple(
            (int(start), int(stop - start))
            for start, stop in zip(parsed.offsets, parsed.offsets[1:], strict=False)
        ),
        tensors=tensors,
    )


def _tensor_info(manifest: wire.Manifest, index: int, runs: list[wire.Tiles]) -> TensorInfo:
    tensor = manifest.tensors[index]
    try:
        element_format(jax.numpy.dtype(tensor.dtype))
    except TypeError as error:
        raise UnknownFormat(
            f"{tensor.name}: unknown dtype {tensor.dtype!r}", tensor=tensor.name
        ) from error
    counts: collections.Counter[str] = collections.Counter()
    for tiles in runs:
        for mode, count in enumerate(np.bincount(tiles.modes).tolist()):
            if count and mode not in list(Mode):
                raise UnknownFormat(f"{tensor.name}: unknown mode {mode}", tensor=tensor.name)
            if count:
                counts[Mode(mode).name.lower().replace("_", "-")] += count
    tied = tensor.same != index
    return TensorInfo(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.grid.shape,
        tile=tensor.grid.tile,
        tied_to=manifest.tensors[tensor.same].name if tied else None,
        changed=sum(int(tiles.nnz.sum(dtype=np.int64)) for tiles in runs),
        coded_bytes=0 if tied else sum(int(tiles.sizes.sum(dtype=np.int64)) for tiles in runs),
        modes=dict(counts),
    )


def _row(tensor: TensorInfo) -> tuple[str, ...]:
    modes = " ".join(f"{name} {count}" for name, count in tensor.modes.items())
    return (
        tensor.name,
        tensor.dtype,
        "×".join(map(str, tensor.shape)) or "scalar",
        f"{tensor.density:.3%}",
        "–" if math.isnan(tensor.bits_per_change) else f"{tensor.bits_per_change:.2f}",
        str(tensor.coded_bytes),
        f"tied to {tensor.tied_to}" if tensor.tied_to else modes or "none",
    )


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)
