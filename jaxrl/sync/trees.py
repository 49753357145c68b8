"""The learner's parameters as actors get them: cast, and each array the publisher's own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import sparse_delta


@functools.partial(jax.jit, static_argnames="dtype")
def cast(params: Any, dtype: Any) -> Any:
    """A copy of a tree, its floating point leaves in `dtype`.

    The copy is the publisher's own: the learner may donate its arrays to the next step.

    Args:
      params: pytree of arrays.
      dtype: of floating point leaves, rounded to nearest, ties to even; None leaves them.
    """

    def one(leaf: jax.Array) -> jax.Array:
        if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(dtype)
        return jnp.copy(leaf)

    return jax.tree.map(one, params)


def size_bytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def digest(tree: Any) -> sparse_delta.TreeDigest:
    """The digest of a tree, made where it lies, once it is there."""
    return sparse_delta.digest(jax.block_until_ready(tree))
