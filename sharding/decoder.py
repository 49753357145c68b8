"""Decoders as JAX programs: what `transformer` describes, as code that a compiler takes.

Plain functions of a pytree of parameters, with layers under one `scan`: a loss, a prefill that
fills a cache, and a decoding step that reads it. Scores of attention are materialised
(`TransformerConfig.flash` is about kernels, which no portable program has), and experts have a
fixed capacity (GShard, arXiv:2006.16668).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sharding.execution.execute import train_step
from sharding.programs.transformer import TransformerConfig

# Rows that an expert computes for each row routed to it on average, where nothing else is said.
_CAPACITY = 1.25
_EPSILON = 1e-6
_THETA = 500_000.0
_MASKED = -1e30
# What is described but not written as a program, and the value that leaves it out.
_UNWRITTEN: Mapping[str, Any] = {
    "window": 0, "query_rank": 0, "kv_rank": 0, "dense_layers": 0, "precision": "bf16",
    "adapters_only": False,
}  # fmt: skip

Params = dict[str, Any]


def decoder_params(config: TransformerConfig) -> Params:
    """Shapes of a decoder's parameters; layers are stacked along a leading axis.

    Raises:
      ValueError: the description has something that is not written as a program.
    """
    clash = {name: getattr(config, name) for name, value in _UNWRITTEN.items()
             if getattr(config, name) != value}  # fmt: skip
    if clash:
        raise ValueError(f"{config.name} has {clash}, which is described but not a program; take "
                         "a model of uniform layers, as llama3-8b or mixtral-8x7b")  # fmt: skip
    size = config.dims
    embed, vocab, head = size["embed"], size["vocab"], size["head_dim"]
    dtype = jnp.dtype(config.weight_dtype)

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def layers(*shape: int) -> jax.ShapeDtypeStruct:
        return leaf(config.layers, *shape)

    def feed_forward(width: int, *experts: int) -> Params:
        found = {"up": layers(*experts, embed, width), "down": layers(*experts, width, embed)}
        return found | ({"gate": layers(*experts, embed, width)} if config.gated else {})

    stacked: Params = {
        "norm_1": layers(embed),
        "norm_2": layers(embed),
        "query": layers(embed, size["heads"], head),
        "key": layers(embed, size["kv_heads"], head),
        "value": layers(embed, size["kv_heads"], size["value_dim"]),
        "out": layers(size["heads"], size["value_dim"], embed),
    }
    if config.experts:
        stacked["router"] = layers(embed, config.experts)
        stacked["experts"] = feed_forward(size["moe_mlp"], config.experts)
        if config.shared_experts:
            stacked["shared"] = feed_forward(size["shared_mlp"])
    else:
        stacked["mlp"] = feed_forward(config.d_ff)
    params: Params = {"embed": leaf(vocab, embed), "norm": leaf(embed), "layers": stacked}
    if not config.rotary:
        params["positions"] = leaf(config.seq_len, embed)
    return params | ({} if config.tied else {"head": leaf(embed, vocab)})


def decoder_cache(config: TransformerConfig, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the keys and values [layers, batch, kv heads, length, width] of a batch.

    Heads stand before positions, as the products of attention read them: in another order a
    compiler copies the whole cache first.
    """
    size = config.dims
    dtype = jnp.dtype(config.compute_dtype)
    shape = (config.layers, config.global_batch, size["kv_heads"], length)
    return {
        "key": jax.ShapeDtypeStruct((*shape, size["head_dim"]), dtype),
        "value": jax.ShapeDtypeStruct((*shape, size["value_dim"]), dtype),
    }


