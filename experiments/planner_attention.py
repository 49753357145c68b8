"""Programs of a run with the attention kernels of their machine and with XLA's attention.

The update and a reward model's scores of Llama-3-8B, as the dry run plans them, short and long. On
one mesh each program is compiled twice: with the machine's own kernels (splash on TPUs, cuDNN on
GPUs) and with plain attention, whose scores are arrays. Of time the compilers say nothing without
a device. XLA:TPU counts bytes that are read and written (what a loop repeats once; of a kernel its
operands and results) and operations (a kernel's are not among them, so they are not compared);
XLA:GPU counts neither.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sharding
from experiments.harness import Table
from experiments.planner_programs import Case
from jaxrl import recipes
from jaxrl.deployment import Program, Workload, actor_programs, learner_programs
from jaxrl.models.compiling import training_options
from jaxrl.models.named import named
from sharding.simulation import find_cluster

Attention = Literal["auto", "xla"]
# Of a device's memory: plain attention is compared also where no device holds its scores.
_EVERYTHING_FITS = 100.0


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """A program of a run.

    `length` is prompt and completion together; `batch` is prompts; a "train" step is the update
    of a group of completions of each, a "prefill" the reward model's scores of them.

    Attributes:
      completion: tokens of `length` that the policy wrote.
      group: completions of a prompt.
      attention: "auto", the machine's kernel, or "xla".
    """

    completion: int
    group: int
    attention: Attention

    @property
    def options(self) -> Mapping[str, str] | None:
        """Of the compiler, as the learner has them; None: its own defaults."""
        if self.mode != "train":
            return None
        return training_options(find_cluster(self.cluster).platform)

    @property
    def program(self) -> Program:
        """The program as the dry run has it."""
        model = dataclasses.replace(named(self.model), attention=self.attention)
        workload = Workload(
            recipe=recipes.get(recipes.RECOMMENDED, group_size=self.group), policy=model,
            prompts_per_step=self.batch, prompt_len=self.length - self.completion,
            completion_len=self.completion, reward_model=model,
        )  # fmt: skip
        if self.mode == "train":
            return learner_programs(workload)[0]
        return {p.name: p for p in actor_programs(workload, self.batch)}["reward"]

    def problem(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The step and the shapes of its arguments."""
        program = self.program
        return program.step, program.args

    def planned(self) -> sharding.Plan:
        """The plan on the mesh that is pinned."""
        program = self.program
        return sharding.plan(
            program.step, program.args, cluster=self.cluster, state=program.state,
            data=program.data, donate=program.donate,
            constraints=sharding.Constraints(
                pinned=dict(self.pinned), memory_fraction=_EVERYTHING_FITS
            ),
        )  # fmt: skip


def _pair(
    program: str, cluster: str, batch: int, length: int, **fields: Any
) -> tuple[AttentionCase, AttentionCase]:
    chip = cluster.partition(":")[0]

    def case(name: str, attention: Attention) -> AttentionCase:
        return AttentionCase(
            name=f"{program} llama3-8b {length} {chip} {name}", model="llama3-8b", cluster=cluster,
            mode="train" if program == "update" else "prefill", batch=batch, length=length,
            pinned={"fsdp": find_cluster(cluster).device_count, "zero": 3}, attention=attention,
            **fields,
        )  # fmt: skip

    return case("cudnn" if chip == "h100" else "splash", "auto"), case("xla", "xla")


# A device has four rows of an update, each a prompt with its completions, of 512 + 8 · 512 columns,
# as the dry run's, or one of 7,168 + 2 · 1,024. It scores eight rows of 1,024, or one of 8,192.
PAIRS = tuple(
    pair
    for update, score in (("h100:2x8", "h100:1x4"), ("v5p:2x2x4", "v5p:2x2x1"))
    for pair in (
        _pair("update", update, 64, 1024, completion=512, group=8),
        _pair("update", update, 16, 8192, completion=1024, group=2),
        _pair("score", score, 16, 1024, completion=512, group=2),
        _pair("score", score, 2, 8192, completion=1024, group=2),
    )
)
"""With the kernel, and with XLA's attention."""


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every pair that was compiled, XLA's attention over the kernel: memory, traffic, time.

    Args:
      rows: of `experiments.planner_memory.measure`.
    """
    found = {row["case"]: row for row in rows if "error" not in row}
    out = []
    for kernel, plain in PAIRS:
        if kernel.name not in found or plain.name not in found:
            continue
        ours, theirs = found[kernel.name], found[plain.name]

        def ratio(name: str, ours: Any = ours, theirs: Any = theirs) -> float | None:
            return None if ours[name] is None else theirs[name] / ours[name]

        out.append({
            "kernel": kernel.name,
            "memory": ratio("compiled_bytes"), "predicted_memory": ratio("predicted_bytes"),
            "accessed": ratio("accessed_bytes"), "predicted_time": ratio("predicted_step_s"),
        })  # fmt: skip
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A pair in two lines, and what its plain attention takes of what its kernel takes."""
    plain = {pair[1].name: pair[0].name for pair in PAIRS}
    ratios = {entry["kernel"]: entry for entry in compared(rows)}

    def cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
        if "error" in row:
            return row["case"], row["cluster"], *(None,) * 6, row["error"].partition("\n")[0][:60]
        said = ratios.get(plain.get(row["case"], ""))
        accessed = row["accessed_bytes"]
        over = (None, None)
        if said is not None:
            over = f"{said['predicted_memory']:.2f}", f"{said['memory']:.2f}"
        return (
            row["case"], row["cluster"],
            f"{row['predicted_bytes'] / 1e9:.2f}", f"{row['compiled_bytes'] / 1e9:.2f}",
            f"{row['error_share']:+.1%}", *over, f"{row['predicted_step_s']:.3g}",
            None if accessed is None else f"{accessed / 1e9:.1f}",
        )  # fmt: skip

    columns = (
        "case", "cluster", "predicted (GB)", "compiled (GB)", "error",
        "× kernel, predicted", "× kernel, compiled", "predicted (s)", "accessed (GB)",
    )  # fmt: skip
    return Table(columns=columns, rows=tuple(map(cells, rows)))


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far plain attention and kernels are from the compilers, and from each other."""
    pairs = compared(rows)
    if not pairs:
        return "no pair was compiled"
    errors = {row["case"]: row["error_share"] for row in rows if "error" not in row}
    lines = []
    for title, index in (("kernels", 0), ("XLA's attention", 1)):
        mine = [errors[pair[index].name] for pair in PAIRS if pair[index].name in errors]
        lines.append(f"{title}: predicted {min(mine):+.1%} to {max(mine):+.1%}")
    for key, title in (("memory", "memory, compiled"), ("predicted_memory", "memory, predicted"),
                       ("accessed", "bytes accessed, compiled (TPU; loops once)"),
                       ("predicted_time", "time, predicted (no compiler says it)")):  # fmt: skip
        known = [entry[key] for entry in pairs if entry[key] is not None]
        if known:
            lines.append(
                f"XLA's attention over the kernel, {title}: {min(known):.2f} to {max(known):.2f}"
            )
    return "\n".join(lines)
