"""The pace of a divided run, against closed forms."""

import dataclasses

import numpy as np
import pytest

from jaxrl import recipes
from jaxrl.deployment import Cut, Division, Program, Workload
from jaxrl.deployment.division import bits_per_change, division
from jaxrl.deployment.parts import Part
from jaxrl.models import DecoderConfig
from jaxrl.models.named import named
from jaxrl.sync import Link
from sharding import Cluster, Plan

TINY = DecoderConfig(vocab_size=512, layers=2, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=128)
WORKLOAD = Workload(
    recipe=recipes.get("repo_tb", group_size=4), policy=TINY, prompts_per_step=16, prompt_len=32,
    completion_len=100,
)  # fmt: skip


def made(**changes) -> Division:
    fields = {
        "learner": Cluster.from_name("h100:1x8"), "actor": Cluster.from_name("h100:1x2"),
        "actors": 4, "prompts": 8, "codec": "sparse", "update_s": 1.0, "publish_s": 0.3,
        "fetch_s": 0.2, "batch_s": 3.9, "pause_s": 0.1, "max_staleness": 8, "prompts_per_step": 16,
        "trained_tokens": 1600.0, "parts": (),
    }  # fmt: skip
    return Division(**(fields | changes))


def test_the_slower_of_learner_and_actors_sets_the_pace():
    # 4 actors × 8 prompts in 3.9 + .1 s: 8 prompts/s, so that 16 take 2 s.
    assert made().generation_s == pytest.approx(2.0)
    assert (made().step_s, made().limit) == (pytest.approx(2.0), "generation")
    assert (made(update_s=5.0).step_s, made(update_s=5.0).limit) == (5.0, "update")
    assert made().tokens_per_s == pytest.approx(800.0)
    assert made(publish_s=1.9).step_s == pytest.approx(2.0)  # beside the updates


def test_a_rollout_is_as_old_as_steps_pass_from_its_weights_to_its_use():
    # .3 s until the weights are stored, .2 until an actor has them, 3.9 of writing, at 2 s a step.
    assert made().age_s == pytest.approx(4.4)
    assert made().staleness == 3
    assert made(update_s=9.0).staleness == 1


def test_a_bound_on_staleness_slows_what_would_be_older():
    bound = made(max_staleness=2)
    assert (bound.staleness, bound.limit) == (2, "staleness")
    assert bound.step_s == pytest.approx(4.4 / 2)


def test_weights_that_come_slower_than_updates_are_older_by_the_wait_for_the_next():
    # Of 10 s a fetch and 2 s a step, 8 s pass before the next version.
    assert made(fetch_s=10.0).age_s == pytest.approx(0.3 + 10.0 + 8.0 + 3.9)


@pytest.mark.parametrize("density", [1e-4, 1e-3, 0.0062, 0.02, 0.3, 1.0])
def test_bits_lie_between_their_neighbours(density):
    assert 5.6 <= bits_per_change(density) <= 16.0


def costed(link: Link | None, codec: str, *, actors: int = 4) -> Division:
    learner, actor = Cluster.from_name("v5p:2x2x2"), Cluster.from_name("v5p:2x2x1")
    update = Program(name="update", side="learner", step=dict, args=())
    part = Part(program=update, plan=Plan(), step_s=1.0, memory_bytes=0.0, resident_bytes=0.0)
    return division(
        WORKLOAD, Cut(learner, Cluster.from_name("v5p:2x2x4")), part, actor=actor, actors=actors,
        prompts=8, codec=codec, parts=(), max_staleness=8, link=link,
    )  # fmt: skip


def test_dense_weights_take_their_bytes_over_the_hosts_network():
    weights, network = 2 * TINY.num_params, Cluster.from_name("v5p:2x2x1").chip.host_bytes_per_s
    found = costed(None, "dense")
    assert found.publish_s == pytest.approx(weights / network)
    assert found.fetch_s == pytest.approx(weights / network)
    assert found.update_s == 1.0


def test_a_slow_link_is_shared_by_all_actors_and_wants_few_bytes():
    link = Link(bits_per_s=1e6, latency_s=0.5)
    dense, sparse = costed(link, "dense"), costed(link, "sparse")
    assert dense.fetch_s == pytest.approx(4 * 16 * TINY.num_params / 1e6 + 0.5)
    assert costed(link, "dense", actors=2).fetch_s == pytest.approx(
        2 * 16 * TINY.num_params / 1e6 + 0.5
    )
    bits = TINY.num_params * WORKLOAD.density * bits_per_change(WORKLOAD.density)
    assert sparse.fetch_s == pytest.approx(4 * bits / 1e6 + 0.5, rel=1e-3)
    assert sparse.update_s > dense.update_s  # whose devices look for what changed


@pytest.mark.parametrize("mean", [1.0, 5.0, 37.5, 99.0, 100.0])
def test_lengths_have_the_mean_that_is_asked_for_and_a_batch_lasts_as_its_longest(mean):
    workload = dataclasses.replace(WORKLOAD, mean_len=mean)
    prompts = 3
    ending = workload._ending()
    draws = np.random.default_rng(0).geometric(ending, (4000, prompts * 4)) if ending else None
    drawn = np.full((1, 1), 100) if draws is None else np.minimum(draws, 100)
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    assert workload.decoding_steps(prompts) == pytest.approx(drawn.max(axis=1).mean(), rel=0.02)
    assert workload.trained_tokens == pytest.approx(16 * 4 * mean)


def test_lengths_out_of_range_are_refused():
    with pytest.raises(ValueError, match="mean_len lies between 1 and completion_len"):
        dataclasses.replace(WORKLOAD, mean_len=101.0)


def test_a_mixture_of_experts_has_bounded_room_unless_it_says_for_how_much():
    mixture = named("qwen3-30b-a3b")
    workload = dataclasses.replace(WORKLOAD, policy=mixture)
    assert workload.executed(mixture).expert_capacity == 2.0
    assert "take 2 times a balanced router's tokens" in workload.summary()
    own = dataclasses.replace(mixture, expert_capacity=1.25)
    workload = dataclasses.replace(WORKLOAD, policy=own)
    assert workload.executed(own).expert_capacity == 1.25
    assert "take 1.25 times" in workload.summary()
    assert WORKLOAD.executed(TINY).expert_capacity is None
    assert "experts" not in WORKLOAD.summary()
