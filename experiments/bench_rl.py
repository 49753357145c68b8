"""How long does one RL step take, here and elsewhere, and how far is it from arithmetic?

    python -m experiments.bench_rl --make-peers

One GRPO step (rollout, scoring, update) of a random 3.2 M Qwen3-shaped policy: 8 prompts × 8
completions of 64 tokens. Contestants: this project, a plain jitted JAX loop, and Tunix and TRL
where they are installed (`--make-peers` installs each into an environment of its own under
~/.cache/jaxrl-safe; on Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares
the CUDA build of PyTorch). Each is a process of its own, all with the same weights and prompts;
rounds are interleaved, because a shared machine drifts, and ratios are taken within rounds.

About 3 minutes on 2 CPU cores. To expect: a step at least 1.3 times faster than the faster peer,
generation at least twice its tokens a second, a first step within 8 s cold and 3 s with the
persistent compilation cache, and no compilation after warm-up.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from experiments import harness
from experiments.bench import processes
from experiments.bench.processes import Contestant, Worker, WorkerFailed
from experiments.bench.workload import Workload
from experiments.harness import Run
from experiments.harness.report import Report
from experiments.harness.tables import Table

Name = Literal["jaxrl", "plain", "tunix", "trl"]
MODULES = {
    "jaxrl": "experiments.bench.ours",
    "plain": "experiments.bench.plain",
    "tunix": "experiments.bench.tunix_peer",
    "trl": "experiments.bench.trl_peer",
}
LOGIT_TOLERANCE = 1e-4
MATMULS = {
    "square": (1024, 1024, 1024),
    "update": (6144, 256, 768),
    "decode": (64, 256, 768),
}
"""Shapes (rows, inner, columns) whose float32 rate is measured; "decode" is one token a row."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(harness.RunOptions):
    """What is measured, and on whom."""

    steps: int = 5
    """Measured rounds; each contestant does one RL step in each."""
    warmup: int = 2
    """Steps that each contestant does after its first one and before the measured rounds."""
    contestants: tuple[Name, ...] = ("jaxrl", "plain", "tunix", "trl")
    """Who takes part; peers that are not installed are left out with a note."""
    make_peers: bool = field(default=False, metadata=harness.COSMETIC)
    """First install the peers named, each into an environment of its own."""
    tunix_python: Path | None = None
    """Interpreter of an environment with google-tunix; by default the one of --make-peers."""
    trl_python: Path | None = None
    """Interpreter of an environment with trl and torch; by default the one of --make-peers."""
    timeout_s: float = 600.0
    """Longest wait for any answer of a worker, in seconds."""
    layers: int = 4
    """Layers of the policy; other numbers than 4 are for trying things out."""
    prompts: int = 8
    """Prompts in a step."""
    new_tokens: int = 64
    """Tokens of each completion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "layers", "prompts", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or greater, got {getattr(self, name)}")
        if self.warmup < 0 or self.timeout_s <= 0:
            raise ValueError(
                f"warmup must be ≥ 0 and timeout_s > 0: {self.warmup=}, {self.timeout_s=}"
            )
        if not self.contestants:
            raise ValueError(f"contestants must name at least one of {', '.join(MODULES)}")

    @property
    def workload(self) -> Workload:
        """The step that is measured."""
        return Workload(
            seed=self.seed, layers=self.layers, prompts=self.prompts, new_tokens=self.new_tokens
        )


def experiment(run: Run) -> None:
    """Measures, checks and reports."""
    config: BenchConfig = run.config
    run.rewind("rounds", 0)  # an interrupted measurement is no measurement
    contestants = gather(config, run)
    results = measure(config, contestants, run)
    summary = summarise(config, results)
    table = main_table(summary)
    report(config, summary, table).write(run.folder / "report.html")
    run.finish(
        summary,
        "\n".join(t.text() for t in (table, arithmetic_table(summary), targets_table(summary))),
    )
    recompiled = summary["contestants"].get("jaxrl", {}).get("compilations_after_warmup", 0)
    if recompiled:
        raise ValueError(f"nothing may compile after warm-up, but {recompiled:g} programs did")


def gather(config: BenchConfig, run: Run) -> list[Contestant]:
    """The contestants that can run here."""
    found = []
    for name in config.contestants:
        python: str | None = sys.executable
        if name in processes.PEERS:
            given = getattr(config, f"{name}_python")
            if config.make_peers and given is None and not processes.find_peer(name, None):
                processes.make_peer(name, timeout_s=1800)
            python = processes.find_peer(name, given)
        if python is None:
            run.note(f"{name} is not installed and left out; --make-peers installs it")
            continue
        found.append(
            Contestant(name=name, module=MODULES[name], python=python, compiles=name != "trl")
        )
    return found


def measure(
    config: BenchConfig, contestants: Sequence[Contestant], run: Run
) -> dict[str, dict[str, Any]]:
    """First steps, one contestant after the other; then rounds, interleaved."""
    results: dict[str, dict[str, Any]] = {c.name: {} for c in contestants}
    logs = run.folder / "logs"
    logs.mkdir(exist_ok=True)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for contestant in contestants:
            cache = None
            if contestant.compiles:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxrl-bench-"))
                cache = Path(folder)
            log = logs / f"{contestant.name}.txt"

            def start(contestant=contestant, cache=cache, log=log) -> Worker:
                worker = Worker(
                    contestant, config.workload, cache=cache, log=log, timeout_s=config.timeout_s
                )
                return stack.enter_context(worker)

            run.note(f"{contestant.name}: first step")
            workers[contestant.name] = first_steps(start, contestant, results[contestant.name])
        compare_logits(workers, results)
        rounds(config, workers, results, run)
        for name, worker in workers.items():
            results[name]["peak_bytes"] = worker.close()["peak_bytes"]
    return results


def first_steps(start: Any, contestant: Contestant, result: dict[str, Any]) -> Worker:
    """Measures the first step cold, then in a new process with what the first one cached."""
    worker = start()
    result["first_step_cold_s"] = worker.ask("step")["step_s"]
    if contestant.compiles:
        worker.close()
        worker = start()
        result["first_step_cached_s"] = worker.ask("step")["step_s"]
    result |= {"startup_s": worker.hello["startup_s"], "versions": worker.hello["versions"]}
    return worker


def compare_logits(workers: Mapping[str, Worker], results: dict[str, dict[str, Any]]) -> None:
    """Checks that everyone computes the same function, by its frozen reference policy.

    Raises:
      WorkerFailed: a contestant's logits differ.
    """
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).tolist()
    logits = {n: np.asarray(w.ask("logits", tokens=tokens)["logits"]) for n, w in workers.items()}
    first = next(iter(logits))
    for name, values in logits.items():
        gap = float(np.abs(values - logits[first]).max())
        results[name]["logit_gap"] = gap
        if gap > LOGIT_TOLERANCE:
            raise WorkerFailed(
                f"all contestants must compute the same model: the logits of {name} and {first} "
                f"differ by {gap:.2g}, tolerated are {LOGIT_TOLERANCE:g}"
            )


def rounds(
    config: BenchConfig,
    workers: Mapping[str, Worker],
    results: dict[str, dict[str, Any]],
    run: Run,
) -> None:
    """Warm-up and measured rounds, in an order that turns with every round."""
    names = list(workers)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    rates: dict[str, list[float]] = {name: [] for name in MATMULS}
    total = config.warmup + config.steps
    with run.progress("rounds", total) as progress:
        for index in range(total):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                step = workers[name].ask("step")
                if index >= config.warmup:
                    measured[name].append(step)
                    run.log(
                        "rounds",
                        index - config.warmup + 1,
                        {f"{name}/{k}": v for k, v in step.items()},
                    )
            for name, (rows, inner, columns) in MATMULS.items():
                if "plain" in workers:
                    rate = workers["plain"].ask("matmul", rows=rows, inner=inner, columns=columns)
                    rates[name].append(rate["flops_per_s"])
            progress.update(index + 1, {n: s[-1]["step_s"] for n, s in measured.items() if s})
    for name in names:
        results[name]["rounds"] = measured[name]
    if "plain" in workers:
        results["plain"]["matmul_flops_per_s"] = {k: median(v) for k, v in rates.items()}


def summarise(config: BenchConfig, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians, ratios within rounds, arithmetic and targets."""
    workload = config.workload
    contestants = {name: contestant_summary(workload, r) for name, r in results.items()}
    rates = results.get("plain", {}).get("matmul_flops_per_s")
    summary = {
        "workload": asdict(workload) | {"parameters": workload.parameters()},
        "machine": {"cores": os.cpu_count(), "matmul_flops_per_s": rates},
        "contestants": contestants,
        "speedups": speedups(results),
        "arithmetic": arithmetic(workload, contestants, rates),
    }
    return summary | {"targets": targets(summary)}


