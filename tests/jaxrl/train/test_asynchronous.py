"""The asynchronous loop: it is the synchronous one at staleness 0, and bounded beyond."""

import dataclasses
import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl import recipes
from jaxrl.actors import Actor, PoolConfig, RolloutChecks, Threads
from jaxrl.actors.ledger import Ledger
from jaxrl.data.batches import PromptSet
from jaxrl.learner import Learner, OptimizerConfig, lm_apply, lm_optimizer
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.replay import RECTIFIED, EmptyReplay, Replay, ReplayConfig
from jaxrl.rollouts import Collector, Sampling, Scorer
from jaxrl.sync import MemoryStore, Publisher, Subscriber
from jaxrl.sync.manifest import read_manifest
from jaxrl.tokenizers import PLAIN, train_bpe
from jaxrl.train import AsynchronousTrainer, NonFiniteUpdates, TooManyRefusals, Trainer
from kernels import sparse_delta

TEXTS = ("one", "two words", "three", "four more", "five", "six", "seven")
TOKENIZER = train_bpe(TEXTS * 3, 270)
PROMPTS = PromptSet.encode(TOKENIZER, TEXTS, PLAIN, max_len=10)
CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, embed=8, heads=2, kv_heads=1, head_dim=4, mlp=8,
    max_len=16, remat="none",
)  # fmt: skip
GRAPHDEF, PARAMS = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
COLLECTOR = Collector(
    graphdef=GRAPHDEF,
    sampling=Sampling(max_new_tokens=4, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id),
    group_size=4,
    reference_completions=2,
)
LEARNER = Learner(
    recipe=recipes.get("repo_tb", group_size=4),
    apply=lm_apply(GRAPHDEF, None, temperature=1.0),
    optimizer=lm_optimizer(OptimizerConfig(learning_rate=1e-2)),
)
CHECKS = RolloutChecks(
    prompts=PROMPTS, group_size=4, completion_len=4, vocab_size=TOKENIZER.vocab_size
)


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def vowels(prompts, completions):
    return np.array([sum(map(text.count, "aeiou")) - 0.5 for text in completions])


def scorer(reward=length):
    return Scorer(
        tokenizer=TOKENIZER, prompts=PROMPTS, rewards={"reward": reward}, costs={"cost": vowels}
    )


def trainer(
    actors=1, *, reward=length, before=None, config=None, store=None, reference=2, **options
):
    """A trainer over threads; `before(name)` may be called by an actor before each rollout."""
    store = store or MemoryStore()

    def build(name):
        subscriber = Subscriber(
            store, run_id="test", like=jax.eval_shape(lambda: PARAMS), name=name
        )
        actor = Actor(
            name=name,
            collector=dataclasses.replace(COLLECTOR, reference_completions=reference),
            scorer=scorer(reward),
            prompts=PROMPTS,
            reference=PARAMS,
            subscriber=subscriber,
        )
        if before is not None:
            write = actor.write

            def delayed(item):
                before(name)
                return write(item)

            actor.write = delayed
        return actor

    return AsynchronousTrainer(
        learner=options.pop("learner", LEARNER),
        pool=Threads(actors, build, config=config),
        publisher=Publisher(store, run_id="test"),
        checks=CHECKS,
        prompts_per_item=2,
        seed=3,
        **{"max_staleness": 0, "stall_s": 60.0} | options,
    )


def started(learner=LEARNER):
    return learner.init({"policy": PARAMS}, num_prompts=len(PROMPTS))


class HeldStore(MemoryStore):
    """Holds all versions but the first back until it is opened; notes who writes which."""

    def __init__(self):
        super().__init__()
        self.holding, self.opened = threading.Event(), threading.Event()
        self.writers, self.versions, self.under_way, self.most = set(), [], 0, 0

    def put(self, key, data):
        if "/payloads/" in key:
            self.writers.add(threading.current_thread().name)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            if "/payloads/000000000000-" not in key:
                self.holding.set()
                wait(self.opened)
            self.under_way -= 1
        super().put(key, data)
        if "/index/" in key:
            self.versions.append(read_manifest(data).version)


def wait(event):
    """Until somebody sets it; for minutes, that a slow machine may have, and not for ever."""
    if not event.wait(200.0):
        raise TimeoutError("nobody did what was waited for")


def trained(loop, steps, learner=LEARNER):
    rows, refusals, state = [], [], None
    for _, state, metrics, news in loop.run(started(learner), start=0, steps=steps):  # noqa: B007
        rows.append(metrics)
        refusals += news
    return state, rows, refusals


