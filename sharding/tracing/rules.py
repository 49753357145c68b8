"""How each JAX operation relates the dimensions of its operands to those of its results.

A rule unites, in the dimension graph, what the operation walks in step, and names the dimensions
of the results. Dimensions that it cannot relate (slices, windows, concatenations) start anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sharding.programs.program import Kind
from sharding.tracing.dims import DimensionGraph, product

Axes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Applied:
    """An operation after its rule.

    Attributes:
      kind: as in `program.Op`.
      outs: for each result, the dimension of every axis.
      contracted: dimensions that it sums over.
      summed: the same as axes of the first operand; `summed_right` of the second.
      batched: axes of the first operand that it shares with the second and does not sum;
        `batched_right` of the second.
      mixed: dimensions whose positions do not stay apart although they survive (a sort, a
        cumulative sum): to divide them would need more than the collectives that are counted.
      cut: dimensions of which a part is taken: where they are divided, the part has to move.
      flops: of the whole, undivided operation.
      computed: share of these that a kernel computes (`sharding.fused`).
      backward: cost of the kernel's derivative in runs of the kernel; None: by its kind.
    """

    kind: Kind
    outs: tuple[Axes, ...]
    contracted: Axes = ()
    summed: Axes = ()
    summed_right: Axes = ()
    batched: Axes = ()
    batched_right: Axes = ()
    mixed: Axes = ()
    cut: Axes = ()
    flops: float = 0.0
    computed: float = 1.0
    backward: float | None = None


Rule = Callable[[DimensionGraph, Any, Sequence[Axes]], Applied]

_ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "bessel_i0e",
        "bessel_i1e",
        "bitcast_convert_type",
        "cbrt",
        "ceil",
        "clamp",
        "clz",
        "complex",
        "conj",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "eq_to",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "igamma",
        "igamma_grad_a",
        "igammac",
        "imag",
        "integer_pow",
        "is_finite",
        "le",
        "le_to",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "lt_to",
        "max",
        "min",
        "mul",
        "mul_jaxvals",
        "name",
        "ne",
        "neg",
        "nextafter",
        "nop",
        "not",
        "optimization_barrier",
        "or",
        "polygamma",
        "population_count",
        "pow",
        "pvary",
        "random_bits_like",
        "real",
        "reduce_precision",
        "regularized_incomplete_beta",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sharding_constraint",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "threefry2x32",
        "xor",
        "zeta",
    ]
)
# Of these an element costs about ten instructions; of the others one.
TRANSCENDENTAL = frozenset(
    [
        "cos",
        "sin",
        "tan",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "logistic",
        "erf",
        "erfc",
        "erf_inv",
        "tanh",
        "pow",
        "rsqrt",
        "sqrt",
    ]
)
_GENERATORS = frozenset(
    [
        "iota",
        "random_bits",
        "random_seed",
        "random_split",
        "random_fold_in",
        "random_wrap",
        "random_unwrap",
        "rng_bit_generator",
        "rng_uniform",
        "create_token",
        "empty",
        "empty2",
        "device_put",
        "axis_index",
    ]
)


def rule_for(primitive: str) -> Rule | None:
    """The rule of a primitive, by its name; None if there is none."""
    if primitive in _ELEMENTWISE:
        return _elementwise
    if primitive in _GENERATORS:
        return _generate
    return _RULES.get(primitive)


def rule_kind(primitive: str) -> Kind:
    """The kind of a primitive's operation, whatever its operands are.

    >>> rule_kind("exp"), rule_kind("dot_general"), rule_kind("reduce_sum")
    ('elementwise', 'dot', 'reduce')
    """
    if primitive in _ELEMENTWISE or primitive in _GENERATORS:
        return "elementwise"
    rule = _RULES.get(primitive)
    return "opaque" if rule is None else _KINDS.get(rule, "elementwise")


def opaque(graph: DimensionGraph, eqn: Any, _ins: Sequence[Axes]) -> Applied:
    """An operation without a rule: its results are related to nothing."""
    return Applied(kind="opaque", outs=_fresh(graph, eqn))


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in atom.aval.shape)


def _fresh(graph: DimensionGraph, eqn: Any) -> tuple[Axes, ...]:
    return tuple(graph.array(getattr(v.aval, "shape", ())) for v in eqn.outvars)


def _elementwise(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    if eqn.primitive.name == "optimization_barrier":  # each result is its own operand
        return Applied(kind="elementwise", outs=tuple(ins))
    outs = []
    for var in eqn.outvars:
        out: list[int | None] = [None] * len(_shape(var))
        for axes in (axes for axes in ins if len(axes) == len(out)):
            for i, size in enumerate(_shape(var)):
                if graph.size(axes[i]) == size:  # an operand of size one is broadcast
                    first = out[i]
                    if first is None:
                        out[i] = axes[i]
                    else:
                        graph.union(first, axes[i])
        sizes = zip(out, _shape(var), strict=True)
        outs.append(tuple(graph.new(size) if axis is None else axis for axis, size in sizes))
    each = 10.0 if eqn.primitive.name in TRANSCENDENTAL else 1.0
    flops = each * product(_shape(eqn.outvars[0]))
    return Applied(kind="elementwise", outs=tuple(outs), flops=flops)


def _generate(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    if eqn.primitive.name == "device_put":
        return Applied(kind="elementwise", outs=tuple(ins))
    return Applied(kind="elementwise", outs=_fresh(graph, eqn))


def _broadcast(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    out = list(graph.array(eqn.params["shape"]))
    for i, axis in enumerate(eqn.params["broadcast_dimensions"]):
        if graph.size(ins[0][i]) == graph.size(out[axis]):
            out[axis] = ins[0][i]
    return Applied(kind="elementwise", outs=(tuple(out),))


def _reshape(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    out = graph.array(_shape(eqn.outvars[0]))
    if eqn.params.get("dimensions") is None and product(_shape(eqn.outvars[0])):
        graph.align(ins[0], out)
    return Applied(kind="elementwise", outs=(out,))


def _transpose(_graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    out = tuple(ins[0][i] for i in eqn.params["permutation"])
    return Applied(kind="elementwise", outs=(out,))


def _squeeze(_graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    gone = {d % len(ins[0]) for d in eqn.params["dimensions"]}
    out = tuple(axis for i, axis in enumerate(ins[0]) if i not in gone)
    return Applied(kind="elementwise", outs=(out,))


def _reduce(_graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    axes = eqn.params.get("axes", eqn.params.get("dimensions", ()))
    # Some of JAX's own functions name axes by NumPy's integers.
    gone = {int(d) % len(ins[0]) for d in axes} if ins[0] else set()
    out = tuple(axis for i, axis in enumerate(ins[0]) if i not in gone)
    return Applied(
        kind="reduce",
        outs=(out,) * len(eqn.outvars),
        contracted=tuple(ins[0][i] for i in sorted(gone)),
        summed=tuple(sorted(gone)),
        flops=float(product(_shape(eqn.invars[0]))),
    )


def _cumulative(_graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    return Applied(
        kind="elementwise",
        outs=(tuple(ins[0]),),
        mixed=(ins[0][eqn.params["axis"]],),
        flops=float(product(_shape(eqn.outvars[0]))),
    )


def _reverse(_graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    mixed = tuple(ins[0][d] for d in eqn.params["dimensions"])
    return Applied(kind="elementwise", outs=(tuple(ins[0]),), mixed=mixed)


def _sort(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    for other in ins[1:]:
        for a, b in zip(ins[0], other, strict=True):
            graph.union(a, b)
    mixed = (ins[0][eqn.params["dimension"]],)
    return Applied(kind="sort", outs=tuple(ins), mixed=mixed)


def _top_k(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    axis = eqn.params.get("axis", -1) % len(ins[0])
    out = list(ins[0])
    out[axis] = graph.derived(ins[0][axis], _shape(eqn.outvars[0])[axis], "top_k")
    flops = float(product(_shape(eqn.invars[0])))
    return Applied(kind="reduce", outs=(tuple(out),) * 2, contracted=(ins[0][axis],), flops=flops)


def _same_extent(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    """Slices, pads and concatenations: axes of unchanged extent are the same, others are new."""
    shape = _shape(eqn.outvars[0])
    out, cut = [], []
    for i, size in enumerate(shape):
        alike = [axes[i] for axes in ins if len(axes) == len(shape) and graph.size(axes[i]) == size]
        for other in alike[1:]:
            graph.union(alike[0], other)
        if alike:
            out.append(alike[0])
        elif ins and len(ins[0]) == len(shape):
            out.append(graph.derived(ins[0][i], size, _extent(eqn, i)))
            cut += [ins[0][i]] if eqn.primitive.name == "slice" else []
        else:
            out.append(graph.new(size))
    return Applied(kind="elementwise", outs=(tuple(out),), cut=tuple(cut))


def _extent(eqn: Any, axis: int) -> tuple[Any, ...]:
    """What an operation makes of an axis."""
    names = ("start_indices", "limit_indices", "strides", "padding_config")
    held = [eqn.params.get(name) for name in names]
    sizes = tuple(_shape(v)[axis] for v in eqn.invars if len(_shape(v)) > axis)
    return (eqn.primitive.name, sizes, *(v[axis] if v is not None else None for v in held))


def _split(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    axis, outs = eqn.params["axis"], []
    for var in eqn.outvars:
        out = list(ins[0])
        out[axis] = graph.derived(ins[0][axis], _shape(var)[axis], ("split", len(outs)))
        outs.append(tuple(out))
    return Applied(kind="elementwise", outs=tuple(outs))


def _update_slice(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    operand, update = ins[0], ins[1]
    for a, b in zip(operand, update, strict=True):
        graph.union(a, b)  # of the same size; a shorter update is left apart
    return Applied(kind="scatter", outs=(operand,))


def _dot(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = ins[0], ins[1]
    for a, b in [*zip(lhs_sum, rhs_sum, strict=True), *zip(lhs_batch, rhs_batch, strict=True)]:
        graph.union(lhs[a], rhs[b])
    left = [lhs[i] for i in range(len(lhs)) if i not in {*lhs_sum, *lhs_batch}]
    right = [rhs[i] for i in range(len(rhs)) if i not in {*rhs_sum, *rhs_batch}]
    out = (*(lhs[i] for i in lhs_batch), *left, *right)
    summed = product(graph.size(lhs[i]) for i in lhs_sum)
    return Applied(
        kind="dot",
        outs=(out,),
        contracted=tuple(lhs[i] for i in lhs_sum),
        summed=tuple(lhs_sum),
        summed_right=tuple(rhs_sum),
        batched=tuple(lhs_batch),
        batched_right=tuple(rhs_batch),
        flops=2.0 * summed * product(_shape(eqn.outvars[0])),
    )


def _ragged_dot(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lhs_sum, rhs_sum), (lhs_batch, _) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    lhs, rhs = ins[0], ins[1]
    if not groups or lhs_batch:
        return opaque(graph, eqn, ins)
    for a, b in zip(lhs_sum, rhs_sum, strict=True):
        graph.union(lhs[a], rhs[b])
    left = [lhs[i] for i in range(len(lhs)) if i not in lhs_sum]
    right = [rhs[i] for i in range(len(rhs)) if i not in {*rhs_sum, *groups}]
    summed = product(graph.size(lhs[i]) for i in lhs_sum)
    return Applied(
        kind="grouped_dot",
        outs=((*left, *right),),
        contracted=tuple(lhs[i] for i in lhs_sum),
        summed=tuple(lhs_sum),
        flops=2.0 * summed * product(_shape(eqn.outvars[0])),
    )


def _conv(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs = ins[0], ins[1]
    out = list(graph.array(_shape(eqn.outvars[0])))
    if eqn.params["batch_group_count"] == 1:
        out[numbers.out_spec[0]] = lhs[numbers.lhs_spec[0]]
    contracted: Axes = ()
    if eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1:
        out[numbers.out_spec[1]] = rhs[numbers.rhs_spec[0]]
        graph.union(lhs[numbers.lhs_spec[1]], rhs[numbers.rhs_spec[1]])
        contracted = (lhs[numbers.lhs_spec[1]],)
    window = product(_shape(eqn.invars[1])[i] for i in numbers.rhs_spec[1:])
    return Applied(
        kind="dot",
        outs=(tuple(out),),
        contracted=contracted,
        mixed=tuple(lhs[i] for i in numbers.lhs_spec[2:]),
        flops=2.0 * window * product(_shape(eqn.outvars[0])),
    )


def _gather(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = ins[0], ins[1]
    out = list(graph.array(_shape(eqn.outvars[0])))
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [i for i in range(len(operand)) if i not in gone]
    for position, i in zip(numbers.offset_dims, windows, strict=True):
        if sizes[i] == graph.size(operand[i]):
            out[position] = operand[i]
    rest = [i for i in range(len(out)) if i not in numbers.offset_dims]
    for position, axis in zip(rest, indices[:-1], strict=True):
        out[position] = axis
    for a, b in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        graph.union(operand[a], indices[b])
    looked_up = tuple(operand[i] for i in numbers.start_index_map if sizes[i] == 1)
    return Applied(kind="gather", outs=(tuple(out),), contracted=looked_up)


def _scatter(graph: DimensionGraph, eqn: Any, ins: Sequence[Axes]) -> Applied:
    numbers = eqn.params["dimension_numbers"]
    operand, indices, updates = ins[0], ins[1], ins[2]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = [i for i in range(len(operand)) if i not in gone]
    for position, i in zip(numbers.update_window_dims, windows, strict=True):
        graph.union(operand[i], updates[position])
    rest = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
    for position, axis in zip(rest, indices[:-1], strict=True):
        graph.union(updates[position], axis)
    for a, b in zip(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    ):
        graph.union(operand[a], indices[b])
    return Applied(kind="scatter", outs=(operand,))


_RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "rev": _reverse,
    "sort": _sort,
    "top_k": _top_k,
    "approx_top_k": _top_k,
    "split": _split,
    "dynamic_update_slice": _update_slice,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
    **dict.fromkeys(("slice", "dynamic_slice", "pad", "concatenate"), _same_extent),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _cumulative
    ),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
         "reduce_xor", "argmax", "argmin", "reduce"),
        _reduce,
    ),
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max",
         "scatter-mul", "scatter-min", "scatter-max"),
        _scatter,
    ),
}  # fmt: skip

_KINDS: dict[Rule, Kind] = {
    _dot: "dot", _conv: "dot", _ragged_dot: "grouped_dot", _reduce: "reduce", _top_k: "reduce",
    _gather: "gather", _scatter: "scatter", _update_slice: "scatter", _sort: "sort",
}  # fmt: skip
