"""The learner's parameters as actors get them: cast, quantised, the publisher's own copy."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxrl.sync.config import SyncConfig
from jaxrl.sync.quantise import quantise, quantised_like
from kernels import sparse_delta


def actors_view(params: Any, config: SyncConfig) -> Any:
    """What actors get of the learner's parameters: a copy throughout, that lies where they do.

    It is only dispatched, not waited for; what is dispatched later, such as a step that `params`
    are donated to, leaves it as it is.

    Args:
      params: pytree of arrays.
      config: says dtype and quantisation.
    """
    view = _view(params, config.dtype, config.quantise, config.kept)
    like = params
    if config.quantise is not None:
        like = quantised_like(params, config.quantise, kept=config.kept)
    leaves, structure = jax.tree.flatten(view)
    # The compiler has ideas of its own of where results lie; most often this moves nothing.
    placed = [
        jax.device_put(leaf, own.sharding)
        if isinstance(getattr(own, "sharding", None), NamedSharding)
        else leaf
        for leaf, own in zip(leaves, jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _view(params: Any, dtype: Any, how: Any, kept: tuple[str, ...]) -> Any:
    tree = params if how is None else quantise(params, how, kept=kept)

    def one(leaf: jax.Array) -> jax.Array:
        # What is left of 16 or 32 bits was not quantised.
        wide = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 1
        return leaf.astype(dtype) if dtype is not None and wide else jnp.copy(leaf)

    return jax.tree.map(one, tree)


def receivers_of(receivers: Sequence[Any], params: Any, config: SyncConfig) -> list[Any] | None:
    """The receivers' shardings as trees like what actors get."""
    if config.quantise is None or not receivers:
        return list(receivers) or None

    def laid(sharding: Any, leaf: Any) -> Any:
        own = getattr(sharding, "sharding", sharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)

    def is_sharding(x: Any) -> bool:
        return isinstance(x, jax.sharding.Sharding)

    trees = [jax.tree.map(laid, r, params, is_leaf=is_sharding) for r in receivers]
    return [quantised_like(tree, config.quantise, kept=config.kept) for tree in trees]


def size_bytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def digest(tree: Any) -> sparse_delta.TreeDigest:
    """The digest of a tree, made where it lies."""
    return sparse_delta.digest(jax.block_until_ready(tree))
