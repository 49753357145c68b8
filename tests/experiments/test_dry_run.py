"""The dry run on the command line, without compilers."""

import dataclasses
import importlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import dry_run, launch, safety_controls, safety_seeds, weight_sync
from experiments.asynchrony.__main__ import main as asynchrony_main
from experiments.asynchrony.config import TINY
from experiments.dry_run.config import SUITE, WORKLOADS
from experiments.dry_run.hand_over import flag
from experiments.safety.__main__ import main as safety
from experiments.safety.config import BASE
from experiments.safety.sizes import sizes
from jaxrl.deployment import actor_programs, deltas, learner_programs
from jaxrl.deployment import dry_run as planned_run
from jaxrl.deployment.dry_run import Compiling, Row, compiled
from jaxrl.deployment.parts import planned
from sharding import Cluster
from sharding.compiled import compile_check

SHORT = [
    "--no-compile", "--model", "qwen3-0.6b", "--reward-model", "", "--cost-model", "",
    "--prompts", "8", "--completion-len", "64",
]  # fmt: skip


def test_it_prints_the_programs_and_the_pace(capsys, tmp_path):
    dry_run.main(["--cluster", "h100:2x2", *SHORT, "--json", str(tmp_path / "run.json")])
    printed = capsys.readouterr().out
    for wanted in ("0.60B parameters", "update", "decode", "delta encode", "delta apply",
                   "best: learner h100:1x2", "times as many tokens", "fits: "):  # fmt: skip
        assert wanted in printed
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["fits"]
    assert [row["compiled"] for row in found["programs"]] == [None] * len(found["programs"])
    assert found["division"]["tokens_per_s"] * 1.01 >= found["half_and_half"]["tokens_per_s"]
    update = found["programs"][0]
    assert sum(t["bytes"] for t in update["predicted_collectives"].values()) > 0


def test_what_does_not_fit_exits_with_1_and_says_what_is_missing(capsys):
    with pytest.raises(SystemExit) as caught:
        dry_run.main(["--cluster", "v5e:2x8", "--no-compile", "--model", "llama3-70b"])
    assert caught.value.code == 1
    assert "does not fit: it lacks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "v9:4x4"], "no cluster is called 'v9:4x4'"),
        (["--model", "llama9"], "unknown model 'llama9'"),
        (["--between", "fast"], "a link is 'bandwidth,latency'"),
        (["--prompts", "0"], "prompts must be 1 or more"),
    ],
)
def test_wrong_names_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        dry_run.main(["--no-compile", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "said"),
    [
        (safety, ("recipe repo_tb", "8 prompts × 8 completions", "prompts of 16", "up to 20")),
        (safety_seeds.main, ("recipe repo_tb", "8 prompts × 8", "prompts of 16", "up to 20")),
        (safety_controls.main, ("8 prompts × 8", "prompts of 16", "up to 20")),
        (asynchrony_main, ("recipe tba", "8 prompts × 8", "prompts of 40", "up to 20")),
        (launch.main, ("recipe tba", "8 prompts × 8", "prompts of 16", "up to 16")),
        (weight_sync.main, ("recipe repo_grpo", "prompts of 16", "up to 20")),
    ],
)
def test_experiments_that_train_hand_over_their_sizes(main, said, capsys):
    main(["--dry-run", "h100:2x1", "--no-compile"])
    printed = capsys.readouterr().out
    assert "best: learner" in printed
    for wanted in (*said, "reward model a function on the host"):
        assert wanted in printed


