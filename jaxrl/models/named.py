"""Published models by name: what their `config.json` says, for runs that are planned without them.

A folder with the model itself is read by `jaxrl.models.huggingface`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from jaxrl.models.config import DecoderConfig
from jaxrl.models.huggingface.config import decoder_config

_LLAMA_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _document(family: str, sizes: str, **fields: Any) -> dict[str, Any]:
    """`sizes`: layers, width, query heads, key heads, feed-forward width, vocabulary."""
    names = (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "vocab_size",
    )  # fmt: skip
    numbers = map(int, sizes.split())
    return {"model_type": family, **dict(zip(names, numbers, strict=True)), **fields}


_LLAMA3 = {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
_LLAMA31 = _LLAMA3 | {"max_position_embeddings": 131_072, "rope_scaling": _LLAMA_ROPE}
_LLAMA32 = _LLAMA31 | {
    "tie_word_embeddings": True,
    "rope_scaling": _LLAMA_ROPE | {"factor": 32.0},
}
_QWEN25 = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}
_QWEN3 = _QWEN25 | {"head_dim": 128, "max_position_embeddings": 40_960}
_MISTRAL = {
    "rope_theta": 1e6, "rms_norm_eps": 1e-5, "max_position_embeddings": 32_768,
    "sliding_window": None,
}  # fmt: skip
_GEMMA2 = {"sliding_window": 4096, "head_dim": 256, "query_pre_attn_scalar": 256}

DOCUMENTS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "llama2-7b": _document("llama", "32 4096 32 32 11008 32000", rms_norm_eps=1e-5,
                           max_position_embeddings=4096),
    "llama3-8b": _document("llama", "32 4096 32 8 14336 128256", **_LLAMA3),
    "llama3-70b": _document("llama", "80 8192 64 8 28672 128256", **_LLAMA3),
    "llama3.1-8b": _document("llama", "32 4096 32 8 14336 128256", **_LLAMA31),
    "llama3.2-1b": _document("llama", "16 2048 32 8 8192 128256", head_dim=64, **_LLAMA32),
    "llama3.2-3b": _document("llama", "28 3072 24 8 8192 128256", head_dim=128, **_LLAMA32),
    "qwen2.5-0.5b": _document("qwen2", "24 896 14 2 4864 151936", tie_word_embeddings=True,
                              **_QWEN25),
    "qwen2.5-7b": _document("qwen2", "28 3584 28 4 18944 152064", **_QWEN25),
    "qwen3-0.6b": _document("qwen3", "28 1024 16 8 3072 151936", tie_word_embeddings=True,
                            **_QWEN3),
    "qwen3-8b": _document("qwen3", "36 4096 32 8 12288 151936", **_QWEN3),
    "qwen3-30b-a3b": _document("qwen3_moe", "48 2048 32 4 6144 151936", num_experts=128,
                               num_experts_per_tok=8, moe_intermediate_size=768,
                               norm_topk_prob=True, **_QWEN3),
    "mistral-7b": _document("mistral", "32 4096 32 8 14336 32768", **_MISTRAL),
    "mixtral-8x7b": _document("mixtral", "32 4096 32 8 14336 32000", num_local_experts=8,
                              num_experts_per_tok=2, **_MISTRAL),
    "gemma2-9b": _document("gemma2", "42 3584 16 8 14336 256000", **_GEMMA2),
    "gemma3-1b": _document("gemma3_text", "26 1152 4 1 6912 262144", sliding_window=512,
                           max_position_embeddings=32_768),
})  # fmt: skip


def named(
    name: str,
    *,
    max_len: int | None = None,
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> DecoderConfig:
    """The decoder of a published model.

    Args:
      name: of `DOCUMENTS`.
      max_len: longest prompt and completion together; the model's own where None.
      compute_dtype: dtype of the matrix products.

    Raises:
      ValueError: an unknown name; names those there are.

    >>> named("llama3-8b").num_params
    8030261248
    """
    if name not in DOCUMENTS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(DOCUMENTS)}")
    return decoder_config(DOCUMENTS[name], max_len=max_len, compute_dtype=compute_dtype)
