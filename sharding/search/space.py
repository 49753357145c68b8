"""The search space: every strategy that a program, a cluster and its constraints allow."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sharding.costs.strategies import AXES, REMAT, Strategies, divisors
from sharding.machines.topology import Cluster
from sharding.programs.program import Program

# A division may leave this share of the devices' work as padding (a vocabulary of 50,257).
_PADDING = 0.01
# More micro-batches than this many a stage no longer shrink the bubble by anything that matters.
_MICROBATCHES_PER_STAGE = 16
# Without a pipeline, accumulation beyond this many steps only saves memory that is not missing.
_ACCUMULATION = 256
_INTERLEAVES = (1, 2, 4, 8)


class DoesNotFit(ValueError):
    """No strategy fits the memory; the message says what would help.

    Attributes:
      needed_bytes: of a device, by the strategy that needs least.
      limit_bytes: that it may take.
      nearest: that strategy, in words.
      place: "device", or "host" where it is the host's memory that is too small.
    """

    def __init__(
        self,
        message: str,
        needed_bytes: float,
        limit_bytes: float,
        *,
        nearest: str = "",
        place: str = "device",
    ) -> None:
        super().__init__(message)
        self.needed_bytes, self.limit_bytes = needed_bytes, limit_bytes
        self.nearest, self.place = nearest, place

    @property
    def shortfall_bytes(self) -> float:
        """What is missing."""
        return self.needed_bytes - self.limit_bytes


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a strategy must keep to.

    Attributes:
      pinned: field of `Strategy` to the value that it must have: the degrees "data", "fsdp",
        "tensor", "context", "expert" and "stage", and "microbatches", "interleave", "zero",
        "remat", "sequence_parallel", "offload", "first".
      remat: rematerialisation policies allowed; () for all.
      remat_at_most: policy that recomputes most of those allowed, of "none", "attention", "dots",
        "projections", "full" in this order; "" for no bound.
      zero: ZeRO stages allowed where there is an FSDP axis; () for 1 and 3.
      offload: what may lie in the host's memory, of "none", "activations" and "optimizer"; () for
        what can be executed, which of a description is taken to be "none" and "activations".
      forbidden: axes that stay at one.
      tensor_across_nodes: whether layers may be divided between nodes that a switch joins.
      tensor_across_hosts: whether they may be divided between hosts. On a torus False keeps the
        groups of tensor parallelism to chips that share a host; behind a switch a node is a host.
      uneven_shares: whether replicas on chips that differ may take different shares of the batch.
      memory_fraction: of a device's memory that a plan may be predicted to take. The rest is the
        runtime's, and the error of the prediction.
    """

    pinned: Mapping[str, Any] = field(default_factory=dict)
    remat: tuple[str, ...] = ()
    remat_at_most: str = ""
    zero: tuple[int, ...] = ()
    offload: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    tensor_across_nodes: bool = False
    tensor_across_hosts: bool = True
    uneven_shares: bool = True
    memory_fraction: float = 0.94

    def __post_init__(self) -> None:
        known = set(Strategies.__dataclass_fields__)
        unknown = (set(self.pinned) - known) | (set(self.forbidden) - set(AXES))
        if unknown:
            raise ValueError(f"constraints name {sorted(unknown)}; there are {sorted(known)}")
        if set(self.remat) - set(REMAT) or self.remat_at_most not in ("", *REMAT):
            raise ValueError(
                f"remat allows {self.remat} and at most {self.remat_at_most!r}; the policies are "
                f"{', '.join(REMAT)}"
            )
        if not self.tensor_across_hosts and self.pinned.get("first", "host") != "host":
            raise ValueError(
                f"tensor_across_hosts=False lays tensor first, within hosts; {self.pinned} says "
                "otherwise"
            )
        pin, most = self.pinned.get("remat", "none"), self.remat_at_most
        if pin not in REMAT:
            raise ValueError(f"remat {pin!r} is pinned; the policies are {', '.join(REMAT)}")
        if most and list(REMAT).index(pin) > list(REMAT).index(most):
            raise ValueError(f"remat {pin!r} is pinned and recomputes more than at most {most!r}")
        if self.remat and not any(map(self.allows_remat, self.remat)):
            raise ValueError(f"remat allows {self.remat}, and all recompute more than {most!r}")

    @property
    def offloads(self) -> tuple[str, ...]:
        """What may lie in the host's memory: what is pinned, allowed, or searched by default."""
        if "offload" in self.pinned:
            return (self.pinned["offload"],)
        return self.offload or ("none", "activations")

    def allows_remat(self, policy: str) -> bool:
        """Whether layers may be rematerialised so."""
        order = list(REMAT)  # by increasing recomputation
        few = not self.remat_at_most or order.index(policy) <= order.index(self.remat_at_most)
        return few and (not self.remat or policy in self.remat)

    def allows(self, axis: str, degree: int) -> bool:
        """Whether an axis may have a degree."""
        if axis in self.forbidden and degree != 1:
            return False
        return self.pinned.get(axis, degree) == degree


