"""Decoders without code: a description becomes the same `Program` that a trace gives.

For questions such as "what would a 70B need". Dense or mixture of experts, grouped queries or
latent attention, local and global layers, gated or plain feed-forward.
"""

import functools
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

from sharding.programs.program import Block, Op, Parallelism, Program, Tensor

# The kind of parallelism that divides each dimension of a decoder.
SPLITS: Mapping[str, Parallelism] = {
    "batch": "data",
    "sequence": "context",
    "kv_sequence": "context",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "moe_mlp": "tensor",
    "shared_mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a decoder.

    Attributes:
      name: for reports.
      layers: number of layers.
      d_model: width.
      heads: query heads.
      kv_heads: key and value heads; None means as many as query heads.
      head_dim: of queries and keys; None means d_model / heads.
      value_dim: of values; None means head_dim.
      d_ff: hidden width of the dense feed-forward.
      vocab: vocabulary.
      seq_len: tokens of a sequence.
      global_batch: sequences of a step.
      gated: the feed-forward has two input matrices (SwiGLU).
      rotary: queries and keys are rotated; otherwise positions are added to the embedding.
      tied: the head reuses the embedding.
      experts: experts of a layer, 0 for a dense model.
      experts_per_token: experts that a token visits.
      moe_d_ff: hidden width of an expert; None means d_ff.
      shared_experts: experts that every token visits.
      dense_layers: layers without experts.
      capacity: rows computed for each row routed, where experts have a fixed capacity and rows
        beyond it are dropped; 0 if experts take whatever comes ("dropless").
      window: tokens that a local layer looks back, 0 if all layers are global.
      global_every: one layer in this many is global.
      query_rank: width of the compressed query of latent attention, 0 for none.
      kv_rank: width of the compressed keys and values of latent attention, 0 for none.
      precision: of products with weights in layers: "bf16", "fp8" or "fp4".
      flash: attention does not materialise its scores.
      fused_loss: the loss reads the logits once; otherwise each of its steps is a pass in float32
        over all of them.
      weight_dtype: of stored parameters.
      compute_dtype: of activations and products.
      optimizer_bytes: of optimiser state a parameter, without the parameter itself.
      gradient_dtype: in which gradients are reduced.
      training: a train step; otherwise a forward pass.
      adapters_only: weights are frozen and small adapters trained (LoRA): no gradients of weights.
    """

    name: str = "transformer"
    layers: int
    d_model: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    d_ff: int
    vocab: int
    seq_len: int = 4096
    global_batch: int = 256
    gated: bool = True
    rotary: bool = True
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 1
    moe_d_ff: int | None = None
    shared_experts: int = 0
    dense_layers: int = 0
    capacity: float = 0.0
    window: int = 0
    global_every: int = 1
    query_rank: int = 0
    kv_rank: int = 0
    precision: str = "bf16"
    flash: bool = True
    fused_loss: bool = True
    weight_dtype: str = "float32"
    compute_dtype: str = "bfloat16"
    optimizer_bytes: float = 8.0
    gradient_dtype: str = "float32"
    training: bool = True
    adapters_only: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "d_model", "heads", "d_ff", "vocab", "seq_len", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"a decoder needs a positive {name}: {getattr(self, name)}")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"a token visits between 1 and {self.experts=} experts: {self.experts_per_token=}"
            )
        if self.dense_layers > self.layers:
            raise ValueError(f"{self.dense_layers=} of {self.layers=}")

    @property
    def dims(self) -> dict[str, int]:
        """Dimensions of the program that it describes."""
        head_dim = self.head_dim or self.d_model // self.heads
        sizes = {
            "batch": self.global_batch,
            "sequence": self.seq_len,
            "kv_sequence": self.seq_len,
            "window": min(self.window or self.seq_len, self.seq_len),
            "embed": self.d_model,
            "heads": self.heads,
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": head_dim,
            "value_dim": self.value_dim or head_dim,
            "mlp": self.d_ff,
            "vocab": self.vocab,
            "pair": 2,
        }
        if self.query_rank or self.kv_rank:
            sizes |= {"query_rank": self.query_rank or self.d_model, "kv_rank": self.kv_rank}
        if self.experts:
            width = self.moe_d_ff or self.d_ff
            sizes |= {"expert": self.experts, "top_k": self.experts_per_token, "moe_mlp": width}
            if self.shared_experts:
                sizes["shared_mlp"] = width * self.shared_experts
        return sizes

    @property
    def repeats(self) -> dict[str, int]:
        """Repetitions of the kinds of layers: (local or global) and (dense or experts)."""
        moe = self.layers - self.dense_layers if self.experts else 0
        kinds = {"experts": moe, "dense": self.layers - moe}
        if not self.window or self.window >= self.seq_len:
            return {name: count for name, count in kinds.items() if count}
        found = {}
        for name, count in kinds.items():
            whole = count // self.global_every
            found |= {name: whole, f"local_{name}": count - whole}
        return {name: count for name, count in found.items() if count}


def transformer(config: TransformerConfig | None = None, **changes: Any) -> Program:
    """Describes a decoder's step.

    Args:
      config: its sizes; None starts from `changes` alone.
      **changes: fields of `TransformerConfig` to set or override.

    >>> program = transformer(layers=2, d_model=64, heads=4, d_ff=128, vocab=100, gated=False)
    >>> program.parameter_count  # 2·(4·64² + 2·64·128 + 2·64) + 2·64·100 + 64
    78656
    """
    config = replace(config, **changes) if config else TransformerConfig(**changes)
    builder = _Builder(config)
    blocks = [builder.embedding()]
    blocks += [builder.layer(name, count) for name, count in config.repeats.items()]
    blocks.append(builder.head())
    if config.adapters_only:
        blocks = [_frozen(block) for block in blocks]
    dims = config.dims
    return Program(
        name=config.name,
        dims=dims,
        tensors=builder.tensors,
        blocks=tuple(blocks),
        splits={dim: kind for dim, kind in SPLITS.items() if dim in dims},
        training=config.training,
        optimizer_bytes=config.optimizer_bytes,
        trained=0.0 if config.adapters_only else 1.0,
        gradient_dtype=config.gradient_dtype,
    )


class _Builder:
    """Collects tensors while the blocks are written down."""

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config
        self.tensors: dict[str, Tensor] = {}

    def param(self, name: str, *dims: str) -> str:
        dtype = self.config.weight_dtype
        self.tensors[name] = Tensor(name=name, dims=dims, dtype=dtype, role="param", path=name)
        return name

    def act(self, name: str, *dims: str, dtype: str | None = None) -> str:
        dtype = dtype or self.config.compute_dtype
        dims = ("batch", "sequence", *dims)
        self.tensors[name] = Tensor(name=name, dims=dims, dtype=dtype)
        return name

    def raw(self, name: str, *dims: str, dtype: str) -> str:
        self.tensors[name] = Tensor(name=name, dims=dims, dtype=dtype)
        return name

    def embedding(self) -> Block:
        ids = Tensor(name="tokens", dims=("batch", "sequence"), dtype="int32", role="data")
        self.tensors["tokens"] = ids
        table, x = self.param("embedding", "vocab", "embed"), self.act("x", "embed")
        ops = [_op("gather", ("tokens", table), x, work=0.0, contracted=("vocab",),
                   space=("batch", "sequence", "embed"))]  # fmt: skip
        if not self.config.rotary:
            where = self.param("positions", "sequence", "embed")
            ops.append(_op("elementwise", (x, where), x, work=1.0, residuals=()))
        return Block(name="embedding", ops=tuple(ops), carry=("x",), checkpointed=False)

    def layer(self, kind: str, repeat: int) -> Block:
        ops = [_op("reduce", ("x", self.param(f"{kind}/norm_1", "embed")), self.act("a", "embed"),
                   work=4.0)]  # fmt: skip
        ops += self._projections(kind)
        ops += self._attention(local=kind.startswith("local"))
        wo = self.param(f"{kind}/out", "heads", "value_dim", "embed")
        y, x1, b = self.act("y", "embed"), self.act("x1", "embed"), self.act("b", "embed")
        ops += [
            _op("dot", ("o", wo), y, contracted=("heads", "value_dim"), name="out"),
            _op(
                "reduce",
                ("x", y, self.param(f"{kind}/norm_2", "embed")),
                x1,
                b,
                work=6.0,
                residuals=(x1,),
            ),
        ]
        ops += self._experts(kind) if kind.endswith("experts") else self._mlp(kind, "mlp")
        ops.append(_op("elementwise", (x1, "z"), "x", work=1.0, residuals=()))
        full_rate = ("attention", "scores", "router")
        ops = [
            replace(op, precision=self.config.precision)
            if op.is_matmul and op.name not in full_rate
            else op
            for op in ops
        ]
        return Block(name=kind, ops=tuple(ops), repeat=repeat, carry=("x",))

    def _projections(self, kind: str) -> list[Op]:
        q = self.act("q", "heads", "head_dim")
        k = self.raw("k", "batch", "kv_sequence", "kv_heads", "head_dim",
                     dtype=self.config.compute_dtype)  # fmt: skip
        v = self.raw("v", "batch", "kv_sequence", "kv_heads", "value_dim",
                     dtype=self.config.compute_dtype)  # fmt: skip
        ops = []
        source, rank = "a", "embed"
        if self.config.query_rank:
            down = self.param(f"{kind}/query_down", "embed", "query_rank")
            source, rank = self.act("q_latent", "query_rank"), "query_rank"
            ops.append(_op("dot", ("a", down), source, contracted=("embed",), name="query_down"))
        wq = self.param(f"{kind}/query", rank, "heads", "head_dim")
        ops.append(_op("dot", (source, wq), q, contracted=(rank,), name="query"))
        source, rank = "a", "embed"
        if self.config.kv_rank:
            down = self.param(f"{kind}/kv_down", "embed", "kv_rank")
            source, rank = self.act("kv_latent", "kv_rank"), "kv_rank"
            ops.append(_op("dot", ("a", down), source, contracted=("embed",), name="kv_down"))
        wk = self.param(f"{kind}/key", rank, "kv_heads", "head_dim")
        wv = self.param(f"{kind}/value", rank, "kv_heads", "value_dim")
        for name, weight, into, width in (
            ("key", wk, k, "head_dim"),
            ("value", wv, v, "value_dim"),
        ):
            # Keys are read by every query: their positions have a name of their own.
            space = ("batch", "sequence", rank, "kv_heads", width)
            ops.append(
                _op("dot", (source, weight), into, contracted=(rank,), space=space, name=name)
            )
        if self.config.rotary:
            space = ("batch", "sequence", "heads", "head_dim")
            ops.append(_op("elementwise", (q, k), q, k, work=6.0, space=space, residuals=()))
        return ops

    def _attention(self, *, local: bool) -> list[Op]:
        # A local layer's keys are a band of `window`; a global causal layer computes half.
        keys, fraction = ("window", 1.0) if local else ("kv_sequence", 0.5)
        o = self.act("o", "heads", "value_dim")
        space = ("batch", "heads", "sequence", keys, "head_dim")
        if self.config.flash:
            ratio = self.config.dims["value_dim"] / self.config.dims["head_dim"]
            work = 2.0 * (1.0 + ratio)
            return [_op("attention", ("q", "k", "v"), o, contracted=(keys,), space=space,
                        work=work, fraction=fraction, name="attention")]  # fmt: skip
        dtype = self.config.compute_dtype
        scores = self.raw("scores", "batch", "heads", "sequence", keys, dtype=dtype)
        weights = self.raw("weights", "batch", "heads", "sequence", keys, dtype=dtype)
        kept = self.raw("kept", "batch", "heads", "sequence", keys, dtype=dtype)
        return [
            _op("dot", ("q", "k"), scores, contracted=("head_dim",), space=space, name="scores"),
            _op("reduce", (scores,), weights, work=5.0, residuals=(weights,), name="softmax"),
            _op("elementwise", (weights,), kept, work=2.0, residuals=(), name="dropout"),
            _op(
                "dot",
                (kept, "v"),
                o,
                contracted=(keys,),
                space=(*space[:-1], "value_dim"),
                name="attention",
            ),
        ]

    def _mlp(self, kind: str, width: str, into: str = "z") -> list[Op]:
        hidden = ("pair", width) if self.config.gated else (width,)
        up = self.param(f"{kind}/{width}_up", "embed", *hidden)
        down = self.param(f"{kind}/{width}_down", width, "embed")
        h, g, z = self.act(f"h_{width}", *hidden), self.act(f"g_{width}", width), self.act(
            into, "embed")  # fmt: skip
        return [
            _op("dot", ("b", up), h, contracted=("embed",), name="mlp_up"),
            _op("elementwise", (h,), g, work=8.0, name="activation"),
            _op("dot", (g, down), z, contracted=(width,), name="mlp_down"),
        ]

    def _experts(self, kind: str) -> list[Op]:
        hidden = ("pair", "moe_mlp") if self.config.gated else ("moe_mlp",)
        router = self.param(f"{kind}/router", "embed", "expert")
        up = self.param(f"{kind}/moe_up", "expert", "embed", *hidden)
        down = self.param(f"{kind}/moe_down", "expert", "moe_mlp", "embed")
        gates = self.raw("gates", "batch", "sequence", "top_k", dtype="float32")
        sent, back = self.act("sent", "top_k", "embed"), self.act("back", "top_k", "embed")
        h, g = self.act("h_moe", "top_k", *hidden), self.act("g_moe", "top_k", "moe_mlp")
        out, z = self.act("out_moe", "top_k", "embed"), self.act("z", "embed")
        # With a fixed capacity the products are of full batches; else of ragged groups.
        kind_of = "dot" if self.config.capacity else "grouped_dot"
        rows, work = ("batch", "sequence", "top_k"), 2.0 * (self.config.capacity or 1.0)
        ops = [
            # Every device scores all experts for its tokens: the result is not divided.
            _op("dot", ("b", router), gates, contracted=("embed",), name="router",
                space=("batch", "sequence", "embed", "expert")),
            _op("route", ("b", gates), sent, work=0.0, name="dispatch"),
            _op(kind_of, (sent, up), h, contracted=("embed",), work=work, name="mlp_up",
                space=(*rows, "embed", *hidden)),
            _op("elementwise", (h,), g, work=8.0, name="activation"),
            _op(kind_of, (g, down), out, contracted=("moe_mlp",), work=work, name="mlp_down",
                space=(*rows, "moe_mlp", "embed")),
            _op("route", (out,), back, work=0.0, name="combine"),
        ]  # fmt: skip
        inputs = (back, gates)
        if self.config.shared_experts:
            ops += self._mlp(kind, "shared_mlp", into="z_shared")
            inputs = (*inputs, "z_shared")
        ops.append(_op("reduce", inputs, z, contracted=("top_k",), work=2.0))
        return ops

    def head(self) -> Block:
        n = self.act("n", "embed")
        logits = self.act("logits", "vocab")
        loss = self.raw("loss", "batch", "sequence", dtype="float32")
        self.tensors["loss"] = replace(self.tensors["loss"], role="output")
        table = "embedding" if self.config.tied else self.param("head", "embed", "vocab")
        ops = [
            _op("reduce", ("x", self.param("final_norm", "embed")), n, work=4.0),
            _op("dot", (n, table), logits, contracted=("embed",), name="logits"),
        ]
        if not self.config.fused_loss:
            # Cast, subtract the maximum, exponentiate, divide by the sum.
            steps = [self.act(f"logits_{i}", "vocab", dtype="float32") for i in range(4)]
            # Backward subtracts one at the target in place and casts: 14 bytes where forward
            # moves 34.
            ops += [
                _op("elementwise", (a,), b, work=1.0, residuals=(), backward=0.4)
                for a, b in itertools.pairwise((logits, *steps))
            ]
            logits = steps[-1]
        ops.append(_op("reduce", (logits,), loss, contracted=("vocab",), work=5.0))
        return Block(name="head", ops=tuple(ops), carry=("x",), checkpointed=False)


def _frozen(block: Block) -> Block:
    """The block without gradients of its weights: one product backward instead of two."""
    ops = [
        replace(op, backward=1.0) if op.kind in ("dot", "grouped_dot") else op for op in block.ops
    ]
    return replace(block, ops=tuple(ops))


def _op(kind: Any, inputs: tuple[str, ...], *outputs: str, **fields_: Any) -> Op:
    return Op(kind=kind, inputs=inputs, outputs=outputs, **fields_)


@functools.cache
def models() -> Mapping[str, Mapping[str, Any]]:
    """Published models by name: fields of `TransformerConfig`, and `aliases`."""
    text = resources.files("sharding").joinpath("catalog/models.json").read_text()
    return json.loads(text)["models"]


def find_model(name: str, **changes: Any) -> TransformerConfig | None:
    """The published model that a name stands for, however it is spelled; None if unknown.

    >>> find_model("LLAMA3-8B").layers
    32
    """
    wanted = _plain(name)
    known = {f.name for f in fields(TransformerConfig)}
    for key, entry in models().items():
        if wanted in {_plain(key), *map(_plain, entry.get("aliases", ()))}:
            sizes = {field: value for field, value in entry.items() if field in known}
            return TransformerConfig(**{"name": key, **sizes, **changes})
    return None


def named_model(name: str, **changes: Any) -> TransformerConfig:
    """Like `find_model`.

    Raises:
      ValueError: an unknown name; the message lists those that there are.
    """
    found = find_model(name, **changes)
    if found is None:
        raise ValueError(f"no model is called {name!r}: {', '.join(models())}")
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
