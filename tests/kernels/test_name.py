"""The package shares its import name with the Hub's distribution `kernels`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_transformers_imports_beside_this_project():
    program = "import transformers.integrations, kernels.sparse_delta; print(kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(done.stdout.strip().splitlines()[-1]).parent == ROOT / "kernels"
