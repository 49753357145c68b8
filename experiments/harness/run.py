"""A run and its folder: what it was, how it went, what came out."""

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar, cast

from experiments.harness.config import config_hash, differences, to_json
from experiments.harness.distributed import ProcessOptions, join
from experiments.harness.environment import describe
from experiments.harness.files import write_atomically, write_json, write_json_lines
from experiments.harness.lock import FolderLock
from experiments.harness.metrics import Metrics, start_wandb
from experiments.harness.progress import Progress
from experiments.harness.trace import StepProfiler, Timeline
from jaxrl import processes
from jaxrl.processes import Preempted, Preemption

Item = TypeVar("Item")

FORMAT = 1  # of config.json; raised when an older folder can no longer be resumed


class RunFolderError(ValueError):
    """The output folder cannot be used for this run; the message says what to do."""


class Run:
    """One run and its folder, which holds:

        config.json      config, seed, commit, versions, devices
        metrics.jsonl    one row per step       tensorboard/   the same as events
        samples/         what each policy wrote
        checkpoints/     what a resumed run needs
        report.html      plots and tables       table.txt      the final table
        summary.json     results; written last, so its presence means that the run is finished

    Use it as a context manager: on the way out it closes its files and frees the folder.

    Of several processes (`jax.distributed`) each has a run of the same folder; the first writes and
    speaks, and the others do neither.
    """

    def __init__(self, name: str, config: Any, folder: Path, *, stream: TextIO | None = None):
        """Prefer `Run.open`, which chooses and checks the folder."""
        self.name, self.config, self.folder = name, config, folder
        self.hash = config_hash(name, config)
        self._exit = ExitStack()
        self.leads = processes.leads()
        self.stream = (stream or sys.stderr) if self.leads else io.StringIO()
        self.resumed = self.finished = False
        self.preemption: Preemption | None = None

    @classmethod
    def open(
        cls,
        name: str,
        config: Any,
        out: Path | str | None = None,
        *,
        stream: TextIO | None = None,
        lock_timeout_s: float = 0.0,
    ) -> "Run":
        """Starts a run in its folder, or continues the one that the folder holds.

        Args:
          name: of the experiment.
          config: its frozen dataclass; `out`, `wandb` and `profile` are read where present.
          out: the folder; by default `config.out`, else runs/NAME-<hash of the config>.
          stream: for progress and notes; standard error by default.
          lock_timeout_s: how long to wait for another process in the same folder.

        Raises:
          RunFolderError: the folder holds another run, or files that are no run.
          FolderBusy: another process is writing to the folder.
        """
        chosen = out or getattr(config, "out", None)
        folder = Path(chosen) if chosen else Path("runs") / f"{name}-{config_hash(name, config)}"
        run = cls(name, config, folder, stream=stream)
        try:
            run._start(lock_timeout_s)
        except BaseException:
            run.close()
            raise
        return run

    def _start(self, lock_timeout_s: float) -> None:
        self.resumed, self.finished = processes.from_leader(lambda: self._take(lock_timeout_s))
        profile = bool(getattr(self.config, "profile", False))
        self.timeline = Timeline(keep=profile)
        self.profiler = StepProfiler(self.folder / "profile", enabled=profile and self.leads)
        if not self.leads:
            return
        if profile:
            self._exit.callback(self._write_timeline)
            self._exit.callback(self.profiler.stop)
        self.metrics = Metrics(self.folder, wandb=self._wandb())
        self._exit.callback(self.metrics.close)

    def _take(self, lock_timeout_s: float) -> tuple[bool, bool]:
        """Takes the folder; whether it holds this run already, and whether its results."""
        _make_folder(self.folder)
        lock = FolderLock(self.folder, timeout_s=lock_timeout_s)
        self._exit.callback(lock.release)
        return self._check_or_write_config(), (self.folder / "summary.json").exists()

    def _wandb(self) -> Any:
        if not getattr(self.config, "wandb", False) or self.finished:
            return None
        run_id = f"{self.name}-{self.hash}"
        return start_wandb(f"jaxrl-{self.name}", self.folder, run_id, to_json(self.config))

    def _write_timeline(self) -> None:
        self.timeline.write(self.folder / "profile" / f"timeline-{os.getpid()}.json")

    def _check_or_write_config(self) -> bool:
        """Whether the folder holds this very run; writes its config into a new folder."""
        path = self.folder / "config.json"
        if path.exists():
            self._refuse_other_run(_read_config(path))
            return True
        visible = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
        if visible:
            raise RunFolderError(
                f"{self.folder} holds files that are no run ({', '.join(visible[:5])}) and "
                "would be mixed with it; choose an empty or new folder for --out"
            )
        record = {"format": FORMAT, "name": self.name, "hash": self.hash}
        record |= {"seed": getattr(self.config, "seed", None), "config": to_json(self.config)}
        write_json(path, record | describe() | {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        return False

    def _refuse_other_run(self, found: Mapping[str, Any]) -> None:
        if found.get("name") != self.name:
            raise RunFolderError(
                f"{self.folder} holds a run of {found.get('name')!r}, not of {self.name!r}; "
                "choose another --out"
            )
        relevant = to_json(self.config, cosmetics=False)
        old = {key: value for key, value in found["config"].items() if key in relevant}
        # Through text, as the file went: a float32 default and its decimal are then the same.
        changed = differences(old, json.loads(json.dumps(relevant)))
        if changed or found.get("format") != FORMAT:
            listing = "; ".join(changed[:8]) or f"format {found.get('format')}, now {FORMAT}"
            raise RunFolderError(
                f"{self.folder} holds a run with another config ({listing}); give the same "
                "values to resume it, or choose another --out"
            )

    @property
    def checkpoints(self) -> Path:
        """The folder for `jaxrl.checkpoint.Checkpointer`, one below it per stage."""
        return self.folder / "checkpoints"

    def summary(self) -> dict[str, Any]:
        """Results of a finished run."""
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))

    def table(self) -> str:
        """The final table of a finished run, as text."""
        path = self.folder / "table.txt"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def progress(
        self, stage: str, total: int, *, start: int = 0, interval_s: float = 5.0
    ) -> Progress:
        """A progress bar for one stage; see `progress.Progress`."""
        return Progress(stage, total, start=start, stream=self.stream, interval_s=interval_s)

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row of metrics; see `metrics.Metrics.log`."""
        if self.leads:
            self.metrics.log(stage, step, values)

    def rewind(self, stage: str, step: int) -> None:
        """Forgets the metrics of a stage after `step`; see `metrics.Metrics.rewind`."""
        if self.leads:
            self.metrics.rewind(stage, step)

    def span(self, name: str, **details: Any) -> AbstractContextManager[None]:
        """Times a block, such as "rollout", "scoring" or "update"."""
        return self.timeline.span(name, **details)

    def profiled(self) -> AbstractContextManager[None]:
        """Wraps one training step; with `--profile` a few of them are traced by JAX."""
        return self.profiler.step()

    def each_profiled(self, steps: Iterable[Item]) -> Iterator[Item]:
        """Passes on the items of an iterator that does one training step for each of them."""
        ended = object()
        iterator = iter(steps)
        while True:
            with self.profiled():
                item = next(iterator, ended)
            if item is ended:
                return
            yield cast(Item, item)

    def note(self, text: str) -> None:
        """Writes a line for the person who watches."""
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def write_samples(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes what a policy wrote, one JSON object a line, to samples/NAME.jsonl."""
        path = self.folder / "samples" / f"{name}.jsonl"
        if self.leads:
            write_json_lines(path, rows)
        return path

    def preempted(self) -> bool:
        """Whether the run has to save and raise `Preempted`; all processes ask, once a step."""
        return self.preemption is not None and self.preemption.reached()

    def finish(self, summary: Mapping[str, Any], table: str) -> None:
        """Writes the results; from then on the run counts as finished."""
        self.finished = True
        if not self.leads:
            return
        write_atomically(self.folder / "table.txt", table if table.endswith("\n") else table + "\n")
        self.metrics.flush()
        write_json(self.folder / "summary.json", summary)

    def close(self) -> None:
        """Closes the files and frees the folder; the second call does nothing."""
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunFolderError(f"--out must be a folder, but {folder} is a file") from error
    except OSError as error:
        raise RunFolderError(f"cannot make the folder {folder}: {error}; check --out") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["config"]["seed"] = found["config"].get("seed")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} is no config of a run; choose another --out") from error
    return found


