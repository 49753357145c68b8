"""What the simulator is asked: this machine, to judge it, and then other ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from experiments.asynchrony.config import METHODS, AsynchronyConfig
from experiments.asynchrony.simulator import (
    Durations,
    Network,
    Outcome,
    Schedule,
    ideal_speedup,
    simulate,
)
from experiments.asynchrony.training import Trained
from jaxrl import sync

ACTORS = tuple(2**n for n in range(11))
"""1, 2, … 1,024."""
RATIOS = (0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
"""Generation to training time, of one batch."""
TBA_SPEEDUP = 4.0
"""Of TBA over synchronous training, as its authors report it (arXiv:2503.18929)."""


def this_machine(config: AsynchronyConfig, trained: Trained) -> Outcome:
    """A method on this machine, whose processors learner and actors share."""
    return simulate(
        trained.durations,
        METHODS[trained.method].schedule,
        updates=config.simulated_updates,
        seed=config.seed,
        cores=trained.usable_cores,
    )


@dataclass(frozen=True, kw_only=True)
class Speedups:
    """How many times faster than alternating on one machine, by number of actors.

    Attributes:
      ratio: G/T.
      speedups: simulated, every actor on a machine of its own.
      ideal: `ideal_speedup`.
      staleness: mean age of what is trained on, in versions.
      learner_idle, actor_idle: shares of their time.
    """

    ratio: float
    speedups: tuple[float, ...]
    ideal: tuple[float, ...]
    staleness: tuple[float, ...]
    learner_idle: tuple[float, ...]
    actor_idle: tuple[float, ...]


def many_actors(
    durations: Durations,
    network: Network,
    *,
    actors: Sequence[int] = ACTORS,
    updates: int,
    sync_every: int = 1,
    seed: int = 0,
) -> Speedups:
    """Actors on machines of their own, every completion trained on once.

    Each actor waits for the newest weights before each item, which is the dearest way to have
    them. Twice as many versions of staleness as there are actors keep all of them busy.

    Args:
      durations: measured, or scaled.
      network: what the learner and all actors are connected by.
      actors: numbers of them.
      updates: of each simulation, beyond those that fill the pipeline.
      sync_every: updates between two published versions.
      seed: of the durations drawn.
    """
    alternating = 1 / (durations.rollout.mean_s + durations.update.mean_s)
    found = [
        simulate(
            durations,
            Schedule(
                actors=count,
                max_staleness=2 * count + sync_every,
                sync_every=sync_every,
                background=False,
            ),
            # Half is warm-up: every actor has delivered several items by then.
            updates=2 * (updates + 4 * count),
            seed=seed,
            network=network,
            warmup=0.5,
        )
        for count in actors
    ]
    return Speedups(
        ratio=durations.ratio,
        speedups=tuple(outcome.updates_per_s / alternating for outcome in found),
        ideal=tuple(ideal_speedup(durations.ratio, count) for count in actors),
        staleness=tuple(mean_staleness(outcome) for outcome in found),
        learner_idle=tuple(outcome.learner_idle for outcome in found),
        actor_idle=tuple(outcome.actor_idle for outcome in found),
    )


def mean_staleness(outcome: Outcome) -> float:
    """Mean age of the items trained on, in versions."""
    return sum(age * n for age, n in outcome.staleness.items()) / sum(outcome.staleness.values())


def at_ratio(durations: Durations, ratio: float) -> Durations:
    """The same with generation made longer or shorter, its relative spread kept."""
    factor = ratio / durations.ratio
    return replace(durations, rollout=durations.rollout.scaled(factor))


def network_of(link: str) -> Network:
    """A link of this bandwidth and latency at the learner, which shares it, and at each actor."""
    parsed = sync.Link.parse(link)
    rate = parsed.bits_per_s / 8
    return Network(uplink_bytes_per_s=rate, downlink_bytes_per_s=rate, latency_s=parsed.latency_s)


def fourfold(
    durations: Durations,
    *,
    actors: Sequence[int],
    updates: int,
    sync_every: int = 1,
    seed: int = 0,
) -> Mapping[float, Speedups]:
    """Speed-ups by ratio of generation to training time, on links that cost nothing."""
    free = replace(durations, payload_bytes=0.0)
    return {
        ratio: many_actors(
            at_ratio(free, ratio),
            Network(),
            actors=actors,
            updates=updates,
            sync_every=sync_every,
            seed=seed,
        )
        for ratio in RATIOS
    }
