"""This project's codec as a contestant, through its public functions."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import zstandard

from experiments.delta_bench.codec import Codec
from experiments.delta_bench.pairs import Pair, bits_of
from experiments.delta_bench.recorded import Versions
from kernels import sparse_delta

NAME = "sparse_delta (ours)"
UNKNOWN = "ours, digest of old unknown"
FAST = "ours, fast"


@dataclass(frozen=True, kw_only=True)
class Held:
    """Old weights, and the digest that the version before left behind."""

    tree: Any
    digest: sparse_delta.TreeDigest


def ours() -> list[Codec]:
    """This project, as it runs from version to version, unconditional, and as it runs first.

    Sender and receiver both know the digest of the weights they hold from the payload before;
    the first time they have to read all of them for it. All checks are on in all.
    """
    chained = Codec(
        name=NAME,
        encode=lambda old, new, threads: sparse_delta.encode(
            old.tree, new, base_digest=old.digest, threads=threads
        ),
        apply=lambda old, payload, threads: sparse_delta.apply(
            old.tree, payload, base_digest=old.digest, threads=threads
        ),
        sides=_held,
        bits=bits_of,
    )
    fast = replace(
        chained,
        name=FAST,
        encode=lambda old, new, threads: sparse_delta.encode(
            old.tree, new, base_digest=old.digest, threads=threads, conditional=False
        ),
    )
    first = Codec(
        name=UNKNOWN,
        encode=lambda old, new, threads: sparse_delta.encode(old, new, threads=threads),
        apply=lambda old, payload, threads: sparse_delta.apply(old, payload, threads=threads),
        sides=lambda pair: pair.arrays,
        bits=bits_of,
    )
    return [chained, fast, first]


def _held(pair: Pair) -> tuple[Held, Any]:
    old, new = pair.arrays
    return Held(tree=old, digest=sparse_delta.digest(old)), new


def anatomy(pair: Pair) -> dict[str, Any]:
    """Where the bits of this project's payload go: bits per change by part, tiles by mode."""
    info = sparse_delta.inspect(sparse_delta.encode(*pair.arrays))
    modes: Counter[str] = sum((Counter(t.modes) for t in info.tensors), Counter())
    tiles = sum(tensor.coded_bytes for tensor in info.tensors)
    return {
        "tile_bits": 8 * tiles / pair.changed,
        "manifest_bits": 8 * info.manifest_bytes / pair.changed,
        "modes": dict(sorted(modes.items())),
    }


def anchor_sizes(pair: Pair) -> dict[str, float]:
    """How many times smaller than dense a full version is, beside zstd-1 of each tensor."""
    _, new = pair.arrays
    anchor = sparse_delta.encode(None, new)
    ours()[0].check(pair, sparse_delta.apply(pair.arrays[0], anchor))
    compressor = zstandard.ZstdCompressor(level=1)
    plain = sum(len(compressor.compress(x.tobytes())) for x in pair.new.values())
    size = memoryview(anchor).nbytes
    return {"ours": pair.dense_bytes / size, "zstd-1": pair.dense_bytes / plain}


def squash_sizes(versions: Versions) -> dict[str, float]:
    """Bytes of one delta over all versions, and of those it stands for; its result is checked."""
    base = versions.consecutive().arrays[0]
    pairs = [versions.consecutive(i) for i in range(len(versions.weights) - 1)]
    payloads = [
        sparse_delta.encode(*pair.arrays, version=i + 1, base_version=i)
        for i, pair in enumerate(pairs)
    ]
    payload = sparse_delta.squash(base, *payloads)
    ours()[0].check(versions.squashed(), sparse_delta.apply(base, payload))
    each = [memoryview(p).nbytes for p in payloads]
    size = memoryview(payload).nbytes
    return {
        "one_bytes": each[0],
        "sum_bytes": sum(each),
        "squash_bytes": size,
        "of_one": size / each[0],
        "of_sum": size / sum(each),
    }
