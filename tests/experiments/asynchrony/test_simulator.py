import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.asynchrony.simulator import (
    Activity,
    Durations,
    Network,
    Schedule,
    ideal_speedup,
    simulate,
    throughput_bound,
)


def fixed(generation, training, **rest):
    return Durations(rollout=Activity.fixed(generation), update=Activity.fixed(training), **rest)


def exponential(mean, count=20_000):
    samples = np.random.default_rng(1).exponential(mean, count)
    return Activity(seconds=tuple(samples * (mean / samples.mean())))


# --- fixed durations: closed forms to rounding --------------------------------------------------


@pytest.mark.parametrize("generation", [0.5, 1.0, 3.0])
def test_synchronous_one_step_off_and_asynchronous(generation):
    training = 1.0

    def rate(**schedule):
        return simulate(fixed(generation, training), Schedule(**schedule), updates=400)

    alternating = rate(actors=1, max_staleness=0)
    assert 1 / alternating.updates_per_s == pytest.approx(generation + training)
    assert alternating.learner_idle == pytest.approx(generation / (generation + training))
    assert alternating.actor_idle == pytest.approx(training / (generation + training))
    overlapped = rate(actors=1, max_staleness=1)
    assert 1 / overlapped.updates_per_s == pytest.approx(max(generation, training))
    assert set(alternating.staleness) == {0}
    assert set(overlapped.staleness) == {1}


@given(
    st.integers(1, 40).map(lambda n: n / 8),
    st.integers(1, 5),
    st.integers(0, 7),
)
@settings(max_examples=60, deadline=None)
def test_throughput_is_that_of_the_bottleneck(generation, actors, max_staleness):
    found = simulate(
        fixed(generation, 1.0), Schedule(actors=actors, max_staleness=max_staleness), updates=600
    )
    bound = throughput_bound(generation, 1.0, actors=actors, max_staleness=max_staleness)
    assert found.updates_per_s == pytest.approx(bound, rel=0.01)
    assert found.learner_idle == pytest.approx(1 - found.updates_per_s, abs=0.01)
    assert max(found.staleness) <= max_staleness


@pytest.mark.parametrize(("ratio", "actors"), [(1, 1), (3, 3), (3, 64), (10, 4), (30, 31)])
def test_speed_up_of_enough_room_to_run_ahead(ratio, actors):
    schedule = Schedule(actors=actors, max_staleness=4 * (ratio + actors))
    alone = simulate(fixed(ratio, 1), Schedule(actors=1, max_staleness=0), updates=50)
    found = simulate(fixed(ratio, 1), schedule, updates=40 * (ratio + actors))
    speedup = found.updates_per_s / alone.updates_per_s
    assert speedup == pytest.approx(ideal_speedup(ratio, actors), rel=0.02)


def test_publications_run_beside_the_updates():
    found = simulate(
        fixed(0.2, 1.0, publish=Activity.fixed(2.0)),
        Schedule(actors=2, max_staleness=6, sync_every=4),
        updates=400,
    )
    assert found.updates_per_s == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("max_staleness", [1, 3, 6])
def test_long_publications_bound_the_learner_by_its_staleness(max_staleness):
    # While version v is published the learner gets as far as the version before allows, which is
    # then published next: two publications of P seconds for every s + 1 updates.
    found = simulate(
        fixed(0.01, 0.1, publish=Activity.fixed(8.0)),
        Schedule(actors=1, max_staleness=max_staleness),
        updates=600,
    )
    assert found.updates_per_s == pytest.approx((max_staleness + 1) / 16.0, rel=0.03)
    assert max(found.staleness) == max_staleness


def test_one_core_shares_its_time_with_the_publications():
    # 1 s an update; of every second one a publication of .5 s, and .25 s at the actor.
    durations = fixed(0.0, 1.0, publish=Activity.fixed(0.5), prepare=Activity.fixed(0.25))
    schedule = Schedule(actors=1, max_staleness=8, sync_every=2)
    found = simulate(durations, schedule, updates=400, cores=1.0)
    assert 1 / found.updates_per_s == pytest.approx(1.0 + (0.5 + 0.25) / 2, rel=0.01)


