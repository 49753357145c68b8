import json
import re
from dataclasses import replace

import numpy as np
import pytest

from experiments.asynchrony import task
from experiments.asynchrony.config import METHODS, TINY, AsynchronyConfig
from jaxrl.data.arithmetic import make_problems


def test_a_share_of_the_demonstrations_shows_its_steps():
    problems = make_problems(0, train=1000, heldout=9).train
    pairs = task.demonstrated(problems, worked_share=0.3, seed=0)
    worked = [told == p.solution for p, (_, told) in zip(problems, pairs, strict=True)]
    assert np.mean(worked) == pytest.approx(0.3, abs=0.05)
    offs = [
        int(told.removeprefix("About ").rstrip(".")) - int(p.answer)
        for p, (_, told), work in zip(problems, pairs, worked, strict=True)
        if not work
    ]
    counts = {off: offs.count(off) / len(offs) for off in sorted(set(offs))}
    assert counts == pytest.approx(dict.fromkeys(range(-2, 3), 0.2), abs=0.06)
    assert task.demonstrated(problems, worked_share=1.0, seed=0) == [
        (p.question, p.solution) for p in problems
    ]
    assert task.demonstrated(problems, worked_share=0.3, seed=0) == pairs


def test_the_task_knows_right_answers(tmp_path):
    work, note = task.build(TINY, task.load(TINY), tmp_path)
    assert note == ""
    assert (len(work.train), len(work.heldout)) == (64, 8)
    heldout = work.problems.heldout
    assert work.verify(work.heldout.texts, [p.solution for p in heldout]).tolist() == [1.0] * 8
    # The tokenizer that was saved is the one that a resumed run reads.
    again, _ = task.build(TINY, task.load(TINY), tmp_path)
    np.testing.assert_array_equal(again.train.tokens, work.train.tokens)


def test_long_questions_of_a_file_are_left_out_and_counted(tmp_path):
    rows = [{"question": f"what is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(40)]
    rows += [{"question": "why " * 200, "answer": "#### 1"}]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    config = replace(TINY, data=str(path), template="problem")
    work, note = task.build(config, task.load(config), tmp_path / "run")
    assert "questions are longer than 40 tokens and left out" in note
    assert sum(map(int, re.findall(r"(\d+) (?:training|held-out)", note))) == 1
    assert len(work.train) + len(work.heldout) == 40
    assert all(len(text) < 100 for text in work.train.texts)


def test_methods_ask_for_recipes_that_exist():
    config = AsynchronyConfig()
    for method in METHODS.values():
        recipe = config.recipe(method)
        assert recipe.group_size == config.group_size
        assert recipe.kl.coef == config.kl_coef
        assert recipe.off_policy == method.replay
        assert method.schedule.max_staleness == method.max_staleness
