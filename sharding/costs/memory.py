"""Bytes of one device: training state, kept activations, and the largest transient."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharding.costs.local import View
from sharding.costs.strategies import Strategies
from sharding.programs.program import Block, dtype_bytes

# Layers whose gathered parameters are alive at once: the one that computes and the next.
_GATHERED_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a device, arrays over strategies.

    Attributes:
      parameters: stored parameters.
      gradients: accumulated gradients.
      optimizer: its state.
      activations: kept for the backward pass.
      transient: the largest working set of one block.
      host: what lies in the host's memory instead.
    """

    parameters: np.ndarray
    gradients: np.ndarray
    optimizer: np.ndarray
    activations: np.ndarray
    transient: np.ndarray
    host: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Of the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.transient


def memory(view: View, repeats: Sequence[Any]) -> Memory:
    """Costs the memory of strategies.

    Args:
      view: the program under them.
      repeats: repetitions of its blocks, scalars or (N,).
    """
    program, strategies = view.program, view.strategies
    dense, routed, ends, kept = (0.0 * view.one for _ in range(4))
    transient = 0.0 * view.one
    outer, inner = 0.0 * view.one, 0.0 * view.one
    for block, repeat in zip(program.blocks, repeats, strict=True):
        outside, experts = view.params(block)
        if block.checkpointed:
            share = np.ceil(repeat / strategies.stage)
            dense, routed = dense + share * outside, routed + share * experts
            kept = kept + share * kept_bytes(view, block)
            outer, inner = np.maximum(outer, outside), np.maximum(inner, experts)
        else:  # the ends lie on different stages
            ends = np.where(strategies.stage > 1, np.maximum(ends, outside), ends + outside)
        transient = np.maximum(transient, _working_set(view, block))
    dense = dense + ends
    width = parameter_width(view)
    training = float(program.training)
    gathered_dense, gathered_routed = (
        (strategies.zero == 3) & (ways > 1) for ways in (strategies.state_ways, strategies.fsdp)
    )
    layer = outer * gathered_dense + inner * gathered_routed
    gathered = np.maximum(_GATHERED_LAYERS * layer, ends * gathered_dense) * 2.0
    in_flight = np.where(
        strategies.stage > 1, np.minimum(strategies.stage, strategies.microbatches), 1
    )
    activations = kept * in_flight * training
    optimizer = program.state_bytes * zero_share(strategies, 1, dense, routed)
    away_activations = (strategies.offload == "activations") * activations
    away_optimizer = (strategies.offload == "optimizer") * optimizer
    return Memory(
        parameters=width * zero_share(strategies, 3, dense, routed),
        gradients=program.gradient_bytes * zero_share(strategies, 2, dense, routed),
        optimizer=optimizer - away_optimizer,
        activations=activations - away_activations,
        transient=transient + gathered,
        host=away_activations + away_optimizer,
    )


def zero_share(strategies: Strategies, stage: int, dense: Any, routed: Any) -> np.ndarray:
    """Parameters of which a device holds what a stage of ZeRO divides.

    Args:
      strategies: N of them.
      stage: of ZeRO that divides it: 1 for optimiser state, 2 for gradients, 3 for parameters.
      dense: parameters outside experts of a device, before ZeRO, (N,).
      routed: the same of experts.
    """
    divides = strategies.zero >= stage
    return dense / np.where(divides, strategies.state_ways, 1) + routed / np.where(
        divides, strategies.fsdp, 1)  # fmt: skip


def kept_bytes(view: View, block: Block) -> np.ndarray:
    """Activations of a repetition that are kept for the backward pass, for one micro-batch."""
    needed = {n for op in block.ops for n in op.residual_names}
    producers = {n: op for op in block.ops for n in op.outputs}
    total = 0.0 * view.one
    for name in dict.fromkeys((*block.carry, *sorted(needed))):
        tensor = view.program.tensors[name]
        if tensor.role not in ("activation", "state"):
            continue
        size = resident_bytes(view, name)
        if name in block.carry or name not in producers:
            total = total + size
        else:
            total = total + size * ~view.strategies.recomputes(producers[name])
    return total


def resident_bytes(view: View, name: str) -> np.ndarray:
    """Bytes of an activation at rest: sequence parallelism also divides what tensor leaves."""
    size = view.bytes(name)
    if view.divided(view.program.tensors[name].dims, "tensor"):
        return size
    return size / np.where(view.strategies.sequence_parallel, view.strategies.tensor, 1)


def _working_set(view: View, block: Block) -> np.ndarray:
    """The most that is alive while a block runs: its results, their cotangents in training."""
    if block.checkpointed:
        read = {n for op in block.ops for n in op.inputs}
        # What an operation only hands to the backward pass is kept, or made again piece by piece.
        handed = {n for op in block.ops for n in op.outputs if n in (op.residuals or ())} - read
        names = {n for op in block.ops for n in (*op.inputs, *op.outputs)} - handed
        alive = sum(
            (resident_bytes(view, n) for n in sorted(names)
             if view.program.tensors[n].role == "activation"),
            0.0 * view.one,
        )  # fmt: skip
        return alive * (1.0 + 0.5 * view.program.training)
    largest = 0.0 * view.one
    for op in block.ops:
        for name in op.outputs:
            tensor = view.program.tensors[name]
            rounds = math.prod(view.program.dims[d] for d in tensor.dims[: tensor.loop])
            size = view.bytes(name) / rounds
            largest = np.maximum(largest, size * (1.0 + view.program.training))
    return largest


def parameter_width(view: View) -> float:
    """Bytes of a stored parameter: of the widest type that there is."""
    widths = [dtype_bytes(t.dtype) for t in view.program.tensors.values() if t.role == "param"]
    return max(widths, default=4.0)
