"""From a function and its arguments to named dimensions and a `Program`.

The jaxpr is walked once whole, which gives every argument and result its dimensions, and once for
what the loss depends on, which is the forward pass that is costed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from sharding.paths import leaf_path
from sharding.programs.program import Program, dtype_bytes
from sharding.tracing.arguments import abstract
from sharding.tracing.dims import DimensionGraph, product
from sharding.tracing.lowering import lower
from sharding.tracing.splits import Splits, find_splits
from sharding.tracing.walk import Axes, Notes, Role, Value, Walk

# Adam's two moments in float32: what a bare loss is assumed to be trained with.
_ADAM_BYTES = 8.0


@dataclass(frozen=True)
class Leaf:
    """An argument or a result.

    Attributes:
      path: `leaf_path` within the tuple of arguments, or within the result.
      shape: its shape.
      dtype: its element type.
      role: what it is to the program.
      factors: for every axis, the atoms that it is a product of, outermost first.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    factors: tuple[Axes, ...]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A function, understood.

    Attributes:
      program: what is costed.
      inputs: its arguments, leaf by leaf.
      outputs: its results, leaf by leaf; role "activation" unless it is state that comes back.
      splits: atoms by the parallelism that may divide them.
      names: atom to the name of its dimension.
      sizes: atom to its size.
      layer_atoms: stacked dimensions of scans over parameters.
      looked_up: dimensions that rows are looked up along, as the vocabulary of an embedding.
      closed: the jaxpr.
      notes: what is known of its equations.
      graph: the dimensions that they speak of.
      in_tree: structure of the tuple of arguments.
      out_tree: structure of the result.
      has_remat: whether the function rematerialises by itself.
      is_loss: whether all it returns is one number, to be differentiated by the caller.
    """

    program: Program
    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    splits: Splits
    names: Mapping[int, str]
    sizes: Mapping[int, int]
    layer_atoms: frozenset[int]
    looked_up: frozenset[int]
    closed: core.ClosedJaxpr = field(repr=False)
    notes: Notes = field(repr=False)
    graph: DimensionGraph = field(repr=False)
    in_tree: Any = field(repr=False)
    out_tree: Any = field(repr=False)
    has_remat: bool
    is_loss: bool


def trace(
    step: Callable[..., Any],
    args: Sequence[Any],
    *,
    state: Sequence[int] | None = None,
    data: Sequence[int] | None = None,
    optimizer_bytes: float | None = None,
    training: bool | None = None,
) -> Trace:
    """Traces a function and names its dimensions.

    Args:
      step: any function that `jax.jit` takes: a loss, a train step, an inference step.
      args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
      state: positions of arguments that hold parameters and what is carried with them. By
        default those that come back out with the same structure, and the first one, unless it
        holds integers only.
      data: positions of arguments whose leading axis is the batch; by default that of most of
        the others, if it takes part in the main work.
      optimizer_bytes: bytes of optimiser state a parameter; by default counted from the state,
        and Adam's 8 for a function that returns nothing but a loss.
      training: whether a backward pass belongs to the step; by default whether parameters come
        back changed, or nothing but one number comes back.
    """
    args = abstract(args)
    closed, out_shape = jax.make_jaxpr(step, return_shape=True)(*args)
    flat, in_tree = jax.tree_util.tree_flatten_with_path(args)
    out_flat, out_tree = jax.tree_util.tree_flatten_with_path(out_shape)
    roles = _roles(args, out_shape, state, data)
    graph = DimensionGraph()
    walk = Walk(graph)
    values = [
        walk.fresh(var.aval, role, leaf_path(path))
        for var, (path, _), role in zip(closed.jaxpr.invars, flat, roles, strict=True)
    ]
    results = walk.run(closed.jaxpr, closed.consts, values)
    kept = _returned(args, out_shape, values, results)
    for value, result in kept:
        for a, b in zip(value.axes, result.axes, strict=True):
            graph.union(a, b)

    is_loss = len(out_flat) == 1 and out_flat[0][1].shape == () and _is_float(out_flat[0][1])
    changed = any(r.role == "param" and r not in values for r in results)
    trains = is_loss or changed if training is None else training
    forward, loss = _forward(walk, closed, values, results, trains)
    for value, result in kept:  # the forward pass told parameters and optimiser state apart
        if result not in values:
            result.role = value.role
    differentiated = (
        loss is not None
        and not walk.has_remat
        and any(value.role == "param" for value in loss.values)
    )
    if loss is not None and differentiated:
        forward = _differentiated(walk, loss)
    said = [data is None or i in data for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    data_values = [
        v
        for v, role, is_data in zip(values, roles, said, strict=True)
        if role == "data" and is_data
    ]
    params = [v for v, role in zip(values, roles, strict=True) if role == "param"]
    whole = (*walk.layer_dims, *walk.loop_dims, *forward.layer_dims, *forward.loop_dims)
    splits = find_splits(graph, forward.stretches, data=data_values, params=params, whole=whole)
    _reconsider(graph, [*values, *results], splits)
    declared = _declared_names(args, len(flat))
    layers = frozenset(a for d in (*walk.layer_dims, *forward.layer_dims) for a in graph.atoms(d))
    names = _name(graph, values, splits, declared, layers)
    program = lower(
        graph,
        forward,
        splits,
        names,
        name=getattr(step, "__name__", "step"),
        training=loss is not None,
        stacked_are_residuals=differentiated,
        unknown=walk.unknown,
        optimizer_bytes=(
            _optimizer_bytes(graph, values, is_loss) if optimizer_bytes is None else optimizer_bytes
        ),
    )
    atoms = {*names, *splits.kinds, *program_atoms(graph, [*values, *results])}
    sizes = {atom: graph.size(atom) for atom in sorted(atoms)}
    return Trace(
        program=program,
        inputs=tuple(_leaf(graph, v, p) for v, (p, _) in zip(values, flat, strict=True)),
        outputs=tuple(_leaf(graph, v, p) for v, (p, _) in zip(results, out_flat, strict=True)),
        splits=splits,
        names=names,
        sizes=sizes,
        layer_atoms=layers,
        looked_up=_looked_up(graph, forward),
        closed=closed,
        notes=walk.notes,
        graph=graph,
        in_tree=in_tree,
        out_tree=out_tree,
        has_remat=walk.has_remat,
        is_loss=is_loss,
    )


def program_atoms(graph: DimensionGraph, values: Sequence[Value]) -> list[int]:
    """All atoms of some arrays, each once, ascending."""
    return sorted({a for value in values for axis in value.axes for a in graph.atoms(axis)})


def _leaf(graph: DimensionGraph, value: Value, path: Any) -> Leaf:
    return Leaf(
        leaf_path(path),
        tuple(graph.size(axis) for axis in value.axes),
        value.dtype,
        value.role,
        tuple(graph.atoms(axis) for axis in value.axes),
    )


def _is_float(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)


def _signature(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((tuple(x.shape), str(x.dtype)) for x in leaves)


def _parts(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _roles(
    args: tuple[Any, ...],
    out_shape: Any,
    state: Sequence[int] | None,
    data: Sequence[int] | None,
) -> list[Role]:
    """The role of every leaf; see `trace`. What the forward pass does not read is state of the
    optimiser, which `_forward` finds.
    """
    returned = [_signature(part) for part in _parts(out_shape)]
    carried: list[bool] = []
    for i, arg in enumerate(args):
        leaves = jax.tree.leaves(arg)
        # A bare array that comes back with its shape may well be data that was transformed.
        comes_back = _signature(arg) in returned and (i == 0 or not jax.tree_util.all_leaves([arg]))
        first = i == 0 and any(_is_float(leaf) for leaf in leaves)
        said = state is not None and i in state
        denied = (data is not None and i in data) or (state is not None and i not in state)
        carried.append(bool(leaves) and (said or (not denied and (comes_back or first))))
    roles: list[Role] = []
    for keeps, arg in zip(carried, args, strict=True):
        for leaf in jax.tree.leaves(arg):
            array = bool(leaf.shape) and _is_float(leaf)
            roles.append("data" if not keeps else "param" if array else "state")
    return roles


def _returned(
    args: tuple[Any, ...], out_shape: Any, values: Sequence[Value], results: Sequence[Value]
) -> list[tuple[Value, Value]]:
    """Pairs of what goes in and what comes back out in its place."""
    parts = _parts(out_shape)
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(jax.tree.leaves(part)))
    free = set(range(len(parts)))
    pairs = []
    position = 0
    for arg in args:
        count = len(jax.tree.leaves(arg))
        mine = values[position : position + count]
        position += count
        if not any(value.role in ("param", "optimizer", "state") for value in mine):
            continue
        for i in sorted(free):
            if _signature(parts[i]) == _signature(arg):
                back = results[starts[i] : starts[i + 1]]
                pairs += list(zip(mine, back, strict=True))
                for value, result in zip(mine, back, strict=True):
                    if result not in values:
                        result.role = value.role
                free.discard(i)
                break
    return pairs


@dataclass(frozen=True)
class _Loss:
    """A jaxpr whose only result is the loss, and its arguments on the walk."""

    jaxpr: core.ClosedJaxpr
    values: tuple[Value, ...]


def _forward(
    walk: Walk,
    closed: core.ClosedJaxpr,
    values: Sequence[Value],
    results: Sequence[Value],
    training: bool,
) -> tuple[Walk, _Loss | None]:
    """The walk of the forward pass, and the loss if the backward pass can be taken off it.

    A step that trains computes its loss on the way: what a floating scalar result depends on,
    the least that contains a product of matrices, is the forward pass. State that it does not
    read is the optimiser's.
    """
    if not training:
        return walk, None
    best: tuple[float, Walk, _Loss] | None = None
    for i, value in enumerate(results):
        if value.axes or not value.dtype.startswith(("float", "bfloat")) or value in values:
            continue
        used = [j == i for j in range(len(results))]
        jaxpr, kept = partial_eval.dce_jaxpr(closed.jaxpr, used)
        read = tuple(v for v, k in zip(values, kept, strict=True) if k)
        candidate = Walk(walk.graph)
        candidate.run(jaxpr, closed.consts, read)
        work = _product_flops(candidate)
        if work and (best is None or work < best[0]):
            best = (work, candidate, _Loss(core.ClosedJaxpr(jaxpr, closed.consts), read))
    if best is None:
        return walk, None
    for value in values:
        if value.role == "param" and not any(value is v for v in best[2].values):
            value.role = "optimizer"
    return best[1], best[2]


def _differentiated(walk: Walk, loss: _Loss) -> Walk:
    """The walk of a loss that hands out what its gradient needs, as differentiation makes it."""
    run = core.jaxpr_as_fun(loss.jaxpr)
    trained = [i for i, value in enumerate(loss.values) if value.role == "param"]

    def forward(*leaves: Any) -> Any:
        def of(params: Sequence[Any]) -> Any:
            held = dict(zip(trained, params, strict=True))
            return run(*(held.get(i, leaf) for i, leaf in enumerate(leaves)))[0]

        return jax.vjp(of, [leaves[i] for i in trained])

    closed = jax.make_jaxpr(forward)(*(_shape_of(v) for v in loss.jaxpr.jaxpr.invars))
    found = Walk(walk.graph)
    found.run(closed.jaxpr, closed.consts, loss.values)
    return found


def _shape_of(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _product_flops(walk: Walk) -> float:
    return math.fsum(
        record.applied.flops * stretch.repeat
        for stretch in walk.stretches
        for record in stretch.records
        if record.applied.kind in ("dot", "grouped_dot", "attention")
    )


def _looked_up(graph: DimensionGraph, walk: Walk) -> frozenset[int]:
    return frozenset(
        atom
        for stretch in walk.stretches
        for record in stretch.records
        if record.applied.kind == "gather" and record.ins[0].role == "param"
        for axis in record.applied.contracted
        for atom in graph.atoms(axis)
    )


def _optimizer_bytes(graph: DimensionGraph, values: Sequence[Value], is_loss: bool) -> float:
    def count(value: Value) -> int:
        return product(graph.size(axis) for axis in value.axes)

    params = sum(count(v) for v in values if v.role == "param")
    state = sum(count(v) * dtype_bytes(v.dtype) for v in values if v.role == "optimizer")
    return _ADAM_BYTES if is_loss else state / max(params, 1)


def _declared_names(args: tuple[Any, ...], count: int) -> list[tuple[str | None, ...] | None]:
    """Logical axis names of every leaf, where a container of Flax (NNX or linen) carries them."""
    found: list[tuple[str | None, ...] | None] = []
    for node in jax.tree.leaves(args, is_leaf=lambda node: _axis_names(node) is not None):
        names = _axis_names(node)
        found += [names] * len(jax.tree.leaves(node))
    return found if len(found) == count else [None] * count


def _axis_names(node: Any) -> tuple[str | None, ...] | None:
    metadata = getattr(node, "get_metadata", None)  # flax.nnx.Variable
    names = getattr(node, "names", None)  # flax.linen.Partitioned
    if callable(metadata):
        held = metadata()
        held = held if isinstance(held, Mapping) else {}
        names = held.get("out_sharding", held.get("sharding_names", held.get("sharding")))
    if isinstance(names, tuple) and all(n is None or isinstance(n, str) for n in names):
        return names
    return None


def _name(
    graph: DimensionGraph,
    values: Sequence[Value],
    splits: Splits,
    declared: Sequence[tuple[str | None, ...] | None],
    layers: frozenset[int],
) -> dict[int, str]:
    """A name for every atom of the arguments: by its use, declared, or by where it first is."""
    names: dict[int, str] = {}

    def give(atom: int, name: str) -> None:
        if atom in names:
            return
        taken, free, number = set(names.values()), name, 2
        while free in taken:
            free, number = f"{name}.{number}", number + 1
        names[atom] = free

    for group, name in ((splits.batch, "batch"), (splits.sequence, "sequence"), (layers, "layers")):
        for atom in sorted(group):
            give(atom, name)
    for value, axes in zip(values, declared, strict=True):
        for axis, name in zip(value.axes, axes or (), strict=False):
            for atom in graph.atoms(axis):
                if name is not None:
                    give(atom, name)
    for atom in sorted(splits.expert):
        give(atom, "expert")
    for value in values:
        for i, axis in enumerate(value.axes):
            for atom in graph.atoms(axis):
                give(atom, f"{value.path}:{i}")
    return names


def _reconsider(graph: DimensionGraph, values: Sequence[Value], splits: Splits) -> None:
    """A carried array with a batch dimension is no parameter but a cache."""
    for value in values:
        atoms = {a for axis in value.axes for a in graph.atoms(axis)}
        if value.role == "param" and atoms & splits.batch:
            value.role = "state"
