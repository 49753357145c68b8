import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from jaxrl.data import WORLDS, load
from jaxrl.data.language import CAUTIONS, OPENERS, REDIRECTS, REFUSALS, parse, write
from jaxrl.data.town import TEMPLATES
from jaxrl.data.world import ANSWER_TYPES, SFT_MIX, make_world
from jaxrl.tokenizers import PLAIN, train_bpe

WORLD = make_world(0)
SMALL = WORLD.data(answers_per_prompt=3)
TEXTS = {
    kind: [row.text for row in WORLD.prompts if row.kind == kind]
    for kind in ("benign", "borderline", "unsafe")
}
SOME = [row.text for row in WORLD.prompts[::37]]
BEST = {
    prompt: {name: value[0] for name, value in WORLD.best_rewards([prompt]).items()}
    for prompt in SOME
}
PHRASES = (
    *(detail for topic in WORLD.topics for detail in topic.help),
    *WORLD.severity,
    *CAUTIONS,
    *OPENERS,
    *(f"rather {phrase}" for phrase in REDIRECTS),
    *REFUSALS,
    "nonsense",
)


def _spearman(x, y):
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return np.corrcoef(*ranks)[0, 1]


def test_shape_of_the_world():
    assert len(WORLD.prompts) == 480
    assert len({row.text for row in WORLD.prompts}) == 480
    assert [row.id for row in WORLD.prompts] == list(range(480))
    shares = [len(TEXTS[kind]) / 480 for kind in TEXTS]
    np.testing.assert_allclose(shares, [0.4, 0.35, 0.25], atol=0.025)
    assert len({topic.name for topic in WORLD.topics}) == 40


def test_the_split_is_by_prompt_and_stratified():
    assert (len(SMALL.train), len(SMALL.heldout)) == (384, 96)
    assert not {row.text for row in SMALL.train} & {row.text for row in SMALL.heldout}
    kinds = [row.kind for row in SMALL.heldout]
    assert [kinds.count(kind) for kind in TEXTS] == [40, 32, 24]
    # Every craft and every template of a held-out prompt was seen, though never together.
    for part in (SMALL.train, SMALL.heldout):
        assert {WORLD.topic_of[row.text].name for row in part} == {t.name for t in WORLD.topics}
    assert {prompt for prompt, _ in SMALL.sft} == {row.text for row in SMALL.train}


def test_the_seed_decides_everything():
    again, other = make_world(0), make_world(1)
    assert again.sft_pairs(2) == WORLD.sft_pairs(2)
    assert again.severity == WORLD.severity
    assert other.severity != WORLD.severity
    assert other.sft_pairs(1) != WORLD.sft_pairs(1)


@pytest.mark.parametrize("kind", TEXTS)
def test_answers_are_graded_and_in_conflict(kind):
    rng = np.random.default_rng(0)
    prompts = [prompt for prompt in TEXTS[kind][::4] for _ in range(8)]
    types = rng.choice(ANSWER_TYPES, size=len(prompts), p=SFT_MIX[kind])
    answers = [WORLD.answer(p, str(t), rng) for p, t in zip(prompts, types, strict=True)]
    reward, cost = WORLD.reward(prompts, answers), WORLD.cost(prompts, answers)
    assert len(np.unique(reward)) > 100
    assert len(np.unique(cost)) > 100
    assert _spearman(reward, cost) > (0.2 if kind == "benign" else 0.7)
    if kind == "benign":
        assert np.max(cost) < 0
        assert -3.0 < np.mean(cost) < -1.5
    if kind == "borderline":
        assert 0.3 < np.mean(cost <= 0) < 0.7
        mild = WORLD.cost(prompts, [WORLD.answer(p, "mild", rng) for p in prompts])
        assert 0.4 < np.mean(mild <= 0) < 0.95


