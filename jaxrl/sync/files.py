"""A store in any place that fsspec reaches: a folder, memory, an object store."""

import contextlib
import errno
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.local

from jaxrl.sync.errors import NotInStore, StoreError, StoreFull
from jaxrl.sync.stores import checked_key, checked_prefix

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}")
_ABANDONED_S = 3600.0
"""Age without a change from which an unfinished file is a dead writer's."""


class FsspecStore:
    """Blobs as files below a URL: "/mnt/shared/sync", "memory://sync", "gs://bucket/sync".

    In a folder of this machine a blob is written beside its place, forced to disk and renamed, so
    that a crash leaves the old one or the new one. Object stores do the same by themselves: an
    object appears when its upload is complete.
    """

    def __init__(self, url: str | os.PathLike[str], **options: Any) -> None:
        """Opens a place; a folder is made where missing.

        Args:
          url: a path, or a URL of a filesystem that fsspec knows.
          **options: for the filesystem, such as credentials; see `fsspec.url_to_fs`.

        Raises:
          ValueError: fsspec knows no such protocol.
          ImportError: the protocol needs a package that is not installed; names it.
        """
        self.url = os.fspath(url)
        # Listings are asked for anew each time: others write here too.
        self._fs, root = fsspec.url_to_fs(self.url, use_listings_cache=False, **options)
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, fsspec.implementations.local.LocalFileSystem)

    def _path(self, key: str) -> str:
        return f"{self._root}/{checked_key(key)}"

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            if self._local:
                _write_whole(Path(path), data)
            else:
                self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                self._fs.pipe_file(path, data)
        except Exception as error:  # of fsspec's many filesystems each raises what it likes
            if isinstance(error, OSError) and error.errno in _FULL:
                raise StoreFull(
                    f"no room in {self.url} for the {len(data)} bytes of {key!r} ({error}); what "
                    "was there is as it was: free some space, and publish again"
                ) from error
            raise self._failure("write", key, error) from error

    def get(self, key: str) -> bytes:
        return self._read(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        return self._read(key, start=start, end=stop)

    def _read(self, key: str, **edges: int) -> bytes:
        path = self._path(key)
        try:
            return self._fs.cat_file(path, **edges)
        except FileNotFoundError:
            raise NotInStore(f"no blob {key!r} in {self.url}") from None
        except Exception as error:  # see `put`
            raise self._failure("read", key, error) from error

    def keys(self, prefix: str) -> list[str]:
        folder = f"{self._root}/{checked_prefix(prefix)}".rstrip("/")
        try:
            self._fs.invalidate_cache()
            found = self._fs.find(folder)
        except FileNotFoundError:
            return []
        except Exception as error:  # see `put`
            raise self._failure("list", prefix, error) from error
        start = len(self._root) + 1
        # Object stores list by the beginning of a key, which may be within a part of it.
        names = (path[start:] for path in found if path.startswith(f"{folder}/"))
        return sorted(name for name in names if not name.rsplit("/", 1)[-1].startswith("."))

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)
        except Exception as error:  # see `put`
            raise self._failure("delete", key, error) from error

    def _failure(self, what: str, key: str, error: Exception) -> StoreError:
        return StoreError(f"cannot {what} {key!r} in {self.url}: {error}; check path and rights")


def _write_whole(path: Path, data: bytes) -> None:
    """Replaces a file in one step; a crash or a full disk leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    # Not by `tempfile`, whose files only their owner may read: actors may be other users.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _sweep(folder: Path) -> None:
    """Removes what writers that were killed have left; who still writes changes its file."""
    # A folder that may be written need not be one that may be listed.
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not _UNFINISHED.fullmatch(entry.name):
                continue
            # Another writer may finish or remove it meanwhile, or it may not be ours to remove.
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _ABANDONED_S:
                    os.unlink(entry.path)


def _sync_folder(folder: Path) -> None:
    """Forces a rename to disk, where the system lets folders be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
