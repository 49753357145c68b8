"""The book of items: handed out at least once, accepted exactly once, in whatever order."""

import threading
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jaxrl.actors import Refusal, Result, WorkItem
from jaxrl.actors.ledger import Ledger, Seat


def item(number):
    return WorkItem(id=number, rows=(0,), seed=0)


def answer(number, actor):
    return Result(item=number, actor=actor, version=0, rollouts=None)


class Book(RuleBasedStateMachine):
    """Any order of hand-outs, answers, late answers and deaths, against a naive model."""

    actors = st.sampled_from("abc")

    def __init__(self):
        super().__init__()
        self.durable, self.seen, self.submitted = [], [], 0
        self.holding = {actor: [] for actor in "abc"}  # also what was handed to others meanwhile
        self.book = Ledger(self.keep, lease_s=1e9, max_failures=10**9)

    def keep(self, result):
        self.durable.append(result.item)

    @rule()
    def submit(self):
        self.book.submit(item(self.submitted))
        self.submitted += 1

    @rule(actor=actors)
    def take(self, actor):
        taken = self.book.take(Seat(actor), timeout_s=0.0)
        held = {number for numbers in self.live().values() for number in numbers}
        free = set(range(self.submitted)) - held - set(self.durable)
        assert (taken.id if taken else None) == min(free, default=None)
        if taken:
            self.holding[actor].append(taken.id)

    def live(self):
        return {a: [n for n in ns if n >= 0] for a, ns in self.holding.items()}

    @rule(actor=actors, late=st.booleans())
    def give(self, actor, late):
        numbers = self.holding[actor]
        if not numbers:
            return
        number = numbers.pop()
        known = number if number >= 0 else -1 - number
        outcome = self.book.give(answer(known, actor))
        assert outcome == ("duplicate" if self.durable.count(known) > 1 else outcome)
        if late:  # the same answer arrives twice
            assert self.book.give(answer(known, actor)) == "duplicate"
        for other in self.holding.values():  # whoever still has it is too late
            other[:] = [-1 - n if n == known else n for n in other]

    @rule(actor=actors)
    def die(self, actor):
        self.book.release(Seat(actor), "killed")
        # A dead actor's connection may still deliver what it held.
        self.holding[actor] = [n if n < 0 else -1 - n for n in self.holding[actor]]

    @rule()
    def poll(self):
        self.seen += [result.item for result in self.book.poll(0.0)]
        assert self.seen == self.durable  # all, once each, in the order of acceptance

    @invariant()
    def nothing_is_accepted_twice(self):
        assert max(Counter(self.durable).values(), default=0) <= 1


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def book(accept=lambda result: None, **options):
    return Ledger(accept, **{"lease_s": 1e9, "max_failures": 3} | options)


def test_an_idle_actor_gets_what_a_slow_one_holds_too_long():
    ledger = book(lease_s=0.05)
    ledger.submit(item(0))
    assert ledger.take(Seat("slow")).id == 0
    # Woken by the lease alone: nobody else does anything.
    assert ledger.take(Seat("fast")).id == 0
    # Never the same twice to one that has it.
    assert ledger.take(Seat("slow"), timeout_s=0.2) is None
    assert ledger.give(answer(0, "fast")) == "accepted"
    assert ledger.give(answer(0, "slow")) == "duplicate"
    assert ledger.statistics["slow"].duplicates == 1
    assert [result.actor for result in ledger.poll(0.0)] == ["fast"]


def test_an_item_is_its_holders_as_long_as_the_lease_runs(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("jaxrl.actors.ledger.time.monotonic", lambda: now[0])
    ledger = book(lease_s=10.0)
    ledger.submit(item(0))
    assert ledger.take(Seat("slow")).id == 0
    for now[0], found in ((100.0, None), (109.9, None), (110.0, item(0))):
        assert ledger.take(Seat("fast"), timeout_s=0.0) == found


def test_an_item_that_kills_is_refused_and_one_whose_connection_breaks_is_not():
    ledger = book(max_failures=2)
    for number in (0, 1):
        ledger.submit(item(number))
    for attempt in range(5):
        assert ledger.take(Seat("a")).id == 0
        ledger.release(Seat("a"), "the line was cut", blame=False)
        del attempt
    for _ in range(2):
        assert ledger.take(Seat("a")).id == 0
        ledger.release(Seat("a"), "out of memory")
    assert ledger.take(Seat("a")).id == 1
    (refused,) = ledger.poll(0.0)
    assert (refused.item, refused.refusal.reason) == (0, "fatal")
    assert "item 0 ended 2 actors, last: out of memory" in refused.refusal.detail
    assert ledger.statistics["a"].refused == {"fatal": 1}
    ledger.lose("a", "out of memory")
    assert ledger.statistics["a"].restarts == 1


def test_what_cannot_be_made_durable_is_not_acknowledged_and_may_come_again():
    full = [True]

    def accept(result):
        if full:
            raise OSError("disk full")

    ledger = book(accept)
    ledger.submit(item(0))
    ledger.take(Seat("a"))
    with pytest.raises(OSError, match="disk full"):
        ledger.give(answer(0, "a"))
    assert ledger.poll(0.0) == []
    full.clear()
    assert ledger.give(answer(0, "a")) == "accepted"
    assert [result.item for result in ledger.poll(0.0)] == [0]


def test_refusals_are_counted_by_reason():
    refusal = Refusal(reason="stale", detail="old", item=0, actor="a")
    ledger = book(lambda result: refusal if result.item == 0 else None)
    for number in (0, 1):
        ledger.submit(item(number))
        ledger.take(Seat("a"))
    assert [ledger.give(answer(number, "a")) for number in (0, 1)] == ["refused", "accepted"]
    assert ledger.statistics["a"].refused == {"stale": 1}
    assert [result.refusal for result in ledger.poll(0.0)] == [refusal, None]


def test_an_item_is_submitted_once_and_closing_ends_every_wait():
    ledger = book()
    ledger.submit(item(0))
    with pytest.raises(ValueError, match=r"item.id=0 is open already"):
        ledger.submit(item(0))
    ledger.take(Seat("a"))
    waits = [
        threading.Thread(target=ledger.take, args=(Seat("a"),)),
        threading.Thread(target=ledger.poll, args=(60.0,)),
    ]
    for wait in waits:
        wait.start()
    ledger.close()
    for wait in waits:
        wait.join(200.0)
        assert not wait.is_alive()


def test_an_item_whose_answer_is_being_made_durable_is_not_given_up():
    """Its second holder dies while the first one's answer is on its way to the disk."""

    def accept(result):
        book_.release(Seat("b"), "out of memory")
        if full:
            full.clear()
            raise OSError("disk full")

    full = [True]
    book_ = book(accept, max_failures=1, lease_s=1e-9)
    book_.submit(item(0))
    assert book_.take(Seat("a")).id == book_.take(Seat("b")).id == 0
    with pytest.raises(OSError, match="disk full"):
        book_.give(answer(0, "a"))
    assert book_.give(answer(0, "a")) == "accepted"
    (kept,) = book_.poll(0.0)
    assert (kept.actor, kept.refusal) == ("a", None)
