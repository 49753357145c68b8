from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.rewards.verifier import last_number, numeric_verifier


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("7 + 5 = 12. 12 * 2 = 24", "24"),
        ("#### 1,234,567", "1234567"),
        ("She earned $1,012.50!", "1012.50"),
        ("3 apples, 4 pears,", "4"),
        ("it fell to -7", "-7"),
        ("10-3", "3"),
        ("x-3", "3"),
        ("1.-2", "2"),
        ("5.", "5"),
        ("50%", "50"),
        ("2 ** 10 = 1024\n#### 0018", "18"),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "...", "-", ",,", "$"])
def test_a_text_without_numbers(text):
    assert last_number(text) is None


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{}.", "= {} cups", "so:\n#### {}"]))
def test_any_integer_is_read_with_and_without_commas(number, frame):
    assert last_number(frame.format(number)) == number
    assert last_number(frame.format(f"{number:,}")) == number


@given(st.decimals(-1000, 1000, places=3))
def test_any_decimal_is_read(number):
    assert last_number(f"1 and then {number}") == number


@given(st.text())
def test_any_text_has_a_verdict(text):
    verdict = numeric_verifier({"q": "3"})(["q"], [text])
    assert verdict.dtype == np.float32
    assert verdict.shape == (1,)
    assert verdict[0] in (0.0, 1.0)


def test_only_the_last_number_counts():
    verify = numeric_verifier({"q": "72"})
    answers = ["72", "72.00", "7 and 72", "72 of 100", "", "seventy-two", "-72", "720"]
    assert verify(["q"] * 8, answers).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_errors_name_the_prompt():
    with pytest.raises(ValueError, match="an answer must be a number: 'five' for the prompt 'q'"):
        numeric_verifier({"q": "five"})
    with pytest.raises(ValueError, match="own prompts only: 'r' is none of its 1"):
        numeric_verifier({"q": "5"})(["r"], ["5"])