def contestant_summary(workload: Workload, result: Mapping[str, Any]) -> dict[str, Any]:
    """One contestant's medians over the rounds."""
    steps = result["rounds"]
    keys = [key for key in steps[0] if key.endswith("_s")]
    medians = {key: median(step[key] for step in steps) for key in keys}
    trained = workload.completions * (workload.prompt_len + workload.new_tokens)
    rates = {
        "generation_tokens_per_s": workload.generated_tokens / medians["rollout_s"],
        "training_tokens_per_s": trained / medians["update_s"],
    }
    kept = {k: v for k, v in result.items() if k not in ("rounds", "matmul_flops_per_s")}
    compiled = {}
    if "compilations" in steps[0]:
        compiled = {"compilations_after_warmup": sum(step["compilations"] for step in steps)}
    spread = [step["step_s"] for step in steps]
    return (
        medians | rates | kept | compiled | {"step_s_min": min(spread), "step_s_max": max(spread)}
    )


def speedups(results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times faster this project is than each other one: medians of the rounds' ratios."""
    if "jaxrl" not in results:
        return {}
    ours = results["jaxrl"]["rounds"]

    def ratio(theirs: Sequence[Mapping[str, float]], key: str) -> float:
        return median(b[key] / a[key] for a, b in zip(ours, theirs, strict=True))

    return {
        name: {
            key: ratio(result["rounds"], f"{key}_s") for key in ("step", "cpu", "rollout", "update")
        }
        for name, result in results.items()
        if name != "jaxrl"
    }


def arithmetic(
    workload: Workload, contestants: Mapping[str, Any], rates: Mapping[str, float] | None
) -> dict[str, dict[str, float]]:
    """What multiply-adds alone would take at the measured rate, beside what was measured."""
    name = next((n for n in ("jaxrl", "plain") if n in contestants), None)
    if not rates or name is None:
        return {}
    parts = {}
    for part, flops in workload.flops().items():
        least, took = flops / rates["square"], contestants[name][f"{part}_s"]
        parts[part] = {"flops": flops, "arithmetic_s": least, "measured_s": took}
    parts["step"] = {key: sum(p[key] for p in parts.values()) for key in parts["rollout"]}
    parts["step"]["measured_s"] = contestants[name]["step_s"]
    return {k: p | {"share": p["arithmetic_s"] / p["measured_s"]} for k, p in parts.items()}


def targets(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was wanted and what came out."""
    ours, all_ratios = summary["contestants"].get("jaxrl"), summary["speedups"]
    if ours is None:
        return {}
    rows: dict[str, tuple[str, float, float]] = {
        "first step cold, s": ("≤", 8.0, ours["first_step_cold_s"]),
        "first step with cache, s": ("≤", 3.0, ours["first_step_cached_s"]),
        "compilations after warm-up": ("≤", 0, ours["compilations_after_warmup"]),
    }
    peers = {name: all_ratios[name] for name in processes.PEERS if name in all_ratios}
    if peers:
        rows |= {
            "step, times faster than the faster peer": (
                "≥", 1.3, min(p["step"] for p in peers.values())),
            "generation, times the faster peer's": (
                "≥", 2.0, min(p["rollout"] for p in peers.values())),
        }  # fmt: skip
    return {
        name: {"wanted": f"{sign} {bound:g}", "got": got,
               "met": got >= bound if sign == "≥" else got <= bound}
        for name, (sign, bound, got) in rows.items()
    }  # fmt: skip


def main_table(summary: Mapping[str, Any]) -> Table:
    """Contestants side by side."""
    records = {
        name: c | {"peak_mb": c["peak_bytes"] / 2**20, "gen": round(c["generation_tokens_per_s"]),
                   "train": round(c["training_tokens_per_s"])}
        for name, c in summary["contestants"].items()
    }  # fmt: skip
    columns = {
        "step_s": "step s", "cpu_s": "CPU-s", "rollout_s": "rollout s", "scoring_s": "scoring s",
        "update_s": "update s", "gen": "generation tok/s", "train": "training tok/s",
        "first_step_cold_s": "first step s", "first_step_cached_s": "… cached s",
        "startup_s": "start-up s", "peak_mb": "peak MiB",
    }  # fmt: skip
    caption = "One RL step; medians of interleaved rounds"
    return Table.of(records, columns, caption=caption)


def arithmetic_table(summary: Mapping[str, Any]) -> Table:
    """This project's parts beside the figure of arithmetic."""
    columns = {"flops": "Gflop", "arithmetic_s": "arithmetic s", "measured_s": "measured s",
               "share": "share"}  # fmt: skip
    records = {k: v | {"flops": v["flops"] / 1e9} for k, v in summary["arithmetic"].items()}
    return Table.of(records, columns, caption="Multiply-adds at the machine's matmul rate")


def targets_table(summary: Mapping[str, Any]) -> Table:
    """Wanted against got."""
    rows = tuple(
        (name, t["wanted"], t["got"], "yes" if t["met"] else "no")
        for name, t in summary["targets"].items()
    )
    return Table(columns=("", "wanted", "got", "met"), rows=rows, caption="Targets")


GAP = """
The figure of arithmetic counts multiply-adds of the weights only, at the rate of a 1024-cube
product ({square:.0f} Gflop/s here). What lies between it and the clock: a decoding step multiplies
{rows} rows by each matrix, at {decode:.0f} Gflop/s instead, and between the products it runs
hundreds of small operations (norms, rotations, attention over the cache, sampling) that cost a
fixed time each and, on a CPU, largely one core; the update's products run at {update:.0f} Gflop/s,
and attention's softmax, SwiGLU, norms and the log-softmax over the vocabulary are bound by memory,
forward and backward. CPU-seconds beside wall time show the same: a step that kept both cores busy
would use {cores} CPU-seconds for each second.
"""


def report(config: BenchConfig, summary: Mapping[str, Any], table: Table) -> Report:
    """The page."""
    page = Report("One RL step, timed", "python -m experiments.bench_rl")
    page.text((__doc__ or "").split("\n\n")[2]).table(table)
    page.table(targets_table(summary))
    ratios = Table.of(
        summary["speedups"],
        {"step": "step", "cpu": "CPU time", "rollout": "generation", "update": "update"},
    )
    page.heading("Times faster than …").table(ratios)
    rates = summary["machine"]["matmul_flops_per_s"]
    if rates:
        page.heading("The gap to arithmetic").table(arithmetic_table(summary))
        shown = {name: rate / 1e9 for name, rate in rates.items()}
        rows = config.workload.completions
        page.text(GAP.format(**shown, rows=rows, cores=summary["machine"]["cores"]))
    return page.record("Summary", summary)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m experiments.bench_rl`."""
    config = harness.cli(
        BenchConfig, argv=argv, prog="python -m experiments.bench_rl", description=__doc__
    )
    harness.main(experiment, "bench_rl", config)


if __name__ == "__main__":
    main()
