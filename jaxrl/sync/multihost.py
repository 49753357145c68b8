"""Learners and actors of several processes: one speaks with the store, all do the arithmetic."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl.processes import broadcast
from jaxrl.sync import errors
from jaxrl.sync.errors import SyncError
from kernels import sparse_delta

_GATHERED_BYTES = 1 << 28
"""Of all processes' parts of a payload that lie on each device at once."""


def is_spread(tree: Any) -> bool:
    """Whether other processes hold some of a tree of arrays or shapes."""
    placed = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return any(own is not None and not own.is_fully_addressable for own in placed)


def on_first(act: Callable[[], Any], *, shared: bool = True) -> Any:
    """What a function returns in the first process, in all of them; what it raises, likewise.

    All processes call this together.

    Args:
      act: called in the first process only; returns JSON values.
      shared: False: no other process takes part.

    Raises:
      SyncError: the one of the first process, as a member of its class.
    """
    if not shared or jax.process_count() == 1:
        return act()
    failure: Exception | None = None
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": act()}
        except Exception as error:  # whatever it is, the others wait for word of it
            failure = error
            outcome = {"error": type(error).__name__, "message": str(error)}
    outcome = json.loads(broadcast(json.dumps(outcome).encode()))
    if failure is not None:
        raise failure
    if "error" in outcome:
        kind = getattr(errors, outcome["error"], SyncError)
        raise kind(f"process 0: {outcome['message']}")
    return outcome["value"]


def worst(code: int, *, shared: bool) -> int:
    """The highest code of any process; all call this together, if it is `shared`."""
    if not shared or jax.process_count() == 1:
        return code
    return int(np.max(multihost_utils.process_allgather(np.asarray(code, np.int32))))


def whole(payload: bytes) -> bytes:
    """A payload from the parts that the processes of one `encode` made; all call this together.

    The parts pass through the devices, whose memory is the model's: piece by piece, so that each
    device holds no more than `_GATHERED_BYTES` of them at once. Every process's host memory gets
    all of the payload.
    """
    count = jax.process_count()
    if count == 1:
        return payload
    # As bytes, since JAX makes 32 bits of 64-bit integers.
    lengths = multihost_utils.process_allgather(np.asarray([len(payload)], "<u8").view(np.uint8))
    sizes = np.ascontiguousarray(lengths).view("<u8").ravel().tolist()
    piece_bytes = max(_GATHERED_BYTES // count, 1)
    parts: list[list[bytes]] = [[] for _ in range(count)]
    for start in range(0, max(sizes), piece_bytes):
        own = np.frombuffer(payload[start : start + piece_bytes], np.uint8)
        padded = np.zeros(min(piece_bytes, max(sizes) - start), np.uint8)
        padded[: own.size] = own
        gathered = np.asarray(multihost_utils.process_allgather(padded))
        for part, piece, size in zip(parts, gathered, sizes, strict=True):
            part.append(piece[: max(size - start, 0)].tobytes())
    return sparse_delta.merge([b"".join(part) for part in parts])
