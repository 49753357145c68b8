"""What the TPU kernels compute on arrays of 256 lanes, one sub-block a row.

* Elements narrower than 32 bits are read as 32-bit words, which hold p = 32 / w elements of
  neighbouring rows; a row i of words in the part h of the columns gives the sub-blocks
  s = (p·i + j)·k + h, j < p. Rows of the arrays here are ordered q = (h, j, i).
* A rank is a prefix sum over lanes, which the vector unit lacks; the matrix unit has it as a
  product with a triangular matrix. Each element enters as 2^(8·(class mod 3)) into one of three
  words, so that one product counts three classes at once, in the 24 bits that float32 adds
  exactly; powers of two are exact in bfloat16, too.
* Compaction is a logarithmic shift: a record that has to move d lanes to the left moves by 2^b
  where bit b of d is set, lowest bit first, and never meets another one (Warren, Hacker's Delight,
  section 7-4).
* Results that come out in every g-th row are collected by a strided load.

16-bit vectors, unsigned comparison and integer reduction are avoided, since not every generation
has them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels.sparse_delta.elements import ElementFormat
from kernels.sparse_delta.reference import CLASSES, SUBBLOCK
from kernels.sparse_delta.tpu_layout import LANES, Layout

FIELDS = 3  # classes counted by one float32 accumulator, 8 bits each


def words(ref: Any, chunk: Any, own: Layout) -> list[Array]:
    """Words of a chunk, int32 (n, 256) for each part of the columns."""
    rows = own.word_rows * own.packing
    start = pl.multiple_of(chunk * rows, rows)
    parts = (ref[pl.ds(start, rows), pl.ds(h * SUBBLOCK, SUBBLOCK)] for h in range(own.parts))
    # Rows of narrow elements fill a word from its lowest bits.
    return [pltpu.bitcast(part, jnp.int32) for part in parts]


def split(words: Sequence[Array], own: Layout) -> Array:
    """The elements of words as int32 (M, 256), rows in the order (h, j, i)."""
    ones = (1 << own.width) - 1
    if own.packing == 1:
        return stack(words)
    return stack(
        [
            lax.shift_right_logical(word, jnp.int32(own.width * j)) & ones
            for word in words
            for j in range(own.packing)
        ]
    )


def stack(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=0)


def iota(shape: tuple[int, ...], axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def subblock_of_row(shape: tuple[int, ...], axis: int, own: Layout) -> Array:
    """Which sub-block of the chunk the kernel's row q is: s = (p·i + j)·k + h."""
    q = iota(shape, axis)
    n, p = own.word_rows, own.packing  # powers of two: divisions are shifts
    i, j, h = q & (n - 1), q >> log2(n) & (p - 1), q >> log2(n * p)
    return (p * i + j) * own.parts + h


def log2(power: int) -> int:
    return power.bit_length() - 1


def each_chunk(own: Layout, body: Callable[[Any], None]) -> None:
    """Runs `body` for every chunk: a loop where its stores are aligned at any number."""
    if own.chunk == 128:
        lax.fori_loop(0, own.chunks, lambda c, _: body(c), None)
    else:
        for c in range(own.chunks):
            body(c)


def classes(bits: Array, limits: Any, fmt: ElementFormat) -> Array:
    """Classes by a binary search among the limits, which are thresholds in units of bits."""
    magnitude = bits & fmt.magnitude_mask if fmt.kind == "float" else jnp.zeros_like(bits)
    t = [limits[k] for k in range(CLASSES - 1)]
    high = magnitude >= t[3]
    middle = magnitude >= jnp.where(high, t[5], t[1])
    last = jnp.where(high, jnp.where(middle, t[6], t[4]), jnp.where(middle, t[2], t[0]))
    low = magnitude >= last
    return (jnp.where(high, 4, 0) + jnp.where(middle, 2, 0) + jnp.where(low, 1, 0)).astype(
        jnp.int32
    )


def fields(classes: Array) -> list[Array]:
    """2^(8·(class mod 3)) in the word that counts the class, 0 in the two others; bfloat16."""
    fields = []
    for first in range(0, CLASSES, FIELDS):
        power = lax.bitcast_convert_type((127 + 8 * (classes - first)) << 23, jnp.float32)
        inside = (classes >= first) & (classes < first + FIELDS)
        fields.append(jnp.where(inside, power, 0.0).astype(jnp.bfloat16))
    return fields


