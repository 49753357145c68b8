"""The dry run on the command line, without compilers."""

import json

import pytest

from experiments import dry_run
from experiments.safety.__main__ import main as safety

SHORT = [
    "--no-compile", "--model", "qwen3-0.6b", "--reward-model", "", "--cost-model", "",
    "--prompts", "8", "--completion-len", "64",
]  # fmt: skip


def test_it_prints_the_programs_and_the_pace(capsys, tmp_path):
    dry_run.main(["--cluster", "h100:2x8", *SHORT, "--json", str(tmp_path / "run.json")])
    printed = capsys.readouterr().out
    for wanted in ("0.60B parameters", "update", "decode", "delta encode", "best: learner h100:1x8",
                   "times as many tokens a second", "fits: "):  # fmt: skip
        assert wanted in printed
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["fits"]
    assert [row["compiled"] for row in found["programs"]] == [None] * len(found["programs"])
    assert found["division"]["tokens_per_s"] >= found["half_and_half"]["tokens_per_s"]


def test_what_does_not_fit_exits_with_1_and_says_what_is_missing(capsys):
    with pytest.raises(SystemExit) as caught:
        dry_run.main(["--cluster", "v5e:2x8", "--no-compile", "--model", "llama3-70b"])
    assert caught.value.code == 1
    assert "GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "v9:4x4"], "no cluster is called 'v9:4x4'"),
        (["--model", "llama9"], "unknown model 'llama9'"),
    ],
)
def test_wrong_names_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        dry_run.main(["--no-compile", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_experiment_hands_over(capsys):
    safety(["--dry-run", "h100:2x8", *SHORT])
    assert "best: learner" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        safety(["--dry-run"])
    assert caught.value.code == 2
