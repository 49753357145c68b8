"""A small run for the fault tests, and the faults: patches in the process that shall suffer them.

Imported by the tests and, by its name, by the processes that they start.
"""

import dataclasses
import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxrl import checkpoint, recipes
from jaxrl.actors import Actor, ActorConfig, Journal, RolloutChecks
from jaxrl.data.batches import PromptSet
from jaxrl.learner import Learner, OptimizerConfig, lm_apply, lm_optimizer
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.rollouts import Collector, Sampling, Scorer
from jaxrl.sync import (
    ConnectionBroken,
    FsspecStore,
    Publisher,
    Subscriber,
    SyncConfig,
    TcpStore,
)
from jaxrl.tokenizers import PLAIN, train_bpe
from jaxrl.train import AsynchronousTrainer
from kernels import sparse_delta
from kernels.sparse_delta import unpack

RUN = "faults"
TEXTS = ("one", "two words", "three", "four more", "five", "six", "seven")
TOKENIZER = train_bpe(TEXTS * 3, 270)
PROMPTS = PromptSet.encode(TOKENIZER, TEXTS, PLAIN, max_len=10)
CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, embed=8, heads=2, kv_heads=1, head_dim=4, mlp=8,
    max_len=16, remat="none",
)  # fmt: skip
GRAPHDEF, PARAMS = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
LIKE = jax.eval_shape(lambda: PARAMS)
GROUP = 2
LEARNER = Learner(
    recipe=recipes.get("repo_tb", group_size=GROUP),
    apply=lm_apply(GRAPHDEF, None, temperature=1.0),
    optimizer=lm_optimizer(OptimizerConfig(learning_rate=1e-2)),
)
CHECKS = RolloutChecks(
    prompts=PROMPTS, group_size=GROUP, completion_len=4, vocab_size=TOKENIZER.vocab_size
)


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def started(step=0):
    state = LEARNER.init({"policy": PARAMS}, num_prompts=len(PROMPTS))
    return dataclasses.replace(state, step=jax.numpy.int32(step))


def digest(params):
    """What the two ends know a version by; and SHA-256 of its bits, which neither computes."""
    bits = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        bits.update(np.asarray(leaf).tobytes())
    return f"{sparse_delta.digest(jax.block_until_ready(params)).root.hex()} {bits.hexdigest()}"


class Claims:
    """Appends what a process says of versions to a file; one line is one write."""

    def __init__(self, path):
        self.path, self._late = Path(path), b""

    def add(self, **claim):
        self._late += (json.dumps(claim) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            while self._late:
                self._late = self._late[os.write(handle, self._late) :]
        except OSError:
            pass  # a test has filled the disk; its own notes wait
        finally:
            os.close(handle)

    def read(self):
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]


class ClaimingActor(Actor):
    """Says of every item which weights wrote it."""

    def __init__(self, *, claims, before=lambda name, item: None, **parts):
        super().__init__(**parts)
        self._claims, self._before = claims, before

    def write(self, item):
        self._before(self.name, item)
        score = super().write(item)
        # Weights take over between two items only: these have written it.
        params = self._subscriber.params
        self._claims.add(actor=self.name, item=item.id, version=self.version, digest=digest(params))
        return score


def build(
    name, *, store, claims, secret="", kills=None, folder="", bad_seed=None, poll_s=0.02,
    patience_s=120.0,
):  # fmt: skip
    """An actor of a store, or of its URL or, with a secret, its address.

    `kills` names the places where the actor of a name ends its process, once; with `bad_seed` one
    delivery in ten is damaged.
    """
    opened = store
    if isinstance(store, str):
        opened = TcpStore(store, secret=secret, patience_s=30.0) if secret else FsspecStore(store)
    if bad_seed is not None:
        opened = BadStore(opened, bad_seed, rate=0.1)
    for kill in (kills or {}).get(name, ()):
        KILLS[kill](Path(folder) / f"killed in {kill}")
    return ClaimingActor(
        claims=Claims(claims),
        name=name,
        collector=Collector(
            graphdef=GRAPHDEF,
            sampling=Sampling(max_new_tokens=4, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id),
            group_size=GROUP,
        ),
        scorer=Scorer(
            tokenizer=TOKENIZER, prompts=PROMPTS, rewards={"reward": length}, costs={"cost": length}
        ),
        prompts=PROMPTS,
        reference=PARAMS,
        subscriber=Subscriber(opened, run_id=RUN, like=LIKE, name=name),
        config=ActorConfig(poll_s=poll_s, patience_s=patience_s),
    )


