"""What searches return: strategies with their predictions, and which of them is best."""

from dataclasses import dataclass

import numpy as np

from sharding.costs.cost import Estimate
from sharding.costs.strategies import Strategies, Strategy

# Predicted times that differ by less than this share are not told apart. The best predicted of many
# measured configurations ran 5 to 7 % slower than the best (decision 0007). A smaller share is
# taken, because not all differences are as uncertain: what recomputation adds is known better than
# how well a collective hides.
TIE_TOLERANCE = 0.02
# Of plans that are not told apart by time, memory decides in steps of this share of a device's: to
# save less serves nobody, and is not worth even a time that only may be longer.
MEMORY_STEP = 0.1


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
      best: the chosen strategy, then the fastest others.
      bound_s: no strategy of the space that fits is faster than this.
      gap: (chosen - bound) / chosen; no more than the tolerance of ties if the search was whole.
      tied: strategies among which memory decided, the chosen one included.
      space: strategies in the space.
      fitting: of these, not known to exceed the memory.
      costed: of these, costed exactly.
      search_time_s: seconds of wall time.
    """

    best: tuple[Candidate, ...]
    bound_s: float
    gap: float
    tied: int
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


def choose(
    times_s: np.ndarray,
    memory_bytes: np.ndarray,
    strategies: Strategies,
    *,
    limit: float,
    tolerance: float,
) -> tuple[int, int]:
    """The best of N strategies: of those that tie with the fastest, the smallest.

    Memory counts in steps; within a step the fewest kinds of parallelism (offload is one more)
    decide, then the time, then the position.

    Args:
      times_s: predicted seconds, (N,).
      memory_bytes: predicted bytes of a device, (N,).
      strategies: N of them.
      limit: bytes that a device has.
      tolerance: share of the fastest time within which strategies tie.

    Returns:
      Its position, and how many tie.
    """
    tied = np.flatnonzero(times_s <= times_s.min() * (1 + tolerance))
    some = strategies[tied]
    kinds = (some.degrees > 1).sum(axis=1) + (some.offload != "none")
    steps = np.floor(memory_bytes[tied] / (MEMORY_STEP * limit))
    order = np.lexsort((tied, times_s[tied], kinds, steps))
    return int(tied[order[0]]), len(tied)
