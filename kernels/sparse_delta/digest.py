"""Digest of arrays where they lie: two 32-bit sums over hashes of every element and its place.

An element with bits u (as u32) at the row-major index i of its tensor, i = hi · 2^32 + lo, adds

    a = ((u + 1) · 0x9E3779B1) ^ (lo · 0x85EBCA77 + hi · 0xC2B2AE3D)
    a ^= a >> 15;  a *= 0x2C1B3C6D;  a ^= a >> 13             to the first sum and
    (a ^ (a >> 16)) · 0x297A2D39                              to the second, all mod 2^32.

Every step is a bijection of u, so one changed element always changes the first sum; sums make the
digest independent of order, of sharding and of tiles, and let a sender that knows the digest of
the old weights update it by its changed elements alone. It detects damage and mix-ups, not an
adversary. Multipliers: the primes of xxHash32 (Collet) and an integer finaliser found by search
("lowbias32" family, Wellons).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt, UInt32

_VALUE, _LOW, _HIGH = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_MIX, _SECOND = 0x2C1B3C6D, 0x297A2D39
# Of the inner dimensions whose indices are made once for all outer ones.
_INNER_ELEMENTS = 1 << 16


def element_hashes(
    bits: UInt[Array, "*shape"], low: UInt32[Array, "*#shape"], high: UInt32[Array, "*#shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """What each element adds to the two sums.

    Args:
      bits: of the elements.
      low: low half of the row-major index in the tensor.
      high: high half of it.
    """
    u = bits.astype(jnp.uint32)
    a = ((u + 1) * jnp.uint32(_VALUE)) ^ (low * jnp.uint32(_LOW) + high * jnp.uint32(_HIGH))
    a = (a ^ (a >> 15)) * jnp.uint32(_MIX)
    a = a ^ (a >> 13)
    return a, (a ^ (a >> 16)) * jnp.uint32(_SECOND)


def digest_box(
    bits: UInt[Array, "..."], origin: UInt32[Array, " 2"], strides: Sequence[int]
) -> UInt32[Array, " 2"]:
    """Sums of a box of a tensor: one pass that reads each element once.

    Args:
      bits: of the elements, any shape.
      origin: low and high half of the row-major index in the tensor of the box's first element.
      strides: by how much that index grows along each dimension of the box.

    Returns:
      The two sums; those of disjoint boxes add up, mod 2^32, to those of their union.
    """
    low, high = _indices(bits.shape, origin, strides)
    hashes = element_hashes(bits, low, high)
    zeros = (jnp.uint32(0), jnp.uint32(0))
    # One reduction of two operands, so that XLA cannot make two passes of it.
    first, second = lax.reduce(
        hashes, zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), tuple(range(bits.ndim))
    )
    return jnp.stack([first, second])


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of a tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def split_index(index: int) -> tuple[int, int]:
    """Low and high half of a 64-bit index."""
    return index & 0xFFFFFFFF, index >> 32


def _indices(
    shape: tuple[int, ...], origin: Array, strides: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Low and high half of every element's index.

    XLA may keep the halves of outer and of inner dimensions in memory. Inner is the last dimension,
    with those before it while all of them have at most 2^16 elements together: their halves fill
    register tiles as the tensor does. Outer are the others, a row for each inner block: few, unless
    the dimension before the inner ones is long, as in (70000, 3), whose outer halves are 70,000
    rows of one element. Only the sum of outer and inner, with a carry, costs operations an element.
    """
    ones = (1,) * len(shape)
    split = next(k for k in range(len(shape) + 1) if math.prod(shape[k:]) <= _INNER_ELEMENTS)
    split = min(split, max(len(shape) - 1, 0))
    outer = origin[0].reshape(ones), origin[1].reshape(ones)
    inner = jnp.zeros(ones, jnp.uint32), jnp.zeros(ones, jnp.uint32)
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        if size == 1:
            continue
        along = (*ones[:axis], size, *ones[axis + 1 :])
        part = _product(lax.iota(jnp.uint32, size).reshape(along), stride)
        if axis < split:
            outer = _sum(outer, part)
        else:
            inner = _sum(inner, part)
    return _sum(outer, inner)


def _sum(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """64-bit sum of two arrays of halves, broadcast."""
    low = a[0] + b[0]
    return low, a[1] + b[1] + (low < b[0]).astype(jnp.uint32)


def _product(steps: Array, stride: int) -> tuple[Array, Array]:
    """64-bit product of a u32 array and a stride, as two halves."""
    low, high = split_index(stride)
    # (s1·2^16 + s0) · (l1·2^16 + l0), whose partial products fit 32 bits.
    s0, s1 = steps & 0xFFFF, steps >> 16
    l0, l1 = jnp.uint32(low & 0xFFFF), jnp.uint32(low >> 16)
    middle = s1 * l0 + (s0 * l0 >> 16)
    cross = s0 * l1 + (middle & 0xFFFF)
    carry = s1 * l1 + (middle >> 16) + (cross >> 16)
    return steps * jnp.uint32(low), carry + steps * jnp.uint32(high)
