"""A verifier of numeric answers: is the last number of a completion the right one?

GSM8K's rule as trajectory balance with asynchrony uses it (TBA, arXiv:2503.18929): commas are
stripped, and whatever stands before the last number does not count.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxrl.rewards.functions import RewardFunction

# A sign counts only where it begins a number: in "10-3" the last number is 3.
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, thousands commas stripped; None where there is none.

    >>> last_number("7 + 5 = 12. So she paid $1,012.50."), last_number("none")
    (Decimal('1012.50'), None)
    >>> last_number("-4"), last_number("10-3")
    (Decimal('-4'), Decimal('3'))
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def numeric_verifier(answers: Mapping[str, str]) -> RewardFunction:
    """1 where the last number of a completion equals its prompt's answer, else 0.

    Args:
      answers: the number that is right, as text, by prompt.

    Raises:
      ValueError: an answer holds no number; at a call, a prompt without an answer.

    >>> verify = numeric_verifier({"2 + 3?": "5", "A dear thing?": "1,000"})
    >>> verify(["2 + 3?", "2 + 3?", "A dear thing?"], ["It is 5.0", "5 or 6", "$1000."])
    array([1., 0., 1.], dtype=float32)
    """
    gold = {prompt: last_number(answer) for prompt, answer in answers.items()}
    for prompt, number in gold.items():
        if number is None:
            raise ValueError(
                f"an answer must be a number: {answers[prompt]!r} for the prompt {prompt[:60]!r}"
            )

    def verify(
        prompts: Sequence[str], completions: Sequence[str], /, **columns: Any
    ) -> Float32[np.ndarray, " N"]:
        unknown = next((prompt for prompt in prompts if prompt not in gold), None)
        if unknown is not None:
            raise ValueError(
                f"a verifier knows the answers of its own prompts only: {unknown[:60]!r} is none "
                f"of its {len(gold)}; give the prompt without chat template"
            )
        pairs = zip(prompts, completions, strict=True)
        return np.array([last_number(text) == gold[prompt] for prompt, text in pairs], np.float32)

    return verify
