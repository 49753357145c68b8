"""The doctor: well on this machine, and every fault is seen and comes with a remedy."""

import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import pytest

from jaxrl import doctor
from jaxrl.__main__ import main


def test_every_check_passes_here(tmp_path, capsys):
    assert main(["doctor", "--json", "--out", str(tmp_path / "runs")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert [c["name"] for c in found["checks"]] == list(doctor.checks(tmp_path))
    failed = [c for c in found["checks"] if c["status"] == "fail"]
    assert failed == []


def test_one_line_each_and_status_1_on_a_fault(tmp_path, capsys, monkeypatch):
    outcomes = {
        "good": lambda: ("ok", "fine", ""),
        "odd": lambda: ("warn", "slow", "make it fast"),
        "bad": lambda: ("fail", "broken", "mend it"),
    }
    monkeypatch.setattr(doctor, "checks", lambda _: outcomes)
    assert main(["doctor", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok    good         fine",
        "warn  odd          slow",
        "                   → make it fast",
        "fail  bad          broken",
        "                   → mend it",
    ]
    del outcomes["bad"]
    assert main(["doctor", "--out", str(tmp_path)]) == 0  # warnings are no fault


def test_fake_devices_take_part_in_the_collective():
    code = (
        "import sys, jax\n"
        "from jaxrl import __main__, doctor\n"
        "doctor.checks = lambda _: {'collective': doctor.check_collective}\n"
        "sys.exit(__main__.main(['doctor', '--fake-devices', '8']))\n"
    )
    environment = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "sum over 8 devices" in done.stdout


def test_a_wrong_sum_is_a_fault(monkeypatch):
    real = jax.lax.psum
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: real(x, axis) + 1)
    status, detail, remedy = doctor.check_collective()
    assert status == "fail"
    assert "gave" in detail
    assert remedy


def test_an_exception_is_a_finding_with_a_remedy():
    def check():
        raise RuntimeError("Unable to initialize backend 'cuda'\n  twice")

    found = doctor.examine("devices", check, timeout_s=10.0)
    assert found.status == "fail"
    assert found.detail == "RuntimeError: Unable to initialize backend 'cuda' twice"
    assert "JAX_PLATFORMS=cpu" in found.remedy


def test_a_hanging_check_is_a_finding():
    answered = threading.Event()
    found = doctor.examine("collective", answered.wait, timeout_s=0.1)
    answered.set()
    assert (found.status, found.detail) == ("fail", "no answer after 0.1 s")
    assert "NCCL_DEBUG" in found.remedy


REQUIREMENTS = [
    "jax>=0.10",
    "flax>=0.12",
    "numpy",
    "tokenizers[x]>=0.21",
    "wandb>=0.19; extra == 'wandb'",
]


@pytest.fixture
def installed(monkeypatch):
    versions = {"jax": "0.10.2", "flax": "0.12.8", "numpy": "2.4.6", "tokenizers": "0.23.3"}

    def version(name):
        if name not in versions:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: REQUIREMENTS)
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    return versions


def test_packages_that_fit(installed):
    assert doctor.check_packages() == ("ok", "jax 0.10.2, flax 0.12.8", "")


def test_packages_missing_or_too_old(installed):
    installed["jax"] = "0.9.10"  # as text it would come after 0.10
    del installed["tokenizers"]
    status, detail, remedy = doctor.check_packages()
    assert (status, detail) == ("fail", "jax 0.9.10 is older than 0.10; tokenizers is missing")
    assert remedy == "pip install --upgrade jaxrl-safe"


def test_running_from_source_is_said(monkeypatch):
    def absent(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", absent)
    status, _, remedy = doctor.check_packages()
    assert (status, remedy) == ("warn", "pip install -e . in the checkout")


def test_plugin_of_another_release(monkeypatch):
    versions = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda13-plugin": "0.9.0"}
    names = [SimpleNamespace(metadata={"Name": name}) for name in versions]
    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda: names)
    monkeypatch.setattr(doctor.importlib.metadata, "version", versions.__getitem__)
    status, detail, remedy = doctor.check_jaxlib()
    assert status == "warn"
    assert "jax-cuda13-plugin 0.9.0" in detail
    assert "plugin" in remedy
    versions["jax-cuda13-plugin"] = "0.10.2"
    assert doctor.check_jaxlib()[0] == "ok"


def test_unused_gpu_is_noticed(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("needs JAX on CPU")
    monkeypatch.setattr(doctor.glob, "glob", lambda p: ["/dev/nvidia0"] if "nvidia" in p else [])
    status, detail, remedy = doctor.check_devices()
    assert status == "warn"
    assert "the machine has an NVIDIA GPU" in detail
    assert "jaxrl-safe[cuda]" in remedy


def test_little_memory_is_noticed(monkeypatch):
    monkeypatch.setattr(doctor, "host_memory_bytes", lambda: (8.0 * 2**30, 1.0 * 2**30))
    status, detail, _ = doctor.check_memory()
    assert status == "warn"
    assert "host 1.0 of 8.0 GiB free" in detail


def test_memory_is_that_of_this_machine():
    total, free = doctor.host_memory_bytes()
    assert 0 < free <= total < 2**50


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    status, detail, remedy = doctor.check_disk(tmp_path / "file" / "runs")
    assert status == "fail"
    assert "cannot write" in detail
    assert "--out" in remedy


def test_full_disk_is_noticed(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert doctor.check_disk(tmp_path)[0] == "warn"


def test_checkpoint_that_comes_back_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrl.checkpoint.Checkpointer.restore_latest", lambda *_: None)
    status, _, remedy = doctor.check_checkpoint(tmp_path)
    assert status == "fail"
    assert remedy


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["operate"])
    assert stopped.value.code == 2
    assert "doctor" in capsys.readouterr().err
