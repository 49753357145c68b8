"""Compiles a decoder's train step for another machine, and prints what came of it as JSON.

Two layers as wide as Llama 3 8B's, divided by batch and heads over four devices; with the kernel
of the machine and with XLA's attention. A process of its own: the compiler library wants its
settings before JAX is imported. Usage: compile_attention.py TOPOLOGY, or "h100".
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

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

ROWS, PROMPT, GROUPS, STEPS = 8, 512, 4, 512
RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
         "vocab": "tensor"}  # fmt: skip


def mesh_of(target: str) -> Mesh:
    if target == "h100":
        text = Path(sharding.__file__).parent / "catalog" / "h100_target.txt"
        described = topologies.get_topology_desc(
            platform="cuda", target_config=text.read_text(), topology="1x1x4"
        )
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=target)
    devices = np.asarray(described.devices[:4]).reshape(2, 2)
    return Mesh(devices, ("fsdp", "tensor"))


def compiled(mesh: Mesh, attention: str, **changes) -> dict:
    model = dataclasses.replace(
        named("llama3-8b", max_len=PROMPT + STEPS), layers=2, attention=attention, remat="full",
        logit_chunk=128, **changes,
    )  # fmt: skip
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    plan = sharding.Plan.from_rules(
        logical_axes(params), mesh=dict(mesh.shape), rules=RULES, batch=("fsdp",)
    )
    bound = plan.bind(list(mesh.devices.flat))

    def shapes(tree, found):
        leaves, structure = jax.tree.flatten(tree)
        laid = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
                for x, s in zip(leaves, found, strict=True)]  # fmt: skip
        return jax.tree.unflatten(structure, laid)

    def data(*sizes, dtype=jnp.int32):
        spec = NamedSharding(bound.mesh, PartitionSpec("fsdp"))
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
    return {
        "splash": text.count('custom_call_target="tpu_custom_call"'),
        "cudnn": text.count("__cudnn$fmha"),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    _mesh = mesh_of(sys.argv[1])
    _found = {name: compiled(_mesh, name) for name in ("auto", "xla")}
    _found["windowed"] = compiled(_mesh, "auto", windows=(128, None))
    print(json.dumps(_found))
