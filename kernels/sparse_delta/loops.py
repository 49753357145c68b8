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

# Rice codes: a number whose quotient is this or more follows as raw bits instead.
RICE_ESCAPE = 24
NUMBER_BITS = 24
MAX_STEP = 20  # largest divisor 2^step of a gap; no tile is larger
ALL = 31  # step of a class whose gaps are all 0 and take no bits
# Prefix codes of the symbols of changes.
CODE_BITS = 11
MAX_CODE_BITS = 39  # with the raw bits of a change of 32 bits
INDEX_BITS = 20  # of an exception's place among a tile's changes

# Words of 64 elements that are scanned before their changes are looked up.
_CHUNK_WORDS = 64
_BLOCKS_AHEAD = 8
_ROWS_AHEAD = 4
_NO_RANK = 0xFFFFFFFF

# Bytes by which one step of an encoder may pass the end it was given before it looks.
SLACK = 64

EMPTY = 0
BLOCK_OFFSET = 1
BITMAP = 2
ENTROPY = 3
DENSE = 4
PLANES = 5

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
FRAME = 9


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
def _load_64_before(typing: Any, data: Any, end: Any) -> Any:
    """Eight bytes before `end` as an int64, the last one lowest."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.sub(args[1], ir.Constant(ir.IntType(64), 8))
        pointer = _element_pointer(context, builder, data, args[0], at)
        word = builder.load(builder.bitcast(pointer, ir.IntType(64).as_pointer()), align=1)
        return builder.bswap(word)

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


def _exponents(context: Any, builder: Any, kind: Any, args: Any) -> Any:
    """<64 x i8>: exponents of the 64 elements of args = array, index, mask, shift."""
    width = kind.dtype.bitwidth
    pointer = _element_pointer(context, builder, kind, args[0], args[1])
    values = _load_vector(builder, pointer, width, 64)
    shift = builder.trunc(args[3], ir.IntType(width)) if width < 64 else args[3]
    values = builder.and_(values, _splat(builder, args[2], 64))
    values = builder.lshr(values, _splat(builder, shift, 64))
    bytes_ = ir.VectorType(ir.IntType(8), 64)
    return values if width == 8 else builder.trunc(values, bytes_)


@_instruction
def _reach_64(typing: Any, array: Any, i: Any, mask: Any, shift: Any, thresholds: Any) -> Any:
    """Seven sets of 64 bits: bit k of set j is (array[i + k] & mask) >> shift >= thresholds[j].

    Bits of an element beyond its exponent's 8 do not count, nor does a mask of 0 leave any.
    """
    result = types.UniTuple(types.uint64, CLASSES - 1)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        exponents = _exponents(context, builder, array, args)
        limits = context.make_array(thresholds)(context, builder, args[4]).data
        sets = []
        for j in range(CLASSES - 1):
            limit = builder.load(builder.gep(limits, [ir.Constant(ir.IntType(64), j)]))
            above = builder.icmp_unsigned(">=", exponents, _splat(builder, limit, 64))
            sets.append(builder.bitcast(above, ir.IntType(64)))
        return context.make_tuple(builder, result, sets)

    return result(array, types.intp, array.dtype, types.int64, thresholds), generate


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
def _count_reached(
    typing: Any, array: Any, i: Any, mask: Any, shift: Any, thresholds: Any, reached: Any, sets: Any
) -> Any:
    """Find which of the 256 elements from `i` on reach each threshold, and count them.

    reached[0:8] = reached[9:17]; then reached[9 + k] += number of elements with (array[.] & mask)
    >> shift >= thresholds[k − 1], all of them for k = 0. sets[4k : 4k + 4], k = 1 … 7, are these
    elements, as sets of 64.
    """
    signature = types.void(array, types.intp, array.dtype, types.int64, thresholds, reached, sets)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index, word = ir.IntType(64), ir.IntType(32)
        limits = context.make_array(thresholds)(context, builder, args[4]).data
        found = context.make_array(sets)(context, builder, args[6]).data
        bounds = [
            _splat(builder, builder.load(builder.gep(limits, [ir.Constant(index, j)])), 64)
            for j in range(CLASSES - 1)
        ]
        totals = [ir.Constant(index, 0)] * (CLASSES - 1)
        for line in range(SUB_BLOCK // 64):
            at = builder.add(args[1], ir.Constant(index, 64 * line))
            exponents = _exponents(context, builder, array, [args[0], at, *args[2:]])
            for j, bound in enumerate(bounds):
                above = builder.bitcast(builder.icmp_unsigned(">=", exponents, bound), index)
                place = builder.gep(found, [ir.Constant(index, 4 * (1 + j) + line)])
                builder.store(above, place)
                totals[j] = builder.add(totals[j], builder.ctpop(above))
        counts = ir.Constant(ir.VectorType(word, CLASSES), [SUB_BLOCK] + [0] * (CLASSES - 1))
        for j, total in enumerate(totals):
            total = builder.trunc(total, word)
            counts = builder.insert_element(counts, total, ir.Constant(word, j + 1))
        rows = context.make_array(reached)(context, builder, args[5]).data
        before, now = (
            builder.bitcast(builder.gep(rows, [ir.Constant(index, k)]), counts.type.as_pointer())
            for k in (0, CLASSES + 1)
        )
        held = builder.load(now, align=4)
        builder.store(held, before, align=4)
        builder.store(builder.add(held, counts), now, align=4)
        return context.get_dummy_value()

    return signature, generate


@_instruction
def _below(typing: Any, ranks: Any, row: Any) -> Any:
    """Set of the classes c with ranks[c] < row[9 + c] − row[10 + c], unsigned; a u64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = [ir.Constant(ir.IntType(64), k) for k in (CLASSES + 1, CLASSES + 2)]
        own = _element_pointer(context, builder, ranks, args[0], ir.Constant(ir.IntType(64), 0))
        ends = [
            _load_vector(builder, _element_pointer(context, builder, row, args[1], k), 32, CLASSES)
            for k in at
        ]
        less = builder.icmp_unsigned(
            "<", _load_vector(builder, own, 32, CLASSES), builder.sub(*ends)
        )
        return builder.zext(builder.bitcast(less, ir.IntType(CLASSES)), ir.IntType(64))

    return types.uint64(ranks, row), generate


