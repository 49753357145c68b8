"""Connections let in who knows the secret, and carry messages as they were sent."""

import contextlib
import hashlib
import hmac
import json
import socket
import struct
import threading
import time

import pytest

from jaxrl import sync
from jaxrl.sync import connection as wire
from jaxrl.sync.connection import Connection


def pair(secret, other=None, **options):
    """Both ends of a connection over a socket pair; each may be the error that it ended with."""
    left, right = socket.socketpair()
    ends = {}

    def serve():
        try:
            ends["server"] = Connection(left, secret, "server", **options)
        except sync.SyncError as error:
            ends["server"] = error

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        ends["client"] = Connection(right, other or secret, "client", **options)
    except sync.SyncError as error:
        ends["client"] = error
    thread.join()
    return ends["server"], ends["client"]


def test_messages_arrive_as_they_were_sent_both_ways(secret):
    server, client = pair(secret)
    with server, client:
        for number in range(3):
            client.send({"put": f"k{number}"}, bytes(range(number * 50)))
            assert server.receive() == ({"put": f"k{number}"}, bytes(range(number * 50)))
            server.send({"n": number, "é": None})
            assert client.receive() == ({"n": number, "é": None}, b"")


def test_two_secrets_are_refused_at_both_ends(secret):
    server, client = pair(secret, "another secret of enough bytes")
    assert isinstance(server, sync.Refused)
    assert "does not know the secret" in str(server)
    assert isinstance(client, sync.Refused)
    assert "refuses this secret" in str(client)


def test_short_secrets_are_refused():
    with pytest.raises(ValueError, match=r"at least 16 bytes, got 5.*token_hex"):
        wire.checked_secret("short")


def test_a_server_that_does_not_know_the_secret_is_refused(secret):
    """It says yes to anybody, in order to be sent weights."""
    left, right = socket.socketpair()

    def lure():
        left.sendall(wire.MAGIC + bytes(32))
        left.recv(8 + 32 + 32, socket.MSG_WAITALL)
        left.sendall(b"\1" + bytes(32))

    thread = threading.Thread(target=lure)
    thread.start()
    with left, pytest.raises(sync.Refused, match="does not know the secret itself"):
        Connection(right, secret, "client")
    thread.join()


def test_a_proof_cannot_be_reflected(secret):
    """A stranger answers the server's challenge with what the server says to the same challenge."""
    left, right = socket.socketpair()
    refusal = []

    def serve():
        with pytest.raises(sync.Refused) as caught:
            Connection(left, secret, "server")
        refusal.append(str(caught.value))

    thread = threading.Thread(target=serve)
    thread.start()
    with right:
        greeting = right.recv(40, socket.MSG_WAITALL)
        nonce = greeting[8:]
        mine = bytes(32)
        # What a server that knows the secret would say of these nonces, in its own role.
        proof = hmac.digest(secret.encode(), b"server\0" + nonce + mine, hashlib.sha256)
        right.sendall(wire.MAGIC + mine + proof)
        assert right.recv(1) == b"\0"
        assert right.recv(1) == b""
    thread.join()
    assert refusal == ["the other end does not know the secret"]


def test_another_protocol_is_refused(secret):
    left, right = socket.socketpair()
    with right:
        right.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(sync.Refused, match=r"another protocol.*GET"):
            Connection(left, secret, "server")


def test_who_says_nothing_is_not_waited_for_long(secret):
    left, right = socket.socketpair()
    started = time.monotonic()
    with right, pytest.raises(sync.ConnectionBroken, match="no progress"):
        Connection(left, secret, "server", timeout_s=250.0, handshake_s=0.2)
    assert time.monotonic() - started < 200  # not as long as any message may take


def test_who_says_one_byte_at_a_time_is_not_waited_for_long(secret):
    left, right = socket.socketpair()
    stop = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            for byte in wire.MAGIC + bytes(64):
                right.sendall(bytes([byte]))
                if stop.wait(0.5):
                    return

    thread = threading.Thread(target=drip)
    thread.start()
    started = time.monotonic()
    with pytest.raises(sync.ConnectionBroken):
        Connection(left, secret, "server", handshake_s=1.2)
    assert time.monotonic() - started < 30  # all 72 bytes would take 36 s
    stop.set()
    thread.join()
    right.close()


