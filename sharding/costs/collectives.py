"""Times of collectives by message size, on tori and on switches.

Each function takes the bytes that the operation is about, the members of a group, the bytes/s at
which a member sends (`Cluster.axis_bandwidth`, which knows the wires) and the latency of a step.
All arguments may be arrays of one shape.
"""

from typing import Any

import numpy as np

Value = np.ndarray | np.generic | float | int
Result = Any  # an array of the arguments' shape, or a number


def all_gather(size: Value, members: Value, speed: Value, latency_s: Value) -> Result:
    """Time until every member has all `size` bytes, of which each held one part.

    T = α·⌈log₂ n⌉ + V·(n-1)/n / B   (bandwidth-optimal ring, latency of a tree)

    >>> float(all_gather(8e9, 4, 2e9, 0.0))
    3.0
    """
    members = np.asarray(members, float)
    moved = np.asarray(size) * (members - 1) / members
    return _steps(members) * np.asarray(latency_s) + moved / np.asarray(speed)


def reduce_scatter(size: Value, members: Value, speed: Value, latency_s: Value) -> Result:
    """Time to sum `size` bytes of every member and leave each a part: the reverse gather."""
    return all_gather(size, members, speed, latency_s)


def all_reduce(size: Value, members: Value, speed: Value, latency_s: Value) -> Result:
    """Time to sum `size` bytes of every member on every member: a scatter and a gather."""
    return 2 * all_gather(size, members, speed, latency_s)


def all_to_all(
    size: Value,
    members: Value,
    speed: Value,
    latency_s: Value,
    *,
    torus: bool = False,
) -> Result:
    """Time to exchange `size` bytes of each member evenly with the others.

    A switch moves V·(n-1)/n. On a ring a message travels n/4 links on average, so that
    T = V·(n/4)/(2W): a quarter of an all-gather of all members' bytes (scaling-book, sharding.md).
    """
    members = np.asarray(members, float)
    moved = np.asarray(size) * (members - 1) / members
    if torus:
        moved = moved * np.maximum(1.0, members / 4)
    return _steps(members) * np.asarray(latency_s) + moved / np.asarray(speed)


def send(size: Value, speed: Value, latency_s: Value) -> Result:
    """Time to hand `size` bytes to a neighbour."""
    return np.asarray(latency_s) + np.asarray(size) / np.asarray(speed)


def _steps(members: np.ndarray) -> np.ndarray:
    return np.where(members > 1, np.ceil(np.log2(np.maximum(members, 1))), 0.0)
