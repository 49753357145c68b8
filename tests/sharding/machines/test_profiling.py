"""Measuring the machine that is here, and planning for it."""

import inspect
import math

import jax
import pytest

import sharding
from sharding.costs.constants import shipped
from sharding.machines import profiling
from sharding.machines.profiling import _gathers
from sharding.machines.topology import Cluster


@pytest.fixture(scope="module")
def measured():
    return sharding.profile(budget_s=4.0)


def test_the_devices_that_are_here_become_a_cluster(measured):
    assert measured.device_count == len(jax.devices())
    # One host: no network was measured.
    assert set(measured.measured) == {"kernel_s", "matmul", "hbm", "link", "link_s"}
    assert all(0 < measured.measured[name] <= 1 for name in ("matmul", "hbm", "link"))
    assert all(0 <= measured.measured[name] < math.inf for name in ("kernel_s", "link_s"))
    assert all(0 < rate < math.inf for rate in measured.chip.peak_flops.values())


def test_rates_are_those_of_the_times(monkeypatch):
    """On a device of 2 TFLOP/s and 0.1 TB/s whose kernels take 10 µs to launch."""
    kernel_s, flops, bandwidth = 1e-5, 2e12, 1e11
    mesh = jax.sharding.Mesh(jax.devices(), ("all",))

    def of_a_product(mesh, run, shape, dtype):
        count = inspect.signature(run).parameters["count"].default
        return count * (2 * shape[0] ** 3 / flops + kernel_s)

    monkeypatch.setattr(profiling, "_each", of_a_product)
    rates = list(profiling._product_rates(mesh, "float32", kernel_s, 100.0))
    assert rates == pytest.approx([flops] * len(rates))
    # Sizes that take a tenth of a second tell the rate: none larger is tried.
    assert 2 * profiling._EDGES[len(rates) - 1] ** 3 / flops > 0.1
    monkeypatch.setattr(
        profiling, "_each", lambda mesh, run, shape, dtype: 8 * shape[0] / bandwidth + kernel_s
    )
    rates = list(profiling._pass_rates(mesh, kernel_s, 100.0))
    assert rates == pytest.approx([bandwidth] * len(profiling._PASS_BYTES))


def test_a_gathers_latency_and_bandwidth_are_those_of_its_times(monkeypatch):
    """Three steps of 20 µs among 8 devices, and seven eighths of the bytes at 5 GB/s."""
    monkeypatch.setattr(profiling, "_seconds", lambda run, x: 3 * 2e-5 + x.nbytes * 7 / 8 / 5e9)
    devices = jax.devices()
    found = _gathers(Cluster.from_devices(devices), devices, "fsdp", 100.0)
    assert found is not None
    assert (found[0], found[2]) == pytest.approx((2e-5, 5e9), rel=1e-3)


def test_a_plan_is_costed_by_what_was_measured(measured, tmp_path, models):
    found = measured
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
