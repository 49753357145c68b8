"""Advantages: how much better a completion, or a token of it, was than a baseline.

Two layers. The functions treat one sequence or one group and are `vmap`ped by their callers.
The configurations below them (`GAE`, `LeaveOneOut`, `GroupNormalised`, `GreedyBaseline`,
`GroupMean`) name a choice and its options; `jaxrl.recipes` composes them.

>>> import jax.numpy as jnp
>>> leave_one_out(jnp.asarray([4.0, 0.0, 2.0])).tolist()
[3.0, -3.0, 0.0]
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# ------------------------------------------------------------------ one sequence, one group


def gae(
    rewards: Float[Array, " T"],
    values: Float[Array, " T"],
    mask: Bool[Array, " T"],
    *,
    gamma: float,
    gae_lambda: float,
) -> Float[Array, " T"]:
    """Generalised advantage estimates of one completion; 0 on padding.

    δ_t = r_t + γ·V_{t+1} − V_t,  A_t = δ_t + γλ·A_{t+1}   (GAE, arXiv:1506.02438, eqs. 11, 16;
    V beyond the end is 0, as in safe-rlhf)

    Args:
      rewards: per token, in reward units.
      values: of the state before each token.
      mask: True on tokens the policy chose; padding must be on the right.
      gamma: discount γ, in [0, 1].
      gae_lambda: λ, in [0, 1]; 1 gives Monte-Carlo returns, 0 one-step TD.

    >>> gae(jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]), jnp.ones(2, bool),
    ...     gamma=1.0, gae_lambda=1.0).tolist()
    [0.5, 0.5]
    """
    rewards = jnp.where(mask, rewards, 0.0)
    values = jnp.where(mask, values, 0.0)
    next_values = jnp.append(values[1:], 0.0)
    deltas = rewards + gamma * next_values - values

    def step(carry: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = delta + gamma * gae_lambda * carry
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros((), deltas.dtype), deltas, reverse=True)
    return jnp.where(mask, advantages, 0.0)


def group_mean(rewards: Float[Array, " G"]) -> Float[Array, " G"]:
    """R_j − mean_G R: Dr. GRPO (arXiv:2503.20783), and what trajectory balance implies."""
    return rewards - jnp.mean(rewards)


def leave_one_out(rewards: Float[Array, " G"]) -> Float[Array, " G"]:
    """R_j − mean_{i≠j} R_i = G/(G−1)·(R_j − mean_G R)   (RLOO, arXiv:2402.14740).

    Raises:
      ValueError: a group of one has no other sample to compare with.
    """
    size = rewards.shape[0]
    if size < 2:
        raise ValueError(
            f"leave-one-out needs at least two completions a prompt: {size=}; raise group_size"
        )
    return group_mean(rewards) * (size / (size - 1))


def group_normalised(rewards: Float[Array, " G"], *, std_eps: float) -> Float[Array, " G"]:
    """(R_j − mean_G R) / (std_G R + ε)   (GRPO, arXiv:2402.03300; ddof 1 as in TRL and verl).

    A group of equal rewards, or of one completion, has advantage 0.
    """
    size = rewards.shape[0]
    centred = group_mean(rewards)
    std = jnp.sqrt(jnp.sum(centred**2) / max(size - 1, 1))
    return centred / (std + std_eps)


def greedy_baseline(
    rewards: Float[Array, " G"], greedy: Float[Array, ""], *, clip: float | None
) -> Float[Array, " G"]:
    """clip(R_j − R_greedy, ±clip)   (ReMax, arXiv:2310.10505; the clip is its code's, 5)."""
    advantage = rewards - greedy
    return advantage if clip is None else jnp.clip(advantage, -clip, clip)


def discount_to_end(
    advantage: Float[Array, ""], mask: Bool[Array, " T"], *, gamma: float
) -> Float[Array, " T"]:
    """Spreads one number over a completion: γ^(tokens left after t)·advantage; 0 on padding."""
    left = jnp.sum(mask) - jnp.cumsum(mask)
    return jnp.where(mask, gamma**left * advantage, 0.0)


def reward_to_go(rewards: Float[Array, " T"], mask: Bool[Array, " T"]) -> Float[Array, " T"]:
    """Σ_{s≥t} r_s over the unmasked tokens; 0 on padding."""
    rewards = jnp.where(mask, rewards, 0.0)
    return jnp.where(mask, jnp.cumsum(rewards[::-1])[::-1], 0.0)


def standardise(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """(x − mean)/(std + 1e-8) over the unmasked entries of a batch; 0 outside."""
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(values, where=mask) / count
    variance = jnp.sum((values - mean) ** 2, where=mask) / count
    return jnp.where(mask, (values - mean) / (jnp.sqrt(variance) + 1e-8), 0.0)


# ------------------------------------------------------------------------------ choices


@dataclass(frozen=True, kw_only=True)
class GAE:
    """Advantages from a critic, as safe-rlhf computes them.

    Attributes:
      gamma, gae_lambda: see `gae`; safe-rlhf fixes them at 1 and .95.
      clip_range_score: token rewards and costs are clamped to ± this.
      clip_range_value: the critic may move this far from its old value within one update.
      value_coef: weight of the critic's loss beside the policy's.
    """

    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range_score: float = 50.0
    clip_range_value: float = 5.0
    value_coef: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1]: {getattr(self, name)!r}")
        for name in ("clip_range_score", "clip_range_value"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name} must be positive: {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """RLOO: the mean of the other completions of the group is the baseline."""


@dataclass(frozen=True, kw_only=True)
class GroupMean:
    """Dr. GRPO: the group's mean is the baseline, no division by its standard deviation."""


@dataclass(frozen=True, kw_only=True)
class GroupNormalised:
    """GRPO: rewards standardised within the group.

    With a penalty inside the reward the division distorts the multiplier per prompt.
    """

    std_eps: float = 1e-4

    def __post_init__(self) -> None:
        if self.std_eps <= 0.0:
            raise ValueError(f"std_eps must be positive: {self.std_eps!r}")


@dataclass(frozen=True, kw_only=True)
class GreedyBaseline:
    """ReMax: the reward of the greedy completion is the baseline.

    Attributes:
      clip: the advantage is clamped to ± this; None for the formula as published.
      gamma: the advantage at a token is discounted by the tokens that still follow it.
    """

    clip: float | None = 5.0
    gamma: float = 0.99

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0.0:
            raise ValueError(f"clip must be positive or None: {self.clip!r}")
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"gamma must lie in (0, 1]: {self.gamma!r}")


Advantage = GAE | LeaveOneOut | GroupMean | GroupNormalised | GreedyBaseline
"""What a recipe may name as its `advantage`."""
