"""The searches against brute force, and what they promise."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.costs.constants import shipped
from sharding.costs.cost import estimate
from sharding.costs.machine import machine
from sharding.costs.strategies import Strategies, Strategy
from sharding.machines.topology import AXES, Cluster
from sharding.machines.torus import device_grid
from sharding.programs.transformer import named_model, transformer
from sharding.search.brute_force import best_cuts, best_strategy
from sharding.search.pipeline import cut_layers
from sharding.search.solver import evaluate, lower_bound, solve
from sharding.search.space import Constraints, candidates, divides

SMALL = {"layers": 2, "d_model": 512, "heads": 8, "kv_heads": 4, "d_ff": 2048, "vocab": 1024}


def small(**changes):
    return transformer(**{**SMALL, "seq_len": 512, "global_batch": 8, **changes})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("v5e:2x2", {}),
        ("h100:1x4", {"gated": False}),
        ("h100:2x2", {"experts": 4, "experts_per_token": 2, "moe_d_ff": 256}),
        ("v5p:2x2x1", {"training": False}),
    ],
)
def test_the_search_finds_what_trying_everything_finds(name, changes):
    program, cluster = small(**changes), Cluster.from_name(name)
    constraints = Constraints(remat=("none", "full"), offload=("none",), zero=(3,))
    found = solve(program, cluster, constraints=constraints, tie_tolerance=0.0)
    reference = best_strategy(program, cluster, constraints=constraints, tie_tolerance=0.0)
    assert found.gap == 0
    assert np.isclose(found.best[0].step_s, reference.step_s, rtol=1e-12)
    assert [c.step_s for c in found.best] == sorted(c.step_s for c in found.best)


def test_memory_decides_where_it_is_short():
    # 1.4 GB of activations a sequence: what fits is what recomputes.
    program = small(layers=64, seq_len=8192, d_model=2048, global_batch=64, d_ff=8192, kv_heads=8)
    cluster = Cluster.from_name("v5e:4x4")
    constraints = Constraints(offload=("none",))
    found = solve(program, cluster, constraints=constraints).best[0]
    assert found.memory_bytes <= cluster.memory_bytes * constraints.memory_fraction
    roomy = solve(program, cluster, constraints=Constraints(memory_fraction=1e3)).best[0]
    assert roomy.step_s < found.step_s
    assert roomy.memory_bytes > cluster.memory_bytes


def test_no_plan_names_the_overshoot():
    program = transformer(named_model("llama3-70b", global_batch=4))
    with pytest.raises(ValueError, match=r"no plan of llama3-70b fits v5e:2x2.*times the devices"):
        solve(program, Cluster.from_name("v5e:2x2"))


def test_nothing_divides_names_the_batch():
    with pytest.raises(ValueError, match="no division of transformer over 8 devices"):
        solve(
            small(global_batch=3),
            Cluster.from_name("h100:1x8"),
            constraints=Constraints(forbidden=("tensor", "context", "stage")),
        )


def test_pins_hold():
    pins = {"tensor": 2, "remat": "full", "microbatches": 2}
    found = solve(small(), Cluster.from_name("h100:1x8"), constraints=Constraints(pinned=pins))
    for candidate in found.best:
        assert (candidate.strategy.tensor, candidate.strategy.remat) == (2, "full")
        assert candidate.strategy.microbatches == 2
    with pytest.raises(ValueError, match=r"constraints name \['tesnor'\]"):
        Constraints(pinned={"tesnor": 2})


def test_a_budget_leaves_a_gap_that_holds():
    program, cluster = transformer(named_model("llama3-8b", global_batch=64)), None
    cluster = Cluster.from_name("v5e:8x8")
    whole = solve(program, cluster, tie_tolerance=0.0)
    part = solve(program, cluster, budget=50, tie_tolerance=0.0)
    assert whole.gap == 0
    assert part.costed <= 50 < whole.costed
    assert part.bound_s <= whole.best[0].step_s <= part.best[0].step_s


@pytest.mark.parametrize("name", ["v5e:4x4", "h100:2x8"])
def test_the_bound_bounds(name):
    cluster = Cluster.from_name(name)
    program = small(layers=8, experts=4, experts_per_token=2)
    space = candidates(program, cluster, Constraints())
    constants = shipped().constants(cluster.chip.name)
    bound = lower_bound(program, space, cluster, constants)
    costed = estimate(program, space, machine(cluster, space, constants)).step_s
    assert np.all(bound <= costed * (1 + 1e-9))


def test_the_same_answer_every_time():
    program, cluster = small(), Cluster.from_name("v5e:4x4")
    first, second = solve(program, cluster), solve(program, cluster)
    assert first.best == second.best


def test_degrees_that_leave_padding_are_left_out():
    assert divides([32, 8], 16)  # eight heads of keys: each on two devices
    assert not divides([40], 16)
    assert divides([50257], 8)
    assert not divides([], 2)


def test_given_strategies_must_take_the_cluster():
    with pytest.raises(ValueError, match="takes 2 devices, h100:1x4 has 4; change a degree"):
        evaluate(small(), [Strategy(data=2)], Cluster.from_name("h100:1x4"))


def test_more_bandwidth_is_never_slower():
    program = small()
    space = Strategies.stack(
        [Strategy(fsdp=4, tensor=2), Strategy(data=8, zero=0), Strategy(stage=4, fsdp=2)]
    )
    cluster = Cluster.from_name("h100:2x4")
    machine_ = machine(cluster, space, shipped().constants("h100"))
    slow = estimate(program, space, machine_).step_s
    faster = type(machine_)(**{**vars(machine_), "bandwidth": 2 * machine_.bandwidth})
    assert np.all(estimate(program, space, faster).step_s <= slow)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 9), min_size=4, max_size=7),
    st.integers(1, 6),
    st.lists(st.integers(1, 3), min_size=4, max_size=4),
    st.lists(st.integers(0, 5), min_size=8, max_size=8),
)
def test_cuts_agree_with_all_cuts(stages, layers, microbatches, slowness, handover):
    times = np.outer(np.asarray(slowness[:stages], float), np.asarray(layers, float))
    between = [float(h) for h in handover[: len(layers) + 1]]
    found = cut_layers(times, microbatches=microbatches, handover_s=between)
    expected, _ = best_cuts(times, microbatches=microbatches, handover_s=between)
    assert np.isclose(found.step_s, expected)
    assert sum(found.sizes) == len(layers)


def test_cuts_keep_to_the_memory_of_each_stage():
    times = np.ones((2, 6))
    free = cut_layers(times, microbatches=4)
    assert free.sizes == (3, 3)
    # The first stage holds two micro-batches in flight: 2·2 + 1 bytes a layer of 10.
    held = cut_layers(times, microbatches=4, state_bytes=np.ones(6), kept_bytes=2 * np.ones(6),
                      limit_bytes=[10.0, 100.0])  # fmt: skip
    assert held.sizes == (2, 4)
    with pytest.raises(ValueError, match="no cuts of 6 layers into 2 stages fit"):
        cut_layers(times, microbatches=4, state_bytes=np.ones(6), limit_bytes=[2.0, 2.0])
    with pytest.raises(ValueError, match="every stage needs a layer"):
        cut_layers(np.ones((3, 2)), microbatches=1)


def test_pins_that_leave_nothing_are_named_with_what_may_be_pinned():
    cluster = Cluster.from_name("h100:1x8")

    def search(**pins):
        return solve(small(global_batch=16), cluster, constraints=Constraints(pinned=pins))

    # Two sequences a device: four micro-batches cannot divide them.
    with pytest.raises(
        ValueError,
        match=r"'fsdp': 4.*leave no strategy of transformer on h100:1x8: microbatches 4 is pinned "
        r"and may be 1, 2\. Global batch 16 leaves 2 sequences.*larger global batch",
    ):
        search(fsdp=4, data=2, microbatches=4)
    assert search(fsdp=4, data=2, microbatches=2).best[0].strategy.microbatches == 2
    with pytest.raises(ValueError, match="offload 'activations' needs another remat than 'full'"):
        search(offload="activations", remat="full")


def test_of_equally_fast_strategies_the_smallest_is_taken():
    program = small(layers=24, d_model=2048, d_ff=8192, vocab=32768, global_batch=16, seq_len=4096)
    cluster = Cluster.from_name("h100:1x4")
    constraints = Constraints(remat=("none", "full"), offload=("none",),
                              forbidden=("context", "stage"))  # fmt: skip
    fastest = solve(program, cluster, constraints=constraints, tie_tolerance=0.0).best[0]
    for tolerance in (0.05, 0.3):
        found = solve(program, cluster, constraints=constraints, tie_tolerance=tolerance)
        reference = best_strategy(program, cluster, constraints=constraints,
                                  tie_tolerance=tolerance)  # fmt: skip
        chosen = found.best[0]
        assert chosen.strategy == reference.strategy
        assert chosen.step_s <= fastest.step_s * (1 + tolerance)
        assert chosen.memory_bytes < fastest.memory_bytes - 0.1 * cluster.memory_bytes
        assert found.tied > 1
        # The gap is that of the time, whatever decided.
        assert np.isclose(found.gap, 1 - fastest.step_s / chosen.step_s, rtol=1e-9)


def test_a_tolerance_of_ties_is_a_share():
    with pytest.raises(ValueError, match="tolerance of ties is a share of the time"):
        solve(small(), Cluster.from_name("h100:1x4"), tie_tolerance=-0.1)


@pytest.mark.parametrize("name", ["v5p:4x4x4", "v5e:4x8", "h100:4x8"])
def test_tensor_groups_stay_on_one_host_where_that_is_asked_for(name):
    cluster = Cluster.from_name(name)
    program = small(heads=32, d_model=4096, d_ff=16384, global_batch=64)
    space = candidates(program, cluster, Constraints(tensor_across_hosts=False))
    assert space.tensor.max() == cluster.host_size
    assert set(space.first.tolist()) == ({"host"} if cluster.is_torus else {"tensor"})
    if not cluster.is_torus:
        return
    # Every block of a host's chips holds whole groups.
    axes = ("fsdp", "tensor")
    fsdp = cluster.device_count // cluster.host_size
    degrees = [{"fsdp": fsdp, "tensor": cluster.host_size}.get(axis, 1) for axis in AXES]
    placed = cluster.placement(degrees, "host")
    coordinates = list(np.ndindex(*cluster.shape))
    devices = [SimpleNamespace(coords=c, slice_index=0, core_on_chip=0) for c in coordinates]
    grid = device_grid(devices, dict(zip(axes, (fsdp, cluster.host_size), strict=True)), placed)
    for group in grid:
        hosts = {tuple(x // b for x, b in zip(d.coords, cluster.host_bounds, strict=True))
                 for d in group}  # fmt: skip
        assert len(hosts) == 1


def test_recomputation_at_most_so_much():
    program, cluster = small(), Cluster.from_name("h100:1x8")
    space = candidates(program, cluster, Constraints(remat_at_most="dots"))
    assert set(space.remat.tolist()) == {"none", "dots"}
    with pytest.raises(ValueError, match="remat 'full' is pinned and recomputes more than at most"):
        Constraints(pinned={"remat": "full"}, remat_at_most="dots")
    with pytest.raises(ValueError, match="at most 'some'"):
        Constraints(remat_at_most="some")


def test_inference_may_divide_experts_and_keep_the_rest_whole():
    program = small(
        experts=8, experts_per_token=2, moe_d_ff=4096, vocab=65536, training=False
    )  # fmt: skip
    cluster = Cluster.from_name("h100:1x8")
    found = solve(program, cluster, tie_tolerance=0.0).best[0]
    references = {
        zero: best_strategy(
            program, cluster, constraints=Constraints(pinned={"zero": zero}), tie_tolerance=0.0
        )
        for zero in range(4)
    }
    assert (found.strategy.expert, found.strategy.zero) == (8, 0)
    assert np.isclose(found.step_s, min(r.step_s for r in references.values()), rtol=1e-12)
    assert references[0].strategy.mesh == found.strategy.mesh
    # Gathered for every call, the rest costs more than any other division does.
    assert references[3].step_s > found.step_s
    assert references[3].strategy.mesh != found.strategy.mesh