@_instruction
def _select_64(typing: Any, members: Any, rank: Any) -> Any:
    """Index of the set bit of a u64 that has `rank` set ones before it; there is one."""
    signature = types.int64(types.uint64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, features = context.codegen().magic_tuple()
        if "+bmi2" not in features.split(","):
            return context.compile_internal(builder, _select_by_halves, signature, args)
        word = ir.IntType(64)
        deposit = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(word, [word, word]), "llvm.x86.bmi.pdep.64"
        )
        one = builder.shl(ir.Constant(word, 1), args[1])
        return builder.cttz(builder.call(deposit, [one, args[0]]), ir.Constant(ir.IntType(1), 0))

    return signature, generate


def _select_by_halves(members: Any, rank: Any) -> Any:
    """`_select_64` where the processor has no instruction for it.

    Which way to go nobody can predict, so all choices are arithmetic: `past` is −1 or 0.
    """
    position = np.int64(0)
    step = np.int64(32)
    while step:
        below = _popcount(members & np.uint64((1 << step) - 1))
        past = ~((rank - below) >> 63)
        rank -= below & past
        members >>= np.uint64(step & past)
        position += step & past
        step >>= 1
    return position


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
def _collect(changed, position, n, records):
    """Append to the `n` records the positions of a word's changes, a set that is not empty."""
    end = n + _popcount(changed)
    # Four at a time whether there are so many or not: a branch that goes either way costs more
    # than writes that the next word's overwrite.
    while True:
        for k in range(4):
            records[0, n + k] = position + _lowest_bit(changed)
            changed &= changed - np.uint64(1)
        n += 4
        if changed == np.uint64(0):
            return end


