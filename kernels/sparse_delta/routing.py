"""The order of tiles in a payload: those that one receiver reads lie together."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.sparse_delta import codec
from kernels.sparse_delta.tiles import TileGrid
from kernels.sparse_delta.trees import Sums
from kernels.sparse_delta.wire import Run


@dataclass(frozen=True)
class Coded:
    """The coded tiles of a tree.

    Attributes:
      tables: dtype and tables of the coder.
      runs: of tiles.
      chunks: the bytes of each run.
      change: by how much this process's share of each leaf's digest sums grows.
    """

    tables: tuple[tuple[str, codec.Tables], ...]
    runs: tuple[Run, ...]
    chunks: tuple[memoryview, ...]
    change: tuple[Sums, ...]


def routed(coded: Coded, grids: Sequence[TileGrid], receivers: Sequence[Any]) -> Coded:
    """Coded tiles, sorted by the shard of the receivers that reads them.

    A payload of tensors one after the other has tiles for every shard in every bucket, so that each
    process of a receiver would fetch all of it. Sorted by the number of the shard first, it fetches
    one stretch for each of its devices. Shards are numbered in row-major order within a tensor;
    those of equal number are taken to be on one device, as they are where each tensor is split
    along one axis of the mesh.

    Args:
      coded: tiles by tensor.
      grids: of the tensors.
      receivers: sharding of each tensor.
    """
    pieces: list[tuple[int, Run, memoryview]] = []
    for run, chunk in zip(coded.runs, coded.chunks, strict=True):
        shard = _shard_of(run.tiles.ids, grids[run.tensor], receivers[run.tensor])
        ends = np.cumsum(run.tiles.sizes, dtype=np.int64)
        starts = ends - run.tiles.sizes
        data = chunk.cast("B")
        for number in np.unique(shard).tolist():
            own = np.flatnonzero(shard == number)
            if len(own) == len(shard):
                pieces.append((number, run, data))
                continue
            stretches = np.split(own, np.flatnonzero(np.diff(own) > 1) + 1)
            joined = b"".join(data[int(starts[s[0]]) : int(ends[s[-1]])] for s in stretches)
            some = dataclasses.replace(run, tiles=run.tiles[own])
            pieces.append((number, some, memoryview(joined)))
    pieces.sort(key=lambda piece: piece[0])
    return dataclasses.replace(
        coded,
        runs=tuple(run for _, run, _ in pieces),
        chunks=tuple(chunk for *_, chunk in pieces),
    )


def _shard_of(ids: np.ndarray, grid: TileGrid, sharding: Any) -> np.ndarray:
    """Number of the shard that holds the first element of each tile."""
    if not math.prod(grid.shape):
        return np.zeros(len(ids), np.int64)
    shard = sharding.shard_shape(grid.shape)
    at = np.unravel_index(grid.origins(ids), grid.shape) if grid.shape else ()
    number = np.zeros(len(ids), np.int64)
    for index, size, whole in zip(at, shard, grid.shape, strict=True):
        number = number * (whole // size) + index // size
    return number
