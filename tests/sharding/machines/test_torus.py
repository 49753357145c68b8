"""Meshes on tori: devices lie where the cost model took them to lie."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import optax
import pytest

import sharding
from sharding.costs.strategies import Strategy
from sharding.machines.topology import AXES, Cluster
from sharding.machines.torus import device_grid


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    coords: tuple[int, ...]
    core_on_chip: int = 0
    slice_index: int = 0


def devices_of(shape, cores=1, slices=1):
    """As JAX lists them: the first coordinate runs fastest, cores within chips."""
    chips = [tuple(reversed(c)) for c in itertools.product(*map(range, reversed(shape)))]
    return [
        FakeDevice((*chip, *[0] * (3 - len(chip))), core, slice_)
        for slice_ in range(slices)
        for chip in chips
        for core in range(cores)
    ]


def laid(name, first="tensor", **sizes):
    cluster = Cluster.from_name(name)
    strategy = Strategy(**sizes)
    degrees = [getattr(strategy, axis) for axis in AXES]
    devices = devices_of(cluster.shape, cluster.chip.devices_per_chip, cluster.slices)
    return device_grid(devices, strategy.mesh, cluster.placement(degrees, first))


def extent(group):
    """(chips an axis spans along each torus dimension, slices) of a group of devices."""
    coords = np.asarray([d.coords for d in group])
    return tuple(len(set(column)) for column in coords.T.tolist())


def groups(grid, position):
    moved = np.moveaxis(grid, position, -1)
    return moved.reshape(-1, grid.shape[position])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v5e:16x16", {"fsdp": 16, "tensor": 16}),
        ("v5e:8x8", {"stage": 2, "data": 4, "tensor": 8}),
        ("v5p:4x4x8", {"fsdp": 32, "tensor": 4}),
        ("v5p:4x4x4", {"data": 2, "fsdp": 4, "context": 2, "tensor": 4}),
        ("v4:2x2x4", {"fsdp": 8, "tensor": 2}),
        ("tpu7x:4x4x4", {"fsdp": 64, "tensor": 2}),
        ("v5p:4x4x4x2slices", {"data": 2, "fsdp": 16, "tensor": 4}),
    ],
)
def test_every_device_once_and_every_axis_a_box(name, sizes):
    grid = laid(name, **sizes)
    assert grid.shape == tuple(sizes.values())
    assert len(set(grid.flat)) == grid.size
    for position in range(grid.ndim):
        # All groups of an axis have one shape, and are boxes: chips, cores and slices multiply.
        shapes = {extent(g) for g in groups(grid, position)}
        assert len(shapes) == 1
        spans = math.prod(shapes.pop())
        one = groups(grid, position)[0]
        cores, slices = len({d.core_on_chip for d in one}), len({d.slice_index for d in one})
        assert spans * cores * slices == len(one)


def test_the_axis_that_takes_first_gets_whole_rings():
    # 16 of 16 in one dimension: a closed ring, whichever axis asks first.
    grid = laid("v5e:16x16", fsdp=16, tensor=16)
    assert {tuple(sorted(extent(g)[:2])) for g in groups(grid, 1)} == {(1, 16)}
    # Of 4 x 4 x 8, tensor 4 takes a closed ring of 4 and leaves fsdp two whole dimensions ...
    grid = laid("v5p:4x4x8", "tensor", fsdp=32, tensor=4)
    assert {tuple(sorted(extent(g))) for g in groups(grid, 1)} == {(1, 1, 4)}
    assert {tuple(sorted(extent(g))) for g in groups(grid, 0)} == {(1, 4, 8)}
    # ... but fsdp, if it asks first, spreads over all three.
    grid = laid("v5p:4x4x8", "fsdp", fsdp=32, tensor=4)
    assert {tuple(sorted(extent(g))) for g in groups(grid, 0)} == {(2, 4, 4)}


def test_devices_of_a_chip_are_the_nearest_neighbours():
    grid = laid("tpu7x:4x4x4", fsdp=64, tensor=2)
    for pair in groups(grid, 1):
        assert pair[0].coords == pair[1].coords


def test_axes_that_share_a_dimension_are_near_in_the_order_they_took_it():
    # v5e:4x4 as tensor 2, context 2, fsdp 4: what takes first has direct neighbours.
    grid = laid("v5e:4x4", tensor=2, context=2, fsdp=4)
    apart = [
        {abs(np.subtract(a.coords, b.coords)).sum() for g in groups(grid, p)
         for a, b in itertools.pairwise(g)}
        for p in range(3)
    ]  # fmt: skip
    mesh = list(Strategy(tensor=2, context=2, fsdp=4).mesh)
    assert apart[mesh.index("tensor")] == {1}


def test_slices_lie_on_the_outermost_axis():
    grid = laid("v5p:4x4x4x2slices", data=2, fsdp=64)
    for group in groups(grid, 0):
        assert [d.slice_index for d in group] == [0, 1]
        assert group[0].coords == group[1].coords


def test_a_torus_that_is_turned_is_recognised():
    cluster = Cluster.from_name("v5p:4x4x8")
    placement = cluster.placement((4, 1, 1, 32, 1, 1), "tensor")
    turned = device_grid(devices_of((8, 4, 4)), {"fsdp": 32, "tensor": 4}, placement)
    assert {tuple(sorted(extent(g))) for g in groups(turned, 1)} == {(1, 1, 4)}


def test_a_plan_binds_to_the_wires_that_it_chose(models):
    step = sharding.train_step(models.decoder_loss, optax.sgd(1.0))
    params = models.decoder_params(jax.random.key(0))
    args = (params, step.optimizer.init(params), models.tokens(jax.random.key(0)))
    pins = sharding.Constraints(pinned={"fsdp": 4, "tensor": 2})
    plan = sharding.plan(step, args, cluster="v5e:2x4", constraints=pins)
    assert set(plan.placement) == {"fsdp", "tensor"}
    assert sharding.Plan.from_json(plan.to_json()).placement == plan.placement
    grid = device_grid(devices_of((2, 4)), plan.mesh, plan.placement)
    speeds = Cluster.from_name("v5e:2x4").axis_bandwidth((2, 1, 1, 4, 1, 1))
    assert min(speeds[AXES.index("tensor")], speeds[AXES.index("fsdp")]) >= 45e9
    # Both axes have lines of their own: one spans two chips, the other four.
    spans = [max(extent(g) for g in groups(grid, p)) for p in range(2)]
    assert sorted(map(math.prod, spans)) == [2, 4]
    # CPU devices have no coordinates: their order is kept.
    assert [d.id for d in plan.bind().mesh.devices.flat] == [d.id for d in jax.devices()]
