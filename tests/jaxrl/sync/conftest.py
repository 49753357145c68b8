"""Weights that change a little from version to version, and ways to compare them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SECRET = "a secret of more than sixteen bytes"


def _weights(version: int, size: int = 4096) -> dict[str, Any]:
    w = np.random.default_rng(0).normal(size=size).astype(np.float32)
    for step in range(version):
        changed = np.random.default_rng(step + 1).integers(0, size, size // 100)
        w[changed] *= np.float32(1.01)
    return {"layer": {"w": jnp.asarray(w).reshape(64, -1)}, "b": jnp.full(3, version, jnp.int32)}


@pytest.fixture
def weights() -> Callable[..., Any]:
    """Float32 weights by version, of which 1 % differ from one to the next."""
    return _weights


@pytest.fixture
def bits() -> Callable[[Any], list[bytes]]:
    """All bits of a tree."""
    return lambda tree: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def like() -> Any:
    """Shapes and dtypes of the weights."""
    return jax.eval_shape(lambda: _weights(0))


@pytest.fixture
def secret() -> str:
    return SECRET
