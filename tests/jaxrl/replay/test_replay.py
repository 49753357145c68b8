"""Replay: check e of the TBA specification, a naive model, and save and restore."""

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.checkpoint import Checkpointer
from jaxrl.replay import EmptyReplay, Replay, ReplayConfig, reward_score, safe_reward_score
from jaxrl.types import REFERENCE_VERSION, Prompts, Rollouts

T = 3


def rollouts(groups, *, version=0, reward=None, cost=None):
    """Rollouts of {prompt id: completions}, a completion being a tuple of 1 to T tokens.

    The reward of a completion is its first token unless a function is given.
    """
    ids = np.asarray(list(groups), np.int32)
    size = {len(g) for g in groups.values()}
    assert len(size) == 1
    shape = (len(groups), size.pop(), T)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    rewards, costs = np.zeros(shape[:2], np.float32), np.zeros(shape[:2], np.float32)
    for b, group in enumerate(groups.values()):
        for g, completion in enumerate(group):
            tokens[b, g, : len(completion)] = completion
            mask[b, g, : len(completion)] = True
            rewards[b, g] = (reward or (lambda c: c[0]))(completion)
            costs[b, g] = (cost or (lambda c: -1.0))(completion)
    versions = np.where(mask, version, 0).astype(np.int32)
    return Rollouts(
        prompts=Prompts(
            tokens=np.stack([np.array([0, 100 + i], np.int32) for i in ids]),
            mask=np.tile([False, True], (len(ids), 1)),
            ids=ids,
        ),
        tokens=tokens,
        mask=mask,
        behaviour_log_probs=np.where(mask, -0.5 - tokens, 0).astype(np.float32),
        reference_log_probs=np.where(mask, -0.25 - tokens, 0).astype(np.float32),
        policy_version=versions,
        rewards={"reward": rewards},
        costs={"cost": costs},
    )


