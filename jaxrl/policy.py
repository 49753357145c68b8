"""What a policy says of tokens: log-probabilities, entropies, exact divergences.

One rule for the temperature: logits are divided by it before anything else, for the policy and
for the reference alike; forgetting one of the two changes the target distribution.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from jaxrl.models import Decoder
from jaxrl.types import PolicyOutput, Prompts


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
    logits = model.logits(model.completion_hidden(prompts, tokens))
    log_probs = token_log_probs(logits, tokens, temperature=temperature)
    spread = jnp.zeros_like(log_probs)
    if with_entropy:
        spread = entropy(jax.lax.stop_gradient(logits), temperature=temperature)
    return PolicyOutput(
        log_probs=jnp.where(mask, log_probs, 0.0), entropy=jnp.where(mask, spread, 0.0)
    )


def negative_log_likelihood(
    model: Decoder, prompts: Prompts, tokens: Int32[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float32[Array, ""]:
    """Mean negative log-likelihood of the completions' tokens, in nats a token."""
    output = evaluate(model, prompts, tokens[:, None], mask[:, None], temperature=1.0)
    return -jnp.sum(output.log_probs) / jnp.maximum(jnp.sum(mask), 1)