def test_flags_of_both_commands_go_where_they_belong(capsys):
    safety(["--steps", "3", "--dry-run", "h100:2x1", "--completion-len", "64", "--no-compile",
            "--samples-per-step=32", "--max-staleness", "2"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "4 prompts × 8 completions" in printed
    assert "up to 64 tokens" in printed
    for arguments in (["--dry-run"], ["--dry-run", "--steps", "3"]):
        with pytest.raises(SystemExit) as caught:
            safety(arguments)
        assert caught.value.code == 2
        assert "needs a cluster" in capsys.readouterr().err


def test_a_model_that_is_named_takes_the_preset_of_pretrained_ones(capsys):
    safety(["--dry-run", "h100:2x2", "--model", "qwen3-0.6b", "--no-compile"])
    printed = capsys.readouterr().out
    assert "policy 0.60B parameters" in printed
    assert "reward model 0.60B; cost model 0.60B" in printed  # which the preset learns
    assert f"up to {BASE.completion_len} tokens" in printed


def test_a_preset_with_transformers_for_scorers_plans_them():
    found = sizes(BASE)
    assert found["reward_model"] == found["cost_model"] == dry_run.OWN
    config = dry_run.DryRunConfig(**{k: v for k, v in found.items() if k != "own"})
    workload = config.workload(found["own"])
    assert workload.reward_model == workload.policy
    assert workload.prompts_per_step * workload.group_size == BASE.samples_per_step


def test_every_configuration_that_is_planned_together_is_one():
    for changes in (*SUITE.values(), *WORKLOADS.values()):
        config = dataclasses.replace(dry_run.DryRunConfig(), **changes)
        assert config.workload().prompts_per_step == config.prompts[0]
        assert Cluster.from_name(config.cluster).chip_count >= 64


def test_a_compilation_that_takes_too_long_is_said(tmp_path):
    config = dry_run.DryRunConfig(
        model="own", reward_model="", cost_model="", prompts=(2,), prompt_len=8, completion_len=8
    )
    workload = config.workload(TINY.model.decoder(64, 16))
    run = planned_run(workload, Cluster.from_name("h100:2x1"))
    row = compiled(run.rows[0], Compiling(answers=tmp_path, timeout_s=0.01), print)
    assert row.error is not None
    assert "took more than" in row.error
    assert not list(tmp_path.iterdir())


@pytest.fixture
def compiler(monkeypatch):
    """A stand-in for the process that compiles; what it is asked, and what it says of a program."""
    asked: list[dict] = []
    says = {"peak_bytes": lambda program: 1_000_000 * len(asked)}

    def run(command, **options):
        folder = Path(command[-1])
        asked.append(json.loads((folder / "request.json").read_text()))
        program = jax.export.deserialize(bytearray((folder / "step.bin").read_bytes()))
        answer = dict.fromkeys(("argument_bytes", "output_bytes", "aliased_bytes"), 1000)
        answer |= {"peak_bytes": says["peak_bytes"](program), "groups": [], "compile_s": 1.0}
        (folder / "answer.json").write_text(json.dumps(answer))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(compile_check.subprocess, "run", run)
    return asked, says


SMALLEST: dict[str, Any] = {"model": "own", "reward_model": "", "cost_model": "", "prompts": (1,),
            "prompt_len": 8, "completion_len": 8}  # fmt: skip


@pytest.fixture(scope="module")
def smallest() -> list[Row]:
    """An update and a prefill that are planned in no time."""
    workload = dry_run.DryRunConfig(**SMALLEST).workload(TINY.model.decoder(64, 16))
    machine = Cluster.from_name("h100:1x1")
    programs = learner_programs(workload) + actor_programs(workload, 1)[:1]
    return [Row(part=planned(program, machine), machine=machine) for program in programs]


def test_what_was_compiled_is_read_again_and_not_asked_twice(compiler, smallest, tmp_path):
    asked, _ = compiler
    kept = Compiling(answers=tmp_path / "answers")
    first = [compiled(row, kept, print) for row in smallest]
    assert len(asked) == len(list((tmp_path / "answers").iterdir())) == 2
    assert [row.report.peak_bytes for row in first if row.report] == [1_000_000, 2_000_000]
    # From another place in the source, of which the answers' names know nothing.
    again = [compiled(row, kept, print) for row in smallest]
    assert len(asked) == 2
    assert [row.to_json() for row in again] == [row.to_json() for row in first]
    # An answer that was lost is asked for again, and no other.
    next((tmp_path / "answers").iterdir()).unlink()
    for row in smallest:
        compiled(row, kept, print)
    assert len(asked) == 3


def test_a_shortfall_that_the_compilers_find_is_the_smallest_of_what_was_tried(
    compiler, capsys, monkeypatch, tmp_path
):
    def prefill_alone(workload, division):
        return [Row(part=division.parts[1], machine=division.actor)], []

    module = importlib.import_module("jaxrl.deployment.dry_run")  # the package has its function
    monkeypatch.setattr(module, "_rows", prefill_alone)
    memory = round(Cluster.from_name("h100:2x1").memory_bytes)

    def peak(program) -> int:
        """Too much, and the more the more prompts there are: int32[prompts, 8]."""
        shapes = [aval.shape for aval in program.in_avals if aval.dtype == np.int32]
        return memory + 10**9 * max([shape[0] for shape in shapes if shape[1:] == (8,)], default=0)

    _, says = compiler
    says["peak_bytes"] = peak
    flags = [part for name, value in SMALLEST.items() for part in flag(name, value)]
    with pytest.raises(SystemExit) as caught:
        dry_run.main(
            ["--cluster", "h100:2x1", *flags, "--answers", str(tmp_path / "answers"),
             "--json", str(tmp_path / "run.json")], own=TINY.model.decoder(64, 16),
        )  # fmt: skip
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    tried = [int(prompts) for prompts in re.findall(r"with (\d+) prompts an actor does", printed)]
    assert len(set(tried)) == 3
    found = json.loads((tmp_path / "run.json").read_text())
    assert not found["fits"]
    assert found["division"]["prompts"] == min(tried)
    lacks = found["shortfall_bytes"]
    assert lacks == max(
        row["compiled"]["peak_bytes"] + row["others_bytes"] - memory for row in found["programs"]
    )
    assert min(tried) * 10**9 <= lacks < (min(tried) + 1) * 10**9
    assert f"lacks {lacks / 1e9:.2f} GB a device (compiled)" in printed


def test_only_an_update_for_tpus_is_compiled_with_its_products_whole(compiler, smallest):
    asked, _ = compiler
    tpu = Cluster.from_name("v5e:2x4")
    update, prefill = (dataclasses.replace(row, machine=tpu) for row in smallest)
    assert [row.options for row in (*smallest, prefill)] == [None] * 3
    compiled(update, Compiling(), print)
    compiled(prefill, Compiling(), print)
    assert asked[0]["options"] == {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    assert "options" not in asked[1]


def test_the_next_weights_are_built_from_the_shards_of_the_policy():
    config = dry_run.DryRunConfig(model="qwen3-0.6b", reward_model="", cost_model="", prompts=(8,))
    run = planned_run(config.workload(), Cluster.from_name("h100:2x2"))
    prefill = next(p for p in run.best.parts if p.program.name == "prefill")
    parts = deltas.applying(prefill, run.best.actor, density=0.01)
    devices = run.best.actor.device_count
    whole = sum(part.program.args[0].size * part.program.calls for part in parts)
    held = prefill.resident_bytes / 2 * devices  # bf16, on all devices together
    assert whole == pytest.approx(held, rel=0.05)
    for part in parts:
        leaf = 2 * part.program.args[0].size / devices
        assert part.resident_bytes == 2 * leaf  # old and new
        # And what changes; slots of the smallest leaves are larger than these.
        assert 2 * leaf < part.memory_bytes < 3 * leaf + 1e6
    names = " ".join(part.program.name for part in parts)
    for leaf in ("embedding", "gate", "up", "down", "query", "key", "value", "attention_out"):
        assert names.count(leaf) == 1
    # Beside one leaf lie all others, twice, and what decodes meanwhile.
    rows = {row.part.program.name: row for row in run.rows}
    others = [rows[part.program.name].others_bytes + part.resident_bytes for part in parts]
    assert others == pytest.approx([others[0]] * len(parts))
    assert others[0] >= rows["decode"].part.memory_bytes + 2 * prefill.resident_bytes


def test_shards_that_no_kernel_takes_are_rebuilt_by_the_hosts():
    """A stack of 70B's projections, divided by its eight heads of keys, passes 2^31 elements."""
    config = dry_run.DryRunConfig(model="llama3-70b", reward_model="", cost_model="")
    program = next(
        p for p in actor_programs(config.workload(), 16) if p.name == "prefill"
    )  # fmt: skip
    machine = Cluster.from_name("h100:1x8")
    prefill = planned(program, machine, pinned={"tensor": 8}, memory=2.0)
    parts = deltas.applying(prefill, machine, density=0.01)
    names = " ".join(part.program.name for part in parts)
    assert "query" in names
    assert not any(leaf in names for leaf in ("gate", "up", "down"))
    projections = 3 * 80 * 8192 * 28672 / 8
    hosted = deltas.by_host(prefill, machine, parts)
    assert hosted == pytest.approx(2 * projections, rel=1e-3)
