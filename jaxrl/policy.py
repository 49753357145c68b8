"""What a policy says of tokens: log-probabilities, entropies, exact divergences.

One rule for the temperature: logits are divided by it before anything else, for the policy and
for the reference alike; forgetting one of the two changes the target distribution.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxrl.models import Decoder
from jaxrl.types import PackedRows, PolicyOutput, Prompts


def token_log_probs(
    logits: Float32[Array, "*batch V"], tokens: Int32[Array, "*batch"], *, temperature: float = 1.0
) -> Float32[Array, "*batch"]:
    """The log of softmax(logits / temperature) at `tokens`.

    >>> token_log_probs(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0])).round(4)
    Array([-1.3863], dtype=float32)
    """
    scaled = logits / temperature
    chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def entropy(
    logits: Float32[Array, "*batch V"], *, temperature: float = 1.0
) -> Float32[Array, "*batch"]:
    """Entropy of softmax(logits / temperature), in nats."""
    log_probs = jax.nn.log_softmax(logits / temperature, axis=-1)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def full_kl(
    logits: Float32[Array, "*batch V"],
    reference_logits: Float32[Array, "*batch V"],
    *,
    temperature: float = 1.0,
) -> Float32[Array, "*batch"]:
    """Exact KL(π ‖ π_ref) of two next-token distributions at one temperature, in nats."""
    log_p = jax.nn.log_softmax(logits / temperature, axis=-1)
    log_q = jax.nn.log_softmax(reference_logits / temperature, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def evaluate(
    model: Decoder,
    prompts: Prompts,
    tokens: Int32[Array, "B G T"],
    mask: Bool[Array, "B G T"],
    *,
    temperature: float,
    with_entropy: bool = True,
) -> PolicyOutput:
    """Log-probabilities and entropies of completions under `model`.

    Log-probabilities are differentiable; entropies are not.

    Args:
      model: the policy.
      prompts: what was completed.
      tokens: the completions, padded on the right.
      mask: True on tokens that were chosen.
      temperature: the one at which the completions were sampled.
      with_entropy: False saves a pass over the logits and leaves the entropies at 0.
    """
    hidden = model.completion_hidden(prompts, tokens)
    log_probs, spread = _read(model, hidden, tokens, temperature, with_entropy)
    return PolicyOutput(
        log_probs=jnp.where(mask, log_probs, 0.0), entropy=jnp.where(mask, spread, 0.0)
    )


def packed_log_probs(
    model: Decoder, rows: PackedRows, *, temperature: float
) -> Float32[Array, "N S"]:
    """Log-probabilities of the tokens of packed rows that are trained on, 0 elsewhere.

    Each token is predicted from those before it in its own sequence.

    Args:
      model: the policy.
      rows: sequences side by side.
      temperature: divides the logits.
    """
    hidden = model.hidden(rows.tokens, rows.segments, packed=True)
    # A row is one completion of a group of its own; what stands in front of it is its first token.
    log_probs, _ = _read(
        model, hidden[:, None, :-1], rows.tokens[:, None, 1:], temperature, with_entropy=False
    )
    found = jnp.pad(log_probs[:, 0], [(0, 0), (1, 0)])
    follows = jnp.diff(rows.segments, axis=1, prepend=0) == 0
    return jnp.where(rows.mask & follows, found, 0.0)


def _read(
    model: Decoder,
    hidden: Float[Array, "B G T D"],
    tokens: Int32[Array, "B G T"],
    temperature: float,
    with_entropy: bool,
) -> tuple[Float32[Array, "B G T"], Float32[Array, "B G T"]]:
    """Log-probabilities and entropies from hidden states, in the chunks of the configuration."""

    def read(hidden, tokens):
        logits = model.logits(hidden)
        log_probs = token_log_probs(logits, tokens, temperature=temperature)
        if not with_entropy:
            return log_probs, jnp.zeros_like(log_probs)
        return log_probs, entropy(jax.lax.stop_gradient(logits), temperature=temperature)

    return _in_chunks(read, model.config.logit_chunk, hidden, tokens)


def _in_chunks(
    read: Callable[..., tuple[Float32[Array, "B G t"], Float32[Array, "B G t"]]],
    size: int | None,
    hidden: Float[Array, "B G T D"],
    tokens: Int32[Array, "B G T"],
) -> tuple[Float32[Array, "B G T"], Float32[Array, "B G T"]]:
    """`read(hidden, tokens)`, for `size` positions at a time, recomputed in the backward pass.

    Cut along time, where data are never sharded, so that every device reads its own rows.
    """
    steps = tokens.shape[2]
    if size is None or size >= steps:
        return read(hidden, tokens)
    short = -steps % size

    def cut(x):  # [B, G, T, …] -> [chunks, B, G, size, …]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, short), *[(0, 0)] * (x.ndim - 3)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

    def joined(x):
        return jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1)[:, :, :steps]

    body = jax.checkpoint(lambda part: read(*part), prevent_cse=False)
    log_probs, spread = jax.lax.map(body, (cut(hidden), cut(tokens)))
    return joined(log_probs), joined(spread)


def negative_log_likelihood(
    model: Decoder, prompts: Prompts, tokens: Int32[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float32[Array, ""]:
    """Mean negative log-likelihood of the completions' tokens, in nats a token."""
    output = evaluate(model, prompts, tokens[:, None], mask[:, None], temperature=1.0)
    return -jnp.sum(output.log_probs) / jnp.maximum(jnp.sum(mask), 1)


def packed_negative_log_likelihood(model: Decoder, rows: PackedRows) -> Float32[Array, ""]:
    """`negative_log_likelihood` of packed rows: the mean over all tokens that are trained on."""
    log_probs = packed_log_probs(model, rows, temperature=1.0)
    return -jnp.sum(log_probs) / jnp.maximum(jnp.sum(rows.mask), 1)
