"""Pipelines of measured layers: worked by hand."""

import numpy as np
import pytest

from sharding.machines.topology import Cluster, Node, catalog
from sharding.measured.profiled import (
    LayerProfile,
    ProfiledConstants,
    ProfiledPlan,
    memory_bytes,
    step_time,
)

FREE = ProfiledConstants(
    host={"v100": 0.0, "t4": 0.0},
    device={"v100": 1.0, "t4": 1.0},
    link=1.0,
    network_bytes_per_s=1e30,
    handover_s=0.0,
)


def cluster(*chips, count=1, network=1e9):
    nodes = [
        Node(chip=catalog()[c], count=count, link_bytes_per_s=1e9, network_bytes_per_s=network)
        for c in chips
    ]
    return Cluster.of_nodes(nodes, name="test")


def profile(**changes):
    fields = {
        "forward_s": {"v100": np.asarray([1.0, 1.0, 2.0]), "t4": np.asarray([2.0, 2.0, 4.0])},
        "params": np.asarray([0.0, 0.0, 0.0]),
        "reduced": np.asarray([True, True, True]),
        "activation_bytes": 0.0,
        "kept_bytes": np.asarray([1.0, 1.0, 0.0]),
        "divided_bytes": np.asarray([0.0, 0.0, 4.0]),
    }
    return LayerProfile(**{**fields, **changes})


def plan(**changes):
    fields = {"cuts": (0, 2, 3), "tensor": 1, "data": 1, "microbatch": 1, "microbatches": 4}
    return ProfiledPlan(**{**fields, **changes})


def test_a_pipeline_runs_at_the_pace_of_its_slowest_stage():
    # Three passes over 2 s on each of two stages: 6 s a stage; (4 - 1)·6 + 12.
    assert step_time(profile(), plan(), cluster("v100", "v100"), FREE) == 3 * 6 + 12
    # The second stage on a chip half as fast.
    assert step_time(profile(), plan(), cluster("v100", "t4"), FREE) == 3 * 12 + 18


def test_the_hosts_share_does_not_grow_with_the_microbatch():
    half = ProfiledConstants(
        host={"v100": 0.5}, device={"v100": 0.5}, link=1.0, network_bytes_per_s=1e30,
        handover_s=0.0,
    )  # fmt: skip
    one = step_time(profile(), plan(microbatches=1), cluster("v100", "v100"), half)
    four = step_time(profile(), plan(microbatches=1, microbatch=4), cluster("v100", "v100"), half)
    assert one == 12
    assert four == 12 * (0.5 + 4 * 0.5)


def test_handovers_share_the_network_of_their_node():
    # One byte in 1e9 a sample of 1e9 bytes: 1 s each way; two replicas on a node: 2 s each way.
    heavy = profile(activation_bytes=1e9)
    alone = step_time(heavy, plan(microbatches=1), cluster("v100", "v100"), FREE)
    assert alone == pytest.approx(12 + 2 * 1)
    pair = step_time(heavy, plan(microbatches=1, data=2), cluster("v100", "v100", count=2), FREE)
    assert pair == pytest.approx(12 + 2 * 2)


def test_gradients_are_summed_by_a_ring():
    model = profile(params=np.asarray([1e9, 0.0, 0.0]))
    one = plan(cuts=(0, 3), data=2, microbatches=1)
    # 4 GB over two nodes: 2·(1/2)·4 GB at 1 GB/s, after 12 s of compute.
    assert step_time(model, one, cluster("v100", "v100"), FREE) == pytest.approx(12 + 4)
    slow = ProfiledConstants(**{**vars(FREE), "network_bytes_per_s": 1e9})
    assert step_time(model, one, cluster("v100", "v100"), slow) == pytest.approx(12 + 8)


def test_tensor_parallelism_divides_devices_and_adds_reductions():
    model = profile(activation_bytes=1e9)
    two = plan(cuts=(0, 3), tensor=2, microbatches=1)
    # 3·4 s / 2, and for each of three layers two reductions of 1 GB, forward and backward.
    expected = 6 + 3 * 2 * 2 * 1.0
    assert step_time(model, two, cluster("v100", count=2), FREE) == pytest.approx(expected)


def test_memory_holds_microbatches_in_flight():
    # First stage: two in flight of two layers; second: one in flight of 4 bytes, divided by 2.
    assert memory_bytes(profile(), plan(microbatch=3), 0.0) == max(2 * 2 * 3, 4 * 3)
    assert memory_bytes(profile(), plan(tensor=2, microbatch=3), 0.0) == max(12, 2 * 3)
    model = profile(params=np.asarray([5.0, 5.0, 1.0]))
    assert memory_bytes(model, plan(microbatches=1), 2.0) == 2 * 10 + 2


def test_a_plan_takes_the_whole_cluster():
    with pytest.raises(ValueError, match="other than the cluster's 3 chips"):
        step_time(profile(), plan(), cluster("v100", "v100", "v100"), FREE)


def test_the_hosts_share_of_a_divided_layer_is_that_of_its_own_profile():
    half = ProfiledConstants(
        host={"v100": 0.5}, device={"v100": 0.5}, link=1.0, network_bytes_per_s=1e30,
        handover_s=0.0,
    )  # fmt: skip
    slower = {("v100", 2): np.asarray([1.5, 1.5, 3.0])}
    layers = profile(divided_s=slower, reduced=np.zeros(3, bool))
    one = plan(cuts=(0, 3), tensor=2, microbatches=1)
    # Three passes: half of 6 s on the host, half of 4 s on two devices.
    assert step_time(layers, one, cluster("v100", count=2), half) == 3 * (3 + 1)
