"""Hugging Face's `config.json` and `DecoderConfig`, each from the other.

Understood are Llama 2 and 3.x, Qwen2, Qwen2.5, Qwen3 dense and mixture of experts, Mistral,
Mixtral, Gemma 2 and the text half of Gemma 3. A field that would change what the model
computes and that the decoder does not have is an error, never left out in silence.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from jaxrl.models.config import DecoderConfig, RopeScaling

Document = Mapping[str, Any]


class UnsupportedModel(ValueError):
    """The folder holds a model that the decoder cannot compute."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family of models apart.

    Attributes:
      architecture: class in `transformers`, as `config.json` names it.
      defaults: values of fields that a `config.json` may leave out, as in `transformers`.
      options: what every model of the family has, as fields of `DecoderConfig`.
      windows: (document, layers) to the window of each layer.
    """

    architecture: str
    defaults: Document = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    windows: Callable[[Document, int], tuple[int | None, ...]] = lambda document, layers: ()


def _by_layer_type(document: Document, layers: int) -> tuple[int | None, ...]:
    return tuple(
        document["sliding_window"] if kind == "sliding_attention" else None
        for kind in document["layer_types"]
    )


def _everywhere(document: Document, layers: int) -> tuple[int | None, ...]:
    return (document.get("sliding_window"),) * layers


def _qwen(document: Document, layers: int) -> tuple[int | None, ...]:
    """The last layers, and only when it is switched on."""
    if not document.get("use_sliding_window"):
        return ()
    if document.get("layer_types"):
        return _by_layer_type(document, layers)
    full = document.get("max_window_layers", 28)
    return (None,) * min(full, layers) + (document["sliding_window"],) * max(layers - full, 0)


def _qwen_moe(document: Document, layers: int) -> tuple[int | None, ...]:
    return _everywhere(document, layers) if document.get("use_sliding_window") else ()


def _gemma(document: Document, layers: int) -> tuple[int | None, ...]:
    """Every n-th layer sees everything."""
    if document.get("layer_types"):
        return _by_layer_type(document, layers)
    every, window = document["sliding_window_pattern"], document["sliding_window"]
    return tuple(window if (i + 1) % every else None for i in range(layers))


_GEMMA = MappingProxyType({"norm_plus_one": True, "post_norms": True, "scale_embeddings": True})
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True, "head_dim": 256, "num_attention_heads": 8,
    "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "rms_norm_eps": 1e-6,
}  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "llama": Family(architecture="LlamaForCausalLM"),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        windows=_everywhere,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        defaults={
            "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6,
            "rms_norm_eps": 1e-5, "num_key_value_heads": 8,
        },
        windows=_everywhere,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults={"sliding_window": 4096},
        options={"attention_bias": True},
        windows=_qwen,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={"head_dim": 128, "sliding_window": 4096},
        options={"qk_norm": True},
        windows=_qwen,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        defaults={
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            "norm_topk_prob": False, "num_key_value_heads": 4, "sliding_window": 4096,
        },
        options={"qk_norm": True},
        windows=_qwen_moe,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults={
            **_GEMMA_DEFAULTS, "vocab_size": 256_000, "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        options=_GEMMA,
        windows=_gemma,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults={
            **_GEMMA_DEFAULTS, "vocab_size": 262_208, "max_position_embeddings": 131_072,
            "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
        },
        options={**_GEMMA, "qk_norm": True},
        windows=_gemma,
    ),
})  # fmt: skip

_DEFAULTS = {
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
    "attention_bias": False, "hidden_act": "silu", "max_position_embeddings": 2048,
}  # fmt: skip
_ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_REFUSED = {  # fields that change what is computed, with the values that do not
    "mlp_bias": (False, None),
    "use_bidirectional_attention": (False, None),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
}


def decoder_config(
    document: Document,
    *,
    max_len: int | None = None,
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Args:
      document: the parsed `config.json`; of a multimodal Gemma 3 the text half is taken.
      max_len: longest prompt and completion together; the model's own where None.
      compute_dtype: dtype of the matrix products.

    Raises:
      UnsupportedModel: an unknown `model_type` (names those there are), a field that the
        decoder cannot honour, or a missing one.
    """
    document = text_half(document)
    name = str(document.get("model_type"))
    if name not in FAMILIES:
        raise UnsupportedModel(f"model_type must be one of {', '.join(FAMILIES)}, got {name!r}")
    family = FAMILIES[name]
    document = {**_DEFAULTS, **family.defaults, **document}
    for key, harmless in _REFUSED.items():
        if document.get(key) not in harmless:
            raise UnsupportedModel(f"{name} with {key}={document[key]!r} is not supported")
    try:
        return _decoder_config(document, family, max_len, compute_dtype)
    except KeyError as error:
        raise UnsupportedModel(f"config.json of a {name} needs the field {error}") from error


