"""Rollouts that were recorded: what makes two runs comparable to the last digits.

Freshly sampled rollouts of two runs may differ as soon as one log-probability does in its last
bit, as it does on another number of devices. What follows from given rollouts does not fork.
"""

import json
import os
from pathlib import Path

import jax

from jaxrl import processes
from jaxrl.train.multihost import rollouts_from_message, rollouts_to_message
from jaxrl.types import Rollouts


class Tape:
    """A folder with the scored rollouts of every step, one file each: `00000012.rollouts`."""

    def __init__(self, folder: Path | str) -> None:
        """Opens a folder, which the first `write` makes where it is missing."""
        self._folder = Path(folder)

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:08d}.rollouts"

    def read(self, step: int) -> Rollouts | None:
        """The rollouts of a step, the same in every process; None where none were recorded.

        Raises:
          Malformed: the file is no recording.
        """
        data = b""
        if processes.leads() and self._path(step).exists():
            data = self._path(step).read_bytes()
        data = processes.broadcast(data)
        if not data:
            return None
        end = 8 + int.from_bytes(data[:8], "little")
        return rollouts_from_message((json.loads(data[8:end]), data[end:]))

    def write(self, step: int, rollouts: Rollouts) -> None:
        """Records the rollouts of a step; the first process writes."""
        if not processes.leads():
            return
        header, body = rollouts_to_message(jax.device_get(rollouts))
        text = json.dumps(header).encode()
        path = self._path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(len(text).to_bytes(8, "little") + text + body)
        os.replace(part, path)
