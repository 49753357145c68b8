"""Sizes on one device: what strategies leave of each dimension, tensor and parameter."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sharding.costs.strategies import Strategies
from sharding.programs.program import Block, Program, dtype_bytes


class View:
    """Sizes of a program on one device, under each of N strategies.

    Attributes:
      sizes: dimension to its global size.
      local: dimension to its local size, (N,); uneven divisions are rounded up.
      one: N ones.
    """

    def __init__(
        self, program: Program, strategies: Strategies, sizes: Mapping[str, Any] | None
    ) -> None:
        self.program, self.strategies = program, strategies
        self.sizes = {d: np.asarray(s, float) for d, s in (sizes or program.dims).items()}
        ways = {
            "data": strategies.batch_ways * strategies.microbatches,
            "context": strategies.context,
            "tensor": strategies.tensor,
            "expert": strategies.expert,
        }
        self.local = {
            dim: np.ceil(size / ways[program.splits[dim]]) if dim in program.splits else size
            for dim, size in self.sizes.items()
        }
        one = np.ones(len(strategies))
        self.local = {dim: size * one for dim, size in self.local.items()}
        self.one = one

    def divided(self, dims: Sequence[str], kind: str) -> bool:
        """Whether a kind of parallelism may divide any of the dimensions."""
        return any(self.program.splits.get(d) == kind for d in dims)

    def elements(self, dims: Sequence[str]) -> np.ndarray:
        """Local elements; of two dimensions divided by one kind the first is divided."""
        count = self.one
        for size in self.factors(dims):
            count = count * size
        return count

    def factors(self, dims: Sequence[str]) -> list[np.ndarray]:
        """Local sizes of the dimensions of one tensor or operation; see `elements`."""
        taken: set[str] = set()
        found = []
        for dim in dims:
            kind = self.program.splits.get(dim)
            found.append(self.sizes[dim] * self.one if kind in taken else self.local[dim])
            if kind is not None:
                taken.add(kind)
        return found

    def params(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Local parameters of a repetition, not yet divided by FSDP: outside and of experts."""
        dense, routed = 0.0 * self.one, 0.0 * self.one
        for tensor in self.program.params(block):
            count = self.elements(tensor.dims)
            if self.divided(tensor.dims, "expert"):
                routed = routed + count
            else:
                dense = dense + count
        return dense, routed

    def bytes(self, name: str) -> np.ndarray:
        """Local bytes of a tensor."""
        tensor = self.program.tensors[name]
        return self.elements(tensor.dims) * dtype_bytes(tensor.dtype)
