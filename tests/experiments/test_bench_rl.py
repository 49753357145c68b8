"""The benchmark measures what it says, and its contestants compute the same model."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_rl
from experiments.bench import ours, plain, processes, protocol
from experiments.bench.processes import Contestant, Worker, WorkerFailed
from experiments.bench.workload import EOS, PAD, Workload, decode, encode, lowercase_share

TINY = Workload(
    layers=2, embed=16, heads=4, kv_heads=2, head_dim=8, mlp=24, prompts=2, group_size=3,
    prompt_len=6, new_tokens=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _plain_code_is_free_to_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_the_workload_has_the_size_that_is_written_everywhere():
    # Embedding 260·256; a layer: q 256·256, k and v 128·256, o 256·256, three of 768·256,
    # two norms of 256 and two of 64.
    layer = 256 * (256 + 128 + 128 + 256 + 3 * 768) + 2 * 256 + 2 * 64
    assert Workload().parameters() == 260 * 256 + 4 * layer + 256 == 3_215_104
    assert Workload().generated_tokens == 4096


def test_arithmetic_is_two_flops_a_parameter_and_token_and_three_times_that_to_train():
    flops = TINY.flops()
    tokens = 2 * 6 + 2 * 3 * 4
    assert flops["rollout"] == 2 * TINY.parameters() * tokens
    assert flops["update"] == 3 * flops["scoring"]


def test_prompts_are_left_padded_and_fit():
    tokens, mask = Workload().prompt_tokens()
    assert tokens.shape == (8, 32)
    assert mask[:, -1].all()
    assert (np.diff(mask.astype(int), axis=1) >= 0).all()
    assert mask.all(axis=1).any(), "no prompt fills the whole length: peers would pad less"
    assert [decode(row[row != PAD]) for row in tokens] == Workload().texts()


def test_reward_is_the_share_of_lowercase_letters():
    # "aB1c" has 2 of 4; nothing has 0 of at least 1; é is no letter a–z.
    assert lowercase_share(["aB1c", "", "é"]) == [0.5, 0.0, 0.0]
    assert decode([*encode("ok"), EOS, PAD]) == "ok"


def test_plain_loop_and_project_have_the_same_logits():
    tokens = np.random.default_rng(0).integers(0, 260, (2, 10)).tolist()
    theirs = plain.Loop(TINY).logits(tokens)["logits"]
    np.testing.assert_allclose(ours.Loop(TINY).logits(tokens)["logits"], theirs, atol=1e-5)


def test_plain_generation_scores_its_own_tokens_as_a_fresh_forward_does():
    loop = plain.Loop(TINY)
    key = jax.random.key(3)
    tokens, log_probs = plain.generate(TINY, loop.params, loop.prompts, loop.mask, key)
    fresh = plain.score(TINY, loop.params, loop.prompts, loop.mask, tokens)
    assert tokens.shape == (6, 4)
    np.testing.assert_allclose(log_probs, fresh, atol=1e-5)


def test_plain_scores_and_project_scores_agree():
    from flax import nnx

    from jaxrl import policy

    loop, own = plain.Loop(TINY), ours.Loop(TINY)
    tokens, _ = plain.generate(TINY, loop.params, loop.prompts, loop.mask, jax.random.key(0))
    theirs = plain.score(TINY, loop.params, loop.prompts, loop.mask, tokens)
    grouped = tokens.reshape(2, 3, 4)
    model = nnx.merge(own.graphdef, own.reference)
    got = policy.evaluate(
        model, own.prompts, grouped, jnp.ones_like(grouped, bool), temperature=1.0
    )
    np.testing.assert_allclose(got.log_probs.reshape(6, 4), theirs, atol=1e-5)


def test_plain_gradient_is_that_of_the_project():
    """From the same rollouts, one step moves both policies alike."""
    loop, own = plain.Loop(TINY), ours.Loop(TINY)
    key = jax.random.key(1)
    rollouts, _ = own.collector.collect(own.reference, own.reference, own.prompts, key, 0)
    rewards = jax.random.normal(jax.random.key(2), (2, 3))
    rollouts = rollouts.replace(rewards={"reward": rewards}, costs={"cost": rewards * 0})
    state, _ = own.learner.update(own.state, rollouts)
    flat = rollouts.tokens.reshape(6, 4)
    params, _, _ = plain.update(
        TINY, loop.params, loop.opt_state, loop.prompts, loop.mask, flat,
        rollouts.behaviour_log_probs.reshape(6, 4), rollouts.reference_log_probs.reshape(6, 4),
        rewards.reshape(-1),
    )  # fmt: skip
    before = plain.load(TINY)["embed"]
    moved = np.asarray(state.params["policy"]["embedding"][...] - before)
    # Adam's first step is the gradient's sign times the rate, whatever its size.
    signs = np.sign(np.asarray(params["embed"] - before))
    assert (np.abs(moved) > 0).mean() > 0.5
    assert (np.sign(moved) == signs).mean() > 0.99


@pytest.mark.parametrize("module", [plain, ours])
def test_steps_after_the_second_compile_nothing_and_parts_add_up(module):
    compilations = protocol.Compilations()
    # A shape that no other test has compiled.
    loop = module.Loop(dataclasses.replace(TINY, new_tokens=3))
    step = protocol.counting(compilations, loop.step)
    assert step()["compilations"] > 0
    step()
    shares = []
    # A busy machine may stop a process between any two parts, and not every time.
    while not shares or (max(shares) < 0.8 and len(shares) < 500):
        measured = step()
        assert measured["compilations"] == 0
        parts = sum(measured[f"{name}_s"] for name in ("rollout", "scoring", "update"))
        shares.append(parts / measured["step_s"])
    assert 0.8 <= max(shares) < 1.001


def test_stopwatch_counts_an_inner_part_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])
    watch = protocol.Stopwatch()
    with watch.part("outer", minus="inner"):
        now[0] += 2.0
        with watch.part("inner"):
            now[0] += 5.0
        now[0] += 1.0
    now[0] += 4.0
    found = watch.result()
    assert watch.parts == {"inner": 5.0, "outer": 3.0}
    assert (found["step_s"], found["update_s"]) == (12.0, 4.0)  # what no part claims


ECHO = """
import sys, time, json
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    op = json.loads(line)["op"]
    if op == "sleep":
        time.sleep(60)
    if op == "die":
        print("out of luck", file=sys.stderr)
        sys.exit(3)
    print(json.dumps({"heard": op}), flush=True)
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    contestant = Contestant(name="echo", module="echo_worker", python=sys.executable)
    with Worker(contestant, TINY, cache=None, log=tmp_path / "log", timeout_s=200) as worker:
        yield worker


