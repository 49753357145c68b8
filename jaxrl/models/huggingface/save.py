"""Writes a decoder as a Hugging Face folder that `transformers` loads."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl.models.config import DecoderConfig
from jaxrl.models.huggingface import config as config_lib
from jaxrl.models.huggingface.names import Parameter, parameters

_GIB = 1 << 30


def save_pretrained(
    folder: Path | str,
    config: DecoderConfig,
    params: nnx.State,
    *,
    document: Mapping[str, Any] | None = None,
    dtype: jnp.dtype | type = jnp.bfloat16,
    max_file_bytes: int = 5 * _GIB,
) -> None:
    """Writes config.json and the weights, several files and their index where they are large.

    Each file is written whole under another name first; config.json comes last, so that a
    folder that has one is complete. Under `jax.distributed` every process calls this and the
    first one writes.

    Args:
      folder: made where missing.
      config: of the decoder.
      params: its parameters, sharded or not.
      document: the `config.json` that the model came with; made from `config` where None.
      dtype: of the files.
      max_file_bytes: largest file; a tensor is never cut.

    Raises:
      UnsupportedModel: `transformers` has no model that computes this decoder.
    """
    folder = Path(folder)
    document = dict(config_lib.document_of(config) if document is None else document)
    document["dtype"] = document["torch_dtype"] = np.dtype(dtype).name
    document["architectures"] = [config_lib.FAMILIES[_text_type(document)].architecture]
    wanted = parameters(config, _text_type(document))
    flat = {path: variable.get_value() for path, variable in nnx.to_flat_state(params)}
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    groups = _grouped(wanted, np.dtype(dtype).itemsize, max_file_bytes)
    weight_map, total = {}, 0
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            theirs: np.ascontiguousarray(wanted[path].to_theirs(to_host(flat[path], at, dtype)))
            for path, theirs, at in group
        }
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(x.nbytes for x in tensors.values())
        if writes:
            write_tensors(folder / name, tensors)
    if not writes:
        return
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
    write_text(folder / "config.json", json.dumps(document, indent=2) + "\n")


def _text_type(document: Mapping[str, Any]) -> str:
    return config_lib.text_half(document)["model_type"]


Entry = tuple[tuple[str, ...], str, tuple[int, ...]]


def _grouped(
    wanted: Mapping[tuple[str, ...], Parameter], itemsize: int, limit: int
) -> list[list[Entry]]:
    """Tensors of each file: layer after layer, no file above the limit but for one tensor."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry, elements in _in_order(wanted):
        if groups[-1] and size + elements * itemsize > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += elements * itemsize
    return groups


def _in_order(
    wanted: Mapping[tuple[str, ...], Parameter],
) -> Iterator[tuple[Entry, int]]:
    entries = [
        ((path, piece.name, piece.at), int(np.prod(parameter.piece_shape)))
        for path, parameter in wanted.items()
        for piece in parameter.pieces()
    ]
    return iter(sorted(entries, key=lambda e: e[0][2][:1]))  # stable: by layer, head first


def to_host(value: jax.Array, at: tuple[int, ...], dtype: Any) -> np.ndarray:
    """One layer's (and expert's) part on this host; a collective where others hold a share."""
    part = value[at].astype(dtype)
    if part.is_fully_addressable:
        return np.asarray(part)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file, which replaces an older one only when it is whole and on the disk."""
    from safetensors.numpy import save_file

    part = path.with_name(path.name + ".part")
    save_file(dict(tensors), part, metadata={"format": "pt"})
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def write_text(path: Path, text: str) -> None:
    """A text file, likewise."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)
