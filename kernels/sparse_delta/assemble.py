"""What encoding on hosts and on devices share: checks of the trees, and the payload at the end."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kernels.sparse_delta import codec, host, wire
from kernels.sparse_delta.merge import NO_ROOT, complete
from kernels.sparse_delta.routing import Coded
from kernels.sparse_delta.tiles import TileGrid
from kernels.sparse_delta.trees import Leaf, Sums, TreeDigest, add, named_leaves, tree_digest
from kernels.sparse_delta.wire import ANCHOR, DELTA, Manifest, Run, Tensor


def matched(old: Any, leaves: Sequence[Leaf], structure: Any) -> list[Leaf]:
    """The leaves of `old`, which must be those of `new`."""
    olds, old_structure = named_leaves(old, role="old")
    for mine, other in zip(olds, leaves, strict=False):
        if (mine.name, mine.shape, mine.dtype) != (other.name, other.shape, other.dtype):
            raise ValueError(
                "old and new must have the same leaves: old has "
                f"{mine.name!r} {mine.dtype}{list(mine.shape)} where new has "
                f"{other.name!r} {other.dtype}{list(other.shape)}"
            )
    if len(olds) != len(leaves) or old_structure != structure:
        raise ValueError(
            "old and new must be trees of one structure; "
            f"they have {len(olds)} and {len(leaves)} leaves: {old_structure} and {structure}"
        )
    return olds


def checked_version(name: str, value: int | None) -> int | None:
    if value is not None and not 0 <= value < 1 << 63:
        raise ValueError(f"{name} must be within 0 … 2^63 − 1 or None, got {value}")
    return value


def sharding_trees(
    receivers: Sequence[Any] | None, leaves: Sequence[Leaf], structure: Any
) -> list[list[Any]]:
    """The receivers' shardings, for each leaf."""
    found: list[list[Any]] = [[] for _ in leaves]
    for number, tree in enumerate(receivers or ()):
        flat, its_structure = jax.tree.flatten(
            tree, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding)
        )
        if its_structure != structure:
            raise ValueError(
                f"receivers[{number}] must have the structure of new: "
                f"{its_structure} is not {structure}"
            )
        for leaf, mine in zip(leaves, found, strict=True):
            sharding = getattr(flat[leaf.place], "sharding", flat[leaf.place])
            if not isinstance(sharding, jax.sharding.Sharding):
                raise TypeError(
                    f"leaf {leaf.name!r} of receivers[{number}] is a "
                    f"{type(sharding).__name__}, not a sharding"
                )
            mine.append(sharding)
    return found


def ties(
    leaves: Sequence[Leaf], olds: Sequence[Leaf] | None, grids: Sequence[TileGrid]
) -> list[int]:
    """For each leaf the first one that is the same arrays, or itself."""
    first: dict[Any, int] = {}
    return [
        first.setdefault((id(leaf.value), olds and id(olds[index].value), grids[index]), index)
        for index, leaf in enumerate(leaves)
    ]


def base_sums(
    olds: Sequence[Leaf],
    grids: Sequence[TileGrid],
    same: Sequence[int],
    base_digest: TreeDigest | None,
    spread: bool,
) -> list[Sums]:
    """This process's share of the old tree's sums."""
    sums: list[Sums] = []
    for index, (leaf, grid) in enumerate(zip(olds, grids, strict=True)):
        known = base_digest.sums.get(leaf.name) if base_digest else None
        if known is not None:
            # Known as a whole; the first process answers for it.
            sums.append(known if not spread or jax.process_index() == 0 else (0, 0))
        elif same[index] != index:
            sums.append(sums[same[index]])
        else:
            sums.append(host.digest_sums(leaf, grid, spread))
    if base_digest and not spread and tree_digest(olds, sums).root != base_digest.root:
        raise ValueError("base_digest is not of old: names, shapes, dtypes or weights differ")
    return sums


def packed(
    leaves: Sequence[Leaf],
    grids: Sequence[TileGrid],
    same: Sequence[int],
    base: Sequence[Sums],
    coded: Coded,
    versions: tuple[int | None, int | None],
    *,
    anchor: bool,
    spread: bool,
) -> bytes:
    """The payload of coded tiles, or this process's part of it where the tree is spread."""
    used = sorted({run.table for run in coded.runs})
    runs = tuple(dataclasses.replace(run, table=used.index(run.table)) for run in coded.runs)
    tensors = tuple(
        Tensor(
            name=leaf.name,
            dtype=leaf.dtype.name,
            grid=grids[index],
            same=same[index],
            target=add(base[index], coded.change[same[index]]),
            base=base[index],
        )
        for index, leaf in enumerate(leaves)
    )
    manifest = Manifest(
        kind=ANCHOR if anchor else DELTA,
        part=(jax.process_index(), jax.process_count()),
        version=versions[0],
        base_version=versions[1],
        base_root=NO_ROOT,
        target_root=NO_ROOT,
        tensors=tensors,
        tables=tuple(_table_bytes(*coded.tables[k], k, coded.runs) for k in used),
        runs=runs,
    )
    return wire.write(manifest if spread else complete(manifest), coded.chunks)


def _table_bytes(
    dtype: str, tables: codec.Tables, number: int, runs: Sequence[Run]
) -> tuple[str, bytes]:
    """Tables as they are stored: empty ones where no tile needs any."""
    own = [run.tiles.modes for run in runs if run.table == number]
    if not any(np.any(modes == codec.Mode.ENTROPY) for modes in own):
        tables = codec.make_tables(tables.fmt, [], (1, 1))
    return dtype, tables.to_bytes()
