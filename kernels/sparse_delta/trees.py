"""Pytrees as sorted lists of named leaves, and the digest of a whole tree.

The digest of a tensor (`digest`) is a pair of sums over its elements, so that shards add up and a
change of few elements costs little; that of a tree is one hash over names, dtypes, shapes and sums.
"""

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import xxhash

from kernels.sparse_delta.elements import element_format

Sums = tuple[int, int]


@dataclass(frozen=True)
class Leaf:
    """One array of a tree.

    Attributes:
      name: its path, keys joined by "/".
      place: index among the tree's leaves.
      value: jax.Array, numpy array, or in a template jax.ShapeDtypeStruct.
      shape: of the whole array.
      dtype: of NumPy, ml_dtypes included.
    """

    name: str
    place: int
    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def named_leaves(tree: Any, *, role: str) -> tuple[list[Leaf], Any]:
    """The leaves by rising name (as UTF-8), and the structure of the tree.

    Args:
      tree: pytree of jax.Arrays, numpy arrays or shapes.
      role: what to call the tree in an error.

    Raises:
      TypeError: a leaf is no array, or its elements have not 1, 2 or 4 bytes; names it.
      ValueError: two leaves whose paths read the same.
    """
    with_paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [
        _leaf(jax.tree_util.keystr(path, simple=True, separator="/"), place, value, role)
        for place, (path, value) in enumerate(with_paths)
    ]
    leaves.sort(key=lambda leaf: leaf.name.encode())
    for one, other in itertools.pairwise(leaves):
        if one.name == other.name:
            raise ValueError(f"two leaves of {role} are both called {one.name!r}; rename a key")
    return leaves, structure


def _leaf(name: str, place: int, value: Any, role: str) -> Leaf:
    if not isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        raise TypeError(
            f"leaf {name!r} of {role} is a {type(value).__name__}, not an array; "
            "wrap it in numpy.asarray or leave it out"
        )
    try:
        element_format(value.dtype)
    except TypeError as error:
        raise TypeError(
            f"leaf {name!r} of {role} has dtype {value.dtype}; elements of 1, 2 or 4 bytes are "
            "coded: convert it (PRNG keys by jax.random.key_data) or leave it out"
        ) from error
    return Leaf(name, place, value, tuple(value.shape), np.dtype(value.dtype))


@dataclass(frozen=True)
class TreeDigest:
    """What a tree of weights is known by.

    Attributes:
      root: xxh3-128 over names, dtypes, shapes and sums of all leaves; 16 bytes.
      sums: of leaves by name, mod 2^32 each. Where it comes from a payload, small tensors are
        missing: they are made again from the weights.
    """

    root: bytes
    sums: Mapping[str, Sums]

    def __str__(self) -> str:
        return self.root.hex()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeDigest) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)


def tree_digest(leaves: Sequence[Leaf], sums: Sequence[Sums]) -> TreeDigest:
    """The digest of a tree from those of its leaves, which are sorted by name."""
    state = xxhash.xxh3_128()
    for leaf, pair in zip(leaves, sums, strict=True):
        name, dtype = leaf.name.encode(), leaf.dtype.name.encode()
        state.update(
            struct.pack("<I", len(name))
            + name
            + struct.pack("<B", len(dtype))
            + dtype
            + struct.pack(f"<B{len(leaf.shape)}Q", len(leaf.shape), *leaf.shape)
            + struct.pack("<II", *pair)
        )
    by_name = {leaf.name: pair for leaf, pair in zip(leaves, sums, strict=True)}
    return TreeDigest(state.digest(), by_name)


def add(*sums: Sums) -> Sums:
    """Sums of disjoint sets of elements, taken together."""
    return sum(s[0] for s in sums) % (1 << 32), sum(s[1] for s in sums) % (1 << 32)
