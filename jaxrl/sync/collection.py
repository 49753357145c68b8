"""Garbage collection: what no subscriber needs any more leaves the store."""

import re
from collections.abc import Collection

from jaxrl.sync.index import Index
from jaxrl.sync.manifest import index_entry
from jaxrl.sync.routes import route
from jaxrl.sync.stores import Store

_PAYLOAD = re.compile(r".*/payloads/(\d{12})-[^/]+")


def floor(index: Index, positions: Collection[int], *, keep_anchors: int) -> int:
    """The lowest sequence number that is still needed.

    Whoever joins, or is too far behind, begins with an anchor; of those the newest `keep_anchors`
    are kept, so that one may prove damaged. A subscriber that lives keeps what follows its own
    publication as long as that is a cheaper way to the newest than an anchor is.

    Args:
      index: of the run.
      positions: sequence numbers of the publications that living subscribers serve.
      keep_anchors: at least 1.
    """
    manifests = index.manifests
    anchors = sorted(
        (s for s, m in manifests.items() if any(p.kind == "anchor" for p in m.payloads)),
        reverse=True,
    )
    lowest = anchors[:keep_anchors][-1] if anchors else 0
    newest = manifests.get(max(manifests, default=-1))
    for position in positions:
        own = manifests.get(position)
        if own is None or newest is None or position >= lowest:
            continue
        steps = route(manifests.values(), newest.id, have=own.id, shortcuts=index.shortcuts)
        if steps and steps[0].payload.kind != "anchor":
            lowest = position
    return lowest


def collect(store: Store, run: str, index: Index, lowest: int) -> None:
    """Removes what lies below a sequence number, and payloads that no manifest names.

    Manifests go first: a crash in between leaves payloads that the next call removes.

    Args:
      store: of the run.
      run: its identity.
      index: of the run, refreshed.
      lowest: from `floor`.

    Raises:
      StoreError: the store failed.
    """
    for key in store.keys(f"{run}/index/"):
        entry = index_entry(key)
        if entry is not None and min(n for n in entry if n is not None) < lowest:
            store.delete(key)
    index.refresh()
    named = {p.key for m in index.manifests.values() for p in m.payloads}
    named |= {p.key for payloads in index.shortcuts.values() for p in payloads}
    for key in store.keys(f"{run}/payloads/"):
        match = _PAYLOAD.fullmatch(key)
        # Payloads above the newest manifest may be of a publication that is under way.
        if key not in named and match is not None and int(match[1]) <= index.last:
            store.delete(key)