def test_actors_that_look_seldom_get_their_weights_later():
    # Synchronous: half of the pause between two looks is waited for, on average.
    schedule = Schedule(actors=1, max_staleness=0, poll_s=2.0)
    found = simulate(fixed(3.0, 1.0), schedule, updates=4_000)
    assert 1 / found.updates_per_s == pytest.approx(3.0 + 1.0 + 1.0, rel=0.02)


def test_a_replaying_learner_does_not_wait():
    found = simulate(fixed(5.0, 1.0), Schedule(actors=2, replay=True), updates=400)
    assert found.updates_per_s == pytest.approx(1.0)
    assert found.items_per_s == pytest.approx(2 / 5, rel=0.02)
    assert found.learner_idle == 0.0
    assert found.actor_idle == 0.0
    assert set(found.staleness) == {5, 6} or set(found.staleness) == {5}


def test_actors_of_a_replaying_learner_never_run_out_of_items():
    # Thirty items in an update of 1 s, whatever the learner does.
    found = simulate(fixed(0.1, 1.0), Schedule(actors=3, max_staleness=9, replay=True), updates=400)
    assert found.items_per_s == pytest.approx(30.0, rel=0.01)
    assert found.actor_idle == pytest.approx(0.0, abs=1e-6)


# --- random durations ---------------------------------------------------------------------------


def machine_repair(generation, training, tokens):
    """Updates a second of K tokens between exponential machines and one exponential repairman.

    p_n ∝ K!/(K−n)! (T/G)ⁿ tokens wait at the learner; it works unless none does (Gross & Harris,
    Fundamentals of Queueing Theory, section 2.7).
    """
    weights = [math.perm(tokens, n) * (training / generation) ** n for n in range(tokens + 1)]
    return (1 - weights[0] / sum(weights)) / training


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_exponential_durations_are_the_machine_repair_model(max_staleness):
    durations = Durations(rollout=exponential(2.0), update=exponential(1.0))
    found = simulate(durations, Schedule(actors=8, max_staleness=max_staleness), updates=16_000)
    expected = machine_repair(2.0, 1.0, max_staleness + 1)
    assert found.updates_per_s == pytest.approx(expected, rel=0.03)


def test_a_barrier_waits_for_the_slowest():
    # The largest of N exponential times is on average H_N of their mean.
    actors = 16
    durations = Durations(rollout=exponential(1.0), update=Activity.fixed(0.5))
    schedule = Schedule(actors=actors, items_per_update=actors, max_staleness=0)
    found = simulate(durations, schedule, updates=4_000)
    slowest = sum(1 / n for n in range(1, actors + 1))
    assert 1 / found.updates_per_s == pytest.approx(slowest + 0.5, rel=0.03)


def test_slow_actors_do_not_hold_up_fast_ones():
    # Without a barrier stragglers cost nothing on average: N/G items a second.
    durations = Durations(rollout=exponential(8.0), update=Activity.fixed(0.5))
    found = simulate(durations, Schedule(actors=8, max_staleness=64), updates=20_000)
    assert found.updates_per_s == pytest.approx(1.0, rel=0.02)


# --- what is shared -----------------------------------------------------------------------------


@pytest.mark.parametrize("actors", [1, 2, 4])
def test_one_core_does_the_same_work_in_any_order(actors):
    schedule = Schedule(actors=actors, max_staleness=6)
    found = simulate(fixed(2.0, 1.0), schedule, updates=400, cores=1.0)
    assert 1 / found.updates_per_s == pytest.approx(3.0, rel=0.01)


def test_two_cores_are_filled():
    # 2·1 + 1·1 core seconds an update on two cores; one actor alone could not fill both.
    durations = fixed(2.0, 1.0)
    for actors, period in ((1, 2.0), (2, 1.5), (4, 1.5)):
        schedule = Schedule(actors=actors, max_staleness=9)
        found = simulate(durations, schedule, updates=600, cores=2.0)
        assert 1 / found.updates_per_s == pytest.approx(period, rel=0.02), actors


