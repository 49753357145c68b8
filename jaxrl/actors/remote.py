"""An actor's end of a connection to its learner."""

import logging
import time

from jaxrl.actors.wire import item_from_json, result_to_wire
from jaxrl.actors.work import AbstractActor, Build
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
    while True:
        while not connection.wait(_LOOK_S):
            pass
        header, _ = connection.receive()
        if "bye" in header:
            return
        try:
            result = actor.run(item_from_json(header["item"]))
        except Exception as error:  # whatever it was: the pool learns it before this process ends
            connection.send({"failed": f"{type(error).__name__}: {error}"}, b"")
            raise
        try:
            connection.send(*result_to_wire(result))
        except ConnectionBroken:
            # A learner that ended meanwhile has said so: its farewell is there to be read.
            if connection.wait(0.5) and "bye" in connection.receive()[0]:
                return
            raise
