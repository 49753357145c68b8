"""Attention's kernels against plain XLA in float32: values and gradients, and their speed."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check.checks import Finding
from jaxrl.models.attention import Pattern, Scores, cudnn, plain, splash
from jaxrl.models.cache import KeyValue

TOLERANCE = {"bfloat16": 0.02, "float32": 1e-3}
"""Largest Frobenius norm of a difference, as a share of the reference's: of operands rounded to
bf16, whose unit of least precision is 2⁻⁸, and of float32 as TPUs multiply it in three passes."""


def cases(tiny: bool) -> dict[str, tuple[Pattern, Scores, int]]:
    """Who sees whom, the scores' rule and key heads (of 8 query heads), by name."""
    long, own, window = (24, 8, 7) if tiny else (1024, 512, 300)
    return {
        "causal": (Pattern(prompt=long), Scores(), 2),
        "window": (Pattern(prompt=long, window=window), Scores(), 2),
        "soft cap, one key head": (Pattern(prompt=long), Scores(softcap=2.0), 1),
        "completions": (Pattern(prompt=long, completion=own), Scores(), 8),
    }


def implementations() -> dict[str, Callable[..., Any]]:
    """The kernels that this platform has; a CPU interprets the TPU's."""
    platform = jax.devices()[0].platform
    found: dict[str, Callable[..., Any]] = {"xla": _plain}
    if platform == "gpu":
        found["cudnn"] = functools.partial(cudnn.attend, packed=False)
    else:
        found["splash"] = functools.partial(splash.attend, interpret=platform == "cpu")
    return found


def _plain(query, kv, segments, pattern, *, rule):
    return plain.rows(query, kv, segments, pattern, rule=rule, window=pattern.window)


def check(tiny: bool) -> Finding:
    """Compares the implementations that run here, and times them at a longer row."""
    numbers: dict[str, Any] = {}
    problems = []
    for name, (pattern, rule, kv_heads) in cases(tiny).items():
        operands = query, kv, segments = _operands(pattern, kv_heads, tiny)
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), (query, kv))
        expected = _results(
            _plain, exact[0], exact[1], segments, pattern, rule, precision="highest"
        )
        for kind, attend in implementations().items():
            key = f"{kind}, {name}"
            refused = ""
            if kind == "cudnn":
                refused = cudnn.obstacle(query, kv, pattern, rule=rule, packed=False)
            if refused:
                numbers[key] = {"refused": refused}  # then the switch takes XLA
                continue
            try:
                found = _results(attend, *operands, pattern, rule)
            except Exception as error:  # what one raises does not end the others
                problems.append(f"{key}: {type(error).__name__}: {str(error)[:500]}")
                continue
            errors = [_error(a, b) for a, b in zip(found, expected, strict=True)]
            numbers[key] = dict(
                zip(("values", "of query", "of key", "of value"), errors, strict=True)
            )
            limit = TOLERANCE[operands[0].dtype.name]
            if not max(errors) <= limit:
                problems.append(f"{key}: differs by {max(errors):.3g}, allowed are {limit}")
    speeds = {} if tiny else _speeds(problems)
    compared = [row for row in numbers.values() if "values" in row]
    worst = max((max(row.values()) for row in compared), default=float("nan"))
    fast = "; ".join(f"{kind} {tflops:.0f} TFLOP/s" for kind, tflops in speeds.items())
    summary = f"{len(compared)} comparisons, worst difference {worst:.2g}"
    return Finding(
        numbers={"differences": numbers, "tflop_per_s": speeds},
        summary=f"{summary}; {fast}" if fast else summary,
        problems=tuple(problems),
    )


def _operands(pattern: Pattern, kv_heads: int, tiny: bool, rows: int = 2):
    """Queries, keys and values in bf16, and segments of which one row is padded on the left."""
    size = pattern.prompt + 2 * pattern.completion
    head_dim, heads = (16, 8) if tiny else (128, 8)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(rows, size, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    query, key, value = (
        jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)
    )
    padding = jnp.asarray([0, 5] * (rows // 2))
    segments = (jnp.arange(size)[None] >= padding[:, None]).astype(jnp.int32)
    return query, KeyValue(key, value), segments


def _results(attend, query, kv, segments, pattern, rule, *, precision: str | None = None):
    """The output at real columns, and its gradients along a fixed direction."""
    real = (segments != 0)[..., None, None]
    direction = jax.random.normal(jax.random.key(9), query.shape)

    def loss(query, kv):
        out = attend(query, kv, segments, pattern, rule=rule).astype(jnp.float32)
        out = jnp.where(real, out, 0.0)
        return jnp.sum(out * direction), out

    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, out), (of_query, of_kv) = run(query, kv)
    return [np.asarray(x, np.float32) for x in (out, of_query, *of_kv)]


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _speeds(problems: list[str]) -> dict[str, float]:
    """TFLOP/s of forward and backward at rows of 4,096 columns, 7 products of S²·d a head."""
    pattern, rule = Pattern(prompt=4096), Scores()
    query, kv, segments = _operands(pattern, 8, tiny=False, rows=4)
    rows, size, heads, head_dim = query.shape
    flops = 7 * 2 * rows * heads * size * size * head_dim / 2  # half of the square is seen
    speeds = {}
    for kind, attend in implementations().items():

        def loss(query, kv, attend=attend):
            return jnp.sum(attend(query, kv, segments, pattern, rule=rule).astype(jnp.float32))

        run = jax.jit(jax.grad(loss, argnums=(0, 1)))
        try:
            jax.block_until_ready(run(query, kv))
            times = []
            for _ in range(5):
                began = time.perf_counter()
                jax.block_until_ready(run(query, kv))
                times.append(time.perf_counter() - began)
            speeds[kind] = flops / statistics.median(times) / 1e12
        except Exception as error:  # one kernel that fails must not hide what the others do
            problems.append(f"{kind}, timed: {type(error).__name__}: {str(error)[:500]}")
    return speeds
