"""What the planner reads in place of attention kernels: the same numbers, and no scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import sharding
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.models.attention import Attention, Pattern, Scores, cudnn, plain, planned, splash
from jaxrl.models.attention.planned import Kernel, computed_share
from jaxrl.models.cache import KeyValue
from jaxrl.models.layout import platform
from jaxrl.types import Prompts
from sharding import Cluster
from sharding.costs.constants import shipped
from sharding.programs.fused import planning
from sharding.tracing.trace import trace


def operands(*, size, rows=2, heads=4, kv_heads=2, head_dim=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, size, n, head_dim) for n in (heads, kv_heads, kv_heads))
    query, *kv = (jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True))
    return query, KeyValue(*kv)


def padded_left(padding, size):
    return jnp.asarray(np.arange(size)[None] >= np.asarray(padding)[:, None], jnp.int32)


CASES = {
    "splash, causal": ("tpu", Pattern(prompt=120), Scores(scale=0.3)),
    "splash, window and cap": ("tpu", Pattern(prompt=120, window=70), Scores(softcap=0.9)),
    "splash, completions": ("tpu", Pattern(prompt=40, completion=25), Scores()),
    "cudnn, causal": ("gpu", Pattern(prompt=12), Scores(scale=0.3)),
    "cudnn, window": ("gpu", Pattern(prompt=12, window=4), Scores()),
    "cudnn, completions": ("gpu", Pattern(prompt=6, completion=4), Scores()),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_plain_attention(name):
    machine, pattern, rule = CASES[name]
    size = pattern.prompt + 3 * pattern.completion
    query, kv = operands(size=size)
    segments = padded_left([0, 5], size)
    real = (segments != 0)[..., None, None]
    if machine == "tpu":
        kernel = functools.partial(splash.attend, pattern=pattern, rule=rule)
    else:
        kernel = functools.partial(cudnn.attend, pattern=pattern, rule=rule, packed=False)
    plainly = functools.partial(plain.rows, pattern=pattern, rule=rule, window=pattern.window)

    def both(attend):
        def loss(query, kv):
            out = jnp.where(real, attend(query, kv, segments), 0.0)
            return jnp.sum(jnp.sin(3 * out)), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(query, kv)

    run = jax.jit(both, static_argnums=0)
    (_, expected), wanted = run(plainly)
    with planning(machine):
        (_, out), gradients = run(kernel)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_packed_rows_on_gpus_take_a_mask():
    pattern, rule = Pattern(prompt=10), Scores()
    query, kv = operands(size=10)
    segments = jnp.asarray([[1] * 4 + [2] * 4 + [0] * 2, [1] * 1 + [2] * 9], jnp.int32)
    with planning("gpu"):
        out = cudnn.attend(query, kv, segments, pattern, rule=rule, packed=True)
    expected = plain.rows(query, kv, segments, pattern, rule=rule)
    real = np.asarray(segments) != 0
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "size", "block"),
    [
        (Pattern(prompt=64), 64, 8),
        (Pattern(prompt=60), 60, 8),
        (Pattern(prompt=64, window=9), 64, 8),
        (Pattern(prompt=16, completion=24), 16 + 3 * 24, 8),
        (Pattern(prompt=16, completion=24, window=12), 16 + 3 * 24, 8),
    ],
)
def test_the_share_of_blocks_by_brute_force(pattern, size, block):
    columns = np.arange(size)
    visible = np.asarray(pattern.visible(columns[:, None], columns[None]))
    starts = range(0, size, block)
    seen = [visible[i : i + block, j : j + block].any() for i in starts for j in starts]
    assert computed_share(pattern, size, block) == pytest.approx(np.mean(seen))


CONFIG = DecoderConfig(
    vocab_size=64, layers=2, embed=64, mlp=128, heads=4, kv_heads=2, head_dim=16, max_len=4096,
    compute_dtype="bfloat16", remat="full", logit_chunk=128,
)  # fmt: skip


def traced(machine, config, prompt, completion):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    def loss(params, prompts, tokens):
        hidden = nnx.merge(graphdef, params).completion_hidden(prompts, tokens)
        return jnp.mean(hidden.astype(jnp.float32) ** 2)

    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    prompts = Prompts(tokens=shape(8, prompt), mask=shape(8, prompt, dtype=jnp.bool_), ids=shape(8))
    with planning(machine):
        return trace(loss, (params, prompts, shape(8, 2, completion)))


@pytest.mark.parametrize("machine", ["tpu", "gpu"])
def test_no_array_of_a_planned_decoder_grows_with_the_square_of_the_length(machine):
    def largest(length):
        program = traced(machine, CONFIG, length, length).program
        return max(program.bytes(n) for n, t in program.tensors.items() if t.role != "param")

    short, long = (largest(n) for n in (256, 512))
    assert long == 2 * short
    program = traced("cpu", CONFIG, 512, 512).program
    assert any(program.bytes(n) >= 8 * 4 * 512**2 * 4 for n in program.tensors)


@pytest.mark.parametrize("machine", ["tpu", "gpu"])
def test_a_planned_decoder_is_divided_as_with_plain_attention(machine):
    plainly, fused = (traced(kind, CONFIG, 256, 256) for kind in ("cpu", machine))

    def divided(found):
        """Of every factor of every argument its size and by what it may be divided."""
        return {
            (leaf.path, axis, found.sizes[atom], found.splits.kinds.get(atom))
            for leaf in found.inputs
            for axis, factors in enumerate(leaf.factors)
            for atom in factors
        }

    assert divided(fused) == divided(plainly)
    assert {kind for *_, kind in divided(fused)} >= {"data", "tensor"}
    kernels = [op for b in fused.program.blocks for op in b.ops if op.kind == "attention"]
    assert len(kernels) == 1
    assert not fused.program.unknown


def test_what_a_kernel_cannot_do_is_planned_without_it():
    wide = dataclasses.replace(CONFIG, compute_dtype="float32")
    capped = dataclasses.replace(CONFIG, attention_softcap=5.0)
    for config in (wide, capped):
        program = traced("gpu", config, 128, 128).program
        assert not any(op.kind == "attention" for b in program.blocks for op in b.ops)
    program = traced("tpu", capped, 128, 128).program
    assert any(op.kind == "attention" for b in program.blocks for op in b.ops)


def test_layers_with_different_windows_take_one_kernel_each():
    config = dataclasses.replace(CONFIG, windows=(64, None))
    program = traced("tpu", config, 256, 256).program
    assert [op.kind for b in program.blocks for op in b.ops].count("attention") == 1


def test_the_switch_asks_what_is_planned_for():
    assert platform() == "cpu"
    with planning("gpu"):
        assert platform() == "gpu"
    query, kv = operands(size=8, dtype=jnp.bfloat16)
    segments, pattern = jnp.ones((2, 8), jnp.int32), Pattern(prompt=8)

    def attend():
        return Attention()(query, kv, segments, pattern, packed=False)

    def fused(jaxpr):
        return "fused[" in str(jaxpr)

    assert not fused(jax.make_jaxpr(attend)())
    with planning("tpu"):
        assert fused(jax.make_jaxpr(attend)())
        assert sharding.planned_for() == "tpu"
    assert not fused(jax.make_jaxpr(attend)())


def products(jaxpr):
    """Matrix products of a jaxpr and of what it calls."""
    return sum(
        (eqn.primitive.name == "dot_general") + sum(map(products, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def kernels(jaxpr, primitive):
    """Products of each call of a kernel, in order."""
    found = []
    for eqn in jaxpr.eqns:
        inner = jaxprs_in_params(eqn.params)
        if eqn.primitive.name == primitive:
            found.append(sum(map(products, inner)))
        else:
            found += [n for body in inner for n in kernels(body, primitive)]
    return found


@pytest.mark.parametrize(("one_kernel", "backward"), [(False, [4, 3]), (True, [5])])
def test_products_backward_are_those_of_the_splash_kernels(one_kernel, backward):
    blocks = splash._block_sizes(128)
    assert not blocks.use_fused_bwd_kernel  # what `splash` runs is what it tells the planner
    if one_kernel:
        blocks = dataclasses.replace(
            blocks, use_fused_bwd_kernel=True, block_q_dq=None, block_kv_dq=None
        )
    run = splash.kernel.make_splash_mha(
        splash.masks.MultiHeadMask([splash.masks.CausalMask((256, 256))] * 2),
        block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=True,
    )  # fmt: skip
    operand = jax.ShapeDtypeStruct((2, 256, 128), jnp.bfloat16)

    def loss(query, key, value):
        return jnp.sum(run(query, key, value).astype(jnp.float32))

    made = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(operand, operand, operand)
    forward, *others = kernels(made.jaxpr, "pallas_call")
    assert (forward, others) == (2, backward)
    kernel = Kernel(
        visible=bool, softcap=None, scale=1.0, heads_first=True, statistics=128,
        kernels_backward=len(backward), computed=1.0,
    )  # fmt: skip
    assert kernel.backward == sum(backward) / forward


@pytest.mark.parametrize(
    ("machine", "forward", "backward"), [("tpu", 2, [3, 4]), ("gpu", 2, [5]), ("cpu", 0, [])]
)
def test_the_planner_reads_as_many_products_as_the_kernels_make(machine, forward, backward):
    query, kv = operands(size=128, dtype=jnp.bfloat16)
    segments = jnp.ones((2, 128), jnp.int32)

    def loss(query, kv):
        out = Attention()(query, kv, segments, Pattern(prompt=128), packed=False)
        return jnp.sum(out.astype(jnp.float32))

    with planning(machine):
        made = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(query, kv)
    wanted = [forward, *backward] if forward else []
    assert kernels(made.jaxpr, "fused") == wanted


def test_a_long_step_is_planned_with_the_work_of_its_kernels():
    def seconds(kernels_backward, computed=1.0):
        kernel = Kernel(
            visible=lambda _: jnp.ones((1, 4096, 4096), bool), softcap=None, scale=0.1,
            heads_first=True, statistics=128, kernels_backward=kernels_backward, computed=computed,
        )  # fmt: skip

        def loss(weights, rows):
            heads = [jnp.einsum("nse,ehd->nhsd", rows, weight) for weight in weights]
            return jnp.sum(planned.attend(kernel, *heads, None).astype(jnp.float32))

        args = (
            [jax.ShapeDtypeStruct((1024, 8, 128), jnp.bfloat16)] * 3,
            jax.ShapeDtypeStruct((8, 4096, 1024), jnp.bfloat16),
        )
        program = trace(loss, args).program
        (op,) = (op for b in program.blocks for op in b.ops if op.kind == "attention")
        assert op.contracted  # the width of queries and keys: it stands in no result
        # Two products, each a multiply-add for every pair of columns, head and its width.
        assert program.flops(op) == pytest.approx(2 * 2 * 8 * 8 * 128 * 4096**2 * computed)
        plan = sharding.plan(loss, args, cluster="v5p:1x1x1", state=(0,), data=(1,))
        return op.backward_passes, plan.step_time_s, program.flops(op)

    (two, slow, work), (one, fast, _) = seconds(2), seconds(1)
    assert (two, one) == (3.5, 2.5)
    # One more run of the forward kernel, which products limit and not memory.
    rate = Cluster.from_name("v5p:1x1x1").chip.peak_flops["bf16"]
    rate *= shipped().constants("v5p").attention
    assert slow - fast == pytest.approx(work / rate, rel=0.05)
    # Forward and 3.5 times as much backward, of which the mask leaves half.
    _, masked, _ = seconds(2, 0.5)
    assert slow - masked == pytest.approx(4.5 * work / 2 / rate, rel=0.05)
