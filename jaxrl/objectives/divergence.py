"""Estimates of KL(π‖π_ref) from sampled tokens (Schulman, "Approximating KL divergence")."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Estimator = Literal["k1", "k3"]


def kl_estimate(
    log_probs: Float[Array, "*shape"],
    reference_log_probs: Float[Array, "*shape"],
    *,
    estimator: Estimator,
) -> Float[Array, "*shape"]:
    """Per-token estimate, unbiased when the token was drawn from π.

    k1 = log π − log π_ref (may be negative);
    k3 = e^Δ − Δ − 1 with Δ = log π_ref − log π (never negative; GRPO's).

    Raises:
      ValueError: unknown `estimator`.

    >>> kl_estimate(jnp.zeros(1), jnp.zeros(1), estimator="k3")
    Array([0.], dtype=float32)
    """
    delta = reference_log_probs - log_probs
    if estimator == "k1":
        return -delta
    if estimator == "k3":
        return jnp.expm1(delta) - delta
    raise ValueError(f"estimator must be 'k1' or 'k3': {estimator!r}")
