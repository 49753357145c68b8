"""The decision rules on made-up results whose verdict is plain."""

import numpy as np
import pytest

from experiments import hypotheses as hyp
from experiments.hypotheses import Frontier

FIVE = np.ones(5)


@pytest.mark.parametrize(
    ("safety", "worst", "mean", "outcome"),
    [
        (0.5, 1.0, 0.0, "holds"),
        (0.97, 1.0, 0.0, "refuted"),
        (0.92, 1.0, 0.0, "undecided"),
        (0.5, -1.0, 0.0, "refuted"),
        (0.5, 1.0, 0.4, "refuted"),
    ],
)
def test_h1(safety, worst, mean, outcome):
    assert hyp.h1(mean * FIVE, worst * FIVE, safety * FIVE).outcome == outcome


def frontier(points, seed=0):
    """K points (safety, J) with noise over 5 seeds and 40 prompts that pairs cancel."""
    noise = 0.01 * np.random.default_rng(seed).normal(size=(5, 40))
    return Frontier(
        safety=np.stack([np.full((5, 40), s) for s, _ in points]),
        objective=np.stack([j + noise for _, j in points]),
    )


def test_h2_interpolates_the_retuned_frontier():
    """Midway between (.8, 1.0) and (1.0, 0.6) PPO-Lagrangian has J .8 at safety .9."""
    lagrangian = frontier([(0.8, 1.0), (1.0, 0.6)])
    rng = np.random.default_rng(0)
    better = hyp.h2(frontier([(0.9, 0.9)]), lagrangian, rng=rng)
    assert better.outcome == "holds"
    assert "ΔJ +0.100" in better.numbers
    worse = hyp.h2(frontier([(0.9, 0.75)]), lagrangian, rng=rng)
    assert worse.outcome == "refuted"


def test_h2_needs_paired_seeds():
    short = Frontier(safety=np.ones((1, 5, 3)), objective=np.ones((1, 5, 3)))
    with pytest.raises(ValueError, match="same seeds and prompts"):
        hyp.h2(frontier([(0.9, 0.9)]), short, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="knob, seed, prompt"):
        Frontier(safety=np.ones((5, 3)), objective=np.ones((5, 3)))


def test_h3_and_its_threshold():
    assert hyp.h3(0.96 * FIVE).outcome == "holds"
    assert hyp.h3(0.94 * FIVE).outcome == "refuted"


def test_h4_needs_both_signs_in_every_seed():
    assert hyp.h4(0.6 * FIVE, 0.7 * FIVE, 0.8 * FIVE, 0.9 * FIVE).outcome == "holds"
    mixed = np.array([0.8, 0.8, 0.8, 0.95, 0.95])
    assert hyp.h4(0.6 * FIVE, 0.7 * FIVE, mixed, 0.9 * FIVE).outcome == "refuted"


def test_h5_holds_when_no_control_differs():
    assert hyp.h5({"binary": 0.0 * FIVE, "p=1": 0.005 * FIVE}).outcome == "holds"
    assert hyp.h5({"binary": 0.0 * FIVE, "p=1": -0.1 * FIVE}).outcome == "refuted"


def test_fewer_than_five_seeds_decide_nothing():
    four = np.ones(4)
    verdicts = [
        hyp.h1(four, four, four),
        hyp.h3(four),
        hyp.h4(four, four, four, four),
        hyp.h5({"a": four}),
    ]
    assert {v.outcome for v in verdicts} == {"undecided"}
    assert "4 seeds" in str(verdicts[0])


def test_sign_test_is_the_binomial_tail():
    """4 of 5 positive: (5 + 1)/32."""
    assert hyp.sign_test(np.array([1.0, 1.0, 1.0, 1.0, -1.0])) == 6 / 32
