"""Run folders: new, resumed, finished, foreign, busy and broken ones."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from experiments.harness import FolderBusy, Run, RunFolderError, RunOptions, clean_errors, main
from experiments.harness.files import read_json_lines, write_atomically, write_json
from experiments.harness.metrics import Metrics, start_wandb

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    steps: int = 3
    """Updates."""


def opened(out, **changes):
    return Run.open("demo", Config(**changes), out, stream=io.StringIO())


def experiment(run):
    run.rewind("repo", 0)
    with run.progress("repo", run.config.steps) as bar:
        for step in range(1, run.config.steps + 1):
            with run.profiled(), run.span("rollout", step=step):
                metrics = {"reward": np.float32(step)}
            run.log("repo", step, metrics)
            bar.update(step, metrics)
    run.write_samples("repo", [{"prompt": "?", "completion": "!"}])
    run.finish({"reward": 3.0}, "the table")


def test_new_folder_records_what_the_result_depends_on(tmp_path):
    with opened(tmp_path / "a" / "b", seed=5) as run:
        assert not run.resumed
        assert not run.finished
    record = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert record["config"]["steps"] == 3
    assert record["seed"] == 5
    assert record["hash"] == run.hash
    assert {"python", "jax", "flax", "numpy"} <= set(record["versions"])
    assert record["devices"]
    assert record["git"] is None or re.fullmatch(r"[0-9a-f]{40}", record["git"]["commit"])


def test_default_folder_is_named_by_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Run.open("demo", Config(), stream=io.StringIO()) as run:
        assert str(run.folder) == f"runs/demo-{run.hash}"
    with Run.open("demo", Config(out=tmp_path / "mine"), stream=io.StringIO()) as run:
        assert run.folder == tmp_path / "mine"


def test_empty_folder_counts_as_new(tmp_path):
    (tmp_path / ".DS_Store").touch()
    with opened(tmp_path) as run:
        assert not run.resumed


def test_same_config_resumes_also_with_other_cosmetics(tmp_path):
    opened(tmp_path).close()
    with opened(tmp_path, profile=True) as run:
        assert run.resumed


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    opened(tmp_path).close()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(RunFolderError, match=r"steps: 3, now 9; seed: 0, now 1|seed: 0, now 1"):
        opened(tmp_path, steps=9, seed=1)
    assert (tmp_path / "config.json").read_bytes() == before
    opened(tmp_path).close()  # the failed attempt did not keep the lock


def test_another_experiment_is_refused(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(RunFolderError, match="a run of 'demo', not of 'other'"):
        Run.open("other", Config(), tmp_path, stream=io.StringIO())


def test_files_that_are_no_run_are_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match=r"no run \(thesis.tex\)"):
        opened(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"
    assert not (tmp_path / "config.json").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="must be a folder"):
        opened(tmp_path / "file")


def test_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "demo"')
    with pytest.raises(RunFolderError, match=r"config.json is no config"):
        opened(tmp_path)


def test_second_run_in_one_folder_is_refused_until_the_first_ends(tmp_path):
    with opened(tmp_path), pytest.raises(FolderBusy, match=f"process {os.getpid()} on"):
        opened(tmp_path)
    opened(tmp_path).close()


HOLD = """
    import sys, time
    from pathlib import Path
    from experiments.harness.lock import FolderLock
    lock = FolderLock(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderBusy, match=f"process {holder.pid}"):
            opened(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=200)
    opened(tmp_path).close()


def test_main_runs_once_and_then_prints_the_table_again(tmp_path, capsys):
    main(experiment, "demo", Config(), out=tmp_path, stream=io.StringIO())
    assert "the table" in capsys.readouterr().out

    def never(_):
        raise AssertionError("a finished run must not run again")

    main(never, "demo", Config(), out=tmp_path, stream=io.StringIO())
    assert "the table" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text()) == {"reward": 3.0}
    assert read_json_lines(tmp_path / "samples" / "repo.jsonl") == [
        {"prompt": "?", "completion": "!"}
    ]


