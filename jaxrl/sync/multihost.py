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


def all_well(well: bool, *, shared: bool) -> bool:
    """Whether all is well in every process; all call this together, if it is `shared`."""
    if not shared or jax.process_count() == 1:
        return well
    return bool(np.all(multihost_utils.process_allgather(np.asarray(well))))


def whole(payload: bytes) -> bytes:
    """A payload from the parts that the processes of one `encode` made; all call this together."""
    if jax.process_count() == 1:
        return payload
    sizes = multihost_utils.process_allgather(np.asarray(len(payload), np.int64))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(payload)] = np.frombuffer(payload, np.uint8)
    parts = multihost_utils.process_allgather(padded)
    return sparse_delta.merge(
        [part[:size].tobytes() for part, size in zip(parts, sizes.tolist(), strict=True)]
    )
