"""Plans as JSON: readable, and the same for the same plan."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any

from jax.sharding import PartitionSpec

from sharding.compiled.hlo import Traffic
from sharding.explain import Alternative, Prediction
from sharding.machines.topology import Cluster

_SPECS = ("specs", "inputs", "outputs", "gradients", "updates")
# Structures of somebody's classes and their functions are no data.
_HELD = ("in_tree", "out_tree", "step", "args")
_TUPLES = ("batch", "pipeline", "notes", "state", "data", "donate")


def dumps(plan: Any) -> str:
    """A `Plan` as JSON."""
    held: dict[str, Any] = {}
    for item in fields(plan):
        value = getattr(plan, item.name)
        if item.name in _HELD:
            continue
        if item.name in _SPECS:
            value = {path: _entries(spec) for path, spec in value.items()}
        elif item.name == "where":
            value = None if value is None else json.loads(value.to_json())
        elif item.name == "prediction":
            value = None if value is None else asdict(value)
        elif item.name == "alternatives":
            value = [asdict(other) for other in value]
        elif isinstance(value, Mapping):
            value = dict(value)
        held[item.name] = value
    return json.dumps(held, indent=1)


def loads(text: str, known: Collection[str]) -> dict[str, Any]:
    """The fields of a `Plan` from JSON; those that are absent keep their defaults.

    Args:
      text: what `dumps` wrote.
      known: names of the fields of a `Plan`.

    Raises:
      ValueError: not the JSON of a plan.
    """
    held = json.loads(text)
    if not isinstance(held, dict) or "mesh" not in held:
        raise ValueError(f"no plan: an object with a mesh is needed, got {text[:60]!r}")
    unknown = sorted(set(held) - set(known))
    if unknown:
        raise ValueError(
            f"no plan: it has {', '.join(unknown)}; a plan is what Plan.save writes, and not what "
            "`python -m sharding plan --json` prints, which holds no specs"
        )
    for name in _SPECS:
        held[name] = {path: _spec(entries) for path, entries in held.get(name, {}).items()}
    for name in _TUPLES:
        if name in held:
            held[name] = None if held[name] is None else tuple(held[name])
    for name in ("activations", "placement"):
        held[name] = {key: tuple(values) for key, values in held.get(name, {}).items()}
    if held.get("where") is not None:
        held["where"] = Cluster.from_fields(held["where"])
    if held.get("prediction") is not None:
        fields_ = dict(held["prediction"])
        moved = fields_.pop("collectives", {})
        traffic = {kind: Traffic(**entry) for kind, entry in moved.items()}
        held["prediction"] = Prediction(**fields_, collectives=traffic)
    held["alternatives"] = tuple(Alternative(**other) for other in held.get("alternatives", ()))
    return held


def _entries(spec: PartitionSpec) -> list[Any]:
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]


def _spec(entries: list[Any]) -> PartitionSpec:
    return PartitionSpec(*(tuple(e) if isinstance(e, list) else e for e in entries))
