"""A plan: the shape of a mesh and where each array lies on it, without any device.

A plan can be written down, compared and sent to another machine; `bind` turns it into JAX
shardings on the devices that are there, `apply` a step into one that runs as planned.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding import plan_json
from sharding.compiled.compile_check import Report, abstract_mesh, check
from sharding.execution.execute import Execution, Planned
from sharding.explain import Alternative, Prediction, explain
from sharding.machines.topology import Cluster
from sharding.machines.torus import device_grid
from sharding.paths import leaf_path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Mesh shape and partition specs of a program.

    Attributes:
      mesh: axis name to size, outermost first.
      specs: leaf path (as `leaf_path` writes it) to its spec. A leaf takes the spec of the
        longest path that its own path ends with, so that the moments of an optimiser lie with
        their parameters; a leaf without any is replicated.
      batch: mesh axes over which the leading axis of the data is split.
      inputs: path within the tuple of arguments of the planned step to its spec; unlike `specs`
        whole paths.
      outputs: path within its result to its spec.
      placement: mesh axis to its factors over (slices, *torus dimensions, devices of a chip), the
        axis with the nearest neighbours at the front; {} leaves devices in their order.
      activations: named dimension of the step to the mesh axes that divide it within.
      gradients: path of a parameter, within its argument, to the spec of its gradient.
      updates: the same to the spec in which its update is computed, where that is divided further
        than the parameter.
      remat: rematerialisation of layers: what is kept, by increasing recomputation "none"
        (everything), "attention" (all but scores), "dots" (products), "projections" (of
        attention, by name), "full" (nothing).
      accumulation_steps: micro-batches whose gradients are summed before an update.
      pipeline: layers of every pipeline stage, or ().
      microbatches: that fill the pipeline.
      offload: what lies in the host's memory: "optimizer" (its state), "activations" (what layers
        keep), or "none".
      sequence_parallel: what layers hand on is divided along the sequence over the tensor axis.
      gathers_weights: layers that are computed again gather each weight once for both products
        that read it then.
      prediction: what the step will cost; None of a plan that was written by hand.
      alternatives: the next best, fastest first.
      notes: what was out of reach, unknown or left whole, for `explain`.
      program: name of the step.
      cluster: name of the cluster.
      state: positions of arguments that were said to be state; None if inferred.
      data: the same of data.
      donate: positions of arguments whose memory results may take: the prediction and `check`
        take it that they do.
      in_tree: structure of the arguments; not written down.
      out_tree: structure of the result; not written down.
      step: what was planned, for `check`; not written down.
      args: shapes of its arguments; not written down.
      where: the cluster, for `check`.
    """

    mesh: Mapping[str, int] = field(default_factory=dict)
    specs: Mapping[str, PartitionSpec] = field(default_factory=dict)
    batch: tuple[str, ...] = ()
    inputs: Mapping[str, PartitionSpec] = field(default_factory=dict)
    outputs: Mapping[str, PartitionSpec] = field(default_factory=dict)
    activations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gradients: Mapping[str, PartitionSpec] = field(default_factory=dict)
    updates: Mapping[str, PartitionSpec] = field(default_factory=dict)
    remat: str = "none"
    accumulation_steps: int = 1
    pipeline: tuple[int, ...] = ()
    microbatches: int = 1
    offload: str = "none"
    sequence_parallel: bool = False
    gathers_weights: bool = False
    placement: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    prediction: Prediction | None = None
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    program: str = ""
    cluster: str = ""
    state: tuple[int, ...] | None = None
    data: tuple[int, ...] | None = None
    donate: tuple[int, ...] = ()
    in_tree: Any = field(default=None, repr=False, compare=False)
    out_tree: Any = field(default=None, repr=False, compare=False)
    step: Callable[..., Any] | None = field(default=None, repr=False, compare=False)
    args: tuple[Any, ...] | None = field(default=None, repr=False, compare=False)
    where: Cluster | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for axis, size in self.mesh.items():
            if size < 1:
                raise ValueError(f"a mesh axis needs at least one device: {axis}={size}")
        named = {
            "batch": PartitionSpec(self.batch or None),
            **self.specs,
            **self.inputs,
            **self.outputs,
        }
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

    @property
    def in_shardings(self) -> Any:
        """Partition specs of the arguments, as `jax.jit` takes them under `jax.set_mesh`."""
        return self._tree(self.in_tree, self.inputs)

    @property
    def out_shardings(self) -> Any:
        """Partition specs of the result, as `jax.jit` takes them under `jax.set_mesh`."""
        return self._tree(self.out_tree, self.outputs)

    def _tree(self, structure: Any, specs: Mapping[str, PartitionSpec]) -> Any:
        if structure is None:
            raise ValueError(
                "this plan holds paths and no structure of arguments: it was loaded or written by "
                "hand; read `inputs` and `outputs`, or use `apply`, which needs none"
            )
        return jax.tree.unflatten(structure, list(specs.values()))

    @property
    def step_time_s(self) -> float:
        """Predicted seconds of a step."""
        return self._predicted.step_time_s

    @property
    def memory_bytes(self) -> float:
        """Predicted bytes of the fullest device."""
        return self._predicted.memory_bytes

    @property
    def breakdown(self) -> Mapping[str, float]:
        """Predicted seconds, term by term; they sum to `step_time_s`."""
        return self._predicted.breakdown

    @property
    def gap(self) -> float:
        """Distance to a proven lower bound of the search space, as a share of `step_time_s`."""
        return self._predicted.gap

    @property
    def _predicted(self) -> Prediction:
        if self.prediction is None:
            raise ValueError("nothing was predicted of this plan; `sharding.simulate` costs it")
        return self.prediction

    def explain(self) -> str:
        """What is divided, what it costs term by term, and what was out of reach, as text."""
        return explain(self)

    def to_json(self) -> str:
        """The plan as JSON, which `from_json` reads."""
        return plan_json.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads what `to_json` wrote.

        Raises:
          ValueError: not the JSON of a plan.
        """
        return cls(**plan_json.loads(text, [item.name for item in fields(cls)]))

    def save(self, path: str | Path) -> None:
        """Writes the plan to a file, which `load` reads."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads a file that `save` wrote."""
        return cls.from_json(Path(path).read_text())

    def apply(
        self,
        step: Callable[..., Any],
        devices: Sequence[Any] | None = None,
        *,
        donate: Sequence[int] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Planned:
        """A step that runs as planned: jit with shardings, activations, remat and stages.

        Args:
          step: the function that was planned.
          devices: JAX devices; all of this process's backend when None.
          donate: positions of arguments whose memory the results may take: what lies where the
            plan wants it is gone after the step. None is `plan.donate`, for which memory is
            predicted: the state that comes back. () keeps all.
          options: of the compiler, by name, as `check` takes them; its own defaults where None.
        """
        donate = self.donate if donate is None else donate
        execution = self.execution(self.bind(devices).mesh)
        return Planned(
            step, execution, donate=donate, state=self.state, data=self.data, options=options
        )

    def check(
        self,
        step: Callable[..., Any] | None = None,
        args: Sequence[Any] | None = None,
        *,
        donate: Sequence[int] | None = None,
        timeout_s: float = 1200.0,
        answers: Path | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Report:
        """Compiles the step for the cluster that it was planned for, which need not be here.

        Args:
          step: the function that was planned; needed by a plan that was loaded.
          args: its arguments; needed by a plan that was loaded.
          donate: positions of arguments whose memory the results may take; None is
            `plan.donate`.
          timeout_s: seconds until the compilation is given up.
          answers: folder in which the compiler's answers are kept, so that the same program is
            compiled once.
          options: of the compiler, by name; its own defaults where None.

        Raises:
          RuntimeError: the compiler refused, is not installed or took too long.
        """
        step, args = step or self.step, args or self.args
        if step is None or args is None or not self.cluster:
            raise ValueError("a plan that was loaded or written by hand checks a step and its "
                             "arguments: plan.check(step, args), with `cluster` named")  # fmt: skip
        where = Cluster.from_name(self.cluster) if self.where is None else self.where
        return check(
            step, args, self.execution(abstract_mesh(self.mesh, where)), where,
            donate=self.donate if donate is None else donate,
            placement=self.placement,
            predicted_bytes=self.prediction.memory_bytes if self.prediction else None,
            predicted_collectives=self.prediction.collectives if self.prediction else {},
            timeout_s=timeout_s, answers=answers, options=options,
            state=self.state, data=self.data,
        )  # fmt: skip

    def execution(self, mesh: Any) -> Execution:
        """What the plan asks of the execution on a mesh, of devices or abstract."""
        return Execution(
            mesh=mesh,
            inputs=self.inputs,
            outputs=self.outputs,
            activations=self.activations,
            gradients=self.gradients,
            updates=self.updates,
            remat=self.remat,
            accumulation_steps=self.accumulation_steps,
            pipeline=self.pipeline,
            microbatches=self.microbatches,
            offload=self.offload,
            sequence_parallel=self.sequence_parallel,
            gathers_weights=self.gathers_weights,
        )

    def bind(self, devices: Sequence[Any] | None = None) -> "BoundPlan":
        """Lays the plan on devices: on a torus, each axis on the dimensions that it was given.

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
        grid = device_grid(devices[:needed], self.mesh, self.placement)
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

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The mesh for what is traced within: kernels under `jax.shard_map` ask for it."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

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

    def build(self, function: Callable[[Any], Any], tree: Any) -> Any:
        """What a function makes of a tree, each part made where the plan wants it.

        No device ever holds what it does not keep: the state of an optimiser, for instance, which
        is larger than the parameters.
        """
        tree = self.place(tree)
        shapes = jax.eval_shape(function, tree)
        # By leaves: a record that checks its fields could not be rebuilt with shardings in it.
        made = jax.jit(
            lambda tree: jax.tree.leaves(function(tree)), out_shardings=self.shardings(shapes)
        )(tree)
        return jax.tree.unflatten(jax.tree.structure(shapes), made)

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
