"""What each part of a method takes alone: what the simulator starts from.

A part's processor seconds do not depend on what else the machine does; its wall-clock time does.
Its duration is therefore taken as its processor seconds over the processors that it keeps busy when
nothing disturbs it, which the least disturbed of its laps show.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from experiments.asynchrony.machine import machine_cores, measured
from experiments.asynchrony.parts import Parts
from experiments.asynchrony.simulator import NOTHING, Activity, Durations
from jaxrl import sync
from jaxrl.data.batches import shuffled
from jaxrl.learner import LearnerState
from jaxrl.train import summarise
from jaxrl.types import Rollouts

_UNDISTURBED = 0.9
"""Quantile of the laps, by processors kept busy, that counts as undisturbed."""


class Stopwatch:
    """Wall and processor seconds of a part, time after time."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    @contextmanager
    def lap(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)

    def activity(self, *, warmup: int = 1) -> Activity:
        """What was timed, as it were undisturbed, without the first laps, which compile."""
        wall, cpu = np.asarray(self.wall_s[warmup:]), np.asarray(self.cpu_s[warmup:])
        if not wall.sum():
            return NOTHING
        # Not the very best lap: the clocks of a short one are not read at one moment.
        cores = max(float(np.quantile(cpu / wall, _UNDISTURBED)), 0.01)
        return Activity(seconds=tuple((cpu / cores).tolist()), cores=cores)


def calibrate(parts: Parts) -> Durations:
    """Times every part of a method alone, after compiling it: for the simulator."""
    watches = {name: Stopwatch() for name in ("rollout", "update", "publish", "prepare", "flip")}
    state = jax.tree.map(jnp.copy, parts.state)
    channel = _Channel(parts) if parts.method.actors else None
    replay = parts.replay() if parts.method.replay else None
    size_bytes: list[int] = []
    warmup = 2  # the second publication is the first delta
    for step in range(parts.config.calibration + warmup):
        with watches["rollout"].lap():
            rollouts = _rollout(parts, state, step)
        with watches["update"].lap():
            if replay is not None:
                replay.add(rollouts, tag=step)
                rollouts = replay.sample(
                    parts.config.prompts_per_step, rollouts.tokens.shape[1], step
                )
            state, metrics = parts.learner.update(state, jax.tree.map(jnp.asarray, rollouts))
            summarise(rollouts, metrics)
        if channel is not None:
            with watches["publish"].lap():
                published = channel.publisher.publish(state.params["policy"], step)
            size_bytes.append(published.delta_bytes or published.size_bytes)
            with watches["prepare"].lap():
                channel.subscriber.prepare()
            with watches["flip"].lap():
                channel.subscriber.flip()
    activities = {
        name: watch.activity(warmup=warmup) if watch.wall_s else NOTHING
        for name, watch in watches.items()
    }
    return Durations(
        **activities, payload_bytes=float(np.mean(size_bytes[warmup:])) if size_bytes else 0.0
    )


def _rollout(parts: Parts, state: LearnerState, step: int) -> Rollouts:
    """One work item's rollouts, as an actor makes them."""
    rows = shuffled(
        len(parts.task.train), parts.config.prompts_per_step, seed=parts.config.seed, step=step
    )
    key = jax.random.fold_in(jax.random.key(parts.config.seed), step)
    # As each of the two loops has it, or the first step of one would compile once more.
    version = step if parts.method.actors else state.step
    rollouts, greedy = parts.collector.collect(
        state.params["policy"], parts.reference.params, parts.task.train.take(rows), key, version
    )
    return jax.tree.map(np.asarray, parts.scorer(rollouts, greedy))


def usable_share(parts: Parts) -> float:
    """Share of the processors left by others that this process can keep busy, in (0, 1].

    Below 1 where threads wait for each other, as for the interpreter's lock. Measured by rollouts
    in more threads than the machine has cores.
    """
    threads = machine_cores() + 2
    barrier = threading.Barrier(threads + 1)

    def work(first: int) -> None:
        barrier.wait()
        for step in range(first, first + parts.config.calibration):
            _rollout(parts, parts.state, step)
        barrier.wait()

    with ThreadPoolExecutor(threads) as pool:
        done = [pool.submit(work, index * parts.config.calibration) for index in range(threads)]
        barrier.wait()
        with measured() as load:
            barrier.wait()
        for each in done:
            each.result()
    return load.own / load.left


class _Channel:
    """A publisher and one subscriber of their own."""

    def __init__(self, parts: Parts) -> None:
        store, like = sync.MemoryStore(), parts.reference.params
        self.publisher = sync.Publisher(store, run_id="calibration")
        self.subscriber = sync.Subscriber(store, run_id="calibration", like=like, name="alone")
