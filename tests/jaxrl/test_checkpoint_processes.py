"""Checkpoints of n processes, read by m: bit for bit, and the same one in all of them."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxrl.checkpoint import Checkpointer

ROOT = Path(__file__).resolve().parents[2]

# What every number of processes does: makes the state of a step, divided over all devices.
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jaxrl import processes
from jaxrl.checkpoint import Checkpointer

def state(step, mesh):
    rng = np.random.default_rng(step)
    def lie(array, *spec):
        place = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])
    return {
        "divided": lie(rng.normal(size=(8, 6)).astype(np.float32), "data"),
        "flat": lie(rng.normal(size=16).astype(jnp.bfloat16), "data"),
        "bits": lie(rng.integers(0, 2**32, (4, 4), np.uint32)),  # whole on every device
        "replay": rng.normal(size=(3, 5)),
        "empty": np.zeros((0, 2)),
        "key": jax.random.key(step),
        "step": step,
    }

def equal(found, wanted):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for a, b in pairs:
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if isinstance(b, jax.Array):
            assert a.sharding.is_equivalent_to(b.sharding, b.ndim), (a.sharding, b.sharding)
        a, b = processes.whole((a, b))
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()

def read(folder, step, mesh):
    with Checkpointer(folder) as checkpoints:
        found = checkpoints.restore_latest(state(99, mesh))
    assert (found.step, found.metadata) == (step, {"of": step})
    equal(found.tree, state(step, mesh))

def write(folder, step, mesh):
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(step, state(step, mesh), metadata={"of": step})
        checkpoints.save(step, state(step, mesh), metadata={"of": step})  # replaces its own

def all_devices():
    return jax.make_mesh((len(jax.devices()),), ("data",))

if __name__ == "__main__":
    count, number, port = map(int, sys.argv[1:4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    for task in sys.argv[4:]:
        verb, folder, step = task.split(":")
        {"read": read, "write": write}[verb](folder, int(step), all_devices())
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


def on(count, devices, program, *tasks):
    """Runs tasks in several processes at once; the output of all where one fails."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, str(program), str(count), str(number), str(port), *tasks],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, "\n".join(said)[-4000:]


@pytest.mark.timeout(300)
def test_what_n_processes_wrote_m_read_bit_for_bit(tmp_path, program):
    """1 → 2, 2 → 1, 2 → 4."""
    here = runpy.run_path(str(program))
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    of_one, of_two = tmp_path / "one", tmp_path / "two"
    here["write"](of_one, 1, mesh)
    # A later one that is damaged: all have to pass it over.
    with Checkpointer(of_one) as checkpoints:
        checkpoints.save(2, here["state"](2, mesh), metadata={"of": 2})
    files = [path for path in (of_one / "00000002").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    on(2, 2, program, f"read:{of_one}:1", f"write:{of_two}:3")
    here["read"](of_two, 3, mesh)
    on(4, 1, program, f"read:{of_two}:3")
