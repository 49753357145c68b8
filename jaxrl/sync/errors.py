"""What can go wrong between a publisher and its subscribers."""


class SyncError(Exception):
    """Weights could not be published or fetched; those that serve are as they were."""


class StoreError(SyncError):
    """The store, or the way to it, failed; the message names the key and what to do."""


class StoreFull(StoreError):
    """There is no room for a blob; nothing was replaced."""


class NotInStore(KeyError):
    """The store has no blob under this key."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument
        return str(self.args[0]) if self.args else ""


class DamagedManifest(SyncError):
    """Bytes that are no manifest, or not the one that was written."""


class WrongRun(SyncError):
    """A manifest of another run lies among those of this one."""


class Superseded(SyncError):
    """Another publisher has published to this run since; two learners must not share a run."""


class ConnectionBroken(StoreError):
    """A connection was cut, stalled, or carried what is no message."""


class Refused(SyncError):
    """The other end of a connection does not know the shared secret; trying again is no use."""
