"""Completions of prompts: written, weighed by the policy that wrote them, and scored."""

from jaxrl.rollouts.collect import Collector as Collector
from jaxrl.rollouts.generate import generate as generate
from jaxrl.rollouts.generate import generate_from_state as generate_from_state
from jaxrl.rollouts.sampling import Sampling as Sampling
from jaxrl.rollouts.sampling import categorical as categorical
from jaxrl.rollouts.sampling import draw as draw
from jaxrl.rollouts.sampling import truncate as truncate
from jaxrl.rollouts.scoring import NonFiniteScores as NonFiniteScores
from jaxrl.rollouts.scoring import Scorer as Scorer
from jaxrl.rollouts.scoring import Scores as Scores
