"""Does a planned step compute what the step computes, for every kind of axis?

    python -m experiments.planner_runs
    python -m experiments.planner_runs --axes stage,expert

One update of a small decoder (dense and mixture of experts) by gradient descent with a rate of
one, so that the change of a parameter is its gradient: planned for eight devices with each kind of
parallelism pinned, run on eight CPU devices, compared with the unsharded step in float32. Wanted:
the largest difference of the loss and of any gradient at most 1e-5 of the largest entry. CPU only,
about two minutes; tests/sharding/test_two_processes.py does the same across two processes.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sharding
from experiments import harness
from experiments.harness import Report, RunOptions, Table

WANTED = 1e-5
DEVICES = 8
HEAD = 128


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decoder and its batch."""

    name: str
    layers: int
    width: int
    hidden: int
    batch: int
    length: int
    experts: int = 0
    vocab: int = 32_000


def parameters(case: Case) -> Any:
    """Shapes of a decoder's parameters, in float32."""
    heads = case.width // HEAD

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    n, d, f = case.layers, case.width, case.hidden
    experts = (case.experts,) if case.experts else ()
    layers = {
        "query": leaf(n, d, heads, HEAD),
        "key": leaf(n, d, heads // 2, HEAD),
        "value": leaf(n, d, heads // 2, HEAD),
        "out": leaf(n, heads, HEAD, d),
        "gate": leaf(n, *experts, d, f),
        "up": leaf(n, *experts, d, f),
        "down": leaf(n, *experts, f, d),
    }
    if case.experts:
        layers["router"] = leaf(n, d, case.experts)
    return {"embed": leaf(case.vocab, d), "head": leaf(d, case.vocab), "layers": layers}


def forward(params: Any, tokens: jax.Array, *, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Logits [batch, length, vocab], computed in a type of less precision than the parameters."""
    params = jax.tree.map(lambda x: x.astype(dtype), params)

    def norm(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
        return (wide * scale).astype(x.dtype)

    def layer(x: jax.Array, w: Mapping[str, jax.Array]) -> tuple[jax.Array, None]:
        h = norm(x)
        query = jnp.einsum("bsd,dkh->bskh", h, w["query"])
        key = jnp.einsum("bsd,dkh->bskh", h, w["key"])
        value = jnp.einsum("bsd,dkh->bskh", h, w["value"])
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + jnp.einsum("bskh,khd->bsd", attended, w["out"])
        h = norm(x)
        if "router" not in w:
            hidden = jax.nn.silu(h @ w["gate"]) * (h @ w["up"])
            return x + hidden @ w["down"], None
        # Every token to every expert, weighted: memory is that of a capacity of all tokens.
        weights = jax.nn.softmax(h @ w["router"], -1)
        hidden = jax.nn.silu(jnp.einsum("bsd,edf->ebsf", h, w["gate"]))
        hidden = hidden * jnp.einsum("bsd,edf->ebsf", h, w["up"])
        out = jnp.einsum("ebsf,efd->ebsd", hidden, w["down"])
        return x + jnp.einsum("ebsd,bse->bsd", out, weights), None

    x, _ = jax.lax.scan(layer, jnp.take(params["embed"], tokens, axis=0), params["layers"])
    return norm(x) @ params["head"]


def loss(params: Any, tokens: jax.Array, *, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Mean cross entropy of the next token."""
    logits = forward(params, tokens[:, :-1], dtype=dtype).astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


DENSE = Case(name="dense", layers=3, width=256, hidden=512, batch=16, length=32, vocab=128)
EXPERTS = Case(name="experts", layers=2, width=256, hidden=256, batch=16, length=32, vocab=128,
               experts=4)  # fmt: skip
RUNS: tuple[tuple[Case, dict[str, Any]], ...] = (
    (DENSE, {"data": 8}),
    (DENSE, {"data": 2, "fsdp": 4, "microbatches": 2}),
    (DENSE, {"fsdp": 8, "zero": 1}),
    (DENSE, {"fsdp": 8, "zero": 2, "remat": "dots"}),
    (DENSE, {"fsdp": 8, "zero": 3, "remat": "full"}),
    (DENSE, {"fsdp": 8, "zero": 3, "remat": "full", "microbatches": 2}),
    (DENSE, {"tensor": 2, "data": 4}),
    (DENSE, {"tensor": 2, "fsdp": 4, "zero": 3}),
    (DENSE, {"context": 8}),
    (DENSE, {"context": 4, "tensor": 2}),
    (DENSE, {"context": 2, "tensor": 2, "fsdp": 2, "zero": 3, "remat": "attention"}),
    (DENSE, {"tensor": 2, "fsdp": 4, "zero": 3, "sequence_parallel": True}),
    (DENSE, {"fsdp": 8, "zero": 3, "remat": "dots", "offload": "activations"}),
    (DENSE, {"data": 8, "offload": "optimizer"}),
    (DENSE, {"stage": 2, "data": 4, "microbatches": 4}),
    (DENSE, {"stage": 2, "tensor": 2, "fsdp": 2, "zero": 3, "microbatches": 4, "remat": "full"}),
    (EXPERTS, {"expert": 4, "data": 2}),
    (EXPERTS, {"expert": 2, "fsdp": 2, "context": 2, "zero": 3}),
)


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All of experiments.planner_runs."""

    axes: tuple[str, ...] = ()
    """Only comparisons that pin one of these, such as tensor or stage; all when empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.chosen:
            names = sorted({name for _, pinned in RUNS for name in pinned})
            raise ValueError(f"no comparison pins {self.axes}; they pin {', '.join(names)}")

    @property
    def chosen(self) -> list[tuple[Case, dict[str, Any]]]:
        """The comparisons that `axes` names."""
        return [one for one in RUNS if not self.axes or set(self.axes) & set(one[1])]


PRESETS = {"full": Config(), "quick": Config(axes=("expert",))}


def compare(case: Case, pinned: dict[str, Any], seed: int) -> dict[str, Any]:
    """One comparison: the largest differences, as shares of the largest entry.

    Args:
      case: the decoder.
      pinned: of its plan.
      seed: of parameters and tokens.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 32))
    params = jax.tree.map(
        lambda x: 0.05 * jax.random.normal(next(keys), x.shape, x.dtype), parameters(case)
    )
    shape = case.batch, case.length + 1
    tokens = jax.random.randint(next(keys), shape, 0, case.vocab)
    step = sharding.train_step(functools.partial(loss, dtype=jnp.float32), optax.sgd(1.0))
    args = (params, step.optimizer.init(params), tokens)
    plan = sharding.plan(
        step, args, cluster=jax.devices(), constraints=sharding.Constraints(pinned=pinned)
    )
    found, _, value = plan.apply(step)(*args)
    expected_value, gradients = jax.jit(jax.value_and_grad(step.loss))(params, tokens)
    worst = max(
        float(np.abs(np.asarray(p - f) - np.asarray(g)).max() / np.abs(g).max())
        for p, f, g in zip(*map(jax.tree.leaves, (params, found, gradients)), strict=True)
    )
    return {
        "case": case.name,
        "mesh": dict(plan.mesh),
        "pinned": pinned,
        "stage_layers": list(plan.pipeline),
        "loss_difference": abs(float(value) / float(expected_value) - 1),
        "gradient_difference": worst,
    }


def experiment(run: harness.Run) -> None:
    config: Config = run.config
    rows = []
    with run.progress("comparisons", len(config.chosen)) as progress:
        for done, (case, pinned) in enumerate(config.chosen, 1):
            rows.append(compare(case, pinned, config.seed))
            progress.update(done)
    table = _table(rows)
    page = Report("Planned steps against the plain step", f"{DEVICES} CPU devices, float32")
    page.table(table).record("Config", harness.to_json(config)).write(run.folder / "report.html")
    run.finish({"wanted": WANTED, "reached": all(map(_reached, rows)), "rows": rows}, table.text())


def _reached(row: dict[str, Any]) -> bool:
    return max(row["loss_difference"], row["gradient_difference"]) <= WANTED


def _table(rows: list[dict[str, Any]]) -> Table:
    def choices(row: dict[str, Any]) -> str:
        text = " ".join(f"{name} {value}" for name, value in row["pinned"].items())
        return f"{text} layers {row['stage_layers']}" if row["stage_layers"] else text

    return Table(
        columns=("case", "mesh and choices", "loss", "gradient", f"within {WANTED:g}"),
        rows=tuple(
            (
                row["case"],
                choices(row),
                f"{row['loss_difference']:.1e}",
                f"{row['gradient_difference']:.1e}",
                _reached(row),
            )
            for row in rows
        ),
        caption="Largest differences, as shares of the largest entry.",
    )


def _use_cpu_devices() -> None:
    """Asks JAX for eight CPU devices; a process in which it has started must have them.

    Raises:
      ValueError: JAX has started with fewer.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", DEVICES)
    except RuntimeError:  # it has started
        pass
    if len(jax.devices()) < DEVICES:
        raise ValueError(
            f"{DEVICES} devices are needed, there are {len(jax.devices())}; start a new process "
            "without XLA_FLAGS"
        )


def main(argv: list[str] | None = None) -> None:
    config = harness.cli(
        Config,
        presets=PRESETS,
        argv=argv,
        prog="python -m experiments.planner_runs",
        description=__doc__,
    )
    with harness.clean_errors():
        _use_cpu_devices()
    harness.main(experiment, "planner_runs", config)


if __name__ == "__main__":
    main()
