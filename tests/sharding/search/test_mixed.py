"""Chips that differ: the search against trying everything, and what it makes of their speeds."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest

import sharding
from sharding import planner
from sharding.costs.cost import estimate
from sharding.costs.strategies import Strategies, Strategy
from sharding.machines.topology import Cluster, Node, catalog
from sharding.programs.transformer import transformer
from sharding.search.solver import evaluate, solve
from sharding.search.space import Constraints, candidates

SLOW, FAST = "t4", "v100"


def cluster_of(*chips, count=1, **changes):
    nodes = [Node(chip=catalog()[c], count=count, link_bytes_per_s=1e10, network_bytes_per_s=1e10)
             for c in chips]  # fmt: skip
    return Cluster.of_nodes(nodes, name=" ".join(chips), **changes)


def small(**changes):
    sizes = {"layers": 3, "d_model": 512, "heads": 8, "d_ff": 2048, "vocab": 1024, "seq_len": 512,
             "global_batch": 8}  # fmt: skip
    return transformer(**{**sizes, **changes})


def all_divisions(total, parts):
    for cut in itertools.combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cut, total)))


def brute_force(program, chips, constraints):
    """The least step time over strategies, shares and cuts, one by one.

    Costs come from clusters that are wholly of one chip, so that nothing of `mixed` is used.
    """
    whole = cluster_of(*chips)
    pure = {c: cluster_of(*[c] * len(chips)) for c in set(chips)}
    layers = [i for i, b in enumerate(program.blocks) for _ in range(b.repeat)]
    space, best = candidates(program, whole, constraints), np.inf
    for row in range(len(space)):
        s = space.row(row)
        cost = {c: estimate(program, Strategies.stack([s]), pure[c]) for c in pure}

        def layer(chip, load, cost=cost):
            blocks = cost[chip].blocks
            compute = [float((b.forward + b.backward + b.recompute)[0]) for b in blocks]
            total = [float(b.total[0]) for b in blocks]
            return [compute[i] * load + total[i] - compute[i] for i in layers]

        replicas, ways = s.data * s.fsdp * s.expert, s.tensor * s.context
        samples = 8 // (replicas * s.microbatches)
        outside = max(float(c.outside_s[0]) for c in cost.values())
        for shares in all_divisions(samples * replicas, replicas):
            per_stage = []
            for stage in range(s.stage):
                first = stage * replicas * ways
                groups = [chips[first + r * ways : first + (r + 1) * ways] for r in range(replicas)]
                per_stage.append(
                    np.max([layer(c, share / samples)
                            for g, share in zip(groups, shares, strict=True) for c in g], axis=0)
                )  # fmt: skip
            for inner in itertools.combinations(range(1, len(layers)), s.stage - 1):
                ends = (0, *inner, len(layers))
                t = [per_stage[i][a:b].sum() for i, (a, b) in enumerate(itertools.pairwise(ends))]
                best = min(best, (s.microbatches - 1) * max(t) + sum(t) + outside)
    return best


@pytest.mark.parametrize(
    "chips", [(FAST, SLOW), (FAST, FAST, SLOW, SLOW), (SLOW, FAST, FAST, FAST)]
)
def test_the_search_finds_what_trying_everything_finds(chips):
    program = small()
    constraints = Constraints(remat=("none",), offload=("none",), zero=(3,), memory_fraction=1e3)
    found = solve(program, cluster_of(*chips), constraints=constraints)
    assert found.gap == 0
    assert found.best[0].step_s == pytest.approx(brute_force(program, chips, constraints))
    assert sum(found.best[0].terms.values()) == pytest.approx(found.best[0].step_s)


def test_a_faster_chip_takes_more_of_the_batch():
    program, cluster = small(global_batch=24), cluster_of(FAST, SLOW)
    pinned = {"data": 2, "microbatches": 1, "zero": 3, "remat": "none"}
    free = solve(program, cluster, constraints=Constraints(pinned=pinned)).best[0]
    even = solve(
        program, cluster, constraints=Constraints(pinned=pinned, uneven_shares=False)
    ).best[0]
    fast, slow = free.strategy.shares
    assert fast > slow
    assert fast + slow == 24
    assert free.step_s < even.step_s
    # A V100 is nominally 1.9 times a T4: no share beats what both together can do.
    alone = evaluate(program, [Strategy(data=2)], cluster_of(FAST, FAST))[0].step_s
    assert free.step_s > alone


def test_a_faster_stage_takes_more_layers_and_a_smaller_memory_fewer():
    program = small(layers=12, global_batch=32)
    pinned = {"stage": 2, "microbatches": 32}
    front = solve(program, cluster_of(FAST, SLOW), constraints=Constraints(pinned=pinned)).best[0]
    back = solve(program, cluster_of(SLOW, FAST), constraints=Constraints(pinned=pinned)).best[0]
    assert front.strategy.cuts[0] > front.strategy.cuts[1]
    assert back.strategy.cuts[0] < back.strategy.cuts[1]
    # 14 layers of state in 0.1 GB and 16 GB: what fits goes to the large one, however slow.
    tight = catalog()[FAST].__class__(**{**vars(catalog()[FAST]), "memory_bytes": 1.6e8})
    nodes = [Node(chip=c, count=1, link_bytes_per_s=1e10, network_bytes_per_s=1e10)
             for c in (tight, catalog()[SLOW])]  # fmt: skip
    cluster = Cluster.of_nodes(nodes, name="tight first")
    held = solve(program, cluster, constraints=Constraints(pinned=pinned)).best[0]
    assert held.strategy.cuts[0] < front.strategy.cuts[0]


def test_what_no_stage_holds_is_an_error_that_says_how_much_is_missing():
    program = small()
    constraints = Constraints(pinned={"stage": 2, "microbatches": 8})

    def cluster(memory_bytes):
        chip = dataclasses.replace(catalog()[FAST], memory_bytes=memory_bytes)
        nodes = [Node(chip=c, count=1, link_bytes_per_s=1e10, network_bytes_per_s=1e10)
                 for c in (chip, catalog()[SLOW])]  # fmt: skip
        return Cluster.of_nodes(nodes, name="tight first")

    with pytest.raises(sharding.DoesNotFit, match="no plan of transformer fits tight first") as got:
        solve(program, cluster(1e7), constraints=constraints)
    assert got.value.limit_bytes == pytest.approx(0.94e7)
    # With what was missing it fits.
    solve(program, cluster(1.001 * got.value.needed_bytes / 0.94), constraints=constraints)


def test_cuts_and_shares_that_somebody_else_chose_are_costed():
    program, cluster = small(), cluster_of(FAST, SLOW)
    best = evaluate(program, [Strategy(stage=2, microbatches=8)], cluster)[0]
    other = evaluate(program, [Strategy(stage=2, microbatches=8, cuts=(1, 4))], cluster)[0]
    assert other.strategy.cuts == (1, 4)
    assert other.step_s > best.step_s
    with pytest.raises(ValueError, match="do not make the 5 layers"):
        evaluate(program, [Strategy(stage=2, microbatches=8, cuts=(1, 1))], cluster)
    with pytest.raises(ValueError, match="shares names the samples of 2 replicas"):
        Strategy(data=2, shares=(1, 2, 3))


def test_equal_chips_written_as_nodes_are_not_mixed():
    program = small()
    nodes = solve(program, cluster_of(FAST, FAST, FAST, FAST)).best[0]
    assert not nodes.strategy.cuts
    assert not cluster_of(FAST, FAST).is_mixed
    assert cluster_of(FAST, SLOW).is_mixed


def test_a_step_is_planned_for_mixed_chips(models):
    step = sharding.train_step(models.decoder_loss, optax.sgd(1.0))
    params = models.decoder_params(jax.random.key(0), layers=6)
    args = (params, step.optimizer.init(params), models.tokens(jax.random.key(0)))
    pins = Constraints(pinned={"stage": 2, "microbatches": 4})
    plan = sharding.plan(step, args, cluster=cluster_of(FAST, SLOW, count=4), constraints=pins)
    assert sum(plan.pipeline) == 6
    assert min(plan.pipeline) >= 1
    assert "uneven shares" in plan.explain()


def test_a_footprint_beyond_the_chips_of_a_mixed_cluster_is_not_passed_over(models, monkeypatch):
    step = sharding.train_step(models.decoder_loss, optax.sgd(1.0))
    params = models.decoder_params(jax.random.key(0), layers=6)
    args = (params, step.optimizer.init(params), models.tokens(jax.random.key(0)))
    pins = Constraints(pinned={"stage": 2, "microbatches": 4})
    cluster = cluster_of(FAST, "v100-32gb")
    measured = planner.with_footprint

    def plan(memory_bytes):
        def of_size(made, traced):
            made = measured(made, traced)
            prediction = dataclasses.replace(made.prediction, memory_bytes=memory_bytes)
            return dataclasses.replace(made, prediction=prediction)

        monkeypatch.setattr(planner, "with_footprint", of_size)
        return sharding.plan(step, args, cluster=cluster, constraints=pins)

    small, large = (catalog()[name].memory_bytes for name in (FAST, "v100-32gb"))
    assert "smallest chips" not in plan(0.5 * small).explain()
    assert "of the smallest chips" in plan((small + large) / 2).explain()
    with pytest.raises(sharding.DoesNotFit, match="no plan of decoder_loss fits"):
        plan(2 * large)
