"""Actors as processes: started on this machine, or joining from any other."""

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from queue import Empty, Queue
from types import TracebackType
from typing import Any

from jaxrl.actors.factory import Factory
from jaxrl.actors.pool import Pool, PoolConfig
from jaxrl.actors.wire import Malformed, item_to_json, result_from_wire
from jaxrl.actors.work import (
    AbstractActor,
    Accept,
    Interrupted,
    Refusal,
    Result,
    Score,
    Supply,
    WorkItem,
)
from jaxrl.sync import ConnectionBroken, Refused, SyncError
from jaxrl.sync.connection import SECRET, Connection, checked_secret, split_address

_log = logging.getLogger(__name__)
_LOOK_S = 0.2

MALFORMED = "malformed"
"""The reason of refusals for bytes that are no rollouts."""


class ActorFailed(RuntimeError):
    """A process that was an actor ended, or said why it cannot go on."""


class Processes(Pool):
    """Actors in processes of their own, which talk with the learner over TCP.

    `size` of them are started here, as `python -m jaxrl.actors`, and started again when they die;
    they end with this process, however it ends. Others may join from anywhere with the same command
    and the same secret, at any time; when one is lost, its item goes to the next.

    Processes are spawned, never forked, so that JAX may have started here; nothing is unpickled:
    an actor is made by the name of a function and JSON, and sends raw arrays.
    """

    def __init__(
        self,
        size: int,
        build: Factory | None = None,
        *,
        address: str = "127.0.0.1:0",
        secret: str | None = None,
        environment: Callable[[str], Mapping[str, str]] | None = None,
        connect_s: float = 300.0,
        max_connections: int = 4096,
        config: PoolConfig | None = None,
    ) -> None:
        """Listens; `start` starts the actors.

        Args:
          size: how many actors to start here; 0 where all of them join by themselves.
          build: makes them; needed where `size` is not 0.
          address: "host:port" to listen on; port 0 takes a free one, see `address`.
          secret: of at least 16 bytes; a random one where None. See `secret`.
          environment: variables to set for the actor of a name, such as `JAX_PLATFORMS` or
            `CUDA_VISIBLE_DEVICES`, beside those of this process.
          connect_s: the longest that a started actor may need to come up.
          max_connections: strangers being let in and actors that joined from outside, at once;
            further ones wait to be accepted. Started actors count only until they are known.
          config: how actors are treated; defaults where None.

        Raises:
          ValueError: no `build` for the actors to start, a short secret, or no address.
          OSError: the address cannot be listened on.
        """
        super().__init__(size, config)
        if size and build is None:
            raise ValueError(f"actors that are started here must be built: {size=}, build=None")
        self.secret = secret or secrets.token_hex(32)
        """What actors must know; pass it in their environment as JAXRL_SECRET."""
        checked_secret(self.secret)
        self._build, self._environment, self._connect_s = build, environment, connect_s
        if max_connections < 1:
            raise ValueError(f"max_connections must be at least 1, got {max_connections}")
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self._listener.settimeout(_LOOK_S)
        self._places = threading.BoundedSemaphore(max_connections)
        self._awaited: dict[str, Queue[Connection]] = {}
        self.refused = 0
        """Connections of strangers that were turned away."""

    @property
    def address(self) -> str:
        """Where it listens, as "host:port"."""
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def start(self, accept: Accept, supply: Supply | None = None) -> None:
        super().start(accept, supply)
        self._spawn(self._listen, "actors-listen")

    def close(self) -> None:
        super().close()
        self._listener.close()

    # ------------------------------------------------------------------ who connects

    def _listen(self, _: str) -> None:
        while not self._closed.is_set():
            if not self._places.acquire(timeout=_LOOK_S):
                continue
            try:
                sock, peer = self._listener.accept()
            except OSError:  # nobody came, or the listener was closed
                self._places.release()
                continue
            self._spawn(self._receive, f"actors-{peer[0]}-{peer[1]}", sock)

    def _receive(self, peer: str, sock: socket.socket) -> None:
        try:
            self._welcome(peer, sock)
        finally:
            self._places.release()

    def _welcome(self, peer: str, sock: socket.socket) -> None:
        """Lets a connection in: to the thread that waits for it, or as an actor that joins.

        Returns when it is turned away, passed on to that thread, or lost.
        """
        _keep_alive(sock)
        try:
            connection = Connection(sock, self.secret, "server")
            hello, _ = connection.receive()
            name, life = str(hello["hello"]), str(hello["life"])
        except (SyncError, KeyError) as error:
            with self._lock:
                self.refused += isinstance(error, Refused)
            _log.warning("turned away %s: %s", peer, error)
            sock.close()
            return
        if life in self._awaited:
            self._awaited[life].put(connection)
            return
        _log.info("%s joins", name)
        try:
            with _Remote(connection) as actor:
                self._answer(name, actor)
        except Exception as error:  # an actor may fail in any way; the run goes on
            if not self._closed.is_set():
                self._lose(name, error)

    # ------------------------------------------------------------------ who is started

    def _hire(self, name: str) -> AbstractActor:
        assert self._build is not None
        life = secrets.token_hex(8)
        arrived = self._awaited[life] = Queue()
        process = subprocess.Popen(
            [
                sys.executable, "-m", "jaxrl.actors", "--learner", self.address, "--name", name,
                "--build", self._build.target, "--config", json.dumps(dict(self._build.config)),
                "--life", life, "--with-parent",
            ],
            stdin=subprocess.PIPE,
            env=os.environ
            | {SECRET: self.secret}
            | dict(self._environment(name) if self._environment else {}),
        )  # fmt: skip
        try:
            return _Remote(self._wait_for(process, arrived), process)
        except BaseException:
            _end(process)
            raise
        finally:
            del self._awaited[life]

    def _wait_for(self, process: subprocess.Popen, arrived: "Queue[Connection]") -> Connection:
        end = time.monotonic() + self._connect_s
        while time.monotonic() < end:
            with contextlib.suppress(Empty):
                return arrived.get(timeout=_LOOK_S)
            if process.poll() is not None:
                raise ActorFailed(
                    f"it ended before it connected ({_ended(process)}); its own log says why"
                )
            if self._closed.is_set():
                raise Interrupted("the pool closes")
        raise ActorFailed(f"it did not connect within {self._connect_s:.0f} s (connect_s)")


