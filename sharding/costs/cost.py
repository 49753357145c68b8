"""Step time, term by term, of many strategies at once.

Per operation a roofline over its local, tile-padded sizes; per block the collectives that follow
from the names of its dimensions (see `program`); per step the pipeline's bubble, the reduction of
gradients and the update. Everything is an array over strategies. Sizes and repetitions of the
program may be arrays too, so that calibration costs a table of runs as fast as one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharding.costs import collectives
from sharding.costs.constants import Calibration, shipped
from sharding.costs.local import View
from sharding.costs.machine import Machine, machine
from sharding.costs.memory import Memory, kept_bytes, memory, parameter_width, zero_share
from sharding.costs.roofline import op_time
from sharding.costs.strategies import Strategies
from sharding.costs.traffic import fsdp_comm, layer_comm
from sharding.machines.topology import Cluster
from sharding.programs.program import Block

# Sharpness of the change from a device that waits for its host to one that does not.
_LAUNCH_SHARPNESS = 6.0
# A host this many times as fast as the device keeps nothing waiting; the smooth change between the
# two would say 2e-13 of the time, of which subtraction leaves mostly rounding.
_HOST_FAR_AHEAD = 100.0
# Kernels that the host launches for a collective: the collective, and what waits for it.
_COLLECTIVE_LAUNCHES = 2.0
# Passes over accumulated gradients a micro-batch: the product that makes one adds it in place.
_SUM_PASSES = 2
# Passes over a gradient in an update: its norm, and the update itself.
_GRADIENT_READS = 2


_MICROBATCH_TERMS = ("forward", "backward", "recompute", "layer_comm", "fsdp_comm", "launch")


@dataclass(frozen=True, kw_only=True)
class BlockTime:
    """Seconds of one repetition of a block for one micro-batch, arrays over strategies.

    Attributes:
      forward: products and passes over memory.
      backward: the same of the backward pass.
      recompute: of the forward pass that is run again.
      layer_comm: exposed collectives of tensor, context and expert parallelism.
      fsdp_comm: exposed gathers of parameters and scatters of gradients.
      launch: waiting for the host, which launches kernels in order.
    """

    forward: np.ndarray
    backward: np.ndarray
    recompute: np.ndarray
    layer_comm: np.ndarray
    fsdp_comm: np.ndarray
    launch: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Of the whole micro-batch."""
        return sum((getattr(self, name) for name in _MICROBATCH_TERMS), np.zeros(()))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What strategies cost, arrays over strategies.

    Attributes:
      step_s: seconds of a step.
      terms: the same, term by term; they sum to `step_s`.
      memory: bytes of a device.
      blocks: seconds of a repetition of each block.
      outside_s: what the step adds to its micro-batches: reduction, update, constant.
    """

    step_s: np.ndarray
    terms: Mapping[str, np.ndarray]
    memory: Memory
    blocks: tuple[BlockTime, ...]
    outside_s: np.ndarray


def estimate(
    program: Any,
    strategies: Strategies,
    cluster: Cluster | Machine,
    *,
    calibration: Calibration | None = None,
    stack: str = "",
    sizes: Mapping[str, Any] | None = None,
    repeats: Sequence[Any] | None = None,
) -> Estimate:
    """Costs strategies.

    Args:
      program: what is run, a `Program`.
      strategies: how, N of them.
      cluster: where; or a `Machine` of N entries.
      calibration: constants; the shipped ones when None.
      stack: software that runs it; XLA when "".
      sizes: dimensions in place of the program's, scalars or (N,).
      repeats: repetitions of blocks in place of the program's, scalars or (N,).

    Returns:
      Arrays of N entries.
    """
    if isinstance(cluster, Cluster):
        constants = (calibration or shipped()).constants(cluster.chip.name, stack, cluster.measured)
        cluster = machine(cluster, strategies, constants)
    view = View(program, strategies, sizes)
    repeats = [b.repeat for b in program.blocks] if repeats is None else list(repeats)
    blocks = tuple(_block_time(view, block, cluster) for block in program.blocks)
    return _step(view, blocks, repeats, cluster)


def _block_time(view: View, block: Block, machine: Machine) -> BlockTime:
    constants, strategies = machine.constants, view.strategies
    zero = 0.0 * view.one
    forward, backward, again, kernels = zero, zero, zero, zero
    for index, op in enumerate(block.ops):
        busy = op_time(view, op, machine)
        forward = forward + busy + constants.kernel_s
        kernels = kernels + 1.0
        if view.program.training:
            count = 2.0 if op.kind in ("dot", "grouped_dot") else 1.0
            backward = backward + op.backward_passes * busy + count * constants.kernel_s
            read = 1.0 if index in block.read_again else constants.dead
            repeated = strategies.recomputes(op) * float(block.checkpointed) * read
            again = again + repeated * (busy + constants.kernel_s)
            kernels = kernels + count + repeated
    comm, collectives_ = layer_comm(view, block, machine)
    comm = _longer(comm, collectives_ * constants.sync_s) * (1.0 - constants.overlap_tensor)
    kernels = kernels + _COLLECTIVE_LAUNCHES * collectives_
    busy = forward + backward + again
    gathers, scatters = fsdp_comm(view, block, machine)
    exposed = _exposed(gathers + scatters, busy, constants.overlap_fsdp)
    return BlockTime(
        forward=forward,
        backward=backward,
        recompute=again,
        layer_comm=comm,
        fsdp_comm=exposed,
        # The device waits for the host where the host cannot launch as fast as the device runs.
        launch=_waits(
            busy + comm + exposed,
            kernels * constants.launch_s * (1.0 + constants.skew * np.log2(strategies.tensor)),
        ),
    )


def _exposed(comm: np.ndarray, compute: np.ndarray, share: Any) -> np.ndarray:
    """What of a communication does not hide behind compute.

    At most `share` of either hides: its first and last pieces have nothing to hide behind. The
    change from one limit to the other is smooth, because neither of the two is even.
    """
    left = share * (comm - compute)
    return (1 - share) * comm + 0.5 * (left + np.sqrt(left**2 + 0.04 * share**2 * comm * compute))


def _longer(moving: np.ndarray, waiting: np.ndarray) -> np.ndarray:
    """The longer of two times that pass together, smoothly: sqrt(x² + y²).

    Members that are there begin to send while the last are awaited: a long message hides the wait,
    and a short one hides within it.
    """
    return np.sqrt(moving**2 + waiting**2)


def _waits(busy: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """How much longer than `busy` something takes that cannot take less than `floor`.

    Kernels differ: where the two are near each other, some wait and some do not.
    """
    p = _LAUNCH_SHARPNESS
    waits = (busy**p + floor**p) ** (1 / p) - busy
    return np.where(_HOST_FAR_AHEAD * floor < busy, 0.0, waits)


def _step(
    view: View, blocks: tuple[BlockTime, ...], repeats: Sequence[Any], machine: Machine
) -> Estimate:
    strategies, constants = view.strategies, machine.constants
    count = strategies.microbatches.astype(float)
    terms: dict[str, np.ndarray] = dict.fromkeys(_MICROBATCH_TERMS, 0.0 * view.one)
    for time, repeat in zip(blocks, repeats, strict=True):
        for name in _MICROBATCH_TERMS:  # of an average stage
            terms[name] = terms[name] + count * repeat * getattr(time, name) / strategies.stage
    terms["bubble"] = _bubble(view, blocks, repeats)
    inside = sum(terms.values())
    terms["stage_comm"] = _stage_comm(view, machine)
    reduction = _gradient_comm(view, repeats, machine)
    last_backward = terms["backward"] / count
    terms["gradient_comm"] = _exposed(reduction, last_backward, constants.overlap_data)
    gathered = _parameter_comm(view, repeats, machine)
    terms["parameter_comm"] = _exposed(gathered, terms["forward"] / count, constants.overlap_update)
    update, accumulate = _update(view, repeats, machine)
    terms["accumulate"] = accumulate
    terms["update"] = update
    terms["offload"] = _offload(view, repeats, machine, sum(terms[n] for n in _MICROBATCH_TERMS))
    terms["host"] = constants.step_s + count * constants.microbatch_s + 0.0 * view.one
    # Steps wait for the slowest node or slice.
    waiting = constants.jitter * np.log2(np.maximum(machine.domains, 1.0))
    terms["waiting"] = waiting * sum(terms.values())
    total = sum(terms.values())
    return Estimate(
        step_s=np.asarray(total),
        terms=terms,
        memory=memory(view, repeats),
        blocks=blocks,
        outside_s=np.asarray(total - inside),
    )


def _bubble(view: View, blocks: Sequence[BlockTime], repeats: Sequence[Any]) -> np.ndarray:
    """Seconds that an average stage is idle in a step.

    All micro-batches through equal stages take
    T = m·t_max + (p-1)/v·t   (1F1B with v stretches a stage; arXiv:2104.04473, section 2.2)
    of which an average stage works m·t. The embedding is on the first stage and the head on the
    last, which is thereby the slowest. Idle time is summed from its causes, not left over from T,
    so that one stage has exactly none.
    """
    strategies = view.strategies
    stage = strategies.stage
    layers, depth, ends, heaviest = (0.0 * view.one for _ in range(4))
    for block, time, repeat in zip(view.program.blocks, blocks, repeats, strict=True):
        if block.checkpointed:
            layers, depth = layers + repeat * time.total, depth + repeat
        else:
            ends = ends + repeat * time.total
            heaviest = np.maximum(heaviest, repeat * time.total)
    fullest = np.ceil(depth / stage) * stage / np.maximum(depth, 1.0)
    uneven = layers / stage * (fullest - 1.0) + np.where(stage > 1, heaviest - ends / stage, 0.0)
    fill = (stage - 1) * layers / stage / strategies.interleave
    return strategies.microbatches * uneven + fill


def _stage_comm(view: View, machine: Machine) -> np.ndarray:
    """Hand-overs between stages that nothing hides: one each way, micro-batch and stretch.

    Every member of a tensor-parallel group sends its share (arXiv:2104.04473, section 4.1).
    """
    strategies = view.strategies
    carry = sorted({n for b in view.program.blocks if b.checkpointed for n in b.carry})
    size = sum((view.bytes(n) for n in carry), 0.0 * view.one) / strategies.tensor
    once = collectives.send(size, machine.speed("stage"), machine.latency("stage"))
    rounds = strategies.microbatches * strategies.interleave + strategies.stage - 1
    return once * rounds * (1.0 + view.program.training) * (strategies.stage > 1)


def _gradient_comm(view: View, repeats: Sequence[Any], machine: Machine) -> np.ndarray:
    """Sums of gradients over what `fsdp_comm` has not summed them over, once a step.

    Whose optimiser is divided (ZeRO-1) needs its part of a sum only: a scatter, no all-reduce.
    """
    program, strategies = view.program, view.strategies
    if not program.training:
        return 0.0 * view.one
    dense, routed = local_params(view, repeats)
    width = program.gradient_bytes
    total = 0.0 * view.one
    for axis in ("context", "expert", "data", "fsdp"):
        members, passes = getattr(strategies, axis), np.full(len(strategies), 2)
        if axis in ("expert", "fsdp"):
            members = np.where(strategies.zero >= 2, 1, members)
            passes = np.where(strategies.zero == 1, 1, 2)
        count = zero_share(strategies, 2, dense, 0.0 if axis == "expert" else routed)
        speed, latency = machine.speed(axis), machine.latency(axis)
        once = collectives.reduce_scatter(width * count, members, speed, latency)
        total = total + passes * once
    return total


def _parameter_comm(view: View, repeats: Sequence[Any], machine: Machine) -> np.ndarray:
    """Gathers of new parameters, once a step, where only their update is divided: ZeRO-1 and 2."""
    program, strategies = view.program, view.strategies
    if not program.training:
        return 0.0 * view.one
    dense, routed = local_params(view, repeats)
    width = parameter_width(view) * program.trained
    total = 0.0 * view.one
    for axis, count in (("expert", dense / strategies.fsdp), ("fsdp", dense + routed)):
        members = np.where(np.isin(strategies.zero, (1, 2)), getattr(strategies, axis), 1)
        speed, latency = machine.speed(axis), machine.latency(axis)
        total = total + collectives.all_gather(width * count, members, speed, latency)
    return total


def local_params(view: View, repeats: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of the fullest device before FSDP: outside experts and of experts."""
    dense, routed, ends = 0.0 * view.one, 0.0 * view.one, 0.0 * view.one
    stage = view.strategies.stage
    for block, repeat in zip(view.program.blocks, repeats, strict=True):
        outside, experts = view.params(block)
        if block.checkpointed:
            dense = dense + repeat * outside / stage
            routed = routed + repeat * experts / stage
        else:
            ends = np.where(stage > 1, np.maximum(ends, outside), ends + outside)
    return dense + ends, routed


