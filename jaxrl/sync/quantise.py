"""Quantised actors: matrices in 8 bits, with scales that are powers of two.

Weights are quantised first and differenced then, so that what arrives is bit for bit what the
learner quantised, and only codes that changed travel. The format is that of OCP Microscaling (MX)
v1.0: along the last axis, blocks of 32 elements share a scale 2^(e − 127), e being 8 bits (E8M0).
Elements are "int8" (MXINT8: q · 2^−6, |q| ≤ 127) or "fp8" (MXFP8 with E4M3 elements, |v| ≤ 448),
rounded to nearest, ties to even.

The scale is the smallest at which the block's largest element fits, where MX leaves a choice. That
it is a power of two is what keeps deltas small: it stays as it is while the largest element moves
within its octave, and a scale that moved with each step would rewrite its whole block.

A block with an element that is not finite gets the scale NaN (e = 255), and stands for NaNs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxrl.sync.manifest import Quantisation

BLOCK = 32
"""Elements that share a scale."""
KEPT = ("norm", "bias", "embed", "head")
"""Parts of names of leaves that are not quantised by default: small, or read by few products."""
_BIAS = 127
_NAN = 255


class _Format(NamedTuple):
    dtype: Any
    largest: float  # element, before the scale
    exponent: int  # of the largest power of two that is an element
    fraction: int  # bits behind the point of an integer element


_FORMATS = {
    "int8": _Format(jnp.int8, 127 / 64, 0, 6),
    "fp8": _Format(jnp.float8_e4m3fn, 448.0, 8, 0),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A matrix in 8 bits: `values` · 2^(`exponents` − 127) in blocks of the last axis.

    Attributes:
      values: int8 (in units of 2^−6) or float8_e4m3fn, in the shape of the matrix.
      exponents: uint8[..., ⌈last / 32⌉], E8M0 scales of the blocks.
      how: "int8" or "fp8".
    """

    values: Any
    exponents: Any
    how: Quantisation = field(metadata={"static": True})


def quantise(tree: Any, how: Quantisation, *, kept: tuple[str, ...] = KEPT) -> Any:
    """Quantises the matrices of a tree; works under `jax.jit` and on any sharding.

    Args:
      tree: pytree of arrays.
      how: "int8" or "fp8".
      kept: parts of names of leaves that stay as they are.

    Returns:
      The tree, `Quantised` in place of floating point leaves of two axes or more that are not
      `kept`.

    >>> quantised = quantise({"w": jnp.full((2, 32), 0.75)}, "int8")["w"]
    >>> int(quantised.values[0, 0]), int(quantised.exponents[0, 0]) - 127
    (96, -1)
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _quantised(leaf, how) if _is_matrix(path, leaf, kept) else leaf, tree
    )


def dequantise(tree: Any, dtype: Any = jnp.bfloat16) -> Any:
    """The tree that a quantised one stands for; works under `jax.jit`.

    Args:
      tree: from `quantise`.
      dtype: of the matrices that were quantised; bfloat16 holds either format exactly.
    """

    def one(leaf: Any) -> Any:
        return _dequantised(leaf, dtype) if isinstance(leaf, Quantised) else leaf

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Quantised))


def dequantiser(like: Any) -> Callable[[Any], Any]:
    """A function to the trees that quantised ones stand for, compiled once.

    Args:
      like: pytree of `jax.ShapeDtypeStruct` or arrays: dtypes and, where they have one, shardings
        of what comes out. Leaves that were not quantised keep their own dtype.
    """
    shardings = jax.tree.map(lambda own: getattr(own, "sharding", None), like)

    @functools.partial(jax.jit, out_shardings=shardings)
    def expand(tree: Any) -> Any:
        def one(own: Any, leaf: Any) -> Any:
            return _dequantised(leaf, own.dtype) if isinstance(leaf, Quantised) else leaf

        return jax.tree.map(one, like, tree)

    return expand


def quantised_like(like: Any, how: Quantisation, *, kept: tuple[str, ...] = KEPT) -> Any:
    """The shapes, dtypes and shardings of a quantised tree.

    Args:
      like: pytree of `jax.ShapeDtypeStruct` or arrays of the tree before.
      how: as in `quantise`.
      kept: as in `quantise`.

    Returns:
      `jax.ShapeDtypeStruct`s. Codes lie as their matrix does; so do scales, but for their last
      axis where its shards would cut blocks.
    """
    shapes = jax.eval_shape(lambda tree: quantise(tree, how, kept=kept), like)

    def one(leaf: Any, shape: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(shape, Quantised):
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
        values, exponents = shape.values, shape.exponents
        return Quantised(
            jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding),
            jax.ShapeDtypeStruct(
                exponents.shape, exponents.dtype, sharding=scale_sharding(sharding, leaf.shape)
            ),
            how,
        )

    return jax.tree.map(one, like, shapes)


def scale_sharding(sharding: Any, shape: tuple[int, ...]) -> Any:
    """Where the scales of a matrix lie.

    Args:
      sharding: of the matrix.
      shape: of the matrix.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    shard = sharding.shard_shape(shape)[-1]
    if shard == shape[-1] or shard % BLOCK == 0:
        return sharding
    axes = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*axes[:-1], None))


def _dequantised(leaf: Quantised, dtype: Any) -> Array:
    exponents = leaf.exponents.astype(jnp.int32) - (_BIAS + _FORMATS[leaf.how].fraction)
    last = leaf.values.shape[-1]
    spread = jnp.repeat(exponents, BLOCK, axis=-1)[..., :last]
    values = jnp.ldexp(leaf.values.astype(jnp.float32), spread)
    nan = jnp.repeat(leaf.exponents == _NAN, BLOCK, axis=-1)[..., :last]
    return jnp.where(nan, jnp.nan, values).astype(dtype)


def _is_matrix(path: Any, leaf: Any, kept: tuple[str, ...]) -> bool:
    name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return floating and len(leaf.shape) >= 2 and not any(part in name for part in kept)


def _quantised(leaf: Array, how: Quantisation) -> Quantised:
    form = _FORMATS[how]
    last = leaf.shape[-1]
    x = leaf.astype(jnp.float32)
    padded = jnp.pad(x, [(0, 0)] * (leaf.ndim - 1) + [(0, -last % BLOCK)])
    blocks = padded.reshape(*leaf.shape[:-1], -1, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=-1)  # NaN where there is one
    _, exponent = jnp.frexp(largest)  # largest = m · 2^exponent, ½ ≤ m < 1
    scale = exponent - 1 - form.exponent
    scale = scale + (jnp.ldexp(largest, -scale) > form.largest)
    # All zeros have the smallest scale, 2^−127; below it elements would lose nothing either.
    scale = jnp.where(largest > 0, jnp.maximum(scale, -_BIAS), -_BIAS)
    finite = jnp.isfinite(largest)
    scale = jnp.where(finite, scale, 0)
    units = jnp.ldexp(jnp.where(finite[..., None], blocks, 0), form.fraction - scale[..., None])
    codes = jnp.round(units) if form.fraction else units
    values = codes.astype(form.dtype).reshape(padded.shape)[..., :last]
    exponents = jnp.where(finite, scale + _BIAS, _NAN).astype(jnp.uint8)
    return Quantised(values, exponents, how)
