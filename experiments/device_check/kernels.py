"""The kernels of sparse deltas: the definition's bits, their speed, and the whole way."""

import tempfile
from pathlib import Path

from experiments.delta_bench import device
from experiments.device_check.checks import Finding

# An eighth of what `experiments.delta_bench.device` measures: the same kernels, fewer tensors.
SCALE = device.Scale(base=(2048, 4096), repeats=16, rounds=5, elements=1 << 30)
TINY = device.Scale(base=(64, 512), repeats=1, tile=(64, 512), rounds=1, elements=1 << 15)


def check(tiny: bool) -> Finding:
    """Compares every kernel of this device with `reference`, and times it."""
    with tempfile.TemporaryDirectory() as folder:
        found = device.run(Path(folder), tiny=tiny, scale=TINY if tiny else SCALE)
    kernels = found["kernels"]
    problems = [f"{name}: {error}" for name, error in found["errors"].items()]
    for name, result in kernels.items():
        if not result.get("same_bits"):
            said = result.get("check_error", f"other bits: {result.get('different')}")
            problems.append(f"{name}: {said}")
        elif "time_error" in result:
            problems.append(f"{name}: {result['time_error']}")
    whole = found.get("round_trip", {})
    if whole and not whole["same_bits"]:
        problems.append("weights that went the whole way have other bits")
    same = sum(bool(result.get("same_bits")) for result in kernels.values())
    best = max((r.get("per_cent_of_copy", 0.0) for r in kernels.values()), default=0.0)
    summary = (
        f"{same} of {len(kernels)} kernels give the reference's bits; the fastest reaches "
        f"{best:.0f} % of a copy's {found.get('copy_gb_s', float('nan')):.0f} GB/s"
    )
    names = ("kernels", "halves", "round_trip", "copy_gb_s", "elements", "density")
    numbers = {name: found[name] for name in names if name in found}
    return Finding(numbers=numbers, summary=summary, problems=tuple(problems))
