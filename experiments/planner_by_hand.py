"""Is the plan that is found at least as good, compiled, as what one would write by hand?

    python -m experiments.planner_by_hand
    python -m experiments.planner_by_hand --compile --problems decode

Every problem is compiled by the production compilers as planned, with plain FSDP, with FSDP and
tensor parallelism, and as its community runs models of the kind (sizes and batches are ours);
rematerialisation and micro-batches are the same for all, so that only the division differs. The
first command reads the kept figures in results/planner_by_hand; with --compile they are made again.
Compared are the compiler's `peak_memory_in_bytes` and the time of the collectives in the optimised
HLO, V·(n-1)/n over the bandwidth of the mesh axis that they run over, nothing overlapped. The first
count is strict: the chosen plan takes no more memory than the smallest of the others and no more
time than the fastest of them, which may be two plans that no one plan can match. CPU only.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import Report, Run, RunOptions, Table
from experiments.planner_programs import Case, compile_case, kept
from sharding.machines.topology import AXES
from sharding.simulation import find_cluster

FIGURES = Path(__file__).resolve().parent.parent / "results" / "planner_by_hand"
# The chosen plan may be this much above the best of the others and still count as no worse.
_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A program, what all its plans have in common, and how its community divides it.

    Attributes:
      case: without pins.
      common: fields of `Strategy` that all plans share.
      tensor: degree of tensor parallelism beside FSDP.
      published: degrees that the source names; others are one.
      source: who runs it so, and where that is written.
    """

    case: Case
    common: Mapping[str, Any]
    tensor: int
    published: Mapping[str, int]
    source: str

    def cases(self) -> dict[str, Case]:
        """Every way of dividing the program, by name."""
        devices = find_cluster(self.case.cluster).device_count
        ways: dict[str, Mapping[str, Any]] = {
            "chosen": {},
            "FSDP": _degrees(fsdp=devices),
            "FSDP x TP": _degrees(fsdp=devices // self.tensor, tensor=self.tensor),
            "published": _degrees(**self.published),
        }
        return {
            way: dataclasses.replace(
                self.case, name=f"{self.case.name}, {way}", pinned={**self.common, **pins}
            )
            for way, pins in ways.items()
        }


def _degrees(**given: int) -> dict[str, Any]:
    return {**dict.fromkeys(AXES, 1), "zero": 3, **given}


def _problem(
    name: str, model: str, cluster: str, mode: Any, batch: int, length: int, **rest: Any
) -> Problem:
    case = Case(name=name, model=model, cluster=cluster, mode=mode, batch=batch, length=length)
    common = {"microbatches": 1, "remat": "full"} if mode == "train" else {}
    return Problem(case=case, common=common, **rest)


# Whose configurations are compared with, and where each says so.
_TORCHTITAN = (
    "torchtitan: FSDP over all GPUs (pytorch/torchtitan@01424cb2, "
    "torchtitan/models/llama3/train_configs/llama3_8b.toml: data_parallel_shard_degree = -1)"
)
_TPU_RECIPES = (
    "MaxText: FSDP over all chips (AI-Hypercomputer/tpu-recipes@43e52ff5, "
    "training/trillium/Llama3.1-8B-MaxText/v6e-16/README.md: ici_fsdp_parallelism -1)"
)
_MEGATRON_BRIDGE = (
    "Megatron Bridge: experts over all GPUs (docs.nvidia.com/nemo/megatron-bridge, "
    "bridge.perf_recipes.qwen.h100.qwen3_moe: 16x H100, BF16, EP=16)"
)
_VLLM = "docs.vllm.ai/en/v0.8.3/serving/distributed_serving.html"
_VLLM_SPLIT = f"vLLM: what does not fit one GPU is divided by tensor over the node's ({_VLLM})"
_VLLM_WHOLE = f"vLLM: what fits one GPU runs on one; four of them are replicas ({_VLLM})"
_MAXTEXT = (
    "MaxText: tensor over all chips (AI-Hypercomputer/maxtext@4be7accd, MaxText/benchmarks/"
    "decode_paged_attention-7b.sh: ici_fsdp_parallelism=1 ici_tensor_parallelism=-1)"
)

PROBLEMS = (
    _problem("train llama3-8b h100", "llama3-8b", "h100:2x8", "train", 32, 2048, tensor=2,
             published={"fsdp": 16}, source=_TORCHTITAN),
    _problem("train llama3-8b v6e", "llama3-8b", "v6e:4x4", "train", 32, 2048, tensor=2,
             published={"fsdp": 16}, source=_TPU_RECIPES),
    _problem("train qwen3-30b-a3b h100", "qwen3-30b-a3b", "h100:2x8", "train", 16, 4096, tensor=2,
             published={"expert": 16}, source=_MEGATRON_BRIDGE),
    _problem("prefill llama3-8b h100", "llama3-8b", "h100:1x4", "prefill", 8, 2048, tensor=2,
             published={"data": 4}, source=_VLLM_WHOLE),
    _problem("prefill llama3-70b h100", "llama3-70b", "h100:1x4", "prefill", 8, 2048, tensor=2,
             published={"tensor": 4}, source=_VLLM_SPLIT),
    _problem("decode llama3-70b h100", "llama3-70b", "h100:1x4", "decode", 64, 2048, tensor=2,
             published={"tensor": 4}, source=_VLLM_SPLIT),
    _problem("decode qwen3-14b v4", "qwen3-14b", "v4:2x2x2", "decode", 64, 4096, tensor=2,
             published={"tensor": 8}, source=_MAXTEXT),
    _problem("decode llama3-8b v6e", "llama3-8b", "v6e:2x2", "decode", 64, 2048, tensor=2,
             published={"tensor": 4}, source=_MAXTEXT),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All of experiments.planner_by_hand; nothing in it is random."""

    problems: tuple[str, ...] = ()
    """Parts of names of problems, such as decode or h100; all of them when empty."""
    compile: bool = False
    """Plan and compile again, and replace the kept figures."""
    missing: bool = False
    """Compile only what has no kept figures."""
    figures: Path = FIGURES
    """Folder of the kept figures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.chosen:
            names = "; ".join(problem.case.name for problem in PROBLEMS)
            raise ValueError(f"no problem is called like {self.problems}; there are: {names}")

    @property
    def chosen(self) -> list[Problem]:
        """The problems that `problems` names."""
        parts = self.problems
        return [p for p in PROBLEMS if not parts or any(part in p.case.name for part in parts)]


PRESETS = {"full": Config(), "quick": Config(problems=("decode llama3-8b v6e",))}


def collective_s(held: Mapping[str, Any], cluster_name: str) -> float:
    """Seconds of a compiled program's collectives one after the other.

    A group is taken for the mesh axis of its size, the slowest of several, or for all axes
    together.
    """
    cluster = find_cluster(cluster_name)
    mesh = held["plan"]["mesh"]
    speeds = cluster.axis_bandwidth([mesh.get(axis, 1) for axis in AXES])
    by_axis = {axis: speed for axis, speed in zip(AXES, speeds, strict=True) if axis in mesh}
    total = 0.0
    for group in held["compiled"]["groups"]:
        members = group["members"] or max(mesh.values(), default=1)
        if members < 2 or not by_axis:
            continue
        same = [speed for axis, speed in by_axis.items() if mesh[axis] == members]
        speed = min(same or by_axis.values())
        passes = 2 if group["kind"] == "all-reduce" else 1
        total += passes * group["bytes"] * (members - 1) / members / speed
    return total


def measure(problem: Problem, config: Config) -> list[dict[str, Any]]:
    """A row for every way of dividing a problem; what went wrong is one too."""
    rows = []
    for way, case in problem.cases().items():
        row: dict[str, Any] = {"problem": problem.case.name, "cluster": case.cluster, "way": way}
        try:
            held = kept(case, config.figures)
            if config.compile or (config.missing and held is None):
                held = compile_case(case, config.figures)
        except (ValueError, RuntimeError) as error:
            rows.append(row | {"error": str(error)[:300]})
            continue
        if held is None:
            rows.append(row | {"error": "not compiled yet: --missing"})
            continue
        rows.append(row | {
            "mesh": held["plan"]["mesh"],
            "peak_bytes": held["compiled"]["peak_bytes"],
            "collective_s": collective_s(held, case.cluster),
            "source": problem.source if way == "published" else "",
        })  # fmt: skip
    return rows


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every problem: the chosen plan against the others.

    `no_worse` is strict: no more memory than the plan by hand that takes least, and no more time
    than the one that communicates least, which need not be one plan. `no_worse_than_fastest`
    compares both with the plan by hand that communicates least, and `dominated_by` names those
    that are better than the chosen plan in one and no worse in the other.
    """
    found = []
    for name in dict.fromkeys(row["problem"] for row in rows):
        mine = [r for r in rows if r["problem"] == name and "error" not in r]
        chosen = next((r for r in mine if r["way"] == "chosen"), None)
        others = [r for r in mine if r["way"] != "chosen"]
        if chosen is None or not others:
            continue
        fastest = min(others, key=lambda r: (r["collective_s"], r["peak_bytes"]))
        smallest = min(others, key=lambda r: (r["peak_bytes"], r["collective_s"]))
        ratios = {
            "memory_ratio": _ratio(chosen, smallest, "peak_bytes"),
            "collective_ratio": _ratio(chosen, fastest, "collective_s"),
        }
        beside = max(ratios["collective_ratio"], _ratio(chosen, fastest, "peak_bytes"))
        found.append({
            "problem": name, "smallest": smallest["way"], "fastest": fastest["way"], **ratios,
            "no_worse": max(ratios.values()) <= 1 + _TOLERANCE,
            "no_worse_than_fastest": beside <= 1 + _TOLERANCE,
            "dominated_by": [r["way"] for r in others if _dominates(r, chosen)],
        })  # fmt: skip
    return found


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> float:
    """How much more one plan takes than another; plans that move nothing take as long."""
    tiny = 1e-9
    return (one[what] + tiny) / (other[what] + tiny)


def _dominates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    ratios = [_ratio(one, other, what) for what in ("peak_bytes", "collective_s")]
    return max(ratios) <= 1 + _TOLERANCE and min(ratios) < 1 - _TOLERANCE


def experiment(run: Run) -> None:
    config: Config = run.config
    rows: list[dict[str, Any]] = []
    with run.progress("problems", len(config.chosen)) as progress:
        for done, problem in enumerate(config.chosen, 1):
            rows += measure(problem, config)
            progress.update(done)
    judged = verdicts(rows)
    said = _said(judged)
    table = _table(rows)
    page = Report("The planner against plans by hand", "compiled memory and collectives")
    page.table(table).text(said)
    page.record("Config", harness.to_json(config)).write(run.folder / "report.html")
    run.finish({"rows": rows, "verdicts": judged}, f"{table.text()}\n{said}\n")


def _said(judged: Sequence[Mapping[str, Any]]) -> str:
    """How often the chosen plan is no worse, strictly and otherwise, and where it is worse."""
    total = len(judged)

    def count(what: str) -> str:
        return f"{sum(bool(one[what]) for one in judged)} of {total}"

    undominated = f"{sum(not one['dominated_by'] for one in judged)} of {total}"
    lines = [
        f"no more memory than the smallest by hand and no more time than the fastest: "
        f"{count('no_worse')} problems",
        f"neither more memory nor more time than the fastest by hand: "
        f"{count('no_worse_than_fastest')} problems",
        f"no plan by hand is better in one and as good in the other: {undominated} problems",
    ]
    for one in judged:
        if not one["no_worse"]:
            lines.append(
                f"  {one['problem']}: memory {one['memory_ratio']:.2f} of {one['smallest']}'s, "
                f"collectives {_times(one['collective_ratio'])} of {one['fastest']}'s"
            )
    return "\n".join(lines)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1e3 else "much more than none"


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    def cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
        if "error" in row:
            return row["problem"], row["way"], row["error"].partition("\n")[0][:60], None, None
        mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
        return (
            row["problem"],
            row["way"],
            mesh,
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['collective_s'] * 1e3:.2f}",
        )

    columns = ("problem", "plan", "mesh", "peak (GB)", "collectives (ms)")
    return Table(columns=columns, rows=tuple(map(cells, rows)))


def main(argv: list[str] | None = None) -> None:
    config = harness.cli(
        Config,
        presets=PRESETS,
        argv=argv,
        prog="python -m experiments.planner_by_hand",
        description=__doc__,
    )
    harness.main(experiment, "planner_by_hand", config)


if __name__ == "__main__":
    main()
