"""A process's first call: what a user waits for who has compiled nothing yet.

    python -m experiments.delta_bench.cold PAIR.npz

Prints one JSON object: seconds of the import, of the first and the second encode, of the first
and the second apply.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KEYS = ("import_s", "first_encode_s", "second_encode_s", "first_apply_s", "second_apply_s")


def cold_and_cached(pair: Path) -> dict[str, dict[str, float]]:
    """First calls without compiled code, and in a second process with what the first one kept.

    Args:
      pair: a file of `pairs.save_versions`.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="numba-cache-") as cache:
        for name in ("cold", "cached"):
            done = subprocess.run(
                [sys.executable, "-m", __spec__.name, str(pair)],
                capture_output=True,
                text=True,
                check=True,
                timeout=300,
                env=os.environ | {"NUMBA_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu"},
            )
            found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(path: str) -> None:
    """Measures this process."""
    times: dict[str, float] = {}

    def timed(name: str, function: Any, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **options)
        times[name] = time.perf_counter() - began
        return result

    from experiments.delta_bench.pairs import Pair, load_versions

    old, new = load_versions(Path(path))
    arrays = Pair(name="cold", old=old, new=new).arrays
    codec = timed("import_s", _import)
    for nth in ("first", "second"):
        payload = timed(f"{nth}_encode_s", codec.encode, *arrays)
        timed(f"{nth}_apply_s", codec.apply, arrays[0], payload)
    print(json.dumps(times))


def _import() -> Any:
    from kernels import sparse_delta

    return sparse_delta


if __name__ == "__main__":
    main(sys.argv[1])
