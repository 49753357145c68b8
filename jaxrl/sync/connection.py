"""Messages between processes that share a secret: JSON and bytes, authenticated, bounded.

    server → client   magic (8 bytes), nonce (32)
    client → server   magic, nonce (32), HMAC(secret, "client" ‖ server's nonce ‖ client's nonce)
    server → client   1, HMAC(secret, "server" ‖ client's nonce ‖ server's nonce); or 0, the end

HMAC is HMAC-SHA-256 (RFC 2104) and compared in constant time. Both ends prove that they know the
secret, and neither proof can be replayed, or reflected as the other's. Then come messages:

    u32 size of the header, u64 size of the body (little-endian), header (JSON), body, tag (32)

The tag is the HMAC of the message's number and of all of it, under a key of this connection and
direction, so that nothing can be changed, repeated, left out or put in. Nothing is encrypted: a
network whose listeners are not trusted needs a tunnel (WireGuard, ssh). Nothing is unpickled.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

from jaxrl.sync.errors import ConnectionBroken, Refused

MAGIC = b"JAXRLSY1"
_NONCE = 32
_TAG = 32
_SIZES = struct.Struct("<IQ")
_SHORTEST_SECRET = 16
SECRET = "JAXRL_SECRET"
"""The environment variable in which processes get their shared secret."""
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 36
_CHUNK = 1 << 20

Role = Literal["client", "server"]


def checked_secret(secret: str | bytes) -> bytes:
    """The secret as bytes.

    Raises:
      ValueError: it is too short to resist guessing.
    """
    data = secret.encode() if isinstance(secret, str) else bytes(secret)
    if len(data) < _SHORTEST_SECRET:
        raise ValueError(
            f"a shared secret has at least {_SHORTEST_SECRET} bytes, got {len(data)}; make one by "
            "python -c 'import secrets; print(secrets.token_hex(32))'"
        )
    return data


def secret_from_environment() -> str:
    """The secret that a launcher has put into `JAXRL_SECRET`, where other users cannot read it.

    Raises:
      ValueError: it is not set.
    """
    secret = os.environ.get(SECRET)
    if not secret:
        raise ValueError(
            f"the environment must hold the learner's shared secret: {SECRET} is not set; make one "
            "by python -c 'import secrets; print(secrets.token_hex(32))', the same for all"
        )
    return secret


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port".

    Raises:
      ValueError: it is not of that form.

    >>> split_address("[::1]:7000")
    ('::1', 7000)
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"an address is 'host:port', such as 127.0.0.1:7000; got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


class Connection:
    """One authenticated connection; a context manager.

    Any thread may send; one at a time waits and receives.
    """

    def __init__(
        self,
        sock: socket.socket,
        secret: str | bytes,
        role: Role,
        *,
        timeout_s: float = 60.0,
        handshake_s: float = 10.0,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        """Takes over a connected socket and proves both ends to each other.

        Args:
          sock: connected; closed by `close`, and if this fails.
          secret: of at least 16 bytes, the same at both ends.
          role: who accepted the connection is the server.
          timeout_s: the longest that the other end may make no progress.
          handshake_s: the longest that all of the handshake may take.
          max_body_bytes: of a message; a larger one breaks the connection.

        Raises:
          Refused: the other end does not know the secret, or speaks another protocol.
          ConnectionBroken: it was cut, or too slow.
        """
        self._sock, self._max_body_bytes = sock, max_body_bytes
        self._deadline: float | None = time.monotonic() + handshake_s
        self._timeout_s = timeout_s
        try:
            keys = self._handshake(checked_secret(secret), role)
        except BaseException:
            sock.close()
            raise
        self._deadline = None
        self._send_key, self._receive_key = keys
        self._sent = self._received = 0
        self._sending = threading.Lock()

    @classmethod
    def connect(cls, address: str, secret: str | bytes, **options: Any) -> "Connection":
        """Connects to a server.

        Args:
          address: "host:port".
          secret: see `Connection`.
          **options: see `Connection`.

        Raises:
          Refused: see `Connection`.
          ConnectionBroken: nobody answers there, or see `Connection`.
        """
        try:
            sock = socket.create_connection(split_address(address), options.get("handshake_s", 10))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise ConnectionBroken(f"cannot connect to {address}: {error}") from error
        return cls(sock, secret, "client", **options)

    def _handshake(self, secret: bytes, role: Role) -> tuple[bytes, bytes]:
        """Keys for sending and receiving."""
        mine = secrets.token_bytes(_NONCE)
        if role == "server":
            self._write(MAGIC + mine)
            theirs = self._greeting()
            proof = self._read(_TAG)
            if not hmac.compare_digest(proof, _proof(secret, "client", mine, theirs)):
                self._write(b"\0")
                raise Refused("the other end does not know the secret")
            self._write(b"\1" + _proof(secret, "server", theirs, mine))
        else:
            theirs = self._greeting()
            self._write(MAGIC + mine + _proof(secret, "client", theirs, mine))
            if self._read(1) != b"\1":
                raise Refused("the server refuses this secret; both ends need the same one")
            if not hmac.compare_digest(self._read(_TAG), _proof(secret, "server", mine, theirs)):
                raise Refused("the server does not know the secret itself: it is a stranger")
        nonces = (mine, theirs) if role == "server" else (theirs, mine)
        to_server, to_client = (_proof(secret, way, *nonces) for way in ("to server", "to client"))
        return (to_client, to_server) if role == "server" else (to_server, to_client)

    def _greeting(self) -> bytes:
        magic = self._read(len(MAGIC))
        if magic != MAGIC:
            raise Refused(f"the other end speaks another protocol: it began with {magic!r}")
        return self._read(_NONCE)

    def send(self, header: Mapping[str, Any], body: bytes = b"") -> None:
        """Sends a message; waits while the other end does not read.

        Args:
          header: JSON values.
          body: as it is.

        Raises:
          ConnectionBroken: it was cut, or made no progress for `timeout_s`.
          ValueError: header or body above its bound.
        """
        text = json.dumps(header).encode()
        if len(text) > MAX_HEADER_BYTES or len(body) > self._max_body_bytes:
            raise ValueError(
                f"a message has at most {MAX_HEADER_BYTES} bytes of header and "
                f"{self._max_body_bytes} of body, got {len(text)} and {len(body)}"
            )
        head = _SIZES.pack(len(text), len(body)) + text
        with self._sending:
            tag = _tag(self._send_key, self._sent, head, body)
            self._sent += 1
            self._write(head)
            self._write(body)
            self._write(tag)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Waits for a message.

        Returns:
          Header and body.

        Raises:
          ConnectionBroken: it was cut, made no progress for `timeout_s`, or carried what is no
            message of the other end.
        """
        sizes = self._read(_SIZES.size)
        header_size, body_size = _SIZES.unpack(sizes)
        if header_size > MAX_HEADER_BYTES or body_size > self._max_body_bytes:
            raise ConnectionBroken(
                f"a message of {header_size} + {body_size} bytes is above the bounds of "
                f"{MAX_HEADER_BYTES} + {self._max_body_bytes}"
            )
        text, body = self._read(header_size), self._read(body_size)
        tag = _tag(self._receive_key, self._received, sizes + text, body)
        self._received += 1
        if not hmac.compare_digest(self._read(_TAG), tag):
            raise ConnectionBroken("a message was changed on its way")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConnectionBroken(f"a message whose header is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise ConnectionBroken("a message without a JSON object as header")
        return header, body

    def wait(self, timeout_s: float) -> bool:
        """Whether a message begins within a time, without reading it; also true at the end.

        Raises:
          ConnectionBroken: it was cut.
        """
        # Not by the socket's timeout, which is also that of who sends meanwhile.
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._sock, selectors.EVENT_READ)
                return bool(selector.select(timeout_s))
        except (OSError, ValueError) as error:  # ValueError: closed by another thread
            raise ConnectionBroken(f"the connection broke: {error}") from error

    def _read(self, size: int) -> bytes:
        # Memory grows with what arrives, not with what a length promises.
        parts, left = [], size
        while left:
            part = self._attempt(lambda left=left: self._sock.recv(min(left, _CHUNK)))
            if not part:
                raise ConnectionBroken(f"the connection ended {left} bytes early")
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._attempt(lambda view=view: self._sock.send(view[:_CHUNK])) :]

    def _attempt(self, act: Any) -> Any:
        left = self._timeout_s if self._deadline is None else self._deadline - time.monotonic()
        try:
            self._sock.settimeout(max(left, 1e-3))
            return act()
        except TimeoutError as error:
            raise ConnectionBroken(f"no progress for {max(left, 0):.3g} s") from error
        except OSError as error:
            raise ConnectionBroken(f"the connection broke: {error}") from error

    def close(self) -> None:
        """Ends the connection, also for a thread that waits in it; the second call does nothing."""
        with contextlib.suppress(OSError):  # it has ended already
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _proof(secret: bytes, purpose: str, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, purpose.encode() + b"\0" + first + second, hashlib.sha256)


def _tag(key: bytes, number: int, head: bytes, body: bytes) -> bytes:
    mac = hmac.new(key, struct.pack("<Q", number) + head, hashlib.sha256)
    mac.update(body)
    return mac.digest()
