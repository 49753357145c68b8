"""Worker: Tunix's GRPO learner on the workload. Runs in an environment with `google-tunix`.

The learner pulls its batches from an iterator; the iterator here waits for the parent before
each one, so that a step is exactly what the learner does between two pulls.
"""

from collections.abc import Iterator
from typing import Any

from experiments.bench import protocol
from experiments.bench.workload import EOS, PAD, Workload, decode, encode, lowercase_share


class Bytes:
    """The tokenizer in the shape that Tunix asks for."""

    def encode(self, text: str, **_: Any) -> list[int]:
        """One token a byte."""
        return encode(text)

    def decode(self, ids: list[int], **_: Any) -> str:
        """See `workload.decode`."""
        return decode(ids)

    def bos_id(self) -> int:
        """0 tells Tunix that prompts start without one."""
        return 0

    def eos_id(self) -> int:
        """Outside the vocabulary."""
        return EOS

    def pad_id(self) -> int:
        """The padding token."""
        return PAD


def build_model(w: Workload) -> Any:
    """Tunix's Qwen3 with the workload's weights."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.qwen3 import model, params

    config = model.ModelConfig(
        num_layers=w.layers,
        vocab_size=w.vocab_size,
        embed_dim=w.embed,
        hidden_dim=w.mlp,
        num_heads=w.heads,
        head_dim=w.head_dim,
        num_kv_heads=w.kv_heads,
        rope_theta=int(w.rope_theta),
        norm_eps=w.norm_eps,
        use_tied_embedding=True,
    )
    qwen = model.Qwen3(config, rngs=nnx.Rngs(0))
    arrays = _converted(w.weights(), params._get_key_and_transform_mapping(config))
    flat = nnx.to_flat_state(nnx.state(qwen, nnx.Param))
    for path, variable in flat:
        array = jnp.asarray(arrays.pop(".".join(map(str, path))))
        assert array.shape == variable.shape, (path, array.shape, variable.shape)
        variable.set_value(jax.device_put(array))
    assert not arrays, f"no place for {sorted(arrays)}"
    nnx.update(qwen, nnx.from_flat_state(flat))
    return qwen


def _converted(weights: dict[str, Any], mapping: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face names and layouts to Tunix's own, by Tunix's table."""
    import re

    converted = {}
    for name, array in weights.items():
        (pattern,) = [p for p in mapping if re.fullmatch(p, name)]
        key, transform = mapping[pattern]
        if transform is not None:
            permutation, shape = transform
            array = array.transpose(permutation)
            array = array if shape is None else array.reshape(shape)
        converted[re.sub(pattern, key, name)] = array
    return converted


def build_learner(w: Workload, mesh: Any) -> Any:
    """The GRPO learner with one mini-batch a step."""
    import optax
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=build_model(w),
        reference=build_model(w),
        tokenizer=Bytes(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(w.learning_rate, weight_decay=0.0),
                eval_every_n_steps=10**9,
                max_steps=10**9,
                mini_batch_size=w.prompts,
                train_micro_batch_size=w.prompts,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=w.new_tokens,
                max_prompt_length=w.prompt_len,
                kv_cache_size=w.prompt_len + w.new_tokens,
                temperature=w.temperature,
                top_p=1.0,
                eos_tokens=[EOS],
            ),
        ),
    )
    return grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        reward_fns=lambda prompts, completions, **_: lowercase_share(completions),
        algo_config=grpo_learner.GRPOConfig(
            num_generations=w.group_size,
            num_iterations=1,
            beta=w.kl_coef,
            epsilon=w.clip_eps,
        ),
    )


class Batches:
    """The iterator that the learner pulls from: one batch for every "step" of the parent."""

    def __init__(self, channel: protocol.Channel, workload: Workload, cluster: Any):
        self.channel, self.workload = channel, workload
        self.actor, self.reference = (
            cluster.actor_trainer.model,
            cluster.inference_worker.get_model("reference"),
        )
        self.compilations = protocol.Compilations()
        self.watch: protocol.Stopwatch | None = None
        self.rewards: list[float] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import jax
        import numpy as np
        from flax import nnx

        while True:
            if self.watch is not None:
                jax.block_until_ready(nnx.state(self.actor, nnx.Param))
                count = self.compilations.count - self.before
                self.channel.send(**self.watch.result(compilations=count))
            if not self._asked():
                return
            self.before, self.watch = self.compilations.count, protocol.Stopwatch()
            yield {"prompts": np.array(self.workload.texts())}

    def _asked(self) -> bool:
        import jax.numpy as jnp

        while (message := self.channel.receive())["op"] == "logits":
            tokens = jnp.asarray(message["tokens"], jnp.int32)
            batch, length = tokens.shape
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
            causal = jnp.tril(jnp.ones((length, length), bool))
            mask = jnp.broadcast_to(causal, (batch, length, length))
            logits, _ = self.reference(tokens, positions, None, mask)
            self.channel.send(logits=logits.tolist())
        return message["op"] == "step"

    def timed(self, name: str, function: Any) -> Any:
        """`function` as a part of the step's time, its result waited for."""
        import jax

        def call(*args: Any, **kwargs: Any) -> Any:
            assert self.watch is not None
            with self.watch.part(name):
                return jax.block_until_ready(function(*args, **kwargs))

        return call


def main() -> None:
    """The worker."""
    channel = protocol.Channel()
    import importlib.metadata as metadata

    import jax

    workload = Workload.from_argv()
    # Tunix leaves the layout of intermediate results to the compiler.
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=automatic)
    with mesh:
        learner = build_learner(workload, mesh)
        cluster = learner.rl_cluster
        batches = Batches(channel, workload, cluster)
        cluster.generate = batches.timed("rollout", cluster.generate)
        cluster.get_ref_per_token_logps = batches.timed("scoring", cluster.get_ref_per_token_logps)
        channel.ready(**{p: metadata.version(p) for p in ("google-tunix", "jax")})
        learner.train(batches)
    channel.close()


if __name__ == "__main__":
    main()
