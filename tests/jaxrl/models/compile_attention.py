"""Compiles a decoder's train step for another machine, and prints what came of it as JSON.

Two layers, divided over four devices: by batch and heads with the kernel of the machine or with
XLA's attention, by batch and along the sequence, or by batch and experts. A process of its own: the
compiler library wants its settings before JAX is imported. Usage: compile_attention.py TARGET
PROGRAM..., where TARGET is a TPU topology or "h100" and PROGRAM a key of `PROGRAMS`.
"""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",  # or libtpu looks for a TPU, and waits
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import jax  # after the settings above
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sharding
from jaxrl import policy
from jaxrl.models import Decoder, logical_axes
from jaxrl.models.named import named
from jaxrl.types import Prompts

# What kernels and exchanges there are does not change, and it compiles five times as fast.
if hasattr(jax.config, "jax_exec_time_optimization_effort"):
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
else:  # JAX 0.11 has levels in its place
    jax.config.update("jax_optimization_level", "O1")

ROWS, PROMPT, GROUPS, STEPS = 8, 512, 4, 512
RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
         "vocab": "tensor", "expert": "expert"}  # fmt: skip
HEADS, CONTEXT = {"fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}
# Sizes at which kernels and exchanges are the same and the rest compiles faster.
NARROW = {"embed": 1024, "heads": 8, "kv_heads": 4, "mlp": 1024, "vocab_size": 8192}
EXPERTS = NARROW | {"experts": 8, "experts_per_token": 2, "mlp": 512}
PROGRAMS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "auto": (HEADS, {}),
    "xla": (HEADS, {"attention": "xla"}),
    "windowed": (HEADS, {"windows": (128, None)}),
    "ring": (CONTEXT, NARROW | {"context": "ring"}),
    "all_gather": (CONTEXT, NARROW | {"context": "all_gather"}),
    "experts": ({"fsdp": 2, "expert": 2}, EXPERTS),
}


def mesh_of(target: str, sizes: dict[str, int]) -> Mesh:
    if target == "h100":
        text = Path(sharding.__file__).parent / "catalog" / "h100_target.txt"
        described = topologies.get_topology_desc(
            platform="cuda", target_config=text.read_text(), topology="1x1x4"
        )
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=target)
    return Mesh(np.asarray(described.devices[:4]).reshape(*sizes.values()), tuple(sizes))


def compiled(mesh: Mesh, changes: dict[str, Any]) -> dict[str, Any]:
    model = dataclasses.replace(
        named("llama3-8b", max_len=PROMPT + STEPS), layers=2, remat="full", logit_chunk=128,
        **changes,
    )  # fmt: skip
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    batch = tuple(axis for axis in ("fsdp", "expert") if axis in mesh.shape)
    plan = sharding.Plan.from_rules(
        logical_axes(params), mesh=dict(mesh.shape), batch=batch,
        rules={name: axis for name, axis in RULES.items() if axis in mesh.shape},
    )  # fmt: skip
    bound = plan.bind(list(mesh.devices.flat))

    def shapes(tree, found):
        leaves, structure = jax.tree.flatten(tree)
        laid = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
                for x, s in zip(leaves, found, strict=True)]  # fmt: skip
        return jax.tree.unflatten(structure, laid)

    def data(*sizes, dtype=jnp.int32):
        spec = NamedSharding(bound.mesh, PartitionSpec(batch))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=spec)

    def step(params, prompts, tokens, mask):
        def loss(params):
            held = nnx.merge(graphdef, params)
            output = policy.evaluate(held, prompts, tokens, mask, temperature=1.0)
            return -jnp.mean(output.log_probs)

        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 1e-6 * g, params, gradients), value

    prompts = Prompts(
        tokens=data(ROWS, PROMPT), mask=data(ROWS, PROMPT, dtype=jnp.bool_), ids=data(ROWS)
    )
    tokens = data(ROWS, GROUPS, STEPS)
    with jax.sharding.use_abstract_mesh(bound.mesh.abstract_mesh):
        program = jax.jit(step, donate_argnums=0).lower(
            shapes(params, bound.shardings(params)), prompts, tokens,
            data(*tokens.shape, dtype=jnp.bool_),
        ).compile()  # fmt: skip
    text = program.as_text()
    # Those that the program asks for itself, and not the partitioner's.
    asked = re.findall(r'= \S+ (?:all-|collective-|reduce-)\S+\(.*op_name="[^"]*/(\w+)"', text)
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "cudnn": text.count("__cudnn$fmha"),
        "exchanges": sorted(set(asked) & {"ppermute", "all_gather", "all_to_all"}),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    _target, *_names = sys.argv[1:]
    _found = {}
    for _name in _names:
        _sizes, _changes = PROGRAMS[_name]
        _found[_name] = compiled(mesh_of(_target, _sizes), _changes)
    print(json.dumps(_found))
