"""A train step with the attention kernels, compiled by the real compilers for real machines."""

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def compiled_for(target: str, *programs: str) -> dict[str, dict[str, Any]]:
    given = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), given)))}
    environment.pop("XLA_FLAGS", None)  # fake CPU devices are not wanted there
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), target, *programs], capture_output=True, text=True,
        env=environment, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


_FOR_TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu: pip install -e '.[aot]'",
)


@_FOR_TPU
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_splash_compiles_for_tpus_and_needs_less_memory(topology):
    found = compiled_for(topology, "auto", "windowed", "xla")
    # Forward, forward again in the backward pass, and gradients to queries and to keys.
    assert found["auto"]["kernels"] == 4
    assert found["windowed"]["kernels"] == 8  # each of two kinds of layer
    assert found["xla"]["kernels"] == 0
    # XLA holds scores of 4 rows, 16 heads, 512 and 4 · 512 queries, in float32.
    scores = 4 * 16 * 4 * 4 * 511 * 1023
    assert found["auto"]["temporary_bytes"] < found["xla"]["temporary_bytes"] - scores / 2


@_FOR_TPU
def test_divided_sequences_compile_for_tpus():
    found = compiled_for("v5p:2x2x1", "ring", "all_gather")
    assert found["ring"]["exchanges"] == ["ppermute"]
    assert found["ring"]["kernels"] == 0
    assert found["all_gather"]["exchanges"] == ["all_gather"]
    assert found["all_gather"]["kernels"] == 4
    assert found["all_gather"]["temporary_bytes"] < found["ring"]["temporary_bytes"] / 2


@_FOR_TPU
def test_experts_that_are_divided_compile_for_tpus():
    found = compiled_for("v5p:2x2x1", "experts")["experts"]
    assert found["exchanges"] == ["all_to_all"]
    # Splash's four, and more for the products of ragged groups.
    assert found["kernels"] > 4


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or not has_cudnn(),
    reason="compiling for a GPU needs jax-cuda13-plugin, nvidia-cudnn-cu13 and nvidia-cublas, the "
    "libraries of the last two on LD_LIBRARY_PATH",
)
def test_cudnn_compiles_for_gpus_and_needs_less_memory():
    found = compiled_for("h100", "auto", "windowed", "xla")
    assert found["auto"]["cudnn"] == 3  # forward, forward again, and backward
    assert found["windowed"]["cudnn"] == 6
    assert found["xla"]["cudnn"] == 0
    assert found["auto"]["temporary_bytes"] < found["xla"]["temporary_bytes"]
