"""Results that need no model: arrays of the right shapes, made from the item's number."""

import textwrap

import numpy as np
import pytest

from jaxrl.actors import Result, RolloutChecks, Timings, WorkItem
from jaxrl.data.batches import PromptSet
from jaxrl.types import REFERENCE_VERSION, Prompts, Rollouts

ACTORS = '''
    """Actors without a model, for tests."""
    import os, signal, time
    import numpy as np
    from jaxrl.actors import Result
    from jaxrl.types import Prompts, Rollouts

    class Little:
        def __init__(self, name, die_once, sleep_s):
            self.name, self.die_once, self.sleep_s = name, die_once, sleep_s
        def __enter__(self):
            return self
        def __exit__(self, *_):
            pass
        def interrupt(self):
            pass
        def write(self, item):
            if self.die_once and not os.path.exists(self.die_once):
                open(self.die_once, "x").close()
                os.kill(os.getpid(), signal.SIGKILL)
            if item.rows[0] == 13:
                raise RuntimeError("unlucky row")
            time.sleep(self.sleep_s)
            whole = np.full((1, 1, 2), item.id, np.int32)
            rollouts = Rollouts(
                prompts=Prompts(tokens=whole[0], mask=whole[0] >= 0, ids=np.int32(item.rows)),
                tokens=whole, mask=whole >= 0, policy_version=whole,
                behaviour_log_probs=np.zeros((1, 1, 2), np.float32),
                reference_log_probs=np.zeros((1, 1, 2), np.float32), rewards={}, costs={})
            return lambda: Result(
                item=item.id, actor=self.name, version=os.getpid(), rollouts=rollouts)

    def build(name, die_once="", sleep_s=0.0):
        return Little(name, die_once, sleep_s)
'''
PROMPTS = PromptSet(
    texts=("a", "b", "c", "d", "e"),
    tokens=np.arange(20, dtype=np.int32).reshape(5, 4),
    mask=np.ones((5, 4), bool),
)


def _item(number, rows=(1, 3), min_version=0):
    return WorkItem(id=number, rows=rows, seed=7, min_version=min_version)


def _result(item, *, version=2, actor="actor-0"):
    """G = 3 completions of T = 5 tokens for each row, the last written by the reference."""
    rng = np.random.default_rng(item.id)
    rows, shape = np.asarray(item.rows), (len(item.rows), 3, 5)
    mask = np.arange(5) < rng.integers(1, 6, shape[:2])[..., None]
    versions = np.where(np.arange(3)[:, None] < 2, version, REFERENCE_VERSION) * mask
    rollouts = Rollouts(
        prompts=Prompts(
            tokens=PROMPTS.tokens[rows], mask=PROMPTS.mask[rows], ids=rows.astype(np.int32)
        ),
        tokens=rng.integers(0, 30, shape, dtype=np.int32),
        mask=mask,
        behaviour_log_probs=-rng.random(shape, np.float32) * mask,
        reference_log_probs=-rng.random(shape, np.float32) * mask,
        policy_version=versions.astype(np.int32),
        rewards={"reward": rng.random(shape[:2], np.float32)},
        costs={
            "cost": rng.random(shape[:2], np.float32),
            "other cost": np.ones((2, 3), np.float32),
        },
        greedy=None,
    )
    return Result(
        item=item.id, actor=actor, version=version, rollouts=rollouts,
        timings=Timings(generate_s=1.0, score_s=0.5, paused_s=0.25, idle_s=2.0),
    )  # fmt: skip


@pytest.fixture
def make_item():
    return _item


@pytest.fixture
def make_result():
    return _result


@pytest.fixture
def checks():
    return RolloutChecks(prompts=PROMPTS, group_size=3, completion_len=5, vocab_size=30)


@pytest.fixture
def little_actors(tmp_path):
    """A folder with the module `little_actors`, for processes that import it by name."""
    (tmp_path / "little_actors.py").write_text(textwrap.dedent(ACTORS))
    return tmp_path
