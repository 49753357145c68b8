"""The experiment from end to end on the embedded world: its files, its errors, its resumption."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments.harness.files import read_json_lines
from experiments.safety.__main__ import main
from experiments.safety.config import SafetyConfig
from jaxrl import recipes

ROOT = Path(__file__).resolve().parents[3]
TINY = [
    *("--model.layers", "1", "--model.embed", "16", "--model.heads", "2", "--model.kv-heads", "1"),
    *("--model.head-dim", "8", "--model.mlp", "16", "--vocab-size", "300", "--prompt-len", "48"),
    *("--completion-len", "8", "--samples-per-step", "16", "--sft.batch", "8"),
    *("--evaluation.prompts", "8", "--evaluation.samples", "2", "--evaluation.batch", "4"),
]
SHORT = [*TINY, "--steps", "2", "--sft.steps", "2"]


def failed(capsys, *argv):
    """What a run that must end with status 2 says on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one run with the default algorithms, and what it printed."""
    out = tmp_path_factory.mktemp("safety") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main([*SHORT, "--seed", "5", "--out", str(out), "--profile"])
    return out, shown.getvalue()


# --- what is written ----------------------------------------------------------------------------

POLICIES = ("sft", "ppo_lagrangian", "repo", recipes.RECOMMENDED)


def test_options_of_an_algorithm_reach_its_recipe():
    config = SafetyConfig(algorithms=("repo",), options=("repo.max_value=50", "repo.rate=0.5"))
    assert (config.recipe("repo").constraint.max_value, config.recipe("repo").kl.coef) == (50, 0.1)


@pytest.mark.parametrize("option", ["grpo.max_value=1", "repo.max_value", "max_value=3"])
def test_an_option_of_no_algorithm_of_the_run_is_refused(capsys, option):
    message = failed(capsys, *SHORT, "--algorithms", "repo", "--options", option)
    assert "ALGORITHM.OPTION=VALUE, with an algorithm of this run (repo)" in message


def test_the_run_records_what_it_was(finished):
    record = json.loads((finished[0] / "config.json").read_text())
    assert record["seed"] == 5
    assert record["config"]["evaluation"]["samples"] == 2
    assert {"python", "jax", "flax", "numpy"} <= set(record["versions"])


def test_every_step_of_every_stage_is_logged(finished):
    rows = read_json_lines(finished[0] / "metrics.jsonl")
    steps = {name: [r["step"] for r in rows if r["stage"] == name] for name in POLICIES}
    assert steps == {"sft": [2], **{name: [1, 2] for name in POLICIES[1:]}}
    for row in rows:
        if row["stage"] != "sft":
            assert {"reward", "cost", "safety", "multiplier", "kl", "loss"} <= set(row)
            assert "nonfinite" not in row
    for name in POLICIES:
        assert list((finished[0] / "tensorboard" / name).iterdir())


def test_the_summary_has_every_number_of_every_policy(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert set(summary["algorithms"]) == set(POLICIES)
    assert summary["recommended"] == recipes.RECOMMENDED
    assert summary["weak_judge"] is False
    for found in summary["algorithms"].values():
        assert {"reward", "cost", "safety_rate", "worst_decile_unsafe", "over_refusal"} <= set(
            found
        )
        assert all(value is not None for value in found.values())


def test_samples_and_arrays_are_those_of_the_summary(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    for name in POLICIES:
        rows = read_json_lines(finished[0] / "samples" / f"{name}.jsonl")
        assert len(rows) == 8 * 2
        assert set(rows[0]) == {"prompt", "completion", "reward", "cost", "refusal"}
        found = summary["algorithms"][name]
        assert np.mean([r["reward"] for r in rows]) == pytest.approx(found["reward"], abs=1e-5)
        safe = np.mean([r["cost"] <= 0 for r in rows])
        assert safe == pytest.approx(found["safety_rate"])
        arrays = np.load(finished[0] / "evaluation" / f"{name}.npz")
        np.testing.assert_allclose(
            arrays["rewards"].ravel(), [r["reward"] for r in rows], atol=1e-5
        )


class Links(HTMLParser):
    """Everything that a page would load from elsewhere, and its tags."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        self.found += [
            value
            for name, value in values.items()
            if name in ("src", "href", "xlink:href", "srcset", "data")
            and not value.startswith(("#", "data:"))
        ]


def test_the_report_stands_alone(finished):
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert links.found == []
    assert not re.search(r"url\(\s*['\"]?https?:|@import", page)
    assert {"table", "svg"} <= links.tags or {"table", "img"} <= links.tags
    assert "link" not in links.tags
    for name in POLICIES:
        assert name in page
    for title in ("Reward against safety", "Mean cost of each prompt", "multiplier"):
        assert title in page


def test_profile_writes_a_trace_and_a_timeline(finished):
    profile = finished[0] / "profile"
    (timeline,) = profile.glob("timeline-*.json")
    names = [event["name"] for event in json.loads(timeline.read_text())["traceEvents"]]
    for part in ("rollout", "scoring", "update"):
        assert names.count(part) == 3 * 2  # algorithms × steps
    assert list(profile.rglob("*.xplane.pb"))


