"""What every contestant does: model, weights, prompts, reward, arithmetic. NumPy alone.

Peers import this module in environments that have no JAX.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PAD, BOS, UNKNOWN, SEPARATOR = 256, 257, 258, 259
EOS = 260
"""Outside the vocabulary, so that nothing ends a completion: everyone writes all its tokens."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One GRPO step of a small Qwen3-shaped policy.

    Attributes:
      layers, embed, heads, kv_heads, head_dim, mlp: shape of the decoder.
      vocab_size: 256 bytes and four special tokens.
      prompts, group_size: B and G.
      prompt_len, new_tokens: P and T, in tokens.
      temperature: of sampling.
      kl_coef: weight of the KL penalty in the loss (estimator k3).
      clip_eps: of the clipped surrogate.
      learning_rate: of AdamW; its decay is 0.
    """

    layers: int = 4
    embed: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 768
    vocab_size: int = 260
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    prompts: int = 8
    group_size: int = 8
    prompt_len: int = 32
    new_tokens: int = 64
    temperature: float = 1.0
    kl_coef: float = 0.04
    clip_eps: float = 0.2
    learning_rate: float = 1e-5
    seed: int = 0

    @classmethod
    def from_argv(cls) -> "Workload":
        """The workload that the parent gave as JSON in the first argument; else the default."""
        return cls(**json.loads(sys.argv[1])) if len(sys.argv) > 1 else cls()

    @property
    def completions(self) -> int:
        """Completions in one step, B · G."""
        return self.prompts * self.group_size

    @property
    def generated_tokens(self) -> int:
        """Tokens written in one step."""
        return self.completions * self.new_tokens

    def parameters(self) -> int:
        """N, all parameters; with tied embeddings each takes part in one multiply-add a token."""
        return sum(weight.size for _, weight in self._arrays())

    def flops(self) -> dict[str, float]:
        """Arithmetic of one step: 2·N a token forward, 6·N with the backward pass.

        Each prompt is counted once, as it has to be computed; contestants that repeat it for
        every completion do more. Attention's own products are left out (2 % here).
        """
        forward = 2.0 * self.parameters() * (self.generated_tokens + self.prompts * self.prompt_len)
        return {"rollout": forward, "scoring": forward, "update": 3 * forward}

    def weights(self) -> dict[str, np.ndarray]:
        """Random float32 weights under the names and in the layout of Hugging Face's Qwen3."""
        return dict(self._arrays())

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        generator = np.random.default_rng(self.seed)

        def matrix(rows: int, columns: int) -> np.ndarray:
            return generator.normal(0.0, 0.02, (rows, columns)).astype(np.float32)

        def scale(size: int) -> np.ndarray:  # not all ones, so that a norm left out is seen
            return generator.normal(1.0, 0.1, size).astype(np.float32)

        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", matrix(self.vocab_size, self.embed)
        for index in range(self.layers):
            at = f"model.layers.{index}."
            yield at + "input_layernorm.weight", scale(self.embed)
            yield at + "self_attn.q_proj.weight", matrix(query, self.embed)
            yield at + "self_attn.k_proj.weight", matrix(key, self.embed)
            yield at + "self_attn.v_proj.weight", matrix(key, self.embed)
            yield at + "self_attn.o_proj.weight", matrix(self.embed, query)
            yield at + "self_attn.q_norm.weight", scale(self.head_dim)
            yield at + "self_attn.k_norm.weight", scale(self.head_dim)
            yield at + "post_attention_layernorm.weight", scale(self.embed)
            yield at + "mlp.gate_proj.weight", matrix(self.mlp, self.embed)
            yield at + "mlp.up_proj.weight", matrix(self.mlp, self.embed)
            yield at + "mlp.down_proj.weight", matrix(self.embed, self.mlp)
        yield "model.norm.weight", scale(self.embed)

    def texts(self) -> list[str]:
        """The prompts; each at most `prompt_len` bytes, the longest exactly so."""
        openings = (
            "Tell me about the harbour town",
            "Which ship leaves at dawn",
            "How is a net mended",
            "What does the lamp mean, keeper?",
            "Name three kinds of knots",
            "Why do gulls follow trawlers",
            "Where is the tide mill",
            "Who rings the fog bell",
        )
        return [openings[i % len(openings)][: self.prompt_len] for i in range(self.prompts)]

    def prompt_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [B, P], padded on the left, and where they are real, bool [B, P]."""
        tokens = np.full((self.prompts, self.prompt_len), PAD, np.int32)
        for row, text in zip(tokens, self.texts(), strict=True):
            encoded = encode(text)
            row[self.prompt_len - len(encoded) :] = encoded
        return tokens, tokens != PAD


def encode(text: str) -> list[int]:
    """One token a byte."""
    return list(text.encode())


def decode(tokens: Sequence[int]) -> str:
    """Bytes as text; special tokens and broken characters become U+FFFD or nothing."""
    return bytes(t for t in tokens if t < 256).decode(errors="replace")


def lowercase_share(completions: Sequence[str]) -> list[float]:
    """The reward: share of the characters that are lowercase letters a–z."""
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in completions]