def decoder_loss(config: TransformerConfig) -> Callable[[Params, jax.Array], jax.Array]:
    """(parameters, tokens int32 [batch, length + 1]) -> mean cross entropy of the next token."""

    def loss(params: Params, tokens: jax.Array) -> jax.Array:
        params = _computing(params, config)
        x = _embedded(params, tokens[:, :-1], jnp.arange(tokens.shape[1] - 1))
        x, _ = jax.lax.scan(lambda x, w: (_layer(config, x, w)[0], None), x, params["layers"])
        logits = _logits(params, x, config).astype(jnp.float32)
        # Compared, not looked up: a look-up along a divided vocabulary would gather the logits.
        is_next = jnp.arange(config.vocab)[None, None] == tokens[:, 1:, None]
        chosen = jnp.sum(jnp.where(is_next, logits, 0.0), axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    loss.__name__ = config.name
    return loss


def decoder_prefill(config: TransformerConfig) -> Callable[[Params, jax.Array], Any]:
    """(parameters, tokens [batch, length]) -> (logits [batch, vocab] of the last, cache)."""

    def prefill(params: Params, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = _computing(params, config)
        x = _embedded(params, tokens, jnp.arange(tokens.shape[1]))
        x, (key, value) = jax.lax.scan(functools.partial(_layer, config), x, params["layers"])
        return _logits(params, x[:, -1:], config)[:, 0], {"key": key, "value": value}

    prefill.__name__ = f"{config.name} prefill"
    return prefill


def decoder_step(config: TransformerConfig) -> Callable[..., Any]:
    """(parameters, cache, tokens [batch, 1], position) -> (logits [batch, vocab], cache).

    The token is at `position`, an int32 scalar; what the cache holds from there on is not read.
    """

    def step(
        params: Params, cache: dict[str, jax.Array], tokens: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = _computing(params, config)

        def layer(carry: Any, slices: Any) -> tuple[Any, None]:
            x, key, value = carry
            weights, index = slices
            # The cache goes round whole and is written in place: stacked slices would be a copy.
            x, (key, value) = _layer(config, x, weights, (key, value), (index, position))
            return (x, key, value), None

        carry = _embedded(params, tokens, position[None]), cache["key"], cache["value"]
        indices = jnp.arange(config.layers)
        (x, key, value), _ = jax.lax.scan(layer, carry, (params["layers"], indices))
        return _logits(params, x, config)[:, 0], {"key": key, "value": value}

    step.__name__ = f"{config.name} decode"
    return step


def decoder_problem(config: TransformerConfig) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What a description describes, as a step and the shapes of its arguments.

    A train step with AdamW, or a prefill.
    """
    params = decoder_params(config)
    batch, length = config.global_batch, config.seq_len
    if not config.training:
        return decoder_prefill(config), (params, jax.ShapeDtypeStruct((batch, length), jnp.int32))
    step = train_step(decoder_loss(config), optax.adamw(1e-4))
    state = jax.eval_shape(step.optimizer.init, params)
    return step, (params, state, jax.ShapeDtypeStruct((batch, length + 1), jnp.int32))


def _computing(params: Params, config: TransformerConfig) -> Params:
    return jax.tree.map(lambda x: x.astype(config.compute_dtype), params)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + _EPSILON)
    return wide.astype(x.dtype) * jnp.broadcast_to(scale, x.shape)


def _embedded(params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    x = jnp.take(params["embed"], tokens, axis=0)
    if "positions" in params:
        x = x + jnp.broadcast_to(jnp.take(params["positions"], positions, axis=0)[None], x.shape)
    return x


def _logits(params: Params, x: jax.Array, config: TransformerConfig) -> jax.Array:
    x = _norm(x, params["norm"])
    if config.tied:
        return jnp.einsum("bsd,vd->bsv", x, params["embed"])
    return jnp.einsum("bsd,dv->bsv", x, params["head"])


def _layer(
    config: TransformerConfig,
    x: jax.Array,
    w: Params,
    cache: tuple[jax.Array, jax.Array] | None = None,
    place: tuple[Any, Any] = (0, 0),
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """A layer on x [batch, length, width]; also its keys and values, or the cache with them.

    `place` is the layer within the cache and the position of the first token.
    """
    index, position = place
    h = _norm(x, w["norm_1"])
    query = jnp.einsum("bsd,dhk->bshk", h, w["query"])
    key = jnp.einsum("bsd,dhk->bshk", h, w["key"])
    value = jnp.einsum("bsd,dhk->bshk", h, w["value"])
    if config.rotary:
        query, key = _rotated(query, position), _rotated(key, position)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    kept = key, value
    if cache is not None:
        kept = _written(cache[0], key, place), _written(cache[1], value, place)
        key, value = (jax.lax.dynamic_index_in_dim(held, index, keepdims=False) for held in kept)
    attended = _attention(query, key, value, position)
    x = x + jnp.einsum("bshk,hkd->bsd", attended, w["out"])
    h = _norm(x, w["norm_2"])
    if "mlp" in w:
        return x + _feed_forward(h, w["mlp"]), kept
    y = _routed(config, h, w)
    if "shared" in w:
        y = y + _feed_forward(h, w["shared"])
    return x + y, kept


def _written(cache: jax.Array, new: jax.Array, place: tuple[Any, Any]) -> jax.Array:
    """A cache [layers, batch, heads, length, width] with keys or values of a layer written."""
    index, position = place
    return jax.lax.dynamic_update_slice(cache, new[None], (index, 0, 0, position, 0))


def _rotated(x: jax.Array, position: jax.Array | int) -> jax.Array:
    """Rotary positions (arXiv:2104.09864) of x [batch, length, heads, width], halves paired."""
    half = x.shape[-1] // 2
    frequency = _THETA ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (position + jnp.arange(x.shape[1]))[:, None].astype(jnp.float32) * frequency[None]
    sin, cos = jnp.sin(angle)[None, :, None], jnp.cos(angle)[None, :, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, position: jax.Array | int
) -> jax.Array:
    """Causal attention of queries [batch, length, heads, width] from `position` on.

    Keys and values are [batch, kv heads, length, width]; several query heads share one.
    Heads come first in both products: whatever order a product writes its scores in, a compiler
    that keeps them for the backward pass would else copy them all into the order that is read.
    """
    batch, length, heads, width = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    heads_first = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(query, key, (((4,), (3,)), heads_first)).astype(jnp.float32)
    visible = (position + jnp.arange(length))[:, None] >= jnp.arange(key.shape[2])[None]
    scores = jnp.where(visible[None, None, None], scores / math.sqrt(width), _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    attended = jax.lax.dot_general(weights, value, (((4,), (2,)), heads_first))
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, value.shape[-1])


def _feed_forward(x: jax.Array, w: Params) -> jax.Array:
    up = jnp.einsum("...d,df->...f", x, w["up"])
    hidden = jax.nn.silu(jnp.einsum("...d,df->...f", x, w["gate"])) * up if "gate" in w else (
        jax.nn.gelu(up))  # fmt: skip
    return jnp.einsum("...f,fd->...d", hidden, w["down"])


def _routed(config: TransformerConfig, x: jax.Array, w: Params) -> jax.Array:
    """Experts of a fixed capacity: each sequence sends its tokens by one-hot products."""
    length, count, chosen = x.shape[1], config.experts, config.experts_per_token
    room = max(1, math.ceil((config.capacity or _CAPACITY) * length * chosen / count))
    scores = jax.nn.softmax(jnp.einsum("bsd,de->bse", x, w["router"]).astype(jnp.float32), axis=-1)
    gates, experts = jax.lax.top_k(scores, chosen)
    mine = jax.nn.one_hot(experts, count, dtype=jnp.float32)  # [batch, length, chosen, experts]
    flat = mine.reshape(x.shape[0], length * chosen, count)
    place = ((jnp.cumsum(flat, axis=1) - flat) * flat).sum(-1).reshape(gates.shape)
    slot = jax.nn.one_hot(place.astype(jnp.int32), room, dtype=x.dtype)  # zero beyond the room
    mine = mine.astype(x.dtype)
    sent = jnp.einsum("bske,bskc->bsec", mine, slot)
    back = jnp.einsum("bske,bskc->bsec", mine * gates[..., None].astype(x.dtype), slot)
    rows = jnp.einsum("bsec,bsd->ebcd", sent, x)
    up = jnp.einsum("ebcd,edf->ebcf", rows, w["experts"]["up"])
    hidden = jax.nn.gelu(up)
    if "gate" in w["experts"]:
        hidden = jax.nn.silu(jnp.einsum("ebcd,edf->ebcf", rows, w["experts"]["gate"])) * up
    out = jnp.einsum("ebcf,efd->ebcd", hidden, w["experts"]["down"])
    return jnp.einsum("bsec,ebcd->bsd", back, out)
