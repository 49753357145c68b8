"""Fitted constants: how much of the catalogue's figures real programs reach.

`catalog/calibration.json` holds them with the fit that made them; `sharding.measured.calibrate`
makes it.
A constant belongs to a software stack (XLA on TPUs, PyTorch FSDP, ...); a chip may shift the
efficiency of its stack. Every efficiency is at most 1.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What programs reach of a machine's nominal figures.

    Attributes:
      matmul: of the matrix unit's peak, for large products; at most 1.
      fill: depth of contraction that starting and finishing an output tile costs: a product over K
        takes the time of K + fill.
      unaligned: of `matmul`, where rows of an operand do not start at multiples of 16 bytes, as
        with a vocabulary of 50,257; at most 1.
      grouped: of `matmul`, for products of rows sorted by expert; at most 1.
      attention: of the peak, for fused attention; at most 1.
      hbm: of the memory's bandwidth; at most 1.
      scatter: of `hbm`, for passes whose addresses depend on data (routing, lookups); at most 1.
      link: of the bandwidth within a node or slice; at most 1.
      network: of the bandwidth between nodes or slices; at most 1.
      low_precision: exponent on the nominal gain of 8- and 4-bit products; 1 is all of it.
      kernel_s: seconds that a product or pass over memory takes to start and drain.
      launch_s: seconds of the host a kernel: a floor under everything it launches.
      skew: how much longer a host-bound step takes for each doubling of the tensor-parallel group,
        whose collectives wait for the slowest of its hosts.
      sync_s: seconds that a collective within a layer waits for its members and streams, whatever
        its size; its message travels meanwhile.
      link_s: seconds a step of a collective within a node or slice.
      network_s: seconds a step of a collective between nodes or slices.
      overlap_fsdp: share of compute behind which gathers of parameters hide.
      overlap_data: share of the backward pass behind which gradients' reduction hides.
      overlap_update: share of the next forward pass behind which gathers of updated parameters
        hide (ZeRO-1 and 2): nothing where a step is a program of its own.
      overlap_tensor: share of layers' own collectives that hide behind compute.
      dead: share of a layer's results that no gradient reads which recomputation computes all the
        same: 0 where a compiler removes them.
      step_s: seconds a step that grow with nothing.
      microbatch_s: seconds a micro-batch that grow with nothing.
      jitter: relative slow-down for each doubling of the nodes or slices in step.
    """

    matmul: float = 0.7
    fill: float = 64.0
    unaligned: float = 1.0
    grouped: float = 0.8
    attention: float = 0.5
    hbm: float = 0.8
    scatter: float = 0.4
    link: float = 0.8
    network: float = 0.7
    low_precision: float = 0.6
    kernel_s: float = 5e-6
    launch_s: float = 1e-7
    skew: float = 0.1
    sync_s: float = 0.0
    link_s: float = 5e-6
    network_s: float = 2e-5
    overlap_fsdp: float = 0.8
    overlap_data: float = 0.8
    overlap_update: float = 0.0
    overlap_tensor: float = 0.2
    dead: float = 0.02
    step_s: float = 1e-3
    microbatch_s: float = 1e-4
    jitter: float = 0.005

    def __post_init__(self) -> None:
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"physical bound: {name} is in [0, 1]: {getattr(self, name)}")
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"a constant is not negative: {field.name}")


SHARES = ("matmul", "unaligned", "grouped", "attention", "hbm", "scatter", "link", "network",
          "low_precision", "overlap_fsdp", "overlap_data", "overlap_update",
          "overlap_tensor", "dead")  # fmt: skip

# Which software runs a program when nothing says so.
STACKS = ("xla_tpu", "xla_gpu", "megatron_fp16", "megatron", "fsdp")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Constants of every stack, and chips' shifts.

    Attributes:
      stacks: constants by stack.
      chips: chip to constant to the factor on its distance from the bound.
      about: how it was made.
    """

    stacks: Mapping[str, Constants]
    chips: Mapping[str, Mapping[str, float]]
    about: Mapping[str, str]

    def constants(
        self, chip: str, stack: str = "", measured: Mapping[str, float] | None = None
    ) -> Constants:
        """For a chip under a stack; "" is XLA. What was measured takes the place of the fit.

        Raises:
          ValueError: an unknown stack.
        """
        if not stack:
            stack = "xla_tpu" if chip.startswith(("v2", "v3", "v4", "v5", "v6", "tpu")) and (
                not chip.startswith("v100")) else "xla_gpu"  # fmt: skip
        if stack not in self.stacks:
            raise ValueError(f"no stack is called {stack!r}; one of {', '.join(self.stacks)}")
        found = self.stacks[stack]
        shifts = self.chips.get(f"{stack}/{chip}", {})
        shifted_ = {n: shifted(getattr(found, n), d) for n, d in shifts.items()}
        return replace(found, **{**shifted_, **(measured or {})})

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(
            {
                "_units": "seconds where a name ends in _s, shares of the nominal figure elsewhere",
                "about": dict(self.about),
                "stacks": {k: {f.name: getattr(c, f.name) for f in fields(c)}
                           for k, c in self.stacks.items()},
                "chips": {k: dict(v) for k, v in self.chips.items()},
            },
            indent=1,
        )  # fmt: skip

    @classmethod
    def from_json(cls, text: str) -> "Calibration":
        """Reads what `to_json` wrote."""
        document = json.loads(text)
        stacks = {name: Constants(**values) for name, values in document["stacks"].items()}
        return cls(stacks=stacks, chips=document["chips"], about=document["about"])


def shifted(share: float, shift: float) -> float:
    """A share in (0, 1) moved by `shift` on the log-odds scale, which keeps it there.

    >>> round(shifted(0.5, 0.4), 3)
    0.599
    """
    odds = share / (1 - share) * 2.718281828459045**shift if share < 1 else float("inf")
    return 1.0 if odds == float("inf") else odds / (1 + odds)


@functools.cache
def shipped() -> Calibration:
    """The calibration that comes with the package."""
    text = resources.files("sharding").joinpath("catalog/calibration.json").read_text()
    return Calibration.from_json(text)


def load(path: str | Path | None = None) -> Calibration:
    """A calibration from a file, or the shipped one."""
    return Calibration.from_json(Path(path).read_text()) if path else shipped()
