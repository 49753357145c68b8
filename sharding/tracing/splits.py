"""Which kind of parallelism may divide which dimension of a traced program.

Batch and experts are read off the program. What tensor parallelism divides is a choice, and is
made by an integer programme (HiGHS): every product of matrices should have one of its dimensions
divided, none two, and the sums that this leaves to the network should be small. On a transformer
the optimum is Megatron's (arXiv:1909.08053): heads, the hidden width, the vocabulary.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import LinearConstraint, milp

from sharding.programs.program import Parallelism
from sharding.tracing.dims import DimensionGraph, product
from sharding.tracing.walk import Record, Stretch, Value

# Weight of all traffic against all products, both as shares of their sum: it decides between
# choices that cover as many products, and hardly ever against covering one.
_TRAFFIC_WEIGHT = 0.1
# Share of the work of the busiest leading dimension of the data that makes another one the batch.
_MAIN_WORK = 0.5


@dataclass(frozen=True)
class Splits:
    """Atoms of the dimension graph by the parallelism that may divide them."""

    batch: frozenset[int] = frozenset()
    sequence: frozenset[int] = frozenset()
    tensor: frozenset[int] = frozenset()
    expert: frozenset[int] = frozenset()
    kinds: Mapping[int, Parallelism] = field(init=False)

    def __post_init__(self) -> None:
        kinds: dict[int, Parallelism] = {}
        for atom in self.batch:
            kinds[atom] = "data"
        for atom in self.sequence:
            kinds[atom] = "context"
        for atom in self.tensor:
            kinds[atom] = "tensor"
        for atom in self.expert:
            kinds[atom] = "expert"
        object.__setattr__(self, "kinds", kinds)


def pairs_positions(graph: DimensionGraph, splits: Splits, value: Value) -> bool:
    """Whether an array has an entry for every two positions of a sequence: attention's scores."""
    atoms = (atom for axis in value.axes for atom in graph.atoms(axis))
    return sum(atom in splits.sequence for atom in atoms) > 1


class Products:
    """The matrix products of a walk, as sets of atoms."""

    def __init__(self, graph: DimensionGraph, stretches: Sequence[Stretch]) -> None:
        self.graph = graph
        done = list(_operations(stretches))
        self.cuts: list[Record] = [record for record, _ in done if record.applied.cut]
        self.records: list[tuple[Record, float]] = [
            (record, record.applied.flops * repeat)
            for record, repeat in done
            if record.applied.kind in ("dot", "grouped_dot")
        ]

    def atoms(self, value: Value) -> set[int]:
        """Factors of the dimensions of an array."""
        return {atom for axis in value.axes for atom in self.graph.atoms(axis)}

    def of(self, axes: Iterable[int]) -> set[int]:
        """Factors of dimensions."""
        return {atom for axis in axes for atom in self.graph.atoms(axis)}

    def size(self, value: Value) -> int:
        """Elements of an array."""
        return product(self.graph.size(axis) for axis in value.axes)


def _operations(stretches: Iterable[Stretch], repeat: int = 1) -> Iterator[tuple[Record, int]]:
    """Operations and how often each runs, those of kernels among them."""
    for stretch in stretches:
        for record in stretch.records:
            yield record, repeat * stretch.repeat
            yield from _operations(record.inner, repeat * stretch.repeat)


def find_splits(
    graph: DimensionGraph,
    stretches: Sequence[Stretch],
    *,
    data: Sequence[Value],
    params: Sequence[Value],
    whole: Iterable[int] = (),
) -> Splits:
    """Decides what each atom of a program may be divided by.

    Args:
      graph: of the whole walk.
      stretches: of the forward pass.
      data: arguments whose leading axis is the batch.
      params: arguments that are parameters.
      whole: dimensions that stay whole: of loops and stacked layers.
    """
    products = Products(graph, stretches)
    whole_atoms = products.of(whole)
    mixed = {a for s in stretches for r in s.records for a in products.of(r.applied.mixed)}
    batch = _batch(products, data, whole_atoms)
    # What has a batch is carried like a parameter and is none: a cache of keys and values.
    held = [atoms for value in params if not (atoms := products.atoms(value)) & batch]
    in_params = {atom for atoms in held for atom in atoms} - whole_atoms
    expert = _experts(products, in_params, batch) - batch
    taken = whole_atoms | batch | expert
    sequence = _sequence(products, batch, taken | in_params | mixed)
    carried = {
        atom
        for stretch in stretches
        if stretch.is_layer
        for value in stretch.carry
        if value.role == "activation"
        for atom in products.atoms(value)
    }
    candidates = in_params - taken - sequence - carried
    tensor = _tensor(products, sorted(candidates), batch)
    return Splits(frozenset(batch), frozenset(sequence), frozenset(tensor), frozenset(expert))


