"""The peers' compiled loops. All release the GIL and work on one flat tensor of uint16 bits."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

BLOCK = 256
RAW = 255
"""Count of a block that is sent raw; fewer changes than that are cheaper by their offsets."""
RAW_FROM = 171
"""From so many changes on, offset and code of 1.5 bytes each are more than 512 bytes less."""
ESCAPE = 15
GAP_ESCAPE = 0xFFFF


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(nogil=True, cache=True, boundscheck=False)(function)


@_compiled
def _changed(old, new, old_words, new_words, positions):
    """Positions of unequal elements, ascending; gives their number.

    Args:
      old: uint16 [N].
      new: uint16 [N].
      old_words: memory of `old` as uint64 [N // 4].
      new_words: memory of `new`, likewise.
      positions: int32 [N + 1], written.
    """
    found = 0
    for word in range(old_words.size):
        if old_words[word] != new_words[word]:
            for at in range(4 * word, 4 * word + 4):
                positions[found] = at
                found += old[at] != new[at]
    for at in range(4 * old_words.size, old.size):
        positions[found] = at
        found += old[at] != new[at]
    return found


def changed(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Positions of the unequal elements of two flat tensors, int32, ascending."""
    whole = old.size // 4 * 4
    words = [x[:whole].view(np.uint64) for x in (old, new)]
    # One more than can be found: the loop writes each candidate before it knows. Pages of this
    # buffer that are never written are never mapped.
    positions = np.empty(old.size + 1, np.int32)
    return positions[: _changed(old, new, *words, positions)]


@_compiled
def take(values, positions):
    """values[positions], uint16 [K]."""
    taken = np.empty(positions.size, np.uint16)
    for i in range(positions.size):
        taken[i] = values[positions[i]]
    return taken


@_compiled
def take_xor(old, new, positions):
    """(old ^ new)[positions], uint16 [K]."""
    taken = np.empty(positions.size, np.uint16)
    for i in range(positions.size):
        taken[i] = old[positions[i]] ^ new[positions[i]]
    return taken


@_compiled
def put(out, positions, values):
    """out[positions] = values."""
    for i in range(positions.size):
        out[positions[i]] = values[i]


@_compiled
def gaps_of(positions):
    """Gap before each position (the first one's is the position itself), and the largest gap."""
    gaps = np.empty(positions.size, np.uint32)
    before, largest = np.int64(0), np.int64(0)
    for i in range(positions.size):
        gap = positions[i] - before
        gaps[i] = gap
        largest = max(largest, gap)
        before = positions[i]
    return gaps, largest


@_compiled
def put_xor_by_gaps(out, gaps, values):
    """XORs values into the elements that are these gaps apart."""
    at = np.int64(0)
    for i in range(gaps.size):
        at += gaps[i]
        out[at] ^= values[i]


@_compiled
def narrow_gaps(positions):
    """Gaps as uint16, those of 65535 and more escaped to a list of their own, uint32."""
    gaps, large = np.empty(positions.size, np.uint16), np.empty(positions.size, np.uint32)
    before, escaped = np.int64(0), 0
    for i in range(positions.size):
        gap = positions[i] - before
        before = positions[i]
        if gap >= GAP_ESCAPE:
            large[escaped] = gap
            escaped += 1
            gap = GAP_ESCAPE
        gaps[i] = gap
    return gaps, large[:escaped]


@_compiled
def put_by_narrow_gaps(out, gaps, large, low, high):
    """Writes values, given by their byte planes, at the places that `narrow_gaps` describes."""
    at, escaped = np.int64(0), 0
    for i in range(gaps.size):
        if gaps[i] == GAP_ESCAPE:
            at += large[escaped]
            escaped += 1
        else:
            at += gaps[i]
        out[at] = low[i] | np.uint16(high[i]) << 8


@_compiled
def rows_and_columns(positions, columns):
    """Row gaps, and columns as gaps within a row; the first of a row is absolute. int32 each."""
    rows, cols = np.empty(positions.size, np.int32), np.empty(positions.size, np.int32)
    row, column, start = np.int64(0), np.int64(0), np.int64(0)
    for i in range(positions.size):
        at = np.int64(positions[i])
        if at >= start + columns:
            step = (at - start) // columns
            rows[i] = step
            row += step
            start += step * columns
            cols[i] = at - start
        else:
            rows[i] = 0
            cols[i] = at - start - column
        column = at - start
    return rows, cols


@_compiled
def put_by_rows(out, columns, rows, cols, values):
    """Writes values at the places that `rows_and_columns` describes."""
    start, column = np.int64(0), np.int64(0)
    for i in range(rows.size):
        if rows[i] != 0:
            start += rows[i] * columns
            column = 0
        column += cols[i]
        out[start + column] = values[i]


@_compiled
def _ordered(bits):
    wide = np.int64(bits)
    return 0x7FFF - wide if wide >= 0x8000 else wide


@_compiled
def _unordered(value):
    return np.uint16(0x7FFF - value if value < 0 else value)


@_compiled
def fixed_width(old, new, positions):
    """Blocks of 256: a count, offsets of a byte, steps of 4 bits.

    A step in units of the last place of −7 … 7 is sent as step + 7; others as 15 and the new bits.

    Returns:
      counts uint8 [blocks], offsets uint8 [K'], codes uint8 [⌈K'/2⌉], raw uint16: the new bits of
      escaped elements and of raw blocks, in their order.
    """
    blocks = (old.size + BLOCK - 1) // BLOCK
    counts = np.zeros(blocks, np.uint8)
    offsets, codes = np.empty(positions.size, np.uint8), np.zeros(positions.size, np.uint8)
    raw = np.empty(positions.size + old.size // 2 + BLOCK, np.uint16)
    sent, raws, i = 0, 0, 0
    for block in range(blocks):
        start = block * BLOCK
        stop = min(start + BLOCK, old.size)
        first = i
        while i < positions.size and positions[i] < stop:
            i += 1
        if i - first >= RAW_FROM:
            counts[block] = RAW
            for at in range(start, stop):
                raw[raws] = new[at]
                raws += 1
            continue
        counts[block] = i - first
        for j in range(first, i):
            at = positions[j]
            offsets[sent] = at - start
            code = _ordered(new[at]) - _ordered(old[at]) + 7
            if code < 0 or code >= ESCAPE:
                code = ESCAPE
                raw[raws] = new[at]
                raws += 1
            codes[sent // 2] |= code << (4 * (sent & 1))
            sent += 1
    return counts, offsets[:sent], codes[: (sent + 1) // 2], raw[:raws]


@_compiled
def put_fixed_width(out, counts, offsets, codes, raw):
    """Rebuilds a tensor, which holds the old bits, from what `fixed_width` gives."""
    sent, raws = 0, 0
    for block in range(counts.size):
        start = block * BLOCK
        if counts[block] == RAW:
            for at in range(start, min(start + BLOCK, out.size)):
                out[at] = raw[raws]
                raws += 1
            continue
        for _ in range(counts[block]):
            at = start + offsets[sent]
            code = np.int64((codes[sent // 2] >> (4 * (sent & 1))) & 15)
            sent += 1
            if code == ESCAPE:
                out[at] = raw[raws]
                raws += 1
            else:
                out[at] = _unordered(_ordered(out[at]) + code - 7)
