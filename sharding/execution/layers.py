"""Layers of a program, written so that a plan can reach them."""

from collections.abc import Callable
from typing import Any

import jax


def layers(layer: Callable[[Any, Any], Any], stacked: Any, x: Any) -> Any:
    """Runs equal layers one after the other: a scan, which plans see through.

    Layers under one scan over stacked parameters can be rematerialised and cut into pipeline
    stages; those of a Python loop cannot.

    Args:
      layer: (parameters of one layer, x) -> x of the same shapes and dtypes.
      stacked: parameters of all layers, each leaf [layers, ...].
      x: what the first layer gets.

    Returns:
      What the last layer gives.

    >>> import jax.numpy as jnp
    >>> layers(lambda w, x: w * x, jnp.asarray([2.0, 3.0]), jnp.asarray(1.0))
    Array(6., dtype=float32)
    """
    return jax.lax.scan(lambda x, params: (layer(params, x), None), x, stacked)[0]
