"""The device halves of publishing and of receiving weights, as programs of a division."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.deployment.division import DEVICE_TRAFFIC
from jaxrl.deployment.parts import Part
from jaxrl.deployment.programs import Program, Side
from kernels import sparse_delta
from kernels.sparse_delta import forecast
from kernels.sparse_delta.backends import Backend
from sharding import Cluster, Plan, leaf_path
from sharding.compiled.compile_check import abstract_mesh
from sharding.compiled.footprint import footprint


def encoding(update: Part, machine: Cluster) -> Part:
    """Finding what an update changed, on the shards of the learner's parameters.

    Its resident bytes are those that stay while it is coded and sent, beside the next updates: two
    versions, and what was found.

    Args:
      update: the learner's program.
      machine: the learner's.
    """
    params = update.program.args[0].params["policy"]
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    lies = _shardings(weights, update.plan, machine, "0/params/policy")

    backend = _backend(machine)

    def delta(old, new):
        # The compilers' own devices, where it is lowered for them.
        here, shardings = jax.sharding.get_abstract_mesh(), lies
        if update.plan.mesh and here.axis_names == tuple(update.plan.mesh):
            shardings = jax.tree.map(lambda lie: NamedSharding(here, lie.spec), lies)
        return sparse_delta.diff(old, new, shardings=shardings, backend=backend).records

    specs = {leaf_path(p): s.spec for p, s in jax.tree_util.tree_leaves_with_path(lies)}
    records = jax.eval_shape(delta, weights, weights)
    plan = Plan(
        mesh=update.plan.mesh,
        inputs={f"{i}/{path}": spec for i in (0, 1) for path, spec in specs.items()},
        outputs=_everywhere(records, PartitionSpec(tuple(update.plan.mesh))),
        placement=update.plan.placement,
        program="delta encode", cluster=machine.name,
        step=delta, args=(weights, weights), where=machine,
    )  # fmt: skip
    version = _shard_bytes(weights, lies)
    found = _bytes(records) / math.prod(update.plan.mesh.values())
    resident = 2 * version + found
    if backend == "reference":
        mesh = abstract_mesh(plan.mesh, machine)
        memory = footprint(delta, (weights, weights), plan.execution(mesh), machine).peak.total
    else:
        memory = resident + forecast.comparing_bytes(weights, lies, backend=backend)
    return _part("delta encode", "learner", plan, version, memory=memory, resident=resident)


def applying(prefill: Part, machine: Cluster, *, density: float) -> list[Part]:
    """Building the next weights beside those that serve, on the shards of an actor's policy.

    Leaf by leaf, as `kernels.sparse_delta.apply` does: one program for those that are alike, which
    is called once for each of them. Its resident bytes are the two versions of its leaf. Leaves
    that no kernel takes go by the host and are in none.

    Args:
      prefill: the actor's program that reads the policy where it lies.
      machine: of an actor.
      density: share of the weights that change.
    """
    weights = prefill.program.args[0]
    lies = _shardings(weights, prefill.plan, machine, "0")
    row, devices = PartitionSpec(forecast.DEVICE_AXIS), math.prod(prefill.plan.mesh.values())
    found = []
    for one in forecast.applying(weights, lies, density=density, backend=_backend(machine)):
        rebuilt = jax.eval_shape(one.run, *one.args)
        plan = Plan(
            mesh={forecast.DEVICE_AXIS: devices},
            inputs=_everywhere(one.args, row),
            outputs=_everywhere(rebuilt, row),
            program="delta apply", cluster=machine.name,
            step=one.run, args=one.args, where=machine,
        )  # fmt: skip
        # A variable's array is its "value".
        leaves = ", ".join(leaf.removesuffix("/value").split("/")[-1] for leaf in one.leaves)
        version = float(one.shard_bytes)
        found.append(
            _part(
                f"delta apply {leaves}", "actor", plan, version,
                # The kernels change a copy of the old weights where it lies.
                memory=(_bytes(one.args) + _bytes(rebuilt)) / devices + one.working_bytes,
                resident=2 * version, calls=len(one.leaves),
            )
        )  # fmt: skip
    return found


def by_host(prefill: Part, machine: Cluster, applied: Sequence[Part]) -> float:
    """Bytes of a device's policy that the programs of `applying` leave to the host."""
    weights = prefill.program.args[0]
    whole = _shard_bytes(weights, _shardings(weights, prefill.plan, machine, "0"))
    return whole - sum(part.resident_bytes / 2 * part.program.calls for part in applied)


def _part(
    name: str,
    side: Side,
    plan: Plan,
    version: float,
    *,
    memory: float,
    resident: float,
    calls: int = 1,
) -> Part:
    """`version` is of what it reads, in bytes of a device."""
    assert plan.step is not None
    assert plan.args is not None
    assert plan.where is not None
    return Part(
        program=Program(
            name=name, side=side, step=plan.step, args=plan.args, parameters=name, calls=calls
        ),
        plan=plan,
        step_s=DEVICE_TRAFFIC * version / plan.where.chip.hbm_bytes_per_s,
        memory_bytes=memory,
        resident_bytes=resident,
    )


def _shardings(weights: Any, plan: Plan, machine: Cluster, under: str) -> Any:
    """Where a plan wants the weights, which it has as an argument at some path."""
    mesh = abstract_mesh(plan.mesh, machine)
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
    lies = [NamedSharding(mesh, plan.inputs[f"{under}/{path}"]) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(weights), lies)


def _everywhere(tree: Any, spec: PartitionSpec) -> dict[str, PartitionSpec]:
    """One spec for all leaves, by path."""
    return {leaf_path(path): spec for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _shard_bytes(weights: Any, lies: Any) -> float:
    """Of a device, of a tree of shapes that lies by a tree of shardings."""
    return math.fsum(
        float(math.prod(own.shard_shape(x.shape))) * x.dtype.itemsize
        for own, x in zip(jax.tree.leaves(lies), jax.tree.leaves(weights), strict=True)
    )


def _bytes(tree: Any) -> float:
    return math.fsum(float(x.size) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _backend(machine: Cluster) -> Backend:
    if machine.chip.name == "cpu":
        return "reference"
    return "tpu" if machine.is_torus else "gpu"
