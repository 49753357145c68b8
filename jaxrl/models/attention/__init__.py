"""Attention: one definition in plain XLA, and the kernels and exchanges that compute the same."""

from jaxrl.models.attention.choice import Attention as Attention
from jaxrl.models.attention.pattern import Pattern as Pattern
from jaxrl.models.attention.plain import Scores as Scores
from jaxrl.models.attention.plain import Window as Window
from jaxrl.models.attention.plain import after_prompt as after_prompt
from jaxrl.models.attention.plain import causal as causal
from jaxrl.models.attention.plain import one_token as one_token
