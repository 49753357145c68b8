"""What a person sees while a run goes on."""

import io
import math

import numpy as np

from experiments.harness.progress import Progress

METRICS = {"reward": 0.5, "cost": -1.0, "safety": 0.975, "multiplier": 2.0, "kl": np.float32(0.25)}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_show_what_is_watched():
    stream = io.StringIO()
    with Progress("repo", 4, stream=stream, interval_s=0.0) as bar:
        bar.update(1, METRICS)
        bar.update(4, {"reward": 0.6})
    first, last = stream.getvalue().splitlines()
    assert "repo  1/4 (25%)" in first
    assert "reward +0.50  cost -1.00  safe 97.5%  λ 2.00  KL 0.250" in first
    assert "4/4 (100%)" in last
    assert "reward +0.60" in last
    assert "left 0:00" in last


def test_plain_lines_are_rare_but_the_last_is_shown():
    stream = io.StringIO()
    with Progress("repo", 50, stream=stream, interval_s=3600.0) as bar:
        for step in range(1, 51):
            bar.update(step, METRICS)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/50", "50/50"]


def test_nan_is_never_silent_and_reported_once():
    stream = io.StringIO()
    with Progress("repo", 3, stream=stream, interval_s=0.0) as bar:
        for step in (1, 2, 3):
            bar.update(step, {"kl": math.nan})
    shown = stream.getvalue()
    assert shown.count("warning: repo, step 1: kl is nan") == 1
    assert shown.count("KL NaN!") == 3


def test_time_left_counts_neither_earlier_processes_nor_the_first_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("experiments.harness.progress.time.monotonic", lambda: now[0])
    bar = Progress("repo", 100, start=50, stream=io.StringIO())
    now[0] += 500.0  # compilation
    bar.update(51)
    assert math.isnan(bar.left_s)
    now[0] += 18.0
    bar.update(60)  # nine steps in 18 s: the forty left take 80 s
    assert bar.left_s == 80.0
    bar.update(100)
    assert bar.left_s == 0.0


def test_terminal_gets_a_bar_with_the_metrics():
    stream = Terminal()
    with Progress("repo", 4, stream=stream) as bar:
        bar.update(4, METRICS)
        bar.note("a note with [brackets]")
    shown = stream.getvalue()
    assert "4/4" in shown
    assert "safe 97.5%" in shown
    assert "a note with [brackets]" in shown
