"""What each part of a method takes alone: what the simulator starts from."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from experiments.asynchrony.parts import Parts
from experiments.asynchrony.simulator import NOTHING, Activity, Durations
from jaxrl import sync
from jaxrl.data.batches import shuffled
from jaxrl.learner import LearnerState
from jaxrl.train import summarise
from jaxrl.types import Rollouts


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
        """What was timed, without the first laps, which compile."""
        wall, cpu = self.wall_s[warmup:], self.cpu_s[warmup:]
        cores = sum(cpu) / sum(wall) if sum(wall) else 0.0
        return Activity(seconds=tuple(wall), cores=max(cores, 0.01))


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
                replay.add(rollouts, iteration=step)
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


def available_cores(parts: Parts) -> float:
    """Processor seconds a second that this process gets when it wants more than there are.

    Fewer than the machine has where others use it too, or where threads wait for the
    interpreter's lock. Measured by rollouts in more threads than the machine has cores.
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
        watch = Stopwatch()
        barrier.wait()
        with watch.lap():
            barrier.wait()
        for each in done:
            each.result()
    return watch.activity(warmup=0).cores


def machine_cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Channel:
    """A publisher and one subscriber of their own."""

    def __init__(self, parts: Parts) -> None:
        store, like = sync.MemoryStore(), parts.reference.params
        self.publisher = sync.Publisher(store, run_id="calibration")
        self.subscriber = sync.Subscriber(store, run_id="calibration", like=like, name="alone")
