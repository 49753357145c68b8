"""Rewards and costs: functions, learned models, and weighted combinations of both."""

from jaxrl.rewards.functions import (
    RewardFunction,
    brevity,
    compose,
    evaluate,
    fluency,
    is_refusal,
    weighted,
)

__all__ = [
    "RewardFunction",
    "brevity",
    "compose",
    "evaluate",
    "fluency",
    "is_refusal",
    "weighted",
]