def contents(batch):
    """The completions of a batch, as tuples, by place."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    return [
        [tuple(t[m].tolist()) for t, m in zip(tokens[b], mask[b], strict=True)]
        for b in range(len(tokens))
    ]


def only(**options):
    """A replay that draws by score alone, uniformly unless told otherwise."""
    return Replay(
        ReplayConfig(**{"recent_share": 0.0, "inverse_temperature": 0.0} | options), seed=0
    )


# ----------------------------------------------------------- check e of the specification


def test_a_duplicate_keeps_the_newest_version():
    replay = only()
    replay.add(rollouts({7: [(1, 2), (3,)]}, version=0), 0)
    replay.add(rollouts({7: [(1, 2), (4,)]}, version=5), 5)
    replay.add(rollouts({7: [(4,), (4,)]}, version=2), 2)  # late, and twice
    found = {tuple(r.tokens.tolist()): (r.iteration, r.version) for r in replay.buffer(7).records}
    assert found == {(1, 2): (5, 5), (3,): (0, 0), (4,): (5, 5)}


def test_padding_does_not_make_two_completions_of_one_but_length_does():
    replay = only()
    replay.add(rollouts({0: [(1,), (1, 0), (1, 0, 0)]}), 0)
    assert len(replay.buffer(0).records) == 3


def test_capacity_evicts_the_oldest():
    replay = only(capacity=3)
    replay.add(rollouts({0: [(1,), (2,)]}), 0)
    replay.add(rollouts({0: [(3,), (4,)]}, version=1), 1)
    assert [r.tokens.tolist() for r in replay.buffer(0).records] == [[2], [3], [4]]
    replay.add(rollouts({0: [(5,), (6,)]}, version=0), 0)  # late: older than what is kept
    assert [r.tokens.tolist() for r in replay.buffer(0).records] == [[6], [3], [4]]


def test_with_m_1_every_record_has_the_last_syncs_tag():
    replay = Replay(ReplayConfig(recent_share=1.0), seed=3)
    replay.add(rollouts({i: [(1,), (2,)] for i in range(5)}, version=0), 0)
    replay.add(rollouts({i: [(3,), (4,)] for i in (1, 4)}, version=8), 8)
    batch = replay.sample(6, 2, 9)
    assert set(np.asarray(batch.policy_version)[np.asarray(batch.mask)].tolist()) == {8}
    assert sorted(np.asarray(batch.prompts.ids).tolist()) == [1, 1, 1, 4, 4, 4]


def test_inverse_temperature_0_is_uniform_and_1_is_the_softmax_of_the_scores():
    completions = [(r,) for r in range(4)]
    for inverse_temperature in (0.0, 1.0):
        replay = only(inverse_temperature=inverse_temperature)
        replay.add(rollouts({0: completions}), 0)
        counts = Counter(place[0] for place in contents(replay.sample(4000, 1, 0)))
        weights = np.exp(inverse_temperature * np.arange(4))
        expected = weights / weights.sum()
        shares = np.array([counts[completion] for completion in completions]) / 4000
        # Four standard errors of a share of 4,000 draws.
        assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_the_recent_draws_are_never_staler_than_2k_minus_1():
    """A sync every k updates brings what the policy of the sync before it wrote."""
    k = 4
    replay = Replay(ReplayConfig(recent_share=1.0), seed=0)
    staleness = []
    for update in range(5 * k):
        if update % k == 0:
            written_by = max(update - k, 0)  # published at the last sync, merged at this one
            fresh = {i: [(update + 1,), (update + 2,)] for i in range(3)}
            replay.add(rollouts(fresh, version=written_by), written_by)
        batch = replay.sample(2, 2, update)
        staleness += (update - np.asarray(batch.policy_version)[np.asarray(batch.mask)]).tolist()
    assert max(staleness) == 2 * k - 1


# ------------------------------------------------------------------------- other promises


def test_records_are_drawn_without_replacement_unless_there_are_too_few():
    replay = only()
    replay.add(rollouts({0: [(1,), (2,), (3,)]}), 0)
    for place in contents(replay.sample(20, 3, 0)):
        assert sorted(place) == [(1,), (2,), (3,)]
    assert any(len(set(place)) < 3 for place in contents(replay.sample(20, 4, 0)))


def test_prompts_take_turns():
    replay = only()
    replay.add(rollouts({i: [(1,), (2,)] for i in range(5)}), 0)
    ids = np.asarray(replay.sample(15, 1, 0).prompts.ids).reshape(3, 5)
    assert [sorted(row) for row in ids.tolist()] == [list(range(5))] * 3
    assert len({tuple(row) for row in ids.tolist()}) > 1


def test_m_is_the_share_of_recent_places():
    replay = Replay(ReplayConfig(recent_share=0.7, inverse_temperature=0.0), seed=1)
    replay.add(rollouts({0: [(1,)] * 2, 1: [(1,)] * 2}), 0)
    replay.add(rollouts({2: [(1,)] * 2, 3: [(1,)] * 2}, version=1), 1)
    ids = np.asarray(replay.sample(4000, 1, 1).prompts.ids)
    # The other 30 % take turns among all four prompts.
    assert np.mean(ids >= 2) == pytest.approx(0.7 + 0.15, abs=4 * np.sqrt(0.25 / 4000))


def test_stale_records_are_dropped_and_the_references_are_not():
    replay = only(max_staleness=3)
    replay.add(rollouts({0: [(1,), (2,)], 1: [(5,), (6,)]}, version=2), 2)
    replay.add(rollouts({0: [(3,), (4,)]}, version=REFERENCE_VERSION), 2)
    assert len(replay) == 6
    replay.sample(1, 1, 5)
    assert len(replay) == 6
    drawn = contents(replay.sample(10, 2, 6))
    assert {c for place in drawn for c in place} == {(3,), (4,)}
    assert replay.prompt_ids == (0,)
    replay = only(max_staleness=0)
    replay.add(rollouts({0: [(1,)]}, version=2), 2)
    with pytest.raises(EmptyReplay, match=r"update 3 \(max_staleness=0\)"):
        replay.sample(1, 1, 3)


def test_what_comes_out_is_what_went_in():
    replay = only()
    went_in = rollouts({4: [(1, 2), (3,)], 9: [(5, 6, 7), (8,)]}, version=3)
    replay.add(went_in, 3)
    batch = replay.sample(2, 2, 3)
    for b, prompt_id in enumerate(np.asarray(batch.prompts.ids).tolist()):
        source = went_in.prompts.ids.tolist().index(prompt_id)
        np.testing.assert_array_equal(batch.prompts.tokens[b], went_in.prompts.tokens[source])
        np.testing.assert_array_equal(batch.prompts.mask[b], went_in.prompts.mask[source])
        for g in range(2):
            row = [
                i for i in range(2)
                if (went_in.tokens[source, i] == np.asarray(batch.tokens[b, g])).all()
            ]  # fmt: skip
            assert len(row) == 1
            for name in ("mask", "behaviour_log_probs", "reference_log_probs", "policy_version"):
                stored, given_ = getattr(batch, name)[b, g], getattr(went_in, name)[source, row[0]]
                np.testing.assert_array_equal(stored, given_)
                assert stored.dtype == given_.dtype
            assert float(batch.reward[b, g]) == float(went_in.rewards["reward"][source, row[0]])
            assert float(batch.cost[b, g]) == -1.0


def test_completions_without_tokens_are_left_out():
    batch = rollouts({0: [(1,), (2,)]})
    batch.mask[0, 1] = False
    replay = only()
    replay.add(batch, 0)
    assert len(replay) == 1


def test_safe_answers_come_first():
    score = partial(safe_reward_score, penalty=100.0)
    replay = only(inverse_temperature=1.0, score=score)
    replay.add(rollouts({0: [(1,), (2,), (9,)]}, cost=lambda c: c[0] - 5.0), 0)
    assert {c for place in contents(replay.sample(50, 1, 0)) for c in place} == {(1,), (2,)}
    np.testing.assert_array_equal(reward_score({"reward": np.float32([2])}, {}), [2.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"recent_share": 1.5}, "recent_share is a probability"),
        ({"inverse_temperature": -1.0}, "inverse_temperature must be finite"),
        ({"max_staleness": -1}, "max_staleness must be ≥ 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReplayConfig(**options)


def test_what_cannot_be_replayed_is_refused():
    replay = only()
    with pytest.raises(EmptyReplay, match="add rollouts first"):
        replay.sample(1, 1, 0)
    replay.add(rollouts({0: [(1,)]}), 0)
    other = rollouts({0: [(1,)]})
    with pytest.raises(ValueError, match=r"same scores.*pad them alike"):
        replay.add(other.replace(costs={"cost": other.cost, "judge": other.cost}), 0)
    with pytest.raises(ValueError, match="greedy baseline"):
        replay.add(other.replace(greedy={"reward": np.zeros(1, np.float32)}), 0)
    with pytest.raises(ValueError, match="num_prompts=0"):
        replay.sample(0, 1, 0)


# ------------------------------------------------------------------ against a naive model

SYNCS = st.lists(
    st.tuples(
        st.integers(0, 6),  # tag
        st.dictionaries(
            st.integers(0, 3),
            st.lists(
                st.lists(st.integers(1, 3), min_size=1, max_size=T).map(tuple),
                min_size=2,
                max_size=2,
            ),
            min_size=1,
        ),
    ),
    min_size=1,
    max_size=8,
)


def naive(syncs, capacity):
    """{prompt: [(completion, tag)]} by the definition, looking at the whole history."""
    found = {}
    for prompt in {p for _, groups in syncs for p in groups}:
        kept = []
        # The history of the prompt in order of arrival, replayed from the start each time.
        for tag, groups in syncs:
            for completion in groups.get(prompt, []):
                rivals = [k for k in kept if k[0] == completion]
                if rivals and rivals[0][1] > tag:
                    continue
                kept = [k for k in kept if k[0] != completion]
                place = sum(k[1] <= tag for k in kept)
                kept.insert(place, (completion, tag))
            kept = kept[-capacity:] if prompt in groups else kept
        found[prompt] = kept
    return found


@settings(max_examples=150, deadline=None)
@given(syncs=SYNCS, capacity=st.integers(1, 5), seed=st.integers(0, 3))
def test_buffers_hold_what_the_definition_says(syncs, capacity, seed):
    replay = Replay(ReplayConfig(capacity=capacity, recent_share=0.5), seed=seed)
    for tag, groups in syncs:
        replay.add(rollouts(groups, version=tag), tag)
    expected = naive(syncs, capacity)
    held = {
        p: [(tuple(r.tokens.tolist()), r.iteration) for r in replay.buffer(p).records]
        for p in replay.prompt_ids
    }
    assert held == expected
    assert len(replay) == sum(map(len, expected.values()))
    newest = max(tag for tag, _ in syncs)
    batch = replay.sample(5, 2, newest)
    for prompt, place in zip(np.asarray(batch.prompts.ids).tolist(), contents(batch), strict=True):
        assert set(place) <= {completion for completion, _ in expected[prompt]}
        if len(expected[prompt]) >= 2 and len(set(place)) < 2:  # only a small sync may repeat
            assert sum(tag == newest for _, tag in expected[prompt]) == 1


@settings(max_examples=60, deadline=None)
@given(syncs=SYNCS, cut=st.integers(0, 8), seed=st.integers(0, 3))
def test_a_restored_replay_goes_on_as_the_saved_one(syncs, cut, seed):
    config = ReplayConfig(capacity=4, recent_share=0.5)

    def advance(replay, part):
        drawn = []
        for tag, groups in part:
            replay.add(rollouts(groups, version=tag), tag)
            drawn.append(replay.sample(3, 2, tag))
        return drawn

    straight = Replay(config, seed=seed)
    advance(straight, syncs[:cut])
    state = straight.state_dict()
    state = {"arrays": state["arrays"], "metadata": json.loads(json.dumps(state["metadata"]))}
    resumed = Replay(config, seed=seed + 100)
    resumed.load(state)
    assert resumed.state_dict()["metadata"] == straight.state_dict()["metadata"]
    for one, other in zip(
        advance(straight, syncs[cut:]), advance(resumed, syncs[cut:]), strict=True
    ):
        assert contents(one) == contents(other)
        np.testing.assert_array_equal(one.prompts.ids, other.prompts.ids)
        np.testing.assert_array_equal(one.behaviour_log_probs, other.behaviour_log_probs)


def test_a_checkpoint_holds_it(tmp_path):
    replay = Replay(seed=0)
    replay.add(rollouts({0: [(1,), (2, 3)], 2: [(4,), (5, 6, 7)]}), 0)
    replay.sample(3, 2, 0)
    with Checkpointer(tmp_path) as checkpoints:
        state = replay.state_dict()
        checkpoints.save(
            1, {"w": np.ones(2), "replay": state["arrays"]}, metadata={"replay": state["metadata"]}
        )
        found = checkpoints.restore_latest(
            lambda metadata: {"w": np.zeros(2), "replay": Replay.template(metadata["replay"])}
        )
    assert found is not None
    restored = Replay(seed=9)
    restored.load({"arrays": found.tree["replay"], "metadata": found.metadata["replay"]})
    for _ in range(3):
        one, other = replay.sample(4, 2, 1), restored.sample(4, 2, 1)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.rewards["reward"], other.rewards["reward"])
    empty = Replay(seed=0)
    empty.load(Replay(seed=5).state_dict())
    assert len(empty) == 0


def test_a_batch_knows_the_best_safe_answer_of_each_prompt():
    """Also where it is not in the group drawn: rewards 1 and 2 are safe, 9 is not, at C = R − 5."""
    replay = only(margin=2.5)
    replay.add(
        rollouts({0: [(1,), (2,), (9,)], 3: [(8,), (9,), (7,)]}, cost=lambda c: c[0] - 5.0), 0
    )
    batch = replay.sample(6, 1, 0)
    expected = {0: 2.0, 3: -np.inf}
    ids = batch.prompts.ids.tolist()
    assert batch.best_safe.tolist() == [expected[i] for i in ids]
    strict = only(margin=3.5)
    strict.add(rollouts({0: [(1,), (2,)]}, cost=lambda c: c[0] - 5.0), 0)
    assert strict.sample(1, 1, 0).best_safe.tolist() == [1.0]
