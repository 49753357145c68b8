"""Exhaustive references that the tests of the searches compare with: slow, plain, independent."""

import itertools
from collections.abc import Sequence

import numpy as np

from sharding.costs.constants import Calibration
from sharding.machines.topology import Cluster
from sharding.programs.program import Program
from sharding.search.candidate import MEMORY_STEP, TIE_TOLERANCE, Candidate
from sharding.search.solver import evaluate
from sharding.search.space import Constraints, candidates


def best_strategy(
    program: Program,
    cluster: Cluster,
    *,
    constraints: Constraints | None = None,
    calibration: Calibration | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> Candidate:
    """Costs every strategy of the space one by one and returns the best that fits.

    The fastest, or with a tolerance of ties the smallest of those nearly as fast.

    Raises:
      ValueError: none fits.
    """
    constraints = constraints or Constraints()
    limit = cluster.memory_bytes * constraints.memory_fraction
    space = candidates(program, cluster, constraints)
    fitting: list[Candidate] = []
    for row in range(len(space)):
        (found,) = evaluate(program, [space.row(row)], cluster, calibration=calibration)
        if found.memory_bytes <= limit:
            fitting.append(found)
    if not fitting:
        raise ValueError(f"none of {len(space)} strategies fits into {limit / 1e9:.1f} GB")
    slowest = min(found.step_s for found in fitting) * (1 + tie_tolerance)

    def size(found: Candidate) -> tuple[float, int, float]:
        held = found.memory_bytes // (MEMORY_STEP * cluster.memory_bytes)
        return held, len(found.strategy.mesh) + (found.strategy.offload != "none"), found.step_s

    return min((found for found in fitting if found.step_s <= slowest), key=size)


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
