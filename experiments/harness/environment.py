"""What a result depends on besides its config: code, versions and hardware."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "jaxrl-safe",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "chex",
    "jaxtyping",
    "numpy",
    "tokenizers",
    "scikit-learn",
    "matplotlib",
    "tyro",
    "tensorboardX",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results rest on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path | None = None, *, timeout_s: float = 10.0) -> dict[str, Any] | None:
    """Commit of the source and whether files differ from it; None outside a git checkout."""
    where = folder or Path(__file__).resolve().parents[2]

    def ask(*words: str) -> str:
        done = subprocess.run(
            ("git", "-C", str(where), *words),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        return done.stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")) != where.resolve():
            return None  # an installed copy that happens to lie inside someone else's checkout
        return {
            "commit": ask("rev-parse", "HEAD"),
            "modified": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def describe() -> dict[str, Any]:
    """Versions, commit, command and hardware of this process, as JSON values."""
    import jax  # starts the backend: not for every `--help`

    return {
        "versions": versions(),
        "git": git_commit(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
