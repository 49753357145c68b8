"""The compiled loops of the host coder: every numba function of the package, and nothing else.

Weights come in as unsigned integers of 8, 16 or 32 bits in boxes (lead, rows, cols). Only `scan`
and `apply` read all of them, by vector instructions written in LLVM's portable vector types, which
it lowers to AVX-512, AVX2, SSE or NEON; all other loops touch changed elements only, as records
that do not depend on the width, so they are compiled once.

numba turns a product or sum of small integers into 64 bits, and one of u64 and i64 into a float.
Here all scalars are int64, and u64 are used for bit sets only.

Every read of an encoded stream is checked against its end in the loop that does it.

One file, though a long one: numba's cache on disk looks at the time of a function's own file only,
so a caller in another file would go on using what it had compiled of a function that changed here.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

SUB_BLOCK = 256
CLASSES = 8

# rANS: states of 32 bits that keep within [2^16, 2^32) by words of 16 bits.
PROBABILITY_BITS = 12
RANS_LOW = 1 << 16
ONE_STATE_CHANGES = 1024  # fewer in a tile, and one state serves gaps and changes
ESCAPE = 255  # symbol: the number follows in raw bits
GAP_BITS = 20  # raw bits of an escaped gap; no tile is larger
GAP_LEVELS = 57

# Sub-blocks that are scanned before their changes are looked up, and that are asked for ahead.
_CHUNK_BLOCKS = 16
_BLOCKS_AHEAD = 8
_ROWS_AHEAD = 4

# Bytes by which one step of an encoder may pass the end it was given before it looks.
SLACK = 64

EMPTY = 0
BLOCK_OFFSET = 1
BITMAP = 2
ENTROPY = 3
DENSE = 4

# What is wrong with a stream; index into `codec.REASONS`.
OK = 0
SHORT = 1
LONG = 2
COUNTS = 3
RANGE = 4
STATE = 5
PADDING = 6
BASE = 7
MODE = 8


# No division here has a divisor of zero, so none needs Python's check for it.
_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


def _compiled(function: Any) -> Any:
    """Compile on first use and keep the result on disk, for the user's next process.

    Where neither the package's folder nor the user's cache folder can be written, numba refuses to
    cache; then each process compiles for itself.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        return numba.njit(**_OPTIONS)(function)


# ------------------------------------------------------------------- instructions that numba lacks


def _instruction(function: Any) -> Any:
    # Called with one argument fewer than it has: numba adds the typing context.
    return intrinsic(function)


def _element_pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [index])


