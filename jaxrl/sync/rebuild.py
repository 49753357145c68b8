"""From payloads to weights, of which not a bit is in doubt."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.sync.fetching import BadPayload
from jaxrl.sync.routes import Step
from jaxrl.sync.trees import size_bytes
from kernels import sparse_delta

_COPIED = 1 / 8
"""Share of the weights up to which it pays to copy what did not change, to donate the rest."""


def rebuild(
    params: Any,
    known: sparse_delta.TreeDigest | None,
    steps: Sequence[Step],
    payloads: Sequence[bytes | sparse_delta.PartialPayload],
) -> tuple[Any, sparse_delta.TreeDigest | None]:
    """Applies payloads one after the other; what it is given stays as it is.

    Weights in between are given up as soon as the next ones stand, so that a chain of any length
    needs the memory of two versions: the one that was given and the one that is made.

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
    given = {id(leaf) for leaf in jax.tree.leaves(params)}
    for number, (step, data) in enumerate(zip(steps, payloads, strict=True)):
        base, donate = None if step.payload.kind == "anchor" else known, False
        if number:
            params, donate = _given_up(params, given)
        try:
            params = sparse_delta.apply(params, data, base, donate=donate)
            known = sparse_delta.inspect(data).target_digest
        except sparse_delta.WrongModel:
            raise
        except sparse_delta.CorruptPayload as error:
            raise BadPayload(step.payload.key, error) from error
        if known is None or known.root.hex() != step.target.digest:
            raise BadPayload(step.payload.key, "it leads to other weights than its manifest says")
    return params, known


def _given_up(params: Any, given: set[int]) -> tuple[Any, bool]:
    """Weights of which no array is one that was given, and whether they may be donated.

    What a delta does not change is the same array before and after it.
    """
    shared = [leaf for leaf in jax.tree.leaves(params) if id(leaf) in given]
    if size_bytes(shared) > _COPIED * size_bytes(params):
        return params, False
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in given else x, params), True
