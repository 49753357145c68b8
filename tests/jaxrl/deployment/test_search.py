"""The joint choice against enumeration, programs against their shapes."""

import dataclasses
import itertools
import math
import sys

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

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
    parts,
)
from jaxrl.deployment.machines import actor_sizes
from jaxrl.deployment.parts import Part
from jaxrl.deployment.search import actor_bytes, resident_bytes
from jaxrl.models import DecoderConfig
from jaxrl.models.named import named
from jaxrl.sync import Link
from sharding import Cluster, DoesNotFit, Plan

SMALL = DecoderConfig(
    vocab_size=1024, layers=8, embed=512, heads=8, kv_heads=4, head_dim=64, mlp=2048,
    tie_embeddings=False,
)  # fmt: skip
WORKLOAD = Workload(
    recipe=recipes.get("repo_tb"), policy=SMALL, reward_model=SMALL, prompts_per_step=16,
    prompt_len=64, completion_len=128,
)  # fmt: skip
CLUSTER = Cluster.from_name("h100:4x2")


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(WORKLOAD)


def sharing(planner: Planner, **options) -> Planner:
    """A planner that has the plans of another; they know of neither links nor batches."""
    new = Planner(planner.workload, **options)
    new._learners, new._actors = planner._learners, planner._actors
    return new


def test_programs_have_the_shapes_of_the_run():
    (update,) = learner_programs(WORKLOAD)
    state, rollouts = update.args
    assert set(state.params) == {"policy"}
    assert rollouts.tokens.shape == (16, 8, 128)
    new_state, metrics = jax.eval_shape(update.step, *update.args)
    assert jax.tree.map(lambda x: x.shape, new_state) == jax.tree.map(lambda x: x.shape, state)
    assert "loss" in metrics
    programs = {p.name: p for p in actor_programs(WORKLOAD, 32)}
    assert set(programs) == {"prefill", "decode", "reference", "reward"}
    logits, cache = jax.eval_shape(programs["decode"].step, *programs["decode"].args)
    assert logits.shape == (32, 8, 1024)
    (donated,) = programs["decode"].donate
    before = programs["decode"].args[donated]
    assert jax.tree.map(lambda x: x.shape, cache) == jax.tree.map(lambda x: x.shape, before)
    assert programs["decode"].calls == 128
    # Whole completions are read for 16 prompts at a time.
    assert {programs[name].calls for name in ("reference", "reward")} == {2}
    assert jax.eval_shape(programs["reference"].step, *programs["reference"].args).shape == (
        16, 8, 128,
    )  # fmt: skip
    assert jax.eval_shape(programs["reward"].step, *programs["reward"].args).shape == (128, 1)


def test_decoding_reads_what_the_prefill_leaves():
    prefill, decode = actor_programs(WORKLOAD, 4)[:2]
    _, cache, layers = jax.eval_shape(prefill.step, *prefill.args)
    assert jax.tree.map(lambda x: x.shape, layers) == jax.tree.map(
        lambda x: x.shape, decode.args[1]
    )
    assert jax.tree.structure(cache) == jax.tree.structure(decode.args[2])


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


def test_a_machine_over_which_nothing_divides_is_no_lack_of_memory():
    """Three eighths of a pod: heads would be divided 24 ways, and keys have 8."""
    workload = dataclasses.replace(WORKLOAD, policy=named("llama3-8b"), reward_model=None)
    with pytest.raises(ValueError, match="nothing divides decoding of 16 prompts") as got:
        Planner(workload).actor(Cluster.from_name("v5p:4x4x3"), 16)
    assert not isinstance(got.value, DoesNotFit)


def test_every_cut_is_announced_and_no_plan_is_made_twice(monkeypatch):
    """Models that score fit beside the policy only as shards, so that actors are planned twice."""
    made = []

    def listed(program, cluster, *, pinned=None, memory):
        made.append((program.step, cluster.name, tuple(sorted((pinned or {}).items())), memory))
        whole = program.parameters in ("reference", "reward") and not pinned
        return Part(
            program=program, plan=Plan(mesh={"data": cluster.device_count}), step_s=1.0,
            memory_bytes=75e9 if whole else 2e9, resident_bytes=1e9,
        )  # fmt: skip

    monkeypatch.setattr(parts, "planned", listed)
    planner, heard = Planner(WORKLOAD), []
    divide(WORKLOAD, CLUSTER, planner=planner, told=heard.append)
    assert [line.split(":")[0] for line in heard] == [f"division {i} of 3" for i in (1, 2, 3)]
    assert all(cut.learner.name in line for cut, line in zip(cuts(CLUSTER), heard, strict=True))
    assert len(made) == len(set(made)) == len(planner._plans) > 10
    made.clear()
    monkeypatch.setattr(parts.Plans, "planned", lambda self, *args, **kw: listed(*args, **kw))
    divide(WORKLOAD, CLUSTER, planner=Planner(WORKLOAD))
    assert len(made) > len(set(made))  # as would be planned if nothing were kept


