"""Fault tests start processes that import this folder's modules by name."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))


@pytest.fixture
def environment():
    """Of processes that shall find both the packages and this folder's modules."""
    return os.environ | {"PYTHONPATH": f"{HERE}:{ROOT}"}


@pytest.fixture
def learner(environment):
    """Starts learners as processes; those that are left are killed."""
    started = []

    def start(**options):
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_learner.py"), json.dumps(options)],
            env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


class Cutter:
    """A TCP relay that can cut what passes through it."""

    def __init__(self, target):
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs, self._lock = [], threading.Lock()
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            with self._lock:
                self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                sink.sendall(data)
        self._end(source)
        self._end(sink)

    def _end(self, sock):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    def cut(self):
        """Ends every connection that passes through, at whatever byte it is."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for sock in pair:
                self._end(sock)
        self.cuts += bool(pairs)

    def close(self):
        self._listener.close()
        self.cut()


@pytest.fixture
def cutter():
    made = []

    def make(target):
        made.append(Cutter(target))
        return made[-1]

    yield make
    for each in made:
        each.close()
