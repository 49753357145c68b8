"""A TCP relay between two processes that a test can cut."""

import contextlib
import socket
import threading
import time


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
            except OSError:  # closed
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:  # whoever should be there is dead, for now
                near.close()
                continue
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

    def cut_when_there(self, timeout_s=200.0):
        """Waits for a connection that passes through, and cuts it."""
        end = time.monotonic() + timeout_s
        while not self._pairs:
            assert time.monotonic() < end, "nobody connects"
            time.sleep(0.01)
        self.cut()

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
