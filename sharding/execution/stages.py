"""Pipeline parallelism: a scan over layers, cut into stages that work on micro-batches in turn.

Every stage is a group of devices that holds its layers only. In each tick all stages work, each on
another micro-batch, and hand the result to the next (GPipe, arXiv:1811.06965): B micro-batches
through S stages take B + S - 1 ticks. Stages may hold different numbers of layers; the shorter
ones then pass through, which costs no time that the longest would not take. Other mesh axes stay
with the partitioner.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sharding.execution.rewrite import Body, LayerScan, layer_scans
from sharding.tracing.dims import DimensionGraph
from sharding.tracing.trace import Trace
from sharding.tracing.walk import Notes, Value

AXIS = "stage"


def obstacle(traced: Trace) -> str:
    """Why the layers of a program cannot be cut into stages; "" if they can."""
    scans = list(layer_scans(traced))
    if not scans:
        return "it has no scan over stacked parameters; write its layers as one"
    if len(scans) > 1:
        return f"it has {len(scans)} scans over stacked parameters, and one can be cut"
    found = scans[0]
    if found.within:
        return f"its scan over layers is within a {' within a '.join(found.within[::-1])}"
    assert found.note.carry is not None
    if len(found.note.outs) > len(found.note.carry):
        return "its scan over layers returns something for every layer"
    if _mixes(traced.graph, found.note.bodies[0], traced):
        return "its layers combine examples of the batch, which micro-batches would keep apart"
    if any(_batch_axis(traced, value) is None for value in found.note.carry):
        return "its layers hand on something without a batch dimension"
    return ""


def pipelined(
    traced: Trace, mesh: Mesh | AbstractMesh, cuts: Sequence[int], microbatches: int, body: Body
) -> Callable[[LayerScan, Sequence[Any], Sequence[Any], Sequence[Any]], list[Any]]:
    """What runs a scan over layers as a pipeline.

    Args:
      traced: the program, for the batch dimension of what the layers hand on.
      mesh: with an axis "stage".
      cuts: layers of every stage; they sum to the layers of the scan.
      microbatches: into how many the batch is cut; it has to divide it.
      body: a layer, for one micro-batch.
    """
    stages = mesh.shape[AXIS]
    if len(cuts) != stages or min(cuts) < 1:
        raise ValueError(f"every stage needs a layer: {cuts=}, {stages=}")

    def run(
        layers: LayerScan, consts: Sequence[Any], carry: Sequence[Any], xs: Sequence[Any]
    ) -> list[Any]:
        if sum(cuts) != layers.length:
            raise ValueError(f"stages of {cuts} layers do not make {layers.length}")
        if layers.reverse:
            xs = [jnp.flip(x, 0) for x in xs]
        axes = [_batch_axis(traced, value) for value in layers.carry]
        const_axes = [_batch_axis(traced, value) for value in layers.consts]
        parts = [_cut(x, axis, traced, microbatches) for x, axis in zip(carry, axes, strict=True)]
        shared = [
            x if axis is None else _cut(x, axis, traced, microbatches)
            for x, axis in zip(consts, const_axes, strict=True)
        ]
        staged, valid = _stack_stages(xs, cuts)

        def local(ok: Any, weights: Any, inputs: Any, constants: Any) -> Any:
            stage = jax.lax.axis_index(AXIS)
            mine = [jnp.squeeze(w, 0) for w in weights]

            def pick(arrays: Sequence[Any], which: Sequence[Any], index: Any) -> list[Any]:
                return [
                    x if axis is None else jax.lax.dynamic_index_in_dim(x, index, 0, False)
                    for x, axis in zip(arrays, which, strict=True)
                ]

            def tick(received: Any, t: Any) -> tuple[Any, Any]:
                own = jnp.clip(t - stage, 0, microbatches - 1)
                fresh = pick(inputs, axes, jnp.minimum(t, microbatches - 1))
                entering = [
                    jnp.where(stage == 0, a, b) for a, b in zip(fresh, received, strict=True)
                ]
                at_hand = pick(constants, const_axes, own)

                def layer(state: Any, slices: Any) -> tuple[Any, None]:
                    real, *weights = slices
                    new = body(at_hand, state, weights)
                    return tuple(
                        jnp.where(real, a, b) for a, b in zip(new, state, strict=True)
                    ), None

                leaving, _ = jax.lax.scan(layer, tuple(entering), (ok[0], *mine))
                forward = [(i, i + 1) for i in range(stages - 1)]
                sent = tuple(jax.lax.ppermute(x, AXIS, forward) for x in leaving)
                return sent, leaving

            # Stages that wait compute on real data, not zeros: what they compute is dropped, but
            # a division by zero in it would reach the gradient as 0 · inf.
            start = tuple(pick(inputs, axes, 0))
            _, made = jax.lax.scan(tick, start, jnp.arange(microbatches + stages - 1))
            return tuple(x[stages - 1 :] for x in made)

        over_stages, whole = PartitionSpec(AXIS), PartitionSpec()
        outs = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(over_stages, over_stages, whole, whole),
            out_specs=over_stages,
            axis_names={AXIS},
            check_vma=False,
        )(valid, staged, parts, shared)
        # Of all stages only the last has the results.
        return [_join(x[-microbatches:], axis, traced) for x, axis in zip(outs, axes, strict=True)]

    return run


def _stack_stages(xs: Sequence[Any], cuts: Sequence[int]) -> tuple[list[Any], Any]:
    """[layers, ...] -> [stages, longest stage, ...], and which of those are layers."""
    longest = max(cuts)
    starts = np.cumsum([0, *cuts[:-1]])
    offsets = np.arange(longest)
    valid = offsets[None] < np.asarray(cuts)[:, None]
    if min(cuts) == longest:
        return [x.reshape(len(cuts), longest, *x.shape[1:]) for x in xs], valid
    # What is no layer repeats one, so that its numbers are finite.
    index = np.where(valid, starts[:, None] + offsets[None], starts[:, None])
    return [jnp.take(x, index, axis=0) for x in xs], valid


def _batch_axis(traced: Trace, value: Value) -> int | None:
    """The axis whose outermost factor is the batch."""
    for i, axis in enumerate(value.axes):
        if set(traced.graph.atoms(axis)[:1]) & traced.splits.batch:
            return i
    return None


def _cut(x: Any, axis: int | None, traced: Trace, parts: int) -> Any:
    """[..., batch, ...] -> [parts, ..., batch / parts, ...].

    Part i takes every `parts`-th example from i on, so that each device keeps its own.
    """
    assert axis is not None
    batch = _batch_size(traced)
    if batch % parts:
        raise ValueError(f"{parts} micro-batches do not divide a batch of {batch}")
    rest = x.shape[axis] // batch
    shape = (*x.shape[:axis], batch // parts, parts, rest, *x.shape[axis + 1 :])
    moved = jnp.moveaxis(x.reshape(shape), axis + 1, 0)
    return moved.reshape(parts, *x.shape[:axis], batch // parts * rest, *x.shape[axis + 1 :])


def _join(x: Any, axis: int | None, traced: Trace) -> Any:
    """Undoes `_cut`."""
    assert axis is not None
    parts, batch = x.shape[0], _batch_size(traced)
    rest = x.shape[axis + 1] // (batch // parts)
    shape = (parts, *x.shape[1 : axis + 1], batch // parts, rest, *x.shape[axis + 2 :])
    moved = jnp.moveaxis(x.reshape(shape), 0, axis + 1)
    return moved.reshape(*x.shape[1 : axis + 1], batch * rest, *x.shape[axis + 2 :])


def _batch_size(traced: Trace) -> int:
    return traced.graph.size(min(traced.splits.batch))


def _mixes(graph: DimensionGraph, notes: Notes, traced: Trace) -> bool:
    """Whether an equation sums, sorts or scans along the batch."""
    for note in notes:
        if note.applied is not None:
            axes = (*note.applied.contracted, *note.applied.mixed)
            if {a for axis in axes for a in graph.atoms(axis)} & traced.splits.batch:
                return True
        if any(_mixes(graph, body, traced) for body in note.bodies):
            return True
    return False