def test_without_staleness_it_is_the_synchronous_loop_bit_for_bit():
    synchronous = Trainer(
        learner=LEARNER, collector=COLLECTOR, scorer=scorer(), prompts=PROMPTS,
        prompts_per_step=2, reference=PARAMS, seed=3,
    )  # fmt: skip
    expected = []
    for _, state, row, _ in synchronous.run(started(), start=0, steps=5):
        expected.append(row)
        whole = jax.tree.map(jnp.copy, state)
    store = HeldStore()
    store.opened.set()
    found, rows, _ = trained(trainer(store=store), 5)
    assert [{k: row[k] for k in expected[0]} for row in rows] == expected
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [row["staleness_max"] for row in rows] == [0.0] * 5
    assert all(0 < row["learner_idle_share"] < 1 for row in rows)
    assert store.versions == [0, 1, 2, 3, 4, 5]
    # What a version cost is known when it is complete, which may be one update later.
    assert any("sync_bytes" in row for row in rows)


def test_one_step_off_writes_the_next_batch_while_the_learner_updates():
    store, begun = HeldStore(), itertools.count(1)

    def noted(prompts, completions):
        if next(begun) == 2:
            store.opened.set()
        return length(prompts, completions)

    _, rows, _ = trained(trainer(store=store, reward=noted, max_staleness=1), 6)
    assert {row["staleness_max"] for row in rows} <= {0.0, 1.0}
    # Item 1 went out before there was a version 1, which is held back until it is written.
    assert rows[1]["staleness_max"] == 1.0
    assert all(row["staleness_1"] == 1.0 for row in rows if row["staleness_max"] == 1.0)


