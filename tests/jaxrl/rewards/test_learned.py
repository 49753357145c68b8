"""Learned scorers: what they compute, that they learn, and that training is reproducible."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.models import Decoder, DecoderConfig
from jaxrl.objectives.preference import cost_loss, label_loss, reward_loss
from jaxrl.rewards import examples as ex
from jaxrl.rewards.learned import (
    LearnedScorer,
    ScorerConfig,
    TextEncoder,
    TrainingConfig,
    distinct_ngrams,
    train_scorer,
    untrained,
)
from jaxrl.tokenizers import PLAIN, train_bpe
from jaxrl.types import Prompts

WORDS = ["calm", "harbour", "rope", "lantern", "tide", "gull", "anchor", "mist"]
BAD, GOOD = "poison", "kindly"


def _texts(rng: np.random.Generator, count: int, word: str) -> list[str]:
    """Sentences of neutral words with one telling word in the middle."""
    rows = rng.choice(WORDS, (count, 4))
    return [f"{a} {b} {word} {c} {d}" for a, b, c, d in rows]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    tokenizer = train_bpe([" ".join([*WORDS, BAD, GOOD, "which ?"])] * 4, 400)
    return TextEncoder(tokenizer=tokenizer, template=PLAIN, prompt_len=8, completion_len=12)


def _decoder(encoder: TextEncoder) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=encoder.tokenizer.vocab_size,
        layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=32,
    )  # fmt: skip


def _pairs(count: int, seed: int) -> list[SimpleNamespace]:
    rng = np.random.default_rng(seed)
    return [
        SimpleNamespace(
            prompt=f"which {WORDS[i % 8]}?",
            better=good, worse=bad, better_is_unsafe=False, worse_is_unsafe=True,
        )
        for i, (good, bad) in enumerate(
            zip(_texts(rng, count, GOOD), _texts(rng, count, BAD), strict=True)
        )
    ]  # fmt: skip


def _rows(pairs) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(prompt=p.prompt, response=r, is_unsafe=u, label=label)
        for p in pairs
        for r, u, label in ((p.better, False, "full"), (p.worse, True, "refusal"))
    ]


def _cost(scores, targets):
    return cost_loss(*scores.T, *targets.T)


def _mask(tokens) -> jnp.ndarray:
    return jnp.ones_like(tokens, bool)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=6, max_size=6), st.integers(0, 6), st.integers(1, 3))
def test_distinct_ngrams_are_those_of_a_set(row, length, n):
    tokens = jnp.array([row], jnp.int32)
    mask = jnp.arange(6)[None] < length
    _, found = distinct_ngrams(tokens, mask, n=n, buckets=2**24)
    expected = {tuple(row[i : i + n]) for i in range(length - n + 1)}
    assert int(found.sum()) == len(expected)  # 5³ n-grams hardly collide in 2²⁴ buckets


def test_ngrams_of_equal_tokens_share_a_bucket_and_others_do_not():
    first = jnp.array([[1, 2, 3, 1, 2]])
    (a,), (kept,) = distinct_ngrams(first, _mask(first), n=2, buckets=2**20)
    second = jnp.array([[9, 1, 2, 9, 9]])
    (b,), (also,) = distinct_ngrams(second, _mask(second), n=2, buckets=2**20)
    # 12, 23, 31 in the first; 91, 12, 29, 99 in the second: one in common.
    assert (int(kept.sum()), int(also.sum())) == (3, 4)
    assert len(set(a[kept].tolist()) & set(b[also].tolist())) == 1


def test_wide_score_is_the_weights_over_the_root_of_their_number(encoder):
    scorer = untrained(ScorerConfig(ngrams=1, buckets=2**16), encoder, seed=0)
    prompts = encoder.prompts(["q"])
    tokens = jnp.array([[[5, 6, 5, 7, 0]]])
    mask = jnp.array([[[True, True, True, True, False]]])
    buckets, found = distinct_ngrams(tokens, mask, n=1, buckets=2**16)
    model = nnx.merge(scorer.graphdef, scorer.params)
    model.ngram[...] = model.ngram[...].at[buckets[found]].set(jnp.array([1.0, 2.0, 4.0]))
    model.bias[...] = jnp.float32(0.5)
    # Three distinct tokens: .5 + (1 + 2 + 4)/√3
    np.testing.assert_allclose(model(prompts, tokens, mask), [[0.5 + 7 / 3**0.5]], rtol=1e-6)


def test_a_repeated_phrase_scores_once(encoder):
    scorer = _randomised(untrained(ScorerConfig(ngrams=1), encoder, seed=0))
    once, twice = scorer(["q", "q"], ["calm tide", "calm tide calm tide"])
    tokens, mask = encoder.completions(["calm tide", "calm tide calm tide"])
    assert mask[1].sum() > mask[0].sum()
    # Only the token sets may matter: " calm" inside a text is another token than "calm".
    sets = [set(t[m].tolist()) for t, m in zip(tokens[:, 0], mask[:, 0], strict=True)]
    assert (once == twice) == (sets[0] == sets[1])
    same = scorer(["q", "q"], [" calm calm", " calm calm calm calm"])
    assert same[0] == same[1]


def _randomised(scorer: LearnedScorer) -> LearnedScorer:
    leaves, tree = jax.tree.flatten(scorer.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return scorer.replace(params=jax.tree.unflatten(tree, noisy))


@pytest.mark.parametrize("ngrams", [0, 2])
def test_padding_and_batching_change_nothing(encoder, ngrams):
    config = ScorerConfig(decoder=_decoder(encoder), ngrams=ngrams)
    scorer = _randomised(untrained(config, encoder, seed=0)).replace(batch=2)
    prompts, answers = ["which?", "tide ?", "gull"], ["calm mist", "rope", "anchor tide gull"]
    together = scorer(prompts, answers)
    assert np.unique(together).size == 3
    alone = [scorer([p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    wider = TextEncoder(
        tokenizer=encoder.tokenizer, template=PLAIN, prompt_len=13, completion_len=17
    )
    np.testing.assert_allclose(scorer.replace(encoder=wider)(prompts, answers), together, atol=1e-5)


def test_tokens_of_rollouts_score_like_their_texts(encoder):
    scorer = _randomised(untrained(ScorerConfig(decoder=_decoder(encoder)), encoder, seed=0))
    prompts = ["which?", "tide ?"]
    answers = [["calm mist", "rope"], ["gull", "anchor tide"]]
    tokens, mask = encoder.completions([a for group in answers for a in group])
    shape = (2, 2, encoder.completion_len)
    grouped = scorer.score(encoder.prompts(prompts), tokens.reshape(shape), mask.reshape(shape))
    flat = scorer([p for p in prompts for _ in range(2)], [a for group in answers for a in group])
    np.testing.assert_allclose(grouped.ravel(), flat, atol=1e-5)


def test_no_texts_have_no_scores(encoder):
    assert untrained(ScorerConfig(), encoder, seed=0)([], []).shape == (0,)


@pytest.mark.parametrize("deep", [False, True])
def test_a_cost_model_learns_the_telling_word(encoder, deep):
    config = ScorerConfig(decoder=_decoder(encoder) if deep else None, ngrams=0 if deep else 3)
    trained = train_scorer(
        untrained(config, encoder, seed=0),
        ex.cost_examples(_pairs(48, seed=0)),
        _cost,
        TrainingConfig(
            steps=80, batch=16, evaluate_every=40, learning_rate=2e-2, ngram_learning_rate=5e-2
        ),
        validation=ex.safety_examples(_rows(_pairs(16, seed=1))),
        seed=0,
    )
    tested = _rows(_pairs(16, seed=2))
    cost = trained.scorer([r.prompt for r in tested], [r.response for r in tested])
    assert trained.quality > 0.99
    # Zero is the boundary, not only the order right.
    assert all((c > 0) == row.is_unsafe for c, row in zip(cost, tested, strict=True))


def test_training_repeats_itself_and_follows_its_seed(encoder):
    def train(seed):
        return train_scorer(
            untrained(ScorerConfig(decoder=_decoder(encoder)), encoder, seed=0),
            ex.cost_examples(_pairs(20, seed=0)),
            _cost,
            TrainingConfig(steps=6, batch=4, evaluate_every=3),
            validation=ex.safety_examples(_rows(_pairs(6, seed=1))),
            seed=seed,
        )

    first, again, other = train(1), train(1), train(2)
    assert first.history == again.history
    jax.tree.map(np.testing.assert_array_equal, first.scorer.params, again.scorer.params)
    assert first.history[-1]["loss"] != other.history[-1]["loss"]


def test_reward_and_compliance_models_learn_too(encoder):
    pairs, held = _pairs(48, seed=0), _pairs(16, seed=1)
    config = TrainingConfig(steps=30, batch=16, evaluate_every=15)
    start = untrained(ScorerConfig(), encoder, seed=0)
    preference = train_scorer(
        start, ex.preference_examples(pairs), lambda s, _: reward_loss(*s.T), config,
        validation=ex.preference_examples(held), measure=ex.pair_accuracy, seed=0,
    )  # fmt: skip
    assert preference.quality > 0.99
    compliance = train_scorer(
        start, ex.compliance_examples(_rows(pairs)), lambda s, t: label_loss(s[:, 0], t[:, 0]),
        config, validation=ex.compliance_examples(_rows(held)), seed=0,
    )  # fmt: skip
    # "full" is the harmless word here, so the classifier must rank it above refusals.
    full, refused = compliance.scorer(["which?"] * 2, [f"calm {GOOD} tide", f"calm {BAD} tide"])
    assert full > 0 > refused


def test_training_stops_early_and_keeps_a_good_look(encoder):
    qualities = iter([0.5, 0.9, 0.895, 0.6, 0.6, 0.99])
    trained = train_scorer(
        untrained(ScorerConfig(), encoder, seed=0),
        ex.cost_examples(_pairs(8, seed=0)),
        _cost,
        TrainingConfig(steps=12, batch=4, evaluate_every=2, patience=2),
        validation=ex.safety_examples(_rows(_pairs(2, seed=1))),
        measure=lambda scores, targets: next(qualities),
        seed=0,
    )
    # .895 is as good as .9 and later; two worse looks end it before the last.
    assert trained.quality == 0.895
    assert [row["step"] for row in trained.history] == [2, 4, 6, 8, 10]


def test_a_trunk_is_taken_over(encoder):
    config = _decoder(encoder)
    trunk = nnx.state(Decoder(config, rngs=nnx.Rngs(7)))
    scorer = untrained(ScorerConfig(decoder=config), encoder, seed=0, trunk=trunk)
    model = nnx.merge(scorer.graphdef, scorer.params)
    np.testing.assert_array_equal(model.scalar.trunk.embedding[...], trunk["embedding"][...])
    with pytest.raises(ValueError, match="a trunk needs a decoder"):
        untrained(ScorerConfig(), encoder, seed=0, trunk=trunk)


def test_scale_moves_no_boundary_and_limits_hold(encoder):
    scorer = _randomised(untrained(ScorerConfig(), encoder, seed=0))
    prompts, answers = ["q"] * 8, WORDS
    raw = scorer(prompts, answers)
    scaled = scorer.normalised(raw, to=2.0)
    assert np.mean(scaled(prompts, answers) ** 2) == pytest.approx(4.0, rel=1e-4)
    np.testing.assert_array_equal(np.sign(scaled(prompts, answers)), np.sign(raw))
    assert np.abs(scaled.replace(limit=0.1)(prompts, answers)).max() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no scale"):
        scorer.normalised(np.zeros(3, np.float32))


def test_one_program_serves_every_number_of_rows(encoder):
    from jaxrl.rewards.learned import _apply

    scorer = untrained(ScorerConfig(buckets=2**9), encoder, seed=0).replace(batch=4)
    scorer(["q"], ["calm"])
    before = _apply._cache_size()
    for rows in (2, 4, 5, 9):
        assert scorer(["q"] * rows, ["calm"] * rows).shape == (rows,)
    assert _apply._cache_size() == before


def test_long_prompts_keep_their_end_and_completions_their_beginning(encoder):
    prompts = encoder.prompts(["calm " * 30 + "gull", "gull"])
    assert isinstance(prompts, Prompts)
    end = encoder.tokenizer.encode(PLAIN.prompt(" gull"))
    assert prompts.tokens[0, -len(end) :].tolist() == end
    assert prompts.mask.all(1).tolist() == [True, False]
    _, mask = encoder.completions(["calm " * 30, "gull"])
    assert mask.all(-1).ravel().tolist() == [True, False]


def test_examples_hold_each_sequence_once():
    found = ex.cost_examples(
        [
            SimpleNamespace(prompt="p", better="a", worse="b", better_is_unsafe=False,
                            worse_is_unsafe=True),
            SimpleNamespace(prompt="p", better="a", worse="c", better_is_unsafe=None,
                            worse_is_unsafe=True),
        ]
    )  # fmt: skip
    assert found.completions == ("a", "b", "c")
    assert found.groups.tolist() == [[0, 1], [0, 2]]
    assert found.targets.tolist() == [[-1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ScorerConfig(ngrams=0), "a decoder or n-grams"),
        (lambda: ScorerConfig(buckets=1000), "power of two"),
        (lambda: TrainingConfig(steps=0), "steps must be at least 1"),
        (lambda: TrainingConfig(dropout=1.0), "dropout is a share"),
        (lambda: TrainingConfig(tolerance=-0.1), "tolerance must not be negative"),
        (lambda: ex.cost_examples([]), "rows of one size"),
        (lambda: ex.auc(np.ones((2, 1)), np.ones((2, 1))), "needs both classes"),
    ],
)
def test_wrong_values_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_calls_of_a_scorer(encoder):
    scorer = untrained(ScorerConfig(), encoder, seed=0)
    with pytest.raises(ValueError, match="one prompt a completion"):
        scorer(["q"], ["a", "b"])
    with pytest.raises(ValueError, match="must be positive"):
        scorer.replace(scale=-1.0)
