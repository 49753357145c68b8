"""One RL step of a large model: tokens a second, MFU, and the planner's prediction beside them."""

import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from experiments.device_check.checks import Finding
from experiments.device_check.model import Large, chip, large, random_prompts, update_flops
from jaxrl.deployment.programs import learner_programs
from jaxrl.learner import Learner, lm_apply, lm_optimizer
from jaxrl.types import Rollouts

ROUNDS = 5


def check(tiny: bool) -> Finding:
    """Updates a few times on the same rollouts, of which every number has to stay finite."""
    found = large(tiny)
    work = found.workload
    learner = Learner(
        recipe=work.recipe,
        apply=lm_apply(found.graphdef, None, temperature=1.0),
        optimizer=lm_optimizer(work.optimizer),
        plan=found.plan({"policy": found.params}),
    )
    state = learner.init({"policy": found.params}, num_prompts=work.prompts_per_step)
    rollouts = _rollouts(found)
    before = np.asarray(jax.tree.leaves(state.params)[-1].ravel()[:64])
    began = time.perf_counter()
    state, metrics = learner.update(state, rollouts)
    losses = [float(metrics["loss"])]
    compile_s = time.perf_counter() - began
    times, skipped = [], float(metrics["skipped"])
    for _ in range(2 if tiny else ROUNDS):
        began = time.perf_counter()
        state, metrics = learner.update(state, rollouts)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - began)
        skipped += float(metrics["skipped"])
    problems = []
    if skipped or not all(map(math.isfinite, losses)):
        problems.append(f"losses must be finite and no update skipped: {losses=}, {skipped=}")
    if np.array_equal(np.asarray(jax.tree.leaves(state.params)[-1].ravel()[:64]), before):
        problems.append("the updates changed nothing")
    numbers = _numbers(found, statistics.median(times)) | {
        "losses": losses, "first_step_with_compilation_s": compile_s, **_predicted(found),
    }  # fmt: skip
    return Finding(numbers=numbers, summary=_summary(numbers), problems=tuple(problems))


def _rollouts(found: Large) -> Rollouts:
    """Random tokens, as the reference policy would have written them, with random scores."""
    work, rng = found.workload, np.random.default_rng(0)
    b, g, t = work.prompts_per_step, work.group_size, work.completion_len
    tokens = rng.integers(0, found.config.vocab_size, (b, g, t), np.int32)
    chance = -math.log(found.config.vocab_size)  # of a token, where all are as likely
    log_probs = np.full((b, g, t), chance, np.float32)
    scores = rng.normal(size=(2, b, g)).astype(np.float32)
    return Rollouts(
        prompts=random_prompts(found), tokens=jnp.asarray(tokens), mask=jnp.ones((b, g, t), bool),
        behaviour_log_probs=jnp.asarray(log_probs), reference_log_probs=jnp.asarray(log_probs),
        policy_version=jnp.full((b, g, t), -1, jnp.int32),
        rewards={"reward": jnp.asarray(scores[0])}, costs={"cost": jnp.asarray(scores[1])},
    )  # fmt: skip


def _numbers(found: Large, step_s: float) -> dict[str, Any]:
    known, flops = chip(), update_flops(found)
    reached = flops / step_s
    numbers: dict[str, Any] = {
        "model": found.name,
        "parameters": found.config.num_params,
        "mesh": dict(found.mesh),
        "step_s": step_s,
        "trained_tokens_per_s": found.workload.trained_tokens / step_s,
        "model_flops": flops,
        "model_tflop_per_s": reached / 1e12,
    }
    if known is not None:
        peak = known.peak_flops["bf16"] * jax.device_count() / known.devices_per_chip
        numbers |= {"peak_tflop_per_s": peak / 1e12, "mfu": reached / peak, "chip": known.name}
    return numbers


def _predicted(found: Large) -> dict[str, Any]:
    """What the planner says of the same step on these devices; why not, where it cannot."""
    (program,) = learner_programs(found.workload)
    try:
        pinned = {"fsdp": jax.device_count()} if found.mesh else {}
        devices = jax.devices() if found.mesh else jax.devices()[:1]
        plan = sharding.plan(
            program.step, program.args, cluster=devices,
            constraints=sharding.Constraints(pinned=pinned),
        )  # fmt: skip
    except Exception as error:  # the measurement stands without it
        return {"prediction_error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"predicted_step_s": plan.step_time_s, "predicted_bytes": plan.memory_bytes}


def _summary(numbers: dict[str, Any]) -> str:
    said = (
        f"{numbers['parameters'] / 1e9:.2g}B parameters: {numbers['step_s']:.3g} s, "
        f"{numbers['trained_tokens_per_s']:,.0f} trained tokens/s"
    )
    if "mfu" in numbers:
        said += f", MFU {numbers['mfu']:.1%}"
    if "predicted_step_s" in numbers:
        said += f"; the planner predicted {numbers['predicted_step_s']:.3g} s"
    return said
