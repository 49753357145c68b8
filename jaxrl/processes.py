"""What the processes of one `jax.distributed` job must do alike; a single process is one of one.

All functions but `leads` are called by all processes together, in the same order.

A run is told to stop by the owner of the machines: TPU pods, Kubernetes and Slurm send SIGTERM some
seconds to minutes before they take machines away. All processes save after the same step and exit:

    with Preemption() as preemption:
        for done, state, *_ in trainer.run(state, start=start, steps=steps):
            if preemption.reached():
                checkpoints.save(done, state)  # closed, and so on the disk, before the exit
                raise Preempted(f"after step {done}")
"""

import json
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_PIECE_BYTES = 1 << 28
"""Of what is broadcast at once: it passes through the memory of every device."""


class LeaderStopped(RuntimeError):
    """The first process cannot go on; says why."""


def leads() -> bool:
    """Whether this process is the first, which speaks with the world for all of them."""
    return jax.process_index() == 0


def broadcast(data: bytes) -> bytes:
    """The first process's bytes, in every process."""
    if jax.process_count() == 1:
        return data
    pieces: list[bytes] = []
    while not pieces or len(pieces[-1]) == _PIECE_BYTES:
        start = len(pieces) * _PIECE_BYTES
        pieces.append(_broadcast_piece(data[start : start + _PIECE_BYTES]))
    return b"".join(pieces)


def _broadcast_piece(piece: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(piece), np.int32)))
    if not size:
        return b""
    padded = np.zeros(size, np.uint8)
    if leads():
        padded[:] = np.frombuffer(piece, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def from_leader(act: Callable[[], Any]) -> Any:
    """What a function returns in the first process, which alone calls it, in all of them.

    Args:
      act: returns JSON values.

    Raises:
      LeaderStopped: in the other processes, where it raised in the first; there it is what was
        raised.
    """
    if jax.process_count() == 1:
        return act()
    failure: BaseException | None = None
    outcome: dict[str, Any] = {}
    if leads():
        try:
            outcome = {"value": act()}
        except BaseException as error:  # whatever it is, the others wait for word of it
            failure = error
            outcome = {"error": f"{type(error).__name__}: {error}"}
    outcome = json.loads(broadcast(json.dumps(outcome).encode()))
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise LeaderStopped(outcome["error"])
    return outcome["value"]


def anywhere(flag: bool) -> bool:
    """Whether a flag is up in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def concatenated(tree: Any) -> Any:
    """NumPy arrays of every process, of one shape, joined along their first axis in their order."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def whole(tree: Any) -> Any:
    """Arrays that lie over several devices or processes, as NumPy arrays in every process."""

    def on_host(leaf: Any) -> np.ndarray:
        spread = isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        )
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if spread else leaf)

    return jax.tree.map(on_host, tree)


PREEMPTED = 75
"""Exit status of a run that saved and stopped because it was told to: EX_TEMPFAIL of sysexits.h,
which asks to be tried again. Launchers start the same command once more when they see it."""


class Preempted(SystemExit):
    """The run has saved and ends here, with status `PREEMPTED`; says where."""

    def __init__(self, where: str):
        super().__init__(PREEMPTED)
        self.where = where

    def __str__(self) -> str:
        return self.where


class Preemption:
    """Catches a signal and answers, alike in every process, whether it came; a context manager.

    Meanwhile the signal does nothing else. Only a program's main thread may catch signals:
    elsewhere nothing is caught, and the answer is always no.
    """

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        self._signum = signum
        self._received = False
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(self._signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(self._signum, self._before)
            self._before = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    def reached(self) -> bool:
        """Whether the signal has come to any process.

        All processes ask together, once a step: they then stop after the same one. It costs them
        the exchange of a byte.
        """
        return anywhere(self._received)
