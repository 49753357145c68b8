"""A train step with the attention kernels, compiled by the real compilers for real machines."""

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.aot, pytest.mark.timeout(900)]

_SCRIPT = Path(__file__).parent / "compile_attention.py"
_ROOT = Path(__file__).parents[3]


def has_cudnn() -> bool:
    try:
        ctypes.CDLL("libcudnn.so.9")
    except OSError:
        return False
    return True


def compiled_for(target: str) -> dict[str, dict[str, int]]:
    given = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), given)))}
    environment.pop("XLA_FLAGS", None)  # fake CPU devices are not wanted there
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), target], capture_output=True, text=True, env=environment,
        timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu: pip install -e '.[aot]'",
)
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_splash_compiles_for_tpus_and_needs_less_memory(topology):
    found = compiled_for(topology)
    # Forward, forward again in the backward pass, and gradients to queries and to keys.
    assert found["auto"]["splash"] == 4
    assert found["windowed"]["splash"] == 8  # each of two kinds of layer
    assert found["xla"]["splash"] == 0
    # XLA holds scores of 4 rows, 16 heads, 512 and 4 · 512 queries, in float32.
    scores = 4 * 16 * 4 * 4 * 511 * 1023
    assert found["auto"]["temporary_bytes"] < found["xla"]["temporary_bytes"] - scores / 2


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or not has_cudnn(),
    reason="compiling for a GPU needs jax-cuda13-plugin, nvidia-cudnn-cu13 and nvidia-cublas, the "
    "libraries of the last two on LD_LIBRARY_PATH",
)
def test_cudnn_compiles_for_gpus_and_needs_less_memory():
    found = compiled_for("h100")
    assert found["auto"]["cudnn"] == 3  # forward, forward again, and backward
    assert found["windowed"]["cudnn"] == 6
    assert found["xla"]["cudnn"] == 0
    assert found["auto"]["temporary_bytes"] < found["xla"]["temporary_bytes"]
