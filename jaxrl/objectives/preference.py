"""Losses of learned rewards and costs. One scalar score a sequence; nothing is reduced."""

import jax
from jaxtyping import Array, Float

_RIDGE = 1e-3  # safe-rlhf's regularisation of reward and cost models


def reward_loss(
    better: Float[Array, " N"], worse: Float[Array, " N"], *, ridge: float = _RIDGE
) -> Float[Array, " N"]:
    """Bradley-Terry loss of a reward model, a pair.

    L = -log σ(r_better - r_worse) + ridge · ½(r_better² + r_worse²)

    (safe-rlhf's reward model; the mean of L has safe-rlhf's ridge · mean r²). Differences only
    are learned: a constant may be added to the rewards, and the ridge alone picks it.

    Args:
      better: scores of the preferred responses.
      worse: scores of the other responses.
      ridge: weight of the squared scores.

    >>> import jax.numpy as jnp
    >>> reward_loss(jnp.array([0.0]), jnp.array([0.0]), ridge=0.0).round(4)
    Array([0.6931], dtype=float32)
    """
    ranking = jax.nn.softplus(worse - better)
    return ranking + ridge * 0.5 * (better**2 + worse**2)


def cost_loss(
    safer: Float[Array, " N"],
    unsafer: Float[Array, " N"],
    safer_sign: Float[Array, " N"],
    unsafer_sign: Float[Array, " N"],
    *,
    ridge: float = _RIDGE,
) -> Float[Array, " N"]:
    """Safe-RLHF's loss of a cost model, a pair.

    L = -log σ(c_unsafer - c_safer) - log σ(s_safer · c_safer) - log σ(s_unsafer · c_unsafer)
        + ridge · ½(c_safer² + c_unsafer²)

    (Safe RLHF, arXiv:2310.12773, eq. 6; the mean of L has safe-rlhf's ridge · mean c²). The
    signs make zero the boundary between safe and unsafe: such a cost may be scaled, not
    shifted.

    Args:
      safer: costs of the safer responses.
      unsafer: costs of the other responses.
      safer_sign: +1 unsafe, -1 safe, 0 unknown (a constant: no gradient).
      unsafer_sign: likewise.
      ridge: weight of the squared costs.
    """
    ranking = jax.nn.softplus(safer - unsafer)
    labels = jax.nn.softplus(-safer_sign * safer) + jax.nn.softplus(-unsafer_sign * unsafer)
    return ranking + labels + ridge * 0.5 * (safer**2 + unsafer**2)


def label_loss(
    score: Float[Array, " N"], target: Float[Array, " N"], *, ridge: float = _RIDGE
) -> Float[Array, " N"]:
    """Cross-entropy of a graded label, a row.

    L = -t log σ(s) - (1 - t) log(1 - σ(s)) + ridge · s²

    Without ridge it is least at s = logit(t): a partial refusal (t = ½) has score 0.

    Args:
      score: logit s.
      target: t in [0, 1].
      ridge: weight of the squared scores.

    >>> import jax.numpy as jnp
    >>> label_loss(jnp.array([0.0, 0.0]), jnp.array([1.0, 0.5]), ridge=0.0).round(4)
    Array([0.6931, 0.6931], dtype=float32)
    """
    return jax.nn.softplus(score) - target * score + ridge * score**2
