"""Weights from a learner to any number of actors: versioned, verified, bit for bit.

    learner ─► Publisher ─► store ─► Subscriber.prepare (beside generation) ─► Subscriber.flip

A store is any place for blobs: this process, a folder or bucket, another process over TCP.
"""

from jaxrl.sync.errors import (
    DamagedManifest,
    NotInStore,
    StoreError,
    StoreFull,
    Superseded,
    SyncError,
    WrongRun,
)
from jaxrl.sync.files import FsspecStore
from jaxrl.sync.publisher import Published, Publisher, SyncConfig
from jaxrl.sync.stores import MemoryStore, Store
from jaxrl.sync.subscriber import Subscriber, Update

__all__ = [
    "DamagedManifest",
    "FsspecStore",
    "MemoryStore",
    "NotInStore",
    "Published",
    "Publisher",
    "Store",
    "StoreError",
    "StoreFull",
    "Subscriber",
    "Superseded",
    "SyncConfig",
    "SyncError",
    "Update",
    "WrongRun",
]
