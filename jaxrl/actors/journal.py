"""The journal of acknowledged rollouts: append-only segments that survive a kill at any byte.

    FOLDER/000000000000.journal, 000000000001.journal, …

A segment is a row of records:

    "JRL1", u32 size of the header, u64 size of the body (little-endian), CRC-32C of these 16 bytes,
    header (JSON), body, CRC-32C of header and body

A record counts when its checksums hold. The last one may be cut short by a crash: it was never
acknowledged, and is passed over. A new process begins a new segment and never writes into one
that it found.
"""

import errno
import json
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

_log = logging.getLogger(__name__)
_SUFFIX = ".journal"
_MAGIC = b"JRL1"
_HEAD = struct.Struct("<4sIQ")
_CRC = struct.Struct("<I")


class Record(NamedTuple):
    """One entry.

    Attributes:
      header: JSON values.
      body: bytes.
    """

    header: dict[str, Any]
    body: bytes


class JournalError(OSError):
    """A record could not be made durable; the journal is as it was before."""


class Journal:
    """An append-only log of records on this machine's disk; a context manager, thread-safe."""

    def __init__(self, folder: Path | str, *, segment_bytes: int = 64 << 20) -> None:
        """Opens a folder; `records` reads what is there.

        Args:
          folder: of one run; made where missing.
          segment_bytes: size from which a new segment is begun; whole segments are collected.

        Raises:
          ValueError: `segment_bytes` below 1.
        """
        if segment_bytes < 1:
            raise ValueError(f"segment_bytes must be ≥ 1, got {segment_bytes}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._segment_bytes = segment_bytes
        found = self._segments()
        self._next = found[-1] + 1 if found else 0
        self._current: int | None = None
        self._file: FileIO | None = None
        self._lock = threading.RLock()

    def _segments(self) -> list[int]:
        names = (path.name for path in self.folder.glob(f"*{_SUFFIX}"))
        return sorted(int(name.removesuffix(_SUFFIX)) for name in names)

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment:012d}{_SUFFIX}"

    def records(self) -> Iterator[Record]:
        """All good records, oldest first; what is damaged is logged and left out."""
        for segment in self._segments():
            yield from _read(self._path(segment))

    def append(self, header: Mapping[str, Any], body: bytes = b"", *, durable: bool = True) -> None:
        """Adds a record.

        Args:
          header: JSON values.
          body: bytes.
          durable: force it to disk before this returns; else the next durable one does, or
            `flush`.

        Raises:
          JournalError: the disk is full or failed; nothing was added.
        """
        text = json.dumps(dict(header)).encode()
        head = _HEAD.pack(_MAGIC, len(text), len(body))
        crc = google_crc32c.extend(google_crc32c.value(text), body)
        data = b"".join((head, _CRC.pack(google_crc32c.value(head)), text, body, _CRC.pack(crc)))
        with self._lock:
            try:
                self._write(data, durable=durable)
            except OSError as error:
                raise _explained(error, self.folder, len(data)) from error

    def _write(self, data: bytes, *, durable: bool) -> None:
        file = self._file or self._begin()
        start = file.tell()
        try:
            view = memoryview(data)
            while view:  # a raw file may take less than it was given
                view = view[file.write(view) :]
            full = file.tell() >= self._segment_bytes
            if durable or full:
                os.fsync(file.fileno())
        except OSError:
            # What is half there must not stand before the next record. Where even that fails,
            # the segment is given up: a reader passes its tail over.
            try:
                file.truncate(start)
                file.seek(start)
            except OSError:
                self._end()
            raise
        if full:
            self._end()

    def _begin(self) -> FileIO:
        path = self._path(self._next)
        # Unbuffered: after a failure no byte may wait in a buffer for the next write.
        self._file = FileIO(path, "xb")
        self._current, self._next = self._next, self._next + 1
        _sync_folder(self.folder)
        return self._file

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._current = None

    def flush(self) -> None:
        """Forces all records to disk.

        Raises:
          JournalError: the disk failed.
        """
        with self._lock:
            if self._file is None:
                return
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise _explained(error, self.folder, 0) from error

    def collect(self, needed: Callable[[Mapping[str, Any]], bool]) -> int:
        """Deletes the oldest segments up to the first that holds a needed record.

        Args:
          needed: whether the record of a header may have to be read again.

        Returns:
          How many segments were deleted.
        """
        with self._lock:
            deleted = 0
            for segment in self._segments():
                if segment == self._current:
                    break
                if any(needed(record.header) for record in _read(self._path(segment))):
                    break
                self._path(segment).unlink()
                deleted += 1
            return deleted

    def close(self) -> None:
        """Forces all to disk and closes the segment."""
        with self._lock:
            self.flush()
            self._end()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(path: Path) -> Iterator[Record]:
    """The good records of a segment."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    offset = 0
    while offset < len(data):
        start = offset
        try:
            record, offset = _record(data, offset)
        except _Torn as torn:
            _log.warning(
                "%s ends at byte %d of %d: %s; what follows was never acknowledged, or is damaged",
                path, start, len(data), torn,
            )  # fmt: skip
            return
        if record is None:
            _log.error("%s has a damaged record at byte %d; it is left out", path, start)
        else:
            yield record


class _Torn(Exception):
    """From here on nothing can be read."""


def _record(data: bytes, offset: int) -> tuple[Record | None, int]:
    """The record at an offset, None where only its own bytes are damaged, and where it ends."""
    body_at = offset + _HEAD.size + _CRC.size
    if body_at > len(data):
        raise _Torn("the head of a record is cut")
    head = data[offset : offset + _HEAD.size]
    magic, header_bytes, body_bytes = _HEAD.unpack(head)
    (head_crc,) = _CRC.unpack_from(data, offset + _HEAD.size)
    if magic != _MAGIC or google_crc32c.value(head) != head_crc:
        raise _Torn("the head of a record is damaged")
    end = body_at + header_bytes + body_bytes
    if end + _CRC.size > len(data):
        raise _Torn("a record is cut")
    text, body = data[body_at : body_at + header_bytes], data[body_at + header_bytes : end]
    (crc,) = _CRC.unpack_from(data, end)
    if google_crc32c.extend(google_crc32c.value(text), body) != crc:
        return None, end + _CRC.size
    return Record(json.loads(text), body), end + _CRC.size


def _explained(error: OSError, folder: Path, size: int) -> JournalError:
    remedy = "look at the disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free some space"
    return JournalError(
        error.errno,
        f"acknowledged rollouts must be durable: the journal {folder} could not write a record of "
        f"{size} bytes ({error.strerror or error}); nothing is lost, {remedy}",
    )


def _sync_folder(folder: Path) -> None:
    """Forces a new file's name to disk, where the system lets folders be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
