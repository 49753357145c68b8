"""One run on one, two and four processes: the same numbers, stopped, and gone on with elsewhere."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.harness import Run
from experiments.harness.files import read_json_lines
from experiments.safety import stages, task
from experiments.safety.__main__ import main
from experiments.safety.config import PRESETS, SafetyConfig
from jaxrl.models.huggingface import load_adapter, load_pretrained
from jaxrl.models.lora import merged
from jaxrl.processes import PREEMPTED
from jaxrl.train import Tape

ROOT = Path(__file__).resolve().parents[3]
TINY = [
    *("--model.layers", "1", "--model.embed", "16", "--model.heads", "2", "--model.kv-heads", "1"),
    *("--model.head-dim", "8", "--model.mlp", "16", "--vocab-size", "300", "--prompt-len", "48"),
    *("--completion-len", "8", "--samples-per-step", "32", "--sft.batch", "8", "--sft.steps", "2"),
    *("--evaluation.prompts", "4", "--evaluation.samples", "1", "--evaluation.batch", "4"),
    *("--algorithms", "repo_tb", "--checkpoint-every", "5", "--sampler-tolerance", "100"),
]
RECORDED, STEPS = 24, 26  # steps with recorded rollouts, and all


def config_of(*argv):
    return harness.cli(SafetyConfig, presets=PRESETS, argv=[*TINY, *argv])


@pytest.fixture(scope="module")
def tape(tmp_path_factory):
    """Rollouts of the first steps, with scores that differ so that there is much to learn."""
    folder = tmp_path_factory.mktemp("tape")
    config = config_of("--steps", str(STEPS))
    data = task.load(config)
    with Run.open("safety", config, folder / "run", stream=io.StringIO()) as run:
        work = task.build(config, data, run.folder)
        sft = stages.initial_policy(config, work)
        recipe = config.recipe("repo_tb")
        parts = (run, config, work, task.exact_evaluators(data), recipe, sft)
        trainer = stages.trainer_of(*parts)
        state = stages.initial_state(config, trainer.learner, work, sft)
        rng = np.random.default_rng(0)
        recorded = Tape(folder / "repo_tb")
        for step in range(RECORDED):
            rollouts = trainer.rollout(state, step)
            rewards, costs = rng.normal(size=(2, *rollouts.reward.shape)).astype(np.float32)
            found = rollouts.replace(rewards={"reward": rewards}, costs={"cost": costs})
            recorded.write(step, found)
            back = recorded.read(step)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(back), strict=True):
                np.testing.assert_array_equal(a, b)
    shutil.rmtree(folder / "run")
    return folder


def started(folder, count, devices, *argv, sizes=(*TINY, "--steps", str(STEPS))):
    """The processes of one run, in the environment that a launcher would make."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices)}
    if count > 1:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{listener.getsockname()[1]}"
        environment["JAX_NUM_PROCESSES"] = str(count)
    else:
        argv = ("--mesh", f"data={devices}", *argv)
    command = [sys.executable, "-m", "experiments.safety", *sizes]
    return [
        subprocess.Popen(
            [*command, *argv, "--out", str(folder / "run"), "--tape", str(folder / "tape")],
            cwd=ROOT, env=environment | ({"JAX_PROCESS_ID": str(k)} if count > 1 else {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for k in range(count)
    ]  # fmt: skip


def ended(running, status):
    """What every process printed, once all have ended with a status; Gloo's own lines left out."""
    try:
        said = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    found = [process.returncode for process in running]
    assert found == [status] * len(running), "\n".join(err[-2500:] for _, err in said)
    return [[without_gloo(text) for text in both] for both in said]


def without_gloo(text):
    """Gloo's threads print the pieces of their lines between one another's."""
    pieces = r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of .* ranks is : "
    return "".join(
        line
        for line in text.splitlines(keepends=True)
        if not re.search(pieces, line) and not re.fullmatch(r"\d*\s*", line)
    )


def numbers(folder):
    """Metrics by stage and step; each step once."""
    rows = read_json_lines(folder / "run" / "metrics.jsonl")
    found = {(row["stage"], row["step"]): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.timeout(400)
def test_a_run_is_the_same_on_other_processes_and_goes_on_after_a_preemption(tmp_path, tape):
    one, many = tmp_path / "one", tmp_path / "many"
    for folder in (one, many):
        shutil.copytree(tape, folder / "tape")
    alone = started(one, 1, 4)

    # Two processes of two devices. The second, which writes nothing, is told to stop.
    running = started(many, 2, 2)
    rows = many / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (rows.exists() and '"repo_tb"' in rows.read_text()):
        assert all(process.poll() is None for process in running), ended(running, 0)
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running[1].send_signal(signal.SIGTERM)
    said = ended(running, PREEMPTED)
    assert "told to stop" in said[0][1]
    assert said[1][0] == ""
    assert "repo_tb" not in said[1][1]
    saved = max(int(x.stem) for x in (many / "run" / "checkpoints" / "repo_tb").glob("*.json"))
    assert saved == max(step for stage, step in numbers(many) if stage == "repo_tb")

    # Four processes of one device go on.
    said = ended(started(many, 4, 1), 0)
    assert "resuming" in said[0][1]
    assert "Report:" in said[0][0]
    assert [out for out, _ in said[1:]] == [""] * 3
    ended(alone, 0)

    wanted, found = numbers(one), numbers(many)
    assert set(found) == set(wanted)
    assert len(found) == STEPS + 1
    for (stage, step), row in wanted.items():
        if stage == "repo_tb" and step > RECORDED:
            continue  # with rollouts of its own it may have forked
        other = found[stage, step]
        assert set(other) == set(row)
        for name in set(row) - {"time_s", "stage"}:
            assert other[name] == pytest.approx(row[name], rel=1e-5, abs=1e-5), (stage, step, name)
    losses = [row["loss"] for (stage, _), row in wanted.items() if stage == "repo_tb"]
    assert np.ptp(losses[:RECORDED]) > 0.1  # else the comparison would say nothing
    for step in range(RECORDED, STEPS):  # written afresh: the same prompts in the same order
        mine, theirs = (Tape(folder / "tape" / "repo_tb").read(step) for folder in (one, many))
        np.testing.assert_array_equal(mine.prompts.ids, theirs.prompts.ids)
        assert mine.tokens.shape == theirs.tokens.shape
    assert (many / "run" / "summary.json").exists()


@pytest.mark.timeout(200)
def test_adapters_are_trained_by_several_processes(tmp_path, pretrained_folder, varied_rewards):
    one, many = tmp_path / "one", tmp_path / "many"
    sizes = [
        *("--model", str(pretrained_folder), "--model.lora-rank", "2", "--steps", "3"),
        *("--model.compute-dtype", "float32", "--prompt-len", "32", "--completion-len", "6"),
        *("--samples-per-step", "8", "--algorithms", "rloo", "--critic-free-learning-rate", "0.01"),
        *("--optimizer.warmup-steps", "0", "--evaluation.prompts", "2", "--evaluation.samples"),
        *("2", "--evaluation.batch", "2", "--mesh", "fsdp=2,tensor=2"),
    ]
    main([*sizes, "--out", str(one / "run"), "--tape", str(one / "tape")])
    shutil.copytree(one / "tape", many / "tape")
    (many / "tape" / "rloo" / "00000002.rollouts").unlink()  # the last step they write themselves
    ended(started(many, 2, 2, sizes=sizes), 0)

    wanted, found = numbers(one), numbers(many)
    assert set(found) == set(wanted)
    for step in (1, 2):
        for name in set(wanted["rloo", step]) - {"time_s", "stage"}:
            value = wanted["rloo", step][name]
            assert found["rloo", step][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert abs(wanted["rloo", 2]["kl"]) > 1e-4  # the first step has moved the adapters
    assert found["rloo", 3]["sampler_gap"] < 1e-3  # they write with the weights that they train

    base = load_pretrained(pretrained_folder, compute_dtype="float32")
    beside = load_adapter(many / "run" / "models" / "rloo-adapter", base)
    whole = load_pretrained(many / "run" / "models" / "rloo", compute_dtype="float32")
    lora, layers = beside.config.lora, beside.model().layers.weights()
    assert all(np.abs(layers[f"{name}_lora_b"]).max() > 1e-3 for name in lora.targets)
    added = merged(layers, lora)
    for name, weights in whole.model().layers.weights().items():
        # Written in the bf16 of the source.
        np.testing.assert_allclose(weights, added[name], rtol=2**-8, atol=1e-6, err_msg=name)
