"""Fits the constants to tables of runs, within physical bounds, and reports held-out errors.

min over θ of  Σ_rows w·ρ(log predicted/measured) + Σ_θ ((θ - θ₀)/σ)²

θ are the constants on a scale on which they are free: log-odds for shares, logarithms for times.
θ₀ is the default of `Constants`, and σ says how far data may move it: one constant is shared by
all runs of a software stack, a chip may shift the efficiency of products and memory. ρ is soft_l1,
so that a wrong row of a table does not pull the rest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.optimize import least_squares

from sharding.costs.constants import SHARES, Calibration, Constants
from sharding.measured.runs import Run
from sharding.measured.table import Table

# How far data may move a constant from its default, in log-odds or in logarithms.
_SIGMA_SHARE = 1.0
_SIGMA_TIME = 1.5
# Fused attention is measured by itself: 40 to 60 % of the peak. Runs tell it badly, since every
# other pass of a layer over its sequence grows alike.
_SIGMA = {"attention": 0.4}
# How far a chip may lie from the others of its stack, in log-odds.
_SIGMA_CHIP = 0.4
# What is known of a stack before any run. XLA's collectives on TPUs are asynchronous and its
# programs are one launch, without what nobody reads; PyTorch and Megatron launch every kernel from
# the host, and Megatron's checkpointing repeats a layer to its end. A step of Megatron gathers new
# parameters while the next one begins.
PRIORS = {
    "xla_tpu": Constants(matmul=0.85, overlap_tensor=0.7, overlap_fsdp=0.95, overlap_data=0.6,
                         launch_s=1e-7, kernel_s=2e-6),
    "xla_gpu": Constants(matmul=0.75, launch_s=2e-6, overlap_tensor=0.4),
    "megatron_fp16": Constants(unaligned=0.4, sync_s=1e-4, launch_s=7e-5, overlap_fsdp=0.3,
                               overlap_data=0.1, overlap_tensor=0.02, kernel_s=3e-6, link_s=1e-5,
                               dead=0.97),
    "megatron": Constants(launch_s=2e-5, overlap_tensor=0.4, overlap_update=0.8, kernel_s=3e-6,
                          dead=0.97),
    "fsdp": Constants(launch_s=2e-5, kernel_s=3e-6),
}  # fmt: skip
# The constants that the runs of a stack can tell; the others stay what is known without them.
FITTED = {
    "xla_tpu": ("matmul", "grouped", "attention", "hbm", "scatter", "low_precision", "link",
                "overlap_tensor", "overlap_fsdp", "overlap_data", "network", "jitter"),
    "xla_gpu": ("matmul", "low_precision", "jitter"),
    "megatron_fp16": ("matmul", "fill", "unaligned", "hbm", "link", "network", "kernel_s",
                      "launch_s", "skew", "sync_s", "link_s", "step_s", "jitter"),
    "megatron": ("matmul", "grouped", "attention", "hbm", "scatter", "low_precision", "link",
                 "network", "kernel_s", "launch_s", "overlap_tensor", "jitter"),
    "fsdp": ("matmul", "attention", "hbm", "low_precision", "network", "kernel_s",
             "overlap_fsdp", "jitter"),
}  # fmt: skip
# Constants that depend on the chip within a stack.
_OF_CHIP = ("matmul", "attention", "hbm")
# A residual beyond this counts linearly.
_SOFT = 0.1
# Of finite differences, in log-odds or logarithms.
_STEP = 1e-3
# Shares stay off 0 and 1, where the log-odds end.
_EDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the constants of a stack lie in a vector, and how they are read back."""

    stack: str
    names: tuple[str, ...]
    chips: tuple[str, ...]

    @property
    def shifts(self) -> tuple[str, ...]:
        """Constants that chips may shift: none where there is only one chip."""
        return tuple(n for n in _OF_CHIP if n in self.names and len(self.chips) > 1)

    @property
    def start(self) -> np.ndarray:
        prior = PRIORS[self.stack]
        defaults = [_free(name, getattr(prior, name)) for name in self.names]
        return np.asarray(defaults + [0.0] * (len(self.chips) * len(self.shifts)))

    @property
    def sigma(self) -> np.ndarray:
        widths = [_SIGMA.get(n, _SIGMA_SHARE if n in SHARES else _SIGMA_TIME) for n in self.names]
        return np.asarray(widths + [_SIGMA_CHIP] * (len(self.chips) * len(self.shifts)))

    def read(self, vector: np.ndarray) -> tuple[Constants, dict[str, dict[str, float]]]:
        free = {n: _bound(n, v) for n, v in zip(self.names, vector, strict=False)}
        shifts = vector[len(self.names) :].reshape(len(self.chips), len(self.shifts))
        chips = {
            chip: {name: round(float(s), 4) for name, s in zip(self.shifts, row, strict=True)}
            for chip, row in zip(self.chips, shifts, strict=True)
        }
        return replace(PRIORS[self.stack], **free), chips


