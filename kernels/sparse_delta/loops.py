"""The compiled loops of the host coder: every numba function of the package, and nothing else.

Weights come in as unsigned integers of 8, 16 or 32 bits in boxes (lead, rows, cols). Only `scan`
and `apply` read all of them, by vector instructions written in LLVM's portable vector types, which
it lowers to AVX-512, AVX2, SSE or NEON; all other loops touch changed elements only, as records
that do not depend on the width, so they are compiled once.

numba turns a product or sum of small integers into 64 bits, and one of u64 and i64 into a float.
Here all scalars are int64, and u64 are used for bit sets only.

Every read of an encoded stream is checked against its end in the loop that does it.
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


def _compiled(function: Any) -> Any:
    """Compile on first use and keep the result on disk, for the user's next process.

    Where neither the package's folder nor the user's cache folder can be written, numba refuses to
    cache; then each process compiles for itself.
    """
    try:
        return numba.njit(cache=True, nogil=True, boundscheck=False)(function)
    except RuntimeError:
        return numba.njit(nogil=True, boundscheck=False)(function)


# ------------------------------------------------------------------- instructions that numba lacks


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


@intrinsic
def _popcount(typing: Any, bits: Any) -> Any:
    """Number of set bits of a u64, int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


@intrinsic
def _lowest_bit(typing: Any, bits: Any) -> Any:
    """Index of the lowest set bit of a u64 other than 0, int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
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


@intrinsic
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


@intrinsic
def _counts_above(typing: Any, array: Any, i: Any, mask: Any, limits: Any, counts: Any) -> Any:
    """counts[k] = number of the 256 elements from `i` with (array[.] & mask) >= limits[k].

    Sums of comparisons in lanes of the elements' own width; a lane of 8 bits takes 8 of them.
    """
    width = array.dtype.bitwidth
    lanes = 512 // width

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, array, args[0], args[1])
        mask = _splat(builder, args[2], lanes)
        limit_data = context.make_array(limits)(context, builder, args[3]).data
        count_data = context.make_array(counts)(context, builder, args[4]).data
        vector = ir.VectorType(ir.IntType(width), lanes)
        at = [ir.Constant(ir.IntType(64), k) for k in range(CLASSES - 1)]
        bounds = [_splat(builder, builder.load(builder.gep(limit_data, [k])), lanes) for k in at]
        sums = [ir.Constant(vector, None)] * (CLASSES - 1)
        for start in range(0, SUB_BLOCK, lanes):
            offset = builder.gep(pointer, [ir.Constant(ir.IntType(64), start)])
            values = builder.and_(_load_vector(builder, offset, width, lanes), mask)
            for k, bound in enumerate(bounds):
                above = builder.sext(builder.icmp_unsigned(">=", values, bound), vector)
                sums[k] = builder.sub(sums[k], above)
        wide = ir.VectorType(ir.IntType(max(width, 16)), lanes)
        reduce = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(wide.element, [wide]),
            f"llvm.vector.reduce.add.v{lanes}i{wide.element.width}",
        )
        for k, total in zip(at, sums, strict=True):
            if width < 16:
                total = builder.zext(total, wide)
            total = builder.call(reduce, [total])
            if width > 16:
                total = builder.trunc(total, ir.IntType(16))
            builder.store(total, builder.gep(count_data, [k]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype, limits, counts), generate


# ------------------------------------------------------------------------------------ one element


@_compiled
def _ordered(bits, sign, is_float):
    """Integer in which neighbouring values are neighbours; see `elements.order`."""
    if is_float and bits & sign:
        return 2 * sign - 1 - bits
    return bits ^ sign


@_compiled
def change_code(old, new, sign, is_float):
    """Code 2(|c| − 1) + [c > 0] of the change c of an element, 0 … 2^w − 2; old != new.

    c counts the values between, away from zero for floats, wrapped into w bits.
    """
    change = (_ordered(new, sign, is_float) - _ordered(old, sign, is_float)) & (2 * sign - 1)
    if is_float and old & sign:
        change = (-change) & (2 * sign - 1)
    if change >= sign:
        return 2 * (2 * sign - change) - 2
    return 2 * change - 1


@_compiled
def changed_bits(old, code, sign, is_float):
    """Inverse of `change_code`: the new bits."""
    change = (code >> 1) + 1
    if not code & 1:
        change = -change
    if is_float and old & sign:
        change = -change
    ordered = (_ordered(old, sign, is_float) + change) & (2 * sign - 1)
    if is_float and not ordered & sign:
        return 2 * sign - 1 - ordered
    return ordered ^ sign


# ------------------------------------------------------------------------------------ whole tiles


@_compiled
def _gather(flat, start, width, stride, size, scratch):
    """Copy a tile's rows to the front of `scratch` and fill its last sub-block with zeros."""
    done = 0
    while done < size:
        scratch[done : done + width] = flat[start : start + width]
        done += width
        start += stride
    end = (size + SUB_BLOCK - 1) // SUB_BLOCK * SUB_BLOCK
    scratch[size:end] = 0


