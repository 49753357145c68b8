"""A walk over a jaxpr: every operation with the dimensions of its operands and results.

Calls, checkpoints and custom derivatives are entered; a `scan` over stacked parameters becomes a
block that repeats, any other loop an extra dimension of everything that varies in it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jax.extend import core

from sharding.programs.fused import FUSED
from sharding.tracing.dims import DimensionGraph, product
from sharding.tracing.rules import Applied, Axes, opaque, rule_for

Role = Literal["param", "optimizer", "state", "data", "activation"]

# Views of a parameter are the parameter: they cost nothing that is not fused into their reader.
_VIEWS = frozenset(
    (
        "convert_element_type",
        "reshape",
        "transpose",
        "squeeze",
        "copy",
        "stop_gradient",
        "reduce_precision",
        "sharding_constraint",
        "optimization_barrier",
    )
)
# What `Walk.unknown` calls a loop whose body is walked and whose repetitions are not known.
WHILE = "while (trip count)"
# Calls whose body computes the same as the call: the primitive to the name of its jaxpr.
CALLS: Mapping[str, str] = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "jaxpr",
}


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a `scan` are constants and how many go round; the rest is sliced."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = params["ft_in"].unpack()  # from jax 0.11 on
    return len(consts), len(carried)


@dataclass(eq=False)
class Value:
    """An array on the walk.

    Attributes:
      axes: a dimension for every axis.
      dtype: its element type.
      role: what it is; parameters keep theirs through views and slices of a scan.
      path: of the argument that it is, or "".
      loop: dimensions of loops around it, which its repetitions add.
      label: what `jax.ad_checkpoint.checkpoint_name` calls it, or "".
    """

    axes: Axes
    dtype: str
    role: Role = "activation"
    path: str = ""
    loop: Axes = ()
    source: "Value | None" = None
    label: str = ""

    @property
    def stored(self) -> "Value":
        """The array that a view shows."""
        return self if self.source is None else self.source.stored


@dataclass(frozen=True)
class Note:
    """What the walk found out about one equation, for whoever runs the jaxpr again.

    Attributes:
      outs: its results.
      ins: its operands.
      bodies: notes of the equations of every jaxpr within it, in the order of the walk.
      carry: of a scan over stacked parameters, what goes round; else None.
      consts: of the same scan, what all repetitions share.
      applied: its rule's answer; None of calls and loops.
    """

    outs: tuple[Value, ...]
    ins: tuple[Value, ...] = ()
    bodies: tuple["Notes", ...] = ()
    carry: tuple[Value, ...] | None = None
    consts: tuple[Value, ...] = ()
    applied: Applied | None = None


Notes = tuple[Note, ...]


@dataclass(frozen=True)
class Record:
    """One operation of the walk; of a kernel (`sharding.fused`), `inner` is what it computes."""

    primitive: str
    applied: Applied
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    loop: Axes = ()
    inner: "tuple[Stretch, ...]" = ()


@dataclass
class Stretch:
    """Operations in order, run `repeat` times: the body of a scan over layers, or what is around.

    `carry` holds what goes from one repetition to the next, `stacked` what each leaves behind.
    """

    repeat: int
    records: list[Record] = field(default_factory=list)
    carry: tuple[Value, ...] = ()
    stacked: tuple[Value, ...] = ()
    is_layer: bool = False


class Walk:
    """Fills a dimension graph and a list of stretches from a jaxpr.

    Attributes:
      graph: the dimensions.
      stretches: what ran, in order.
      unknown: operations without a rule, and how often each was met.
      layer_dims: stacked dimensions of scans over parameters.
      loop_dims: leading dimensions of other scans.
      has_remat: whether the program rematerialises by itself.
    """

    def __init__(self, graph: DimensionGraph) -> None:
        self.graph = graph
        self.stretches: list[Stretch] = [Stretch(repeat=1)]
        self.unknown: dict[str, int] = {}
        self.layer_dims: list[int] = []
        self.loop_dims: list[int] = []
        self.has_remat = False
        self._loop: Axes = ()
        self._bodies: list[Notes] = []
        self._applied: Applied | None = None
        self._scanned: tuple[tuple[Value, ...], tuple[Value, ...]] | None = None

    @property
    def notes(self) -> Notes:
        """Of the equations of the jaxpr that was walked last."""
        return self._bodies[-1]

    def run(self, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
        """Walks a jaxpr; returns its results."""
        env: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = const if isinstance(const, Value) else self.fresh(var.aval)
        notes: list[Note] = []
        for eqn in jaxpr.eqns:
            outer = self._bodies
            self._bodies, self._scanned, self._applied = [], None, None
            ins = [self._read(env, v) for v in eqn.invars]
            outs = self._apply(eqn, ins)
            if self._bodies:
                self._applied = None  # of the last equation within
            if eqn.primitive.name != "scan":
                self._scanned = None  # the same
            carry, shared = self._scanned or (None, ())
            notes.append(
                Note(tuple(outs), tuple(ins), tuple(self._bodies), carry, shared, self._applied)
            )
            self._bodies = outer
            env.update(zip(eqn.outvars, outs, strict=True))
        self._bodies.append(tuple(notes))
        return [self._read(env, v) for v in jaxpr.outvars]

    def fresh(self, aval: Any, role: Role = "activation", path: str = "") -> Value:
        """An array of which nothing is known."""
        axes = self.graph.array(getattr(aval, "shape", ()))
        return Value(axes, _dtype(aval), role, path)

    def _read(self, env: Mapping[Any, Value], var: Any) -> Value:
        return self.fresh(var.aval) if isinstance(var, core.Literal) else env[var]

    def _apply(self, eqn: Any, ins: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if name in CALLS and CALLS[name] in eqn.params:
            return self._call(eqn, ins)
        if name == "scan":
            return self._scan(eqn, ins)
        if name == "while":
            return self._while(eqn, ins)
        if name == "cond":
            return self._cond(eqn, ins)
        if name == FUSED.name:
            return self._kernel(eqn, ins)
        rule = rule_for(name)
        if rule is None:
            self.unknown[name] = self.unknown.get(name, 0) + 1
            rule = opaque
        applied = rule(self.graph, eqn, [value.axes for value in ins])
        self._applied = applied
        if name == "name":
            ins[0].stored.label = eqn.params["name"]
            return [ins[0]]
        if name in ("dynamic_slice", "dynamic_update_slice"):
            return [self._in_place(name, ins, Value(applied.outs[0], _dtype(eqn.outvars[0].aval)))]
        view = name in _VIEWS and len(ins) == 1 and ins[0].role != "activation"
        outs = []
        for var, axes in zip(eqn.outvars, applied.outs, strict=True):
            if view:
                origin = ins[0]
                outs.append(Value(axes, _dtype(var.aval), origin.role, origin.path,
                                  origin.loop, origin))  # fmt: skip
            else:
                outs.append(Value(axes, _dtype(var.aval), loop=self._loop))
        if not view:
            record = Record(name, applied, tuple(ins), tuple(outs), self._loop)
            self.stretches[-1].records.append(record)
        return outs

    def _in_place(self, name: str, ins: list[Value], out: Value) -> Value:
        """A part of an array, or the array with a part written: only the part is touched."""
        if name == "dynamic_slice":
            out.loop = self._loop
            return out
        whole, part = ins[0], ins[1]
        written = Value(part.axes, part.dtype, loop=self._loop)
        applied = Applied(kind="elementwise", outs=(part.axes,))
        self.stretches[-1].records.append(Record(name, applied, (part,), (written,), self._loop))
        return Value(out.axes, out.dtype, whole.role, whole.path, whole.loop, whole)

    def _call(self, eqn: Any, ins: list[Value]) -> list[Value]:
        self.has_remat |= eqn.primitive.name in ("remat2", "checkpoint", "remat")
        body = eqn.params[CALLS[eqn.primitive.name]]
        if isinstance(body, core.ClosedJaxpr):
            return self.run(body.jaxpr, body.consts, ins)
        return self.run(body, (), ins)

    def _kernel(self, eqn: Any, ins: list[Value]) -> list[Value]:
        """What a kernel computes is walked, and comes to one operation."""
        body, around = eqn.params["jaxpr"], self.stretches
        self.stretches = [Stretch(repeat=1)]
        results = self.run(body.jaxpr, body.consts, ins)
        inner, self.stretches = tuple(self.stretches), around
        applied = self._as_one(ins, results, inner, eqn.params)
        outs = [
            Value(axes, _dtype(var.aval), loop=self._loop)
            for var, axes in zip(eqn.outvars, applied.outs, strict=True)
        ]
        record = Record(FUSED.name, applied, tuple(ins), tuple(outs), self._loop, inner)
        self.stretches[-1].records.append(record)
        return outs

    def _as_one(
        self,
        ins: Sequence[Value],
        outs: Sequence[Value],
        inner: Sequence[Stretch],
        params: Mapping[str, Any],
    ) -> Applied:
        """What of a kernel's operations is seen from outside; `params` are those of `FUSED`.

        It sums over a dimension of its arguments that its results do not have.
        """
        around = len(self._loop)
        done = [(s.repeat, r) for s in inner for r in s.records]
        products = [(n, r) for n, r in done if r.applied.kind in ("dot", "grouped_dot")]
        given, left = (
            {atom for v in values for axis in v.axes for atom in self.graph.atoms(axis)}
            for values in (ins, outs)
        )
        summed = {
            axis: None
            for _, record in done
            for axis in record.applied.contracted
            if (atoms := set(self.graph.atoms(axis))) <= given and not atoms & left
        }
        return Applied(
            kind="attention" if products else "kernel",
            outs=tuple(value.axes for value in outs),
            contracted=tuple(summed),
            mixed=tuple(axis for _, record in done for axis in record.applied.mixed),
            computed=params["computed"],
            backward=params["backward"],
            flops=math.fsum(
                n * r.applied.flops * product(self.graph.size(axis) for axis in r.loop[around:])
                for n, r in products
            ),
        )

    def _scan(self, eqn: Any, ins: list[Value]) -> list[Value]:
        params = eqn.params
        consts, carried = scan_counts(params)
        carry, xs = ins[consts : consts + carried], ins[consts + carried :]
        body = params["jaxpr"]
        leading = [value.axes[0] for value in xs]
        layer = self.graph.new(params["length"])
        for dim in leading:
            self.graph.union(layer, dim)
        stacked = any(value.role == "param" for value in xs)
        outer_loop, around = self._loop, self.stretches[-1]
        if stacked:
            self.layer_dims.append(layer)
            repeat = around.repeat * params["length"]
            self.stretches.append(Stretch(repeat=repeat, is_layer=True))
        else:
            self.loop_dims.append(layer)
            self._loop = (*outer_loop, layer)
        inner_carry = [self._entering(value) for value in carry]
        # A slice of a view is a slice of what is stored: with its type, not the view's.
        sliced = [
            Value(v.axes[1:], v.stored.dtype if v.role == "param" else v.dtype, v.role, v.path,
                  self._loop)
            for v in xs
        ]  # fmt: skip
        mine = self.stretches[-1]
        if stacked:
            mine.carry = tuple(inner_carry)
        entered = [*ins[:consts], *inner_carry, *sliced]
        results = self.run(body.jaxpr, body.consts, entered)
        if stacked:
            mine.stacked = tuple(results[carried:])
        for before, after in zip(inner_carry, results[:carried], strict=True):
            self._unite(before.axes, after.axes)
        self._loop = outer_loop
        if stacked:
            self.stretches.append(Stretch(repeat=around.repeat, is_layer=around.is_layer))
        self._scanned = (tuple(inner_carry), tuple(ins[:consts])) if stacked else None
        # What leaves a loop is its last value, or all of them along a new leading axis.
        last = [Value(v.axes, v.dtype, loop=outer_loop) for v in inner_carry]
        stacks = [Value((layer, *v.axes), v.dtype, loop=outer_loop) for v in results[carried:]]
        return [*last, *stacks]

    def _entering(self, value: Value) -> Value:
        # An argument that goes round is state that is written in place, as a cache is.
        role: Role = "activation" if value.role == "activation" else "state"
        return Value(value.axes, value.dtype, role, loop=self._loop)

    def _while(self, eqn: Any, ins: list[Value]) -> list[Value]:
        split = eqn.params["cond_nconsts"]
        body_consts = eqn.params["body_nconsts"]
        carry = ins[split + body_consts :]
        body, test = eqn.params["body_jaxpr"], eqn.params["cond_jaxpr"]
        self.run(test.jaxpr, test.consts, [*ins[:split], *carry])
        results = self.run(body.jaxpr, body.consts, [*ins[split : split + body_consts], *carry])
        for before, after in zip(carry, results, strict=True):
            self._unite(before.axes, after.axes)
        # How often it runs is not known: it is costed once, and said.
        self.unknown[WHILE] = self.unknown.get(WHILE, 0) + 1
        return [Value(v.axes, v.dtype, loop=self._loop) for v in results]

    def _cond(self, eqn: Any, ins: list[Value]) -> list[Value]:
        outs: list[list[Value]] = []
        for branch in eqn.params["branches"]:  # all are walked; all are costed: an upper bound
            outs.append(self.run(branch.jaxpr, branch.consts, ins[1:]))
        for other in outs[1:]:
            for a, b in zip(outs[0], other, strict=True):
                self._unite(a.axes, b.axes)
        return [Value(v.axes, v.dtype, loop=self._loop) for v in outs[0]]

    def _unite(self, a: Axes, b: Axes) -> None:
        for x, y in zip(a, b, strict=True):
            self.graph.union(x, y)


def applied_kernel(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    """The rule of a kernel (`sharding.fused`): that of what it computes."""
    values = [Value(axes, _dtype(var.aval)) for axes, var in zip(ins, eqn.invars, strict=True)]
    walk = Walk(graph)
    walk._kernel(eqn, values)
    return walk.stretches[-1].records[-1].applied


def _dtype(aval: Any) -> str:
    name = str(getattr(aval, "dtype", "uint32"))
    return "uint32" if name.startswith("key<") else name
