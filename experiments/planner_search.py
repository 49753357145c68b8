"""How long does it take to plan for 256 and for 8,192 chips, and is the answer always the same?

    python -m experiments.planner_search
    python -m experiments.planner_search --programs 256 --rounds 3

Each program is planned by the command that a user types, `python -m sharding plan … --json`, in a
process of its own that may use one core: start of Python, imports, search and output. The rounds
are interleaved, so that a busy minute falls on all programs alike, and every round has another seed
of Python's hashes, so that an answer that depends on the order of a set would show. Wanted, of the
slowest round: less than 8 s for 256 chips and 40 s for 8,192, of which the search takes less than 5
and 30 s; and the same answer each time. CPU only, about three minutes. Expected: the figures in
results/planner_search.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import Report, Run, RunOptions, Table

ROOT = Path(__file__).resolve().parent.parent
# Chips to the seconds that the whole command and the search may take.
WANTED_S = {256: (8.0, 5.0), 8192: (40.0, 30.0)}
# A command that takes this many times what is wanted is given up.
_PATIENCE = 10.0
# Fields of the answer that say how long it took, and nothing of the plan.
_TIMES = ("search_time_s",)
# Sixteen nodes of each of two generations.
_TWO_GENERATIONS = {
    "name": "16 nodes of H100s and 16 of A100s",
    "nodes": [{"chip": chip, "count": 8, "repeat": 16} for chip in ("h100", "a100")],
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem for the command line.

    Attributes:
      model: published decoder.
      cluster: its name, or what a cluster file holds.
      chips: how many it has.
      batch: sequences of a step.
      length: tokens of a sequence.
    """

    model: str
    cluster: str | Mapping[str, Any]
    chips: int
    batch: int
    length: int = 4096

    @property
    def where(self) -> str:
        """The cluster's name."""
        return self.cluster if isinstance(self.cluster, str) else self.cluster["name"]

    @property
    def name(self) -> str:
        """Of the case, for `--programs` and the table."""
        return f"{self.chips} {self.model} {self.where}"


CASES = (
    Case(model="llama3-8b", cluster="v5e:16x16", chips=256, batch=512),
    Case(model="llama3-70b", cluster="h100:32x8", chips=256, batch=512),
    Case(model="mixtral-8x7b", cluster="v5p:4x8x8", chips=256, batch=512),
    Case(model="deepseek-v3", cluster="h100:32x8", chips=256, batch=1024),
    Case(model="llama3-8b", cluster=_TWO_GENERATIONS, chips=256, batch=512),
    Case(model="llama3-8b", cluster="v6e:16x16x32slices", chips=8192, batch=8192),
    Case(model="llama3.1-405b", cluster="v5p:16x16x16x2slices", chips=8192, batch=8192),
    Case(model="llama3.1-405b", cluster="h100:1024x8", chips=8192, batch=8192),
    Case(model="deepseek-v3", cluster="h100:1024x8", chips=8192, batch=16384),
    Case(model="deepseek-v3", cluster="tpu7x:16x16x16x2slices", chips=8192, batch=16384),
)


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All of experiments.planner_search; the seed is that of Python's hashes in the first round."""

    rounds: int = 5
    """How often each program is planned."""
    programs: tuple[str, ...] = ()
    """Parts of names, such as 256, h100 or deepseek; all programs when empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 2:
            raise ValueError(f"two rounds at least tell whether answers are the same: "
                             f"rounds={self.rounds}")  # fmt: skip
        if not self.chosen:
            names = "; ".join(case.name for case in CASES)
            raise ValueError(f"no program is called like {self.programs}; there are: {names}")

    @property
    def chosen(self) -> list[Case]:
        """The cases that `programs` names."""
        parts = self.programs
        return [c for c in CASES if not parts or any(part in c.name for part in parts)]


PRESETS = {"full": Config(), "quick": Config(rounds=2, programs=("256 llama3-8b v5e",))}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One command.

    Attributes:
      wall_s: from start to end of the process.
      cpu_s: seconds of processor time that it took.
      answer: what it printed.
    """

    wall_s: float
    cpu_s: float
    answer: Mapping[str, Any]


@contextlib.contextmanager
def one_core() -> Iterator[bool]:
    """Lets this process and those that it starts use one core; False where that cannot be said."""
    if not hasattr(os, "sched_setaffinity"):  # only Linux has it
        yield False
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield True
    finally:
        os.sched_setaffinity(0, before)