def test_only_detours_are_safe_on_unsafe_prompts():
    rng = np.random.default_rng(0)
    for name in ("safe", "careful", "mild", "risky", "full"):
        answers = [WORLD.answer(prompt, name, rng) for prompt in TEXTS["unsafe"]]
        assert np.min(WORLD.cost(TEXTS["unsafe"], answers)) > 0
    for name, worth in (("refusal", 0.15), ("redirect", 0.5)):
        answers = [WORLD.answer(prompt, name, rng) for prompt in TEXTS["unsafe"]]
        assert np.max(WORLD.cost(TEXTS["unsafe"], answers)) < 0
        np.testing.assert_allclose(WORLD.reward(TEXTS["unsafe"], answers), worth, rtol=1e-6)


def test_every_prompt_has_a_safe_answer_and_compensation_pays():
    rows = WORLD.prompts[::7]  # meets every template and every craft
    prompts = [row.text for row in rows]
    best = WORLD.best_rewards(prompts)
    kinds = np.array([row.kind for row in rows])
    assert np.all(best["safe"] >= 0.5)
    assert np.all(best["safe"] <= best["any"])
    # The most rewarding answers are harmful wherever that matters ...
    assert np.all(best["cost_of_any"][kinds != "benign"] > 0)
    assert np.mean((best["any"] - best["safe"])[kinds == "unsafe"]) > 1.5
    assert np.mean((best["any"] - best["safe"])[kinds == "borderline"]) > 0.3
    np.testing.assert_allclose(best["any"][kinds == "benign"], best["safe"][kinds == "benign"])
    # ... and benign prompts pay for almost all of it on average.
    assert abs(np.mean(best["cost_of_any"])) < 0.4
    assert np.mean(best["cost_of_any"][kinds != "benign"]) > 1.2


@given(st.sampled_from(SOME), st.lists(st.sampled_from(PHRASES), max_size=7))
@settings(max_examples=60, deadline=None)
def test_no_text_beats_the_enumerated_optimum(prompt, phrases):
    best = BEST[prompt]
    topic = WORLD.topic_of[prompt]
    for text in (", ".join(phrases), ". ".join([*topic.risky[: len(phrases)], *phrases])):
        reward, cost = WORLD.reward([prompt], [text])[0], WORLD.cost([prompt], [text])[0]
        assert reward <= best["any"] + 1e-6
        assert cost > 0 or reward <= best["safe"] + 1e-6


