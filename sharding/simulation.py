"""What a plan costs that somebody else made."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from sharding.compiled.compile_check import abstract_mesh
from sharding.compiled.footprint import Footprint, compiler_of, footprint
from sharding.costs.constants import Calibration
from sharding.costs.strategies import Strategy
from sharding.execution.execute import TrainStep
from sharding.execution.specs import layout
from sharding.execution.step_trace import trace_step
from sharding.explain import Prediction
from sharding.machines.topology import AXES, Cluster
from sharding.plan import Plan
from sharding.programs.fused import planning
from sharding.programs.program import Program
from sharding.search.solver import Candidate, evaluate
from sharding.tracing.arguments import abstract
from sharding.tracing.kept import Kept
from sharding.tracing.trace import Leaf, Trace
from sharding.tracing.walk import WHILE


def simulate(
    step: Callable[..., Any] | Program,
    args: Any = (),
    *,
    mesh: Mapping[str, int],
    shardings: Any = None,
    cluster: str | Cluster | Sequence[Any],
    state: Sequence[int] | None = None,
    data: Sequence[int] | None = None,
    remat: str = "none",
    microbatches: int = 1,
    calibration: Calibration | None = None,
) -> Plan:
    """Costs a plan that somebody else made.

    What a mesh axis does is read off what it divides: the batch (data parallelism), the batch
    and parameters (FSDP), sequences, experts, stacked layers (stages), or else tensors. Of a
    description, which has no arrays, the name of the axis says it.

        sharding.simulate(sharding.transformer(layers=80, d_model=8192, ...),
                          mesh={"fsdp": 64, "tensor": 2}, cluster="v5p:4x4x8")

    Args:
      step: as in `plan`.
      args: as in `plan`.
      mesh: axis name to size, outermost first; of a description, names of "data", "fsdp",
        "tensor", "context", "expert" and "stage".
      shardings: `PartitionSpec`s, or `NamedSharding`s, in the structure of `args`; None is whole.
      cluster: as in `plan`.
      state: as in `plan`.
      data: as in `plan`.
      remat: what layers recompute, a name of `strategies.REMAT`.
      microbatches: of accumulation, or of the pipeline.
      calibration: as in `plan`.

    Returns:
      A plan with these specs and what it is predicted to cost.

    Raises:
      ValueError: the mesh is not the cluster's size, or specs do not fit the arguments.
    """
    where = find_cluster(cluster)
    if isinstance(step, Program):
        return _described(step, args, mesh, shardings, where, remat, microbatches, calibration)
    with planning(where.platform):
        traced = trace_step(step, args, state=state, data=data)
    specs = _given_specs(traced, args, shardings)
    uses = _uses(traced, mesh, specs)
    degrees: dict[str, Any] = dict.fromkeys(AXES, 1)
    for axis, use in uses.items():
        degrees[use] *= mesh[axis]
    strategy = Strategy(**degrees, remat=remat, microbatches=microbatches, sequence_parallel=False)
    (candidate,) = evaluate(traced.program, [strategy], where, calibration=calibration)
    made = _as_given(step, traced, where, candidate, mesh, specs, uses)
    return with_footprint(
        dataclasses.replace(
            made,
            donate=returned(args, traced),
            args=abstract(args),
            state=None if state is None else tuple(state),
            data=None if data is None else tuple(data),
        )
    )


def _as_given(
    step: Callable[..., Any],
    traced: Trace,
    where: Cluster,
    candidate: Candidate,
    mesh: Mapping[str, int],
    specs: Mapping[str, PartitionSpec],
    uses: Mapping[str, str],
) -> Plan:
    """The plan that has given specs; results and activations lie as for a plan of its degrees."""
    strategy = candidate.strategy
    named = {use: tuple(a for a, its in uses.items() if its == use) for use in AXES}
    placed = layout(traced, strategy)
    gradients = {}
    if isinstance(step, TrainStep):
        gradients = {path.partition("/")[2]: spec for path, spec in specs.items()
                     if path.partition("/")[0] == "0"}  # fmt: skip
    notes = [f"mesh axis {axis} is taken for {use} parallelism" for axis, use in uses.items()]
    return Plan(
        mesh=dict(mesh),
        inputs=specs,
        outputs={path: _renamed(spec, named) for path, spec in placed.outputs.items()},
        activations={
            dim: tuple(a for use in held for a in named[use])
            for dim, held in placed.activations.items()
        },
        gradients=gradients,
        batch=tuple(a for a, use in uses.items() if use in ("data", "fsdp", "expert")),
        remat=strategy.remat,
        accumulation_steps=strategy.microbatches if strategy.stage == 1 else 1,
        microbatches=strategy.microbatches if strategy.stage > 1 else 1,
        prediction=predicted(candidate),
        notes=(*where.warnings, *notes, *without_rule(traced)),
        program=traced.program.name,
        cluster=where.name,
        in_tree=traced.in_tree,
        step=step,
        where=where,
    )


def _described(
    program: Program,
    args: Any,
    mesh: Mapping[str, int],
    shardings: Any,
    where: Cluster,
    remat: str,
    microbatches: int,
    calibration: Calibration | None,
) -> Plan:
    if args or shardings is not None:
        raise ValueError("a description has no arguments: leave out args and shardings")
    unknown = sorted(set(mesh) - set(AXES))
    if unknown:
        raise ValueError(
            f"mesh axes {unknown} of a description stand for nothing; name them {', '.join(AXES)}"
        )
    degrees: dict[str, Any] = dict(mesh)
    strategy = Strategy(**degrees, remat=remat, microbatches=microbatches)
    (candidate,) = evaluate(program, [strategy], where, calibration=calibration)
    return described_plan(program, where, candidate, ())


def described_plan(
    program: Program, where: Cluster, candidate: Candidate, pipeline: tuple[int, ...]
) -> Plan:
    """The plan of a program that is described and not written, with what it is predicted to cost.

    Args:
      program: the description.
      where: the cluster.
      candidate: the strategy and its cost.
      pipeline: layers of every stage, or ().
    """
    strategy = candidate.strategy
    limit = where.memory_bytes
    notes = [*where.warnings, "planned from a description: memory is the search's own sums"]
    if candidate.memory_bytes > limit and not where.is_mixed:
        notes.append(
            f"does not fit: {candidate.memory_bytes / 1e9:.1f} GB of a device's "
            f"{limit / 1e9:.1f} GB"
        )
    return Plan(
        mesh=strategy.mesh,
        remat=strategy.remat,
        accumulation_steps=strategy.microbatches if strategy.stage == 1 else 1,
        pipeline=pipeline,
        microbatches=strategy.microbatches if strategy.stage > 1 else 1,
        offload=strategy.offload,
        sequence_parallel=strategy.sequence_parallel and strategy.tensor > 1,
        placement=placement_of(strategy, where),
        prediction=predicted(candidate),
        notes=tuple(notes),
        program=program.name,
        cluster=where.name,
        where=where,
    )


def _renamed(spec: PartitionSpec, named: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    entries = []
    for entry in spec:
        held = (entry,) if isinstance(entry, str) else entry or ()
        entries.append(tuple(axis for use in held for axis in named[use]) or None)
    return PartitionSpec(*entries)


_FOOTPRINTS: Kept[Footprint] = Kept()


def with_footprint(plan: Plan, traced: Trace | None = None) -> Plan:
    """A plan whose memory and collectives are those of the program that it will run.

    Args:
      plan: of a step.
      traced: the step; with it, what was found of a plan is kept for all that run alike.
    """
    step, args, where = plan.step, plan.args, plan.where
    assert step is not None
    assert args is not None
    assert where is not None
    assert plan.prediction is not None
    execution = plan.execution(abstract_mesh(plan.mesh))

    def follow() -> Footprint:
        return footprint(
            step, args, execution, where, donate=plan.donate, state=plan.state, data=plan.data
        )

    if traced is None:
        found = follow()
    else:
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
        key = (structure, shapes, execution.key, compiler_of(where), plan.donate, plan.state,
               plan.data)  # fmt: skip
        found = _FOOTPRINTS.get(step, key, traced.closed.jaxpr, follow)
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
    said = {
        WHILE: "how often a while loop runs is not known: it is costed once",
        "shard_map": "what runs within shard_map is divided as it says itself, and not costed",
    }
    return [said.get(name, f"no rule for {name}: replicated") for name in traced.program.unknown]


def _given_specs(traced: Trace, args: Sequence[Any], shardings: Any) -> dict[str, PartitionSpec]:
    """Specs by path, from a tree in the structure of the arguments or of a prefix of it."""
    whole = PartitionSpec()

    def is_spec(node: Any) -> bool:
        return node is None or isinstance(node, PartitionSpec) or hasattr(node, "spec")

    def spread(node: Any, tree: Any) -> Any:
        spec = whole if node is None else getattr(node, "spec", node)
        return jax.tree.map(lambda _: spec, tree)

    given = (None,) * len(args) if shardings is None else tuple(shardings)
    spreads = jax.tree.map(spread, given, tuple(args), is_leaf=is_spec)
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
