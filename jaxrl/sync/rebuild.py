"""From payloads to weights, of which not a bit is in doubt."""

import hashlib
from collections.abc import Sequence
from typing import Any

from jaxrl.sync.manifest import Payload
from jaxrl.sync.routes import Step
from jaxrl.sync.stores import Store
from kernels import sparse_delta


class BadPayload(Exception):
    """A payload that must not be used; another way may exist.

    Attributes:
      key: of the payload.
    """

    def __init__(self, key: str, reason: object) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key


def fetch(store: Store, payload: Payload) -> bytes:
    """The bytes of a payload as they were written.

    Raises:
      BadPayload: they are gone, or others.
      StoreError: the store failed.
    """
    try:
        data = store.get(payload.key)
    except KeyError as error:
        raise BadPayload(payload.key, "it is not in the store") from error
    if len(data) != payload.size_bytes or hashlib.sha256(data).hexdigest() != payload.sha256:
        raise BadPayload(
            payload.key,
            f"damaged: {len(data)} bytes, not the {payload.size_bytes} that were written",
        )
    return data


def rebuild(
    params: Any,
    known: sparse_delta.TreeDigest | None,
    steps: Sequence[Step],
    payloads: Sequence[bytes],
) -> tuple[Any, sparse_delta.TreeDigest | None]:
    """Applies payloads one after the other; what it is given stays as it is.

    Args:
      params: the weights before; for an anchor shapes and shardings are enough.
      known: their digest; None before an anchor.
      steps: from `route`.
      payloads: of the steps.

    Returns:
      The weights of the last step, and their digest as far as the payload carries it.

    Raises:
      BadPayload: one is damaged, or leads elsewhere than its manifest says.
      WrongModel: they are of weights of other names, shapes or dtypes.
    """
    for step, data in zip(steps, payloads, strict=True):
        base = None if step.payload.kind == "anchor" else known
        try:
            params = sparse_delta.apply(params, data, base)
            known = sparse_delta.inspect(data).target_digest
        except sparse_delta.WrongModel:
            raise
        except sparse_delta.CorruptPayload as error:
            raise BadPayload(step.payload.key, error) from error
        if known is None or known.root.hex() != step.target.digest:
            raise BadPayload(step.payload.key, "it leads to other weights than its manifest says")
    return params, known
