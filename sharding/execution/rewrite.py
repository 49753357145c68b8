"""Runs a traced function again, with what a plan adds to its inside.

Sharding constraints on the results of products and look-ups and on what layers hand on;
rematerialisation of layers; and, in place of a scan over layers, whatever a pipeline makes of it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.sharding import PartitionSpec

from sharding.costs.strategies import REMAT
from sharding.tracing.dims import product
from sharding.tracing.splits import pairs_positions
from sharding.tracing.trace import Trace
from sharding.tracing.walk import Note, Notes, Value, scan_counts

# What products are called that a policy moves to the host's memory, and rows that it keeps.
_PRODUCT = "sharding product"
_INLINED = ("jit", "pjit", "closed_call", "core_call")
_REMAT = ("remat2", "checkpoint", "remat")
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
_CONSTRAINED = (*_PRODUCTS, "gather")

Body = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], list[Any]]


@dataclass(frozen=True)
class LayerScan:
    """A scan over stacked parameters.

    Attributes:
      body: (consts, carry, slices) -> the carry, then what is stacked.
      carry: what is known of what goes round.
      consts: what is known of what all layers share.
      length: how many layers.
      reverse: whether the last comes first.
      unroll: as in `jax.lax.scan`.
    """

    body: Body
    carry: tuple[Value, ...]
    consts: tuple[Value, ...]
    length: int
    reverse: bool
    unroll: int

    def run(self, consts: Sequence[Any], carry: Sequence[Any], xs: Sequence[Any]) -> list[Any]:
        """As the scan it was."""

        def step(carried: Any, slices: Any) -> tuple[Any, Any]:
            outs = self.body(consts, carried, slices)
            return tuple(outs[: len(carried)]), tuple(outs[len(carried) :])

        last, stacked = jax.lax.scan(
            step, tuple(carry), tuple(xs), length=self.length, reverse=self.reverse,
            unroll=self.unroll)  # fmt: skip
        return [*last, *stacked]


@dataclass
class _Exchanges:
    """Rows on their way to experts and back, within one run of a jaxpr.

    Attributes:
      by_expert: array, by the identity of its `Value`, to whether the product that it stems from
        works on experts.
      made: array to itself, exchanged.
    """

    by_expert: dict[int, bool] = field(default_factory=dict)
    made: dict[int, Any] = field(default_factory=dict)

    def follow(self, primitive: str, note: Note, *, by_expert: bool) -> None:
        """Notes how an equation's results lie: those of a product as it works, else as operands."""
        if primitive not in _PRODUCTS:
            found = [self.by_expert[id(v)] for v in note.ins if id(v) in self.by_expert]
            if not found:
                return
            by_expert = found[0]
        self.by_expert |= {id(v): by_expert for v in note.outs}