def _batch(products: Products, data: Sequence[Value], whole: Collection[int]) -> set[int]:
    """The outermost dimension of most of the data that takes part in the main work.

    Class weights and a key lead with a dimension, too, but of little or no work; the positions of
    a sequence with one that stands behind the batch elsewhere.
    """
    votes: Counter[int] = Counter()
    inner: set[int] = set()
    for value in data:
        if value.axes:
            votes.update([a for a in products.graph.atoms(value.axes[0]) if a not in whole][:1])
            inner |= products.of(value.axes[1:])
    work: Counter[int] = Counter()
    for record, flops in products.records:
        involved = set().union(*(products.atoms(v) for v in (*record.ins[:2], *record.outs)))
        for atom in involved & set(votes):
            work[atom] += int(flops)
    most = max(work.values(), default=0)
    found = {atom for atom in votes if work[atom] >= _MAIN_WORK * most}
    found = found - inner or found
    return {min(found, key=lambda atom: (-votes[atom], atom))} if found else set()


def _experts(products: Products, in_params: Collection[int], batch: Collection[int]) -> set[int]:
    """Dimensions that a parameter, what it meets and their product share; groups of rows.

    The key heads that a query and a cache share are none: a cache has a batch.
    """
    found: set[int] = set()
    for record, _ in products.records:
        if not any(_is_param(products, value, batch) for value in record.ins[:2]):
            continue
        if record.applied.kind == "grouped_dot":
            left, right = (products.atoms(value) for value in record.ins[:2])
            found |= right - left - products.atoms(record.outs[0])
        else:
            shared = (record.ins[0].axes[i] for i in record.applied.batched)
            found |= products.of(shared) & set(in_params)
    return found


def _is_param(products: Products, value: Value, batch: Collection[int]) -> bool:
    """Whether an array is a parameter: a cache comes back like one, and has a batch."""
    return value.role == "param" and not products.atoms(value) & set(batch)


def _sequence(products: Products, batch: set[int], excluded: set[int]) -> set[int]:
    """The dimension, of no parameter, that takes part in most of the work beside the batch."""
    work: Counter[int] = Counter()
    total = 0.0
    for record, flops in products.records:
        out = products.atoms(record.outs[0])
        if not batch & out:
            continue
        total += flops
        for atom in out - excluded:
            work[atom] += int(flops)
    if not work:
        return set()
    best = max(work, key=lambda atom: (work[atom], -atom))
    return {best} if work[best] > 0.5 * total else set()


def _tensor(products: Products, candidates: Sequence[int], batch: set[int]) -> set[int]:
    """Maximises the work that has a divided dimension, less the traffic; see the module."""
    rows: list[tuple[set[int], float]] = []
    column = {atom: i for i, atom in enumerate(candidates)}
    traffic = np.zeros(len(candidates))
    for record, flops in products.records:
        involved = set().union(*(products.atoms(v) for v in (*record.ins[:2], *record.outs)))
        inside = involved & set(candidates)
        if not inside or not batch & involved:
            continue
        rows.append((inside, flops))
        summed = products.of(record.applied.contracted)
        for atom in inside:
            if atom in summed:
                traffic[column[atom]] += products.size(record.outs[0])
            for value in record.ins[:2]:
                # Of an activation the sums of its cotangents travel; of a cache more is read.
                cache = value.role == "param" and not _is_param(products, value, batch)
                if (value.role == "activation" or cache) and atom not in products.atoms(value):
                    traffic[column[atom]] += products.size(value)
    for record in products.cuts:
        for atom in products.of(record.applied.cut) & set(candidates):
            traffic[column[atom]] += products.size(record.outs[0])
    if not rows:
        return set()
    work = np.asarray([flops for _, flops in rows])
    count, total = len(candidates), len(candidates) + len(rows)
    # Variables: whether each candidate is divided, then whether each product is covered.
    gain = np.concatenate([
        _TRAFFIC_WEIGHT * traffic / max(traffic.sum(), 1.0), -work / max(work.sum(), 1.0)
    ])  # fmt: skip
    cover = np.zeros((len(rows), total))
    alone = np.zeros((len(rows), total))
    for i, (inside, _) in enumerate(rows):
        columns = [column[atom] for atom in inside]
        cover[i, columns], cover[i, count + i] = -1.0, 1.0
        alone[i, columns] = 1.0
    result = milp(
        gain,
        integrality=np.ones(total),
        bounds=(0, 1),
        options={"mip_rel_gap": 0.0},  # of many layers each is a small share
        constraints=[
            LinearConstraint(cover, -np.inf, 0.0),
            LinearConstraint(alone, -np.inf, 1.0),
        ],
    )
    if result.x is None:
        raise AssertionError(f"the choice of nothing is feasible, yet HiGHS says {result.message}")
    return {atom for atom in candidates if result.x[column[atom]] > 0.5}
