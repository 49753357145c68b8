"""What is this process's, and what is the others'."""

import os
import subprocess
import sys
import time

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


def test_what_others_use_is_seen_and_is_not_counted_as_own():
    if not machine._busy_s():  # there is no such file, or a sandbox writes zeros into it
        pytest.skip("this system does not tell what other processes use")
    busy = "import time\nend = time.perf_counter() + 1.5\nwhile time.perf_counter() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", busy])
    time.sleep(0.3)
    with machine.measured() as load:
        time.sleep(0.8)
    other.wait()
    assert load.others > 0.15  # a core, or its share of one on a machine that is full
    assert load.own < 0.2
    # A full machine has nothing left but what this process used.
    assert load.left == pytest.approx(max(load.own, machine.machine_cores() - load.others))


def test_a_part_is_as_long_as_its_processor_seconds_whatever_disturbs_it():
    watch = Stopwatch()
    # Twelve laps of .1 s of work: most of them disturbed, which takes the wall clock longer.
    watch.cpu_s = [0.1] * 12
    watch.wall_s = [9.0, 0.2, 0.125, 0.3, 0.125, 0.25, 0.125, 0.4, 0.125, 0.2, 0.125, 0.15]
    found = watch.activity(warmup=1)
    assert found.cores == pytest.approx(0.8)  # .1 s of processor in .125 s
    assert found.seconds == pytest.approx((0.125,) * 11)
