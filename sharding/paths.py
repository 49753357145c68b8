"""Names of the leaves of pytrees."""

from collections.abc import Sequence
from typing import Any

import jax


def leaf_path(path: Sequence[Any]) -> str:
    """Path of a pytree leaf as text: keys joined by "/", wrappers of values left out.

    >>> tree = {"layers": {"query": 0}}
    >>> [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['layers/query']
    """
    # Flax wraps arrays in variables, whose array is the *attribute* "value"; a parameter that
    # is itself called "value" is an entry of a dict and keeps its name.
    keys = tuple(path)
    if len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")
