"""A plan: the shape of a mesh and where each array lies on it, without any device.

A plan can be written down, compared and sent to another machine; `bind` turns it into JAX
shardings on the devices that are there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Mesh shape and partition specs of a program.

    Attributes:
      mesh: axis name to size, outermost first.
      specs: leaf path (as `leaf_path` writes it) to its spec. A leaf takes the spec of the
        longest path that its own path ends with, so that the moments of an optimiser lie with
        their parameters; a leaf without any is replicated.
      batch: mesh axes over which the leading axis of the data is split.
    """

    mesh: Mapping[str, int] = field(default_factory=dict)
    specs: Mapping[str, PartitionSpec] = field(default_factory=dict)
    batch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for axis, size in self.mesh.items():
            if size < 1:
                raise ValueError(f"a mesh axis needs at least one device: {axis}={size}")
        named = {"batch": PartitionSpec(self.batch or None), **self.specs}
        for path, spec in named.items():
            unknown = _axes(spec) - set(self.mesh)
            if unknown:
                raise ValueError(
                    f"spec of {path} names mesh axes {sorted(unknown)}; "
                    f"the mesh has {list(self.mesh)}"
                )

    @classmethod
    def single_device(cls) -> "Plan":
        """The trivial plan: one device, everything whole."""
        return cls()

    @classmethod
    def from_rules(
        cls,
        axes: Any,
        *,
        mesh: Mapping[str, int],
        rules: Mapping[str, str | tuple[str, ...] | None],
        batch: tuple[str, ...] = (),
    ) -> "Plan":
        """Maps logical axis names to mesh axes, as one rule for all arrays.

        Args:
          axes: pytree whose leaves are tuples of logical axis names (or None), one a dimension.
          mesh: axis name to size.
          rules: logical axis to the mesh axis or axes that split it; absent means whole. A mesh
            axis serves the first dimension of an array that claims it.
          batch: mesh axes that split the data.
        """
        leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes)
        specs = {leaf_path(path): _spec(names, rules) for path, names in leaves}
        return cls(mesh=mesh, specs=specs, batch=batch)

    def spec(self, path: str) -> PartitionSpec:
        """The spec of one leaf; see the class for the rule."""
        parts = path.split("/")
        for start in range(len(parts)):
            found = self.specs.get("/".join(parts[start:]))
            if found is not None:
                return found
        return PartitionSpec()

    def bind(self, devices: Sequence[Any] | None = None) -> "BoundPlan":
        """Lays the plan on devices.

        Args:
          devices: JAX devices; all of this process's backend when None.

        Raises:
          ValueError: fewer devices than the mesh needs.
        """
        sizes = tuple(self.mesh.values()) or (1,)
        devices = list(jax.devices() if devices is None else devices)
        needed = int(np.prod(sizes))
        if len(devices) < needed:
            raise ValueError(
                f"the plan's mesh {dict(self.mesh)} needs {needed} devices, got {len(devices)}; "
                "plan for the devices that are there, or pass more"
            )
        grid = np.asarray(devices[:needed]).reshape(sizes)
        return BoundPlan(plan=self, mesh=Mesh(grid, tuple(self.mesh) or ("single",)))


@dataclass(frozen=True, kw_only=True)
class BoundPlan:
    """A plan on devices.

    Attributes:
      plan: the plan.
      mesh: its mesh.
    """

    plan: Plan
    mesh: Mesh

    def shardings(self, tree: Any) -> list[NamedSharding]:
        """Of every leaf of a tree of parameters or optimiser state, in the order of the leaves.

        Raises:
          ValueError: a dimension that its mesh axes do not divide.
        """
        found = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = leaf_path(path)
            spec = self.plan.spec(name)
            if len(spec) > np.ndim(leaf):  # statistics of less than the parameter: a count, a row
                spec = PartitionSpec()
            self._check(name, spec, np.shape(leaf))
            found.append(NamedSharding(self.mesh, _trimmed(spec)))
        return found

    def place(self, tree: Any) -> Any:
        """Moves a tree to where the plan wants it; dtypes and values stay."""
        return self._over(jax.device_put, tree)

    def constrain(self, tree: Any) -> Any:
        """Within `jit`: a result that has to lie where the plan wants it."""
        return self._over(jax.lax.with_sharding_constraint, tree)

    def _over(self, move: Callable[[Any, Any], Any], tree: Any) -> Any:
        # By leaves: a record that checks its fields could not be rebuilt with shardings in it.
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, move(leaves, self.shardings(tree)))

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of data: the leading axis over the plan's batch axes."""
        return NamedSharding(self.mesh, PartitionSpec(self.plan.batch or None))

    def place_batch(self, tree: Any) -> Any:
        """Moves a batch to the mesh, split along its leading axis.

        Raises:
          ValueError: a leading axis that the batch axes do not divide.
        """
        sharding = self.batch_sharding
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            self._check(f"the batch's {leaf_path(path)}", sharding.spec, np.shape(leaf))
        return jax.device_put(tree, sharding)

    def _check(self, name: str, spec: PartitionSpec, shape: tuple[int, ...]) -> None:
        for size, entry in zip(shape, spec, strict=False):
            ways = int(np.prod([self.mesh.shape[axis] for axis in _entry(entry)]))
            if size % ways:
                raise ValueError(
                    f"mesh axes {_entry(entry)} split a dimension of {name} {ways} ways, "
                    f"which its size {size} does not allow; shape {shape}, spec {spec}"
                )


def leaf_path(path: Sequence[Any]) -> str:
    """Path of a pytree leaf as text: keys joined by "/", wrappers of values left out.

    >>> tree = {"layers": {"query": 0}}
    >>> [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['layers/query']
    """
    # Flax wraps arrays in variables, whose array is the *attribute* "value"; a parameter that
    # is itself called "value" is an entry of a dict and keeps its name.
    keys = tuple(path)
    if len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(x is None or isinstance(x, str) for x in leaf)


def _entry(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _trimmed(spec: PartitionSpec) -> PartitionSpec:
    """Without trailing Nones, as compiled programs return it: to `jit` the two are not equal."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _axes(spec: PartitionSpec) -> set[str]:
    return {axis for entry in spec for axis in _entry(entry)}


def _spec(
    names: Sequence[str | None], rules: Mapping[str, str | tuple[str, ...] | None]
) -> PartitionSpec:
    used: set[str] = set()
    entries = []
    for name in names:
        wanted = _entry(rules.get(name) if name is not None else None)
        free = tuple(axis for axis in wanted if axis not in used)
        used.update(free)
        entries.append(free[0] if len(free) == 1 else free or None)
    return PartitionSpec(*entries)
