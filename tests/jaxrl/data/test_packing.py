"""Packed rows hold every token once, whatever the lengths, and are a function of (seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.data.batches import Demonstrations, PromptSet
from jaxrl.data.packing import PackedDemonstrations, first_fit


def demonstrations(lengths, *, seed=0):
    """Examples of (prompt, completion) lengths whose tokens are all different."""
    prompt_len, completion_len = (max(column) for column in zip(*lengths, strict=True))
    tokens = np.arange(1, len(lengths) * (prompt_len + completion_len) + 1, dtype=np.int32)
    tokens = tokens.reshape(len(lengths), -1)
    of_prompt = (
        np.arange(prompt_len)[None] >= prompt_len - np.array([p for p, _ in lengths])[:, None]
    )
    of_own = np.arange(completion_len)[None] < np.array([c for _, c in lengths])[:, None]
    prompts = PromptSet(texts=("",) * len(lengths), tokens=tokens[:, :prompt_len], mask=of_prompt)
    return Demonstrations(prompts=prompts, tokens=tokens[:, prompt_len:], mask=of_own)


LENGTHS = [(3, 2), (1, 1), (5, 3), (2, 4), (4, 4), (1, 6), (2, 2)]


def test_first_fit_takes_the_oldest_row_with_room():
    # 6 and 5 open a row each; 4 fills the first; 3 and then 2 go into the second.
    assert first_fit([6, 5, 4, 3, 2], width=10) == [[0, 2], [1, 3, 4]]


@given(st.lists(st.integers(1, 12), max_size=60))
def test_every_example_stands_once_and_rows_are_at_least_half_full(lengths):
    rows = first_fit(lengths, width=12)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    filled = [sum(lengths[place] for place in row) for row in rows]
    assert all(0 < total <= 12 for total in filled)
    # First-fit leaves at most one row half empty: two such would have been one.
    assert sum(2 * total <= 12 for total in filled) <= 1


@pytest.mark.parametrize("length", [0, 13])
def test_what_has_no_place_is_refused(length):
    with pytest.raises(ValueError, match=f"between 1 and 12 tokens.*example 1 has {length}"):
        first_fit([3, length], width=12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=20))
def test_an_epoch_holds_every_token_once(lengths):
    demos = demonstrations(lengths)
    packed = PackedDemonstrations(demonstrations=demos, width=10, seed=3)
    rows = packed.take(0, len(packed.epoch(0)))
    tokens, segments, mask = (np.asarray(x) for x in (rows.tokens, rows.segments, rows.mask))
    real = {*demos.prompts.tokens[demos.prompts.mask].tolist(), *demos.tokens[demos.mask].tolist()}
    held = tokens[segments != 0].tolist()
    assert sorted(held) == sorted(real)
    assert set(tokens[mask].tolist()) == set(demos.tokens[demos.mask].tolist())
    assert not tokens[segments == 0].any()
    for row, of in zip(tokens, segments, strict=True):
        for segment in set(of.tolist()) - {0}:  # each sequence in one piece and in its order
            places = np.flatnonzero(of == segment)
            assert np.all(np.diff(places) == 1)
            assert np.all(np.diff(row[places]) > 0)


def test_batches_follow_from_seed_and_step_alone():
    demos = demonstrations(LENGTHS)

    def batches(seed, steps):
        packed = PackedDemonstrations(demonstrations=demos, width=9, seed=seed)
        return [np.asarray(packed.take(step, 2).tokens) for step in steps]

    forward = batches(0, range(8))
    for step, again in zip((5, 0, 7), batches(0, (5, 0, 7)), strict=True):
        np.testing.assert_array_equal(again, forward[step])
    assert any(not np.array_equal(a, b) for a, b in zip(forward, batches(1, range(8)), strict=True))


def test_the_stream_is_one_epoch_after_the_other():
    packed = PackedDemonstrations(demonstrations=demonstrations(LENGTHS), width=9, seed=0)
    stream = [row for step in range(10) for row in packed.rows(step, 3)]
    expected = [row for number in range(10) for row in packed.epoch(number)]
    assert stream == expected[: len(stream)]
    assert len(packed.epoch(0)) < len(LENGTHS)  # it does pack
