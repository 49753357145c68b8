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
from jaxrl.rewards.verifier import last_number, numeric_verifier

__all__ = [
    "RewardFunction",
    "brevity",
    "compose",
    "evaluate",
    "fluency",
    "is_refusal",
    "last_number",
    "numeric_verifier",
    "weighted",
]
