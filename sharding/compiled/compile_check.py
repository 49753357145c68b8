"""Compiles a planned step for the machine that it was planned for, without that machine.

The step is lowered here, for a mesh without devices or of described ones, and compiled in a
process of its own: the TPU compiler is one to a process and may end it. `python -m
sharding.compiled.compile_check FOLDER` is that process. Needs the `aot` extra for TPUs, and for
GPUs the CUDA plugin of JAX.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.compiled.hlo import Group, Traffic, collectives, groups
from sharding.execution.execute import Execution, rewritten
from sharding.machines.topology import Cluster
from sharding.machines.torus import device_grid
from sharding.tracing.dims import product

_PLATFORMS = {"torus": "tpu", "switch": "cuda"}
# Of operations in the source, in a module's text.
_PLACES = re.compile(
    r'^#loc.*\n?|\s*loc\((?:#loc\d*|unknown|"[^"]*"(?:\(#loc\d*\))?)\)', re.MULTILINE
)
# Of what is kept of an answer: a new one where its figures come to mean something else. 2: peaks
# without vector memory; collectives of `shard_map`, which share a channel, apart.
_FORM = 2
# Chips that share a host, by torus dimension, unless the compiler is told otherwise.
_HOST = (2, 2, 1)
# Chips whose two cores the compiler takes for two devices unless it is told otherwise.
_MEGACORE = ("v4",)
# Calls of cuDNN's attention: forward, backward, and both with a mask.
_CUDNN = tuple(f"__cudnn$fmha{bias}Softmax{back}" for bias in ("", "ScaleBias")
               for back in ("", "Backward"))  # fmt: skip
# What JAX calls them, and cores that work as one device: a step may ask the mesh that it is traced
# under what it is for.
_KINDS = {"v4": ("TPU v4", 2), "v5e": ("TPU v5 lite", 1), "v5p": ("TPU v5", 2),
          "v6e": ("TPU v6 lite", 1), "tpu7x": ("TPU7x", 1)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler says of a planned step; bytes are of one device.

    Attributes:
      peak_bytes: the most that is alive at once, arguments and results included.
      argument_bytes: of the arguments.
      output_bytes: of the results.
      aliased_bytes: of results that take the place of arguments.
      groups: collectives by kind and size of group.
      compile_s: seconds of the compilation.
      predicted_bytes: what the plan predicted; None if it predicts nothing.
      predicted_collectives: the same of collectives.
      flops: of one device, by the compiler's cost analysis: what loops repeat counts once, what
        a kernel computes only as far as the kernel says it. None where it was not kept.
      accessed_bytes: of memory, of the same device and by the same count.
    """

    peak_bytes: int
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    groups: tuple[Group, ...]
    compile_s: float
    predicted_bytes: float | None = None
    predicted_collectives: Mapping[str, Traffic] = field(default_factory=dict)
    flops: float | None = None
    accessed_bytes: float | None = None

    @property
    def collectives(self) -> dict[str, Traffic]:
        """Kind to count and bytes."""
        return collectives(self.groups)

    @property
    def memory_error(self) -> float | None:
        """(predicted - compiled) / compiled; negative if the plan was too hopeful."""
        if self.predicted_bytes is None:
            return None
        return self.predicted_bytes / self.peak_bytes - 1

    @property
    def collective_error(self) -> float | None:
        """The same of the bytes of all collectives; None if nothing was predicted."""
        if self.predicted_bytes is None:
            return None
        compiled = moved_bytes(self.collectives)
        predicted = moved_bytes(self.predicted_collectives)
        return (predicted - compiled) / max(compiled, predicted, 1)

    def __str__(self) -> str:
        lines = [
            f"compiled in {self.compile_s:.1f} s: peak {self.peak_bytes / 1e9:.3f} GB a device, "
            f"arguments {self.argument_bytes / 1e9:.3f} GB"
        ]
        if self.predicted_bytes is not None:
            lines.append(f"predicted {self.predicted_bytes / 1e9:.3f} GB: {self.memory_error:+.1%}")
        for kind in sorted({*self.collectives, *self.predicted_collectives}):
            found = self.collectives.get(kind, Traffic(0, 0))
            line = f"{kind}: {found.count} of together {found.bytes / 1e6:.3f} MB"
            if self.predicted_bytes is not None:
                mine = self.predicted_collectives.get(kind, Traffic(0, 0))
                line += f", predicted {mine.bytes / 1e6:.3f} MB"
            lines.append(line)
        if self.collective_error is not None:
            lines.append(f"all collectives: {self.collective_error:+.1%}")
        return "\n".join(lines)


