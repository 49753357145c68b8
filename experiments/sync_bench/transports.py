"""The stores between learner and actor: an emulated link, and TCP to another process."""

import contextlib
import multiprocessing
import secrets
from collections.abc import Iterator
from multiprocessing.connection import Connection

from jaxrl import sync

LOOPBACK = "loopback TCP"

Ends = tuple[sync.Store, sync.Store]
"""The store as the learner sees it, and as the actor does."""


@contextlib.contextmanager
def emulated(link: sync.Link) -> Iterator[Ends]:
    """A store at the learner, and a link to the actor."""
    store = sync.MemoryStore()
    yield store, sync.PacedStore(store, link)


@contextlib.contextmanager
def loopback() -> Iterator[Ends]:
    """A store in a process of its own, to which both ends have a TCP connection."""
    secret = secrets.token_hex(32)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, secret), daemon=True)
    process.start()
    try:
        if not ours.poll(120):
            raise OSError("the process of the store did not start within two minutes")
        address = ours.recv()
        with (
            sync.TcpStore(address, secret=secret) as learner,
            sync.TcpStore(address, secret=secret) as actor,
        ):
            yield learner, actor
    finally:
        ours.send("close")
        process.join(10)
        process.kill()
        ours.close()


def _serve(pipe: Connection, secret: str) -> None:
    with sync.StoreServer(sync.MemoryStore(), secret=secret) as server:
        pipe.send(server.address)
        with contextlib.suppress(EOFError):
            pipe.recv()
