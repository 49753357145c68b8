"""Kernels and exchanges against plain attention: values and gradients, on one device and eight."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

import sharding
from jaxrl import policy
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.models.attention import Attention, Pattern, Scores, cudnn, plain, splash
from jaxrl.models.attention.choice import UNLIMITED, _say
from jaxrl.models.attention.context import zigzag
from jaxrl.models.cache import KeyValue
from jaxrl.types import Prompts
from sharding.programs.fused import planning


def brute_force(query, kv, segments, pattern, rule):
    """One query, one head and one key at a time, from the definition of who sees whom."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, *kv))
    rows, size, heads, head_dim = query.shape
    share = heads // key.shape[2]
    out = np.zeros(query.shape)
    scale = head_dim**-0.5 if rule.scale is None else rule.scale

    def place(column):  # (which completion or -1, position in its own sequence)
        if not pattern.completion or column < pattern.prompt:
            return -1, column
        which, inside = divmod(column - pattern.prompt, pattern.completion)
        return which, pattern.prompt + inside

    def sees(row, q, k):
        (of_q, at_q), (of_k, at_k) = place(q), place(k)
        near = pattern.window is None or at_q - at_k < pattern.window
        return segments[row, q] == segments[row, k] and of_k in (-1, of_q) and at_k <= at_q and near

    for row, q, head in np.ndindex(rows, size, heads):
        keys = [k for k in range(size) if sees(row, q, k)]
        scores = key[row, keys, head // share] @ query[row, q, head] * scale
        if rule.softcap is not None:
            scores = np.tanh(scores / rule.softcap) * rule.softcap
        weights = np.exp(scores - scores.max())
        out[row, q, head] = weights @ value[row, keys, head // share] / weights.sum()
    return out


def operands(*, rows=2, size, heads=4, kv_heads=2, head_dim=8, seed=0, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((rows, size, n, head_dim) for n in (heads, kv_heads, kv_heads))
    query, key, value = (
        scale * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)
    )
    return query, KeyValue(key, value)


def padded_left(padding, size):
    return jnp.asarray(np.arange(size)[None] >= np.asarray(padding)[:, None], jnp.int32)


def assert_agree(run, reference, query, kv, segments, *, atol=2e-5):
    """Values and gradients of two attentions are alike at the columns that are not padding."""
    real = (segments != 0)[..., None, None]
    direction = jax.random.normal(jax.random.key(9), query.shape)

    def both(attend):
        def loss(query, kv):
            out = jnp.where(real, attend(query, kv, segments), 0.0)
            return jnp.sum(out * direction), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(query, kv)

    (_, out), gradients = both(run)
    (_, expected), wanted = both(reference)
    np.testing.assert_allclose(out, expected, atol=atol)
    for mine, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5 * atol)


def plainly(pattern, rule):
    return functools.partial(plain.rows, pattern=pattern, rule=rule, window=pattern.window)


CASES = {
    "causal": (Pattern(prompt=9), Scores()),
    "window": (Pattern(prompt=9, window=3), Scores(scale=0.7)),
    "completions": (Pattern(prompt=5, completion=3), Scores(softcap=0.8)),
    "completions, window": (Pattern(prompt=5, completion=3, window=4), Scores(scale=1.3)),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_by_brute_force(name):
    pattern, rule = CASES[name]
    size = pattern.prompt + 2 * pattern.completion
    query, kv = operands(size=size)
    segments = padded_left([0, 2], size)
    out = plain.rows(query, kv, segments, pattern, rule=rule, window=pattern.window)
    expected = brute_force(query, kv, np.asarray(segments), pattern, rule)
    real = np.asarray(segments) != 0
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=1e-5)


# --- splash -------------------------------------------------------------------------------------

SPLASH = {
    "causal, width 64": (Pattern(prompt=200), Scores(), {"head_dim": 64}),
    "one key head, width 128": (
        Pattern(prompt=130), Scores(scale=0.3), {"head_dim": 128, "kv_heads": 1},
    ),
    "as many key heads, width 256": (
        Pattern(prompt=128), Scores(), {"head_dim": 256, "heads": 2, "kv_heads": 2},
    ),
    "window and cap": (Pattern(prompt=300, window=70), Scores(softcap=1.5), {"head_dim": 16}),
    "completions": (Pattern(prompt=70, completion=50), Scores(softcap=0.8), {}),
    "completions, window": (Pattern(prompt=100, completion=125, window=60), Scores(), {}),
    "completions of whole blocks": (Pattern(prompt=128, completion=127), Scores(), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLASH)
def test_splash_is_plain_attention(name):
    pattern, rule, sizes = SPLASH[name]
    size = pattern.prompt + 3 * pattern.completion
    query, kv = operands(size=size, **sizes)
    run = functools.partial(splash.attend, pattern=pattern, rule=rule, interpret=True)
    assert_agree(run, plainly(pattern, rule), query, kv, padded_left([0, 37], size))


def test_splash_keeps_packed_sequences_apart():
    pattern, rule = Pattern(prompt=150), Scores()
    query, kv = operands(size=150)
    segments = jnp.asarray([[1] * 40 + [2] * 90 + [0] * 20, [1] * 1 + [2] * 149], jnp.int32)
    run = functools.partial(splash.attend, pattern=pattern, rule=rule, interpret=True)
    assert_agree(run, plainly(pattern, rule), query, kv, segments)


@pytest.mark.parametrize(
    ("pattern", "size", "block", "width"),
    [
        (Pattern(prompt=512), 512, 512, 512),
        (Pattern(prompt=512, completion=511), 512 + 4 * 511, 512, 2560),  # one column each
        (Pattern(prompt=500, completion=255), 500 + 4 * 255, 256, 512 + 4 * 256),
        (Pattern(prompt=64, completion=31), 64 + 8 * 31, 128, 384),  # filled up at the end only
        (Pattern(prompt=1000), 1000, 512, 1024),
    ],
)
def test_splash_fills_rows_up_to_whole_blocks_where_that_is_little(pattern, size, block, width):
    aligned = splash._Aligned.of(pattern, size)
    assert (aligned.block, aligned.size) == (block, width)
    x = jnp.arange(size * 2.0).reshape(1, size, 2)
    wide = aligned.widened(x)
    assert wide.shape == (1, width, 2)
    assert float(jnp.sum(wide)) == float(jnp.sum(x))  # nothing but zeros is added
    np.testing.assert_array_equal(aligned.narrowed(wide), x)


# --- cuDNN --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "window", "completions", "completions, window"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_cudnn_is_asked_for_is_plain_attention(name, packed):
    """The same call without cuDNN: lengths, windows, masks and the order of columns are ours."""
    pattern, rule = CASES[name]
    rule = dataclasses.replace(rule, softcap=None)
    size = pattern.prompt + 2 * pattern.completion
    query, kv = operands(size=size)
    run = functools.partial(
        cudnn.attend, pattern=pattern, rule=rule, packed=packed, implementation="xla"
    )
    assert_agree(run, plainly(pattern, rule), query, kv, padded_left([0, 2], size))


def test_what_cudnn_is_asked_for_keeps_packed_sequences_apart():
    pattern = Pattern(prompt=9, window=3)
    query, kv = operands(size=9)
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2, 2]], jnp.int32)
    run = functools.partial(
        cudnn.attend, pattern=pattern, rule=Scores(), packed=True, implementation="xla"
    )
    assert_agree(run, plainly(pattern, Scores()), query, kv, segments)


