"""The intermediate form that is costed: named dimensions, tensors, and operations in blocks.

A traced function and a description of a transformer both become a `Program`; the cost model sees
nothing else. A program holds no degrees of parallelism: `splits` says which kind of parallelism
may divide which dimension, a strategy says how many ways, and every local size, collective and
byte follows from the names of the dimensions.

How collectives follow from names (kinds of parallelism: data, context, tensor, expert):

* an operation that contracts a divided dimension leaves partial sums, which are all-reduced over
  that kind's devices (forward: the row-parallel product of a tensor-parallel layer);
* the cotangent of a tensor that is whole on a kind, but read by an operation whose result is
  divided by it, is a partial sum too (backward: the column-parallel product), once a tensor;
* a weight's gradient contracts batch and sequence, hence gradients are reduced over data and
  context;
* if two dimensions of an operation are divided by the same kind, the first keeps it and operands
  that carry only the second are all-gathered (keys and values under context parallelism);
* a `route` operation moves rows between holders of experts by all-to-all.
"""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

Role = Literal["param", "state", "data", "activation", "output"]
Kind = Literal[
    "dot", "grouped_dot", "attention", "kernel", "elementwise", "reduce", "gather", "scatter",
    "sort", "route", "opaque",
]  # fmt: skip
Parallelism = Literal["data", "context", "tensor", "expert"]

