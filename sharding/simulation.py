"""What a plan costs that somebody else made."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from sharding.compiled.compile_check import abstract_mesh
from sharding.compiled.footprint import footprint
from sharding.costs.constants import Calibration
from sharding.costs.strategies import Strategy
from sharding.execution.execute import TrainStep
from sharding.execution.specs import layout
from sharding.execution.step_trace import trace_step
from sharding.explain import Prediction
from sharding.machines.topology import AXES, Cluster
from sharding.plan import Plan
from sharding.search.solver import Candidate, evaluate
from sharding.tracing.trace import Leaf, Trace


def simulate(
    step: Callable[..., Any],
    args: Sequence[Any],
    *,
    mesh: Mapping[str, int],
    shardings: Any,
    cluster: str | Cluster | Sequence[Any],
    state: Sequence[int] | None = None,
    data: Sequence[int] | None = None,
    remat: str = "none",
    microbatches: int = 1,
    calibration: Calibration | None = None,
) -> Plan:
    """Costs a plan that somebody else made.

    What a mesh axis does is read off what it divides: the batch (data parallelism), the batch
    and parameters (FSDP), sequences, experts, stacked layers (stages), or else tensors.

    Args:
      step: as in `plan`.
      args: as in `plan`.
      mesh: axis name to size, outermost first.
      shardings: `PartitionSpec`s, or `NamedSharding`s, in the structure of `args`; None is whole.
      cluster: as in `plan`.
      state: as in `plan`.
      data: as in `plan`.
      remat: what layers recompute, a name of `strategies.REMAT`.
      microbatches: of accumulation, or of the pipeline.
      calibration: as in `plan`.

    Raises:
      ValueError: the mesh is not the cluster's size, or specs do not fit the arguments.
    """
    where = find_cluster(cluster)
    traced = trace_step(step, args, state=state, data=data)
    specs = _given_specs(traced, args, shardings)
    uses = _uses(traced, mesh, specs)
    degrees: dict[str, Any] = dict.fromkeys(AXES, 1)
    for axis, use in uses.items():
        degrees[use] *= mesh[axis]
    strategy = Strategy(**degrees, remat=remat, microbatches=microbatches, sequence_parallel=False)
    (candidate,) = evaluate(traced.program, [strategy], where, calibration=calibration)
    notes = [f"mesh axis {axis} is taken for {use} parallelism" for axis, use in uses.items()]
    batch = tuple(a for a, use in uses.items() if use in ("data", "fsdp", "expert"))
    # Results and activations lie as a plan of these degrees would have them.
    named = {use: tuple(a for a, its in uses.items() if its == use) for use in AXES}
    placed = layout(traced, strategy)
    gradients = {}
    if isinstance(step, TrainStep):
        gradients = {path.partition("/")[2]: spec for path, spec in specs.items()
                     if path.startswith("0/")}  # fmt: skip
    made = Plan(
        mesh=dict(mesh),
        inputs=specs,
        outputs={path: _renamed(spec, named) for path, spec in placed.outputs.items()},
        activations={
            dim: tuple(a for use in held for a in named[use])
            for dim, held in placed.activations.items()
        },
        gradients=gradients,
        batch=batch,
        donate=returned(args, traced),
        remat=remat,
        accumulation_steps=microbatches if strategy.stage == 1 else 1,
        microbatches=microbatches if strategy.stage > 1 else 1,
        prediction=predicted(candidate),
        notes=(*where.warnings, *notes, *without_rule(traced)),
        program=traced.program.name,
        cluster=where.name,
        in_tree=traced.in_tree,
        step=step,
        args=tuple(jax.eval_shape(lambda *a: a, *args)),
        where=where,
        state=None if state is None else tuple(state),
        data=None if data is None else tuple(data),
    )
    return with_footprint(made)


def _renamed(spec: PartitionSpec, named: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    entries = []
    for entry in spec:
        held = (entry,) if isinstance(entry, str) else entry or ()
        entries.append(tuple(axis for use in held for axis in named[use]) or None)
    return PartitionSpec(*entries)


def with_footprint(plan: Plan) -> Plan:
    """A plan whose memory and collectives are those of the program that it will run."""
    assert plan.step is not None
    assert plan.args is not None
    assert plan.where is not None
    assert plan.prediction is not None
    found = footprint(
        plan.step, plan.args, plan.execution(abstract_mesh(plan.mesh)), plan.where,
        donate=plan.donate, state=plan.state, data=plan.data)  # fmt: skip
    held = found.peak
    prediction = dataclasses.replace(
        plan.prediction,
        memory_bytes=held.total,
        memory_breakdown={"arguments": held.arguments, "results": held.results,
                          "temporary": held.temporary,
                          "host": plan.prediction.memory_breakdown.get("host", 0.0)},
        collectives=found.collectives,
    )  # fmt: skip
    return dataclasses.replace(plan, prediction=prediction)


def returned(args: Sequence[Any], traced: Trace) -> tuple[int, ...]:
    """Positions of arguments in whose place a result comes back: what a caller would donate."""

    def parts(tree: Any, leaves: Sequence[Leaf]) -> list[Any]:
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        whole = jax.tree.unflatten(tree, shapes)
        return list(whole) if isinstance(whole, (tuple, list)) else [whole]

    def kind(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure, tuple((x.shape, str(x.dtype)) for x in leaves)

    free = [kind(part) for part in parts(traced.out_tree, traced.outputs)]
    found, start = [], 0
    for i, part in enumerate(parts(traced.in_tree, traced.inputs)):
        count = len(jax.tree.leaves(args[i]))
        held = any(leaf.role != "data" for leaf in traced.inputs[start : start + count])
        start += count
        if count and held and kind(part) in free:
            free.remove(kind(part))
            found.append(i)
    return tuple(found)


def find_cluster(cluster: str | Cluster | Sequence[Any]) -> Cluster:
    """A cluster from its name or file, from JAX devices, or as it is."""
    if isinstance(cluster, Cluster):
        return cluster
    if isinstance(cluster, str):
        return Cluster.from_name(cluster)
    return Cluster.from_devices(list(cluster))


def placement_of(strategy: Strategy, cluster: Cluster) -> dict[str, tuple[int, ...]]:
    """The torus dimensions of every mesh axis of a strategy; see `Cluster.placement`."""
    return cluster.placement([getattr(strategy, axis) for axis in AXES], strategy.first)


def predicted(candidate: Candidate) -> Prediction:
    """What a candidate is predicted to cost."""
    return Prediction(
        step_time_s=candidate.step_s,
        memory_bytes=candidate.memory_bytes,
        breakdown=candidate.terms,
        memory_breakdown=candidate.memory_terms,
    )


def without_rule(traced: Trace) -> list[str]:
    """What the program does that the cost model has no rule for, in words."""
    return [f"no rule for {name}: replicated" for name in traced.program.unknown]


def _given_specs(traced: Trace, args: Sequence[Any], shardings: Any) -> dict[str, PartitionSpec]:
    """Specs by path, from a tree in the structure of the arguments or of a prefix of it."""
    whole = PartitionSpec()

    def is_spec(node: Any) -> bool:
        return node is None or isinstance(node, PartitionSpec) or hasattr(node, "spec")

    def spread(node: Any, tree: Any) -> Any:
        spec = whole if node is None else getattr(node, "spec", node)
        return jax.tree.map(lambda _: spec, tree)

    spreads = jax.tree.map(spread, tuple(shardings), tuple(args), is_leaf=is_spec)
    leaves = jax.tree.leaves(spreads, is_leaf=lambda node: isinstance(node, PartitionSpec))
    return {leaf.path: spec for leaf, spec in zip(traced.inputs, leaves, strict=True)}


def _uses(
    traced: Trace, mesh: Mapping[str, int], specs: Mapping[str, PartitionSpec]
) -> dict[str, str]:
    """Mesh axis to the kind of parallelism that it stands for."""
    divides: dict[str, set[str]] = {axis: set() for axis in mesh}
    for leaf in traced.inputs:
        for factors, entry in zip(leaf.factors, specs[leaf.path], strict=False):
            axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            for axis in axes:
                if axis not in mesh:
                    raise ValueError(f"spec of {leaf.path} names {axis!r}; the mesh is {mesh}")
                kinds = {traced.splits.kinds.get(atom, "") for atom in factors}
                if set(factors) & traced.layer_atoms:
                    kinds = {"stage"}
                if leaf.role in ("param", "optimizer") and not kinds & {"stage", "expert"}:
                    kinds = {"tensor" if "tensor" in kinds else "param"}
                divides[axis] |= kinds
    found = {}
    for axis, kinds in divides.items():
        if "data" in kinds:
            found[axis] = "fsdp" if "param" in kinds else "expert" if "expert" in kinds else "data"
        else:
            order = ("stage", "expert", "tensor", "context")
            found[axis] = next((kind for kind in order if kind in kinds),
                               "tensor" if "param" in kinds else "data")  # fmt: skip
    return found
