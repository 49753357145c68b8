"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl.models.config import LORA_TARGETS, DecoderConfig, LoraConfig
from jaxrl.models.decoder import Decoder
from jaxrl.models.huggingface.config import UnsupportedModel, text_half
from jaxrl.models.huggingface.load import Files, Pretrained, check_tensors, read_part
from jaxrl.models.huggingface.names import Parameter, parameters
from jaxrl.models.huggingface.save import to_host, write_tensors, write_text
from jaxrl.models.lora import factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HARMLESS = {  # fields of adapter_config.json that change what is computed, with harmless values
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_bdlora": (False, None),
    "use_qalora": (False, None),
}


def with_adapter(pretrained: Pretrained, lora: LoraConfig, *, seed: int = 0) -> Pretrained:
    """The same model with fresh adapters, which as yet change nothing."""
    config = dataclasses.replace(pretrained.config, lora=lora)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    known = dict(nnx.to_flat_state(pretrained.params))
    keys = jax.random.split(jax.random.key(seed), len(lora.targets))
    fresh = {}
    for name, key in zip(lora.targets, keys, strict=True):
        inputs, outputs = config.lora_widths(name)
        a, b = factors(name)
        bound = inputs**-0.5  # as PEFT draws A; B is zero
        shape = (config.layers, inputs, lora.rank)
        fresh["layers", a] = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        fresh["layers", b] = jnp.zeros((config.layers, lora.rank, outputs))
    params = {
        path: known[path] if path in known else variable.replace(fresh[path])
        for path, variable in nnx.to_flat_state(state)
    }
    return dataclasses.replace(
        pretrained, config=config, graphdef=graphdef, params=nnx.from_flat_state(params.items())
    )


def load_adapter(folder: Path | str, pretrained: Pretrained) -> Pretrained:
    """The model with the adapters of a folder in place of any that it has.

    Raises:
      FileNotFoundError: a file is missing.
      UnsupportedModel: an adapter that is more than A·B beside kernels (DoRA, biases, other
        ranks in some layers), or on modules that have none here.
      CheckpointMismatch: tensors are missing, left over or of another shape.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"an adapter's folder holds {CONFIG} and {WEIGHTS}: no {name}")
    document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    lora = _lora_config(document, pretrained)
    adapted = with_adapter(pretrained, lora)
    wanted = _parameters(adapted)
    flat = dict(nnx.to_flat_state(adapted.params))
    with contextlib.ExitStack() as stack:
        files = Files(folder, stack, single=WEIGHTS)
        check_tensors(wanted, files)
        for path, parameter in wanted.items():
            index = (slice(None),) * len(parameter.shape)
            value = jnp.asarray(read_part(parameter, files, index, np.dtype(np.float32)))
            flat[path] = flat[path].replace(value)
    return dataclasses.replace(adapted, params=nnx.from_flat_state(flat.items()))


def save_adapter(
    folder: Path | str, pretrained: Pretrained, *, base_model: str = "", dtype: Any = jnp.float32
) -> None:
    """Writes the adapters of a model, and nothing else of it.

    Args:
      folder: made where missing; a file is replaced only by a whole one.
      pretrained: with adapters.
      base_model: name or folder of the model that they belong to, for PEFT to find it.
      dtype: of the file.

    Raises:
      ValueError: the model has none.
    """
    lora = pretrained.config.lora
    if lora is None:
        raise ValueError("the model has no adapters to save; make them by `with_adapter`")
    flat = {path: variable.get_value() for path, variable in nnx.to_flat_state(pretrained.params)}
    tensors = {
        piece.name: np.ascontiguousarray(parameter.to_theirs(to_host(flat[path], piece.at, dtype)))
        for path, parameter in _parameters(pretrained).items()
        for piece in parameter.pieces()
    }
    if jax.process_index() != 0:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = _modules(dataclasses.replace(pretrained.config, lora=None), pretrained.document)
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilised,
        "target_modules": sorted(modules[name].rpartition(".")[2] for name in lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_tensors(folder / WEIGHTS, tensors)
    write_text(folder / CONFIG, json.dumps(document, indent=2) + "\n")


def _lora_config(document: Mapping[str, Any], pretrained: Pretrained) -> LoraConfig:
    if document.get("peft_type") != "LORA":
        raise UnsupportedModel(f"peft_type must be LORA, got {document.get('peft_type')!r}")
    for key, harmless in _HARMLESS.items():
        if document.get(key) not in harmless:
            raise UnsupportedModel(f"an adapter with {key}={document[key]!r} is not supported")
    modules = _modules(dataclasses.replace(pretrained.config, lora=None), pretrained.document)
    by_last = {module.rpartition(".")[2]: name for name, module in modules.items()}
    wanted = document["target_modules"]
    wanted = list(by_last) if wanted == "all-linear" else wanted
    unknown = sorted(set(wanted) - set(by_last)) if not isinstance(wanted, str) else [wanted]
    if unknown:
        raise UnsupportedModel(
            f"target_modules must be some of {', '.join(by_last)}, got {', '.join(unknown)}"
        )
    return LoraConfig(
        rank=document["r"],
        alpha=float(document["lora_alpha"]),
        rank_stabilised=bool(document.get("use_rslora")),
        targets=tuple(name for module, name in by_last.items() if module in wanted),
    )


def _modules(config: DecoderConfig, document: Mapping[str, Any]) -> dict[str, str]:
    """Their module of each kernel that may have an adapter, with {} for the layer."""
    every = parameters(config, text_half(document)["model_type"])
    return {
        name: every["layers", name].pattern.removesuffix(".weight")
        for name in LORA_TARGETS
        if every["layers", name].stacked == 1  # experts have none
    }


def _parameters(pretrained: Pretrained) -> dict[tuple[str, ...], Parameter]:
    """The factors of all adapters, by path."""
    config, found = pretrained.config, {}
    modules = _modules(dataclasses.replace(config, lora=None), pretrained.document)
    assert config.lora is not None
    for name in config.lora.targets:
        (inputs, outputs), rank = config.lora_widths(name), config.lora.rank
        a, b = factors(name)
        for factor, shape, theirs in (
            (a, (inputs, rank), "lora_A"),
            (b, (rank, outputs), "lora_B"),
        ):
            pattern = f"{_PREFIX}{modules[name]}.{theirs}.weight"
            found["layers", factor] = Parameter((config.layers, *shape), 1, "out_in", pattern)
    return found