class ClaimingPublisher(Publisher):
    """Says of every version which weights it is."""

    def __init__(self, store, *, claims, **parts):
        super().__init__(store, **parts)
        self._claims = claims

    def sections(self, params, version, *, anchor=False):
        self._claims.add(learner=os.getpid(), version=version, digest=digest(params))
        return super().sections(params, version, anchor=anchor)


def trainer(pool, store, folder, *, segment_bytes=4096, **options):
    folder = Path(folder)
    return AsynchronousTrainer(
        learner=LEARNER,
        pool=pool,
        publisher=ClaimingPublisher(
            store,
            claims=Claims(folder / "published.jsonl"),
            run_id=RUN,
            config=SyncConfig(anchor_every=5, ack_expiry_s=5.0),
        ),
        checks=CHECKS,
        prompts_per_item=2,
        seed=3,
        **{
            "journal": KeepingJournal(folder / "journal", segment_bytes=segment_bytes),
            "max_staleness": 3,
            "stall_s": 120.0,
        }
        | options,
    )


class KeepingJournal(Journal):
    """Collects as any journal does, and keeps a second name for what it deletes."""

    def collect(self, needed):
        keep_segments(self.folder)
        return super().collect(needed)


def keep_segments(folder):
    kept = folder.with_name("all segments")
    kept.mkdir(exist_ok=True)
    for segment in folder.glob("*.journal"):
        if not (kept / segment.name).exists():
            os.link(segment, kept / segment.name)
    return kept


def used(folder):
    """Which items each update used, and which were acknowledged, since the run began."""
    records = Journal(keep_segments(Path(folder) / "journal")).records()
    headers = [record.header for record in records]
    updates = {h["update"]: h["items"] for h in headers if "update" in h}
    return updates, [h["item"] for h in headers if "item" in h]


def mismatches(published, claims):
    """Claims of actors about versions whose bits are not those that the learner published."""
    known = {}
    for claim in published:
        known.setdefault(claim["version"], set()).add(claim["digest"])
    return [c for c in claims if c["digest"] not in known.get(c["version"], set())]


# --- the faults ---------------------------------------------------------------------------------


def _die_once(marker, after=0, last_words=lambda: None):
    """A function whose call number `after` ends this process, the first time that it comes."""
    calls = iter(range(10**9))

    def maybe():
        if next(calls) >= after and not Path(marker).exists():
            Path(marker).touch()
            last_words()
            os.kill(os.getpid(), signal.SIGKILL)

    return maybe


def _patch(owner, name, wrapper):
    setattr(owner, name, wrapper(getattr(owner, name)))


def kill_in_rollout(marker):
    """When the tokens are written and not yet scored."""
    die = _die_once(marker, after=1)

    def wrapper(collect):
        def dying(*args, **kwargs):
            rollouts = collect(*args, **kwargs)
            die()
            return rollouts

        return dying

    _patch(Collector, "collect", wrapper)


