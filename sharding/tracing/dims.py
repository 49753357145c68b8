"""Dimensions that have to be divided alike, found by union and factorisation.

Every dimension of every array of a program starts as a node of its own. Two dimensions that an
operation walks in step (the contracted pair of a product, the axes of two added arrays) become
one. A reshape relates products of dimensions: [batch, heads · width] -> [batch, heads, width]
splits the second node into two factors, and everything that shares it follows. What remains are
the *named dimensions* of PartIR (arXiv:2401.11202) and TOAST: a typical decoder has a dozen.
"""

import math
from collections.abc import Hashable, Iterable, Sequence


class DimensionGraph:
    """Union-find over dimensions, whose roots may be split into factors, outermost first."""

    def __init__(self) -> None:
        self._size: list[int] = []
        self._parent: list[int] = []
        self._factors: dict[int, tuple[int, ...]] = {}
        self._derived: dict[Hashable, list[tuple[int, int]]] = {}

    def new(self, size: int) -> int:
        """A dimension that is related to no other yet."""
        self._size.append(size)
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def array(self, shape: Iterable[int]) -> tuple[int, ...]:
        """A new dimension for every axis of an array."""
        return tuple(self.new(size) for size in shape)

    def derived(self, source: int, size: int, how: Hashable) -> int:
        """The dimension that an operation makes of another: the same one if it is done again.

        A program is walked more than once (as it is, and differentiated); a slice of the sequence
        has to be the same dimension in all walks, or what one finds is lost on the others.
        """
        atoms, known = self.atoms(source), self._derived.setdefault((how, size), [])
        for before, made in known:
            if self.atoms(before) == atoms:
                return made
        known.append((source, self.new(size)))
        return known[-1][1]

    def size(self, node: int) -> int:
        return self._size[node]

    def atoms(self, node: int) -> tuple[int, ...]:
        """The factors of a dimension, outermost first: none of them is split or has size one."""
        root = self._find(node)
        if root in self._factors:
            return tuple(atom for factor in self._factors[root] for atom in self.atoms(factor))
        return (root,) if self._size[root] != 1 else ()

    def union(self, a: int, b: int) -> None:
        """Makes two dimensions one; refines their factors where both are split.

        Dimensions of different size are left apart, for the caller has then broadcast.
        """
        if self._size[a] == self._size[b]:
            self.align(self.atoms(a), self.atoms(b))

    def align(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Relates two lists of dimensions that enumerate the same elements in the same order.

        Factors are matched from the outermost inwards. Where neither of two factors divides the
        other ([6] against [4, 3] and so on), the groups that have the same product are skipped:
        no division of the one is a division of the other.
        """
        a = [atom for node in left for atom in self.atoms(node)]
        b = [atom for node in right for atom in self.atoms(node)]
        while a and b:
            # Atoms may have been refined or merged since they were listed.
            a = [*self.atoms(a[0]), *a[1:]]
            b = [*self.atoms(b[0]), *b[1:]]
            m, n = self._size[a[0]], self._size[b[0]]
            if m == n:
                self._link(a.pop(0), b.pop(0))
            elif m % n == 0 and a[0] not in map(self._find, b):
                self._split(a[0], n)
            elif n % m == 0 and b[0] not in map(self._find, a):
                self._split(b[0], m)
            else:
                self._skip(a, b)

    def _skip(self, a: list[int], b: list[int]) -> None:
        left, right = self._size[a.pop(0)], self._size[b.pop(0)]
        while left != right and (a or b):
            if left < right and a:
                left *= self._size[a.pop(0)]
            elif b:
                right *= self._size[b.pop(0)]
            else:
                break

    def _find(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _link(self, a: int, b: int) -> None:
        a, b = self._find(a), self._find(b)
        # The older node stays the root: arguments come first, and lend their names.
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def _split(self, atom: int, outer: int) -> None:
        atom = self._find(atom)
        inner = self._size[atom] // outer
        self._factors[atom] = (self.new(outer), self.new(inner))


def product(sizes: Iterable[int]) -> int:
    """The number of elements of a shape, as an int whatever the sizes are."""
    return math.prod(int(size) for size in sizes)
