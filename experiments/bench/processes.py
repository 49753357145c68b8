"""The parent's end: workers as processes, and the environments that peers need."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from experiments.bench.workload import Workload

ROOT = Path(__file__).parents[2]

PEERS: Mapping[str, Sequence[Sequence[str]]] = {
    "tunix": [["google-tunix==0.1.7"]],
    # torch first and by itself: whatever else asks for it is then content.
    "trl": [["torch==2.13.0"], ["trl==1.16.0"]],
}
"""Packages of each peer, in the order in which pip is to install them."""


class WorkerFailed(OSError):
    """A worker ended, or did not answer in time; the message says what it was asked."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One of those who are compared.

    Attributes:
      name: in tables.
      module: of its worker.
      python: interpreter of its environment.
      compiles: whether it is JAX, and so has a persistent compilation cache.
    """

    name: str
    module: str
    python: str
    compiles: bool = True


class Worker:
    """A worker process; a context manager that ends it."""

    def __init__(
        self,
        contestant: Contestant,
        workload: Workload,
        *,
        cache: Path | None,
        log: Path,
        timeout_s: float,
    ):
        """Starts the process and waits until it is ready.

        Args:
          contestant: whom to start.
          workload: what it is to do.
          cache: folder of its compilation cache; None where it has none.
          log: file for what it prints.
          timeout_s: longest wait for any answer.

        Raises:
          WorkerFailed: it did not become ready.
        """
        self.name, self.timeout_s, self._log = contestant.name, timeout_s, log
        self._answers: queue.Queue[str] = queue.Queue()
        with log.open("a", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                [contestant.python, "-m", contestant.module, json.dumps(asdict(workload))],
                cwd=ROOT,
                env=environment(cache),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.hello = self._answer("start")
        except BaseException:
            self.kill()
            raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, operation: str, **details: Any) -> dict[str, Any]:
        """Sends one message and waits for the answer.

        Raises:
          WorkerFailed: no answer within `timeout_s`, or the worker ended.
        """
        assert self._process.stdin is not None
        # Where the pipe is broken the reader has seen the end too, and `_answer` tells of it.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"op": operation} | details) + "\n")
            self._process.stdin.flush()
        return self._answer(operation)

    def _answer(self, operation: str) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=self.timeout_s)
        except queue.Empty:
            self.kill()
            raise WorkerFailed(
                f"{self.name} was asked to {operation!r} and did not answer within "
                f"{self.timeout_s:g} s; see {self._log}, or raise --timeout-s"
            ) from None
        if not line:
            tail = self._log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise WorkerFailed(
                f"{self.name} ended when asked to {operation!r}: {''.join(tail)} (see {self._log})"
            )
        return json.loads(line)

    def close(self) -> dict[str, Any]:
        """Asks the worker to end and gives its last words."""
        last = self.ask("close")
        try:
            self._process.wait(timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            raise WorkerFailed(
                f"{self.name} said goodbye and did not end within {self.timeout_s:g} s"
            ) from None
        finally:
            self.kill()
        return last

    def kill(self) -> None:
        """Ends the process at once, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(timeout=30)
        self._reader.join(timeout=30)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def environment(cache: Path | None) -> dict[str, str]:
    """Environment of a worker: this one's, without settings that would tilt the comparison."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "PYTHON"))}
    kept |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if cache is not None:
        kept |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return kept


def peer_folder(name: str) -> Path:
    """Where `--make-peers` puts the environment of a peer."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "jaxrl-safe" / "peers" / name


def find_peer(name: str, given: Path | None) -> str | None:
    """The interpreter of a peer's environment; None where there is none.

    Raises:
      ValueError: the interpreter given does not exist.
    """
    if given is not None and not given.exists():
        raise ValueError(f"--{name}-python must be a Python interpreter: {given} does not exist")
    made = peer_folder(name) / "bin" / "python"
    return str(given or made) if given or made.exists() else None


def make_peer(name: str, *, timeout_s: float) -> None:
    """Creates a peer's environment with pip; minutes, and gigabytes where torch means CUDA."""
    folder = peer_folder(name)
    started = time.monotonic()
    print(f"making {folder} …", file=sys.stderr, flush=True)
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    for command in commands + [[*pip, *packages] for packages in PEERS[name]]:
        left = timeout_s - (time.monotonic() - started)
        try:
            subprocess.run(command, check=True, timeout=max(left, 1), stdin=subprocess.DEVNULL)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise ValueError(
                f"could not make the environment of {name}: {error}; make one by hand and name "
                f"its interpreter with --{name}-python"
            ) from error
