"""The loop that a JAX user would write for this workload: one file, nothing of this project's.

It is a contestant of the benchmark and, being independent, a second opinion on `jaxrl.models`.
Ordinary care and no tuning: jitted, a KV cache, a scan over the tokens, each prompt's prefill
done once; scoring and update run the whole sequences.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench import protocol
from experiments.bench.workload import Workload, decode, lowercase_share


def load(workload: Workload) -> dict:
    """The workload's weights as {"embed", "norm", "layers": [{…}, …]}, matrices [in, out]."""
    flat = {name: jnp.asarray(w.T) for name, w in workload.weights().items()}
    layers = []
    for index in range(workload.layers):
        at = f"model.layers.{index}."
        own = {name.removeprefix(at): w for name, w in flat.items() if name.startswith(at)}
        layers.append({name.removesuffix(".weight").split(".")[-1]: w for name, w in own.items()})
    embed = flat["model.embed_tokens.weight"].T
    return {"embed": embed, "norm": flat["model.norm.weight"], "layers": layers}


def rms_norm(x, scale, eps):
    """x / rms(x) · scale over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rope(x, positions, theta):
    """Rotates the halves of each head of x [N, S, heads, d] by its position [N, S]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None] * frequency
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def block(w: Workload, layer, x, positions, mask, cache=None, slot=0):
    """One layer on x [N, S, D]; keys and values come from, and go to, the cache if given.

    mask [N, S, K] says which keys a query sees. Returns x and the keys and values seen.
    """
    n, s, _ = x.shape
    h = rms_norm(x, layer["input_layernorm"], w.norm_eps)
    q = (h @ layer["q_proj"]).reshape(n, s, w.heads, w.head_dim)
    k = (h @ layer["k_proj"]).reshape(n, s, w.kv_heads, w.head_dim)
    v = (h @ layer["v_proj"]).reshape(n, s, w.kv_heads, w.head_dim)
    q = rope(rms_norm(q, layer["q_norm"], w.norm_eps), positions, w.rope_theta)
    k = rope(rms_norm(k, layer["k_norm"], w.norm_eps), positions, w.rope_theta)
    if cache is not None:
        k = jax.lax.dynamic_update_slice(cache[0], k, (0, slot, 0, 0))
        v = jax.lax.dynamic_update_slice(cache[1], v, (0, slot, 0, 0))
    q = q.reshape(n, s, w.kv_heads, -1, w.head_dim)
    scores = jnp.einsum("nsgrd,nkgd->ngrsk", q, k) * w.head_dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    out = jnp.einsum("ngrsk,nkgd->nsgrd", jax.nn.softmax(scores), v)
    x = x + out.reshape(n, s, -1) @ layer["o_proj"]
    h = rms_norm(x, layer["post_attention_layernorm"], w.norm_eps)
    gated = jax.nn.silu(h @ layer["gate_proj"]) * (h @ layer["up_proj"])
    return x + gated @ layer["down_proj"], (k, v)


def forward(w: Workload, params, tokens, mask):
    """Logits [N, S, V] of whole sequences [N, S] and each layer's keys and values."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    seen = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool)) & mask[:, None, :]
    x, caches = params["embed"][tokens], []
    for layer in params["layers"]:
        x, cache = block(w, layer, x, positions, seen)
        caches.append(cache)
    return rms_norm(x, params["norm"], w.norm_eps) @ params["embed"].T, caches


def log_probs_of(logits, tokens):
    """log softmax(logits) at the tokens."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@partial(jax.jit, static_argnums=0)
def generate(w: Workload, params, prompts, mask, key):
    """Completions [B · G, T] and the log-probability of each token."""
    logits, caches = forward(w, params, prompts, mask)
    room = ((0, 0), (0, w.new_tokens), (0, 0), (0, 0))

    def repeat(x):
        return jnp.repeat(x, w.group_size, axis=0)

    caches = jax.tree.map(lambda x: repeat(jnp.pad(x, room)), caches)
    length, logits = repeat(jnp.sum(mask, axis=1)), repeat(logits[:, -1])
    visible = repeat(jnp.pad(mask, ((0, 0), (0, w.new_tokens))))

    def write(carry, step):
        caches, visible, logits = carry
        token = jax.random.categorical(jax.random.fold_in(key, step), logits / w.temperature)
        log_prob = log_probs_of(logits / w.temperature, token)
        slot = w.prompt_len + step
        visible = visible.at[:, slot].set(True)
        x, positions, new = params["embed"][token][:, None], (length + step)[:, None], []
        for layer, cache in zip(params["layers"], caches, strict=True):
            x, cache = block(w, layer, x, positions, visible[:, None], cache, slot)
            new.append(cache)
        logits = rms_norm(x[:, 0], params["norm"], w.norm_eps) @ params["embed"].T
        return (new, visible, logits), (token, log_prob)

    _, (tokens, log_probs) = jax.lax.scan(
        write, (caches, visible, logits), jnp.arange(w.new_tokens)
    )
    return tokens.T, log_probs.T


