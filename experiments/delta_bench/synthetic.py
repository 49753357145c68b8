"""Synthetic pairs: one Adam step on float32 master weights, seen through bf16.

Weights are N(0, σ_l²) with σ_l lognormal around 0.02, a layer each. A gradient is
snr · d_t + n_t with unit white noise n_t and a direction d_t that is an AR(1) process of unit
variance, so that steps agree with each other as far as they do in RL. After the warm-up of
Adam's moments the learning rate alone sets the density, and is solved for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from experiments.delta_bench.pairs import Pair, load_versions, save_versions

_PROPORTIONAL = 0.3
"""Up to this density it grows with the rate nearly in proportion, and a sample's noise matters."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Size and statistics of the simulated training.

    Attributes:
      elements: of the whole model.
      layers: tensors, equally large, of 512 columns.
      steps: of Adam; the last one makes the pair.
      median_std: median over the layers of a weight's standard deviation.
      log_std: standard deviation of its logarithm over the layers.
      snr: of a gradient: its AR(1) part over its white part.
      memory: coefficient of the AR(1) process.
      b1: decay rate of Adam's first moment.
      b2: decay rate of its second moment.
    """

    elements: int = 1 << 24
    layers: int = 16
    steps: int = 24
    median_std: float = 0.02
    log_std: float = 0.5
    snr: float = 0.3
    memory: float = 0.9
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self) -> None:
        if self.elements < 1 or self.elements % (512 * self.layers):
            raise ValueError(
                f"elements must be a multiple of 512 · layers: {self.elements=}, {self.layers=}"
            )


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A training for any learning rate: its gradients do not depend on the weights.

    Attributes:
      start: weights before the first step, float32 [layers, rows, 512].
      before: sum of Adam's normalised updates of all steps but the last, of the same shape.
      last: the last step's, of the same shape.
    """

    start: np.ndarray
    before: np.ndarray
    last: np.ndarray

    @classmethod
    def run(cls, simulation: Simulation, seed: int) -> "Trajectory":
        """Simulates layer by layer."""
        shape = (simulation.layers, simulation.elements // (512 * simulation.layers), 512)
        parts = [np.empty(shape, np.float32) for _ in range(3)]
        streams = np.random.SeedSequence(seed).spawn(simulation.layers)
        for layer, stream in enumerate(streams):
            rng = np.random.default_rng(stream)
            for part, values in zip(parts, _layer(simulation, shape[1:], rng), strict=True):
                part[layer] = values
        return cls(start=parts[0], before=parts[1], last=parts[2])

    def versions(self, learning_rate: float, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """bf16 bits before and after the last step, uint16.

        Args:
          learning_rate: of Adam.
          every: takes each so many-th column only.
        """
        start, before, last = (x[..., ::every] for x in (self.start, self.before, self.last))
        rate = np.float32(learning_rate)
        master = start - rate * before
        old, new = (x.astype(ml_dtypes.bfloat16) for x in (master, master - rate * last))
        return old.view(np.uint16), new.view(np.uint16)

    def solve(self, density: float) -> float:
        """The learning rate at which the last step changes this share of the bf16 weights."""
        low, high = -25.0, 5.0  # natural logarithms
        for _ in range(32):
            middle = (low + high) / 2
            old, new = self.versions(np.exp(middle), every=8)
            low, high = (middle, high) if np.mean(old != new) < density else (low, middle)
        rate, tried = float(np.exp((low + high) / 2)), {}
        for _ in range(4 if density <= _PROPORTIONAL else 1):
            old, new = self.versions(rate)
            found = max(float(np.mean(old != new)), 1 / old.size)
            tried[abs(math.log(found / density))] = rate
            rate *= density / found
        return tried[min(tried)]


def _layer(
    simulation: Simulation, shape: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, summed updates and last update of one layer."""

    def normal() -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    std = simulation.median_std * np.exp(simulation.log_std * rng.standard_normal())
    start = np.float32(std) * normal()
    memory, fresh = np.float32(simulation.memory), np.float32(np.sqrt(1 - simulation.memory**2))
    b1, b2 = np.float32(simulation.b1), np.float32(simulation.b2)
    direction, first, second, before, update = normal(), *(np.zeros(shape, np.float32),) * 4
    for step in range(1, simulation.steps + 1):
        before = before + update
        direction = memory * direction + fresh * normal()
        gradient = np.float32(simulation.snr) * direction + normal()
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient**2
        update = (first / (1 - b1**step)) / np.sqrt(second / (1 - b2**step))
    return start, before, update


def pair_path(folder: Path, density: float) -> Path:
    """The file of the pair of this density."""
    return folder / f"synthetic_{density:g}.npz"


def synthetic_pairs(
    folder: Path, simulation: Simulation, densities: Sequence[float], *, seed: int
) -> list[Pair]:
    """Pairs of these densities; read from `folder` where an earlier run left them.

    At density 1 the learning rate is the largest that changes all but a thousandth; the bits of
    the elements that came out equal are moved by one.
    """
    paths = {density: pair_path(folder, density) for density in densities}
    if not all(path.exists() for path in paths.values()):
        trajectory = Trajectory.run(simulation, seed)
        for density, path in paths.items():
            old, new = trajectory.versions(trajectory.solve(min(density, 0.999)))
            if density == 1:
                new ^= new == old
            versions = [{f"layer_{i:02}": x for i, x in enumerate(side)} for side in (old, new)]
            save_versions(path, versions)
    pairs = []
    for density, path in paths.items():
        old, new = load_versions(path)
        pairs.append(Pair(name=f"synthetic, {100 * density:.4g} %", old=old, new=new))
    return pairs
