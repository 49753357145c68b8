"""Where every array of a step lies, and which collectives that takes.

What the partitioner of XLA (GSPMD, arXiv:2105.04663; Shardy) does to a program, done to a
`Computation`: layouts flow from the arguments through the operations, later constraints pull
results to where they are wanted, and wherever an operand lies otherwise than its operation needs,
a collective moves it. The rules:

* An operation runs over the dimensions that its operands share (`sharding.tracing.rules`). A mesh
  axis divides one of them; activations say which before weights do, so that a weight divided over
  the axis of the batch is gathered. Look-ups are the exception: the rows stay divided, the indices
  are gathered and the result is exchanged, which moves less than a table would.
* A sum over a divided dimension leaves partial sums: they are scattered if the result is wanted
  divided over that axis, and else reduced on all devices. Partial sums that are added to each
  other are added first and reduced once.
* An operand is gathered once, in the type that is read, however many operations read it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sharding.compiled.computation import Array, Computation, Instruction, Move, Spec
from sharding.machines.topology import Cluster
from sharding.programs.fused import FUSED
from sharding.tracing.dims import DimensionGraph
from sharding.tracing.rules import Applied, opaque, rule_for, rule_kind
from sharding.tracing.walk import applied_kernel, scan_counts

# Operations whose weights are not gathered: rows of them are looked up or added to.
_SCATTERS = frozenset(["scatter", "scatter-add", "scatter_add"])
# Collectives that stand in a program, under `jax.shard_map`.
_WRITTEN_OUT = {
    "psum": "all-reduce", "psum_invariant": "all-reduce", "pmax": "all-reduce",
    "pmin": "all-reduce", "all_gather": "all-gather", "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}  # fmt: skip
_LOOKUPS = _SCATTERS | {"gather"}
_SUMS = frozenset(["all-reduce", "reduce-scatter"])
# What shows partial sums in another shape.
_VIEWS = frozenset(["reshape", "transpose", "squeeze", "expand_dims", "sharding_constraint"])
_ADDS = frozenset(["add", "add_any"])
# Loops run again until what goes round lies where it came from; twice settles all but cycles.
_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Partitioner:
    """What compilers do differently.

    Attributes:
      scatters: sums of activations that are wanted divided are scattered; else they are reduced on
        all devices, of which each keeps its part.
      regathers: two products of one body that read a weight of more than two dimensions gather it
        for each, in the layout that suits it.
      reduces: kinds of collectives that are made of an all-reduce where they join all devices: a
        gather as the sum of arrays that are zero but for one's own part.
    """

    scatters: bool = True
    regathers: bool = False
    reduces: frozenset[str] = frozenset()


# Dimensions of a torus are rings from this many chips on; chips with three whose compilers reduce
# along all of them at once rather than gather.
_RING = 4
_REDUCES = {
    "v4": frozenset(["all-gather", "reduce-scatter"]),
    "v5p": frozenset(["all-gather", "reduce-scatter"]),
    "tpu7x": frozenset(["all-gather"]),
}


def partitioner_of(cluster: Cluster) -> Partitioner:
    """What the compiler for a cluster's chips does; seen in programs compiled for v4 to Ironwood
    and for H100s.
    """
    rings = cluster.is_torus and cluster.slices == 1 and min(cluster.shape) >= _RING
    return Partitioner(
        scatters=not cluster.is_torus,
        regathers=cluster.is_torus,
        reduces=_REDUCES.get(cluster.chip.name, frozenset()) if rings else frozenset(),
    )


def partition(
    step: Computation,
    mesh: Mapping[str, int],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    weights: Collection[int] | None = None,
    *,
    partitioner: Partitioner | None = None,
) -> None:
    """Fills in where arrays lie and what moves.

    Args:
      step: whose arrays and instructions are filled in.
      mesh: axis name to size.
      inputs: the `PartitionSpec` of every input.
      outputs: the `PartitionSpec` of every output; None where the compiler may choose.
      weights: positions of inputs that are parameters or lie as they do; None for all.
      partitioner: of the compiler; one that does as planned when None.
    """
    for i, (array, spec) in enumerate(zip(step.inputs, inputs, strict=True)):
        array.spec = _full(spec, len(array.shape))
        array.is_weight = weights is None or i in weights
    for array, spec in zip(step.outputs, outputs, strict=True):
        if spec is not None:
            array.wanted = _full(spec, len(array.shape))
    flow = _Flow(dict(mesh), partitioner or Partitioner())
    flow.backward(step)
    flow.forward(step)
    flow.settle(step)
    flow.deliver(step.outputs, [a.wanted for a in step.outputs], step.instructions)


def _full(spec: Any, rank: int) -> Spec:
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(entries + [()] * (rank - len(entries)))


class _Flow:
    def __init__(self, mesh: dict[str, int], partitioner: Partitioner) -> None:
        self.mesh = mesh
        self.partitioner = partitioner
        self.manual: frozenset[str] = frozenset()

    # Wanted layouts, from the results towards the arguments.

    def backward(self, body: Computation) -> None:
        for instruction in reversed(body.instructions):
            name = instruction.name
            if name == "sharding_constraint":
                spec = getattr(instruction.eqn.params["sharding"], "spec", None)
                if spec is not None:
                    out, source = instruction.outs[0], instruction.ins[0]
                    out.wanted = self._open(_full(spec, len(out.shape)))
                    source.wanted = out.wanted
            elif name == "scan":
                self._scan_backward(instruction)
            elif instruction.bodies:
                for inner in instruction.bodies:
                    for mine, outer in zip(inner.outputs, instruction.outs, strict=False):
                        mine.wanted = mine.wanted or outer.wanted
                    self.backward(inner)
            elif any(out.wanted is not None for out in instruction.outs):
                self._pull(instruction)

    def _open(self, spec: Spec) -> Spec:
        return tuple(tuple(a for a in e if a not in self.manual) for e in spec)

    def _scan_backward(self, loop: Instruction) -> None:
        body, params = loop.bodies[0], loop.eqn.params
        consts, carried = scan_counts(params)
        for i, outer in enumerate(loop.outs):
            mine = body.outputs[i]
            if outer.wanted is not None and not mine.is_literal:
                mine.wanted = outer.wanted if i < carried else outer.wanted[1:]
        self.backward(body)
        for i in range(carried):
            mine = body.inputs[consts + i]
            if mine.wanted is not None and body.outputs[i].wanted is None:
                body.outputs[i].wanted = mine.wanted
        self.backward(body)
        for i in range(carried):
            mine, outer = body.inputs[consts + i], loop.ins[consts + i]
            wanted = body.outputs[i].wanted or mine.wanted
            if outer.wanted is None:
                outer.wanted = wanted

    def _pull(self, instruction: Instruction) -> None:
        """Operands that are worked on element by element are wanted where the result is."""
        graph, ins, applied = _apply(instruction)
        if applied.kind != "elementwise" or len(applied.outs) != len(instruction.outs):
            return
        held: dict[int, tuple[str, ...]] = {}
        for out, axes in zip(instruction.outs, applied.outs, strict=True):
            if out.wanted is not None:
                self._claim(graph, axes, out.wanted, held, set())
        for array, axes in zip(instruction.ins, ins, strict=True):
            if array.wanted is None and not array.is_literal and array.shape:
                array.wanted = self._spec(graph, axes, held)

    # Layouts, from the arguments towards the results.

    def forward(self, body: Computation) -> None:
        moved: set[tuple[int, Spec, str]] = set()
        for instruction in body.instructions:
            instruction.moves = []
            if instruction.name == "sharding_constraint":
                self._constrain(instruction)
            elif instruction.name == "scan":
                self._scan(instruction)
            elif instruction.name == "shard_map":
                self._by_hand(instruction)
            elif instruction.name in _WRITTEN_OUT:
                self._written_out(instruction)
            elif instruction.bodies:
                self._branches(instruction)
            else:
                self._operation(instruction)
            # The partitioner keeps what it has moved for the next that reads it there.
            fresh = []
            for move in instruction.moves:
                key = id(move.array), move.target, move.kind
                again = self.partitioner.regathers and _free_axes(instruction, move.array) > 2
                if move.kind in _SUMS or key not in moved or again:
                    fresh.append(move)
                moved.add(key)
            instruction.moves = fresh
        _join_sums(body)

    def _constrain(self, instruction: Instruction) -> None:
        source, out = instruction.ins[0], instruction.outs[0]
        out.is_weight = source.is_weight
        out.spec = source.spec if out.wanted is None else out.wanted
        if source.spec is not None and out.spec is not None:
            instruction.moves += self._reshard(source, out.spec)

    def _operation(self, instruction: Instruction) -> None:
        graph, ins, applied = _apply(instruction)
        held: dict[int, tuple[str, ...]] = {}
        taken: set[str] = set(self.manual)
        operands = list(zip(instruction.ins, ins, strict=True))
        is_lookup = instruction.name in _LOOKUPS
        if is_lookup:  # rows are read where the table lies, and added where it will
            if instruction.name != "gather":
                for out, axes in zip(instruction.outs, applied.outs, strict=True):
                    self._claim(graph, axes, out.wanted or ((),) * len(axes), held, taken)
            table, axes = operands[0]
            if table.is_weight and table.spec is not None:
                self._claim(graph, axes, table.spec, held, taken)
        agreed = self._agreed(graph, operands, zip(instruction.outs, applied.outs, strict=True))
        for axes, spec in agreed:
            self._claim(graph, axes, spec, held, taken)
        for array, axes in operands:
            if array.spec is not None and (is_lookup or not array.is_weight):
                self._claim(graph, axes, array.spec, held, taken)
        for out, axes in zip(instruction.outs, applied.outs, strict=True):
            if out.wanted is not None and applied.kind != "opaque":
                summed = {a for x in applied.contracted for a in graph.atoms(x)}
                self._claim(graph, axes, out.wanted, held, set(taken), without=summed)
                taken |= {a for axes_ in held.values() for a in axes_}
        for array, axes in operands:
            if array.spec is not None and array.is_weight and not is_lookup:
                self._claim(graph, axes, array.spec, held, taken)
        if instruction.name == FUSED.name:  # nobody exchanges anything within a kernel
            inside = {atom for axis in applied.contracted for atom in graph.atoms(axis)}
            held = {atom: names for atom, names in held.items() if atom not in inside}
        free = all(a.spec is None or not a.shape for a, _ in operands)
        for array, axes in operands:
            needed = self._spec(graph, axes, held)
            if applied.kind == "opaque":
                needed = ((),) * len(array.shape)
            if array.spec is None:
                array.spec = needed if held and not array.is_literal else None
            elif array.spec != needed:
                instruction.moves += self._reshard(array, needed)
        if applied.kind == "elementwise" and len(operands) == 1:  # what it repeats, changed
            for out in instruction.outs:
                if instruction.ins[0].shape == out.shape and out.repeats is None:
                    out.repeats = instruction.ins[0].repeats
        is_weight = bool(operands) and all(a.is_weight or not a.shape for a, _ in operands)
        for out, axes in zip(instruction.outs, applied.outs, strict=True):
            out.is_weight = is_weight and applied.kind == "elementwise" and bool(operands)
            out.spec = None if free and out.wanted is None else self._spec(graph, axes, held)
        summed = [a for x in applied.contracted for atom in graph.atoms(x)
                  for a in held.get(atom, ())]  # fmt: skip
        if applied.kind == "scatter" and "add" in instruction.name:  # of updates held apart
            kept = {a for entry in instruction.outs[0].spec or () for a in entry}
            updates = self._spec(graph, ins[2], held)
            summed = [a for entry in updates for a in entry if a not in kept]
        if summed and applied.kind in ("dot", "grouped_dot", "reduce", "gather", "scatter"):
            instruction.moves += self._sum(instruction, tuple(summed))

    def _agreed(
        self,
        graph: DimensionGraph,
        operands: Sequence[tuple[Array, Sequence[int]]],
        results: Iterable[tuple[Array, Sequence[int]]],
    ) -> list[tuple[Sequence[int], Spec]]:
        """What an operand brings and the result wants: that stays, whatever else must move."""
        wanted: dict[int, set[str]] = {}
        for out, axes in results:
            for axis, names in zip(axes, out.wanted or (), strict=False):
                for atom in graph.atoms(axis):
                    wanted.setdefault(atom, set()).update(names)
        found = []
        for array, axes in operands:
            if array.spec is not None:
                kept = tuple(
                    names if names and all(set(names) <= wanted.get(atom, set())
                                           for atom in graph.atoms(axis)[:1]) else ()
                    for axis, names in zip(axes, array.spec, strict=True)
                )  # fmt: skip
                found.append((axes, kept))
        return found

    def _sum(self, instruction: Instruction, summed: tuple[str, ...]) -> list[Move]:
        """Partial sums: scattered over the axes along which the result is wanted, else reduced."""
        moves = []
        for out in instruction.outs:
            scattered: Spec = out.spec or ((),) * len(out.shape)
            wanted = out.wanted or scattered
            reads_weight = any(a.is_weight for a in instruction.ins)
            if reads_weight and not self.partitioner.scatters and instruction.name not in _SCATTERS:
                wanted = scattered
            into = tuple(a for a in summed if any(a in e for e in wanted))
            rest = tuple(a for a in summed if a not in into)
            size = out.bytes(self.mesh)
            if into:
                scattered = tuple(
                    mine + tuple(a for a in theirs if a in into and a not in mine)
                    for mine, theirs in zip(scattered, wanted, strict=True)
                )
                moves.append(Move("reduce-scatter", into, size, out, scattered))
                out.spec = scattered
                size = out.bytes(self.mesh)
            if rest:
                moves.append(Move("all-reduce", rest, size, out, scattered))
        return moves

    def _reshard(self, array: Array, target: Spec) -> list[Move]:
        """Collectives that take an array from where it lies to where it is needed."""
        held = array.spec
        if held is None or held == target:
            return []
        if array.repeats is not None:  # what is repeated is moved before
            source, axes = array.repeats
            entries = {a: target[i] for i, a in enumerate(axes) if a is not None}
            array.spec = target
            needed = tuple(entries.get(i, ()) for i in range(len(source.shape)))
            return self._reshard(source, needed)
        ours = {a: i for i, entry in enumerate(held) for a in entry}
        theirs = {a: i for i, entry in enumerate(target) for a in entry}
        crossing = tuple(a for a, i in ours.items() if theirs.get(a, i) != i)
        lost = tuple(a for a in ours if a not in theirs)
        found = []
        middle = held
        if crossing:  # from one dimension to another
            found.append(Move("all-to-all", crossing, array.bytes(self.mesh), array, target))
            middle = tuple(
                tuple(a for a in entry if a not in crossing)
                + tuple(a for a in crossing if theirs[a] == i)
                for i, entry in enumerate(held)
            )
        if lost:
            gathered = tuple(tuple(a for a in entry if a not in lost) for entry in middle)
            # What is cut further afterwards is cut before it is gathered, where that is possible.
            cut = tuple(
                entry if set(entry) <= set(mine) else mine
                for entry, mine in zip(target, gathered, strict=True)
            )
            size = array.bytes(self.mesh, cut)
            found.append(Move("all-gather", lost, size, array, target))
        return found

    def _scan(self, loop: Instruction) -> None:
        body, params = loop.bodies[0], loop.eqn.params
        consts, carried = scan_counts(params)
        for mine, outer in zip(body.inputs, loop.ins, strict=True):
            mine.is_weight = outer.is_weight
        for mine, outer in zip(body.inputs[:consts], loop.ins[:consts], strict=True):
            mine.spec = outer.spec
        xs = list(zip(body.inputs[consts + carried :], loop.ins[consts + carried :], strict=True))
        for mine, outer in xs:
            mine.spec = None if outer.spec is None else outer.spec[1:]
        rounds = list(range(consts, consts + carried))
        goes = {i: body.inputs[i].wanted or loop.ins[i].spec for i in rounds}
        for _ in range(_ROUNDS):
            for i in rounds:
                body.inputs[i].spec = goes[i]
                body.inputs[i].is_weight = loop.ins[i].is_weight and goes[i] == loop.ins[i].spec
            self.forward(body)
            after = {i: body.outputs[i - consts].spec for i in rounds}
            changed = {i: s for i, s in after.items() if s is not None and s != goes[i]}
            if not changed:
                break
            goes |= changed
        for mine, outer in zip(body.inputs[:consts], loop.ins[:consts], strict=True):
            outer.spec = mine.spec if outer.spec is None else outer.spec
        for mine, outer in xs:
            if outer.spec is None and mine.spec is not None:
                outer.spec = ((), *mine.spec)
        self.deliver(body.outputs[:carried], [goes[i] for i in rounds], body.instructions)
        for i in rounds:
            outer, spec = loop.ins[i], goes[i]
            if outer.spec is None:
                outer.spec = spec
            elif spec is not None:
                loop.moves += self._reshard(outer, spec)
            loop.outs[i - consts].spec = spec
        for mine, outer in zip(body.outputs[carried:], loop.outs[carried:], strict=True):
            outer.spec = None if mine.spec is None else ((), *mine.spec)

    def _branches(self, instruction: Instruction) -> None:
        """Conditions and loops of unknown length: operands that follow the first, as they lie."""
        for body in instruction.bodies:
            given = instruction.ins[len(instruction.ins) - len(body.inputs) :]
            for mine, outer in zip(body.inputs, given, strict=True):
                mine.spec, mine.is_weight = outer.spec, outer.is_weight
            self.forward(body)
            for mine, outer in zip(body.outputs, instruction.outs, strict=False):
                outer.spec = outer.spec or mine.spec

    def _by_hand(self, instruction: Instruction) -> None:
        """What runs under `shard_map`: shapes within are local to its axes already."""
        params, (body,) = instruction.eqn.params, instruction.bodies
        outside = self.manual
        self.manual = outside | frozenset(params["newly_manual_axes"])
        for mine, outer in zip(body.inputs, instruction.ins, strict=True):
            mine.is_weight = outer.is_weight
            mine.spec = None if outer.spec is None else self._open(outer.spec)
        self.backward(body)
        self.forward(body)
        for mine, outer, names in zip(
            body.outputs, instruction.outs, params["out_specs"], strict=True
        ):
            by_hand = _full(names, len(outer.shape))
            held = mine.spec or ((),) * len(outer.shape)
            outer.spec = tuple(a + b for a, b in zip(by_hand, held, strict=True))
        self.manual = outside

    def _written_out(self, instruction: Instruction) -> None:
        """A collective of the program's own: axes that are not its business stay as they are."""
        params = instruction.eqn.params
        named = params.get("axis_name", params.get("axes"))
        axes = (named,) if isinstance(named, str) else tuple(a for a in named if a in self.mesh)
        kind = _WRITTEN_OUT[instruction.name]
        for source, out in zip(instruction.ins, instruction.outs, strict=True):
            spec = source.spec
            if spec is not None and len(source.shape) != len(out.shape):
                spec = ((),) * len(out.shape)
                instruction.moves += self._reshard(source, ((),) * len(source.shape))
            out.spec = spec
            size = max(source.bytes(self.mesh), out.bytes(self.mesh))
            instruction.moves.append(Move(kind, axes, size, source, spec or ()))

    def settle(self, body: Computation) -> None:
        """Lays what is made of literals as its readers have it, which costs nothing."""
        for instruction in reversed(body.instructions):
            if instruction.name == "scan":
                inner = instruction.bodies[0]
                self.settle(inner)
                consts, _ = scan_counts(instruction.eqn.params)
                for mine, outer in zip(inner.inputs[:consts], instruction.ins, strict=False):
                    outer.spec = mine.spec if outer.spec is None else outer.spec
            elif not instruction.bodies and any(a.spec is None for a in instruction.ins):
                graph, ins, applied = _apply(instruction)
                held: dict[int, tuple[str, ...]] = {}
                taken = set(self.manual)
                for out, axes in zip(instruction.outs, applied.outs, strict=True):
                    if out.spec is not None:
                        self._claim(graph, axes, out.spec, held, taken)
                for array, axes in zip(instruction.ins, ins, strict=True):
                    if array.spec is None and not array.is_literal and held:
                        array.spec = self._spec(graph, axes, held)

    def deliver(
        self, results: Iterable[Array], wanted: Iterable[Spec | None], into: list[Instruction]
    ) -> None:
        """Moves results to where they have to be, after the last instruction."""
        for array, spec in zip(results, wanted, strict=True):
            if spec is None or array.is_literal:
                continue
            if array.spec is None:
                array.spec = spec
            elif array.spec != spec and into:
                maker = next((i for i in reversed(into) if array in i.outs), into[-1])
                maker.moves += self._reshard(array, spec)

    # Dimensions and the mesh axes that divide them.

    def _claim(
        self,
        graph: DimensionGraph,
        axes: Sequence[int],
        spec: Spec,
        held: dict[int, tuple[str, ...]],
        taken: set[str],
        without: Iterable[int] = (),
    ) -> None:
        """Divides factors as an array's layout does, with mesh axes that are still free."""
        for axis, names in zip(axes, spec, strict=True):
            left = list(names)
            for atom in graph.atoms(axis):
                room = graph.size(atom)
                mine: list[str] = []
                while left and room % self.mesh[left[0]] == 0:
                    room //= self.mesh[left[0]]
                    mine.append(left.pop(0))
                if atom not in held and mine and not set(mine) & taken and atom not in without:
                    held[atom] = tuple(mine)
                    taken.update(mine)
                elif atom in held and set(mine) - set(held[atom]) and atom not in without:
                    more = tuple(a for a in mine if a not in taken)
                    held[atom] = held[atom] + more
                    taken.update(more)
                if room != 1:
                    break

    def _spec(
        self, graph: DimensionGraph, axes: Sequence[int], held: Mapping[int, tuple[str, ...]]
    ) -> Spec:
        """How an array lies whose factors are divided so: an inner factor only where the outer
        is divided to the end.
        """
        found = []
        used: set[str] = set()
        for axis in axes:
            names: list[str] = []
            for atom in graph.atoms(axis):
                mine = [a for a in held.get(atom, ()) if a not in used]
                names += mine
                used.update(mine)
                ways = 1
                for name in mine:
                    ways *= self.mesh[name]
                if ways != graph.size(atom):
                    break
            found.append(tuple(names))
        return tuple(found)


