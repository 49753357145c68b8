"""The accelerator's script on a CPU: what it checks, what it writes, and what it survives."""

import json

import jax
import pytest

from experiments.delta_bench import device
from experiments.delta_bench.round_trip import DEVICE_STEPS, round_trip
from kernels.sparse_delta import gpu


def test_a_kernel_that_raises_or_differs_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise ValueError("no such instruction")

    def wrong(old, new, *, tile, interpret):
        mask, counts = device.reference.pack(old, new, tile=tile)
        return device.reference.Packed(mask, counts + (counts > 3))

    monkeypatch.setattr(gpu, "class_counts", broken)
    monkeypatch.setattr(gpu, "pack", wrong)
    monkeypatch.setattr(device, "_sweep", lambda *args: {})
    names = ("pack", "class_counts", "epilogue", "digest")
    found = device.run(tmp_path, tiny=True, names=names)
    kernels = found["kernels"]
    assert kernels["pack"]["same_bits"] is False
    assert kernels["pack"]["different"][0] == 0
    assert kernels["pack"]["different"][1] > 0
    assert "no such instruction" in kernels["class_counts"]["check_error"]
    for name in ("epilogue", "digest"):
        assert kernels[name]["same_bits"] is True, kernels[name]
        assert kernels[name]["per_cent_of_copy"] > 0
    written = json.loads((tmp_path / "device_cpu.json").read_text())
    assert written == json.loads(json.dumps(found))
    assert written["jax"] == jax.__version__


def test_weights_go_all_the_way_and_every_step_is_timed():
    found = round_trip((512, 512), 2, density=0.01, rounds=1)
    assert found["same_bits"] is True
    assert found["elements"] == 2 * 512 * 512
    device_steps = {step for steps in DEVICE_STEPS.values() for step in steps}
    assert device_steps | {"finish", "decode and upload"} <= set(found["ms"])
    assert all(ms > 0 for ms in found["ms"].values())
    # The entropy of the mask is 8.1 bits a change, and a sign 1; the exponents tell nothing here.
    assert 8.5 < found["bits_per_change"] < 12


def test_speed_counts_the_bytes_that_have_to_be_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_sweep", lambda *args: {})
    monkeypatch.setattr(device, "_copy_gb_s", lambda *args: 100.0)
    result = device.run(tmp_path, tiny=True, names=("digest",))["kernels"]["digest"]
    elements = 2 * 128 * 512
    gb_s = 2 * elements / (result["median_ms"] * 1e6)
    assert result["gb_s"] == pytest.approx(gb_s)
    assert result["per_cent_of_copy"] == pytest.approx(gb_s)
    assert result["ms_for_8e9"] == pytest.approx(result["median_ms"] * 8e9 / elements)


def test_the_rest_is_done_by_a_fresh_process_when_the_device_is_lost(tmp_path, monkeypatch):
    called = []

    def process(command, check):
        called.append(command)
        folder = tmp_path / "after_1"
        folder.mkdir()
        rest = {"kernels": {"digest": {"same_bits": True}}, "errors": {}}
        (folder / "device_cpu.json").write_text(json.dumps(rest))

    monkeypatch.setattr(device, "_is_usable", lambda _: False)
    monkeypatch.setattr(device.subprocess, "run", process)
    monkeypatch.setattr(device, "_measure", lambda *args: {"same_bits": False})
    found = device.run(tmp_path, tiny=True, names=("pack", "digest"))
    assert called[0][-3:] == ["--tiny", "--only", "digest"]
    assert found["kernels"] == {"pack": {"same_bits": False}, "digest": {"same_bits": True}}
    assert found["errors"]["device"] == "unusable after pack"
