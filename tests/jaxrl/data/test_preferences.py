import itertools
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from jaxrl.data import Companions, DataError, load, load_preferences, load_xstest
from jaxrl.data.dataset import PARTS, Preferences, PromptRow, SafetyData
from jaxrl.data.files import Row
from jaxrl.data.preferences import (
    JudgedPair,
    instruction_pairs,
    judged_pairs,
    majority_labels,
    split_prompts,
)
from jaxrl.rewards import is_refusal

SHARED = Path(__file__).parents[4] / "shared" / "data"
PKU = SHARED / "pku_saferlhf_mixed_5k" / "pku_seferlhf_realign_dpo_5k.json"
needs_pku = pytest.mark.skipif(
    not PKU.is_file(), reason=f"the PKU-SafeRLHF pairs are not at {PKU}; see the README on data"
)


def _full(prompt, responses, safe, safer, better):
    return {
        "prompt": prompt,
        "response_0": responses[0],
        "response_1": responses[1],
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "safer_response_id": safer,
        "better_response_id": better,
    }


FULL = [
    _full(f"question {i}?", (f"good {i}", f"bad {i}"), (True, i % 3 == 0), 0, i % 2)
    for i in range(20)
]
MIXED = [{"prompt": f"question {i}?", "response": [f"good {i}", f"bad {i}"]} for i in range(20)]


def _write(folder, name, rows, *, lines=False):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_text(text)
    return path


def _write_xstest(root):
    kinds = ("homonyms", "contrast_homonyms", "definitions", "contrast_definitions")
    labels = ("1_full_compliance", "2_full_refusal", "3_partial_refusal", "1_full_compliance")
    lines = ["id,type,prompt,completion,final_label"] + [
        f"{i},{kind},prompt of {kind},answer {i},{label}"
        for i, (kind, label) in enumerate(zip(kinds, labels, strict=True))
    ]
    (root / "xstest").mkdir(parents=True)
    (root / "xstest" / "xstest_v2_completions_toy.csv").write_text("\n".join(lines))


def test_splits_are_by_prompt_and_deterministic():
    prompts = [f"p{i}" for i in range(930)] * 2
    parts = split_prompts(prompts, seed=3)
    assert [len(parts[part]) for part in PARTS] == [446, 298, 93, 93]
    assert sorted(itertools.chain(*parts.values())) == sorted(set(prompts))
    assert split_prompts(prompts, seed=3) == parts
    assert split_prompts(prompts, seed=4) != parts
    with pytest.raises(ValueError, match="3 distinct prompts are too few"):
        split_prompts(["a", "b", "c"], seed=0)


def test_labels_are_majorities_without_ties():
    def pair(safe, unsafe):
        return JudgedPair("p", (safe, unsafe), (False, True), 0, None)

    # "b" is twice unsafe and once safe; "a" once each.
    labels, ties = majority_labels([pair("a", "b"), pair("c", "b"), pair("b", "a")])
    assert labels == {("p", "b"): True, ("p", "c"): False}
    assert ties == 1


def test_both_formats_are_read():
    rows = [Row(where="f, row 1", fields=FULL[1]), Row(where="f, row 2", fields=MIXED[1])]
    full, mixed = judged_pairs(rows)
    assert full == JudgedPair("question 1?", ("good 1", "bad 1"), (False, True), 0, 1)
    assert mixed == JudgedPair("question 1?", ("good 1", "bad 1"), (False, True), 0, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "neither format of labelled pairs"),
        ({"prompt": "p", "response": ["one"]}, "'response' must be two texts"),
        ({"prompt": "p", "response": "one"}, "'response' must be two texts"),
        ({"response": ["a", "b"]}, "field 'prompt' is missing"),
        ({**FULL[0], "is_response_1_safe": "?"}, "'is_response_1_safe' must be true or false"),
        ({**FULL[0], "safer_response_id": 2}, "'safer_response_id' must be 0 to 1, got 2"),
        ({k: v for k, v in FULL[0].items() if k != "response_1"}, "'response_1' is missing"),
    ],
)
def test_malformed_rows_name_place_and_field(tmp_path, row, message):
    path = _write(tmp_path, "pairs.jsonl", [FULL[1], row], lines=True)
    with pytest.raises(DataError, match=rf"pairs\.jsonl, line 2: .*{message}"):
        load_preferences(path)