@partial(jax.jit, static_argnums=0)
def score(w: Workload, params, prompts, mask, completions):
    """Log-probabilities [B · G, T] of the completions."""
    prompts, mask = (jnp.repeat(x, w.group_size, axis=0) for x in (prompts, mask))
    mask = jnp.concatenate([mask, jnp.ones_like(completions, bool)], axis=1)
    logits, _ = forward(w, params, jnp.concatenate([prompts, completions], axis=1), mask)
    return log_probs_of(logits[:, w.prompt_len - 1 : -1] / w.temperature, completions)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update(w: Workload, params, opt_state, prompts, mask, completions, old, reference, rewards):
    """One AdamW step on the GRPO loss (arXiv:2402.03300, eq. 3) with KL estimator k3."""
    grouped = rewards.reshape(w.prompts, w.group_size)
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    advantage = (centred / (grouped.std(axis=1, ddof=1, keepdims=True) + 1e-4)).reshape(-1, 1)

    def loss_of(params):
        log_probs = score(w, params, prompts, mask, completions)
        ratio = jnp.exp(log_probs - old)
        clipped = jnp.clip(ratio, 1 - w.clip_eps, 1 + w.clip_eps)
        gain = jnp.minimum(ratio * advantage, clipped * advantage)
        gap = reference - log_probs
        return jnp.mean(w.kl_coef * (jnp.exp(gap) - gap - 1) - gain)

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, opt_state = optimizer(w).update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def optimizer(w: Workload) -> optax.GradientTransformation:
    """AdamW without decay, clip or schedule."""
    return optax.adamw(w.learning_rate, weight_decay=0.0)


class Loop:
    """The state of a run and its step."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.params, self.reference = load(workload), load(workload)
        self.opt_state = optimizer(workload).init(self.params)
        self.prompts, self.mask = map(jnp.asarray, workload.prompt_tokens())
        self.steps = 0

    def logits(self, tokens: list[list[int]]) -> dict[str, list]:
        """Logits of whole sequences without padding, as nested lists."""
        ids = jnp.asarray(tokens, jnp.int32)
        whole = jax.jit(forward, static_argnums=0)
        return {"logits": whole(self.workload, self.reference, ids, ids >= 0)[0].tolist()}

    def step(self) -> dict[str, float]:
        """One RL step, measured."""
        w, watch = self.workload, protocol.Stopwatch()
        key = jax.random.fold_in(jax.random.key(w.seed), self.steps)
        with watch.part("rollout"):
            tokens, old = generate(w, self.params, self.prompts, self.mask, key)
            written = np.asarray(tokens)
        with watch.part("scoring"):
            reference = score(w, self.reference, self.prompts, self.mask, tokens)
            rewards = np.asarray(
                lowercase_share([decode(row) for row in written.tolist()]), np.float32
            )
            jax.block_until_ready(reference)
        self.params, self.opt_state, loss = update(
            w, self.params, self.opt_state, self.prompts, self.mask, tokens, old, reference, rewards
        )
        self.steps += 1
        return watch.result(loss=float(loss), reward=float(rewards.mean()))


def matmul_rate(rows: int, inner: int, columns: int, *, seconds: float = 0.2) -> dict[str, float]:
    """Measured float32 rate of [rows, inner] × [inner, columns] on this machine."""
    a, b = jnp.ones((rows, inner)), jnp.ones((inner, columns))
    flops = 2 * rows * inner * columns
    count = max(1, int(2e9 / flops))

    @jax.jit
    def multiply(a, b):
        # Each product depends on the one before, so that none is dropped or shared.
        def body(_, carry):
            a, total = carry
            out = a @ b
            return a + out[0, 0] * 1e-30, total + out[-1, -1]

        return jax.lax.fori_loop(0, count, body, (a, 0.0))[1]

    multiply(a, b).block_until_ready()
    watch, times = protocol.Stopwatch(), 0
    while watch.result()["step_s"] < seconds:
        multiply(a, b).block_until_ready()
        times += 1
    return {"flops_per_s": times * count * flops / watch.result()["step_s"]}


def main() -> None:
    """The worker."""
    channel, compilations = protocol.Channel(), protocol.Compilations()
    loop = Loop(Workload.from_argv())
    channel.ready(jax=jax.__version__)
    protocol.serve(
        channel,
        logits=loop.logits,
        step=protocol.counting(compilations, loop.step),
        matmul=matmul_rate,
    )


if __name__ == "__main__":
    main()
