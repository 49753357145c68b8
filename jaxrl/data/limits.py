"""Fitting a data set into a model's context."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from jaxrl.data.dataset import Preferences, SafetyData
from jaxrl.tokenizers import ChatTemplate, Tokenizer

T = TypeVar("T")


def fit_prompts(
    data: SafetyData,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    max_tokens: int,
    drop_long: bool = False,
) -> SafetyData:
    """Checks every prompt, of all fields, against the context; long ones go only if asked.

    Prompts are never cut: what a cut prompt asks is another question, with other costs.
    Completions are cut where they are encoded.

    Args:
      data: the data set.
      tokenizer: counts the tokens.
      template: stands around the prompts.
      max_tokens: longest prompt with its template, in tokens.
      drop_long: leave rows with a longer prompt out and say in `notes` how many.

    Raises:
      ValueError: a prompt is longer and `drop_long` is False, with field and row; or nothing
        is left of the training or the held-out prompts.
    """
    fit = _Fit(data, tokenizer, template, max_tokens, drop_long)
    preferences = {
        part: Preferences(
            labels=fit.keep(rows.labels, [r.prompt for r in rows.labels], f"{part} labels"),
            safety_pairs=fit.keep(rows.safety_pairs, [r.prompt for r in rows.safety_pairs], part),
            helpful_pairs=fit.keep(
                rows.helpful_pairs, [r.prompt for r in rows.helpful_pairs], part
            ),
        )
        for part, rows in data.preferences.items()
    }
    fitted = {
        "train": fit.keep(data.train, [row.text for row in data.train], "train"),
        "heldout": fit.keep(data.heldout, [row.text for row in data.heldout], "heldout"),
        "sft": fit.keep(data.sft, [prompt for prompt, _ in data.sft], "sft"),
        "ptx": fit.keep(data.ptx, [prompt for prompt, _ in data.ptx], "ptx"),
        "over_refusal": fit.keep(data.over_refusal, data.over_refusal, "over_refusal"),
        "extra_prompts": {
            name: fit.keep(prompts, prompts, name) for name, prompts in data.extra_prompts.items()
        },
        "preferences": preferences,
    }
    for name in ("compliance_train", "compliance_test"):
        rows = getattr(data, name)
        fitted[name] = fit.keep(rows, [row.prompt for row in rows], name)
    for name in ("train", "heldout"):
        if not fitted[name]:
            raise ValueError(
                f"no {name} prompt of {data.name!r} fits {max_tokens} tokens; "
                "raise the prompt length"
            )
    return data.replace(**fitted, notes=(*data.notes, *fit.notes))


class _Fit:
    """Lengths of prompts, each tokenised once, and notes of what was dropped."""

    def __init__(
        self,
        data: SafetyData,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_tokens: int,
        drop_long: bool,
    ) -> None:
        self.name, self.tokenizer, self.template = data.name, tokenizer, template
        self.max_tokens, self.drop_long = max_tokens, drop_long
        self.lengths: dict[str, int] = {}
        self.notes: list[str] = []

    def _measure(self, texts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.lengths]
        ids = self.tokenizer.encode_batch([self.template.prompt(text) for text in new])
        self.lengths.update((text, len(row)) for text, row in zip(new, ids, strict=True))

    def keep(self, rows: Sequence[T], prompts: Sequence[str], where: str) -> tuple[T, ...]:
        self._measure(prompts)
        kept = []
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            if self.lengths[prompt] <= self.max_tokens:
                kept.append(row)
            elif not self.drop_long:
                raise ValueError(
                    f"a prompt must fit the context: {where} row {index} of {self.name!r} has "
                    f"{self.lengths[prompt]} tokens with its template, {self.max_tokens} fit "
                    f"({prompt[:60]!r}); raise the prompt length or drop long prompts"
                )
        if len(kept) < len(rows):
            self.notes.append(
                f"{where}: {len(rows) - len(kept)} of {len(rows)} rows left out, prompt longer "
                f"than {self.max_tokens} tokens"
            )
        return tuple(kept)


def cut_completion(tokenizer: Tokenizer, text: str, *, max_tokens: int) -> str:
    """The start of `text` that has at most `max_tokens` tokens, without half characters."""
    ids = tokenizer.encode(text)
    if len(ids) <= max_tokens:
        return text
    return tokenizer.decode(ids[:max_tokens]).removesuffix("�").rstrip()
