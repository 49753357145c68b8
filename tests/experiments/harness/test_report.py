"""Tables and the one-file report."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.harness import Report, Table, plots

EVIL = "<script>alert('x')</script> & \"quotes\""


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def full_report():
    rng = np.random.default_rng(0)
    rows = [
        {"stage": "repo", "step": s, "reward": s * 1.0, "kl": None if s == 2 else 0.1}
        for s in range(1, 40)
    ]
    names = ["sft", "repo"]
    report = Report(f"Title {EVIL}", "subtitle")
    report.heading(f"Heading {EVIL}").text(f"Some **bold** text. {EVIL}")
    report.table(Table(columns=("", "x"), rows=((EVIL, 1.0),), caption=EVIL))
    report.figure(plots.tradeoff(dict.fromkeys(names, (0.5, 1.0)), order=names), EVIL)
    report.figure(
        plots.sorted_prompts({n: rng.normal(size=9) for n in names}, y_label="cost"), "costs"
    )
    report.figure(plots.training(rows, ["repo"], order=names), "training")
    report.figure(plots.training([], ["repo"]), "nothing to show")
    report.samples("repo", [{"prompt": EVIL, "completion": EVIL, "cost": np.float32(0.25)}])
    report.record("Config", {"seed": 1, "note": EVIL})
    return report


def test_page_is_well_formed_and_needs_nothing_else():
    text = full_report().html()
    page = Page(text)
    assert not any(tag in ("script", "link", "iframe", "img") for tag, _ in page.seen)
    for tag, attrs in page.seen:
        for name in ("src", "href", "xlink:href"):
            assert not attrs.get(name, "#").startswith("http"), (tag, attrs)
    assert "@import" not in text
    assert "url(http" not in text


def test_foreign_text_is_shown_not_run():
    page = Page(full_report().html())
    words = "".join(page.words)
    # title twice, heading, prose, table twice, caption, sample twice, record: as it was written
    assert words.count("<script>alert(") >= 9
    assert "nothing to show" not in words


def test_drawings_are_valid_follow_the_page_and_share_no_ids():
    text = full_report().html()
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert "viewBox" in root.attrib
        assert "width" not in root.attrib
        assert "currentColor" in drawing
        assert "var(--series-" in drawing
        assert plots.INK not in drawing
    ids = [re.findall(r'clipPath id="([^"]+)"', drawing) for drawing in drawings]
    flat = [name for group in ids for name in group]
    assert len(flat) == len(set(flat)) > 0


def test_a_series_keeps_its_colour_from_plot_to_plot():
    report = Report("x")
    order = ["sft", "ppo", "repo"]
    report.figure(plots.sorted_prompts({"repo": np.ones(3)}, y_label="c", order=order), "a")
    drawing = report.html()
    assert "stroke: var(--series-2)" in drawing
    assert "stroke: var(--series-0)" not in drawing


def test_same_report_same_bytes():
    assert full_report().html() == full_report().html()


def test_mark_stands_on_every_table():
    table = Table(columns=("x",), rows=((1,),))
    report = Report("x").table(table).mark("weak judge").table(table)
    assert report.html().count('class="mark">weak judge<') == 2
    assert "weak judge" not in Report("x").table(table).html().split("</style>")[1]
    assert "[weak judge]" in table.marked("weak judge").text()
    assert table.marked("a").marked("b").mark == "a · b"


def test_write_makes_the_folder(tmp_path):
    Report("x").write(tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_table_in_its_three_forms():
    table = Table.of(
        {"repo|x": {"safe": 0.5, "n": 1200}, "ppo": {"safe": None}},
        {"safe": "safety", "n": "samples"},
        caption="Held out",
    )
    assert table.text().splitlines() == [
        "Held out",
        "        safety  samples",
        "------  ------  -------",
        "repo|x   0.500    1,200",
        "ppo          –        –",
    ]
    assert table.markdown().splitlines()[2:] == [
        "|  | safety | samples |",
        "| --- | ---: | ---: |",
        "| repo\\|x | 0.500 | 1,200 |",
        "| ppo | – | – |",
    ]
    assert '<td class="number">1,200</td>' in table.html()


def test_table_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match="a row needs 2 cells"):
        Table(columns=("", "x"), rows=((1,),))


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=20)
    expected = [values[max(0, i - 4) : i + 1].mean() for i in range(20)]
    np.testing.assert_allclose(plots.running_mean(values, 5), expected)


def test_lines_of_very_different_size_share_a_logarithmic_axis():
    near, far = ([1, 2], [1.0, 5.0]), ([1, 2], [10.0, 400.0])
    panels = {"near": {"a": near, "b": near, "c": near}, "far": {"a": near, "b": near, "c": far}}
    linear, logarithmic = plots.curves(panels).axes
    assert (linear.get_yscale(), logarithmic.get_yscale()) == ("linear", "symlog")
