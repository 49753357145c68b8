"""Do the device kernels give the definition's bits on this accelerator, and how fast are they?

    python -m experiments.delta_bench.device [--out FOLDER] [--tiny]

Runs on the first device that JAX finds: NVIDIA GPU, TPU, or a CPU, where `--tiny` interprets the
GPU kernels. Takes no input and stops for no failure: what one kernel raises is recorded and the
next one goes on. About three minutes on an H200, most of it compilation.

Weights are a base of bf16 normals (σ = 0.02) with 1 % of the elements moved by one step, repeated
in tensors of 2^28 elements until 8·10^9 elements or 3/4 of the memory are reached. Every kernel is
first compared with `reference` on the base, which XLA runs on the host; then timed over all
tensors, one call each, as medians. Its speed counts the bytes that no implementation can avoid, and
is set against a copy measured in the same run.

Then weights go the whole way on the device: `diff`, `finish`, and the steps of `apply`, of which
those that the device does are told from the host's.

To expect on an H200: a copy of about 4.3 TB/s, at least 80 % of it for pack, 60 % for compact, and
at most 12 ms each for the device halves of encode (compact) and apply (class_counts + expand).
`compact_by_stores` is the one-pass variant that is off until it has run on a chip: where its bits
are the same and it is the faster, `gpu.compact` should become it.
"""

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.delta_bench.round_trip import DEVICE_STEPS, round_trip
from kernels.sparse_delta import reference
from kernels.sparse_delta.digest import digest_box
from kernels.sparse_delta.elements import element_format