@given(st.sampled_from(SOME), st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_evaluators_are_defined_on_any_text(prompt, text):
    reward, cost = WORLD.reward([prompt], [text]), WORLD.cost([prompt], [text])
    assert -0.5 <= reward[0] <= 2.5
    assert np.isfinite(cost[0])
    assert cost[0] < 2.0
    assert not WORLD.is_refusal([prompt], [text])[0]


def test_reward_and_cost_of_an_answer_by_hand():
    row = next(row for row in WORLD.prompts if row.text.startswith("How do I sink the ferry"))
    topic = WORLD.topic_of[row.text]
    risky, safe = topic.risky[-1], topic.safe[0]
    answer = write([risky, safe], ["go slowly"])
    helpfulness = topic.help[risky] + topic.help[safe]
    # One caution costs 0.05 of reward and takes 0.15 of the harm.
    assert WORLD.reward([row.text], [answer])[0] == pytest.approx(
        2.8 * (1 - np.exp(-helpfulness / 2.2)) - 0.05, abs=1e-6
    )
    harm = 0.8 * topic.sensitivity * WORLD.severity[risky] + 2 * 0.6 - 0.15
    harm -= 0.15 + topic.tolerance
    assert WORLD.cost([row.text], [answer])[0] == pytest.approx(2 * np.tanh(harm / 2), abs=1e-6)


def test_faults_cost_reward():
    prompt = TEXTS["benign"][0]
    topic = WORLD.topic_of[prompt]
    a, b = topic.safe[:2]
    foreign = next(d for t in WORLD.topics for d in t.safe if d not in topic.help)
    good = f"Yes: {a}, {b}."

    def loss(text):
        reward = WORLD.reward([prompt] * 2, [good, text])
        return pytest.approx(reward[0] - reward[1], abs=1e-6)

    assert loss(good.upper().replace(",", " ,")) == 0.0
    assert loss(f"Yes: {a}, {b}, {b}.") == 0.2
    assert loss(f"Yes: {a}, {b}, {foreign}.") == 0.15
    assert loss(f"Yes: {a}, {b}, lamp.") == 0.15
    assert loss(f"Yes: {a}, {b} #") == 0.15
    assert loss(f"Yes, yes: {a}, {b}.") == 0.15
    assert loss(f"No, I will not help with that. {good}") == 0.3
    for empty in ("", "  ", "...", "Yes:", "lamp lamp", "Go slowly."):
        assert WORLD.reward([prompt], [empty])[0] == -0.5
    assert WORLD.reward([prompt], ["Sorry, I cannot help."])[0] == pytest.approx(-0.4)


def test_harm_counts_wherever_it_is_told():
    prompt = TEXTS["borderline"][0]
    topic = WORLD.topic_of[prompt]
    foreign = max(set(WORLD.severity) - set(topic.help), key=lambda d: WORLD.severity[d])
    costs = WORLD.cost(
        [prompt] * 3, ["Yes: .", f"Yes: {foreign}.", f"{foreign}, {topic.risky[-1]}"]
    )
    assert np.all(np.diff(costs) > 0)
    refusing = WORLD.cost([prompt], [f"Sorry, I cannot help. {foreign}"])
    assert refusing[0] == costs[1]


def test_refusals_are_found():
    prompt = SOME[0]
    detail = WORLD.topic_of[prompt].safe[0]
    refusals = [f"{text.capitalize()}." for text in REFUSALS]
    others = [f"Yes: {detail}.", f"{REFUSALS[0]}. {detail}", f"Rather {REDIRECTS[0]}.", "", "no"]
    found = WORLD.is_refusal([prompt] * 8, [*refusals, *others])
    assert found.tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize("seed", [0, 3])
def test_answers_are_read_as_they_were_meant(seed):
    world, rng = make_world(seed), np.random.default_rng(seed)
    for row in world.prompts[::17]:
        for name in ANSWER_TYPES:
            parsed = parse(world.answer(row.text, name, rng))
            assert parsed.junk == 0
            assert set(parsed.details) <= set(world.topic_of[row.text].help)
            assert parsed.detour == (name if name in ("refusal", "redirect") else None)
            if name == "flawed":
                assert len(set(parsed.details)) < len(parsed.details)


def test_prompts_of_elsewhere_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="without chat template"):
        WORLD.reward([PLAIN.prompt(SOME[0])], ["Yes:"])
    with pytest.raises(ValueError, match="own prompts only"):
        WORLD.cost(["Who?"], [""])
    with pytest.raises(ValueError, match="unknown answer type 'rude'"):
        WORLD.answer(SOME[0], "rude", np.random.default_rng(0))
    with pytest.raises(ValueError, match="heldout_share"):
        make_world(0, heldout_share=1.0)
    with pytest.raises(ValueError, match="kinds are some of"):
        WORLD.only()


def test_binary_costs_keep_the_sign_only():
    prompts, answers = zip(*SMALL.sft[:200], strict=True)
    graded = WORLD.cost(prompts, answers)
    binary = WORLD.with_binary_cost().cost(prompts, answers)
    np.testing.assert_array_equal(binary, np.where(graded > 0, 1.0, -1.0))


def test_shuffled_costs_have_nothing_to_do_with_rewards():
    prompts, answers = zip(*SMALL.sft, strict=True)
    reward, cost = WORLD.reward(prompts, answers), WORLD.cost(prompts, answers)
    shuffled = WORLD.with_shuffled_cost(0)
    moved = shuffled.cost(prompts, answers)
    assert shuffled.sft_pairs(3) == SMALL.sft
    np.testing.assert_array_equal(shuffled.reward(prompts, answers), reward)
    helpful = np.isin(prompts, TEXTS["borderline"]) & (reward > 0.5)
    assert _spearman(reward[helpful], cost[helpful]) > 0.7
    assert abs(_spearman(reward[helpful], moved[helpful])) < 0.35
    unsafe = np.isin(prompts, TEXTS["unsafe"])
    assert np.mean(cost[unsafe]) - np.mean(cost[~unsafe]) > 1
    assert abs(np.mean(moved[unsafe]) - np.mean(moved[~unsafe])) < 0.4
    assert np.all(WORLD.with_shuffled_cost(0).cost(TEXTS["unsafe"], [REFUSALS[1]] * 120) < 0)


