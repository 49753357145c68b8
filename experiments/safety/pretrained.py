"""Real models: a Hugging Face folder in, and the trained policy out as one that others load."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from experiments.safety import placement
from experiments.safety.config import SafetyConfig
from jaxrl import processes
from jaxrl.models import lora as lora_lib
from jaxrl.models.huggingface import Pretrained, load_pretrained
from jaxrl.tokenizers import PLAIN, ChatTemplate, Tokenizer

BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
"""Files of a model's folder that are copied to what is made of it."""
_SENTINEL = "\ufffcprompt\ufffc"  # U+FFFC: stands in no template


def folder_of(name: str) -> Path:
    """The folder of a model: itself, or what the hub's client has downloaded.

    Raises:
      FileNotFoundError: neither a folder nor a name of the form ORGANISATION/MODEL.
      ImportError: a name, and the hub's client is not installed.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise FileNotFoundError(
            "a pretrained model is a folder with config.json and *.safetensors, or ORGANISATION/"
            f"MODEL on the Hugging Face hub: there is no folder {name!r}"
        )
    try:
        from huggingface_hub import (  # pyright: ignore[reportMissingImports]  # optional
            snapshot_download,
        )
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no folder here, and downloading it needs huggingface_hub: "
            'pip install "jaxrl-safe[hub]"'
        ) from error
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))


def load(config: SafetyConfig, tokenizer: Tokenizer) -> Pretrained:
    """The policy that the run starts from, read straight to where it will lie.

    Raises:
      ValueError: the tokenizer has ids that the model has no embedding for; and see
        `load_pretrained`.
    """
    mesh = placement.mesh_of(config.mesh)

    def shardings(state: nnx.State) -> Any:
        plan = placement.plan_of(mesh, state)
        return jax.tree.unflatten(jax.tree.structure(state), plan.bind().shardings(state))

    found = load_pretrained(
        folder_of(config.model.pretrained),
        max_len=config.prompt_len + config.completion_len,
        compute_dtype=config.model.compute_dtype,
        shardings=shardings if mesh else None,
    )
    if tokenizer.vocab_size > found.config.vocab_size:
        raise ValueError(
            "every id of the tokenizer needs an embedding: it has "
            f"{tokenizer.vocab_size}, the model {found.config.vocab_size}; give the model's own "
            "tokenizer"
        )
    return found


def chat_template(folder: Path) -> ChatTemplate:
    """What the model's own chat template puts around one question; plain where it has none.

    Raises:
      ImportError: Jinja, in which templates are written, is not installed.
      ValueError: a template that changes or repeats what the user wrote.
    """
    settings = _json(folder / "tokenizer_config.json")
    source = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(source, list):  # several by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not source:
        return PLAIN
    try:
        from jinja2.sandbox import (  # pyright: ignore[reportMissingImports]  # optional
            ImmutableSandboxedEnvironment,
        )
    except ImportError as error:
        raise ImportError(
            f"the chat template of {folder} is written in Jinja: pip install jinja2, or name one "
            "with --template"
        ) from error

    def refuse(message: str) -> None:
        raise ValueError(f"the chat template of {folder} refuses a question: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    text = environment.from_string(source).render(
        messages=[{"role": "user", "content": _SENTINEL}], add_generation_prompt=True,
        **{name: _token(settings.get(name)) for name in ("bos_token", "eos_token")},
    )  # fmt: skip
    prefix, found, suffix = text.partition(_SENTINEL)
    if not found or _SENTINEL in suffix:
        raise ValueError(
            f"the chat template of {folder} must contain the question once: {text[:200]!r}; name "
            "another with --template"
        )
    return ChatTemplate(name="model", prefix=prefix, suffix=suffix or "\n")


def _json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _token(value: Any) -> str:
    """A special token as tokenizer_config.json has it: text, or a record that holds it."""
    return str(value.get("content", "") if isinstance(value, Mapping) else value or "")


def without_adapters(adapted: Pretrained, base: Pretrained) -> Pretrained:
    """The base model with the adapters added to its kernels: W + s·A·B."""
    weights = lora_lib.merged(adapted.model().layers.weights(), adapted.config.lora)

    def added(path: Any, variable: nnx.Variable) -> nnx.Variable:
        if path[0] != "layers":
            return variable
        # Where the base lies: the compiler may leave a sum elsewhere.
        where = variable.get_value().sharding
        return variable.replace(jax.device_put(weights[str(path[1])], where))

    params = nnx.from_flat_state(
        (path, added(path, variable)) for path, variable in nnx.to_flat_state(base.params)
    )
    return Pretrained(
        config=base.config, document=base.document, graphdef=base.graphdef, params=params
    )


def copy_beside(source: Path, target: Path) -> None:
    """Copies tokenizer and settings of generation, which training leaves alone."""
    if processes.leads():
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
