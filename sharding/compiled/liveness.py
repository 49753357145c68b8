"""Peak memory of a partitioned step: which arrays reach memory, and when each is alive.

A compiler fuses what works element by element, so few of a program's arrays exist. Here an array
is *stored* if an operation that is no loop over elements makes or reads it, if it goes in or out
of a loop, or if several readers would each have to compute a costly function of it again;
all others are computed where they are read, which keeps alive what they are computed from. The
result of a product takes what is done to it element by element along, as far as one reader goes.
A stored array lives from the instruction that makes it to the last that reads it, directly or
through what is fused; loops hold what they stack throughout, and their bodies' peak on top.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sharding.compiled.computation import Array, Computation, Instruction, Move
from sharding.machines.topology import Cluster
from sharding.programs.program import dtype_bytes
from sharding.tracing.rules import TRANSCENDENTAL, rule_kind
from sharding.tracing.walk import scan_counts

# Element-by-element operations that only show an array otherwise: reading through them is free.
_VIEWS = frozenset(
    ["reshape", "transpose", "squeeze", "expand_dims", "stop_gradient", "sharding_constraint",
     "optimization_barrier", "copy", "copy_p", "name", "pvary"]
)  # fmt: skip
_IN_PLACE = frozenset(["dynamic_update_slice"])
_ADDS = frozenset(["add", "add_any"])


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """What a compiler does with operations that work element by element.

    Attributes:
      epilogues: a product's result is worked on before it is written, by one reader after the
        other.
      prologues: products that may each compute an operand while they read it; one that more
        products read is written. Costly functions are never computed so.
      slices: what products read of a loop's stacked operands is copied out of the stack.
      softmax: a product, the maximum of its rows and the exponentials are one loop, which computes
        the product twice and writes the exponentials only.
      relayout: a loop that writes single rows of an array has it laid out for that, in a copy;
        of several such arrays all but one are copied into a donated place.
      retile: arrays of two-byte numbers that a loop reads are copied out of the arguments, whose
        tiles are those of four-byte numbers.
      late: what is needed only after a loop is computed after it, however much its operands take
        meanwhile; and within a loop a product only when it is read.
      combined: what goes into a sum lies whole before it is scattered; a loop reduces all its
        gradients together, at the end of its body.
      restacks: stacks lie as the body of their loop wants them, in copies: results that a product
        sums over the last axis of, and arguments that are gathered along another axis than the
        first.
      converts: stacked arguments whose slices a loop converts are converted whole before it.
      prefetches: the next weight of a loop's body is gathered while a product reads the one before.
    """

    epilogues: bool
    prologues: int
    slices: bool
    softmax: bool
    relayout: bool
    retile: bool
    late: bool
    combined: bool
    restacks: bool
    prefetches: bool
    converts: bool


_TPU = Fusion(epilogues=True, prologues=1, slices=False, softmax=False, relayout=True,
              retile=False, late=False, combined=False, restacks=False,
              prefetches=False, converts=True)  # fmt: skip
_GPU = Fusion(epilogues=False, prologues=0, slices=True, softmax=False, relayout=False,
              retile=False, late=True, combined=True, restacks=True,
              prefetches=True, converts=False)  # fmt: skip
# Chips whose compiler does otherwise than that of its kind of machine. All of it was seen in
# buffer assignments (XLA_FLAGS=--xla_dump_to of a compilation by experiments.planner_memory).
_CHIPS: Mapping[str, Fusion] = {
    "v6e": replace(_TPU, softmax=True),
    "tpu7x": replace(_TPU, softmax=True, retile=True),
}


def fusion_of(cluster: Cluster) -> Fusion:
    """What the compiler for a cluster's chips fuses; that of GPUs for machines without one."""
    return _CHIPS.get(cluster.chip.name, _TPU if cluster.is_torus else _GPU)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a device holds at most.

    Attributes:
      arguments: bytes of arguments, which stay throughout.
      results: bytes of results that take no argument's place.
      temporary: the most that is alive besides, at once.
      alive: what that is: bytes and a description, largest first.
    """

    arguments: float
    results: float
    temporary: float
    alive: tuple[tuple[float, str], ...] = ()

    @property
    def total(self) -> float:
        """Bytes of the device."""
        return self.arguments + self.results + self.temporary


def peak(
    step: Computation,
    mesh: Mapping[str, int],
    fusion: Fusion,
    donated: Iterable[int] = (),
    *,
    detail: bool = False,
) -> Peak:
    """The peak of a partitioned step.

    Args:
      step: after `partition`.
      mesh: axis name to size.
      fusion: what the compiler fuses.
      donated: positions of inputs whose memory results of the same shape may take.
      detail: list what is alive.
    """
    arguments = sum(a.bytes(mesh) for a in step.inputs)
    free = [_kind(step.inputs[i]) for i in donated]
    results = 0.0
    for array in step.outputs:
        if _kind(array) in free:
            free.remove(_kind(array))
        elif not any(array is a for a in step.inputs):
            results += array.bytes(mesh)
    found = _Body(step, mesh, {id(a) for a in (*step.inputs, *step.outputs)}, fusion)
    size, alive = found.peak()
    return Peak(
        arguments=arguments,
        results=results,
        temporary=size,
        alive=tuple(sorted(alive, key=lambda item: -item[0])) if detail else (),
    )


def _kind(array: Array) -> tuple[tuple[int, ...], str]:
    return array.shape, array.dtype


@dataclass(eq=False)
class _Buffer:
    """A stored array: its bytes, and the first and last instruction at which it is alive."""

    size: float
    start: int
    end: int
    what: str
    uses: list[int] = field(default_factory=list)


def _late(body: Computation) -> list[Instruction]:
    """The instructions, those that only something after a loop reads put after it."""
    loops = [i for i, instruction in enumerate(body.instructions) if instruction.bodies]
    if not loops:
        return body.instructions
    when = {id(array): len(body.instructions) for array in body.outputs}
    position: dict[int, int] = {}
    for i in reversed(range(len(body.instructions))):
        instruction = body.instructions[i]
        first = min((when.get(id(a), len(body.instructions)) for a in instruction.outs), default=i)
        passed = any(i < loop < first for loop in loops)
        position[i] = max(first - 1, i) if passed and not instruction.bodies else i
        for array in instruction.ins:
            when[id(array)] = min(when.get(id(array), len(body.instructions)), position[i])
    return [body.instructions[i] for i in sorted(position, key=lambda i: (position[i], i))]


def _lazy(body: Computation) -> list[Instruction]:
    """The instructions, products and views that are no results right before they are read."""
    results = {id(array) for array in body.outputs}
    when: dict[int, int] = {}
    position: dict[int, int] = {}
    for i in reversed(range(len(body.instructions))):
        instruction = body.instructions[i]
        moves = instruction.name in _VIEWS or rule_kind(instruction.name) == "dot"
        if moves and not any(id(a) in results for a in instruction.outs):
            position[i] = max(i, min((when.get(id(a), i) for a in instruction.outs), default=i))
        else:
            position[i] = i
        for array in instruction.ins:
            when[id(array)] = min(when.get(id(array), position[i]), position[i])
    return [body.instructions[i] for i in sorted(position, key=lambda i: (position[i], i))]


def _seen_through(body: Computation) -> dict[int, int]:
    """Of arrays that show an input in another shape or type: its identity, by theirs."""
    found = {id(array): id(array) for array in body.inputs}
    for instruction in body.instructions:
        shows = instruction.name in _VIEWS or instruction.name == "convert_element_type"
        if shows and id(instruction.ins[0]) in found:
            found[id(instruction.outs[0])] = found[id(instruction.ins[0])]
    return found


def _inlined(instructions: Iterable[Instruction]) -> list[Instruction]:
    """Instructions, with what runs under `shard_map` in its place.

    It is no call: what goes in and out are the same buffers within, alive as long as they are read.
    """
    found: list[Instruction] = []
    for instruction in instructions:
        if instruction.name != "shard_map":
            found.append(instruction)
            continue
        (body,), eqn = instruction.bodies, instruction.eqn
        entering = zip(instruction.ins, body.inputs, strict=True)
        leaving = zip(body.outputs, instruction.outs, strict=True)
        found += [Instruction("reshape", eqn, [outer], [inner]) for outer, inner in entering]
        found += _inlined(body.instructions)
        found += [Instruction("reshape", eqn, [inner], [outer]) for inner, outer in leaving]
        found[-1].moves = instruction.moves
    return found


def _scattered_into_sums(body: Computation) -> list[Instruction]:
    """The instructions; what is scattered into nothing and then added is scattered into the rest.

    XLA turns `x + scatter(0, i, u)` into `scatter(x, i, u)`, which needs no zeros.
    """
    maker = {id(array): i for i in body.instructions for array in i.outs}
    readers: dict[int, int] = {}
    for array in (*body.outputs, *(a for i in body.instructions for a in i.ins)):
        readers[id(array)] = readers.get(id(array), 0) + 1

    def of_nothing(array: Array) -> Instruction | None:
        made = maker.get(id(array))
        if made is None or made.name != "scatter-add" or made.moves or readers[id(array)] > 1:
            return None
        filled = maker.get(id(made.ins[0]))
        if filled is None or filled.name != "broadcast_in_dim":
            return None
        return made if getattr(filled.eqn.invars[0], "val", None) == 0 else None

    gone: set[int] = set()
    found: list[Instruction] = []
    for instruction in body.instructions:
        scatters = [of_nothing(a) for a in instruction.ins] if instruction.name in _ADDS else []
        added = next(((k, made) for k, made in enumerate(scatters) if made), None)
        rest = instruction.ins[1 - added[0]] if added else None
        if added is None or rest is None or instruction.moves or not rest.shape:
            found.append(instruction)
            continue
        _, made = added
        gone.add(id(made))
        found.append(replace(made, ins=[rest, *made.ins[1:]], outs=instruction.outs))
    return [instruction for instruction in found if id(instruction) not in gone]


class _Body:
    """The buffers of a computation whose inputs and outputs are held by whoever runs it."""

    def __init__(
        self,
        body: Computation,
        mesh: Mapping[str, int],
        outside: set[int],
        fusion: Fusion,
        slices: Sequence[Array] = (),
        *,
        inside: bool = False,
    ) -> None:
        body = replace(body, instructions=_inlined(body.instructions))
        body = replace(body, instructions=_scattered_into_sums(body))
        self.body, self.mesh, self.outside, self.fusion = body, mesh, outside, fusion
        self.inside = inside
        order = _lazy if inside else _late
        self.instructions = order(body) if fusion.late else body.instructions
        self.readers: dict[int, list[int]] = {}
        self.maker: dict[int, int] = {}
        for i, instruction in enumerate(self.instructions):
            for array in instruction.ins:
                self.readers.setdefault(id(array), []).append(i)
            for array in instruction.outs:
                self.maker[id(array)] = i
        self.results = {id(a) for a in body.outputs}
        self.slices = slices if fusion.slices else ()
        self.roots: dict[int, frozenset[int]] = {}
        self.stored = self._stored()
        self.buffers: dict[int, _Buffer] = {}
        self.turned: dict[int, _Buffer] = {}  # copies of stacks, which all loops read
        self.gathered: int | None = None  # where the last weight was
        self.extra: dict[int, tuple[float, list[tuple[float, str]]]] = {}
        self._place()

    def _fusible(self, instruction: Instruction) -> bool:
        apart = instruction.bodies or instruction.name in (*_IN_PLACE, "device_put")
        return not apart and rule_kind(instruction.name) == "elementwise"

    def _stored(self) -> set[int]:
        """Arrays that reach memory."""
        found: set[int] = set()
        taken: set[int] = set()
        for instruction in self.instructions:
            for array in instruction.outs:
                if not array.shape or instruction.name in _IN_PLACE or id(array) in taken:
                    continue
                if self.fusion.epilogues and rule_kind(instruction.name) == "dot":
                    passed, end = self._epilogue(array)
                    taken |= {id(a) for a in passed}
                    found.add(id(end))
                elif not self._fusible(instruction) or self._needs_memory(instruction, array):
                    found.add(id(array))
        return found - self._within_softmax(found) if self.fusion.softmax else found

    def _within_softmax(self, stored: set[int]) -> set[int]:
        """Products that only a maximum and stored exponentials read."""
        found: set[int] = set()
        for instruction in self.instructions:
            for array in instruction.outs:
                if id(array) not in stored or id(array) in self.results:
                    continue
                readers = [self.instructions[i] for i in set(self.readers.get(id(array), []))]
                kinds = {rule_kind(reader.name) for reader in readers}
                if kinds == {"reduce", "elementwise"} and all(
                    reader.name == "reduce_max" or self._leads_to_costly(reader, stored)
                    for reader in readers
                ):
                    found.add(id(array))
        return found

    def _leads_to_costly(self, instruction: Instruction, stored: set[int]) -> bool:
        out = instruction.outs[0]
        if instruction.name in TRANSCENDENTAL:
            return id(out) in stored
        readers = [self.instructions[i] for i in set(self.readers.get(id(out), []))]
        return (
            id(out) not in stored and len(readers) == 1 and self._fusible(readers[0])
            and self._leads_to_costly(readers[0], stored)
        )  # fmt: skip

    def _epilogue(self, product: Array) -> tuple[list[Array], Array]:
        """What is done to a product before it is written: arrays passed, and the one written.

        Another type alone is left to the readers, who read less so.
        """
        passed, end, worked = [], product, False
        while id(end) not in self.results:
            readers = set(self.readers.get(id(end), []))
            reader = self.instructions[readers.pop()] if len(readers) == 1 else None
            if reader is None or not self._fusible(reader):
                break
            worked |= reader.name not in _VIEWS and reader.name != "convert_element_type"
            passed.append(end)
            end = reader.outs[0]
        if worked or id(end) in self.results:
            return passed, end
        return [], product

    def _needs_memory(self, instruction: Instruction, array: Array) -> bool:
        if id(array) in self.results:
            return True
        if instruction.name in _VIEWS or instruction.name == "broadcast_in_dim":
            return False
        others = [self.instructions[i] for i in set(self.readers.get(id(array), []))]
        products = sum(rule_kind(r.name) == "dot" for r in others)
        rest = [r for r in others if rule_kind(r.name) not in ("dot", "reduce")]
        if products > self.fusion.prologues or any(not self._fusible(r) for r in rest):
            return True
        costly = instruction.name in TRANSCENDENTAL and len(others) > 1
        return costly and self.fusion.prologues > 0 and self._feeds_product(array)

    def _feeds_product(self, array: Array) -> bool:
        """Whether a product reads it through what is fused into the product."""
        for i in set(self.readers.get(id(array), [])):
            reader = self.instructions[i]
            if rule_kind(reader.name) == "dot":
                return True
            if self._fusible(reader):
                out = reader.outs[0]
                if not self._needs_memory(reader, out) and self._feeds_product(out):
                    return True
        return False

    def _place(self) -> None:
        """Lifetimes of what is stored, and the peaks of loops."""
        # What reading an array reads: itself if it is stored, else what it is computed from.
        for array in self.body.inputs:
            self.roots[id(array)] = frozenset()
        for array in self.slices:
            readers = set(self.readers.get(id(array), []))
            if any(rule_kind(self.instructions[i].name) == "dot" for i in readers):
                what = f"slice {array.dtype}{array.shape}"
                size = array.bytes(self.mesh)
                self.buffers[id(array)] = _Buffer(size, min(readers), min(readers), what)
                self.roots[id(array)] = frozenset([id(array)])
        for i, instruction in enumerate(self.instructions):
            read: set[int] = set()
            for array in instruction.ins:
                read |= self.roots.get(id(array), frozenset())
            read = self._moved(instruction, i, read)
            writes = [a for a in instruction.outs if id(a) in self.stored]
            if writes or not self._fusible(instruction):
                for key in read:
                    self.buffers[key].end = max(self.buffers[key].end, i)
            for array in instruction.outs:
                if self._overwrites(instruction, i):
                    self.roots[id(array)] = self.roots[id(instruction.ins[0])]
                elif id(array) in self.stored and id(array) not in self.outside:
                    what = f"{instruction.name} {array.dtype}{array.shape}"
                    self.buffers[id(array)] = _Buffer(array.bytes(self.mesh), i, i, what)
                    self.roots[id(array)] = frozenset([id(array)])
                elif instruction.name in _IN_PLACE:
                    self.roots[id(array)] = self.roots.get(id(instruction.ins[0]), frozenset())
                elif id(array) in self.stored:
                    self.roots[id(array)] = frozenset()
                else:
                    self.roots[id(array)] = frozenset(read)
            if instruction.bodies:
                self.extra[i] = self._inside(instruction)
                self._copied(instruction, i)
        for buffer in self.turned.values():
            self.buffers[-len(self.buffers) - 1] = buffer
        end = len(self.instructions)
        for array in self.body.outputs:
            for key in self.roots.get(id(array), frozenset()):
                self.buffers[key].end = end

    def _moved(self, instruction: Instruction, i: int, read: set[int]) -> set[int]:
        """Places what an instruction's collectives make; what the instruction then reads."""
        for move in instruction.moves:
            if move.kind not in ("all-gather", "all-to-all"):
                self._unreduced(move, instruction, i)
                continue
            key = -len(self.buffers) - 1
            what = f"{move.kind} {move.array.dtype}{move.array.shape}"
            size = move.array.bytes(self.mesh, move.target)
            start = i
            if self.inside and self.fusion.prefetches and move.array.is_weight:
                start, self.gathered = i if self.gathered is None else self.gathered, i
            self.buffers[key] = _Buffer(size, start, self._last_use(move.array, i), what)
            if rule_kind(instruction.name) == "dot":
                read = read | {key}  # until what the product is computed into is written
            if instruction.name == "sharding_constraint":  # its readers read what was moved
                self.buffers[key].end = i
                read = {key}
        return read

    def _copied(self, loop: Instruction, i: int) -> None:
        """Places the copies of its operands that a loop reads."""
        for size, what in self._copies(loop):
            self.buffers[-len(self.buffers) - 1] = _Buffer(size, i, i, what)
        for stack, dtype in self._read_otherwise(loop):
            what = f"{'turned' if dtype == stack.dtype else dtype} {stack.dtype}{stack.shape}"
            size = stack.bytes(self.mesh) * dtype_bytes(dtype) / dtype_bytes(stack.dtype)
            self.turned.setdefault(id(stack), _Buffer(size, i, i, what)).end = i

    def _overwrites(self, instruction: Instruction, i: int) -> bool:
        """Whether a scatter writes into its operand, which nobody wants as it was.

        Neither who runs the body, nor what reads it later, be it through what is fused.
        """
        if rule_kind(instruction.name) != "scatter" or instruction.name in _IN_PLACE:
            return False
        operand = instruction.ins[0]
        if id(operand) not in self.buffers or self.buffers[id(operand)].end > i:
            return False
        if instruction.moves or id(operand) in self.results:
            return False
        if any(id(out) in self.outside for out in instruction.outs):
            return False
        showing = [array for array, roots in self.roots.items() if id(operand) in roots]
        return all(max(self.readers.get(array, [i])) <= i for array in showing)

    def _unreduced(self, move: Move, instruction: Instruction, i: int) -> None:
        """What goes into a sum: until it is scattered, or until a loop reduces its gradients."""
        is_gradient = rule_kind(instruction.name) == "dot" and not any(
            array.is_weight for array in instruction.ins
        )
        if self.fusion.combined and self.inside and is_gradient:
            end = len(self.instructions)
        elif move.kind == "reduce-scatter":
            end = i
        else:
            return
        what = f"{move.kind} of {move.array.dtype}{move.array.shape}"
        self.buffers[-len(self.buffers) - 1] = _Buffer(move.bytes, i, end, what)

    def _copies(self, loop: Instruction) -> list[tuple[float, str]]:
        """Operands of a loop that are copied into a layout of its own."""
        if loop.name != "scan":
            return []
        if self.fusion.restacks:
            return self._restacked(loop)
        held = [a for a in loop.ins if not self.roots.get(id(a)) and id(a) in self.outside]
        if self.fusion.retile:
            return [(a.bytes(self.mesh), f"tiled again {a.dtype}{a.shape}") for a in held
                    if len(a.shape) > 2 and dtype_bytes(a.dtype) == 2]  # fmt: skip
        if not self.fusion.relayout:
            return []
        (body,) = loop.bodies
        written = {id(i.ins[0]) for i in body.instructions if i.name in _IN_PLACE
                   and i.ins[1].shape[-2:-1] == (1,) != i.ins[0].shape[-2:-1]}  # fmt: skip
        places = zip(body.inputs, loop.ins, strict=True)
        sizes = [a.bytes(self.mesh) for mine, a in places if id(mine) in written and a in held]
        return [(max(sizes), "laid out again for its writes")] if sizes else []

    def _restacked(self, loop: Instruction) -> list[tuple[float, str]]:
        (body,) = loop.bodies
        summed: set[int] = set()
        for inner in body.instructions:
            if inner.name == "dot_general":
                axes, _ = inner.eqn.params["dimension_numbers"]
                summed |= {id(a) for a, gone in zip(inner.ins, axes, strict=True)
                           if len(a.shape) - 1 in gone}  # fmt: skip
        places = zip(body.outputs, loop.outs, strict=True)
        return [(a.bytes(self.mesh), f"stacked as it is read {a.dtype}{a.shape}")
                for mine, a in places if id(mine) in summed and id(a) in self.results]  # fmt: skip

    def _read_otherwise(self, loop: Instruction) -> list[tuple[Array, str]]:
        """Stacked arguments that loops read in a copy, and the type of its numbers.

        What is gathered along another axis than the slice's first has to be contiguous, so that
        the stack is turned before the loop; what is computed there is written turned. And where
        slices are only converted to a smaller type, the whole stack is, once.
        """
        if loop.name != "scan" or not (self.fusion.restacks or self.fusion.converts):
            return []
        (body,) = loop.bodies
        shown = _seen_through(body)
        gathered = {shown.get(id(m.array), id(m.array)): m for i in body.instructions
                    for m in i.moves if m.kind == "all-gather"}  # fmt: skip
        found = []
        for mine, stack in zip(body.inputs, loop.ins, strict=True):
            if id(stack) not in self.outside or self.roots.get(id(stack)):
                continue
            if self.fusion.restacks:
                move = gathered.get(id(mine))
                # What a program gathers itself may lie nowhere yet: its target has no axes.
                if move and move.array.spec and move.array.spec[:1] == move.target[:1]:
                    found.append((stack, stack.dtype))
            elif len(mine.shape) < len(stack.shape):
                readers = [i for i in body.instructions if any(a is mine for a in i.ins)]
                if {i.name for i in readers} == {"convert_element_type"}:
                    dtype = min((i.outs[0].dtype for i in readers), key=dtype_bytes)
                    if dtype_bytes(dtype) < dtype_bytes(stack.dtype):
                        found.append((stack, dtype))
        return found

    def _last_use(self, array: Array, now: int) -> int:
        """The last instruction that reads an array as a product does."""
        later = [i for i in self.readers.get(id(array), []) if i >= now]
        return max([now, *later])

    def _inside(self, loop: Instruction) -> tuple[float, list[tuple[float, str]]]:
        best: tuple[float, list[tuple[float, str]]] = (0.0, [])
        for body in loop.bodies:
            outside = {id(a) for a in body.inputs}
            slices: Sequence[Array] = ()
            if loop.name == "scan":
                consts, count = scan_counts(loop.eqn.params)
                # What is stacked is written into the stack; what goes round may need a second
                # buffer while the first is still read.
                outside |= {id(a) for a in body.outputs[count:]}
                slices = body.inputs[consts + count :]
            found = _Body(body, self.mesh, outside, self.fusion, slices, inside=True).peak()
            best = max(best, found, key=lambda item: item[0])
        return best

    def peak(self) -> tuple[float, list[tuple[float, str]]]:
        """The most that is alive at once, and what."""
        best, alive_at = 0.0, 0
        ordered = list(self.buffers.values())
        events: dict[int, float] = {}
        for buffer in ordered:
            events[buffer.start] = events.get(buffer.start, 0.0) + buffer.size
            events[buffer.end + 1] = events.get(buffer.end + 1, 0.0) - buffer.size
        alive = 0.0
        for i in range(len(self.instructions) + 1):
            alive += events.get(i, 0.0)
            now = alive + self.extra.get(i, (0.0, []))[0]
            if now > best:
                best, alive_at = now, i
        held = [(b.size, b.what) for b in ordered if b.start <= alive_at <= b.end]
        return best, held + self.extra.get(alive_at, (0.0, []))[1]
