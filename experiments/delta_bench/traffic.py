"""Bytes that the accelerator kernels move, against those that no implementation can avoid."""

import jax.numpy as jnp

from experiments.delta_bench.device import DENSITY, LEAST_BYTES
from kernels.sparse_delta import tpu
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.reference import BLOCK, capacity_for
from kernels.sparse_delta.tiles import choose_grid

SHAPE = 4096, 4096
"""Of the matrix that is counted: of a common size, and whole in tiles."""
KERNELS = "pack", "compact", "epilogue", "class_counts", "expand"


def traffic() -> dict[str, dict[str, float]]:
    """By kernel for TPU: bytes an element moved, the least possible, and their ratio.

    Moved bytes are counted from the very block specifications of the kernels, with all tiles
    touched and the slots that 1 % changed elements ask for.
    """
    fmt, tile = element_format(jnp.dtype(jnp.bfloat16)), choose_grid(SHAPE).tile
    capacity = capacity_for(DENSITY)
    elements = SHAPE[0] * SHAPE[1]
    found = {}
    for name in KERNELS:
        least = LEAST_BYTES[name]
        moved = tpu.traffic(name, (1, *SHAPE), fmt=fmt, tile=tile, capacity=capacity) / elements
        found[name] = {"bytes_per_element": moved, "least": least, "ratio": moved / least}
    found["compact"]["slots_filled"] = BLOCK * DENSITY / capacity
    return found
