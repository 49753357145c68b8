"""How far a run is: a bar in a terminal, a line every few seconds elsewhere."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Self, TextIO

# What a person watches, in this order: metric, label, format.
WATCHED = (
    ("loss", "loss", "{:.3f}"),
    ("reward", "reward", "{:+.2f}"),
    ("cost", "cost", "{:+.2f}"),
    ("safety", "safe", "{:.1%}"),
    ("multiplier", "λ", "{:.2f}"),
    ("kl", "KL", "{:.3f}"),
)


def summary_line(values: Mapping[str, Any]) -> str:
    """The watched metrics that are present: "reward +0.50  safe 97.0%  λ 1.20".

    >>> summary_line({"reward": 0.5, "kl": float("nan"), "other": 1})
    'reward +0.50  KL NaN!'
    """
    parts = []
    for name, label, form in WATCHED:
        if name in values:
            number = float(values[name])
            parts.append(f"{label} {form.format(number) if math.isfinite(number) else 'NaN!'}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> clock(75), clock(3675), clock(float("nan"))
    ('1:15', '1:01:15', '–')
    """
    if not math.isfinite(seconds):
        return "–"
    minutes, secs = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """Shows one stage of a run; a context manager.

    Numbers that are not finite are shown as "NaN!" and reported once in a line of their own.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        interval_s: float = 5.0,
    ) -> None:
        """Begins to show.

        Args:
          stage: what is running.
          total: steps of this stage.
          start: steps done before, by an earlier process.
          stream: where to write; standard error by default.
          interval_s: seconds between lines where there is no terminal.
        """
        self.stage, self.total, self.start, self.step = stage, total, start, start
        self._stream = stream or sys.stderr
        self._interval_s = interval_s
        # Where the pace is measured from: the first step compiles and says nothing of the rest.
        self._first: tuple[int, float] | None = None
        self._last_line = -math.inf
        self._values: dict[str, Any] = {}
        self._warned: set[str] = set()
        self._bar: Any = None
        self._task: Any = None
        self._live: Any = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._open_bar()
        return self

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("left {task.fields[left]}"),
        )
        self._task = self._bar.add_task(
            self.stage, total=self.total, completed=self.start, left="–"
        )
        console = Console(file=self._stream)
        self._live = Live(self._bar, console=console, refresh_per_second=4)
        self._live.start()

    def _show_bar(self, line: str) -> None:
        from rich.console import Group
        from rich.text import Text

        self._bar.update(self._task, completed=self.step, left=clock(self.left_s))
        # Two lines: on one, 80 columns have no room for the metrics.
        self._live.update(Group(self._bar, Text(f"  {line}")))

    @property
    def left_s(self) -> float:
        """Seconds left at the pace so far; NaN while there is none to go by."""
        if self._first is None or self.step >= self.total:
            return 0.0 if self.step >= self.total else math.nan
        step, at = self._first
        if self.step == step:
            return math.nan
        return (time.monotonic() - at) / (self.step - step) * (self.total - self.step)

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """Shows that `step` steps are done, and the metrics of the last of them."""
        self.step = step
        if self._first is None:
            self._first = step, time.monotonic()
        # An evaluation comes more rarely than a step: what it measured stays on show.
        self._values.update({n: float(v) for n, v in (values or {}).items() if _is_number(v)})
        self._warn()
        line = summary_line(self._values)
        if self._bar is not None:
            self._show_bar(line)
            return
        now = time.monotonic()
        if now - self._last_line >= self._interval_s or step >= self.total:
            self._last_line = now
            share = step / max(1, self.total)
            left = clock(self.left_s)
            self._write(f"{self.stage}  {step}/{self.total} ({share:.0%})  {line}  left {left}")

    def _warn(self) -> None:
        for name, value in self._values.items():
            if not math.isfinite(value) and name not in self._warned:
                self._warned.add(name)
                self.note(f"warning: {self.stage}, step {self.step}: {name} is {value}")

    def note(self, text: str) -> None:
        """Writes a line above the bar."""
        if self._bar is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            self._write(text)

    def _write(self, text: str) -> None:
        self._stream.write(text.rstrip() + "\n")
        self._stream.flush()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._live.stop()
            self._bar = None


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and getattr(value, "size", 1) == 1
