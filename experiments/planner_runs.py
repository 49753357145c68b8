"""Does a planned step compute what the step computes, for every kind of axis?

    python -m experiments.planner_runs [--json FILE]

One update of a small decoder (dense and mixture of experts) by gradient descent with a rate of
one, so that the change of a parameter is its gradient: planned for eight devices with each kind of
parallelism pinned, run on eight CPU devices, compared with the unsharded step in float32. Wanted:
the largest difference of the loss and of any gradient at most 1e-5 of the largest entry. CPU only,
about two minutes; tests/sharding/test_two_processes.py does the same across two processes.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sharding
from experiments.planner_memory import Case, loss, parameters

WANTED = 1e-5
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
    (DENSE, {"stage": 2, "data": 4, "microbatches": 4}),
    (DENSE, {"stage": 2, "tensor": 2, "fsdp": 2, "zero": 3, "microbatches": 4, "remat": "full"}),
    (EXPERTS, {"expert": 4, "data": 2}),
    (EXPERTS, {"expert": 2, "fsdp": 2, "context": 2, "zero": 3}),
)


def run(case: Case, pinned: dict[str, Any]) -> dict[str, Any]:
    """One comparison: the largest differences, as shares of the largest entry."""
    keys = iter(jax.random.split(jax.random.key(0), 32))
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


def main() -> None:
    """Runs all comparisons and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rows = []
    print(f"{'case':8s} {'mesh and choices':60s} {'loss':>8s} {'gradient':>9s}  wanted {WANTED:g}")
    for case, pinned in RUNS:
        row = run(case, pinned)
        rows.append(row)
        text = " ".join(f"{name} {value}" for name, value in pinned.items())
        if row["stage_layers"]:
            text += f" layers {row['stage_layers']}"
        good = max(row["loss_difference"], row["gradient_difference"]) <= WANTED
        print(
            f"{case.name:8s} {text:60s} {row['loss_difference']:8.1e} "
            f"{row['gradient_difference']:9.1e}  {'reached' if good else 'MISSED'}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
