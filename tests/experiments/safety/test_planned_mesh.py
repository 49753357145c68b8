"""`--mesh planned` and `--mesh auto`: who plans, what for, and that the run is the same."""

import math
from dataclasses import replace

import jax
import pytest

from experiments.harness.files import read_json_lines
from experiments.safety import placement, planned_mesh
from experiments.safety.__main__ import main
from experiments.safety.config import SafetyConfig
from experiments.safety.planned_mesh import with_mesh, workload_of
from sharding import Cluster

TINY = [
    *("--model.layers", "1", "--model.embed", "16", "--model.heads", "2", "--model.kv-heads", "1"),
    *("--model.head-dim", "8", "--model.mlp", "16", "--vocab-size", "300", "--prompt-len", "48"),
    *("--completion-len", "8", "--samples-per-step", "32", "--sft.batch", "8", "--sft.steps", "2"),
    *("--evaluation.prompts", "4", "--evaluation.samples", "1", "--evaluation.batch", "4"),
    *("--algorithms", "rloo", "--steps", "1"),
]


def test_one_process_on_cpu_takes_one_device_and_what_is_named_stays():
    config, said = SafetyConfig(), []
    assert placement.mesh_of(with_mesh(config, said.append).mesh) == {}
    named = replace(config, mesh="fsdp=2,tensor=2")
    assert with_mesh(named, said.append) is named
    assert said == []


def test_a_run_on_the_planners_mesh_is_the_run_on_one_device(tmp_path, capsys):
    main([*TINY, "--mesh", "planned", "--out", str(tmp_path / "planned")])
    said = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("mesh "))
    text = said.split()[1].rstrip(",")
    mesh = placement.mesh_of(text)
    assert math.prod(mesh.values()) == jax.device_count() == 8
    assert 4 % (mesh.get("data", 1) * mesh.get("fsdp", 1)) == 0  # prompts of a batch of evaluation
    assert f"--mesh {text} takes it as it is" in said
    main([*TINY, "--out", str(tmp_path / "one")])
    losses = [
        [row["loss"] for row in read_json_lines(tmp_path / run / "metrics.jsonl")]
        for run in ("planned", "one")
    ]
    assert len(losses[0]) == 2
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)


def test_devices_that_the_planner_does_not_know(monkeypatch):
    def unknown(devices):
        raise ValueError("no chip of the catalogue is called 'abacus'")

    monkeypatch.setattr(Cluster, "from_devices", unknown)
    with pytest.raises(ValueError, match="abacus"):
        with_mesh(replace(SafetyConfig(), mesh="planned"), print)
    monkeypatch.setattr(planned_mesh.jax, "default_backend", lambda: "gpu")
    said = []
    assert with_mesh(SafetyConfig(), said.append).mesh == "data=8"
    assert "nobody planned: no chip of the catalogue is called 'abacus'" in said[0]


def test_what_is_planned_is_what_runs(pretrained_folder):
    config = replace(SafetyConfig(), algorithms=("repo_tb", "repo"))
    work = workload_of(config)
    assert work.recipe.name == "repo"  # which has critics
    assert work.prompts_per_step * work.group_size == config.samples_per_step
    assert work.executed(work.policy).compute_dtype == config.model.compute_dtype
    model = replace(config.model, pretrained=str(pretrained_folder), lora_rank=2)
    adapted = replace(config, model=model, sft=replace(config.sft, steps=0))
    assert workload_of(adapted).policy.lora.rank == 2
    assert workload_of(adapted).policy.vocab_size == 40
