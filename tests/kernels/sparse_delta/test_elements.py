"""Element formats: what a dtype's bits mean, and that changes of them lose nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.sparse_delta import elements, loops
from kernels.sparse_delta.elements import ElementFormat, element_format

EIGHT_AND_SIXTEEN = [
    jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3b11fnuz,
    jnp.float8_e8m0fnu, jnp.int8, jnp.uint8, jnp.int16, jnp.uint16,
]  # fmt: skip


def all_bits(fmt: ElementFormat) -> np.ndarray:
    return np.arange(1 << fmt.width_bits, dtype=np.int64).astype(fmt.bits_dtype)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (jnp.bfloat16, ElementFormat(16, "float", 8, 7)),
        (jnp.float16, ElementFormat(16, "float", 5, 10)),
        (jnp.float32, ElementFormat(32, "float", 8, 23)),
        (jnp.float8_e4m3fn, ElementFormat(8, "float", 4, 3)),
        (jnp.float8_e5m2, ElementFormat(8, "float", 5, 2)),
        (jnp.float8_e8m0fnu, ElementFormat(8, "unsigned")),
        (jnp.int32, ElementFormat(32, "signed")),
        (jnp.uint16, ElementFormat(16, "unsigned")),
        (jnp.bool_, ElementFormat(8, "unsigned")),
    ],
)
def test_formats_of_dtypes(dtype, expected):
    assert element_format(dtype) == expected


@pytest.mark.parametrize("dtype", [jnp.int4, np.float64, np.complex64, np.int64, np.dtype("S1")])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="8, 16 or 32 bits"):
        element_format(dtype)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((12, "unsigned"), "width_bits"),
        ((16, "float", 8, 8), "a float is a sign"),
        ((32, "float", 11, 20), "exponent of 1 to 8 bits"),
    ],
)
def test_impossible_formats_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ElementFormat(*fields)


def test_as_bits_shares_memory():
    weights = np.array([1.0, -0.0], jnp.bfloat16)
    bits = elements.as_bits(weights)
    assert bits.tolist() == [0x3F80, 0x8000]
    assert np.shares_memory(bits, weights)


@pytest.mark.parametrize("dtype", EIGHT_AND_SIXTEEN)
def test_order_sorts_values_and_is_a_bijection(dtype):
    fmt = element_format(dtype)
    bits = all_bits(fmt)
    ordered = elements.order(bits, fmt)
    assert np.array_equal(np.sort(ordered), bits)
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = bits[np.argsort(ordered)].view(dtype).astype(np.float64)
    assert np.all(np.diff(values[np.isfinite(values)]) >= 0)


def test_exponent_is_that_of_frexp():
    values = np.array([1.0, -1.5, 2.0, 2.0**-126, -(2.0**-127), 0.0, np.inf], np.float32)
    fmt = element_format(np.float32)
    # Biased by 127; subnormals and zero have 0, infinities 255.
    expected = [127, 127, 128, 1, 0, 0, 255]
    assert elements.exponent(elements.as_bits(values), fmt).tolist() == expected


@pytest.mark.parametrize("dtype", EIGHT_AND_SIXTEEN)
def test_every_old_value_with_every_code_gives_another_value(dtype):
    """changed_bits inverts change_code: all old values, a sample of new ones and the edges."""
    fmt = element_format(dtype)
    sign, is_float = fmt.sign_bit, fmt.kind == "float"
    old = all_bits(fmt)[:: 1 if fmt.width_bits == 8 else 251].astype(int).tolist()
    edges = [0, 1, sign - 1, sign, sign + 1, 2 * sign - 1]
    for before in [*old, *edges]:
        codes = {}
        for after in [*edges, *range(0, 2 * sign, 1 if fmt.width_bits == 8 else 1009)]:
            if after == before:
                continue
            code = loops.change_code(before, after, sign, is_float)
            assert 0 <= code <= 2 * sign - 2
            assert loops.changed_bits(before, code, sign, is_float) == after
            assert codes.setdefault(code, after) == after


def test_codes_are_small_next_door_and_positive_away_from_zero():
    fmt = element_format(jnp.bfloat16)
    one = 0x3F80
    # Code 2 (|c| − 1) + [c > 0]: one step away from zero is 1, one towards it 0.
    for sign in (0, 0x8000):
        assert loops.change_code(one | sign, (one + 1) | sign, fmt.sign_bit, True) == 1
        assert loops.change_code(one | sign, (one - 1) | sign, fmt.sign_bit, True) == 0  # 0x3F7F
    assert loops.change_code(0x8000, 0x0000, fmt.sign_bit, True) == 0  # −0 to +0, towards
    assert loops.change_code(0x0000, 0x8000, fmt.sign_bit, True) == 0
