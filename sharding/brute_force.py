"""Exhaustive references for the searches: slow, plain, and independent of what they check."""

import itertools
from collections.abc import Sequence

import numpy as np

from sharding.constants import Calibration
from sharding.program import Program
from sharding.solver import Candidate, evaluate
from sharding.space import Constraints, candidates
from sharding.topology import Cluster


def best_strategy(
    program: Program,
    cluster: Cluster,
    *,
    constraints: Constraints | None = None,
    calibration: Calibration | None = None,
) -> Candidate:
    """Costs every strategy of the space one by one and returns the fastest that fits.

    Raises:
      ValueError: none fits.
    """
    constraints = constraints or Constraints()
    limit = cluster.memory_bytes * constraints.memory_fraction
    space = candidates(program, cluster, constraints)
    best: Candidate | None = None
    for row in range(len(space)):
        (found,) = evaluate(program, [space.row(row)], cluster, calibration=calibration)
        if found.memory_bytes <= limit and (best is None or found.step_s < best.step_s):
            best = found
    if best is None:
        raise ValueError(f"none of {len(space)} strategies fits into {limit / 1e9:.1f} GB")
    return best


def best_cuts(
    times_s: np.ndarray, *, microbatches: int, handover_s: Sequence[float] | None = None
) -> tuple[float, tuple[int, ...]]:
    """The best step time and cuts of layers into stages, from all cuts.

    Args:
      times_s: (stages, layers) seconds of a layer on a stage.
      microbatches: of a step.
      handover_s: (layers + 1,) seconds to hand over before each layer.
    """
    stages, layers = times_s.shape
    handover = [0.0] * (layers + 1) if handover_s is None else list(handover_s)
    options = []
    for inner in itertools.combinations(range(1, layers), stages - 1):
        cuts = (0, *inner, layers)
        spent = [float(times_s[i, a:b].sum()) for i, (a, b) in enumerate(itertools.pairwise(cuts))]
        total = (microbatches - 1) * max(spent) + sum(spent) + sum(handover[c] for c in inner)
        options.append((total, cuts))
    return min(options)
