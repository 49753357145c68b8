"""The checks by name, and what one of them says."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found.

    Attributes:
      numbers: what was measured, by name; units stand in the names.
      problems: why it fails; () passes.
      summary: one line for the table.
    """

    numbers: Mapping[str, Any]
    summary: str
    problems: tuple[str, ...] = field(default=())


Check = Callable[[bool], Finding]
CHECKS: Mapping[str, str] = {
    "kernels": "sparse delta kernels against their reference",
    "attention": "attention kernels against plain XLA",
    "step": "one RL step of a large model",
    "generation": "generation with a large model",
    "repo": "a short RePO run",
}
"""Names, in the order in which they run, and what they are."""


def check(name: str) -> Check:
    """The function of a check: `tiny` to what was found. Only who runs it imports JAX."""
    return importlib.import_module(f"experiments.device_check.{name}").check


def device() -> dict[str, Any]:
    """What the checks ran on."""
    import jax

    from experiments.harness.environment import versions

    first = jax.devices()[0]
    return {
        "device": first.device_kind,
        "platform": first.platform,
        "count": jax.device_count(),
        "compute_capability": str(getattr(first, "compute_capability", "")),
        "versions": versions(),
    }
