"""Learner and actors on different meshes: FSDP to tensor parallel, and two real processes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl import sync

_ROOT = Path(__file__).parents[3]


def arrays(version: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tree = {
        "embedding": rng.normal(size=(40, 64)).astype(np.float32),
        "wq": rng.normal(size=(2, 64, 8, 8)).astype(np.float32),
        "wo": rng.normal(size=(2, 8, 8, 64)).astype(np.float32),
        "norm": np.ones((2, 64), np.float32),
    }
    for step in range(version):
        moved = np.random.default_rng(step + 1)
        for leaf in tree.values():
            leaf[moved.random(leaf.shape) < 0.02] *= np.float32(1.01)
    return tree


TENSOR_PARALLEL = {
    "embedding": P(None, "tensor"),
    "wq": P(None, None, "tensor", None),
    "wo": P(None, "tensor", None, None),
    "norm": P(),
}


@pytest.mark.parametrize("told", [True, False], ids=["receivers", "unknown receivers"])
@pytest.mark.parametrize("devices", [slice(0, 8), slice(4, 8)], ids=["8 devices", "4 others"])
def test_fsdp_to_tensor_parallel(told, devices, bits):
    fsdp = Mesh(np.asarray(jax.devices()), ("fsdp",))
    rest = np.asarray(jax.devices())[devices]
    actors = Mesh(rest.reshape(-1, 4), ("data", "tensor"))
    rows = {"embedding": P("fsdp"), "wq": P(None, "fsdp"), "wo": P(None, "fsdp"), "norm": P()}
    like = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, jnp.bfloat16, sharding=NamedSharding(actors, TENSOR_PARALLEL[name])
        )
        for name, leaf in arrays(0).items()
    }
    store = sync.MemoryStore()
    publisher = sync.Publisher(
        store,
        run_id="r",
        config=sync.SyncConfig(dtype=jnp.bfloat16),
        receivers=[like] if told else [],
    )
    actor = sync.Subscriber(store, run_id="r", like=like)
    for version in range(3):
        master = {
            name: jax.device_put(leaf, NamedSharding(fsdp, rows[name]))
            for name, leaf in arrays(version).items()
        }
        published = publisher.publish(master, version)
        assert published.kind == ("delta" if version else "anchor")
        assert actor.prepare(), actor.problem
        actor.flip()
        for name, leaf in actor.params.items():
            assert leaf.sharding == like[name].sharding
            expected = arrays(version)[name].astype(jnp.bfloat16)
            assert np.asarray(leaf).tobytes() == expected.tobytes()


_PROGRAM = """
import logging, sys
from pathlib import Path

import jax

process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl import processes, sync
from jaxrl.sync import SyncError, multihost
from kernels import sparse_delta

# All that passes between the processes does so in many pieces.
processes._PIECE_BYTES, multihost._GATHERED_BYTES = 100, 10_000
logging.basicConfig()
mesh = Mesh(np.asarray(jax.devices()), ("a",))
rows, columns = NamedSharding(mesh, P("a")), NamedSharding(mesh, P(None, "a"))


def versions():
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    for version in range(5):
        w[version, ::7] *= np.float32(1.5)
        yield version, w


def same(params, w):
    want = w.astype(jnp.bfloat16)
    shards = params["w"].addressable_shards
    return all(np.asarray(s.data).tobytes() == want[s.index].tobytes() for s in shards)


class Refusing(sync.FsspecStore):
    refuse = False

    def put(self, key, data):
        if self.refuse:
            raise sync.StoreFull("no room at all")
        super().put(key, data)


store = Refusing(folder / "store")
like = {"w": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=columns)}
config = sync.SyncConfig(dtype=jnp.bfloat16, anchor_every=3)
publisher = sync.Publisher(store, run_id="r", config=config, receivers=[like])
actor = sync.Subscriber(store, run_id="r", like=like, name="spread")
kinds = []
for version, w in versions():
    params = {"w": jax.make_array_from_callback(w.shape, rows, lambda index: w[index])}
    if version == 2:
        store.refuse = process == 0
        try:
            publisher.publish(params, version)
            raise SystemExit("published to a full store")
        except sync.StoreFull as error:
            assert ("process 0" in str(error)) == (process == 1), error
        store.refuse = False
    kinds.append(publisher.publish(params, version).kind)
    assert actor.prepare(), actor.problem
    update = actor.flip()
    assert actor.version == version and same(actor.params, w), update
