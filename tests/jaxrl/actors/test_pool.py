"""The pool and its actors: whose item it is when two things happen at once."""

import threading
import time

import pytest

from jaxrl.actors import PoolConfig, Processes, Result, Threads
from jaxrl.actors.wire import item_from_json, result_to_wire
from jaxrl.sync import Refused
from jaxrl.sync.connection import Connection

SECRET = "a secret of the pool's tests"


def polled(pool, count):
    results, end = [], time.monotonic() + 60
    while len(results) < count and time.monotonic() < end:
        results += pool.poll(0.5)
    return results


class Writer:
    """Says what it does; scores as the test likes."""

    def __init__(self, name, score, log):
        self.name, self._score, self._log = name, score, log
        self.interrupted = threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def interrupt(self):
        self.interrupted.set()

    def write(self, item):
        self._log.append(("write", item.id))

        def score():
            self._score(self, item)
            self._log.append(("score", item.id))
            return Result(item=item.id, actor=self.name, version=0, rollouts=None)

        return score


def writers(score, log, **config):
    return Threads(
        1, lambda name: Writer(name, score, log), config=PoolConfig(backoff_s=0.0, **config)
    )


def test_an_actor_writes_its_next_item_while_the_last_one_is_scored(make_item):
    log = []

    def score(actor, item):
        if item.id == 0:  # comes to an end only if item 1 is written beside it
            while ("write", 1) not in log:
                assert not actor.interrupted.wait(0.01)

    with writers(score, log) as pool:
        pool.start(lambda result: None)
        for number in range(3):
            pool.submit(make_item(number))
        assert sorted(result.item for result in polled(pool, 3)) == [0, 1, 2]
    assert log.index(("write", 1)) < log.index(("score", 0))
    assert [what for what in log if what[0] == "write"] == [("write", n) for n in range(3)]


def test_one_after_the_other_where_that_is_asked_for(make_item):
    log = []
    with writers(lambda actor, item: None, log, score_beside=False) as pool:
        pool.start(lambda result: None)
        for number in range(3):
            pool.submit(make_item(number))
        polled(pool, 3)
    assert log == [(what, number) for number in range(3) for what in ("write", "score")]


def test_of_two_items_in_hand_only_the_one_that_failed_is_blamed(make_item):
    log = []

    def score(actor, item):
        if item.id == 0:
            while ("write", 1) not in log:
                assert not actor.interrupted.wait(0.01)
            raise RuntimeError("unlucky score")
        if len([entry for entry in log if entry == ("write", 1)]) == 1:
            assert actor.interrupted.wait(60.0)  # it is told that the actor's life is over

    with writers(score, log, max_failures=1) as pool:
        pool.start(lambda result: None)
        for number in range(2):
            pool.submit(make_item(number))
        results = {result.item: result.refusal for result in polled(pool, 2)}
    assert results[0].reason == "fatal"
    assert "unlucky score" in results[0].detail
    assert results[1] is None


def joined(pool, name):
    connection = Connection.connect(pool.address, SECRET)
    connection.send({"hello": name, "life": ""}, b"")
    return connection


def asked(connection):
    header, _ = connection.receive()
    return item_from_json(header["item"])


def answer(connection, result):
    header, body = result_to_wire(result)
    connection.send({"item": result.item, "written": True}, b"")
    connection.send(header, body)


def test_a_name_that_comes_twice_keeps_its_items_apart(make_item, make_result):
    """As after a line that broke at one end only: the old connection is lost after the new came."""
    with Processes(0, secret=SECRET, config=PoolConfig(score_beside=False)) as pool:
        pool.start(lambda result: None)
        for number in range(2):
            pool.submit(make_item(number))
        old = joined(pool, "far")
        first = asked(old)
        new = joined(pool, "far")
        second = asked(new)
        assert (first.id, second.id) == (0, 1)
        old.close()
        while not pool.statistics["far"].restarts if "far" in pool.statistics else True:
            time.sleep(0.01)
        # Item 1 is the new connection's still: nobody else is given it.
        other = joined(pool, "other")
        assert asked(other).id == 0
        answer(new, make_result(second, actor="far"))
        answer(other, make_result(first, actor="other"))
        results = polled(pool, 2)
        assert {result.item: result.actor for result in results} == {0: "other", 1: "far"}
        assert all(result.refusal is None for result in results)
        assert pool.statistics["far"].restarts == 1
        new.close()
        other.close()


def test_strangers_are_counted_and_leave_no_thread_behind():
    with Processes(0, secret=SECRET) as pool:
        pool.start(lambda result: None)
        for _ in range(20):
            with pytest.raises(Refused):
                Connection.connect(pool.address, "x" * 32)
        end = time.monotonic() + 60
        while pool.refused < 20 and time.monotonic() < end:
            time.sleep(0.01)
        assert pool.refused == 20
        assert len(pool._threads) < 10


def test_no_more_connections_are_taken_in_than_allowed(make_item):
    with Processes(0, secret=SECRET, max_connections=1) as pool:
        pool.start(lambda result: None)
        pool.submit(make_item(0))
        first = joined(pool, "first")
        assert asked(first).id == 0
        waiting = []
        thread = threading.Thread(target=lambda: waiting.append(joined(pool, "second")))
        thread.start()  # not let in, nor sent away, before the first has gone
        thread.join(0.3)
        assert not waiting
        first.close()
        thread.join(60.0)
        assert waiting
        assert asked(waiting[0]).id == 0
        waiting[0].close()
