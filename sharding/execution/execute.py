"""Runs a step as planned: jit with shardings, and what a plan adds to the inside of a step."""

import contextlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sharding.execution import stages
from sharding.execution.rewrite import Rewrite
from sharding.paths import leaf_path
from sharding.tracing.trace import Leaf, Trace, trace

# The kind of memory that transfers to and from a device take least time.
HOST = "pinned_host"


@dataclass(frozen=True, eq=False)
class TrainStep:
    """(parameters, optimiser state, *data) -> (parameters, optimiser state, loss).

    A step that says what its loss and its optimiser are, so that a plan may choose
    rematerialisation, gradient accumulation and pipeline stages. Called by itself it is the plain
    step. Make one with `train_step`.

    Attributes:
      loss: (parameters, *data) -> a scalar, the *mean* over the batch of the data: micro-batches
        are averaged. Data without a batch dimension (class weights, a key) is whole in all of
        them.
      optimizer: an `optax.GradientTransformation`, or anything with its `init` and `update`.
    """

    loss: Callable[..., Any]
    optimizer: Any

    def __call__(self, params: Any, opt_state: Any, *data: Any) -> tuple[Any, Any, Any]:
        loss, gradients = jax.value_and_grad(self.loss)(params, *data)
        return *self.update(params, opt_state, gradients), loss

    def update(self, params: Any, opt_state: Any, gradients: Any) -> tuple[Any, Any]:
        """Parameters and optimiser state after a gradient."""
        changes, opt_state = self.optimizer.update(gradients, opt_state, params)
        return jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, changes), opt_state


