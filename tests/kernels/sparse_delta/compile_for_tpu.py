"""Compiles the device half for a TPU topology without a TPU; prints what came of it as JSON.

A process of its own: the compiler library wants its settings before JAX is imported, and what it
holds is freed only by leaving. Usage: compile_for_tpu.py TOPOLOGY
"""

import functools
import json
import os
import sys

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",  # or libtpu looks for a TPU, and waits
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import jax  # after the settings above
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.sparse_delta import delta, expand, reference, sparsecore, tpu
from kernels.sparse_delta.digest import digest_box, strides_of
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.tiles import TileGrid

BOX, TILE = (1, 1024, 1024), (256, 512)
ODD_BOX, ODD_TILE = (1, 100, 300), (50, 300)
WIDTHS = {"bfloat16": jnp.uint16, "float32": jnp.uint32, "float8_e4m3fn": jnp.uint8}


def report(run, *arguments, mesh, donate=()) -> dict:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return described(jax.jit(run, donate_argnums=donate).lower(*arguments).compile())


def described(compiled) -> dict:
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "on_sparsecore": 'execution_thread="sparsecore"' in text,
        "collectives": [
            name
            for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce")
            if f" {name}(" in text or f" {name}-start(" in text
        ],
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "bytes_accessed": compiled.cost_analysis().get("bytes accessed"),
    }


def receiver_programs(devices) -> dict:
    """The device half of `apply` on shards of (1024, 1024): two passes of changes, and patches."""
    mesh = expand.mesh_of(devices)
    grid = TileGrid((1024 * len(devices), 1024), (0, 1), TILE)
    lie = NamedSharding(mesh, PartitionSpec("device"))

    def each(dims, dtype):
        return jax.ShapeDtypeStruct((len(devices) * dims[0], *dims[1:]), dtype, sharding=lie)

    old = each((1024, 1024), jnp.bfloat16)
    words = each((8, 16, reference.subblocks_of(TILE)), jnp.uint32)
    slots = reference.Slots(each((8,), jnp.int32), each((1,), jnp.int32), words)
    limits = jax.ShapeDtypeStruct((7,), jnp.int32)
    whole = each((2, *TILE), jnp.uint16)
    patches = expand.Patches(each((2, 3), jnp.int32), each((1,), jnp.int32), whole)
    edits = expand.Edits(((slots, limits), (slots, limits)), (patches,))
    options = {"mesh": mesh, "grid": grid, "backend": "tpu"}
    origins = each((1, 2), jnp.uint32)
    lowered = {
        "receiver counts": (expand._class_counts, old, each((4,), jnp.int32), limits),
        "receiver rehearsal": (expand._rewritten_sums, old, edits, origins),
        "receiver": (expand.rewrite_in_place, old, edits),
    }
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return {
            name: described(program.lower(*arguments, **options).compile())
            for name, (program, *arguments) in lowered.items()
        }


def main(topology: str) -> dict:
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    one = Mesh(np.array(devices[:1]), ("x",))
    results = {}

    def shape(dims, dtype, mesh=one, spec=()):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    limits = shape((7,), jnp.int32)
    for name, dtype in WIDTHS.items():
        fmt = element_format(name)
        for label, dims, tile in (("", BOX, TILE), (" laid out", ODD_BOX, ODD_TILE)):
            box = shape(dims, dtype)
            n_subblocks = reference.subblocks_of(tile)
            words = shape((2, 12, n_subblocks), jnp.uint32)
            wide = words if fmt.width_bits == 32 else None
            slots = reference.Slots(shape((2,), jnp.int32), shape((), jnp.int32), words, wide)
            own = {"fmt": fmt, "tile": tile}
            compact = functools.partial(tpu.compact, **own, capacity=128)
            runs = {
                "pack": (functools.partial(tpu.pack, tile=tile), box, box),
                "compact": (compact, box, box, limits),
                "class_counts": (functools.partial(tpu.class_counts, **own), box, limits),
                "expand": (functools.partial(tpu.expand, **own), box, slots, limits),
            }
            for kernel, (run, *arguments) in runs.items():
                donate = (0,) if kernel == "expand" else ()
                results[f"{kernel} {name}{label}"] = report(
                    run, *arguments, mesh=one, donate=donate
                )
    bf16 = element_format("bfloat16")
    bits = shape(BOX, jnp.uint16)
    results["epilogue"] = report(
        functools.partial(tpu.epilogue, tile=TILE), shape(BOX, jnp.float32), bits, mesh=one
    )
    results["digest"] = report(
        functools.partial(digest_box, strides=strides_of(BOX)), bits, shape((2,), jnp.uint32),
        mesh=one,
    )  # fmt: skip
    own = {"fmt": bf16, "tile": TILE, "capacity": 128}
    results["epilogue_compact"] = report(
        functools.partial(tpu.epilogue_compact, **own), shape(BOX, jnp.float32), bits, limits,
        mesh=one,
    )  # fmt: skip
    mesh = Mesh(np.array(devices[:4]).reshape(2, 2), ("data", "model"))
    weights = shape((2048, 2048), jnp.bfloat16, mesh, ("data", "model"))
    tree = {"w": weights}
    places = {"w": weights.sharding}
    diff = functools.partial(delta.diff, shardings=places, backend="tpu")
    results["diff"] = report(diff, tree, tree, mesh=mesh)
    if topology.startswith("v5e"):  # one is enough: it takes as long as some kernels together
        # Shards of an embedding whose rows make no tiles, which are taken as vectors.
        row = Mesh(np.array(devices[:4]), ("x",))
        weights = shape((4 * 4748, 2048), jnp.bfloat16, row, ("x",))
        diff = functools.partial(delta.diff, shardings={"w": weights.sharding}, backend="tpu")
        results["diff of vectors"] = report(diff, {"w": weights}, {"w": weights}, mesh=row)
    for name, run in receiver_programs(devices[:4]).items():
        results[name] = run
    if topology.startswith("tpu7x"):
        compact = functools.partial(sparsecore.compact, **own)
        results["sparsecore"] = report(compact, bits, bits, limits, mesh=one)
    return results


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