def test_what_cudnn_is_asked_for_at_right_padding():
    pattern = Pattern(prompt=9)
    query, kv = operands(size=9)
    segments = jnp.asarray([[1] * 9, [1] * 4 + [0] * 5], jnp.int32)
    run = functools.partial(
        cudnn.attend, pattern=pattern, rule=Scores(), packed=False, implementation="xla"
    )
    assert_agree(run, plainly(pattern, Scores()), query, kv, segments)


H100 = AbstractMesh(
    (2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2,
    abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
)  # fmt: skip
V5P = AbstractMesh(
    (2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2,
    abstract_device=AbstractDevice("TPU v5", 2, "tpu"),
)  # fmt: skip
SMALL = DecoderConfig(
    vocab_size=32, layers=2, embed=32, heads=4, kv_heads=2, head_dim=64, mlp=32, max_len=300,
    compute_dtype="bfloat16",
)  # fmt: skip


@pytest.fixture
def cudnn_here(monkeypatch):
    """Lowering asks which cuDNN is installed, and nothing more of it."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def lowered_step(config: DecoderConfig, mesh: AbstractMesh, platform: str) -> str:
    """The StableHLO of loss and gradient of completions, for another machine."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    # cuDNN's call is not lowered without devices, of whatever kind they are.
    whole = NamedSharding(mesh_of(dict(mesh.shape)), PartitionSpec())

    def loss(params, prompts, tokens):
        model = nnx.merge(graphdef, params)
        mask = jnp.ones(tokens.shape, bool)
        return jnp.sum(policy.evaluate(model, prompts, tokens, mask, temperature=1.0).log_probs)

    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)

    prompts = Prompts(tokens=shape(4, 128), mask=shape(4, 128, dtype=jnp.bool_), ids=shape(4))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(params, prompts, shape(4, 2, 130))
        return traced.lower(lowering_platforms=(platform,)).as_text().replace("\\22", '"')


@pytest.mark.parametrize("choice", ["auto", "cudnn"])
@pytest.mark.parametrize("windows", [(), (16, None)])
def test_a_step_for_gpus_calls_cudnn(cudnn_here, choice, windows):
    config = dataclasses.replace(SMALL, attention=choice, windows=windows)
    text = lowered_step(config, H100, "cuda")
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    shape = '"dimensions": ["4", "2", "264", "264"]'  # of 8 rows of 257 and 4 heads, on 4 devices
    assert shape in text
    assert ('"sliding_window_length": 16' in text) == bool(windows)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_softcap": 2.0}, "cuDNN has no soft cap"),
        ({"compute_dtype": "float32"}, "cuDNN refuses: Q must be fp16/bf16"),
        ({"head_dim": 140}, "cuDNN refuses: The head dim must be"),
        ({"attention": "splash"}, "its kernels are for TPUs"),
    ],
)
def test_what_cudnn_cannot_do_xla_does_and_says_why(cudnn_here, caplog, changes, reason):
    _say.cache_clear()
    with caplog.at_level(logging.WARNING):
        text = lowered_step(dataclasses.replace(SMALL, **changes), H100, "cuda")
    assert "__cudnn" not in text
    assert reason in caplog.text


