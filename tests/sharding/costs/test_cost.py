"""Time and memory of described programs, against hand arithmetic and what must hold."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.costs import collectives
from sharding.costs.constants import Constants, shifted, shipped
from sharding.costs.cost import estimate
from sharding.costs.local import View
from sharding.costs.machine import machine
from sharding.costs.memory import kept_bytes, memory
from sharding.costs.roofline import op_time
from sharding.costs.strategies import Strategies, Strategy
from sharding.machines.topology import Cluster
from sharding.programs.transformer import find_model, models, named_model, transformer
from sharding.tracing.trace import trace

TINY = {"layers": 4, "d_model": 1024, "heads": 8, "d_ff": 4096, "vocab": 8192, "gated": False}
PERFECT = Constants(
    matmul=1.0, fill=0.0, skew=0.0, grouped=1.0,
    attention=1.0, hbm=1.0, scatter=1.0, link=1.0, network=1.0,
    kernel_s=0.0, launch_s=0.0, link_s=0.0, network_s=0.0, overlap_fsdp=0.0, overlap_data=0.0,
    overlap_tensor=0.0, dead=0.0, step_s=0.0, microbatch_s=0.0, jitter=0.0,
)  # fmt: skip


def tiny(**changes):
    return transformer(**{**TINY, "seq_len": 1024, "global_batch": 8, **changes})


def cost(program, *strategies, cluster="h100:1x8", constants=PERFECT):
    table = Strategies.stack(strategies)
    where = Cluster.from_name(cluster)
    return estimate(program, table, machine(where, table, constants))


def test_terms_sum_to_the_step():
    some = [
        Strategy(fsdp=8),
        Strategy(fsdp=2, tensor=4),
        Strategy(stage=4, fsdp=2, microbatches=4),
        Strategy(context=4, data=2, remat="full"),
        Strategy(fsdp=8, offload="activations"),
    ]
    result = cost(tiny(), *some, constants=shipped().constants("h100"))  # fmt: skip
    np.testing.assert_allclose(sum(result.terms.values()), result.step_s)
    assert all(np.all(np.asarray(v) >= -1e-12) for v in result.terms.values())


def test_a_perfect_machine_is_bound_by_its_peak_alone():
    program = tiny()
    one = cost(program, Strategy(fsdp=8))
    ideal = 3 * program.forward_flops / (8 * 989e12)
    busy = one.terms["forward"] + one.terms["backward"]
    # Passes over memory and whole blocks of attention are above it.
    assert ideal < busy[0] < 3 * ideal


def test_filling_a_tile_costs_as_much_as_more_to_sum():
    # A product over 1,024 with a fill of 512 takes half as long again; one over 4,096 an eighth.
    program = tiny(flash=True, global_batch=64)
    filled = replace(PERFECT, fill=512.0)
    table = Strategies.stack([Strategy(fsdp=8)])
    where = Cluster.from_name("h100:1x8")
    ratios = {}
    for op in program.blocks[1].ops:
        if op.name in ("mlp_up", "mlp_down"):
            view = View(program, table, None)
            times = [op_time(view, op, machine(where, table, c))[0] for c in (PERFECT, filled)]
            ratios[op.name] = times[1] / times[0]
    # Both are bound by the matrix unit but for a little of the roofline's bend.
    assert ratios["mlp_up"] == pytest.approx(1.5, rel=0.02)
    assert ratios["mlp_down"] == pytest.approx(1.125, rel=0.02)


def test_heads_of_an_odd_vocabulary_run_slower():
    constants = replace(PERFECT, unaligned=0.25)
    odd, even = (
        cost(tiny(vocab=v, global_batch=64), Strategy(fsdp=8), constants=constants).blocks[-1]
        for v in (50257, 50264)
    )
    assert 3 < odd.forward[0] / even.forward[0] < 4
    whole = cost(tiny(vocab=50257, global_batch=64), Strategy(fsdp=8)).blocks[-1]
    assert whole.forward[0] == pytest.approx(even.forward[0], rel=0.01)


def test_collectives_wait_and_hosts_keep_each_other_waiting():
    program = tiny()
    divided, whole = Strategy(tensor=8), Strategy(fsdp=8)
    wait = replace(PERFECT, sync_s=1e-3)
    # Two reductions forward and two backward, and as many launches that the host makes. Waiting
    # and moving pass together.
    waits, moves = (
        cost(program, divided, constants=c).blocks[1].layer_comm[0] for c in (wait, PERFECT)
    )
    assert waits == pytest.approx((moves**2 + 4e-3**2) ** 0.5)
    assert 4e-3 < waits < 4e-3 + moves
    # Far beyond what the device takes, a layer takes what the host does, 0.1 more a doubling.
    slow = replace(PERFECT, launch_s=1.0)
    skewed = replace(slow, skew=0.1)
    layer = [cost(program, divided, constants=c).blocks[1].total[0] for c in (slow, skewed)]
    assert layer[1] / layer[0] == pytest.approx(1.3, rel=1e-6)
    alone = [cost(program, whole, constants=c).blocks[1].total[0] for c in (slow, skewed)]
    assert alone[0] == alone[1]
    assert layer[0] - alone[0] == pytest.approx(4 * 2.0, rel=1e-6)


def test_recomputation_repeats_forward_but_the_last_product():
    none, full = (cost(tiny(), Strategy(fsdp=8, remat=r)) for r in ("none", "full"))
    layers = [t for t, b in zip(full.blocks, tiny().blocks, strict=True) if b.checkpointed]
    assert none.terms["recompute"] == 0
    assert 0.6 < layers[0].recompute[0] / layers[0].forward[0] < 0.9


def test_tensor_parallelism_reduces_four_times_a_layer():
    program = tiny()
    result = cost(program, Strategy(tensor=8))
    layer = result.blocks[1].layer_comm[0]
    # Megatron: two all-reduces forward and two backward of b·s·h in bfloat16.
    size = 8 * 1024 * 1024 * 2
    assert layer == pytest.approx(4 * 2 * size * (7 / 8) / 450e9)


def test_fsdp_gathers_twice_and_scatters_once():
    result = cost(tiny(), Strategy(fsdp=8))
    params = 12 * 1024**2 + 2 * 1024
    expected = (2 * 2 * params + 4 * params) * (7 / 8) / 450e9
    assert result.blocks[1].fsdp_comm[0] == pytest.approx(expected)


def test_context_parallelism_gathers_keys_and_values():
    result = cost(tiny(), Strategy(context=8))
    # Keys and values, forward, and twice backward (again, and the sums of their cotangents).
    size = 2 * 8 * 1024 * 1024 * 2
    assert result.blocks[1].layer_comm[0] == pytest.approx(3 * size * (7 / 8) / 450e9)


def test_experts_exchange_their_rows():
    program = tiny(experts=8, experts_per_token=2, moe_d_ff=512)
    result = cost(program, Strategy(expert=8))
    # Two rows a token to and fro, forward and backward.
    size = 1 * 1024 * 2 * 1024 * 2
    assert result.blocks[1].layer_comm[0] == pytest.approx(4 * size * (7 / 8) / 450e9)


def test_what_lies_outside_experts_is_divided_over_their_axis():
    program = tiny(experts=8, experts_per_token=2, moe_d_ff=512)
    layouts = [Strategy(expert=8, zero=zero) for zero in (0, 1, 3)] + [Strategy(fsdp=8)]
    whole, state, everything, fsdp = range(4)
    held = cost(program, *layouts).memory
    for part, divided in (("parameters", everything), ("gradients", everything),
                          ("optimizer", state)):  # fmt: skip
        found = getattr(held, part)
        assert found[divided] == pytest.approx(found[fsdp])
        assert found[whole] > 1.5 * found[divided]
    # A scatter and two gathers in bfloat16 move what an all-reduce in float32 moves.
    terms = cost(program, *layouts).terms
    moved = sum(terms[name] for name in ("gradient_comm", "fsdp_comm", "parameter_comm"))
    assert moved[everything] == pytest.approx(moved[whole], rel=1e-3)
    assert moved[state] == pytest.approx(moved[whole], rel=1e-3)
    dense = 8 * held.optimizer[whole] / program.state_bytes - program.parameter_count
    dense /= 7  # the state of all, whole outside experts: (dense + routed / 8) parameters
    assert moved[whole] == pytest.approx(2 * 4 * dense * (7 / 8) / 450e9, rel=1e-3)


def test_gradients_are_reduced_over_what_did_not_divide_them():
    program = tiny()
    result = cost(program, Strategy(data=8, zero=0))
    size = 4 * program.parameter_count
    assert result.terms["gradient_comm"][0] == pytest.approx(2 * size * (7 / 8) / 450e9, rel=1e-3)


def test_what_does_not_happen_costs_exactly_nothing():
    # Rounding that is left over would be printed as a term of the step.
    llama = transformer(named_model("llama3-8b", global_batch=512, seq_len=4096))
    table = Strategies.stack(
        [
            Strategy(fsdp=128, microbatches=count, remat=remat)
            for count in (1, 2)
            for remat in ("none", "full")
        ]
    )
    where = Cluster.from_name("v5p:4x4x8")
    terms = estimate(llama, table, where).terms
    for name in ("bubble", "launch", "stage_comm", "layer_comm", "offload"):
        np.testing.assert_array_equal(terms[name], 0.0, err_msg=name)
    assert np.all(terms["forward"] > 0)


def test_the_bubble_of_a_pipeline():
    program = tiny(layers=8)
    result = cost(program, Strategy(stage=8, microbatches=8))
    total = (result.step_s - result.terms["stage_comm"] - result.terms["gradient_comm"]
             - result.terms["update"] - result.terms["accumulate"])[0]  # fmt: skip
    layer = result.blocks[1].total[0]
    head = result.blocks[2].total[0]
    # Eight micro-batches through a last stage of one layer and the head, and seven stages to fill.
    assert total == pytest.approx(8 * (layer + head) + 7 * layer, rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"overlap_fsdp": 0.9}, {"overlap_tensor": 0.9}, {"overlap_data": 0.9}],
)
def test_overlap_never_costs(changes):
    some = [Strategy(fsdp=8), Strategy(tensor=8), Strategy(data=8, zero=0)]
    hidden = cost(tiny(), *some, constants=replace(PERFECT, **changes)).step_s
    assert np.all(hidden <= cost(tiny(), *some).step_s * (1 + 1e-9))


def test_state_is_sixteen_bytes_a_parameter_divided_by_fsdp():
    program = tiny()
    result = cost(program, Strategy(data=8, zero=0), Strategy(fsdp=8), Strategy(fsdp=8, zero=1))
    state = result.memory.parameters + result.memory.gradients + result.memory.optimizer
    count = program.parameter_count
    np.testing.assert_allclose(state, [16 * count, 2 * count, 8 * count + count], rtol=1e-6)


def test_kept_activations_are_those_of_korthikanti():
    """34·s·b·h with dropout (arXiv:2205.05198, equation 1); 32 without, and attention's own."""
    program = tiny(flash=True)
    view = View(program, Strategies.stack([Strategy(data=8)]), None)
    layer = next(b for b in program.blocks if b.checkpointed)
    assert kept_bytes(view, layer)[0] == 32 * 1024 * 1 * 1024
    eager = tiny(flash=False)
    view = View(eager, Strategies.stack([Strategy(data=8)]), None)
    layer = next(b for b in eager.blocks if b.checkpointed)
    scores = 2 * 2 * 8 * 1024**2  # two matrices of scores in bfloat16
    assert kept_bytes(view, layer)[0] == 32 * 1024 * 1024 + scores


