import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.asynchrony.events import Clock, Level, Shared


def completions(jobs, capacity):
    """When each job, given as (start, seconds, demand), is done on a shared resource."""
    clock, done = Clock(), {}
    resource = Shared(clock, capacity)

    def job(name, start, seconds, demand):
        yield clock.sleep(start)
        yield resource.use(seconds, demand)
        done[name] = clock.now

    for name, (start, seconds, demand) in enumerate(jobs):
        clock.spawn(job(name, start, seconds, demand))
    clock.run()
    return [done[name] for name in range(len(jobs))]


def by_small_steps(jobs, capacity, step):
    """The same by brute force: in every small step each job present gets its share."""
    left = [seconds for _, seconds, _ in jobs]
    done = [np.inf] * len(jobs)
    tick = 0
    while np.inf in done:
        now = tick * step
        present = [i for i, (start, _, _) in enumerate(jobs) if start <= now and done[i] == np.inf]
        demand = sum(jobs[i][2] for i in present)
        rate = min(1.0, capacity / demand) if present else 1.0
        for i in present:
            left[i] -= step * rate
            if left[i] <= step * 1e-6:
                done[i] = now + step
        tick += 1
    return done


def test_two_jobs_share_a_core_until_the_short_one_ends():
    # Both at half speed until 2 s; then the long one's last second alone.
    assert completions([(0, 1, 1), (0, 2, 1)], capacity=1) == [2.0, 3.0]
    # A core each: nobody waits.
    assert completions([(0, 1, 1), (0, 2, 1)], capacity=2) == [1.0, 2.0]


def test_a_demand_above_the_capacity_slows_even_a_single_job():
    assert completions([(0, 3, 2)], capacity=1) == [6.0]
    assert completions([(0, 3, 2), (10, 1, 1)], capacity=2) == [3.0, 11.0]


def test_a_job_of_no_length_takes_no_time():
    assert completions([(0, 0, 1), (0, 2, 1)], capacity=1) == [0.0, 2.0]


times = st.integers(0, 12).map(lambda n: n / 4)


@given(
    st.lists(
        st.tuples(times, times.filter(bool), st.sampled_from([0.5, 1.0, 1.5])),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([0.75, 1.0, 2.0]),
)
@settings(max_examples=40, deadline=None)
def test_sharing_is_what_small_steps_give(jobs, capacity):
    step = 1 / 512
    expected = by_small_steps(jobs, capacity, step)
    np.testing.assert_allclose(completions(jobs, capacity), expected, atol=step * (2 * len(jobs)))


@given(st.lists(st.tuples(times, times.filter(bool)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_work_is_lost_or_invented(jobs):
    """One core that everybody wants is busy from the first arrival on until the work is done."""
    jobs = [(start, seconds, 1.0) for start, seconds in jobs]
    end = 0.0
    for start, seconds, _ in sorted(jobs):
        end = max(end, start) + seconds
    assert max(completions(jobs, 1.0)) == pytest.approx(end, abs=1e-9)


def test_a_level_wakes_those_whose_value_it_has_reached():
    clock, log = Clock(), []
    level = Level(clock)

    def waiter(name, after, value):
        yield clock.sleep(after)
        yield level.reach(value)
        log.append((name, clock.now))

    def tide():
        for value in (2, 1, 5):
            yield clock.sleep(2.0)
            level.rise(value)

    clock.spawn(tide())
    for name, after, value in (
        ("at once", 1.0, 0), ("first", 1.0, 2), ("third", 0.0, 3), ("late", 5.0, 2),
        ("never", 0.0, 6),
    ):  # fmt: skip
        clock.spawn(waiter(name, after, value))
    clock.run()
    assert log == [("at once", 1.0), ("first", 2.0), ("late", 5.0), ("third", 6.0)]
    assert level.value == 5


def test_a_capacity_is_positive():
    with pytest.raises(ValueError, match="capacity must be above 0: capacity=0"):
        Shared(Clock(), 0)