@contextmanager
def clean_errors(stream: TextIO | None = None) -> Iterator[None]:
    """Turns a `ValueError`, `OSError` or `ImportError` into one line on stderr and exit status 2.

    `ImportError` is what an optional extra that is not installed raises. The other processes of a
    run whose first process stopped exit with the same status and say nothing.

    Set JAXRL_TRACEBACK=1 to see where it came from.
    """
    try:
        yield
    except processes.LeaderStopped as error:
        raise SystemExit(2) from error
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("JAXRL_TRACEBACK"):
            raise
        print(f"error: {error}", file=stream or sys.stderr)
        print("(set JAXRL_TRACEBACK=1 for the traceback)", file=stream or sys.stderr)
        raise SystemExit(2) from error


def main(
    experiment: Callable[[Run], None],
    name: str,
    config: Any,
    *,
    preemptible: bool = False,
    **options: Any,
) -> Run:
    """Runs an experiment in its folder, or prints the table of the finished one.

    A config with `ProcessOptions` joins the other processes of its run first.

    Args:
      experiment: does the work and calls `Run.finish`.
      name: of the experiment.
      config: from `cli`.
      preemptible: whether the experiment asks `Run.preempted` after every step; SIGTERM then makes
        it save and exit with status `jaxrl.processes.PREEMPTED`, 75, instead of ending it at once.
      **options: for `Run.open`.
    """
    with clean_errors():
        if isinstance(config, ProcessOptions):
            join(config.coordinator, config.num_processes, config.process_id)
        with (
            Preemption() if preemptible else nullcontext() as preemption,
            Run.open(name, config, **options) as run,
        ):
            run.preemption = preemption
            if run.finished:
                run.note(f"{run.folder} is finished; choose another --out to run it again")
            else:
                run.note(f"{'resuming' if run.resumed else 'writing to'} {run.folder}")
                _run_to_the_end(experiment, run)
            if run.leads:
                print(run.table(), end="")
                if (run.folder / "report.html").exists():
                    print(f"\nReport: {run.folder / 'report.html'}")
    return run


def _run_to_the_end(experiment: Callable[[Run], None], run: Run) -> None:
    try:
        experiment(run)
    except KeyboardInterrupt:
        run.note(f"interrupted; the same command with --out {run.folder} continues")
        raise SystemExit(130) from None  # what a shell expects after Ctrl-C
    except Preempted as stopped:
        run.note(f"told to stop {stopped}: saved; the same command continues")
        raise