def _update(view: View, repeats: Sequence[Any], machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """The optimiser's pass over memory, and the sums of gradients over micro-batches."""
    program, strategies = view.program, view.strategies
    if not program.training:
        return 0.0 * view.one, 0.0 * view.one
    dense, routed = local_params(view, repeats)
    width = parameter_width(view)
    gradient = program.gradient_bytes
    bandwidth = machine.hbm * machine.constants.hbm
    moved = 2 * width * program.trained + 2 * program.state_bytes + _GRADIENT_READS * gradient
    update = moved * zero_share(strategies, 1, dense, routed) / bandwidth
    held = zero_share(strategies, 2, dense, routed)
    sums = _SUM_PASSES * gradient * held * strategies.microbatches * (strategies.microbatches > 1)
    return update, sums / bandwidth


def _offload(view: View, repeats: Sequence[Any], machine: Machine, busy: Any) -> np.ndarray:
    """Transfers to and from the host's memory that compute does not hide."""
    strategies = view.strategies
    if not np.any(strategies.offload != "none"):
        return 0.0 * view.one
    kept = 0.0 * view.one
    for block, repeat in zip(view.program.blocks, repeats, strict=True):
        if block.checkpointed:
            kept = kept + repeat / strategies.stage * kept_bytes(view, block)
    moved = 2 * kept * strategies.microbatches * (strategies.offload == "activations")
    state = view.program.state_bytes * zero_share(strategies, 1, *local_params(view, repeats))
    behind = machine.constants.overlap_fsdp * busy
    hidden = np.maximum(0.0, moved / machine.pcie - behind)
    return hidden + 2 * state * (strategies.offload == "optimizer") / machine.pcie
