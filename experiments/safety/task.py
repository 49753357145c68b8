"""From data to a task: encoded prompts and demonstrations, and what scores a completion."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments.safety import pretrained
from experiments.safety.config import SafetyConfig
from jaxrl import data as data_lib
from jaxrl import processes
from jaxrl.data import Companions, SafetyData, fit_prompts
from jaxrl.data.batches import Demonstrations, PromptSet
from jaxrl.tokenizers import TEMPLATES, ChatTemplate, Tokenizer, train_bpe

Evaluator = Callable[[Sequence[str], Sequence[str]], Sequence[float] | np.ndarray]
OVER_REFUSAL = "xstest_safe"
"""Name of the prompts that a good policy answers, in `Task.extra`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every stage of the experiment works on.

    Attributes:
      data: as it was read.
      tokenizer: of the policy.
      template: what stands around a prompt.
      train, heldout: prompts of RL, and of evaluation.
      demonstrations: what SFT imitates.
      ptx: general instructions that RL may go on imitating; None where the data has none.
      extra: further prompts that every policy is evaluated on, by the name of their set.
    """

    data: SafetyData
    tokenizer: Tokenizer
    template: ChatTemplate
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
    """Encodes the data; a tokenizer that is trained is written to `folder` and read on resumption.

    All processes of a run call this together.
    """
    template = template_of(config)
    tokenizer = _tokenizer(config, data, template, folder / "tokenizer.json")
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
        template=template,
        train=prompts([row.text for row in data.train]),
        heldout=prompts([row.text for row in data.heldout]),
        demonstrations=demonstrations(data.sft),
        ptx=demonstrations(data.ptx) if config.ptx_coef else None,
        extra={name: prompts(texts) for name, texts in further.items() if texts},
    )


def template_of(config: SafetyConfig) -> ChatTemplate:
    """What stands around a prompt: by name, or the pretrained model's own."""
    if config.template == "model":
        return pretrained.chat_template(pretrained.folder_of(config.model.pretrained))
    return TEMPLATES[config.template]


def _tokenizer(
    config: SafetyConfig, data: SafetyData, template: ChatTemplate, saved: Path
) -> Tokenizer:
    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    if config.model.pretrained:
        return Tokenizer.load(pretrained.folder_of(config.model.pretrained))

    def train() -> None:
        if not saved.exists():
            texts = [text for pair in data.sft for text in (template.prompt(pair[0]), pair[1])]
            special = template.special_tokens
            train_bpe(texts, config.vocab_size, special_tokens=special).save(saved)

    processes.from_leader(train)
    return Tokenizer.load(saved)


def exact_evaluators(data: SafetyData) -> Evaluators:
    """The data's own functions: exact, so the judge is the cost itself."""
    assert data.reward is not None
    assert data.cost is not None
    assert data.is_refusal is not None
    return Evaluators(
        reward=data.reward, cost=data.cost, judge=data.cost, is_refusal=data.is_refusal
    )