def test_full_rematerialisation_keeps_the_layers_inputs():
    program = tiny()
    table = Strategies.stack([Strategy(data=8, remat=r) for r in ("none", "dots", "full")])
    view = View(program, table, None)
    layer = next(b for b in program.blocks if b.checkpointed)
    kept = kept_bytes(view, layer)
    assert kept[0] > kept[1] > kept[2] == 2 * 1024 * 1024
    assert np.all(np.diff(memory(view, [b.repeat for b in program.blocks]).total) < 0)


def test_of_what_a_loop_makes_in_chunks_one_is_held():
    rows, width, vocab = 64, 8, 512

    def loss(head, x, parts):
        @jax.checkpoint
        def chunk(total, rows):
            return total + jax.nn.logsumexp(rows @ head, -1).sum(), None

        return jax.lax.scan(chunk, 0.0, x.reshape(parts, rows // parts, width))[0]

    def held(parts):
        args = (jnp.zeros((width, vocab)), jnp.zeros((rows, width)))
        program = trace(functools.partial(loss, parts=parts), args).program
        view = View(program, Strategies.stack([Strategy()]), None)
        return float(memory(view, [b.repeat for b in program.blocks]).transient[0])

    assert held(1) == 2 * 4 * rows * vocab  # float32, and the cotangents
    assert held(8) == held(1) / 8


def test_collectives_of_known_length():
    assert collectives.all_gather(8.0, 4, 2.0, 0.0) == 3.0
    assert collectives.all_reduce(8.0, 4, 2.0, 1.0) == 2 * (3.0 + 2.0)
    assert collectives.all_to_all(8.0, 4, 2.0, 0.0) == 3.0
    # A ring of 16: a message travels four links on average.
    ring = collectives.all_to_all(8.0, 16, 2.0, 0.0, torus=True)
    assert ring == pytest.approx(8 * 15 / 16 / 2 * 4)
    assert collectives.all_gather(8.0, 1, 2.0, 1.0) == 0.0


def test_published_models_have_their_published_parameters():
    expected = {"llama2-7b": 6.74, "llama3-8b": 8.03, "llama3.1-405b": 405.9, "mixtral-8x7b": 46.7,
                "deepseek-v3": 671.0, "qwen3-30b-a3b": 30.5, "gpt-oss-120b": 116.8,
                "gpt3-175b": 175.0, "gemma2-9b": 9.24}  # fmt: skip
    for name, billions in expected.items():
        count = transformer(named_model(name)).parameter_count
        assert math.isclose(count / 1e9, billions, rel_tol=5e-3), name
    assert find_model("LLAMA3.1-8B") == find_model("llama-3-8b")
    assert all(entry["source"] for entry in models().values())
    with pytest.raises(ValueError, match="no model is called 'llama9'"):
        named_model("llama9")


def test_flops_are_six_a_parameter_and_token():
    config = named_model("llama2-7b", seq_len=2, global_batch=1)
    program = transformer(config)
    outside = config.vocab * config.d_model  # the embedding multiplies nothing
    assert math.isclose(
        program.forward_flops, 2 * 2 * (program.parameter_count - outside), rel_tol=1e-3
    )


def test_local_layers_attend_to_their_window():
    base = {**TINY, "seq_len": 4096, "global_batch": 1}
    every = transformer(**base)
    local = transformer(**base, window=512, global_every=4)
    names = {b.name: b.repeat for b in local.blocks if b.checkpointed}
    assert names == {"dense": 1, "local_dense": 3}
    assert local.parameter_count == every.parameter_count
    assert local.forward_flops < every.forward_flops


def test_constants_keep_to_physics():
    with pytest.raises(ValueError, match=r"physical bound: matmul is in \[0, 1\]: 1.2"):
        Constants(matmul=1.2)
    assert shifted(1.0, 3.0) == 1.0
    for name in ("v5e", "v5p", "v6e", "tpu7x", "h100", "a100", "h20"):
        found = shipped().constants(name)
        assert 0.2 < found.matmul <= 1
    with pytest.raises(ValueError, match="no stack is called 'fortran'"):
        shipped().constants("h100", "fortran")
