"""The command line: plan, simulate, calibrate."""

import csv
import json
from importlib import resources

import numpy as np
import pytest

from sharding import __main__ as commands
from sharding.__main__ import main
from sharding.costs.constants import Calibration, load
from sharding.measured.calibrate import PRIORS
from sharding.measured.evaluation import Errors
from sharding.measured.runs import read_runs
from sharding.measured.table import Table
from sharding.programs.transformer import named_model, transformer

PROBLEM = ["--model", "llama3-8b", "--cluster", "v5e:8x8", "--global-batch", "64",
           "--seq-len", "2048"]  # fmt: skip


def run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_plan_prints_json_and_nothing_else(capsys):
    status, out, _ = run(capsys, "plan", *PROBLEM, "--json")
    found = json.loads(out)
    assert status == 0
    assert {"mesh", "step_time_s", "memory_bytes", "breakdown", "gap", "search_time_s",
            "alternatives"} <= set(found)  # fmt: skip
    size = 1
    for degree in found["mesh"].values():
        size *= degree
    assert size == 64
    assert found["gap"] == 0
    assert found["memory_bytes"] < 17.2e9
    assert sum(found["breakdown"].values()) == pytest.approx(found["step_time_s"])
    assert all(a["step_time_s"] >= found["step_time_s"] for a in found["alternatives"])


def test_a_simulation_costs_what_the_plan_said(capsys):
    _, out, _ = run(capsys, "plan", *PROBLEM, "--json")
    plan = json.loads(out)
    options = [f"--{axis}={degree}" for axis, degree in plan["mesh"].items()]
    options += [f"--{name}={plan[name]}" for name in ("microbatches", "zero", "remat", "offload")]
    status, out, _ = run(capsys, "simulate", *PROBLEM, *options, "--json")
    found = json.loads(out)
    assert status == 0
    # The plan also chose which axis takes the best dimensions of the torus.
    assert found["step_time_s"] == pytest.approx(plan["step_time_s"], rel=0.05)
    assert found["memory_bytes"] == plan["memory_bytes"]
    assert found["fits"]


def test_the_text_says_what_and_why(capsys):
    _, out, _ = run(capsys, "plan", *PROBLEM, "--top", "2", "--tie", "0")
    assert "llama3-8b on v5e:8x8 (64 devices)" in out
    assert "within 0.00% of the best of" in out
    assert "as fast as can be told" not in out
    head, _, others = out.partition("the fastest with other meshes:\n")
    assert head
    (other,) = others.splitlines()
    assert " +" in other  # slower than the fastest, in per cent
    _, out, _ = run(capsys, "simulate", *PROBLEM, "--data", "64", "--zero", "0")
    assert "does not fit into 17.2 GB" in out


def test_pins_and_pipelines(capsys):
    status, out, _ = run(capsys, "plan", "--model", "llama3-70b", "--cluster", "h100:8x8",
                         "--global-batch", "256", "--pin", "stage=8", "--pin", "interleave=1",
                         "--json")  # fmt: skip
    found = json.loads(out)
    assert status == 0
    assert found["mesh"]["stage"] == 8
    # 80 layers, the embedding and the head.
    assert len(found["stage_layers"]) == 8
    assert sum(found["stage_layers"]) == 82
    assert found["executed"]


def test_what_is_only_costed_says_so(capsys):
    problem = ("--model", "llama3-70b", "--cluster", "h100:8x8", "--global-batch", "128", "--pin",
               "stage=8", "--pin", "tensor=8", "--pin", "interleave=2", "--top", "1")  # fmt: skip
    _, out, _ = run(capsys, "plan", *problem)
    assert "costed for schedules that other software has" in out
    _, out, _ = run(capsys, "plan", *problem, "--json")
    assert not json.loads(out)["executed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama9", "--cluster", "v5e:8x8"], "no model is called 'llama9'"),
        (["--model", "llama3-8b", "--cluster", "v5e"], "no cluster is called 'v5e'"),
        (["--model", "llama3-70b", "--cluster", "v5e:2x2"], "no plan of llama3-70b fits v5e:2x2"),
        ([*PROBLEM, "--pin", "tensor"], "--pin takes FIELD=VALUE, got 'tensor'"),
        ([*PROBLEM, "--pin", "sequence_parallel=no"], "sequence_parallel is true or false"),
        ([*PROBLEM, "--calibration", "absent.json"], "absent.json"),
        ([*PROBLEM, "--check", "--precision", "fp8"], "described but not a program"),
        ([*PROBLEM, "--check", "--pin", "interleave=2"], "cannot be executed"),
    ],
)
def test_what_makes_no_sense_is_said_on_stderr(capsys, arguments, message):
    status, out, err = run(capsys, "plan", *arguments, "--json")
    assert status == 2
    assert out == ""
    assert message in err


