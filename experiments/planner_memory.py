"""How well does the planner predict memory, against the production compilers?

    python -m experiments.planner_memory
    python -m experiments.planner_memory --clusters h100:1x8 --cases inference

Plans decoders (dense and mixture of experts, training and inference) for clusters that need not be
there, compiles every plan with XLA's compiler for that machine, and compares the predicted bytes
of a device with `peak_memory_in_bytes`. Wanted: median error at most 5 %, worst at most 10 %, and
no chosen plan predicted more than 3 % too low. CPU only; a program takes about ten seconds for
H100s and two minutes for TPUs; started again, a run keeps what it has compiled. Needs
`flatbuffers`, and jax[tpu] or jax-cuda13-plugin.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sharding
from experiments import harness
from experiments.harness import Report, Run, RunOptions, Table, plots

HEAD = 128
# Characters of a failure that the table shows.
_ERROR_WIDTH = 60


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decoder: its shape, whether it is trained, and what is pinned of the plan."""

    name: str
    layers: int
    width: int
    hidden: int
    batch: int
    length: int
    experts: int = 0
    vocab: int = 32_000
    training: bool = True
    pinned: tuple[tuple[str, Any], ...] = ()


CASES = (
    Case(name="dense 0.6B, full", layers=8, width=2048, hidden=8192, batch=32, length=1024,
         pinned=(("remat", "full"),)),
    Case(name="dense 0.6B, dots", layers=8, width=2048, hidden=8192, batch=32, length=1024,
         pinned=(("remat", "dots"),)),
    Case(name="dense 0.6B, none", layers=8, width=2048, hidden=8192, batch=16, length=1024,
         pinned=(("remat", "none"),)),
    Case(name="dense 2.6B", layers=16, width=3072, hidden=12_288, batch=64, length=2048),
    Case(name="dense 2.6B, tensor 2", layers=16, width=3072, hidden=12_288, batch=64, length=2048,
         pinned=(("tensor", 2),)),
    Case(name="experts 8 x 0.6B", layers=8, width=1024, hidden=4096, batch=32, length=1024,
         experts=8),
    Case(name="experts 8 x 0.6B, expert 4", layers=8, width=1024, hidden=4096, batch=32,
         length=1024, experts=8, pinned=(("expert", 4),)),
    Case(name="dense 2.6B, inference", layers=16, width=3072, hidden=12_288, batch=32, length=2048,
         training=False),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All of experiments.planner_memory; nothing in it is random."""

    clusters: tuple[str, ...] = ("h100:1x8", "v5e:4x4")
    """Clusters to plan and compile for, as sharding.plan takes them."""
    cases: tuple[str, ...] = ()
    """Parts of names of decoders, such as experts or inference; all of them when empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clusters or not self.chosen:
            names = "; ".join(case.name for case in CASES)
            raise ValueError(
                f"a cluster and a case are needed: {self.clusters=}, {self.cases=}; the cases "
                f"are: {names}"
            )

    @property
    def chosen(self) -> list[Case]:
        """The cases that `cases` names."""
        return [c for c in CASES if not self.cases or any(part in c.name for part in self.cases)]


PRESETS = {"full": Config(), "quick": Config(clusters=("h100:1x8",), cases=("inference",))}


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


def problem(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """A case as a step, its arguments, and those whose memory the results take."""
    params = parameters(case)
    if not case.training:
        tokens = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
        return forward, (params, tokens), ()
    tokens = jax.ShapeDtypeStruct((case.batch, case.length + 1), jnp.int32)
    step = sharding.train_step(loss, optax.adamw(1e-4))
    return step, (params, jax.eval_shape(step.optimizer.init, params), tokens), (0, 1)


def measure(case: Case, cluster: str) -> dict[str, Any]:
    """Plans and compiles one case; what went wrong is an entry too."""
    step, args, donate = problem(case)
    row: dict[str, Any] = {"case": case.name, "cluster": cluster}
    try:
        plan = sharding.plan(
            step, args, cluster=cluster,
            constraints=sharding.Constraints(pinned=dict(case.pinned)),
        )  # fmt: skip
        report = plan.check(donate=donate)
    except (ValueError, RuntimeError) as error:
        return row | {"error": str(error)[:300]}
    return row | {
        "mesh": dict(plan.mesh),
        "remat": plan.remat,
        "accumulation": plan.accumulation_steps,
        "predicted_bytes": round(plan.memory_bytes),
        "compiled_bytes": report.peak_bytes,
        "error_share": report.memory_error,
        "argument_bytes": report.argument_bytes,
        "collectives": {k: {"count": t.count, "bytes": t.bytes}
                        for k, t in report.collectives.items()},
        "memory_breakdown": {} if plan.prediction is None
                            else dict(plan.prediction.memory_breakdown),
        "compile_s": report.compile_s,
    }  # fmt: skip


def experiment(run: Run) -> None:
    config: Config = run.config
    work = [(cluster, case) for cluster in config.clusters for case in config.chosen]
    rows = []
    with run.progress("programs", len(work)) as progress:
        for done, (cluster, case) in enumerate(work, 1):
            rows.append(_kept_or_measured(run, case, cluster))
            progress.update(done)
    table, numbers = _table(rows), errors(rows)
    said = _verdict(numbers)
    page = Report("Memory against the production compilers", "bytes of a device")
    page.table(table).text(said)
    compiled = [row for row in rows if "error" not in row]
    if compiled:
        points = {
            cluster: (
                [row["compiled_bytes"] / 1e9 for row in compiled if row["cluster"] == cluster],
                [row["predicted_bytes"] / 1e9 for row in compiled if row["cluster"] == cluster],
            )
            for cluster in config.clusters
        }
        page.figure(
            plots.agreement(points, quantity="peak memory (GB)", truth="compiled"),
            "Each point is a program; on the line the prediction is the compiler's figure.",
        )
    page.record("Config", harness.to_json(config)).write(run.folder / "report.html")
    run.finish({"rows": rows, **numbers}, f"{table.text()}\n{said}\n")


def _kept_or_measured(run: Run, case: Case, cluster: str) -> dict[str, Any]:
    """The row of a program; compiled before it was interrupted, or now."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{cluster} {case.name}".lower())
    path = run.folder / "programs" / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    row = measure(case, cluster)
    if "error" not in row:  # what failed is tried again
        harness.write_json(path, row)
    return row


def errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the compiled rows: how many, the median and worst size of the error, and the lowest."""
    found = np.asarray([row["error_share"] for row in rows if "error" not in row], float)
    size = np.abs(found)
    return {
        "programs": len(found),
        "failed": len(rows) - len(found),
        "error_median": float(np.median(size)) if len(found) else None,
        "error_worst": float(size.max()) if len(found) else None,
        "error_lowest": float(found.min()) if len(found) else None,
    }


def _verdict(numbers: Mapping[str, Any]) -> str:
    if not numbers["programs"]:
        return f"no program was compiled, {numbers['failed']} failed"
    return (
        f"{numbers['programs']} programs, {numbers['failed']} failed: median error "
        f"{numbers['error_median']:.1%} (wanted 5 %), worst {numbers['error_worst']:.1%} (10 %), "
        f"lowest {numbers['error_lowest']:+.1%} (-3 %)"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    def cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
        if "error" in row:
            said = row["error"].partition("\n")[0]  # the whole of it stands in summary.json
            return row["case"], row["cluster"], said[:_ERROR_WIDTH], None, None, None
        mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
        return (
            row["case"],
            row["cluster"],
            f"{mesh}, remat {row['remat']}",
            f"{row['predicted_bytes'] / 1e9:.2f}",
            f"{row['compiled_bytes'] / 1e9:.2f}",
            f"{row['error_share']:+.1%}",
        )

    columns = ("case", "cluster", "mesh", "predicted (GB)", "compiled (GB)", "error")
    return Table(columns=columns, rows=tuple(map(cells, rows)))


def main(argv: list[str] | None = None) -> None:
    config = harness.cli(
        Config,
        presets=PRESETS,
        argv=argv,
        prog="python -m experiments.planner_memory",
        description=__doc__,
    )
    harness.main(experiment, "planner_memory", config)


if __name__ == "__main__":
    main()
