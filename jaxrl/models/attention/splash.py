"""Attention on TPUs by JAX's splash kernels: never a score in memory, no block that is all masked.

The whole row of a prompt and its completions is one call, whose mask is known before it runs
(`Pattern`); padding and packed sequences, which are not, are segment numbers. The kernels stand
in `jax.experimental.pallas.ops.tpu.splash_attention`; see arXiv:2205.14135 for the algorithm.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int32, Shaped

from jaxrl.models.attention.pattern import Pattern
from jaxrl.models.attention.plain import Scores
from jaxrl.models.cache import KeyValue

LANES = 128  # columns of a vector register: what blocks are multiples of
_WIDTH = 64  # what head widths are multiples of: half a register is taken as it is
_BLOCKS = (512, 256, LANES)
_MOST_ADDED = 1 / 8  # columns that padding may add to make larger or fuller blocks


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
    heads, head_dim = query.shape[2:]
    scale = head_dim**-0.5 if rule.scale is None else rule.scale
    aligned = _Aligned.of(pattern, query.shape[1])
    ids = aligned.widened(segments)
    mask = masks.MultiHeadMask([_PatternMask(aligned.pattern, aligned.size)] * heads)
    run = kernel.make_splash_mha(
        mask,
        block_sizes=_block_sizes(aligned.block),
        attn_logits_soft_cap=rule.softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def prepared(x: Float[Array, "N S h d"]) -> Float[Array, "N h W e"]:
        width = -head_dim % (_WIDTH if head_dim < LANES else LANES)
        x = jnp.pad(aligned.widened(x), [(0, 0), (0, 0), (0, 0), (0, width)])
        return jnp.swapaxes(x, 1, 2)

    rows = prepared(query * jnp.asarray(scale, query.dtype)), prepared(kv.key), prepared(kv.value)
    out: Any = jax.vmap(run)(*rows, kernel.SegmentIds(ids, ids))
    return aligned.narrowed(jnp.swapaxes(out, 1, 2))[..., :head_dim]


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
