"""A discrete-event engine: processes that wait for time, for each other and for shared resources.

A process is a generator that yields commands: `Clock.sleep`, `Level.reach`, `Shared.use`. The
engine runs it until it yields, and again when the command is done.

>>> clock, log = Clock(), []
>>> cpu = Shared(clock, capacity=1.0)
>>> def job(name, seconds):
...     yield cpu.use(seconds)
...     log.append((name, clock.now))
>>> clock.spawn(job("short", 1.0)), clock.spawn(job("long", 2.0))
(None, None)
>>> clock.run()
>>> log
[('short', 2.0), ('long', 3.0)]
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator

Resume = Callable[[], None]
Command = Callable[[Resume], None]
"""Begins what a process waits for, and calls the function it is given when that is over."""
Process = Iterator[Command]


class Clock:
    """Simulated time, in seconds, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Resume]] = []
        self._order = itertools.count()  # of events at one time: first planned, first done

    def at(self, time: float, do: Resume) -> None:
        """Plans a call."""
        heapq.heappush(self._events, (time, next(self._order), do))

    def sleep(self, seconds: float) -> Command:
        """Waits."""
        return lambda resume: self.at(self.now + seconds, resume)

    def spawn(self, process: Process) -> None:
        """Starts a process, now."""

        def proceed() -> None:
            command = next(process, None)
            if command is not None:
                command(proceed)

        self.at(self.now, proceed)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Runs until the condition holds, or nothing is left to happen."""
        while self._events and not until():
            self.now, _, do = heapq.heappop(self._events)
            do()


class Level:
    """A number that only rises, and processes that wait for it to reach theirs."""

    def __init__(self, clock: Clock) -> None:
        self.value = 0
        self._clock = clock
        self._waiting: list[tuple[int, int, Resume]] = []
        self._order = itertools.count()

    def reach(self, value: int) -> Command:
        """Waits until the level is `value` or more; not at all where it is."""

        def begin(resume: Resume) -> None:
            if self.value >= value:
                resume()
            else:
                heapq.heappush(self._waiting, (value, next(self._order), resume))

        return begin

    def rise(self, value: int) -> None:
        """Lifts the level and wakes those who waited for it, who asked for the least first."""
        self.value = max(self.value, value)
        while self._waiting and self._waiting[0][0] <= self.value:
            self._clock.at(self._clock.now, heapq.heappop(self._waiting)[2])


class Shared:
    """A capacity that all jobs on it share: the cores of a machine, the bandwidth of a link.

    A job has a demand: what it uses when it is alone. While the demands of all jobs exceed the
    capacity, everyone is slowed by the same factor, capacity / Σ demands (egalitarian processor
    sharing; Kleinrock, Queueing Systems II, 1976, section 4.4).
    """

    def __init__(self, clock: Clock, capacity: float = math.inf) -> None:
        if not capacity > 0:
            raise ValueError(f"a capacity must be above 0: {capacity=}")
        self._clock, self._capacity = clock, capacity
        # All jobs progress alike, so one number tells how far each is: the seconds that a job
        # would have done by now if it had been here from the start.
        self._progress, self._at, self._demand = 0.0, 0.0, 0.0
        self._jobs: list[tuple[float, int, float, Resume]] = []
        self._order = itertools.count()
        self._plan = 0  # number of the latest planned completion; earlier ones are void

    def use(self, seconds: float, demand: float = 1.0) -> Command:
        """Does a job that takes `seconds` when it is alone.

        Args:
          seconds: alone, at its own demand.
          demand: in units of the capacity; more than all of it takes longer even alone.
        """

        def begin(resume: Resume) -> None:
            self._advance()
            end = self._progress + seconds
            heapq.heappush(self._jobs, (end, next(self._order), demand, resume))
            self._demand += demand
            self._plan_next()

        return begin

    @property
    def _rate(self) -> float:
        return min(1.0, self._capacity / self._demand) if self._demand > 0 else 1.0

    def _advance(self) -> None:
        self._progress += (self._clock.now - self._at) * self._rate
        self._at = self._clock.now

    def _plan_next(self) -> None:
        self._plan += 1
        if self._jobs:
            left = max(0.0, self._jobs[0][0] - self._progress)
            plan = self._plan
            self._clock.at(self._clock.now + left / self._rate, lambda: self._complete(plan))

    def _complete(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._advance()
        end, _, demand, resume = heapq.heappop(self._jobs)
        self._progress = end  # not a rounding error less, or the next job would see time go back
        # An idle resource has no demand at all, whatever rounding left.
        self._demand = self._demand - demand if self._jobs else 0.0
        self._plan_next()
        resume()