@_compiled
def scan(old, i, new, width, stride, size, fmt, work, totals, records):
    """Find the changed elements of a tile, and the classes and ranks of their old values.

    Takes:
      old, new: flat arrays of elements, the tile's first at `i` in both.
      width, stride: elements of a row of the tile, a multiple of 256, and between its rows.
      size: elements; those up to a multiple of 256 beyond it are zero in both arrays.
      fmt: width in bits, is a float, mantissa bits, magnitude mask, of the elements' type,
        thresholds u8[7], and class of each exponent, u8[256].
      work: scratch, u64 and int64 [64, 9].
      totals[8]: int64, filled with the number of elements of each class.
      records[4, ≥ size + 8]: u32, filled with position, class, rank within the class, and code.

    Returns:
      The number of changed elements.
    """
    width_bits, is_float, shift, mask, thresholds, classes = fmt
    sign = 1 << (width_bits - 1)
    sets, before = work
    sets[:, 0] = ~np.uint64(0)
    sets[:, CLASSES] = 0
    before[:, CLASSES] = 0
    padded = (size + SUB_BLOCK - 1) // SUB_BLOCK * SUB_BLOCK
    reach = (0, 0, 0, 0, 0, 0, 0)  # elements so far that are not below each threshold
    n = 0
    position = 0
    column = 0
    at = i
    while position < padded:
        # Chunks that stay in the first-level cache until their changes have been looked up.
        first = position
        start = at
        start_column = column
        n_before = n
        end = min(position + 64 * _CHUNK_WORDS, padded)
        while position < end:
            if stride != width and position & (SUB_BLOCK - 1) == 0:
                # The rows of a tile may be too short for the processor to see where they go on.
                ahead = column + _BLOCKS_AHEAD * SUB_BLOCK
                lines = np.int64(np.uint64(ahead) // np.uint64(width)) if ahead >= width else 0
                ahead = at + _BLOCKS_AHEAD * SUB_BLOCK + lines * (stride - width)
                _prefetch(old, ahead)
                _prefetch(new, ahead)
            found = _reach_64(old, at, mask, shift, thresholds)
            changed = _changed_64(old, at, new, at)
            if changed != np.uint64(0):
                word = (position - first) >> 6
                n = _collect(changed, position, n, records)
                before[word, 0] = position
                for k in range(CLASSES - 1):
                    sets[word, 1 + k] = found[k]
                    before[word, 1 + k] = reach[k]
            reach = (
                reach[0] + _popcount(found[0]),
                reach[1] + _popcount(found[1]),
                reach[2] + _popcount(found[2]),
                reach[3] + _popcount(found[3]),
                reach[4] + _popcount(found[4]),
                reach[5] + _popcount(found[5]),
                reach[6] + _popcount(found[6]),
            )
            position += 64
            at += 64
            column += 64
            if column == width:
                column = 0
                at += stride - width
        inverse = 1 / width
        for r in range(n_before, n):
            here = np.int64(records[0, r])
            word = (here - first) >> 6
            place = start + (here - first)
            if stride != width:
                place += _row_of(start_column + here - first, inverse) * (stride - width)
            bits = np.int64(old[place])
            c = np.int64(classes[(bits & np.int64(mask)) >> shift])
            earlier = (np.uint64(1) << np.uint64(here & 63)) - np.uint64(1)
            own = sets[word, c] & ~sets[word, c + 1] & earlier
            records[1, r] = c
            records[2, r] = before[word, c] - before[word, c + 1] + _popcount(own)
            records[3, r] = change_code(bits, np.int64(new[place]), sign, is_float)
    last = size
    filling = padded - size
    for k in range(CLASSES - 1):
        above = reach[k] - (filling if thresholds[k] == 0 else 0)
        totals[k] = last - above
        last = above
    totals[CLASSES - 1] = last
    return n


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
    lines = (size + width - 1) // width
    n = 0
    for line in range(lines):
        start = i + line * stride
        ahead = start + min(_ROWS_AHEAD, lines - 1 - line) * stride
        for column in range(0, width, SUB_BLOCK):
            _prefetch(old, ahead + column)
            _prefetch(new, ahead + column)
            n_before = n
            for word in range(column, column + SUB_BLOCK, 64):
                changed = _changed_64(old, start + word, new, start + word)
                if changed != np.uint64(0):
                    n = _collect(changed, line * width + word, n, records)
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
def _code_bits(records, n):
    """Bits of the largest code, at least 1."""
    every = np.int64(1)
    for r in range(n):
        every |= np.int64(records[3, r])
    return _bit_length(every)


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
def _write_codes(records, n, bits, out, at):
    """Codes of `bits` each, lowest bits first."""
    buffer = 0
    held = 0
    for r in range(n):
        buffer |= np.int64(records[3, r]) << held
        held += bits
        while held >= 8:
            out[at] = buffer & 255
            at += 1
            buffer >>= 8
            held -= 8
    if held:
        out[at] = buffer
        at += 1
    return at


@_compiled
def _read_codes(data, at, end, n, bits, width_bits, records):
    """Inverse of `_write_codes`, which must end at `end`; a reason, `OK` or not."""
    if not 1 <= bits <= width_bits:
        return RANGE
    size = (n * bits + 7) // 8
    if at + size != end:
        return SHORT if at + size > end else LONG
    mask = (1 << bits) - 1
    limit = (1 << width_bits) - 1
    buffer = 0
    held = 0
    for r in range(n):
        while held < bits:
            buffer |= np.int64(data[at]) << held
            at += 1
            held += 8
        code = buffer & mask
        buffer >>= bits
        held -= bits
        if code >= limit:
            return RANGE
        records[3, r] = code
    return PADDING if buffer else OK


@_compiled
def choose_fixed(records, n, size, width_bits):
    """The smallest of block-offset, bitmap and dense, bits of an inline code, and bytes."""
    blocks = (size + SUB_BLOCK - 1) // SUB_BLOCK
    bits = _code_bits(records, n)
    codes = 1 + (n * bits + 7) // 8
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
def write_fixed(mode, bits, records, n, size, out, at):
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
        return _write_codes(records, n, bits, out, at + blocks + n)
    words = (size + 7) // 8
    _clear(out, at, at + words)
    for r in range(n):
        position = np.int64(records[0, r])
        out[at + (position >> 3)] |= np.uint8(1 << (position & 7))
    return _write_codes(records, n, bits, out, at + words)


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
    """Token of a number ≥ 0: itself below 8, else 4 for each power of two; and its raw bits."""
    extra = _bit_length(value | 4) - 3
    return 4 * extra + (value >> extra), extra


@_compiled
def _token_start(token):
    """Inverse of `_token`: the smallest number of a token, and its raw bits."""
    extra = max((token >> 2) - 1, 0)
    return (token - 4 * extra) << extra, extra


@_compiled
def _folded(number):
    """0, −1, 1, −2, … as 0, 1, 2, 3, …"""
    return 2 * number if number >= 0 else -2 * number - 1


@_compiled
def _unfolded(number):
    return -((number + 1) >> 1) if number & 1 else number >> 1


@_compiled
def _put_bits(out, held, at, value, n):
    """Write the lowest `n` ≤ 55 bits of `value`, which has no others, at bit `at`.

    `held` are the bits of the byte before; eight bytes are written, those that follow with zeros.
    """
    held |= value << (at & 7)
    _store_64(out, at >> 3, held)
    after = at + n
    return held >> (8 * ((after >> 3) - (at >> 3))), after


@_compiled
def _put_number(out, held, at, number, step):
    """Rice code of a number below 2^24: its quotient by 2^step in zeros, a one, the rest."""
    quotient = number >> step
    if quotient >= RICE_ESCAPE:
        return _put_bits(out, held, at, number << RICE_ESCAPE, RICE_ESCAPE + NUMBER_BITS)
    rest = number & ((1 << step) - 1)
    return _put_bits(out, held, at, ((rest << 1) | 1) << quotient, quotient + 1 + step)


@_compiled
def _bits_at(data, at):
    """At least 56 bits from bit `at` on, as an int64 ≥ 0; eight bytes are read."""
    window = np.uint64(_load_64(data, at >> 3)) >> np.uint64(at & 7)
    return np.int64(window & np.uint64(0x7FFFFFFFFFFFFFFF))


@_compiled
def _bits_before(data, end, at):
    """`_bits_at` of the string of the bytes before `end`, the last one first."""
    window = np.uint64(_load_64_before(data, end - (at >> 3))) >> np.uint64(at & 7)
    return np.int64(window & np.uint64(0x7FFFFFFFFFFFFFFF))


@_compiled
def _get_number(data, at, step):
    """Inverse of `_put_number`: the number and the bit behind it."""
    window = _bits_at(data, at)
    zeros = _lowest_bit(np.uint64(window))
    if zeros >= RICE_ESCAPE:
        number = (window >> RICE_ESCAPE) & ((1 << NUMBER_BITS) - 1)
        return number, at + RICE_ESCAPE + NUMBER_BITS
    rest = (window >> (zeros + 1)) & ((1 << step) - 1)
    return (zeros << step) | rest, at + zeros + 1 + step


@_compiled
def _expected(left, shares, c):
    """Expected changes of class `c` when `left` remain for it and the classes above."""
    rest = 0
    for k in range(c, CLASSES):
        rest += shares[k]
    return left * shares[c] // rest if rest else 0


@_compiled
def _best_step(gaps, first, last, usual):
    """The step with which the Rice codes of gaps[first:last] and itself are shortest."""
    count = last - first
    total = 0
    for k in range(first, last):
        total += np.int64(gaps[k])
    if total == 0 and count > RICE_ESCAPE + NUMBER_BITS:
        return ALL
    # Where gaps are geometric the second of these is best, or by a hair the third.
    low = max(_bit_length(total // count) - 2, 0)
    usual = min(usual, MAX_STEP)
    bits = 0
    bits_1 = count
    bits_2 = 2 * count
    bits_usual = (usual - low) * count
    for k in range(first, last):
        gap = np.int64(gaps[k])
        bits += gap >> low
        bits_1 += gap >> (low + 1)
        bits_2 += gap >> (low + 2)
        bits_usual += gap >> usual
    best = low
    bits += _folded(low - usual)
    bits_1 += _folded(low + 1 - usual)
    bits_2 += _folded(low + 2 - usual)
    if bits_1 < bits:
        best, bits = low + 1, bits_1
    if bits_2 < bits:
        best, bits = low + 2, bits_2
    return usual if bits_usual < bits else min(best, MAX_STEP)


@_compiled
def _sort_by_class(records, n, changed, sorted_):
    """Fill gaps and codes of the changes of each class in turn, and count them."""
    lone = records[1, 0]
    others = 0
    for r in range(n):
        others |= np.int64(records[1, r] ^ lone)
    if others == 0:
        changed[lone] = n
        following = np.int64(0)
        for r in range(n):
            rank = np.int64(records[2, r])
            sorted_[0, r] = rank - following
            sorted_[1, r] = records[3, r]
            following = rank + 1
        return
    for r in range(n):
        changed[records[1, r]] += 1
    place = np.zeros(CLASSES, np.int64)
    following = np.zeros(CLASSES, np.int64)
    for c in range(1, CLASSES):
        place[c] = place[c - 1] + changed[c - 1]
    for r in range(n):
        c = records[1, r]
        rank = np.int64(records[2, r])
        sorted_[0, place[c]] = rank - following[c]
        sorted_[1, place[c]] = records[3, r]
        following[c] = rank + 1
        place[c] += 1


@_compiled
def write_entropy(records, n, width_bits, tables, sorted_, spare, out, at, end):
    """Write the changes of a tile in entropy mode, unless that takes until `end`.

    Takes:
      records[4, ≥ n]: u32, as `scan` makes them.
      n: changed elements, at least 1.
      width_bits: of an element.
      tables: see `codec.Tables.arrays`.
      sorted_[2, ≥ n]: u32, scratch.
      spare: u8, scratch of at least `end` − `at` + `SLACK`.
      out: u8, at least until `end` + `SLACK`.
      at: where to write.
      end: where the encoding must be shorter than.

    Returns:
      The end of what was written, or −1.
    """
    codes, _, shares, steps = tables
    changed = np.zeros(CLASSES, np.int64)
    _sort_by_class(records, n, changed, sorted_)
    held = 0
    bit = 8 * at
    held_codes = 0
    code_bit = 0
    limit = 8 * (end - at)
    left = n
    done = 0
    exceptions = 0  # never more than gaps that were written, whose places they take
    for c in range(CLASSES):
        count = changed[c]
        if c < CLASSES - 1:
            expected = _expected(left, shares, c)
            error = _folded(count - expected)
            held, bit = _put_number(out, held, bit, error, _bit_length(expected) >> 1)
        left -= count
        if count == 0:
            continue
        step = _best_step(sorted_[0], done, done + count, steps[c])
        held, bit = _put_number(out, held, bit, _folded(step - steps[c]), 0)
        for k in range(done, done + count):
            if bit - 8 * at + code_bit >= limit:
                return -1
            if step != ALL:
                held, bit = _put_number(out, held, bit, np.int64(sorted_[0, k]), step)
            code = np.int64(sorted_[1, k])
            token, extra = _token(code >> 1)
            entry = np.int64(codes[c, 2 * token + (code & 1)])
            raw = (code >> 1) & ((1 << extra) - 1)
            if entry == 0:  # any symbol will do; what it should be is said behind the gaps
                entry, extra, raw = np.int64(codes[c, 256]), 0, 0
                sorted_[0, exceptions] = k
                exceptions += 1
            length = entry >> 16
            held_codes, code_bit = _put_bits(
                spare, held_codes, code_bit, (raw << length) | (entry & 0xFFFF), length + extra
            )
        done += count
    held, bit = _put_number(out, held, bit, exceptions, 0)
    for e in range(exceptions):
        if bit - 8 * at + code_bit >= limit:
            return -1
        k = np.int64(sorted_[0, e])
        exception = k | np.int64(sorted_[1, k]) << INDEX_BITS
        held, bit = _put_bits(out, held, bit, exception, INDEX_BITS + width_bits)
    at = (bit + 7) >> 3
    size = (code_bit + 7) >> 3
    if at + size >= end:
        return -1
    for k in range(size):
        out[at + k] = spare[size - 1 - k]
    return at + size


@_compiled
def read_entropy(stream, at, end, n, totals, width_bits, tables, changed, records):
    """Inverse of `write_entropy`: fills class, rank and code of `n` records, class by class.

    Takes:
      stream: u8, the tile's from `at` to `end`, with 8 bytes of anything before and 16 behind.
      totals[8]: int64, more than any rank of each class.

    Returns:
      A reason, `OK` or not. Each rank is below the class's total and above the one before.
    """
    _, values, shares, steps = tables
    limit = 8 * (end - at)
    start = 8 * at
    front = start
    back = 0
    left = n
    r = 0
    most = (1 << width_bits) - 1
    for c in range(CLASSES):
        count = left
        if c < CLASSES - 1:
            expected = _expected(left, shares, c)
            error, front = _get_number(stream, front, _bit_length(expected) >> 1)
            count = expected + _unfolded(error)
            if front - start > limit:
                return SHORT
        if count < 0 or count > left or count > totals[c]:
            return COUNTS
        changed[c] = count
        left -= count
        if count == 0:
            continue
        error, front = _get_number(stream, front, 0)
        step = steps[c] + _unfolded(error)
        if step != ALL and not 0 <= step <= MAX_STEP:
            return RANGE
        total = totals[c]
        rank = -1
        rest = (1 << step) - 1
        # The next bits of both strings, and how many of them are left.
        window = 0
        left_in_window = 0
        codes = 0
        left_in_codes = 0
        for k in range(r, r + count):
            # An item is at most 48 bits in front and 39 behind: within what surrounds the stream.
            if step != ALL:
                zeros = _lowest_bit(np.uint64(window))
                used = zeros + 1 + step
                if used > left_in_window or zeros >= RICE_ESCAPE:
                    window = _bits_at(stream, front)
                    left_in_window = 56
                    zeros = _lowest_bit(np.uint64(window))
                    used = zeros + 1 + step
                if zeros < RICE_ESCAPE:
                    rank += (zeros << step) + ((window >> (zeros + 1)) & rest)
                else:
                    used = RICE_ESCAPE + NUMBER_BITS
                    rank += (window >> RICE_ESCAPE) & ((1 << NUMBER_BITS) - 1)
                window >>= used
                left_in_window -= used
                front += used
            rank += 1
            if left_in_codes < MAX_CODE_BITS:
                codes = _bits_before(stream, end, back)
                left_in_codes = 56
            entry = np.int64(values[c, codes & ((1 << CODE_BITS) - 1)])
            symbol = entry & 255
            length = entry >> 8
            code, extra = _token_start(symbol >> 1)
            code += (codes >> (length - extra)) & ((1 << extra) - 1)
            code = 2 * code + (symbol & 1)
            codes >>= length
            left_in_codes -= length
            back += length
            if front - start + back > limit:
                return SHORT
            if rank >= total or code >= most:
                return RANGE
            records[1, k] = c
            records[2, k] = rank
            records[3, k] = code
        r += count
    exceptions, front = _get_number(stream, front, 0)
    for _ in range(exceptions):
        if front - start + back > limit:
            return SHORT
        window = _bits_at(stream, front)
        front += INDEX_BITS + width_bits
        k = window & ((1 << INDEX_BITS) - 1)
        code = (window >> INDEX_BITS) & most
        if k >= n or code >= most:
            return RANGE
        records[3, k] = code
    used = (front - start + 7) >> 3
    if used + ((back + 7) >> 3) != end - at:
        return LONG
    if _unused(front, stream[at + used - 1]) or _unused(back, stream[at + used]):
        return PADDING
    return OK


@_compiled
def _unused(bits, last):
    """The bits of a string's last byte beyond its end."""
    return np.int64(last) >> (bits & 7) if bits & 7 else 0


@_compiled
def place_records(flat, i, size, fmt, changed, work, records):
    """Fill the positions of records that `read_entropy` made, from the tile's old values.

    Takes:
      flat, i: the tile is in one piece from `i` on, a multiple of 256 long, with zeros from `size`.
      fmt: see `scan`.
      changed[8]: changes of each class.
      work: scratch: u32[18], u32[8], u64[36], and three of int64[8]; the last is not used.

    Returns:
      Whether all were placed; if not, a rank is beyond the elements of its class.
    """
    _, _, shift, mask, thresholds, _ = fmt
    reached, ranks, sets, cursor, stop, _ = work
    reached[:] = 0
    sets[:4] = ~np.uint64(0)
    sets[4 * CLASSES :] = 0
    done = 0
    for c in range(CLASSES):
        cursor[c] = done
        done += changed[c]
        stop[c] = done
        ranks[c] = records[2, cursor[c]] if changed[c] else _NO_RANK
    placed = 0
    blocks = (size + SUB_BLOCK - 1) // SUB_BLOCK
    for block in range(blocks):
        start = i + block * SUB_BLOCK
        _count_reached(flat, start, mask, shift, thresholds, reached, sets)
        if block == blocks - 1:
            filling = np.uint32(blocks * SUB_BLOCK - size)
            reached[CLASSES + 1] -= filling
            for k in range(CLASSES - 1):
                if thresholds[k] == 0:
                    reached[CLASSES + 2 + k] -= filling
        hit = _below(ranks, reached)
        # One change at a time, so that nothing has to be predicted but how many there are.
        while hit != np.uint64(0):
            c = _lowest_bit(hit)
            one = sets[4 * c] & ~sets[4 * c + 4]
            two = sets[4 * c + 1] & ~sets[4 * c + 5]
            three = sets[4 * c + 2] & ~sets[4 * c + 6]
            four = sets[4 * c + 3] & ~sets[4 * c + 7]
            in_one = _popcount(one)
            in_two = in_one + _popcount(two)
            in_three = in_two + _popcount(three)
            rank = np.int64(ranks[c]) - (np.int64(reached[c]) - np.int64(reached[c + 1]))
            past_one = ~((rank - in_one) >> 63)
            past_two = ~((rank - in_two) >> 63)
            past_three = ~((rank - in_three) >> 63)
            bits = one ^ ((one ^ two) & np.uint64(past_one))
            bits ^= (two ^ three) & np.uint64(past_two)
            bits ^= (three ^ four) & np.uint64(past_three)
            rank -= (
                (in_one & past_one)
                + ((in_two - in_one) & past_two)
                + ((in_three - in_two) & past_three)
            )
            word = -(past_one + past_two + past_three)
            r = cursor[c]
            records[0, r] = block * SUB_BLOCK + 64 * word + _select_64(bits, rank)
            placed += 1
            r += 1
            cursor[c] = r
            over = ~((r - stop[c]) >> 63)  # −1 after the last change of the class
            following = (np.int64(records[2, r]) | over) & _NO_RANK
            ranks[c] = following
            after = np.int64(reached[CLASSES + 1 + c]) - np.int64(reached[CLASSES + 2 + c])
            hit ^= np.uint64(following >= after) << np.uint64(c)
    return placed == done


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
def survey(old, new, i, width, stride, size, fmt, every, members, changes, symbols):
    """Count, by exponent of the old value, elements, changed ones and symbols of their changes.

    Takes:
      old, new: flat boxes.
      i, width, stride, size: of a tile; see `scan`, but any width will do.
      fmt: see `scan`.
      every: how far apart the elements are that are counted as members; they stand for the others.
      members[256], changes[256], symbols[256, 256]: int64, added to.
    """
    width_bits, is_float, shift, mask = fmt[:4]
    sign = 1 << (width_bits - 1)
    mask = np.int64(mask)
    for start in range(i, i + size // width * stride, stride):
        for at in range(start, start + width, every):
            members[(np.int64(old[at]) & mask) >> shift] += every
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


@_compiled
def class_costs(edges, members, changes, symbols, cost):
    """Bits that each stretch of exponents takes as one class.

    Takes:
      edges[n + 1]: int64, exponents at which a stretch may begin or end.
      members, changes, symbols: of a survey.
      cost[n, n + 1]: float64, filled at [i, j] for i < j with the bits of which elements between
        edges i and j change, and to what, and of the class's table.
    """
    n = edges.size - 1
    counts = np.empty(256, np.int64)
    for i in range(n):
        counts[:] = 0
        inside = 0
        hit = 0
        for j in range(i, n):
            for exponent in range(edges[j], edges[j + 1]):
                if changes[exponent]:
                    for k in range(256):
                        counts[k] += symbols[exponent, k]
                inside += members[exponent]
                hit += changes[exponent]
            inside = max(inside, hit)
            bits = _xlogx(inside) - _xlogx(hit) - _xlogx(inside - hit) + _xlogx(hit)
            for k in range(256):
                if counts[k]:
                    bits += 8 - _xlogx(counts[k])
            cost[i, j + 1] = bits


@_compiled
def _xlogx(x):
    return x * np.log2(x) if x > 0 else 0.0


@_compiled
def code_lengths(counts, lengths):
    """Lengths of Huffman's code, at most `CODE_BITS`.

    Takes:
      counts[n]: int64, how often each symbol occurs; 0: it gets no code. At least two are not 0.
      lengths[n]: u8, filled.
    """
    n = counts.size
    counts = counts.copy()
    weights = np.empty(2 * n, np.int64)
    parents = np.empty(2 * n, np.int64)
    leaves = np.empty(n, np.int64)
    while True:
        used = 0
        for k in range(n):
            if counts[k]:
                leaves[used] = k
                weights[used] = counts[k]
                used += 1
        nodes = used
        while nodes < 2 * used - 1:
            # Symbols are few, so looking for the two lightest is as good as a heap.
            one = -1
            two = -1
            for k in range(nodes):
                if weights[k] < 0:
                    continue
                if one < 0 or weights[k] < weights[one]:
                    one, two = k, one
                elif two < 0 or weights[k] < weights[two]:
                    two = k
            weights[nodes] = weights[one] + weights[two]
            parents[one] = parents[two] = nodes
            weights[one] = weights[two] = -1
            nodes += 1
        longest = 0
        lengths[:] = 0
        for k in range(used):
            node = k
            length = 0
            while node != nodes - 1:
                node = parents[node]
                length += 1
            lengths[leaves[k]] = length
            longest = max(longest, length)
        if longest <= CODE_BITS:
            return
        for k in range(n):  # flatter counts make shorter codes
            counts[k] = (counts[k] + 1) >> 1


@_compiled
def prefix_codes(lengths, codes, symbols):
    """Canonical prefix codes as those of DEFLATE (RFC 1951, 3.2.2); see `codec.Tables.arrays`.

    Takes:
      lengths[n, 256]: u8, complete codes.
      codes[n, 257]: u32, filled; at the end one of the shortest codes with raw bits of 0.
      symbols[n, 2^11]: u16, filled.
    """
    for c in range(lengths.shape[0]):
        code = 0
        for length in range(1, CODE_BITS + 1):
            for symbol in range(256):
                if lengths[c, symbol] != length:
                    continue
                backwards = 0
                for k in range(length):
                    backwards |= ((code >> k) & 1) << (length - 1 - k)
                extra = _token_start(symbol >> 1)[1]
                codes[c, symbol] = backwards | length << 16
                if codes[c, 256] == 0:
                    codes[c, 256] = backwards | (length + extra) << 16
                for slot in range(backwards, 1 << CODE_BITS, 1 << length):
                    symbols[c, slot] = symbol | (length + extra) << 8
                code += 1
            code <<= 1


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
def _look_up(flat, start, width, stride, records, place, n, row):
    """Copy into a row of the records the elements of a tile at the positions in row `place`."""
    if width == stride:
        for r in range(n):
            records[row, r] = flat[start + np.int64(records[place, r])]
        return
    inverse = 1 / width
    for r in range(n):
        position = np.int64(records[place, r])
        records[row, r] = flat[start + _row_of(position, inverse) * (stride - width) + position]


@_compiled
def _add_record_hashes(records, place, n, width, index, index_stride, sums):
    """Add to `sums[2]` how the hashes of a tile's changed elements grow.

    Takes:
      records: old bits in row 1, new ones in row 3, positions in row `place`. Nothing else is
        looked at, so that eight elements are under way in one vector.
      index, index_stride: row-major index in the tensor of the tile's first element, and the
        stride of its rows.
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
def encode_tiles(
    old, new, shape, tile, first, last, fmt, tables, frame, work, out, modes, changed, sizes, sums
):
    """Encode tiles `first` … `last` of a box until they are done or `out` may be too small.

    Takes:
      old, new: flat boxes.
      shape, tile: (lead, rows, cols) of the box, (rows, cols) of a tile.
      fmt: see `scan`.
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
    width_bits, is_float, shift, mask, _, classes = fmt
    sign = 1 << (width_bits - 1)
    item = width_bits // 8
    digests, origin, lead_index, row_index = frame
    own = lone_class(mask, shift, classes)
    old_tile, new_tile, scan_work, _, totals, records, sorted_, spare = work
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
            totals[:] = 0
            totals[own] = size
            n = scan_lone(a, i, b, line, stride, size, sign, is_float, own, records)
        else:
            n = scan(a, i, b, line, stride, size, fmt, scan_work, totals, records)
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
                after = write_entropy(
                    records, n, width_bits, tables, sorted_, spare, out, at, at + fixed
                )
            mode, bits = ENTROPY, 0
            if after < 0 or after - at >= least:
                mode, bits, fixed = choose_fixed(records, n, size, width_bits)
                if 0 < after < at + fixed:
                    mode = ENTROPY
            if mode == ENTROPY:
                at = after
            elif mode != DENSE:
                at = write_fixed(mode, bits, records, n, size, out, at)
            else:
                at = _write_rows(new, start, width, shape[2], height, item, out, at)
            modes[t] = mode
            if digests:
                index = origin + lead * lead_index + row * row_index + column
                _look_up(old, start, width, shape[2], records, 0, n, 1)
                _look_up(new, start, width, shape[2], records, 0, n, 3)
                _add_record_hashes(records, 0, n, width, index, row_index, sums)
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
    width_bits, is_float, _, _, _, _ = fmt
    sign = 1 << (width_bits - 1)
    item = width_bits // 8
    digests, origin, lead_index, row_index = frame
    records = work[5]
    has_old = old.size > 0
    taken = np.zeros(2, np.int64)
    for k in range(first, last):
        lead, row, column, height, width = _tile_box(ids[k], shape, tile)
        size = height * width
        start = (lead * shape[1] + row) * shape[2] + column
        index = origin + lead * lead_index + row * row_index + column
        at = offsets[k]
        n_bytes = np.int64(sizes[k])
        n = np.int64(changed[k])
        if modes[k] == DENSE:
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
        reason, place = _read_tile(
            modes[k], data, at, n_bytes, n, old, start, height, width, shape[2], fmt, tables, work
        )
        if reason:
            return k, reason
        if not in_place:
            _copy_rows(old, new, start, width, shape[2], height)
        # What `_add_record_hashes` needs; classes have served.
        _look_up(old, start, width, shape[2], records, place, n, 1)
        for r in range(n):
            bits, code = np.int64(records[1, r]), np.int64(records[3, r])
            records[3, r] = changed_bits(bits, code, sign, is_float)
        _put_back(new, start, width, shape[2], records, place, n)
        if digests:
            _add_record_hashes(records, place, n, width, index, row_index, sums)
    return last, OK


@_compiled
def _read_tile(mode, data, at, n_bytes, n, old, start, height, width, stride, fmt, tables, work):
    """Fill records with the changes of a tile that is not dense, from its stream.

    Returns:
      A reason, `OK` or not, and the row of the records that has positions; codes are in row 3.
    """
    width_bits, _, shift, mask, _, classes = fmt
    old_tile, _, _, place_work, totals, records, _, stream = work
    size = height * width
    if mode == EMPTY:
        return (COUNTS if n or n_bytes else OK), 0
    if n == 0 or n > size:
        return COUNTS, 0
    if n_bytes >= size * (width_bits // 8):
        return LONG, 0
    if mode in (BLOCK_OFFSET, BITMAP):
        return read_fixed(mode, data, at, at + n_bytes, n, size, width_bits, records), 0
    if mode != ENTROPY or tables[0].size == 0:
        return MODE, 0
    own = lone_class(mask, shift, classes)
    # Ranks are checked against the classes' true sizes when they are placed.
    totals[:] = size if own < 0 else 0
    if own >= 0:
        totals[own] = size
    changed = place_work[5]
    _copy(stream, 8, data, at, n_bytes)
    reason = read_entropy(stream, 8, 8 + n_bytes, n, totals, width_bits, tables, changed, records)
    if reason or own >= 0:
        return reason, 2  # a rank is a position
    flat, i = old, start
    if width != stride or size % SUB_BLOCK:
        _gather(old, start, width, stride, size, old_tile)
        flat, i = old_tile, 0
    return (OK if place_records(flat, i, size, fmt, changed, place_work, records) else RANGE), 0


@_compiled
def _copy_rows(old, new, start, width, stride, height):
    if width == stride:
        _copy(new, start, old, start, width * height)
        return
    for line in range(height):
        here = start + line * stride
        for column in range(0, width, SUB_BLOCK):
            _prefetch(old, here + _ROWS_AHEAD * stride + column)
        _copy(new, here, old, here, width)


@_compiled
def _put_back(flat, start, width, stride, records, place, n):
    """Write row 3 of the records to where `_look_up` read."""
    if width == stride:
        for r in range(n):
            flat[start + np.int64(records[place, r])] = records[3, r]
        return
    inverse = 1 / width
    for r in range(n):
        position = np.int64(records[place, r])
        flat[start + _row_of(position, inverse) * (stride - width) + position] = records[3, r]


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
