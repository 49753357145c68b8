"""Where the time of a run goes: named spans, a timeline and a JAX trace."""

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.harness.files import write_atomically

_MAX_EVENTS = 200_000  # about 20 MB of timeline; viewers do not take more


class Timeline:
    """Adds up the wall time of named spans; when asked to, keeps each of them.

    Work that JAX runs asynchronously belongs to the span that waits for it.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.totals_s: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self._keep = keep
        self._events: list[dict[str, Any]] = []
        self._origin = time.perf_counter()

    @contextmanager
    def span(self, name: str, **details: Any) -> Iterator[None]:
        """Times the block under it; `details` stand in the timeline."""
        began = time.perf_counter()
        try:
            with _annotation(name) if self._keep else _nothing():
                yield
        finally:
            took = time.perf_counter() - began
            self.totals_s[name] += took
            self.counts[name] += 1
            if self._keep and len(self._events) < _MAX_EVENTS:
                self._events.append(self._event(name, began, took, details))

    def _event(self, name: str, began: float, took: float, details: Any) -> dict[str, Any]:
        """A complete event of the Chrome trace format; times in microseconds."""
        return {
            "name": name,
            "ph": "X",
            "ts": round((began - self._origin) * 1e6, 1),
            "dur": round(took * 1e6, 1),
            "pid": os.getpid(),
            "tid": threading.get_native_id(),
            "args": details,
        }

    def write(self, path: Path) -> None:
        """Writes the kept spans; open the file in Perfetto or chrome://tracing."""
        record = {"traceEvents": self._events, "displayTimeUnit": "ms"}
        write_atomically(path, json.dumps(record))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _annotation(name: str) -> Any:
    import jax

    return jax.profiler.TraceAnnotation(name)


class StepProfiler:
    """A JAX trace of a few steps after warm-up: of a whole run it would fill the disk."""

    def __init__(self, folder: Path, *, enabled: bool, skip: int = 3, steps: int = 5) -> None:
        self._folder, self._enabled = folder, enabled
        self._skip, self._steps = skip, steps
        self._seen = 0
        self._running = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wraps one step; the first `skip` are left out, the next `steps` traced."""
        if self._enabled and self._seen == self._skip:
            self._start()
        try:
            yield
        finally:
            self._seen += 1
            if self._running and self._seen >= self._skip + self._steps:
                self.stop()

    def _start(self) -> None:
        import jax

        jax.profiler.start_trace(str(self._folder))
        self._running = True

    def stop(self) -> None:
        """Writes the trace; the second call does nothing."""
        if self._running:
            import jax

            self._running = False
            jax.profiler.stop_trace()
