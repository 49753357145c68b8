"""A walked jaxpr as a `Program`: what is written to memory, multiplied and summed.

Between products, whatever works element by element is taken to be fused as XLA fuses it: a run of
such operations reads what comes from outside and writes what is read outside, once.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sharding.programs.program import Block, Op, Parallelism, Program, Tensor
from sharding.tracing.dims import DimensionGraph, product
from sharding.tracing.splits import Splits, pairs_positions
from sharding.tracing.walk import Axes, Record, Stretch, Value, Walk

_FUSED = ("elementwise", "reduce")


def lower(
    graph: DimensionGraph,
    walk: Walk,
    splits: Splits,
    names: Mapping[int, str],
    *,
    name: str,
    training: bool,
    optimizer_bytes: float,
    stacked_are_residuals: bool = False,
    unknown: Iterable[str] = (),
) -> Program:
    """Writes down a walk for the cost model.

    Args:
      graph: its dimensions.
      walk: of the forward pass.
      splits: what may be divided.
      names: atoms that have a name; others are numbered.
      name: of the program.
      training: a backward pass and an update follow.
      optimizer_bytes: of optimiser state a parameter.
      stacked_are_residuals: what a scan over layers stacks is what its backward pass reads; else
        that is taken to be the operands of products and of fused runs.
      unknown: operations without a rule elsewhere in the step: in its backward pass or its update.
    """
    builder = _Builder(graph, splits, dict(names))
    if stacked_are_residuals:
        builder.residuals = {id(v) for stretch in walk.stretches for v in stretch.stacked}
    blocks = []
    read_in = _readers(walk.stretches)
    for index, stretch in enumerate(walk.stretches):
        ops = builder.ops(stretch, index, read_in)
        if ops:
            blocks.append(
                Block(
                    name="layers" if stretch.is_layer else f"outside {index}",
                    ops=tuple(ops),
                    repeat=stretch.repeat,
                    carry=tuple(
                        builder.tensor(v) for v in stretch.carry if builder.atoms(v) & splits.batch
                    ),
                    checkpointed=stretch.is_layer,
                )
            )
    batch = [builder.dims_of[a] for a in sorted(splits.batch) if a in builder.dims_of]
    return Program(
        name=name,
        dims=builder.sizes,
        tensors=builder.tensors,
        blocks=tuple(blocks),
        splits=builder.kinds,
        training=training,
        optimizer_bytes=optimizer_bytes,
        batch_dim=batch[0] if batch else "",
        pipelined=any(stretch.is_layer for stretch in walk.stretches),
        unknown=tuple(sorted({*walk.unknown, *unknown})),
    )


def _precision(record: Record) -> str:
    """The rate of the matrix unit at which a product of such operands runs."""
    types = {v.dtype for v in record.ins[:2]}
    if types <= {"float32", "float64"}:
        return "fp32"
    return "fp8" if all(t.startswith("float8") for t in types) else ""


def _label(records: Sequence[Record]) -> str:
    return next((v.label for record in records for v in record.outs if v.label), "")


def _readers(stretches: Sequence[Stretch]) -> dict[int, set[int]]:
    """For every array, by identity, the stretches that read it."""
    found: dict[int, set[int]] = {}
    for index, stretch in enumerate(stretches):
        for record in stretch.records:
            for value in record.ins:
                found.setdefault(id(value), set()).add(index)
        for value in stretch.carry:
            found.setdefault(id(value), set()).add(index)
    return found


@dataclass
class _Builder:
    graph: DimensionGraph
    splits: Splits
    names: dict[int, str]
    dims_of: dict[int, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, Parallelism] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    residuals: set[int] | None = None
    _constant: set[int] = field(default_factory=set)
    _of_value: dict[int, str] = field(default_factory=dict)

    def atoms(self, value: Value) -> set[int]:
        return {atom for axis in value.axes for atom in self.graph.atoms(axis)}

    def dims(self, axes: Iterable[int]) -> tuple[str, ...]:
        """Names of the factors; one that comes again is another dimension of the same kind."""
        found: list[str] = []
        for axis in axes:
            for atom in self.graph.atoms(axis):
                name = self.dims_of.setdefault(atom, self.names.get(atom, f"dim{atom}"))
                while name in found:
                    name += "'"
                found.append(name)
                self.sizes[name] = self.graph.size(atom)
                if atom in self.splits.kinds:
                    self.kinds[name] = self.splits.kinds[atom]
        return tuple(found)

    def tensor(self, value: Value) -> str:
        """Lists an array, and returns its name; a parameter is listed once for all its views."""
        stored = value.stored
        key = self._of_value.get(id(stored))
        if key is not None:
            return key
        role = "state" if stored.role == "optimizer" else stored.role
        name = stored.path if stored.path and stored.role != "activation" else ""
        loop = stored.loop if role == "activation" else ()
        dims = self.dims((*loop, *stored.axes))
        name = name or f"t{len(self.tensors)}"
        if name in self.tensors and self.tensors[name].dims != dims:
            name = f"{name} whole"  # a stacked parameter that is also used outside its scan
        self.tensors[name] = Tensor(name=name, dims=dims, dtype=stored.dtype, role=role,
                                    path=stored.path, loop=len(self.dims(loop)))  # fmt: skip
        self._of_value[id(stored)] = name
        return name

    def ops(self, stretch: Stretch, index: int, read_in: Mapping[int, set[int]]) -> list[Op]:
        """The operations of a stretch, runs of fused ones together."""
        for value in stretch.carry:
            self.tensor(value)
        reads = Counter(id(v) for record in stretch.records for v in record.ins)
        found: list[Op] = []
        run: list[Record] = []
        for record in stretch.records:
            if record.applied.kind in _FUSED:
                run.append(record)
                continue
            if run:
                found += self._fuse(run, stretch, index, read_in, reads)
                run = []
            found.append(self._op(record, stretch))
        return found + (self._fuse(run, stretch, index, read_in, reads) if run else [])

    def _op(self, record: Record, stretch: Stretch) -> Op:
        kind = record.applied.kind
        outs = tuple(self.tensor(v) for v in record.outs)
        if kind in ("dot", "grouped_dot"):
            inputs, summed = self._operands(record)
            read = inputs[:1] if kind == "grouped_dot" else inputs
            space = dict.fromkeys(d for n in (*read, *outs) for d in self.tensors[n].dims)
            size = product(self.sizes[d] for d in space)
            return Op(
                kind=kind,
                inputs=inputs,
                outputs=outs,
                contracted=summed,
                work=record.applied.flops * self._repeats(record.loop) / max(size, 1),
                space=tuple(space),
                precision=_precision(record),
                name=self._product_name(record),
                # What a product makes is counted whether differentiation keeps it or not: a
                # policy that saves products keeps it, and too much is better than too little.
                residuals=(*self._read_backward(record.ins[:2], (), stretch), *outs),
            )
        inputs = tuple(dict.fromkeys(self.tensor(v) for v in record.ins if v.axes))
        if kind == "attention":
            return self._attention(record, inputs, outs, stretch)
        contracted = self.dims(record.applied.contracted) if kind == "gather" else ()
        residuals = self._read_backward(record.ins, record.outs, stretch)
        return Op(
            kind=kind,
            inputs=inputs,
            outputs=outs,
            contracted=contracted,
            work=1.0,
            residuals=residuals,
        )

    def _attention(
        self, record: Record, inputs: tuple[str, ...], outs: tuple[str, ...], stretch: Stretch
    ) -> Op:
        """A kernel with products: work for every point of arguments and results together.

        Blocks that it passes over are taken off the work: `Op.fraction` is of what a mask shows,
        and adds the hidden parts of blocks that are computed.
        """
        space = dict.fromkeys(d for n in (*inputs, *outs) for d in self.tensors[n].dims)
        for last in self.tensors[outs[0]].dims[-1:]:  # the width of a head, which is padded
            del space[last]
            space[last] = None
        size = product(self.sizes[d] for d in space)
        flops = record.applied.flops * record.applied.computed
        return Op(
            kind="attention",
            inputs=inputs,
            outputs=outs,
            contracted=self.dims(record.applied.contracted),
            work=flops * self._repeats(record.loop) / max(size, 1),
            space=tuple(space),
            name="attention",
            backward=record.applied.backward,
            residuals=self._read_backward((*record.ins, *record.outs), (), stretch),
        )

    def _read_backward(
        self, ins: Iterable[Value], outs: Iterable[Value], stretch: Stretch
    ) -> tuple[str, ...]:
        """What the backward pass reads of an operation's operands and results."""
        if self.residuals is None or not stretch.is_layer:
            return tuple(dict.fromkeys(self.tensor(v) for v in ins if v.axes))
        kept = (v for v in (*ins, *outs) if id(v) in self.residuals)
        return tuple(dict.fromkeys(map(self.tensor, kept)))

    def _repeats(self, loop: Axes) -> int:
        return product(self.graph.size(axis) for axis in loop)

    def _axis_names(self, value: Value) -> list[list[str]]:
        """For every axis of an array, the names of its factors."""
        names = iter(self.dims(value.axes))
        return [[next(names) for _ in self.graph.atoms(axis)] for axis in value.axes]

    def _summed(self, record: Record) -> tuple[str, ...]:
        """Contracted dimensions under the names that the first operand gives them."""
        of_axis = self._axis_names(record.ins[0])
        return tuple(name for i in record.applied.summed for name in of_axis[i])

    def _operands(self, record: Record) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Operands of a product, and the dimensions that it sums.

        The same dimension may stand for two: queries and keys both run along the sequence. The
        result and the other operand tell them apart, and an operand that carries the second
        is listed under its name.
        """
        applied = record.applied
        inputs = [self.tensor(v) for v in record.ins[:2]]
        names = [self._axis_names(v) for v in record.ins[:2]]
        if record.primitive != "dot_general":
            return tuple(inputs), self._summed(record)
        summed, batched = (
            (applied.summed, applied.summed_right),
            (applied.batched, applied.batched_right),
        )
        free = [
            [i for i in range(len(names[side])) if i not in (*summed[side], *batched[side])]
            for side in (0, 1)
        ]
        out = self._axis_names(record.outs[0])[len(batched[0]) :]
        of_free = (out[: len(free[0])], out[len(free[0]) :])
        # The operand in which both stand fixes the names; else the first does.
        side = 0 if any("'" in name for axis in names[1] for name in axis) else 1
        for i, j in zip(summed[side], summed[1 - side], strict=True):
            names[side][i] = names[1 - side][j]
        for i, axis in zip(free[side], of_free[side], strict=True):
            names[side][i] = axis
        renamed = tuple(name for axis in names[side] for name in axis)
        tensor = self.tensors[inputs[side]]
        if renamed != tensor.dims[len(tensor.dims) - len(renamed) :] and tensor.role != "param":
            alias = f"{tensor.name} along {' '.join(d for d in renamed if d not in tensor.dims)}"
            dims = (*tensor.dims[: len(tensor.dims) - len(renamed)], *renamed)
            self.tensors[alias] = replace(tensor, name=alias, dims=dims)
            inputs[side] = alias
        return tuple(inputs), tuple(name for i in summed[0] for name in names[0][i])

    def _fuse(
        self,
        run: Sequence[Record],
        stretch: Stretch,
        index: int,
        read_in: Mapping[int, set[int]],
        reads: Mapping[int, int],
    ) -> list[Op]:
        """One operation for a run of fused ones, and one for each sum in it.

        A sum is listed apart for the collective that it may need; its operand stays in registers.
        """
        # Masks and positions made of nothing but literals are made again wherever they are read.
        for record in run:
            if all(not v.axes or id(v) in self._constant for v in record.ins):
                self._constant |= {id(v) for v in record.outs}
        made = {id(v) for record in run for v in record.outs} | self._constant
        within = Counter(id(v) for record in run for v in record.ins)
        needed = {
            id(v)
            for record in run
            for v in record.outs
            if reads.get(id(v), 0) > within[id(v)]
            or read_in.get(id(v), set()) - {index}
            or id(v) in (self.residuals or ())
        }
        last = {id(v) for v in run[-1].outs}
        inputs = dict.fromkeys(
            self.tensor(v) for record in run for v in record.ins if v.axes and id(v) not in made
        )
        outputs = dict.fromkeys(
            self.tensor(v)
            for record in run
            for v in record.outs
            if v.axes and id(v) in needed | last and id(v) not in self._constant
        )
        found = []
        flops = sum(r.applied.flops * self._repeats(r.loop) for r in run)
        if inputs or outputs:
            dims = dict.fromkeys(d for n in (*inputs, *outputs) for d in self.tensors[n].dims)
            size = product(self.sizes[d] for d in dims)
            found.append(
                Op(
                    kind="elementwise",
                    inputs=tuple(inputs),
                    outputs=tuple(outputs),
                    work=flops / max(size, 1),
                    space=tuple(dims),
                    fused=not flops,  # only views: the neighbours read through them
                    name=self._fused_name(run),
                    residuals=self._read_backward(
                        [v for record in run for v in record.ins if id(v) not in made],
                        [v for record in run for v in record.outs],
                        stretch,
                    ),
                )
            )
        for record in run:
            if record.applied.kind != "reduce" or not record.outs[0].axes:
                continue
            if not {*self._kinds(record.applied.contracted)} & {"tensor", "context"}:
                continue  # nothing to sum between devices within the forward pass
            found.append(
                Op(
                    kind="reduce",
                    inputs=(),
                    outputs=(self.tensor(record.outs[0]),),
                    contracted=self._summed(record),
                    work=0.0,
                    fused=True,
                    residuals=(),
                )
            )
        return found

    def _product_name(self, record: Record) -> str:
        """What policies call a product: as the program names it, or what it is to attention."""
        if label := _label([record]):
            return label
        makes, reads = (any(map(self._is_scores, side)) for side in (record.outs, record.ins[:2]))
        return "scores" if makes else "attention" if reads else ""

    def _fused_name(self, run: Sequence[Record]) -> str:
        outs = [v for record in run for v in record.outs]
        return _label(run) or ("softmax" if any(map(self._is_scores, outs)) else "")

    def _is_scores(self, value: Value) -> bool:
        return pairs_positions(self.graph, self.splits, value)

    def _kinds(self, axes: Axes) -> Iterable[str]:
        for axis in axes:
            for atom in self.graph.atoms(axis):
                if atom in self.splits.kinds:
                    yield self.splits.kinds[atom]
