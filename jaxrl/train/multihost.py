"""A learner of several processes: the first leads, and all do the same arithmetic."""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxrl.actors import Result
from jaxrl.actors.wire import result_from_wire, result_to_wire
from jaxrl.processes import LeaderStopped, broadcast, leads
from jaxrl.types import Rollouts

Message = tuple[dict[str, Any], bytes]


def tell(header: Mapping[str, Any], body: bytes = b"") -> None:
    """Says something to the processes that follow, which wait in `hear`; those say nothing."""
    if leads() and jax.process_count() > 1:
        text = json.dumps(dict(header)).encode()
        broadcast(len(text).to_bytes(8, "little") + text + body)


def hear() -> Message:
    """What the leader says next.

    Raises:
      LeaderStopped: that it cannot go on.
    """
    data = broadcast(b"")
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if "stop" in header:
        raise LeaderStopped(header["stop"])
    return header, data[end:]


def rollouts_to_message(rollouts: Rollouts) -> Message:
    """Rollouts, whoever wrote them or replayed them, as `tell` takes them."""
    header, body = result_to_wire(Result(item=-1, actor="", version=-1, rollouts=rollouts))
    best = b""
    if rollouts.best_safe is not None:
        best = np.asarray(rollouts.best_safe, "<f4").tobytes()
    return header | {"best_safe_bytes": len(best)}, body + best


def rollouts_from_message(message: Message) -> Rollouts:
    """The rollouts of `rollouts_to_message`."""
    header, data = message
    end = len(data) - header["best_safe_bytes"]
    rollouts = result_from_wire(header, data[:end]).rollouts
    assert rollouts is not None
    best = np.frombuffer(data[end:], "<f4")
    return rollouts.replace(best_safe=best) if best.size else rollouts


def tree_to_message(state: Mapping[str, Any] | None) -> Message:
    """A replay's `state_dict`, or None, as `tell` takes it."""
    if state is None:
        return {"state": None}, b""
    arrays = {name: np.ascontiguousarray(array) for name, array in state["arrays"].items()}
    table = [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]
    body = b"".join(array.tobytes() for array in arrays.values())
    return {"state": {"metadata": state["metadata"], "arrays": table}}, body


def tree_from_message(message: Message) -> dict[str, Any] | None:
    """The state of `tree_to_message`."""
    header, body = message
    if header["state"] is None:
        return None
    arrays, offset = {}, 0
    for name, dtype, shape in header["state"]["arrays"]:
        array = np.frombuffer(body, dtype, math.prod(shape), offset).reshape(shape)
        arrays[name], offset = array, offset + array.nbytes
    return {"metadata": header["state"]["metadata"], "arrays": arrays}
