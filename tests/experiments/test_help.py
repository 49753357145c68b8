"""`--help` of every experiment: every flag says what it is for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in (ROOT / "experiments").rglob("*.py")
    if "harness.main(" in path.read_text(encoding="utf-8") and "harness" not in path.parts
)


def test_there_are_experiments():
    assert "experiments.safety" in PROGRAMS


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_has_a_help_text(program):
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100", "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    options = flags(done.stdout)
    assert len(options) > 5
    assert [flag for flag, text in options.items() if not text.split("(default:")[0].strip()] == []


def flags(shown):
    """Help text by flag, from the boxes that the help draws in one column."""
    found, current = {}, None
    for line in shown.splitlines():
        inner = line.strip("│╭╮╰╯─ ")
        if head := re.match(r"(--[\w.-]+)(?:, --no-[\w.-]+)?(?: \S*[A-Z{|]\S*)?(?: {2,}|$)", inner):
            current, inner = head[1], inner[head.end() :]
            found[current] = ""
        if current:
            found[current] += f" {inner}"
    return found
