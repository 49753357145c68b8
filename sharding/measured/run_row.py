"""Cells of a table of runs, however they are written."""

import math
import re
from collections.abc import Mapping
from typing import Any

# Columns of other tables, by the name used here.
_SYNONYMS = {
    "n_gpus": "n_chips", "num_gpus": "n_chips", "global_batch": "global_batch_sequences",
    "micro_batch": "microbatch", "micro_batch_size": "microbatch", "batch": "microbatch",
    "num_layers": "n_layers", "hidden_size": "d_model", "num_heads": "n_heads", "cp": "sp_or_cp",
}  # fmt: skip


class Row:
    """One row.

    Attributes:
      cells: column to text.
      filled: rules that filled blanks.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.cells = {
            _SYNONYMS.get(str(k).strip().lower(), str(k).strip().lower()): str(v or "").strip()
            for k, v in raw.items()
            if k is not None
        }
        self.filled: list[str] = []
        if not self.cells.get("source"):
            self.cells["source"] = self.cells.get("source_path", "")

    def text(self, name: str) -> str:
        """A cell, "" if it is blank or absent."""
        return self.cells.get(name, "")

    def number(self, name: str) -> float | None:
        """A positive number, or None."""
        match = re.fullmatch(r"[~<>]?\s*([-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?)\s*%?", self.text(name),
                             re.IGNORECASE)  # fmt: skip
        if match is None:
            return None
        value = float(match[1].replace(",", ""))
        return value if math.isfinite(value) and value > 0 else None

    def whole(self, name: str) -> int | None:
        """A positive whole number, or None."""
        value = self.number(name)
        return None if value is None else max(1, round(value))

    @property
    def is_old(self) -> bool:
        """Before fused attention and sharded optimisers, when training was in float16."""
        return (
            self.text("dtype").lower().startswith("fp16") or "vtrain" in self.text("source").lower()
        )

    def fill(self, rule: str, value: Any) -> Any:
        """Notes that a rule filled a blank; returns the value."""
        self.filled.append(rule)
        return value
