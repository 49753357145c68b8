"""Arguments of a step: what may be one, and which of them were said to be state or data."""

from collections.abc import Sequence
from typing import Any

import jax

from sharding.paths import leaf_path


def abstract(args: Any) -> tuple[Any, ...]:
    """Shapes and dtypes of the arguments of a step.

    Args:
      args: a tuple or list of pytrees of arrays, `jax.ShapeDtypeStruct`s or Python numbers.

    Raises:
      ValueError: no sequence of arguments, or a leaf that is no array.

    >>> abstract(({"rate": 0.5},))[0]["rate"].shape
    ()
    """
    if not isinstance(args, (tuple, list)):
        raise ValueError(
            "args is the tuple of the step's arguments, as (params, batch), got one "
            f"{type(args).__name__}; write (x,) for a step with a single argument"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if not is_array and not isinstance(leaf, (bool, int, float, complex)):
            raise ValueError(
                f"argument {leaf_path(path)} is a {type(leaf).__name__}, and only arrays can be "
                "planned; close over the rest of it: params, static = "
                "equinox.partition(model, equinox.is_array), or graph, params = nnx.split(model)"
            )
    return tuple(jax.eval_shape(_same, *args))


def _same(*args: Any) -> tuple[Any, ...]:
    """Has a name, so that JAX knows it again and does not trace it anew for the same shapes."""
    return args


def check_positions(
    count: int, state: Sequence[int] | None, data: Sequence[int] | None, *, is_train_step: bool
) -> None:
    """Checks what was said of the positions of arguments.

    Args:
      count: how many arguments there are.
      state: positions of state, or None.
      data: positions of data, or None.
      is_train_step: the step is (parameters, optimiser state, *data).

    Raises:
      ValueError: a position that is none, or that cannot be what it is said to be.
    """
    for name, said in (("state", state), ("data", data)):
        wrong = [i for i in said or () if not 0 <= i < count]
        if wrong:
            raise ValueError(
                f"{name} names positions of arguments, 0 to {count - 1} for these {count}; got "
                f"{wrong} in {tuple(said or ())}"
            )
    both = set(state or ()) & set(data or ())
    if both:
        raise ValueError(f"arguments {sorted(both)} are said to be state and data; they are one")
    if not is_train_step:
        return
    if set(state or ()) - {0, 1}:
        raise ValueError(
            "the state of a train step are arguments 0 and 1, the parameters and the optimiser's, "
            f"got state={tuple(state or ())}; close over parameters that are not trained, or pass "
            "them as data, or plan a plain function"
        )
    if set(data or ()) & {0, 1}:
        raise ValueError(
            "the data of a train step are its arguments from the third on, got "
            f"data={tuple(data or ())}"
        )
