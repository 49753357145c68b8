"""The digest on devices against Python integers, sharding, and what it detects."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sparse_delta.digest import digest_box, split_index, strides_of

_MASK = 0xFFFFFFFF


def hashes(u: int, index: int) -> tuple[int, int]:
    """The contract's formula in Python integers."""
    low, high = index & _MASK, index >> 32
    a = ((u + 1) * 0x9E3779B1 ^ (low * 0x85EBCA77 + high * 0xC2B2AE3D)) & _MASK
    a ^= a >> 15
    a = a * 0x2C1B3C6D & _MASK
    a ^= a >> 13
    return a, (a ^ a >> 16) * 0x297A2D39 & _MASK


def digest_of(bits: np.ndarray, origin: int, strides: tuple[int, ...]) -> tuple[int, int]:
    first = second = 0
    for place in np.ndindex(bits.shape):
        index = origin + sum(i * s for i, s in zip(place, strides, strict=True))
        a, b = hashes(int(bits[place]), index)
        first, second = first + a & _MASK, second + b & _MASK
    return first, second


def run(bits: np.ndarray, origin: int, strides: tuple[int, ...]) -> tuple[int, int]:
    halves = jnp.array(split_index(origin), jnp.uint32)
    sums = jax.jit(functools.partial(digest_box, strides=strides))(bits, halves)
    return int(sums[0]), int(sums[1])


# Origins and strides around every carry into the high half and far above it.
CASES = [
    ((), 0, ()),
    ((0, 5), 3, (5, 1)),
    ((7, 13), 0, (13, 1)),
    ((3, 4, 5), (1 << 32) - 17, (20, 5, 1)),
    ((3, 4, 5), (5 << 32) + 1, (1 << 33, 0x1_8000_0001, 1)),
    ((2, 9), _MASK, (0xFFFF_FFFF, 1)),
    ((70000,), 1, (0xFFFF,)),  # steps beyond 16 bits
]


@pytest.mark.parametrize(("shape", "origin", "strides"), CASES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_digest_is_the_sum_of_the_hashes_of_elements_and_places(shape, origin, strides, dtype):
    if shape == (70000,) and dtype != np.uint16:
        pytest.skip("one width is enough for the long case")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    assert run(bits, origin, strides) == digest_of(bits, origin, strides)


def test_golden_digest():
    # A change of these breaks every payload that is already written.
    assert hashes(0x3F80, 5) == (0x30049CBA, 0x43F3DC4E)
    golden = 0x1047AC45, 0x1F77DF77
    assert run(np.arange(6, dtype=np.uint16).reshape(2, 3), 0, (3, 1)) == golden


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 11), st.integers(0, (1 << 16) - 1), st.integers(0, 1 << 45))
def test_one_changed_element_always_changes_the_first_sum(place, value, origin):
    bits = np.arange(12, dtype=np.uint16) * 997
    other = bits.copy()
    other[place] = value
    before, after = run(bits, origin, (1,)), run(other, origin, (1,))
    assert (before[0] == after[0]) == (value == bits[place])
    old, new = (hashes(int(b[place]), origin + place) for b in (bits, other))
    updated = tuple((d + y - x) & _MASK for d, x, y in zip(before, old, new, strict=True))
    assert updated == after


def test_two_equal_elements_that_trade_places_with_others_are_seen():
    bits = np.array([1, 2, 3, 4], np.uint16)
    swapped = np.array([2, 1, 3, 4], np.uint16)
    assert run(bits, 0, (1,)) != run(swapped, 0, (1,))


def test_the_sums_of_shards_add_up_to_those_of_the_tensor():
    bits = np.random.default_rng(1).integers(0, 1 << 16, (8, 12)).astype(np.uint16)
    total = [0, 0]
    for row in range(0, 8, 2):
        for col in range(0, 12, 6):
            origin = row * 12 + col
            part = run(np.ascontiguousarray(bits[row : row + 2, col : col + 6]), origin, (12, 1))
            total = [(t + p) & _MASK for t, p in zip(total, part, strict=True)]
    assert tuple(total) == run(bits, 0, strides_of((8, 12)))


def test_the_array_is_read_in_one_fused_reduction():
    compiled = (
        jax.jit(functools.partial(digest_box, strides=(1024, 1)))
        .lower(
            jax.ShapeDtypeStruct((512, 1024), jnp.uint16), jax.ShapeDtypeStruct((2,), jnp.uint32)
        )
        .compile()
    )
    analysis = compiled.cost_analysis()
    # Each 16-bit element is read once; indices and hashes are never written to memory.
    assert analysis["bytes accessed"] < 1.1 * 512 * 1024 * 2
