"""Every command of the README and of its page on safety runs, with two steps."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SAFETY = (ROOT / "docs" / "safety.md").read_text(encoding="utf-8")

# What makes a documented command short; its own flags come first, so these win.
_MODEL = (
    "--model.layers 1 --model.embed 16 --model.heads 2 --model.kv-heads 1 --model.head-dim 8 "
    "--model.mlp 16"
)
SHORT = {
    "experiments.safety": f"--steps 2 --sft.steps 2 --evaluation.prompts 4 --evaluation.samples 2 "
    f"--samples-per-step 16 --scorers.steps 4 {_MODEL}",
    "experiments.safety_seeds": "--steps 2 --seeds 1 --sft-steps 2 --samples 2",
    "experiments.safety_controls": "--steps 2 --seeds 1 --sft-steps 2 --samples 2",
    "experiments.safety_limit": "--steps 2 --prompts 8 --seeds 2 --algorithms repo_tb,repo,ppo",
    "experiments.weight_sync": "--preset tiny",
    "experiments.asynchrony": "--preset tiny --methods rloo,tba_2",
    "experiments.safety_samples": "--prompts 12 --seeds 2 --budgets 64,128 "
    "--algorithms repo_tb_replay,repo",
}
PLACEHOLDER = re.compile(r"\b(?!PATH\b)[A-Z][A-Z_]{2,}\b|\bhub:|<\w+>")
LABELS = {"1_full_compliance": "Sure: take the rope.", "2_full_refusal": "I'm sorry, but I can't."}


def documented():
    """Commands in code blocks and in inline code, without what a shell would add around them."""
    found = re.findall(r"python -m experiments\.[^`\n|&#]+", README + SAFETY)
    return list(dict.fromkeys(" ".join(command.split()) for command in found))


def test_the_readme_documents_commands():
    assert "python -m experiments.safety" in documented()


def write_labelled_text(root):
    """What PATH stands for: safety pairs, and human compliance labels in a folder beside them."""
    pairs = [
        {"prompt": f"how do I open door {i}?", "response": [f"ask for key {i}", f"break door {i}"]}
        for i in range(40)
    ]
    path = root / "pairs" / "pairs.json"
    path.parent.mkdir()
    path.write_text(json.dumps(pairs))
    kinds = [f"{contrast}kind{i}" for i in range(6) for contrast in ("", "contrast_")]
    rows = [
        f'{i},{kind},question on {kind},"{answer}",{label}'
        for i, kind in enumerate(kinds)
        for label, answer in LABELS.items()
    ]
    (root / "xstest").mkdir()
    (root / "xstest" / "xstest_v2_completions_made_here.csv").write_text(
        "\n".join(["id,type,prompt,completion,final_label", *rows])
    )
    return str(path)


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_runs(tmp_path, command):
    words = shlex.split(command)
    module, argv = words[2], words[3:]
    if found := PLACEHOLDER.search(command):
        pytest.skip(f"{found[0]!r} stands for what a reader has")
    if module not in SHORT:
        pytest.skip(f"{module} has tests of its own and measures for minutes")
    if "PATH" in argv:
        argv[argv.index("PATH")] = write_labelled_text(tmp_path)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", module, *argv, *SHORT[module].split(), "--out", str(out)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "summary.json").exists()
    assert (out / "report.html").exists()
    assert done.stdout.strip()
