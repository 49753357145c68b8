"""Trajectory balance with a group-mean estimate of log Z (VarGrad; TBA, arXiv:2503.18929).

The loss is zero only at π ∝ π_ref·exp(R/β), whichever policy with full support wrote the
completions: no importance ratio, no critic.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def tb_residual(
    log_prob: Float[Array, " G"],
    reference_log_prob: Float[Array, " G"],
    rewards: Float[Array, " G"],
    *,
    kl_coef: float,
) -> Float[Array, " G"]:
    """δ_j = log Ẑ + log π(y_j) − log π_ref(y_j) − R_j/β of one group, in nats.

    log Ẑ is the group's mean of the negated rest, held constant under differentiation: Σδ = 0
    makes the gradient the same either way.

    Args:
      log_prob: of whole completions under the policy being trained.
      reference_log_prob: the same under the frozen reference.
      rewards: R, the effective reward, any penalty included.
      kl_coef: β, in reward units per nat.

    Raises:
      ValueError: a group of one, or `kl_coef` not positive.
    """
    if log_prob.shape[0] < 2:
        raise ValueError(
            "trajectory balance needs at least two completions a prompt: "
            f"{log_prob.shape[0]}; raise group_size"
        )
    if kl_coef <= 0.0:
        raise ValueError(f"trajectory balance needs a positive kl_coef: {kl_coef=}")
    rest = log_prob - reference_log_prob - rewards / kl_coef
    return rest - jax.lax.stop_gradient(jnp.mean(rest))


@dataclass(frozen=True, kw_only=True)
class TrajectoryBalance:
    """½·β·mean δ², in reward units.

    Its gradient is −mean_j A_j·∇log π(y_j) with A_j = −β·δ_j, a centred, KL-penalised reward:
    the scale of a policy gradient at any β. (The published δ² has gradients that grow as 1/β.)
    """

    def per_group(
        self,
        log_prob: Float[Array, " G"],
        reference_log_prob: Float[Array, " G"],
        rewards: Float[Array, " G"],
        *,
        kl_coef: float,
    ) -> Float[Array, " G"]:
        """½·β·δ_j² for each completion of one group."""
        residual = tb_residual(log_prob, reference_log_prob, rewards, kl_coef=kl_coef)
        return 0.5 * kl_coef * residual**2