def moved_bytes(collectives: Mapping[str, Traffic]) -> int:
    """Bytes of all collectives together; a reduction is a scatter and a gather."""
    return sum((1 + (kind == "all-reduce")) * t.bytes for kind, t in collectives.items())


def check(
    step: Callable[..., Any],
    args: Sequence[Any],
    execution: Execution,
    cluster: Cluster,
    *,
    donate: Sequence[int] = (),
    placement: Mapping[str, Sequence[int]] | None = None,
    predicted_bytes: float | None = None,
    predicted_collectives: Mapping[str, Traffic] | None = None,
    timeout_s: float = 1200.0,
    answers: Path | None = None,
    options: Mapping[str, str] | None = None,
    **roles: Any,
) -> Report:
    """Compiles a planned step for a cluster.

    Args:
      step: the function.
      args: its arguments, arrays or shapes.
      execution: what the plan asks for; of its mesh only names and sizes are read.
      cluster: the machine.
      donate: positions of arguments whose memory results may take.
      placement: torus dimensions of the mesh axes, see `sharding.machines.torus.device_grid`.
      predicted_bytes: for the report.
      predicted_collectives: for the report.
      timeout_s: seconds until the compilation is given up.
      answers: folder in which the compiler's answers are kept, each under the digest of what it
        was asked: the program, the devices and the compiler's version. A program that is there
        is not compiled again.
      options: of the compiler, by name; its own defaults where None.
      roles: `state` and `data` of `sharding.plan`.

    Raises:
      RuntimeError: the compiler refused, is not installed or took too long; the message has its
        last words.
    """
    platform = "cpu" if cluster.chip.name == "cpu" else _PLATFORMS[cluster.chip.kind]
    sizes = dict(execution.mesh.shape)
    execution = replace(execution, mesh=_lowered_for(sizes, cluster, platform))
    lowered, text, donated = _lower(step, tuple(args), execution, platform, donate, roles)
    request = {
        "platform": platform,
        "mesh": sizes,
        "placement": dict(placement or {}),
        "topology": _topology(cluster, platform),
        "donated": donated,
    }
    if options:
        request["options"] = dict(options)
    kept = None
    if answers is not None:
        asked = json.dumps([_FORM, text, request, _compiler(platform)], sort_keys=True)
        kept = answers / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"
    if kept is not None and kept.exists():
        held = json.loads(kept.read_text())
    else:
        held = _asked(lowered, request, cluster, timeout_s)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            partly = kept.with_suffix(f".{os.getpid()}")  # whole or not at all, if interrupted
            partly.write_text(json.dumps(held))
            partly.replace(kept)
    held["groups"] = tuple(Group(**group) for group in held["groups"])
    return Report(
        **held, predicted_bytes=predicted_bytes, predicted_collectives=predicted_collectives or {}
    )


