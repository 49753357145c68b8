"""An actor's end of a connection to its learner."""

import contextlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from jaxrl.actors.wire import item_from_json, result_to_wire
from jaxrl.actors.work import AbstractActor, Build, Score, WorkItem
from jaxrl.sync import ConnectionBroken
from jaxrl.sync.connection import Connection

_log = logging.getLogger(__name__)
_LOOK_S = 1.0


def serve(
    build: Build,
    *,
    name: str,
    learner: str,
    secret: str,
    life: str = "",
    patience_s: float = 600.0,
) -> None:
    """Answers a learner's work items until it says that it is done.

    A connection that breaks is made anew: a learner that was killed and resumed finds its actors
    again. What was not acknowledged by then is written again, from the item's own seed.

    Args:
      build: makes the actor.
      name: of the actor, different from every other's.
      learner: "host:port" of its pool.
      secret: of the pool.
      life: what the pool said when it started this process; empty for an actor that joins by
        itself.
      patience_s: how long to look for the learner.

    Raises:
      Refused: the learner has another secret.
      ConnectionBroken: the learner is not there for `patience_s`.
      Exception: what the actor raised, after the learner was told.
    """
    with build(name) as actor:
        while True:
            with _connected(learner, secret, patience_s) as connection:
                try:
                    connection.send({"hello": name, "life": life}, b"")
                    _converse(connection, actor)
                    return
                except ConnectionBroken as error:
                    _log.warning("%s lost its learner and looks for it: %s", name, error)


def _connected(learner: str, secret: str, patience_s: float) -> Connection:
    end, pause_s = time.monotonic() + patience_s, 0.1
    while True:
        try:
            return Connection.connect(learner, secret)
        except ConnectionBroken:
            if time.monotonic() > end:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 5.0)


def _converse(connection: Connection, actor: AbstractActor) -> None:
    """Writes items as they come, and has each scored beside the next.

    The learner has at most two in hand here, and asks for the second when the first is written.
    """
    with (
        ThreadPoolExecutor(1, thread_name_prefix="write") as writing,
        ThreadPoolExecutor(2, thread_name_prefix="score") as scoring,
    ):
        answers: list[Future[None]] = []
        while True:
            while not connection.wait(_LOOK_S):
                answers = _still_open(answers)
            header, _ = connection.receive()
            answers = _still_open(answers)
            if "bye" in header:
                return
            item = item_from_json(header["item"])
            written = writing.submit(_write, connection, actor, item)
            if _bids_farewell(connection, written):
                actor.interrupt()  # it may wait for weights that nobody will publish any more
                _still_open(answers)
                return
            score = written.result()
            try:
                connection.send({"item": item.id, "written": True}, b"")
            except ConnectionBroken:
                if _said_goodbye(connection):
                    _still_open(answers)
                    return
                raise
            answers.append(scoring.submit(_answer, connection, item, score))


def _write(connection: Connection, actor: AbstractActor, item: WorkItem) -> Score:
    with _reported(connection, item):
        return actor.write(item)


def _bids_farewell(connection: Connection, written: Future[Score]) -> bool:
    """Whether the learner ends before an item is written.

    Raises:
      ConnectionBroken: it is lost, which is told when the item is written: it may come back.
      Exception: what the actor raised meanwhile.
    """
    while not written.done():
        wait([written], _LOOK_S)
        if written.done():
            break
        try:
            if connection.wait(0.0):  # it asks for nothing else before it has this item
                return "bye" in connection.receive()[0]
        except ConnectionBroken:
            written.result()
            raise
    return False


def _answer(connection: Connection, item: WorkItem, score: Score) -> None:
    with _reported(connection, item):
        result = score()
    with contextlib.suppress(ConnectionBroken):  # who reads from it notices, too
        connection.send(*result_to_wire(result))


@contextlib.contextmanager
def _reported(connection: Connection, item: WorkItem) -> Iterator[None]:
    """Whatever goes wrong, the pool learns it before this process ends."""
    try:
        yield
    except Exception as error:  # whatever it was; it is raised again
        failed = {"item": item.id, "failed": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(ConnectionBroken):
            connection.send(failed, b"")
        raise


def _still_open(answers: list[Future[None]]) -> list[Future[None]]:
    """The answers that are not given yet; raises what kept another from being given."""
    for answer in answers:
        if answer.done():
            answer.result()
    return [answer for answer in answers if not answer.done()]


def _said_goodbye(connection: Connection) -> bool:
    """Whether a learner whose end is closed has said so: its farewell is there to be read."""
    return connection.wait(0.5) and "bye" in connection.receive()[0]