class Tap:
    """Sits between two ends after their handshake, and does what it likes to the bytes."""

    def __init__(self, secret, change):
        self.server_side, inner = socket.socketpair()
        outer, self.client_side = socket.socketpair()
        self._ends, self._change = (inner, outer), change
        self._handshake = (8 + 32 + 32, 8 + 32 + 1 + 32)
        self.threads = [threading.Thread(target=self._pump, args=(way,)) for way in (0, 1)]
        for thread in self.threads:
            thread.start()

    def _pump(self, way):
        source, sink = self._ends[1 - way], self._ends[way]
        left = self._handshake[way]
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                shaken, rest = data[:left], data[left:]
                left -= len(shaken)
                sink.sendall(shaken + (self._change(rest) if rest and way == 0 else rest))
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self):
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        for end in self._ends:
            end.close()


def flip_last(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def flip_header(data):
    at = data.find(b"put")
    return data[:at] + b"get" + data[at + 3 :] if at >= 0 else data


def tapped(secret, change):
    """Both ends of a connection whose messages to the server somebody changes, and the tap."""
    tap = Tap(secret, change)
    ends = []
    thread = threading.Thread(
        target=lambda: ends.append(Connection(tap.server_side, secret, "server", timeout_s=5.0))
    )
    thread.start()
    client = Connection(tap.client_side, secret, "client", timeout_s=5.0)
    thread.join()
    return ends[0], client, tap


@pytest.mark.parametrize("change", [flip_last, flip_header, lambda data: data[1:] + data[:1]])
def test_what_is_changed_on_the_way_is_not_taken(secret, change):
    server, client, tap = tapped(secret, change)
    with server, client:
        client.send({"put": "a"}, b"payload")
        with pytest.raises(sync.ConnectionBroken):
            server.receive()
    tap.close()


def test_what_is_sent_again_by_a_stranger_is_not_taken_twice(secret):
    server, client, tap = tapped(secret, lambda data: data + data)
    with server, client:
        # In one piece, as the tap doubles what it reads.
        parts = []
        client._write = parts.append
        client.send({"put": "a"}, b"payload")
        client._sock.sendall(b"".join(parts))
        assert server.receive() == ({"put": "a"}, b"payload")
        with pytest.raises(sync.ConnectionBroken, match="changed on its way"):
            server.receive()
    tap.close()


def test_messages_have_bounds(secret):
    server, client = pair(secret, max_body_bytes=100)
    with server, client:
        with pytest.raises(ValueError, match=r"at most .* 100 of body, got 12 and 101"):
            client.send({"put": "a"}, bytes(101))
        client._sock.sendall(struct.pack("<IQ", 2, 1 << 40) + json.dumps({}).encode())
        with pytest.raises(sync.ConnectionBroken, match="above the bounds"):
            server.receive()


def test_a_connection_cut_in_a_message_says_so(secret):
    server, client = pair(secret)
    with server:
        client._sock.sendall(struct.pack("<IQ", 2, 1000) + b"{}" + bytes(400))
        client.close()
        with pytest.raises(sync.ConnectionBroken, match="ended 600 bytes early"):
            server.receive()


@pytest.mark.parametrize("text", [b"no JSON", b"\xff\xfe", b"[" * 100_000, b"[]"])
def test_a_header_that_is_no_json_object_breaks_the_connection(secret, text):
    """Of one who knows the secret: another version of this program, or damaged memory."""
    server, client = pair(secret)
    with server, client:
        head = struct.pack("<IQ", len(text), 0) + text
        client._sock.sendall(head + wire._tag(client._send_key, 0, head, b""))
        with pytest.raises(sync.ConnectionBroken, match="JSON"):
            server.receive()


@pytest.mark.parametrize("text", ["nowhere", "host:", "host:70000", "host:-1", ":x"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="an address is 'host:port'"):
        wire.split_address(text)