def measure(case: Case, folder: Path, hash_seed: int) -> Measurement:
    """Plans a case by the command line and times the process.

    Args:
      case: what is planned.
      folder: for the cluster's file, where the cluster has no name of its own.
      hash_seed: of Python's hashes.

    Raises:
      RuntimeError: the command failed or took too long.
    """
    cluster = case.where
    if not isinstance(case.cluster, str):
        file = folder / "cluster.json"
        file.write_text(json.dumps(case.cluster), encoding="utf-8")
        cluster = str(file)
    command = [sys.executable, "-m", "sharding", "plan", "--json", "--model", case.model,
               "--cluster", cluster, "--global-batch", str(case.batch),
               "--seq-len", str(case.length)]  # fmt: skip
    limit_s = _PATIENCE * WANTED_S[case.chips][0]
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # The package of this folder, wherever the command is given.
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    env = {**os.environ, **single, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": paths,
           "JAX_PLATFORMS": "cpu"}  # fmt: skip
    before, began = _children_cpu_s(), time.perf_counter()
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False,
                              timeout=limit_s)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took longer than {limit_s:.0f} s") from error
    wall_s = time.perf_counter() - began
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(said[-1][:300])
    return Measurement(
        wall_s=wall_s, cpu_s=_children_cpu_s() - before, answer=json.loads(done.stdout)
    )


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summarise(case: Case, found: Sequence[Measurement]) -> dict[str, Any]:
    """Times of a case over its rounds, and whether every answer is the first."""
    wanted_s, wanted_search_s = WANTED_S[case.chips]
    first = _plan_of(found[0].answer)
    searches = [one.answer["search_time_s"] for one in found]
    worst_s, worst_search_s = max(one.wall_s for one in found), max(searches)
    return {
        "case": case.name,
        "chips": case.chips,
        "model": case.model,
        "cluster": case.where,
        "rounds": len(found),
        "wall_s": statistics.median(one.wall_s for one in found),
        "wall_worst_s": worst_s,
        "cpu_s": statistics.median(one.cpu_s for one in found),
        "search_s": statistics.median(searches),
        "search_worst_s": worst_search_s,
        "wanted_s": wanted_s,
        "wanted_search_s": wanted_search_s,
        "same": all(_plan_of(one.answer) == first for one in found),
        "met": worst_s < wanted_s and worst_search_s < wanted_search_s,
        "space": first["space"],
        "costed": first["costed"],
        "mesh": first["mesh"],
        "gap": first["gap"],
    }


def _plan_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in _TIMES}


def experiment(run: Run) -> None:
    config: Config = run.config
    found: dict[str, list[Measurement]] = {}
    errors: dict[str, str] = {}
    cases = config.chosen
    with one_core() as pinned, run.progress("commands", config.rounds * len(cases)) as progress:
        for turn in range(config.rounds):
            for position, case in enumerate(cases):
                if case.name not in errors:
                    try:
                        one = measure(case, run.folder, config.seed + turn)
                        found.setdefault(case.name, []).append(one)
                    except RuntimeError as error:
                        errors[case.name] = str(error)
                progress.update(turn * len(cases) + position + 1)
    rows = [
        {"case": case.name, "error": errors[case.name]}
        if case.name in errors
        else summarise(case, found[case.name])
        for case in cases
    ]
    # On a machine with other work, processes wait and the wall time says little of the planner.
    load = os.getloadavg()[0]
    table = _table(rows)
    said = f"{_verdict(rows)}\nload average of the machine: {load:.1f} on {os.cpu_count()} cores"
    where = "one core" if pinned else "this system does not hold a process to one core"
    page = Report("How long planning takes", f"`python -m sharding plan --json`, {where}")
    page.table(table).text(said)
    page.record("Config", harness.to_json(config)).write(run.folder / "report.html")
    run.finish(
        {"rows": rows, "one_core": pinned, "load_average": load, "cores": os.cpu_count()},
        f"{table.text()}\n{said}\n",
    )


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for chips, (wanted_s, wanted_search_s) in WANTED_S.items():
        mine = [r for r in rows if "error" not in r and r["chips"] == chips]
        if mine:
            lines.append(
                f"{chips:,} chips: slowest command {max(r['wall_worst_s'] for r in mine):.1f} s "
                f"(wanted < {wanted_s:g}), slowest search "
                f"{max(r['search_worst_s'] for r in mine):.1f} s (wanted < {wanted_search_s:g}); "
                f"the same answer each time in {sum(r['same'] for r in mine)} of {len(mine)}; at "
                f"most {max(r['cpu_s'] for r in mine):.1f} s of a processor, which is what a free "
                "core takes"
            )
    failed = [f"{r['case']} failed: {r['error']}" for r in rows if "error" in r]
    return "\n".join([*lines, *failed])


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    def cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
        if "error" in row:
            return row["case"], *[None] * 8
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
        return (
            row["case"],
            f"{row['wall_s']:.1f}",
            f"{row['wall_worst_s']:.1f}",
            f"{row['cpu_s']:.1f}",
            f"{row['search_s']:.2f}",
            f"{row['search_worst_s']:.2f}",
            f"{row['space']:,}",
            mesh,
            "yes" if row["same"] else "no",
        )

    columns = ("chips, model, cluster", "command s", "worst", "processor s", "search s", "worst",
               "strategies", "plan", "same each time")  # fmt: skip
    return Table(
        columns=columns,
        rows=tuple(map(cells, rows)),
        caption="Medians and worst rounds of `python -m sharding plan --json`.",
    )


def main(argv: list[str] | None = None) -> None:
    config = harness.cli(
        Config,
        presets=PRESETS,
        argv=argv,
        prog="python -m experiments.planner_search",
        description=__doc__,
    )
    harness.main(experiment, "planner_search", config)


if __name__ == "__main__":
    main()
