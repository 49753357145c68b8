"""Which column of a row sees which: what kernels and exchanges need to know before they run."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A row of columns: one sequence, or a prompt with its completions side by side.

    A prompt's column sees the columns before it. A completion's column sees the prompt and the
    columns before it of its own completion; the completions stand one after the other and do not
    see each other, as if each followed the prompt directly. Padding is not the pattern's: it
    differs from row to row.

    Attributes:
      prompt: columns of the prompt, or of the whole sequence.
      completion: columns of each completion; 0: there is none.
      window: tokens that a query sees backwards, itself included; None: all.

    >>> import numpy as np
    >>> columns = np.arange(5)  # a prompt of one token, two completions of two
    >>> Pattern(prompt=1, completion=2).visible(columns[:, None], columns[None]).astype(int)
    array([[1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0],
           [1, 0, 0, 1, 0],
           [1, 0, 0, 1, 1]])
    """

    prompt: int
    completion: int = 0
    window: int | None = None

    def visible(self, query: Any, key: Any) -> Any:
        """Whether columns `query` see columns `key`: integers of NumPy or JAX, broadcast."""
        seen = key <= query
        shift = 0
        if self.completion:
            own = (query - self.prompt) // self.completion * self.completion
            shift = own * (query >= self.prompt)  # from the first completion's place to this one's
            seen = seen & ((key < self.prompt) | (key >= self.prompt + shift))
        if self.window is None:
            return seen
        distance = query - key - shift * (key < self.prompt)
        return seen & (distance < self.window)