def test_the_best_is_the_best_of_all_that_can_be_written_down(planner):
    """Every cut, actor, batch, codec and bound again, costed here from the parts' own times."""
    best, others = divide(WORKLOAD, CLUSTER, planner=planner)
    weights, paces = 2.0 * SMALL.num_params, {}
    for cut in cuts(CLUSTER):
        try:
            update = planner.learner(cut.learner, 16).step_s
        except ValueError:
            continue
        for actor, count in actor_sizes(cut.actors):
            for power, bound in itertools.product(range(10), range(1, 9)):
                prompts = 2**power
                if count * prompts > 4 * 16 or (actor.name, prompts) not in planner._actors:
                    continue
                try:
                    parts = planner.actor(actor, prompts)
                except ValueError:
                    continue
                batch = sum(p.step_s * p.program.calls for p in parts)
                pause = 2.13 * weights / (actor.chip.hbm_bytes_per_s * actor.chip_count)
                pace = max(update, 16 * (batch + pause) / (count * prompts))
                fetch = weights / min(
                    actor.chip.host_bytes_per_s, actor.chip.host_bytes_per_s * actor.chip_count / 8
                )
                store = weights / actor.chip.host_bytes_per_s
                age = store + fetch + max(0, store - pace, fetch - pace) + batch
                step = max(pace, age / bound)
                paces[cut.learner.name, actor.name, prompts, bound] = 16 * 8 * 128 / step
    assert len(paces) > 100
    found = [best, *others]
    assert max(d.tokens_per_s for d in found) == pytest.approx(max(paces.values()), rel=1e-6)
    dense = {
        (d.learner.name, d.actor.name, d.prompts, d.max_staleness): d.tokens_per_s
        for d in found
        if d.codec == "dense"
    }
    assert len(dense) > 50
    assert {key: paces[key] for key in dense} == pytest.approx(dense)
    assert {d.codec for d in found} == {"sparse", "dense"}
    assert best.tokens_per_s * 1.01 >= max(paces.values())


def test_less_staleness_is_never_faster(planner):
    paces = []
    for bound in (1, 2, 3, 8):
        best, others = divide(WORKLOAD, CLUSTER, planner=planner, max_staleness=bound)
        assert all(d.staleness <= bound for d in (best, *others))
        paces.append(max(d.tokens_per_s for d in (best, *others)))
    assert paces == sorted(paces)
    assert paces[0] < paces[-1]


def test_a_slow_link_makes_the_weights_sparse_and_few_actors(planner):
    slow = sharing(planner, link=Link(bits_per_s=1e8, latency_s=0.1))
    over_it, others = divide(WORKLOAD, CLUSTER, planner=slow)
    nearby, _ = divide(WORKLOAD, CLUSTER, planner=planner)
    assert over_it.codec == "sparse"
    assert over_it.tokens_per_s <= nearby.tokens_per_s
    alike = [
        d for d in others
        if (d.learner, d.actor, d.prompts) == (over_it.learner, over_it.actor, over_it.prompts)
        and d.codec == "dense"
    ]  # fmt: skip
    assert max(d.tokens_per_s for d in alike) < over_it.tokens_per_s


def test_a_batch_that_three_nodes_can_divide_is_taken_where_it_pays(planner):
    both = sharing(planner, batches=(16, 24))
    _, others = divide(WORKLOAD, CLUSTER, planner=both)
    three = {d.prompts_per_step for d in others if d.learner.name == "h100:3x2"}
    assert 24 in three
    assert {d.prompts_per_step for d in others if d.learner.name == "h100:2x2"} == {16, 24}


def test_other_chips_for_the_actors(planner):
    best, _ = divide(
        WORKLOAD, Cluster.from_name("h100:1x8"), Cluster.from_name("v5e:2x4"), planner=planner
    )
    assert best.learner.name == "h100:1x8"
    assert best.actor.chip.name == "v5e"


def test_what_lives_on_an_actor_is_counted(planner):
    parts = planner.actor(Cluster.from_name("h100:1x2"), 8)
    held = resident_bytes(parts)
    assert set(held) == {"policy", "next policy", "reference", "reward"}
    assert held["next policy"] == held["policy"]
    assert min(held.values()) >= 2 * SMALL.num_params / 2  # bf16 on two devices
    decode = next(p for p in parts if p.program.name == "decode")
    assert actor_bytes(parts) >= decode.memory_bytes + sum(held.values())


def test_nothing_fits_says_by_how_much():
    large = dataclasses.replace(
        WORKLOAD, policy=dataclasses.replace(SMALL, embed=32768, mlp=131072)
    )
    with pytest.raises(NothingFits, match="GB a device") as caught:
        divide(large, Cluster.from_name("h100:2x2"))
    state = 12 * large.policy.num_params / 2  # float32 weights and two moments on two devices
    lacks = caught.value.shortfall_bytes
    assert lacks is not None
    assert lacks > 0.9 * state - 85e9
    with pytest.raises(DoesNotFit, match="no plan of update"):
        Planner(large).learner(Cluster.from_name("h100:1x2"), 16)


def test_a_dry_run_without_compilers(planner, monkeypatch):
    module = sys.modules["jaxrl.deployment.dry_run"]
    monkeypatch.setattr(module, "Planner", lambda *_, **options: sharing(planner, **options))
    run = dry_run(WORKLOAD, CLUSTER)
    names = [row.part.program.name for row in run.rows]
    assert names[:6] == ["update", "prefill", "decode", "reference", "reward", "delta encode"]
    assert len(names) > 6
    assert all(name.startswith("delta apply ") for name in names[6:])
    assert run.fits
    assert not run.compiled
    assert run.half is not None
    assert run.best.tokens_per_s * 1.01 >= run.half.tokens_per_s
    assert list(run.by_staleness.values()) == sorted(run.by_staleness.values())
    decode = next(row for row in run.rows if row.part.program.name == "decode")
    shards = math.prod(decode.part.plan.mesh.values())
    # Beside decoding: the policy twice, the reference and the reward model, in bf16.
    assert decode.others_bytes >= 4 * 2 * SMALL.num_params / shards
    # Compilers bring devices of their own, of another kind than a mesh without any has.
    encode = next(row.part.plan for row in run.rows if row.part.program.name == "delta encode")
    gpus = AbstractMesh(
        tuple(encode.mesh.values()), tuple(encode.mesh), (AxisType.Auto,) * len(encode.mesh),
        abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(gpus):
        jax.eval_shape(encode.step, *encode.args)