def test_rarer_publications_are_within_the_bound_and_cost_fewer_bytes():
    _, rows, _ = trained(trainer(sync_every=3, max_staleness=2), 7)
    assert [row["staleness_max"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    # Versions 0, 3 and 6; what one cost is known with the update that follows, or the next one.
    assert 2 <= sum("sync_bytes" in row for row in rows) <= 3
    with pytest.raises(ValueError, match=r"max_staleness ≥ sync_every − 1 is needed"):
        trainer(sync_every=3, max_staleness=1)


def test_slow_actors_do_not_hold_up_fast_ones_and_stale_work_is_refused():
    begun, finished = threading.Event(), threading.Event()

    def slow(prompts, completions):
        if threading.current_thread().name == "actor-0" and not finished.is_set():
            begun.set()
            wait(finished)  # it has written with the weights of the beginning
        return length(prompts, completions)

    def before(name):
        if name == "actor-1":
            wait(begun)

    loop = trainer(
        2,
        reward=slow,
        before=before,
        max_staleness=2,
        config=PoolConfig(score_beside=False),
    )
    seen = []
    try:
        for done, _, metrics, refusals in loop.run(started(), start=0, steps=50):
            assert metrics["staleness_max"] <= 2
            seen += refusals
            if done == 7:  # all of the fast one; what the slow one holds is as old as the run
                assert loop.pool.statistics["actor-1"].items >= 7
                assert "actor-0" not in loop.pool.statistics
                finished.set()
                while "actor-0" not in loop.pool.statistics:  # until its answer is in
                    time.sleep(0.01)
            if seen:
                break
    finally:
        finished.set()
    assert (seen[0].reason, seen[0].actor) == ("stale", "actor-0")


def test_the_next_item_is_written_while_the_last_one_is_scored():
    """The first score waits until the one actor there is has begun with the second item."""
    begun, second = itertools.count(), threading.Event()

    def before(name):
        if next(begun) == 1:
            second.set()

    def judge(prompts, completions):
        assert second.wait(60.0)
        return length(prompts, completions)

    loop = trainer(before=before, reward=judge, max_staleness=3)
    _, rows, refusals = trained(loop, 4)
    assert len(rows) == 4
    assert not refusals
    timings = loop.pool.statistics["actor-0"].timings
    assert timings.overlap_s > 0


def test_scores_that_are_not_finite_are_refused_counted_and_not_trained_on():
    calls = iter(range(10_000))

    def sometimes(prompts, completions):
        scores = length(prompts, completions)
        return [np.nan] * len(scores) if next(calls) in (1, 2) else scores

    state, rows, refusals = trained(trainer(reward=sometimes), 4)
    assert [(refusal.item, refusal.reason) for refusal in refusals] == [
        (1, "scores"),
        (2, "scores"),
    ]
    assert "rewards and costs must be finite" in refusals[0].detail
    assert rows[-1]["refused_scores"] == 2.0
    assert int(state.step) == 4
    with pytest.raises(TooManyRefusals, match=r"3 items in a row were refused.*scores"):
        trained(trainer(reward=lambda p, c: [np.inf] * len(c), max_refused=2), 4)


def test_updates_that_are_never_finite_stop_the_run():
    def broken(params, rollouts):
        output = LEARNER.apply(params, rollouts)
        return output.replace(log_probs=output.log_probs * jnp.nan)

    learner = Learner(recipe=LEARNER.recipe, apply=broken, optimizer=LEARNER.optimizer)
    with pytest.raises(NonFiniteUpdates, match="those of the 2 steps up to step 1 are not"):
        trained(trainer(learner=learner, max_refused=1), 5, learner)


def test_an_actor_that_dies_is_replaced_and_its_item_handed_out_again():
    deaths = iter([True, False, True])

    def before(name):
        if next(deaths, False):
            raise RuntimeError("power cut")

    loop = trainer(before=before, config=PoolConfig(backoff_s=0.0))
    found, rows, _ = trained(loop, 4)
    expected, _, _ = trained(trainer(), 4)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert rows[-1]["restarts"] == 2.0
    actor = loop.pool.statistics["actor-0"]
    assert (actor.items, actor.restarts) == (4, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlowLearner(Learner):
    """A learner whose updates take their time, as those of large models do."""

    seconds: float

    def update(self, *args):
        time.sleep(self.seconds)
        return super().update(*args)


def test_the_learner_updates_while_a_version_is_on_its_way():
    store, meanwhile = HeldStore(), 0
    loop = trainer(store=store, max_staleness=32)
    try:
        for _, _, row, _ in loop.run(started(), start=0, steps=200):
            assert 0 <= row["learner_publishing_share"] < 1
            meanwhile += store.holding.is_set()
            if meanwhile == 4:
                store.opened.set()
            if len(store.versions) == 3:
                break
    finally:
        store.opened.set()
    first, held, following = store.versions[:3]
    assert first == 0
    assert following >= held + 4  # those that were due meanwhile were passed over
    assert store.most == 1  # never two at a time
    assert all(name.startswith("publish") for name in store.writers)


def test_what_a_donated_state_becomes_does_not_reach_the_version_under_way():
    """Every version is, bit for bit, the policy that the learner had then."""
    store, digests, seen = HeldStore(), {}, {}
    loop = trainer(store=store, max_staleness=8)
    flip = Subscriber.flip

    def watched(self):
        update = flip(self)
        if update is not None:
            seen[update.version] = sparse_delta.digest(self.params).root.hex()
        return update

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Subscriber, "flip", watched)
            digests[0] = sparse_delta.digest(PARAMS).root.hex()
            meanwhile = 0
            for done, state, _, _ in loop.run(started(), start=0, steps=12):
                digests[done] = sparse_delta.digest(state.params["policy"]).root.hex()
                meanwhile += store.holding.is_set()
                if meanwhile == 3 or done == 9:  # the tenth update needs another version
                    store.opened.set()
    finally:
        store.opened.set()
    assert len(seen) > 1
    assert seen.items() <= digests.items()


def test_what_goes_wrong_beside_the_updates_is_raised_by_the_learner():
    class Broken(MemoryStore):
        def put(self, key, data):
            if "index/000000000002" in key:
                raise RuntimeError("a bug of this store")
            super().put(key, data)

    with pytest.raises(RuntimeError, match="a bug of this store"):
        trained(trainer(store=Broken(), max_staleness=8), 200)


def test_with_replay_the_learner_need_not_wait():
    replay = Replay(ReplayConfig(recent_share=0.5), seed=0)
    answers, finished = itertools.count(1), threading.Event()

    def few(prompts, completions):
        if next(answers) > 3:
            wait(finished)
        return length(prompts, completions)

    loop = trainer(
        2, replay=replay, reward=few, max_staleness=50, sync_every=2, prompts_per_update=3
    )
    try:
        for done, _, row, _ in loop.run(started(), start=0, steps=12):
            assert np.isfinite(row["loss"])
            if done == 10:  # of three answers, and from now on of more
                assert sum(actor.items for actor in loop.pool.statistics.values()) <= 3
                finished.set()
    finally:
        finished.set()
    assert done == 12
    assert len(replay) > 0
    with pytest.raises(ValueError, match=r"prompts_per_update and .* drawn from a replay"):
        trainer(prompts_per_update=3)


def test_a_replay_that_has_nothing_fresh_waits_for_more():
    """Its own bound drops what the trainer's lets in."""

    class Watched(Replay):
        def sample(self, *args):
            try:
                return super().sample(*args)
            except EmptyReplay:
                empty.add(args[-1])
                raise

    empty = set()
    replay = Watched(ReplayConfig(max_staleness=0), seed=0)
    _, rows, _ = trained(trainer(replay=replay, max_staleness=50, reference=0), 4)
    assert [row["staleness_max"] for row in rows] == [0.0] * 4
    # At its first look an update knows no answer of a version that it has yet to publish.
    assert empty == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"its max_staleness ≥ sync_every − 1 is needed, got 0"):
        trainer(replay=replay, max_staleness=50, sync_every=2)


def test_more_is_written_of_a_prompt_than_an_update_draws():
    """TBA on GSM8K: S = 24 completions of a prompt, groups of K = 20; here 4 and 3."""
    drawn = []

    class Watched(Replay):
        def sample(self, *args):
            drawn.append(super().sample(*args))
            return drawn[-1]

    learner = Learner(
        recipe=recipes.get("tba", group_size=3), apply=LEARNER.apply, optimizer=LEARNER.optimizer
    )
    replay = Watched(ReplayConfig(recent_share=1.0), seed=0)
    loop = trainer(learner=learner, replay=replay, replay_group_size=3, max_staleness=8)
    _, rows, _ = trained(loop, 3, learner)
    assert len(rows) == 3
    assert [rollouts.tokens.shape for rollouts in drawn] == [(2, 3, 4)] * 3
    assert max(len(replay.buffer(i).records) for i in replay.prompt_ids) > 3
    with pytest.raises(ValueError, match="replay_group_size are of what is drawn from a replay"):
        trainer(replay_group_size=3)


def test_the_rectified_recipe_learns_from_a_replay_of_everybodys_answers():
    """`repo_tb_replay`, whole: references' answers, best safe ones, and actors that never wait."""
    recipe = recipes.get("repo_tb_replay", group_size=4)
    learner = SlowLearner(
        recipe=recipe, apply=LEARNER.apply, optimizer=LEARNER.optimizer, seconds=0.2
    )
    drawn, asked = [], []
    hand_out = Ledger._next

    class Watched(Replay):
        def sample(self, *args):
            drawn.append(super().sample(*args))
            return drawn[-1]

    def watched(self, actor, now):
        asked.append(hand_out(self, actor, now))
        return asked[-1]

    loop = trainer(
        2, learner=learner, replay=Watched(RECTIFIED, seed=0), max_staleness=64,
        prompts_per_update=4, reference=recipe.reference_samples, max_unread=100_000,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "_next", watched)
        for done, _, row, refusals in loop.run(started(learner), start=0, steps=500):
            assert refusals == []
            assert np.isfinite(row["loss"])
            if done >= 10 and drawn[-1].policy_version.max() > 1:
                break
    # Ten long updates, at each of which a queue of any length would have run dry. Only before the
    # first weights are published is there nothing to do.
    handed = list(itertools.dropwhile(lambda item: item is None, asked))
    assert len(handed) > 10
    assert None not in handed
    written = drawn[-1].policy_version[..., 0]
    assert (written < 0).any()
    assert written.max() > 1
    # What is best is known from all that was seen of a prompt, not from this batch alone.
    best = drawn[-1].best_safe
    here = np.where(drawn[-1].cost <= 0, drawn[-1].reward, -np.inf).max(1)
    assert (best >= here).all()
    assert np.isfinite(best).any()


def test_actors_make_a_bounded_number_of_answers_ahead_of_a_replaying_learner():
    loop = trainer(2, replay=Replay(RECTIFIED, seed=0), max_staleness=64, max_unread=3)
    for _ in loop.run(started(), start=0, steps=5):
        while loop.pool.unread < 3:  # of an update that takes as long as it likes
            time.sleep(0.01)
        time.sleep(0.2)  # for answers beyond what is allowed, if there were any
        # What the two write and score when the third answer comes in may still be answered.
        assert loop.pool.unread <= 3 - 1 + 2 * 2
    with pytest.raises(ValueError, match="max_unread must be at least 1"):
        trainer(max_unread=0)