def test_the_full_format_trains_cost_and_reward(tmp_path):
    path = _write(tmp_path / "set", "full.jsonl", FULL, lines=True)
    data = load_preferences(path, companions=Companions())
    assert (len(data.train), len(data.heldout)) == (16, 2)
    assert not data.is_exact
    helpful = {p.prompt: p for rows in data.preferences.values() for p in rows.helpful_pairs}
    safety = {p.prompt: p for rows in data.preferences.values() for p in rows.safety_pairs}
    assert len(helpful) == len(safety) == 20
    for i in range(20):
        prompt, texts = f"question {i}?", (f"good {i}", f"bad {i}")
        assert (helpful[prompt].better, helpful[prompt].worse) == texts[:: 1 if i % 2 == 0 else -1]
        assert (safety[prompt].better, safety[prompt].worse) == texts
        assert safety[prompt].better_is_unsafe is False
        assert safety[prompt].worse_is_unsafe is (i % 3 != 0)
    test_prompts = data.preferences["test"].prompts
    assert test_prompts == {row.text for row in data.heldout}
    assert not {prompt for prompt, _ in data.sft} - {row.text for row in data.train}


def test_the_hub_takes_the_same_path(tmp_path, monkeypatch):
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, split: FULL
    monkeypatch.setitem(sys.modules, "datasets", module)
    hub = load("hub:org/full")
    file = load(_write(tmp_path / "set", "full.json", FULL), companions=Companions())
    assert hub.preferences == file.preferences
    assert hub.sft == file.sft
    assert hub.name == "hub:org/full"


def test_safety_labels_alone_need_xstest_for_the_reward(tmp_path):
    path = _write(tmp_path / "set", "mixed.json", MIXED)
    with pytest.raises(ValueError, match=r"XSTest.*is missing; put the folder `xstest`"):
        load_preferences(path)
    assert load_preferences(path, needs_reward=False).compliance_train == ()
    _write_xstest(tmp_path)
    data = load_preferences(path)
    families = [
        {row.type.removeprefix("contrast_") for row in rows}
        for rows in (data.compliance_train, data.compliance_test)
    ]
    assert len(families[0]) == len(families[1]) == 1
    assert not families[0] & families[1]
    assert {row.label for row in (*data.compliance_train, *data.compliance_test)} == {
        "full",
        "refusal",
        "partial",
    }
    assert data.over_refusal == (f"prompt of {families[1].pop()}",)


def test_companions_are_found_or_given_and_announced(tmp_path):
    path = _write(tmp_path / "set", "mixed.json", MIXED)
    _write_xstest(tmp_path)
    heldout = load_preferences(path).heldout[0].text
    _write(
        tmp_path / "elsewhere",
        "alpaca_5000.json",
        [
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"instruction": heldout.upper(), "input": "", "output": "leaked"},
            {"instruction": "Say nothing", "input": "", "output": ""},
        ],
    )
    _write(
        tmp_path / "saferlhf_gpt4_problems",
        "problem.json",
        [
            {"prompt": "new", "category": "c"},
            {"prompt": "Question  3?", "category": "c"},
        ],
    )
    given = Companions.beside(path, stanford_alpaca_5k=tmp_path / "elsewhere")
    data = load_preferences(path, companions=given)
    assert data.ptx == (("Add\n1 2", "3"),)
    assert ("Add\n1 2", "3") in data.sft
    assert "leaked" not in {completion for _, completion in data.sft}
    assert data.extra_prompts == {"saferlhf_gpt4_problems": ("new",)}
    notes = "\n".join(data.notes)
    assert "20 labelled pairs over 20 prompts" in notes
    assert "SFT: 1 of stanford_alpaca_5k, 1 overlaps left out" in notes
    assert "harmbench: not found, left out" in notes
    assert f"xstest: found at {tmp_path / 'xstest'}" in notes


