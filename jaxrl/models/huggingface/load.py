"""Reads a model's folder, as Hugging Face lays it out, straight into its sharding.

Every device's part of every parameter is read from the files on its own, so that neither this
host nor any device ever holds what it does not keep.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl.models.config import DecoderConfig
from jaxrl.models.decoder import Decoder
from jaxrl.models.huggingface import config as config_lib
from jaxrl.models.huggingface.names import Index, Parameter, parameters

_IGNORED = (
    "rotary_emb.inv_freq",
    "vision_tower.",
    "multi_modal_projector.",
)  # no parameters of a decoder
_MOST_NAMES = 8


class CheckpointMismatch(ValueError):
    """The files do not hold the tensors that `config.json` asks for.

    The message names the first few of each kind.

    Attributes:
      missing: names of all tensors that are not there.
      unknown: of those that nothing asks for.
      wrong: of those of another shape, with what they are and what they should be.
    """

    def __init__(self, missing: list[str], unknown: list[str], wrong: list[str]) -> None:
        self.missing, self.unknown, self.wrong = tuple(missing), tuple(unknown), tuple(wrong)
        complaints = [
            f"{what}: {_listed(names)}"
            for what, names in (("missing", missing), ("unknown", unknown), ("wrong", wrong))
            if names
        ]
        super().__init__(
            "the tensors must be those that config.json describes; " + "; ".join(complaints)
        )

    def __reduce__(self) -> tuple[type["CheckpointMismatch"], tuple[list[str], ...]]:
        # As other processes have to build it: from what it holds, not from its message.
        return type(self), (list(self.missing), list(self.unknown), list(self.wrong))


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model that was read.

    Attributes:
      config: of the decoder.
      document: the parsed `config.json`.
      graphdef: structure of the decoder.
      params: its parameters.
    """

    config: DecoderConfig
    document: Mapping[str, Any]
    graphdef: nnx.GraphDef
    params: nnx.State

    def model(self) -> Decoder:
        return nnx.merge(self.graphdef, self.params)


def read_document(folder: Path | str) -> dict[str, Any]:
    """The parsed `config.json` of a model's folder.

    Raises:
      FileNotFoundError: there is none.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"a model's folder holds config.json and *.safetensors: {path} is missing"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def load_pretrained(
    folder: Path | str,
    *,
    max_len: int | None = None,
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16",
    dtype: jnp.dtype | type = jnp.float32,
    shardings: Callable[[Any], Any] | None = None,
) -> Pretrained:
    """Reads config and weights.

    Args:
      folder: with config.json and model.safetensors, or several files and their index.
      max_len: longest prompt and completion together; the model's own where None.
      compute_dtype: dtype of the matrix products.
      dtype: of the parameters.
      shardings: from the state of `jax.ShapeDtypeStruct`s (with their logical axes) to a tree
        of shardings of the same structure, `plan.bind(...)` for instance; None: one device.

    Raises:
      FileNotFoundError: a file is missing.
      UnsupportedModel: see `decoder_config`.
      CheckpointMismatch: tensors are missing, left over or of another shape; nothing was read.
    """
    folder = Path(folder)
    document = read_document(folder)
    config = config_lib.decoder_config(document, max_len=max_len, compute_dtype=compute_dtype)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    flat = dict(nnx.to_flat_state(state))
    wanted = parameters(config, config_lib.text_half(document)["model_type"])
    placed: dict[Any, Any] = dict.fromkeys(flat)
    if shardings is not None:
        placed = dict(nnx.to_flat_state(shardings(state)))
    with contextlib.ExitStack() as stack:
        files = Files(folder, stack)
        # Some write a tied head a second time.
        check_tensors(wanted, files, spare={"lm_head.weight"} if config.tie_embeddings else set())
        params = {
            path: variable.replace(
                _load(
                    wanted[tuple(map(str, path))], files, _sharding(placed[path]), np.dtype(dtype)
                )
            )
            for path, variable in flat.items()
        }
    return Pretrained(
        config=config,
        document=document,
        graphdef=graphdef,
        params=nnx.from_flat_state(params.items()),
    )


class Files:
    """The tensors of a folder by name; opened, not read."""

    def __init__(
        self, folder: Path, stack: contextlib.ExitStack, *, single: str = "model.safetensors"
    ):
        import safetensors  # only who reads a checkpoint pays for the import

        index = folder / f"{single}.index.json"
        names = [single]
        if index.is_file():
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {_listed(missing)}")
        self._files: dict[str, Any] = {}
        for name in names:
            file = stack.enter_context(safetensors.safe_open(folder / name, framework="numpy"))
            self._files |= {key: (file, key) for key in file.keys()}  # noqa: SIM118
        # A multimodal model keeps its language model under a name of its own.
        for prefix in ("language_model.", "model.language_model."):
            inner = {k: v for k, v in self._files.items() if k.startswith(prefix)}
            for key, value in inner.items():
                del self._files[key]
                self._files[_canonical(key.removeprefix(prefix))] = value

    @property
    def names(self) -> set[str]:
        return {n for n in self._files if not any(part in n for part in _IGNORED)}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slices(name).get_shape())

    def slices(self, name: str) -> Any:
        file, key = self._files[name]
        return file.get_slice(key)


def _canonical(name: str) -> str:
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def check_tensors(
    wanted: Mapping[Any, Parameter], files: Files, *, spare: Set[str] = frozenset()
) -> None:
    """Names and shapes, before anything is read.

    Args:
      wanted: the parameters that are going to be read.
      files: what there is.
      spare: tensors that may be there as well.

    Raises:
      CheckpointMismatch: tensors are missing, left over or of another shape; names them.
    """
    shapes = {
        piece.name: parameter.piece_shape
        for parameter in wanted.values()
        for piece in parameter.pieces()
    }
    missing = sorted(set(shapes) - files.names)
    extra = sorted(files.names - set(shapes) - set(spare))
    differing = [
        f"{name} is {list(files.shape(name))} and should be {list(shape)}"
        for name, shape in shapes.items()
        if name in files.names and files.shape(name) != shape
    ]
    if missing or extra or differing:
        raise CheckpointMismatch(missing, extra, differing)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    leaf = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return jax.sharding.SingleDeviceSharding(jax.devices()[0]) if leaf is None else leaf


def _load(
    parameter: Parameter, files: Files, sharding: jax.sharding.Sharding, dtype: np.dtype
) -> jax.Array:
    def part(index: Index | None) -> np.ndarray:
        assert index is not None  # jax types it so; it always gives slices
        return read_part(parameter, files, index, dtype)

    return jax.make_array_from_callback(parameter.shape, sharding, part)


def read_part(parameter: Parameter, files: Files, index: Index, dtype: np.dtype) -> np.ndarray:
    """A box of one parameter, read from the tensors that it touches and no others."""
    cuts = [slice(*cut.indices(n)) for cut, n in zip(index, parameter.shape, strict=True)]
    out = np.empty([cut.stop - cut.start for cut in cuts], dtype)
    rows, after = parameter.rows_and_columns(tuple(cuts[parameter.stacked :]))
    for piece in parameter.pieces(index):
        read = parameter.to_ours(files.slices(piece.name)[rows])[after]
        at = tuple(i - cut.start for i, cut in zip(piece.at, cuts, strict=False))
        out[at] = read
    return out