def test_weights_over_a_shared_uplink():
    # Synchronous with 4 actors: 0.5 s latency, 4 × 10 bytes over 20 bytes/s, then the step.
    durations = Durations(
        rollout=Activity.fixed(3.0),
        update=Activity.fixed(1.0),
        publish=Activity.fixed(0.25),
        prepare=Activity.fixed(0.125),
        flip=Activity.fixed(0.0625),
        payload_bytes=10,
    )
    schedule = Schedule(actors=4, items_per_update=4, max_staleness=0)
    network = Network(uplink_bytes_per_s=20, latency_s=0.5)
    found = simulate(durations, schedule, updates=40, network=network)
    period = 3.0 + 1.0 + 0.25 + 0.125 + 0.0625 + 0.5 + 4 * 10 / 20
    assert 1 / found.updates_per_s == pytest.approx(period)
    # With slow downlinks, which nobody shares, the uplink does not matter.
    network = Network(uplink_bytes_per_s=20, downlink_bytes_per_s=5, latency_s=0.5)
    found = simulate(durations, schedule, updates=40, network=network)
    assert 1 / found.updates_per_s == pytest.approx(period)
    network = Network(uplink_bytes_per_s=20, downlink_bytes_per_s=4, latency_s=0.5)
    found = simulate(durations, schedule, updates=40, network=network)
    assert 1 / found.updates_per_s == pytest.approx(period - 2.0 + 10 / 4)


def test_weights_travel_beside_generation():
    # 0.9 s on the link fit into a rollout of 1 s: only the exchange is seen.
    durations = fixed(1.0, 0.1, flip=Activity.fixed(0.25), payload_bytes=9)
    network = Network(uplink_bytes_per_s=10)
    found = simulate(durations, Schedule(actors=1, max_staleness=8), updates=200, network=network)
    assert 1 / found.updates_per_s == pytest.approx(1.25, rel=0.01)


@pytest.mark.parametrize("actors", [1, 2, 16, 64])
def test_an_uplink_carries_so_many_versions_a_second(actors):
    """Actors in step that fetch before each item: N/(G + N·F), which F alone limits in the end."""
    generation, alone = 1.0, 10 / 20
    durations = fixed(generation, 1e-3, payload_bytes=10)
    schedule = Schedule(actors=actors, max_staleness=4 * actors, background=False)
    network = Network(uplink_bytes_per_s=20)
    found = simulate(durations, schedule, updates=80 * actors, network=network)
    rate = actors / (generation + actors * alone)
    assert found.updates_per_s == pytest.approx(rate, rel=0.02)


# --- its manners --------------------------------------------------------------------------------


def test_the_seed_decides():
    durations = Durations(rollout=exponential(1.0, 100), update=exponential(0.5, 100))

    def run(seed):
        return simulate(durations, Schedule(actors=3, max_staleness=4), updates=60, seed=seed)

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"max_staleness ≥ sync_every − 1: .*=2, .*=4"):
        Schedule(actors=1, max_staleness=2, sync_every=4)
    with pytest.raises(ValueError, match="actors must be 1 or more: 0"):
        Schedule(actors=0)
    with pytest.raises(ValueError, match="durations of 0 or more"):
        Activity(seconds=(-1.0,))
    with pytest.raises(ValueError, match=r"updates ≥ 2 and 0 ≤ warmup < 1"):
        simulate(fixed(1, 1), Schedule(actors=1), updates=1)


def test_an_activity_knows_its_mean_and_its_multiples():
    activity = Activity(seconds=(1.0, 3.0), cores=1.5)
    assert activity.mean_s == 2.0
    assert activity.scaled(2.0).seconds == (2.0, 6.0)
    assert Durations(rollout=activity, update=Activity.fixed(0.5)).ratio == 4.0