def _load_vector(builder: Any, pointer: Any, width: int, lanes: int) -> Any:
    vector = ir.VectorType(ir.IntType(width), lanes)
    pointer = builder.bitcast(pointer, vector.as_pointer())
    return builder.load(pointer, align=width // 8)


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    vector = ir.VectorType(scalar.type, lanes)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
    one = builder.insert_element(
        ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
    )
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


@_instruction
def _popcount(typing: Any, bits: Any) -> Any:
    """Number of set bits of a u64, int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


@_instruction
def _lowest_bit(typing: Any, bits: Any) -> Any:
    """Index of the lowest set bit of a u64, int64; 64 of none."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@_instruction
def _bit_length(typing: Any, number: Any) -> Any:
    """Bits of an int64 ≥ 0 from its highest set one on, int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zeros = builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))
        return builder.sub(ir.Constant(ir.IntType(64), 64), zeros)

    return types.int64(types.int64), generate


@_instruction
def _load_64(typing: Any, data: Any, at: Any) -> Any:
    """Eight bytes from `at` as an int64, little-endian."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, data, args[0], args[1])
        return builder.load(builder.bitcast(pointer, ir.IntType(64).as_pointer()), align=1)

    return types.int64(data, types.intp), generate


@_instruction
def _store_64(typing: Any, data: Any, at: Any, value: Any) -> Any:
    """Write an int64 as eight bytes from `at`, little-endian."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, data, args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.int64), generate


@_instruction
def _changed_64(typing: Any, old: Any, i: Any, new: Any, j: Any) -> Any:
    """Set of 64 bits: bit k is old[i + k] != new[j + k]."""
    width = old.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sides = [
            _load_vector(builder, _element_pointer(context, builder, kind, array, index), width, 64)
            for kind, array, index in ((old, args[0], args[1]), (new, args[2], args[3]))
        ]
        return builder.bitcast(builder.icmp_unsigned("!=", *sides), ir.IntType(64))

    return types.uint64(old, types.intp, new, types.intp), generate


@_instruction
def _in_range_64(typing: Any, array: Any, i: Any, mask: Any, low: Any, span: Any) -> Any:
    """Set of 64 bits: bit k is low <= (array[i + k] & mask) < low + span; all of them if span = 0.

    The subtraction wraps, so one comparison tests both ends; `span - 1` makes a span of all values
    expressible.
    """
    element = array.dtype
    width = element.bitwidth

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, array, args[0], args[1])
        values = _load_vector(builder, pointer, width, 64)
        mask, low, span = (_splat(builder, arg, 64) for arg in args[2:])
        one = ir.Constant(mask.type, [1] * 64)
        shifted = builder.sub(builder.and_(values, mask), low)
        inside = builder.icmp_unsigned("<=", shifted, builder.sub(span, one))
        return builder.bitcast(inside, ir.IntType(64))

    return types.uint64(array, types.intp, element, element, element), generate


@_instruction
def _copy(typing: Any, target: Any, i: Any, source: Any, j: Any, n: Any) -> Any:
    """target[i : i + n] = source[j : j + n] of one type of elements, which do not overlap."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to = _element_pointer(context, builder, target, args[0], args[1])
        start = _element_pointer(context, builder, source, args[2], args[3])
        cgutils.raw_memcpy(builder, to, start, args[4], target.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.intp), generate


@_instruction
def _prefetch(typing: Any, array: Any, i: Any) -> Any:
    """Ask for the 256 elements from `i` on, which need not exist."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = builder.bitcast(
            _element_pointer(context, builder, array, args[0], args[1]),
            ir.IntType(8).as_pointer(),
        )
        word = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [data.type, word, word, word]),
            "llvm.prefetch.p0",
        )
        to_read, keep, as_data = (ir.Constant(word, n) for n in (0, 3, 1))
        for line in range(0, SUB_BLOCK * array.dtype.bitwidth // 8, 64):
            address = builder.gep(data, [ir.Constant(ir.IntType(64), line)])
            builder.call(function, [address, to_read, keep, as_data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@_instruction
def _count_above(
    typing: Any, array: Any, i: Any, mask: Any, limits: Any, reached: Any, block: Any
) -> Any:
    """Add to row `block` of `reached` what the 256 elements from `i` reach, into the next row.

    reached[block + 1, k] = reached[block, k] + number of elements with
    (array[.] & mask) >= limits[k], k = 0 … 7.

    Comparisons are summed in lanes of the elements' own width; a lane of 8 bits takes 4 of them.
    """
    width = array.dtype.bitwidth
    lanes = 512 // width

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, array, args[0], args[1])
        mask = _splat(builder, args[2], lanes)
        limit_data = context.make_array(limits)(context, builder, args[3]).data
        row = builder.mul(args[5], ir.Constant(ir.IntType(64), CLASSES))
        before = _element_pointer(context, builder, reached, args[4], row)
        vector = ir.VectorType(ir.IntType(width), lanes)
        at = [ir.Constant(ir.IntType(64), k) for k in range(CLASSES)]
        bounds = [_splat(builder, builder.load(builder.gep(limit_data, [k])), lanes) for k in at]
        sums = [ir.Constant(vector, None)] * CLASSES
        for start in range(0, SUB_BLOCK, lanes):
            offset = builder.gep(pointer, [ir.Constant(ir.IntType(64), start)])
            values = builder.and_(_load_vector(builder, offset, width, lanes), mask)
            for k in range(1, CLASSES):
                above = builder.sext(builder.icmp_unsigned(">=", values, bounds[k]), vector)
                sums[k] = builder.sub(sums[k], above)
        wide = ir.VectorType(ir.IntType(max(width, 16)), lanes)
        reduce = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(wide.element, [wide]),
            f"llvm.vector.reduce.add.v{lanes}i{wide.element.width}",
        )
        word = ir.IntType(32)
        counts = ir.Constant(ir.VectorType(word, CLASSES), [SUB_BLOCK] + [0] * (CLASSES - 1))
        for k in range(1, CLASSES):
            total = builder.zext(sums[k], wide) if width < 16 else sums[k]
            total = builder.call(reduce, [total])
            total = builder.zext(total, word) if width < 32 else total
            counts = builder.insert_element(counts, total, ir.Constant(word, k))
        counts = builder.add(counts, _load_vector(builder, before, 32, CLASSES))
        after = builder.gep(before, [ir.Constant(ir.IntType(64), CLASSES)])
        builder.store(counts, builder.bitcast(after, counts.type.as_pointer()), align=4)
        return context.get_dummy_value()

    signature = types.void(array, types.intp, array.dtype, limits, reached, types.intp)
    return signature, generate


# ------------------------------------------------------------------------------------ one element


# Signs are as good as random, and a branch on one costs more than all of the arithmetic.


@_compiled
def _negative(bits, sign, is_float):
    """−1 for a float with its sign bit set, else 0."""
    return -np.int64((bits & sign != 0) & is_float)


@_compiled
def _ordered(bits, sign, is_float):
    """Integer in which neighbouring values are neighbours; see `elements.order`."""
    return bits ^ sign ^ (_negative(bits, sign, is_float) & (sign - 1))


@_compiled
def change_code(old, new, sign, is_float):
    """Code 2(|c| − 1) + [c > 0] of the change c of an element, 0 … 2^w − 2; old != new.

    c counts the values between, away from zero for floats, wrapped into w bits.
    """
    flip = _negative(old, sign, is_float)
    change = _ordered(new, sign, is_float) - _ordered(old, sign, is_float)
    change = (((change ^ flip) - flip) & (2 * sign - 1) ^ sign) - sign
    down = change >> 63
    return 2 * ((change ^ down) - down) - 1 + down


@_compiled
def changed_bits(old, code, sign, is_float):
    """Inverse of `change_code`: the new bits."""
    flip = _negative(old, sign, is_float) ^ ((code & 1) - 1)
    change = (((code >> 1) + 1) ^ flip) - flip
    bits = (_ordered(old, sign, is_float) + change) & (2 * sign - 1) ^ sign
    return bits ^ (_negative(bits, sign, is_float) & (sign - 1))


# ------------------------------------------------------------------------------------ whole tiles


@_compiled
def _clear(array, start, end):
    for k in range(start, end):
        array[k] = 0


@_compiled
def _gather(flat, start, width, stride, size, scratch):
    """Copy a tile's rows to the front of `scratch` and fill its last sub-block with zeros."""
    for line in range(size // width):
        here = start + line * stride
        # The rows of a tile are too short for the processor to see where they go on.
        for column in range(0, width, SUB_BLOCK):
            _prefetch(flat, here + _ROWS_AHEAD * stride + column)
        _copy(scratch, line * width, flat, here, width)
    _clear(scratch, size, (size + SUB_BLOCK - 1) // SUB_BLOCK * SUB_BLOCK)


@_compiled
def _class_set(flat, i, mask, low, span):
    """Elements from `i` on whose masked bits are in a class's range, as four sets of 64."""
    return (
        _in_range_64(flat, i, mask, low, span),
        _in_range_64(flat, i + 64, mask, low, span),
        _in_range_64(flat, i + 128, mask, low, span),
        _in_range_64(flat, i + 192, mask, low, span),
    )


@_compiled
def _first_bits(n):
    """Set of the lowest min(max(n, 0), 64) bits."""
    n = min(max(n, 0), 64)
    # A shift by 64 is undefined, so it is done in two.
    half = np.uint64(n >> 1)
    return ~((~np.uint64(0) << half) << np.uint64(n - (n >> 1)))


@_compiled
def _rank(members, at):
    """Number of members of a sub-block's set before element `at` of it."""
    return (
        _popcount(members[0] & _first_bits(at))
        + _popcount(members[1] & _first_bits(at - 64))
        + _popcount(members[2] & _first_bits(at - 128))
        + _popcount(members[3] & _first_bits(at - 192))
    )


@_compiled
def _select(members, rank):
    """Element of a sub-block that is a member and has `rank` members before it.

    Which way to go nobody can predict, so all choices are arithmetic: `past` is −1 or 0.
    """
    one = _popcount(members[0])
    two = one + _popcount(members[1])
    three = two + _popcount(members[2])
    bits = members[0]
    past = ~((rank - one) >> 63)
    bits ^= (members[0] ^ members[1]) & np.uint64(past)
    before = one & past
    position = 64 & past
    past = ~((rank - two) >> 63)
    bits ^= (members[1] ^ members[2]) & np.uint64(past)
    before += (two - one) & past
    position += 64 & past
    past = ~((rank - three) >> 63)
    bits ^= (members[2] ^ members[3]) & np.uint64(past)
    before += (three - two) & past
    position += 64 & past
    rank -= before
    rank, bits, position = _halve(rank, bits, position, 32)
    rank, bits, position = _halve(rank, bits, position, 16)
    rank, bits, position = _halve(rank, bits, position, 8)
    rank, bits, position = _halve(rank, bits, position, 4)
    rank, bits, position = _halve(rank, bits, position, 2)
    rank, bits, position = _halve(rank, bits, position, 1)
    return position


@_compiled
def _halve(rank, bits, position, step):
    """Go on in the half of `2 · step` bits that has the set bit with `rank` set ones before it."""
    below = _popcount(bits & np.uint64((1 << step) - 1))
    past = ~((rank - below) >> 63)
    return rank - (below & past), bits >> np.uint64(step & past), position + (step & past)


@_compiled
def _drop_filling(size, limits, reached):
    """Take out of the last row what the zeros that fill the last sub-block reached."""
    blocks = (size + SUB_BLOCK - 1) // SUB_BLOCK
    filling = blocks * SUB_BLOCK - size
    for k in range(CLASSES):
        if limits[k] == 0:
            reached[blocks, k] -= np.uint32(filling)


@_compiled
def count_classes(flat, i, size, mask, limits, reached, starts):
    """Count the classes of a tile that is in one piece: the receiver's half of `scan`."""
    for k in range(CLASSES):
        reached[0, k] = 0
    for block in range((size + SUB_BLOCK - 1) // SUB_BLOCK):
        starts[block] = i + block * SUB_BLOCK
        _count_above(flat, i + block * SUB_BLOCK, mask, limits, reached, block)
    _drop_filling(size, limits, reached)


@_compiled
def _find_changes(old, new, i, block, n, records):
    """Append to the `n` records the positions of a sub-block's changes; returns how many are."""
    for word in range(0, SUB_BLOCK, 64):
        changed = _changed_64(old, i + word, new, i + word)
        end = n + _popcount(changed)
        # Four at a time whether there are so many or not: a branch that goes either way costs more
        # than writes that the next word's overwrite.
        while True:
            for k in range(4):
                records[0, n + k] = block * SUB_BLOCK + word + _lowest_bit(changed)
                changed &= changed - np.uint64(1)
            n += 4
            if changed == np.uint64(0):
                break
        n = end
    return n


@_compiled
def scan(
    old, i, new, width, stride, size, mask, limits, shift, classes, sign, is_float,
    reached, starts, records,
):  # fmt: skip
    """Find the changed elements of a tile and count the classes of its old values.

    Takes:
      old, new: flat arrays of elements, the tile's first at `i` in both.
      width, stride: elements of a row of the tile, a multiple of 256, and between its rows.
      size: elements; those of the last sub-block beyond it are zero in both arrays.
      mask: of the elements' type; the exponent is (bits & mask) >> shift.
      limits[8]: of the elements' type: 0 and the thresholds, shifted like an exponent.
      shift: mantissa bits.
      classes[256]: class of each exponent, u8.
      sign, is_float: of the element format.
      reached[sub-blocks + 1, 8]: u32, filled with the number of elements of the sub-blocks before
        that are not below each limit.
      starts[sub-blocks]: int64, filled with the index of each sub-block's first element.
      records[4, ≥ size + 8]: u32, filled with position, class, rank within the class, and code.

    Returns:
      The number of changed elements.
    """
    blocks = (size + SUB_BLOCK - 1) // SUB_BLOCK
    per_line = width // SUB_BLOCK
    for block in range(blocks):
        line = np.int64(np.uint64(block) // np.uint64(per_line))
        starts[block] = i + line * (stride - width) + block * SUB_BLOCK
    for k in range(CLASSES):
        reached[0, k] = 0
    n_changed = 0
    # Chunks that stay in the first-level cache until their changes have been looked up.
    for first in range(0, blocks, _CHUNK_BLOCKS):
        end = min(first + _CHUNK_BLOCKS, blocks)
        n_before = n_changed
        for block in range(first, end):
            # The rows of a tile may be too short for the processor to see where they go on.
            ahead = starts[min(block + _BLOCKS_AHEAD, blocks - 1)]
            _prefetch(old, ahead)
            _prefetch(new, ahead)
            _count_above(old, starts[block], mask, limits, reached, block)
            n_changed = _find_changes(old, new, starts[block], block, n_changed, records)
        if end == blocks:
            _drop_filling(size, limits, reached)
        for r in range(n_before, n_changed):
            position = np.int64(records[0, r])
            start = starts[position >> 8]
            at = position & 255
            bits = np.int64(old[start + at])
            c = np.int64(classes[(bits & np.int64(mask)) >> shift])
            low = np.int64(limits[c])
            rank = np.int64(reached[position >> 8, c])
            span = -low
            if c < CLASSES - 1:
                rank -= np.int64(reached[position >> 8, c + 1])
                span += np.int64(limits[c + 1])
            records[1, r] = c
            records[2, r] = rank + _rank(_class_set(old, start, mask, low, span), at)
            records[3, r] = change_code(bits, np.int64(new[start + at]), sign, is_float)
    return n_changed


@_compiled
def lone_class(mask, shift, classes):
    """The class of every element where tables have one class only, else −1."""
    last = classes[np.int64(mask) >> shift]
    return np.int64(last) if last == classes[0] else -1


@_compiled
def scan_lone(old, i, new, width, stride, size, sign, is_float, own, records):
    """`scan` of a tile whose elements are all of the class `own`: a rank is a position.

    Nothing is counted, so this reads the two versions about as fast as memory gives them.
    """
    per_line = width // SUB_BLOCK
    lines = (size + width - 1) // width
    n = 0
    for line in range(lines):
        start = i + line * stride
        ahead = start + min(_ROWS_AHEAD, lines - 1 - line) * stride
        n_before = n
        for block in range(per_line):
            _prefetch(old, ahead + block * SUB_BLOCK)
            _prefetch(new, ahead + block * SUB_BLOCK)
            at = start + block * SUB_BLOCK
            n = _find_changes(old, new, at, line * per_line + block, n, records)
        shift = start - line * width
        for r in range(n_before, n):
            position = np.int64(records[0, r])
            at = shift + position
            records[1, r] = own
            records[2, r] = position
            records[3, r] = change_code(np.int64(old[at]), np.int64(new[at]), sign, is_float)
    return n


# ------------------------------------------------------------------------------ fixed-width modes


@_compiled
def _code_bits(records, n, width_bits):
    """Bits of an inline code that make the codes shortest, and how many codes escape."""
    counts = np.zeros(4, np.int64)  # of codes that do not fit 2, 4, 8 and 16 bits
    for r in range(n):
        code = records[3, r]
        counts[0] += np.int64(code >= 3)
        counts[1] += np.int64(code >= 15)
        counts[2] += np.int64(code >= 255)
        counts[3] += np.int64(code >= 65535)
    best = width_bits
    best_size = n * width_bits
    escapes = 0
    for k in range(4):
        bits = 2 << k
        if bits >= width_bits:
            break
        size = (n * bits + 7) // 8 * 8 + counts[k] * width_bits
        if size < best_size:
            best, best_size, escapes = bits, size, counts[k]
    return best, escapes


@_compiled
def _write_bytes(out, at, value, n):
    for k in range(n):
        out[at + k] = (value >> (8 * k)) & 255
    return at + n


@_compiled
def _read_bytes(data, at, n):
    value = 0
    for k in range(n):
        value |= np.int64(data[at + k]) << (8 * k)
    return value


@_compiled
def _write_codes(records, n, bits, width_bits, out, at):
    """Codes of `bits` each, lowest bits first, then those that escaped, in full."""
    mark = (1 << bits) - 1
    buffer = 0
    held = 0
    for r in range(n):
        buffer |= min(np.int64(records[3, r]), mark) << held
        held += bits
        while held >= 8:
            out[at] = buffer & 255
            at += 1
            buffer >>= 8
            held -= 8
    if held:
        out[at] = buffer
        at += 1
    if bits < width_bits:
        for r in range(n):
            if records[3, r] >= mark:
                at = _write_bytes(out, at, np.int64(records[3, r]), width_bits // 8)
    return at


@_compiled
def _read_codes(data, at, end, n, bits, width_bits, records):
    """Inverse of `_write_codes`, which must end at `end`; a reason, `OK` or not."""
    if bits > width_bits or (bits != 2 and bits != 4 and bits != 8 and bits != 16 and bits != 32):
        return RANGE
    escape = at + (n * bits + 7) // 8
    if escape > end:
        return SHORT
    mark = (1 << bits) - 1
    limit = (1 << width_bits) - 1
    buffer = 0
    held = 0
    for r in range(n):
        while held < bits:
            buffer |= np.int64(data[at]) << held
            at += 1
            held += 8
        code = buffer & mark
        buffer >>= bits
        held -= bits
        if code == mark:
            if bits == width_bits:
                return RANGE
            if escape + width_bits // 8 > end:
                return SHORT
            code = _read_bytes(data, escape, width_bits // 8)
            escape += width_bits // 8
            if code < mark or code >= limit:
                return RANGE
        records[3, r] = code
    if buffer:
        return PADDING
    if escape != end:
        return LONG
    return OK


@_compiled
def choose_fixed(records, n, size, width_bits):
    """The smallest of block-offset, bitmap and dense, bits of an inline code, and bytes."""
    blocks = (size + SUB_BLOCK - 1) // SUB_BLOCK
    bits, escapes = _code_bits(records, n, width_bits)
    codes = 1 + (n * bits + 7) // 8 + escapes * (width_bits // 8)
    bitmap = codes + (size + 7) // 8
    block_offset = codes + blocks + n
    run = 0
    for r in range(n):
        run = run + 1 if r and records[0, r] >> 8 == records[0, r - 1] >> 8 else 1
        if run == SUB_BLOCK:  # a count that has no byte
            block_offset = bitmap + 1
    dense = size * (width_bits // 8)
    if min(bitmap, block_offset) >= dense:
        return DENSE, 0, dense
    if block_offset <= bitmap:
        return BLOCK_OFFSET, bits, block_offset
    return BITMAP, bits, bitmap


@_compiled
def write_fixed(mode, bits, records, n, size, width_bits, out, at):
    """Write the changes of a tile in a mode and width of codes that `choose_fixed` gave.

    Returns:
      The end of what was written.
    """
    out[at] = bits
    at += 1
    if mode == BLOCK_OFFSET:
        blocks = (size + SUB_BLOCK - 1) // SUB_BLOCK
        _clear(out, at, at + blocks)
        for r in range(n):
            out[at + np.int64(records[0, r] >> 8)] += np.uint8(1)
            out[at + blocks + r] = records[0, r] & 255
        return _write_codes(records, n, bits, width_bits, out, at + blocks + n)
    words = (size + 7) // 8
    _clear(out, at, at + words)
    for r in range(n):
        position = np.int64(records[0, r])
        out[at + (position >> 3)] |= np.uint8(1 << (position & 7))
    return _write_codes(records, n, bits, width_bits, out, at + words)


@_compiled
def read_fixed(mode, data, at, end, n, size, width_bits, records):
    """Inverse of `write_fixed`: fills positions and codes of `n` records; a reason."""
    blocks = (size + SUB_BLOCK - 1) // SUB_BLOCK
    positions = at + 1
    found = 0
    if mode == BLOCK_OFFSET:
        at = positions + blocks + n
        if at > end:
            return SHORT
        offsets = positions + blocks
        for block in range(blocks):
            here = np.int64(data[positions + block])
            if found + here > n:
                return COUNTS
            last = -1
            for r in range(found, found + here):
                offset = np.int64(data[offsets + r])
                if offset <= last or block * SUB_BLOCK + offset >= size:
                    return RANGE
                last = offset
                records[0, r] = block * SUB_BLOCK + offset
            found += here
    else:
        at = positions + (size + 7) // 8
        if at > end:
            return SHORT
        for byte in range((size + 7) // 8):
            bits = np.uint64(data[positions + byte])
            while bits != np.uint64(0):
                position = 8 * byte + _lowest_bit(bits)
                bits &= bits - np.uint64(1)
                if position >= size:
                    return PADDING
                if found == n:
                    return COUNTS
                records[0, found] = position
                found += 1
    if found != n:
        return COUNTS
    return _read_codes(data, at, end, n, np.int64(data[positions - 1]), width_bits, records)


# ------------------------------------------------------------------------------------ entropy mode


@_compiled
def _token(value):
    """Symbol of a number ≥ 0: itself below 8, else 4 for each power of two; and its raw bits."""
    extra = _bit_length(value | 4) - 3
    return 4 * extra + (value >> extra), extra


@_compiled
def _token_start(token):
    """Inverse of `_token`: the smallest number of a symbol, and its raw bits."""
    extra = max((token >> 2) - 1, 0)
    return (token - 4 * extra) << extra, extra


@_compiled
def gap_level(members, changed):
    """Which geometric table codes the gaps of a class of which some, not all, members changed.

    Twice the binary logarithm of the mean gap (members − changed) / changed, rounded down, from
    2^−8 on.
    """
    ratio = ((members - changed) << 32) // changed
    top = _bit_length(ratio) - 1
    mantissa = ratio >> (top - 15) if top >= 15 else ratio << (15 - top)
    level = 2 * (top - 32) + np.int64(mantissa >= 46341) + 16
    return min(max(level, 0), GAP_LEVELS - 1)


@_compiled
def _put_bits(out, held, at, value, n):
    """Write the lowest `n` ≤ 55 bits of `value` at bit `at`; `held` are the byte's bits before.

    Eight bytes are written each time, those that follow with zeros.
    """
    held |= (value & ((1 << n) - 1)) << (at & 7)
    _store_64(out, at >> 3, held)
    after = at + n
    return held >> (8 * ((after >> 3) - (at >> 3))), after


@_compiled
def _bits_at(data, at):
    """At least 56 bits from bit `at` on, as an int64 ≥ 0; eight bytes are read."""
    window = np.uint64(_load_64(data, at >> 3)) >> np.uint64(at & 7)
    return np.int64(window & np.uint64(0x7FFFFFFFFFFFFFFF))


@_compiled
def _expected(left, totals, weights, c):
    """Expected changes of class `c` when `left` remain for it and the classes above."""
    rest = 0
    for k in range(c, CLASSES):
        rest += totals[k] * weights[k]
    if rest == 0:
        return 0
    return left * (totals[c] * weights[c]) // rest


@_compiled
def _put_count(out, held, at, changed, expected):
    """Exponential Golomb code of a class's number of changes around what is expected."""
    shift = _bit_length(expected) >> 1
    error = changed - expected
    folded = 2 * error if error >= 0 else -2 * error - 1
    high = (folded >> shift) + 1
    length = _bit_length(high) - 1
    held, at = _put_bits(out, held, at, 1 << length, length + 1)
    held, at = _put_bits(out, held, at, high, length)
    return _put_bits(out, held, at, folded, shift)


@_compiled
def _get_count(data, at, expected):
    """Inverse of `_put_count`: the count and the bit behind it; −1 where there is no such code."""
    shift = _bit_length(expected) >> 1
    window = _bits_at(data, at)
    length = _lowest_bit(np.uint64(window))
    if length > 22:
        return -1, at
    high = (1 << length) | ((window >> (length + 1)) & ((1 << length) - 1))
    at += 2 * length + 1
    folded = ((high - 1) << shift) | (_bits_at(data, at) & ((1 << shift) - 1))
    error = -((folded + 1) >> 1) if folded & 1 else folded >> 1
    return expected + error, at + shift


@_compiled
def _rans_put(x, entry, out, at):
    """Encode a symbol with a table's entry for it; the state, and the end of the words written."""
    frequency = np.int64(entry & 0xFFFF)
    # Whether a word has to leave the state is as good as random: no branch.
    leaves = np.int64(x >= frequency << (32 - PROBABILITY_BITS))
    out[at] = x & 255
    out[at + 1] = (x >> 8) & 255
    x >>= 16 * leaves
    quotient = np.int64(np.uint64(x) // np.uint64(frequency))
    x += quotient * ((1 << PROBABILITY_BITS) - frequency) + np.int64(entry >> 16)
    return x, at + 2 * leaves


@_compiled
def _rans_get(x, table, symbols, row, data, end):
    """Decode a symbol by a row of tables; the state, where the words left end, and the symbol."""
    slot = x & ((1 << PROBABILITY_BITS) - 1)
    symbol = np.int64(symbols[row, slot])
    entry = np.int64(table[row, symbol])
    x = (entry & 0xFFFF) * (x >> PROBABILITY_BITS) + slot - (entry >> 16)
    enters = np.int64(x < RANS_LOW)
    word = np.int64(data[end - 2]) | np.int64(data[end - 1]) << 8
    x = (x << (16 * enters)) | (word & -enters)
    return x, end - 2 * enters, symbol


@_compiled
def write_entropy(records, n, totals, width_bits, tables, symbols, order, out, at, end):
    """Write the changes of a tile in entropy mode, unless that takes until `end`.

    Takes:
      records[4, ≥ n]: u32, as `scan` makes them.
      n: changed elements, at least 1.
      totals[8]: elements of each class.
      width_bits: of an element.
      tables: see `codec.Tables.arrays`.
      symbols[2, ≥ n], order[≥ n]: u8, u32, scratch.
      out: u8, at least until `end` + `SLACK`.
      at: where to write.
      end: where the encoding must be shorter than.

    Returns:
      The end of what was written, or −1.
    """
    values, gaps, weights = tables[0], tables[1], tables[2]
    changed = np.zeros(CLASSES, np.int64)
    for r in range(n):
        changed[records[1, r]] += 1
    place = np.zeros(CLASSES, np.int64)
    for c in range(1, CLASSES):
        place[c] = place[c - 1] + changed[c - 1]
    for r in range(n):
        c = records[1, r]
        order[place[c]] = r
        place[c] += 1

    held = 0
    bit = 8 * at
    left = n
    for c in range(CLASSES - 1):
        held, bit = _put_count(out, held, bit, changed[c], _expected(left, totals, weights, c))
        left -= changed[c]
    done = 0
    for c in range(CLASSES):
        full = changed[c] == totals[c]
        level = 0 if full or changed[c] == 0 else gap_level(totals[c], changed[c])
        following = 0
        for k in range(done, done + changed[c]):
            if bit >= 8 * end:
                return -1
            r = np.int64(order[k])
            raw = 0
            skip = 0
            if not full:
                raw = np.int64(records[2, r]) - following
                following += raw + 1
                token, skip = _token(raw)
                if gaps[level, token] & 0xFFFF == 0:
                    token, skip = ESCAPE, GAP_BITS
                symbols[0, k] = token
                raw &= (1 << skip) - 1
            code = np.int64(records[3, r])
            token, extra = _token(code >> 1)
            token = 2 * token + (code & 1)
            own = code >> 1
            if values[c, token] & 0xFFFF == 0:
                token, extra, own = ESCAPE, width_bits, code
            symbols[1, k] = token
            raw |= (own & ((1 << extra) - 1)) << skip
            held, bit = _put_bits(out, held, bit, raw, skip + extra)
        done += changed[c]

    at = (bit + 7) >> 3
    gap_state = RANS_LOW
    value_state = RANS_LOW
    one_state = n < ONE_STATE_CHANGES
    for c in range(CLASSES - 1, -1, -1):
        full = changed[c] == totals[c]
        level = 0 if full or changed[c] == 0 else gap_level(totals[c], changed[c])
        done -= changed[c]
        for k in range(done + changed[c] - 1, done - 1, -1):
            if at >= end:
                return -1
            if one_state:
                gap_state, at = _rans_put(gap_state, values[c, symbols[1, k]], out, at)
            else:
                value_state, at = _rans_put(value_state, values[c, symbols[1, k]], out, at)
            if not full:
                gap_state, at = _rans_put(gap_state, gaps[level, symbols[0, k]], out, at)
    if not one_state:
        at = _write_bytes(out, at, value_state, 4)
    at = _write_bytes(out, at, gap_state, 4)
    return at if at < end else -1


@_compiled
def read_entropy(stream, at, end, n, totals, width_bits, tables, changed, records):
    """Inverse of `write_entropy`: fills class, rank and code of `n` records, class by class.

    Takes:
      stream: u8, the tile's from `at` to `end`, with 8 bytes of anything before and 16 behind.

    Returns:
      A reason, `OK` or not. Each rank is below the class's total and above the one before.
    """
    values, gaps, weights, value_symbols, gap_symbols = tables
    one_state = n < ONE_STATE_CHANGES
    if end - at < (4 if one_state else 8):
        return SHORT
    end -= 4
    gap_state = _read_bytes(stream, end, 4)
    value_state = RANS_LOW
    if not one_state:
        end -= 4
        value_state = _read_bytes(stream, end, 4)
    if value_state < RANS_LOW or gap_state < RANS_LOW:
        return STATE
    bit = 8 * at
    left = n
    for c in range(CLASSES - 1):
        count, bit = _get_count(stream, bit, _expected(left, totals, weights, c))
        if bit > 8 * end:
            return SHORT
        if count < 0 or count > left or count > totals[c]:
            return COUNTS
        changed[c] = count
        left -= count
    if left > totals[CLASSES - 1]:
        return COUNTS
    changed[CLASSES - 1] = left
    limit = (1 << width_bits) - 1
    r = 0
    for c in range(CLASSES):
        total = totals[c]
        full = changed[c] == total
        level = 0 if full or changed[c] == 0 else gap_level(total, changed[c])
        rank = -1
        for _ in range(changed[c]):
            # An item is at most 52 raw bits and two words: within what surrounds the stream.
            window = _bits_at(stream, bit)
            if not full:
                gap_state, end, token = _rans_get(gap_state, gaps, gap_symbols, level, stream, end)
                if token == ESCAPE:
                    gap, extra = 0, GAP_BITS
                else:
                    gap, extra = _token_start(token)
                rank += gap + (window & ((1 << extra) - 1))
                window >>= extra
                bit += extra
            rank += 1
            if one_state:
                gap_state, end, token = _rans_get(gap_state, values, value_symbols, c, stream, end)
            else:
                value_state, end, token = _rans_get(
                    value_state, values, value_symbols, c, stream, end
                )
            if token == ESCAPE:
                code = window & limit
                bit += width_bits
            else:
                code, extra = _token_start(token >> 1)
                code = 2 * (code + (window & ((1 << extra) - 1))) + (token & 1)
                bit += extra
            if bit > 8 * end:
                return SHORT
            if rank >= total or code >= limit:
                return RANGE
            records[1, r] = c
            records[2, r] = rank
            records[3, r] = code
            r += 1
    if value_state != RANS_LOW or gap_state != RANS_LOW:
        return STATE
    if (bit + 7) >> 3 != end:
        return LONG
    if bit & 7 and stream[end - 1] >> (bit & 7):
        return PADDING
    return OK


@_compiled
def place_records(flat, mask, limits, reached, starts, changed, records):
    """Fill the positions of records that `read_entropy` made, from the tile's old values."""
    done = 0
    for c in range(CLASSES):
        low = np.int64(limits[c])
        high = np.int64(limits[c + 1]) if c < CLASSES - 1 else 0
        block = -1
        before = 0
        after = 0
        # First the sub-blocks, by branches that nobody can predict; then what lies in them, which
        # takes none, so that many are under way at once.
        for r in range(done, done + changed[c]):
            rank = np.int64(records[2, r])
            while rank >= after:
                block += 1
                before = after
                after = np.int64(reached[block + 1, c])
                if c < CLASSES - 1:
                    after -= np.int64(reached[block + 1, c + 1])
            records[0, r] = block
            records[2, r] = rank - before
        for r in range(done, done + changed[c]):
            block = np.int64(records[0, r])
            members = _class_set(flat, starts[block], mask, low, high - low)
            records[0, r] = block * SUB_BLOCK + _select(members, np.int64(records[2, r]))
        done += changed[c]


# ----------------------------------------------------------------------------------------- digest


@_compiled
def _element_hash(bits, index):
    """The two 32-bit hashes of an element at a row-major index of its tensor."""
    word = 0xFFFFFFFF
    low = (index & word) * 0x85EBCA77
    high = (index >> 32) * 0xC2B2AE3D
    a = (((bits + 1) * 0x9E3779B1) ^ (low + high)) & word
    a ^= a >> 15
    a = (a * 0x2C1B3C6D) & word
    a ^= a >> 13
    b = ((a ^ (a >> 16)) * 0x297A2D39) & word
    return a, b


@_compiled
def digest_rows(flat, start, width, stride, n_rows, index, index_stride, sums):
    """Add the hashes of a rectangle's elements to `sums[2]`, int64, modulo 2^32."""
    for row in range(n_rows):
        first = 0
        second = 0
        for k in range(width):
            a, b = _element_hash(np.int64(flat[start + row * stride + k]), index + k)
            first += a
            second += b
        sums[0] = (sums[0] + first) & 0xFFFFFFFF
        sums[1] = (sums[1] + second) & 0xFFFFFFFF
        index += index_stride


# ----------------------------------------------------------------------------------------- survey


@_compiled
def survey(old, new, i, width, stride, size, fmt, members, changes, symbols):
    """Count, by exponent of the old value, elements, changed ones and symbols of their changes.

    Takes:
      old, new: flat boxes.
      i, width, stride, size: of a tile; see `scan`, but any width will do.
      fmt: width in bits, is a float, mantissa bits, magnitude mask, and more.
      members[256], changes[256], symbols[256, 256]: int64, added to.
    """
    width_bits, is_float, shift, mask = fmt[:4]
    sign = 1 << (width_bits - 1)
    mask = np.int64(mask)
    # Runs of one exponent would wait for each other's count.
    second = np.zeros(256, np.int64)
    for start in range(i, i + size // width * stride, stride):
        for at in range(start, start + width - 1, 2):
            members[(np.int64(old[at]) & mask) >> shift] += 1
            second[(np.int64(old[at + 1]) & mask) >> shift] += 1
        if width & 1:
            members[(np.int64(old[start + width - 1]) & mask) >> shift] += 1
        at = start
        while at < start + width:
            if at + 64 <= start + width:
                changed = _changed_64(old, at, new, at)
            else:
                changed = np.uint64(0)
                for k in range(start + width - at):
                    if old[at + k] != new[at + k]:
                        changed |= np.uint64(1) << np.uint64(k)
            while changed != np.uint64(0):
                place = at + _lowest_bit(changed)
                changed &= changed - np.uint64(1)
                bits = np.int64(old[place])
                code = change_code(bits, np.int64(new[place]), sign, is_float)
                exponent = (bits & mask) >> shift
                changes[exponent] += 1
                symbols[exponent, 2 * _token(code >> 1)[0] + (code & 1)] += 1
            at += 64
    for k in range(256):
        members[k] += second[k]


# ---------------------------------------------------------------------------------- many tiles


@_compiled
def _tile_box(t, shape, tile):
    """Lead index, first row, first column, rows and columns of tile `t` of a box."""
    across = (shape[2] + tile[1] - 1) // tile[1]
    down = (shape[1] + tile[0] - 1) // tile[0]
    row = t // across % down * tile[0]
    column = t % across * tile[1]
    height = min(tile[0], shape[1] - row)
    width = min(tile[1], shape[2] - column)
    return t // across // down, row, column, height, width


@_compiled
def _row_of(position, inverse):
    """position // width for positions up to 2^20, given the double 1 / width.

    Halfway between two whole positions no rounding of a double reaches the next row.
    """
    return np.int64((position + 0.5) * inverse)


@_compiled
def _add_changes(old, new, start, width, stride, index, index_stride, records, n, sums):
    """Add to `sums[2]` how the hashes of a tile's changed elements grow.

    Its first element has the row-major `index` in the tensor.
    """
    first = 0
    second = 0
    inverse = 1 / width
    for r in range(n):
        position = np.int64(records[0, r])
        row = _row_of(position, inverse)
        at = start + row * (stride - width) + position
        place = index + row * (index_stride - width) + position
        old_a, old_b = _element_hash(np.int64(old[at]), place)
        new_a, new_b = _element_hash(np.int64(new[at]), place)
        first += new_a - old_a
        second += new_b - old_b
    sums[0] = (sums[0] + first) & 0xFFFFFFFF
    sums[1] = (sums[1] + second) & 0xFFFFFFFF


@_compiled
def _add_record_hashes(records, place, n, width, index, index_stride, sums):
    """`_add_changes` of records that hold old and new bits in rows 1 and 3, positions in `place`.

    It looks at nothing else, so that eight elements are under way in one vector.
    """
    first = 0
    second = 0
    inverse = 1 / width
    for r in range(n):
        position = np.int64(records[place, r])
        at = index + _row_of(position, inverse) * (index_stride - width) + position
        old_a, old_b = _element_hash(np.int64(records[1, r]), at)
        new_a, new_b = _element_hash(np.int64(records[3, r]), at)
        first += new_a - old_a
        second += new_b - old_b
    sums[0] = (sums[0] + first) & 0xFFFFFFFF
    sums[1] = (sums[1] + second) & 0xFFFFFFFF


@_compiled
def _totals(reached, blocks, totals):
    """Elements of each class of a tile."""
    for c in range(CLASSES - 1):
        totals[c] = np.int64(reached[blocks, c]) - np.int64(reached[blocks, c + 1])
    totals[CLASSES - 1] = np.int64(reached[blocks, CLASSES - 1])


@_compiled
def encode_tiles(
    old, new, shape, tile, first, last, fmt, tables, frame, work, out, modes, changed, sizes, sums
):
    """Encode tiles `first` … `last` of a box until they are done or `out` may be too small.

    Takes:
      old, new: flat boxes.
      shape, tile: (lead, rows, cols) of the box, (rows, cols) of a tile.
      fmt: width in bits, is a float, mantissa bits, magnitude mask, limits and classes: see `scan`.
      tables: see `codec.Tables.arrays`.
      frame: whether to digest, row-major index in the tensor of the box's first element, and the
        strides of that index along lead and rows.
      work: scratch: see `codec._workspace`.
      out: u8.
      modes, changed, sizes: u8, u32, u32 of each tile of the box.
      sums[2]: change of the digest.

    Returns:
      The first tile that is not encoded, and the number of bytes written.
    """
    width_bits, is_float, shift, mask, limits, classes = fmt
    sign = 1 << (width_bits - 1)
    item = width_bits // 8
    digests, origin, lead_index, row_index = frame
    own = lone_class(mask, shift, classes)
    old_tile, new_tile, reached, starts, totals, records, symbols, order, _ = work
    at = 0
    for t in range(first, last):
        lead, row, column, height, width = _tile_box(t, shape, tile)
        size = height * width
        if at + size * item + SLACK > out.size:
            return t, at
        start = (lead * shape[1] + row) * shape[2] + column
        i = start
        a, b = old, new
        line, stride = width, shape[2]
        if width == shape[2]:
            line = stride = size
        if line % SUB_BLOCK:
            _gather(old, start, width, shape[2], size, old_tile)
            _gather(new, start, width, shape[2], size, new_tile)
            a, b = old_tile, new_tile
            i = 0
            line = stride = (size + SUB_BLOCK - 1) // SUB_BLOCK * SUB_BLOCK
        if own >= 0:
            n = scan_lone(a, i, b, line, stride, size, sign, is_float, own, records)
        else:
            n = scan(
                a, i, b, line, stride, size, mask, limits, shift, classes, sign, is_float,
                reached, starts, records,
            )  # fmt: skip
        changed[t] = n
        begin = at
        if n == 0:
            modes[t] = EMPTY
        else:
            after = -1
            fixed = size * item
            # No fixed mode spends less than this, nor has to be looked at if entropy mode does.
            blocks = (size + SUB_BLOCK - 1) // SUB_BLOCK
            least = min(fixed, 1 + (n + 3) // 4 + min((size + 7) // 8, blocks + n))
            if tables[0].size:
                if own >= 0:
                    totals[:] = 0
                    totals[own] = size
                else:
                    _totals(reached, blocks, totals)
                after = write_entropy(
                    records, n, totals, width_bits, tables, symbols, order, out, at, at + fixed
                )
            mode, bits = ENTROPY, 0
            if after < 0 or after - at >= least:
                mode, bits, fixed = choose_fixed(records, n, size, width_bits)
                if 0 < after < at + fixed:
                    mode = ENTROPY
            if mode == ENTROPY:
                at = after
            elif mode != DENSE:
                at = write_fixed(mode, bits, records, n, size, width_bits, out, at)
            else:
                at = _write_rows(new, start, width, shape[2], height, item, out, at)
            modes[t] = mode
            if digests:
                index = origin + lead * lead_index + row * row_index + column
                _add_changes(old, new, start, width, shape[2], index, row_index, records, n, sums)
        sizes[t] = at - begin
    return last, at


@_compiled
def _write_rows(flat, start, width, stride, height, item, out, at):
    """The elements of a rectangle as they are, little-endian."""
    for row in range(height):
        for k in range(width):
            at = _write_bytes(out, at, np.int64(flat[start + row * stride + k]), item)
    return at


@_compiled
def _read_rows(data, at, item, flat, start, width, stride, height):
    """Inverse of `_write_rows`."""
    for row in range(height):
        for k in range(width):
            flat[start + row * stride + k] = _read_bytes(data, at, item)
            at += item


@_compiled
def encode_dense(new, shape, tile, first, last, item, out):
    """Encode tiles of a box without an old one; returns the number of bytes written."""
    at = 0
    for t in range(first, last):
        lead, row, column, height, width = _tile_box(t, shape, tile)
        start = (lead * shape[1] + row) * shape[2] + column
        at = _write_rows(new, start, width, shape[2], height, item, out, at)
    return at


@_compiled
def decode_tiles(
    old, new, in_place, shape, tile, ids, first, last, fmt, tables, frame, work, data,
    modes, changed, offsets, sizes, sums,
):  # fmt: skip
    """Decode tiles `ids[first:last]` of a box; the arguments are those of `encode_tiles`.

    Takes:
      old: flat box; of no elements where there is none and all tiles are dense.
      new: flat box that is written, the listed tiles whole.
      in_place: `new` is the memory of `old`.
      data: u8, holds `data[offsets[k] : offsets[k] + sizes[k]]` for each k.

    Returns:
      The number of the first bad tile and the reason; `last` and OK where there is none.
    """
    width_bits, is_float, shift, mask, limits, classes = fmt
    sign = 1 << (width_bits - 1)
    item = width_bits // 8
    digests, origin, lead_index, row_index = frame
    old_tile, _, reached, starts, totals, records, _, _, stream = work
    own = lone_class(mask, shift, classes)
    has_old = old.size > 0
    class_changes = np.zeros(CLASSES, np.int64)
    taken = np.zeros(2, np.int64)
    for k in range(first, last):
        lead, row, column, height, width = _tile_box(ids[k], shape, tile)
        size = height * width
        start = (lead * shape[1] + row) * shape[2] + column
        index = origin + lead * lead_index + row * row_index + column
        at = offsets[k]
        n_bytes = np.int64(sizes[k])
        n = np.int64(changed[k])
        mode = modes[k]
        place = 0  # row of the records that has positions
        if mode == DENSE:
            if n_bytes != size * item:
                return k, SHORT if n_bytes < size * item else LONG
            if digests and has_old:
                taken[0] = taken[1] = 0
                digest_rows(old, start, width, shape[2], height, index, row_index, taken)
                sums[0] -= taken[0]
                sums[1] -= taken[1]
            _read_rows(data, at, item, new, start, width, shape[2], height)
            if digests:
                digest_rows(new, start, width, shape[2], height, index, row_index, sums)
            continue
        if not has_old:
            return k, BASE
        if mode == EMPTY:
            if n or n_bytes:
                return k, COUNTS
        elif n == 0 or n > size:
            return k, COUNTS
        elif n_bytes >= size * item:
            return k, LONG
        elif mode in (BLOCK_OFFSET, BITMAP):
            reason = read_fixed(mode, data, at, at + n_bytes, n, size, width_bits, records)
            if reason:
                return k, reason
        elif mode == ENTROPY and tables[0].size:
            flat, i = old, start
            if own >= 0:
                totals[:] = 0
                totals[own] = size
            else:
                # Looked into in no order: that wants it in one piece, in the cache.
                line = (size + SUB_BLOCK - 1) // SUB_BLOCK * SUB_BLOCK
                if width != shape[2] or line != size:
                    _gather(old, start, width, shape[2], size, old_tile)
                    flat, i = old_tile, 0
                count_classes(flat, i, size, mask, limits, reached, starts)
                _totals(reached, (size + SUB_BLOCK - 1) // SUB_BLOCK, totals)
            _copy(stream, 8, data, at, n_bytes)
            reason = read_entropy(
                stream, 8, 8 + n_bytes, n, totals, width_bits, tables, class_changes, records
            )
            if reason:
                return k, reason
            if own >= 0:
                place = 2  # a rank is a position
            else:
                place_records(flat, mask, limits, reached, starts, class_changes, records)
        else:
            return k, MODE
        if not in_place:
            for line in range(height):
                here = start + line * shape[2]
                for column in range(0, width, SUB_BLOCK):
                    _prefetch(old, here + _ROWS_AHEAD * shape[2] + column)
                _copy(new, here, old, here, width)
        inverse = 1 / width
        for r in range(n):
            position = np.int64(records[place, r])
            line = _row_of(position, inverse)
            here = start + line * (shape[2] - width) + position
            bits = np.int64(old[here])
            value = changed_bits(bits, np.int64(records[3, r]), sign, is_float)
            new[here] = value
            # What `_add_record_hashes` needs of them; class and code have served.
            records[1, r] = bits
            records[3, r] = value
        if digests:
            _add_record_hashes(records, place, n, width, index, row_index, sums)
    return last, OK


# ----------------------------------------------------------------- tiles for a device that has them


@_compiled
def _members(packed, k, size, own, lowest, members, totals):
    """Elements of each class in every sub-block of tile `k`, and in all of it.

    Takes:
      packed: u32[T, 2, S], as `reference.class_counts` gives; not read where `own` is not −1.
      size: elements of the tile; what fills its last sub-blocks up counts as zeros.
      lowest: class of a zero.
    """
    totals[:] = 0
    if own >= 0:
        totals[own] = size
        return
    blocks = packed.shape[2]
    for c in range(CLASSES):
        shift = 8 * (c & 3)
        for block in range(blocks):
            word = np.int64(packed[k, c >> 2, block])
            count = (word >> shift) & 255
            # 255 alone: 256, which a byte has no room for.
            if word == 255 << shift and packed[k, 1 - (c >> 2), block] == 0:
                count = 256
            members[c, block] = count
            totals[c] += count
    totals[lowest] -= blocks * SUB_BLOCK - size


@_compiled
def locate_tiles(
    first, last, element_counts, packed, lowest, fmt, tables, work, data,
    modes, changed, offsets, sizes, starts, places, changes, fullest,
):  # fmt: skip
    """Read tiles `first … last` whose old values lie elsewhere: what changes in each sub-block.

    Takes:
      element_counts: int64[T].
      packed, lowest: see `_members`.
      fmt, tables: as of `encode_tiles`.
      work: u32[4, n] for the records of a tile, u8[n + 24] for its stream, int64[8, S] and two of
        int64[8] for counts of classes.
      data, modes, changed, offsets, sizes: as of `decode_tiles`.

    Fills:
      places: u32, from `starts[k]` on those of tile k: sub-block << 11 | class << 8 | rank, where
        the rank counts earlier elements of the sub-block and class. Tiles that name positions, and
        tables of one class, take all elements as of class 7.
      changes: u32, modulo 2^32, away from zero positive where `fmt` is a float.
      fullest: int64[T], changes of the sub-block that has most.

    Returns:
      The number of the first bad tile and the reason; `last` and OK where there is none.
    """
    width_bits, _, shift, mask, _, classes = fmt
    records, stream, members, totals, class_changes, held = work
    own = lone_class(mask, shift, classes)
    for k in range(first, last):
        size = element_counts[k]
        at = offsets[k]
        n_bytes = np.int64(sizes[k])
        n = np.int64(changed[k])
        mode = modes[k]
        if mode == EMPTY:
            if n or n_bytes:
                return k, COUNTS
            continue
        if n == 0 or n > size:
            return k, COUNTS
        if n_bytes >= size * (width_bits // 8):
            return k, LONG
        position = -1  # row of the records that has positions
        if mode in (BLOCK_OFFSET, BITMAP):
            reason = read_fixed(mode, data, at, at + n_bytes, n, size, width_bits, records)
            position = 0
        elif mode == ENTROPY and tables[0].size:
            _members(packed, k, size, own, lowest, members, totals)
            _copy(stream, 8, data, at, n_bytes)
            reason = read_entropy(
                stream, 8, 8 + n_bytes, n, totals, width_bits, tables, class_changes, records
            )
            if own >= 0:
                position = 2  # a rank is a position
        else:
            reason = MODE
        if reason:
            return k, reason
        held[:] = 0
        start = starts[k]
        last_class = -1
        block = 0
        before = 0
        after = 0
        for r in range(n):
            if position >= 0:
                rank = np.int64(records[position, r])
                block = rank >> 8
                c = CLASSES - 1
                before = block << 8
            else:
                rank = np.int64(records[2, r])
                c = np.int64(records[1, r])
                if c != last_class:
                    last_class = c
                    block = -1
                    after = 0
                while rank >= after:
                    block += 1
                    before = after
                    after += members[c, block]
            places[start + r] = block << 11 | c << 8 | (rank - before)
            code = np.int64(records[3, r])
            step = (code >> 1) + 1
            changes[start + r] = step if code & 1 else -step
            held[block] += 1
            fullest[k] = max(fullest[k], held[block])
    return last, OK


@_compiled
def fill_slots(first, last, tiles, starts, places, changes, wide, held, words, extra):
    """Put changes that `locate_tiles` found into the slots of their sub-blocks.

    Takes:
      tiles: int64[L], which of the located tiles each entry is.
      wide: whether changes take a word of their own.
      held: int64[S], scratch.

    Fills:
      words: u32[L, C, S] of empty slots, entries `first … last`: class << 24 | rank << 16, and the
        change in the low half where it is not wide.
      extra: u32[L, C, S], changes that are; else anything.
    """
    for entry in range(first, last):
        held[:] = 0
        tile = tiles[entry]
        for r in range(starts[tile], starts[tile + 1]):
            place = np.int64(places[r])
            change = np.int64(changes[r])
            block = place >> 11
            slot = held[block]
            held[block] += 1
            key = (place & 0x7FF) << 16
            if wide:
                words[entry, slot, block] = key
                extra[entry, slot, block] = change
            else:
                words[entry, slot, block] = key | (change & 0xFFFF)
