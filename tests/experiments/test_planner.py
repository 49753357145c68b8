"""The planner's experiments at their quickest: what they print, write and refuse."""

import json
import math
import re

import numpy as np
import pytest

from experiments import (
    planner_accuracy,
    planner_amp,
    planner_choice,
    planner_memory,
    planner_runs,
)
from experiments.harness import plots
from sharding.evaluation import Errors


@pytest.fixture(scope="module", autouse=True)
def published():
    """The measured runs, read once."""
    runs = planner_accuracy.published_runs()
    with pytest.MonkeyPatch.context() as patch:
        for program in (planner_accuracy, planner_choice):
            patch.setattr(program, "published_runs", lambda: runs)
        yield runs


def run(program, out, *arguments):
    program.main(["--preset", "quick", "--out", str(out), *arguments])
    for name in ("config.json", "report.html", "table.txt"):
        assert (out / name).stat().st_size > 0, name
    return json.loads((out / "summary.json").read_text())


def test_accuracy_of_one_software(tmp_path, capsys):
    summary = run(planner_accuracy, tmp_path)
    (record,) = summary["accuracy"]
    assert record["set"] == "PyTorch FSDP on GPUs"
    assert record["met"] == (record["reached"] <= record["wanted"])
    assert record["reached"] == record["median"] < record["constant_mfu"]
    printed = capsys.readouterr().out
    assert f"{record['reached']:.1%}" in printed
    report = (tmp_path / "report.html").read_text()
    assert "measured step time (s)" in report
    assert "http://" not in report.replace("http://www.w3.org", "")  # needs nothing else
    # Finished: prints the same table, and does not predict again.
    before = (tmp_path / "summary.json").stat().st_mtime_ns
    run(planner_accuracy, tmp_path)
    assert (tmp_path / "table.txt").read_text() in capsys.readouterr().out
    assert (tmp_path / "summary.json").stat().st_mtime_ns == before


def test_errors_and_choices_of_perfect_and_of_doubled_predictions(published):
    # Every problem that was measured in several configurations, and a part of the others.
    runs = published[::3]
    measured = np.asarray([one.measured_s for one in runs])
    for factor in (1.0, 2.0):  # a common factor spoils every error and no choice
        records = planner_accuracy.accuracy(runs, factor * measured)
        assert [r["set"] for r in records] == [goal.name for goal in planner_accuracy.GOALS]
        for record in records:
            assert record["reached"] == pytest.approx(factor - 1, abs=1e-12)
            assert record["met"] == (factor == 1.0)
        for record in planner_accuracy.choices(runs, factor * measured):
            assert (record["regret_worst"], record["met"]) == (0.0, True)
    assert planner_accuracy.accuracy(runs, np.full(len(runs), np.nan)) == []


def test_amp_is_reproduced_and_one_problem_predicted(tmp_path, capsys):
    summary = run(planner_amp, tmp_path)
    assert summary["reproduced"] == 105
    assert summary["worst"] < 1e-4
    (record,) = summary["problems"]
    assert record["problem"] == "AMP homogeneous"
    ours, measured = np.asarray(record["predicted_s"]), np.asarray(record["measured_s"])
    assert record["launches"] == len(ours) == len(measured)
    error = Errors.of(ours, measured)
    assert error is not None
    assert record["error_mean"] == pytest.approx(error.mean)
    chosen = measured[np.argmin(ours)]
    assert record["regret"] == pytest.approx(chosen / measured.min() - 1)
    assert record["speed_up"] == pytest.approx(1.32 / chosen)
    assert f"{record['spearman']:.3f}" in capsys.readouterr().out


def test_a_published_configuration_is_planned_anew(tmp_path, capsys):
    summary = run(planner_choice, tmp_path)
    (record,) = summary["experts"]
    assert record["ratio"] == pytest.approx(record["ours_s"] / record["expert_s"])
    assert math.prod(record["ours"].values()) == math.prod(record["expert"].values())
    (sequence,) = summary["long"]
    assert (sequence["seq_len"], sequence["gpus"]) == (8192, 8)
    assert "1 published configurations planned anew" in capsys.readouterr().out


