"""What attention kernels compute and keep, in JAX: what the planner reads in their place.

The planner runs on machines without the accelerator, and a kernel tells it nothing. Here the same
is said as functions of `sharding.fused`, which take no memory but for arguments and results: a
forward one that leaves the output and the logarithm of each query's sum of exponentials, and
backward ones that compute the scores again from them (arXiv:2205.14135, algorithms 1 and 4; with
the log-sum-exp of arXiv:2307.08691).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

import sharding
from jaxrl.models.attention.pattern import Pattern

_MASKED = -1e30
# Products of queries and keys: forward scores and sums of values; backward three gradients, and in
# every kernel scores and the gradient of the weights.
_FORWARD, _GRADIENTS, _AGAIN = 2, 3, 2
_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """How a kernel goes about attention.

    Attributes:
      visible: from its masking operand to which query sees which key, [#N S S].
      softcap: of the scores.
      scale: of the scores.
      heads_first: operands are [N, heads, S, d]; else [N, S, heads, d].
      statistics: numbers that it writes for each query where one is needed: a vector register of
        copies on TPUs.
      kernels_backward: 1: one for all gradients; 2: one for those of queries, one for those of
        keys and values, each of which computes the scores.
      computed: share of the scores that it computes, see `computed_share`.
    """

    visible: Callable[[Any], Bool[Array, "..."]]
    softcap: float | None
    scale: float
    heads_first: bool
    statistics: int
    kernels_backward: int
    computed: float

    @property
    def backward(self) -> float:
        """Products of the kernels backward, as a multiple of the two of the forward one.

        One kernel makes five: scores, dP = dO Vᵀ, dV = Pᵀ dO, dQ = dS K and dK = dSᵀ Q
        (FlashAttention-2, arXiv:2307.08691, algorithm 2). Two make the first two in each, 7 in
        all: 3 in `_flash_attention_dq_kernel` and 4 in `_flash_attention_dkv_kernel` of
        `jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel`, which has
        five in one where its `use_fused_bwd_kernel` is on.

        >>> splash = Kernel(visible=bool, softcap=None, scale=1.0, heads_first=True,
        ...                 statistics=128, kernels_backward=2, computed=1.0)
        >>> splash.backward
        3.5
        """
        return (_GRADIENTS + _AGAIN * self.kernels_backward) / _FORWARD


def computed_share(pattern: Pattern, size: int, block: int) -> float:
    """Share of the blocks of a square of columns of which something is visible.

    Blocks are judged by their corners: exactly, if the pattern's parts begin at edges of blocks.

    >>> computed_share(Pattern(prompt=1024), 1024, 256)  # 10 of 16
    0.625
    """
    first = np.arange(0, size, block)
    last = np.minimum(first + block, size) - 1
    reach = Pattern(prompt=pattern.prompt, completion=pattern.completion)
    seen = reach.visible(last[:, None], first[None])
    if pattern.window is not None:
        # The nearest pair of a block; a completion stands as if right after the prompt.
        seen &= pattern.visible(first[:, None], np.minimum(last[None], first[:, None]))
    return float(np.mean(seen | np.eye(len(first), dtype=bool)))


def attend(
    kernel: Kernel,
    query: Float[Array, "N _ _ d"],
    key: Float[Array, "N _ _ d"],
    value: Float[Array, "N _ _ d"],
    masking: Any,
) -> Float[Array, "N _ _ d"]:
    """Attention as `kernel` does it; shapes as it says, keys and values of fewer heads.

    Args:
      kernel: how.
      query: in the compute type.
      key: of the same type.
      value: of the same type.
      masking: operand of `kernel.visible`; not differentiated.
    """
    return _attend(kernel, query, key, value, masking)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: Kernel, query: Any, key: Any, value: Any, masking: Any) -> Array:
    def attention(query, key, value, masking):
        return _forward(kernel, query, key, value, masking)[0]

    run = sharding.fused(attention, computed=kernel.computed, backward=kernel.backward)
    return run(query, key, value, masking)


def _kept(kernel: Kernel, query: Any, key: Any, value: Any, masking: Any) -> Any:
    def attention(query, key, value, masking):
        out, log_total = _forward(kernel, query, key, value, masking)
        return out, jnp.broadcast_to(log_total[..., None], (*log_total.shape, kernel.statistics))

    run = sharding.fused(attention, computed=kernel.computed, backward=kernel.backward)
    out, log_total = run(query, key, value, masking)
    return out, (query, key, value, masking, out, log_total[..., 0])


def _forward(kernel: Kernel, query: Any, key: Any, value: Any, masking: Any) -> tuple[Any, Any]:
    """The output, and each query's log Σ exp(score), [N, K, G, S]."""
    grouped, key, value = _by_key_head(kernel, query, key, value)
    scores = _scores(kernel, grouped, key, masking)[0]
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product("nkgst,nktd->nkgsd", weights.astype(query.dtype), value) / total
    log_total = (top + jnp.log(total))[..., 0]
    return _as_given(kernel, out.astype(query.dtype)), log_total


def _backward(kernel: Kernel, kept: Any, cotangent: Any) -> Any:
    query, key, value, masking, out, log_total = kept
    operands = (query, key, value, masking, out, log_total, cotangent)

    def gradients(*operands):
        return _gradients(kernel, *operands)

    def of_queries(*operands):
        return _gradients(kernel, *operands)[0]

    def of_keys(*operands):
        return _gradients(kernel, *operands)[1:]

    run = partial(sharding.fused, computed=kernel.computed)
    if kernel.kernels_backward == 1:
        return *run(gradients)(*operands), None
    return run(of_queries)(*operands), *run(of_keys)(*operands), None


_attend.defvjp(_kept, _backward)


def _gradients(
    kernel: Kernel,
    query: Any,
    key: Any,
    value: Any,
    masking: Any,
    out: Any,
    log_total: Float32[Array, "N K G S"],
    cotangent: Any,
) -> tuple[Any, Any, Any]:
    """To queries, keys and values: dS = P ∘ (dP − rowsum(dO ∘ O))."""
    grouped, keys, values = _by_key_head(kernel, query, key, value)
    given, made = (_grouped(kernel, x, keys.shape[1]) for x in (cotangent, out))
    scores, slope = _scores(kernel, grouped, keys, masking)
    weights = jnp.exp(scores - log_total[..., None])
    mean = jnp.sum(given.astype(jnp.float32) * made.astype(jnp.float32), axis=-1, keepdims=True)
    of_weights = _product("nkgsd,nktd->nkgst", given, values)
    of_scores = (weights * (of_weights - mean) * slope * kernel.scale).astype(query.dtype)
    of_query = _product("nkgst,nktd->nkgsd", of_scores, keys)
    of_key = _product("nkgst,nkgsd->nktd", of_scores, grouped)
    of_value = _product("nkgst,nkgsd->nktd", weights.astype(query.dtype), given)
    back = (_as_given(kernel, of_query), *(_heads_back(kernel, x) for x in (of_key, of_value)))
    return tuple(g.astype(x.dtype) for g, x in zip(back, (query, key, value), strict=True))  # type: ignore[return-value]


def _scores(kernel: Kernel, query: Any, key: Any, masking: Any) -> tuple[Any, Any]:
    """Scores [N, K, G, S, S], and their derivative by what they were before the cap."""
    scores = _product("nkgsd,nktd->nkgst", query, key) * kernel.scale
    slope = jnp.ones((1,) * scores.ndim, jnp.float32)
    if kernel.softcap is not None:
        bent = jnp.tanh(scores / kernel.softcap)
        scores, slope = bent * kernel.softcap, 1 - bent * bent
    visible = kernel.visible(masking)
    return jnp.where(visible[:, None, None], scores, _MASKED), slope


def _by_key_head(kernel: Kernel, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    key, value = _heads_back(kernel, key), _heads_back(kernel, value)
    return _grouped(kernel, query, key.shape[1]), key, value


def _heads_back(kernel: Kernel, x: Any) -> Any:
    """[N, heads, S, d] of the kernel's operand, or the other way."""
    return x if kernel.heads_first else jnp.swapaxes(x, 1, 2)


def _grouped(kernel: Kernel, x: Any, kv_heads: int) -> Float[Array, "N K G S d"]:
    x = _heads_back(kernel, x)
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _as_given(kernel: Kernel, x: Float[Array, "N K G S d"]) -> Any:
    """Undoes `_grouped`."""
    return _heads_back(kernel, x.reshape(x.shape[0], -1, *x.shape[3:]))