def _decoder_config(document, family, max_len, compute_dtype) -> DecoderConfig:
    layers, heads = document["num_hidden_layers"], document["num_attention_heads"]
    activation = document.get("hidden_activation") or document["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"the activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
        )
    biased = bool(document["attention_bias"])
    windows = family.windows(document, layers)
    theta, scaling, window_theta = _rope(document)
    experts = document.get("num_local_experts") or document.get("num_experts") or 0
    head_dim = document.get("head_dim") or document["hidden_size"] // heads
    scale = document.get("query_pre_attn_scalar")
    if window_theta == theta and scaling.kind == "none":
        window_theta = None  # the same as elsewhere
    options = {
        "attention_bias": biased,
        "output_bias": biased,
        "windows": windows if any(windows) else (),
        "window_rope_theta": window_theta if any(windows) else None,
        "query_scale": None if scale in (None, head_dim) else scale**-0.5,
        "attention_softcap": document.get("attn_logit_softcapping"),
        "logit_softcap": document.get("final_logit_softcapping"),
        **family.options,
    }
    if experts:
        options |= {
            "experts": experts,
            "experts_per_token": document["num_experts_per_tok"],
            "normalise_routing": document.get("norm_topk_prob", True),  # Mixtral always does
        }
    return DecoderConfig(
        vocab_size=document["vocab_size"],
        layers=layers,
        embed=document["hidden_size"],
        heads=heads,
        kv_heads=document.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp=document.get("moe_intermediate_size") or document["intermediate_size"],
        max_len=max_len or document["max_position_embeddings"],
        rope_theta=float(theta),
        rope_scaling=scaling,
        tie_embeddings=bool(document["tie_word_embeddings"]),
        norm_eps=document["rms_norm_eps"],
        activation=_ACTIVATIONS[activation],
        compute_dtype=compute_dtype,
        **options,
    )


def text_half(document: Document) -> Document:
    """Of a multimodal document (Gemma 3 from 4B on) the language model's, else the same."""
    if document.get("model_type") != "gemma3":
        return document
    return {"model_type": "gemma3_text", **document["text_config"]}


# ------------------------------------------------------------------------------------ RoPE


def _rope(document: Document) -> tuple[float, RopeScaling, float | None]:
    """θ, scaling, and θ of layers with a window, in the old spelling of a document or the new.

    transformers 5 writes `rope_parameters`, by kind of layer where they differ; before it were
    `rope_theta`, `rope_scaling` and, in Gemma 3, `rope_local_base_freq`.
    """
    parameters = document.get("rope_parameters")
    local = document.get("rope_local_base_freq")
    if parameters is None:
        return document["rope_theta"], _scaling(document.get("rope_scaling"), document), local
    if "full_attention" not in parameters:
        return parameters["rope_theta"], _scaling(parameters, document), None
    full, windowed = parameters["full_attention"], parameters.get("sliding_attention") or {}
    if _scaling(windowed, document).kind != "none":
        raise UnsupportedModel(f"layers with a window must have plain RoPE, got {windowed}")
    return (
        full.get("rope_theta", document["rope_theta"]),
        _scaling(full, document),
        windowed.get("rope_theta", local),
    )


