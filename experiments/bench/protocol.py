"""How the benchmark talks to its workers: JSON, one object a line, over stdin and stdout.

A worker answers `{"op": "logits", "tokens": [[…]]}` and `{"op": "step"}` until it is told
`{"op": "close"}` or its input ends. The standard library alone: peers import this.
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

STARTED = time.perf_counter()


class Channel:
    """The worker's end. Whatever else prints goes to stderr, which is the parent's log."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def send(self, **message: Any) -> None:
        """Writes one message."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def receive(self) -> dict[str, Any]:
        """Waits for the parent's next message; the end of the input is a "close".

        The parent holds the timeouts: it ends a worker that no longer answers.
        """
        line = sys.stdin.readline()
        return json.loads(line) if line else {"op": "close"}

    def ready(self, **versions: str) -> None:
        """Says that imports and construction are over."""
        self.send(ready=True, startup_s=time.perf_counter() - STARTED, versions=versions)

    def close(self) -> None:
        """Says goodbye with the process's peak memory."""
        self.send(closed=True, peak_bytes=peak_bytes())


def cpu_s() -> float:
    """CPU time of this process so far, all threads, user and system, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Stopwatch:
    """Wall and CPU time of a step and of its named parts."""

    def __init__(self) -> None:
        self._start, self._cpu = time.perf_counter(), cpu_s()
        self.parts: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str, *, minus: str | None = None) -> Iterator[None]:
        """Adds the time of a block to the part `name`; the block must wait for its results.

        `minus` names a part that happens inside the block and is not to be counted twice.
        """
        start, inner = time.perf_counter(), self.parts.get(minus or "", 0.0)
        yield
        inner = self.parts.get(minus or "", 0.0) - inner
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start - inner

    def result(self, **more: float) -> dict[str, float]:
        """Everything measured, in seconds; what no part claims is the update's."""
        total = time.perf_counter() - self._start
        parts = {f"{name}_s": seconds for name, seconds in self.parts.items()}
        parts.setdefault("update_s", total - sum(self.parts.values()))
        return {"step_s": total, "cpu_s": cpu_s() - self._cpu} | parts | more


class Compilations:
    """Counts XLA compilations in this process, those found in the persistent cache included."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        import jax.monitoring

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == self.EVENT


def serve(channel: Channel, **operations: Callable[..., dict[str, Any]]) -> None:
    """Answers the parent until it says "close"; an operation gets the rest of its message."""
    while (operation := (message := channel.receive()).pop("op")) != "close":
        channel.send(**operations[operation](**message))
    channel.close()


def counting(compilations: Compilations, step: Callable[[], dict[str, float]]) -> Any:
    """`step` that also says how many programs were compiled meanwhile."""

    def counted() -> dict[str, float]:
        before = compilations.count
        return step() | {"compilations": compilations.count - before}

    return counted
