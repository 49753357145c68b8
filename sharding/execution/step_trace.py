"""Traces a train step by its loss: its other arguments lie with the parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sharding.execution.execute import TrainStep, loss_roles
from sharding.paths import leaf_path
from sharding.programs.program import dtype_bytes
from sharding.tracing.arguments import abstract, check_positions
from sharding.tracing.dims import product
from sharding.tracing.kept import Kept
from sharding.tracing.trace import Leaf, Trace, trace


def trace_step(
    step: Callable[..., Any],
    args: Any,
    *,
    state: Sequence[int] | None = None,
    data: Sequence[int] | None = None,
) -> Trace:
    """Traces a step; of a `TrainStep`, its loss, with the arguments and results of the step.

    Raises:
      ValueError: arguments that are no arrays, positions that are none, or a train step without
        its arguments or without a loss.
    """
    args = abstract(args)
    check_positions(len(args), state, data, is_train_step=isinstance(step, TrainStep))
    if not isinstance(step, TrainStep):
        return _traced(step, args, state=_tuple(state), data=_tuple(data))
    if len(args) < 3:
        raise ValueError(
            f"a train step takes (parameters, optimiser state, *data), got {len(args)} arguments"
        )
    params, opt_state, *rest = args
    traced = _traced(step.loss, (params, *rest), training=True, **loss_roles(data))
    if not traced.is_loss:
        raise ValueError("the loss of a train step has to return one floating number")
    own = [leaf for leaf in traced.inputs if _argument(leaf.path) == 0]
    moments = _moments(opt_state, own)
    held = sum(dtype_bytes(m.dtype) * product(m.shape) for m in moments if m.role == "optimizer")
    count = sum(product(leaf.shape) for leaf in own if leaf.role == "param")
    later = [_moved(leaf, 1) for leaf in traced.inputs if _argument(leaf.path) > 0]
    value = dataclasses.replace(traced.outputs[0], path="2")
    program = dataclasses.replace(
        traced.program,
        name=getattr(step.loss, "__name__", "loss"),
        optimizer_bytes=held / max(count, 1),
    )
    _, in_tree = jax.tree.flatten((params, opt_state, *rest))
    _, out_tree = jax.tree.flatten((params, opt_state, 0.0))
    return dataclasses.replace(
        traced,
        program=program,
        inputs=(*own, *moments, *later),
        outputs=(*own, *moments, value),
        in_tree=in_tree,
        out_tree=out_tree,
    )


_TRACES: Kept[Trace] = Kept()


def _traced(step: Callable[..., Any], args: tuple[Any, ...], **roles: Any) -> Trace:
    """`trace`, once for all plans of a function."""
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
    key = structure, shapes, tuple(sorted(roles.items()))
    jaxpr = jax.make_jaxpr(step)(*args).jaxpr
    return _TRACES.get(step, key, jaxpr, lambda: trace(step, args, **roles))


def _tuple(positions: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if positions is None else tuple(positions)


def _argument(path: str) -> int:
    return int(path.split("/", 1)[0])


def _moved(leaf: Leaf, by: int) -> Leaf:
    first, *rest = leaf.path.split("/")
    return dataclasses.replace(leaf, path="/".join([str(int(first) + by), *rest]))


def _moments(opt_state: Any, params: Sequence[Leaf]) -> list[Leaf]:
    """Leaves of an optimiser's state: one whose path ends with a parameter's lies with it."""
    tails = {leaf.path.partition("/")[2]: leaf for leaf in params}
    found = []
    for path, value in jax.tree_util.tree_leaves_with_path((None, opt_state)):
        name, shape = leaf_path(path), tuple(value.shape)
        keys = name.split("/")
        of = next(
            (tails[t] for i in range(1, len(keys) + 1)
             if (t := "/".join(keys[i:])) in tails and tails[t].shape == shape),
            None,
        )  # fmt: skip
        dtype = str(value.dtype)
        if of is None:
            found.append(Leaf(name, shape, dtype, "state", ((),) * len(shape)))
        else:
            role = "optimizer" if of.role == "param" else of.role
            found.append(Leaf(name, shape, dtype, role, of.factors))
    return found
