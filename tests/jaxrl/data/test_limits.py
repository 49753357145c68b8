import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.data.dataset import LabelledResponse, Preferences, PromptRow, SafetyData
from jaxrl.data.limits import cut_completion, fit_prompts
from jaxrl.tokenizers import PLAIN, train_bpe

TOKENIZER = train_bpe(["~"], 260)  # bytes only
LONG = "x" * 10


def _data(**changes):
    rows = [PromptRow(text=text, id=i) for i, text in enumerate(["a", LONG, "b", LONG + "y"])]
    given = {"name": "toy", "train": tuple(rows[:2]), "heldout": tuple(rows[2:]), **changes}
    return SafetyData(**given)


def test_long_prompts_are_an_error_that_names_the_row():
    with pytest.raises(ValueError, match=r"train row 1 of 'toy' has 11 tokens .* 10 fit \('xxx"):
        fit_prompts(_data(), TOKENIZER, PLAIN, max_tokens=10)
    assert fit_prompts(_data(), TOKENIZER, PLAIN, max_tokens=12) == _data()


def test_long_prompts_go_everywhere_when_asked():
    labels = tuple(LabelledResponse(prompt=p, response="r", is_unsafe=True) for p in ("a", LONG))
    data = _data(
        sft=(("a", "fine"), (LONG, "gone")),
        over_refusal=("a", LONG),
        extra_prompts={"more": (LONG, "c")},
        preferences={"test": Preferences(labels=labels)},
    )
    fitted = fit_prompts(data, TOKENIZER, PLAIN, max_tokens=10, drop_long=True)
    assert [row.id for row in (*fitted.train, *fitted.heldout)] == [0, 2]
    assert fitted.sft == (("a", "fine"),)
    assert fitted.over_refusal == ("a",)
    assert fitted.extra_prompts == {"more": ("c",)}
    assert fitted.preferences["test"].labels == labels[:1]
    assert "train: 1 of 2 rows left out, prompt longer than 10 tokens" in fitted.notes


def test_nothing_left_is_an_error():
    rows = (PromptRow(text=LONG, id=0),)
    with pytest.raises(ValueError, match="no train prompt of 'toy' fits 3 tokens"):
        fit_prompts(_data(train=rows), TOKENIZER, PLAIN, max_tokens=3, drop_long=True)


@given(st.text(max_size=30), st.integers(0, 30))
def test_cut_completions_are_prefixes_that_fit(text, max_tokens):
    cut = cut_completion(TOKENIZER, text, max_tokens=max_tokens)
    assert len(TOKENIZER.encode(cut)) <= max_tokens
    assert text.startswith(cut)