def product(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def before(values: Array) -> Array:
    """Sums over the lanes before each: int32, exact below 2^24."""
    lower = iota((LANES, LANES), 0) < iota((LANES, LANES), 1)
    lower = lower.astype(jnp.bfloat16)
    left, right = values[:, :LANES], values[:, LANES:]
    first = product(left, lower)
    total = product(left, jnp.ones((LANES, LANES), jnp.bfloat16))
    return jnp.concatenate([first, product(right, lower) + total], axis=1).astype(jnp.int32)


def ranks(classes: Array) -> tuple[Array, list[Array]]:
    """Rank of each element in its sub-block, and the packed counters before it."""
    counters = [before(field) for field in fields(classes)]
    own = jnp.where(classes < 3, counters[0], jnp.where(classes < 6, counters[1], counters[2]))
    field = classes - jnp.where(classes < 3, 0, jnp.where(classes < 6, 3, 6))
    return lax.shift_right_logical(own, 8 * field) & 0xFF, counters


def move_left(words: list[Array], steps: int, distance: Callable[[Array], Array]) -> list[Array]:
    """Moves each record left by its distance; a first word of 0 is an empty place."""
    lanes = words[0].shape[1]
    for b in range(steps):
        step = 1 << b
        shifted = [pltpu.roll(word, lanes - step, 1) for word in words]
        arrives = (distance(shifted[0]) & step) != 0
        stays = (distance(words[0]) & step) == 0
        words = [
            jnp.where(arrives, there, jnp.where(stays, here, 0))
            for here, there in zip(words, shifted, strict=True)
        ]
    return words


def move_right(words: list[Array], offset: Array, steps: int) -> list[Array]:
    """Rotates every row right by its own offset."""
    for b in range(steps):
        moves = (offset & (1 << b)) != 0
        words = [jnp.where(moves, pltpu.roll(word, 1 << b, 1), word) for word in words]
    return words


def merge_streams(word: Array, own: Layout) -> Array:
    """ORs the rows (h, j, i) of the same i: (n, lanes) from (M, lanes)."""
    n = own.word_rows
    return functools.reduce(jnp.bitwise_or, [word[q * n : (q + 1) * n] for q in range(own.streams)])


def merge_rows(word: Array, group: int) -> Array:
    """ORs `group` neighbouring rows into the first of them; the others hold rubbish."""
    for b in range(log2(group)):
        word = word | pltpu.roll(word, word.shape[0] - (1 << b), 0)
    return word


def order(bits: Array, fmt: ElementFormat) -> Array:
    """`reference.order` in int32 lanes."""
    sign = signed(fmt.sign_bit)
    if fmt.kind == "unsigned":
        return bits
    if fmt.kind == "signed":
        return bits ^ sign
    ones = signed((fmt.sign_bit << 1) - 1)
    return bits ^ jnp.where((bits & sign) != 0, ones, sign)


def unorder(ordered: Array, fmt: ElementFormat) -> Array:
    if fmt.kind != "float":
        return order(ordered, fmt)
    sign, ones = signed(fmt.sign_bit), signed((fmt.sign_bit << 1) - 1)
    return ordered ^ jnp.where((ordered & sign) != 0, sign, ones)


def signed(word: int) -> Array:
    """A 32-bit pattern as int32."""
    return jnp.int32(word - (1 << 32) if word >= 1 << 31 else word)


def add_change(bits: Array, change: Array, fmt: ElementFormat) -> Array:
    negative = (bits & signed(fmt.sign_bit)) != 0
    step = jnp.where(negative, -change, change) if fmt.kind == "float" else change
    ones = signed((fmt.sign_bit << 1) - 1)
    return unorder((order(bits, fmt) + step) & ones, fmt)


def store_lanes(refs: Sequence[Any], start: Any, values: Array) -> None:
    """Stores rows into scratch of 128 lanes each, from which alone strided loads are possible."""
    for k, ref in enumerate(refs):
        ref[pl.ds(start, values.shape[0]), :] = values[:, k * LANES : (k + 1) * LANES]


def every(refs: Sequence[Any], count: int, stride: int) -> Array:
    """Rows 0, stride, 2·stride … of scratch of 128 lanes each, side by side."""
    return jnp.concatenate([ref[pl.ds(0, count, stride=stride), :] for ref in refs], axis=1)


def bfloat16(small: Array) -> Array:
    """Integers up to 256, exactly."""
    return small.astype(jnp.float32).astype(jnp.bfloat16)


def lane_sums(values: Array) -> Array:
    """Sums over lanes, one row's sum in each lane: int32 (8, M), all rows alike."""
    ones = jnp.ones((8, values.shape[1]), jnp.bfloat16)
    along_lanes = (((1,), (1,)), ((), ()))
    sums = lax.dot_general(ones, values, along_lanes, preferred_element_type=jnp.float32)
    return sums.astype(jnp.int32)


def by_subblock(counts: Array, own: Layout) -> Array:
    """Counts up to 256, one a lane, from the order of the kernel's rows to that of sub-blocks."""
    if own.streams == 1:
        return counts
    shape = own.chunk, own.chunk
    moves = subblock_of_row(shape, 0, own) == iota(shape, 1)
    permutation = jnp.where(moves, 1.0, 0.0).astype(jnp.bfloat16)
    return product(bfloat16(counts), permutation).astype(jnp.int32)


def chunk_lanes(c: Any, own: Layout) -> Any:
    """The lanes of a chunk's sub-blocks in a row of all."""
    start = c * own.chunk
    return pl.ds(start if isinstance(c, int) else pl.multiple_of(start, own.chunk), own.chunk)


def signed_words(words: Array) -> Array:
    """uint32 as int32, in which all is computed."""
    return pltpu.bitcast(words, jnp.int32)


def unsigned(words: Array) -> Array:
    """int32 as uint32. Done here, because outside it were a pass over memory."""
    return pltpu.bitcast(words, jnp.uint32)


def resized(word: Array, lanes: int) -> Array:
    rows, own = word.shape
    if lanes <= own:
        return word[:, :lanes]
    return jnp.concatenate([word, jnp.zeros((rows, lanes - own), word.dtype)], axis=1)
