"""Consecutive versions of a model's bf16 weights, and the files that keep them."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import zstandard

from experiments.harness.files import write_atomically

Bits = Mapping[str, np.ndarray]
"""bf16 weights by name, as the uint16 of their bits."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What the receiver has and what it shall have.

    Attributes:
      name: of the pair, as tables show it.
      old, new: uint16 bits of the bf16 weights, with equal names and shapes.
    """

    name: str
    old: Bits
    new: Bits

    def __post_init__(self) -> None:
        shapes = [{name: x.shape for name, x in side.items()} for side in (self.old, self.new)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"old and new must have equal names and shapes: {shapes}")

    @cached_property
    def elements(self) -> int:
        """N."""
        return sum(x.size for x in self.old.values())

    @property
    def dense_bytes(self) -> int:
        """Size of the new weights."""
        return 2 * self.elements

    @cached_property
    def changed(self) -> int:
        """K: elements whose bits differ."""
        return sum(int(np.count_nonzero(self.old[n] != self.new[n])) for n in self.old)

    @property
    def density(self) -> float:
        """K / N."""
        return self.changed / self.elements

    @cached_property
    def arrays(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Old and new as JAX arrays of bfloat16."""
        old, new = (
            {name: jnp.asarray(x.view(ml_dtypes.bfloat16)) for name, x in side.items()}
            for side in (self.old, self.new)
        )
        return jax.block_until_ready((old, new))


def bits_of(array: jax.Array | np.ndarray) -> np.ndarray:
    """The uint16 bits of an array, which is rounded to bf16 first where it is not bf16."""
    return np.ascontiguousarray(np.asarray(array).astype(ml_dtypes.bfloat16)).view(np.uint16)


def save_versions(path: Path, versions: Sequence[Bits]) -> None:
    """Writes successive versions: the first one whole, the others as XOR with the one before."""
    compressor = zstandard.ZstdCompressor(level=1)
    members: dict[str, np.ndarray] = {}
    for name, first in versions[0].items():
        members[f"{name}:shape"] = np.asarray(first.shape, np.int64)
        before = np.zeros_like(first)
        for index, version in enumerate(versions):
            frame = compressor.compress(np.bitwise_xor(version[name], before).tobytes())
            members[f"{name}:{index}"] = np.frombuffer(frame, np.uint8)
            before = version[name]
    buffer = io.BytesIO()
    np.savez(buffer, **members)  # pyright: ignore[reportArgumentType]
    write_atomically(path, buffer.getvalue())


def load_versions(path: Path) -> list[dict[str, np.ndarray]]:
    """Reads what `save_versions` wrote."""
    decompressor = zstandard.ZstdDecompressor()
    versions: list[dict[str, np.ndarray]] = []
    with np.load(path) as file:
        for name in (key.removesuffix(":shape") for key in file.files if key.endswith(":shape")):
            shape, index, bits = tuple(file[f"{name}:shape"]), 0, np.uint16(0)
            while (key := f"{name}:{index}") in file.files:
                frame = decompressor.decompress(file[key].tobytes())
                bits = np.frombuffer(frame, np.uint16).reshape(shape) ^ bits
                if index == len(versions):
                    versions.append({})
                versions[index][name] = bits
                index += 1
    return versions