@dataclass(frozen=True, eq=False, kw_only=True)
class Rewrite:
    """What a plan adds to the inside of a function.

    Attributes:
      traced: the function.
      axes: name of a dimension to the mesh axes that divide it in activations.
      constrain: lays an array as a spec says.
      mesh: mesh axis to size.
      remat: policy for layers, a key of `strategies.REMAT`.
      offload: "activations": what the policy keeps lies in the host's memory.
      sequence_parallel: what layers hand on is divided along the sequence over the tensor axis.
      pipeline: runs a scan over layers; None leaves it a scan.
      gathers_weights: layers that are computed again gather each weight once, see `_gathered`.
      inside: of a layer that is computed again.
    """

    traced: Trace
    axes: Mapping[str, tuple[str, ...]]
    constrain: Callable[[Any, PartitionSpec], Any]
    mesh: Mapping[str, int] = field(default_factory=dict)
    remat: str = "none"
    offload: str = "none"
    sequence_parallel: bool = False
    pipeline: (
        Callable[[LayerScan, Sequence[Any], Sequence[Any], Sequence[Any]], list[Any]] | None
    ) = None
    gathers_weights: bool = False
    inside: bool = False

    def __call__(self, *args: Any) -> Any:
        """The function, on arguments of the traced shapes."""
        leaves, structure = jax.tree.flatten(args)
        if structure != self.traced.in_tree:
            raise ValueError(
                f"the step was planned for arguments {self.traced.in_tree}, got {structure}"
            )
        traced = self.traced
        outs = self._run(traced.closed.jaxpr, traced.closed.consts, leaves, traced.notes)
        return jax.tree.unflatten(traced.out_tree, outs)

    def spec(self, value: Value, *, by_expert: bool = False) -> PartitionSpec | None:
        """Where an activation lies; None if the plan does not say.

        Experts and batch may be divided by the same mesh axis. An array that has both is divided
        by experts where experts work on it, and by the batch elsewhere. An array in which one
        dimension stands twice (scores: sequence against sequence) is left to propagation, which
        knows which of the two the neighbours divide.
        """
        if value.role != "activation":
            return None
        atoms = [atom for axis in value.axes for atom in self.traced.graph.atoms(axis)]
        splits = self.traced.splits
        if len(set(atoms)) != len(atoms) or not set(atoms) & (splits.batch | splits.expert):
            return None
        shared = {
            name for atom in atoms if atom in splits.expert for name in self._axes_of(atom)
        } & {name for atom in atoms if atom in splits.batch for name in self._axes_of(atom)}
        loser = splits.batch if by_expert else splits.expert
        entries: list[Any] = []
        for axis in value.axes:
            held: list[str] = []
            for atom in self.traced.graph.atoms(axis):
                mine = self._axes_of(atom)
                if atom in loser:
                    mine = tuple(name for name in mine if name not in shared)
                held += [name for name in mine if name not in held]
                if not mine:  # an inner factor alone is not contiguous
                    break
            entries.append(tuple(held) or None)
        if self.sequence_parallel and tuple(atoms) in self._handed_on:
            self._divide_sequence(value, entries)
        if not any(entries):
            return None
        seen = [name for entry in entries for name in entry or ()]
        return PartitionSpec(*entries) if len(set(seen)) == len(seen) else None

    @functools.cached_property
    def _handed_on(self) -> set[tuple[int, ...]]:
        """Dimensions of what layers hand on: the results that are added to it have the same."""
        graph = self.traced.graph
        return {
            tuple(atom for axis in value.axes for atom in graph.atoms(axis))
            for value in _carried(self.traced.notes)
        }

    def _divide_sequence(self, value: Value, entries: list[Any]) -> None:
        """Adds the tensor axis to the sequence's entry, where it divides what is left of it."""
        used = {name for entry in entries for name in entry or ()}
        ways = self.mesh.get("tensor", 1)
        if ways == 1 or "tensor" in used:
            return
        for i, axis in enumerate(value.axes):
            if set(self.traced.graph.atoms(axis)[:1]) & self.traced.splits.sequence:
                held = entries[i] or ()
                local = self.traced.graph.size(axis) // product(self.mesh[name] for name in held)
                if local % ways == 0:
                    entries[i] = (*held, "tensor")
                return

    def _policy(self) -> Callable[..., Any] | None:
        """What `jax.checkpoint` keeps of a layer; None keeps everything."""
        kept = REMAT[self.remat]
        if self.remat == "attention":
            return _all_but_scores(self._score_shapes(self.traced.notes))
        if kept is None:
            return None
        policies = jax.checkpoint_policies
        if self.offload == "activations":
            names = [_PRODUCT] if self.remat == "dots" else sorted(kept)
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[], names_which_can_be_offloaded=names,
                offload_src="device", offload_dst="pinned_host")  # fmt: skip
        if self.remat == "dots":
            named = policies.save_only_these_names(_PRODUCT)
            return policies.save_from_both_policies(policies.dots_saveable, named)
        return policies.save_only_these_names(*sorted(kept))

    def _score_shapes(self, notes: Notes) -> set[tuple[int, ...]]:
        """Shapes of the arrays with an entry for every two positions."""
        traced, found = self.traced, set()
        for note in notes:
            for value in note.outs:
                if pairs_positions(traced.graph, traced.splits, value):
                    found.add(tuple(traced.graph.size(axis) for axis in value.axes))
            for body in note.bodies:
                found |= self._score_shapes(body)
        return found

    def _axes_of(self, atom: int) -> tuple[str, ...]:
        return tuple(self.axes.get(self.traced.names.get(atom, ""), ()))

    def _atoms(self, value: Value) -> set[int]:
        return {atom for axis in value.axes for atom in self.traced.graph.atoms(axis)}

    def _run(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        args: Sequence[Any],
        notes: Notes,
        exchanges: "_Exchanges | None" = None,
    ) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        exchanges = _Exchanges() if exchanges is None else exchanges

        def read(var: Any) -> Any:
            return var.val if isinstance(var, core.Literal) else env[var]

        for eqn, note in zip(jaxpr.eqns, notes, strict=True):
            ins = [read(v) for v in eqn.invars]
            by_expert = self._of_experts(note)
            name = eqn.primitive.name
            with _as_written(eqn):
                if name == "dot_general":
                    ins = [self._exchanged(x, v, by_expert, exchanges)
                           for x, v in zip(ins, note.ins, strict=True)]  # fmt: skip
                outs = self._equation(eqn, ins, note, exchanges)
            if name not in _INLINED:
                exchanges.follow(name, note, by_expert=by_expert)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[Any], note: Note, exchanges: "_Exchanges") -> list[Any]:
        name = eqn.primitive.name
        if name in _INLINED:
            body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            return self._run(body.jaxpr, body.consts, ins, note.bodies[0], exchanges)
        if name in _REMAT:
            return self._remat(eqn, ins, note)
        if name == "scan":
            return self._scan(eqn, ins, note)
        by_expert = name in _CONSTRAINED and self._of_experts(note)
        if name == "dot_general":
            ins = [self._gathered(x, v) for x, v in zip(ins, note.ins, strict=True)]
        bound = eqn.primitive.get_bind_params(eqn.params)
        # Before JAX 0.10.2 the functions of a custom derivative stood apart.
        functions, params = ((), bound) if isinstance(bound, dict) else bound
        outs = eqn.primitive.bind(*functions, *ins, **params)
        outs = list(outs) if eqn.primitive.multiple_results else [outs]
        if name in _CONSTRAINED:
            outs = [self._placed(x, v, by_expert) for x, v in zip(outs, note.outs, strict=True)]
        if name in _PRODUCTS and self.offload == "activations" and self.remat == "dots":
            outs = [checkpoint_name(x, _PRODUCT) for x in outs]
        return outs

    def _placed(self, x: Any, value: Value, by_expert: bool = False) -> Any:
        spec = self.spec(value, by_expert=by_expert)
        return x if spec is None else self.constrain(x, spec)

    def _of_experts(self, note: Note) -> bool:
        """Whether an operation reads the parameters of experts."""
        splits = self.traced.splits
        return any(v.role == "param" and self._atoms(v) & splits.expert for v in note.ins)

    def _exchanged(self, x: Any, value: Value, by_expert: bool, exchanges: "_Exchanges") -> Any:
        """A product's operand that has experts and batch: where the product works on it.

        Rows on their way to experts and back are exchanged here, and not gathered. A policy that
        keeps products keeps them exchanged, as the backward pass reads them too. Of rows that are
        kept as they lay before, the partitioner exchanges the stack of all layers' instead, in
        every layer of the backward pass.
        """
        splits = self.traced.splits
        if not (self._atoms(value) & splits.expert and self._atoms(value) & splits.batch):
            return x
        if exchanges.by_expert.get(id(value), by_expert) == by_expert:
            return self._placed(x, value, by_expert)
        if id(value) not in exchanges.made:
            moved = self._placed(x, value, by_expert)
            exchanges.made[id(value)] = (
                checkpoint_name(moved, _PRODUCT) if self.remat == "dots" else moved
            )
        return exchanges.made[id(value)]

    def _gathered(self, x: Any, value: Value) -> Any:
        """A weight of a layer that is computed again, as its product reads it.

        The second forward and the backward product read it then. Left to themselves, compilers
        gather it for each, in layouts that differ.
        """
        if not (self.inside and self.gathers_weights) or value.role != "param":
            return x
        axes = [tuple(a for atom in self.traced.graph.atoms(axis) for a in self._axes_of(atom))
                for axis in value.axes]  # fmt: skip
        if len({*sum(axes, ())}) != len(sum(axes, ())):
            return x
        spec = PartitionSpec(*(names or None for names in axes))
        return _forward_only(lambda y: self.constrain(y, spec), x)

    def _remat(self, eqn: Any, ins: list[Any], note: Note) -> list[Any]:
        body = eqn.params["jaxpr"]

        def run(*args: Any) -> list[Any]:
            return self._run(body, (), args, note.bodies[0])

        if not eqn.params["differentiated"]:
            policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
            return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)(*ins)
        # Within a backward pass it only keeps the compiler from undoing the recomputation.
        made = jax.make_jaxpr(run)(*ins)
        assert not made.consts, "constraints bring no constants"
        return eqn.primitive.bind(*ins, **{**eqn.params, "jaxpr": made.jaxpr})

    def _scan(self, eqn: Any, ins: list[Any], note: Note) -> list[Any]:
        count, going_round = scan_counts(eqn.params)
        carried = count + going_round
        layers = self._layers(eqn, note)
        given = ins[:count], ins[count:carried], ins[carried:]
        if note.carry is None or self.pipeline is None:
            return layers.run(*given)
        # Said again: micro-batches leave the stages in another order than the batch is divided in,
        # and the partitioner would divide what follows by stages, and gather all logits for it.
        outs = self.pipeline(layers, *given)
        return [self._placed(x, v) for x, v in zip(outs, note.outs, strict=True)]

    def _layers(self, eqn: Any, note: Note) -> LayerScan:
        params, body = eqn.params, eqn.params["jaxpr"]

        # A policy that keeps whatever it does not name would keep the gathered weights.
        again = note.carry is not None and self.remat in ("full", "projections")
        inside = dataclasses.replace(self, inside=again)

        def run(consts: Sequence[Any], carry: Sequence[Any], xs: Sequence[Any]) -> list[Any]:
            if note.carry is not None:
                carry = [self._placed(x, v) for x, v in zip(carry, note.carry, strict=True)]
            return inside._run(body.jaxpr, body.consts, [*consts, *carry, *xs], note.bodies[0])

        policy = self._policy()
        if note.carry is not None and policy is not None:
            run = jax.checkpoint(run, policy=policy, prevent_cse=False)  # a scan bars CSE itself
        return LayerScan(
            run, note.carry or (), note.consts, params["length"], params["reverse"],
            params["unroll"])  # fmt: skip

    def layers(self) -> LayerScan | None:
        """The scan over stacked parameters that can be cut into stages, if there is one."""
        for found in layer_scans(self.traced):
            if not found.within:
                return self._layers(found.eqn, found.note)
        return None