def _free(name: str, value: float) -> float:
    if name in SHARES:
        value = min(max(value, _EDGE), 1 - _EDGE)
        return math.log(value / (1 - value))
    return math.log(max(value, 1e-9))


def _bound(name: str, value: float) -> float:
    if name in SHARES:
        return float(f"{1 / (1 + math.exp(-value)):.5g}")
    return float(f"{math.exp(value):.5g}")


def fit(
    runs: Sequence[Run],
    *,
    about: Mapping[str, str] | None = None,
    start: Calibration | None = None,
) -> Calibration:
    """Fits every stack that has runs; the others keep their defaults.

    Args:
      runs: measured runs; failed launches are ignored, and rows that do not say what ran.
      about: kept in the calibration: what the runs are.
      start: where to begin, for refits of nearly the same runs.
    """
    stacks: dict[str, Constants] = {}
    chips: dict[str, dict[str, float]] = {}
    measured = [run for run in runs if run.is_complete]
    for stack in sorted({run.stack for run in measured}):
        mine = Table.of([run for run in measured if run.stack == stack])
        constants, shifts = _fit_stack(mine, stack, start)
        stacks[stack] = constants
        chips |= {f"{stack}/{chip}": values for chip, values in shifts.items()}
    return Calibration(stacks=stacks, chips=chips, about=about or {})


def _fit_stack(
    table: Table, stack: str, start: Calibration | None
) -> tuple[Constants, dict[str, dict[str, float]]]:
    layout = _Layout(
        stack=stack,
        names=FITTED[stack],
        chips=tuple(sorted({run.cluster.chip.name for run in table.runs})),
    )
    residuals = _residuals(table, layout)
    begin = layout.start
    if start is not None and stack in start.stacks:
        begin = _vector(layout, start, stack)
    found = least_squares(
        residuals, begin, method="trf", x_scale=np.maximum(layout.sigma, 0.1), ftol=1e-5, xtol=1e-4,
        diff_step=1e-3, max_nfev=4 if start is not None else 60,
    )  # fmt: skip
    return layout.read(found.x)


def _vector(layout: _Layout, calibration: Calibration, stack: str) -> np.ndarray:
    constants = calibration.stacks[stack]
    values = [_free(n, getattr(constants, n)) for n in layout.names]
    shifts = [
        calibration.chips.get(f"{stack}/{chip}", {}).get(name, 0.0)
        for chip in layout.chips
        for name in layout.shifts
    ]
    return np.asarray(values + shifts)


def _residuals(table: Table, layout: _Layout) -> Callable[[np.ndarray], np.ndarray]:
    measured = np.asarray([run.measured_s for run in table.runs], float)
    weights = row_weights(table.runs)
    chip_of = np.asarray([layout.chips.index(run.cluster.chip.name) for run in table.runs])
    start, sigma = layout.start, layout.sigma

    def residuals(vector: np.ndarray) -> np.ndarray:
        arrays = _arrays(layout, vector, chip_of)
        error = np.log(table.evaluate_arrays(arrays) / measured)
        soft = np.sign(error) * _SOFT * np.sqrt(2 * (np.sqrt(1 + (error / _SOFT) ** 2) - 1))
        prior = (vector - start) / sigma
        return np.concatenate([weights * soft / _SOFT, prior])

    return residuals


