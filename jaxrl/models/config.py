"""Shape and options of the decoder: everything that is fixed before it is compiled."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from jaxrl.models.attention.choice import (
    CONTEXT_EXCHANGES,
    IMPLEMENTATIONS,
    ContextExchange,
    Implementation,
)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was trained on.

    Attributes:
      kind: "linear" (arXiv:2306.15595), "llama3" (Llama 3.1's piecewise rule) or "yarn"
        (arXiv:2309.00071); "none" leaves the frequencies alone.
      factor: how many times longer the context becomes, ≥ 1.
      original_max_len: context of the unscaled model, in tokens ("llama3" and "yarn").
      low_freq_factor, high_freq_factor: bounds of Llama 3.1's interpolated band, in
        wavelengths per original context.
      beta_fast, beta_slow: bounds of YaRN's ramp, in rotations per original context.
      temperature: scale of the rotated queries and keys; None takes YaRN's own (eq. 22).
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_len: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"RoPE scaling stretches: factor must be ≥ 1, got {self.factor=}")

    @property
    def attention_factor(self) -> float:
        """Scale of the rotated queries and keys (YaRN's temperature, eq. 22); 1 elsewhere."""
        if self.temperature is not None:
            return self.temperature
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0

    def frequencies(self, head_dim: int, theta: float) -> np.ndarray:
        """Angular frequency of each rotary pair.

        Args:
          head_dim: width of a head; even.
          theta: base of the geometric series, 1e4 in RoFormer (arXiv:2104.09864).

        Returns:
          float32 [head_dim / 2], in radians per position.
        """
        plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        stretched = plain / self.factor
        if self.kind == "none":
            scaled = plain
        elif self.kind == "linear":
            scaled = stretched
        elif self.kind == "llama3":
            turns = self.original_max_len * plain / (2 * np.pi)
            ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(ramp, 0.0, 1.0)
            scaled = keep * plain + (1 - keep) * stretched
        else:
            scaled = self._yarn(plain, stretched, head_dim, theta)
        return scaled.astype(np.float32)

    def _yarn(
        self, plain: np.ndarray, stretched: np.ndarray, head_dim: int, theta: float
    ) -> np.ndarray:
        def pair_with_rotations(rotations: float) -> float:
            wavelength = self.original_max_len / (rotations * 2 * np.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(theta))

        low = max(math.floor(pair_with_rotations(self.beta_fast)), 0)
        high = min(math.ceil(pair_with_rotations(self.beta_slow)), head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return (1 - ramp) * plain + ramp * stretched


LORA_TARGETS = ("query", "key", "value", "attention_out", "gate", "up", "down")
"""Kernels that an adapter may have."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters W + s·A·B beside frozen kernels W (LoRA, arXiv:2106.09685).

    Attributes:
      rank: r, the inner width of A·B.
      alpha: numerator of the scale s = α / r.
      targets: which kernels have one, of `LORA_TARGETS`; experts have none.
      rank_stabilised: s = α / √r instead (rsLoRA, arXiv:2312.03732).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        if unknown or not self.targets:
            raise ValueError(
                f"LoRA targets must be some of {', '.join(LORA_TARGETS)}, got {self.targets}"
            )
        if self.rank < 1:
            raise ValueError(f"LoRA needs a rank ≥ 1, got {self.rank}")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder of the Llama, Qwen, Mistral and Gemma families, dense or mixture of experts.

    Attributes:
      vocab_size: size of the tokenizer's vocabulary.
      layers: decoder blocks.
      embed: width D of the residual stream.
      heads: query heads.
      kv_heads: key and value heads, a divisor of `heads` (grouped-query attention).
      head_dim: width of one head, even.
      mlp: width of the gated feed-forward block; of one expert where there are experts.
      max_len: longest prompt and completion together, in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: stretch of the rotary frequencies.
      qk_norm: RMS-normalise queries and keys per head (Qwen3).
      attention_bias: biases on the query, key and value projections (Qwen2).
      output_bias: a bias on the projection that ends attention.
      tie_embeddings: the output projection is the transposed embedding.
      norm_eps: ε of RMSNorm.
      norm_plus_one: RMSNorm multiplies by 1 + scale (Gemma).
      post_norms: both branches are normalised once more before they are added (Gemma 2, 3).
      scale_embeddings: embeddings are multiplied by √embed (Gemma).
      activation: of the gate: SiLU (SwiGLU), or GELU in its tanh form (Gemma's GeGLU).
      query_scale: what scores are multiplied by; None is 1/√head_dim.
      attention_softcap, logit_softcap: c of c·tanh(x/c) on scores and on logits (Gemma 2).
      windows: tokens, itself included, that each layer's attention sees backwards; None in
        place of a number sees all. One entry a layer; () is no window anywhere.
      window_rope_theta: base of the rotary frequencies, unscaled, in layers that have a
        window (Gemma 3); None: the same as elsewhere.
      experts: feed-forward blocks of each layer, of which a router picks some; 0 is dense.
      experts_per_token: how many it picks.
      normalise_routing: the picked experts' probabilities are made to sum to 1.
      expert_exchange: on a mesh, "all_to_all" routes each device's tokens by itself and sends
        rows to the devices of their experts; "partitioner" leaves all to the compiler.
      expert_capacity: rows that a device takes from each other, as a multiple of a balanced
        router's; what is beyond is dropped. None: whatever comes, and nothing is dropped.
      lora: adapters beside the kernels; None: none.
      attention: "splash" (TPU), "cudnn" (GPU) or "xla"; "auto" takes the kernel of the machine
        that the program is for. See `jaxrl.models.attention.Attention`.
      context: how keys and values travel where the mesh has a context axis: around a "ring", by
        "all_gather", or as the compiler's "partitioner" likes; "auto" gathers where a kernel reads
        what was gathered, and is a ring elsewhere.
      compute_dtype: dtype of the matrix products; parameters are always float32.
      remat: what the backward pass computes again instead of reading it from memory: all but
        the products with weights ("projections"), the whole layer ("full") or nothing ("none").
      logit_chunk: positions of each completion whose float32 logits exist at once when
        completions are evaluated, so that [batch, time, vocabulary] never does; the backward
        pass computes them again. None: all at once.
      scan_unroll: layers that one iteration of the scan holds; more compile longer.
    """

    vocab_size: int
    layers: int = 4
    embed: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384
    max_len: int = 256
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    qk_norm: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    window_rope_theta: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    normalise_routing: bool = True
    expert_exchange: Literal["all_to_all", "partitioner"] = "all_to_all"
    expert_capacity: float | None = None
    lora: LoraConfig | None = None
    attention: Implementation = "auto"
    context: ContextExchange = "auto"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "projections", "full"] = "projections"
    logit_chunk: int | None = None
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "max_len")
        for name in (*sizes, "scan_unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}")
        if self.logit_chunk is not None and self.logit_chunk < 1:
            raise ValueError(f"logit_chunk must be ≥ 1 or None, got {self.logit_chunk}")
        if self.remat not in ("none", "projections", "full"):
            raise ValueError(f"remat must be none, projections or full, got {self.remat!r}")
        for name, known in (("attention", IMPLEMENTATIONS), ("context", CONTEXT_EXCHANGES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads: {self.heads=}, {self.kv_heads=}; "
                "use kv_heads=heads for multi-head attention"
            )
        if self.head_dim % 2:
            raise ValueError(f"RoPE rotates pairs: head_dim must be even, got {self.head_dim}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation must be silu or gelu_tanh, got {self.activation!r}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(
                f"windows needs one entry a layer, got {len(self.windows)} for {self.layers} "
                "layers; use None for a layer without window"
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"a window holds the token itself: ≥ 1, got {self.windows}")
        if self.window_rope_theta is not None and not any(self.windows):
            raise ValueError("window_rope_theta is of layers with a window, and there are none")
        if self.expert_exchange not in ("all_to_all", "partitioner"):
            raise ValueError(
                f"expert_exchange must be all_to_all or partitioner, got {self.expert_exchange!r}"
            )
        for name in ("query_scale", "attention_softcap", "logit_softcap", "expert_capacity"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}; None leaves it out")
        if not 0 <= self.experts_per_token <= self.experts or bool(self.experts) != bool(
            self.experts_per_token
        ):
            raise ValueError(
                "a token goes to between 1 and all of the experts, and a dense decoder has 0 of "
                f"both: {self.experts=}, {self.experts_per_token=}"
            )

        if self.lora and self.experts and {"gate", "up", "down"} & set(self.lora.targets):
            raise ValueError(
                f"experts have no adapters: {self.lora.targets=}; leave out gate, up and down"
            )

    @property
    def num_params(self) -> int:
        """Parameters of the decoder, embeddings counted once when tied."""
        attention = self.embed * self.head_dim * 2 * (self.heads + self.kv_heads)
        biases = self.head_dim * (self.heads + 2 * self.kv_heads) * self.attention_bias
        biases += self.embed * self.output_bias
        norms = (4 if self.post_norms else 2) * self.embed + 2 * self.head_dim * self.qk_norm
        feed_forward = 3 * self.embed * self.mlp * max(self.experts, 1) + self.embed * self.experts
        block = attention + biases + norms + feed_forward
        embeddings = self.vocab_size * self.embed * (1 if self.tie_embeddings else 2)
        adapters = (
            sum(sum(self.lora_widths(name)) for name in self.lora.targets) if self.lora else 0
        )
        block += adapters * (self.lora.rank if self.lora else 0)
        return self.layers * block + embeddings + self.embed

    def lora_widths(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of a kernel that an adapter may have."""
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "query": (self.embed, heads),
            "key": (self.embed, kv_heads),
            "value": (self.embed, kv_heads),
            "attention_out": (heads, self.embed),
            "gate": (self.embed, self.mlp),
            "up": (self.embed, self.mlp),
            "down": (self.mlp, self.embed),
        }[name]
