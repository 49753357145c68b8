"""A step as one device runs it: arrays and instructions, calls inlined, loops with bodies.

What `Program` is to the search, a `Computation` is to a single plan: the whole step, with its
backward pass, its rematerialisation and its update, as it goes to the compiler. `partition` fills
in where arrays lie and what moves between devices; `liveness` says what is alive when.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from sharding.programs.program import dtype_bytes
from sharding.tracing.walk import CALLS

# The mesh axes that divide every axis of an array, outermost first.
Spec = tuple[tuple[str, ...], ...]


@dataclass(eq=False)
class Array:
    """An array of a step.

    Attributes:
      shape: undivided.
      dtype: its element type.
      spec: mesh axes that divide each axis; None while it may lie anywhere at no cost, as what
        is made of literals does.
      wanted: where a later constraint wants it, or None.
      is_weight: it is a parameter, or a view or another type of one.
      is_literal: a number written into the program.
      on_host: it lies in the host's memory.
      repeats: the smaller array that it repeats, and for each of its own axes the axis of that.
    """

    shape: tuple[int, ...]
    dtype: str
    spec: Spec | None = None
    wanted: Spec | None = None
    is_weight: bool = False
    is_literal: bool = False
    on_host: bool = False
    repeats: "tuple[Array, tuple[int | None, ...]] | None" = None

    def bytes(self, mesh: Mapping[str, int], spec: Spec | None = None) -> float:
        """Bytes on one device where it lies, or as `spec` would divide it; rounded up."""
        if self.on_host:
            return 0.0
        held = self.spec if spec is None else spec
        count = 1
        for i, size in enumerate(self.shape):
            ways = 1
            for axis in held[i] if held else ():
                ways *= mesh[axis]
            count *= -(-size // ways)
        return count * dtype_bytes(self.dtype)


@dataclass(frozen=True)
class Move:
    """A collective that an instruction needs, on one device.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or "collective-permute".
      axes: mesh axes whose devices take part.
      bytes: of the undivided side: the result of a gather, what goes into a sum or an exchange.
      array: what is moved.
      target: where it lies afterwards.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    array: Array
    target: Spec


@dataclass(eq=False)
class Instruction:
    """An operation, or a loop.

    Attributes:
      name: of the JAX primitive.
      params: of the equation.
      eqn: the equation, for rules.
      ins: operands.
      outs: results.
      bodies: of a loop, or of every branch; else ().
      trips: how often a body runs.
      moves: collectives that it needs before or after, filled in by `partition`.
      applied: its rule on a graph of its own, which `partition` asks for several times.
    """

    name: str
    eqn: Any
    ins: list[Array]
    outs: list[Array]
    bodies: tuple["Computation", ...] = ()
    trips: int = 1
    moves: list[Move] = field(default_factory=list)
    applied: Any = None


@dataclass(eq=False)
class Computation:
    """Instructions in order, with what goes in and what comes out."""

    inputs: list[Array]
    outputs: list[Array]
    instructions: list[Instruction]


def computation(step: Any, args: Sequence[Any]) -> Computation:
    """The computation of a function of arrays or shapes, dead code removed."""
    closed = jax.make_jaxpr(step)(*args)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars),
                                      instantiate=True)  # fmt: skip
    inputs = [_array(var) for var in jaxpr.invars]
    instructions: list[Instruction] = []
    outputs = _inline(jaxpr, [_array(v) for v in jaxpr.constvars], inputs, instructions)
    return Computation(inputs, outputs, instructions)


def _array(var: Any) -> Array:
    aval = var.aval
    dtype = str(getattr(aval, "dtype", "uint32"))
    dtype = "uint32" if dtype.startswith("key<") else dtype
    on_host = "host" in str(getattr(aval, "memory_space", "")).lower()
    return Array(tuple(getattr(aval, "shape", ())), dtype, on_host=on_host)


def _inline(
    jaxpr: core.Jaxpr,
    consts: Sequence[Array],
    args: Sequence[Array],
    into: list[Instruction],
) -> list[Array]:
    """Appends a jaxpr's equations, those of calls in their place; returns its results."""
    env: dict[Any, Array] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(var: Any) -> Array:
        if isinstance(var, core.Literal):
            found = _array(var)
            found.is_literal = True
            return found
        return env[var]

    for eqn in jaxpr.eqns:
        ins = [read(v) for v in eqn.invars]
        name = eqn.primitive.name
        if name in CALLS and CALLS[name] in eqn.params:
            body = eqn.params[CALLS[name]]
            inner, held = _opened(body)
            outs = _inline(inner, held, ins, into)
        else:
            outs = [_array(v) for v in eqn.outvars]
            bodies, trips = _bodies(eqn)
            if name == "broadcast_in_dim" and ins[0].shape:
                outs[0].repeats = ins[0], _sources(eqn)
            into.append(Instruction(name, eqn, ins, outs, bodies, trips))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _sources(eqn: Any) -> tuple[int | None, ...]:
    """For every axis of a broadcast's result, the operand's axis that it is."""
    found: list[int | None] = [None] * len(eqn.params["shape"])
    for axis, at in enumerate(eqn.params["broadcast_dimensions"]):
        found[at] = axis
    return tuple(found)


def _opened(body: Any) -> tuple[core.Jaxpr, list[Array]]:
    if isinstance(body, core.ClosedJaxpr):
        return body.jaxpr, [_array(v) for v in body.jaxpr.constvars]
    return body, []


def _bodies(eqn: Any) -> tuple[tuple[Computation, ...], int]:
    """Bodies of a loop, of branches, or of what runs by hand on each device."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return (_body(params["jaxpr"]),), params["length"]
    if name == "while":
        return (_body(params["body_jaxpr"]),), 1
    if name == "cond":
        return tuple(map(_body, params["branches"])), 1
    if name == "shard_map":
        return (_body(params["jaxpr"]),), 1
    return (), 1


def _body(body: Any) -> Computation:
    jaxpr, consts = _opened(body)
    inputs = [_array(v) for v in jaxpr.invars]
    instructions: list[Instruction] = []
    outputs = _inline(jaxpr, consts, inputs, instructions)
    return Computation(inputs, outputs, instructions)
