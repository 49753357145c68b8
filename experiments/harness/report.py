"""A report: one HTML file that needs nothing else, readable in light and in dark."""

import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from experiments.harness.files import plain, write_atomically
from experiments.harness.plots import INK, SERIES
from experiments.harness.tables import Table, cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito (2008), Color Universal Design, darkened for white and lightened for black so that
# each has a contrast of at least 3:1 to its background (WCAG 2.2, 1.4.11).
LIGHT = "#0065a3 #c4500a #00805c #a8497f #8a6a00 #3a86b8 #5b5bb5 #6b6b6b".split()  # noqa: SIM905
_DARK = "#56b4e9 #f08a4b #2fc79b #e59ac4 #e6c04a #8fd0f5 #a9a9f5 #b5b5b5".split()  # noqa: SIM905


class Report:
    """Collects text, tables, figures and samples in reading order; `write` makes the file.

    >>> report = Report("Question?").text("An *answer*.").mark("weak judge")
    >>> _ = report.table(Table(columns=("x",), rows=((1,),)))
    >>> "<em>answer</em>" in report.html(), "weak judge" in report.html()
    (True, True)
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[tuple[str, Any]] = []
        self._marks: list[str] = []
        self._figures = 0

    def mark(self, warning: str) -> Self:
        """Puts a warning on every table of the report, earlier ones too."""
        self._marks.append(warning)
        return self

    def heading(self, text: str) -> Self:
        self._parts.append(("html", f"<h2>{html.escape(text)}</h2>"))
        return self

    def text(self, markdown: str) -> Self:
        """Adds prose; HTML in it is shown, not run."""
        from markdown_it import MarkdownIt

        rendered = MarkdownIt("js-default").render(markdown)
        self._parts.append(("html", f'<div class="prose">{rendered}</div>'))
        return self

    def table(self, table: Table) -> Self:
        self._parts.append(("table", table))
        return self

    def figure(self, figure: "Figure | None", caption: str, *, alt: str = "") -> Self:
        """Adds a plot; None adds nothing.

        Args:
          figure: from `plots`, or any other.
          caption: what to see in it.
          alt: what it shows, for readers who cannot see it; the caption by default.
        """
        if figure is not None:
            self._figures += 1
            drawing = _svg(figure, salt=f"figure-{self._figures}")
            label = html.escape(alt or caption, quote=True)
            self._parts.append(
                (
                    "html",
                    f'<figure><div class="scroll" role="img" aria-label="{label}">{drawing}</div>'
                    f"<figcaption>{html.escape(caption)}</figcaption></figure>",
                )
            )
        return self

    def samples(
        self, title: str, rows: Iterable[Mapping[str, Any]], *, unfold: bool = False
    ) -> Self:
        """Adds what a policy wrote.

        Args:
          title: of the group.
          rows: with "prompt" and "completion"; other entries are shown as small labels.
          unfold: show at once instead of on a click.
        """
        items = "".join(_sample(row) for row in rows)
        self._parts.append(("html", _details(title, f'<div class="samples">{items}</div>', unfold)))
        return self

    def record(self, title: str, value: Any) -> Self:
        """Adds a config or the like, as JSON, folded."""
        text = json.dumps(plain(value), indent=2, ensure_ascii=False)
        self._parts.append(("html", _details(title, f"<pre>{html.escape(text)}</pre>")))
        return self

    def html(self) -> str:
        """The whole page."""
        warning = " · ".join(self._marks)
        body = [
            (part.marked(warning) if warning else part).html() if kind == "table" else part
            for kind, part in self._parts
        ]
        subtitle = f'<p class="subtitle">{html.escape(self.subtitle)}</p>' if self.subtitle else ""
        return _PAGE.format(
            title=html.escape(self.title),
            subtitle=subtitle,
            style=_css(),
            body="\n".join(body),
        )

    def write(self, path: Path | str) -> None:
        """Writes the file, atomically."""
        write_atomically(path, self.html())


def _svg(figure: "Figure", *, salt: str) -> str:
    """The figure as SVG whose colours follow the page; the same figure gives the same text."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # Ids are hashes: with a salt of their own, figures of one page do not share clip paths.
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Matplotlib writes the size in points; the viewBox alone lets the page scale it.
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", text)
    for i, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--series-{i})")
    return text.replace(INK, "currentColor")


def _details(title: str, inner: str, unfold: bool = False) -> str:
    state = " open" if unfold else ""
    return f"<details{state}><summary>{html.escape(title)}</summary>{inner}</details>"


def _sample(row: Mapping[str, Any]) -> str:
    labels = "".join(
        f"<span>{html.escape(name)} <b>{html.escape(cell(plain(value)))}</b></span>"
        for name, value in row.items()
        if name not in ("prompt", "completion")
    )
    prompt, completion = (html.escape(str(row[name])) for name in ("prompt", "completion"))
    return (
        f'<article><p class="prompt">{prompt}</p><p class="completion">{completion}</p>'
        f'<p class="labels">{labels}</p></article>'
    )


def _css() -> str:
    def palette(colours: Sequence[str]) -> str:
        return "".join(f"--series-{i}:{colour};" for i, colour in enumerate(colours))

    return _STYLE.replace("/*light*/", palette(LIGHT)).replace("/*dark*/", palette(_DARK))


_STYLE = """
:root { color-scheme: light dark; --bg:#fff; --ink:#1b1d21; --soft:#5c626b; --line:#d9dce1;
  --panel:#f6f7f9; --warn-bg:#fff1d6; --warn:#7a4b00; /*light*/
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { --bg:#15171b; --ink:#e6e8eb; --soft:#a0a7b1;
  --line:#363b43; --panel:#1d2026; --warn-bg:#42300c; --warn:#ffd68a; /*dark*/ } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 58rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.015em; }
.subtitle { color: var(--soft); margin: 0 0 2rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; letter-spacing: -.01em; }
.prose { max-width: 42rem; } .prose p { margin: .6rem 0; }
code, pre { font-family: var(--mono); font-size: .85em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0 1.4rem; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: 0 0 .5rem; font-size: .92rem; }
th { font-weight: 600; border-bottom: 1.5px solid var(--ink); vertical-align: bottom; }
th, td { padding: .36rem 0 .36rem 1rem; text-align: left; }
td { border-bottom: 1px solid var(--line); }
.number { text-align: right; } th:first-child, td:first-child { padding-left: 0; }
td { white-space: nowrap; }
.mark { background: var(--warn-bg); color: var(--warn); border-radius: .3rem;
  padding: .1rem .5rem; margin-left: .4rem; font-weight: 600; white-space: nowrap; }
figure { margin: 1.2rem 0 1.8rem; max-width: 48rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .5rem; max-width: 42rem; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .7rem 0; }
summary { cursor: pointer; padding: .6rem .9rem; font-weight: 600; }
summary:focus-visible { outline: 2px solid var(--series-0); border-radius: .5rem; }
details pre { margin: 0; padding: .2rem 1rem 1rem; overflow-x: auto; }
.samples { padding: 0 .9rem .5rem; }
article { border-top: 1px solid var(--line); padding: .8rem 0; }
article p { margin: 0 0 .35rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { font-weight: 600; } .completion { background: var(--panel); border-radius: .4rem;
  padding: .5rem .7rem; }
.labels { color: var(--soft); font-size: .84rem; } .labels span { margin-right: 1rem; }
.labels b { color: var(--ink); font-weight: 600; }
@media print { details { border: 0; } main { padding: 0; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
<h1>{title}</h1>
{subtitle}
{body}
</main></body>
</html>
"""
