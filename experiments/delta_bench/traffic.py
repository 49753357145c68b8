"""Bytes that the accelerator kernels move, against those that no implementation can avoid."""

import math
from types import ModuleType

import jax.numpy as jnp

from experiments.delta_bench.device import DENSITY, LEAST_BYTES
from kernels.sparse_delta import gpu, tpu
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.reference import BLOCK, capacity_for
from kernels.sparse_delta.tiles import TileGrid, box_view, choose_grid

SHAPE = 4096, 4096
"""Of the matrix that is counted: of a common size, and whole in tiles."""
KERNELS = "pack", "compact", "epilogue", "class_counts", "expand"
CHIPS: dict[str, ModuleType] = {"TPU": tpu, "GPU": gpu}
BF16 = element_format(jnp.dtype(jnp.bfloat16))

# Matrices of each model: shape, how many, and the axis that tensor parallelism splits.
Matrix = tuple[tuple[int, int], int, int]
MODELS: dict[str, dict[str, Matrix]] = {
    "Llama-3.1-8B": {
        "q": ((4096, 4096), 32, 1),
        "k, v": ((4096, 1024), 64, 1),
        "o": ((4096, 4096), 32, 0),
        "gate, up": ((4096, 14336), 64, 1),
        "down": ((14336, 4096), 32, 0),
        "embed, head": ((128256, 4096), 2, 0),
    },
    "Qwen3-8B": {
        "q": ((4096, 4096), 36, 1),
        "k, v": ((4096, 1024), 72, 1),
        "o": ((4096, 4096), 36, 0),
        "gate, up": ((4096, 12288), 72, 1),
        "down": ((12288, 4096), 36, 0),
        "embed, head": ((151936, 4096), 2, 0),
    },
    "Qwen2.5-7B": {
        "q": ((3584, 3584), 28, 1),
        "k, v": ((3584, 512), 56, 1),
        "o": ((3584, 3584), 28, 0),
        "gate, up": ((3584, 18944), 56, 1),
        "down": ((18944, 3584), 28, 0),
        "embed, head": ((152064, 3584), 2, 0),
    },
    "Llama-2-7B": {
        "q": ((4096, 4096), 32, 1),
        "k, v": ((4096, 4096), 64, 1),
        "o": ((4096, 4096), 32, 0),
        "gate, up": ((4096, 11008), 64, 1),
        "down": ((11008, 4096), 32, 0),
        "embed, head": ((32000, 4096), 2, 0),
    },
}
"""Weights of well-known models, by their published configurations; [inputs, outputs]."""
TRAINER = 16
"""Devices that the trainer splits the rows of every matrix over (FSDP)."""
RECEIVERS = 1, 4, 8
"""Devices that receivers split the matrices over (tensor parallelism)."""


def traffic() -> dict[str, dict[str, float]]:
    """By kernel: bytes an element moved, the least possible, and their ratio.

    Moved bytes are those of the kernels' own `traffic`, with all tiles touched and the slots that
    1 % changed elements ask for.
    """
    grid = choose_grid(SHAPE)
    capacity = capacity_for(DENSITY)
    found = {}
    for chip, module in CHIPS.items():
        for name in KERNELS:
            least, moved = LEAST_BYTES[name], _moved(module, name, grid, SHAPE)
            row = {"bytes_per_element": moved, "least": least, "ratio": moved / least}
            found[f"{chip} {name}"] = row
        found[f"{chip} compact"]["slots_filled"] = BLOCK * DENSITY / capacity
    return found


def _moved(module: ModuleType, name: str, grid: TileGrid, shard: tuple[int, ...]) -> float:
    """Bytes an element that a kernel moves for a shard."""
    extents = box_view(grid, shard)
    options = {"fmt": BF16, "tile": grid.tile, "capacity": capacity_for(DENSITY)}
    return module.traffic(name, extents, **options) / math.prod(shard)


def traffic_by_model() -> dict[str, dict[str, float]]:
    """Bytes an element for all matrices of a model that `TRAINER` devices send to receivers.

    Those of the trainer's shards for `pack` and `compact`, of the receiver's for what it does
    (`class_counts` and `expand`). More than on one matrix, where the shards of both allow no tiles
    that the kernels read in place.
    """
    found = {}
    for model, matrices in MODELS.items():
        for ways in RECEIVERS:
            row = dict.fromkeys((f"{chip}_{half}" for chip in CHIPS for half in HALVES), 0.0)
            total = sum(math.prod(shape) * count for shape, count, _ in matrices.values())
            for shape, count, axis in matrices.values():
                shards = {
                    "trainer": (shape[0] // TRAINER, shape[1]),
                    "receiver": tuple(
                        size // ways if k == axis else size for k, size in enumerate(shape)
                    ),
                }
                grid = choose_grid(shape, tuple(shards.values()))
                share = math.prod(shape) * count / total
                for chip, module in CHIPS.items():
                    for half, (where, names) in HALVES.items():
                        moved = sum(_moved(module, name, grid, shards[where]) for name in names)
                        row[f"{chip}_{half}"] += share * moved
            found[f"{model} to {ways} × TP"] = row
    return found


HALVES = {
    "pack": ("trainer", ("pack",)),
    "compact": ("trainer", ("compact",)),
    "apply": ("receiver", ("class_counts", "expand")),
}
"""Whose shards, and which kernels, each column of `traffic_by_model` counts."""