def _scaling(fields: Document | None, document: Document) -> RopeScaling:
    fields = fields or {}
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind in ("default", None):
        return RopeScaling()
    if fields.get("partial_rotary_factor", 1.0) != 1.0 or not fields.get("truncate", True):
        raise UnsupportedModel(f"RoPE with {dict(fields)} is not supported")
    context = fields.get(
        "original_max_position_embeddings",
        document.get("original_max_position_embeddings", document["max_position_embeddings"]),
    )
    if kind == "linear":
        return RopeScaling(kind="linear", factor=fields["factor"])
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=fields["factor"],
            original_max_len=context,
            low_freq_factor=fields["low_freq_factor"],
            high_freq_factor=fields["high_freq_factor"],
        )
    if kind == "yarn":
        if fields.get("mscale") or fields.get("mscale_all_dim"):
            raise UnsupportedModel(f"YaRN with mscale is not supported: {dict(fields)}")
        return RopeScaling(
            kind="yarn",
            factor=fields["factor"],
            original_max_len=context,
            beta_fast=fields.get("beta_fast") or 32.0,
            beta_slow=fields.get("beta_slow") or 1.0,
            temperature=fields.get("attention_factor"),
        )
    raise UnsupportedModel(f"RoPE must be default, linear, llama3 or yarn, got {kind!r}")


def _rope_document(scaling: RopeScaling, theta: float) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if scaling.kind == "none":
        return fields
    fields |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = scaling.original_max_len
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.temperature is not None:
            fields["attention_factor"] = scaling.temperature
    return fields


# --------------------------------------------------------------------------------- the way back


def document_of(config: DecoderConfig) -> dict[str, Any]:
    """A `config.json` for a decoder that was made here.

    Raises:
      UnsupportedModel: no family has this combination of options; names those that differ.
    """
    name = _family_of(config)
    document: dict[str, Any] = {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.embed,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.output_bias,
        **_rope_documents(config, name),
    }
    if name.startswith("gemma"):
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        document |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": _whole(scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    else:
        document["hidden_act"] = "silu"
    window = next((w for w in config.windows if w is not None), None)
    if name in ("mistral", "mixtral"):
        document["sliding_window"] = window
    elif config.windows:
        document |= {
            "sliding_window": window,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in config.windows],
        }
    elif name.startswith("gemma"):
        document["layer_types"] = ["full_attention"] * config.layers
    if config.experts:
        number = "num_local_experts" if name == "mixtral" else "num_experts"
        document |= {number: config.experts, "num_experts_per_tok": config.experts_per_token}
    if name == "qwen3_moe":
        document["moe_intermediate_size"] = config.mlp
        document["norm_topk_prob"] = config.normalise_routing
    _check_says_the_same(document, config)
    return document


def _whole(x: float) -> float | int:
    """An integer where it is one but for rounding: transformers 5 insists on the type."""
    return round(x) if abs(x - round(x)) < 1e-6 * abs(x) else x


def _family_of(config: DecoderConfig) -> str:
    if config.norm_plus_one:
        return "gemma3_text" if config.qk_norm else "gemma2"
    if config.experts:
        return "qwen3_moe" if config.qk_norm else "mixtral"
    if config.qk_norm:
        return "qwen3"
    if config.attention_bias and not config.output_bias:
        return "qwen2"
    return "mistral" if any(config.windows) else "llama"


def _rope_documents(config: DecoderConfig, name: str) -> dict[str, Any]:
    """Both spellings, so that old and new readers find theirs."""
    fields = _rope_document(config.rope_scaling, config.rope_theta)
    document: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_parameters": fields}
    if config.rope_scaling.kind != "none":
        document["rope_scaling"] = {k: v for k, v in fields.items() if k != "rope_theta"}
    if name == "gemma3_text":
        local = config.window_rope_theta or config.rope_theta
        document["rope_local_base_freq"] = local
        document["rope_parameters"] = {
            "full_attention": fields,
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        }
    return document


def _check_says_the_same(document: Document, config: DecoderConfig) -> None:
    execution = ("compute_dtype", "remat", "scan_unroll")
    again = decoder_config(document, compute_dtype=config.compute_dtype)
    again = dataclasses.replace(again, **{name: getattr(config, name) for name in execution})
    differing = [
        f"{f.name}={getattr(config, f.name)!r}"
        for f in dataclasses.fields(config)
        if not _same(getattr(config, f.name), getattr(again, f.name))
    ]
    if differing:
        raise UnsupportedModel(
            f"no model that transformers has computes this decoder; the nearest, "
            f"{document['model_type']}, cannot have {', '.join(differing)}"
        )


def _same(wanted: Any, got: Any) -> bool:
    if isinstance(wanted, float) and isinstance(got, float):
        return abs(wanted - got) <= 1e-6 * abs(wanted)
    return wanted == got