def train_step(loss: Callable[..., Any], optimizer: Any) -> TrainStep:
    """A train step whose inside a plan may change; see `TrainStep`."""
    return TrainStep(loss, optimizer)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What a plan asks of the execution, on devices.

    Attributes:
      mesh: of devices, or abstract if the step is only lowered.
      inputs: path of an argument to its spec; others are replicated.
      outputs: path of a result to its spec; others are left to the compiler.
      activations: name of a dimension to the mesh axes that divide it.
      gradients: path of a parameter, within its argument, to the spec of its gradient.
      updates: the same to the spec in which its update is computed, where that is divided further
        than the parameter (ZeRO-1 and 2); empty where all lie alike.
      remat: policy for layers.
      accumulation_steps: micro-batches whose gradients are summed before the update.
      pipeline: layers of every stage, or ().
      microbatches: that fill the pipeline.
      offload: "optimizer" or "activations": what lies in the host's memory; or "none".
      sequence_parallel: see `Rewrite`.
      gathers_weights: see `Rewrite`.
    """

    mesh: Mesh | AbstractMesh
    inputs: Mapping[str, PartitionSpec]
    outputs: Mapping[str, PartitionSpec]
    activations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gradients: Mapping[str, PartitionSpec] = field(default_factory=dict)
    updates: Mapping[str, PartitionSpec] = field(default_factory=dict)
    remat: str = "none"
    accumulation_steps: int = 1
    pipeline: tuple[int, ...] = ()
    microbatches: int = 1
    offload: str = "none"
    sequence_parallel: bool = False
    gathers_weights: bool = False

    @property
    def key(self) -> Hashable:
        """The same of executions that make the same program."""

        def entries(field: Any) -> Hashable:
            return tuple(sorted(field.items())) if isinstance(field, Mapping) else field

        return tuple(entries(getattr(self, field.name)) for field in fields(self))

    def shardings(
        self, tree: Any, specs: Mapping[str, PartitionSpec], *, host: bool = True
    ) -> list[NamedSharding]:
        """Of the leaves of arguments or results.

        Args:
          tree: the tuple of them.
          specs: path to spec.
          host: whether what is offloaded lies in the host's memory, or in the device's.
        """
        found = []
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(tree), leaf_specs(tree, specs), strict=True
        ):
            # Of a train step the second argument and result is the optimiser's state.
            moments = leaf_path(path).startswith("1/") and np.ndim(leaf) > 0
            away = host and moments and self.offload == "optimizer"
            found.append(NamedSharding(self.mesh, spec, memory_kind=HOST if away else None))
        return found


class Planned:
    """A step with a plan: called as the step is, or lowered as `jax.jit` would.

    Arguments may lie anywhere; they are moved to where the plan wants them. Compiled once for
    each set of shapes. Of a donated argument what lies there already is gone after the call, as
    after that of a jitted function; what had to be moved stays as it was.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        execution: Execution,
        *,
        donate: Sequence[int] = (),
        state: Sequence[int] | None = None,
        data: Sequence[int] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._step, self._execution = step, execution
        self._donate = tuple(donate)
        self._options = None if options is None else dict(options)
        self._roles = {"state": state, "data": data}
        self._jitted: dict[Any, tuple[Any, list[NamedSharding]]] = {}

    def __call__(self, *args: Any) -> Any:
        run, shardings = self._jit(args)
        return run(*self._moved(args, shardings))

    def lower(self, *args: Any) -> Any:
        """As `jax.jit(step).lower`, for arrays or `jax.ShapeDtypeStruct`s."""
        return self._jit(args)[0].lower(*args)

    def place(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Moves arguments to where the plan wants them."""
        return self._moved(args, self._execution.shardings(args, self._execution.inputs))

    def _moved(self, args: tuple[Any, ...], shardings: list[NamedSharding]) -> tuple[Any, ...]:
        leaves, structure = jax.tree.flatten(args)
        ends = np.cumsum([0, *(len(jax.tree.leaves(arg)) for arg in args)])
        for i in self._donate:
            for j in range(ends[i], ends[i + 1]):
                leaves[j] = _unshared(leaves[j], shardings[j])
        return jax.tree.unflatten(structure, jax.device_put(leaves, shardings))

    def _jit(self, args: tuple[Any, ...]) -> tuple[Any, list[NamedSharding]]:
        leaves, structure = jax.tree.flatten(args)
        # Read off the leaves: this runs in every step.
        key = structure, tuple((np.shape(x), getattr(x, "dtype", type(x))) for x in leaves)
        if key not in self._jitted:
            shapes = jax.eval_shape(lambda *a: a, *args)
            run = rewritten(self._step, shapes, self._execution, **self._roles)
            out = jax.eval_shape(run, *shapes)
            into = self._execution.shardings(shapes, self._execution.inputs)
            back = self._execution.shardings(out, self._execution.outputs)
            jitted = jax.jit(
                run,
                in_shardings=jax.tree.unflatten(structure, into),
                out_shardings=jax.tree.unflatten(jax.tree.structure(out), back),
                donate_argnums=self._donate,
                compiler_options=self._options,
            )
            self._jitted[key] = jitted, into
        return self._jitted[key]


def _unshared(x: Any, wanted: NamedSharding) -> Any:
    """A copy of an array that `device_put` would share a device's buffer with, else the array.

    A whole copy for every device takes the one that is there for its own device's; donating it
    would delete the caller's array, which lies elsewhere.
    """
    if not isinstance(x, jax.Array) or x.sharding.is_equivalent_to(wanted, x.ndim):
        return x
    return x.copy() if wanted.is_fully_replicated else x


def leaf_specs(tree: Any, specs: Mapping[str, PartitionSpec]) -> list[PartitionSpec]:
    """The spec of every leaf, by its path; a leaf without one is whole."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [specs.get(leaf_path(path), PartitionSpec()) for path, _ in flat]


def rewritten(
    step: Callable[..., Any],
    shapes: tuple[Any, ...],
    execution: Execution,
    *,
    state: Sequence[int] | None = None,
    data: Sequence[int] | None = None,
) -> Callable[..., Any]:
    """A step with the plan's choices inside, for arguments of given shapes."""
    if isinstance(step, TrainStep):
        return _train_step(step, shapes, execution, loss_roles(data))
    return _rewrite(step, shapes, execution, state=state, data=data)


def loss_roles(data: Sequence[int] | None) -> dict[str, Any]:
    """Positions of state and data in the loss of a train step, from those of data in the step."""
    return {"state": (0,), "data": None if data is None else tuple(i - 1 for i in data)}


def _rewrite(
    step: Callable[..., Any], shapes: tuple[Any, ...], execution: Execution, **roles: Any
) -> Rewrite:
    mesh = execution.mesh
    with _in_context(execution, shapes):
        traced = trace(step, shapes, **roles)

    def constrain(x: Any, spec: PartitionSpec) -> Any:
        # Within a pipeline stage the mesh of the context has the stage axis taken away.
        if execution.pipeline and jax.sharding.get_abstract_mesh().manual_axes:
            return jax.lax.with_sharding_constraint(x, spec)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def rewrite(traced: Trace, pipeline: Any = None) -> Rewrite:
        return Rewrite(
            traced=traced,
            axes=execution.activations,
            constrain=constrain,
            mesh=mesh.shape,
            remat=execution.remat,
            offload=execution.offload,
            sequence_parallel=execution.sequence_parallel,
            gathers_weights=execution.gathers_weights,
            pipeline=pipeline,
        )

    if not execution.pipeline:
        return rewrite(traced)
    obstacle = stages.obstacle(traced)
    if obstacle:
        raise ValueError(f"the program cannot be cut into pipeline stages: {obstacle}")
    # A jaxpr holds its shapes: what a stage runs is traced at the size of a micro-batch.
    micro = _micro_shapes(traced, shapes, execution.microbatches)
    layers = rewrite(trace(step, micro, **roles)).layers()
    assert layers is not None, "what the batch is does not depend on its size"
    return rewrite(
        traced,
        stages.pipelined(traced, mesh, execution.pipeline, execution.microbatches, layers.body),
    )


def _in_context(
    execution: Execution, shapes: tuple[Any, ...]
) -> contextlib.AbstractContextManager[Any]:
    """The mesh for a step that asks for it: to run a kernel under `jax.shard_map`, for example.

    Not where there are stages: within one, the mesh has the stage axis taken away. Nor where
    parameters carry logical names (linen's `Partitioned`): with a mesh at hand, Flax constrains
    them to axes of those names, which the mesh need not have.
    """
    if execution.pipeline or _has_logical_names(shapes):
        return contextlib.nullcontext()
    mesh = execution.mesh
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh)