# Types that NumPy does not know by name, in bytes an element.
_EXTRA_DTYPES = {"bfloat16": 2.0, "int4": 0.5, "uint4": 0.5, "float4_e2m1fn": 0.5}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An array of the program, before any division.

    Attributes:
      name: unique within the program.
      dims: names of its dimensions, outermost first; each is a key of `Program.dims`. Within a
        repeated block these are the dimensions of one repetition: a stacked parameter of a scan
        is listed without its layer dimension.
      dtype: NumPy or ml_dtypes name of the element type.
      role: what it is to the program. Optimiser state is not listed but counted by
        `Program.optimizer_bytes`; "state" is what else is carried (a cache, statistics).
      path: `sharding.leaf_path` of the argument that it is or is a slice of, or "".
      loop: how many of `dims`, the first ones, a loop runs over: chunks of a long array, of which
        one at a time exists.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str = "bfloat16"
    role: Role = "activation"
    path: str = ""
    loop: int = 0

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role of tensor {self.name}: {self.role!r}; one of {get_args(Role)}")
        dtype_bytes(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation of the forward pass.

    Attributes:
      name: what rematerialisation policies call its result ("query", "mlp_up"), or "".
      precision: rate of the matrix unit at which it runs ("bf16", "fp8", "fp4", "fp32"); ""
        means bf16.
      kind: "dot" (any contraction; runs on the matrix unit), "grouped_dot" (rows sorted by
        expert times the weights of their expert), "attention" (products and what is between them
        in one kernel, which never materialises the scores), "kernel" (one without products),
        "elementwise", "reduce", "gather", "scatter", "sort", "route" (rows to the holders of
        their experts, or back), "opaque" (no rule: runs replicated).
      inputs: names of tensors read.
      outputs: names of tensors written.
      contracted: dimensions summed over.
      work: FLOPs for each point of the iteration space; 2 for a multiply-add.
      space: dimensions of the iteration space; None means the union of the operands' and
        results' dimensions, without the expert dimension for a `grouped_dot`.
      fraction: share of the iteration space that is computed (0.5: causal attention).
      residuals: tensors that the backward pass reads; None means the kind's rule
        (`Op.residual_names`).
      fused: its operands and results never reach HBM because a neighbour computes with them
        in registers; only its FLOPs count.
      backward: cost of the backward pass in forward passes; None means 2 for operations with
        two differentiable operands and 1 otherwise.
    """

    kind: Kind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    contracted: tuple[str, ...] = ()
    work: float = 2.0
    space: tuple[str, ...] | None = None
    fraction: float = 1.0
    residuals: tuple[str, ...] | None = None
    fused: bool = False
    backward: float | None = None
    name: str = ""
    precision: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind of operation: {self.kind!r}; one of {get_args(Kind)}")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction of the iteration space is in [0, 1]: {self.fraction=}")

    @property
    def is_matmul(self) -> bool:
        """Whether the matrix unit computes it."""
        return self.kind in ("dot", "grouped_dot", "attention")

    @property
    def residual_names(self) -> tuple[str, ...]:
        """Tensors that its backward pass reads: a fused attention also keeps its result."""
        if self.residuals is not None:
            return self.residuals
        return self.inputs + (self.outputs if self.kind == "attention" else ())

    @property
    def backward_passes(self) -> float:
        """Cost of its backward pass, in forward passes.

        Fused attention recomputes the scores: five products against two where one kernel makes all
        gradients (arXiv:2307.08691, algorithm 2), which the constants were fitted with; kernels
        that are traced say what theirs multiply (`sharding.fused`). What reads and writes an array
        forward reads two and writes one backward, unless it is linear.
        """
        if self.backward is not None:
            return self.backward
        if self.kind in ("elementwise", "reduce"):
            return 1.5 if self.residual_names else 1.0
        return {"dot": 2.0, "grouped_dot": 2.0, "attention": 2.5}.get(self.kind, 1.0)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Operations that run in order, `repeat` times: a layer, or the body of a scan.

    Attributes:
      name: for reports.
      ops: in order of execution.
      repeat: how often; each repetition has parameters of its own.
      carry: tensors that go from one repetition to the next, and between pipeline stages.
      checkpointed: the block is what rematerialisation repeats. Embeddings and heads are not.
    """

    name: str
    ops: tuple[Op, ...]
    repeat: int = 1
    carry: tuple[str, ...] = ()
    checkpointed: bool = True

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"block {self.name} needs at least one repetition: {self.repeat=}")

    @functools.cached_property
    def read_again(self) -> frozenset[int]:
        """Positions of the operations whose results some gradient of the block reads.

        The others, as the last product of a layer, need not run again under rematerialisation.
        """
        # A carried tensor is read at the start and written at the end under one name.
        version: dict[str, int] = {}
        needed: set[tuple[str, int]] = set()
        reads: list[set[tuple[str, int]]] = []
        writes: list[set[tuple[str, int]]] = []
        for index, op in enumerate(self.ops):
            reads.append({(n, version.get(n, -1)) for n in op.inputs})
            before = dict(version)
            version.update(dict.fromkeys(op.outputs, index))
            writes.append({(n, index) for n in op.outputs})
            for name in op.residual_names:
                own = name in op.outputs and name not in op.inputs
                needed.add((name, index if own else before.get(name, -1)))
        found: set[int] = set()
        for index in reversed(range(len(self.ops))):
            if needed & writes[index]:
                found.add(index)
                needed |= reads[index]
        return frozenset(found)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Of all operands and results, each once, in order of appearance."""
        names = (n for op in self.ops for n in (*op.inputs, *op.outputs))
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class Program:
    """A step: forward pass in blocks, and what is trained.

    Attributes:
      name: for reports.
      dims: dimension to its global size.
      tensors: name to tensor.
      blocks: in order of execution.
      splits: dimension to the kind of parallelism that may divide it; absent dimensions stay
        whole, except that FSDP divides parameters along whichever dimension it can.
      training: a backward pass and an update follow.
      optimizer_bytes: bytes of optimiser state a trained parameter, without the parameter
        itself: 8 for Adam in float32, 12 with a float32 master copy.
      trained: share of the parameters that is trained; the rest has no gradients and no optimiser
        state.
      gradient_dtype: type in which gradients are accumulated and reduced.
      batch_dim: dimension that micro-batches divide, or "" if there is none.
      pipelined: the repeated blocks may be cut into pipeline stages.
      unknown: operations without a rule, as they appear in the source, for `explain()`.
    """

    name: str
    dims: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    blocks: tuple[Block, ...]
    splits: Mapping[str, Parallelism] = field(default_factory=dict)
    training: bool = True
    optimizer_bytes: float = 8.0
    trained: float = 1.0
    gradient_dtype: str = "float32"
    batch_dim: str = "batch"
    pipelined: bool = True
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for dim, kind in self.splits.items():
            if dim not in self.dims or kind not in get_args(Parallelism):
                raise ValueError(
                    f"splits maps known dimensions to {get_args(Parallelism)}: {dim!r} -> {kind!r}"
                )
        if self.batch_dim and self.batch_dim not in self.dims:
            raise ValueError(f"batch_dim {self.batch_dim!r} is no dimension; {list(self.dims)}")
        for tensor in self.tensors.values():
            self._known(f"tensor {tensor.name}", tensor.dims)
        for block in self.blocks:
            missing = set(block.tensor_names) - set(self.tensors)
            missing |= set(block.carry) - set(self.tensors)
            if missing:
                raise ValueError(f"block {block.name} uses unlisted tensors {sorted(missing)}")
            for op in block.ops:
                self._known(f"{op.kind} in {block.name}", (*op.contracted, *(op.space or ())))

    def _known(self, owner: str, dims: tuple[str, ...]) -> None:
        unknown = [d for d in dims if d not in self.dims]
        if unknown:
            raise ValueError(f"{owner} names dimensions {unknown}; the program has {[*self.dims]}")

    def size(self, tensor: str) -> int:
        """Elements of a tensor, undivided, in one repetition of its block."""
        return math.prod(self.dims[d] for d in self.tensors[tensor].dims)

    def bytes(self, tensor: str) -> float:
        """Bytes of a tensor, undivided, in one repetition of its block."""
        return self.size(tensor) * dtype_bytes(self.tensors[tensor].dtype)

    def space(self, op: Op) -> tuple[str, ...]:
        """Dimensions of an operation's iteration space, each once, in order of appearance."""
        if op.space is not None:
            return op.space
        dims = (d for n in (*op.inputs, *op.outputs) for d in self.tensors[n].dims)
        unique = tuple(dict.fromkeys(dims))
        if op.kind == "grouped_dot":  # a row meets the weights of one expert only
            return tuple(d for d in unique if self.splits.get(d) != "expert")
        return unique

    def flops(self, op: Op) -> float:
        """FLOPs of one forward execution of an operation, undivided."""
        return op.work * op.fraction * math.prod(self.dims[d] for d in self.space(op))

    @property
    def gradient_bytes(self) -> float:
        """Bytes of gradient a parameter, 0 without training."""
        return dtype_bytes(self.gradient_dtype) * self.trained * self.training

    @property
    def state_bytes(self) -> float:
        """Bytes of optimiser state a parameter, 0 without training."""
        return self.optimizer_bytes * self.trained * self.training

    def params(self, block: Block) -> Iterator[Tensor]:
        """Parameters that a block reads, of one repetition."""
        return (t for n in block.tensor_names if (t := self.tensors[n]).role == "param")

    @property
    def parameter_count(self) -> int:
        """Trained numbers: each repetition has its own; a tensor that blocks share counts once."""
        repeats: dict[str, int] = {}
        for block in self.blocks:
            for tensor in self.params(block):
                repeats[tensor.name] = max(repeats.get(tensor.name, 0), block.repeat)
        return sum(self.size(name) * count for name, count in repeats.items())

    @property
    def forward_flops(self) -> float:
        """FLOPs of the matrix products of one forward pass, undivided."""
        return sum(
            self.flops(op) * block.repeat
            for block in self.blocks
            for op in block.ops
            if op.is_matmul
        )

    def to_json(self) -> str:
        """The program as JSON, which `from_json` reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Program":
        """Reads what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        fields["tensors"] = {
            name: Tensor(**{**value, "dims": tuple(value["dims"])})
            for name, value in fields["tensors"].items()
        }
        fields["blocks"] = tuple(
            Block(
                **{
                    **block,
                    "ops": tuple(Op(**_tuples(op)) for op in block["ops"]),
                    "carry": tuple(block["carry"]),
                }
            )
            for block in fields["blocks"]
        )
        fields["unknown"] = tuple(fields["unknown"])
        return cls(**fields)


def dtype_bytes(dtype: str) -> float:
    """Bytes an element of a type takes.

    Raises:
      ValueError: a name that is no element type.

    >>> dtype_bytes("float32"), dtype_bytes("bfloat16"), dtype_bytes("float8_e4m3fn")
    (4.0, 2.0, 1.0)
    """
    if dtype in _EXTRA_DTYPES:
        return _EXTRA_DTYPES[dtype]
    if dtype.startswith("float8"):
        return 1.0
    try:
        return float(np.dtype(dtype).itemsize)
    except TypeError as error:
        raise ValueError(f"no element type: {dtype!r}; use a NumPy or ml_dtypes name") from error


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