BF16 = element_format("bfloat16")
DENSITY = 0.01
ELEMENTS = 8_000_000_000
MEMORY_SHARE = 0.75
# Bytes an element that have to be moved: weights read and written, a bit or a record of 8 bytes
# for a change. Master weights take 4 bytes.
LEAST_BYTES = {
    "pack": 4 + 1 / 8,
    "compact": 4 + 8 * DENSITY,
    "class_counts": 2,
    "expand": 4,
    "epilogue": 8 + 1 / 8,
    "digest": 2,
    "compact_by_stores": 4 + 8 * DENSITY,
}
WANTED = {"pack": 80.0, "compact": 60.0, "compact_by_stores": 60.0}  # per cent of the copy
WANTED_MS = {"encode": 12.0, "apply": 12.0}  # of ELEMENTS elements
HALVES = {"encode": ("compact",), "apply": ("class_counts", "expand")}
ROUND_TRIP_TENSORS = 8  # at most; what the host does takes longest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured.

    Attributes:
      base: rows and columns of the weights that are repeated.
      repeats: of the base in one tensor, along the rows.
      tile: rows and columns.
      rounds: timed rounds over all tensors.
      elements: wanted in total.
    """

    base: tuple[int, int] = (4096, 4096)
    repeats: int = 16
    tile: tuple[int, int] = (256, 512)
    rounds: int = 10
    elements: int = ELEMENTS

    @property
    def tensor(self) -> int:
        return self.base[0] * self.base[1] * self.repeats


TINY = Scale(base=(128, 512), repeats=2, tile=(64, 512), rounds=2, elements=1 << 17)


@dataclasses.dataclass
class Weights:
    """The base pair, what belongs to it, and how its repetition is laid out."""

    old: jax.Array
    new: jax.Array
    thresholds: jax.Array
    slots: reference.Slots
    capacity: int


def run(
    out: Path,
    *,
    tiny: bool = False,
    names: Sequence[str] = tuple(LEAST_BYTES),
    scale: Scale | None = None,
) -> dict[str, Any]:
    """Checks and times every kernel; writes `device_NAME.json` into a folder and prints a table.

    The file is written after every step, so that a process that hangs or dies leaves what it had.
    A kernel that leaves the device unusable (an illegal address) ends this process's part: a fresh
    one does the rest.

    Args:
      out: the folder, made if absent.
      tiny: a size for a CPU, where the kernels for GPUs are interpreted.
      names: of the kernels.
      scale: how much is measured, where not all of it: then no kernel is timed by how many
        vectors it loads at a time, and none is tried in a fresh process.

    Returns:
      What was written.
    """
    device, sweeps = jax.devices()[0], scale is None
    scale = scale or (TINY if tiny else Scale())
    found: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "scale": dataclasses.asdict(scale),
        "density": DENSITY,
        "kernels": {},
        "errors": {},
    }
    kind = "".join(c if c.isalnum() else "_" for c in device.device_kind).strip("_").lower()
    path = out / f"device_{kind}.json"
    write = functools.partial(_write, path, found)
    with _recorded(found["errors"], "weights"):
        weights = _make_weights(scale)
        count = _tensor_count(device, scale)
        found["elements"] = count * scale.tensor
        with _recorded(found["errors"], "copy"):
            found["copy_gb_s"] = _copy_gb_s(count, scale)
        if device.platform == "tpu":
            names = [name for name in names if name != "compact_by_stores"]
        for place, name in enumerate(names):
            found["kernels"][name] = _measure(name, weights, count, scale, device, found)
            print(name, found["kernels"][name], flush=True)
            write()
            if not _is_usable(device):
                rest = _in_fresh_process(out, tiny, names[place + 1 :] if sweeps else (), path)
                found["kernels"] |= rest.get("kernels", {})
                found["errors"] |= {"device": f"unusable after {name}"} | rest.get("errors", {})
                break
        else:
            if sweeps:
                with _recorded(found["errors"], "sweep"):
                    found["sweep"] = _sweep(weights, count, scale, device)
            del weights
            with _recorded(found["errors"], "round_trip"):
                found["round_trip"] = round_trip(
                    (scale.base[0] * scale.repeats, scale.base[1]),
                    min(count, ROUND_TRIP_TENSORS),
                    density=DENSITY,
                    rounds=2,
                )
    found["halves"] = _halves(found["kernels"])
    write()
    _print_table(found)
    print(f"written: {path}")
    return found


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")


def _is_usable(device: Any) -> bool:
    try:
        return int(jax.device_put(jnp.int32(1), device) + 1) == 2
    except Exception:  # a kernel that failed may have left it in any state: that is the answer
        return False


def _in_fresh_process(out: Path, tiny: bool, names: Sequence[str], path: Path) -> dict[str, Any]:
    if not names:
        return {}
    folder = out / f"after_{len(names)}"
    command = [sys.executable, "-m", "experiments.delta_bench.device", "--out", str(folder)]
    subprocess.run([*command, *["--tiny"] * tiny, "--only", *names], check=False)
    written = folder / path.name
    return json.loads(written.read_text()) if written.exists() else {}


@contextmanager
def _recorded(errors: dict[str, str], name: str) -> Iterator[None]:
    """Notes what is raised, and goes on."""
    try:
        yield
    except Exception as error:  # one kernel that fails must not hide what the others do
        errors[name] = f"{type(error).__name__}: {error}"[:2000]
        traceback.print_exc()


def _make_weights(scale: Scale) -> Weights:
    """Made by NumPy and jnp on the host, so that the reference stems from another compiler."""
    rng = np.random.default_rng(0)
    extents = (1, *scale.base)
    bits = rng.normal(0, 0.02, extents).astype(np.float32).view(np.uint32)
    old = (bits >> 16).astype(np.uint16)
    old[0, 0, :6] = [0x0000, 0x8000, 0x7FC0, 0xFF80, 0x7F80, 0x0001]  # ±0, NaN, ±inf, subnormal
    step = np.where(rng.random(extents) < 0.5, 1, -1).astype(np.uint16)
    new = np.where(rng.random(extents) < DENSITY, old + step, old)
    with _on_host():
        thresholds = reference.default_thresholds(jnp.asarray(old[0, ::64]), BF16)
        slots = _slots(jnp.asarray(old), jnp.asarray(new), thresholds, scale.tile)
    put = functools.partial(jax.device_put, device=jax.devices()[0])
    capacity = reference.capacity_for(DENSITY)
    return Weights(put(old), put(new), put(thresholds), put(slots), capacity)


def _on_host() -> Any:
    try:
        return jax.default_device(jax.devices("cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves no CPU: then the accelerator checks itself
        return jax.default_device(jax.devices()[0])


def _slots(
    old: jax.Array, new: jax.Array, thresholds: jax.Array, tile: tuple[int, int]
) -> reference.Slots:
    before, after = (reference.tile_matrix(bits, tile) for bits in (old, new))
    keys, changes = [], []
    for index in range(before.shape[0]):  # the one-hot ranks of a tile take 32 bytes an element
        classes = reference.classes_of(before[index], thresholds, BF16)
        keys.append(np.asarray(classes << 8 | reference._ranks(classes)).astype(np.uint32))
        change = reference.change_of(before[index], after[index], BF16)
        changes.append(np.asarray(change).astype(np.uint32))
    words = np.stack(keys) << 16 | np.stack(changes)
    differs = np.asarray(before != after)
    place = np.cumsum(differs, axis=2) - 1
    room = int(differs.sum(2).max())
    slots = np.full((*differs.shape[:2], room), reference.EMPTY_SLOT, np.uint32)
    at = np.nonzero(differs)
    slots[at[0], at[1], place[at]] = words[at]
    tiles = np.arange(len(slots), dtype=np.int32)
    used = np.asarray(len(slots), np.int32)
    stored = np.ascontiguousarray(slots.transpose(0, 2, 1))
    return reference.Slots(jnp.asarray(tiles), jnp.asarray(used), jnp.asarray(stored))


def _repeat_slots(slots: reference.Slots, repeats: int) -> reference.Slots:
    """Those of the base repeated along its rows, which repeats its tiles."""
    count = slots.tiles.shape[0]
    return reference.Slots(
        jnp.arange(count * repeats, dtype=jnp.int32),
        slots.used * repeats,
        jnp.concatenate([slots.keys] * repeats),
    )


def _tensor_count(device: Any, scale: Scale) -> int:
    """Pairs of tensors for the wanted elements, or as many as fit with master weights beside."""
    stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    wanted = -(-scale.elements // scale.tensor)
    room = int(stats.get("bytes_limit", 0) * MEMORY_SHARE) // (8 * scale.tensor)
    return max(1, min(wanted, room)) if stats else wanted


def _copy_gb_s(count: int, scale: Scale) -> float:
    """Bytes read and written a second by flipping a bit of every word, in units of 10^9."""
    flip = jax.jit(lambda words: words ^ jnp.uint32(1))
    shape = (scale.base[0] * scale.repeats, scale.base[1] // 2)
    words = [jnp.full(shape, i, jnp.uint32) for i in range(count)]
    seconds = _median_s(lambda: [flip(one) for one in words][-1], scale.rounds)
    return 2 * 4 * count * words[0].size / seconds / 1e9


def _median_s(call: Callable[[], Any], rounds: int) -> float:
    """Median wall-clock time; work is queued in order: waiting for the last waits for all."""
    for _ in range(2):
        jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _implementation(device: Any) -> tuple[ModuleType, dict[str, Any]]:
    if device.platform == "tpu":
        from kernels.sparse_delta import tpu

        return tpu, {}
    from kernels.sparse_delta import gpu

    return gpu, {"interpret": True} if device.platform == "cpu" else {}


def _function(name: str, module: Any, weights: Weights, scale: Scale) -> Callable[..., Any]:
    """The kernel as a function of old, new and master weights and the slots, all on a device."""
    tile, thresholds = scale.tile, weights.thresholds
    by_stores = getattr(module, "compact_by_stores", module.compact)  # only the GPU has two ways
    calls: dict[str, Callable[..., Any]] = {
        "pack": lambda old, new, master, slots: module.pack(old, new, tile=tile),
        "compact": lambda old, new, master, slots: module.compact(
            old, new, thresholds, fmt=BF16, tile=tile, capacity=weights.capacity
        ),
        "compact_by_stores": lambda old, new, master, slots: by_stores(
            old, new, thresholds, fmt=BF16, tile=tile, capacity=weights.capacity
        ),
        "class_counts": lambda old, new, master, slots: module.class_counts(
            old, thresholds, fmt=BF16, tile=tile
        ),
        "expand": lambda old, new, master, slots: module.expand(
            old, slots, thresholds, fmt=BF16, tile=tile
        ),
        "epilogue": lambda old, new, master, slots: module.epilogue(master, old, tile=tile),
    }
    return calls[name]


class _Bound:
    """A module whose functions are called with further options."""

    def __init__(self, module: ModuleType, options: dict[str, Any]) -> None:
        self.module, self.options = module, options

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(getattr(self.module, name), **self.options)


def _digest(old: jax.Array, new: jax.Array, master: Any, slots: Any) -> jax.Array:
    strides = (old.shape[1] * old.shape[2], old.shape[2], 1)
    return digest_box(old, jnp.zeros(2, jnp.uint32), strides)


def _master_of(new: jax.Array) -> jax.Array:
    """Master weights that round to the new ones."""
    return lax.bitcast_convert_type(new.astype(jnp.uint32) << 16 | 0x1234, jnp.float32)


def _measure(
    name: str,
    weights: Weights,
    count: int,
    scale: Scale,
    device: Any,
    found: dict[str, Any],
) -> dict[str, Any]:
    """Checks and times one kernel; what either raises is part of the result."""
    result: dict[str, Any] = {}
    module = _Bound(*_implementation(device))
    call = _digest if name == "digest" else _function(name, module, weights, scale)
    defined = _digest if name == "digest" else _function(name, reference, weights, scale)
    base = (weights.old, weights.new, _master_of(weights.new))
    with _recorded(result, "check_error"):
        with _on_host():
            # Made from NumPy arrays: an array that lies on the accelerator would be used there.
            hosted = jax.tree.map(np.asarray, (*base, weights.slots))
            limits = jnp.asarray(np.asarray(weights.thresholds))
            on_host = dataclasses.replace(weights, thresholds=limits)
            if name != "digest":
                defined = _function(name, reference, on_host, scale)
            expected = jax.jit(defined)(*jax.tree.map(jnp.asarray, hosted))
        actual = jax.jit(call)(*base, weights.slots)
        result["same_bits"] = _equal(actual, expected)
        if not result["same_bits"]:
            result["different"] = _differences(actual, expected)
    with _recorded(result, "time_error"):
        slots = _repeat_slots(weights.slots, scale.repeats)
        result["median_ms"] = 1e3 * _time(name, call, base, slots, count, scale)
        elements = count * scale.tensor
        moved = LEAST_BYTES[name] * elements
        result["gb_s"] = moved / result["median_ms"] / 1e6
        result["ms_for_8e9"] = result["median_ms"] * ELEMENTS / elements
        if "copy_gb_s" in found:
            result["per_cent_of_copy"] = 100 * result["gb_s"] / found["copy_gb_s"]
    if name in WANTED:
        result["wanted_per_cent"] = WANTED[name]
    return result


def _equal(actual: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in pairs)


def _differences(actual: Any, expected: Any) -> list[int]:
    """Unequal elements of each result."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return [int((np.asarray(one) != np.asarray(other)).sum()) for one, other in pairs]


