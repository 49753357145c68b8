"""Fuzz target of the receiver: whatever bytes come, it refuses them or gives what they say.

    python tests/kernels/sparse_delta/fuzz/target.py --seconds 60      # as CI does
    python tests/kernels/sparse_delta/fuzz/target.py --make-corpus     # after a change of format

Checksums are made right first, so that the fuzzer reaches what lies behind them. With atheris
installed it is guided by coverage and starts from the corpus; without it, it mutates the corpus at
random. An input fails if anything but `CorruptPayload` is raised, if the old weights change, or if
the result has not the digest that the payload names.
"""

import argparse
import importlib.util
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parents[4]
HEADER = struct.Struct("<8sIIQQ")
BUCKET = struct.Struct("<IIQI")
# Longer inputs teach nothing more.
MAX_BYTES = 4096


def weights(numpy, ml_dtypes):
    """The receiver's tree: what the corpus was made against, without any random generator."""

    def mixed(n, seed):
        return (numpy.arange(n, dtype=numpy.uint64) * 2654435761 + seed) % (1 << 32) >> 11

    bits = (mixed(640, 1) & 0x03FF) | 0x3C00
    return {
        "kernel": bits.astype(numpy.uint16).view(ml_dtypes.bfloat16).reshape(16, 40),
        "scale": mixed(70, 2).astype(numpy.uint32).view(numpy.float32),
        "table": mixed(24, 3).astype(numpy.uint8).view(numpy.int8).reshape(2, 3, 4),
        "tied": bits.astype(numpy.uint16).view(ml_dtypes.bfloat16).reshape(16, 40),
        "zero": numpy.zeros((0, 3), numpy.float16),
    }


def new_weights(old, every):
    """Another version: every so-many-th element has the next bits."""
    new = {}
    for name, leaf in old.items():
        words = leaf.reshape(-1).view(f"u{leaf.dtype.itemsize}").copy()
        words[::every] += 1
        new[name] = words.view(leaf.dtype).reshape(leaf.shape)
    new["tied"] = new["kernel"]
    return new


def resealed(data: bytes) -> bytes:
    """The same payload with right sizes and checksums, as far as its manifest can be found."""
    import google_crc32c
    import xxhash

    if len(data) < HEADER.size + 20:
        return data
    magic, version, size, _, _ = HEADER.unpack_from(data)
    size = min(size, len(data) - HEADER.size)
    manifest = bytearray(data[HEADER.size : HEADER.size + size])
    body = data[HEADER.size + size :]
    # The bucket table comes last and is not compressed; where it is, its checksums stay wrong.
    n_buckets = struct.unpack_from("<I", manifest, 12)[0] if size > 72 else 0
    at, start = size - BUCKET.size * n_buckets, 0
    if n_buckets * BUCKET.size < size:
        for _ in range(n_buckets):
            tiles, length, _, _ = BUCKET.unpack_from(manifest, at)
            bucket = body[start : start + length]
            sums = xxhash.xxh3_64_intdigest(bucket), google_crc32c.value(bucket)
            BUCKET.pack_into(manifest, at, tiles, length, *sums)
            at, start = at + BUCKET.size, start + length
    head = HEADER.pack(magic, version, size, len(data), 0)[:24]
    seal = xxhash.xxh3_64_intdigest(head + bytes(manifest))
    return head + struct.pack("<Q", seal) + bytes(manifest) + body


def attempt(data: bytes) -> str:
    """Applies an input; returns what came of it, and raises where the receiver has a bug."""
    import ml_dtypes
    import numpy

    from kernels import sparse_delta

    old = weights(numpy, ml_dtypes)
    before = {name: leaf.tobytes() for name, leaf in old.items()}
    payload = resealed(data)
    try:
        info = sparse_delta.inspect(payload)
        str(info)
    except sparse_delta.CorruptPayload:
        info = None
    try:
        new = sparse_delta.apply(old, payload, threads=1)
        outcome = "applied"
    except sparse_delta.CorruptPayload as refusal:
        new, outcome = None, type(refusal).__name__
    assert {name: leaf.tobytes() for name, leaf in old.items()} == before, "old weights changed"
    if new is not None:
        assert info is not None, "applied what cannot be inspected"
        assert sparse_delta.digest(new) == info.target_digest, "the result is not what was promised"
    return outcome


def make_corpus() -> dict[str, bytes]:
    """Payloads of every kind and mode, small."""
    import ml_dtypes
    import numpy

    from kernels import sparse_delta

    old = weights(numpy, ml_dtypes)
    made = {
        f"delta_{every}": sparse_delta.encode(old, new_weights(old, every), version=2)
        for every in (1, 2, 7, 40)
    }
    noise = {
        name: ((leaf.reshape(-1).view("u1") * 167 + 13) ^ 91).view(leaf.dtype).reshape(leaf.shape)
        for name, leaf in old.items()
    }
    made["noise"] = sparse_delta.encode(old, noise)
    made["same"] = sparse_delta.encode(old, old, version=3, base_version=2)
    made["anchor"] = sparse_delta.encode(None, old, version=1)
    made["wrong_base"] = sparse_delta.encode(new_weights(old, 3), old)
    return made


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One of the usual mutations: flips, other bytes, cuts, copies, numbers at the bounds."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + rng.choice((1, 4, 30))]
        elif kind == 3:
            out[at:at] = out[rng.randrange(len(out) + 1) :][: rng.choice((1, 4, 30))]
        else:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice((0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1)))
            out[at : at + width] = value.to_bytes(width, "little")
        if not out:
            out = bytearray(data[:1])
    return bytes(out)


def _guided(seconds: int) -> None:
    import atheris

    # numba compiles the loops from their bytecode, which must stay as it is.
    loops = ["kernels.sparse_delta.loops"]
    with atheris.instrument_imports(include=["kernels"], exclude=loops):
        import kernels.sparse_delta  # noqa: F401

    with tempfile.TemporaryDirectory() as found:
        arguments = [
            sys.argv[0],
            found,
            str(CORPUS),
            f"-max_total_time={seconds}",
            f"-max_len={MAX_BYTES}",
            f"-artifact_prefix={ROOT}/crash-",
        ]
        atheris.Setup(arguments, lambda data: attempt(data) and None)
        atheris.Fuzz()


def _blind(seconds: int) -> None:
    corpus = [path.read_bytes() for path in sorted(CORPUS.glob("*.bin"))]
    rng = random.Random(0)
    count, end = 0, time.monotonic() + seconds
    outcomes: dict[str, int] = {}
    while time.monotonic() < end:
        data = mutated(rng.choice(corpus), rng)
        try:
            outcome = attempt(data)
        except BaseException:
            (ROOT / "crash-input.bin").write_bytes(data)
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        count += 1
    print(f"{count} inputs, unguided: {outcomes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--make-corpus", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.make_corpus:
        CORPUS.mkdir(exist_ok=True)
        for name, payload in make_corpus().items():
            (CORPUS / f"{name}.bin").write_bytes(payload)
    elif importlib.util.find_spec("atheris"):
        _guided(options.seconds)
    else:
        _blind(options.seconds)


if __name__ == "__main__":
    main()
