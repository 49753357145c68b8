"""One process per run folder."""

import errno
import os
import socket
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: a process id decides instead
    fcntl = None


class FolderBusy(ValueError):
    """Another process is writing to the folder."""


class FolderLock:
    """Held by a process for as long as it writes to a folder.

    The operating system drops the lock when its process dies, so a killed run leaves nothing
    that a person would have to remove; the file only tells who holds it.
    """

    def __init__(self, folder: Path, *, timeout_s: float = 0.0) -> None:
        """Takes the lock.

        Args:
          folder: an existing folder.
          timeout_s: how long to wait for another process to end.

        Raises:
          FolderBusy: another process still holds it after `timeout_s`.
        """
        self.path = folder / ".lock"
        deadline = time.monotonic() + timeout_s
        while True:
            self._file: Any = self.path.open("a+", encoding="utf-8")
            if self._try():
                break
            owner = self._owner()
            self._file.close()
            if time.monotonic() >= deadline:
                raise FolderBusy(
                    f"{folder} is in use by {owner}; wait for it, stop it, or choose another --out"
                )
            time.sleep(0.1)
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"{os.getpid()} {socket.gethostname()}\n")
        self._file.flush()

    def _try(self) -> bool:
        if fcntl is None:
            pid = self._owner_pid()
            return pid is None or pid == os.getpid() or not _alive(pid)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                return True
            raise
        return True

    def _words(self) -> list[str]:
        self._file.seek(0)
        return self._file.read().split()

    def _owner_pid(self) -> int | None:
        words = self._words()
        return int(words[0]) if words and words[0].isdigit() else None

    def _owner(self) -> str:
        words = self._words()
        return f"process {words[0]} on {words[1]}" if len(words) > 1 else "another process"

    def release(self) -> None:
        """Gives the folder free; the second call does nothing."""
        if not self._file.closed:
            self._file.seek(0)
            self._file.truncate()
            self._file.close()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True
