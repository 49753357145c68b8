"""Trains with one method and keeps what the comparison needs, in one process and one go."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from experiments.asynchrony import parts as parts_lib
from experiments.asynchrony.calibration import calibrate, usable_share
from experiments.asynchrony.config import AsynchronyConfig, Method
from experiments.asynchrony.machine import measured
from experiments.asynchrony.parts import Parts
from experiments.asynchrony.policies import Policy, evaluate
from experiments.asynchrony.simulator import Activity, Durations
from experiments.asynchrony.task import Task
from experiments.harness import Run, write_json
from jaxrl import sync
from jaxrl.actors import RolloutChecks
from jaxrl.learner import LearnerState
from jaxrl.train import AsynchronousTrainer, Trainer


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The policy after some updates, evaluated when the training was over.

    Attributes:
      step: updates.
      elapsed_s: wall-clock time of training up to it.
      written: completions that had been written for it; fewer than trained on where a replay
        uses them again.
      greedy, sampled: accuracy on the held-out problems; see `policies.Accuracy`.
    """

    step: int
    elapsed_s: float
    written: int
    greedy: float
    sampled: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one method did.

    Attributes:
      method: its name.
      seed: of prompts, samples and critic.
      snapshots: from before the first update to after the last.
      step_s: seconds of each update with all that it waited for.
      rewards: mean reward of the completions of each update.
      items: work items answered.
      learner_idle: share of the time in which the learner did not update or publish.
      actor_idle: share of the time in which actors did not generate or score, on average.
      pause_s: of one exchange of weights at an actor; None where nothing is exchanged.
      staleness: share of the trained tokens by their age in versions.
      refused: work items refused.
      publishing: share of the learner's time that publications took of it; None for synchronous
        training.
      durations: of the parts alone.
      usable_share: of the processors that others leave, how many this process can keep busy.
      left_cores: that others left during the training.
    """

    method: str
    seed: int
    snapshots: tuple[Snapshot, ...]
    step_s: tuple[float, ...]
    rewards: tuple[float, ...]
    items: int
    learner_idle: float
    actor_idle: float
    pause_s: float | None
    staleness: dict[int, float]
    refused: int
    publishing: float | None
    durations: Durations
    usable_share: float
    left_cores: float

    @property
    def elapsed_s(self) -> float:
        return sum(self.step_s)

    @property
    def updates_per_s(self) -> float:
        """Of the learner, without the first steps: actors have nothing to write with yet."""
        steady = self.step_s[len(self.step_s) // 10 :]
        return len(steady) / sum(steady)

    @property
    def usable_cores(self) -> float:
        """Processors that all threads together could keep busy during the training."""
        return self.usable_share * self.left_cores

    @property
    def items_per_s(self) -> float:
        return self.items / self.elapsed_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"staleness": {str(k): v for k, v in self.staleness.items()}}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Trained":
        parts = {
            name: Activity(seconds=tuple(value["seconds"]), cores=value["cores"])
            for name, value in record["durations"].items()
            if name != "payload_bytes"
        }
        durations = Durations(**parts, payload_bytes=record["durations"]["payload_bytes"])
        changes = {
            "snapshots": tuple(Snapshot(**s) for s in record["snapshots"]),
            "step_s": tuple(record["step_s"]),
            "rewards": tuple(record["rewards"]),
            "staleness": {int(k): v for k, v in record["staleness"].items()},
            "durations": durations,
        }
        return cls(**record | changes)


def train(
    run: Run, config: AsynchronyConfig, task: Task, reference: Policy, method: Method
) -> tuple[Trained, ...]:
    """Trains with a method, with each seed, or reads what an earlier process has trained.

    What is finished is kept in the folder. A training that was interrupted starts anew: the times
    of two processes do not add up.
    """
    found: list[Trained] = []
    for seed in range(config.seed, config.seed + config.seeds):
        path = run.folder / "methods" / f"{method.name}-seed{seed}.json"
        if path.exists():
            found.append(Trained.from_json(json.loads(path.read_text(encoding="utf-8"))))
            continue
        parts = parts_lib.build(replace(config, seed=seed), method, task, reference)
        if found:  # what the parts take does not depend on the seed
            durations, share = found[0].durations, found[0].usable_share
        else:
            durations, share = calibrate(parts), usable_share(parts)
        run.rewind(_stage(parts), 0)
        with measured() as load:
            train_one = _asynchronous if method.actors else _synchronous
            log, counts = train_one(run, parts)
        record = log.record(run, **counts)
        trained = Trained(
            method=method.name,
            seed=seed,
            durations=durations,
            usable_share=share,
            left_cores=load.left,
            **record,
        )
        write_json(path, trained.to_json())
        found.append(trained)
    return tuple(found)


def _stage(parts: Parts) -> str:
    """Name of a training in metrics and samples."""
    return f"{parts.method.name}-seed{parts.config.seed}"


def _synchronous(run: Run, parts: Parts) -> tuple["_Log", dict[str, Any]]:
    config, log = parts.config, _Log(parts)
    updating = Seconds()
    trainer = Trainer(
        learner=parts.learner,
        collector=parts.collector,
        scorer=parts.scorer,
        prompts=parts.task.train,
        prompts_per_step=config.prompts_per_step,
        reference=parts.reference.params,
        seed=config.seed,
        sampler_tolerance=config.sampler_tolerance,
        span=updating.span("update"),
    )
    steps = trainer.run(parts.state, start=0, steps=config.steps)
    log.follow(run, ((step, state, metrics) for step, state, metrics, _ in steps), lambda: log.done)
    share = updating.total_s / sum(log.step_s)
    return log, {"items": config.steps, "learner_idle": 1 - share, "actor_idle": share}


def _asynchronous(run: Run, parts: Parts) -> tuple["_Log", dict[str, Any]]:
    config, log = parts.config, _Log(parts)
    store, waiting = sync.MemoryStore(), Seconds()
    pool = parts.actors(store, run_id=run.hash)
    trainer = AsynchronousTrainer(
        learner=parts.learner,
        pool=pool,
        publisher=sync.Publisher(store, run_id=run.hash),
        checks=RolloutChecks(
            prompts=parts.task.train,
            group_size=parts.collector.group_size,
            completion_len=config.completion_len,
            vocab_size=parts.task.tokenizer.vocab_size,
        ),
        prompts_per_item=config.prompts_per_step,
        seed=config.seed,
        max_staleness=parts.method.max_staleness,
        sync_every=parts.method.sync_every,
        replay=parts.replay() if parts.method.replay else None,
        sampler_tolerance=config.sampler_tolerance,
        span=waiting.span("wait"),
    )

    def answered() -> int:
        return sum(actor.items for actor in pool.statistics.values())

    steps = trainer.run(parts.state, start=0, steps=config.steps)
    log.follow(run, ((step, state, metrics) for step, state, metrics, _ in steps), answered)
    actors = list(pool.statistics.values())
    pauses = sum(actor.timings.paused_s for actor in actors)
    return log, {
        "items": answered(),
        "learner_idle": waiting.total_s / sum(log.step_s),
        "actor_idle": float(np.mean([actor.idle_share for actor in actors])),
        "pause_s": pauses / answered(),
        "refused": sum(sum(actor.refused.values()) for actor in actors),
        "publishing": log.publishing_s / sum(log.step_s),
    }


class Seconds:
    """Adds up the wall-clock time of one kind of span."""

    def __init__(self) -> None:
        self.total_s = 0.0

    def span(self, counted: str) -> Callable[[str], AbstractContextManager[None]]:
        """What a trainer names the parts of a step with; those called `counted` are added."""

        @contextmanager
        def one(name: str) -> Iterator[None]:
            began = time.perf_counter()
            yield
            if name == counted:
                self.total_s += time.perf_counter() - began

        return one


class _Log:
    """What happens while a method trains."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.step_s: list[float] = []
        self.rewards: list[float] = []
        self.staleness: defaultdict[int, float] = defaultdict(float)  # sums of shares
        self.publishing_s = 0.0
        self._kept: list[tuple[int, float, int, Any]] = []

    @property
    def done(self) -> int:
        """Updates so far."""
        return len(self.step_s)

    def follow(
        self,
        run: Run,
        steps: Iterator[tuple[int, LearnerState, dict[str, float]]],
        answered: Callable[[], int],
    ) -> None:
        """Runs the training.

        Args:
          run: gets the metrics.
          steps: the training; its clock starts with the first request.
          answered: work items that have been written so far.
        """
        config, name = self.parts.config, _stage(self.parts)
        self._keep(0, 0, self.parts.state)
        with run.progress(name, config.steps) as bar:
            began = time.perf_counter()
            for step, state, metrics in run.each_profiled(steps):
                now = time.perf_counter()
                self.step_s.append(now - began)
                self.rewards.append(metrics["reward"])
                share = metrics.get("learner_publishing_share", 0.0)
                self.publishing_s += share * self.step_s[-1]
                for age in (key for key in metrics if key.startswith(_AGE)):
                    if age != _OLDEST:
                        self.staleness[int(age.removeprefix(_AGE))] += metrics[age]
                shown = {k: v for k, v in metrics.items() if k not in _NOT_HERE}
                run.log(name, step, shown | {"step_s": self.step_s[-1]})
                bar.update(step, shown)
                if step % config.evaluate_every == 0 or step == config.steps:
                    self._keep(step, answered(), state)
                began = time.perf_counter()  # what is written down here is no part of training

    def _keep(self, step: int, items: int, state: LearnerState) -> None:
        config = self.parts.config
        written = items * config.prompts_per_step * config.group_size
        # On the host: the next step donates the arrays.
        params = jax.tree.map(np.asarray, state.params["policy"])
        self._kept.append((step, sum(self.step_s), written, params))

    def record(
        self,
        run: Run,
        *,
        items: int,
        learner_idle: float,
        actor_idle: float,
        pause_s: float | None = None,
        refused: int = 0,
        publishing: float | None = None,
    ) -> dict[str, Any]:
        """All of `Trained` that a training shows; evaluates the snapshots."""
        parts, snapshots, accuracy = self.parts, [], None
        for step, elapsed_s, written, params in self._kept:
            policy = Policy(graphdef=parts.reference.graphdef, params=params)
            accuracy = evaluate(parts.config, parts.task, policy)
            snapshots.append(
                Snapshot(
                    step=step,
                    elapsed_s=elapsed_s,
                    written=written,
                    greedy=float(accuracy.greedy.mean()),
                    sampled=float(accuracy.sampled.mean()),
                )
            )
        assert accuracy is not None
        run.write_samples(_stage(parts), accuracy.rows(parts.task))
        total = sum(self.staleness.values())
        return {
            "snapshots": tuple(snapshots),
            "step_s": tuple(self.step_s),
            "rewards": tuple(self.rewards),
            "items": items,
            "learner_idle": learner_idle,
            "actor_idle": actor_idle,
            "pause_s": pause_s,
            "staleness": {age: n / total for age, n in sorted(self.staleness.items())},
            "refused": refused,
            "publishing": publishing,
        }


_NOT_HERE = ("cost", "safety", "multiplier", "rectified")
"""Metrics of a constraint, which this task does not have."""
_AGE, _OLDEST = "staleness_", "staleness_max"
"""Beginnings of the metrics that hold shares of tokens by age, and one that does not."""
