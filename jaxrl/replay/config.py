"""What can be chosen of a replay, and what the paper chose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

Scores = Mapping[str, Float32[np.ndarray, " n"]]
Score = Callable[[Scores, Scores], Float32[np.ndarray, " n"]]
"""(rewards, costs) of the n records of one prompt, by name, to the score that draws them."""


def reward_score(rewards: Scores, costs: Scores) -> Float32[np.ndarray, " n"]:
    """The entry "reward": TBA's choice."""
    del costs
    return rewards["reward"]


def safe_reward_score(
    rewards: Scores, costs: Scores, *, penalty: float
) -> Float32[np.ndarray, " n"]:
    """R − penalty·1{C > 0}: old safe answers before unsafe ones, the helpful ones first."""
    return rewards["reward"] - np.float32(penalty) * (costs["cost"] > 0)


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """How records are kept and drawn.

    Attributes:
      capacity: records kept of each prompt; the newest stay.
      recent_share: m, the probability that a place of the batch goes to a prompt of the last
        sync, whose newest records are then drawn uniformly.
      inverse_temperature: of the softmax over scores by which all other places draw their
        records; 0 draws uniformly.
      score: what that softmax is over.
      max_staleness: updates by which a record's policy may lie behind the learner; older
        records are dropped. None keeps them, which trajectory balance may use at any age. What
        the frozen reference policy wrote never grows stale.
      margin: δ, in cost units; a completion counts as safe, and its reward for
        `Rollouts.best_safe`, when C ≤ −δ.
    """

    capacity: int = 100
    recent_share: float = 0.5
    inverse_temperature: float = 1.0
    score: Score = reward_score
    max_staleness: int | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1: {self.capacity!r}")
        if not 0.0 <= self.recent_share <= 1.0:
            raise ValueError(f"recent_share is a probability, in [0, 1]: {self.recent_share!r}")
        if not 0.0 <= self.inverse_temperature < float("inf"):
            raise ValueError(
                f"inverse_temperature must be finite and ≥ 0: {self.inverse_temperature!r}"
            )
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ValueError(f"max_staleness must be ≥ 0, or None: {self.max_staleness!r}")
        if not self.margin >= 0.0:
            raise ValueError(f"margin must not be negative: {self.margin!r}")


GSM8K = ReplayConfig(capacity=100, recent_share=0.95, inverse_temperature=0.0)
"""TBA's on GSM8K: 24 completions a prompt for groups of 20, a sync every 2 updates."""

TLDR = ReplayConfig(capacity=100, recent_share=0.5, inverse_temperature=1.0)
"""TBA's on TL;DR: 20 completions a prompt for groups of 20, a sync every 10 updates."""

RECTIFIED = ReplayConfig(capacity=100, recent_share=0.25, inverse_temperature=0.0)
"""For rectified trajectory balance: uniform over the distinct completions that are known, so that
the rarest converges as fast as may be; see docs/rectified_trajectory_balance.md."""
