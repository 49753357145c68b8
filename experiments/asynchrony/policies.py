"""The policy before RL: supervised fine-tuning, and how often a policy is right."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32

from experiments.asynchrony.config import AsynchronyConfig
from experiments.asynchrony.task import Task
from experiments.harness import Run
from jaxrl.checkpoint import Checkpointer
from jaxrl.data.batches import shuffled
from jaxrl.models import Decoder
from jaxrl.rollouts.generate import generate_from_state
from jaxrl.supervised import Supervised

LOG_EVERY = 10  # SFT steps between rows of metrics
CHECKPOINT_EVERY = 100  # SFT steps
EVALUATION_BATCH = 64  # questions answered at once
SAMPLES = 4  # answers drawn to each of them


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A decoder's structure with one set of parameters."""

    graphdef: nnx.GraphDef
    params: nnx.State


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How a policy did on the held-out problems.

    Attributes:
      greedy: 1 or 0 for each problem, by its greedy answer (pass@1 as TBA reports it).
      sampled: share of right ones among the answers drawn at the training's temperature: what
        RL maximises.
      answers: the greedy ones.
    """

    greedy: Float32[np.ndarray, " N"]
    sampled: Float32[np.ndarray, " N"]
    answers: list[str]

    def rows(self, task: Task) -> list[dict[str, Any]]:
        """One record for each problem, for people to read."""
        columns = zip(task.problems.heldout, self.answers, self.greedy, self.sampled, strict=True)
        return [
            {"prompt": problem.question, "completion": answer, "gold": problem.answer,
             "right": bool(right), "right_of_samples": float(share)}
            for problem, answer, right, share in columns
        ]  # fmt: skip


def fine_tune(run: Run, config: AsynchronyConfig, task: Task) -> Policy:
    """What every method starts from, and its frozen reference; resumes from its checkpoints."""
    decoder = config.model.decoder(
        task.tokenizer.vocab_size, config.prompt_len + config.completion_len
    )
    graphdef, params = nnx.split(Decoder(decoder, rngs=nnx.Rngs(config.seed)))
    trainer = Supervised(graphdef=graphdef, optimizer=config.sft.optimizer().build())
    demonstrations, total = task.demonstrations, config.sft.steps
    with Checkpointer(run.checkpoints / "sft") as checkpoints:
        state = trainer.init(params)
        found = checkpoints.restore_latest(state)
        start, state = (0, state) if found is None else (found.step, found.tree)
        run.rewind("sft", start)
        with run.progress("sft", total, start=start) as bar:
            for step in range(start, total):
                rows = shuffled(len(demonstrations), config.sft.batch, seed=config.seed, step=step)
                state, loss = trainer.update(state, *demonstrations.take(rows))
                done = step + 1
                if done % LOG_EVERY == 0 or done == total:
                    metrics = {"loss": float(loss)}
                    if not math.isfinite(metrics["loss"]):
                        raise ValueError(
                            f"the loss of SFT must be finite: it is {metrics['loss']} at step "
                            f"{done}; lower --sft.learning-rate and choose another --out"
                        )
                    run.log("sft", done, metrics)
                    bar.update(done, metrics)
                if done % CHECKPOINT_EVERY == 0 or done == total:
                    checkpoints.save(done, state)
    return Policy(graphdef=graphdef, params=state.params)


def evaluate(config: AsynchronyConfig, task: Task, policy: Policy) -> Accuracy:
    """Answers the held-out problems, greedily and by sampling; a function of the seed.

    Every policy is sampled with the same keys, so that differences between two are paired.
    """
    greedy, answers = _answered(config, task, policy, samples=1, greedy=True)
    sampled, _ = _answered(config, task, policy, samples=SAMPLES, greedy=False)
    return Accuracy(greedy=greedy.mean(-1), sampled=sampled.mean(-1), answers=answers)


def _answered(
    config: AsynchronyConfig, task: Task, policy: Policy, *, samples: int, greedy: bool
) -> tuple[Float32[np.ndarray, "N S"], list[str]]:
    """What is right, and the texts."""
    tokenizer, questions = task.tokenizer, task.heldout
    sampling = config.sampling(eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, greedy=greedy)
    count, tokens = len(questions), []
    root = jax.random.key(config.seed + 1_000_003)  # apart from the keys of training
    for index, begin in enumerate(range(0, count, EVALUATION_BATCH)):
        # The last batch is filled up, so that all have one shape and compile once.
        rows = np.minimum(np.arange(begin, begin + EVALUATION_BATCH), count - 1)
        written = generate_from_state(
            policy.params,
            questions.take(rows),
            jax.random.fold_in(root, index),
            graphdef=policy.graphdef,
            sampling=sampling,
            group_size=samples,
        )
        tokens.append(np.asarray(written.tokens))
    flat = np.concatenate(tokens)[:count].reshape(count * samples, -1)
    texts = tokenizer.decode_batch(flat)
    asked = [question for question in questions.texts for _ in range(samples)]
    right = np.asarray(task.verify(asked, texts), np.float32)
    return right.reshape(count, samples), texts
