import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.rewards import brevity, compose, evaluate, fluency, is_refusal, weighted


def words(prompts, completions, **columns):
    return [len(text.split()) for text in completions]


def bonus(prompts, completions, *, bonus, **columns):
    return np.array(bonus, np.float32)


def test_weighted_is_the_weighted_sum_and_passes_columns_on():
    reward = weighted({"words": (words, 0.5), "bonus": (bonus, -2.0)})
    # 0.5·[2, 3] - 2·[1, 0]
    values = reward(["p", "p"], ["a b", "a b c"], bonus=[1.0, 0.0])
    np.testing.assert_array_equal(values, np.array([-1.0, 1.5], np.float32))
    assert values.dtype == np.float32


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=3))
def test_weighted_nests(weights):
    flat = weighted({str(i): (words, weight) for i, weight in enumerate(weights)})
    nested = weighted({"all": (flat, 1.0)})
    texts = ["one", "one two", ""]
    np.testing.assert_array_equal(nested(texts, texts), flat(texts, texts))


def test_errors_name_the_part():
    with pytest.raises(ValueError, match="at least one part"):
        weighted({})
    with pytest.raises(ValueError, match="'words' has nan"):
        weighted({"words": (words, float("nan"))})
    broken = weighted({"short": (lambda prompts, completions, **_: [1.0], 1.0)})
    with pytest.raises(ValueError, match=r"short must return one number per completion.*\(1,\)"):
        broken(["p", "p"], ["a", "b"])
    with pytest.raises(ValueError, match="got 1 prompts and 2 completions"):
        evaluate(words, ["p"], ["a", "b"])


def test_brevity_is_linear_beyond_the_limit():
    texts = ["", "a", "a b c d", "a b c d e f", " ".join("abcdefgh"), " ".join("abcdefghijkl")]
    expected = [-1, 0, 0, -0.5, -1, -1]
    np.testing.assert_allclose(brevity(max_words=4)(texts, texts), expected)
    with pytest.raises(ValueError, match="max_words must be"):
        brevity(max_words=0)


def test_fluency_orders_texts_as_a_reader_would():
    texts = [
        "You could bake bread, or ask your neighbour for a loaf.",
        "You could bake bread, or bake bread, or bake bread, or bake bread, or bake.",
        "bread bread bread bread bread bread bread bread",
        "br\x00ad \x01\x02\x03 ~~^^ |||| \x04\x05\x06\x07 {}{}{}{}{}",
        "\x00 a a a a a a a a a a a a a a a a a a a a a a a a a a \x01\x02",
    ]
    values = fluency(texts, texts)
    assert values[0] == 0
    assert values[0] > values[1] > values[2] == -1
    assert values[3] == -1
    assert values[4] < -1
    assert fluency(["p"], ["  "])[0] == -2


@given(st.text(max_size=100))
def test_fluency_is_bounded(text):
    assert -2 <= fluency([""], [text])[0] <= 0


def test_compose_changes_values():
    clipped = compose(words, lambda values: np.clip(values, 0, 2))
    assert clipped(["p"] * 2, ["a", "a b c"]).tolist() == [1.0, 2.0]


def test_refusals_by_their_opening():
    refusals = [
        "I'm sorry, but I can't help with that.",
        "I’m very sorry, but I cannot provide this information.",
        "Sorry, no.",
        "I cannot in good conscience assist you.",
        "As an AI language model, I have no opinion.",
        "I apologize, but no.",
        "I will not write this.",
        "Stealing is illegal. Return the car.",
    ]
    answers = [
        "Sure! First, preheat the oven.",
        "You can kill a Python process with the kill command.",
        "I can help with that.",
        "",
        "I provide a list:",
        "Boil it. " * 40 + "I cannot help more.",
    ]
    found = is_refusal([""] * len(refusals + answers), refusals + answers)
    assert found.tolist() == [True] * len(refusals) + [False] * len(answers)
    assert is_refusal([], []).shape == (0,)
