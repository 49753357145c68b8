"""What is this process's, and what is the others'."""

import os

import pytest

from experiments.asynchrony import machine
from experiments.asynchrony.calibration import Stopwatch

TICKS = os.sysconf("SC_CLK_TCK")


def test_busy_time_is_all_but_idle_and_waiting_of_the_cores_asked_for():
    def line(name, *seconds):  # user, nice, system, idle, iowait, irq, softirq, steal, guests
        return " ".join([name, *(str(s * TICKS) for s in (*seconds, 50, 60))])

    stat = "\n".join(
        [
            line("cpu", 90, 90, 90, 90, 90, 90, 90, 90),
            line("cpu0", 1, 2, 3, 100, 100, 4, 5, 6),
            line("cpu1", 10, 0, 0, 100, 0, 0, 0, 0),
            line("cpu12", 7, 7, 7, 7, 7, 7, 7, 7),
            "intr 1 2 3",
        ]
    )
    assert machine.busy_s(stat, frozenset({0})) == 21.0
    assert machine.busy_s(stat, frozenset({0, 1})) == 31.0


@pytest.mark.parametrize(
    ("busy_s", "others", "left"),
    [
        (3.0, 0.125, 1.875),  # two of the three by this process
        (17.0, 1.875, 0.25),  # a full machine has nothing left but what this process used
        (1.0, 0.0, 2.0),  # clocks that are not read at one moment
        (None, 0.0, 2.0),  # a system that does not tell
    ],
)
def test_what_others_use_is_seen_and_is_not_counted_as_own(monkeypatch, busy_s, others, left):
    """Eight seconds on two cores, two processor seconds of them this process's."""
    clocks = {"perf_counter": [50.0, 58.0], "process_time": [7.0, 9.0]}
    for name, readings in clocks.items():
        monkeypatch.setattr(machine.time, name, lambda readings=readings: readings.pop(0))
    busy = [None if busy_s is None else 100.0 + seconds for seconds in (0.0, busy_s or 0.0)]
    monkeypatch.setattr(machine, "_busy_s", lambda: busy.pop(0))
    monkeypatch.setattr(machine, "machine_cores", lambda: 2)
    with machine.measured() as load:
        pass
    assert (load.own, load.others, load.left) == (0.25, others, left)


def test_this_system_counts_processor_seconds_that_never_fall():
    if not machine._busy_s():  # there is no such file, or a sandbox writes zeros into it
        pytest.skip("this system does not tell what other processes use")
    before = machine._busy_s()
    with machine.measured() as load:
        assert sum(range(1_000_000)) == 499_999_500_000
    assert machine._busy_s() >= before
    assert load.own_s > 0
    assert load.others >= 0


def test_a_part_is_as_long_as_its_processor_seconds_whatever_disturbs_it():
    watch = Stopwatch()
    # Twelve laps of .1 s of work: most of them disturbed, which takes the wall clock longer.
    watch.cpu_s = [0.1] * 12
    watch.wall_s = [9.0, 0.2, 0.125, 0.3, 0.125, 0.25, 0.125, 0.4, 0.125, 0.2, 0.125, 0.15]
    found = watch.activity(warmup=1)
    assert found.cores == pytest.approx(0.8)  # .1 s of processor in .125 s
    assert found.seconds == pytest.approx((0.125,) * 11)
