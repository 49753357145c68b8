"""Grouped-query attention in plain XLA, in the layouts that reinforcement learning needs.

Queries are [..., heads, head_dim], keys and values [..., kv_heads, head_dim]; scores and
softmax are float32 whatever the compute dtype. What a layout shares it computes once: the G
completions of a prompt attend to one copy of the prompt's keys and values.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxrl.models.attention.pattern import Pattern
from jaxrl.models.cache import CachedKeyValue, KeyValue

_MASKED = -1e30  # finite: a padding query, which sees nothing, must not become NaN


Window = int | Int32[Array, ""] | None
"""Tokens that a query sees backwards, itself included; an array where layers differ."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How scores come of queries and keys, the same in every layer.

    Attributes:
      scale: what query · key is multiplied by; None is 1/√head_dim.
      softcap: c of c·tanh(score / c), before the mask (Gemma 2, arXiv:2408.00118); None: none.
    """

    scale: float | None = None
    softcap: float | None = None

    def cap(self, scores: Float32[Array, "*batch S"]) -> Float32[Array, "*batch S"]:
        if self.softcap is None:
            return scores
        return jnp.tanh(scores / self.softcap) * self.softcap


_PLAIN = Scores()


def with_groups(
    query: Float[Array, "*batch Q d"], kv_heads: int, rule: Scores
) -> Float[Array, "*batch K h d"]:
    """Splits query heads into groups that share one key head, scaled."""
    *batch, heads, head_dim = query.shape
    scale = head_dim**-0.5 if rule.scale is None else rule.scale
    scaled = query * jnp.asarray(scale, query.dtype)
    return scaled.reshape(*batch, kv_heads, heads // kv_heads, head_dim)


def ungrouped(out: Float[Array, "*batch K h d"]) -> Float[Array, "*batch Q d"]:
    """Undoes `with_groups`, but for the scale."""
    *batch, kv_heads, group, head_dim = out.shape
    return out.reshape(*batch, kv_heads * group, head_dim)


def rows(
    query: Float[Array, "N S Q d"],
    kv: KeyValue,
    segments: Int32[Array, "N S"],
    pattern: Pattern,
    *,
    rule: Scores = _PLAIN,
    window: Window = None,
) -> Float[Array, "N S Q d"]:
    """Attention of whole rows; of a prompt's row with completions in two blocks.

    Args:
      query: rotated queries.
      kv: rotated keys, and values, [N, S, K, d].
      segments: 0 marks padding; a column sees columns of its own segment only.
      pattern: prompt and completions of the rows; its window is not read.
      rule: scale and soft cap of the scores.
      window: how many tokens a query sees backwards.
    """
    options = {"rule": rule, "window": window}
    if not pattern.completion:
        return causal(query, kv, segments, **options)
    batch, start = query.shape[0], pattern.prompt

    def split(x):  # [B, P + G·T, …] -> [B, P, …], [B, G, T, …]
        own = x[:, start:].reshape(batch, -1, pattern.completion, *x.shape[2:])
        return x[:, :start], own

    (q_prompt, q_own), (k_prompt, k_own), (v_prompt, v_own) = map(split, (query, *kv))
    prompt, of_prompt = KeyValue(k_prompt, v_prompt), segments[:, :start]
    out_prompt = causal(q_prompt, prompt, of_prompt, **options)
    own = KeyValue(k_own, v_own)
    out_own = after_prompt(q_own, prompt, of_prompt != 0, own, **options)
    out_own = out_own.reshape(batch, -1, *query.shape[2:])
    return jnp.concatenate([out_prompt, out_own], axis=1)


def causal(
    query: Float[Array, "N S Q d"],
    kv: KeyValue,
    segments: Int32[Array, "N S"],
    *,
    rule: Scores = _PLAIN,
    window: Window = None,
) -> Float[Array, "N S Q d"]:
    """Causal attention within segments.

    Args:
      query: rotated queries.
      kv: rotated keys, and values, [N, S, K, d].
      segments: 0 marks padding; a token sees earlier tokens of its own segment only.
      rule: scale and soft cap of the scores.
      window: how many tokens of these it sees.
    """
    visible = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] != 0)
    visible &= jnp.tri(query.shape[1], dtype=bool)[None]
    if window is not None:
        column = jnp.arange(query.shape[1])
        visible &= (column[:, None] - column[None] < window)[None]
    grouped = with_groups(query, kv.key.shape[-2], rule)
    scores = jnp.einsum("nskhd,ntkd->nkhst", grouped, kv.key, preferred_element_type=jnp.float32)
    weights = _softmax(rule.cap(scores), visible[:, None, None]).astype(query.dtype)
    return ungrouped(jnp.einsum("nkhst,ntkd->nskhd", weights, kv.value))


def after_prompt(
    query: Float[Array, "B G T Q d"],
    prompt: KeyValue,
    prompt_mask: Bool[Array, "B P"],
    own: KeyValue,
    *,
    rule: Scores = _PLAIN,
    window: Window = None,
) -> Float[Array, "B G T Q d"]:
    """Completions attend to their whole prompt, and causally to themselves.

    Args:
      query: rotated queries of the completions.
      prompt: keys and values of the prompts, [B, P, K, d].
      prompt_mask: True on real prompt tokens.
      own: keys and values of the completions, [B, G, T, K, d]. Padding stands on the right,
        where causality hides it from every real token.
      rule: scale and soft cap of the scores.
      window: how many tokens a query sees backwards.
    """
    grouped = with_groups(query, own.key.shape[-2], rule)
    to_prompt = jnp.einsum(
        "bgtkhd,bpkd->bkghtp", grouped, prompt.key, preferred_element_type=jnp.float32
    )
    to_own = jnp.einsum(
        "bgtkhd,bgskd->bkghts", grouped, own.key, preferred_element_type=jnp.float32
    )
    visible = jnp.broadcast_to(prompt_mask[:, None, None, None, None, :], to_prompt.shape)
    causal_mask = jnp.broadcast_to(jnp.tri(query.shape[2], dtype=bool), to_own.shape)
    if window is not None:  # a prompt ends in the column before its completions begin
        query_at = jnp.arange(query.shape[2])[:, None]
        prompt_at = jnp.arange(prompt_mask.shape[1])[None] - prompt_mask.shape[1]
        visible &= _as_rank(query_at - prompt_at < window, visible.ndim)
        causal_mask &= _as_rank(query_at - jnp.arange(query.shape[2])[None] < window, visible.ndim)
    weights = _softmax(
        rule.cap(jnp.concatenate([to_prompt, to_own], axis=-1)),
        jnp.concatenate([visible, causal_mask], axis=-1),
    ).astype(query.dtype)
    on_prompt, on_own = jnp.split(weights, [to_prompt.shape[-1]], axis=-1)
    out = jnp.einsum("bkghtp,bpkd->bgtkhd", on_prompt, prompt.value)
    out += jnp.einsum("bkghts,bgskd->bgtkhd", on_own, own.value)
    return ungrouped(out)


def one_token(
    query: Float[Array, "B G Q d"],
    prompt: CachedKeyValue,
    prompt_mask: Bool[Array, "B P"],
    own: CachedKeyValue,
    step: Int32[Array, ""],
    *,
    rule: Scores = _PLAIN,
    window: Window = None,
) -> Float[Array, "B G Q d"]:
    """The newest token of each completion attends to its prompt and to what it wrote so far.

    Args:
      query: rotated queries of the newest token.
      prompt: keys [B, K, d, P] and values [B, K, P, d] of the prompts.
      prompt_mask: True on real prompt tokens.
      own: keys [B, K, G, d, T] and values [B, K, G, T, d] of the completions; what follows
        `step` is not yet written.
      step: index of the newest token.
      rule: scale and soft cap of the scores.
      window: how many tokens a query sees backwards.
    """
    grouped = jnp.swapaxes(with_groups(query, own.key.shape[1], rule), 1, 2)  # [B, K, G, h, d]
    lead, head_dim = grouped.shape[:-1], grouped.shape[-1]
    together = (*lead[:2], -1)  # the completions of a prompt are rows of one product
    to_prompt = _scores(grouped.reshape(*together, head_dim), prompt.key).reshape(*lead, -1)
    to_own = _scores(grouped, own.key)
    visible = jnp.broadcast_to(prompt_mask[:, None, None, None, :], to_prompt.shape)
    own_at = jnp.arange(to_own.shape[-1])
    written = jnp.broadcast_to(own_at <= step, to_own.shape)
    if window is not None:
        prompt_at = jnp.arange(prompt_mask.shape[1]) - prompt_mask.shape[1]
        visible &= _as_rank(step - prompt_at < window, visible.ndim)
        written &= _as_rank(step - own_at < window, written.ndim)
    weights = _softmax(
        rule.cap(jnp.concatenate([to_prompt, to_own], axis=-1)),
        jnp.concatenate([visible, written], axis=-1),
    ).astype(query.dtype)
    on_prompt, on_own = jnp.split(weights, [to_prompt.shape[-1]], axis=-1)
    of_prompt = on_prompt.reshape(*together, on_prompt.shape[-1]) @ prompt.value
    out = of_prompt.reshape(grouped.shape) + on_own @ own.value
    return ungrouped(jnp.swapaxes(out, 1, 2))


def _as_rank(mask: Bool[Array, "*tail"], rank: int) -> Bool[Array, "..."]:
    return mask.reshape((1,) * (rank - mask.ndim) + mask.shape)


def _scores(
    query: Float[Array, "*batch N d"], key: Float[Array, "*batch d S"]
) -> Float32[Array, "*batch N S"]:
    return jnp.matmul(query, key, preferred_element_type=jnp.float32)


def _softmax(
    scores: Float32[Array, "*batch S"], visible: Bool[Array, "*#batch S"]
) -> Float32[Array, "*batch S"]:
    return jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1)
