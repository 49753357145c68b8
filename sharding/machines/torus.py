"""Which dimensions of a torus each axis of a mesh takes, how fast it is there, and which devices.

An axis takes factors of the torus' dimensions. What it takes first lies closest together: of a
dimension that several axes share, the first has neighbours and the next steps over it. The
devices of a chip are nearer than any link; slices are joined by the network only.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

# Axes of a mesh from the innermost, whose members are closest, to the outermost.
AXES = ("tensor", "context", "expert", "fsdp", "data", "stage")


@dataclass(frozen=True, kw_only=True)
class Torus:
    """What the speed of a group depends on, hashable so that it is computed once.

    Attributes:
      shape: dimensions of a slice.
      slices: joined by the network.
      wrap: dimensions that are a multiple of this are closed to rings.
      link: bytes/s of a link, one way.
      cores: devices of a chip.
      network: bytes/s of a device to other slices.
      host: chips that share a host, by dimension.
    """

    shape: tuple[int, ...]
    slices: int
    wrap: int
    link: float
    cores: int
    network: float
    host: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What every axis of `AXES` takes.

    Attributes:
      bandwidth: bytes/s of each axis, one way and a device.
      factors: of each axis over (slices, *dimensions, devices of a chip).
      order: positions of the axes, from the one that takes first.
    """

    bandwidth: tuple[float, ...]
    factors: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]