def test_errors_are_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("JAXRL_TRACEBACK", raising=False)

    def fails(_):
        raise ValueError("data.jsonl, line 3: prompt is empty")

    with pytest.raises(SystemExit) as stopped:
        main(fails, "demo", Config(), out=tmp_path, stream=io.StringIO())
    assert stopped.value.code == 2
    assert "error: data.jsonl, line 3: prompt is empty" in capsys.readouterr().err
    monkeypatch.setenv("JAXRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="line 3"), clean_errors():
        fails(None)


def test_interrupting_says_how_to_go_on(tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    stream = io.StringIO()
    with pytest.raises(SystemExit) as stopped:
        main(interrupted, "demo", Config(), out=tmp_path, stream=stream)
    assert stopped.value.code == 130
    assert f"--out {tmp_path} continues" in stream.getvalue()


# A run that counts its steps, adds up random numbers and waits in between to be killed.
SLOW_EXPERIMENT = """
    import sys, time
    from dataclasses import dataclass, field
    import jax, jax.numpy as jnp
    from experiments import harness
    from jaxrl.checkpoint import Checkpointer

    @dataclass(frozen=True, kw_only=True)
    class Config(harness.RunOptions):
        steps: int = 12
        hold_at: int = field(default=0, metadata=harness.COSMETIC)

    def experiment(run):
        state = {"key": jax.random.key(run.config.seed), "total": jnp.float32(0)}
        with Checkpointer(run.checkpoints / "walk") as checkpoints:
            found = checkpoints.restore_latest(state)
            start, state = (found.step, found.tree) if found else (0, state)
            run.rewind("walk", start)
            for step in range(start + 1, run.config.steps + 1):
                key, use = jax.random.split(state["key"])
                state = {"key": key, "total": state["total"] + jax.random.normal(use)}
                run.log("walk", step, {"total": state["total"]})
                if step % 3 == 0:
                    checkpoints.save(step, state)
                print(step, flush=True)
                if step == run.config.hold_at:
                    time.sleep(600)  # until it is killed
        run.finish({"total": state["total"]}, "done")

    harness.main(experiment, "walk", harness.cli(Config))
"""


def test_killed_and_started_again_gives_the_same_numbers(tmp_path):
    program = tmp_path / "walk.py"
    program.write_text(textwrap.dedent(SLOW_EXPERIMENT))

    def start(out, *argv):
        command = [sys.executable, str(program), "--out", str(tmp_path / out), *argv]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    with start("whole") as whole, start("killed", "--hold-at", "8") as killed:
        while killed.stdout.readline() != "8\n":
            assert killed.poll() is None
        killed.send_signal(signal.SIGKILL)
        whole.communicate(timeout=250)
    assert not (tmp_path / "killed" / "summary.json").exists()
    with start("killed") as again:
        shown, _ = again.communicate(timeout=250)
    steps = [int(line) for line in shown.split() if line.isdigit()]
    assert steps in (list(range(7, 13)), list(range(4, 13)))  # step 6 may not have been sealed
    for name in ("summary.json", "table.txt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = [
        [(r["step"], r["total"]) for r in read_json_lines(tmp_path / out / "metrics.jsonl")]
        for out in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == list(range(1, 13))


def test_rows_survive_and_are_rewound_to_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path)
    for stage, steps in (("sft", 3), ("repo", 5)):
        for step in range(1, steps + 1):
            metrics.log(stage, step, {"loss": 1 / step})
    # As after SIGKILL: not closed, and the last line cut in the middle.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "repo", "st')
    again = Metrics(tmp_path)
    assert len(again.rows()) == 8
    again.rewind("repo", 2)
    again.log("repo", 3, {"loss": 7.0})
    again.close()
    assert [row["step"] for row in again.rows("sft")] == [1, 2, 3]
    assert [(row["step"], row["loss"]) for row in again.rows("repo")] == [(1, 1), (2, 0.5), (3, 7)]
    metrics.close()


def test_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1}\n{oops\n{"stage": "b"}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        Metrics(tmp_path).rows()


def test_non_finite_metrics_are_valid_json_and_named(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.log("repo", 1, {"kl": float("nan"), "reward": np.float32(np.inf), "cost": 1.0})
    metrics.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=pytest.fail)
    assert (row["kl"], row["reward"], row["cost"]) == (None, None, 1.0)
    assert row["nonfinite"] == ["kl", "reward"]


def test_a_metric_is_one_number(tmp_path):
    with pytest.raises(ValueError, match=r"one number: received shape \(3,\)"):
        Metrics(tmp_path).log("repo", 1, {"kl": np.zeros(3)})


def test_resumed_event_files_tell_tensorboard_what_to_forget(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    metrics = Metrics(tmp_path)
    metrics.log("repo", 1, {"kl": 0.5})
    metrics.log("repo", 2, {"kl": 0.6})
    metrics.close()
    again = Metrics(tmp_path)
    again.rewind("repo", 1)
    again.log("repo", 2, {"kl": 0.7})
    again.close()

    events = [
        Event.FromString(record)
        for file in sorted((tmp_path / "tensorboard" / "repo").iterdir())
        for record in records_of(file.read_bytes())
    ]
    values = [(e.step, round(v.simple_value, 3)) for e in events for v in e.summary.value]
    assert values == [(1, 0.5), (2, 0.6), (2, 0.7)]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert starts == [2]


def records_of(data):
    """Payloads of a TFRecord file: length, its checksum, payload, its checksum."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_wandb_missing_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"not installed.*jaxrl-safe\[wandb\]"):
        start_wandb("p", tmp_path, "id", {})


def test_wandb_receives_every_number(tmp_path):
    class Fake:
        rows: list = []  # noqa: RUF012
        ended = False

        def log(self, row):
            self.rows.append(row)

        def finish(self):
            self.ended = True

    fake = Fake()
    metrics = Metrics(tmp_path, wandb=fake)
    metrics.log("repo", 4, {"kl": 0.5, "note": "text"})
    metrics.close()
    assert fake.rows == [{"repo/kl": 0.5, "repo/step": 4}]
    assert fake.ended


def test_profile_writes_a_trace_and_a_timeline(tmp_path):
    with opened(tmp_path, profile=True, steps=10) as run:
        experiment(run)
    (timeline,) = (tmp_path / "profile").glob("timeline-*.json")
    events = json.loads(timeline.read_text())["traceEvents"]
    assert [e["args"]["step"] for e in events] == list(range(1, 11))
    assert all(e["name"] == "rollout" and e["ph"] == "X" and e["dur"] >= 0 for e in events)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert run.timeline.counts["rollout"] == 10
    assert run.timeline.totals_s["rollout"] > 0


def test_nothing_is_profiled_unasked(tmp_path):
    with opened(tmp_path) as run:
        experiment(run)
    assert not (tmp_path / "profile").exists()


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_written_files_have_ordinary_permissions(tmp_path):
    write_atomically(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
