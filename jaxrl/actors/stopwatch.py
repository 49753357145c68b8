"""Where an actor's time goes, when it does two things at once."""

import contextlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Literal

from jaxrl.actors.work import Timings

Activity = Literal["generate_s", "score_s", "paused_s"]


class Stopwatch:
    """Adds up `Timings`, from any number of threads.

    >>> clock = iter([0.0, 1.0, 3.0, 4.0, 6.0, 6.5])
    >>> watch = Stopwatch(clock=lambda: next(clock))
    >>> with watch.during("score_s"):  # from 1 to 6
    ...     with watch.during("generate_s"):  # from 3 to 4
    ...         pass
    >>> found = watch.read()
    >>> found.score_s, found.generate_s, found.overlap_s, found.idle_s, found.total_s
    (5.0, 1.0, 1.0, 1.5, 6.5)
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts, idle.

        Args:
          clock: seconds that never go back.
        """
        self._clock, self._since = clock, clock()
        self._active: Counter[str] = Counter()
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Counts what passes meanwhile as this activity."""
        with self._lock:
            self._pass()
            self._active[activity] += 1
        try:
            yield
        finally:
            with self._lock:
                self._pass()
                self._active[activity] -= 1

    def read(self) -> Timings:
        """What passed since the last call."""
        with self._lock:
            self._pass()
            spent, self._spent = self._spent, defaultdict(float)
        return Timings(**spent)

    def _pass(self) -> None:
        """Books the time since the last call on what went on in it."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        for activity, count in self._active.items():
            self._spent[activity] += count * seconds
        at_once = self._active.total()
        self._spent["overlap_s"] += max(at_once - 1, 0) * seconds
        self._spent["idle_s"] += seconds * (not at_once)