def _free_axes(instruction: Instruction, array: Array) -> int:
    """Axes of a weight that a product reads, without those that it only carries along."""
    if instruction.name != "dot_general" or not array.is_weight:
        return 0
    _, batch = instruction.eqn.params["dimension_numbers"]
    return len(array.shape) - len(batch[0])


def _join_sums(body: Computation) -> None:
    """Leaves one reduction where products' partial sums that nothing else reads are added."""
    maker = {id(a): i for i in body.instructions for a in i.outs}
    readers: dict[int, int] = {}
    for array in (*body.outputs, *(a for i in body.instructions for a in i.ins)):
        readers[id(array)] = readers.get(id(array), 0) + 1

    def source(array: Array) -> Instruction | None:
        """What makes the partial sums that an array shows."""
        made = maker.get(id(array))
        if made is None or readers[id(array)] != 1:
            return None
        if made.name in _VIEWS and not made.moves:
            return source(made.ins[0])
        if rule_kind(made.name) != "dot" and made.name not in _ADDS:
            return None
        return made if any(m.kind in _SUMS for m in made.moves) else None

    for instruction in body.instructions:
        if instruction.name not in _ADDS:
            continue
        sources = [source(a) for a in instruction.ins]
        sums = [[m for m in s.moves if m.kind in _SUMS] if s else [] for s in sources]
        first, second = ({(m.kind, m.axes, m.bytes) for m in moves} for moves in sums)
        if not first or first != second:
            continue
        out = instruction.outs[0]
        for made in sources:
            assert made is not None
            made.moves = [m for m in made.moves if m.kind not in _SUMS]
        instruction.moves += [replace(m, array=out, target=out.spec or m.target) for m in sums[0]]


def _apply(instruction: Instruction) -> tuple[DimensionGraph, list[tuple[int, ...]], Applied]:
    """The operation's rule on a graph of its own."""
    if instruction.applied is None:
        graph = DimensionGraph()
        ins = [graph.array(array.shape) for array in instruction.ins]
        if instruction.name == FUSED.name:
            applied = applied_kernel(graph, instruction.eqn, ins)
        else:
            applied = (rule_for(instruction.name) or opaque)(graph, instruction.eqn, ins)
        instruction.applied = graph, ins, applied
    return instruction.applied
