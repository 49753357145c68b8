"""Attention on TPUs by JAX's splash kernels: never a score in memory, no block that is all masked.

The whole row of a prompt and its completions is one call, whose mask is known before it runs
(`Pattern`); padding and packed sequences, which are not, are segment numbers. The kernels stand
in `jax.experimental.pallas.ops.tpu.splash_attention`; see arXiv:2205.14135 for the algorithm.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float, Int32, Shaped

import sharding
from jaxrl.models.attention import planned
from jaxrl.models.attention.pattern import Pattern
from jaxrl.models.attention.plain import Scores
from jaxrl.models.cache import KeyValue

LANES = 128  # columns of a vector register: what blocks are multiples of
_WIDTH = 64  # what head widths are multiples of: half a register is taken as it is
_BLOCKS = (512, 256, LANES)
_MOST_ADDED = 1 / 8  # columns that padding may add to make larger or fuller blocks
_NO_COLUMN = -1


def attend(
    query: Float[Array, "N S Q d"],
    kv: KeyValue,
    segments: Int32[Array, "N S"],
    pattern: Pattern,
    *,
    rule: Scores,
    interpret: bool = False,
) -> Float[Array, "N S Q d"]:
    """Attention of whole rows.

    Args:
      query: rotated queries.
      kv: rotated keys, and values, [N, S, K, d].
      segments: 0 marks padding; a column sees columns of its own segment only.
      pattern: which columns see which, besides.
      rule: scale and soft cap of the scores.
      interpret: run the kernels in Pallas' interpreter, on any machine.
    """
    aligned = _Aligned.of(pattern, query.shape[1])
    ids = aligned.widened(segments)
    mask = _PatternMask(aligned.pattern, aligned.size)
    if sharding.planned_for() is None:
        run = _kernel(mask, query.shape[2], aligned.block, rule=rule, interpret=interpret)
        each = jax.vmap(run)
    else:
        each = partial(planned.attend, _read_by_planner(aligned, rule))
    wide = KeyValue(aligned.widened(kv.key), aligned.widened(kv.value))
    out = _run(each, aligned.widened(query), wide, kernel.SegmentIds(ids, ids), rule)
    return aligned.narrowed(out)


def _read_by_planner(aligned: "_Aligned", rule: Scores) -> planned.Kernel:
    def visible(ids: kernel.SegmentIds) -> Bool[Array, "N W W"]:
        columns = jnp.arange(aligned.size)
        same = ids.q[:, :, None] == ids.kv[:, None]
        return same & aligned.pattern.visible(columns[:, None], columns[None])[None]

    return planned.Kernel(
        visible=visible, softcap=rule.softcap, scale=1.0, heads_first=True, statistics=LANES,
        kernels_backward=2,
        computed=planned.computed_share(aligned.pattern, aligned.size, aligned.block),
    )  # fmt: skip


def divided(
    columns: Int32[np.ndarray, "ways s"],
    pattern: Pattern,
    heads: int,
    *,
    rule: Scores,
    interpret: bool = False,
) -> kernel.SplashAttentionKernel:
    """The kernels of all devices, for rows that are divided among them along the sequence.

    Goes into `jax.shard_map` with the specs of its `manual_sharding_spec`, so that every device
    has the masks of its own queries, and there to `attend_part`.

    Args:
      columns: which each device holds.
      pattern: which columns see which.
      heads: of queries, on one device.
      rule: scale and soft cap of the scores.
      interpret: see `attend`.
    """
    ways, size = columns.shape
    block = _edge(size)
    padded = np.pad(columns, [(0, 0), (0, -size % block)], constant_values=_NO_COLUMN)
    mask = _OrderedMask(pattern, padded.reshape(-1))
    return _kernel(mask, heads, block, rule=rule, interpret=interpret, ways=ways)


def attend_part(
    run: kernel.SplashAttentionKernel,
    query: Float[Array, "n s Q d"],
    kv: KeyValue,
    segments: Int32[Array, "n s"],
    *,
    axis: str,
    rule: Scores,
) -> Float[Array, "n s Q d"]:
    """Attention of the columns that this device holds to all, under `jax.shard_map`.

    Args:
      run: this device's part of `divided`.
      query: rotated queries of the columns held.
      kv: rotated keys, and values, of the same columns; those of the others are gathered.
      segments: of the columns held; 0 is padding.
      axis: mesh axis along which rows are divided.
      rule: scale and soft cap of the scores.
    """
    return _on_gathered(jax.vmap(run), query, kv, segments, axis=axis, rule=rule)


def attend_part_planned(
    columns: Int32[Array, " s"],
    query: Float[Array, "n s Q d"],
    kv: KeyValue,
    segments: Int32[Array, "n s"],
    *,
    pattern: Pattern,
    axis: str,
    rule: Scores,
) -> Float[Array, "n s Q d"]:
    """What the planner reads in place of `attend_part`.

    Args:
      columns: held by this device.
      query: rotated queries of these columns.
      kv: rotated keys, and values, of the same columns.
      segments: of the same columns; 0 is padding.
      pattern: which columns see which.
      axis: mesh axis along which rows are divided.
      rule: scale and soft cap of the scores.
    """
    size, ways = columns.size, jax.lax.axis_size(axis)
    block = _edge(size)
    padded = jnp.pad(columns, (0, -size % block), constant_values=_NO_COLUMN)
    places = jax.lax.axis_index(axis) * padded.size + jnp.arange(padded.size)
    theirs = jax.lax.all_gather(padded, axis, tiled=True)

    def visible(masking: tuple[Any, Array, Array, Array]) -> Bool[Array, "n w W"]:
        ids, places, mine, theirs = masking
        seen = pattern.visible(mine[:, None], theirs[None])
        seen &= (mine[:, None] >= 0) & (theirs[None] >= 0)
        itself = places[:, None] == jnp.arange(theirs.size)[None]
        return (ids.q[:, :, None] == ids.kv[:, None]) & (seen | itself)[None]

    kept = planned.Kernel(
        visible=visible, softcap=rule.softcap, scale=1.0, heads_first=True, statistics=LANES,
        kernels_backward=2,
        # Of all devices together, of which each has about the same.
        computed=planned.computed_share(pattern, size * ways, block),
    )  # fmt: skip

    def each(query: Array, key: Array, value: Array, ids: kernel.SegmentIds) -> Array:
        return planned.attend(kept, query, key, value, (ids, places, padded, theirs))

    return _on_gathered(each, query, kv, segments, axis=axis, rule=rule)


def _on_gathered(
    run: Callable[..., Any],
    query: Float[Array, "n s Q d"],
    kv: KeyValue,
    segments: Int32[Array, "n s"],
    *,
    axis: str,
    rule: Scores,
) -> Float[Array, "n s Q d"]:
    """The columns held, filled up to whole blocks, and the keys and values of all devices."""
    size = query.shape[1]
    added = -size % _edge(size)

    def widened(x: Shaped[Array, "n s ..."]) -> Shaped[Array, "n w ..."]:
        return jnp.pad(x, [(0, 0), (0, added), *[(0, 0)] * (x.ndim - 2)])

    def gathered(x: Shaped[Array, "n s ..."]) -> Shaped[Array, "n S ..."]:
        return jax.lax.all_gather(widened(x), axis, axis=1, tiled=True)

    ids = kernel.SegmentIds(widened(segments), gathered(segments))
    everything = KeyValue(gathered(kv.key), gathered(kv.value))
    return _run(run, widened(query), everything, ids, rule)[:, :size]


def _kernel(
    mask: masks.Mask, heads: int, block: int, *, rule: Scores, interpret: bool, ways: int = 1
) -> kernel.SplashAttentionKernel:
    return kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=_block_sizes(block),
        attn_logits_soft_cap=rule.softcap,
        head_shards=1,
        q_seq_shards=ways,
        interpret=interpret,
    )


def _run(
    run: Callable[..., Any],
    query: Float[Array, "n s Q d"],
    kv: KeyValue,
    ids: kernel.SegmentIds,
    rule: Scores,
) -> Float[Array, "n s Q d"]:
    """The kernel on every row, in its own order of axes, heads as wide as it wants them."""
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if rule.scale is None else rule.scale

    def prepared(x: Float[Array, "n t h d"]) -> Float[Array, "n h t e"]:
        width = -head_dim % (_WIDTH if head_dim < LANES else LANES)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, width)])
        return jnp.swapaxes(x, 1, 2)

    rows = prepared(query * jnp.asarray(scale, query.dtype)), prepared(kv.key), prepared(kv.value)
    out = run(*rows, ids)
    return jnp.swapaxes(out, 1, 2)[..., :head_dim]


def _edge(size: int) -> int:
    """Of the blocks of rows with nothing but their end to fill up."""
    fitting = (b for b in _BLOCKS if size + -size % b <= size * (1 + _MOST_ADDED))
    return next(fitting, LANES)


def _block_sizes(block: int) -> kernel.BlockSizes:
    return kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip


@dataclass(frozen=True)
class _PatternMask(masks.Mask):
    """A `Pattern` over a square of columns, evaluated block by block before the kernel runs."""

    pattern: Pattern
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        columns = np.arange(self.size, dtype=np.int32)
        return self.pattern.visible(columns[index[0], None], columns[None, index[1]])


@dataclass(frozen=True, eq=False)
class _OrderedMask(masks.Mask):
    """A `Pattern` over columns in any order; of `_NO_COLUMN` each sees itself alone.

    Which keeps the softmax of what only fills a block up defined.
    """

    pattern: Pattern
    columns: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.columns), len(self.columns)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        places = np.arange(len(self.columns))
        query, key = self.columns[index[0], None], self.columns[None, index[1]]
        seen = self.pattern.visible(query, key) & (query >= 0) & (key >= 0)
        return seen | (places[index[0], None] == places[None, index[1]])


@dataclass(frozen=True)
class _Aligned:
    """A row with columns added, so that blocks are full and completions begin at their edges.

    A block in which one completion ends and another begins is multiplied with the keys of both.
    The prompt is filled up on its left, each completion on its right, the whole at its end.

    Attributes:
      given: the row as it comes.
      pattern: as it is computed.
      size: columns as computed.
      count: completions.
      block: edge of the kernel's blocks.
    """

    given: Pattern
    pattern: Pattern
    size: int
    count: int
    block: int

    @classmethod
    def of(cls, given: Pattern, size: int) -> "_Aligned":
        own = given.completion
        count = (size - given.prompt) // own if own else 0
        for block in _BLOCKS:
            prompt, completion = given.prompt + -given.prompt % block, own + -own % block
            whole = prompt + count * completion
            if whole <= size * (1 + _MOST_ADDED):
                pattern = replace(given, prompt=prompt, completion=completion)
                return cls(given, pattern, whole, count, block)
        return cls(given, given, size + -size % LANES, count, LANES)

    def widened(self, x: Shaped[Array, "N S ..."]) -> Shaped[Array, "N W ..."]:
        """With the columns that are added, 0."""
        before = self.given.prompt
        rest = [(0, 0)] * (x.ndim - 2)
        prompt = jnp.pad(x[:, :before], [(0, 0), (self.pattern.prompt - before, 0), *rest])
        own = x[:, before:].reshape(x.shape[0], self.count, self.given.completion, *x.shape[2:])
        added = self.pattern.completion - self.given.completion
        own = jnp.pad(own, [(0, 0), (0, 0), (0, added), *rest])
        whole = jnp.concatenate([prompt, own.reshape(x.shape[0], -1, *x.shape[2:])], axis=1)
        return jnp.pad(whole, [(0, 0), (0, self.size - whole.shape[1]), *rest])

    def narrowed(self, x: Shaped[Array, "N W ..."]) -> Shaped[Array, "N S ..."]:
        """Undoes `widened`."""
        start, own = self.pattern.prompt, self.pattern.completion
        prompt = x[:, start - self.given.prompt : start]
        rest = x[:, start : start + self.count * own]
        rest = rest.reshape(x.shape[0], self.count, own, *x.shape[2:])[
            :, :, : self.given.completion
        ]
        rest = rest.reshape(x.shape[0], self.count * self.given.completion, *x.shape[2:])
        return jnp.concatenate([prompt, rest], axis=1)
