"""Reductions of per-token losses to one number. Padding never counts."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def token_mean(losses: Float[Array, "B G T"], mask: Bool[Array, "B G T"]) -> Float[Array, ""]:
    """Mean over all active tokens of the batch: a long completion weighs more ("dapo")."""
    return jnp.sum(losses, where=mask) / jnp.maximum(jnp.sum(mask), 1)


def sequence_mean(losses: Float[Array, "B G T"], mask: Bool[Array, "B G T"]) -> Float[Array, ""]:
    """Mean over each completion's tokens, then over completions (safe-rlhf).

    A completion without tokens counts as 0.

    >>> mask = jnp.array([[[True, False], [True, True]]])
    >>> float(sequence_mean(jnp.array([[[3.0, 9.0], [1.0, 2.0]]]), mask))
    2.25
    """
    per_sequence = jnp.sum(losses, axis=-1, where=mask) / jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return jnp.mean(per_sequence)


def sequence_sum(
    values: Float[Array, "*rows T"], mask: Bool[Array, "*rows T"]
) -> Float[Array, "*rows"]:
    """Sum over each completion's tokens: turns token log-probabilities into a sequence's."""
    return jnp.sum(values, axis=-1, where=mask)
