"""Trajectory balance with a group-mean estimate of log Z (VarGrad; TBA, arXiv:2503.18929).

The loss is zero only at π ∝ π_ref·exp(R/β), whichever policy with full support wrote the
completions: no importance ratio, no critic.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def tb_residual(
    log_prob: Float[Array, " G"],
    reference_log_prob: Float[Array, " G"],
    rewards: Float[Array, " G"],
    *,
    kl_coef: float | Float[Array, ""],
) -> Float[Array, " G"]:
    """δ_j = log Ẑ + log π(y_j) − log π_ref(y_j) − R_j/β of one group, in nats.

    log Ẑ is the group's mean of the negated rest, held constant under differentiation: Σδ = 0
    makes the gradient the same either way.

    Args:
      log_prob: of whole completions under the policy being trained.
      reference_log_prob: the same under the frozen reference.
      rewards: R, the effective reward, any penalty included.
      kl_coef: β, in reward units per nat; an array where a schedule gives it.

    Raises:
      ValueError: a group of one, or a number `kl_coef` that is not positive.
    """
    if log_prob.shape[0] < 2:
        raise ValueError(
            "trajectory balance needs at least two completions a prompt: "
            f"{log_prob.shape[0]}; raise group_size"
        )
    if isinstance(kl_coef, float) and kl_coef <= 0.0:
        raise ValueError(f"trajectory balance needs a positive kl_coef: {kl_coef=}")
    rest = log_prob - reference_log_prob - rewards / kl_coef
    return rest - jax.lax.stop_gradient(jnp.mean(rest))


@dataclass(frozen=True, kw_only=True)
class TrajectoryBalance:
    """The squared residual δ² of each completion, in one of three scales.

    The minimiser does not depend on the scale, the length of the gradient does. With
    A_j = −β·δ_j, the centred and KL-penalised reward, it is a policy gradient: mean-baseline
    REINFORCE with the KL inside the reward, for any behaviour policy and without a ratio.

    Attributes:
      scale: "reward": ½β·δ², whose gradient is −mean_j A_j·∇log π(y_j) at any β;
        "squared": δ², as published, whose gradient is 2/β times that: annealing β from 1 to
        .05 raises the effective learning rate 20-fold, unless the optimiser is scale-free;
        "reward_per_token": ½β·δ²/T with the longest completion's T, as in the authors' later
        code, so that the gradient does not grow with the length either.
    """

    scale: Literal["reward", "squared", "reward_per_token"] = "reward"

    def __post_init__(self) -> None:
        if self.scale not in ("reward", "squared", "reward_per_token"):
            raise ValueError(
                f"scale must be 'reward', 'squared' or 'reward_per_token': {self.scale!r}"
            )

    def per_group(
        self,
        log_prob: Float[Array, " G"],
        reference_log_prob: Float[Array, " G"],
        rewards: Float[Array, " G"],
        *,
        kl_coef: float | Float[Array, ""],
        completion_len: int = 1,
    ) -> Float[Array, " G"]:
        """The scaled δ_j² of each completion of one group.

        Args:
          log_prob: see `tb_residual`, as for the next three.
          reference_log_prob: of the frozen reference.
          rewards: R.
          kl_coef: β.
          completion_len: T; only "reward_per_token" reads it.
        """
        residual = tb_residual(log_prob, reference_log_prob, rewards, kl_coef=kl_coef)
        if self.scale == "squared":
            return residual**2
        length = completion_len if self.scale == "reward_per_token" else 1
        return (0.5 / length) * kl_coef * residual**2