def _has_logical_names(shapes: tuple[Any, ...]) -> bool:
    def is_box(x: Any) -> bool:
        return hasattr(x, "unbox") and hasattr(x, "names")

    return any(map(is_box, jax.tree.leaves(shapes, is_leaf=is_box)))


def _micro_shapes(traced: Trace, shapes: tuple[Any, ...], parts: int) -> tuple[Any, ...]:
    """Arguments of one micro-batch: an axis whose outermost factor is the batch is shorter.

    Raises:
      ValueError: a batch that does not divide into so many.
    """
    batch = math.prod(traced.sizes[atom] for atom in traced.splits.batch)
    if batch % parts:
        raise ValueError(
            f"{parts} micro-batches do not divide a batch of {batch}; change the batch, or plan "
            "for this one"
        )
    leaves, structure = jax.tree.flatten(shapes)
    micro = []
    for leaf, x in zip(traced.inputs, leaves, strict=True):
        axis, sizes = _batch_axis(traced, leaf), list(leaf.shape)
        if axis is not None:
            sizes[axis] //= parts
        micro.append(jax.ShapeDtypeStruct(tuple(sizes), x.dtype))
    return jax.tree.unflatten(structure, micro)


def _batch_axis(traced: Trace, leaf: Leaf) -> int | None:
    """The axis of an argument whose outermost factor is the batch."""
    found = (i for i, f in enumerate(leaf.factors) if set(f[:1]) & traced.splits.batch)
    return next(found, None)


