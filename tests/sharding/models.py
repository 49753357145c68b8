"""Small programs that know nothing of the planner: a decoder, a mixture of experts, an MLP."""

import jax
import jax.numpy as jnp

KV_HEADS, HEAD = 2, 4


def _normal(key, *shape):
    return jax.random.normal(key, shape) * 0.2


def decoder_params(key, *, layers=4, width=16, heads=4, hidden=32, vocab=24):
    keys = jax.random.split(key, 9)
    return {
        "embed": _normal(keys[0], vocab, width),
        "head": _normal(keys[1], width, vocab),
        "layers": {
            "norm": jnp.ones((layers, width)),
            "query": _normal(keys[2], layers, width, heads * HEAD),
            "key": _normal(keys[3], layers, width, KV_HEADS * HEAD),
            "value": _normal(keys[4], layers, width, KV_HEADS * HEAD),
            "out": _normal(keys[5], layers, heads * HEAD, width),
            "gate": _normal(keys[6], layers, width, hidden),
            "up": _normal(keys[7], layers, width, hidden),
            "down": _normal(keys[8], layers, hidden, width),
        },
    }


def _attention(x, w):
    batch, length, _ = x.shape
    query = (x @ w["query"]).reshape(batch, length, KV_HEADS, -1, HEAD)
    key = (x @ w["key"]).reshape(batch, length, KV_HEADS, HEAD)
    value = (x @ w["value"]).reshape(batch, length, KV_HEADS, HEAD)
    scores = jnp.einsum("bskgd,btkd->bkgst", query, key) / HEAD**0.5
    visible = jnp.tri(length, dtype=bool)[None, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e9), -1)
    out = jnp.einsum("bkgst,btkd->bskgd", weights, value)
    return out.reshape(batch, length, -1) @ w["out"]


def _layer(x, w):
    scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    x = x + _attention(x * scale * w["norm"][None, None], w)
    return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def _next_token(logits, tokens):
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean()


def decoder_loss(params, tokens):
    x = jnp.take(params["embed"], tokens[:, :-1], axis=0)
    x, _ = jax.lax.scan(lambda x, w: (_layer(x, w), None), x, params["layers"])
    return _next_token(x @ params["head"], tokens)


def experts_params(key, *, layers=2, width=16, hidden=32, experts=4, vocab=24):
    keys = jax.random.split(key, 5)
    return {
        "embed": _normal(keys[0], vocab, width),
        "head": _normal(keys[1], width, vocab),
        "layers": {
            "router": _normal(keys[2], layers, width, experts),
            "up": _normal(keys[3], layers, experts, width, hidden),
            "down": _normal(keys[4], layers, experts, hidden, width),
        },
    }


def experts_loss(params, tokens):
    """Every token to every expert, weighted: dense dispatch, the simplest that has experts."""

    def layer(x, w):
        weights = jax.nn.softmax(x @ w["router"], -1)
        rows = jnp.einsum("bse,bsd->ebsd", weights, x)
        hidden = jax.nn.silu(jnp.einsum("ebsd,edf->ebsf", rows, w["up"]))
        return x + jnp.einsum("ebsf,efd->bsd", hidden, w["down"]), None

    x = jnp.take(params["embed"], tokens[:, :-1], axis=0)
    x, _ = jax.lax.scan(layer, x, params["layers"])
    return _next_token(x @ params["head"], tokens)


def tokens(key, *, batch=16, length=17, vocab=24):
    return jax.random.randint(key, (batch, length), 0, vocab)
