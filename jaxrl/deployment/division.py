"""Which chips learn and which act: chosen together with the actors' size, batch and codec.

The learner updates as fast as it can; actors generate; whichever is slower, or the link between
them, sets the pace:

    step = max(update + encode, prompts a step / actors' prompts a second, transfer)

and a rollout is as many versions old as steps pass while it is written. `sharding` gives the cost
of each program on each part.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import numpy as np

import sharding
from jaxrl.deployment.machines import Cut, actor_sizes, cuts, hosts
from jaxrl.deployment.programs import Program, actor_programs, learner_programs
from jaxrl.deployment.workload import Workload
from jaxrl.models import DecoderConfig
from sharding import Cluster, Constraints, Plan

Codec = Literal["dense", "sparse"]

# Bits a changed element on the wire, by density: `python -m experiments.bench_sparse_delta`.
_BITS = ((1e-3, 10.1), (6.2e-3, 7.43), (1e-2, 6.9), (5e-2, 5.65), (0.3, 8.0), (1.0, 16.0))
DEVICE_TRAFFIC = 2.13
"""Bytes that the device half of encode or of apply reads and writes, for each byte of bf16 weights:
the kernels' BlockSpecs, by the same command."""
# Bytes of dense weights a second that one host codes, on one thread; the same command.
_HOST_CODING = 2.4e9
_COMMON = 0.25  # share of an actor's memory that its programs use in turn
_USABLE = 0.92  # share of a chip's memory that plans may fill, as `sharding.Constraints`


@dataclass(frozen=True, kw_only=True)
class Part:
    """A program on its machine.

    Attributes:
      program: what runs.
      plan: how; of a shortened program where `scale` is not 1.
      step_s: predicted seconds of a call.
      memory_bytes: predicted, of the fullest device.
      resident_bytes: the part of it that stays between calls.
    """

    program: Program
    plan: Plan
    step_s: float
    memory_bytes: float
    resident_bytes: float


