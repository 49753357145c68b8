"""Which devices compute what: the mesh that `--mesh` asks for, and a plan of the model on it."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.safety.config import SafetyConfig
from jaxrl.models.decoder import LOGICAL_AXES, logical_axes
from sharding import Plan

AXES = ("data", "fsdp", "tensor")
"""What a mesh may have: `data` divides prompts, `fsdp` divides prompts and every parameter along
the width of the model (ZeRO stage 3), `tensor` divides heads, feed-forward and vocabulary."""
BATCH_AXES = ("data", "fsdp")
_RULES = {
    "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor",
    "expert": "tensor",
}  # fmt: skip
assert set(_RULES) <= set(LOGICAL_AXES)


def mesh_of(text: str) -> dict[str, int]:
    """Axes and sizes of a mesh; {} is one device without a mesh.

    What "auto" and "planned" stand for is written out by `planned_mesh.with_mesh` where a run
    begins; an "auto" that still stands in a single process is one device.

    Raises:
      ValueError: "planned", or "auto" in several processes, still stands; an unknown axis, a size
        that is none, or more or fewer devices than there are.

    >>> mesh_of("fsdp=4,tensor=2")
    {'fsdp': 4, 'tensor': 2}
    """
    if text == "auto" and jax.process_count() == 1:
        return {}
    there = jax.device_count()
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                "mesh is auto, planned, or axes of "
                f"{', '.join(AXES)} with their sizes, as data=2,fsdp=4: "
                f"got {text!r}"
            )
        sizes[axis] = int(size)
    wanted = math.prod(sizes.values())
    if wanted > there or (jax.process_count() > 1 and wanted != there):
        raise ValueError(
            f"mesh {text} has {wanted} devices, and there are {there} in {jax.process_count()} "
            "processes; several processes have to use all"
        )
    return sizes if wanted > 1 else {}


def plan_of(mesh: Mapping[str, int], params: Any) -> Plan:
    """Where a tree of parameters lies on a mesh, and what is trained on with it.

    Args:
      mesh: of `mesh_of`.
      params: `nnx.State`s that name their axes. A named axis that a mesh axis does not divide,
        such as two key heads among four devices, stays whole.
    """
    if not mesh:
        return Plan.single_device()
    axes = logical_axes(params)
    named = zip(
        jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    )  # fmt: skip
    sizes = {
        (name, n) for leaf, names in named for name, n in zip(names, np.shape(leaf), strict=True)
    }
    rules = {
        name: axis
        for name, axis in _RULES.items()
        if axis in mesh and all(n % mesh[axis] == 0 for found, n in sizes if found == name)
    }
    batch = tuple(axis for axis in BATCH_AXES if axis in mesh)
    return Plan.from_rules(axes, mesh=mesh, rules=rules, batch=batch)


def check_batches(config: SafetyConfig, mesh: Mapping[str, int]) -> None:
    """Everything that is divided among devices is known before a long stage begins.

    Raises:
      ValueError: a batch that the mesh does not divide; names the flag.
    """
    ways = math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)
    for name, size in divided_batches(config).items():
        if size % ways:
            raise ValueError(
                f"{ways} devices divide every batch: {name} is {size}; make it a multiple, or "
                "give the devices to --mesh tensor"
            )


def divided_batches(config: SafetyConfig) -> dict[str, int]:
    """Sizes of everything whose leading axis is divided among devices, by what sets them."""
    sizes = {"--evaluation.batch": config.evaluation.batch}
    if config.sft.steps:
        sizes["--sft.batch"] = config.sft.batch
    for name in config.algorithms:
        recipe = config.recipe(name)
        prompts = config.samples_per_step // recipe.group_size
        sizes[f"prompts of a step of {name} (--samples-per-step / {recipe.group_size})"] = prompts
        sizes[f"fresh prompts of a step of {name}"] = recipe.fresh_prompts(prompts)
    return sizes