def does_not_fit(
    program: Program,
    cluster: Cluster,
    needed: float,
    limit: float,
    constraints: Constraints,
    nearest: str,
) -> DoesNotFit:
    """The error that nothing fits, with what would help.

    Args:
      program: what is run.
      cluster: where.
      needed: bytes of a device, of the strategy that needs least.
      limit: bytes that it may take.
      constraints: of the search, for what they leave out.
      nearest: that strategy, in words.
    """
    help_ = [
        f"take about {needed / limit:.1f} times the devices, chips with more memory, a smaller "
        "batch or shorter sequences"
    ]
    if program.training and "optimizer" not in constraints.offloads:
        help_.append('allow Constraints(offload=("none", "optimizer")), --pin offload=optimizer')
    return DoesNotFit(
        f"no plan of {program.name} fits {cluster.name}: the smallest needs {needed / 1e9:.1f} GB "
        f"a device of {limit / 1e9:.1f} GB usable ({nearest}); {'; or '.join(help_)}",
        needed,
        limit,
        nearest=nearest,
    )


def limits(program: Program) -> dict[str, Any]:
    """Which degrees each axis may have: a bound, and a test for divisions without much padding.

    Tensor parallelism divides dimensions evenly, up to the padding that a large one can bear;
    dimensions smaller than the degree are held by several devices each, as few heads of keys are.
    """
    by_kind: dict[str, list[int]] = {"data": [], "context": [], "tensor": [], "expert": []}
    for dim, kind in program.splits.items():
        by_kind[kind].append(program.dims[dim])
    repeats = sum(b.repeat for b in program.blocks if b.checkpointed)
    return {**by_kind, "stage": repeats if program.pipelined else 1}


