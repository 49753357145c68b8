"""Attention on NVIDIA GPUs by cuDNN's fused kernels, through `jax.nn.dot_product_attention`.

They know causal rows that end in padding, a window, and any mask as a bias. They do not know the
row of a prompt with several completions: here every completion attends as one sequence with its
prompt. Two calls, to the prompt and to itself, could share the prompt, but to join them takes the
gradient of their log-sum-exp, which JAX's call does not give. So keys, values and queries of the
prompt are repeated for the time of a layer; the scores, which grow with the square of the length,
never are in memory.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

import sharding
from jaxrl.models.attention import planned
from jaxrl.models.attention.pattern import Pattern
from jaxrl.models.attention.plain import Scores
from jaxrl.models.cache import KeyValue

_MULTIPLE = 8  # of columns, and of a head's width
_WIDEST = 256  # head
_TILE = 128  # rows and columns of scores that a thread block holds
_HIDDEN = -1e9


def obstacle(
    query: Float[Array, "N S Q d"], kv: KeyValue, pattern: Pattern, *, rule: Scores, packed: bool
) -> str:
    """Why cuDNN cannot compute this attention and its gradient; "" if it can."""
    if rule.softcap is not None:
        return "cuDNN has no soft cap"
    if sharding.planned_for() is not None:  # cuDNN is not here to be asked
        return _limits(query)

    def loss(query, kv):
        segments = jnp.ones(query.shape[:2], jnp.int32)
        out = attend(query, kv, segments, pattern, rule=rule, packed=packed)
        return jnp.sum(out, dtype=jnp.float32)

    try:  # what it takes depends on its version and on the chip: the call itself says it best
        jax.eval_shape(jax.grad(loss, argnums=(0, 1)), query, kv)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"cuDNN refuses: {error}"
    return ""


def _limits(query: Float[Array, "N S Q d"]) -> str:
    """What cuDNN 9 takes on Hopper and later, by the checks of JAX's call; "" if this is it."""
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"cuDNN takes float16 and bfloat16, not {query.dtype}"
    if query.shape[-1] > _WIDEST or query.shape[-1] % _MULTIPLE:
        return f"cuDNN takes heads up to {_WIDEST} in multiples of {_MULTIPLE}: {query.shape[-1]}"
    return ""


def attend(
    query: Float[Array, "N S Q d"],
    kv: KeyValue,
    segments: Int32[Array, "N S"],
    pattern: Pattern,
    *,
    rule: Scores,
    packed: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "N S Q d"]:
    """Attention of whole rows.

    Args:
      query: rotated queries, float16 or bfloat16.
      kv: rotated keys, and values, [N, S, K, d].
      segments: 0 marks padding; a column sees columns of its own segment only.
      pattern: which columns see which, besides.
      rule: the scale of the scores; no soft cap.
      packed: a row may hold several segments. They become a mask, one [S, S] for all heads of a
        row; without, what is real of a row stands together, and no mask is made.
      implementation: "xla" runs the same call without cuDNN.
    """
    if sharding.planned_for() is None:
        run = partial(jax.nn.dot_product_attention, implementation=implementation)
    else:
        run = _read_by_planner
    if packed:
        size = query.shape[1]
        query, kv, segments = jax.tree.map(_even, (query, kv, segments))
        columns = jnp.arange(query.shape[1])
        visible = pattern.visible(columns[:, None], columns[None])
        same = (segments[:, :, None] == segments[:, None]) & visible[None]
        return run(query, *kv, mask=same[:, None], scale=rule.scale)[:, :size]
    rows = _Sequences.of(pattern, segments)
    lengths = rows.lengths
    out = run(
        rows.apart(query), rows.apart(kv.key), rows.apart(kv.value), is_causal=True,
        query_seq_lengths=lengths, key_value_seq_lengths=lengths, scale=rule.scale,
        local_window_size=None if pattern.window is None else (pattern.window - 1, 0),
    )  # fmt: skip
    return rows.joined(out)


