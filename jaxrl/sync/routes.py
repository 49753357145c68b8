"""Which payloads lead from the weights that one has to those that one wants."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from jaxrl.sync.manifest import Manifest, Payload

# Each payload costs a round trip and a pass over what it touches, however small it is.
_HOP_BYTES = 1 << 16


class Step(NamedTuple):
    """One payload of a route, and the manifest whose weights it gives."""

    payload: Payload
    target: Manifest


def route(
    manifests: Iterable[Manifest],
    goal: str,
    *,
    have: str | None = None,
    shortcuts: Mapping[str, Collection[Payload]] | None = None,
    avoid: Collection[str] = (),
) -> list[Step] | None:
    """The cheapest payloads from `have` to `goal`, in the order in which they are applied.

    A shortest path by dynamic programming: a payload's base has a lower sequence number than what
    it leads to, so one pass in rising order settles all of them.

    Args:
      manifests: those that are known.
      goal: id of the manifest whose weights are wanted.
      have: id of the manifest whose weights are there; None: none are.
      shortcuts: further payloads by the id of the manifest that they lead to.
      avoid: keys of payloads that proved bad.

    Returns:
      The steps, none where `have` is `goal`; or None where no route is known.
    """
    cost: dict[str, float] = {} if have is None else {have: 0.0}
    last: dict[str, Step] = {}
    for manifest in sorted(manifests, key=lambda m: m.sequence):
        ways = (*manifest.payloads, *(shortcuts or {}).get(manifest.id, ()))
        for payload in ways:
            before = 0.0 if payload.base is None else cost.get(payload.base)
            if before is None or payload.key in avoid:
                continue
            total = before + payload.size_bytes + _HOP_BYTES
            if total < cost.get(manifest.id, float("inf")):
                cost[manifest.id] = total
                last[manifest.id] = Step(payload, manifest)
    if goal not in cost:
        return None
    steps: list[Step] = []
    at: str | None = goal
    while at is not None and at != have:
        steps.append(last[at])
        at = last[at].payload.base
    return steps[::-1]
