"""From data to a task: encoded prompts and demonstrations, and what scores a completion."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments.safety.config import SafetyConfig
from jaxrl import data as data_lib
from jaxrl.data import Companions, SafetyData, fit_prompts
from jaxrl.data.batches import Demonstrations, PromptSet
from jaxrl.tokenizers import TEMPLATES, Tokenizer, train_bpe

Evaluator = Callable[[Sequence[str], Sequence[str]], Sequence[float] | np.ndarray]
OVER_REFUSAL = "xstest_safe"
"""Name of the prompts that a good policy answers, in `Task.extra`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every stage of the experiment works on.

    Attributes:
      data: as it was read.
      tokenizer: of the policy.
      train, heldout: prompts of RL, and of evaluation.
      demonstrations: what SFT imitates.
      ptx: general instructions that RL may go on imitating; None where the data has none.
      extra: further prompts that every policy is evaluated on, by the name of their set.
    """

    data: SafetyData
    tokenizer: Tokenizer
    train: PromptSet
    heldout: PromptSet
    demonstrations: Demonstrations
    ptx: Demonstrations | None = None
    extra: Mapping[str, PromptSet] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluators:
    """Functions that score completions.

    Attributes:
      reward, cost: what the algorithms optimise.
      judge: the cost that evaluation uses; not trained on what trained `cost`.
      is_refusal: whether a completion declines.
      notes: sentences for the report, such as the AUC of learned models.
      measures: their quality by name.
      weak_judge: the judge, or the cost model, is too poor to trust the tables.
    """

    reward: Evaluator
    cost: Evaluator
    judge: Evaluator
    is_refusal: Evaluator
    notes: tuple[str, ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict)
    weak_judge: bool = False


def load(config: SafetyConfig) -> SafetyData:
    """Reads the data that the config names.

    Raises:
      ValueError, OSError: the file is missing or malformed; names file, line and field.
    """
    companions = None
    if config.xstest is not None:
        companions = Companions.beside(config.data, xstest=config.xstest)
    return data_lib.load(config.data, seed=config.data_seed, companions=companions)


def build(config: SafetyConfig, data: SafetyData, folder: Path) -> Task:
    """Encodes the data; the tokenizer is written to `folder` and read back on resumption."""
    template = TEMPLATES[config.template]
    saved = folder / "tokenizer.json"
    if saved.exists():
        tokenizer = Tokenizer.load(saved)
    elif config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
    else:
        texts = [text for pair in data.sft for text in (template.prompt(pair[0]), pair[1])]
        tokenizer = train_bpe(texts, config.vocab_size, special_tokens=template.special_tokens)
    if not saved.exists():
        tokenizer.save(saved)

    data = fit_prompts(
        data, tokenizer, template, max_tokens=config.prompt_len, drop_long=config.drop_long
    )

    def prompts(texts: Sequence[str]) -> PromptSet:
        return PromptSet.encode(tokenizer, texts, template, max_len=config.prompt_len)

    def demonstrations(pairs: Sequence[tuple[str, str]]) -> Demonstrations:
        return Demonstrations.encode(
            tokenizer,
            pairs,
            template,
            prompt_len=config.prompt_len,
            completion_len=config.completion_len,
        )

    further = dict(data.extra_prompts)
    if not data.is_exact and data.over_refusal:
        further[OVER_REFUSAL] = data.over_refusal
    if config.ptx_coef and not data.ptx:
        raise ValueError(
            f"ptx_coef={config.ptx_coef} needs general instructions, and {data.name!r} has none; "
            "put stanford_alpaca_5k beside the data, or use --ptx-coef 0"
        )
    return Task(
        data=data,
        tokenizer=tokenizer,
        train=prompts([row.text for row in data.train]),
        heldout=prompts([row.text for row in data.heldout]),
        demonstrations=demonstrations(data.sft),
        ptx=demonstrations(data.ptx) if config.ptx_coef else None,
        extra={name: prompts(texts) for name, texts in further.items() if texts},
    )


def exact_evaluators(data: SafetyData) -> Evaluators:
    """The data's own functions: exact, so the judge is the cost itself."""
    assert data.reward is not None
    assert data.cost is not None
    assert data.is_refusal is not None
    return Evaluators(
        reward=data.reward, cost=data.cost, judge=data.cost, is_refusal=data.is_refusal
    )
