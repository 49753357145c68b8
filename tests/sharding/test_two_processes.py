"""A plan that spans two real processes computes what one device computes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]

# Each process holds two devices of four; gloo carries what goes between them.
_PROGRAM = """
import json, sys, importlib.util
import jax, numpy as np, optax
process, port, models_path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
spec = importlib.util.spec_from_file_location("models", models_path)
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)
import sharding

key = jax.random.key(0)
step = sharding.train_step(models.decoder_loss, optax.sgd(1.0))
params = jax.tree.map(np.asarray, models.decoder_params(key, layers=2))
tokens = np.asarray(models.tokens(key, batch=8, length=9))
args = (params, step.optimizer.init(params), tokens)
plan = sharding.plan(
    step, args, cluster="v5e:2x2",
    constraints=sharding.Constraints(pinned={"fsdp": 2, "tensor": 2, "zero": 3}),
)
assert jax.process_count() == 2 and len(jax.devices()) == 4
found, _, loss = plan.apply(step)(*args)
value, gradients = jax.jit(jax.value_and_grad(models.decoder_loss))(params, tokens)
shards = [
    (np.asarray(s.data), np.asarray(p - g)[s.index])
    for x, p, g in zip(*map(jax.tree.leaves, (found, params, gradients)), strict=True)
    for s in x.addressable_shards
]
print(json.dumps({
    "loss": abs(float(loss) - float(value)),
    "worst": max(float(np.abs(a - b).max()) for a, b in shards),
    "local": found["head"].addressable_shards[0].data.size / params["head"].size,
}))
"""


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.timeout(240)
def test_two_processes_compute_what_one_device_does(tmp_path):
    program, port = tmp_path / "program.py", str(_free_port())
    program.write_text(_PROGRAM)
    models = str(Path(__file__).with_name("models.py"))
    # The settings of this process, but for its eight devices.
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(_ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, str(program), str(process), port, models],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        answers = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (out, err) in zip(running, answers, strict=True):
        assert process.returncode == 0, err[-2000:]
        found = json.loads(out.splitlines()[-1])
        assert found["loss"] < 1e-5
        assert found["worst"] < 1e-5
        assert found["local"] == 0.25
