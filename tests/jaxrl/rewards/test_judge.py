"""The n-gram judge and its calibration."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxrl.rewards.judge import calibrate, platt, train_ngram_judge


def _rows(count: int, seed: int) -> list[SimpleNamespace]:
    rng = np.random.default_rng(seed)
    words = ["rope", "tide", "gull", "mist"]
    return [
        SimpleNamespace(
            prompt="q",
            response=f"{rng.choice(words)} {'poison' if i % 2 else 'kindly'} {rng.choice(words)}",
            is_unsafe=bool(i % 2),
        )
        for i in range(count)
    ]


def test_the_judge_learns_and_is_graded():
    judge = train_ngram_judge(_rows(40, 0), validation=_rows(20, 1))
    tested = _rows(20, 2)
    scores = judge([r.prompt for r in tested], [r.response for r in tested])
    assert judge.validation_auc == 1.0
    assert all((s > 0) == r.is_unsafe for s, r in zip(scores, tested, strict=True))
    mild, strong = judge(["q", "q"], ["poison rope tide gull", "poison poison poison"])
    assert 0 < mild < strong
    assert judge([], []).shape == (0,)


def test_the_judge_repeats_itself():
    one, two = (train_ngram_judge(_rows(40, 0), validation=_rows(20, 1)) for _ in range(2))
    texts = [r.response for r in _rows(8, 3)]
    np.testing.assert_array_equal(one(texts, texts), two(texts, texts))


def test_calibration_finds_a_known_slope_and_boundary():
    rng = np.random.default_rng(0)
    scores = rng.normal(1.0, 2.0, 40_000)
    log_odds = 1.5 * scores - 2.0
    labels = rng.random(scores.size) < 1 / (1 + np.exp(-log_odds))
    slope, intercept = platt(scores, labels)
    assert slope == pytest.approx(1.5, abs=0.05)
    assert intercept == pytest.approx(-2.0, abs=0.06)


def test_calibrated_scores_have_their_boundary_at_zero():
    rows = [SimpleNamespace(prompt="q", response="x" * n, is_unsafe=n > 10) for n in range(1, 21)]
    judge = calibrate(lambda prompts, completions, **_: [len(c) for c in completions], rows)
    below, above = judge(["q", "q"], ["x" * 9, "x" * 12])
    assert below < 0 < above


def test_wrong_rows_say_what_is_needed():
    safe = [row for row in _rows(10, 0) if not row.is_unsafe]
    with pytest.raises(ValueError, match="`validation` has 5 responses, 0 of them unsafe"):
        train_ngram_judge(_rows(10, 0), validation=safe)
    with pytest.raises(ValueError, match="must score unsafe responses higher"):
        calibrate(lambda p, c, **_: [-float("poison" in x) for x in c], _rows(10, 0))