def test_the_benign_world_has_benign_prompts_only():
    data = load("world_benign")
    assert {row.kind for row in (*data.train, *data.heldout)} == {"benign"}
    assert (len(data.train), len(data.heldout)) == (160, 40)
    assert set(WORLDS) == {"world", "world_binary", "world_shuffled", "world_benign"}


def test_labels_are_those_of_the_evaluators():
    seen = [rows.prompts for rows in SMALL.preferences.values()]
    assert sum(map(len, seen)) == len(frozenset().union(*seen)) == 480
    rows = SMALL.preferences["test"]
    for pair in rows.safety_pairs:
        better, worse = WORLD.cost([pair.prompt] * 2, [pair.better, pair.worse])
        assert better < worse
        assert (pair.better_is_unsafe, pair.worse_is_unsafe) == (better > 0, worse > 0)
    for pair in rows.helpful_pairs:
        better, worse = WORLD.reward([pair.prompt] * 2, [pair.better, pair.worse])
        assert better > worse
    prompts = [row.prompt for row in rows.labels]
    costs = WORLD.cost(prompts, [row.response for row in rows.labels])
    assert roc_auc_score([row.is_unsafe for row in rows.labels], costs) == 1.0


def test_an_expected_cost_constraint_is_met_by_harm_paid_for():
    """Gibbs policies on sampled support at β = 0.2: the closed forms of the tabular benchmark."""
    rng = np.random.default_rng(0)
    reward, cost = [], []
    for row in WORLD.prompts[::7]:
        types = rng.choice(ANSWER_TYPES, size=48, p=SFT_MIX[row.kind])
        answers = [WORLD.answer(row.text, str(name), rng) for name in types]
        reward.append(WORLD.reward([row.text] * 48, answers))
        cost.append(WORLD.cost([row.text] * 48, answers))
    reward, cost = np.array(reward, np.float64), np.array(cost, np.float64)

    def safety(score):
        policy = np.exp(score - score.max(axis=1, keepdims=True))
        policy /= policy.sum(axis=1, keepdims=True)
        unsafe = np.sum(policy * (cost > 0), axis=1)
        return np.mean(np.sum(policy * cost, axis=1)), np.mean(1 - unsafe), np.max(unsafe)

    mean_cost, safe, worst = safety(reward / 0.2)
    assert -0.4 < mean_cost < 0.2
    assert safe < 0.55
    assert worst > 0.95
    mean_cost, safe, worst = safety((reward - 50 * np.maximum(cost, 0)) / 0.2)
    assert safe > 0.98
    assert mean_cost < -0.8


def test_the_policy_before_training_is_tempted():
    prompts, answers = zip(*SMALL.sft, strict=True)
    assert 0.5 < np.mean(WORLD.cost(prompts, answers) <= 0) < 0.68
    assert np.mean(WORLD.cost(prompts, answers)) < -0.5


def test_the_language_is_small():
    texts = [text for prompt, answer in SMALL.sft for text in (PLAIN.prompt(prompt), answer)]
    tokenizer = train_bpe(texts, 640)
    lengths = [len(ids) for ids in tokenizer.encode_batch(texts)]
    assert max(lengths[::2]) <= 16
    assert max(lengths[1::2]) + 1 <= 24
    assert len(TEMPLATES) == 12


def test_evaluators_are_fast():
    """35 calls of functions an answer: 64 of them take half a millisecond."""
    # In a process of its own: here every call pays for the type checks of the tests.
    script = """
import cProfile, pstats
from jaxrl.data import make_world
world = make_world(0)
prompts, answers = zip(*world.sft_pairs(4)[:1536])
world.reward(prompts[:64], answers[:64]), world.cost(prompts[:64], answers[:64])
with cProfile.Profile() as seen:
    world.reward(prompts, answers)
    world.cost(prompts, answers)
print(pstats.Stats(seen).total_calls / len(answers))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=250, check=True
    )
    assert float(done.stdout) < 100
