"""The decoder against plain NumPy, against itself in other layouts, and its bookkeeping."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from jaxrl.models import LOGICAL_AXES, Decoder, DecoderConfig, RopeScaling, ScalarModel, attention
from jaxrl.models.cache import CachedKeyValue, KeyValue
from jaxrl.models.decoder import rms_norm, rotate, rotation
from jaxrl.types import Prompts

TINY = DecoderConfig(
    vocab_size=11, layers=2, embed=16, heads=4, kv_heads=2, head_dim=6, mlp=20, max_len=32
)
VARIANTS = {
    "plain": {},
    "qwen3": {"qk_norm": True},
    "qwen2": {"attention_bias": True},
    "untied": {"tie_embeddings": False},
    "multi_head": {"kv_heads": 4, "qk_norm": True, "attention_bias": True},
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_max_len=16)},
    "gemma": {
        "norm_plus_one": True, "post_norms": True, "scale_embeddings": True, "qk_norm": True,
        "activation": "gelu_tanh", "query_scale": 0.3, "attention_softcap": 1.5,
        "logit_softcap": 3.0, "windows": (3, None), "window_rope_theta": 50.0,
    },
    "window": {"windows": (3, 2), "output_bias": True},
    "mixture": {"experts": 5, "experts_per_token": 2, "normalise_routing": False},
    "mixtral": {"experts": 3, "experts_per_token": 2},
}  # fmt: skip


def randomised(config: DecoderConfig, seed: int = 0) -> Decoder:
    """A decoder whose norms and biases are not at their initial ones and zeros."""
    model = Decoder(config, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, noisy))


@functools.cache
def case(name: str) -> Decoder:
    return randomised(dataclasses.replace(TINY, **VARIANTS[name]))


@nnx.jit
def logits_of(model: Decoder, tokens, segments):
    return model(tokens, segments)


@nnx.jit
def completion_logits(model: Decoder, prompts: Prompts, tokens):
    return model.logits(model.completion_hidden(prompts, tokens))


def left_padded(lengths, width: int, *, seed: int = 0, filler: int = 0) -> Prompts:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, TINY.vocab_size, n) for n in lengths]  # the same whatever the width
    tokens = np.full((len(rows), width), filler, np.int32)
    for row, real in zip(tokens, rows, strict=True):
        row[width - len(real) :] = real
    mask = np.arange(width)[None] >= width - np.asarray(lengths)[:, None]
    return Prompts(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), ids=jnp.arange(len(rows)))


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_is_the_configs(name):
    params = nnx.state(case(name), nnx.Param)
    assert sum(x.size for x in jax.tree.leaves(params)) == case(name).config.num_params


def test_parameter_count_by_hand():
    # per layer: attention 16·6·(4+2+2+4), norms 2·16, feed-forward 3·16·20; embeddings 11·16;
    # final norm 16.
    assert TINY.num_params == 2 * (16 * 6 * 12 + 32 + 960) + 176 + 16


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_names_its_axes(name):
    config = case(name).config
    sizes = {"layer": config.layers, "embed": config.embed, "heads": config.heads}
    sizes |= {"kv_heads": config.kv_heads, "head_dim": config.head_dim, "mlp": config.mlp}
    sizes |= {"vocab": config.vocab_size, "expert": config.experts}
    model = ScalarModel(config, heads=("reward", "cost"), rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        axes, shape = variable.get_metadata()["out_sharding"], variable[...].shape
        assert len(axes) == len(shape), path
        assert set(axes) <= {*LOGICAL_AXES, None}, path
        assert all(
            sizes.get(axis, 2) == size or axis is None
            for axis, size in zip(axes, shape, strict=True)
        )
        assert ("layers" in path) == (axes[0] == "layer"), path
        assert variable[...].dtype == jnp.float32


# --- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "kv_heads must divide heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"layers": 0}, "layers must be ≥ 1, got 0"),
        ({"scan_unroll": 0}, "scan_unroll must be ≥ 1, got 0"),
        ({"windows": (4,)}, "one entry a layer, got 1 for 2"),
        ({"windows": (4, 0)}, "holds the token itself"),
        ({"window_rope_theta": 1e4}, "there are none"),
        ({"query_scale": 0.0}, "query_scale must be above 0"),
        ({"experts": 4}, "between 1 and all of the experts"),
        ({"experts": 4, "experts_per_token": 5}, "between 1 and all of the experts"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_rope_scaling_refuses_shrinking():
    with pytest.raises(ValueError, match="factor must be ≥ 1"):
        RopeScaling(kind="linear", factor=0.5)


# --- rotary positions ---------------------------------------------------------------------------


def hf_llama3(dim, base, factor, low, high, old_len):
    """Loop form of `_compute_llama3_parameters` (transformers/modeling_rope_utils.py)."""
    result = []
    for i in range(0, dim, 2):
        frequency = 1 / base ** (i / dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < old_len / high:
            result.append(frequency)
        elif wavelength > old_len / low:
            result.append(frequency / factor)
        else:
            smooth = (old_len / wavelength - low) / (high - low)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return result


def hf_yarn(dim, base, factor, fast, slow, old_len):
    """Loop form of `_compute_yarn_parameters` (transformers/modeling_rope_utils.py)."""

    def correction_dim(rotations):
        return dim * math.log(old_len / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction_dim(fast)), 0)
    high = min(math.ceil(correction_dim(slow)), dim - 1)
    result = []
    for j in range(dim // 2):
        frequency = 1 / base ** (2 * j / dim)
        extrapolate = 1 - min(max((j - low) / (high - low), 0), 1)
        result.append(frequency / factor * (1 - extrapolate) + frequency * extrapolate)
    return result


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (RopeScaling(), [1e4 ** (-i / 16) for i in range(0, 16, 2)]),
        (
            RopeScaling(kind="linear", factor=4.0),
            [1e4 ** (-i / 16) / 4 for i in range(0, 16, 2)],
        ),
        (
            RopeScaling(kind="llama3", factor=8.0, original_max_len=1024),
            hf_llama3(16, 1e4, 8.0, 1.0, 4.0, 1024),
        ),
        (
            RopeScaling(kind="yarn", factor=4.0, original_max_len=2048),
            hf_yarn(16, 1e4, 4.0, 32.0, 1.0, 2048),
        ),
    ],
    ids=lambda x: x.kind if isinstance(x, RopeScaling) else "",
)
def test_frequencies_are_those_of_transformers(scaling, expected):
    np.testing.assert_allclose(scaling.frequencies(16, 1e4), expected, rtol=1e-6)


def test_frequencies_golden():
    # head_dim 8, θ = 10⁴: 1, .1, .01, .001 radians per token, worked by hand.
    # Llama 3 with context 1024: .1 turns 16.3 times (> 4: kept), .01 turns 1.630 times, so
    # smooth = .6297/3 = .20991 and (1 − .20991)·.01/8 + .20991·.01 = .0030867; .001 is divided.
    llama3 = RopeScaling(kind="llama3", factor=8.0, original_max_len=1024)
    np.testing.assert_allclose(
        llama3.frequencies(8, 1e4), [1.0, 0.1, 0.0030867, 0.000125], rtol=2e-5
    )
    # YaRN with context 2048: 32 turns lie at pair 1.008, 1 turn at pair 2.513, so the ramp runs
    # from pair 1 to 3: kept, kept, half, divided by 4.
    yarn = RopeScaling(kind="yarn", factor=4.0, original_max_len=2048)
    np.testing.assert_allclose(
        yarn.frequencies(8, 1e4), [1.0, 0.1, 0.5 * 0.01 + 0.5 * 0.0025, 0.00025], rtol=1e-6
    )
    assert yarn.attention_factor == pytest.approx(1.1386294)  # 0.1·ln 4 + 1


def test_rotation_is_that_of_the_complex_plane():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2, 6)).astype(np.float32)
    positions = np.array([0, 1, 7], np.int32)
    frequencies = np.array([1.0, 0.3, 0.01], np.float32)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(
        1j * positions[:, None, None] * frequencies[None, None]
    )
    expected = 1.5 * np.concatenate([turned.real, turned.imag], axis=-1)
    turn = rotation(jnp.asarray(positions), jnp.asarray(frequencies), scale=1.5)
    got = rotate(jnp.asarray(x), turn)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_rms_norm_against_numpy_and_its_gradient():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=7).astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(
        rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-6), expected, rtol=1e-5
    )
    check_grads(
        lambda x, s: rms_norm(jnp.asarray(x), jnp.asarray(s), 1e-6), (x, scale), order=1,
        modes=["rev"], atol=1e-2, rtol=1e-2,
    )  # fmt: skip


# --- attention ----------------------------------------------------------------------------------


def numpy_attention(query, key, value, visible, scale=None, softcap=None):
    """softmax(q kᵀ/√d) v, one query head and one position at a time; query [S, Q, d]."""
    scale = 1 / math.sqrt(query.shape[2]) if scale is None else scale
    group = query.shape[1] // key.shape[1]
    out = np.zeros_like(query)
    for s in range(query.shape[0]):
        for head in range(query.shape[1]):
            seen = np.flatnonzero(visible[s])
            scores = key[seen, head // group] @ query[s, head] * scale
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[s, head] = weights / weights.sum() @ value[seen, head // group]
    return out


def random_qkv(rng, *batch, heads=4, kv_heads=2, dim=6):
    q = rng.normal(size=(*batch, heads, dim)).astype(np.float32)
    k, v = rng.normal(size=(2, *batch, kv_heads, dim)).astype(np.float32)
    return q, k, v


def test_causal_attention_against_numpy():
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, 2, 7)
    segments = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 0, 0]])
    got = attention.causal(
        jnp.asarray(q), KeyValue(jnp.asarray(k), jnp.asarray(v)), jnp.asarray(segments)
    )
    for n in range(2):
        same = segments[n][:, None] == segments[n][None]
        visible = np.tril(same & (segments[n] != 0)[None])
        real = segments[n] != 0
        expected = numpy_attention(q[n][real], k[n][real], v[n][real], visible[real][:, real])
        np.testing.assert_allclose(got[n][real], expected, atol=1e-5)
    assert np.all(np.isfinite(got))


def test_attention_after_a_prompt_against_numpy():
    rng = np.random.default_rng(1)
    _, pk, pv = random_qkv(rng, 2, 3)
    q, k, v = random_qkv(rng, 2, 2, 4)
    mask = np.array([[False, True, True], [True, True, True]])
    got = attention.after_prompt(
        jnp.asarray(q),
        KeyValue(jnp.asarray(pk), jnp.asarray(pv)),
        jnp.asarray(mask),
        KeyValue(jnp.asarray(k), jnp.asarray(v)),
    )
    one = [
        attention.one_token(
            jnp.asarray(q[:, :, t]),
            CachedKeyValue(jnp.einsum("bpkd->bkdp", pk), jnp.einsum("bpkd->bkpd", pv)),
            jnp.asarray(mask),
            CachedKeyValue(jnp.einsum("bgtkd->bkgdt", k), jnp.einsum("bgtkd->bkgtd", v)),
            jnp.int32(t),
        )
        for t in range(4)
    ]
    for b in range(2):
        for g in range(2):
            keys, values = np.concatenate([pk[b], k[b, g]]), np.concatenate([pv[b], v[b, g]])
            visible = np.concatenate([np.tile(mask[b], (4, 1)), np.tri(4, dtype=bool)], axis=1)
            expected = numpy_attention(q[b, g], keys, values, visible)
            np.testing.assert_allclose(got[b, g], expected, atol=1e-5)
            np.testing.assert_allclose(np.stack([x[b, g] for x in one]), expected, atol=1e-5)


# --- the decoder in NumPy -----------------------------------------------------------------------


def numpy_decoder(model: Decoder, tokens):
    """Logits of one sequence."""
    c, kernel = model.config, model.embedding if model.config.tie_embeddings else model.output
    kernel = np.asarray(kernel[...], np.float64)
    logits = numpy_hidden(model, tokens) @ (kernel.T if c.tie_embeddings else kernel)
    return (
        logits if c.logit_softcap is None else c.logit_softcap * np.tanh(logits / c.logit_softcap)
    )


def numpy_hidden(model: Decoder, tokens):
    """Hidden states of one sequence, as the papers write them: no scan, no batch."""
    c = model.config
    w = {k: np.asarray(v, np.float64) for k, v in model.layers.weights().items()}
    half, positions = c.head_dim // 2, np.arange(len(tokens))

    def norm(x, scale):
        scale = scale + c.norm_plus_one
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    def turn(window):
        scaling, theta = c.rope_scaling, c.rope_theta
        if window is not None and c.window_rope_theta is not None:
            scaling, theta = RopeScaling(), c.window_rope_theta
        frequencies = np.asarray(scaling.frequencies(c.head_dim, theta), np.float64)
        return scaling.attention_factor * np.exp(1j * positions[:, None] * frequencies)

    def project(x, kernel, bias, heads):
        out = x @ kernel.reshape(c.embed, heads * c.head_dim)
        return out.reshape(len(x), heads, c.head_dim) + bias

    def rope(x, window):
        z = (x[..., :half] + 1j * x[..., half:]) * turn(window)[:, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    embedding = np.asarray(model.embedding[...], np.float64)
    x = embedding[np.asarray(tokens)] * (c.embed**0.5 if c.scale_embeddings else 1)
    for i, window in enumerate(c.windows or [None] * c.layers):
        normed = norm(x, w["attention_norm"][i])
        bias = {n: w[f"{n}_bias"][i] if c.attention_bias else 0 for n in ("query", "key", "value")}
        q = project(normed, w["query"][i], bias["query"], c.heads)
        k = project(normed, w["key"][i], bias["key"], c.kv_heads)
        v = project(normed, w["value"][i], bias["value"], c.kv_heads)
        if c.qk_norm:
            q, k = norm(q, w["query_norm"][i]), norm(k, w["key_norm"][i])
        visible = np.tri(len(tokens), dtype=bool)
        if window is not None:
            visible &= positions[:, None] - positions < window
        out = numpy_attention(
            rope(q, window), rope(k, window), v, visible, c.query_scale, c.attention_softcap
        )
        out = out.reshape(len(x), -1) @ w["attention_out"][i].reshape(-1, c.embed)
        out = out + (w["attention_out_bias"][i] if c.output_bias else 0)
        x = x + (norm(out, w["post_attention_norm"][i]) if c.post_norms else out)
        normed = norm(x, w["mlp_norm"][i])
        out = numpy_feed_forward(c, {k: kernel[i] for k, kernel in w.items()}, normed)
        x = x + (norm(out, w["post_mlp_norm"][i]) if c.post_norms else out)
    return norm(x, np.asarray(model.final_norm[...], np.float64))


def numpy_feed_forward(c, w, x):
    """Token by token, expert by expert."""

    def activation(x):
        if c.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def block(x, gate, up, down):
        return (activation(x @ gate) * (x @ up)) @ down

    if not c.experts:
        return block(x, w["gate"], w["up"], w["down"])
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        odds = np.exp(row @ w["router"])
        odds /= odds.sum()
        chosen = sorted(range(c.experts), key=lambda e: -odds[e])[: c.experts_per_token]
        total = sum(odds[e] for e in chosen) if c.normalise_routing else 1.0
        for e in chosen:
            out[t] += odds[e] / total * block(row, w["gate"][e], w["up"][e], w["down"][e])
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_decoder_against_numpy(name):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)), jnp.int32)
    got = logits_of(case(name), tokens, None)
    for row, logits in zip(tokens, got, strict=True):
        np.testing.assert_allclose(logits, numpy_decoder(case(name), row), atol=2e-4, rtol=1e-4)


# --- layouts agree ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "yarn", "gemma", "mixtral"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_completion_hidden_is_that_of_the_concatenated_sequences(name, groups, steps):
    model, lengths, width = case(name), [1, 5, 3], 5
    prompts = left_padded(lengths, width)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 11, (3, groups, steps)).astype(np.int32)
    got = completion_logits(model, prompts, jnp.asarray(tokens))
    assert got.shape == (3, groups, steps, 11)
    for b, length in enumerate(lengths):
        for g in range(groups):
            prompt = np.asarray(prompts.tokens[b, width - length :])
            alone = numpy_decoder(model, np.concatenate([prompt, tokens[b, g]]))
            np.testing.assert_allclose(
                got[b, g], alone[length - 1 : length - 1 + steps], atol=2e-4, rtol=1e-4
            )


def test_prompt_padding_changes_nothing():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 2, 4)), jnp.int32)
    tight = completion_logits(case("qwen3"), left_padded([4, 2], 4), tokens)
    wide = completion_logits(case("qwen3"), left_padded([4, 2], 9, filler=7), tokens)
    np.testing.assert_allclose(wide, tight, atol=1e-5)


def test_completion_padding_changes_nothing():
    prompts = left_padded([4, 2], 4)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 2, 4)).astype(np.int32)
    padded = np.concatenate([tokens, np.full((2, 2, 3), 9, np.int32)], axis=-1)
    short = completion_logits(case("qwen3"), prompts, jnp.asarray(tokens))
    long = completion_logits(case("qwen3"), prompts, jnp.asarray(padded))
    np.testing.assert_allclose(long[:, :, :4], short, atol=1e-5)


def test_packed_segments_do_not_see_each_other():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 11, 4), rng.integers(0, 11, 3)
    packed = jnp.asarray([[*first, *second, 0, 0]], jnp.int32)
    segments = jnp.asarray([[1] * 4 + [2] * 3 + [0] * 2])
    got = logits_of(case("qwen3"), packed, segments)[0]
    np.testing.assert_allclose(got[:4], numpy_decoder(case("qwen3"), first), atol=2e-4)
    np.testing.assert_allclose(got[4:7], numpy_decoder(case("qwen3"), second), atol=2e-4)


@pytest.mark.parametrize("unroll", [2, 3])
def test_unrolling_the_scan_changes_nothing(unroll):
    config = dataclasses.replace(TINY, layers=3, scan_unroll=1)
    graphdef, params = nnx.split(randomised(config))
    unrolled, _ = nnx.split(
        Decoder(dataclasses.replace(config, scan_unroll=unroll), rngs=nnx.Rngs(0))
    )
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    expected = logits_of(nnx.merge(graphdef, params), tokens, None)
    got = logits_of(nnx.merge(unrolled, params), tokens, None)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_rematerialisation_changes_no_gradient():
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    params = nnx.state(case("qwen3"))

    def grads(remat):
        config = dataclasses.replace(case("qwen3").config, remat=remat)
        graphdef = nnx.graphdef(Decoder(config, rngs=nnx.Rngs(0)))

        def loss(params):
            return jnp.sum(jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens))[..., 0])

        return jax.jit(jax.grad(loss))(params)

    expected = jax.tree.leaves(grads("none"))
    for remat in ("projections", "full"):
        for a, b in zip(jax.tree.leaves(grads(remat)), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3)


def test_bfloat16_is_near_float32():
    exact, params = nnx.split(case("qwen3"))
    rough, _ = nnx.split(
        Decoder(
            dataclasses.replace(case("qwen3").config, compute_dtype="bfloat16"), rngs=nnx.Rngs(0)
        )
    )
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 1, 5)
    prompts = left_padded([4, 2], 4)
    expected = completion_logits(nnx.merge(exact, params), prompts, tokens)
    got = completion_logits(nnx.merge(rough, params), prompts, tokens)
    assert got.dtype == jnp.float32
    assert 1e-6 < np.max(np.abs(got - expected)) < 0.1 * np.max(np.abs(expected))


# --- scalar models ------------------------------------------------------------------------------


def scalar_model(heads=("reward", "cost")) -> ScalarModel:
    model = ScalarModel(TINY, heads=heads, rngs=nnx.Rngs(0))
    model.kernel[...] = jax.random.normal(jax.random.key(3), model.kernel[...].shape)
    model.bias[...] = jnp.arange(1.0, len(heads) + 1)
    return model


def test_scores_are_read_at_the_last_real_token():
    model = scalar_model()
    tokens = jnp.asarray([[3, 1, 4, 1, 5], [0, 0, 2, 7, 1], [6, 2, 0, 0, 0]], jnp.int32)
    segments = jnp.asarray([[1] * 5, [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    got = nnx.jit(ScalarModel.scores)(model, tokens, segments)
    for row, real in zip(got, ([3, 1, 4, 1, 5], [2, 7, 1], [6, 2]), strict=True):
        hidden = numpy_hidden(model.trunk, real)[-1]
        expected = hidden @ np.asarray(model.kernel[...]) + np.asarray(model.bias[...])
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_values_are_those_of_the_state_before_each_token():
    model, prompts = scalar_model(), left_padded([3, 1], 3)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 2, 4)), jnp.int32)
    values = nnx.jit(ScalarModel.completion_values)(model, prompts, tokens)
    assert values.shape == (2, 2, 4, 2)
    changed = nnx.jit(ScalarModel.completion_values)(model, prompts, tokens.at[:, :, 2].set(10))
    np.testing.assert_array_equal(changed[:, :, :3], values[:, :, :3])
    assert np.all(
        np.max(np.abs(changed[:, :, 3] - values[:, :, 3]), -1)[tokens[:, :, 2] != 10] > 1e-4
    )


def test_a_new_critic_has_no_opinion_and_needs_a_head():
    model = ScalarModel(TINY, heads=("reward",), rngs=nnx.Rngs(0))
    tokens = jnp.ones((2, 2, 4), jnp.int32)
    values = nnx.jit(ScalarModel.completion_values)(model, left_padded([3, 1], 3), tokens)
    np.testing.assert_array_equal(values, np.zeros((2, 2, 4, 1)))
    with pytest.raises(ValueError, match="at least one head"):
        ScalarModel(TINY, heads=(), rngs=nnx.Rngs(0))


# --- gradients ----------------------------------------------------------------------------------


def test_gradients_are_finite_beside_padding_and_reach_every_parameter():
    graphdef, params = nnx.split(case("multi_head"))
    tokens = jnp.asarray([[0, 0, 3, 1, 4], [0, 0, 0, 0, 0]], jnp.int32)  # an empty row, too
    segments = jnp.asarray([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])

    def loss(params):
        logits = nnx.merge(graphdef, params)(tokens, segments)
        return jnp.sum(
            jnp.where(segments[..., None] != 0, jax.nn.log_softmax(logits)[..., :5], 0.0)
        )

    grads = jax.jit(jax.grad(loss))(params)
    for path, g in nnx.to_flat_state(grads):
        assert np.all(np.isfinite(g[...])), path
        assert np.any(g[...] != 0) or path[-1] == "key_bias", path  # softmax ignores a key's shift