def test_calibrate_writes_constants_that_validate_reads(tmp_path, capsys):
    with (resources.files("sharding") / "catalog/published_runs.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if "H100 80GB BF16 (Large" in r["source"]][:3]
    runs, constants = tmp_path / "runs.csv", tmp_path / "constants.json"
    with runs.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    status, out, _ = run(capsys, "calibrate", "--runs", str(runs), "--out", str(constants))
    assert status == 0
    assert "3 runs: mean error" in out
    fitted = load(constants)
    assert set(fitted.stacks) == {"fsdp"}
    _, out, _ = run(capsys, "validate", "--runs", str(runs), "--calibration", str(constants),
                    "--json")  # fmt: skip
    after = json.loads(out)["summary"]["error"]["mean"]
    known = Calibration(stacks={"fsdp": PRIORS["fsdp"]}, chips={}, about={})
    before = Table.of(read_runs(runs)[0]).predict(known)
    measured = [r["measured_s"] for r in json.loads(out)["rows"]]
    assert after < Errors.of(before, np.asarray(measured)).mean / 2


def test_a_model_may_come_from_a_file(capsys, tmp_path):
    sizes = tmp_path / "sizes.json"
    sizes.write_text('{"model": "llama3-8b", "layers": 8, "seq_len": 2048}')
    where = ["--cluster", "v5e:4x4", "--json"]
    _, out, _ = run(capsys, "plan", "--model", str(sizes), "--global-batch", "16", *where)
    described = json.loads(out)
    # The same decoder as a program, which brings its own sizes.
    config = named_model("llama3-8b", layers=8, seq_len=2048, global_batch=16)
    program = tmp_path / "program.json"
    program.write_text(transformer(config).to_json())
    _, out, _ = run(capsys, "plan", "--model", str(program), *where)
    assert json.loads(out)["step_time_s"] == described["step_time_s"]
    status, _, err = run(capsys, "plan", "--model", str(program), "--seq-len", "64", *where)
    assert status == 2
    assert "sizes of its own: leave out seq_len" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "it holds a list"), ('{"depth": 3}', "depth"), ("{", "no model file"),
     ('{"model": "llama9"}', "no model is called")],
)  # fmt: skip
def test_a_file_that_is_no_model_says_what_is(capsys, tmp_path, text, message):
    path = tmp_path / "model.json"
    path.write_text(text)
    status, _, err = run(capsys, "plan", "--model", str(path), "--cluster", "v5e:4x4")
    assert status == 2
    assert message in err


def test_profile_writes_a_cluster_to_plan_for(capsys, tmp_path):
    path = tmp_path / "here.json"
    status, out, _ = run(capsys, "profile", "--out", str(path), "--budget", "0.5")
    assert status == 0
    assert f"plan with --cluster {path}" in out
    model = ["--model", "gpt2", "--cluster", str(path), "--seq-len", "64"]
    status, out, err = run(capsys, "plan", *model, "--json")
    assert status == 0, err
    assert json.loads(out)["devices"] == 8


def test_choices_that_are_bounded_and_switched_off(capsys):
    options = ("--pin", "sequence_parallel=false", "--remat-at-most", "none", "--top", "3",
               "--no-tensor-across-hosts")  # fmt: skip
    status, out, err = run(capsys, "plan", *PROBLEM, *options, "--json")
    assert status == 0, err
    found = json.loads(out)
    plans = [found, *found["alternatives"]]
    assert {plan["remat"] for plan in plans} == {"none"}
    assert all(plan["mesh"].get("tensor", 1) <= 8 for plan in plans)
    assert commands._pin("sequence_parallel=false") == ("sequence_parallel", False)
    assert commands._pin("sequence_parallel=true") == ("sequence_parallel", True)
