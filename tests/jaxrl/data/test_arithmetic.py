import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.data import DataError
from jaxrl.data.arithmetic import (
    LARGEST,
    Problem,
    Problems,
    load_problems,
    make_problems,
    read_gsm8k,
)
from jaxrl.rewards.verifier import last_number

MADE = make_problems(0, train=600, heldout=150)
EVERY = (*MADE.train, *MADE.heldout)
SENTENCES = {
    "+": r"(?:buys|finds|brings) (\d+) more",
    "-": r"(?:loses|sells|gives) (\d+)",
    "*": r"number grows (\d+) times",
    "/": r"one in every (\d+)",
}


def chain(problem):
    """First number and operations, read from the story alone."""
    first, *story = problem.question.split(". ")
    operations = []
    for sentence in story[:-1]:
        ((sign, number),) = [
            (sign, found[1])
            for sign, form in SENTENCES.items()
            if (found := re.search(form, sentence))
        ]
        operations.append((sign, int(number)))
    return int(re.search(r"\d+", first)[0]), tuple(operations)


def test_stories_solutions_and_answers_agree():
    for problem in EVERY:
        value, operations = chain(problem)
        steps = re.findall(r"(\d+) ([+*/-]) (\d+) = (\d+)\.", problem.solution)
        assert len(steps) == len(operations) == problem.level
        for (sign, operand), (left, written, right, result) in zip(operations, steps, strict=True):
            assert (int(left), written, int(right)) == (value, sign, operand)
            exact = {"+": value + operand, "-": value - operand, "*": value * operand}
            value = exact[sign] if sign != "/" else value / operand
            assert value == int(result)
            assert 1 <= value <= LARGEST
        assert last_number(problem.solution) == value == int(problem.answer)
    assert MADE.verifier()([p.question for p in EVERY], [p.solution for p in EVERY]).all()


def test_no_chain_of_the_training_problems_is_held_out():
    trained, kept = ([chain(p) for p in part] for part in (MADE.train, MADE.heldout))
    assert not set(trained) & set(kept)
    assert len(set(kept)) == len(kept) == 150
    assert len({p.question for p in MADE.train}) == 600


def test_levels_are_equally_frequent_and_harder_ones_longer():
    for part in (MADE.train, MADE.heldout):
        counts = [sum(p.level == level for p in part) for level in (1, 2, 3)]
        assert counts == [len(part) // 3] * 3
    lengths = [
        max(len(p.solution) for p in EVERY if p.level == level)
        < min(len(p.solution) for p in EVERY if p.level == level + 1) + 12
        for level in (1, 2)
    ]
    assert all(lengths)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31))
def test_the_seed_decides(seed):
    first = make_problems(seed, train=30, heldout=9, levels=(1, 4))
    assert first == make_problems(seed, train=30, heldout=9, levels=(1, 4))
    assert first != make_problems(seed + 1, train=30, heldout=9, levels=(1, 4))
    assert {p.level for p in first.train} == {1, 4}


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match=r"1 or more: levels=\(0, 1\)"):
        make_problems(0, levels=(0, 1))
    with pytest.raises(ValueError, match=r"levels \(1,\) have too few distinct problems for 9000"):
        make_problems(0, heldout=9000, levels=(1,))
    with pytest.raises(ValueError, match="no heldout ones"):
        make_problems(0, heldout=0)
    one = Problem(question="q", solution="1", answer="1")
    with pytest.raises(ValueError, match="1 stand in both, first 'q'"):
        Problems(name="x", train=(one,), heldout=(one,))


# --- GSM8K's files ------------------------------------------------------------------------------

ROWS = [
    {"question": "Natalia sold 48 clips and half as many. How many?",
     "answer": "She sold 48/2 = <<48/2=24>>24 more.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"},
    {"question": "What does the car cost?", "answer": "#### 1,234"},
]  # fmt: skip


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_gsm8k_rows(tmp_path):
    first, second = read_gsm8k(write(tmp_path / "train.jsonl", ROWS))
    assert first.solution == "She sold 48/2 = 24 more.\nIn all 48+24 = 72.\n#### 72"
    assert first.answer == "72"
    assert (second.solution, second.answer) == ("#### 1,234", "1234")


def test_gsm8k_is_split_by_question(tmp_path):
    rows = [{"question": f"q{i % 40}", "answer": f"#### {i % 40}"} for i in range(50)]
    path = write(tmp_path / "gsm.jsonl", rows)
    data = load_problems(path, heldout_share=0.25, seed=3)
    assert (data.name, len(data.train), len(data.heldout)) == ("gsm", 30, 10)
    assert data == load_problems(path, heldout_share=0.25, seed=3)
    assert data.heldout != load_problems(path, heldout_share=0.25, seed=4).heldout


def test_held_out_questions_leave_the_training_file(tmp_path):
    train = write(tmp_path / "train.jsonl", [*ROWS, {"question": "q", "answer": "#### 3"}])
    test = write(tmp_path / "test.jsonl", [ROWS[0]])
    data = load_problems(train, heldout=test)
    assert [p.question for p in data.train] == [ROWS[1]["question"], "q"]
    assert [p.question for p in data.heldout] == [ROWS[0]["question"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, r"line 2: field 'answer' is missing"),
        ({"question": "q", "answer": "it is 5"}, r'line 2: field "answer" must end in "#### n"'),
        ({"question": "q", "answer": "#### five"}, r"line 2: .*got '#### five'"),
        ({"question": " ", "answer": "#### 5"}, r"line 2: field 'question' must be non-empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_gsm8k(write(tmp_path / "bad.jsonl", [ROWS[0], row]))


def test_a_split_needs_a_share(tmp_path):
    with pytest.raises(ValueError, match="heldout_share must be above 0 and below 1"):
        load_problems(write(tmp_path / "x.jsonl", ROWS), heldout_share=1.0)
    with pytest.raises(ValueError, match="no heldout ones"):
        load_problems(write(tmp_path / "x.jsonl", ROWS))