def _train_step(
    step: TrainStep, shapes: tuple[Any, ...], execution: Execution, roles: Mapping[str, Any]
) -> Callable[..., Any]:
    parts = execution.accumulation_steps
    params, _, *data = shapes
    micro, batch, axes = (params, *data), 1, [None] * len(jax.tree.leaves(data))
    if parts > 1:
        with _in_context(execution, micro):
            whole = trace(step.loss, micro, **roles)
        micro = _micro_shapes(whole, micro, parts)
        batch = math.prod(whole.sizes[atom] for atom in whole.splits.batch)
        axes = [_batch_axis(whole, leaf) for leaf in whole.inputs[-len(axes) :]]
    loss = _rewrite(step.loss, micro, execution, **roles)

    def placed(gradients: Any) -> Any:
        return _constrained(gradients, execution.gradients, execution.mesh)

    def divided(tree: Any) -> Any:
        return _constrained(tree, execution.updates, execution.mesh)

    def gathered(params: Any) -> Any:
        # Parameters are gathered when they are new, and not the moments that they are made of.
        whole = {path: execution.inputs[f"0/{path}".rstrip("/")] for path in execution.updates}
        return _constrained(params, whole, execution.mesh)

    def gradients_of(params: Any, data: tuple[Any, ...]) -> tuple[Any, Any]:
        value, gradients = jax.value_and_grad(loss)(params, *data)
        return value, placed(gradients)

    def accumulated(params: Any, data: tuple[Any, ...]) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(data)
        cuts = {
            i: _cut(x, axis, batch, parts)
            for i, (x, axis) in enumerate(zip(leaves, axes, strict=True))
            if axis is not None
        }

        def one(sums: Any, part: Mapping[int, Any]) -> tuple[Any, None]:
            mine = [part.get(i, x) for i, x in enumerate(leaves)]
            value, gradients = gradients_of(params, jax.tree.unflatten(structure, mine))
            # Sums in float32: of many small numbers, bfloat16 would lose most.
            added = jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums[1], gradients)
            return (sums[0] + value, placed(added)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
                             params)  # fmt: skip
        start = jnp.zeros((), jax.eval_shape(loss, *micro).dtype), placed(zeros)
        (total, sums), _ = jax.lax.scan(one, start, cuts)
        mean = jax.tree.map(lambda p, s: (s / parts).astype(p.dtype), params, sums)
        return total / parts, mean

    def run(params: Any, opt_state: Any, *data: Any) -> tuple[Any, Any, Any]:
        value, gradients = (gradients_of if parts == 1 else accumulated)(params, data)
        opt_state = _state_in(opt_state, execution, host=False)
        params, opt_state = step.update(divided(params), opt_state, divided(gradients))
        return gathered(params), _state_in(opt_state, execution, host=True), value

    return run


def _state_in(opt_state: Any, execution: Execution, *, host: bool) -> Any:
    """The optimiser's state in the host's or the device's memory, if the plan moves it."""
    if execution.offload != "optimizer":
        return opt_state
    leaves, structure = jax.tree.flatten((None, opt_state))
    placed = execution.shardings((None, opt_state), execution.inputs, host=host)
    moved = [
        jax.device_put(x, where if host else where.with_memory_kind("device")) if x.ndim else x
        for x, where in zip(leaves, placed, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)[1]


def _cut(x: Any, axis: int, batch: int, parts: int) -> Any:
    """[..., batch · n, ...] -> [parts, ..., batch / parts · n, ...].

    Part i takes every `parts`-th example from i on. So each device keeps the examples that it
    has, whereas contiguous parts would move them.
    """
    before, after, rest = x.shape[:axis], x.shape[axis + 1 :], x.shape[axis] // batch
    inner = (rest,) if rest > 1 else ()  # what shares the axis with the batch
    cut = x.reshape(*before, batch // parts, parts, *inner, *after)
    return jnp.moveaxis(cut, axis + 1, 0).reshape(parts, *before, batch // parts * rest, *after)


def _constrained(tree: Any, specs: Mapping[str, PartitionSpec], mesh: Mesh | AbstractMesh) -> Any:
    """Lays the leaves of which a spec is known."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    placed = [
        jax.lax.with_sharding_constraint(x, NamedSharding(mesh, specs[leaf_path(path)]))
        if leaf_path(path) in specs
        else x
        for path, x in flat
    ]
    return jax.tree.unflatten(structure, placed)