@dataclass(frozen=True, kw_only=True)
class Division:
    """One way to run the workload.

    Attributes:
      learner, actor: machines of the learner and of one actor.
      actors: how many.
      prompts: that an actor generates for at once.
      codec: how weights travel.
      update_s: predicted seconds of an update, the device half of encoding included.
      batch_s: of one actor's batch: prefill, decoding, log-probabilities, scores.
      transfer_s: from the end of an update until the weights are at every actor.
      pause_s: of an actor that takes new weights.
      parts: the programs.
    """

    learner: Cluster
    actor: Cluster
    actors: int
    prompts: int
    codec: Codec
    update_s: float
    batch_s: float
    transfer_s: float
    pause_s: float
    prompts_per_step: int
    trained_tokens: int
    parts: tuple[Part, ...]

    @property
    def generation_s(self) -> float:
        """Seconds until the actors together have written one update's rollouts."""
        per_batch = self.batch_s + self.pause_s
        return self.prompts_per_step * per_batch / (self.actors * self.prompts)

    @property
    def step_s(self) -> float:
        return max(self.update_s, self.generation_s, self.transfer_s)

    @property
    def staleness(self) -> int:
        """Versions between writing and training, in a steady state."""
        return math.ceil((self.batch_s + self.transfer_s) / self.step_s)

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens a second."""
        return self.trained_tokens / self.step_s

    @property
    def limit(self) -> str:
        """What sets the pace."""
        times = {
            "update": self.update_s, "generation": self.generation_s, "transfer": self.transfer_s,
        }  # fmt: skip
        return max(times, key=times.__getitem__)

    def __str__(self) -> str:
        return (
            f"learner {self.learner.name}, {self.actors} actors of {self.actor.name} with "
            f"{self.prompts} prompts each, {self.codec} weights: {self.tokens_per_s:,.0f} trained "
            f"tokens/s ({self.step_s:.2f} s a step: update {self.update_s:.2f}, generation "
            f"{self.generation_s:.2f}, transfer {self.transfer_s:.2f}; {self.limit} limits), "
            f"{self.staleness} versions stale"
        )


class NothingFits(ValueError):
    """No division fits the memory of its chips; the message has the smallest overshoot."""


class Planner:
    """Plans the programs of a workload on parts of a cluster, each once."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self._learners: dict[str, Part | ValueError] = {}
        self._actors: dict[tuple[str, int], tuple[Part, ...] | ValueError] = {}

    def divide(
        self, candidates: Iterable[Cut], *, max_staleness: int = 8
    ) -> tuple[Division, list[Division]]:
        """The division that trains most tokens a second, and all others that fit, best first.

        Raises:
          NothingFits: none of them.
        """
        found, refusals = [], []
        for cut in candidates:
            try:
                found += [d for d in self.divisions(cut) if d.staleness <= max_staleness]
            except ValueError as error:
                refusals.append(f"{cut.learner.name} + {cut.actors.name}: {error}")
        if not found:
            raise NothingFits("no division fits: " + "; ".join(refusals or ["too stale"]))
        # Among equals the fewest actors: fewer copies of the weights to bring up to date.
        found.sort(key=lambda d: (-round(d.tokens_per_s, 3), d.staleness, d.actors))
        return found[0], found[1:]

    def divisions(self, cut: Cut) -> list[Division]:
        """Every size, batch and codec that fits one cut.

        Raises:
          ValueError: none does; the message is that of the last refusal.
        """
        update, found, refusal = self.learner(cut.learner), [], None
        for actor, count in actor_sizes(cut.actors):
            for prompts in self._batches(count):
                try:
                    parts = self.actor(actor, prompts)
                except ValueError as error:
                    refusal = error
                    continue
                found += [
                    self._division(cut, actor, count, prompts, codec, update, parts)
                    for codec in get_args(Codec)
                ]
        if not found and refusal is not None:
            raise refusal
        return found

    def _batches(self, actors: int) -> list[int]:
        """Prompts at one actor: powers of two, up to four updates' worth in flight."""
        most = max(1, 4 * self.workload.prompts_per_step // actors)
        largest = int(math.log2(min(most, 4 * self.workload.prompts_per_step)))
        return [2**i for i in range(max(0, largest - 4), largest + 1)]

    def _division(self, cut, actor, count, prompts, codec, update, parts) -> Division:
        w = self.workload
        weights = 2.0 * w.policy.num_params
        payload = weights
        encode_s = coding_s = apply_s = 0.0
        if codec == "sparse":
            payload = w.policy.num_params * w.density * bits_per_change(w.density) / 8
            encode_s = DEVICE_TRAFFIC * weights / _bandwidth(cut.learner)
            coding_s = weights / (_HOST_CODING * hosts(cut.learner))
            apply_s = weights / (_HOST_CODING * hosts(actor))  # beside generation, then a flip
        # Every actor takes a whole payload; the learner's hosts share what they send.
        out = cut.learner.network_bytes_per_s * hosts(cut.learner)
        into = actor.network_bytes_per_s * hosts(actor)
        transfer_s = coding_s + max(payload * count / out, payload / into) + apply_s
        batch_s = sum(part.step_s * part.program.calls for part in parts)
        return Division(
            learner=cut.learner, actor=actor, actors=count, prompts=prompts, codec=codec,
            update_s=update.step_s + encode_s, batch_s=batch_s, transfer_s=transfer_s,
            pause_s=DEVICE_TRAFFIC * weights / _bandwidth(actor),
            prompts_per_step=w.prompts_per_step, trained_tokens=w.trained_tokens,
            parts=(update, *parts),
        )  # fmt: skip

    def learner(self, cluster: Cluster) -> Part:
        """The update on a machine.

        Raises:
          ValueError: it does not fit.
        """
        if cluster.name not in self._learners:
            (program,) = learner_programs(self.workload)
            try:
                self._learners[cluster.name] = planned(program, cluster)
            except ValueError as error:
                self._learners[cluster.name] = error
        return _or_raise(self._learners[cluster.name])

    def actor(self, cluster: Cluster, prompts: int) -> tuple[Part, ...]:
        """Generation and scoring for so many prompts on one actor's machine.

        Raises:
          ValueError: they do not fit together.
        """
        key = cluster.name, prompts
        if key not in self._actors:
            try:
                self._actors[key] = self._plan_actor(cluster, prompts)
            except ValueError as error:
                self._actors[key] = error
        return _or_raise(self._actors[key])

    def _plan_actor(self, cluster: Cluster, prompts: int) -> tuple[Part, ...]:
        programs = {p.name: p for p in actor_programs(self.workload, prompts)}
        # Models that live together share most of the memory in proportion to parameters and
        # caches; the rest is for whichever runs.
        sizes: dict[str, float] = {}
        for program in programs.values():
            key = program.parameters
            sizes[key] = max(sizes.get(key, 0.0), _state_bytes(program))
        share = {
            key: _USABLE * (_COMMON + (1 - _COMMON) * size / sum(sizes.values()))
            for key, size in sizes.items()
        }
        decode = self._decode(programs["decode"], cluster, prompts, share["policy"])
        parts = [decode]
        for program in programs.values():
            if program.name == "decode":
                continue
            # The policy lies where decoding wants it.
            pinned = {}
            if program.parameters == "policy":
                pinned = {"tensor": _model_parallel(decode.plan)}
            parts.append(planned(program, cluster, pinned=pinned, memory=share[program.parameters]))
        # Decoding holds the caches beside the weights that the prefill shares with it.
        models: dict[str, float] = {}
        for part in parts:
            key = part.program.parameters
            models[key] = max(models.get(key, 0.0), part.resident_bytes)
        used = sum(models.values())
        transient = max(p.memory_bytes - p.resident_bytes for p in parts)
        limit = cluster.memory_bytes * _USABLE
        if used + transient > limit:
            raise ValueError(
                f"an actor on {cluster.name} needs {(used + transient) / 1e9:.1f} GB a device of "
                f"{limit / 1e9:.1f} GB usable for its {len(sizes)} models"
            )
        order = list(programs)
        return tuple(sorted(parts, key=lambda part: order.index(part.program.name)))

    def _decode(self, program: Program, cluster: Cluster, prompts: int, memory: float) -> Part:
        """Decoding, divided as is fastest, or further until it fits."""
        limit = cluster.memory_bytes * memory
        free = self._all_layers(program, cluster, prompts, memory, {})
        if free.memory_bytes <= limit:
            return free
        for tensor in (2, 4, 8, 16, 32):
            if tensor <= _model_parallel(free.plan) or cluster.device_count % tensor:
                continue
            try:
                part = self._all_layers(program, cluster, prompts, memory, {"tensor": tensor})
            except ValueError:
                continue  # nothing that the model has divides so far
            if part.memory_bytes <= limit:
                return part
        raise ValueError(
            f"decoding {prompts} prompts on {cluster.name} needs {free.memory_bytes / 1e9:.1f} GB "
            f"a device of {limit / 1e9:.1f} GB, and does not fit divided further"
        )

    def _all_layers(
        self,
        program: Program,
        cluster: Cluster,
        prompts: int,
        memory: float,
        pinned: Mapping[str, int],
    ) -> Part:
        """Decoding planned with few layers, which stand apart, and drawn out to all of them."""
        layers = self.workload.policy.layers
        few = 2 * _period(self.workload.policy)
        if layers <= 2 * few:
            return planned(program, cluster, pinned=pinned, memory=memory)
        longer = planned(self._shortened(2 * few, prompts), cluster, pinned=pinned, memory=memory)
        mesh = {name: longer.plan.mesh.get(name, 1) for name in ("fsdp", "tensor", "expert")}
        shorter = planned(self._shortened(few, prompts), cluster, pinned=mesh, memory=memory)

        def drawn(name: str) -> float:
            first, second = getattr(shorter, name), getattr(longer, name)
            return second + (second - first) * (layers - 2 * few) / few

        names = ("step_s", "memory_bytes", "resident_bytes")
        return Part(program=program, plan=longer.plan, **{name: drawn(name) for name in names})

    def _shortened(self, layers: int, prompts: int) -> Program:
        policy = self.workload.policy
        short = dataclasses.replace(policy, layers=layers, windows=policy.windows[:layers])
        programs = actor_programs(dataclasses.replace(self.workload, policy=short), prompts)
        return next(p for p in programs if p.name == "decode")


def divide(
    workload: Workload,
    cluster: Cluster,
    actors: Cluster | None = None,
    *,
    max_staleness: int = 8,
    planner: Planner | None = None,
) -> tuple[Division, list[Division]]:
    """The division that trains most tokens a second, and the others, best first.

    Args:
      workload: what is run.
      cluster: of all chips; of the learner's where `actors` is given.
      actors: the actors' machines, where they are others.
      max_staleness: versions by which a rollout may be old.
      planner: keeps plans for a second call.

    Raises:
      NothingFits: no division fits.
    """
    planner = planner or Planner(workload)
    candidates: Sequence[Cut] = cuts(cluster) if actors is None else [Cut(cluster, actors)]
    return planner.divide(candidates, max_staleness=max_staleness)


def bits_per_change(density: float) -> float:
    """Bits a changed bf16 element on the wire, read off the measured ones.

    >>> bits_per_change(0.01)
    6.9
    """
    densities, bits = zip(*_BITS, strict=True)
    return float(np.interp(math.log(density), np.log(densities), bits))


def planned(
    program: Program,
    cluster: Cluster,
    *,
    pinned: Mapping[str, int] | None = None,
    memory: float = _USABLE,
) -> Part:
    """The best plan of one program.

    Args:
      program: what is planned.
      cluster: for which machine.
      pinned: degrees of parallelism that are given.
      memory: share of the device's memory that it may fill.

    Raises:
      ValueError: it does not fit.
    """
    # To whom only sees shapes the key heads that decoding keeps apart look like experts.
    pins = {} if program.experts else {"expert": 1}
    plan = sharding.plan(
        program.step, program.args, cluster=cluster, state=program.state, data=program.data,
        constraints=Constraints(pinned=pins | dict(pinned or {}), memory_fraction=memory),
    )  # fmt: skip
    assert plan.prediction is not None
    held = plan.prediction.memory_breakdown
    resident = held["arguments"]
    return Part(
        program=program, plan=plan, step_s=plan.step_time_s, memory_bytes=plan.memory_bytes,
        resident_bytes=resident,
    )  # fmt: skip


def _state_bytes(program: Program) -> float:
    """Of everything that stays between calls, undivided."""
    held = [program.args[i] for i in program.state or (0,)]
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held)))


def _model_parallel(plan: Plan) -> int:
    """Ways in which decoding divides the heads of the weights."""
    return plan.mesh.get("tensor", 1) * plan.mesh.get("expert", 1)


def _bandwidth(cluster: Cluster) -> float:
    return cluster.chip.hbm_bytes_per_s * cluster.chip_count


def _period(config: DecoderConfig) -> int:
    """After how many layers the windows repeat."""
    windows = config.windows
    return next(
        (
            n
            for n in range(1, len(windows))
            if all(w == windows[i % n] for i, w in enumerate(windows))
        ),
        1,
    )


def _or_raise(found):
    if isinstance(found, ValueError):
        raise found
    return found
