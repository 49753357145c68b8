"""Real text: labelled pairs and human compliance labels made here, and the published ones."""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.safety.__main__ import main

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
PKU = SHARED / "pku_saferlhf_mixed_5k" / "pku_seferlhf_realign_dpo_5k.json"
TINY = [
    *("--model.layers", "1", "--model.embed", "16", "--model.heads", "2", "--model.kv-heads", "1"),
    *("--model.head-dim", "8", "--model.mlp", "16", "--vocab-size", "320", "--sft.batch", "8"),
    *("--completion-len", "8", "--samples-per-step", "16", "--algorithms", "repo"),
    *("--evaluation.prompts", "6", "--evaluation.samples", "2", "--evaluation.batch", "6"),
    *("--steps", "2", "--sft.steps", "2", "--scorers.batch", "8"),
]

ACTS = ("open a lock", "mix a drink", "cross the harbour", "mend a net", "find a room")
THINGS = ("at night", "without a key", "for my aunt", "in the rain", "on a boat", "with one hand",
          "before noon", "near the old mill")  # fmt: skip
PROMPTS = [f"how do I {act} {thing}?" for act, thing in itertools.product(ACTS, THINGS)]
MIXED = [
    {
        "prompt": prompt,
        "response": [f"ask the keeper first, please, about {i}", f"break it and steal the {i}"],
    }
    for i, prompt in enumerate(PROMPTS)
]
FULL = [
    {
        "prompt": prompt,
        "response_0": f"ask the keeper first, please, about {i}",
        "response_1": f"break it and steal the {i}",
        "is_response_0_safe": True,
        "is_response_1_safe": i % 3 == 0,
        "safer_response_id": 0,
        "better_response_id": i % 2,
    }
    for i, prompt in enumerate(PROMPTS)
]
TYPES = (
    "homonyms",
    "definitions",
    "safe_contexts",
    "safe_targets",
    "figurative_language",
    "history",
)


def write_xstest(root):
    """A folder in XSTest's format: every type with its contrast set, every label."""
    answers = (
        ("Sure: first take the rope, then pull.", "1_full_compliance"),
        ("I'm sorry, but I can't help with that.", "2_full_refusal"),
        ("I can't say all, but the rope is red.", "3_partial_refusal"),
    )
    kinds = [f"{contrast}{kind}" for kind in TYPES for contrast in ("", "contrast_")]
    rows = [
        f'{i},{kind},"question {i} on {kind}","{answer}",{label}'
        for i, (kind, (answer, label)) in enumerate(itertools.product(kinds, answers))
    ]
    folder = root / "xstest"
    folder.mkdir(parents=True)
    path = folder / "xstest_v2_completions_made_here.csv"
    path.write_text("\n".join(["id,type,prompt,completion,final_label", *rows]))


def write_pairs(root, rows):
    path = root / "pairs" / "pairs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def check_run(out, shown):
    """What every run on real text leaves behind, whatever the quality of its models."""
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["algorithms"]) == {"sft", "repo"}
    measures = summary["measures"]
    assert {"cost_model_auc", "judge_auc", "reward_quality"} <= set(measures)
    aucs = (measures["cost_model_auc"], measures["judge_auc"])
    assert all(0 <= auc <= 1 for auc in aucs)
    assert re.search(
        r"AUC of the cost model on \d+ answers to held-out prompts: 0?[01]\.\d+", shown
    )
    assert re.search(r"AUC of the judge on \d+ answers", shown)
    assert summary["weak_judge"] == (min(aucs) < 0.75)
    page = (out / "report.html").read_text()
    assert ("weak judge" in page) == ("weak judge" in shown) == summary["weak_judge"]
    arrays = np.load(out / "evaluation" / "repo.npz")
    assert all(np.isfinite(arrays[name]).all() for name in ("rewards", "costs"))
    return summary


def run(capsys, *argv):
    main([*TINY, *map(str, argv)])
    return capsys.readouterr().out


def test_pairs_ordered_by_safety_take_their_reward_from_compliance(tmp_path, capsys):
    write_xstest(tmp_path)
    path = write_pairs(tmp_path, MIXED)
    common = ("--data", path, "--prompt-len", "48", "--scorers.steps", "20")
    shown = run(capsys, *common, "--out", tmp_path / "run")
    summary = check_run(tmp_path / "run", shown)
    assert any("compliance model" in note for note in summary["notes"])
    # Started again with its results gone, it reads its models back and comes to the same.
    (tmp_path / "run" / "summary.json").unlink()
    assert run(capsys, *common, "--out", tmp_path / "run") == shown
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_helpfulness_labels_train_the_reward(tmp_path, capsys):
    path = write_pairs(tmp_path, FULL)
    shown = run(
        capsys, "--data", path, "--prompt-len", "48", "--scorers.steps", "20",
        "--out", tmp_path / "run",
    )  # fmt: skip
    summary = check_run(tmp_path / "run", shown)
    assert any("helpfulness model" in note for note in summary["notes"])


@pytest.mark.skipif(not PKU.is_file(), reason=f"the PKU-SafeRLHF pairs are not at {PKU}")
def test_the_published_pairs(tmp_path, capsys):
    shown = run(
        capsys, "--data", PKU, "--prompt-len", "72", "--drop-long", "--scorers.steps", "30",
        "--template", "safe_rlhf", "--out", tmp_path / "run",
    )  # fmt: skip
    summary = check_run(tmp_path / "run", shown)
    assert any("labelled pairs over" in note for note in summary["notes"])


# --- bad input ----------------------------------------------------------------------------------


def said(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main([*TINY, *map(str, argv)])
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


BROKEN = {
    "field missing": ('[{"prompt": "a"}]', r"pairs\.json, row 1: neither format"),
    "wrong type": (
        json.dumps([*MIXED[:2], {"prompt": "a", "response": "one text"}]),
        r"pairs\.json, row 3: field 'response' must be two texts",
    ),
    "empty prompt": (
        json.dumps([MIXED[0], {"prompt": " ", "response": ["a", "b"]}]),
        r"pairs\.json, row 2: field 'prompt' must be non-empty text",
    ),
    "not json": ('[{"prompt": "a",\n "response": ]', r"pairs\.json, line 2: not JSON"),
    "empty set": ("[]", r"pairs\.json has no rows; an empty data set"),
    "no xstest": (json.dumps(MIXED), r"XSTest.*is missing; put the folder `xstest`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_data_is_named_with_file_place_and_field(tmp_path, capsys, case):
    text, message = BROKEN[case]
    path = tmp_path / "set" / "pairs.json"
    path.parent.mkdir()
    path.write_text(text)
    found = said(capsys, "--data", path, "--out", tmp_path / "run")
    assert re.search(message, found), found


def test_a_prompt_longer_than_the_context_is_named(tmp_path, capsys):
    write_xstest(tmp_path)
    path = write_pairs(tmp_path, MIXED)
    found = said(capsys, "--data", path, "--prompt-len", "6", "--out", tmp_path / "run")
    assert re.search(r"must fit the context: .* row \d+ of 'pairs' has \d+ tokens", found), found


def test_the_hub_without_its_library_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    found = said(capsys, "--data", "hub:PKU-Alignment/PKU-SafeRLHF", "--out", tmp_path / "run")
    assert re.search(r"needs the datasets library; pip install .*jaxrl-safe\[hub\]", found)
