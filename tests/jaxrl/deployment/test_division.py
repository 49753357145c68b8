"""The pace of a divided run against closed forms, and its search against enumeration."""

import dataclasses
import itertools

import jax
import pytest

from jaxrl import recipes
from jaxrl.deployment import (
    NothingFits,
    Planner,
    Workload,
    actor_programs,
    cuts,
    divide,
    dry_run,
    learner_programs,
)
from jaxrl.deployment.division import Division, bits_per_change
from jaxrl.models import DecoderConfig
from sharding import Cluster

SMALL = DecoderConfig(
    vocab_size=1024, layers=8, embed=512, heads=8, kv_heads=4, head_dim=64, mlp=2048,
    tie_embeddings=False,
)  # fmt: skip
WORKLOAD = Workload(
    recipe=recipes.get("repo_tb"), policy=SMALL, reward_model=SMALL, prompts_per_step=16,
    prompt_len=64, completion_len=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(WORKLOAD)


def division(**changes) -> Division:
    fields = {
        "learner": Cluster.from_name("h100:1x8"), "actor": Cluster.from_name("h100:1x2"),
        "actors": 4, "prompts": 8, "codec": "sparse", "update_s": 1.0, "batch_s": 3.9,
        "transfer_s": 0.5, "pause_s": 0.1, "prompts_per_step": 16, "trained_tokens": 1600,
        "parts": (),
    }  # fmt: skip
    return Division(**(fields | changes))


def test_the_slowest_of_three_sets_the_pace():
    # 4 actors × 8 prompts in 3.9 + .1 s: 8 prompts/s, so that 16 take 2 s.
    assert division().generation_s == pytest.approx(2.0)
    assert (division().step_s, division().limit) == (pytest.approx(2.0), "generation")
    assert division(update_s=5.0).limit == "update"
    assert division(transfer_s=7.0).limit == "transfer"
    assert division().tokens_per_s == pytest.approx(800.0)


def test_a_rollout_is_as_old_as_steps_pass_while_it_is_written():
    # (3.9 + .5) s of writing and of the weights' way, at 2 s a step: 2.2 versions.
    assert division().staleness == 3
    assert division(actors=1, prompts=2, batch_s=0.9, pause_s=0.1, update_s=9.0).staleness == 1


@pytest.mark.parametrize("density", [1e-4, 1e-3, 0.0062, 0.02, 0.3, 1.0])
def test_bits_lie_between_their_neighbours(density):
    assert 5.6 <= bits_per_change(density) <= 16.0


def test_programs_have_the_shapes_of_the_run():
    (update,) = learner_programs(WORKLOAD)
    state, rollouts = update.args
    assert set(state.params) == {"policy"}
    assert rollouts.tokens.shape == (16, 8, 128)
    new_state, metrics = jax.eval_shape(update.step, *update.args)
    assert jax.tree.map(lambda x: x.shape, new_state) == jax.tree.map(lambda x: x.shape, state)
    assert "loss" in metrics
    programs = {p.name: p for p in actor_programs(WORKLOAD, 4)}
    assert set(programs) == {"prefill", "decode", "reference", "reward"}
    logits, cache = jax.eval_shape(programs["decode"].step, *programs["decode"].args)
    assert logits.shape == (4, 8, 1024)
    assert jax.tree.map(lambda x: x.shape, cache) == jax.tree.map(
        lambda x: x.shape, programs["decode"].args[1]
    )
    assert programs["decode"].calls == 128
    assert jax.eval_shape(programs["reference"].step, *programs["reference"].args).shape == (
        4, 8, 128,
    )  # fmt: skip
    assert jax.eval_shape(programs["reward"].step, *programs["reward"].args).shape == (32, 1)


def test_a_critic_is_part_of_the_update():
    workload = dataclasses.replace(WORKLOAD, recipe=recipes.get("repo"))
    (update,) = learner_programs(workload)
    assert set(update.args[0].params) == {"policy", "critic"}


def test_decoding_drawn_out_is_decoding_planned_whole(planner):
    machine = Cluster.from_name("h100:1x2")
    drawn = next(p for p in planner.actor(machine, 8) if p.program.name == "decode")
    shallow = dataclasses.replace(SMALL, layers=4)  # few enough to be planned as it is
    whole = Planner(dataclasses.replace(WORKLOAD, policy=shallow)).actor(machine, 8)
    whole = next(p for p in whole if p.program.name == "decode")
    assert whole.step_s < drawn.step_s < 2.2 * whole.step_s
    assert whole.memory_bytes < drawn.memory_bytes < 2 * whole.memory_bytes


def test_the_best_is_the_best_of_all(planner):
    cluster = Cluster.from_name("h100:4x8")
    best, others = divide(WORKLOAD, cluster, planner=planner)
    every = list(itertools.chain(*(planner.divisions(cut) for cut in cuts(cluster))))
    allowed = [d for d in every if d.staleness <= 8]
    assert best.tokens_per_s == pytest.approx(max(d.tokens_per_s for d in allowed), rel=1e-6)
    assert len(others) + 1 == len(allowed)
    assert {d.codec for d in every} == {"sparse", "dense"}


def test_less_staleness_is_never_faster(planner):
    cluster = Cluster.from_name("h100:4x8")
    paces = []
    for bound in (2, 3, 8):
        best, _ = divide(WORKLOAD, cluster, planner=planner, max_staleness=bound)
        assert best.staleness <= bound
        paces.append(best.tokens_per_s)
    assert paces == sorted(paces)


def test_other_chips_for_the_actors(planner):
    best, _ = divide(
        WORKLOAD, Cluster.from_name("h100:1x8"), Cluster.from_name("v5e:4x4"), planner=planner
    )
    assert best.learner.name == "h100:1x8"
    assert best.actor.chip.name == "v5e"


def test_nothing_fits_says_by_how_much():
    large = dataclasses.replace(
        WORKLOAD, policy=dataclasses.replace(SMALL, embed=32768, mlp=131072)
    )
    with pytest.raises(NothingFits, match="GB"):
        divide(large, Cluster.from_name("h100:2x2"))


def test_a_dry_run_without_compilers(planner):
    run = dry_run(WORKLOAD, Cluster.from_name("h100:2x8"), compiles=False)
    names = [row.part.program.name for row in run.rows]
    assert names == ["update", "prefill", "decode", "reference", "reward", "delta encode"]
    assert run.fits
    assert not run.compiled
    assert run.half is not None
    assert run.best.tokens_per_s >= run.half.tokens_per_s
