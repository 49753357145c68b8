"""Mixture-of-experts feed-forward: every token goes to the k experts that its router prefers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def route(
    logits: Float32[Array, "N E"], *, experts_per_token: int, normalise: bool
) -> tuple[Float32[Array, "N k"], Int32[Array, "N k"]]:
    """Weights and indices of the experts of each token.

    The k largest of softmax(logits); with `normalise` they are divided by their sum (Mixtral,
    arXiv:2401.04088, eq. 2, which is the softmax of the k largest logits).

    >>> weights, chosen = route(jnp.log(jnp.asarray([[1., 4., 3.]])), experts_per_token=2,
    ...                         normalise=False)
    >>> weights.round(3).tolist(), chosen.tolist()
    ([[0.5, 0.375]], [[1, 2]])
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts_per_token)
    if normalise:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def mixture_of_experts(
    x: Float[Array, "*batch D"],
    router: Float[Array, "D E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    experts_per_token: int,
    normalise: bool,
    activation: Callable[[Array], Array],
) -> Float[Array, "*batch D"]:
    """Σ over the chosen experts e of weight_e · down_e(activation(gate_e·x) · up_e·x).

    Tokens are sorted by expert, so that each expert multiplies the rows that are its own and no
    others; no token is dropped, whatever the balance.

    Args:
      x: hidden states.
      router: logits of the experts, computed in float32.
      gate: kernels of all experts, of what the activation takes.
      up: of what it multiplies.
      down: back to the width of `x`.
      experts_per_token: k.
      normalise: see `route`.
      activation: of the gate.
    """
    flat = x.reshape(-1, x.shape[-1])
    logits = jnp.matmul(flat, router, preferred_element_type=jnp.float32)
    weights, chosen = route(logits, experts_per_token=experts_per_token, normalise=normalise)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    token = order // experts_per_token
    sizes = jnp.bincount(chosen.reshape(-1), length=router.shape[-1]).astype(jnp.int32)
    out = expert_rows(flat[token], gate, up, down, sizes, activation=activation)
    out *= weights.reshape(-1)[order][:, None].astype(out.dtype)
    return jnp.zeros_like(flat).at[token].add(out).reshape(x.shape)


def expert_rows(
    rows: Float[Array, "R D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    sizes: Int32[Array, " E"],
    *,
    activation: Callable[[Array], Array],
) -> Float[Array, "R D"]:
    """down_e(activation(gate_e·x) · up_e·x) of rows sorted by expert, `sizes` of them each.

    Rows after the last expert's have no meaning.
    """
    hidden = activation(jax.lax.ragged_dot(rows, gate, sizes))
    hidden *= jax.lax.ragged_dot(rows, up, sizes)
    return jax.lax.ragged_dot(hidden, down, sizes)
