"""One mesh for a run that learns and generates on the same devices, in turn.

A mesh that is best for the update alone is not: what divides parameters by the batch (FSDP) gathers
them again for every token that is written. The planner costs both programs on every mesh, and the
one is chosen on which a step of the run takes least:

    step = update with its reference log-probabilities + tokens · decoding of one token
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
from flax import nnx

import sharding
from jaxrl import policy as policy_lib
from jaxrl.deployment.parts import USABLE, planned
from jaxrl.deployment.programs import Program, actor_programs, split_shapes, update_parts
from jaxrl.deployment.workload import Workload
from jaxrl.models import Decoder, LoraParam
from sharding import Cluster, Constraints, DoesNotFit

AXES = ("data", "fsdp", "tensor")
_OTHERS = {"context": 1, "expert": 1, "stage": 1}
_ZERO = 3  # an FSDP axis divides parameters, and not the optimiser's state alone
_EVERY = 10_000  # meshes: all
_TIED = 1.02  # predicted times that differ by less than this are not told apart


class _Cost(NamedTuple):
    step_s: float
    memory_bytes: float


@dataclass(frozen=True, kw_only=True)
class SharedMesh:
    """A mesh, and what a step of the run is predicted to take on it.

    Attributes:
      mesh: `AXES` to their sizes, without those of one.
      update_s: reference log-probabilities, gradients and optimiser.
      generation_s: decoding of the longest completion.
      memory_bytes: of the fullest device, while the program runs that needs most.
      considered: meshes that were costed.
    """

    mesh: Mapping[str, int]
    update_s: float
    generation_s: float
    memory_bytes: float
    considered: int

    def __str__(self) -> str:
        named = ",".join(f"{axis}={size}" for axis, size in self.mesh.items()) or "data=1"
        return (
            f"mesh {named}, the best of {self.considered}: predicted are {self.update_s:.3g} s an "
            f"update, {self.generation_s:.3g} s to write its completions and "
            f"{self.memory_bytes / 1e9:.2f} GB a device"
        )


def shared_mesh(
    workload: Workload,
    cluster: Cluster,
    *,
    divides: Callable[[int], bool] = lambda ways: True,
) -> SharedMesh:
    """The mesh of all devices of a cluster on which one step takes least time and fits.

    Args:
      workload: what is run, on functions as rewards and costs.
      cluster: the devices.
      divides: whether all batches of the run may be divided that many ways.

    Raises:
      sharding.DoesNotFit: on every mesh a device would need more memory than it has.
      ValueError: no mesh divides the batches and the model.
    """
    learn = learning(workload)
    decode = {p.name: p for p in actor_programs(workload, workload.prompts_per_step)}["decode"]
    tokens = workload.decoding_steps(workload.prompts_per_step)
    update, writing = (_costs(program, cluster) for program in (learn, decode))
    times = {
        degrees: update[degrees].step_s + tokens * writing[degrees].step_s
        for degrees in update
        if degrees in writing and divides(degrees[0] * degrees[1])
    }
    if not times:
        raise ValueError(
            f"no mesh of {cluster.device_count} devices divides every batch of the run and the "
            "model; choose batches that are multiples of the devices, or name a mesh"
        )
    refused: list[DoesNotFit] = []
    for degrees in _in_order(times, update):
        pinned = dict(zip(AXES, degrees, strict=True)) | _OTHERS | {"zero": _ZERO}
        try:
            part = planned(learn, cluster, pinned=pinned)
        except DoesNotFit as error:
            refused.append(error)
            continue
        needed = max(part.memory_bytes, part.resident_bytes + writing[degrees].memory_bytes)
        limit = USABLE * cluster.memory_bytes
        if needed <= limit:
            return SharedMesh(
                mesh={axis: n for axis, n in zip(AXES, degrees, strict=True) if n > 1},
                update_s=part.step_s, generation_s=tokens * writing[degrees].step_s,
                memory_bytes=needed, considered=len(times),
            )  # fmt: skip
        refused.append(
            DoesNotFit(
                f"{learn.name} and generation on {cluster.name} need {needed / 1e9:.1f} GB a "
                f"device of {limit / 1e9:.1f} GB usable",
                needed, limit,
            )
        )  # fmt: skip
    raise min(refused, key=lambda error: error.shortfall_bytes)


def learning(workload: Workload) -> Program:
    """The update, with log-probabilities of a reference policy that lies on the same devices.

    Of a policy with adapters, the reference's weights are those that are not trained.
    """
    learner, params, rollouts = update_parts(workload)
    graphdef, reference = split_shapes(partial(Decoder, workload.executed(workload.policy)))
    state = jax.eval_shape(
        lambda params: learner.init(params, num_prompts=workload.prompts_per_step), params
    )

    def learn(reference, state, rollouts):
        log_probs = policy_lib.evaluate(
            nnx.merge(graphdef, reference), rollouts.prompts, rollouts.tokens, rollouts.mask,
            temperature=1.0, with_entropy=False,
        ).log_probs  # fmt: skip
        frozen = {}
        if workload.policy.lora is not None:
            _, rest = nnx.split_state(reference, LoraParam, ...)
            frozen = {"policy": rest}
        rollouts = rollouts.replace(reference_log_probs=log_probs)
        return replace(learner, frozen=frozen).step(state, rollouts)

    return Program(
        name="learn", side="learner", step=learn, args=(reference, state, rollouts), donate=(1,),
        parameters="state", state=(0, 1), data=(2,),
    )  # fmt: skip


def _costs(program: Program, cluster: Cluster) -> dict[tuple[int, ...], _Cost]:
    """Of a program on every mesh that divides it, by the degrees of `AXES`."""
    plan = sharding.plan(
        program.step, program.args, cluster=cluster, state=program.state, data=program.data,
        donate=program.donate, top=_EVERY, tie_tolerance=0.0,
        constraints=Constraints(pinned=_OTHERS, zero=(_ZERO,), memory_fraction=USABLE),
    )  # fmt: skip
    found: dict[tuple[int, ...], _Cost] = {}
    host = plan.breakdown.get("host", 0.0) if program.on_device else 0.0
    for one in (plan, *plan.alternatives):
        degrees = tuple(one.mesh.get(axis, 1) for axis in AXES)
        found.setdefault(degrees, _Cost(one.step_time_s - host, one.memory_bytes))
    return found


def _in_order(
    times: Mapping[tuple[int, ...], float], update: Mapping[tuple[int, ...], _Cost]
) -> list[tuple[int, ...]]:
    """Fastest first; of those within a tie of the fastest, the one that takes least memory."""
    order = sorted(times, key=lambda degrees: times[degrees])
    tied = [d for d in order if times[d] <= _TIED * times[order[0]]]
    first = min(tied, key=lambda degrees: update[degrees].memory_bytes)
    return [first, *(d for d in order if d != first)]
