"""One shape for every data set of the safety experiments, embedded or read from files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32

Evaluator = Callable[..., Float32[np.ndarray, " N"]]
"""f(prompts, completions, **columns) -> one real number per row."""

Detector = Callable[..., Bool[np.ndarray, " N"]]
"""f(prompts, completions, **columns) -> one truth value per row."""

Kind = Literal["benign", "borderline", "unsafe"]
Compliance = Literal["full", "partial", "refusal"]
PARTS = ("cost_train", "judge_train", "validation", "test")
"""Parts of the preference rows. No prompt stands in two of them."""


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One prompt; `id` is its index within the data set and never changes with a split."""

    text: str
    id: int
    kind: Kind | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledResponse:
    """A response that people (or an exact evaluator) called safe or unsafe."""

    prompt: str
    response: str
    is_unsafe: bool


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two responses to one prompt, ordered by one criterion.

    In `Preferences.safety_pairs` `better` is the safer one, in `helpful_pairs` the more
    helpful one. The signs are what the Safe-RLHF cost loss needs; None where unknown.
    """

    prompt: str
    better: str
    worse: str
    better_is_unsafe: bool | None = None
    worse_is_unsafe: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """The labelled rows of one part of the prompts."""

    labels: tuple[LabelledResponse, ...] = ()
    safety_pairs: tuple[Pair, ...] = ()
    helpful_pairs: tuple[Pair, ...] = ()

    @property
    def prompts(self) -> frozenset[str]:
        rows = (*self.labels, *self.safety_pairs, *self.helpful_pairs)
        return frozenset(row.prompt for row in rows)


@dataclass(frozen=True, kw_only=True)
class ComplianceRow:
    """A completion with a label of how far it complies with its prompt.

    `type` is the prompt's type in its source; splits go by it, so that a reward model is
    never asked about a type of prompt that it was trained on.
    """

    prompt: str
    response: str
    label: Compliance
    type: str


@dataclass(frozen=True, kw_only=True)
class SafetyData:
    """Everything that a safety experiment reads.

    Attributes:
      name: what the report calls it.
      train: prompts of SFT and RL.
      heldout: prompts of evaluation only; share no text with `train`.
      sft: (prompt, completion) pairs of supervised fine-tuning; none of a held-out prompt.
      ptx: general instructions, for the pre-training loss that keeps the language (PTX).
      reward, cost: exact evaluators; None where they have to be learned.
      is_refusal: exact in the embedded world, string matching on real text.
      preferences: labelled rows by part, see `PARTS`.
      compliance_train, compliance_test: disjoint in prompt types; train the reward model
        where no helpfulness labels exist, and test it.
      over_refusal: safe prompts that a good policy answers.
      extra_prompts: further evaluation prompts by the name of their set.
      notes: what was found, dropped or missing, one sentence each; belongs in the report.
    """

    name: str
    train: tuple[PromptRow, ...]
    heldout: tuple[PromptRow, ...]
    sft: tuple[tuple[str, str], ...] = ()
    ptx: tuple[tuple[str, str], ...] = ()
    reward: Evaluator | None = None
    cost: Evaluator | None = None
    is_refusal: Detector | None = None
    preferences: Mapping[str, Preferences] = field(default_factory=dict)
    compliance_train: tuple[ComplianceRow, ...] = ()
    compliance_test: tuple[ComplianceRow, ...] = ()
    over_refusal: tuple[str, ...] = ()
    extra_prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, rows in (("train", self.train), ("heldout", self.heldout)):
            if not rows:
                raise ValueError(
                    f"a data set needs prompts to train and to evaluate on: {self.name!r} has no "
                    f"{part} prompts; give more prompts or another split"
                )
        shared = {row.text for row in self.train} & {row.text for row in self.heldout}
        if shared:
            raise ValueError(
                f"train and held-out prompts must differ: {self.name!r} has {len(shared)} in both, "
                f"first {min(shared)!r}; split by prompt, not by row"
            )
        unknown = set(self.preferences) - set(PARTS)
        if unknown:
            raise ValueError(f"parts of `preferences` are {PARTS}: got {sorted(unknown)}")

    @property
    def is_exact(self) -> bool:
        """True when reward and cost are functions, not models to be trained."""
        return self.reward is not None and self.cost is not None

    def replace(self, **changes: Any) -> "SafetyData":
        return replace(self, **changes)
