"""When versions are published: a store that fails is left in peace, and the last one gets there."""

import logging
import threading

import jax.numpy as jnp
import pytest

from jaxrl.sync import MemoryStore, Publisher, StoreFull
from jaxrl.train.publishing import Publications

PARAMS = {"w": jnp.arange(8.0)}


class Filling(MemoryStore):
    """Refuses payloads while it is full, and counts the attempts."""

    def __init__(self, failures):
        super().__init__()
        self.failures, self.attempts = failures, 0

    def put(self, key, data):
        if "payloads" in key:
            self.attempts += 1
            if self.attempts <= self.failures:
                raise StoreFull("no room; free some space")
        super().put(key, data)


class Clock:
    """Stands still unless somebody sleeps or moves it."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def publications(store, clock, turned=lambda: None):
    return Publications(
        Publisher(store, run_id="r"), every=1, before=lambda: None, on_turn=turned,
        clock=clock, sleep=clock.sleep,
    )  # fmt: skip


def test_a_full_store_is_tried_again_after_ever_longer_pauses():
    store, clock, turned = Filling(failures=3), Clock(), threading.Event()
    started = []

    def lead():
        complete = found.lead(PARAMS, 0, starting=started.append)
        if found.promised == 0 and not complete:
            assert turned.wait(60.0)
            turned.clear()
        return complete

    with publications(store, clock, turned.set) as found:
        for attempt, pause_s in enumerate((0.1, 0.2, 0.4), 1):
            lead()  # begins
            assert not lead()  # learns that it failed
            assert found.promised is None
            for _ in range(50):  # as a learner that is woken again and again would
                assert not lead()
            assert store.attempts == attempt
            clock.now += pause_s
        lead()
        assert lead()
    assert (store.attempts, found.promised, found.published.version) == (4, 0, 0)
    assert started == [0] * 4


def test_the_last_version_is_published_though_it_was_not_due_and_the_store_fails():
    store, clock = Filling(failures=0), Clock()
    with publications(store, clock) as found:
        found.lead(PARAMS, 0, starting=lambda version: None)
        found.finish({"w": jnp.ones(8)}, 0, starting=lambda version: None)
        assert (store.attempts, found.published.version) == (1, 0)  # it was under way
        store.failures = store.attempts + 2
        found.finish({"w": jnp.ones(8)}, 7, starting=lambda version: None)
    assert found.published.version == 7
    assert clock.slept == [0.1 * 2, 0.1 * 4]


def test_a_last_version_that_no_store_takes_is_told(caplog):
    clock = Clock()
    with (
        publications(Filling(failures=10**9), clock) as found,
        caplog.at_level(logging.ERROR),
    ):
        found.finish(PARAMS, 7, starting=lambda version: None)
    assert found.promised is None
    assert "the last version, 7, is in no store" in caplog.text
    assert clock.slept == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2])


class Looked(MemoryStore):
    """Somebody's look at what is there takes until the test lets it go on."""

    def __init__(self):
        super().__init__()
        self.looking, self.go_on, self.slow = threading.Event(), threading.Event(), False

    def keys(self, prefix):
        if self.slow:
            self.slow = False
            self.looking.set()
            assert self.go_on.wait(60.0)
        return super().keys(prefix)


def test_the_last_version_waits_for_a_look_at_what_is_damaged():
    """Else the look would wait for the publication's lock, and the publication for its thread."""
    store, clock, turned = Looked(), Clock(), threading.Event()
    with publications(store, clock, turned.set) as found:
        found.lead(PARAMS, 0, starting=lambda version: None)
        assert turned.wait(60.0)
        store.slow = True
        assert found.lead(PARAMS, 0, starting=lambda version: None)  # begins to look, too
        assert store.looking.wait(60.0)
        threading.Timer(0.2, store.go_on.set).start()
        found.finish(PARAMS, 3, starting=lambda version: None)
    assert found.published.version == 3