def divides(sizes: Sequence[int], degree: int) -> bool:
    """Whether dimensions may be divided that many ways.

    >>> divides([32, 8, 128256], 16), divides([40], 16), divides([], 2)
    (True, False, False)
    """
    if degree == 1:
        return True
    if not sizes or degree > max(sizes):
        return False
    return all(
        degree % size == 0 if size < degree else -(-size // degree) * degree / size - 1 <= _PADDING
        for size in sizes
    )


def factorings(
    program: Program, cluster: Cluster, constraints: Constraints
) -> Iterator[tuple[int, ...]]:
    """Degrees of `AXES` whose product is the cluster, in a fixed order."""
    sizes = limits(program)
    devices = cluster.device_count
    batch = max(sizes["data"], default=1)
    reach = devices if cluster.is_torus or constraints.tensor_across_nodes else cluster.node_size
    if not constraints.tensor_across_hosts:
        reach = cluster.host_size
    allowed = constraints.allows
    for tensor in divisors(devices):
        if not (divides(sizes["tensor"], tensor) and allowed("tensor", tensor) and tensor <= reach):
            continue
        for stage in divisors(devices // tensor):
            if stage > sizes["stage"] or not allowed("stage", stage):
                continue
            for context in divisors(devices // (tensor * stage)):
                even = context == 1 or (sizes["context"] and not any(
                    s % context for s in sizes["context"]))  # fmt: skip
                if not even or not allowed("context", context):
                    continue
                for expert in divisors(devices // (tensor * stage * context)):
                    whole = expert == 1 or (sizes["expert"] and not any(
                        s % expert for s in sizes["expert"]))  # fmt: skip
                    if not whole or not allowed("expert", expert):
                        continue
                    rest = devices // (tensor * stage * context * expert)
                    for fsdp in divisors(rest):
                        data = rest // fsdp
                        fits = batch % (data * fsdp * expert) == 0
                        if fits and allowed("fsdp", fsdp) and allowed("data", data):
                            yield tensor, context, expert, fsdp, data, stage


def candidates(program: Program, cluster: Cluster, constraints: Constraints) -> Strategies:
    """The whole space as arrays, in a fixed order.

    Raises:
      ValueError: nothing divides the program over the cluster within the constraints.
    """
    rows: list[tuple[Any, ...]] = []
    batch = program.dims.get(program.batch_dim, 1)
    torus = cluster.is_torus
    for degrees in factorings(program, cluster, constraints):
        _, _, expert, fsdp, data, stage = degrees
        local = batch // (data * fsdp * expert)
        for count in _microbatches(local, stage, program.training):
            for interleave in (1,) if cluster.is_mixed else _interleaves(program, stage, count):
                rows.append((*degrees, count, interleave))
    if not rows:
        change = (
            "change the batch to a multiple of the devices, or loosen the constraints"
            if program.batch_dim
            else "no argument was found whose leading axis is the batch: name its position, as "
            "data=(1,), with the batch as its first axis, or loosen the constraints"
        )
        raise ValueError(
            f"no division of {program.name} over {cluster.device_count} devices: global batch "
            f"{batch}, dimensions {dict(program.dims)}, constraints {constraints}; {change}"
        )
    base = np.asarray(rows)
    names: tuple[str, ...] = (*AXES, "microbatches", "interleave")
    columns: dict[str, np.ndarray] = dict(zip(names, base.T, strict=True))
    space = _with_choices(program, columns, _choices(program, constraints, torus), constraints)
    if not len(space):
        raise ValueError(_contradiction(program, cluster, columns, constraints))
    return space


def _contradiction(
    program: Program,
    cluster: Cluster,
    columns: Mapping[str, np.ndarray],
    constraints: Constraints,
) -> str:
    """Which pins leave nothing of the rows that divide the program, and what would do."""
    batch = program.dims.get(program.batch_dim, 1)
    reasons = []
    for name in ("microbatches", "interleave"):
        possible = np.unique(columns[name])
        if name in constraints.pinned and constraints.pinned[name] not in possible:
            listing = ", ".join(map(str, possible.tolist()))
            reasons.append(f"{name} {constraints.pinned[name]} is pinned and may be {listing}")
    if not reasons:
        reasons.append("no strategy has all of them: offload 'activations' needs another remat "
                       "than 'full', and interleave needs stages")  # fmt: skip
    groups = columns["data"] * columns["fsdp"] * columns["expert"]
    local = np.unique(batch // groups)
    leaves = f"{local[0]}" if len(local) == 1 else f"{local[0]} to {local[-1]}"
    return (
        f"the pins {dict(constraints.pinned)} leave no strategy of {program.name} on "
        f"{cluster.name}: {'; '.join(reasons)}. Global batch {batch} leaves {leaves} sequences to "
        "each group of devices, and micro-batches divide them evenly; pin another value or none, "
        "divide the batch over fewer devices, or take a larger global batch"
    )


def _microbatches(local: int, stage: int, training: bool) -> list[int]:
    if not training and stage == 1:
        return [1]
    most = stage * _MICROBATCHES_PER_STAGE if stage > 1 else _ACCUMULATION
    return [d for d in divisors(local) if d <= most and (stage == 1 or d >= min(stage, local))]


def _interleaves(program: Program, stage: int, count: int) -> list[int]:
    if stage == 1 or count % stage:
        return [1]
    layers = sum(b.repeat for b in program.blocks if b.checkpointed)
    return [v for v in _INTERLEAVES if layers % (stage * v) == 0] or [1]


def _choices(program: Program, constraints: Constraints, torus: bool) -> dict[str, Sequence[Any]]:
    found: dict[str, Sequence[Any]] = {
        "zero": constraints.zero or (1, 3),
        "remat": tuple(filter(constraints.allows_remat, constraints.remat or policies(program))),
        "offload": constraints.offloads,
        "first": ("tensor", "fsdp") if torus else ("tensor",),
        "sequence_parallel": (True,) if _sequences(program) else (False,),
    }
    if torus and not constraints.tensor_across_hosts:
        found["first"] = ("host",)
    if not program.training:
        found |= {"remat": ("none",), "offload": ("none",), "zero": constraints.zero or (0, 3)}
    for name in found:
        if name in constraints.pinned:
            found[name] = (constraints.pinned[name],)
    return found


def policies(program: Program) -> tuple[str, ...]:
    """Policies that differ on this program: names of projections may not occur in it."""
    ops = [op for block in program.blocks if block.checkpointed for op in block.ops]
    names = {op.name for op in ops}
    found = ["none", "dots", "full"]
    if REMAT["projections"] and names & REMAT["projections"]:
        found.insert(2, "projections")
    if "softmax" in names:
        found.insert(1, "attention")
    return tuple(found)


def _sequences(program: Program) -> list[int]:
    """Sizes of the dimensions along which sequences are divided."""
    return [program.dims[dim] for dim, kind in program.splits.items() if kind == "context"]


def _with_choices(
    program: Program,
    columns: Mapping[str, np.ndarray],
    choices: Mapping[str, Sequence[Any]],
    constraints: Constraints,
) -> Strategies:
    """The product of rows and choices, without choices that make no difference to a row."""
    rows = len(columns["tensor"])
    sizes = [len(values) for values in choices.values()]
    index = np.indices((rows, *sizes)).reshape(len(sizes) + 1, -1)
    fields = {name: values[index[0]] for name, values in columns.items()}
    for position, (name, values) in enumerate(choices.items(), start=1):
        fields[name] = np.asarray(values)[index[position]]
    for size in _sequences(program):  # uneven shards of sequences stay whole
        ways = fields["tensor"] * fields["context"]
        fields["sequence_parallel"] = fields["sequence_parallel"] & (size % ways == 0)
    everything = Strategies(**fields)
    keep = np.ones(len(everything), bool)
    zero_one = everything.state_ways == 1  # nothing to divide: one stage of ZeRO stands for all
    keep &= ~zero_one | (index[1] == 0)
    if len(choices["zero"]) > 1:  # an axis that divides nothing is data parallelism
        # Beside experts that are divided the rest may be whole, which no data axis says.
        keep &= zero_one | (everything.zero > 0) | (everything.fsdp == 1)
    # What is moved to the host has to have a name: results that a policy picks.
    named = np.isin(everything.remat, ("dots", "projections"))
    keep &= (everything.offload != "activations") | named
    first = list(choices).index("first") + 1
    only_one = (everything.degrees > 1).sum(axis=1) <= 1
    keep &= ~only_one | (index[first] == 0)
    for name in ("microbatches", "interleave"):
        if name in constraints.pinned:
            keep &= fields[name] == constraints.pinned[name]
    return everything[np.flatnonzero(keep)]
