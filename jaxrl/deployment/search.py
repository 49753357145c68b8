"""Which chips learn and which act: chosen together with the actors' size, batch, codec, staleness.

Every cut, size of an actor, batch and codec is looked at: what costs time is planning their
programs, of which each is planned once on each machine.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

import jax

from jaxrl.deployment.decoding import Decoding
from jaxrl.deployment.division import Codec, Division, division
from jaxrl.deployment.machines import Cut, actor_sizes, cuts
from jaxrl.deployment.parts import USABLE, Part, Plans
from jaxrl.deployment.programs import GENERATION, Program, Written, learner_programs
from jaxrl.deployment.workload import Workload
from jaxrl.sync import Link
from sharding import Cluster, DoesNotFit

_COMMON = 0.25  # share of an actor's memory that its programs use in turn
# What models that score are held to, as long as an actor does not fit: copies of their parameters
# are faster than shards.
_SCORERS: tuple[Mapping[str, int], ...] = ({}, {"data": 1, "zero": 3})
_IN_FLIGHT = 4  # updates' worth of prompts that actors have begun, at most
_BATCHES = 5  # sizes of an actor's batch, each half the one before
_GAIN = 1.01  # staleness that is worth less than this stays out


class NothingFits(ValueError):
    """No division fits the memory of its chips.

    Attributes:
      shortfall_bytes: what a device of the best one lacks; None where none failed for memory.
    """

    def __init__(self, message: str, shortfall_bytes: float | None) -> None:
        super().__init__(message)
        self.shortfall_bytes = shortfall_bytes


class Planner:
    """Plans the programs of a workload on parts of a cluster, each once."""

    def __init__(
        self, workload: Workload, *, link: Link | None = None, batches: Sequence[int] = ()
    ):
        """A planner that has planned nothing yet.

        Args:
          workload: what is run.
          link: between learner and actors; None: the hosts' own networks.
          batches: prompts of an update to choose among; the workload's where empty. A number of
            chips that does not divide a batch cannot learn from it.
        """
        self.workload, self.link = workload, link
        self.batches = tuple(batches) or (workload.prompts_per_step,)
        self._learners: dict[tuple[str, int], Part | ValueError] = {}
        self._actors: dict[tuple[str, int], tuple[Part, ...] | ValueError] = {}
        self._plans = Plans()
        self._written = Written()
        self._decoding = Decoding(workload, self._plans, self._written)

    def divide(
        self,
        candidates: Sequence[Cut],
        *,
        max_staleness: int = 8,
        told: Callable[[str], None] = lambda line: None,
    ) -> tuple[Division, list[Division]]:
        """The division that trains most tokens a second, and all others that fit, best first.

        Of those that are within a hundredth of the best the one that is least stale, and of these
        the one with the fewest actors: fewer copies of the weights to bring up to date.

        Args:
          candidates: learner and actors.
          max_staleness: versions by which a rollout may be old.
          told: is called with a line before every candidate is planned.

        Raises:
          NothingFits: none of them.
        """
        found: list[Division] = []
        refusals: list[tuple[str, ValueError]] = []
        for i, cut in enumerate(candidates, start=1):
            told(
                f"division {i} of {len(candidates)}: {cut.learner.name} learns, {cut.actors.name} "
                f"acts; {len(self._plans)} plans made so far"
            )
            try:
                found += self.divisions(cut, max_staleness=max_staleness)
            except ValueError as error:
                refusals.append((f"{cut.learner.name} + {cut.actors.name}", error))
        if not found:
            raise _nothing_fits(refusals)
        found.sort(key=lambda d: (-d.tokens_per_s, d.staleness, d.actors))
        fastest = found[0].tokens_per_s
        near = [d for d in found if d.tokens_per_s * _GAIN >= fastest]
        best = min(near, key=lambda d: (d.staleness, d.actors, -d.tokens_per_s))
        return best, [d for d in found if d is not best]

    def divisions(self, cut: Cut, *, max_staleness: int = 8) -> list[Division]:
        """Every batch, size of an actor, its batch, codec and staleness that fits one cut.

        Raises:
          ValueError: none does; the message is that of the one that lacked least.
        """
        found: list[Division] = []
        refusals: list[ValueError] = []
        for batch in self.batches:
            try:
                update = self.learner(cut.learner, batch)
            except ValueError as error:
                refusals.append(error)
                continue
            workload = dataclasses.replace(self.workload, prompts_per_step=batch)
            for actor, count in actor_sizes(cut.actors):
                for prompts in self._prompts(count):
                    try:
                        parts = self.actor(actor, prompts)
                    except ValueError as error:
                        refusals.append(error)
                        continue
                    found += [
                        division(
                            workload, cut, update, actor=actor, actors=count, prompts=prompts,
                            codec=codec, parts=parts, max_staleness=bound, link=self.link,
                        )
                        for codec in get_args(Codec)
                        for bound in _bounds(max_staleness)
                    ]  # fmt: skip
        if not found:
            raise min(refusals, key=_lacks)
        return found

    def _prompts(self, actors: int) -> list[int]:
        """Prompts at one actor: powers of two."""
        most = max(1, _IN_FLIGHT * self.workload.prompts_per_step // actors)
        largest = int(math.log2(most))
        return [2**i for i in range(max(0, largest - _BATCHES + 1), largest + 1)]

    def learner(self, cluster: Cluster, batch: int) -> Part:
        """The update with so many prompts on a machine.

        Raises:
          ValueError: it does not fit.
        """
        key = cluster.name, batch
        if key not in self._learners:
            workload = dataclasses.replace(self.workload, prompts_per_step=batch)
            (program,) = self._written.get(learner_programs, workload)
            # Two versions in bf16 lie there while one is coded, beside the next updates.
            published = 4 * workload.policy.num_params / cluster.device_count
            memory = USABLE - published / cluster.memory_bytes
            self._learners[key] = _or_error(
                lambda: self._plans.planned(program, cluster, memory=memory)
            )
        return _or_raise(self._learners[key])

    def actor(self, cluster: Cluster, prompts: int) -> tuple[Part, ...]:
        """Generation and scoring for so many prompts on one actor's machine.

        Raises:
          ValueError: they do not fit together.
        """
        key = cluster.name, prompts
        if key not in self._actors:
            for pins in _SCORERS:
                self._actors[key] = _or_error(lambda p=pins: self._plan_actor(cluster, prompts, p))
                if not isinstance(self._actors[key], DoesNotFit):
                    break
        return _or_raise(self._actors[key])

    def _plan_actor(
        self, cluster: Cluster, prompts: int, scorers: Mapping[str, int]
    ) -> tuple[Part, ...]:
        programs = {p.name: p for p in self._written.actor_programs(self.workload, prompts)}
        # What lives together shares most of the memory in proportion to its size; the rest, and
        # the caches' part while nothing is generated, is for whichever runs.
        sizes = {p.parameters: _state_bytes(p) for p in programs.values()}
        sizes["policy"] *= 2  # the next version is built beside the one that serves
        whole = sum(sizes.values())
        own = {key: USABLE * (_COMMON + (1 - _COMMON) * n / whole) for key, n in sizes.items()}
        free = USABLE * (1 - _COMMON) * sizes[GENERATION] / whole
        decode = self._decoding.planned(cluster, prompts, own[GENERATION])
        parts = []
        for program in programs.values():
            if program.name == "decode":
                parts.append(decode)
            elif program.parameters == "policy":
                # The policy lies where decoding wants it.
                mesh = decode.plan.mesh
                pinned = {"tensor": mesh.get("tensor", 1), "expert": mesh.get("expert", 1)}
                memory = own["policy"] + own[GENERATION] - USABLE * _COMMON
                parts.append(self._plans.planned(program, cluster, pinned=pinned, memory=memory))
            else:
                memory = round(own[program.parameters] + free, 2)
                parts.append(self._plans.planned(program, cluster, pinned=scorers, memory=memory))
        needed = actor_bytes(parts)
        limit = cluster.memory_bytes * USABLE
        if needed > limit:
            raise DoesNotFit(
                f"an actor on {cluster.name} needs {needed / 1e9:.1f} GB a device of "
                f"{limit / 1e9:.1f} GB usable for its models and {prompts} prompts",
                needed,
                limit,
            )
        return tuple(parts)


def divide(
    workload: Workload,
    cluster: Cluster,
    actors: Cluster | None = None,
    *,
    max_staleness: int = 8,
    planner: Planner | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> tuple[Division, list[Division]]:
    """The division that trains most tokens a second, and the others, best first.

    Args:
      workload: what is run.
      cluster: of all chips; of the learner's where `actors` is given.
      actors: the actors' machines, where they are others.
      max_staleness: versions by which a rollout may be old.
      planner: keeps plans for a second call.
      told: is called with a line before every cut is planned.

    Raises:
      NothingFits: no division fits.
    """
    planner = planner or Planner(workload)
    candidates: Sequence[Cut] = cuts(cluster) if actors is None else [Cut(cluster, actors)]
    return planner.divide(candidates, max_staleness=max_staleness, told=told)


def resident_bytes(parts: Iterable[Part]) -> dict[str, float]:
    """Of a device, by parameters that stay where they are from batch to batch.

    The policy is there twice: its next version is built beside the one that serves.
    """
    held: dict[str, float] = {}
    for part in parts:
        key = part.program.parameters
        if key != GENERATION:
            held[key] = max(held.get(key, 0.0), part.resident_bytes)
    return held | {"next policy": held.get("policy", 0.0)}


def actor_bytes(parts: Sequence[Part]) -> float:
    """Of a device, when the program runs that needs most beside all parameters."""
    held = resident_bytes(parts)
    return max(
        part.memory_bytes + sum(n for key, n in held.items() if key != part.program.parameters)
        for part in parts
    )


def _bounds(most: int) -> list[int]:
    """Bounds on staleness that are looked at: powers of two, and the largest."""
    return sorted({min(most, 2**i) for i in range(most.bit_length() + 1)})


def _nothing_fits(refusals: Sequence[tuple[str, ValueError]]) -> NothingFits:
    where, nearest = min(refusals, key=lambda refusal: _lacks(refusal[1]))
    lacks = _lacks(nearest)
    return NothingFits(
        f"the nearest of {len(refusals)} divisions is {where}: {nearest}",
        None if math.isinf(lacks) else lacks,
    )


def _lacks(error: ValueError) -> float:
    return error.shortfall_bytes if isinstance(error, DoesNotFit) else math.inf


def _state_bytes(program: Program) -> float:
    """Of everything that a program is given of parameters and caches, undivided."""
    leaves = jax.tree.leaves(program.args[: 3 if program.parameters == GENERATION else 1])
    return float(sum(x.size * x.dtype.itemsize for x in leaves))


def _or_error(make):
    try:
        return make()
    except ValueError as error:
        return error


def _or_raise(found):
    if isinstance(found, ValueError):
        raise found
    return found
