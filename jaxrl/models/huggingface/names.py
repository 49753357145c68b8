"""Which tensors of a Hugging Face model make up each parameter of the decoder.

Theirs are one tensor a layer (and an expert), kernels [out, in]; ours are stacked along `layer`
(and `expert`), kernels [in, *out] with heads apart. RoPE's half-split layout is the same.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxrl.models.config import DecoderConfig
from jaxrl.models.huggingface.config import UnsupportedModel

Index = tuple[slice, ...]
Layout = Literal["same", "out_in", "in_out"]


class Piece(NamedTuple):
    """One tensor of theirs.

    Attributes:
      name: in the file.
      at: where it lies in the stacked axes of ours: (), (layer,) or (layer, expert).
    """

    name: str
    at: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter of ours.

    Attributes:
      shape: of ours, whole.
      stacked: how many leading axes count layers and experts.
      layout: how the rest lies in theirs. "same": flattened to one axis, or as it is where it
        has two that are no kernel; "out_in": ours [in, *out], theirs [prod(out), in];
        "in_out": ours [*in, out], theirs [out, prod(in)].
      pattern: name of theirs, with {} for each stacked axis.
    """

    shape: tuple[int, ...]
    stacked: int
    layout: Layout
    pattern: str

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Of one tensor of theirs."""
        own = self.shape[self.stacked :]
        if self.layout == "out_in":
            return int(np.prod(own[1:])), own[0]
        if self.layout == "in_out":
            return own[-1], int(np.prod(own[:-1]))
        return own if self.pattern == _EMBEDDING else (int(np.prod(own)),)

    def pieces(self, index: Index | None = None) -> Iterator[Piece]:
        """The tensors that a part of ours needs; all of them when `index` is None."""
        index = (slice(None),) * len(self.shape) if index is None else index
        ranges = [
            range(*cut.indices(size))
            for cut, size in zip(index[: self.stacked], self.shape, strict=False)
        ]
        for at in itertools.product(*ranges):
            yield Piece(self.pattern.format(*at), at)

    def rows_and_columns(self, index: Index) -> tuple[Index, Index]:
        """How to read a part of ours from one tensor of theirs.

        Args:
          index: slices of ours, stacked axes left out.

        Returns:
          Slices of theirs, and slices to take of what was read once it has our axes (a part of
          a head cannot be cut out of a flattened axis, so whole heads are read).
        """
        own = self.shape[self.stacked :]
        cuts = [slice(*cut.indices(size)) for cut, size in zip(index, own, strict=True)]
        if self.layout == "same":
            flat, rest = (cuts, own) if len(own) == len(self.piece_shape) else ([], own)
            if flat:
                return tuple(flat), tuple(slice(None) for _ in own)
            rows, after = _merged(cuts, rest)
            return (rows,), after
        if self.layout == "out_in":
            rows, after = _merged(cuts[1:], own[1:])
            return (rows, cuts[0]), (slice(None), *after)
        columns, after = _merged(cuts[:-1], own[:-1])
        return (cuts[-1], columns), (*after, slice(None))

    def to_ours(self, read: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """What was read of one tensor, with our axes (the first of flattened ones may be cut)."""
        own = self.shape[self.stacked :]
        if self.layout == "out_in":
            return read.T.reshape(read.shape[1], -1, *own[2:])
        if self.layout == "in_out":
            return read.T.reshape(-1, *own[1:-1], read.shape[0])
        return read if len(own) == read.ndim else read.reshape(-1, *own[1:])

    def to_theirs(self, ours: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """One layer's (and expert's) part of ours as their tensor."""
        if self.layout == "out_in":
            return ours.reshape(ours.shape[0], -1).T
        if self.layout == "in_out":
            return ours.reshape(-1, ours.shape[-1]).T
        return ours.reshape(self.piece_shape)


def _merged(cuts: list[slice], sizes: tuple[int, ...]) -> tuple[slice, Index]:
    """A range of the flattened axes that holds a box, and the box's place in the range."""
    inner = int(np.prod(sizes[1:]))
    first = cuts[0]
    return slice(first.start * inner, first.stop * inner), (slice(None), *cuts[1:])


_EMBEDDING = "model.embed_tokens.weight"


def parameters(config: DecoderConfig, family: str) -> dict[tuple[str, ...], Parameter]:
    """Every parameter of the decoder, by its path in the state.

    Args:
      config: of the decoder.
      family: `model_type`.

    Raises:
      UnsupportedModel: the family has no name for a parameter of this decoder.
    """
    c, layer = config, "model.layers.{}."
    found: dict[tuple[str, ...], Parameter] = {
        ("embedding",): Parameter((c.vocab_size, c.embed), 0, "same", _EMBEDDING),
        ("final_norm",): Parameter((c.embed,), 0, "same", "model.norm.weight"),
    }
    if not c.tie_embeddings:
        found["output",] = Parameter((c.embed, c.vocab_size), 0, "out_in", "lm_head.weight")

    def stacked(name: str, shape: tuple[int, ...], layout: Layout, pattern: str, experts: int = 0):
        number = (c.layers, experts) if experts else (c.layers,)
        found["layers", name] = Parameter((*number, *shape), len(number), layout, layer + pattern)

    attention = "self_attn."
    for name, heads in (("query", c.heads), ("key", c.kv_heads), ("value", c.kv_heads)):
        theirs = f"{attention}{name[0]}_proj"
        stacked(name, (c.embed, heads, c.head_dim), "out_in", f"{theirs}.weight")
        if c.attention_bias:
            stacked(f"{name}_bias", (heads, c.head_dim), "same", f"{theirs}.bias")
    out = f"{attention}o_proj"
    stacked("attention_out", (c.heads, c.head_dim, c.embed), "in_out", f"{out}.weight")
    if c.output_bias:
        stacked("attention_out_bias", (c.embed,), "same", f"{out}.bias")
    if c.qk_norm:
        stacked("query_norm", (c.head_dim,), "same", f"{attention}q_norm.weight")
        stacked("key_norm", (c.head_dim,), "same", f"{attention}k_norm.weight")
    stacked("attention_norm", (c.embed,), "same", "input_layernorm.weight")
    before_mlp = "post_attention_layernorm.weight"
    if c.post_norms:
        stacked("post_attention_norm", (c.embed,), "same", "post_attention_layernorm.weight")
        stacked("post_mlp_norm", (c.embed,), "same", "post_feedforward_layernorm.weight")
        before_mlp = "pre_feedforward_layernorm.weight"
    stacked("mlp_norm", (c.embed,), "same", before_mlp)
    block, gate, up, down = "mlp.", "gate_proj", "up_proj", "down_proj"
    if c.experts:
        if family not in _EXPERTS:
            raise UnsupportedModel(
                f"experts have names in {', '.join(_EXPERTS)} only, got {family!r}"
            )
        block, gate, up, down = _EXPERTS[family]
        stacked("router", (c.embed, c.experts), "out_in", f"{block}gate.weight")
        block += "experts.{}."
    stacked("gate", (c.embed, c.mlp), "out_in", f"{block}{gate}.weight", c.experts)
    stacked("up", (c.embed, c.mlp), "out_in", f"{block}{up}.weight", c.experts)
    stacked("down", (c.mlp, c.embed), "in_out", f"{block}{down}.weight", c.experts)
    return found


_EXPERTS = {
    "qwen3_moe": ("mlp.", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.", "w1", "w3", "w2"),
}