def _read_by_planner(
    query: Float[Array, "M W Q d"],
    key: Float[Array, "M W K d"],
    value: Float[Array, "M W K d"],
    *,
    scale: float | None,
    mask: Bool[Array, "M 1 W W"] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int32[Array, " M"] | None = None,
    key_value_seq_lengths: Int32[Array, " M"] | None = None,
    local_window_size: tuple[int, int] | None = None,
) -> Float[Array, "M W Q d"]:
    """The call of `jax.nn.dot_product_attention` as the planner reads it; arguments are its."""
    assert mask is not None or (is_causal and key_value_seq_lengths is query_seq_lengths)
    size = query.shape[1]
    window = None if local_window_size is None else local_window_size[0] + 1
    pattern = Pattern(prompt=size, window=window)

    def in_length(lengths: Int32[Array, " M"]) -> Bool[Array, "M W W"]:
        columns = jnp.arange(size)
        seen = pattern.visible(columns[:, None], columns[None])[None]
        return seen & (columns[None, None] < lengths[:, None, None])

    def in_mask(bias: Float[Array, "M 1 W W"]) -> Bool[Array, "M W W"]:
        return bias[:, 0] == 0

    of_mask = mask is not None
    kernel = planned.Kernel(
        visible=in_mask if of_mask else in_length, softcap=None,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        heads_first=False, statistics=1, kernels_backward=1,
        computed=1.0 if of_mask else planned.computed_share(pattern, size, _TILE),
    )  # fmt: skip
    # JAX hands a mask to cuDNN as what is added to the scores, in the type of the queries.
    masking = jnp.where(mask, 0, _HIDDEN).astype(query.dtype) if of_mask else query_seq_lengths
    return planned.attend(kernel, query, key, value, masking)


def _even(x: Any) -> Any:
    """With columns of 0 at the end: of odd lengths cuDNN has no gradient."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % _MULTIPLE), *[(0, 0)] * (x.ndim - 2)])


class _Sequences:
    """Rows as sequences that begin with their first real token, one for each completion."""

    def __init__(self, pattern: Pattern, count: int, segments: Int32[Array, "N S"]):
        real = segments != 0
        prompt = real[:, : pattern.prompt]
        self._pattern, self._count = pattern, count
        self._padding = jnp.argmax(prompt, axis=1).astype(jnp.int32)  # before the first real token
        own = pattern.completion
        length = jnp.sum(prompt, axis=1, dtype=jnp.int32) + own
        self.lengths = jnp.repeat(jnp.maximum(length, 1), max(count, 1))  # no row is empty
        self._width = pattern.prompt + own

    @classmethod
    def of(cls, pattern: Pattern, segments: Int32[Array, "N S"]) -> "_Sequences":
        own = pattern.completion
        count = (segments.shape[1] - pattern.prompt) // own if own else 0
        return cls(pattern, count, segments)

    def apart(self, x: Float[Array, "N S h d"]) -> Float[Array, "M W h d"]:
        """[N, S] columns to sequences of [N · completions, prompt + completion]."""
        if self._count:
            prompt, own = x[:, : self._pattern.prompt], x[:, self._pattern.prompt :]
            own = own.reshape(x.shape[0], self._count, self._pattern.completion, *x.shape[2:])
            shape = (*own.shape[:2], *prompt.shape[1:])
            x = jnp.concatenate([jnp.broadcast_to(prompt[:, None], shape), own], axis=2)
            x = x.reshape(-1, *x.shape[2:])
        return self._rolled(_even(x), 1)

    def joined(self, x: Float[Array, "M W h d"]) -> Float[Array, "N S h d"]:
        """Undoes `apart`; of the prompt's results, which are alike, the first."""
        x = self._rolled(x, -1)[:, : self._width]
        if not self._count:
            return x
        x = x.reshape(-1, self._count, *x.shape[1:])
        prompt, own = x[:, 0, : self._pattern.prompt], x[:, :, self._pattern.prompt :]
        own = own.reshape(x.shape[0], -1, *x.shape[3:])
        return jnp.concatenate([prompt, own], axis=1)

    def _rolled(self, x: Shaped[Array, "M W h d"], sign: int) -> Shaped[Array, "M W h d"]:
        """Turns every row by its padding, towards its beginning or back."""
        by = jnp.repeat(self._padding, max(self._count, 1))[:, None] * sign
        index = (jnp.arange(x.shape[1], dtype=jnp.int32)[None] + by) % x.shape[1]
        return jnp.take_along_axis(x, index[:, :, None, None], axis=1)
