"""The mesh of `--mesh`, where a model lies on it, and which batches it divides."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.safety.config import SafetyConfig
from experiments.safety.placement import check_batches, mesh_of, plan_of
from jaxrl.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=24, layers=2, embed=16, heads=4, kv_heads=2, head_dim=4, mlp=32, max_len=16
)


def test_a_mesh_is_axes_with_sizes():
    assert mesh_of("auto") == {}
    assert mesh_of("data=1") == {}
    assert mesh_of("data=2, tensor=4") == {"data": 2, "tensor": 4}
    rule = "mesh is auto, planned, or axes of data, fsdp, tensor"
    for text in ("data", "data=0", "rows=2", "data=2,data=2", "data=-2", ""):
        with pytest.raises(ValueError, match=rule):
            mesh_of(text)
    with pytest.raises(ValueError, match="has 16 devices, and there are 8"):
        mesh_of("fsdp=16")


def test_parameters_are_divided_by_what_divides_them():
    params = nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    mesh = {"fsdp": 2, "tensor": 4}
    placed = plan_of(mesh, params).bind().place(params)

    def share(name):
        array = placed["layers"][name].get_value()
        return array.size / array.addressable_shards[0].data.size

    assert share("query") == 8  # width by 2, heads by 4
    assert share("gate") == 8
    assert share("key") == 2  # two heads do not divide among four
    assert plan_of(mesh, params).batch == ("fsdp",)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    graphdef, _ = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    expected, found = (nnx.merge(graphdef, p)(jax.numpy.asarray(tokens)) for p in (params, placed))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batches_that_do_not_divide_are_named_before_anything_runs():
    config = SafetyConfig(algorithms=("repo_tb",), samples_per_step=64)
    check_batches(config, mesh_of("data=4,tensor=2"))
    with pytest.raises(ValueError, match=r"4 devices divide every batch: --sft.batch is 30"):
        check_batches(replace(config, sft=replace(config.sft, batch=30)), {"data": 2, "fsdp": 2})
    few = replace(config, samples_per_step=16)  # two prompts of eight completions
    with pytest.raises(ValueError, match=r"prompts of a step of repo_tb .* is 2"):
        check_batches(few, {"data": 4})
