"""`jaxrl doctor`: is this machine ready, and if not, what is wrong and how to mend it.

Each check has a time limit, so that a device that hangs is reported like any other fault.
"""

import glob
import importlib.metadata
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

DISTRIBUTION = "jaxrl-safe"
GIB = 2**30
TESTED_PYTHONS = ((3, 11), (3, 12), (3, 13))
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check found.

    Attributes:
      name: what was looked at.
      status: "warn" where things work, but not as they could.
      detail: what was seen.
      remedy: what to do; empty where there is nothing to do.
      seconds: how long it took.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        """For a terminal.

        >>> print(Check(name="disk", status="warn", detail="full", remedy="free some").line())
        warn  disk         full
                           → free some
        """
        text = f"{self.status:<5} {self.name:<12} {self.detail}"
        return f"{text}\n{'':19}→ {self.remedy}" if self.remedy else text


Finding = tuple[Status, str, str]
"""Status, detail and remedy."""


def check_python() -> Finding:
    seen = f"{platform.python_version()} on {platform.platform()}"
    if sys.version_info[:2] not in TESTED_PYTHONS:
        return "warn", f"{seen}, with which this is not tested", "use Python 3.11, 3.12 or 3.13"
    return "ok", seen, ""


def check_packages() -> Finding:
    """Every requirement of the installed project, against what is there."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return (
            "warn",
            f"{DISTRIBUTION} is not installed; running from its source",
            "pip install -e . in the checkout",
        )
    seen, problems = [], []
    for name, minimum in _base_requirements(requirements):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is missing")
            continue
        if _numbers(version) < _numbers(minimum):
            problems.append(f"{name} {version} is older than {minimum}")
        if name in ("jax", "flax", "optax", "orbax-checkpoint"):
            seen.append(f"{name} {version}")
    if problems:
        return "fail", "; ".join(problems), f"pip install --upgrade {DISTRIBUTION}"
    return "ok", ", ".join(seen), ""


def _base_requirements(requirements: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and lower bound of each requirement that belongs to no extra."""
    for text in requirements:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?", text)
        if match and "extra ==" not in text:
            yield match[1], match[2] or "0"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def check_jaxlib() -> Finding:
    """jax, jaxlib and accelerator plugins have to come from one release."""
    names = [d.metadata["Name"] for d in importlib.metadata.distributions()]
    plugins = {n for n in names if n and re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", n)}
    versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", *sorted(plugins))}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    if len({_numbers(v) for v in versions.values()}) > 1:
        remedy = "pip install --upgrade jax jaxlib, and the plugin with them"
        return "warn", f"releases differ: {shown}", remedy
    return "ok", shown, ""


def check_devices() -> Finding:
    import jax

    devices = jax.devices()
    kinds = ", ".join(sorted({d.device_kind for d in devices}))
    seen = f"{len(devices)} × {kinds} ({jax.default_backend()})"
    if jax.process_count() > 1:
        seen += f", process {jax.process_index()} of {jax.process_count()}"
    if jax.default_backend() == "cpu":
        for pattern, what, extra in (
            ("/dev/nvidia[0-9]*", "an NVIDIA GPU", "cuda"),
            ("/dev/accel[0-9]*", "a TPU", "tpu"),
        ):
            if glob.glob(pattern):
                return (
                    "warn",
                    f"{seen}, but the machine has {what}",
                    f'pip install "{DISTRIBUTION}[{extra}]", and check JAX_PLATFORMS '
                    f"(now {os.environ.get('JAX_PLATFORMS') or 'not set'})",
                )
    return "ok", seen, ""


def check_memory() -> Finding:
    import jax

    total, free = host_memory_bytes()
    seen = f"host {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    for device in jax.local_devices()[:1]:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            used, limit = stats.get("bytes_in_use", 0), stats["bytes_limit"]
            seen += f"; each device {(limit - used) / GIB:.1f} of {limit / GIB:.1f} GiB"
    if free < 2 * GIB:
        return "warn", seen, "close other programs: the quick experiment needs about 2 GiB"
    return "ok", seen, ""


def host_memory_bytes() -> tuple[float, float]:
    """Total and available memory, the limit of a container included; NaN where unknown."""
    total, free = math.nan, math.nan
    info = Path("/proc/meminfo")
    if info.exists():
        entries = dict(re.findall(r"(\w+):\s+(\d+) kB", info.read_text()))
        total = float(entries["MemTotal"]) * 1024
        free = float(entries.get("MemAvailable", entries["MemFree"])) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
        free = total
    limit, used = (_read_number(f"/sys/fs/cgroup/memory.{n}") for n in ("max", "current"))
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (used or 0.0))
    return total, free


