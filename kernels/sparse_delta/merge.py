"""Parts to a whole: what several processes encoded becomes one payload, tile by tile unchanged."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kernels.sparse_delta import parse, wire
from kernels.sparse_delta.trees import Leaf, Sums, add, tree_digest
from kernels.sparse_delta.wire import ANCHOR, Manifest, Run

NO_ROOT = bytes(16)


def merge(payloads: Sequence[Any]) -> bytes:
    """Joins the parts that the processes of one `encode` made, in any order.

    Raises:
      CorruptPayload: a part is damaged, or two hold the same tile.
      ValueError: a part is missing, there twice or of another encode.
    """
    parts = [parse.read(payload) for payload in payloads]
    _check_parts([part.manifest for part in parts])
    first = parts[0].manifest
    tables: list[tuple[str, bytes]] = []
    runs: list[Run] = []
    chunks: list[memoryview] = []
    for part in parts:
        part.verify()
        for run, starts, _ in part.located():
            runs.append(dataclasses.replace(run, table=run.table + len(tables)))
            stop = int(starts[-1]) + int(run.tiles.sizes[-1])
            chunks.append(part.data.data[int(starts[0]) : stop])
        tables.extend(part.manifest.tables)
    parse.refuse_twice(runs, first.tensors)
    shares = zip(*(part.manifest.tensors for part in parts), strict=True)
    tensors = tuple(
        dataclasses.replace(
            share[0],
            target=add(*(tensor.target or (0, 0) for tensor in share)),
            base=add(*(tensor.base or (0, 0) for tensor in share)),
        )
        for share in shares
    )
    joined = dataclasses.replace(first, tensors=tensors, tables=tuple(tables), runs=tuple(runs))
    return wire.write(complete(joined), chunks)


def _check_parts(manifests: Sequence[Manifest]) -> None:
    if not manifests or any(manifest.part is None for manifest in manifests):
        raise ValueError("merge joins parts, as `encode` gives them in each of several processes")
    found = sorted(manifest.part[0] for manifest in manifests if manifest.part)
    counts = {manifest.part[1] for manifest in manifests if manifest.part}
    if counts != {len(found)} or found != list(range(len(found))):
        raise ValueError(
            f"merge needs every part once: got numbers {found} of {sorted(counts)} parts"
        )
    if any(_identity(manifest) != _identity(manifests[0]) for manifest in manifests):
        raise ValueError(
            "the parts are not of one encode: their versions, tensors or tiles differ; "
            "every process has to encode the same trees with the same arguments"
        )


def _identity(manifest: Manifest) -> Any:
    bare = [dataclasses.replace(t, target=None, base=None) for t in manifest.tensors]
    return manifest.kind, manifest.version, manifest.base_version, bare


def complete(manifest: Manifest) -> Manifest:
    """With roots instead of the sums that only parts need.

    Args:
      manifest: of everything, with the sums of all tensors, old and new.
    """
    leaves = [
        Leaf(t.name, place, None, t.grid.shape, np.dtype(jax.numpy.dtype(t.dtype)))
        for place, t in enumerate(manifest.tensors)
    ]

    def root(sums: list[Sums | None]) -> bytes:
        return tree_digest(leaves, [pair or (0, 0) for pair in sums]).root

    tensors = tuple(
        dataclasses.replace(
            tensor,
            base=None,
            target=tensor.target
            if math.prod(tensor.grid.shape) >= wire.SUMS_FROM_ELEMENTS
            else None,
        )
        for tensor in manifest.tensors
    )
    bases = [tensor.base for tensor in manifest.tensors]
    return dataclasses.replace(
        manifest,
        part=None,
        base_root=NO_ROOT if manifest.kind == ANCHOR else root(bases),
        target_root=root([tensor.target for tensor in manifest.tensors]),
        tensors=tensors,
    )