def _asked(
    lowered: bytes, request: Mapping[str, Any], cluster: Cluster, timeout_s: float
) -> dict[str, Any]:
    """What the compiler says, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="sharding-check-") as folder:
        Path(folder, "step.bin").write_bytes(lowered)
        Path(folder, "request.json").write_text(json.dumps(request))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "sharding.compiled.compile_check", folder],
                capture_output=True, text=True, timeout=timeout_s, check=False,
                env=_environment(request["platform"], product(request["mesh"].values())),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"compiling for {cluster.name} took more than {timeout_s:.0f} s; give it more time"
            ) from None
        answer = Path(folder, "answer.json")
        if done.returncode or not answer.exists():
            raise RuntimeError(
                f"compiling for {cluster.name} failed (exit {done.returncode}); TPUs need "
                f"`pip install jax[tpu]`, GPUs jax-cuda13-plugin: {_last_words(done.stderr)}"
            )
        return json.loads(answer.read_text())


def _last_words(stderr: str) -> str:
    """The error of a traceback, without the places that follow it."""
    lines = stderr.strip().splitlines()
    errors = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return "\n".join(lines[errors[-1] :] if errors else lines)[:800]


def _compiler(platform: str) -> list[str]:
    """Names and versions of what compiles for a platform."""
    found = [f"jax {jax.__version__}"]
    for name in {"tpu": ("libtpu",), "cuda": ("jax-cuda13-pjrt", "jax-cuda12-pjrt")}.get(
        platform, ()
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return found


def _lower(
    step: Callable[..., Any],
    args: tuple[Any, ...],
    execution: Execution,
    platform: str,
    donate: Sequence[int],
    roles: Mapping[str, Any],
) -> tuple[bytes, str, list[int]]:
    """The step as StableHLO for a mesh without devices, serialised and as text without places in
    the source, and which leaves it donates.
    """
    shapes = jax.eval_shape(lambda *a: a, *args)
    run = rewritten(step, shapes, execution, **roles)
    leaves, structure = jax.tree.flatten(shapes)
    out = jax.eval_shape(run, *shapes)
    into = execution.shardings(shapes, execution.inputs)
    back = execution.shardings(out, execution.outputs)

    def flat(*leaves: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(run(*jax.tree.unflatten(structure, leaves))))

    # An argument that is not read lies on the devices all the same; dropped, it would come back
    # without a sharding, and count whole.
    jitted = jax.jit(flat, in_shardings=tuple(into), out_shardings=tuple(back), keep_unused=True)
    with jax.sharding.use_abstract_mesh(execution.mesh.abstract_mesh):
        exported = jax.export.export(
            jitted, platforms=[platform],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(n) for n in _CUDNN],
        )(*leaves)  # fmt: skip
    ends = np.cumsum([0, *(len(jax.tree.leaves(a)) for a in shapes)]).tolist()
    donated = [i for arg in donate for i in range(ends[arg], ends[arg + 1])]
    return bytes(exported.serialize()), _PLACES.sub("", exported.mlir_module()), donated


def _lowered_for(sizes: Mapping[str, int], cluster: Cluster, platform: str) -> Mesh | AbstractMesh:
    """The mesh that a step is lowered for: without devices, where that can be.

    cuDNN's calls want devices when they are lowered. Those that the CUDA plugin describes do;
    without the plugin the step is lowered with the compiler's own attention.
    """
    if platform == "cuda":
        try:
            found = topologies.get_topology_desc(platform=platform, **_topology(cluster, platform))
        except RuntimeError:  # the plugin is not installed, which compiling says better
            return abstract_mesh(sizes, cluster)
        shape = tuple(sizes.values()) or (1,)
        devices = np.asarray(found.devices[: product(shape)]).reshape(shape)
        return Mesh(devices, tuple(sizes) or ("single",))
    return abstract_mesh(sizes, cluster)


def _environment(platform: str, devices: int) -> dict[str, str]:
    environment = dict(os.environ)
    # The compilers are asked for by name; the process itself computes nothing.
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
                    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
    # A compiled step may hold the mesh's devices: no cache of another process can give it back.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if platform == "cpu":
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return environment


def _topology(cluster: Cluster, platform: str) -> dict[str, Any]:
    """Arguments of `get_topology_desc`; {} for a CPU."""
    if platform == "tpu":
        shape = cluster.shape if len(cluster.shape) > 1 else (*cluster.shape, 1)
        named: dict[str, Any] = {
            "topology_name": f"{cluster.chip.name}:{'x'.join(map(str, shape))}"
        }
        if cluster.chip.name in _MEGACORE and cluster.chip.devices_per_chip == 1:
            named["chip_config_name"] = "megacore"
        # A part of a host, or hosts in a row of single chips.
        whole = (*shape, 1, 1)[: len(_HOST)]
        bounds = [math.gcd(size, chips) for size, chips in zip(whole, _HOST, strict=True)]
        if tuple(bounds) != _HOST:
            named["chips_per_host_bounds"] = bounds
        return named | ({"num_slices": cluster.slices} if cluster.slices > 1 else {})
    if platform == "cuda":
        target = resources.files("sharding") / "catalog" / f"{cluster.chip.name}_target.txt"
        if not target.is_file():
            raise RuntimeError(
                f"no compiler target is known for {cluster.chip.name}; the catalogue has h100"
            )
        nodes, chips = cluster.shape
        return {"target_config": target.read_text(), "topology": f"1x{nodes}x{chips}"}
    return {}


def _devices(request: Mapping[str, Any]) -> np.ndarray:
    """The devices of the mesh, where neighbours of the inner axes are close."""
    sizes = tuple(request["mesh"].values()) or (1,)
    if request["platform"] == "cpu":
        return np.asarray(jax.devices()[: product(sizes)]).reshape(sizes)
    described = topologies.get_topology_desc(platform=request["platform"], **request["topology"])
    devices = list(described.devices)
    if request["placement"]:
        return device_grid(devices, request["mesh"], request["placement"])
    if request["platform"] == "tpu" and "num_slices" not in request["topology"]:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    devices.sort(key=lambda d: (getattr(d, "slice_index", 0), d.id))
    return np.asarray(devices).reshape(sizes)


def _compile(folder: Path) -> dict[str, Any]:
    request = json.loads((folder / "request.json").read_text())
    exported = jax.export.deserialize(bytearray((folder / "step.bin").read_bytes()))
    mesh = Mesh(_devices(request), tuple(request["mesh"]) or ("single",))
    shapes = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
        for aval, sharding in zip(exported.in_avals, exported.in_shardings_jax(mesh), strict=True)
    ]
    out = tuple(s or NamedSharding(mesh, PartitionSpec()) for s in exported.out_shardings_jax(mesh))
    jitted = jax.jit(exported.call, out_shardings=out, donate_argnums=tuple(request["donated"]))
    began = time.perf_counter()
    compiled = jitted.lower(*shapes).compile(compiler_options=request.get("options"))
    took = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    cost: Mapping[str, float] = compiled.cost_analysis() or {}
    text = compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError(f"this {request['platform']} compiler does not say what it made")
    # A TPU's peak counts what lies in the fast memory of the chip, too, which is none of the
    # memory that a plan divides: no more lies there than arguments, results and temporaries.
    most = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes
        + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip
    return {
        "peak_bytes": int(min(memory.peak_memory_in_bytes, most)),
        "argument_bytes": int(memory.argument_size_in_bytes),
        "output_bytes": int(memory.output_size_in_bytes),
        "aliased_bytes": int(memory.alias_size_in_bytes),
        "groups": [asdict(group) for group in groups(text)],
        "compile_s": took,
        "flops": cost.get("flops"),
        "accessed_bytes": cost.get("bytes accessed"),
    }


def abstract_mesh(sizes: Mapping[str, int], cluster: Cluster | None = None) -> AbstractMesh:
    """A mesh without devices, which says of what kind they would be where a cluster is given.

    Of GPUs it says CPU: cuDNN's calls cannot be lowered without devices; see `_lowered_for`.
    """
    device = None
    if cluster is not None:
        kind, cores = _KINDS.get(cluster.chip.name, ("cpu", None))
        platform = "tpu" if cluster.chip.name in _KINDS else "cpu"
        device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    names = tuple(sizes) or ("single",)
    # From JAX 0.11 on an abstract mesh's axes are explicit unless it says otherwise.
    automatic = (AxisType.Auto,) * len(names)
    return AbstractMesh(
        tuple(sizes.values()) or (1,), names, abstract_device=device, axis_types=automatic
    )


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    (_folder / "answer.json").write_text(json.dumps(_compile(_folder)))
