"""The soak test: `pytest -m soak`; JAXRL_SOAK_MINUTES and JAXRL_SOAK_SEED change it."""

import json
import os

import pytest
import soak


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_minutes_of_random_faults(tmp_path, capsys):
    minutes = os.environ.get("JAXRL_SOAK_MINUTES", "10")
    seed = os.environ.get("JAXRL_SOAK_SEED", "0")
    with capsys.disabled():
        code = soak.main(["--minutes", minutes, "--seed", seed, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "soak.json").read_text())
    assert code == 0, report["problems"]
    assert report["mismatches"] == 0
    assert report["versions_applied"] > 0
    assert report["faults_injected"] > float(minutes)
