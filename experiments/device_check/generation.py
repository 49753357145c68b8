"""Generation with the large model: tokens a second, and whether the log-probabilities are true."""

import contextlib
import statistics
import time

import jax
import numpy as np
from flax import nnx

from experiments.device_check.checks import Finding
from experiments.device_check.model import chip, large, random_prompts
from jaxrl import policy
from jaxrl.rollouts import Sampling
from jaxrl.rollouts.generate import generate_from_state

GAP_NATS = 0.05
"""Largest mean difference of a token's log-probability, in nats, between the sampler, which reads a
cache token by token, and one pass over the finished text; both compute in bf16."""
ROUNDS = 3


def check(tiny: bool) -> Finding:
    """Writes completions a few times, and reads the last ones again in one pass."""
    found = large(tiny)
    work, vocab = found.workload, found.config.vocab_size
    plan = found.plan(found.params)
    prompts = random_prompts(found)
    if found.mesh:
        prompts = plan.bind().place_batch(prompts)
    # An end token that is never drawn: every completion has its full length.
    sampling = Sampling(max_new_tokens=work.completion_len, eos_id=vocab, pad_id=0)
    options = {"graphdef": found.graphdef, "sampling": sampling, "group_size": work.group_size}

    def read(params, completions):
        model = nnx.merge(found.graphdef, params)
        return policy.evaluate(
            model, prompts, completions.tokens, completions.mask, temperature=1.0,
            with_entropy=False,
        ).log_probs  # fmt: skip

    with plan.bind().context() if found.mesh else contextlib.nullcontext():
        began = time.perf_counter()
        written = generate_from_state(found.params, prompts, jax.random.key(0), **options)
        jax.block_until_ready(written)
        compile_s, times = time.perf_counter() - began, []
        for seed in range(1, 2 if tiny else ROUNDS + 1):
            began = time.perf_counter()
            written = generate_from_state(found.params, prompts, jax.random.key(seed), **options)
            jax.block_until_ready(written)
            times.append(time.perf_counter() - began)
        again = jax.jit(read)(found.params, written)
    gaps = np.abs(np.asarray(again) - np.asarray(written.log_probs))
    seconds = statistics.median(times)
    tokens = work.prompts_per_step * work.group_size * work.completion_len
    numbers = {
        "model": found.name,
        "completions": work.prompts_per_step * work.group_size,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "mean_gap_nats": float(gaps.mean()),
        "largest_gap_nats": float(gaps.max()),
        "first_call_with_compilation_s": compile_s,
    }
    problems = []
    if not bool(np.asarray(written.mask).all()):
        problems.append("completions ended early, and no end token can be drawn")
    if not gaps.mean() <= GAP_NATS:
        problems.append(
            f"sampler and one pass differ by {gaps.mean():.3g} nats a token, allowed are {GAP_NATS}"
        )
    summary = f"{tokens / seconds:,.0f} tokens/s, log-probabilities within {gaps.mean():.2g} nats"
    known = chip()
    if known is not None:
        # Each token of all completions reads the weights once, in bf16.
        least_s = work.completion_len * 2 * found.config.num_params / known.hbm_bytes_per_s
        least_s /= jax.device_count() / known.devices_per_chip if found.mesh else 1
        numbers["share_of_bandwidth_for_weights"] = least_s / seconds
        summary += f"; {least_s / seconds:.0%} of the bandwidth is for reading weights"
    return Finding(numbers=numbers, summary=summary, problems=tuple(problems))