def test_a_companion_without_its_file_is_an_error(tmp_path):
    path = _write(tmp_path / "set", "mixed.json", MIXED)
    (tmp_path / "xstest").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no xstest_v2_completions_\*\.csv in"):
        load_preferences(path)
    (tmp_path / "xstest" / "xstest_v2_completions_a.csv").write_text(
        "type,prompt,completion,final_label\nhomonyms,p,c,4_unsure\n"
    )
    with pytest.raises(DataError, match="line 2: field 'final_label' must be one of"):
        load_xstest(tmp_path / "xstest")


def test_instructions_need_their_fields(tmp_path):
    path = _write(tmp_path, "a.json", [{"instruction": "x"}])
    with pytest.raises(DataError, match="row 1: field 'output' is missing"):
        instruction_pairs(path)


def test_a_data_set_without_prompts_or_with_leaks_is_refused():
    rows = (PromptRow(text="a", id=0),)
    with pytest.raises(ValueError, match="'empty' has no heldout prompts"):
        SafetyData(name="empty", train=rows, heldout=())
    with pytest.raises(ValueError, match="1 in both, first 'a'"):
        SafetyData(name="leaky", train=rows, heldout=rows)
    with pytest.raises(ValueError, match=r"got \['extra'\]"):
        SafetyData(
            name="x",
            train=rows,
            heldout=(PromptRow(text="b", id=1),),
            preferences={"extra": Preferences()},
        )


def test_an_unknown_source_lists_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="one of world, world_binary"):
        load(tmp_path / "absent.json")


@needs_pku
def test_the_local_pku_file_has_the_published_counts():
    data = load(PKU)
    rows = [row for part in data.preferences.values() for row in part.labels]
    assert sum(not row.is_unsafe for row in rows) == 2260
    assert sum(row.is_unsafe for row in rows) == 2270
    assert any("226 ties" in note for note in data.notes)
    split = "over 930 prompts: 446 cost_train, 298 judge_train, 93 validation, 93 test"
    assert any(split in note for note in data.notes)
    assert (len(data.train), len(data.heldout)) == (744, 93)
    seen = [part.prompts for part in data.preferences.values()]
    assert sum(map(len, seen)) == len(frozenset().union(*seen))
    assert not any(part.helpful_pairs for part in data.preferences.values())


@needs_pku
def test_the_local_companions_have_the_published_counts():
    data = load(PKU)
    compliance = (*data.compliance_train, *data.compliance_test)
    assert len(compliance) == 2250
    assert len(data.over_refusal) >= 100
    sizes = {name: len(prompts) for name, prompts in data.extra_prompts.items()}
    # Standard behaviours of HarmBench: 159 in the test set, 41 in validation.
    assert sizes["harmbench"] == 200
    assert sizes["saferlhf_gpt4_problems"] == 83
    # 662 single-turn dialogues; some prompts repeat, some stand in the PKU set too.
    assert 550 < sizes["hh_rlhf_harmless_test"] <= 662
    assert len(data.ptx) > 4900
    hidden = {row.text for row in data.heldout} | data.preferences["validation"].prompts
    assert not hidden & {prompt for prompt, _ in data.sft}
    trained = {row.type for row in data.compliance_train}
    assert not trained & {row.type for row in data.compliance_test}


@needs_pku
def test_refusals_by_string_matching_agree_with_people():
    rows = [row for row, _ in load_xstest(SHARED / "xstest")]
    found = is_refusal([row.prompt for row in rows], [row.response for row in rows])
    share = {
        label: np.mean([hit for hit, row in zip(found, rows, strict=True) if row.label == label])
        for label in ("full", "partial", "refusal")
    }
    assert share["refusal"] > 0.85
    assert share["full"] < 0.05