def _read_number(path: str) -> float | None:
    try:
        return float(Path(path).read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def check_collective() -> Finding:
    """A sum over all local devices, against the closed form."""
    import jax
    import jax.numpy as jnp

    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("devices",), devices=devices)
    rows = jax.device_put(
        jnp.arange(len(devices), dtype=jnp.float32), jax.NamedSharding(mesh, jax.P("devices"))
    )
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "devices"),
        mesh=mesh,
        in_specs=jax.P("devices"),
        out_specs=jax.P(),
    )
    began = time.perf_counter()
    found = float(jax.jit(total)(rows)[0])
    took = time.perf_counter() - began
    expected = len(devices) * (len(devices) - 1) / 2
    seen = f"sum over {len(devices)} device{'s' * (len(devices) > 1)} in {took:.2f} s"
    if found != expected:
        return "fail", f"{seen} gave {found}, not {expected}", "test the links between the devices"
    return "ok", seen, ""


def check_matmul() -> Finding:
    """The rate that everything else is measured against."""
    import jax
    import jax.numpy as jnp

    size = 1024
    x = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2:
        product(x).block_until_ready()
        count += 1
    rate = 2 * size**3 * count / (time.perf_counter() - began)
    exact = jnp.dot(x[:64], x, precision="highest")
    error = float(jnp.abs(product(x)[:64] - exact).max() / jnp.abs(exact).max())
    seen = f"{rate / 1e9:,.0f} Gflop/s in float32, relative error {error:.0e}"
    if error > 1e-4:
        return (
            "warn",
            seen,
            "float32 products are rounded here; for exact log-probabilities set "
            "JAX_DEFAULT_MATMUL_PRECISION=highest",
        )
    return "ok", seen, ""


def check_step() -> Finding:
    """Generates with a tiny decoder and makes one update from what it wrote."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxrl import recipes
    from jaxrl.learner import Learner, OptimizerConfig, lm_apply, lm_optimizer
    from jaxrl.models import Decoder, DecoderConfig
    from jaxrl.rollouts import Sampling, generate
    from jaxrl.types import Prompts, Rollouts

    began = time.perf_counter()
    config = DecoderConfig(vocab_size=16, layers=1, embed=16, heads=2, head_dim=8, mlp=16)
    model = Decoder(config, rngs=nnx.Rngs(0))
    prompts = Prompts(
        tokens=jnp.ones((2, 3), jnp.int32), mask=jnp.ones((2, 3), bool), ids=jnp.arange(2)
    )
    sampling = Sampling(max_new_tokens=4, eos_id=0, pad_id=0)
    written = generate(model, prompts, jax.random.key(1), sampling, group_size=2)
    scores = jnp.mean(written.tokens > 7, axis=-1, dtype=jnp.float32)
    rollouts = Rollouts(
        prompts=prompts,
        tokens=written.tokens,
        mask=written.mask,
        behaviour_log_probs=written.log_probs,
        reference_log_probs=written.log_probs,
        policy_version=jnp.zeros_like(written.tokens),
        rewards={"reward": scores},
        costs={"cost": scores - 0.5},
    )
    graph, params = nnx.split(model)
    learner = Learner(
        recipe=recipes.get("rloo", group_size=2),
        apply=lm_apply(graph, None, temperature=1.0),
        optimizer=lm_optimizer(OptimizerConfig()),
    )
    _, metrics = learner.update(learner.init({"policy": params}, num_prompts=2), rollouts)
    numbers = {name: float(value) for name, value in metrics.items()}
    seen = f"generation and update in {time.perf_counter() - began:.1f} s, compilation included"
    if not np.isfinite(numbers["loss"]) or numbers["skipped"]:
        return "fail", f"{seen}: loss is {numbers['loss']}", "report it, with `jaxrl doctor --json`"
    if numbers["sampler_gap"] > 1e-3:
        return (
            "warn",
            f"{seen}; log-probabilities of sampler and learner differ by "
            f"{numbers['sampler_gap']:.1e}",
            "set JAX_DEFAULT_MATMUL_PRECISION=highest",
        )
    return "ok", seen, ""


def check_disk(folder: Path) -> Finding:
    """Whether runs can be written, under the folder where they go."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return "fail", f"cannot write to {folder}: {error}", "give a folder that you own: --out"
    free = shutil.disk_usage(folder).free
    seen = f"{folder} is writable, {free / GIB:.1f} GiB free"
    if free < GIB:
        return "warn", seen, "free some space: checkpoints of the larger presets need gigabytes"
    return "ok", seen, ""


