"""Batches as a pure function of (seed, step): a resumed run reads on where the killed one was."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Int64

from jaxrl.tokenizers import Tokenizer, encode_completions, encode_prompts
from jaxrl.types import Prompts


def shuffled(num_rows: int, batch: int, *, seed: int, step: int) -> Int64[np.ndarray, " B"]:
    """Row indices of batch `step` of an endless stream of shuffled epochs.

    Every epoch is a permutation of its own; a batch may span two. Nothing is stored: the data
    position of a run is its step.

    Args:
      num_rows: rows of the data set.
      batch: rows a batch.
      seed: of the order.
      step: index of the batch, from 0.

    Raises:
      ValueError: no rows.

    >>> sorted(int(i) for step in range(3) for i in shuffled(6, 2, seed=0, step=step))
    [0, 1, 2, 3, 4, 5]
    """
    if num_rows < 1:
        raise ValueError("batches need rows: the data set is empty; give at least one prompt")
    start, end = step * batch, (step + 1) * batch
    epochs = range(start // num_rows, (end - 1) // num_rows + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in epochs]
    offset = start - epochs[0] * num_rows
    return np.concatenate(orders)[offset : offset + batch]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts of an experiment, encoded once.

    Attributes:
      texts: the prompts as a reader sees them, without template.
      tokens, mask: encoded with their template, padded on the left.
    """

    texts: tuple[str, ...]
    tokens: Int32[np.ndarray, "N P"]
    mask: Bool[np.ndarray, "N P"]

    @classmethod
    def encode(
        cls, tokenizer: Tokenizer, texts: Sequence[str], template, *, max_len: int
    ) -> "PromptSet":
        """Raises ValueError for a prompt longer than `max_len` tokens, naming its row."""
        wrapped = [template.prompt(text) for text in texts]
        tokens, mask = encode_prompts(tokenizer, wrapped, max_len=max_len)
        return cls(texts=tuple(texts), tokens=tokens, mask=mask)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Int64[np.ndarray, " B"]) -> Prompts:
        """The prompts of these rows; their `ids` are the rows."""
        arrays = (self.tokens[rows], self.mask[rows], rows.astype(np.int32))
        tokens, mask, ids = map(jnp.asarray, arrays)
        return Prompts(tokens=tokens, mask=mask, ids=ids)


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Prompts with the completions that supervised fine-tuning imitates."""

    prompts: PromptSet
    tokens: Int32[np.ndarray, "N T"]
    mask: Bool[np.ndarray, "N T"]

    @classmethod
    def encode(
        cls,
        tokenizer: Tokenizer,
        pairs: Sequence[tuple[str, str]],
        template,
        *,
        prompt_len: int,
        completion_len: int,
    ) -> "Demonstrations":
        """Completions longer than `completion_len` tokens lose their end, and its token."""
        prompts, completions = zip(*pairs, strict=True)
        tokens, mask = encode_completions(tokenizer, completions, max_len=completion_len)
        encoded = PromptSet.encode(tokenizer, prompts, template, max_len=prompt_len)
        return cls(prompts=encoded, tokens=tokens, mask=mask)

    def __len__(self) -> int:
        return len(self.prompts)

    def take(
        self, rows: Int64[np.ndarray, " B"]
    ) -> tuple[Prompts, Int32[Array, "B T"], Bool[Array, "B T"]]:
        """Prompts of these rows, and tokens and mask of their completions."""
        tokens, mask = jnp.asarray(self.tokens[rows]), jnp.asarray(self.mask[rows])
        return self.prompts.take(rows), tokens, mask
