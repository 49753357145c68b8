"""SparseRL-Sync's cost model: bytes and seconds of a sync by the share of changed weights.

Hu et al., arXiv:2605.07330, equations for S, S_sparse and the compressed form. With N weights of
b_v bytes, of which a share ρ changed:

    dense        S   = N b_v
    sparse       S_s = ρ N (b_v + b_i)            int32 indices, b_i = 4; in bf16 S / S_s = 1/(3ρ)
    compressed   S_c = ρ N (b_i' + α b_v)         b_i' = 2 (int16 gaps), α in .6 … .7

and a transfer takes latency + 8 S / bandwidth.
"""

from dataclasses import dataclass

from jaxrl.sync import Link

VALUE_BYTES = 2
INDEX_BYTES = 4
GAP_BYTES = 2
ALPHA = 0.6
"""What entropy coding leaves of the values, at best, in the paper."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of one sync.

    Attributes:
      dense: of all weights.
      sparse: of changed weights as int32 indices and bf16 values.
      compressed: of changed weights as the paper models them.
    """

    dense: float
    sparse: float
    compressed: float


def sizes(elements: float, density: float) -> Sizes:
    """Bytes by the cost model.

    Args:
      elements: N.
      density: ρ, 0 … 1.

    >>> found = sizes(1e9, 0.0062)
    >>> round(found.dense / found.sparse, 1), round(found.dense / found.compressed)
    (53.8, 101)
    """
    changed = density * elements
    return Sizes(
        dense=VALUE_BYTES * elements,
        sparse=changed * (VALUE_BYTES + INDEX_BYTES),
        compressed=changed * (GAP_BYTES + ALPHA * VALUE_BYTES),
    )


def seconds(link: Link, size_bytes: float, *, requests: int = 1) -> float:
    """Seconds of a transfer.

    Args:
      link: bandwidth and latency.
      size_bytes: in all.
      requests: one after the other, each of which waits for the latency.
    """
    return requests * link.latency_s + 8 * size_bytes / link.bits_per_s
