"""The optimiser's cast and the difference in one pass over the weights.

A step that ends with `new = master.astype(bfloat16)` reads the float32 weights and writes the new
ones anyway. Compared there, while both are in fast memory, the difference costs no more than
reading the old weights and writing what was found: 8 bytes an element instead of 6 + 4.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Array, Float32, UInt

from kernels.sparse_delta.backends import Backend, dispatch
from kernels.sparse_delta.delta import Delta, compare
from kernels.sparse_delta.reference import Packed, Tile


def cast_diff(
    master: Any,
    old: Any,
    *,
    receivers: Sequence[Any] = (),
    thresholds: Mapping[str, Sequence[int]] | None = None,
    density: float = 0.01,
    shardings: Any = None,
    backend: Backend | None = None,
) -> Delta:
    """`diff(old, new)` together with `new = master.astype(bfloat16)`.

    Args:
      master: pytree of float32 arrays, the optimiser's weights.
      old: the bf16 weights that were published last: the same structure, shapes and shardings.
      receivers: as in `diff`.
      thresholds: as in `diff`.
      density: as in `diff`.
      shardings: as in `diff`.
      backend: as in `diff`.

    Returns:
      The delta, for `finish`; its `new` is the tree of new bf16 weights (rounded to nearest, ties
      to even).

    Raises:
      TypeError: a leaf is not float32 in `master` or not bf16 in `old`; names it.
      ValueError: the trees or a leaf of them do not match; names it.
    """
    return compare(
        old,
        master,
        receivers=receivers,
        thresholds=thresholds,
        density=density,
        shardings=shardings,
        backend=backend,
        cast=True,
    )


def epilogue(
    master: Float32[Array, "lead rows cols"],
    old: UInt[Array, "lead rows cols"],
    *,
    tile: Tile,
    backend: Backend,
) -> tuple[UInt[Array, "lead rows cols"], Packed]:
    """New bf16 bits of one box, with the mask and counts of what changed: `reference.epilogue`.

    Args:
      master: float32 weights in the canonical view of their tensor.
      old: bits of the bf16 weights that were published last.
      tile: R and C.
      backend: which kernels.
    """
    return dispatch("epilogue", backend, master, old, tile=tile)
