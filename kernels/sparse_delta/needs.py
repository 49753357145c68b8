"""Which bytes of a payload a receiver's shards need: `needed`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels.sparse_delta import host, parse
from kernels.sparse_delta.errors import Incomplete, WrongModel
from kernels.sparse_delta.parse import Limits, Payload
from kernels.sparse_delta.partial import PartialPayload
from kernels.sparse_delta.tiles import TileGrid, coverage, parts, whole_box
from kernels.sparse_delta.trees import Leaf, named_leaves
from kernels.sparse_delta.wire import HEADER, Manifest


def needed(old: Any, payload: Any) -> list[range]:
    """The bytes of a payload that `apply(old, …)` reads in this process and that are not here.

    Left out are tiles that only other processes' shards need; neighbouring buckets are one range.
    Without the header this asks for it, and with the header for the manifest, so it is called until
    it returns nothing; `PartialPayload` shows how. Where all of the tree lies in this process, all
    of the payload is needed.

    Args:
      old: pytree of arrays, or of `jax.ShapeDtypeStruct`s with shardings.
      payload: a `PartialPayload`, or the payload's first bytes, as many as there are.

    Returns:
      Ranges of bytes, rising and apart.

    Raises:
      CorruptPayload: what is here is of no payload, or of another tree.
      TypeError: a leaf is no array; names it.
    """
    source = payload if isinstance(payload, PartialPayload) else PartialPayload({0: payload})
    leaves, _ = named_leaves(old, role="old")
    header = parse.read_header(source)
    if header is None:
        return source.missing(0, HEADER.size)
    limits = limits_of(leaves)
    limits.check("bytes", header.total, limits.total)
    if head := source.missing(0, header.body):
        return head
    parsed = parse.read(source, limits=limits)
    check_model(parsed.manifest, leaves)
    ranges: list[range] = []
    for index in np.flatnonzero(wanted_buckets(parsed, leaves)).tolist():
        start, stop = parsed.offsets[index : index + 2].tolist()
        if ranges and ranges[-1].stop == start:
            start = ranges.pop().start
        ranges.append(range(start, stop))
    return [gap for wanted in ranges for gap in source.missing(wanted.start, wanted.stop)]


def limits_of(leaves: Sequence[Leaf]) -> Limits:
    """What a receiver's tensors allow a manifest to hold."""
    return Limits(
        tensors=len(leaves),
        names=sum(len(leaf.name.encode()) for leaf in leaves),
        dims=sum(len(leaf.shape) for leaf in leaves),
        elements=sum(math.prod(leaf.shape) for leaf in leaves),
    )


def check_model(manifest: Manifest, leaves: Sequence[Leaf]) -> None:
    """Refuses a payload of another tree, or of part of one.

    Raises:
      WrongModel: names the first difference.
      Incomplete: one process's part.
    """
    if len(manifest.tensors) != len(leaves):
        raise WrongModel(
            f"the payload is of {len(manifest.tensors)} tensors, the receiver has {len(leaves)}"
        )
    for tensor, leaf in zip(manifest.tensors, leaves, strict=True):
        theirs = tensor.name, tensor.dtype, tensor.grid.shape
        if theirs != (leaf.name, leaf.dtype.name, leaf.shape):
            raise WrongModel(
                f"the payload has {theirs[0]!r} {theirs[1]}{list(theirs[2])} where the receiver "
                f"has {leaf.name!r} {leaf.dtype.name}{list(leaf.shape)}",
                tensor=tensor.name,
            )
    if manifest.part is not None:
        raise Incomplete("this is one process's part of a payload; merge it with the others'")


def wanted_buckets(parsed: Payload, leaves: Sequence[Leaf]) -> np.ndarray:
    """Which buckets hold tiles that this process needs, bool; `apply` reads no others.

    Args:
      parsed: of the leaves' tree.
      leaves: of the receiver.
    """
    wanted = np.zeros(len(parsed.buckets), bool)
    holders: dict[int, list[Leaf]] = {}
    for leaf, tensor in zip(leaves, parsed.manifest.tensors, strict=True):
        holders.setdefault(tensor.same, []).append(leaf)
    for run, _, buckets in parsed.located():
        grid = parsed.manifest.tensors[run.tensor].grid
        for leaf in holders[run.tensor]:
            wanted[buckets[_touching(leaf, grid, run.tiles.ids)]] = True
    return wanted


def _touching(leaf: Leaf, grid: TileGrid, ids: np.ndarray) -> np.ndarray:
    """Whether tiles are needed for the shards of a leaf that this process holds."""
    boxes = [piece.box for piece in host.held(leaf)]
    if boxes and any(part.ids is None for box in boxes for part in parts(grid, box)):
        boxes = [whole_box(leaf.shape)]  # to be put together for shards that cut tiles
    return coverage(grid, boxes, ids) > 0
