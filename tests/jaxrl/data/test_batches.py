"""Batches: epochs are permutations, whatever their length, and any step can be read alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.data.batches import Demonstrations, PromptSet, shuffled
from jaxrl.tokenizers import PLAIN, train_bpe

rows = st.integers(1, 40)
batches = st.integers(1, 60)
seeds = st.integers(0, 3)


@settings(max_examples=60, deadline=None)
@given(num_rows=rows, batch=batches, seed=seeds)
def test_every_epoch_is_a_permutation_also_where_batches_span_two(num_rows, batch, seed):
    steps = -(-3 * num_rows // batch)
    stream = np.concatenate([shuffled(num_rows, batch, seed=seed, step=s) for s in range(steps)])
    for epoch in range(3):
        part = stream[epoch * num_rows : (epoch + 1) * num_rows]
        np.testing.assert_array_equal(np.sort(part), np.arange(num_rows))


@settings(max_examples=60, deadline=None)
@given(num_rows=rows, batch=batches, seed=seeds, step=st.integers(0, 10**6))
def test_any_step_is_a_slice_of_the_stream(num_rows, batch, seed, step):
    """Batch s of size b is the b batches of size 1 at its place: nothing depends on the past."""
    found = shuffled(num_rows, batch, seed=seed, step=step)
    assert found.shape == (batch,)
    singles = [
        shuffled(num_rows, 1, seed=seed, step=step * batch + i)[0] for i in range(min(batch, 5))
    ]
    np.testing.assert_array_equal(found[:5], singles)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [shuffled(30, 30, seed=seed, step=step) for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_data_set_without_rows_is_refused():
    with pytest.raises(ValueError, match="the data set is empty; give at least one prompt"):
        shuffled(0, 4, seed=0, step=0)


TEXTS = ("how are you", "what is a lower number", "who")
TOKENIZER = train_bpe([*TEXTS, "a long answer that goes on and on"] * 4, 300)


def test_prompts_keep_their_rows_as_ids():
    prompts = PromptSet.encode(TOKENIZER, TEXTS, PLAIN, max_len=12)
    taken = prompts.take(np.array([2, 0, 2]))
    assert len(prompts) == 3
    assert taken.ids.tolist() == [2, 0, 2]
    assert taken.ids.dtype == np.int32
    for row, text in zip(range(3), ("who", "how are you", "who"), strict=True):
        real = np.asarray(taken.tokens[row][taken.mask[row]])
        assert TOKENIZER.decode(real) == PLAIN.prompt(text)
        assert taken.mask[row, -1]  # padded on the left


def test_a_prompt_longer_than_the_context_is_named():
    with pytest.raises(ValueError, match=r"1 to 4 tokens: row 1 has \d+ \('what is a lower"):
        PromptSet.encode(TOKENIZER, ("who", TEXTS[1] * 3), PLAIN, max_len=4)
    with pytest.raises(ValueError, match="the prompt set is empty"):
        PromptSet.encode(TOKENIZER, (), PLAIN, max_len=4)


def test_demonstrations_end_with_the_end_token_unless_cut():
    pairs = [("who", "you"), ("how are you", "a long answer that goes on and on")]
    demos = Demonstrations.encode(TOKENIZER, pairs, PLAIN, prompt_len=12, completion_len=6)
    assert len(demos) == 2
    short, cut = (tokens[mask] for tokens, mask in zip(demos.tokens, demos.mask, strict=True))
    assert short[-1] == TOKENIZER.eos_id
    assert TOKENIZER.decode(short) == "you"
    assert len(cut) == 6
    assert TOKENIZER.eos_id not in cut
    assert "a long answer that goes on and on".startswith(TOKENIZER.decode(cut))
