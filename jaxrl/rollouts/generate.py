"""Autoregressive generation: prefill once, then one token of every row at a time."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from jaxrl.models import Cache, Decoder
from jaxrl.rollouts.sampling import Sampling, draw
from jaxrl.types import Completions, Prompts

_GROWS_FROM = 32  # shorter caches are read faster than a second loop is compiled


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Loop:
    """State of the generation loop; `hidden` predicts the token of `step`."""

    step: Int32[Array, ""]
    active: Bool[Array, "B G"]
    hidden: Float[Array, "B G D"]
    cache: Cache
    tokens: Int32[Array, "T B G"]
    mask: Bool[Array, "T B G"]
    log_probs: Float32[Array, "T B G"]

    def advance(
        self, model: Decoder, weights, uniforms: Float32[Array, "T 2 B G"], sampling: Sampling
    ) -> "_Loop":
        now = jax.lax.dynamic_index_in_dim(uniforms, self.step, keepdims=False)
        drawn, log_probs = draw(now, model.logits(self.hidden), sampling)
        tokens = jnp.where(self.active, drawn, sampling.pad_id)
        hidden, cache = model.decode(weights, self.cache, tokens, self.step)

        def write(buffer, row):
            return jax.lax.dynamic_update_index_in_dim(buffer, row, self.step, 0)

        return _Loop(
            step=self.step + 1,
            active=self.active & (tokens != sampling.eos_id),
            hidden=hidden,
            cache=cache,
            tokens=write(self.tokens, tokens),
            mask=write(self.mask, self.active),
            log_probs=write(self.log_probs, jnp.where(self.active, log_probs, 0.0)),
        )


def generate(
    model: Decoder, prompts: Prompts, key: PRNGKeyArray, sampling: Sampling, *, group_size: int = 1
) -> Completions:
    """Writes `group_size` completions of every prompt; see `generate_from_state`."""
    graphdef, params = nnx.split(model)
    return generate_from_state(
        params, prompts, key, graphdef=graphdef, sampling=sampling, group_size=group_size
    )


@partial(jax.jit, static_argnames=("graphdef", "sampling", "group_size"))
def generate_from_state(
    params: nnx.State,
    prompts: Prompts,
    key: PRNGKeyArray,
    *,
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    group_size: int,
) -> Completions:
    """Writes `group_size` completions of every prompt; stops when every row has ended.

    Args:
      params: the policy's state, as `nnx.split` gives it.
      graphdef: the policy's structure.
      prompts: each passes through the network once, whatever the group size.
      key: consumed; give every call a fresh one.
      sampling: how tokens are drawn, and the longest completion.
      group_size: G.

    Returns:
      Completions whose log-probabilities are those of a fresh forward pass.

    Raises:
      ValueError: prompt and completion together are longer than the model's `max_len`.
    """
    model = nnx.merge(graphdef, params)
    prompt_len, max_len = prompts.tokens.shape[1], model.config.max_len
    if prompt_len + sampling.max_new_tokens > max_len:
        raise ValueError(
            f"prompt and completion must fit the model's context: {max_len=}, {prompt_len=}, "
            f"{sampling.max_new_tokens=}; shorten one or raise DecoderConfig.max_len"
        )
    hidden, cache = model.prefill(
        prompts, group_size=group_size, max_new_tokens=sampling.max_new_tokens
    )
    batch, weights = prompts.tokens.shape[0], model.layer_weights()
    first = jnp.broadcast_to(hidden[:, None], (batch, group_size, hidden.shape[-1]))
    buffer = jnp.zeros((sampling.max_new_tokens, batch, group_size))
    # Step-major: a step writes one contiguous block.
    start = _Loop(
        step=jnp.int32(0),
        active=jnp.ones((batch, group_size), bool),
        hidden=first,
        cache=cache,
        tokens=jnp.full(buffer.shape, sampling.pad_id, jnp.int32),
        mask=jnp.zeros(buffer.shape, bool),
        log_probs=buffer,
    )

    # All at once: a generator inside the loop is some sixty operations more at every token.
    uniforms = jax.random.uniform(key, (sampling.max_new_tokens, 2, batch, group_size))

    def advance(loop: _Loop) -> _Loop:
        return loop.advance(model, weights, uniforms, sampling)

    loop = start
    for end in _ends(sampling.max_new_tokens):

        def unfinished(loop: _Loop, end=end) -> Bool[Array, ""]:
            return (loop.step < end) & jnp.any(loop.active)

        loop = replace(loop, cache=loop.cache.with_room(end))
        loop = jax.lax.while_loop(unfinished, advance, loop)
    tokens, mask, log_probs = (
        jnp.moveaxis(x, 0, -1) for x in (loop.tokens, loop.mask, loop.log_probs)
    )
    return Completions(tokens=tokens, mask=mask, log_probs=log_probs)


def _ends(steps: int) -> tuple[int, ...]:
    """The steps before which the cache grows.

    A token attends to all the room there is, written or not: in two stages it is three quarters
    of the whole on average. More stages, each a loop to compile, gain little.
    """
    return (steps // 2, steps) if steps >= _GROWS_FROM else (steps,)
