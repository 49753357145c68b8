from dataclasses import replace

import pytest

from experiments.asynchrony import scenarios
from experiments.asynchrony.simulator import Activity, Durations, Network

DURATIONS = Durations(
    rollout=Activity(seconds=(0.8, 1.2)), update=Activity.fixed(0.5), payload_bytes=125e6
)


def test_enough_actors_reach_the_closed_form():
    for ratio in (1.0, 3.0, 10.0):
        durations = scenarios.at_ratio(DURATIONS, ratio)
        assert durations.ratio == pytest.approx(ratio)
        shortest, longest = durations.rollout.seconds
        assert longest / shortest == pytest.approx(1.2 / 0.8)
        found = scenarios.many_actors(durations, Network(), actors=(1, 2, 4, 32), updates=300)
        assert found.speedups == pytest.approx(found.ideal, rel=0.05)


def test_the_fourfold_speed_up_begins_at_a_ratio_of_three():
    found = scenarios.fourfold(DURATIONS, actors=(64,), updates=200)
    reached = [ratio for ratio, curve in found.items() if curve.speedups[0] >= 3.95]
    assert reached == [ratio for ratio in scenarios.RATIOS if ratio >= 3.0]


def test_publications_cost_the_learner_nothing_where_they_are_shorter_than_their_period():
    durations = replace(DURATIONS, publish=Activity.fixed(0.75), payload_bytes=0.0)
    found = scenarios.many_actors(
        scenarios.at_ratio(durations, 3.0), Network(), actors=(32,), updates=300, sync_every=2
    )
    assert found.speedups[0] == pytest.approx(4.0, rel=0.02)


def test_a_link_says_bits_and_the_model_counts_bytes():
    network = scenarios.network_of("1gbit,20ms")
    assert network.uplink_bytes_per_s == 125e6
    assert network.latency_s == pytest.approx(0.02)


def test_a_slow_link_is_the_limit_of_many_actors():
    # A second on the learner's uplink for each version: at most one item a second.
    network = Network(uplink_bytes_per_s=125e6)
    found = scenarios.many_actors(DURATIONS, network, actors=(16,), updates=200)
    alternating = 1 / (1.0 + 0.5)
    assert found.speedups[0] == pytest.approx(1.0 / alternating, rel=0.05)
    assert found.staleness[0] > 1