def check_checkpoint(folder: Path) -> Finding:
    """Saves and restores a small state."""
    import jax
    import jax.numpy as jnp

    from jaxrl.checkpoint import Checkpointer

    tree = {"w": jnp.arange(8.0), "key": jax.random.key(3), "step": 7}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        began = time.perf_counter()
        with Checkpointer(name, timeout_s=30.0) as checkpointer:
            checkpointer.save(7, tree)
            found = checkpointer.restore_latest(tree)
        took = time.perf_counter() - began
    if found is None or found.tree["step"] != 7 or not (found.tree["w"] == tree["w"]).all():
        return "fail", f"restored {found}, not what was saved", "check the disk under --out"
    return "ok", f"saved and restored in {took:.2f} s", ""


def checks(folder: Path) -> dict[str, Callable[[], Finding]]:
    """All checks by name, in order."""
    return {
        "python": check_python,
        "packages": check_packages,
        "jaxlib": check_jaxlib,
        "devices": check_devices,
        "memory": check_memory,
        "collective": check_collective,
        "matmul": check_matmul,
        "step": check_step,
        "disk": lambda: check_disk(folder),
        "checkpoint": lambda: check_checkpoint(folder),
    }


def examine(name: str, check: Callable[[], Finding], *, timeout_s: float) -> Check:
    """Runs one check; an exception or no answer within `timeout_s` is a finding too."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.append(check())
        except Exception as error:  # whatever it is, the person has to see it
            text = " ".join(str(error).split())[:300]
            found.append(("fail", f"{type(error).__name__}: {text}", _remedy(name)))

    began = time.perf_counter()
    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    worker.join(timeout_s)
    if not found:
        found.append(("fail", f"no answer after {timeout_s:g} s", _remedy(name)))
    status, detail, remedy = found[0]
    seconds = round(time.perf_counter() - began, 3)
    return Check(name=name, status=status, detail=detail, remedy=remedy, seconds=seconds)


_REMEDIES = {
    "devices": "JAX cannot start its devices: try JAX_PLATFORMS=cpu; if that works, the driver "
    "or another program on the accelerator is the cause",
    "collective": "the devices cannot reach each other: check the driver, NCCL_DEBUG=INFO on "
    "GPUs, the slice's health on TPUs",
    "step": "reinstall in a fresh virtual environment; if it stays, report it with --json",
    "checkpoint": "check space and rights of the folder, and the version of orbax-checkpoint",
}


def _remedy(name: str) -> str:
    return _REMEDIES.get(name, "reinstall in a fresh virtual environment")


def diagnose(folder: Path, *, timeout_s: float = 120.0) -> Iterator[Check]:
    """Runs every check in order, and gives each result as soon as it is there.

    Args:
      folder: where runs are written.
      timeout_s: limit of each check.
    """
    for name, check in checks(folder).items():
        yield examine(name, check, timeout_s=timeout_s)


def report(found: Sequence[Check]) -> dict[str, Any]:
    """The findings as JSON values."""
    return {"ok": all(c.status != "fail" for c in found), "checks": [asdict(c) for c in found]}
