"""Communication inside a micro-batch: what follows from the names of divided dimensions."""

from typing import Any

import numpy as np

from sharding.costs import collectives
from sharding.costs.local import View
from sharding.costs.machine import Machine
from sharding.programs.program import Block, Op


def layer_comm(view: View, block: Block, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """Collectives of tensor, context and expert parallelism in one repetition and micro-batch.

    Returns:
      Their seconds, and how many there are.
    """
    strategies, training = view.strategies, view.program.training
    reduced: set[str] = set()
    total, count = view.one * 0.0, view.one * 0.0
    for op in block.ops:
        again = strategies.recomputes(op) if block.checkpointed and training else 0.0
        seconds, sums = _partial_sums(view, op, machine, reduced, again)
        total, count = total + seconds, count + sums * (strategies.tensor > 1)
        if op.kind == "route":
            size = np.maximum(view.bytes(op.outputs[0]), view.bytes(op.inputs[0]))
            once = collectives.all_to_all(
                size, strategies.expert, machine.speed("expert"), machine.latency("expert"),
                torus=machine.torus,
            )  # fmt: skip
            total = total + once * (1.0 + training + again)
            count = count + (1.0 + training + again) * (strategies.expert > 1)
        if op.is_matmul:
            total = total + _context_gathers(view, op, machine, again)
    return total, count


def _partial_sums(
    view: View, op: Op, machine: Machine, reduced: set[str], again: Any
) -> tuple[np.ndarray, Any]:
    """All-reduces over tensor parallelism: of partial results, and of partial cotangents.

    Returns:
      Their seconds, and how many there are if layers are divided.
    """
    tensors, strategies = view.program.tensors, view.strategies
    total, count = view.one * 0.0, 0.0
    outputs_divided = any(view.divided(tensors[n].dims, "tensor") for n in op.outputs)
    # Results of experts are summed over a token's experts before they are reduced: linear.
    routed = any(view.divided(tensors[n].dims, "expert") for n in op.inputs)
    merged = view.elements(["top_k"]) if routed and "top_k" in view.local else 1.0

    def reduce_(name: str) -> np.ndarray:
        return collectives.all_reduce(
            view.bytes(name) / merged, strategies.tensor, machine.speed("tensor"),
            machine.latency("tensor"),
        )  # fmt: skip

    if view.divided(op.contracted, "tensor") and not outputs_divided:
        total = total + reduce_(op.outputs[0]) * (1.0 + again)
        count = count + 1.0 + again
    if view.program.training and outputs_divided and op.is_matmul:
        for name in op.inputs:
            tensor = tensors[name]
            if tensor.role != "activation" or view.divided(tensor.dims, "tensor"):
                continue
            if name not in reduced:
                reduced.add(name)
                total, count = total + reduce_(name), count + 1.0
    return total, count


def _context_gathers(view: View, op: Op, machine: Machine, again: Any) -> np.ndarray:
    """Gathers of operands whose own positions another operand's division displaces."""
    splits, strategies = view.program.splits, view.strategies
    first = next((d for d in view.program.space(op) if splits.get(d) == "context"), None)
    total = view.one * 0.0
    for name in op.inputs:
        tensor = view.program.tensors[name]
        own = [d for d in tensor.dims if splits.get(d) == "context"]
        if tensor.role == "param" or not own or own[0] == first or first is None:
            continue
        size = view.bytes(name) * strategies.context
        once = collectives.all_gather(
            size, strategies.context, machine.speed("context"), machine.latency("context")
        )
        # Backward gathers again and scatters the sums of cotangents.
        total = total + once * (1.0 + 2.0 * view.program.training + again)
    return total


def fsdp_comm(view: View, block: Block, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """Gathers of a repetition's parameters, and scatters of its gradients, a micro-batch."""
    strategies, training = view.strategies, view.program.training
    dense, routed = view.params(block)
    gather, scatter = 0.0 * view.one, 0.0 * view.one
    # What lies outside experts is divided over their axis, too: gathered over one after the other.
    for axis, count in (("expert", dense / strategies.fsdp), ("fsdp", dense + routed)):
        members = getattr(strategies, axis)
        speed, latency = machine.speed(axis), machine.latency(axis)
        # Parameters travel in the type that computes, gradients in that which is reduced.
        gather = gather + collectives.all_gather(2.0 * count, members, speed, latency)
        scatter = scatter + collectives.reduce_scatter(
            view.program.gradient_bytes * count, members, speed, latency
        )
    passes = (1.0 + training) * (strategies.zero == 3)
    return gather * passes, scatter * (training * (strategies.zero >= 2))
