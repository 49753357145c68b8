"""Metrics of a run: JSON lines, TensorBoard events and, if asked for, Weights & Biases."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.harness.files import plain, read_json_lines, write_json_lines


class Metrics:
    """Appends rows of metrics; after a crash, takes back what is later than the checkpoint.

    One row belongs to a stage ("sft", "repo", ...) and a step. A stage may log a step once.
    """

    def __init__(self, folder: Path, *, wandb: Any = None) -> None:
        """Opens the files in `folder`.

        Args:
          folder: the run's folder.
          wandb: a started Weights & Biases run, or None.
        """
        self.path = folder / "metrics.jsonl"
        self._events = folder / "tensorboard"
        self._wandb = wandb
        self._file: Any = None
        self._writers: dict[str, Any] = {}
        self._purge: dict[str, int] = {}
        self._started = time.monotonic()
        self._mend()

    def _mend(self) -> None:
        """Drops a half-written last line, so that the next one does not join it."""
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            write_json_lines(self.path, read_json_lines(self.path))

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row.

        Args:
          stage: part of the run, also the TensorBoard run's name.
          step: updates made so far in this stage.
          values: numbers and 0-d arrays by name. NaN and infinities are stored as null and
            their names listed under "nonfinite".
        """
        scalars = {name: _scalar(value) for name, value in values.items()}
        bad = [n for n, v in scalars.items() if isinstance(v, float) and not math.isfinite(v)]
        row = {"stage": stage, "step": int(step), "time_s": round(self.elapsed_s, 3)} | scalars
        if bad:
            row["nonfinite"] = bad
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(plain(row)) + "\n")
        self._file.flush()
        self._log_events(stage, int(step), scalars)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def _log_events(self, stage: str, step: int, scalars: Mapping[str, Any]) -> None:
        numbers = {n: v for n, v in scalars.items() if isinstance(v, int | float)}
        writer = self._writer(stage)
        for name, value in numbers.items():
            if math.isfinite(value):
                writer.add_scalar(name, value, step)
        if self._wandb is not None:
            named = {f"{stage}/{name}": value for name, value in numbers.items()}
            self._wandb.log(named | {f"{stage}/step": step})

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            from tensorboardX import SummaryWriter  # imports protobuf: not for every `--help`

            self._writers[stage] = SummaryWriter(
                str(self._events / stage),
                purge_step=self._purge.get(stage),
                # Files are named by the second: a quick resume would overwrite the one before.
                filename_suffix=f".{time.time_ns()}",
            )
        return self._writers[stage]

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """All rows so far, or those of one stage, in the order they were logged."""
        rows = read_json_lines(self.path)
        return [row for row in rows if stage is None or row["stage"] == stage]

    def rewind(self, stage: str, step: int) -> None:
        """Forgets the rows of a stage that are later than `step`, in one atomic write.

        Call it with the step of the checkpoint from which a stage continues (0 for none), so
        that a resumed run has each step once. TensorBoard is told to forget them too.
        """
        self._close_file()
        rows = read_json_lines(self.path)
        kept = [row for row in rows if row["stage"] != stage or row["step"] <= step]
        if len(kept) < len(rows):
            write_json_lines(self.path, kept)
        if stage in self._writers:
            self._writers.pop(stage).close()
        if (self._events / stage).exists():
            self._purge[stage] = step + 1

    def flush(self) -> None:
        """Hands everything to the operating system."""
        for writer in self._writers.values():
            writer.flush()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self._close_file()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        if self._wandb is not None:
            self._wandb.finish()


def _scalar(value: Any) -> Any:
    """Python's own number of a 0-d array; a metric of more than one number is a mistake."""
    if getattr(value, "size", 1) != 1:
        raise ValueError(f"a metric is one number: received shape {value.shape}; take its mean")
    return value.item() if hasattr(value, "item") else value


def start_wandb(project: str, folder: Path, run_id: str, config: Mapping[str, Any]) -> Any:
    """Starts, or resumes under the same id, a Weights & Biases run.

    Raises:
      ValueError: the package is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]  # an optional extra
    except ImportError as error:
        raise ValueError(
            "--wandb needs the package wandb, which is not installed: "
            'pip install "jaxrl-safe[wandb]", or leave --wandb out'
        ) from error
    return wandb.init(
        project=project, dir=str(folder), id=run_id, resume="allow", config=dict(config)
    )
