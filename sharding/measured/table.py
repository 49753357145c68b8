"""Costs a whole table of runs at once: rows whose programs have one structure become arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from sharding.costs.constants import Calibration, Constants
from sharding.costs.cost import Estimate, estimate
from sharding.costs.local import View
from sharding.costs.machine import Machine, machine
from sharding.costs.memory import memory
from sharding.costs.strategies import Strategies
from sharding.measured.runs import Run
from sharding.programs.program import Program
from sharding.programs.transformer import transformer

# From the least recomputation to the most: what a table leaves blank.
_REMAT_ORDER = {"xla_tpu": ("none", "dots", "projections", "full")}
_OTHER_REMAT_ORDER = ("none", "attention", "dots", "full")
_PRECISIONS = ("bf16", "fp8", "fp4", "int8")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs whose programs differ in sizes only.

    Attributes:
      rows: their positions in the table.
      program: one of them.
      sizes: dimension to its size in each.
      repeats: repetitions of each block in each.
      strategies: of each.
      machine: of each, without constants.
    """

    rows: np.ndarray
    program: Program
    sizes: Mapping[str, np.ndarray]
    repeats: tuple[np.ndarray, ...]
    strategies: Strategies
    machine: Machine

    def estimate(self, constants: Any) -> Estimate:
        """Costs the runs under constants, whose attributes are scalars or one a run."""
        return estimate(
            self.program,
            self.strategies,
            replace(self.machine, constants=constants),
            sizes=self.sizes,
            repeats=self.repeats,
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Runs, ready to be costed again and again.

    Attributes:
      runs: the runs, with rematerialisation filled in.
      groups: the same as arrays.
    """

    runs: tuple[Run, ...]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Table":
        """Groups runs and fills in rematerialisation; `sharding.measured.runs` has the rules."""
        programs = [transformer(run.config) for run in runs]
        runs = _with_remat(runs, programs)
        by_key: dict[Any, list[int]] = {}
        for index, (run, program) in enumerate(zip(runs, programs, strict=True)):
            by_key.setdefault(_structure(run, program), []).append(index)
        groups = tuple(_group(runs, programs, rows) for rows in by_key.values())
        return cls(runs=runs, groups=groups)

    def predict(self, calibration: Calibration) -> np.ndarray:
        """Seconds of a step of every run."""
        return self.evaluate(
            [calibration.constants(run.cluster.chip.name, run.stack) for run in self.runs]
        )

    def evaluate(self, constants: Sequence[Constants]) -> np.ndarray:
        """Seconds of a step of every run under constants of its own."""
        arrays = {
            f.name: np.asarray([getattr(c, f.name) for c in constants]) for f in fields(Constants)
        }
        return self.evaluate_arrays(arrays)

    def evaluate_arrays(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The same with constants as arrays, one entry a run."""
        found = np.empty(len(self.runs))
        for group in self.groups:
            mine = SimpleNamespace(**{name: values[group.rows] for name, values in arrays.items()})
            found[group.rows] = group.estimate(mine).step_s
        return found

    def memory_bytes(self) -> np.ndarray:
        """Predicted bytes of a device of every run."""
        found = np.empty(len(self.runs))
        for group in self.groups:
            view = View(group.program, group.strategies, group.sizes)
            found[group.rows] = memory(view, group.repeats).total
        return found

    def subset(self, rows: Sequence[int]) -> "Table":
        """A table of some of the runs."""
        return Table.of([self.runs[i] for i in rows])


def _with_remat(runs: Sequence[Run], programs: Sequence[Program]) -> tuple[Run, ...]:
    least = [None if run.remat else _least_remat(run, program)
             for run, program in zip(runs, programs, strict=True)]  # fmt: skip
    # A launch that failed must not be read as one that recomputed enough to fit: it ran as those
    # of its problem did that came back.
    shared: dict[Any, int] = {run.problem: 0 for run in runs if run.measured_s is None}
    for run, position in zip(runs, least, strict=True):
        if run.problem in shared and run.measured_s is not None and position is not None:
            shared[run.problem] = max(shared[run.problem], position)
    found = []
    for run, position in zip(runs, least, strict=True):
        if position is not None:
            remat = _remat_order(run)[shared.get(run.problem, position)]
            run = replace(run, strategy=replace(run.strategy, remat=remat), remat=remat)
        found.append(run)
    return tuple(found)


def _remat_order(run: Run) -> tuple[str, ...]:
    return _REMAT_ORDER.get(run.stack, _OTHER_REMAT_ORDER)


def _least_remat(run: Run, program: Program) -> int:
    """Position of the first policy that fits, or of the last."""
    choices = [replace(run.strategy, remat=policy) for policy in _remat_order(run)]
    need = memory(View(program, Strategies.stack(choices), None),
                  [b.repeat for b in program.blocks]).total  # fmt: skip
    fitting = np.flatnonzero(need <= run.cluster.memory_bytes)
    return int(fitting[0]) if len(fitting) else len(choices) - 1


def _structure(run: Run, program: Program) -> Any:
    blocks = tuple(replace(block, repeat=1) for block in program.blocks)
    tensors = tuple(program.tensors.values())
    return (blocks, tensors, program.training, program.trained,
            program.optimizer_bytes, program.gradient_dtype,
            run.cluster.is_torus)  # fmt: skip


def _group(runs: Sequence[Run], programs: Sequence[Program], rows: Sequence[int]) -> Group:
    mine = [runs[i] for i in rows]
    some = [programs[i] for i in rows]
    strategies = [run.strategy for run in mine]
    single = [
        machine(run.cluster, Strategies.stack([s]), None)
        for run, s in zip(mine, strategies, strict=True)
    ]
    peaks = {name: np.asarray([_peak(m.peak, name) for m in single]) for name in _PRECISIONS}
    scalars = {
        name: np.asarray([float(getattr(m, name)) for m in single])
        for name in ("hbm", "pcie", "tile", "domains")
    }
    return Group(
        rows=np.asarray(rows),
        program=some[0],
        sizes={d: np.asarray([p.dims[d] for p in some]) for d in some[0].dims},
        repeats=tuple(
            np.asarray([p.blocks[i].repeat for p in some]) for i in range(len(some[0].blocks))
        ),
        strategies=Strategies.stack(strategies),
        machine=Machine(
            peak=peaks,
            torus=mine[0].cluster.is_torus,
            bandwidth=np.concatenate([m.bandwidth for m in single]),
            crosses=np.concatenate([m.crosses for m in single]),
            constants=None,
            **scalars,
        ),
    )


def _peak(peak: Mapping[str, float], precision: str) -> float:
    """A chip without a precision computes in the next wider one that it has."""
    wider = {"fp4": ("fp4", "fp8"), "int8": ("int8", "fp8")}.get(precision, (precision,))
    return next(peak[name] for name in (*wider, "bf16") if name in peak)
