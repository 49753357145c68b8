"""Coding tiles from the records of their changed elements, without the dense arrays."""

import numpy as np

from kernels.sparse_delta import codec, loops
from kernels.sparse_delta.elements import ElementFormat


def tables_of_records(
    fmt: ElementFormat,
    thresholds: np.ndarray,
    members: np.ndarray,
    classes: np.ndarray,
    codes: np.ndarray,
) -> codec.Tables:
    """The coder's tables for given classes; `codec.make_tables` also chooses the classes.

    Args:
      fmt: of the elements.
      thresholds: 7 exponents of 0 … 255, non-decreasing.
      members: int64[8], elements of each class, changed or not.
      classes: u8[n], class of each changed element.
      codes: u32[n], of each change.
    """
    if not len(codes):
        return codec.make_tables(fmt, [], (1, 1))
    half = (codes >> 1).astype(np.int64)
    # The number of bits of half | 4, which is below 2^32 and so exact as a float.
    extra = np.frexp((half | 4).astype(np.float64))[1].astype(np.int64) - 3
    symbols = 2 * (4 * extra + (half >> extra)) + (codes & 1)
    counts = np.zeros((codec.CLASSES, 256), np.int64)
    np.add.at(counts, (classes, symbols), 1)
    return codec.tables_of_counts(fmt, thresholds.astype(np.uint8), members, counts)


def encode_records(
    records: np.ndarray, totals: np.ndarray, size: int, fmt: ElementFormat, tables: codec.Tables
) -> codec.CodedTiles | None:
    """Codes one tile as `codec.encode_box` would.

    Args:
      records: u32[4, n], n ≥ 1: position, class, rank within the class and code, by position.
      totals: int64[8], elements of each class in the tile.
      size: elements of the tile.
      fmt: of the elements.
      tables: for the same classes.

    Returns:
      The one tile, or None where the dense tile is smallest, for which this has no bits.
    """
    n = records.shape[1]
    mode, bits, end = loops.choose_fixed(records, n, size, fmt.width_bits)
    out = np.empty(end + loops.SLACK, np.uint8)
    after = -1
    if tables.arrays[0].size:
        scratch = np.empty((2, n), np.uint32), np.empty(end + loops.SLACK, np.uint8)
        after = loops.write_entropy(
            records, n, fmt.width_bits, tables.arrays, *scratch, out, 0, end
        )
    if after > 0:
        mode = codec.Mode.ENTROPY
    elif mode == codec.Mode.DENSE:
        return None
    else:
        after = loops.write_fixed(mode, bits, records, n, size, out, 0)
    return codec.CodedTiles(
        np.asarray([mode], np.uint8),
        np.asarray([n], np.uint32),
        np.asarray([after], np.uint32),
        out[:after],
        np.zeros(1, np.int64),
    )
