"""The device halves of publishing and of receiving weights, as programs of a division."""

import math
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


def encoding(update: Part, machine: Cluster) -> Part:
    """Finding what an update changed, on the shards of the learner's parameters.

    Args:
      update: the learner's program.
      machine: the learner's.
    """
    params = update.program.args[0].params["policy"]
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    lies = _shardings(weights, update.plan, machine, "0/params/policy")

    def delta(old, new):
        return sparse_delta.diff(old, new, shardings=lies, backend=_backend(machine)).records

    specs = {leaf_path(p): s.spec for p, s in jax.tree_util.tree_leaves_with_path(lies)}
    records = jax.eval_shape(delta, weights, weights)
    size = 2 * _shard_bytes(weights, lies) + _bytes(records) / math.prod(update.plan.mesh.values())
    plan = Plan(
        mesh=update.plan.mesh,
        inputs={f"{i}/{path}": spec for i in (0, 1) for path, spec in specs.items()},
        outputs=_everywhere(records, PartitionSpec(tuple(update.plan.mesh))),
        placement=update.plan.placement,
        program="delta encode", cluster=machine.name,
        step=delta, args=(weights, weights), where=machine,
    )  # fmt: skip
    return _part("delta encode", "learner", plan, size, _shard_bytes(weights, lies), machine)


def applying(prefill: Part, machine: Cluster, *, density: float) -> Part | None:
    """Building the next weights beside those that serve, on the shards of an actor's policy.

    None where all of them are so small that they go by the host.

    Args:
      prefill: the actor's program that reads the policy where it lies.
      machine: of an actor.
      density: share of the weights that change.
    """
    weights = prefill.program.args[0]
    lies = _shardings(weights, prefill.plan, machine, "0")
    step, args = forecast.applying(weights, lies, density=density, backend=_backend(machine))
    if not args[0]:
        return None
    devices = math.prod(prefill.plan.mesh.values())
    row = PartitionSpec(forecast.DEVICE_AXIS)
    found = jax.eval_shape(step, *args)
    plan = Plan(
        mesh={forecast.DEVICE_AXIS: devices},
        inputs=_everywhere(args, row),
        outputs=_everywhere(found, row),
        program="delta apply", cluster=machine.name,
        step=step, args=args, where=machine,
    )  # fmt: skip
    size = (_bytes(args) + _bytes(found)) / devices
    return _part("delta apply", "actor", plan, size, _shard_bytes(weights, lies), machine)


def _part(name: str, side: Side, plan: Plan, size: float, weights: float, machine: Cluster) -> Part:
    """`size` is of everything, `weights` of one version of the weights; bytes of a device."""
    assert plan.step is not None
    assert plan.args is not None
    return Part(
        program=Program(name=name, side=side, step=plan.step, args=plan.args, parameters=name),
        plan=plan,
        step_s=DEVICE_TRAFFIC * weights / machine.chip.hbm_bytes_per_s,
        memory_bytes=size,
        resident_bytes=weights,
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