def test_a_gpu_without_cudnn_takes_xla(caplog):
    _say.cache_clear()
    with caplog.at_level(logging.WARNING):
        text = lowered_step(SMALL, H100, "cuda")
    assert "__cudnn" not in text
    assert "attention by XLA instead of cudnn: cuDNN refuses" in caplog.text


@pytest.mark.parametrize("choice", ["auto", "splash"])
@pytest.mark.parametrize("windows", [(), (16, None)])
def test_a_step_for_tpus_calls_splash(choice, windows):
    config = dataclasses.replace(SMALL, attention=choice, windows=windows, attention_softcap=20.0)
    text = lowered_step(config, V5P, "tpu")
    kinds = 2 if windows else 1
    # Forward, and in the backward pass forward again, its gradients to queries and to keys.
    assert text.count("tpu_custom_call") >= 3 * kinds
    assert "tensor<2x2x512x64xbf16>" in text  # 2 of 4 rows, 2 of 4 heads, 64 wide


def test_xla_is_xla_on_any_machine():
    config = dataclasses.replace(SMALL, attention="xla")
    assert "tpu_custom_call" not in lowered_step(config, V5P, "tpu")


def test_auto_without_a_mesh_on_several_devices_is_xla(monkeypatch, caplog):
    _say.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    query, kv = operands(size=9)
    segments = jnp.ones((2, 9), jnp.int32)
    with caplog.at_level(logging.WARNING):
        out = Attention()(query, kv, segments, Pattern(prompt=9), packed=False)
    np.testing.assert_array_equal(out, plain.causal(query, kv, segments))
    assert "no mesh in the context" in caplog.text


def test_a_mesh_with_other_names_is_left_to_xla(caplog):
    _say.cache_clear()
    mesh = AbstractMesh(
        (2, 2), ("rows", "tensor"), (AxisType.Auto,) * 2, abstract_device=V5P.abstract_device
    )
    with caplog.at_level(logging.WARNING):
        assert "tpu_custom_call" not in lowered_step(SMALL, mesh, "tpu")
    assert "the mesh has axes rows, and only those named as the planner's" in caplog.text


# --- a decoder on eight devices -----------------------------------------------------------------

EIGHT = {"fsdp": 2, "context": 2, "tensor": 2}