@dataclass(frozen=True)
class FoundScan:
    """A scan over stacked parameters.

    Attributes:
      eqn: the equation; None where it is within something that a plan does not enter.
      note: what the walk knows of it.
      within: names of the loops and other operations around it, outermost first; () at the top.
    """

    eqn: Any
    note: Note
    within: tuple[str, ...] = ()

    @property
    def is_rewritten(self) -> bool:
        """Whether a plan reaches its layers: in a loop it does, in a branch it does not."""
        return set(self.within) <= {"scan"}


def layer_scans(traced: Trace) -> Iterator[FoundScan]:
    """The outermost scans over stacked parameters of a step, wherever they are."""
    return _layer_scans(traced.closed.jaxpr, traced.notes)


def _layer_scans(jaxpr: core.Jaxpr, notes: Notes) -> Iterator[FoundScan]:
    for eqn, note in zip(jaxpr.eqns, notes, strict=True):
        name = eqn.primitive.name
        if note.carry is not None:
            yield FoundScan(eqn, note)
        elif name in (*_INLINED, *_REMAT):
            body: Any = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            inner = body.jaxpr if isinstance(body, core.ClosedJaxpr) else body
            yield from _layer_scans(inner, note.bodies[0])
        elif name == "scan":
            for found in _layer_scans(eqn.params["jaxpr"].jaxpr, note.bodies[0]):
                yield dataclasses.replace(found, within=(name, *found.within))
        else:
            yield from (FoundScan(None, n, (name,)) for n in _of_layers(note.bodies))


