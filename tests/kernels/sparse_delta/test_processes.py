"""Weights that no single process holds: two real processes, each with four devices."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kernels import sparse_delta

_ROOT = Path(__file__).parents[3]

_PROGRAM = """
import sys
from pathlib import Path

import jax

process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import sparse_delta
from kernels.sparse_delta import wire

wire.BUCKET_BYTES = 100
mesh = Mesh(np.asarray(jax.devices()), ("a",))
assert jax.process_count() == 2 and mesh.size == 8


def place(tree, spec):
    def put(x):
        sharding = NamedSharding(mesh, P(*spec[: x.ndim]))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return {name: put(leaf) for name, leaf in tree.items()}


def same(got, want):
    return all(
        np.array_equal(np.asarray(shard.data), want[name][shard.index])
        for name, leaf in got.items()
        for shard in leaf.addressable_shards
    )


old, new = (dict(np.load(folder / f"{name}.npz")) for name in ("old", "new"))
rows, columns = P("a"), P(None, "a")
trainer_old, trainer_new = place(old, rows), place(new, rows)
receiver = place(old, columns)
part = sparse_delta.encode(
    trainer_old, trainer_new, version=1, receivers=[receiver], base_digest=None
)
(folder / f"part{process}").write_bytes(part)
info = sparse_delta.inspect(part)
assert info.part and info.target_digest is None
multihost_utils.sync_global_devices("parts are written")
parts = [(folder / f"part{k}").read_bytes() for k in range(2)]
payload = sparse_delta.merge(parts)

# The trainer's sharding, the receivers' other one, and copies that every process holds.
for base in (trainer_old, receiver, place(old, P())):
    got = sparse_delta.apply(base, payload)
    assert same(got, new)
    digest = sparse_delta.digest(got)
    assert digest == sparse_delta.inspect(payload).target_digest
    # The same where the weights lie, on the devices of each process.
    for donate in (False, True):
        again = {name: leaf + 0 for name, leaf in base.items()}
        got = sparse_delta.apply(again, payload, backend="reference", donate=donate)
        assert same(got, new)
        assert again["big"].is_deleted() == donate

# Each process fetches what its own shards need: half of the columns.
partial, fetched = sparse_delta.PartialPayload(), 0
while missing := sparse_delta.needed(receiver, partial):
    for wanted in missing:
        partial.add(wanted.start, payload[wanted.start : wanted.stop])
        fetched += len(wanted)
body = len(payload) - sparse_delta.inspect(payload).manifest_bytes
assert fetched - (len(payload) - body) < 0.6 * body, (fetched, body)
for kernels in (None, "reference"):
    assert same(sparse_delta.apply(receiver, partial, backend=kernels), new)
try:
    sparse_delta.apply(place(old, P()), partial)
    raise SystemExit("applied what it does not have")
except sparse_delta.Incomplete as refusal:
    assert "is not here" in str(refusal), refusal
known = sparse_delta.digest(receiver)
assert same(sparse_delta.apply(receiver, payload, base_digest=known), new)
again = sparse_delta.encode(
    trainer_old, trainer_new, version=1, receivers=[receiver], base_digest=known
)
(folder / f"again{process}").write_bytes(again)
multihost_utils.sync_global_devices("parts are written again")
again = [(folder / f"again{k}").read_bytes() for k in range(2)]
assert sparse_delta.merge(again) == payload  # the base's sums came from the caller

# Damage that only one process sees is refused by both, and nobody hangs.
damaged = payload[:-1] + bytes([payload[-1] ^ 1]) if process else payload
try:
    sparse_delta.apply(receiver, damaged)
    raise SystemExit("applied what another process refused")
except sparse_delta.Damaged as refusal:
    assert ("bucket" in str(refusal)) == (process == 1), refusal
    assert process == 1 or "process 1 refused" in str(refusal)
try:
    sparse_delta.apply(place(new, columns), payload)
    raise SystemExit("applied twice")
except sparse_delta.WrongBase:
    pass
# Tiles that lie across both processes: says what to do.
across = sparse_delta.encode(old, new)
try:
    sparse_delta.apply(place(old, P("a")), across)
    raise SystemExit("applied tiles that it does not hold")
except ValueError as error:
    assert "receivers=" in str(error), error
anchor = sparse_delta.encode(None, trainer_new, version=1)
(folder / f"anchor{process}").write_bytes(anchor)
if process == 0:
    (folder / "payload").write_bytes(payload)
multihost_utils.sync_global_devices("done")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that two processes leave behind."""
    path = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(0)
    old = {
        "w": rng.normal(size=(256, 64)).astype(np.float16),
        "b": rng.normal(size=(32,)).astype(np.float32),
        "t": rng.normal(size=(8, 16, 4)).astype(np.float16),
        "big": rng.normal(size=(512, 256)).astype(np.float16),
    }
    new = {name: leaf.copy() for name, leaf in old.items()}
    new["w"].view(np.uint16)[::3, ::7] += 1
    new["t"].view(np.uint16)[5] += 2
    new["big"].view(np.uint16)[rng.random((512, 256)) < 0.02] += 1
    np.savez(path / "old.npz", **old)
    np.savez(path / "new.npz", **new)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(_ROOT),
    }
    logs = [path / f"log{process}" for process in range(2)]
    outputs = [log.open("w") for log in logs]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(process), str(port), str(path)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for process, output in enumerate(outputs)
    ]
    end = time.monotonic() + 270
    # One that failed leaves the other waiting for it, so neither is waited for alone.
    while time.monotonic() < end and any(process.poll() is None for process in started):
        if any(process.poll() for process in started):
            break
        time.sleep(0.1)
    codes = [process.poll() for process in started]
    for process in started:
        process.kill()
        process.wait()
    for output in outputs:
        output.close()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return path


def test_merged_parts_are_what_one_process_encodes(folder):
    old, new = (dict(np.load(folder / f"{name}.npz")) for name in ("old", "new"))
    payload = (folder / "payload").read_bytes()
    info = sparse_delta.inspect(payload)
    assert info.base_digest == sparse_delta.digest(old).root
    assert info.target_digest == sparse_delta.digest(new)
    got = sparse_delta.apply(old, payload)
    assert all(np.array_equal(got[name], new[name]) for name in new)
    (w,) = [tensor for tensor in info.tensors if tensor.name == "w"]
    assert w.changed == 86 * 10


def test_parts_of_an_anchor(folder):
    new = dict(np.load(folder / "new.npz"))
    anchor = sparse_delta.merge([(folder / f"anchor{k}").read_bytes() for k in (1, 0)])
    got = sparse_delta.apply(new, anchor)
    assert all(np.array_equal(got[name], new[name]) for name in new)


def test_merge_wants_every_part_once_and_undamaged(folder):
    one, other = ((folder / f"part{k}").read_bytes() for k in range(2))
    with pytest.raises(ValueError, match=r"got numbers \[0\] of \[2\] parts"):
        sparse_delta.merge([one])
    with pytest.raises(ValueError, match=r"got numbers \[0, 0\] of \[2\] parts"):
        sparse_delta.merge([one, one])
    with pytest.raises(sparse_delta.Damaged):
        sparse_delta.merge([one, other[:-1]])
    with pytest.raises(ValueError, match="not of one encode"):
        sparse_delta.merge([one, (folder / "anchor1").read_bytes()])
    old = dict(np.load(folder / "old.npz"))
    with pytest.raises(sparse_delta.Incomplete, match="merge it with the others"):
        sparse_delta.apply(old, one)
