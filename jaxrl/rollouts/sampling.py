"""How one token is drawn from logits."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jaxrl.policy import token_log_probs

_EXCLUDED = -1e30


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn.

    Attributes:
      max_new_tokens: longest completion, its end-of-sequence token included.
      eos_id: token that ends a completion.
      pad_id: token that stands after the end.
      temperature: divides the logits; > 0.
      top_k: draw from the k likeliest tokens only; 0 draws from all.
      top_p: draw from the smallest set of tokens whose probability reaches p, in (0, 1].
      greedy: take the likeliest token; log-probabilities are still those at `temperature`.
    """

    max_new_tokens: int
    eos_id: int
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be ≥ 1, got {self.max_new_tokens}")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature}; use greedy=True for argmax"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be ≥ 0 (0 draws from all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def truncate(
    scaled: Float32[Array, "*batch V"], *, top_k: int, top_p: float
) -> Float32[Array, "*batch V"]:
    """Excludes tokens outside the top k and, of what is left, outside the nucleus of mass p.

    Args:
      scaled: logits divided by the temperature.
      top_k: 0 keeps all. Tokens that tie with the k-th are kept.
      top_p: 1 keeps all. The token that crosses p is kept (arXiv:1904.09751), and so are those
        that tie with it.
    """
    vocab = scaled.shape[-1]
    if 0 < top_k < vocab:
        kth = jax.lax.top_k(scaled, top_k)[0][..., -1:]
        scaled = jnp.where(scaled < kth, _EXCLUDED, scaled)
    if top_p < 1:
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.cumsum(probs, axis=-1) - probs < top_p
        threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < threshold, _EXCLUDED, scaled)
    return scaled


def categorical(
    uniforms: Float32[Array, "2 *batch"], scaled: Float32[Array, "*batch V"]
) -> Int32[Array, "*batch"]:
    """One token of each row, drawn from softmax(scaled).

    By inversion in two levels: first a block of about √V tokens, then a token of it, each with a
    random number of its own. The Gumbel trick needs V random numbers and 2 V logarithms a row:
    on CPU it took twenty times as long.

    Args:
      uniforms: independent, in [0, 1).
      scaled: logits divided by the temperature. Those 104 below the largest are never drawn.

    >>> categorical(jnp.array([[0.0, 0.9], [0.5, 0.5]]), jnp.log(jnp.array([[0.2, 0.8]] * 2)))
    Array([1, 1], dtype=int32)
    """
    *batch, vocab = scaled.shape
    width = math.isqrt(vocab - 1) + 1
    count = -(-vocab // width)
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0)] * len(batch) + [(0, count * width - vocab)])
    blocks = weights.reshape(*batch, count, width)
    block = _invert(uniforms[0], jnp.sum(blocks, axis=-1))
    chosen = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * width + _invert(uniforms[1], chosen)


def _invert(
    uniform: Float32[Array, "*batch"], weights: Float32[Array, "*batch S"]
) -> Int32[Array, "*batch"]:
    """First index whose cumulated weight exceeds `uniform` of the whole; its weight is not 0."""
    cumulated = jnp.cumsum(weights, axis=-1)
    passed = cumulated <= (uniform * cumulated[..., -1])[..., None]
    return jnp.sum(passed, axis=-1, dtype=jnp.int32)


def draw(
    uniforms: Float32[Array, "2 *batch"], logits: Float32[Array, "*batch V"], sampling: Sampling
) -> tuple[Int32[Array, "*batch"], Float32[Array, "*batch"]]:
    """One token of each row, with its log-probability.

    Args:
      uniforms: independent, in [0, 1); see `categorical`.
      logits: of the next token.
      sampling: how to draw.

    Returns:
      Tokens, and their log-probabilities under the full distribution at the sampling
      temperature, before top-k and top-p.
    """
    if sampling.greedy:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        scaled = logits / sampling.temperature
        scaled = truncate(scaled, top_k=sampling.top_k, top_p=sampling.top_p)
        tokens = categorical(uniforms, scaled)
    return tokens, token_log_probs(logits, tokens, temperature=sampling.temperature)
