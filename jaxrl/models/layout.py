"""How a model's arrays are divided, read off the mesh that it is traced under.

What the compiler cannot divide by itself, a kernel or an exchange between devices, is written for
one device under `jax.shard_map`, and has to know which mesh axes divide what. The names are those
of the planner. A planned step is traced under its mesh; elsewhere `jax.set_mesh` says it.
"""

import math
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh

import sharding

BATCH_AXES = ("data", "fsdp", "expert")
HEAD_AXES = ("tensor",)
SEQUENCE_AXES = ("context",)
EXPERT_AXES = ("expert",)
_NAMES = frozenset((*BATCH_AXES, *HEAD_AXES, *SEQUENCE_AXES, *EXPERT_AXES, "stage"))


@dataclass(frozen=True)
class Layout:
    """A mesh, and what its axes divide by their names.

    Attributes:
      mesh: of the context, without devices.
    """

    mesh: AbstractMesh

    @classmethod
    def current(cls) -> "Layout | None":
        """Of the mesh in the context; None where there is none, or where all of it is taken.

        None, too, of a mesh with other names: nobody knows what they divide.
        """
        mesh = jax.sharding.get_abstract_mesh()
        free = set(mesh.axis_names) - set(mesh.manual_axes)
        return cls(mesh) if free and not unknown_axes() else None

    def axes(self, names: tuple[str, ...], size: int) -> tuple[str, ...]:
        """Those of `names` that are in the mesh and together divide a dimension of `size`."""
        kept: list[str] = []
        for name in self.mesh.axis_names:
            free = name in names and name not in self.mesh.manual_axes
            if free and size % self.ways((*kept, name)) == 0 and self.mesh.shape[name] > 1:
                kept.append(name)
        return tuple(kept)

    def batch(self, size: int) -> tuple[str, ...]:
        """Axes that divide the rows."""
        return self.axes(BATCH_AXES, size)

    def heads(self, size: int) -> tuple[str, ...]:
        """Axes that divide attention heads, and the inner width of feed-forward blocks."""
        return self.axes(HEAD_AXES, size)

    @property
    def context_ways(self) -> int:
        """Into how many parts sequences are divided."""
        return self.ways(tuple(a for a in SEQUENCE_AXES if a in self.mesh.shape))

    @property
    def expert_ways(self) -> int:
        """Into how many parts experts are divided."""
        return self.ways(tuple(a for a in EXPERT_AXES if a in self.mesh.shape))

    def ways(self, axes: tuple[str, ...]) -> int:
        """Devices along some axes together."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


def unknown_axes() -> tuple[str, ...]:
    """Axes of the mesh in the context that are not named as the planner names them."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(
        name
        for name in mesh.axis_names
        if name not in _NAMES and name not in mesh.manual_axes and mesh.shape[name] > 1
    )


def platform() -> str:
    """What the traced program is for: "tpu", "gpu" or "cpu".

    While the planner traces, what it plans for. Else the kind of device of the mesh in the
    context, which may be another machine's; the default backend where there is no mesh or it is of
    nothing in particular.
    """
    planned = sharding.planned_for()
    if planned is not None:
        return planned
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    named = jax.default_backend() if device is None else device.platform
    return "gpu" if named in ("cuda", "rocm") else named