def test_a_worker_that_does_not_answer_is_ended_and_named(echo):
    assert echo.ask("hello") == {"heard": "hello"}
    echo.timeout_s = 0.2
    with pytest.raises(WorkerFailed, match="echo was asked to 'sleep' and did not answer"):
        echo.ask("sleep")
    assert echo._process.poll() is not None


def test_a_worker_that_dies_is_quoted(echo):
    with pytest.raises(WorkerFailed, match="ended when asked to 'die': out of luck"):
        echo.ask("die")


def test_workers_do_not_inherit_settings_that_tilt_the_comparison(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    inherited = processes.environment(tmp_path)
    assert "XLA_FLAGS" not in inherited
    assert inherited["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
    assert "JAX_COMPILATION_CACHE_DIR" not in processes.environment(None)


def test_a_missing_interpreter_is_an_error_and_a_missing_peer_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert processes.find_peer("trl", None) is None
    with pytest.raises(ValueError, match="--trl-python must be a Python interpreter"):
        processes.find_peer("trl", tmp_path / "no")


def fake(step_s: list[float], **more: float) -> dict:
    steps = [
        {"step_s": s, "cpu_s": s, "rollout_s": s / 4, "scoring_s": s / 4, "update_s": s / 2} | more
        for s in step_s
    ]
    return {
        "rounds": steps, "first_step_cold_s": 5.0, "first_step_cached_s": 4.0, "startup_s": 1.0,
        "versions": {}, "logit_gap": 0.0, "peak_bytes": 2**30,
    }  # fmt: skip


def test_ratios_are_taken_within_rounds_and_targets_judged():
    # The machine slowed down tenfold in the second round; the ratio is 2 in each all the same.
    results = {
        "jaxrl": fake([1.0, 10.0, 1.0], compilations=0),
        "trl": fake([2.0, 20.0, 2.0]),
        "tunix": fake([1.2, 12.0, 1.2], compilations=1),
    }
    summary = bench_rl.summarise(bench_rl.BenchConfig(), results)
    assert summary["speedups"]["trl"]["step"] == 2.0
    wanted = summary["targets"]
    assert wanted["step, times faster than the faster peer"]["got"] == pytest.approx(1.2)
    assert not wanted["step, times faster than the faster peer"]["met"]
    assert wanted["first step cold, s"]["met"]
    assert not wanted["first step with cache, s"]["met"]
    assert wanted["compilations after warm-up"]["met"]
    # 4096 tokens in a median rollout of 0.25 s.
    assert summary["contestants"]["jaxrl"]["generation_tokens_per_s"] == 4096 / 0.25


def test_arithmetic_shares_are_least_time_over_measured_time():
    results = {"jaxrl": fake([2.0], compilations=0), "plain": fake([3.0])}
    results["plain"]["matmul_flops_per_s"] = {"square": 1e11, "update": 1e11, "decode": 5e10}
    parts = bench_rl.summarise(bench_rl.BenchConfig(), results)["arithmetic"]
    flops = Workload().flops()
    assert parts["update"]["share"] == pytest.approx(flops["update"] / 1e11 / 1.0)
    assert parts["step"]["arithmetic_s"] == pytest.approx(sum(flops.values()) / 1e11)


def test_matmul_rate_is_positive_and_below_any_machine():
    rate = plain.matmul_rate(64, 64, 64, seconds=0.01)["flops_per_s"]
    assert 1e6 < rate < 1e15


def test_the_documented_command_runs(tmp_path, capsys):
    """Two contestants, two rounds of a smaller policy, as processes."""
    bench_rl.main(
        ["--contestants", "jaxrl,plain", "--steps", "2", "--warmup", "1", "--layers", "1",
         "--prompts", "2", "--new-tokens", "4", "--out", str(tmp_path / "run")]
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["contestants"]) == {"jaxrl", "plain"}
    assert summary["contestants"]["jaxrl"]["compilations_after_warmup"] == 0
    assert summary["contestants"]["plain"]["logit_gap"] < 1e-4
    assert "generation tok/s" in capsys.readouterr().out
    assert "One RL step, timed" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--steps", "0"], "steps must be 1 or greater"), (["--contestants", "vllm"], "vllm")],
)
def test_wrong_flags_say_what_is_allowed(flags, message, capsys):
    with pytest.raises(SystemExit):
        bench_rl.main(flags)
    assert message in capsys.readouterr().err
