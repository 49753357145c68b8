"""A store that other processes and machines reach over TCP."""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from jaxrl.sync.connection import MAX_BODY_BYTES, Connection, checked_secret, split_address
from jaxrl.sync.errors import ConnectionBroken, NotInStore, Refused, StoreError, StoreFull
from jaxrl.sync.stores import Store, checked_key, checked_prefix, get_range

_log = logging.getLogger(__name__)
_POLL_S = 0.25  # how soon an idle thread sees that its server closes
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


class StoreServer:
    """Lends a store to who knows the secret; a context manager.

    Back-pressure: at most `max_requests` requests are read, answered and held in memory at once. A
    connection whose turn has not come is not read from, so that TCP makes its sender wait.
    """

    def __init__(
        self,
        store: Store,
        address: str = "127.0.0.1:0",
        *,
        secret: str | bytes,
        max_requests: int = 8,
        max_connections: int = 4096,
        max_body_bytes: int = MAX_BODY_BYTES,
        timeout_s: float = 60.0,
    ) -> None:
        """Begins to listen, in threads of its own.

        Args:
          store: what is lent.
          address: "host:port"; port 0 takes a free one, see `address`.
          secret: of at least 16 bytes.
          max_requests: that are worked on at once.
          max_connections: that are open at once; further ones wait to be accepted.
          max_body_bytes: of the largest blob.
          timeout_s: the longest that a client may stall within a request.

        Raises:
          ValueError: a secret that is too short, or no address.
          OSError: the address cannot be listened on.
        """
        self._store, self._secret = store, checked_secret(secret)
        self._options = {"timeout_s": timeout_s, "max_body_bytes": max_body_bytes}
        self._turns = threading.BoundedSemaphore(max_requests)
        self._seats = threading.BoundedSemaphore(max_connections)
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self._listener.settimeout(_POLL_S)
        self._closing = threading.Event()
        self._threads: set[threading.Thread] = set()
        self.refused = 0
        """Connections of strangers that were turned away."""
        self._accepting = threading.Thread(target=self._accept, name="sync-accept", daemon=True)
        self._accepting.start()

    @property
    def address(self) -> str:
        """Where it listens, as "host:port"."""
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _accept(self) -> None:
        while not self._closing.is_set():
            if not self._seats.acquire(timeout=_POLL_S):
                continue
            try:
                sock, peer = self._listener.accept()
            except OSError:  # nobody came, or the listener was closed
                self._seats.release()
                continue
            thread = threading.Thread(
                target=self._serve, args=(sock, str(peer)), name="sync-serve", daemon=True
            )
            self._threads = {t for t in self._threads if t.is_alive()} | {thread}
            thread.start()

    def _serve(self, sock: socket.socket, peer: str) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            with Connection(sock, self._secret, "server", **self._options) as connection:
                self._converse(connection)
        except Refused as error:
            self.refused += 1
            _log.warning("refused a connection from %s: %s", peer, error)
        except ConnectionBroken as error:
            _log.info("lost the connection of %s: %s", peer, error)
        finally:
            sock.close()
            self._seats.release()

    def _converse(self, connection: Connection) -> None:
        while not self._closing.is_set():
            if connection.wait(_POLL_S):
                with self._turns:
                    header, body = connection.receive()
                    connection.send(*self._answer(header, body))

    def _answer(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            match request:
                case {"put": str(key)}:
                    self._store.put(checked_key(key), body)
                    return {}, b""
                case {"get": str(key), "start": int(start), "stop": int(stop)}:
                    return {}, get_range(self._store, checked_key(key), *_range(start, stop))
                case {"get": str(key)}:
                    return {}, self._store.get(checked_key(key))
                case {"keys": str(prefix)}:
                    return {}, json.dumps(self._store.keys(checked_prefix(prefix))).encode()
                case {"delete": str(key)}:
                    self._store.delete(checked_key(key))
                    return {}, b""
                case _:
                    return {"error": "request", "message": f"no such request: {request}"}, b""
        except KeyError as error:
            return {"error": "missing", "message": str(error)}, b""
        except StoreFull as error:
            return {"error": "full", "message": str(error)}, b""
        except (StoreError, ValueError) as error:
            return {"error": "store", "message": str(error)}, b""

    def close(self) -> None:
        """Stops listening and ends all connections once their requests are answered."""
        self._closing.set()
        self._accepting.join()
        self._listener.close()
        for thread in self._threads:
            thread.join(self._options["timeout_s"])

    def __enter__(self) -> "StoreServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TcpStore:
    """The store of a `StoreServer`; a context manager.

    Threads that ask at the same time have a connection each. One that breaks is made anew and the
    request repeated, which is harmless: each sets or reads the blob of a key.
    """

    def __init__(
        self,
        address: str,
        *,
        secret: str | bytes,
        patience_s: float = 60.0,
        timeout_s: float = 60.0,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        """Prepares to connect, which the first request does.

        Args:
          address: "host:port" of the server.
          secret: of the server.
          patience_s: how long a request is tried again before it fails.
          timeout_s: the longest that the server may stall within a request.
          max_body_bytes: of the largest blob.

        Raises:
          ValueError: a secret that is too short, or no address.
        """
        split_address(address)
        self.address, self._secret = address, checked_secret(secret)
        self._patience_s = patience_s
        self._options = {"timeout_s": timeout_s, "max_body_bytes": max_body_bytes}
        self._idle: list[Connection] = []
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes) -> None:
        self._request({"put": checked_key(key)}, data)

    def get(self, key: str) -> bytes:
        return self._request({"get": checked_key(key)})

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        return self._request({"get": checked_key(key), "start": start, "stop": stop})

    def keys(self, prefix: str) -> list[str]:
        return json.loads(self._request({"keys": checked_prefix(prefix)}))

    def delete(self, key: str) -> None:
        self._request({"delete": checked_key(key)})

    def _request(self, request: dict[str, Any], body: bytes = b"") -> bytes:
        """Asks until there is an answer or patience ends.

        Raises:
          KeyError, StoreFull, StoreError: as the server's store raised them.
          Refused: the server does not know the secret.
        """
        header, data = self._asked(request, body)
        message = str(header.get("message", ""))
        match header.get("error"):
            case None:
                return data
            case "missing":
                raise NotInStore(message)
            case "full":
                raise StoreFull(message)
            case _:
                raise StoreError(f"{self.address}: {message}")

    def _asked(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        end, pause_s = time.monotonic() + self._patience_s, _FIRST_PAUSE_S
        while True:
            try:
                with self._lent() as connection:
                    connection.send(request, body)
                    return connection.receive()
            except ConnectionBroken as error:
                if time.monotonic() + pause_s > end:
                    raise StoreError(
                        f"no answer from {self.address} for {self._patience_s:g} s: {error}; does "
                        "the server run, and can this machine reach it?"
                    ) from error
                _log.info("%s: %s; trying again", self.address, error)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @contextlib.contextmanager
    def _lent(self) -> Iterator[Connection]:
        """A connection that nobody else uses meanwhile; one that made trouble is not used again."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = Connection.connect(self.address, self._secret, **self._options)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)

    def close(self) -> None:
        """Ends the connections that nobody uses; a later request makes another."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def __enter__(self) -> "TcpStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _range(start: int, stop: int) -> tuple[int, int]:
    if not 0 <= start <= stop:
        raise ValueError(f"a range needs 0 ≤ start ≤ stop: {start=}, {stop=}")
    return start, stop
