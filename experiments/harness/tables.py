"""Tables: as text for the terminal, as HTML for the report, as Markdown for a README."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells under headings. Numbers are aligned right and written with three decimals.

    Attributes:
      columns: headings.
      rows: cells; None stands for "not measured".
      caption: what the table shows.
      mark: a warning that goes with the numbers, such as "weak judge".

    Raises:
      ValueError: a row of another length than the headings.

    >>> print(Table(columns=("", "safe"), rows=(("repo", 0.9876), ("ppo", None))).text(), end="")
          safe
    ----  -----
    repo  0.988
    ppo       –
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    caption: str = ""
    mark: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row needs {len(self.columns)} cells, one a heading: {row}")

    @classmethod
    def of(
        cls,
        records: Mapping[str, Mapping[str, Any]],
        columns: Mapping[str, str],
        *,
        caption: str = "",
        mark: str = "",
    ) -> "Table":
        """A table of records by name.

        Args:
          records: numbers by key, by name of the row.
          columns: headings by key, in order; a record may lack some.
          caption: what the table shows.
          mark: a warning that goes with the numbers.
        """
        rows = tuple(
            (name, *(record.get(key) for key in columns)) for name, record in records.items()
        )
        return cls(columns=("", *columns.values()), rows=rows, caption=caption, mark=mark)

    def marked(self, mark: str) -> "Table":
        """The same table with a warning, added to any it has."""
        return replace(self, mark=" · ".join(filter(None, (self.mark, mark))))

    def _title(self) -> str:
        return " ".join(filter(None, (self.caption, f"[{self.mark}]" if self.mark else "")))

    def _cells(self) -> list[list[str]]:
        return [list(self.columns)] + [[cell(value) for value in row] for row in self.rows]

    def _numeric(self, column: int) -> bool:
        values = [row[column] for row in self.rows if row[column] is not None]
        return bool(values) and all(not isinstance(value, str) for value in values)

    def text(self) -> str:
        """For a terminal."""
        cells = self._cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(self._aligned(row, widths)).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        title = self._title()
        return "\n".join([title, *lines] if title else lines) + "\n"

    def _aligned(self, row: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            value.rjust(width) if self._numeric(i) else value.ljust(width)
            for i, (value, width) in enumerate(zip(row, widths, strict=True))
        ]

    def markdown(self) -> str:
        """For a README."""
        header, *rows = [[value.replace("|", "\\|") for value in row] for row in self._cells()]
        rule = ["---:" if self._numeric(i) else "---" for i in range(len(self.columns))]
        lines = [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
        title = self._title()
        return "\n".join([title, "", *lines] if title else lines) + "\n"

    def html(self) -> str:
        """For the report."""
        header, *rows = self._cells()
        classes = ["number" if self._numeric(i) else "name" for i in range(len(self.columns))]
        mark = f' <strong class="mark">{html.escape(self.mark)}</strong>' if self.mark else ""
        parts = ['<div class="scroll"><table>']
        if self.caption or mark:
            parts.append(f"<caption>{html.escape(self.caption)}{mark}</caption>")
        parts.append(f"<thead>{_html_row('th', header, classes)}</thead><tbody>")
        parts += [_html_row("td", row, classes) for row in rows]
        return "".join([*parts, "</tbody></table></div>"])


def _html_row(tag: str, row: Sequence[str], classes: Sequence[str]) -> str:
    cells = (
        f'<{tag} class="{kind}">{html.escape(value)}</{tag}>'
        for value, kind in zip(row, classes, strict=True)
    )
    return f"<tr>{''.join(cells)}</tr>"


def cell(value: Any) -> str:
    """A value as a table shows it.

    >>> [cell(v) for v in (0.5, 12345.678, 1e-5, -1e-8, 7, None, float("nan"), "x", True)]
    ['0.500', '12,346', '1.0e-05', '0.000', '7', '–', 'NaN', 'x', 'yes']
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, int):
        return f"{number:,}"
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else f"{number}"
    size = abs(number)
    if size >= 1000:
        return f"{number:,.0f}"
    if size < 1e-6:  # rounding of float32
        return "0.000"
    return f"{number:.1e}" if size < 0.0005 else f"{number:.3f}"
