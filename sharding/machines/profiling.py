"""Measures the machine that is here: products, memory and collectives, in under a minute.

The result is a `Cluster` whose `measured` constants take the place of the calibrated ones, so that
a plan for it is costed by what these devices did. What is not measured (overlap, attention) stays
calibrated. All devices work at once, as they do in a step.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.optimize import nnls

from sharding.machines.topology import AXES, Cluster, catalog, find_chip, node_shape
from sharding.machines.torus import device_grid

# Edges of square products, from those that a unit hardly notices to those that fill it.
_EDGES = (256, 512, 1024, 2048, 4096, 8192, 16384)
# Bytes of an array a device in passes over memory, and of the result of a gather.
_PASS_BYTES = tuple(2**e for e in range(22, 31, 2))
_GATHER_BYTES = tuple(2**e for e in range(14, 29, 2))
# Operations that follow on one another in one measurement of a small one.
_CHAIN = 256
# A run this long tells its rate: longer ones cost time and tell no more.
_LONG_S = 0.1
_REPEATS = 3


def profile(devices: Sequence[Any] | None = None, *, budget_s: float = 40.0) -> Cluster:
    """Measures devices, and returns the cluster that they are.

    Args:
      devices: JAX devices; all of this process's backend when None.
      budget_s: seconds after which no larger size is begun; each of the four measurements may
        take a quarter. The whole stays under a minute at the default.

    Returns:
      A cluster that `sharding.plan` takes, and that `to_json` writes for `--cluster FILE.json`.
      Of a chip that the catalogue knows, the nominal figures stay and `measured` holds the shares
      reached; of another, and of CPUs, the figures are those measured.

    Raises:
      ValueError: a budget that is not positive.
    """
    if budget_s <= 0:
        raise ValueError(f"a budget in seconds is needed: {budget_s=}")
    devices = list(jax.devices() if devices is None else devices)
    part = budget_s / 4
    everywhere = Mesh(np.asarray(devices), ("all",))
    kernel_s = _kernel_time(everywhere)
    rates = {
        name: max(_product_rates(everywhere, dtype, kernel_s, part / 2))
        for name, dtype in (("bf16", jnp.bfloat16), ("fp32", jnp.float32))
    }
    hbm = max(_pass_rates(everywhere, kernel_s, part))
    cluster = _described(devices, rates, hbm)
    chip = cluster.chip
    per_device = 1 / chip.devices_per_chip
    measured = {
        "kernel_s": kernel_s,
        "matmul": min(1.0, rates["bf16"] / (chip.peak_flops["bf16"] * per_device)),
        "hbm": min(1.0, hbm / (chip.hbm_bytes_per_s * per_device)),
    }
    for axis, share, latency in (("fsdp", "link", "link_s"), ("data", "network", "network_s")):
        found = _gathers(cluster, devices, axis, part / 2)
        if found is not None:
            measured[latency], nominal, reached = found[0], *found[1:]
            measured[share] = min(1.0, reached / nominal)
    return replace(cluster, measured=measured)


def _described(devices: Sequence[Any], rates: dict[str, float], hbm: float) -> Cluster:
    """The cluster of the devices, with the figures of its chip where they are known."""
    platform = devices[0].platform
    kind = str(getattr(devices[0], "device_kind", platform)).lower()
    known = None if platform == "cpu" else find_chip(kind)
    if known is not None:
        cluster = Cluster.from_devices(devices)
        # No share is above 1: a chip that is faster than its nominal figure raises it.
        peaks = {**known.peak_flops, "fp32": rates["fp32"] * known.devices_per_chip}
        peaks["bf16"] = max(peaks["bf16"], rates["bf16"] * known.devices_per_chip)
        return replace(cluster, chip=replace(cluster.chip, peak_flops=peaks))
    base = catalog()["cpu"]
    shape = node_shape(devices)
    chip = replace(
        base,
        name="cpu" if platform == "cpu" else kind,
        peak_flops=rates,
        hbm_bytes_per_s=hbm,
        memory_bytes=_memory(devices),
        chips_per_host=shape[1],
        source="measured by sharding.profile",
    )
    return Cluster.of(chip, shape, name=f"{kind} x {len(devices)}")


def _memory(devices: Sequence[Any]) -> float:
    """Bytes of a device: what its allocator says, else its share of the host's."""
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host / max(1, sum(d.process_index == devices[0].process_index for d in devices))


def _seconds(run: Callable[..., Any], *args: Any) -> float:
    """The fastest of some runs: what slows a run down is not the machine's rate."""
    jax.block_until_ready(run(*args))  # compiles
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - began)
        if times[-1] > 2 * _LONG_S:
            break
    return min(times)


