"""Scalar models: critics, reward models and cost models are a decoder with linear heads."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int32

from jaxrl.models.config import DecoderConfig
from jaxrl.models.decoder import Decoder, parameter
from jaxrl.types import Prompts


class ScalarModel(nnx.Module):
    """A decoder whose hidden states are read by H linear heads with bias.

    Attributes:
      heads: names of the heads, in the order of the last axis of every result.
    """

    def __init__(self, config: DecoderConfig, heads: tuple[str, ...], *, rngs: nnx.Rngs):
        if not heads:
            raise ValueError("a scalar model needs at least one head, got none")
        self.heads = heads
        self.trunk = Decoder(config, rngs=rngs)
        # Zero: a critic starts without opinion, and so does a classifier.
        zeros = nnx.initializers.zeros
        self.kernel = parameter(zeros, rngs, (config.embed, len(heads)), ("embed", None))
        self.bias = parameter(zeros, rngs, (len(heads),), (None,))

    def completion_values(
        self, prompts: Prompts, tokens: Int32[Array, "B G T"]
    ) -> Float32[Array, "B G T H"]:
        """Values of the states *before* each completion token: what a critic predicts."""
        return self._read(self.trunk.completion_hidden(prompts, tokens))

    def scores(
        self, tokens: Int32[Array, "N S"], segments: Int32[Array, "N S"]
    ) -> Float32[Array, "N H"]:
        """Scores of whole sequences, read at the last token that is not padding."""
        hidden = self.trunk.hidden(tokens, segments, packed=False)
        steps = jnp.arange(tokens.shape[1])[None]
        last = jnp.max(jnp.where(segments != 0, steps, 0), axis=1)
        return self._read(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def _read(self, hidden):
        scores = hidden.astype(jnp.float32) @ self.kernel[...]
        return scores + jnp.expand_dims(self.bias[...], range(scores.ndim - 1))