def _time(
    name: str,
    call: Callable[..., Any],
    base: tuple[jax.Array, ...],
    slots: reference.Slots,
    count: int,
    scale: Scale,
) -> float:
    """Seconds for one pass over all tensors, of which only those that the kernel reads are made."""
    repeat = jax.jit(lambda one: jnp.concatenate([one] * scale.repeats, axis=1))
    reads = {
        "epilogue": (0, 2),
        "pack": (0, 1),
        "compact": (0, 1),
        "compact_by_stores": (0, 1),
    }.get(name, (0,))
    none = jnp.zeros((), jnp.uint8)
    tensors = [
        [repeat(base[i]) if i in reads else none for i in range(len(base))] for _ in range(count)
    ]
    if name == "expand":
        # In place: the weights drift from round to round, but the work stays the same.
        in_place = jax.jit(call, donate_argnums=0)

        def one_round() -> Any:
            for arrays in tensors:
                arrays[0] = in_place(*arrays, slots)
            return tensors[-1][0]

    else:
        compiled = jax.jit(call)

        def one_round() -> Any:
            last = None
            for arrays in tensors:
                last = compiled(*arrays, none)
            return last

    return _median_s(one_round, scale.rounds)


def _halves(kernels: dict[str, Any]) -> dict[str, Any]:
    """Times of the device halves of encode and apply, for 8·10^9 elements."""
    halves = {}
    for half, names in HALVES.items():
        times = [kernels.get(name, {}).get("ms_for_8e9") for name in names]
        if None not in times:
            halves[half] = {"ms_for_8e9": sum(times), "wanted_ms": WANTED_MS[half]}
    return halves


