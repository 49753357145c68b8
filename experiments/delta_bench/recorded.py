"""Real deltas: successive versions of a policy that this project's RePO trainer makes.

The run is that of `experiments.safety` on its embedded world: supervised fine-tuning, then RL from
there, once for each learning rate. Master weights and Adam's moments are float32; a version is
the bf16 view of the master weights, which is what actors would be sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np

from experiments.delta_bench.pairs import Bits, Pair, bits_of, load_versions, save_versions
from experiments.harness import Run
from experiments.safety import stages, task
from experiments.safety.config import QUICK, ModelConfig, SafetyConfig, SftConfig
from jaxrl.learner import OptimizerConfig

SQUASHED = 8
"""Versions between the ends of the squashed pairs; PULSE's logs and the reference use 8."""


_MODEL = ModelConfig(layers=4, embed=256, heads=4, kv_heads=2, head_dim=64, mlp=768)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What is trained.

    Attributes:
      algorithm: recipe; RePO with GRPO's advantages has no critic, which the deltas need not wait
        for, and published densities are of GRPO.
      model: decoder of 3.3 M parameters.
      sft_steps: of supervised fine-tuning, of 32 demonstrations each.
      warmup: RL steps before the first recorded version: Adam's moments fill up.
    """

    algorithm: str = "repo_grpo"
    model: ModelConfig = field(default_factory=lambda: _MODEL)
    sft_steps: int = 200
    warmup: int = 24

    def safety(self, learning_rate: float, seed: int) -> SafetyConfig:
        """The run of `experiments.safety` at one learning rate, constant after its warm-up."""
        return replace(
            QUICK,
            algorithms=(self.algorithm,),
            model=self.model,
            sft=SftConfig(steps=self.sft_steps, batch=32),
            optimizer=OptimizerConfig(learning_rate=learning_rate),
            critic_free_learning_rate=learning_rate,
            steps=1_000_000,  # of which the few that are done see no decay
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Successive versions at one learning rate.

    Attributes:
      learning_rate: of Adam.
      weights: `SQUASHED` + 1 of them.
    """

    learning_rate: float
    weights: Sequence[Bits]

    def consecutive(self, index: int = 0) -> Pair:
        """One version to the next."""
        name = f"RePO, lr {self.learning_rate:g}"
        return Pair(name=name, old=self.weights[index], new=self.weights[index + 1])

    def squashed(self) -> Pair:
        """The first version to the last."""
        name = f"RePO, lr {self.learning_rate:g}, {len(self.weights) - 1} versions"
        return Pair(name=name, old=self.weights[0], new=self.weights[-1])


def record(
    run: Run, recording: Recording, learning_rates: Sequence[float], *, seed: int
) -> list[Versions]:
    """Trains at each learning rate; what an earlier process has finished is read."""
    folder = run.folder / "pairs"
    paths = {rate: folder / f"recorded_{rate:g}.npz" for rate in learning_rates}
    if not all(path.exists() for path in paths.values()):
        config = recording.safety(learning_rates[0], seed)
        work = task.build(config, task.load(config), run.folder)
        start = stages.fine_tune(run, config, work)
        with run.progress("recording", len(paths)) as bar:
            for done, (rate, path) in enumerate(paths.items(), 1):
                if not path.exists():
                    _train(run, recording, recording.safety(rate, seed), work, start, path)
                bar.update(done)
    return [Versions(learning_rate=r, weights=load_versions(p)) for r, p in paths.items()]


def _train(
    run: Run,
    recording: Recording,
    config: SafetyConfig,
    work: task.Task,
    start: stages.Policy,
    path: Path,
) -> None:
    recipe = config.recipe(recording.algorithm)
    evaluators = task.exact_evaluators(work.data)
    trainer = stages.trainer_of(run, config, work, evaluators, recipe, start)
    initial = stages.initial_state(config, trainer.learner, work, start)
    versions: list[Bits] = []
    stage, last = path.stem, recording.warmup + SQUASHED
    run.rewind(stage, 0)
    for done, state, metrics, _ in trainer.run(initial, start=0, steps=last):
        run.log(stage, done, metrics)
        if done >= recording.warmup:
            versions.append(dict(_bf16_leaves(state.params["policy"])))
    save_versions(path, versions)


def _bf16_leaves(params: object) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield name.removesuffix("/value"), bits_of(leaf)