def tokens_and_prompts(rows=2, prompt=6, groups=2, steps=5, vocabulary=11):
    keys = jax.random.split(jax.random.key(3), 2)
    prompts = Prompts(
        tokens=jax.random.randint(keys[0], (rows, prompt), 0, vocabulary),
        mask=padded_left([0, 2] * (rows // 2), prompt) != 0,
        ids=jnp.arange(rows),
    )
    return prompts, jax.random.randint(keys[1], (rows, groups, steps), 0, vocabulary)


def mesh_of(sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


TINY = DecoderConfig(
    vocab_size=11, layers=2, embed=16, heads=4, kv_heads=2, head_dim=8, mlp=20, max_len=32
)


def random_decoder(config):
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return graphdef, jax.tree.unflatten(tree, noisy)


def completion_gradients(graphdef, params, prompts, tokens):
    direction = jax.random.normal(jax.random.key(5), tokens.shape)

    def loss(params):
        model = nnx.merge(graphdef, params)
        out = policy.evaluate(model, prompts, tokens, jnp.ones(tokens.shape, bool), temperature=1.0)
        return jnp.sum(out.log_probs * direction)

    return jax.jit(jax.value_and_grad(loss))(params)


def sequence_gradients(graphdef, params, tokens, segments):
    def loss(params):
        logits = nnx.merge(graphdef, params)(tokens, segments)
        return jnp.sum(jnp.where((segments != 0)[..., None], logits, 0.0) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_same(found, expected, *, rtol=1e-5):
    np.testing.assert_allclose(found[0], expected[0], rtol=rtol)
    pairs = zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True)
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine, theirs, atol=rtol * float(jnp.max(jnp.abs(theirs)) + 1))


DIVIDED = {
    "plain": {},
    "windows and cap": {"windows": (3, None), "attention_softcap": 1.5},
    "one key head": {"kv_heads": 1},
    "splash": {"attention": "splash", "windows": (3, None), "attention_softcap": 1.5},
}


def on_mesh(mesh, tree):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def undivided(config):
    """A decoder, what it reads, and its gradients by plain attention on one device."""
    graphdef, params = random_decoder(config)
    prompts, completions = tokens_and_prompts()
    rows = jax.random.randint(jax.random.key(4), (2, 21), 0, 11)
    packed = jnp.asarray([[1] * 8 + [2] * 10 + [0] * 3, [0] * 2 + [1] * 19], jnp.int32)
    plain, _ = random_decoder(dataclasses.replace(config, attention="xla"))
    expected = completion_gradients(plain, params, prompts, completions)
    whole = sequence_gradients(plain, params, rows, packed)
    return graphdef, (params, prompts, completions, rows, packed), expected, whole


@pytest.mark.parametrize(
    ("exchange", "name", "sizes"),
    [
        ("ring", "plain", {"context": 8}),
        ("ring", "windows and cap", EIGHT),
        ("ring", "one key head", EIGHT),
        ("all_gather", "windows and cap", EIGHT),
        ("all_gather", "plain", {"data": 2, "context": 4}),
        ("all_gather", "splash", EIGHT),
    ],
)
def test_sequences_divided_among_devices(exchange, name, sizes):
    config = dataclasses.replace(TINY, **DIVIDED[name], context=exchange)
    graphdef, given, expected, whole = undivided(config)
    params, prompts, completions, rows, packed = given
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        params, prompts, completions, rows, packed = on_mesh(
            mesh, (params, prompts, completions, rows, packed)
        )
        found = completion_gradients(graphdef, params, prompts, completions)
        divided = sequence_gradients(graphdef, params, rows, packed)
    assert_same(found, expected)
    assert_same(divided, whole)


@pytest.mark.parametrize("sizes", [{"context": 8}, EIGHT])
def test_divided_sequences_as_the_planner_reads_them_on_tpus(sizes):
    config = dataclasses.replace(TINY, attention_softcap=1.5)
    graphdef, given, expected, whole = undivided(config)
    params, rows = given[0], given[3]
    mesh = mesh_of(sizes)

    def program(machine):
        with planning(machine):
            return str(jax.make_jaxpr(lambda p: nnx.merge(graphdef, p).hidden(rows))(params))

    with jax.set_mesh(mesh):
        given = on_mesh(mesh, given)
        with planning("tpu"):
            found = completion_gradients(graphdef, *given[:3])
            divided = sequence_gradients(graphdef, given[0], *given[3:])
        assert "all_gather" in program("tpu")
        assert "ppermute" not in program("tpu")
        assert "ppermute" in program("gpu")
    assert_same(found, expected)
    assert_same(divided, whole)


@pytest.mark.parametrize(("ways", "gathers"), [(2, True), (3, False), (8, True)])
def test_an_odd_number_of_tpus_hands_keys_on(ways, gathers):
    """XLA:TPU does not sum the gradients of what three devices gathered."""
    graphdef, params = random_decoder(TINY)
    tokens = jnp.zeros((1, 12), jnp.int32)
    mesh = jax.make_mesh(
        (ways,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:ways]
    )
    with jax.set_mesh(mesh), planning("tpu"):
        text = str(jax.make_jaxpr(lambda p: nnx.merge(graphdef, p).hidden(tokens))(params))
    assert ("all_gather" in text) == gathers
    assert ("ppermute" in text) != gathers


def test_kernels_of_tpus_are_for_no_gpu():
    config = dataclasses.replace(TINY, attention="splash")
    graphdef, params = random_decoder(config)
    mesh = AbstractMesh(
        (2,), ("context",), (AxisType.Auto,),
        abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(
            jax.make_jaxpr(lambda p: nnx.merge(graphdef, p).hidden(jnp.zeros((1, 12), jnp.int32)))(
                params
            )
        )
    assert "pallas_call" not in text
    assert "ppermute" in text


def test_zigzag_gives_all_devices_the_same_work():
    for ways, size in ((2, 8), (4, 32), (8, 64)):
        held = zigzag(size, ways).reshape(ways, -1)
        assert sorted(held.ravel().tolist()) == list(range(size))
        assert len(set(held.sum(axis=1).tolist())) == 1  # a causal column's work is its number


def test_a_ring_hands_on_keys_and_never_gathers_them():
    mesh, config = mesh_of({"context": 8}), dataclasses.replace(TINY, context="ring")
    _, params = random_decoder(config)
    tokens = jnp.zeros((1, 64), jnp.int32)

    def compiled(config):
        def run(params, tokens):
            return nnx.merge(nnx.split(Decoder(config, rngs=nnx.Rngs(0)))[0], params).hidden(tokens)

        with jax.set_mesh(mesh):
            text = jax.jit(run).lower(*on_mesh(mesh, (params, tokens))).compile().as_text()
        assert text is not None
        return text

    ring = compiled(config)
    gathered = compiled(dataclasses.replace(TINY, context="all_gather"))
    assert "collective-permute" in ring
    assert "f32[8,1,8,2,8]" not in ring  # the keys of all devices
    assert "f32[8,1,8,2,8]" in gathered


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_splash_on_the_rows_and_heads_of_each_device(kv_heads):
    config = dataclasses.replace(TINY, kv_heads=kv_heads, attention="xla", windows=(3, None))
    graphdef, params = random_decoder(config)
    prompts, completions = tokens_and_prompts(rows=4)
    expected = completion_gradients(graphdef, params, prompts, completions)
    graphdef, _ = nnx.split(
        Decoder(dataclasses.replace(config, attention="splash"), rngs=nnx.Rngs(0))
    )
    mesh = mesh_of({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        arguments = on_mesh(mesh, (params, prompts, completions))
        found = completion_gradients(graphdef, *arguments)
    assert_same(found, expected)


def test_window_of_a_layer_chosen_inside_a_scan():
    attend = Attention(implementation="splash", windows=(2, None, 5))
    query, kv = operands(size=9, head_dim=4)
    segments = jnp.ones((2, 9), jnp.int32)
    run = jax.jit(
        lambda window: attend(query, kv, segments, Pattern(prompt=9), window=window, packed=False)
    )
    for window in (2, 5, UNLIMITED):
        expected = plain.causal(query, kv, segments, window=window)
        np.testing.assert_allclose(run(jnp.int32(window)), expected, atol=1e-5)


def test_a_plan_with_a_context_axis_runs_the_ring():
    graphdef, params = random_decoder(TINY)
    prompts, completions = tokens_and_prompts(rows=4, prompt=8, groups=2, steps=9)

    def gradient(params, prompts, tokens):
        def loss(params):
            model = nnx.merge(graphdef, params)
            mask = jnp.ones(tokens.shape, bool)
            return jnp.mean(
                policy.evaluate(model, prompts, tokens, mask, temperature=1.0).log_probs
            )

        return jax.grad(loss)(params)

    args = (params, prompts, completions)
    plan = sharding.plan(
        gradient, args, cluster=jax.devices(), data=(1, 2),
        constraints=sharding.Constraints(pinned={"fsdp": 4, "context": 2}),
    )  # fmt: skip
    planned = plan.apply(gradient)
    expected = jax.jit(gradient)(*args)
    for mine, theirs in zip(
        jax.tree.leaves(planned(*args)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert "collective_permute" in planned.lower(*args).as_text()
