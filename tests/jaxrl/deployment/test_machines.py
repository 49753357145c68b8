"""Cuts of clusters, and actors' machines, against enumeration by hand."""

import math

import pytest

from jaxrl.deployment.machines import actor_sizes, cuts, half_and_half, hosts
from sharding import Cluster


def names(cluster: str) -> list[tuple[str, str]]:
    return [(cut.learner.name, cut.actors.name) for cut in cuts(Cluster.from_name(cluster))]


def test_a_torus_is_sawn_through_its_longest_dimension():
    assert names("v5p:4x4x4") == [
        ("v5p:4x4x1", "v5p:4x4x3"), ("v5p:4x4x2", "v5p:4x4x2"), ("v5p:4x4x3", "v5p:4x4x1"),
    ]  # fmt: skip


def test_long_dimensions_are_cut_in_eighths():
    assert [a for a, _ in names("v5p:8x8x16")] == [f"v5p:{s}" for s in
        ("8x8x2", "8x8x4", "8x8x6", "8x8x8", "10x8x8", "12x8x8", "14x8x8")]  # fmt: skip


def test_nodes_and_slices_are_told_apart():
    assert names("h100:4x8") == [
        ("h100:1x8", "h100:3x8"), ("h100:2x8", "h100:2x8"), ("h100:3x8", "h100:1x8"),
    ]  # fmt: skip
    assert names("v5e:16x16x3slices") == [
        ("v5e:16x16", "v5e:16x16x2slices"), ("v5e:16x16x2slices", "v5e:16x16"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["v5p:4x4x8", "v6e:16x16", "h100:32x8", "v5e:16x16x4slices"])
def test_no_chip_is_lost(name):
    cluster = Cluster.from_name(name)
    found = cuts(cluster)
    for cut in found:
        assert cut.learner.chip_count + cut.actors.chip_count == cluster.chip_count
        for actor, count in actor_sizes(cut.actors):
            assert actor.chip_count * count == cut.actors.chip_count
    shares = [cut.learner_share for cut in found]
    assert shares == sorted(shares)
    assert half_and_half(cluster).learner_share == 0.5


def test_actors_are_whole_hosts_or_parts_of_a_node():
    on_torus = actor_sizes(Cluster.from_name("v5p:4x4x4"))
    assert [(a.name, n) for a, n in on_torus] == [
        ("v5p:2x2x1", 16), ("v5p:2x2x2", 8), ("v5p:4x4x1", 4), ("v5p:4x4x2", 2), ("v5p:4x4x4", 1),
    ]  # fmt: skip
    assert all(math.prod(a.shape) % a.chip.chips_per_host == 0 for a, _ in on_torus)
    on_switch = actor_sizes(Cluster.from_name("h100:2x8"))
    assert [(a.name, n) for a, n in on_switch] == [
        ("h100:1x1", 16), ("h100:1x2", 8), ("h100:1x4", 4), ("h100:1x8", 2), ("h100:2x8", 1),
    ]  # fmt: skip


def test_hosts():
    assert hosts(Cluster.from_name("v5p:4x4x4")) == 16
    assert hosts(Cluster.from_name("v5e:16x16")) == 32
    assert hosts(Cluster.from_name("h100:4x8")) == 4


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="too small to be cut"):
        cuts(Cluster.from_name("h100:1x8"))
