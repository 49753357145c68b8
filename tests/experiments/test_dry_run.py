"""The dry run on the command line, without compilers."""

import dataclasses
import json

import pytest

from experiments import dry_run, launch, safety_controls, safety_seeds, weight_sync
from experiments.asynchrony.__main__ import main as asynchrony_main
from experiments.asynchrony.config import TINY
from experiments.dry_run.config import SUITE, WORKLOADS
from experiments.safety.__main__ import main as safety
from experiments.safety.config import BASE
from experiments.safety.sizes import sizes
from jaxrl.deployment import deltas
from jaxrl.deployment import dry_run as planned_run
from jaxrl.deployment.dry_run import Compiling, compiled
from sharding import Cluster

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


def test_the_next_weights_are_built_from_the_shards_of_the_policy():
    config = dry_run.DryRunConfig(model="qwen3-0.6b", reward_model="", cost_model="", prompts=(8,))
    run = planned_run(config.workload(), Cluster.from_name("h100:2x2"))
    prefill = next(p for p in run.best.parts if p.program.name == "prefill")
    part = deltas.applying(prefill, run.best.actor, density=0.01)
    assert part is not None
    olds, _, _ = part.plan.args
    devices = run.best.actor.device_count
    whole = sum(x.size for x in olds.values())
    held = prefill.resident_bytes / 2 * devices  # bf16, on all devices together
    assert whole == pytest.approx(held, rel=0.05)
    assert part.memory_bytes > 2 * 2 * whole / devices  # old and new