@_compiled
def _count_block(flat, i, mask, limits, block, end, counts, totals, above):
    """Count the classes of the sub-block from `i`, of which `end` elements are the tile's."""
    _counts_above(flat, i, mask, limits, above)
    left = SUB_BLOCK
    if end < SUB_BLOCK:
        # What fills the last sub-block is zeros: they are above those limits that are zero.
        left = end
        for k in range(CLASSES - 1):
            if limits[k] == 0:
                above[k] -= np.uint16(SUB_BLOCK - end)
    for k in range(CLASSES - 1):
        reached = np.int64(above[k])
        counts[k, block] = left - reached
        totals[k] += left - reached
        left = reached
    counts[CLASSES - 1, block] = left
    totals[CLASSES - 1] += left


@_compiled
def _class_set(flat, i, mask, limits, c, members):
    """The elements of class `c` of the sub-block from `i`, as four sets of 64."""
    low = np.int64(limits[c - 1]) if c > 0 else 0
    high = np.int64(limits[c]) if c < CLASSES - 1 else 0
    for word in range(4):
        members[c, word] = _in_range_64(flat, i + 64 * word, mask, low, high - low)


@_compiled
def count_classes(flat, i, width, stride, size, mask, limits, counts, totals):
    """Count the classes of a tile: the receiver's half of `scan`, with the same arguments."""
    above = np.empty(CLASSES, np.uint16)
    totals[:] = 0
    column = 0
    for block in range((size + SUB_BLOCK - 1) // SUB_BLOCK):
        end = min(SUB_BLOCK, size - block * SUB_BLOCK)
        _count_block(flat, i, mask, limits, block, end, counts, totals, above)
        i += SUB_BLOCK
        column += SUB_BLOCK
        if column == width:
            column = 0
            i += stride - width


@_compiled
def scan(
    old, i, new, j, width, stride, size, mask, limits, sign, is_float, counts, totals, records
):
    """Find the changed elements of a tile and count the classes of its old values.

    Args:
      old, new: flat arrays of elements, the tile's first at `i` and `j`.
      width, stride: elements of a row of the tile, a multiple of 256, and between its rows.
      size: elements; those of the last sub-block beyond it are zero in both arrays.
      mask, limits[7]: of the elements' type: an element's class is the number of limits that
        old & mask is not below.
      sign, is_float: of the element format.
      counts[8, sub-blocks]: u16, filled with the number of elements of each class.
      totals[8]: int64, filled with their sums.
      records[4, size]: u32, filled with position, class, rank within the class, and code.

    Returns:
      The number of changed elements.
    """
    above = np.empty(CLASSES, np.uint16)
    members = np.empty((CLASSES, 4), np.uint64)
    none = np.uint64(0)
    one = np.uint64(1)
    totals[:] = 0
    n_changed = 0
    column = 0
    for block in range((size + SUB_BLOCK - 1) // SUB_BLOCK):
        end = min(SUB_BLOCK, size - block * SUB_BLOCK)
        _count_block(old, i, mask, limits, block, end, counts, totals, above)
        known = 0
        for word in range(4):
            changed = _changed_64(old, i + 64 * word, new, j + 64 * word)
            while changed != none:
                bit = _lowest_bit(changed)
                changed &= changed - one
                at = 64 * word + bit
                bits = np.int64(old[i + at])
                c = 0
                for k in range(CLASSES - 1):
                    c += np.int64((bits & np.int64(mask)) >= np.int64(limits[k]))
                if not (known >> c) & 1:
                    known |= 1 << c
                    _class_set(old, i, mask, limits, c, members)
                rank = totals[c] - np.int64(counts[c, block])
                for before in range(word):
                    rank += _popcount(members[c, before])
                rank += _popcount(members[c, word] & ((one << np.uint64(bit)) - one))
                records[0, n_changed] = block * SUB_BLOCK + at
                records[1, n_changed] = c
                records[2, n_changed] = rank
                records[3, n_changed] = change_code(bits, np.int64(new[j + at]), sign, is_float)
                n_changed += 1
        i += SUB_BLOCK
        j += SUB_BLOCK
        column += SUB_BLOCK
        if column == width:
            column = 0
            i += stride - width
            j += stride - width
    return n_changed


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
def write_fixed(records, n, size, width_bits, out, at):
    """Write the changes of a tile as block-offset or bitmap, whichever is smaller.

    Args:
      records[4, ≥ n]: u32, in order of position.
      n: changed elements, at least 1.
      size: elements of the tile.
      width_bits: of an element.
      out: u8.
      at: where to write; nothing is written unless it is smaller than the dense tile.

    Returns:
      The mode and the end of what was written; `DENSE` and `at` where that would be smaller.
    """
    blocks = (size + SUB_BLOCK - 1) // SUB_BLOCK
    bits, escapes = _code_bits(records, n, width_bits)
    codes = 1 + (n * bits + 7) // 8 + escapes * (width_bits // 8)
    bitmap = codes + (size + 7) // 8
    block_offset = codes + blocks + n
    if n > (SUB_BLOCK - 1):
        # A count of 256 has no byte.
        run = 0
        for r in range(n):
            run = run + 1 if r and records[0, r] >> 8 == records[0, r - 1] >> 8 else 1
            if run == SUB_BLOCK:
                block_offset = bitmap + 1
    if min(bitmap, block_offset) >= size * (width_bits // 8):
        return DENSE, at
    out[at] = bits
    at += 1
    if block_offset <= bitmap:
        out[at : at + blocks] = 0
        for r in range(n):
            out[at + np.int64(records[0, r] >> 8)] += np.uint8(1)
            out[at + blocks + r] = records[0, r] & 255
        return BLOCK_OFFSET, _write_codes(records, n, bits, width_bits, out, at + blocks + n)
    words = (size + 7) // 8
    out[at : at + words] = 0
    for r in range(n):
        position = np.int64(records[0, r])
        out[at + (position >> 3)] |= np.uint8(1 << (position & 7))
    return BITMAP, _write_codes(records, n, bits, width_bits, out, at + words)


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


@_compiled
def _add_change(old_bits, new_bits, index, sums):
    """Add an element's change of hash to the digest's change `sums[2]`."""
    old_a, old_b = _element_hash(old_bits, index)
    new_a, new_b = _element_hash(new_bits, index)
    sums[0] = (sums[0] + new_a - old_a) & 0xFFFFFFFF
    sums[1] = (sums[1] + new_b - old_b) & 0xFFFFFFFF


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
def _add_changes(old, new, start, width, stride, index, index_stride, records, n, sums):
    """`_add_change` of all records of a tile whose first element has the row-major `index`."""
    for r in range(n):
        position = np.int64(records[0, r])
        row = position // width
        at = start + row * stride + position - row * width
        place = index + row * index_stride + position - row * width
        _add_change(np.int64(old[at]), np.int64(new[at]), place, sums)


@_compiled
def encode_tiles(
    old, new, shape, tile, first, last, fmt, limits, tables, frame, work, out, modes, changed,
    sizes, sums,
):  # fmt: skip
    """Encode tiles `first` … `last` of a box until they are done or `out` may be too small.

    Args:
      old, new: flat boxes.
      shape, tile: (lead, rows, cols) of the box, (rows, cols) of a tile.
      fmt: width in bits, is a float, magnitude mask.
      limits[7]: of the elements' type, see `scan`.
      tables: see `write_entropy`.
      frame: whether to digest, row-major index in the tensor of the box's first element, and the
        strides of that index along lead and rows.
      work: scratch: two tiles of elements, counts, totals, records, tokens.
      out: u8.
      modes, changed, sizes: u8, u32, u32 of each tile of the box.
      sums[2]: change of the digest.

    Returns:
      The first tile that is not encoded, and the number of bytes written.
    """
    width_bits, is_float, mask = fmt
    sign = 1 << (width_bits - 1)
    item = width_bits // 8
    digests, origin, lead_index, row_index = frame
    old_tile, new_tile, counts, totals, records, tokens = work
    lead_stride = shape[1] * shape[2]
    at = 0
    for t in range(first, last):
        lead, row, column, height, width = _tile_box(t, shape, tile)
        size = height * width
        if at + size * item > out.size:
            return t, at
        start = lead * lead_stride + row * shape[2] + column
        i = start
        a, b = old, new
        line, stride = width, shape[2]
        if width == shape[2]:
            line = stride = size
        if line % SUB_BLOCK:
            _gather(old, start, width, shape[2], size, old_tile)
            _gather(new, start, width, shape[2], size, new_tile)
            a, b = old_tile, new_tile
            line = stride = (size + SUB_BLOCK - 1) // SUB_BLOCK * SUB_BLOCK
            i = 0
        n = scan(
            a, i, b, i, line, stride, size, mask, limits, sign, is_float, counts, totals, records
        )
        changed[t] = n
        begin = at
        if n == 0:
            modes[t] = EMPTY
        else:
            mode, at = write_fixed(records, n, size, width_bits, out, at)
            if mode == DENSE:
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
    old, new, in_place, shape, tile, ids, first, last, fmt, limits, tables, frame, work, data,
    modes, changed, offsets, sizes, sums,
):  # fmt: skip
    """Decode tiles `ids[first:last]` of a box; the arguments are those of `encode_tiles`.

    Args:
      old: flat box; of no elements where there is none and all tiles are dense.
      new: flat box that is written, the listed tiles whole.
      in_place: `new` is the memory of `old`.
      data: u8, holds `data[offsets[k] : offsets[k] + sizes[k]]` for each k.

    Returns:
      The number of the first bad tile and the reason; `last` and OK where there is none.
    """
    width_bits, is_float, mask = fmt
    sign = 1 << (width_bits - 1)
    item = width_bits // 8
    digests, origin, lead_index, row_index = frame
    old_tile, _, counts, totals, records, tokens = work
    has_old = old.size > 0
    for k in range(first, last):
        lead, row, column, height, width = _tile_box(ids[k], shape, tile)
        size = height * width
        start = (lead * shape[1] + row) * shape[2] + column
        index = origin + lead * lead_index + row * row_index + column
        at = offsets[k]
        end = at + sizes[k]
        n = np.int64(changed[k])
        mode = modes[k]
        if mode == DENSE:
            if end - at != size * item:
                return k, SHORT if end - at < size * item else LONG
            if digests and has_old:
                sums[2:] = 0
                digest_rows(old, start, width, shape[2], height, index, row_index, sums[2:])
                sums[:2] -= sums[2:]
            _read_rows(data, at, item, new, start, width, shape[2], height)
            if digests:
                digest_rows(new, start, width, shape[2], height, index, row_index, sums)
            continue
        if not has_old:
            return k, BASE
        if mode == EMPTY:
            if n or end != at:
                return k, COUNTS
        elif n == 0 or n > size:
            return k, COUNTS
        elif mode != BLOCK_OFFSET and mode != BITMAP:
            return k, MODE
        else:
            reason = read_fixed(mode, data, at, end, n, size, width_bits, records)
            if reason:
                return k, reason
        if not in_place:
            for line in range(height):
                here = start + line * shape[2]
                new[here : here + width] = old[here : here + width]
        for r in range(n):
            position = np.int64(records[0, r])
            line = position // width
            here = start + line * shape[2] + position - line * width
            bits = np.int64(old[here])
            value = changed_bits(bits, np.int64(records[3, r]), sign, is_float)
            new[here] = value
            if digests:
                place = index + line * row_index + position - line * width
                _add_change(bits, value, place, sums)
    return last, OK
