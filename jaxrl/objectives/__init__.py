"""Losses. They take arrays, never a model; reductions are separate, named functions."""

from jaxrl.objectives.divergence import Estimator, kl_estimate
from jaxrl.objectives.importance import ImportanceCorrected, held_to_cap, importance_ratio
from jaxrl.objectives.policy_gradient import (
    ClippedSurrogate,
    Reinforce,
    clipped_surrogate,
    clipped_value_loss,
    reinforce,
)
from jaxrl.objectives.reduce import sequence_mean, sequence_sum, token_mean
from jaxrl.objectives.trajectory_balance import TrajectoryBalance, tb_residual

Objective = ClippedSurrogate | Reinforce | TrajectoryBalance
"""What a recipe may name as its `objective`."""

__all__ = [
    "ClippedSurrogate",
    "Estimator",
    "ImportanceCorrected",
    "Objective",
    "Reinforce",
    "TrajectoryBalance",
    "clipped_surrogate",
    "clipped_value_loss",
    "held_to_cap",
    "importance_ratio",
    "kl_estimate",
    "reinforce",
    "sequence_mean",
    "sequence_sum",
    "tb_residual",
    "token_mean",
]
