"""Elements as unsigned bits: how a dtype is read, ordered and split into exponent and the rest.

Everything below this module sees unsigned integers of 8, 16 or 32 bits only, so −0.0, NaN payloads
and infinities are ordinary values.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

Kind = Literal["float", "signed", "unsigned"]

WIDTHS = (8, 16, 32)


@dataclass(frozen=True)
class ElementFormat:
    """How the bits of one element are read.

    Attributes:
      width_bits: 8, 16 or 32.
      kind: how the bits are ordered; floats are a sign and a magnitude.
      exponent_bits: of a float, 0 of an integer.
      mantissa_bits: stored ones of a float, 0 of an integer.
    """

    width_bits: int
    kind: Kind
    exponent_bits: int = 0
    mantissa_bits: int = 0

    def __post_init__(self) -> None:
        if self.width_bits not in WIDTHS:
            raise ValueError(f"width_bits must be one of {WIDTHS}, got {self.width_bits}")
        split = 1 + self.exponent_bits + self.mantissa_bits
        if self.kind == "float" and not (split == self.width_bits and 1 <= self.exponent_bits <= 8):
            raise ValueError(
                f"a float is a sign, an exponent of 1 to 8 bits and a mantissa: {self}"
            )

    @property
    def bits_dtype(self) -> np.dtype:
        """The unsigned integer that holds the bits of one element."""
        return np.dtype(f"u{self.width_bits // 8}")

    @property
    def sign_bit(self) -> int:
        return 1 << (self.width_bits - 1)

    @property
    def magnitude_mask(self) -> int:
        """Bits of a float without its sign; 0 of an integer, which is in one class."""
        return self.sign_bit - 1 if self.kind == "float" else 0


@functools.cache
def _format_of(dtype: np.dtype) -> ElementFormat:
    width = 8 * dtype.itemsize
    if dtype == np.bool_:
        return ElementFormat(width, "unsigned")
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits == width in WIDTHS:
        signed = jnp.issubdtype(dtype, jnp.signedinteger)
        return ElementFormat(width, "signed" if signed else "unsigned")
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits == width in WIDTHS:
        info = jnp.finfo(dtype)
        # A scale without a sign bit (float8_e8m0fnu) is ordered as its bits are.
        if 1 + info.nexp + info.nmant != width:
            return ElementFormat(width, "unsigned")
        return ElementFormat(width, "float", info.nexp, info.nmant)
    raise TypeError(
        f"elements must be numbers of 8, 16 or 32 bits, got {dtype}; "
        "send others as a view of one of those"
    )


def element_format(dtype: Any) -> ElementFormat:
    """The format of a dtype of JAX or NumPy.

    Raises:
      TypeError: elements of another size than 1, 2 or 4 bytes, or no numbers (complex, strings).

    >>> element_format(jnp.bfloat16)
    ElementFormat(width_bits=16, kind='float', exponent_bits=8, mantissa_bits=7)
    """
    return _format_of(np.dtype(dtype))


def as_bits(array: np.ndarray) -> np.ndarray:
    """The same memory read as unsigned integers of the elements' width; no copy."""
    return array.view(element_format(array.dtype).bits_dtype)


def order(bits: np.ndarray, fmt: ElementFormat) -> np.ndarray:
    """Bits to integers in which neighbouring values are neighbours, a bijection of w-bit integers.

    Floats: u ^ (all ones if the sign bit is set, else the sign bit); signed: u ^ sign bit;
    unsigned: u.

    Args:
      bits: unsigned integers of `fmt.bits_dtype`, any shape.
      fmt: how to read them.
    """
    sign = bits.dtype.type(fmt.sign_bit)
    if fmt.kind == "unsigned":
        return bits
    if fmt.kind == "signed":
        return bits ^ sign
    return np.where(bits & sign, ~bits, bits ^ sign)


def exponent(bits: np.ndarray, fmt: ElementFormat) -> np.ndarray:
    """Biased exponents 0 … 255, u8; 0 of integers."""
    if fmt.kind != "float":
        return np.zeros(bits.shape, np.uint8)
    magnitude = bits & bits.dtype.type(fmt.magnitude_mask)
    return (magnitude >> bits.dtype.type(fmt.mantissa_bits)).astype(np.uint8)