def test_a_finished_run_prints_its_table_again_and_changes_nothing(finished, capsys):
    out, first = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    main([*SHORT, "--seed", "5", "--out", str(out)])
    shown = capsys.readouterr()
    assert "is finished; choose another --out" in shown.err
    assert shown.out == first
    for name in POLICIES:
        assert name in shown.out
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    changed = {path.name for path in before.keys() | kept if before.get(path) != kept.get(path)}
    assert changed <= {".lock"}


# --- bad input ----------------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused_with_the_field(finished, capsys):
    said = failed(capsys, *SHORT, "--seed", "6", "--out", str(finished[0]))
    assert "holds a run with another config (seed: 5, now 6)" in said
    assert (finished[0] / "summary.json").exists()
    said = failed(capsys, *SHORT, "--seed", "5", "--model.mlp", "24", "--out", str(finished[0]))
    assert "model.mlp: 16, now 24" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--preset huge", r"invalid choice.*huge.*quick.*small.*base"),
        ("--algorithms dpo", r"unknown algorithm 'dpo'; known: ppo, .*repo_tb"),
        ("--stepz 3", r"unknown argument --stepz. Did you mean --steps"),
        ("--steps many", r"many"),
        ("--template fancy", r"fancy.*plain.*safe_rlhf.*chatml.*llama3"),
        ("--steps 0", r"steps must be 1 or more, got 0"),
        ("--seed -1", r"seed must be 0 or greater"),
        ("--samples-per-step 12 --algorithms repo_tb", r"multiple of the group size.*12 and 8"),
        ("--temperature 0", r"temperature must be > 0"),
        ("--algorithms repo,ppo,repo", r"an algorithm is named twice"),
        ("--scorers.cost-scale 0", r"scorers.cost_scale must be above 0"),
        ("--scorers.ngrams 0", r"scorers need n-grams or a transformer"),
        ("--ptx-coef -1", r"ptx_coef must be 0 or more"),
        ("--evaluation.extra-samples 0", r"evaluation.extra_samples must be 1 or more"),
        ("--optimizer.decay-steps 7", r"decay_steps is always --steps here, got 7"),
        ("--optimizer.warmup-steps -3", r"warmup_steps must be ≥ 0, got -3"),
        ("--optimizer.b1 1.5", r"b1 must be in \[0, 1\)"),
        ("--kl-coef 0", r"positive KL coefficient"),
        ("--model.kv-heads 3", r"kv_heads must divide heads"),
        ("--data nowhere.json", r"no data at nowhere.json: give one of world"),
        ("--sft.pack -1", r"sft.pack is the width of a row, or 0: got -1"),
        ("--sft.pack 20", r"every example must have between 1 and 20 tokens"),
        ("--vocab-size 100", r"vocab_size must hold 256 bytes"),
        ("--prompt-len 3", r"must fit the context: .* row \d+ of .* has \d+ tokens.*, 3 fit"),
        ("--prompt-len 1 --drop-long", r"no train prompt of .* fits 1 tokens"),
    ],
)  # fmt: skip
def test_wrong_values_end_with_what_is_allowed(tmp_path, capsys, argv, message):
    said = failed(capsys, *SHORT, *argv.split(), "--out", str(tmp_path / "run"))
    assert re.search(message, said), said
    assert "Traceback" not in said


def test_files_that_are_no_run_are_kept(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert "holds files that are no run" in failed(capsys, *SHORT, "--out", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["thesis.tex"]


# --- killed and started again -------------------------------------------------------------------

LONG = [
    *TINY, "--steps", "30", "--sft.steps", "4", "--checkpoint-every", "4", "--seed", "1",
    "--sft.pack", "112",
    "--algorithms", "repo_rloo,repo_tb_replay", "--critic-free-learning-rate", "0.02",
]  # fmt: skip


def wait_for(condition, process, timeout_s=240.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"nothing to kill after {timeout_s} s"
        time.sleep(0.002)


def test_killed_and_started_again_gives_the_same_numbers(tmp_path):
    command = [sys.executable, "-m", "experiments.safety", *LONG, "--out", str(tmp_path / "killed")]
    rows = tmp_path / "killed" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ)

        def is_in_the_middle():
            """Past the first checkpoint of the second algorithm, in what was not yet saved."""
            saved = tmp_path.glob("killed/checkpoints/repo_tb_replay/*.json")
            return any(saved) and '"repo_tb_replay", "step": 7' in rows.read_text()

        try:
            wait_for(is_in_the_middle, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)
    assert not (tmp_path / "killed" / "summary.json").exists()
    before = len([r for r in read_json_lines(rows) if r["stage"] == "repo_tb_replay"])
    assert 7 <= before < 30
    main([*LONG, "--out", str(tmp_path / "killed")])
    main([*LONG, "--out", str(tmp_path / "whole")])
    killed, whole = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole")
    )
    assert killed == whole
    for file in ("table.txt", "samples/repo_tb_replay.jsonl", "samples/repo_rloo.jsonl"):
        texts = [(tmp_path / name / file).read_text() for name in ("killed", "whole")]
        assert texts[0] == texts[1], file

    def numbers(name):
        found = read_json_lines(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k != "time_s"} for row in found]

    assert numbers("killed") == numbers("whole")