class _Remote:
    """The actor behind a connection."""

    def __init__(self, connection: Connection, process: subprocess.Popen | None = None) -> None:
        self._connection, self._process = connection, process
        self._changed = threading.Condition()
        self._arrived: dict[int, deque[tuple[dict[str, Any], bytes]]] = {}
        self._reading = self._interrupted = False
        self._failure: Exception | None = None

    def __enter__(self) -> "_Remote":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(SyncError):
            self._connection.send({"bye": True}, b"")
        self._connection.close()
        if self._process is not None:
            _end(self._process)

    def interrupt(self) -> None:
        with self._changed:
            self._interrupted = True
            self._changed.notify_all()

    def write(self, item: WorkItem) -> Score:
        """Has an item written; what it returns waits for the answer, and raises alike.

        Raises:
          ActorFailed: the actor said so, or its process ended.
          ConnectionBroken: nothing is known of it any more.
          Interrupted: see `interrupt`.
        """
        with self._changed:
            self._arrived[item.id] = deque()
        try:
            self._connection.send({"item": item_to_json(item)}, b"")
        except ConnectionBroken as error:
            raise self._explained(error) from error
        header, body = self._message(item)
        if "written" in header:
            return lambda: self._answer(item, *self._message(item))
        return lambda: self._answer(item, header, body)

    def _answer(self, item: WorkItem, header: Mapping[str, Any], body: bytes) -> Result:
        with self._changed:
            del self._arrived[item.id]
        return answer_to(item, header, body)

    def _message(self, item: WorkItem) -> tuple[dict[str, Any], bytes]:
        """The next message about an item; of all who wait for one, one reads."""
        while True:
            with self._changed:
                while not self._arrived[item.id]:
                    if self._interrupted:
                        raise Interrupted("the actor is given up, or the pool closes")
                    if self._failure is not None:
                        raise self._failure
                    if not self._reading:
                        self._reading = True
                        break
                    self._changed.wait()
                else:
                    header, body = self._arrived[item.id].popleft()
                    if "failed" in header:
                        raise ActorFailed(str(header["failed"]))
                    return header, body
            self._read()

    def _read(self) -> None:
        """Reads a message if there is one soon, for whom it concerns."""
        message, failure = None, None
        try:
            if self._connection.wait(_LOOK_S):
                message = self._connection.receive()
        except ConnectionBroken as error:
            failure = self._explained(error)
        with self._changed:
            self._reading, self._failure = False, failure
            if message is not None:
                about = message[0].get("item")
                if type(about) is not int or about not in self._arrived:
                    about = min(self._arrived)  # an answer to nothing that was asked: to refuse
                self._arrived[about].append(message)
                # Of its other items an actor that fails says nothing any more.
                self._interrupted |= "failed" in message[0]
            self._changed.notify_all()

    def _explained(self, error: ConnectionBroken) -> Exception:
        """The end of the process is the better reason, where there is one."""
        if self._process is None:
            return error
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
            return ActorFailed(_ended(self._process))
        return error


def answer_to(item: WorkItem, header: Mapping[str, Any], body: bytes) -> Result:
    """An actor's answer from its header and body; a refusal where they are no answer to `item`."""
    try:
        result = result_from_wire(header, body)
        if result.item != item.id:
            raise Malformed(f"it answers item {result.item}, asked was {item.id}")
    except Malformed as error:
        actor = str(header.get("actor", "?"))
        refusal = Refusal(reason=MALFORMED, detail=str(error), item=item.id, actor=actor)
        return Result(item=item.id, actor=actor, version=-1, rollouts=None, refusal=refusal)
    return result


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _ended(process: subprocess.Popen) -> str:
    code = process.returncode
    how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
    return f"process {process.pid} ended by {how}"


def _keep_alive(sock: socket.socket) -> None:
    """Lets the system notice within half a minute that the other machine is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
