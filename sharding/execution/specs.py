"""From degrees of parallelism to the partition specs of a traced program.

Activations: batch over data, FSDP and expert axes, the sequence over context, heads and hidden
widths over tensor. Parameters: the same tensor and expert dimensions, and one more over FSDP (and,
outside experts, over the expert axis), the largest that it divides. What has the dimensions of a
parameter (its gradient, its moments) lies as the parameter does, because the trace gave it the
same dimensions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jax.sharding import PartitionSpec

from sharding.costs.strategies import Strategy
from sharding.programs.program import Parallelism
from sharding.tracing.trace import Leaf, Trace
from sharding.tracing.walk import Axes

# Parameters of fewer elements a device stay whole over FSDP: a gather costs more than it saves.
_SMALLEST_SHARD = 1


class DoesNotHold(ValueError):
    """A spec that is fixed and that a mesh cannot have; another mesh may."""


@dataclass(frozen=True)
class Layout:
    """Where the arrays of a program lie.

    Attributes:
      mesh: axis name to size, outermost first.
      inputs: path of an argument to its spec.
      outputs: path of a result to its spec.
      activations: name of a dimension to the mesh axes that divide it in activations.
      notes: what could not be divided, and why.
    """

    mesh: Mapping[str, int]
    inputs: Mapping[str, PartitionSpec]
    outputs: Mapping[str, PartitionSpec]
    activations: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = field(default=())


def layout(
    traced: Trace,
    strategy: Strategy,
    *,
    fixed: Mapping[str, PartitionSpec] | None = None,
) -> Layout:
    """Emits the specs of a strategy.

    Args:
      traced: the program.
      strategy: degrees of parallelism.
      fixed: path of an argument, or the end of one, to the spec that it has to have. Every
        argument whose path ends with it is fixed: "layers/query" is "0/layers/query" and its
        moments. Of several ends the longest counts.

    Raises:
      DoesNotHold: the mesh lacks an axis of a fixed spec, or does not divide an array so.
      ValueError: a path of `fixed` that is the end of none, or a spec of more axes than its array.
    """
    mesh = strategy.mesh
    axes = _activation_axes(mesh)
    chooser = _Chooser(traced, mesh, strategy.zero, axes)
    pinned = dict(fixed or {})
    inputs = {leaf.path: chooser.spec(leaf, _pin(leaf.path, pinned)) for leaf in traced.inputs}
    by_place = {(leaf.role, leaf.factors, leaf.shape): inputs[leaf.path] for leaf in traced.inputs}
    outputs = {}
    for leaf in traced.outputs:
        same = by_place.get((leaf.role, leaf.factors, leaf.shape))
        outputs[leaf.path] = chooser.spec(leaf, None) if same is None else same
    unused = [path for path in pinned if not any(_matches(p, path) for p in inputs)]
    if unused:
        raise ValueError(
            f"fixed names no argument: {unused}; the program has {sorted(inputs)[:20]}"
        )
    activations = {}
    for atom, kind in traced.splits.kinds.items():
        held = chooser.take(atom, axes.get(kind, ()), set())
        if held and atom in traced.names:
            activations[traced.names[atom]] = held
    return Layout(mesh, inputs, outputs, activations, tuple(chooser.notes))


def _activation_axes(mesh: Mapping[str, int]) -> dict[Parallelism, tuple[str, ...]]:
    wanted: dict[Parallelism, tuple[str, ...]] = {
        "data": ("data", "fsdp", "expert"),
        "context": ("context",),
        "tensor": ("tensor",),
        "expert": ("expert",),
    }
    return {kind: tuple(a for a in names if a in mesh) for kind, names in wanted.items()}


def _matches(path: str, pin: str) -> bool:
    return path == pin or path.endswith("/" + pin)


def _pin(path: str, fixed: Mapping[str, PartitionSpec]) -> PartitionSpec | None:
    found = [pin for pin in fixed if _matches(path, pin)]
    return fixed[max(found, key=len)] if found else None


@dataclass
class _Chooser:
    traced: Trace
    mesh: Mapping[str, int]
    zero: int
    axes: Mapping[Parallelism, tuple[str, ...]]
    notes: list[str] = field(default_factory=list)

    def spec(self, leaf: Leaf, pin: PartitionSpec | None) -> PartitionSpec:
        """The spec of one argument or result."""
        if pin is not None:
            return self._checked(leaf, pin)
        used: set[str] = set()
        entries: list[tuple[str, ...]] = []
        is_param = leaf.role in ("param", "optimizer")
        for factors in leaf.factors:
            entries.append(self._of_axis(factors, used, is_param=is_param))
        wants_fsdp = leaf.role == "optimizer" and self.zero >= 1
        wants_fsdp |= leaf.role == "param" and self.zero >= 3
        free = tuple(a for a in ("fsdp", "expert") if a in self.mesh and a not in used)
        if wants_fsdp and free:
            self._add_fsdp(leaf, entries, free)
        return _spec(entries)

    def take(self, atom: int, axes: Iterable[str], used: set[str]) -> tuple[str, ...]:
        """Those of the axes, in order, that divide an atom evenly and are still free."""
        found: list[str] = []
        left = self.traced.sizes.get(atom, 0)
        for axis in axes:
            if axis in used or not left or left % self.mesh[axis]:
                continue
            left //= self.mesh[axis]
            found.append(axis)
            used.add(axis)
        return tuple(found)

    def _of_axis(self, factors: Axes, used: set[str], *, is_param: bool) -> tuple[str, ...]:
        """Mesh axes of one array axis. An inner factor can be divided only where the outer is
        divided to the end, for a shard is contiguous.
        """
        found: list[str] = []
        for atom in factors:
            if atom in self.traced.layer_atoms:
                wanted: tuple[str, ...] = ("stage",) if "stage" in self.mesh and is_param else ()
            else:
                kind = self.traced.splits.kinds.get(atom)
                allowed = kind is not None and not (is_param and kind in ("data", "context"))
                wanted = self.axes[kind] if kind is not None and allowed else ()
            held = self.take(atom, wanted, used)
            found += held
            ways = _ways(held, self.mesh)
            if ways != self.traced.sizes[atom]:
                break
        return tuple(found)

    def _add_fsdp(self, leaf: Leaf, entries: list[tuple[str, ...]], axes: tuple[str, ...]) -> None:
        """Divides an array over all of the axes, or else over the first of them."""
        ways = _ways(axes, self.mesh)
        best, best_rank = -1, (False, False, 0)
        for i, size in enumerate(leaf.shape):
            local, rest = divmod(size, _ways(entries[i], self.mesh) * ways)
            stacked = any(atom in self.traced.layer_atoms for atom in leaf.factors[i])
            if rest or local < _SMALLEST_SHARD or stacked:
                continue
            # Rows are looked up in one piece; an axis that nothing else divides stays contiguous.
            whole_rows = not set(leaf.factors[i]) & self.traced.looked_up
            rank = (whole_rows, not entries[i], size)
            if best < 0 or rank > best_rank:
                best, best_rank = i, rank
        if best < 0 and len(axes) > 1:
            self._add_fsdp(leaf, entries, axes[:1])
            return
        if best < 0:
            if leaf.shape:
                self.notes.append(f"{leaf.path} {leaf.shape} is whole: no axis divides by {ways}")
            return
        entries[best] = (*entries[best], *axes)

    def _checked(self, leaf: Leaf, pin: PartitionSpec) -> PartitionSpec:
        if len(pin) > len(leaf.shape):
            if leaf.role in ("param", "data"):
                raise ValueError(
                    f"fixed spec {pin} of {leaf.path} names {len(pin)} axes; its shape is "
                    f"{leaf.shape}"
                )
            return PartitionSpec()  # of the optimiser: statistics of less than the parameter
        for size, entry in zip(leaf.shape, pin, strict=False):
            names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            unknown = [name for name in names if name not in self.mesh]
            if unknown or size % _ways(names, self.mesh):
                raise DoesNotHold(
                    f"fixed spec {pin} of {leaf.path} {leaf.shape} needs mesh axes "
                    f"{unknown or names} that divide it; the mesh is {dict(self.mesh)}"
                )
        return pin


def _ways(names: Sequence[str], mesh: Mapping[str, int]) -> int:
    ways = 1
    for name in names:
        ways *= mesh[name]
    return ways


def _spec(entries: Sequence[tuple[str, ...]]) -> PartitionSpec:
    found: list[str | tuple[str, ...] | None] = [
        None if not names else names[0] if len(names) == 1 else names for names in entries
    ]
    while found and found[-1] is None:
        found.pop()
    return PartitionSpec(*found)
