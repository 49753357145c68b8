"""What searches return: strategies with their predictions."""

from dataclasses import dataclass

import numpy as np

from sharding.cost import Estimate
from sharding.strategies import Strategy


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A strategy with its prediction.

    Attributes:
      strategy: the strategy.
      step_s: seconds of a step.
      memory_bytes: of a device.
      terms: seconds by term; they sum to `step_s`.
      memory_terms: bytes by use; they sum to `memory_bytes`, but for `host`.
    """

    strategy: Strategy
    step_s: float
    memory_bytes: float
    terms: dict[str, float]
    memory_terms: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a search found.

    Attributes:
      best: the strategies, fastest first.
      bound_s: no strategy of the space that fits is faster than this.
      gap: (best - bound) / best; 0 if the best is proven.
      space: strategies in the space.
      fitting: of these, not known to exceed the memory.
      costed: of these, costed exactly.
      search_time_s: seconds of wall time.
    """

    best: tuple[Candidate, ...]
    bound_s: float
    gap: float
    space: int
    fitting: int
    costed: int
    search_time_s: float


def candidate(strategy: Strategy, result: Estimate, index: int) -> Candidate:
    """One of the strategies that were costed at once."""
    names = ("parameters", "gradients", "optimizer", "activations", "transient", "host")
    return Candidate(
        strategy=strategy,
        step_s=float(result.step_s[index]),
        memory_bytes=float(result.memory.total[index]),
        terms={n: float(np.broadcast_to(v, result.step_s.shape)[index])
               for n, v in result.terms.items()},
        memory_terms={n: float(getattr(result.memory, n)[index]) for n in names},
    )  # fmt: skip
