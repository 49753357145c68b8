"""Decoders as programs: their sizes are the description's, and all three modes agree."""

import jax
import jax.numpy as jnp
import pytest

from sharding.decoder import (
    decoder_cache,
    decoder_loss,
    decoder_params,
    decoder_prefill,
    decoder_step,
)
from sharding.programs.transformer import TransformerConfig, transformer

SIZES = {"layers": 2, "d_model": 32, "heads": 4, "kv_heads": 2, "d_ff": 64, "vocab": 50,
         "seq_len": 8, "global_batch": 3, "compute_dtype": "float32"}  # fmt: skip
DENSE = TransformerConfig(**SIZES)
EXPERTS = TransformerConfig(**SIZES, experts=4, experts_per_token=2, shared_experts=1, capacity=8.0)
PLAIN = TransformerConfig(**SIZES, tied=True, gated=False, rotary=False)
KEY = jax.random.key(0)


def _params(config):
    leaves, structure = jax.tree.flatten(decoder_params(config))
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(
        structure,
        [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)],
    )


@pytest.mark.parametrize("config", [DENSE, EXPERTS, PLAIN], ids=["dense", "experts", "plain"])
def test_parameters_are_those_of_the_description(config):
    count = sum(x.size for x in jax.tree.leaves(decoder_params(config)))
    assert count == transformer(config).parameter_count


@pytest.mark.parametrize("config", [DENSE, EXPERTS, PLAIN], ids=["dense", "experts", "plain"])
def test_decoding_one_by_one_is_the_prefill(config):
    params = _params(config)
    tokens = jax.random.randint(KEY, (3, 8), 0, 50)
    logits, filled = decoder_prefill(config)(params, tokens)
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), decoder_cache(config, 8))
    step = jax.jit(decoder_step(config))
    for i in range(8):
        last, cache = step(params, cache, tokens[:, i : i + 1], jnp.int32(i))
    assert jnp.allclose(last, logits, atol=1e-5)
    assert all(jnp.allclose(cache[name], filled[name], atol=1e-5) for name in cache)


def test_the_loss_is_the_cross_entropy_of_the_prefill():
    params = _params(DENSE)
    tokens = jax.random.randint(KEY, (3, 9), 0, 50)
    prefill = decoder_prefill(DENSE)
    expected = -jnp.mean(jnp.stack([
        jnp.take_along_axis(jax.nn.log_softmax(prefill(params, tokens[:, : i + 1])[0]),
                            tokens[:, i + 1, None], axis=-1)[:, 0]
        for i in range(8)
    ]))  # fmt: skip
    assert decoder_loss(DENSE)(params, tokens) == pytest.approx(float(expected), rel=1e-5)


def test_rows_beyond_an_experts_capacity_are_dropped():
    """Without room for any but its first rows, an expert's output is that of fewer tokens."""
    small = TransformerConfig(**SIZES, experts=4, experts_per_token=2, capacity=0.25)
    large = TransformerConfig(**SIZES, experts=4, experts_per_token=2, capacity=8.0)
    params = _params(large)
    tokens = jax.random.randint(KEY, (3, 9), 0, 50)
    assert decoder_loss(small)(params, tokens) != decoder_loss(large)(params, tokens)


def test_what_is_described_but_no_program_is_said():
    config = TransformerConfig(**SIZES, window=4)
    with pytest.raises(ValueError, match=r"window.*uniform layers, as llama3-8b"):
        decoder_params(config)
