"""The GPU kernels through XLA's and Mosaic's compilers for chips that are not here.

Needs the CUDA plugin of the same version as jax, and no GPU:
`pip install jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION`, then `pytest -m aot`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

ROOT = Path(__file__).resolve().parents[3]

# A fresh process each: a chip that the code generator does not know makes it abort.
PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from kernels.sparse_delta import gpu, gpu_store, reference
from kernels.sparse_delta.elements import element_format

major, minor, dtype, width_bits = (*map(int, sys.argv[1:3]), sys.argv[3], int(sys.argv[4]))
target = '''gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: %d minor: %d }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
} platform_name: "CUDA" dnn_version_info { major: 9 minor: 1 patch: 1 }
device_description_str: "described"''' % (major, minor)
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x2")
mesh = jax.sharding.Mesh(topology.devices, ("x",))
sharded = jax.sharding.NamedSharding(mesh, jax.P(None, "x", None))
everywhere = jax.sharding.NamedSharding(mesh, jax.P())

fmt, tile = element_format(dtype), (256, 512)
rows, cols = 4096, 2048
tiles = rows * cols // (tile[0] * tile[1]) // 2
box = jax.ShapeDtypeStruct((1, rows, cols), fmt.bits_dtype, sharding=sharded)
master = jax.ShapeDtypeStruct((1, rows, cols), jnp.float32, sharding=sharded)
limits = jax.ShapeDtypeStruct((7,), jnp.int32, sharding=everywhere)
keys = jax.ShapeDtypeStruct((tiles, 12, reference.subblocks_of(tile)), jnp.uint32,
                            sharding=everywhere)
slots = reference.Slots(
    jax.ShapeDtypeStruct((tiles,), jnp.int32, sharding=everywhere),
    jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
    keys, keys if width_bits == 32 else None)

by_box, whole = jax.P(None, "x", None), jax.P()
programs = {
    "pack": (lambda a, b: gpu.pack(a, b, tile=tile), (box, box), jax.P("x")),
    "class_counts": (lambda a, t: gpu.class_counts(a, t, fmt=fmt, tile=tile), (box, limits),
                     jax.P("x")),
    "compact": (lambda a, b, t: gpu.compact(a, b, t, fmt=fmt, tile=tile, capacity=128),
                (box, box, limits), jax.P("x")),
    "store": (lambda a, b, t: gpu_store.compact(a, b, t, fmt=fmt, tile=tile, capacity=128),
              (box, box, limits), jax.P("x")),
    "expand": (lambda a, s, t: gpu.expand(a, s, t, fmt=fmt, tile=tile), (box, slots, limits),
               by_box),
}
if dtype == "bfloat16":
    programs["epilogue"] = (lambda m, a: gpu.epilogue(m, a, tile=tile), (master, box),
                            (by_box, jax.P("x")))
found = {}


def describe(name, compiled):
    text, memory = compiled.as_text(), compiled.memory_analysis()
    found[name] = {
        "kernels": len(re.findall(r"custom_call_target=.mosaic_gpu", text)),
        "collectives": len(re.findall(r"all-(gather|reduce|to-all)|collective-permute", text)),
        "arguments": memory.argument_size_in_bytes, "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


for name, (function, args, out_specs) in programs.items():
    specs = jax.tree.map(lambda a: a.sharding.spec, args)
    local = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs,
                          check_vma=False)
    jitted = jax.jit(local, donate_argnums=0 if name == "expand" else ())
    describe(name, jitted.lower(*args).compile())
if dtype == "bfloat16":
    # The device half of `apply`: two passes of changes and whole tiles, on a shard a device.
    from kernels.sparse_delta import expand
    from kernels.sparse_delta.tiles import TileGrid

    row = expand.mesh_of(topology.devices)
    lie = jax.sharding.NamedSharding(row, jax.P("device"))

    def each(dims, kind):
        return jax.ShapeDtypeStruct((2 * dims[0], *dims[1:]), kind, sharding=lie)

    grid = TileGrid((2 * rows, cols // 2), (0, 1), tile)
    old = each((rows, cols // 2), jnp.bfloat16)
    own = reference.Slots(each((tiles,), jnp.int32), each((1,), jnp.int32),
                          each((tiles, 16, reference.subblocks_of(tile)), jnp.uint32))
    thresholds = jax.ShapeDtypeStruct((7,), jnp.int32)
    patches = expand.Patches(each((2, 3), jnp.int32), each((1,), jnp.int32),
                             each((2, *tile), jnp.uint16))
    edits = expand.Edits(((own, thresholds), (own, thresholds)), (patches,))
    options = {"mesh": row, "grid": grid, "backend": "gpu"}
    for name, (program, *args) in {
        "receiver counts": (expand._class_counts, old, each((4,), jnp.int32), thresholds),
        "receiver rehearsal": (expand._rewritten_sums, old, edits, each((1, 2), jnp.uint32)),
        "receiver": (expand.rewrite_in_place, old, edits),
    }.items():
        describe(name, program.lower(*args, **options).compile())
print(json.dumps({"box": rows * cols // 2 * width_bits // 8, **found}))
"""


def compile_for(major: int, minor: int, dtype: str, width_bits: int) -> subprocess.CompletedProcess:
    if importlib.util.find_spec("jax_plugins") is None or not any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    ):
        pytest.skip("the CUDA plugin is absent: pip install jax-cuda13-plugin jax-cuda13-pjrt")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::DeprecationWarning:kernels", "-c", PROGRAM]
    arguments = [str(major), str(minor), dtype, str(width_bits)]
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.parametrize(
    ("dtype", "width_bits"), [("bfloat16", 16), ("float8_e4m3fn", 8), ("float32", 32)]
)
@pytest.mark.parametrize(("major", "minor"), [(9, 0), (10, 0)], ids=["sm_90", "sm_100"])
def test_every_kernel_compiles_under_shard_map(major, minor, dtype, width_bits):
    done = compile_for(major, minor, dtype, width_bits)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    box = found.pop("box")
    for name, program in found.items():
        passes = 2 if name in ("receiver", "receiver rehearsal") else 1
        assert program["kernels"] == passes, (name, program)
        assert program["collectives"] == 0, (name, program)
    # In place, and no copy of the weights anywhere.
    assert found["expand"]["aliased"] == box
    if dtype == "bfloat16":
        assert found["receiver"]["aliased"] == box
        # The rehearsal may copy its shard.
        assert found.pop("receiver rehearsal")["temporary"] < 1.5 * box
    assert all(program["temporary"] < box for program in found.values()), found


def test_mosaic_does_not_know_sm_80():
    """The reason for `supports`; once it compiles, the bound there can come down."""
    done = compile_for(8, 0, "bfloat16", 16)
    assert done.returncode != 0
    assert "Cannot select: intrinsic %llvm.nvvm.elect.sync" in done.stderr
