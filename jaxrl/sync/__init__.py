"""Weights from a learner to any number of actors: versioned, verified, bit for bit.

    learner ─► Publisher ─► store ─► Subscriber.prepare (beside generation) ─► Subscriber.flip

A store is any place for blobs: this process, a folder or bucket, another process over TCP.
"""

from jaxrl.sync.background import BackgroundPublisher
from jaxrl.sync.config import SyncConfig
from jaxrl.sync.connection import Connection
from jaxrl.sync.errors import (
    ConnectionBroken,
    DamagedManifest,
    NotInStore,
    Refused,
    StoreError,
    StoreFull,
    Superseded,
    SyncError,
    WrongRun,
)
from jaxrl.sync.files import FsspecStore
from jaxrl.sync.link import Link, PacedStore
from jaxrl.sync.publisher import Published, Publisher
from jaxrl.sync.quantise import Quantised, dequantise, quantise, quantised_like
from jaxrl.sync.stores import MemoryStore, RangeStore, Store
from jaxrl.sync.subscriber import Subscriber, Update
from jaxrl.sync.tcp import StoreServer, TcpStore

__all__ = [
    "BackgroundPublisher",
    "Connection",
    "ConnectionBroken",
    "DamagedManifest",
    "FsspecStore",
    "Link",
    "MemoryStore",
    "NotInStore",
    "PacedStore",
    "Published",
    "Publisher",
    "Quantised",
    "RangeStore",
    "Refused",
    "Store",
    "StoreError",
    "StoreFull",
    "StoreServer",
    "Subscriber",
    "Superseded",
    "SyncConfig",
    "SyncError",
    "TcpStore",
    "Update",
    "WrongRun",
    "dequantise",
    "quantise",
    "quantised_like",
]
