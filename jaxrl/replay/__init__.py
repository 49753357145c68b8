"""Replay: past completions of every prompt, drawn again by recency or by reward.

    rollouts ─► add ─► a buffer for each prompt ─► sample ─► rollouts, ready for the learner

Exactly the buffer of TBA (Trajectory Balance with Asynchrony, arXiv:2503.18929): host-side
NumPy, a function of its seed and of what was added, saved and restored with the run.
"""

from jaxrl.replay.buffer import PromptBuffer
from jaxrl.replay.config import (
    GSM8K,
    RECTIFIED,
    TLDR,
    ReplayConfig,
    Score,
    reward_score,
    safe_reward_score,
)
from jaxrl.replay.records import Record
from jaxrl.replay.replay import EmptyReplay, Replay

__all__ = [
    "GSM8K",
    "RECTIFIED",
    "TLDR",
    "EmptyReplay",
    "PromptBuffer",
    "Record",
    "Replay",
    "ReplayConfig",
    "Score",
    "reward_score",
    "safe_reward_score",
]
