"""How many processors this process can use: what there are, what others use, what it gets of them.

Wall-clock times of a part say as much of the other processes of the machine as of the part;
processor seconds do not. So parts are measured in processor seconds, and the machine by what is
left of it.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_IDLE = (3, 4)  # columns of /proc/stat after the name: idle and waiting for disks
_GUEST = 8  # and what follows: counted in user time already


def machine_cores() -> int:
    """Processors that this process may use."""
    return len(_allowed())


def _allowed() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


@dataclass
class Load:
    """Of the processors that this process may use, over a stretch of time.

    Attributes:
      wall_s: length of the stretch.
      own_s: processor seconds of this process.
      others_s: processor seconds of all other processes; 0 where the system does not tell.
    """

    wall_s: float = 0.0
    own_s: float = 0.0
    others_s: float = 0.0

    @property
    def own(self) -> float:
        """Processors that this process used."""
        return self.own_s / self.wall_s if self.wall_s else 0.0

    @property
    def others(self) -> float:
        """Processors that others used."""
        return self.others_s / self.wall_s if self.wall_s else 0.0

    @property
    def left(self) -> float:
        """Processors that others left; never less than this process used."""
        return max(machine_cores() - self.others, self.own)


@contextmanager
def measured() -> Iterator[Load]:
    """Measures what happens within; the load is complete at the end."""
    load = Load()
    wall, own, busy = time.perf_counter(), time.process_time(), _busy_s()
    yield load
    load.wall_s = time.perf_counter() - wall
    load.own_s = time.process_time() - own
    if busy is not None and (now := _busy_s()) is not None:
        load.others_s = max(now - busy - load.own_s, 0.0)


def _busy_s() -> float | None:
    """Processor seconds that all processes have used so far; None where the system hides it."""
    if not _STAT.exists():
        return None
    return busy_s(_STAT.read_text(encoding="ascii"), _allowed())


def busy_s(stat: str, cores: frozenset[int]) -> float:
    """Busy seconds of some cores from the text of /proc/stat (proc(5))."""
    total = 0
    for line in stat.splitlines():
        name, *columns = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
            ticks = [int(column) for column in columns[:_GUEST]]
            total += sum(ticks) - sum(ticks[column] for column in _IDLE)
    return total / os.sysconf("SC_CLK_TCK")
