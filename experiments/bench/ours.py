"""Worker: this project's collector, recipe `grpo` and learner on the workload."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.bench import protocol
from experiments.bench.workload import EOS, PAD, Workload, decode, lowercase_share
from jaxrl import recipes
from jaxrl.learner import Learner, lm_apply
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.rollouts import Collector, Sampling, collect
from jaxrl.types import Prompts, Rollouts

_MATRICES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {
    "attention_norm": "input_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
}


def decoder_config(w: Workload) -> DecoderConfig:
    """The workload's decoder."""
    return DecoderConfig(
        vocab_size=w.vocab_size,
        layers=w.layers,
        embed=w.embed,
        heads=w.heads,
        kv_heads=w.kv_heads,
        head_dim=w.head_dim,
        mlp=w.mlp,
        max_len=w.prompt_len + w.new_tokens,
        rope_theta=w.rope_theta,
        norm_eps=w.norm_eps,
        qk_norm=True,
        tie_embeddings=True,
    )


def build_model(w: Workload) -> Decoder:
    """The decoder with the workload's weights."""
    model = Decoder(decoder_config(w), rngs=nnx.Rngs(0))
    flat = w.weights()

    def stacked(name: str, param: nnx.Param) -> jax.Array:
        each = [flat[f"model.layers.{i}.{name}.weight"].T for i in range(w.layers)]
        return jnp.asarray(np.stack(each).reshape(param.shape))

    for own, theirs in (_MATRICES | _NORMS).items():
        param = getattr(model.layers, own)
        param.set_value(stacked(theirs, param))
    model.embedding.set_value(jnp.asarray(flat["model.embed_tokens.weight"]))
    model.final_norm.set_value(jnp.asarray(flat["model.norm.weight"]))
    return model


class Loop:
    """The state of a run and its step."""

    def __init__(self, workload: Workload):
        self.workload = w = workload
        graphdef, params = nnx.split(build_model(w))
        self.graphdef, self.reference = graphdef, params
        tokens, mask = workload.prompt_tokens()
        self.prompts = Prompts(
            tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), ids=jnp.arange(w.prompts)
        )
        self.collector = Collector(
            graphdef=graphdef,
            group_size=w.group_size,
            sampling=Sampling(
                max_new_tokens=w.new_tokens, eos_id=EOS, pad_id=PAD, temperature=w.temperature
            ),
        )
        recipe = recipes.get("grpo", group_size=w.group_size)
        assert recipe.kl.coef == w.kl_coef, f"the workload's KL coefficient is not {recipe.kl}"
        self.learner = Learner(
            recipe=recipe,
            apply=lm_apply(graphdef, None, temperature=w.temperature),
            optimizer=optax.adamw(w.learning_rate, weight_decay=0.0),
        )
        self.state = self.learner.init({"policy": params}, num_prompts=w.prompts)
        self.steps = 0

    def logits(self, tokens: list[list[int]]) -> dict[str, list]:
        """Logits of whole sequences without padding, as nested lists."""
        whole = jax.jit(lambda params, ids: nnx.merge(self.graphdef, params)(ids))
        return {"logits": whole(self.reference, jnp.asarray(tokens, jnp.int32)).tolist()}

    def scored(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts with rewards; nothing costs anything here."""
        rows = np.asarray(rollouts.tokens).reshape(self.workload.completions, -1).tolist()
        rewards = np.asarray(lowercase_share([decode(row) for row in rows]), np.float32)
        rewards = jnp.asarray(rewards.reshape(rollouts.tokens.shape[:2]))
        return rollouts.replace(
            rewards={"reward": rewards}, costs={"cost": jnp.zeros_like(rewards)}
        )

    def step(self) -> dict[str, float]:
        """One RL step, measured."""
        watch = protocol.Stopwatch()
        key = jax.random.fold_in(jax.random.key(self.workload.seed), self.steps)
        policy = self.state.params["policy"]
        with timed_writing(watch), watch.part("scoring", minus="rollout"):
            rollouts, _ = self.collector.collect(
                policy, self.reference, self.prompts, key, self.state.step
            )
            rollouts = jax.block_until_ready(self.scored(rollouts))
        self.state, metrics = self.learner.update(self.state, rollouts)
        self.steps += 1
        return watch.result(
            loss=float(metrics["loss"]), reward=float(np.mean(rollouts.rewards["reward"]))
        )


@contextlib.contextmanager
def timed_writing(watch: protocol.Stopwatch) -> Iterator[None]:
    """Within the block, the collector's calls to the generator count as "rollout"."""
    written = collect.generate_from_state

    def write(*args: Any, **kwargs: Any) -> Any:
        with watch.part("rollout"):
            return jax.block_until_ready(written(*args, **kwargs))

    collect.generate_from_state = write
    try:
        yield
    finally:
        collect.generate_from_state = written


def main() -> None:
    """The worker."""
    channel, compilations = protocol.Channel(), protocol.Compilations()
    loop = Loop(Workload.from_argv())
    channel.ready(jax=jax.__version__)
    protocol.serve(
        channel,
        logits=loop.logits,
        step=protocol.counting(compilations, loop.step),
    )


if __name__ == "__main__":
    main()
