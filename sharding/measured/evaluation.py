"""Predicted against measured: errors, rank correlation, regret, and the trivial baselines."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from sharding.measured.calibrate import model_key
from sharding.measured.runs import Run, Skipped, full_flops

# Fewer measured configurations of one problem than this are no choice.
_SMALLEST_CHOICE = 3


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors |predicted/measured - 1| of some runs.

    Attributes:
      count: runs.
      mean: mean error.
      median: median error.
      within_15: share of runs within 15 %.
      bias: median of predicted/measured.
      worst: largest error.
    """

    count: int
    mean: float
    median: float
    within_15: float
    bias: float
    worst: float

    @classmethod
    def of(cls, predicted: np.ndarray, measured: np.ndarray) -> "Errors | None":
        """None where there are no runs."""
        if not len(measured):
            return None
        ratio = np.asarray(predicted, float) / np.asarray(measured, float)
        error = np.abs(ratio - 1)
        return cls(
            count=len(ratio),
            mean=float(error.mean()),
            median=float(np.median(error)),
            within_15=float((error <= 0.15).mean()),
            bias=float(np.median(ratio)),
            worst=float(error.max()),
        )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties averaged; 0 where a side does not vary.

    >>> spearman(np.array([1.0, 2, 3]), np.array([1.0, 4, 9]))
    1.0
    """
    x, y = rankdata(a), rankdata(b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(round(np.corrcoef(x, y)[0, 1], 12))


def regret(predicted: np.ndarray, measured: np.ndarray) -> float:
    """How much slower the configuration predicted best ran than the best measured one.

    >>> regret(np.array([1.0, 2.0]), np.array([1.1, 1.0]))
    0.1
    """
    return float(round(measured[int(np.argmin(predicted))] / measured.min() - 1, 12))


def problems(runs: Sequence[Run], rows: Sequence[int]) -> dict[Any, list[int]]:
    """Positions of runs by problem, where there is a choice between configurations."""
    found: dict[Any, list[int]] = {}
    for i in rows:
        found.setdefault(runs[i].problem, []).append(i)
    return {key: rows for key, rows in found.items() if len(rows) >= _SMALLEST_CHOICE}


def constant_mfu(runs: Sequence[Run]) -> np.ndarray:
    """The trivial baseline: model FLOPs at the median utilisation of other models, seconds.

    Utilisation is that of the runs of the same chip, whose model is another; of all runs if
    there are none.
    """
    work = np.asarray([3 * full_flops(r.config) / (_peak(r) * r.cluster.chip_count) for r in runs])
    share = np.asarray([w / r.measured_s if r.measured_s else np.nan
                        for w, r in zip(work, runs, strict=True)])  # fmt: skip
    chips = np.asarray([f"{r.stack} {r.cluster.chip.name}" for r in runs])
    models = np.asarray([model_key(r) for r in runs])
    predicted = np.empty(len(runs))
    for i in range(len(runs)):
        others = (models != models[i]) & np.isfinite(share)
        same = others & (chips == chips[i])
        pool = share[same] if same.any() else share[others] if others.any() else np.asarray([0.4])
        predicted[i] = work[i] / np.median(pool)
    return predicted


def _peak(run: Run) -> float:
    return run.cluster.chip.peak_flops["bf16"]


def summarise(
    runs: Sequence[Run],
    skipped: Sequence[Skipped],
    predicted: np.ndarray,
    memory_bytes: np.ndarray,
) -> dict[str, Any]:
    """Everything that `python -m sharding validate` reports beside the rows."""
    measured = np.asarray([r.measured_s or np.nan for r in runs])
    ran = np.flatnonzero(np.isfinite(measured)).tolist()
    groups = problems(runs, ran)
    ranks = [spearman(predicted[rows], measured[rows]) for rows in groups.values()]
    regrets = [regret(predicted[rows], measured[rows]) for rows in groups.values()]
    fits = feasible(runs, memory_bytes)
    sources = sorted({runs[i].source for i in ran})
    return {
        "rows": len(runs) + len(skipped),
        "predicted": len(runs),
        "skipped": [vars(s) for s in skipped],
        "filled": dict(Counter(rule for run in runs for rule in run.filled)),
        "error": _as_dict(Errors.of(predicted[ran], measured[ran])),
        "constant_mfu_error": _as_dict(
            Errors.of(constant_mfu([runs[i] for i in ran]), measured[ran])
        ) if len(ran) else None,
        "sources": {
            source: _as_dict(Errors.of(predicted[rows], measured[rows]))
            for source in sources
            for rows in [np.asarray([i for i in ran if runs[i].source == source])]
        },
        "problems": len(groups),
        "spearman_mean": float(np.mean(ranks)) if ranks else None,
        "regret_mean": float(np.mean(regrets)) if regrets else None,
        "regret_worst": float(np.max(regrets)) if regrets else None,
        "failed_launches": int(np.sum(~np.isfinite(measured))),
        "failed_predicted": int(np.sum(~np.isfinite(measured) & ~fits)),
        "false_alarms": int(np.sum(np.isfinite(measured) & ~fits)),
    }  # fmt: skip


def feasible(runs: Sequence[Run], memory_bytes: np.ndarray) -> np.ndarray:
    """Whether each run is predicted to fit into its devices' memory."""
    return np.asarray(memory_bytes) <= np.asarray([r.cluster.memory_bytes for r in runs])


def _as_dict(errors: Errors | None) -> dict[str, Any] | None:
    return None if errors is None else {k: round(v, 6) for k, v in vars(errors).items()}