def _of_layers(bodies: Sequence[Notes]) -> Iterator[Note]:
    """Notes of the outermost scans over stacked parameters."""
    for note in (note for body in bodies for note in body):
        if note.carry is not None:
            yield note
        else:
            yield from _of_layers(note.bodies)


@contextlib.contextmanager
def _as_written(eqn: Any) -> Iterator[None]:
    """The names and compiler options that an equation was written under."""
    with contextlib.ExitStack() as held:
        if scope := str(eqn.source_info.name_stack):
            held.enter_context(jax.named_scope(scope))
        if eqn.ctx.compute_type or eqn.ctx.xla_metadata:
            # With the rest of the context comes the mesh of the trace, which stages have not.
            mesh = jax.sharding.get_abstract_mesh()
            held.enter_context(eqn.ctx.manager)
            held.enter_context(jax.sharding.use_abstract_mesh(mesh))
        yield


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward_only(place: Callable[[Any], Any], x: Any) -> Any:
    """Lays an array somewhere, and leaves its cotangent where it is."""
    return place(x)


_forward_only.defvjp(lambda place, x: (place(x), None), lambda _place, _residual, g: (g,))


def _carried(notes: Notes) -> Iterator[Value]:
    """What goes round in scans over stacked parameters."""
    for note in notes:
        yield from note.carry or ()
        for body in note.bodies:
            yield from _carried(body)


def _all_but_scores(shapes: set[tuple[int, ...]]) -> Callable[..., bool]:
    """A policy that keeps what neither is one of attention's scores nor follows from one.

    The selective recomputation of arXiv:2205.05198. An operation is told by its operands' shapes;
    of a product also the result's, which has both operands' positions.
    """

    def policy(primitive: Any, *operands: Any, **params: Any) -> bool:
        seen = {tuple(x.shape) for x in operands}
        if primitive.name == "dot_general":
            (left, right), (batch, right_batch) = params["dimension_numbers"]
            a, b = (x.shape for x in operands[:2])
            free = [n for i, n in enumerate(a) if i not in (*left, *batch)]
            free += [n for i, n in enumerate(b) if i not in (*right, *right_batch)]
            seen.add((*(a[i] for i in batch), *free))
        return not seen & shapes

    return policy
