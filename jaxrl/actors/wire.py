"""Work items and results as JSON and raw bytes: what the network carries and the journal keeps.

A result is a header, which is JSON, and a body, which is its arrays one after another: row-major,
little-endian, in the order of the header's table. Reading runs no code and trusts nothing: names,
dtypes, shapes and sizes are checked, the values later by `jaxrl.actors.validation`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from jaxrl.actors.work import Refusal, Result, Timings, WorkItem
from jaxrl.types import Prompts, Rollouts

_DTYPES = {"bool": np.dtype("?"), "int32": np.dtype("<i4"), "float32": np.dtype("<f4")}
_PROMPTS = ("tokens", "mask", "ids")
_ARRAYS = ("tokens", "mask", "behaviour_log_probs", "reference_log_probs", "policy_version")
_SCORES = ("rewards", "costs", "greedy")


class Malformed(ValueError):
    """Bytes that are no result."""


def item_to_json(item: WorkItem) -> dict[str, Any]:
    """A work item as JSON values."""
    return asdict(item) | {"rows": list(item.rows)}


def item_from_json(fields: Mapping[str, Any]) -> WorkItem:
    """The work item of `item_to_json`.

    Raises:
      Malformed: the values are of no item.
    """
    try:
        names = ("id", "seed", "min_version")
        numbers = {name: _integer(fields[name]) for name in names}
        return WorkItem(rows=tuple(_integer(row) for row in fields["rows"]), **numbers)
    except (KeyError, TypeError) as error:
        raise Malformed(f"no work item: {error!r}") from error


def result_to_wire(result: Result) -> tuple[dict[str, Any], bytes]:
    """Header and body of a result."""
    table, parts = [], []
    for name, array in _flat(result.rollouts).items():
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"rollouts hold {', '.join(_DTYPES)}: {name} is {array.dtype}")
        table.append([name, array.dtype.name, list(array.shape)])
        parts.append(np.ascontiguousarray(array, _DTYPES[array.dtype.name]).tobytes())
    header = {
        "item": result.item,
        "actor": result.actor,
        "version": result.version,
        "refusal": None if result.refusal is None else asdict(result.refusal),
        "timings": asdict(result.timings),
        "arrays": table,
    }
    return header, b"".join(parts)


def result_from_wire(header: Mapping[str, Any], body: bytes) -> Result:
    """The result of `result_to_wire`, its arrays read-only views of `body`.

    Raises:
      Malformed: header or body is of no result.
    """
    try:
        refusal = header["refusal"]
        return Result(
            item=_integer(header["item"]),
            actor=str(header["actor"]),
            version=_integer(header["version"]),
            rollouts=_rollouts(_arrays(header["arrays"], body)) if refusal is None else None,
            refusal=None if refusal is None else _refusal(refusal),
            timings=Timings(**{name: float(x) for name, x in header["timings"].items()}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"no result: {error!r}") from error


def _flat(rollouts: Rollouts | None) -> dict[str, np.ndarray]:
    if rollouts is None:
        return {}
    named = {f"prompts.{name}": getattr(rollouts.prompts, name) for name in _PROMPTS}
    named |= {name: getattr(rollouts, name) for name in _ARRAYS}
    for kind in _SCORES:
        scores = getattr(rollouts, kind)
        named |= {f"{kind}.{name}": array for name, array in (scores or {}).items()}
    return {name: np.asarray(array) for name, array in named.items()}


def _arrays(table: Any, body: bytes) -> dict[str, Any]:
    arrays, offset = {}, 0
    for name, kind, shape in table:
        dtype = _DTYPES[kind]
        if any(_integer(size) < 0 for size in shape) or name in arrays:
            raise Malformed(f"{name!r} of shape {shape} is impossible or comes twice")
        end = offset + dtype.itemsize * math.prod(shape)
        if end > len(body):
            raise Malformed(f"{name!r} needs bytes up to {end}, there are {len(body)}")
        raw = np.frombuffer(body[offset:end], np.uint8 if kind == "bool" else dtype)
        if kind == "bool" and raw.size and raw.max() > 1:
            raise Malformed(f"{name!r} holds other bytes than 0 and 1")
        arrays[str(name)] = (raw.view(np.bool_) if kind == "bool" else raw).reshape(shape)
        offset = end
    if offset != len(body):
        raise Malformed(f"{len(body) - offset} bytes belong to no array")
    return arrays


def _rollouts(arrays: dict[str, Any]) -> Rollouts:
    prompts = Prompts(**{name: arrays.pop(f"prompts.{name}") for name in _PROMPTS})
    fields = {name: arrays.pop(name) for name in _ARRAYS}
    scores: dict[str, dict[str, Any]] = {kind: {} for kind in _SCORES}
    for name, array in arrays.items():
        kind, _, score = name.partition(".")
        scores[kind][score] = array
    return Rollouts(
        prompts=prompts,
        rewards=scores["rewards"],
        costs=scores["costs"],
        greedy=scores["greedy"] or None,
        **fields,
    )


def _refusal(fields: Mapping[str, Any]) -> Refusal:
    return Refusal(
        reason=str(fields["reason"]),
        detail=str(fields["detail"]),
        item=_integer(fields["item"]),
        actor=str(fields["actor"]),
    )


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise Malformed(f"expected an integer, got {value!r}")
    return value