@functools.lru_cache(maxsize=200_000)
def assign(torus: Torus, degrees: tuple[int, ...], first: str) -> Assignment | None:
    """Each axis takes the best that is left for it, `first` before the others, then by `AXES`.

    Args:
      torus: the wires.
      degrees: one per axis of `AXES`.
      first: the axis that takes its dimensions first; "host" is tensor, within a host's chips.

    Returns:
      None if the dimensions cannot be divided so.
    """
    # The network between slices goes to the outermost axes that it divides.
    shares, network_left = [1] * len(AXES), torus.slices
    for axis in (AXES.index("data"), AXES.index("stage"), AXES.index("fsdp")):
        shares[axis] = math.gcd(degrees[axis], network_left)
        network_left //= shares[axis]
    if network_left > 1:
        return None
    left, stride, cores = list(torus.shape), [1] * len(torus.shape), torus.cores
    found = [0.0] * len(AXES)
    taken: list[tuple[int, ...]] = [()] * len(AXES)
    leader = AXES.index("tensor" if first == "host" else first)
    order = sorted(range(len(AXES)), key=lambda i: (i != leader, i))
    for axis in order:
        inside = degrees[axis] // shares[axis]
        on_chip = math.gcd(inside, cores)  # the devices of a chip are nearer than any link
        cores //= on_chip
        most = torus.host if first == "host" and axis == leader else torus.shape
        split = _best_split(torus, inside // on_chip, left, stride, most)
        if split is None:
            return None
        speed, factors = split
        for i, factor in enumerate(factors):
            left[i] //= factor
            stride[i] *= factor
        speed *= on_chip / torus.cores  # the devices of a chip share its links
        if shares[axis] > 1:
            speed = min(speed, inside * torus.network)
        found[axis] = speed
        taken[axis] = (shares[axis], *factors, on_chip)
    return Assignment(bandwidth=tuple(found), factors=tuple(taken), order=tuple(order))


@functools.lru_cache(maxsize=100_000)
def _splits(
    torus: Torus,
    degree: int,
    left: tuple[int, ...],
    stride: tuple[int, ...],
    most: tuple[int, ...],
) -> tuple[float, tuple[int, ...]] | None:
    best = None
    for factors in factorings(degree, len(left)):
        if any(size % factor for size, factor in zip(left, factors, strict=True)):
            continue
        if any(size % factor for size, factor in zip(most, factors, strict=True)):
            continue
        speed = 0.0
        for size, factor, inner, whole in zip(left, factors, stride, torus.shape, strict=True):
            if factor > 1:
                closed = factor == size and whole % torus.wrap == 0
                speed += torus.link * (2 if closed else 1) / inner
        # Among equals, keep whole dimensions free for the axes that follow.
        key = (speed, -sum(f > 1 for f in factors), factors)
        best = max(best, key) if best else key
    return None if best is None else (best[0], best[2])


def _best_split(
    torus: Torus, degree: int, left: Sequence[int], stride: Sequence[int], most: tuple[int, ...]
) -> tuple[float, tuple[int, ...]] | None:
    if degree == 1:
        return 2 * torus.link * len(left), (1,) * len(left)
    return _splits(torus, degree, tuple(left), tuple(stride), most)


@functools.cache
def factorings(number: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """All ways to write a number as an ordered product of `parts` factors."""
    if parts == 1:
        return ((number,),)
    return tuple(
        (d, *rest)
        for d in range(1, number + 1)
        if number % d == 0
        for rest in factorings(number // d, parts - 1)
    )


def device_grid(
    devices: Sequence[Any], mesh: Mapping[str, int], placement: Mapping[str, Sequence[int]]
) -> np.ndarray:
    """Devices in the shape of a mesh, each axis on the wires that a plan chose for it.

    Args:
      devices: JAX devices; those of a torus say their `coords`, `core_on_chip` and `slice_index`.
      mesh: axis to size, outermost first; their product is the number of devices.
      placement: axis to its factors over (slices, *dimensions, devices of a chip), the axis that
        took first at the front; {} leaves the order of the devices as it is.

    Devices without coordinates keep their order, in which those of a host are neighbours. A torus
    of another shape than the plan's, turned ones apart, is left to `mesh_utils`.
    """
    sizes = tuple(mesh.values()) or (1,)
    if not placement or not hasattr(devices[0], "coords"):
        return _as_array(devices).reshape(sizes)
    grid = _by_coordinates(devices)
    shape = tuple(math.prod(f) for f in zip(*placement.values(), strict=True))
    turned = None if grid is None else _turned(grid, shape)
    if turned is None:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Each dimension becomes one factor an axis, the axis that took first innermost.
    outwards = list(placement)[::-1]
    split = turned.reshape([placement[axis][k] for k in range(len(shape)) for axis in outwards])
    position = {(k, a): k * len(outwards) + i for k in range(len(shape))
                for i, a in enumerate(outwards)}  # fmt: skip
    inner_last = [position[k, axis] for axis in mesh for k in range(len(shape))]
    return split.transpose(inner_last).reshape(sizes)


def _as_array(devices: Sequence[Any]) -> np.ndarray:
    found = np.empty(len(devices), object)
    found[:] = devices
    return found


def _by_coordinates(devices: Sequence[Any]) -> np.ndarray | None:
    """[slices, *dimensions, devices of a chip]; None if the devices fill no box."""
    rows = np.asarray(
        [(getattr(d, "slice_index", 0) or 0, *d.coords, getattr(d, "core_on_chip", 0) or 0)
         for d in devices]
    )  # fmt: skip
    rows = rows - rows.min(axis=0)
    shape = tuple((rows.max(axis=0) + 1).tolist())
    if math.prod(shape) != len(devices):
        return None
    grid = np.empty(shape, object)
    for row, device in zip(rows.tolist(), devices, strict=True):
        grid[tuple(row)] = device
    return None if any(d is None for d in grid.flat) else grid


def _turned(grid: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The grid with its torus dimensions in an order that has a shape; None if there is none."""
    while grid.ndim > len(shape) and grid.shape[-2] == 1:  # a plane's third coordinate
        grid = grid.squeeze(-2)
    if grid.ndim != len(shape):
        return None
    last = grid.ndim - 1
    for inner in itertools.permutations(range(1, last)):
        candidate = grid.transpose(0, *inner, last)
        if candidate.shape == shape:
            return candidate
    return None