def test_planned_steps_equal_the_plain_step(tmp_path, capsys):
    summary = run(planner_runs, tmp_path, "--axes", "expert")
    assert summary["reached"]
    assert [row["case"] for row in summary["rows"]] == ["experts", "experts"]
    for row in summary["rows"]:
        assert math.prod(row["mesh"].values()) == 8
        assert 0 <= row["gradient_difference"] <= 1e-5
    assert "expert 4 data 2" in capsys.readouterr().out


def compiled(case, cluster, error):
    return {"case": case.name, "cluster": cluster, "mesh": {"fsdp": 8}, "remat": "full",
            "predicted_bytes": round((1 + error) * 1e9), "compiled_bytes": 10**9,
            "error_share": error}  # fmt: skip


def test_memory_keeps_what_was_compiled_and_tries_again_what_failed(tmp_path, capsys, monkeypatch):
    asked = []
    names = [case.name for case in planner_memory.CASES if "dense" in case.name]

    def measure(case, cluster):
        asked.append(case.name)
        if "inference" in case.name and len(asked) == len(names):
            return {"case": case.name, "cluster": cluster, "error": "no compiler\nfor it"}
        return compiled(case, cluster, -0.02 * len(asked))

    monkeypatch.setattr(planner_memory, "measure", measure)
    arguments = ("--cases", "dense", "--clusters", "h100:1x8")
    first = run(planner_memory, tmp_path, *arguments)
    assert asked == names
    assert (first["programs"], first["failed"]) == (len(names) - 1, 1)
    assert first["error_worst"] == pytest.approx(0.02 * (len(names) - 1))
    assert first["error_lowest"] == -first["error_worst"]
    assert first["error_median"] == pytest.approx(0.02 * len(names) / 2)
    printed = capsys.readouterr().out
    assert "no compiler" in printed
    assert "for it" not in printed
    assert first["rows"][-1]["error"] == "no compiler\nfor it"
    # As if interrupted: only the program that failed is compiled again.
    (tmp_path / "summary.json").unlink()
    second = run(planner_memory, tmp_path, *arguments)
    assert asked[len(names) :] == ["dense 2.6B, inference"]
    assert second["rows"][:-1] == first["rows"][:-1]


@pytest.mark.aot
def test_memory_of_an_inference_step(tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="compiling for H100s needs jax-cuda13-plugin")
    summary = run(planner_memory, tmp_path)
    assert (summary["programs"], summary["failed"]) == (1, 0)
    assert summary["error_worst"] < 0.1


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        (planner_accuracy, ("--stacks", "fdsp"), r"no software \['fdsp'\]; there are .*fsdp"),
        (planner_amp, ("--problems", "het"), "het_cluster"),
        (planner_choice, ("--every", "0"), "one run in at least one"),
        (planner_choice, ("--sequences", "8191"), "divide a batch of 4,194,304 tokens"),
        (planner_memory, ("--cases", "sparse"), "the cases are: dense 0.6B, full"),
        (planner_runs, ("--axes", "tensr"), "they pin .*tensor"),
        (planner_runs, ("--seed", "-1"), "seed must be 0 or greater"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_does(tmp_path, capsys, program, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        program.main([*arguments, "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    shown = re.sub(r"[│\s]+", " ", captured.err + captured.out)
    assert re.search(said, shown), shown
    assert not (tmp_path / "run").exists()


def test_agreement_draws_every_point_and_the_line_of_equality():
    figure = plots.agreement(
        {"a": ([1.0, 10.0], [1.1, 9.0]), "b": ([0.1], [0.2])}, quantity="memory (GB)", truth="true"
    )
    (axis,) = figure.axes
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("true memory (GB)", "predicted memory (GB)")
    drawn = [np.asarray(line.get_xydata()).tolist() for line in axis.lines]
    assert drawn == [[[1, 1.1], [10, 9]], [[0.1, 0.2]], [[0.1, 0.1], [10, 10]]]
