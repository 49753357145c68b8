"""Training with actors apart, as a discrete-event model: what speed-up to expect of how many.

One rule covers all schedules. Item i is made for update u = ⌊i / items_per_update⌋ and may begin
once version u − max_staleness of the weights is published:

    max_staleness 0    synchronous: an update waits for its items, the actors for the update
    max_staleness 1    one step off-policy: actors write the next batch during the update
    more               asynchronous

Versions are published beside the updates, one at a time; those that become due meanwhile are passed
over for the newest, as `AsynchronousTrainer` does it.

With fixed durations, one item an update, and publications that cost nothing, this is a closed
queueing network of s + 1 tokens, N servers of G seconds and one of T seconds. Its throughput in
updates a second is `throughput_bound`, min(1/T, N/G, (s + 1)/(G + T)).
"""

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from experiments.asynchrony.events import Clock, Command, Level, Shared


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Something that keeps a machine busy.

    Attributes:
      seconds: what it took alone, measured; every time one of them is drawn.
      cores: processor seconds a second while it runs alone.
    """

    seconds: tuple[float, ...]
    cores: float = 1.0

    def __post_init__(self) -> None:
        if not self.seconds or min(self.seconds) < 0 or not self.cores > 0:
            raise ValueError(
                f"an activity needs durations of 0 or more and cores above 0: {self.cores=}, "
                f"{len(self.seconds)} durations"
            )

    @classmethod
    def fixed(cls, seconds: float, *, cores: float = 1.0) -> "Activity":
        """It always takes the same time."""
        return cls(seconds=(seconds,), cores=cores)

    @property
    def mean_s(self) -> float:
        return float(np.mean(self.seconds))

    def scaled(self, factor: float) -> "Activity":
        """The same with all durations multiplied."""
        return replace(self, seconds=tuple(factor * s for s in self.seconds))


NOTHING = Activity.fixed(0.0)


@dataclass(frozen=True, kw_only=True)
class Durations:
    """What the parts of a run cost.

    Attributes:
      rollout: one item at one actor: completions, log-probabilities, rewards.
      update: one optimiser step.
      publish: beside the learner's updates, for each published version, encoding included.
      prepare: at an actor, for each version that it fetches, beside its generation and without
        the time on the link.
      flip: at an actor, between two items: the prepared weights take over.
      payload_bytes: of one version on the link.
    """

    rollout: Activity
    update: Activity
    publish: Activity = NOTHING
    prepare: Activity = NOTHING
    flip: Activity = NOTHING
    payload_bytes: float = 0.0

    @property
    def ratio(self) -> float:
        """G/T: generation to training, of one item and one update."""
        return self.rollout.mean_s / self.update.mean_s


@dataclass(frozen=True, kw_only=True)
class Network:
    """What the weights travel over.

    Attributes:
      uplink_bytes_per_s: of the learner; its readers share it.
      downlink_bytes_per_s: of each actor.
      latency_s: before the first byte.
    """

    uplink_bytes_per_s: float = math.inf
    downlink_bytes_per_s: float = math.inf
    latency_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Who may run ahead of whom.

    Attributes:
      actors: N.
      items_per_update: results that one update waits for.
      max_staleness: s, in versions: see the module.
      sync_every: k: a version is due after every k updates.
      background: actors fetch every version beside their generation, as `jaxrl.actors` does;
        else each waits for the newest before it begins an item.
      replay: the learner does not wait for its items: once it has those of its first update it
        trains on what its buffer holds, and the actors never run out of items.
      poll_s: seconds between two looks of an actor for new weights.

    Raises:
      ValueError: with s < k − 1 learner and actors would wait for each other for ever.
    """

    actors: int
    items_per_update: int = 1
    max_staleness: int = 1
    sync_every: int = 1
    background: bool = True
    replay: bool = False
    poll_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("actors", "items_per_update", "sync_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more: {getattr(self, name)}")
        if self.max_staleness < self.sync_every - 1:
            raise ValueError(
                "an item must be allowed to be as old as the newest published weights, so "
                f"max_staleness ≥ sync_every − 1: {self.max_staleness=}, {self.sync_every=}"
            )

    def oldest_version(self, item: int) -> int:
        """The oldest version that may write an item."""
        if self.replay:
            return 0
        return max(0, item // self.items_per_update - self.max_staleness)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulation found, after its warm-up.

    Attributes:
      updates_per_s: of the learner.
      items_per_s: delivered by all actors together.
      learner_idle: share of the time in which the learner waited.
      actor_idle: the same of the actors, on average, waiting for weights included.
      staleness: how many items were how many versions old when they were trained on; in a
        replayed schedule, when they were delivered.
    """

    updates_per_s: float
    items_per_s: float
    learner_idle: float
    actor_idle: float
    staleness: dict[int, int] = field(default_factory=dict)


def throughput_bound(
    generation_s: float, training_s: float, *, actors: int, max_staleness: int
) -> float:
    """Updates a second with fixed durations and one item an update: min(1/T, N/G, (s+1)/(G+T)).

    >>> throughput_bound(3.0, 1.0, actors=1, max_staleness=0)  # synchronous: G + T = 4 s
    0.25
    >>> round(throughput_bound(3.0, 1.0, actors=1, max_staleness=1), 3)  # max(G, T) = 3 s
    0.333
    >>> throughput_bound(3.0, 1.0, actors=4, max_staleness=8)  # the learner is the limit
    1.0
    """
    together = generation_s + training_s
    return min(1 / training_s, actors / generation_s, (max_staleness + 1) / together)


def ideal_speedup(ratio: float, actors: int) -> float:
    """(G + T) / max(T, G/N) with r = G/T: N actors and a learner against one alternating machine.

    At most 1 + r, and at most N (1 + 1/r): four times faster takes r ≥ 3 and N ≥ 4r/(1 + r).

    >>> ideal_speedup(3.0, 3), ideal_speedup(1.0, 1000)
    (4.0, 2.0)
    """
    return (1 + ratio) / max(1.0, ratio / actors)


def simulate(
    durations: Durations,
    schedule: Schedule,
    *,
    updates: int,
    seed: int = 0,
    network: Network | None = None,
    cores: float | None = None,
    warmup: float = 0.25,
) -> Outcome:
    """Runs a schedule.

    Args:
      durations: of the parts.
      schedule: who waits for whom.
      updates: of the learner.
      seed: of the durations drawn.
      network: for the weights; None costs nothing.
      cores: of the one machine that learner and actors share; None gives each its own.
      warmup: share of the updates that is not counted, in [0, 1).

    Raises:
      ValueError: fewer than two updates, or a warm-up outside [0, 1).
    """
    if updates < 2 or not 0 <= warmup < 1:
        raise ValueError(f"updates ≥ 2 and 0 ≤ warmup < 1 are needed: {updates=}, {warmup=}")
    return _Model(durations, schedule, network or Network(), cores, seed).run(updates, warmup)


class _Model:
    """The processes of one simulation and what they share."""

    def __init__(
        self,
        durations: Durations,
        schedule: Schedule,
        network: Network,
        cores: float | None,
        seed: int,
    ) -> None:
        self.durations, self.schedule, self.network = durations, schedule, network
        self.rng = np.random.default_rng(seed)
        self.clock = Clock()
        self.machine = Shared(self.clock, math.inf if cores is None else cores)
        self.link = Shared(self.clock, network.uplink_bytes_per_s)
        self.published = Level(self.clock)  # the newest version that actors can have
        self.delivered = Level(self.clock)  # items
        self.trained = self.next_item = 0
        self.promised = 0  # the version that is published last or is being published
        self.publishing = self.updating = False
        self.writers: deque[int] = deque()  # versions that wrote the items not yet trained on
        self.learner_waited = self.actors_waited = 0.0
        self.staleness: Counter[int] = Counter()

    def run(self, updates: int, warmup: float) -> Outcome:
        self.clock.spawn(self.learner(updates))
        for _ in range(self.schedule.actors):
            self.clock.spawn(self.actor())
        first = min(int(warmup * updates), updates - 2)
        self.clock.run(until=lambda: self.trained > first)
        start = (
            self.clock.now,
            self.trained,
            self.delivered.value,
            self.learner_waited,
            self.actors_waited,
        )
        self.staleness.clear()
        self.clock.run(until=lambda: self.trained >= updates)
        end = (
            self.clock.now,
            self.trained,
            self.delivered.value,
            self.learner_waited,
            self.actors_waited,
        )
        seconds, trained, items, learner, actors = (b - a for a, b in zip(start, end, strict=True))
        return Outcome(
            updates_per_s=trained / seconds,
            items_per_s=items / seconds,
            learner_idle=learner / seconds,
            actor_idle=actors / seconds / self.schedule.actors,
            staleness=dict(sorted(self.staleness.items())),
        )

    def do(self, activity: Activity) -> Command:
        seconds = activity.seconds[self.rng.integers(len(activity.seconds))]
        return self.machine.use(seconds, activity.cores)

    def learner(self, updates: int) -> Iterator[Command]:
        schedule = self.schedule
        for update in range(updates):
            since = self.clock.now
            batches = 1 if schedule.replay else update + 1
            yield self.delivered.reach(batches * schedule.items_per_update)
            self.learner_waited += self.clock.now - since
            if not schedule.replay:
                used = (self.writers.popleft() for _ in range(schedule.items_per_update))
                self.staleness.update(update - version for version in used)
            self.updating = True
            yield self.do(self.durations.update)
            self.updating = False
            self.trained = update + 1
            self.publish_if_due()

    def publish_if_due(self) -> None:
        """What the learner does between two updates, and while it waits."""
        if not self.publishing and self.trained - self.promised >= self.schedule.sync_every:
            self.publishing, self.promised = True, self.trained
            self.clock.spawn(self.publication(self.trained))

    def publication(self, version: int) -> Iterator[Command]:
        yield self.do(self.durations.publish)
        self.published.rise(version)
        self.publishing = False
        if not self.updating:
            self.publish_if_due()

    def actor(self) -> Iterator[Command]:
        own = _Weights(ready=Level(self.clock))
        if self.schedule.background:
            self.clock.spawn(self.fetcher(own))
        while True:
            item, self.next_item = self.next_item, self.next_item + 1
            since = self.clock.now
            wanted = self.schedule.oldest_version(item)
            if not self.schedule.background:
                yield self.published.reach(wanted)
                yield from self.fetch(own)
            yield own.ready.reach(wanted)
            self.actors_waited += self.clock.now - since
            if own.serving < own.ready.value:
                own.serving = own.ready.value
                yield self.do(self.durations.flip)
            yield self.do(self.durations.rollout)
            if self.schedule.replay:
                self.staleness[self.trained - own.serving] += 1
            else:
                self.writers.append(own.serving)
            self.delivered.rise(self.delivered.value + 1)

    def fetcher(self, own: "_Weights") -> Iterator[Command]:
        """Prepares every version, or the newest where it is slower, beside the one that serves."""
        while True:
            yield self.published.reach(own.ready.value + 1)
            yield self.clock.sleep(self.rng.uniform(0.0, self.schedule.poll_s))
            yield from self.fetch(own)

    def fetch(self, own: "_Weights") -> Iterator[Command]:
        """Prepares the newest version; does nothing where that is there."""
        version = self.published.value
        if own.ready.value == version:
            return
        size, network = self.durations.payload_bytes, self.network
        bandwidth = min(network.uplink_bytes_per_s, network.downlink_bytes_per_s)
        yield self.clock.sleep(network.latency_s)
        if size and math.isfinite(bandwidth):
            yield self.link.use(size / bandwidth, bandwidth)
        yield self.do(self.durations.prepare)
        own.ready.rise(version)


@dataclass
class _Weights:
    """The versions that an actor has prepared and generates with; all start with version 0."""

    ready: Level
    serving: int = 0
