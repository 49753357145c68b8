"""A store over TCP: strangers outside, broken connections mended, senders held back."""

import logging
import socket
import threading
import time

import pytest

from jaxrl import sync


def test_a_stranger_is_refused_and_counted(secret, caplog):
    store = sync.MemoryStore()
    with sync.StoreServer(store, secret=secret) as server:
        with (
            sync.TcpStore(server.address, secret="another secret of enough bytes") as stranger,
            caplog.at_level(logging.WARNING),
            pytest.raises(sync.Refused, match="both ends need the same one"),
        ):
            stranger.put("a", b"")
        assert _soon(lambda: server.refused == 1)
        assert "refused a connection" in caplog.text
        assert store.keys("") == []
        with sync.TcpStore(server.address, secret=secret) as friend:
            friend.put("a", b"1")
            assert friend.get("a") == b"1"


def test_a_request_outlives_a_cut_connection_and_a_restart_of_the_server(secret):
    store = sync.MemoryStore()
    server = sync.StoreServer(store, secret=secret)
    address = server.address
    with sync.TcpStore(address, secret=secret) as client:
        client.put("a", b"1")
        client._idle[0]._sock.shutdown(socket.SHUT_RDWR)
        assert client.get("a") == b"1"
        server.close()
        again = []
        restart = threading.Timer(
            0.3, lambda: again.append(sync.StoreServer(store, address, secret=secret))
        )
        restart.start()
        client.put("b", b"2")
        restart.join()
        assert client.keys("") == ["a", "b"]
        again[0].close()


def test_patience_ends(secret):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (
        sync.TcpStore(address, secret=secret, patience_s=0.2) as client,
        pytest.raises(sync.StoreError, match=r"no answer from .* for 0.2 s.*does the server run"),
    ):
        client.get("a")


def test_senders_wait_while_the_store_is_slow(secret):
    """Of many puts at once no more than `max_requests` are in the server's memory."""

    class Slow(sync.MemoryStore):
        def __init__(self):
            super().__init__()
            self.inside = self.most = 0
            self.gate, self.count = threading.Event(), threading.Lock()

        def put(self, key: str, data: bytes) -> None:
            with self.count:
                self.inside += 1
                self.most = max(self.most, self.inside)
            self.gate.wait(200)
            super().put(key, data)
            with self.count:
                self.inside -= 1

    slow = Slow()
    size = 8 << 20  # more than the buffers of a socket hold
    with sync.StoreServer(slow, secret=secret, max_requests=2) as server:
        clients = [sync.TcpStore(server.address, secret=secret) for _ in range(6)]
        threads = [
            threading.Thread(target=client.put, args=(f"k{n}", bytes(size)))
            for n, client in enumerate(clients)
        ]
        for thread in threads:
            thread.start()
        assert _soon(lambda: slow.inside == 2)
        time.sleep(0.2)
        assert slow.inside == 2
        assert sum(thread.is_alive() for thread in threads) == 6
        slow.gate.set()
        for thread in threads:
            thread.join(200)
        assert slow.keys("") == [f"k{n}" for n in range(6)]
        assert slow.most == 2
        for client in clients:
            client.close()


def test_who_stalls_in_a_request_loses_its_turn(secret):
    store = sync.MemoryStore()
    with (
        sync.StoreServer(store, secret=secret, max_requests=1, timeout_s=0.3) as server,
        sync.Connection.connect(server.address, secret) as stalled,
        sync.TcpStore(server.address, secret=secret) as other,
    ):
        stalled._sock.sendall(b"\x05")  # the first byte of a length
        other.put("a", b"1")
        assert store.get("a") == b"1"


def test_what_is_no_request_is_answered(secret):
    with (
        sync.StoreServer(sync.MemoryStore(), secret=secret) as server,
        sync.Connection.connect(server.address, secret) as connection,
    ):
        for request in ({"exec": "rm"}, {"get": 3}, {"get": "../x"}, {}):
            connection.send(request)
            header, body = connection.receive()
            assert header["error"] in ("request", "store")
            assert body == b""


def test_closing_the_server_ends_idle_connections(secret):
    server = sync.StoreServer(sync.MemoryStore(), secret=secret)
    with sync.TcpStore(server.address, secret=secret, patience_s=0.2) as client:
        client.put("a", b"")
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < 30  # a client may stall for 60 s within a request
        with pytest.raises(sync.StoreError, match="no answer"):
            client.get("a")


def test_versions_travel_over_tcp(secret, weights, like, bits):
    with (
        sync.StoreServer(sync.MemoryStore(), secret=secret) as server,
        sync.TcpStore(server.address, secret=secret) as learner_side,
        sync.TcpStore(server.address, secret=secret) as actor_side,
    ):
        publisher = sync.Publisher(learner_side, run_id="r")
        actor = sync.Subscriber(actor_side, run_id="r", like=like)
        for version in range(3):
            publisher.publish(weights(version), version)
            assert actor.prepare()
            actor.flip()
            assert bits(actor.params) == bits(weights(version))


def test_an_actor_goes_on_with_what_it_has_while_the_server_is_away(secret, weights, like, bits):
    store = sync.MemoryStore()
    publisher = sync.Publisher(store, run_id="r")
    publisher.publish(weights(0), 0)
    server = sync.StoreServer(store, secret=secret)
    with sync.TcpStore(server.address, secret=secret, patience_s=0.2) as client:
        actor = sync.Subscriber(client, run_id="r", like=like)
        assert actor.prepare()
        actor.flip()
        publisher.publish(weights(1), 1)
        server.close()
        assert not actor.prepare()
        assert "no answer from" in str(actor.problem)
        assert actor.version == 0
        assert bits(actor.params) == bits(weights(0))
        with sync.StoreServer(store, client.address, secret=secret):
            assert actor.prepare()
            actor.flip()
            assert bits(actor.params) == bits(weights(1))


def test_a_connection_cut_in_the_middle_of_the_weights(secret, weights, like, bits):
    """The first payload stops half-way; the second attempt brings it whole."""

    class Cutting(sync.MemoryStore):
        cuts = 0

        def get(self, key: str) -> bytes:
            data = super().get(key)
            if "payloads" in key and not self.cuts:
                self.cuts += 1
                for connection in connections:
                    # A length, half of what it promises, and the end.
                    connection._write(b"\x02\0\0\0" + len(data).to_bytes(8, "little") + b"{}")
                    connection._write(data[: len(data) // 2])
                    connection.close()
            return data

    connections = []
    original = sync.StoreServer._converse

    def noted(self, connection):
        connections.append(connection)
        original(self, connection)

    store = Cutting()
    sync.Publisher(store, run_id="r").publish(weights(0), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync.StoreServer, "_converse", noted)
        with (
            sync.StoreServer(store, secret=secret) as server,
            sync.TcpStore(server.address, secret=secret) as client,
        ):
            actor = sync.Subscriber(client, run_id="r", like=like)
            assert actor.prepare()
            actor.flip()
            assert store.cuts == 1
            assert len(connections) >= 2
            assert bits(actor.params) == bits(weights(0))


def test_an_actor_with_another_secret_is_told_at_once(secret, like):
    with (
        sync.StoreServer(sync.MemoryStore(), secret=secret) as server,
        sync.TcpStore(server.address, secret="another secret of enough bytes") as client,
        pytest.raises(sync.Refused),
    ):
        sync.Subscriber(client, run_id="r", like=like).prepare()


def _soon(condition) -> bool:
    end = time.monotonic() + 200
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
