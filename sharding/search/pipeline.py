"""Cutting layers into pipeline stages: exact, for layers, chips and links that differ.

T = (m-1)·max_i t_i + Σ_i t_i + Σ_i c_i      (m micro-batches; arXiv:2210.07297, section 3.3)

The slowest stage is enumerated: for each bound on it a dynamic programme finds the cuts with the
smallest rest. Bounds are tried upwards from the smallest that admits any cuts, until even the
best rest cannot make up for a larger one.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class NoCuts(ValueError):
    """Layers that cannot be cut into so many stages, or into none that fit."""


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Layers of the stages of a pipeline.

    Attributes:
      boundaries: from 0 to the number of layers, ascending, one more than there are stages.
      step_s: seconds of all micro-batches.
    """

    boundaries: tuple[int, ...]
    step_s: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(np.diff(self.boundaries).tolist())


def cut_layers(
    times_s: np.ndarray,
    *,
    microbatches: int,
    handover_s: Sequence[float] | None = None,
    state_bytes: np.ndarray | None = None,
    kept_bytes: np.ndarray | None = None,
    limit_bytes: Sequence[float] | None = None,
) -> Cuts:
    """Finds the cuts with the smallest step time.

    Args:
      times_s: (stages, layers) seconds of a layer on a stage for one micro-batch.
      microbatches: of a step.
      handover_s: (layers + 1,) seconds to hand over before each layer; zero when None.
      state_bytes: (layers,) parameters, gradients and optimiser state of a layer.
      kept_bytes: (layers,) activations kept for one micro-batch in flight; stage i of p holds
        p - i of them (1F1B).
      limit_bytes: (stages,) memory of a stage's devices; no limit when None.

    Raises:
      NoCuts: fewer layers than stages, or no cuts that fit.
    """
    stages, layers = times_s.shape
    if layers < stages:
        raise NoCuts(f"every stage needs a layer: {layers=}, {stages=}")
    spent = _stage_sums(times_s)
    allowed = _fitting(stages, layers, microbatches, state_bytes, kept_bytes, limit_bytes)
    handover = np.zeros(layers + 1) if handover_s is None else np.asarray(handover_s, float)
    bounds = np.unique(spent[np.isfinite(spent) & allowed])
    rest_at_best, _ = _cheapest(spent, allowed, handover, np.inf)
    if not np.isfinite(rest_at_best):
        raise NoCuts(
            f"no cuts of {layers} layers into {stages} stages fit into memory; take more stages, "
            "more rematerialisation or a smaller micro-batch"
        )
    best, chosen = np.inf, ()
    for bound in bounds[_first_feasible(spent, allowed, handover, bounds) :].tolist():
        if (microbatches - 1) * bound + rest_at_best >= best:
            break
        rest, cuts = _cheapest(spent, allowed, handover, bound)
        slowest = max(spent[i, a, b] for i, (a, b) in enumerate(itertools.pairwise(cuts)))
        total = (microbatches - 1) * slowest + rest
        if total < best:
            best, chosen = total, cuts
    return Cuts(boundaries=tuple(chosen), step_s=float(best))


def _stage_sums(times: np.ndarray) -> np.ndarray:
    """(stages, layers + 1, layers + 1): seconds of layers a..b-1 on a stage; inf if empty."""
    stages, layers = times.shape
    total = np.concatenate([np.zeros((stages, 1)), np.cumsum(times, axis=1)], axis=1)
    sums = total[:, None, :] - total[:, :, None]
    empty = ~np.triu(np.ones((layers + 1, layers + 1), bool), 1)
    # Sums of equal layers at different places must be equal numbers, or bounds multiply.
    return np.where(empty[None], np.inf, np.round(sums, 12))


def _fitting(
    stages: int,
    layers: int,
    microbatches: int,
    state: np.ndarray | None,
    kept: np.ndarray | None,
    limit: Sequence[float] | None,
) -> np.ndarray:
    allowed = np.ones((stages, layers + 1, layers + 1), bool)
    if limit is None:
        return allowed
    state = np.zeros(layers) if state is None else np.asarray(state, float)
    kept = np.zeros(layers) if kept is None else np.asarray(kept, float)
    for stage in range(stages):
        in_flight = min(stages - stage, microbatches)
        need = _stage_sums((state + in_flight * kept)[None])[0]
        allowed[stage] = need <= limit[stage]
    return allowed


def _first_feasible(
    spent: np.ndarray, allowed: np.ndarray, handover: np.ndarray, bounds: np.ndarray
) -> int:
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        rest, _ = _cheapest(spent, allowed, handover, float(bounds[middle]))
        if np.isfinite(rest):
            high = middle
        else:
            low = middle + 1
    return low


def _cheapest(
    spent: np.ndarray, allowed: np.ndarray, handover: np.ndarray, bound: float
) -> tuple[float, tuple[int, ...]]:
    """The smallest Σ t_i + Σ c_i with no stage above a bound, and its cuts."""
    stages, ends, _ = spent.shape
    value = np.full(ends, np.inf)
    value[0] = 0.0
    choice = np.zeros((stages, ends), int)
    for stage in range(stages):
        step = np.where(allowed[stage] & (spent[stage] <= bound), spent[stage], np.inf)
        entering = value + (handover if stage else 0.0)
        totals = entering[:, None] + step
        choice[stage] = np.argmin(totals, axis=0)
        value = totals[choice[stage], np.arange(ends)]
    cuts = [ends - 1]
    for stage in reversed(range(stages)):
        cuts.append(int(choice[stage, cuts[-1]]))
    return float(value[-1]), tuple(reversed(cuts))