assert kinds == ["anchor", "delta", "delta", "anchor", "delta"], kinds

# A process reads what its shards need, in ranges, and the whole where that is nearly all.
class Counting(sync.FsspecStore):
    read = 0

    def _count(self, key, data):
        self.read += len(data) * ("payloads" in key)
        return data

    def get(self, key):
        return self._count(key, super().get(key))

    def get_range(self, key, start, stop):
        return self._count(key, super().get_range(key, start, stop))


def big(version):
    w = np.random.default_rng(0).normal(size=(2048, 4096)).astype(np.float32)
    if version:
        w *= np.float32(1.5)
    return w


everywhere = NamedSharding(mesh, P())
# Of half of it some more: what shares a bucket, or a request, with what is needed.
for name, places, least, most in (("parted", columns, 0.5, 0.6), ("copied", everywhere, 1, 1)):
    like = {"w": jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16, sharding=places)}
    publisher = sync.Publisher(store, run_id=name, config=config, receivers=[like])
    counting = Counting(folder / "store")
    actor = sync.Subscriber(counting, run_id=name, like=like, name="reads")
    for version in range(2):
        w, counting.read = big(version), 0
        params = {"w": jax.make_array_from_callback(w.shape, rows, lambda index: w[index])}
        size = publisher.publish(params, version).size_bytes
        assert size > 1_000_000
        assert actor.prepare(), actor.problem
        update = actor.flip()
        assert same(actor.params, w)
        assert update.size_bytes == counting.read
        assert least <= counting.read / size <= most, (name, version, counting.read, size)

# What one process does not get, neither uses.
like = {"w": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=columns)}
late = sync.Subscriber(store, run_id="r", like=like, name="late")
if process == 1:
    real = store.get
    store.get = lambda key: real(key)[:-1] if "payloads" in key else real(key)
assert not late.prepare() and late.flip() is None
assert late.problem, "a reason is given"
assert ("another process" in late.problem) == (process == 0), late.problem

# Whatever keeps one from a payload, both go on alike: they try again, or raise the same.
class Failing(sync.FsspecStore):
    failure = None

    def get(self, key):
        if self.failure is not None and "payloads" in key:
            raise self.failure
        return super().get(key)


def attempted(failures):
    failing = Failing(folder / "store")
    actor = sync.Subscriber(failing, run_id="r", like=like, name="failing")
    failing.failure = failures[process]
    try:
        ready, outcome = actor.prepare(), actor.problem or ""
    except Exception as error:
        return type(error)
    assert not ready and ("another process" in outcome) == (failures[process] is None), outcome
    failing.failure = None
    assert actor.prepare(), actor.problem
    return None


broken, wrong = sync.StoreError("the cable is cut"), sparse_delta.WrongModel("of another model")
assert attempted([None, broken]) is attempted([broken, None]) is None
assert attempted([wrong, KeyError("x")]) is sparse_delta.WrongModel
assert attempted([None, sync.Refused("strangers")]) is sync.Refused
assert attempted([ZeroDivisionError("a bug"), None]) is (SyncError, ZeroDivisionError)[process == 0]
"""


def test_a_learner_and_an_actor_of_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(_ROOT),
    }
    logs = [tmp_path / f"log{process}" for process in range(2)]
    outputs = [log.open("w") for log in logs]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(process), str(port), str(tmp_path)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for process, output in enumerate(outputs)
    ]
    end = time.monotonic() + 270
    while time.monotonic() < end and any(process.poll() is None for process in started):
        if any(process.poll() for process in started):
            break  # one that failed leaves the other waiting for it
        time.sleep(0.1)
    codes = [process.poll() for process in started]
    for process, output in zip(started, outputs, strict=True):
        process.kill()
        process.wait()
        output.close()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    # A single process reads what they have published.
    actor = sync.Subscriber(
        sync.FsspecStore(tmp_path / "store"),
        run_id="r",
        like={"w": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)},
    )
    assert actor.prepare()
    actor.flip()
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    for version in range(5):
        w[version, ::7] *= np.float32(1.5)
    assert np.asarray(actor.params["w"]).tobytes() == w.astype(jnp.bfloat16).tobytes()
