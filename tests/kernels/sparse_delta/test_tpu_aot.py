"""The device half compiled for real TPU topologies by the real compiler, without a TPU."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="compiling for a TPU needs libtpu: pip install -e '.[aot]'",
    ),
]

_SCRIPT = Path(__file__).parent / "compile_for_tpu.py"
_ROOT = Path(__file__).parents[3]
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x4",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x4",
    "Ironwood": "tpu7x:2x2x1",
}
BOX_BYTES = 1024 * 1024 * 2


@pytest.fixture(scope="module", params=TOPOLOGIES)
def compiled(request) -> dict[str, dict]:
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    environment.pop("XLA_FLAGS", None)  # fake CPU devices are not wanted there
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), TOPOLOGIES[request.param]],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {"generation": request.param} | json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_compiles_for_the_topology(compiled):
    for name, result in compiled.items():
        if name not in ("generation", "digest"):
            passes = 2 if name in ("receiver", "receiver rehearsal") else 1
            assert result["kernels"] == passes, (name, result)
    assert sum(name.startswith(("pack", "compact", "class", "expand")) for name in compiled) == 24


def test_expand_works_in_the_memory_of_old(compiled):
    for name, width in (("bfloat16", 2), ("float32", 4), ("float8_e4m3fn", 1)):
        result = compiled[f"expand {name}"]
        assert result["aliased_bytes"] == 1024 * 1024 * width
        # Beside it, slots only.
        assert result["temporary_bytes"] < 1024 * 1024


def test_a_receiver_makes_no_copy_of_its_weights(compiled):
    shard = 1024 * 1024 * 2
    for name in ("receiver", "receiver rehearsal", "receiver counts"):
        assert compiled[name]["collectives"] == [], name
    assert compiled["receiver"]["aliased_bytes"] == shard
    # Beside it only the two tiles that come whole, and slots.
    assert compiled["receiver"]["temporary_bytes"] < shard / 2
    assert compiled["receiver rehearsal"]["aliased_bytes"] == 0
    assert compiled["receiver rehearsal"]["temporary_bytes"] < 1.5 * shard  # a copy of the shard


def test_whole_tiles_are_read_where_they_lie(compiled):
    for kernel in ("pack", "compact", "class_counts"):
        assert compiled[f"{kernel} bfloat16"]["temporary_bytes"] < BOX_BYTES / 2


def test_the_digest_reads_its_array_once(compiled):
    assert compiled["digest"]["bytes_accessed"] < 1.1 * BOX_BYTES


def test_nothing_is_gathered_from_other_devices(compiled):
    assert compiled["diff"]["collectives"] == ["all-reduce"]  # the thresholds' counters
    assert math.isclose(compiled["diff"]["kernels"], 1)
    # Nor copied: not even bit-cast, which XLA would do by a copy.
    assert compiled["diff"]["temporary_bytes"] < 1024 * 1024 * 2 / 2


def test_an_embedding_whose_rows_make_no_tiles_is_compared(compiled):
    if compiled["generation"] != "v5e":
        pytest.skip("only compiled for v5e")
    # Two slices of each version, as they come and as they are laid out: less than the two.
    assert compiled["diff of vectors"]["temporary_bytes"] < 2 * 4748 * 2048 * 2
    assert compiled["diff of vectors"]["collectives"] == ["all-reduce"]


def test_compaction_runs_on_the_sparsecore_of_ironwood(compiled):
    if compiled["generation"] != "Ironwood":
        assert "sparsecore" not in compiled
        pytest.skip("only compiled for Ironwood")
    assert compiled["sparsecore"]["on_sparsecore"]
