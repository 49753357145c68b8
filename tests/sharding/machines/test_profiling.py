"""Measuring the machine that is here, and planning for it."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sharding.costs.constants import shipped
from sharding.machines.profiling import _gathers
from sharding.machines.topology import Cluster


@pytest.fixture(scope="module")
def measured():
    began = time.perf_counter()
    found = sharding.profile(budget_s=4.0)
    return found, time.perf_counter() - began


def test_the_devices_that_are_here_become_a_cluster(measured):
    found, took = measured
    assert took < 60
    assert found.device_count == len(jax.devices())
    assert {"kernel_s", "matmul", "hbm", "link", "link_s"} <= set(found.measured)
    assert all(0 < found.measured[name] <= 1 for name in ("matmul", "hbm", "link"))
    assert 0 <= found.measured["kernel_s"] < 0.05
    # One host: no network was measured.
    assert "network" not in found.measured


def test_the_rate_of_products_is_that_of_a_product(measured):
    # The same by hand: all devices multiply at once, in float32.
    found, _ = measured
    n, devices = 512, jax.devices()
    mesh = jax.sharding.Mesh(np.asarray(devices), ("all",))
    spec = jax.sharding.PartitionSpec("all")
    x = jax.device_put(jnp.ones((len(devices), n, n)), jax.sharding.NamedSharding(mesh, spec))
    run = jax.jit(lambda x: x @ x)
    jax.block_until_ready(run(x))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - began)
    rate = 2 * n**3 / min(times)
    # Other work may be on the machine at either time: an order of magnitude has to agree.
    assert 0.1 < found.chip.peak_flops["fp32"] / rate < 10


def test_a_plan_is_costed_by_what_was_measured(measured, tmp_path, models):
    found, _ = measured
    path = tmp_path / "here.json"
    path.write_text(found.to_json())
    read = Cluster.from_json(path)
    assert read == found
    params = models.decoder_params(jax.random.key(0))
    args = (params, models.tokens(jax.random.key(0)))
    plans = [sharding.plan(models.decoder_loss, args, cluster=c) for c in (found, str(path))]
    assert plans[0].step_time_s == plans[1].step_time_s
    constants = shipped().constants("cpu", "", found.measured)
    assert constants.matmul == found.measured["matmul"]
    assert constants.overlap_fsdp == shipped().constants("cpu").overlap_fsdp


def test_gathers_need_members():
    one = Cluster.from_devices(jax.devices()[:1])
    assert _gathers(one, jax.devices()[:1], "fsdp", 1.0) is None
    with pytest.raises(ValueError, match="a budget in seconds"):
        sharding.profile(budget_s=0.0)