def kill_in_fetch(marker):
    """When half of a payload has been read, from the folder or over TCP."""
    die = _die_once(marker, after=1)

    def wrapper(get):
        def dying(self, key):
            if "/payloads/" in key:
                half = self.get_range(key, 0, len(get(self, key)) // 2)
                assert half
                die()
            return get(self, key)

        return dying

    for store in (FsspecStore, TcpStore):
        _patch(store, "get", wrapper)


def kill_in_apply(marker):
    """When a delta's first leaf is rebuilt and its other leaves are not."""
    die = _die_once(marker, after=len(jax.tree.leaves(LIKE)))  # the anchor's leaves come before

    def wrapper(rebuild):
        def dying(*args):
            rebuilt = rebuild(*args)
            die()
            return rebuilt

        return dying

    _patch(unpack.Unpacker, "leaf", wrapper)


def kill_in_payload(marker):
    """When half of a payload is on disk, under no name yet."""
    half = []

    def truncate():
        os.truncate(half[-1], os.path.getsize(half[-1]) // 2)

    die = _die_once(marker, after=2, last_words=truncate)

    def wrapper(replace):
        def dying(source, target):
            if "payload" in str(target):
                half.append(source)
                die()
            return replace(source, target)

        return dying

    _patch(os, "replace", wrapper)


def kill_before_manifest(marker):
    """When the payload is in the store and its manifest is not."""
    die = _die_once(marker, after=2)

    def wrapper(put):
        def dying(self, key, data):
            if "/index/" in key:
                die()
            return put(self, key, data)

        return dying

    _patch(FsspecStore, "put", wrapper)


def kill_after_manifest(marker):
    """When the version is published and the learner does not know it yet."""
    die = _die_once(marker, after=2)

    def wrapper(put):
        def dying(self, key, data):
            put(self, key, data)
            if "/index/" in key:
                die()

        return dying

    _patch(FsspecStore, "put", wrapper)


def kill_in_checkpoint(marker):
    """When a checkpoint's arrays are written and its seal is not."""
    die = _die_once(marker, after=2)

    def wrapper(write):
        def dying(path, text):
            die()
            return write(path, text)

        return dying

    _patch(checkpoint, "_write_atomically", wrapper)


def kill_in_update(marker):
    """When an update is made and not yet published; some rollouts wait, acknowledged."""
    die = _die_once(marker, after=6)

    def wrapper(update):
        def dying(*args, **kwargs):
            state, metrics = update(*args, **kwargs)
            jax.block_until_ready(state)
            die()
            return state, metrics

        return dying

    _patch(Learner, "update", wrapper)


KILLS = {
    "rollout": kill_in_rollout,
    "fetch": kill_in_fetch,
    "apply": kill_in_apply,
    "payload": kill_in_payload,
    "before manifest": kill_before_manifest,
    "after manifest": kill_after_manifest,
    "checkpoint": kill_in_checkpoint,
    "update": kill_in_update,
}


class BadStore:
    """A store whose deliveries are late, repeated, out of order, truncated or bit-flipped."""

    def __init__(self, store, seed, rate=0.3):
        self._store, self._rng, self.rate = store, np.random.default_rng(seed), rate
        self._seen, self._lock = {}, threading.Lock()
        self.faults = {}

    def get(self, key):
        data = self._store.get(key)
        with self._lock:
            if self._rng.random() >= self.rate:
                return data
            kind = ("truncated", "flipped", "another", "missing", "cut")[self._rng.integers(5)]
            self.faults[kind] = self.faults.get(kind, 0) + 1
            others = [old for name, old in self._seen.items() if name != key] or [b""]
            self._seen[key] = data
            if kind == "truncated":
                return data[: self._rng.integers(len(data))]
            if kind == "flipped":
                damaged = bytearray(data)
                damaged[self._rng.integers(len(data))] ^= 1 << self._rng.integers(8)
                return bytes(damaged)
            if kind == "another":  # an older delivery, again and in the wrong place
                return others[self._rng.integers(len(others))]
        if kind == "missing":
            raise KeyError(key)
        raise ConnectionBroken("cut by the test")

    def keys(self, prefix):
        found = self._store.keys(prefix)
        with self._lock:
            if self._rng.random() < self.rate and len(found) > 2:
                self.faults["late"] = self.faults.get("late", 0) + 1
                return found[: self._rng.integers(1, len(found))]  # the newest are not listed yet
            return found

    def put(self, key, data):
        self._store.put(key, data)

    def delete(self, key):
        self._store.delete(key)
