"""Policy-gradient losses, unreduced, and the critic's loss.

Losses stay per token; `jaxrl.objectives.reduce` turns them into one number.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl.objectives.importance import ImportanceCorrected, importance_ratio


def clipped_surrogate(
    ratio: Float[Array, "*shape"],
    advantage: Float[Array, "*shape"],
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Float[Array, "*shape"]:
    """Clipped policy loss, unreduced.

    L = −min(r·A, clip(r, 1−ε, 1+ε_high)·A)   (PPO, arXiv:1707.06347, eq. 7)

    Args:
      ratio: π_new / π_behaviour, dimensionless.
      advantage: in reward units; not differentiated.
      clip_eps: ε, in (0, 1).
      clip_eps_high: upper clip; ε when None.

    Raises:
      ValueError: `clip_eps` outside (0, 1).

    >>> clipped_surrogate(jnp.full((1, 1), 2.0), jnp.ones((1, 1)), clip_eps=0.2)
    Array([[-1.2]], dtype=float32)
    """
    if not 0.0 < clip_eps < 1.0:
        raise ValueError(f"clip_eps must lie in (0, 1): {clip_eps=}")
    high = clip_eps if clip_eps_high is None else clip_eps_high
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + high)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def reinforce(
    log_probs: Float[Array, "*shape"], advantage: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """−A·log π, unreduced (Williams 1992); the advantage is not differentiated."""
    return -advantage * log_probs


def clipped_value_loss(
    values: Float[Array, "*shape"],
    old_values: Float[Array, "*shape"],
    returns: Float[Array, "*shape"],
    *,
    clip_range: float,
) -> Float[Array, "*shape"]:
    """½·max((V − G)², (clip(V, V_old ± c) − G)²), unreduced   (safe-rlhf).

    >>> clipped_value_loss(jnp.array([3.0]), jnp.array([0.0]), jnp.array([1.0]), clip_range=5.0)
    Array([2.], dtype=float32)
    """
    clipped = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate(ImportanceCorrected):
    """PPO's clipped loss; with a correction, decoupled PPO's (arXiv:2110.00641, eq. 5).

    −w·min(r·A, clip(r)·A), where w = 1 and r = π/μ without correction, and w = proximal/μ and
    r = π/proximal with one.

    Attributes:
      clip_eps, clip_eps_high: see `clipped_surrogate`.
      level: "token": one ratio a token; "sequence": one a completion, the product of its
        tokens' (RLOO).
      reduce: "sequence_mean": the mean over a completion's tokens, then over completions
        (safe-rlhf); "token_mean": over all active tokens of the batch ("dapo", TRL's GRPO).
    """

    clip_eps: float = 0.2
    clip_eps_high: float | None = None
    level: Literal["token", "sequence"] = "token"
    reduce: Literal["sequence_mean", "token_mean"] = "sequence_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.clip_eps < 1.0:
            raise ValueError(f"clip_eps must lie in (0, 1): {self.clip_eps!r}")
        if self.clip_eps_high is not None and self.clip_eps_high <= 0.0:
            raise ValueError(f"clip_eps_high must be positive: {self.clip_eps_high!r}")
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level must be 'token' or 'sequence': {self.level!r}")
        if self.reduce not in ("sequence_mean", "token_mean"):
            raise ValueError(f"reduce must be 'sequence_mean' or 'token_mean': {self.reduce!r}")

    def per_token(
        self,
        log_probs: Float[Array, "B G T"],
        behaviour_log_probs: Float[Array, "B G T"],
        advantages: Float[Array, "B G T"],
        mask: Bool[Array, "B G T"],
        proximal_log_probs: Float[Array, "B G T"] | None = None,
    ) -> Float[Array, "B G T"]:
        """The loss of every token; padding holds numbers that reductions must mask.

        Args:
          log_probs: of π, which is differentiated.
          behaviour_log_probs: of μ.
          advantages: per token; not differentiated.
          mask: True on tokens the policy chose.
          proximal_log_probs: of π before the update; only a correction reads them.
        """
        weights = self.weights(proximal_log_probs, behaviour_log_probs, mask)
        before = behaviour_log_probs
        if self.correction != "none" and proximal_log_probs is not None:
            before = proximal_log_probs
        ratio = importance_ratio(log_probs, before, mask, level=self.level)
        return weights * clipped_surrogate(
            ratio, advantages, clip_eps=self.clip_eps, clip_eps_high=self.clip_eps_high
        )


@dataclass(frozen=True, kw_only=True)
class Reinforce(ImportanceCorrected):
    """−w·A·log π: without a correction w = 1, for data of the current policy (ReMax).

    Attributes:
      reduce: as in `ClippedSurrogate`; ReMax divides by all active tokens.
    """

    reduce: Literal["sequence_mean", "token_mean"] = "token_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce not in ("sequence_mean", "token_mean"):
            raise ValueError(f"reduce must be 'sequence_mean' or 'token_mean': {self.reduce!r}")

    def per_token(
        self,
        log_probs: Float[Array, "B G T"],
        behaviour_log_probs: Float[Array, "B G T"],
        advantages: Float[Array, "B G T"],
        mask: Bool[Array, "B G T"],
        proximal_log_probs: Float[Array, "B G T"] | None = None,
    ) -> Float[Array, "B G T"]:
        """The loss of every token; arguments as in `ClippedSurrogate.per_token`."""
        weights = self.weights(proximal_log_probs, behaviour_log_probs, mask)
        return weights * reinforce(jnp.where(mask, log_probs, 0.0), advantages)
