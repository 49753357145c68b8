"""One decoder-only transformer in Flax NNX: RMSNorm, RoPE, grouped-query attention, SwiGLU.

The options of `DecoderConfig` make it a Llama, Qwen, Mistral, Mixtral or Gemma.

All layers live in stacked parameters with leading axis `layer` and run as a scan, so that a
program's size does not grow with depth and a planner sees one layer. Every parameter names its
axes (see `LOGICAL_AXES`); the names are metadata and shard nothing by themselves.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from jaxrl.models import attention, lora
from jaxrl.models.attention import Attention, Pattern
from jaxrl.models.attention.choice import UNLIMITED
from jaxrl.models.cache import Cache, CachedKeyValue, KeyValue, Rotation, Turns
from jaxrl.models.config import DecoderConfig, LoraConfig, RopeScaling
from jaxrl.models.expert_exchange import exchanged_experts
from jaxrl.models.layout import Layout
from jaxrl.models.mixture import mixture_of_experts
from jaxrl.types import Prompts

LOGICAL_AXES = ("layer", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "expert")
"""Every name that may stand in a parameter's `out_sharding`; None marks an unnamed axis."""

_REMAT = {
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

_LORA_AXES = {
    "query": ("embed", "heads"), "key": ("embed", "kv_heads"), "value": ("embed", "kv_heads"),
    "attention_out": ("heads", "embed"), "gate": ("embed", "mlp"), "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}  # fmt: skip
_TILE_ROWS = 128  # of matrix units, and of the tiles that GPU compilers try

Weights = dict[str, Float[Array, "..."]]
Attend = Callable[
    [Float[Array, "..."], KeyValue, attention.Window, Any], tuple[Float[Array, "..."], Any]
]
_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


def parameter(
    init: Callable[..., Array],
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A float32 parameter that carries its logical axis names.

    `eager_sharding=False`: Flax would otherwise look for a mesh as soon as it sees the names.
    """
    return kind(init(rngs.params(), shape, jnp.float32), out_sharding=axes, eager_sharding=False)


def logical_axes(params: Any) -> Any:
    """The logical axis names of every parameter of a tree: what `Plan.from_rules` reads.

    Args:
      params: an `nnx.State`, or a tree of them such as {"policy": …, "critic": …}.

    >>> config = DecoderConfig(vocab_size=5, layers=1)
    >>> logical_axes(nnx.state(Decoder(config, rngs=nnx.Rngs(0))))["layers"]["gate"]
    ('layer', 'embed', 'mlp')
    """
    return jax.tree.map(
        lambda variable: tuple(variable.get_metadata()["out_sharding"]),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*batch D"]:
    """Root-mean-square norm x / √(mean x² + ε) · scale, in float32 (arXiv:1910.07467)."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse * _as_rank(scale, x.ndim)).astype(x.dtype)


def project(x: Float[Array, "*batch D"], kernel: Float[Array, "D *out"]) -> Float[Array, "..."]:
    """Contracts the last axis of `x` with the first of `kernel`: [*batch, *out].

    As one product of two matrices: the gradient of a product with more axes first transposes
    the whole gradient of the result on CPU, which cost half of the backward pass.
    """
    flat = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[0], -1)
    return flat.reshape(*x.shape[:-1], *kernel.shape[1:])


def _rows_fed(steps: int) -> int:
    """Tokens of a completion that pass through the network.

    Nothing is predicted from the last one, so that it can stay out; but lengths that fill the
    tiles of matrix units should stay so: with 511 rows of 512 TPUs pad every product, and XLA:GPU
    found no tiles at all for some.
    """
    return steps if steps % _TILE_ROWS == 0 else steps - 1


def _as_rank(x: Float[Array, "*tail"], rank: int) -> Float[Array, "..."]:
    """Leading axes of size 1 until `x` has the rank of what it is to be broadcast with."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def rotation(
    positions: Int32[Array, "*batch"], frequencies: Float32[Array, " half"], *, scale: float = 1.0
) -> Rotation:
    """The rotation at each position, the same for every layer and head.

    Args:
      positions: of each token in its own sequence.
      frequencies: radians per position.
      scale: YaRN's attention factor, 1 elsewhere.
    """
    angles = positions[..., None, None].astype(jnp.float32) * _as_rank(
        frequencies, positions.ndim + 2
    )
    return Rotation(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def rotate(x: Float[Array, "*batch N d"], by: Rotation) -> Float[Array, "*batch N d"]:
    """Rotary position embedding in Llama's half-split layout (arXiv:2104.09864).

    Args:
      x: queries or keys; the pair (i, i + d/2) is rotated by position × frequency i.
      by: see `rotation`.
    """
    cos, sin = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Layers(nnx.Module):
    """Parameters of all blocks, stacked along `layer`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c, n = config, config.layers
        # Residual branches start small, so that the depth does not change the initial scale.
        normal = nnx.initializers.normal(0.02)
        small = nnx.initializers.normal(0.02 / (2 * n) ** 0.5)
        zeros = nnx.initializers.zeros
        unit = zeros if c.norm_plus_one else nnx.initializers.ones
        heads, kv = ("heads", "head_dim"), ("kv_heads", "head_dim")

        def stacked(init, shape, axes):
            return parameter(init, rngs, (n, *shape), ("layer", *axes))

        self.attention_norm = stacked(unit, (c.embed,), ("embed",))
        self.query = stacked(normal, (c.embed, c.heads, c.head_dim), ("embed", *heads))
        self.key = stacked(normal, (c.embed, c.kv_heads, c.head_dim), ("embed", *kv))
        self.value = stacked(normal, (c.embed, c.kv_heads, c.head_dim), ("embed", *kv))
        self.attention_out = stacked(small, (c.heads, c.head_dim, c.embed), (*heads, "embed"))
        if c.attention_bias:
            self.query_bias = stacked(zeros, (c.heads, c.head_dim), heads)
            self.key_bias = stacked(zeros, (c.kv_heads, c.head_dim), kv)
            self.value_bias = stacked(zeros, (c.kv_heads, c.head_dim), kv)
        if c.output_bias:
            self.attention_out_bias = stacked(zeros, (c.embed,), ("embed",))
        if c.qk_norm:
            self.query_norm = stacked(unit, (c.head_dim,), ("head_dim",))
            self.key_norm = stacked(unit, (c.head_dim,), ("head_dim",))
        self.mlp_norm = stacked(unit, (c.embed,), ("embed",))
        if c.post_norms:
            self.post_attention_norm = stacked(unit, (c.embed,), ("embed",))
            self.post_mlp_norm = stacked(unit, (c.embed,), ("embed",))
        number, expert = ((c.experts,), ("expert",)) if c.experts else ((), ())
        self.gate = stacked(normal, (*number, c.embed, c.mlp), (*expert, "embed", "mlp"))
        self.up = stacked(normal, (*number, c.embed, c.mlp), (*expert, "embed", "mlp"))
        self.down = stacked(small, (*number, c.mlp, c.embed), (*expert, "mlp", "embed"))
        if c.experts:
            self.router = stacked(normal, (c.embed, c.experts), ("embed", "expert"))
        if c.lora is not None:
            self._add_adapters(c, c.lora, rngs)

    def _add_adapters(self, config: DecoderConfig, adapters: LoraConfig, rngs: nnx.Rngs) -> None:
        """A is random, as PEFT draws it, and B zero: an adapter starts as nothing."""
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
        for name in adapters.targets:
            inputs, outputs = config.lora_widths(name)
            of_inputs, of_outputs = _LORA_AXES[name]
            a, b = lora.factors(name)
            for factor, init, shape, axes in (
                (a, uniform, (inputs, adapters.rank), (of_inputs, None)),
                (b, nnx.initializers.zeros, (adapters.rank, outputs), (None, of_outputs)),
            ):
                stacked = (config.layers, *shape), ("layer", *axes)
                setattr(self, factor, parameter(init, rngs, *stacked, kind=lora.LoraParam))

    def weights(self) -> Weights:
        """Stacked arrays by name: what the scan over layers slices."""
        return {name: v[...] for name, v in vars(self).items() if isinstance(v, nnx.Param)}


class Decoder(nnx.Module):
    """A causal language model; see `DecoderConfig`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(0.02)
        shape = (config.vocab_size, config.embed)
        self.embedding = parameter(normal, rngs, shape, ("vocab", "embed"))
        self.layers = Layers(config, rngs=rngs)
        unit = nnx.initializers.zeros if config.norm_plus_one else nnx.initializers.ones
        self.final_norm = parameter(unit, rngs, (config.embed,), ("embed",))
        if not config.tie_embeddings:
            self.output = parameter(normal, rngs, shape[::-1], ("embed", "vocab"))

    def __call__(
        self, tokens: Int32[Array, "N S"], segments: Int32[Array, "N S"] | None = None
    ) -> Float32[Array, "N S V"]:
        """Next-token logits of whole sequences; see `hidden` for the arguments."""
        return self.logits(self.hidden(tokens, segments))

    def hidden(
        self,
        tokens: Int32[Array, "N S"],
        segments: Int32[Array, "N S"] | None = None,
        *,
        packed: bool = True,
    ) -> Float[Array, "N S D"]:
        """Final hidden states of whole sequences.

        Args:
          tokens: token ids.
          segments: 0 on padding, which may stand on either side; several sequences may share
            a row under different numbers, each attending to itself only. All 1 when None.
          packed: False promises that no row holds two sequences, which saves some kernels a
            mask.
        """
        packed = packed and segments is not None
        segments = jnp.ones_like(tokens) if segments is None else segments
        return self._rows(
            tokens, _positions(segments), segments, Pattern(prompt=tokens.shape[1]), packed=packed
        )

    def completion_hidden(
        self, prompts: Prompts, tokens: Int32[Array, "B G T"]
    ) -> Float[Array, "B G T D"]:
        """Hidden states from which each completion token was predicted.

        A prompt passes through the network once for all of its G completions; the result is
        that of running the G concatenated sequences one by one.
        """
        groups, steps = tokens.shape[1], _rows_fed(tokens.shape[2])
        batch, prompt_len = prompts.tokens.shape
        own_tokens = tokens[:, :, :steps].reshape(batch, groups * steps)
        mask = prompts.mask.astype(jnp.int32)
        prompt_positions = _positions(mask)
        own_positions = prompt_positions[:, -1:, None] + 1 + jnp.arange(steps)[None, None]
        own_positions = jnp.broadcast_to(own_positions, (batch, groups, steps))
        hidden = self._rows(
            jnp.concatenate([prompts.tokens, own_tokens], axis=1),
            jnp.concatenate([prompt_positions, own_positions.reshape(own_tokens.shape)], axis=1),
            jnp.concatenate([mask, jnp.ones_like(own_tokens)], axis=1),
            Pattern(prompt=prompt_len, completion=steps),
            packed=False,
        )
        first = hidden[:, None, prompt_len - 1 : prompt_len]
        first = jnp.broadcast_to(first, (batch, groups, 1, hidden.shape[-1]))
        of_own = hidden[:, prompt_len:].reshape(batch, groups, steps, hidden.shape[-1])
        return jnp.concatenate([first, of_own[:, :, : tokens.shape[2] - 1]], axis=2)

    def _rows(
        self,
        tokens: Int32[Array, "N S"],
        positions: Int32[Array, "N S"],
        segments: Int32[Array, "N S"],
        pattern: Pattern,
        *,
        packed: bool,
    ) -> Float[Array, "N S D"]:
        """Final hidden states of rows of a pattern.

        Where devices divide the sequence, the columns stand in another order throughout.
        """
        attend_rows, size = self._attention, tokens.shape[1]
        width = attend_rows.width(size)
        if width > size:
            tokens, positions, segments = (
                jnp.pad(x, [(0, 0), (0, width - size)]) for x in (tokens, positions, segments)
            )
        order = attend_rows.order(pattern, width)
        if order is not None:
            tokens, positions, segments = (x[:, order] for x in (tokens, positions, segments))

        def attend(query, kv, window, _):
            out = attend_rows(query, kv, segments, pattern, window=window, packed=packed)
            return out, None

        x = self._run(self._embed(tokens), positions, attend, None)[0]
        if order is not None:
            x = x[:, np.argsort(order)]
        return x[:, :size]

    def prefill(
        self, prompts: Prompts, *, group_size: int, max_new_tokens: int
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Runs the prompts once, for `group_size` completions of each.

        Returns:
          The hidden state that predicts the first completion token, and a cache, as yet without
          room for completions (`Cache.with_room`).
        """
        c, batch = self.config, prompts.tokens.shape[0]
        segments = prompts.mask.astype(jnp.int32)
        positions, pattern = _positions(segments), Pattern(prompt=prompts.tokens.shape[1])
        # A cache is read in the natural order: the compiler divides the sequence, if anybody.
        attend_rows = replace(self._attention, exchange="partitioner")

        def attend(query, kv, window, _):
            out = attend_rows(query, kv, segments, pattern, window=window, packed=False)
            return out, CachedKeyValue.of_prompt(kv)

        x, stacked = self._run(self._embed(prompts.tokens), positions, attend, None)
        steps = jnp.arange(1, max_new_tokens + 1, dtype=jnp.int32)
        empty = CachedKeyValue.empty((batch, c.kv_heads, group_size), c.head_dim, x.dtype)
        cache = Cache(
            prompt=tuple(CachedKeyValue(*(kv[i] for kv in stacked)) for i in range(c.layers)),
            prompt_mask=prompts.mask,
            turns=self._turns(positions[None, :, -1] + steps[:, None]),
            own=(empty,) * c.layers,
        )
        return x[:, -1], cache

    def layer_weights(self) -> tuple[Weights, ...]:
        """Weights of each layer apart, in the compute dtype: what `decode` reads.

        Taken once before a loop of `decode`; inside it every step would copy all of them. The
        projections of queries, keys and values are joined, by key head, in one kernel
        [embed, kv_heads, heads / kv_heads + 2, head_dim]: each alone is too small at one token
        a row to be shared among cores.
        """
        c = self.config
        stacked = lora.merged(self._cast(self.layers.weights()), c.lora)

        def layer(i: int) -> Weights:
            # Joined here and not in the stack, of which compilers would make two copies at once.
            weights = {name: w[i] for name, w in stacked.items()}
            query, key, value = (weights.pop(name) for name in ("query", "key", "value"))
            grouped = query.reshape(c.embed, c.kv_heads, -1, c.head_dim)
            joined = jnp.concatenate([grouped, key[:, :, None], value[:, :, None]], axis=2)
            return weights | {"joined": joined}

        return tuple(map(layer, range(c.layers)))

    def decode(
        self,
        weights: tuple[Weights, ...],
        cache: Cache,
        tokens: Int32[Array, "B G"],
        step: Int32[Array, ""],
    ) -> tuple[Float[Array, "B G D"], Cache]:
        """Feeds one token of every completion.

        Args:
          weights: from `layer_weights`.
          cache: from `prefill` or the previous call; its completions' part is replaced.
          tokens: the token chosen at `step` (0 for the first completion token).
          step: index at which the cache is written.

        Returns:
          The hidden state that predicts token `step + 1`, and the new cache.
        """
        batch, groups = tokens.shape

        def rows(of_prompts):  # [T, B, …] -> [B·G, …]
            now = jax.lax.dynamic_index_in_dim(of_prompts, step, keepdims=False)
            return jnp.repeat(now, groups, axis=0)

        def by_prompt(x):
            return x.reshape(batch, groups, *x.shape[1:])

        turns, written = jax.tree.map(rows, cache.turns), []
        x = self._embed(tokens.reshape(-1))  # two axes only: a third is not vectorised on CPU
        windows = self.config.windows or (None,) * self.config.layers
        for layer, window, prompt, own in zip(
            weights, windows, cache.prompt, cache.own, strict=True
        ):

            def attend(query, kv, window, own, prompt=prompt):
                own = own.write(jax.tree.map(by_prompt, kv), step)
                out = attention.one_token(
                    by_prompt(query), prompt, cache.prompt_mask, own, step,
                    rule=self._scores, window=window,
                )  # fmt: skip
                return out, own

            turn = turns.of_layer(window is not None)
            x, own = self._layer(layer, x, turn, window, attend, own)
            written.append(own)
        x = self._norm(x, self.final_norm[...])
        return by_prompt(x), cache._replace(own=tuple(written))

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float32[Array, "*batch V"]:
        """Logits of the next token, always float32."""
        kernel = self.embedding[...].T if self.config.tie_embeddings else self.output[...]
        logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else jnp.tanh(logits / cap) * cap

    @property
    def _attention(self) -> Attention:
        c = self.config
        return Attention(
            implementation=c.attention, exchange=c.context, rule=self._scores, windows=c.windows
        )

    @property
    def _scores(self) -> attention.Scores:
        return attention.Scores(
            scale=self.config.query_scale, softcap=self.config.attention_softcap
        )

    def _norm(self, x: Float[Array, "*batch D"], scale: Float[Array, " D"]):
        if self.config.norm_plus_one:
            scale = scale + 1.0
        return rms_norm(x, scale, self.config.norm_eps)

    def _embed(self, tokens: Int32[Array, "*batch"]) -> Float[Array, "*batch D"]:
        x = self.embedding[...][tokens].astype(self.config.compute_dtype)
        if not self.config.scale_embeddings:
            return x
        # Rounded to the compute dtype before the product, as the model was trained.
        return x * jnp.asarray(self.config.embed**0.5, x.dtype)

    def _run(self, x, positions, attend: Attend, layer_state):
        """Scans the layers; `attend` maps query, keys and values, window and the layer's state to
        what attention gives and a result per layer.
        """
        turns, windows = self._turns(positions), self._windows

        def body(x, layer):
            weights, state, window = layer
            if window is None:
                turn = turns.of_layer(False)
            else:
                turn = turns.of_layer(window < UNLIMITED)
            return self._layer(weights, x, turn, window, attend, state)

        if self.config.remat != "none":
            body = jax.checkpoint(body, policy=_REMAT[self.config.remat], prevent_cse=False)
        x, results = jax.lax.scan(
            body, x, (self.layers.weights(), layer_state, windows), unroll=self.config.scan_unroll
        )
        return self._norm(x, self.final_norm[...]), results

    @property
    def _windows(self) -> Int32[Array, " L"] | None:
        """Window of each layer, for the scan; None where no layer has one."""
        if not any(self.config.windows):
            return None
        return jnp.asarray([w or UNLIMITED for w in self.config.windows], jnp.int32)

    def _cast(self, weights: Weights) -> Weights:
        """Norms stay float32, as their arithmetic does."""
        dtype = self.config.compute_dtype
        return {k: w if "norm" in k else w.astype(dtype) for k, w in weights.items()}

    def _turns(self, positions: Int32[Array, "*batch"]) -> Turns:
        c = self.config
        frequencies = jnp.asarray(c.rope_scaling.frequencies(c.head_dim, c.rope_theta))
        everywhere = rotation(positions, frequencies, scale=c.rope_scaling.attention_factor)
        if c.window_rope_theta is None:
            return Turns(everywhere, None)
        local = jnp.asarray(RopeScaling().frequencies(c.head_dim, c.window_rope_theta))
        return Turns(everywhere, rotation(positions, local))

    def _query_key_value(self, weights: Weights, x):
        if "joined" not in weights:
            return tuple(self._project(weights, name, x) for name in ("query", "key", "value"))
        joined = project(x, weights["joined"])
        query = joined[..., :-2, :].reshape(*x.shape[:-1], self.config.heads, -1)
        return query, joined[..., -2, :], joined[..., -1, :]

    def _layer(
        self, weights: Weights, x, turn: Rotation, window: attention.Window, attend: Attend, state
    ):
        c, weights = self.config, self._cast(weights)
        normed = self._norm(x, weights["attention_norm"])
        query, key, value = self._query_key_value(weights, normed)
        if c.attention_bias:
            query, key, value = (
                out + _as_rank(weights[f"{name}_bias"], out.ndim)
                for name, out in (("query", query), ("key", key), ("value", value))
            )
        if c.qk_norm:
            query = self._norm(query, weights["query_norm"])
            key = self._norm(key, weights["key_norm"])
        keys_values = KeyValue(rotate(key, turn), value)
        out, state = attend(rotate(query, turn), keys_values, window, state)
        out = self._project(weights, "attention_out", out.reshape(*x.shape[:-1], -1))
        if c.output_bias:
            out = out + _as_rank(weights["attention_out_bias"], out.ndim)
        if c.post_norms:
            out = self._norm(out, weights["post_attention_norm"])
        x = x + out
        out = self._feed_forward(weights, self._norm(x, weights["mlp_norm"]))
        if c.post_norms:
            out = self._norm(out, weights["post_mlp_norm"])
        return x + out, state

    def _feed_forward(self, weights: Weights, x):
        c, activation = self.config, _ACTIVATIONS[self.config.activation]
        if c.experts:
            router, gate, up, down = (weights[n] for n in ("router", "gate", "up", "down"))
            options: dict[str, Any] = {
                "experts_per_token": c.experts_per_token, "normalise": c.normalise_routing,
                "activation": activation,
            }  # fmt: skip
            layout = Layout.current()
            if layout is None or c.expert_exchange == "partitioner":
                return mixture_of_experts(x, router, gate, up, down, **options)
            return exchanged_experts(
                x, router, gate, up, down, layout, capacity_factor=c.expert_capacity, **options
            )
        gate, up = self._project(weights, "gate", x), self._project(weights, "up", x)
        return self._project(weights, "down", activation(gate) * up)

    def _project(self, weights: Weights, name: str, x):
        """x·W, plus s·(x·A)·B where the kernel has an adapter."""
        kernel = weights[name]
        if name == "attention_out":
            kernel = kernel.reshape(-1, self.config.embed)
        out, (a, b) = project(x, kernel), lora.factors(name)
        if self.config.lora is None or a not in weights:
            return out
        added = project(project(x, weights[a]), weights[b]) * self.config.lora.scale
        return out + added.reshape(out.shape)


def _positions(segments: Int32[Array, "N S"]) -> Int32[Array, "N S"]:
    """Index of each token within its segment; 0 on padding before the first."""
    steps = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1]), jnp.diff(segments, axis=1)], axis=1)
    first = jax.lax.cummax(jnp.where(starts != 0, steps, 0), axis=1)
    return steps - first
