"""Dimensions: union and factorisation, against reshapes that NumPy does."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sharding.tracing.dims import DimensionGraph


def _factorisations(size):
    """A list of factors, all above one, whose product is the size."""
    primes = {12: (2, 2, 3), 24: (2, 2, 2, 3), 30: (2, 3, 5), 36: (2, 2, 3, 3)}[size]

    @st.composite
    def draw(pick):
        rest, found = list(pick(st.permutations(primes))), []
        while rest:
            count = pick(st.integers(1, len(rest)))
            found.append(math.prod(rest[:count]))
            rest = rest[count:]
        return tuple(found)

    return draw()


def test_a_split_reaches_everything_that_shares_the_dimension():
    graph = DimensionGraph()
    merged, same = graph.new(24), graph.new(24)
    graph.union(merged, same)
    heads, width = graph.new(4), graph.new(6)
    graph.align([same], [heads, width])
    assert graph.atoms(merged) == graph.atoms(heads) + graph.atoms(width)
    assert [graph.size(a) for a in graph.atoms(merged)] == [4, 6]


def test_two_splits_of_one_dimension_meet_in_their_refinement():
    graph = DimensionGraph()
    merged = graph.new(24)
    a, b, c = graph.new(4), graph.new(2), graph.new(12)
    graph.align([merged], [a, graph.new(6)])
    graph.align([merged], [b, c])
    assert [graph.size(x) for x in graph.atoms(merged)] == [2, 2, 6]
    assert graph.atoms(a)[0] == graph.atoms(b)[0]


def test_splits_that_no_refinement_reconciles_stay_apart():
    graph = DimensionGraph()
    left, right = graph.array((4, 6)), graph.array((6, 4))
    graph.align(left, right)
    assert not set(graph.atoms(left[0])) & set(graph.atoms(right[0]))
    # What comes after them is aligned again.
    left, right = graph.array((4, 6, 5)), graph.array((6, 4, 5))
    graph.align(left, right)
    assert graph.atoms(left[2]) == graph.atoms(right[2])


def test_dimensions_of_size_one_have_no_atoms_and_relate_nothing():
    graph = DimensionGraph()
    one, five = graph.new(1), graph.new(5)
    graph.union(one, five)
    assert graph.atoms(one) == ()
    assert len(graph.atoms(five)) == 1


@given(data=st.data(), size=st.sampled_from([12, 24, 30, 36]))
def test_an_atom_enumerates_the_same_elements_on_both_sides_of_a_reshape(data, size):
    """Two axes that share their outermost atom have it with the same stride: to divide it in one
    is to divide it in the other. Checked on the indices themselves."""
    left = data.draw(_factorisations(size))
    right = data.draw(_factorisations(size))
    graph = DimensionGraph()
    a, b = graph.array(left), graph.array(right)
    graph.align(a, b)
    for axis, shape in ((a, left), (b, right)):
        for node, extent in zip(axis, shape, strict=True):
            assert math.prod(graph.size(x) for x in graph.atoms(node)) == extent

    def coordinate(shape, nodes, wanted):
        """Of every element, in order, its index along an atom; None if it is not there."""
        flat = np.indices(shape).reshape(len(shape), -1)
        for index, node in zip(flat, nodes, strict=True):
            atoms = graph.atoms(node)
            if wanted in atoms:
                inner = [graph.size(x) for x in atoms[atoms.index(wanted) + 1 :]]
                return index // math.prod(inner) % graph.size(wanted)
        return None

    for atom in {x for node in (*a, *b) for x in graph.atoms(node)}:
        one, other = coordinate(left, a, atom), coordinate(right, b, atom)
        if one is not None and other is not None:
            np.testing.assert_array_equal(one, other)


def test_the_same_slice_of_the_same_dimension_is_one_dimension():
    graph = DimensionGraph()
    tokens, other, later = graph.new(17), graph.new(17), graph.new(17)
    graph.union(tokens, later)
    inputs = graph.derived(tokens, 16, "[:-1]")
    assert graph.derived(later, 16, "[:-1]") == inputs
    assert graph.derived(tokens, 16, "[1:]") != inputs
    assert graph.derived(other, 16, "[:-1]") != inputs
