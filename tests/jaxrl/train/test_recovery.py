"""A learner that comes back from a checkpoint repeats what it lost, with the same rollouts."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrl import recipes
from jaxrl.actors import Actor, Journal, RolloutChecks, Threads
from jaxrl.checkpoint import Checkpointer
from jaxrl.data.batches import PromptSet
from jaxrl.learner import Learner, OptimizerConfig, lm_apply, lm_optimizer
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.replay import Replay, ReplayConfig
from jaxrl.rollouts import Collector, Sampling, Scorer
from jaxrl.sync import MemoryStore, Publisher, Subscriber
from jaxrl.tokenizers import PLAIN, train_bpe
from jaxrl.train import AsynchronousTrainer

TEXTS = ("one", "two words", "three", "four more", "five")
TOKENIZER = train_bpe(TEXTS * 3, 270)
PROMPTS = PromptSet.encode(TOKENIZER, TEXTS, PLAIN, max_len=10)
CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, embed=8, heads=2, kv_heads=1, head_dim=4, mlp=8,
    max_len=16, remat="none",
)  # fmt: skip
GRAPHDEF, PARAMS = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
LEARNER = Learner(
    recipe=recipes.get("repo_tb", group_size=2),
    apply=lm_apply(GRAPHDEF, None, temperature=1.0),
    optimizer=lm_optimizer(OptimizerConfig(learning_rate=1e-2)),
)


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def trainer(journal, store, *, replay=None, **options):
    def build(name):
        return Actor(
            name=name,
            collector=Collector(
                graphdef=GRAPHDEF,
                sampling=Sampling(
                    max_new_tokens=4, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id
                ),
                group_size=2,
            ),
            scorer=Scorer(
                tokenizer=TOKENIZER, prompts=PROMPTS, rewards={"reward": length},
                costs={"cost": length},
            ),
            prompts=PROMPTS,
            reference=PARAMS,
            subscriber=Subscriber(
                store, run_id="test", like=jax.eval_shape(lambda: PARAMS), name=name
            ),
        )  # fmt: skip

    return AsynchronousTrainer(
        learner=LEARNER,
        pool=Threads(2, build),
        publisher=Publisher(store, run_id="test"),
        checks=RolloutChecks(
            prompts=PROMPTS, group_size=2, completion_len=4, vocab_size=TOKENIZER.vocab_size
        ),
        prompts_per_item=2,
        seed=3,
        journal=journal,
        replay=replay,
        stall_s=60.0,
        **{"max_staleness": 2} | options,
    )


def started():
    return LEARNER.init({"policy": PARAMS}, num_prompts=len(PROMPTS))


def on_host(state):
    return [np.array(leaf) for leaf in jax.tree.leaves(state)]


def updates(folder):
    """Which items each update used, as the journal has it."""
    with Journal(folder) as journal:
        headers = [record.header for record in journal.records()]
    return {h["update"]: h["items"] for h in headers if "update" in h}


def life(folder, store, *, steps, save_at=(), options=None):
    """One life of the learner: up to `steps`, saving at some of them; then it is gone."""
    options = options or {}
    states = {}
    with Journal(folder / "journal") as journal, Checkpointer(folder / "checkpoints") as saved:
        replay = Replay(ReplayConfig(), seed=0) if options.pop("replay", False) else None
        loop = trainer(journal, store, replay=replay, **options)
        start, state = loop.restore(saved, started())
        for done, present, metrics, _ in loop.run(state, start=start, steps=steps):
            states[done] = (on_host(present), metrics)
            if done in save_at:
                loop.save(saved, done, present)
    return start, states, loop


@pytest.mark.parametrize("options", [{}, {"replay": True, "max_staleness": 40, "sync_every": 2}])
def test_what_was_lost_is_repeated_bit_for_bit_and_nothing_is_used_twice(tmp_path, options):
    store = MemoryStore()
    _, before, _ = life(tmp_path, store, steps=7, save_at=(3,), options=dict(options))
    used = updates(tmp_path / "journal")
    start, after, _ = life(tmp_path, store, steps=12, options=dict(options))
    assert start == 3
    for done in range(4, 8):  # lost with the process, and made again from the journal
        for a, b in zip(before[done][0], after[done][0], strict=True):
            np.testing.assert_array_equal(a, b)
        assert before[done][1]["reward"] == after[done][1]["reward"]
    both = updates(tmp_path / "journal")
    assert {step: both[step] for step in used} == used  # what was done before is not done anew
    items = [item for step in sorted(both) for item in both[step]]
    assert len(items) == len(set(items))
    assert sorted(both) == list(range(12))


def test_acknowledged_rollouts_that_were_not_used_are_used_first(tmp_path):
    store = MemoryStore()
    life(tmp_path, store, steps=4, save_at=(4,))
    with Journal(tmp_path / "journal") as journal:
        acknowledged = [r.header["item"] for r in journal.records() if "item" in r.header]
    used = [item for items in updates(tmp_path / "journal").values() for item in items]
    waiting = [item for item in acknowledged if item not in used]
    life(tmp_path, store, steps=4 + len(waiting) + 2)
    later = updates(tmp_path / "journal")
    assert [later[4 + i][0] for i in range(len(waiting))] == waiting
    items = [item for items in later.values() for item in items]
    assert sorted(items) == sorted(set(items))


def test_without_a_checkpoint_the_journal_alone_brings_everything_back(tmp_path):
    _, before, _ = life(tmp_path, MemoryStore(), steps=4)
    start, after, _ = life(tmp_path, MemoryStore(), steps=5)
    assert start == 0
    for a, b in zip(before[4][0], after[4][0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_journal_that_lost_a_record_does_not_stop_the_run(tmp_path, caplog):
    life(tmp_path, MemoryStore(), steps=5)
    (segment,) = (tmp_path / "journal").glob("*.journal")
    data = bytearray(segment.read_bytes())
    data[200] ^= 1  # in the first record
    segment.write_bytes(data)
    start, after, _ = life(tmp_path, MemoryStore(), steps=7)
    assert (start, max(after)) == (0, 7)
    assert "the journal does not tell what update 0 used" in caplog.text
    assert "damaged record at byte 0" in caplog.text


def test_the_journal_is_collected_up_to_the_oldest_checkpoint(tmp_path):
    store = MemoryStore()
    with (
        Journal(tmp_path / "journal", segment_bytes=1) as journal,  # a segment for every record
        Checkpointer(tmp_path / "checkpoints", keep=2) as saved,
    ):
        loop = trainer(journal, store)
        start, state = loop.restore(saved, started())
        for done, present, _, _ in loop.run(state, start=start, steps=10):
            if done % 2 == 0:
                loop.save(saved, done, present)
                saved.wait()
        first = min(r.header.get("update", 99) for r in journal.records())
        assert saved.steps() == [8, 10]
        # When step 10 was saved the oldest checkpoint was that of step 6; an answer that came in
        # before an update and is used after it keeps both.
        assert 3 <= first <= 6
    newest = max((tmp_path / "checkpoints").glob("*.json"))
    seal = json.loads(newest.read_text())
    settled = seal["metadata"]["intake"]["settled"]
    assert settled["below"] + len(settled["also"]) >= 10
    newest.write_text("{}")  # the older checkpoint is still good, and so is the journal behind it
    start, after, _ = life(tmp_path, store, steps=11)
    assert start == 8
    assert max(after) == 11
