"""Kernels as the planner reads them: one operation, whose inner arrays never reach memory.

A program that calls a kernel (of Pallas, of cuDNN) says nothing of what the kernel multiplies, and
a program that computes the same in plain JAX says too much: arrays that the kernel holds in tiles
only. `fused` marks a function of JAX as what a kernel does. The planner reads of its body how
dimensions belong together and how much is multiplied, and takes for its memory and its traffic
only arguments and results.

    def attend(query, key, value):
        if sharding.planned_for() == "tpu":
            return attend_marked(query, key, value)  # made of `sharding.fused` functions
        return splash(query, key, value)

A kernel that is differentiated is a `jax.custom_vjp` of two such functions: what the forward one
returns for the backward one is what the kernel keeps.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
from jax.extend import core
from jax.interpreters import batching, mlir, partial_eval

Platform = Literal["tpu", "gpu", "cpu"]
# A context of JAX's own, so that no cache of traces gives out a planned one for a real one.
_PLANNED_FOR = jax.make_user_context(default_value=None)


def planned_for() -> Platform | None:
    """What the planner traces a program for; None where a program is traced to run."""
    return _PLANNED_FOR.value


def planning(platform: Platform) -> AbstractContextManager[None]:
    """What is traced within is read by the planner, and runs nowhere."""
    return _PLANNED_FOR(platform)


def fused(
    function: Callable[..., Any], *, computed: float = 1.0, backward: float | None = None
) -> Callable[..., Any]:
    """Marks what one kernel computes.

    The result may run, differentiated it is an error: its derivative is a kernel too, which
    `jax.custom_vjp` names.

    Args:
      function: of arrays, in plain JAX.
      computed: share of the body's products that the kernel computes; less than 1 if it passes
        over blocks that are masked.
      backward: what the kernels of its derivative multiply, as a multiple of what it multiplies
        itself; None is `sharding.programs.program.Op.backward_passes`' rule: 2.5 for a body with
        products, as of attention's gradient in one kernel.

    Raises:
      ValueError: `computed` outside (0, 1], or a negative `backward`.

    >>> import jax.numpy as jnp
    >>> fused(lambda x: jnp.exp(x) + 1)(jnp.zeros(2)).tolist()
    [2.0, 2.0]
    """
    if not 0 < computed <= 1:
        raise ValueError(f"a kernel computes a share of its body in (0, 1]: {computed=}")
    if backward is not None and backward < 0:
        raise ValueError(f"a derivative costs no less than nothing: {backward=}")

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        closed = _needed(closed)
        if closed.consts:  # what the function closes over is an argument of the kernel
            closed, leaves = _with_consts_as_arguments(closed, leaves)
        name = getattr(function, "__name__", "kernel")
        outs = FUSED.bind(*leaves, jaxpr=closed, name=name, computed=computed, backward=backward)
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return run


FUSED = core.Primitive("fused")
"""Parameters: `jaxpr`, closed and without constants; `name`; `computed` and `backward`, as of
`fused`."""
FUSED.multiple_results = True


@FUSED.def_impl
def _run(*args: Any, jaxpr: core.ClosedJaxpr, **_: Any) -> Any:
    return jax.jit(core.jaxpr_as_fun(jaxpr))(*args)


@FUSED.def_abstract_eval
def _shapes(*_: Any, jaxpr: core.ClosedJaxpr, **__: Any) -> Any:
    return jaxpr.out_avals


def _inlined(*args: Any, jaxpr: core.ClosedJaxpr, **_: Any) -> Any:
    return core.jaxpr_as_fun(jaxpr)(*args)


def _batched(
    args: Sequence[Any], axes: Sequence[int | None], *, jaxpr: core.ClosedJaxpr, **params: Any
) -> tuple[Any, Any]:
    each = jax.vmap(core.jaxpr_as_fun(jaxpr), in_axes=tuple(axes))
    outs = FUSED.bind(*args, jaxpr=jax.make_jaxpr(each)(*args), **params)
    return outs, (0,) * len(outs)


mlir.register_lowering(FUSED, mlir.lower_fun(_inlined, multiple_results=True))
batching.primitive_batchers[FUSED] = _batched


def _needed(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Without what no result needs: a function that returns one of two gradients makes one."""
    used = [True] * len(closed.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)
    return core.ClosedJaxpr(jaxpr, closed.consts)


def _with_consts_as_arguments(
    closed: core.ClosedJaxpr, leaves: Sequence[Any]
) -> tuple[core.ClosedJaxpr, list[Any]]:
    consts = list(closed.consts)

    def run(*args: Any) -> Any:
        held, rest = args[: len(consts)], args[len(consts) :]
        return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, held))(*rest)

    operands = [*consts, *leaves]
    return jax.make_jaxpr(run)(*operands), operands