def _arrays(layout: _Layout, vector: np.ndarray, chip_of: np.ndarray) -> dict[str, np.ndarray]:
    count = len(layout.names)
    shifts = vector[count:].reshape(len(layout.chips), len(layout.shifts))
    prior = PRIORS[layout.stack]
    arrays = {f.name: np.full(len(chip_of), getattr(prior, f.name)) for f in fields(Constants)}
    for name, value in zip(layout.names, vector[:count], strict=True):
        free = np.full(len(chip_of), value)
        if name in layout.shifts:
            free = free + shifts[chip_of, layout.shifts.index(name)]
        arrays[name] = 1 / (1 + np.exp(-free)) if name in SHARES else np.exp(free)
    return arrays


def row_weights(runs: Sequence[Run]) -> np.ndarray:
    """Weights that keep a source with many runs from deciding alone: n_source^(-1/4)."""
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.source] = counts.get(run.source, 0) + 1
    return np.asarray([counts[run.source] ** -0.25 for run in runs])


def held_out(
    runs: Sequence[Run], calibration: Calibration, *, stacks: Sequence[str] | None = None
) -> np.ndarray:
    """Predictions of every run by a fit that has not seen any run of its model, seconds.

    Each refit is one Gauss-Newton step from the fit of all runs, without the model's rows: the
    constants hardly move, and a step costs a solve instead of a search.

    Args:
      runs: measured runs, the ones that `calibration` was fitted to.
      calibration: the fit of all of them.
      stacks: software to do this for; the others get their fitted prediction.
    """
    predicted = Table.of(runs).predict(calibration)
    for stack in stacks if stacks is not None else sorted({run.stack for run in runs}):
        rows = np.asarray([i for i, r in enumerate(runs) if r.stack == stack and r.measured_s])
        if len(rows):
            predicted[rows] = _held_out_stack([runs[i] for i in rows.tolist()], stack, calibration)
    return predicted


def _held_out_stack(runs: Sequence[Run], stack: str, calibration: Calibration) -> np.ndarray:
    table = Table.of(runs)
    chips = tuple(sorted({run.cluster.chip.name for run in runs}))
    layout = _Layout(stack=stack, names=FITTED[stack], chips=chips)
    chip_of = np.asarray([chips.index(run.cluster.chip.name) for run in runs])
    measured = np.asarray([run.measured_s for run in runs], float)
    vector = _vector(layout, calibration, stack)

    def error(free: np.ndarray) -> np.ndarray:
        return np.log(table.evaluate_arrays(_arrays(layout, free, chip_of)) / measured)

    base = error(vector)
    steps = np.full(len(vector), _STEP)
    jacobian = np.stack(
        [(error(vector + h * unit) - base) / h for h, unit in zip(steps, np.eye(len(vector)),
                                                                 strict=True)], axis=1
    )  # fmt: skip
    complete = np.asarray([run.is_complete for run in runs])
    weights = complete * row_weights(runs) ** 2 / (_SOFT**2 * np.sqrt(1 + (base / _SOFT) ** 2))
    prior = 1 / layout.sigma**2
    names = np.asarray([model_key(run) for run in runs])
    predicted = np.empty(len(runs))
    for name in sorted(set(names.tolist())):
        seen, out = names != name, names == name
        some = jacobian[seen] * weights[seen, None]
        normal = some.T @ jacobian[seen] + np.diag(prior)
        slope = some.T @ base[seen] + prior * (vector - layout.start)
        refit = vector - np.linalg.solve(normal, slope)
        predicted[out] = measured[out] * np.exp(error(refit)[out])
    return predicted


def model_key(run: Run) -> str:
    """What "the same model" means: name, depth and width."""
    return f"{run.config.name} {run.config.layers}x{run.config.d_model}"
