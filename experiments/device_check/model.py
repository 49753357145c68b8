"""The large model of the checks: about 1B random weights, or what fits, on all devices here."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.safety.placement import plan_of
from jaxrl import recipes
from jaxrl.deployment import Workload
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.models.named import named
from jaxrl.types import Prompts
from sharding import Plan
from sharding.machines.topology import Chip, find_chip

SIZES = ("llama3.2-1b", "qwen2.5-0.5b")
"""Named models, the first that fits: 1.24B parameters, then 0.49B."""
_STATE_BYTES = 16  # a parameter: float32, two moments, its gradient
_STATE_SHARE = 0.5  # of the memory; the rest is for activations, logits and the update
_TINY = DecoderConfig(
    vocab_size=256, layers=2, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=128, max_len=64
)


@dataclass(frozen=True, kw_only=True)
class Large:
    """The model, its parameters on their devices, and how it is used.

    Attributes:
      name: of `SIZES`, or "tiny".
      workload: recipe and sizes of one step.
      config: of the decoder, as a large run executes it.
      graphdef: its structure.
      params: its parameters, float32.
      mesh: of all devices; {} of one.
    """

    name: str
    workload: Workload
    config: DecoderConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    mesh: Mapping[str, int]

    def plan(self, params: object) -> Plan:
        return plan_of(self.mesh, params)


def chip() -> Chip | None:
    """The catalogue's entry of the devices that are here; None of an unknown kind."""
    first = jax.devices()[0]
    return find_chip("cpu" if first.platform == "cpu" else first.device_kind)


def memory_bytes() -> float:
    """Of all devices together: what the first says, else what the catalogue knows.

    Raises:
      ValueError: neither says.
    """
    stats = jax.devices()[0].memory_stats() or {}
    found = chip()
    one = stats.get("bytes_limit") or (found.memory_bytes if found else 0)
    if not one:
        raise ValueError(f"how much memory has a {jax.devices()[0].device_kind}? Nobody says")
    return one * jax.device_count()


def large(tiny: bool) -> Large:
    """Random weights, made where they lie.

    Raises:
      ValueError: not even the smaller one fits.
    """
    devices = jax.device_count()
    mesh = {} if tiny or devices == 1 else {"fsdp": devices}
    if tiny:
        name, config, batch, lengths = "tiny", _TINY, 2, (8, 8)
    else:
        room = _STATE_SHARE * memory_bytes() / _STATE_BYTES
        fitting = [name for name in SIZES if named(name).num_params <= room]
        if not fitting:
            raise ValueError(f"no model of {', '.join(SIZES)} fits: {room:.3g} parameters do")
        name = fitting[0]
        config, batch, lengths = named(name), 4 * devices, (256, 256)
    workload = Workload(
        recipe=recipes.get(recipes.RECOMMENDED), policy=config, prompts_per_step=batch,
        prompt_len=lengths[0], completion_len=lengths[1],
    )  # fmt: skip
    config = workload.executed(config)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    def made(seed: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(nnx.state(Decoder(config, rngs=nnx.Rngs(jax.random.key(seed)))))

    plan = plan_of(mesh, shapes)
    placed = plan.bind().shardings(shapes) if mesh else None
    leaves = jax.jit(made, out_shardings=placed)(jnp.uint32(0))
    return Large(
        name=name, workload=workload, config=config, graphdef=graphdef,
        params=jax.tree.unflatten(jax.tree.structure(shapes), leaves), mesh=mesh,
    )  # fmt: skip


def random_prompts(found: Large) -> Prompts:
    """Prompts of one step, without padding."""
    work, rng = found.workload, np.random.default_rng(1)
    b, p = work.prompts_per_step, work.prompt_len
    return Prompts(
        tokens=jnp.asarray(rng.integers(0, found.config.vocab_size, (b, p), np.int32)),
        mask=jnp.ones((b, p), bool),
        ids=jnp.arange(b, dtype=jnp.int32),
    )


def update_flops(found: Large) -> float:
    """Floating-point operations of one update that no implementation can avoid.

    6 N a token for the products with weights, forward and backward, N without the embedding where
    the head is another matrix; and 12·L·Q·d a pair of columns that see each other, of which a
    causal row has half (PaLM, arXiv:2204.02311, appendix B). What is computed again is not counted,
    as is usual for MFU. Prompts pass once, for all their completions.
    """
    config, work = found.config, found.workload
    weights = config.num_params - (0 if config.tie_embeddings else config.vocab_size * config.embed)
    own, groups, prompt = work.completion_len, work.group_size, work.prompt_len
    head = config.vocab_size * config.embed
    tokens = prompt + groups * own
    products = 6 * ((weights - head) * tokens + head * groups * own)
    seen = prompt**2 / 2 + groups * (own * prompt + own**2 / 2)
    scores = 12 * config.layers * config.heads * config.head_dim * seen
    return work.prompts_per_step * float(products + scores)