def _sweep(weights: Weights, count: int, scale: Scale, device: Any) -> dict[str, dict[str, float]]:
    """Times in ms of the GPU kernels by how many 16-byte vectors a thread loads at a time."""
    if device.platform == "tpu":
        return {}
    from kernels.sparse_delta import gpu_registers

    usual, found = gpu_registers.VECTORS_IN_FLIGHT, {}
    base = (weights.old, weights.new, _master_of(weights.new))
    slots = _repeat_slots(weights.slots, scale.repeats)
    few = min(count, 8)
    try:
        for vectors in (usual // 4, usual // 2, usual, usual * 2, usual * 4):
            gpu_registers.VECTORS_IN_FLIGHT = vectors
            for name in ("pack", "class_counts", "expand", "epilogue"):
                errors: dict[str, Any] = found.setdefault(name, {})
                with _recorded(errors, f"{vectors}_error"):
                    module = _Bound(*_implementation(device))
                    call = _function(name, module, weights, scale)
                    seconds = _time(name, call, base, slots, few, scale)
                    errors[str(vectors)] = 1e3 * seconds * count / few
    finally:
        gpu_registers.VECTORS_IN_FLIGHT = usual
    return found


def _print_table(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    amount = f"{found.get('elements', 0):.2e} elements of bf16"
    copy = f"copy {found.get('copy_gb_s', float('nan')):.0f} GB/s"
    table = Table(title=f"{found['device']}, jax {found['jax']}, {amount}, {copy}")
    for heading in ("kernel", "same bits", "ms", "GB/s", "% of copy", "wanted", "error"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for name, result in found["kernels"].items():
        errors = [str(result[key]) for key in ("check_error", "time_error") if key in result]
        numbers = [result.get(key) for key in ("median_ms", "gb_s", "per_cent_of_copy")]
        table.add_row(
            name,
            str(result.get("same_bits", "—")),
            *("—" if number is None else f"{number:.1f}" for number in numbers),
            f"≥ {WANTED[name]:.0f} %" if name in WANTED else "",
            "; ".join(errors)[:60],
        )
    console = Console()
    console.print(table)
    for half, result in found.get("halves", {}).items():
        console.print(
            f"{half}: {result['ms_for_8e9']:.1f} ms for 8·10⁹ elements, wanted ≤ "
            f"{result['wanted_ms']:.0f} ms"
        )
    if "round_trip" in found:
        _print_round_trip(console, found["round_trip"])
    for name, error in found["errors"].items():
        console.print(f"{name} failed: {error[:200]}")


def _print_round_trip(console: Any, found: dict[str, Any]) -> None:
    scale = ELEMENTS / found["elements"]
    console.print(
        f"diff, finish and apply of {found['elements']:.2e} elements: bits the same: "
        f"{found['same_bits']}, {found['bits_per_change']:.2f} bits a change; ms for 8·10⁹:"
    )
    for half, steps in DEVICE_STEPS.items():
        on_device = sum(found["ms"][step] for step in steps) * scale
        console.print(f"  {half}, on the device ({', '.join(steps)}): {on_device:.1f}")
    for step, ms in found["ms"].items():
        console.print(f"  {step}: {ms * scale:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/bench_sparse_delta"))
    parser.add_argument("--only", nargs="+", choices=LEAST_BYTES, default=tuple(LEAST_BYTES))
    parser.add_argument("--tiny", action="store_true", help="a size for a CPU")
    options = parser.parse_args()
    run(options.out, tiny=options.tiny, names=options.only)