def _within(sizes: Sequence[int], budget_s: float) -> Iterator[int]:
    """Sizes, ascending, until the time is over; the first in any case."""
    end = time.perf_counter() + budget_s
    for size in sizes:
        yield size
        if time.perf_counter() > end:
            return


def _each(mesh: Mesh, run: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> float:
    """Seconds of a function of an array of a shape that every device has of its own."""
    spec = PartitionSpec(mesh.axis_names)
    whole = (mesh.size * shape[0], *shape[1:])
    x = jax.device_put(jnp.full(whole, 0.5, dtype), NamedSharding(mesh, spec))
    local = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    return _seconds(jax.jit(local), x)


def _kernel_time(mesh: Mesh) -> float:
    """Seconds that an operation takes which does hardly anything."""

    def chain(x: Any) -> Any:
        return jax.lax.fori_loop(0, _CHAIN, lambda _, x: jnp.sort(x, axis=-1) * 0.5, x)

    def none(x: Any) -> Any:
        return jnp.sort(x, axis=-1) * 0.5

    shape = (8, 8)
    many, one = (_each(mesh, run, shape, jnp.float32) for run in (chain, none))
    # A sort and a multiplication: two kernels an iteration.
    return max(0.0, (many - one) / (2 * (_CHAIN - 1)))


def _product_rates(mesh: Mesh, dtype: Any, kernel_s: float, budget_s: float) -> Iterator[float]:
    """FLOP/s of a device in square products of growing size."""
    for edge in _within(_EDGES, budget_s):
        # Several after one another, so that the launch of the program does not count.
        count = max(1, min(16, round((2048 / edge) ** 3)))

        def run(x: Any, count: int = count) -> Any:
            return jax.lax.fori_loop(0, count, lambda _, y: (y @ x) * jnp.asarray(1e-3, x.dtype), x)

        took = _each(mesh, run, (edge, edge), dtype)
        yield 2 * edge**3 * count / max(took - kernel_s * count, 0.1 * took)
        if took / count > _LONG_S:
            return


def _pass_rates(mesh: Mesh, kernel_s: float, budget_s: float) -> Iterator[float]:
    """Bytes/s of a device's memory in passes that read and write an array."""
    for size in _within(_PASS_BYTES, budget_s):
        took = _each(mesh, lambda x: x * 1.5 + 1.0, (size // 4,), jnp.float32)
        yield 2 * size / max(took - kernel_s, 0.1 * took)
        if took > _LONG_S:
            return


def _gathers(
    cluster: Cluster, devices: Sequence[Any], axis: str, budget_s: float
) -> tuple[float, float, float] | None:
    """(seconds a step, nominal and reached bytes/s) of gathers within or between nodes.

    t = α·⌈log₂ n⌉ + V·(n-1)/n / B, as `sharding.costs.collectives.all_gather` has it, fitted to
    gathers of growing size by least squares of relative errors. None where there is nothing to
    gather over: "fsdp" is within a node or slice, "data" between them.
    """
    inside = min(cluster.node_size, len(devices))
    between = len(devices) // inside
    members = inside if axis == "fsdp" else between
    if members == 1:
        return None
    degrees = [{"fsdp": inside, "data": between}.get(a, 1) for a in AXES]
    sizes = {name: n for name, n in (("data", between), ("fsdp", inside)) if n > 1}
    grid = device_grid(devices, sizes, cluster.placement(degrees, "fsdp"))
    mesh = Mesh(grid, tuple(sizes))
    spec = PartitionSpec(tuple(sizes))
    rest = PartitionSpec(tuple(name for name in sizes if name != axis) or None)

    def gather(x: Any) -> Any:
        return jax.lax.all_gather(x, axis, tiled=True)

    run = jax.jit(jax.shard_map(gather, mesh=mesh, in_specs=spec, out_specs=rest, check_vma=False))
    rows, times = [], []
    for size in _within(_GATHER_BYTES, budget_s):
        # Every group gathers `size` bytes.
        count = size * mesh.size // members // 4 // mesh.size * mesh.size
        x = jax.device_put(jnp.ones((count,), jnp.float32), NamedSharding(mesh, spec))
        times.append(_seconds(run, x))
        rows.append([np.ceil(np.log2(members)), size * (members - 1) / members])
        if times[-1] > _LONG_S:
            break
    took = np.asarray(times)
    (latency, per_byte), _ = nnls(np.asarray(rows) / took[:, None], np.ones(len(took)))
    nominal = cluster.axis_bandwidth(degrees, "fsdp")[AXES.index(axis)]
    reached = 1 / per_byte if per_byte else nominal
    return float(latency), float(nominal), float(reached)
