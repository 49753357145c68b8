"""Checking a plan by compiling it in another process, for machines that are not here."""

import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest

import sharding

pytest.importorskip(
    "flatbuffers", reason="jax.export needs flatbuffers to hand the step over: pip install it"
)
KEY = jax.random.key(0)


def _plan(models, cluster, *, width=64, **pinned):
    step = sharding.train_step(models.decoder_loss, optax.adam(1e-3))
    params = jax.eval_shape(lambda: models.decoder_params(KEY, width=width, hidden=4 * width))
    args = (params, jax.eval_shape(step.optimizer.init, params),
            jax.ShapeDtypeStruct((16, 33), jnp.int32))  # fmt: skip
    plan = sharding.plan(
        step, args, cluster=cluster, constraints=sharding.Constraints(pinned=pinned)
    )
    return plan, args


def test_the_compiler_confirms_what_is_divided(models):
    plan, args = _plan(models, jax.devices(), fsdp=4, tensor=2, zero=3)
    report = plan.check(donate=(0, 1))
    expected = sum(
        leaf.size * leaf.dtype.itemsize
        / (1 if not spec else 8 if "tensor" in str(spec) and "fsdp" in str(spec) else 4)
        for leaf, spec in zip(jax.tree.leaves(args), plan.inputs.values(), strict=True)
    )  # fmt: skip
    assert report.argument_bytes == pytest.approx(expected, rel=0.01)
    assert report.aliased_bytes > 0.9 * report.output_bytes  # parameters and state were donated
    assert report.peak_bytes >= report.argument_bytes
    assert report.collectives["all-gather"].count > 0
    assert report.memory_error == pytest.approx(plan.memory_bytes / report.peak_bytes - 1)
    assert "all-gather" in str(report)
    with pytest.raises(ValueError, match="checks a step and its arguments"):
        sharding.Plan.from_json(plan.to_json()).check()


def test_a_machine_without_a_known_target_is_said(models):
    plan, _ = _plan(models, "a100:1x8", data=8)
    with pytest.raises(RuntimeError, match="no compiler target is known for a100"):
        plan.check()


@pytest.mark.aot
@pytest.mark.timeout(600)
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the aot extra")
@pytest.mark.parametrize(
    ("cluster", "pinned"),
    [
        ("v5e:2x4", {"fsdp": 4, "tensor": 2, "zero": 3}),
        ("v5e:1x2", {"fsdp": 2, "zero": 3}),  # a part of a host
        ("v5e:2x2", {"fsdp": 4, "zero": 3, "offload": "optimizer"}),
    ],
)
def test_the_tpu_compiler_accepts_a_plan(models, cluster, pinned):
    # Shards of at least 128 columns: a TPU's tiles pad narrower ones.
    plan, _ = _plan(models, cluster, width=1024, **pinned)
    report = plan.check(donate=(0, 1))
    assert 0 < report.argument_bytes <= report.peak_bytes
    assert report.argument_bytes == pytest.approx(
        plan.prediction.memory_breakdown["arguments"], rel=0.05
    )
