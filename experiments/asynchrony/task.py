"""From problems to a task: encoded questions and solutions, and the verifier."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import numpy as np

from experiments.asynchrony.config import AsynchronyConfig
from jaxrl.data.arithmetic import PROBLEM, Problem, Problems, load_problems, make_problems
from jaxrl.data.batches import Demonstrations, PromptSet
from jaxrl.rewards import RewardFunction
from jaxrl.tokenizers import PLAIN, Tokenizer, train_bpe

_TEMPLATES = {template.name: template for template in (PLAIN, PROBLEM)}

WORST_GUESS = 2
"""A guess is this far off at most, each distance in both directions as likely as no error."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every stage of the experiment works on.

    Attributes:
      problems: as they were made or read.
      tokenizer: of the policy.
      train, heldout: questions of RL, and of evaluation.
      demonstrations: worked solutions of the training questions.
      verify: 1 for a right answer, 0 for a wrong one.
    """

    problems: Problems
    tokenizer: Tokenizer
    train: PromptSet
    heldout: PromptSet
    demonstrations: Demonstrations
    verify: RewardFunction


def no_cost(prompts: Sequence[str], completions: Sequence[str], /, **columns: object) -> np.ndarray:
    """Nothing is unsafe here; the learner's records want a cost all the same."""
    return np.zeros(len(completions), np.float32)


def load(config: AsynchronyConfig) -> Problems:
    """Makes or reads the problems that the config names.

    Raises:
      ValueError, OSError: a file is missing or malformed; names file and row.
    """
    if config.data == "arithmetic":
        return make_problems(
            config.data_seed,
            train=config.problems,
            heldout=config.heldout_problems,
            levels=config.levels,
        )
    found = load_problems(config.data, heldout=config.heldout, seed=config.data_seed)
    return replace(found, heldout=found.heldout[: config.heldout_problems])


def demonstrated(
    problems: Sequence[Problem], *, worked_share: float, seed: int
) -> list[tuple[str, str]]:
    """Questions with what SFT imitates: some solvers show their steps, the others guess.

    A guess is off by up to `WORST_GUESS`. That steps pay is nothing that imitation can tell; RL
    can find it out.

    >>> problem = Problem(question="2 + 3 + 4?", solution="2 + 3 = 5. 5 + 4 = 9.", answer="9")
    >>> demonstrated([problem], worked_share=0.0, seed=0)
    [('2 + 3 + 4?', 'About 11.')]
    """
    rng = np.random.default_rng([seed, 3])
    works = rng.random(len(problems)) < worked_share
    offs = rng.integers(-WORST_GUESS, WORST_GUESS + 1, len(problems))
    guesses = [
        f"About {Decimal(p.answer) + int(off)}." for p, off in zip(problems, offs, strict=True)
    ]
    return [
        (p.question, p.solution if work else guess)
        for p, work, guess in zip(problems, works, guesses, strict=True)
    ]


def build(config: AsynchronyConfig, problems: Problems, folder: Path) -> tuple[Task, str]:
    """Encodes the problems.

    Args:
      config: lengths, template and size of the vocabulary.
      problems: from `load`.
      folder: the tokenizer is written there, and read back on resumption.

    Returns:
      The task, and a sentence on questions that were too long and left out; "" for none.

    Raises:
      ValueError: an unknown template, or no question that fits.
    """
    if config.template not in _TEMPLATES:
        raise ValueError(
            f"template must be one of {', '.join(_TEMPLATES)}, got {config.template!r}"
        )
    template = _TEMPLATES[config.template]
    saved = folder / "tokenizer.json"
    if saved.exists():
        tokenizer = Tokenizer.load(saved)
    else:
        pairs = demonstrated(
            problems.train, worked_share=config.worked_share, seed=config.data_seed
        )
        texts = [text for asked, told in pairs for text in (template.prompt(asked), told)]
        tokenizer = train_bpe(texts, config.vocab_size)
        tokenizer.save(saved)

    def fitting(rows: Sequence[Problem]) -> tuple[Problem, ...]:
        encoded = tokenizer.encode_batch([template.prompt(p.question) for p in rows])
        return tuple(
            p for p, ids in zip(rows, encoded, strict=True) if len(ids) <= config.prompt_len
        )

    kept = Problems(
        name=problems.name, train=fitting(problems.train), heldout=fitting(problems.heldout)
    )
    dropped = len(problems.train) - len(kept.train), len(problems.heldout) - len(kept.heldout)
    note = ""
    if any(dropped):
        note = (
            f"{dropped[0]} training and {dropped[1]} held-out questions are longer than "
            f"{config.prompt_len} tokens and left out (--prompt-len)"
        )

    def prompts(rows: Sequence[Problem]) -> PromptSet:
        questions = [p.question for p in rows]
        return PromptSet.encode(tokenizer, questions, template, max_len=config.prompt_len)

    demonstrations = Demonstrations.encode(
        tokenizer,
        demonstrated(kept.train, worked_share=config.worked_share, seed=config.data_seed),
        template,
        prompt_len=config.prompt_len,
        completion_len=config.completion_len,
    )
    task = Task(
        problems=kept,
        tokenizer=tokenizer,
        train=prompts(kept.train),
        heldout=prompts(kept.heldout),
        demonstrations=demonstrations,
        verify=kept.verifier(),
    )
    return task, note
