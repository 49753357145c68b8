"""One way to divide a run's machines, and the pace that comes of it.

The learner updates, actors generate and score; whichever is slower sets the pace, unless rollouts
would be older than they may be:

    pace = max(update, prompts a step / actors' prompts a second)
    step = max(pace, age / staleness)

where the age of a rollout when it is trained on is the time from the end of the update that made
its weights: publication, the way to the actor, and the actor's batch. Publication runs beside the
updates and fetching beside the generation; versions that come faster than they can be published or
fetched are passed over, as `jaxrl.train` and `jaxrl.sync` do.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxrl.deployment.machines import Cut, hosts
from jaxrl.deployment.parts import Part
from jaxrl.deployment.workload import Workload
from jaxrl.sync import Link
from sharding import Cluster

Codec = Literal["dense", "sparse"]

# Bits a changed element on the wire, by density: `python -m experiments.bench_sparse_delta`.
_BITS = ((1e-3, 10.1), (6.2e-3, 7.43), (1e-2, 6.9), (5e-2, 5.65), (0.3, 8.0), (1.0, 16.0))
DEVICE_TRAFFIC = 2.13
"""Bytes that the device half of encode or of apply reads and writes, for each byte of bf16 weights:
the kernels' BlockSpecs, by the same command."""
# Bytes of dense weights a second that one host codes, on one thread; the same command.
_HOST_CODING = 2.4e9


@dataclass(frozen=True, kw_only=True)
class Division:
    """One way to run the workload.

    Attributes:
      learner, actor: machines of the learner and of one actor.
      actors: how many.
      prompts: that an actor generates for at once.
      codec: how weights travel.
      update_s: predicted seconds of an update, with what encoding takes the learner's devices.
      publish_s: seconds until its weights are in the store, beside the next updates.
      fetch_s: from then until every actor has rebuilt them, beside its generation.
      batch_s: of one actor's batch: prefill, decoding, log-probabilities, scores.
      pause_s: that new weights take an actor's devices.
      max_staleness: versions by which a rollout may be old.
      prompts_per_step: of an update.
      trained_tokens: of an update.
      parts: the programs.
    """

    learner: Cluster
    actor: Cluster
    actors: int
    prompts: int
    codec: Codec
    update_s: float
    publish_s: float
    fetch_s: float
    batch_s: float
    pause_s: float
    max_staleness: int
    prompts_per_step: int
    trained_tokens: float
    parts: tuple[Part, ...]

    @property
    def generation_s(self) -> float:
        """Seconds until the actors together have written one update's rollouts."""
        per_batch = self.batch_s + self.pause_s
        return self.prompts_per_step * per_batch / (self.actors * self.prompts)

    @property
    def age_s(self) -> float:
        """Seconds from the end of an update to training on what its weights wrote."""
        # The next version comes no sooner.
        late = max(0.0, self.publish_s - self._pace_s, self.fetch_s - self._pace_s)
        return self.publish_s + self.fetch_s + late + self.batch_s

    @property
    def staleness(self) -> int:
        """Versions between writing and training: as few as do not slow the run, where allowed."""
        return max(1, min(self.max_staleness, math.ceil(self.age_s / self._pace_s - 1e-9)))

    @property
    def _pace_s(self) -> float:
        return max(self.update_s, self.generation_s)

    @property
    def step_s(self) -> float:
        return max(self._pace_s, self.age_s / self.staleness)

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens a second."""
        return self.trained_tokens / self.step_s

    @property
    def limit(self) -> str:
        """What sets the pace."""
        if self.step_s > self._pace_s:
            return "staleness"
        return "generation" if self.generation_s > self.update_s else "update"

    def __str__(self) -> str:
        return (
            f"learner {self.learner.name}, {self.actors} actors of {self.actor.name} with "
            f"{self.prompts} prompts each, {self.codec} weights: {self.tokens_per_s:,.0f} trained "
            f"tokens/s ({self.step_s:.2f} s a step: update {self.update_s:.2f}, generation "
            f"{self.generation_s:.2f}; weights are published in {self.publish_s:.2f} s and fetched "
            f"in {self.fetch_s:.2f}; {self.limit} limits), {self.staleness} versions stale"
        )


def division(
    workload: Workload,
    cut: Cut,
    update: Part,
    *,
    actor: Cluster,
    actors: int,
    prompts: int,
    codec: Codec,
    parts: tuple[Part, ...],
    max_staleness: int,
    link: Link | None,
) -> Division:
    """What planned programs come to together.

    Args:
      workload: what is run.
      cut: learner and actors.
      update: the learner's program.
      actor: machine of one actor.
      actors: how many.
      prompts: that an actor generates for at once.
      codec: how weights travel.
      parts: an actor's programs.
      max_staleness: versions by which a rollout may be old.
      link: that all actors share on their way to the weights; None: only the hosts' own networks
        limit it.
    """
    weights = 2.0 * workload.policy.num_params
    payload, coding_s, decoding_s, encode_s = weights, 0.0, 0.0, 0.0
    if codec == "sparse":
        payload = workload.policy.num_params * workload.density
        payload *= bits_per_change(workload.density) / 8
        encode_s = DEVICE_TRAFFIC * weights / _memory_bandwidth(cut.learner)
        coding_s = weights / (_HOST_CODING * hosts(cut.learner))
        decoding_s = weights / (_HOST_CODING * hosts(actor))
    # The learner's first process writes to the store; every host of an actor reads all of it.
    upload_s = payload / cut.learner.chip.host_bytes_per_s
    # An actor that is a part of a host has a part of its network.
    of_actor = actor.network_bytes_per_s * actor.device_count
    download_s = payload / min(actor.chip.host_bytes_per_s, of_actor)
    if link is not None:
        readers = actors * hosts(actor)
        download_s = max(download_s, 8 * payload * readers / link.bits_per_s) + link.latency_s
    steps = workload.decoding_steps(prompts)
    return Division(
        learner=cut.learner, actor=actor, actors=actors, prompts=prompts, codec=codec,
        update_s=update.step_s + encode_s,
        publish_s=coding_s + upload_s,
        fetch_s=download_s + decoding_s,
        batch_s=math.fsum(
            part.step_s * (steps if part.program.on_device else part.program.calls)
            for part in parts
        ),
        pause_s=DEVICE_TRAFFIC * weights / _memory_bandwidth(actor),
        max_staleness=max_staleness,
        prompts_per_step=workload.prompts_per_step, trained_tokens=workload.trained_tokens,
        parts=(update, *parts),
    )  # fmt: skip


def bits_per_change(density: float) -> float:
    """Bits a changed bf16 element on the wire, read off the measured ones.

    >>> bits_per_change(0.01)
    6.9
    """
    densities, bits = zip(*_BITS, strict=True)
    return float(np.interp(math.log(density), np.log(densities), bits))


def _memory_bandwidth(cluster: Cluster) -> float:
    return cluster.chip.hbm_bytes_per_s * cluster.chip_count
