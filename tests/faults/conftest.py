"""Fault tests start processes that import this folder's modules by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import fault_relay  # noqa: E402  # of this folder


@pytest.fixture
def environment():
    """Of processes that shall find both the packages and this folder's modules."""
    return os.environ | {"PYTHONPATH": f"{HERE}:{ROOT}"}


@pytest.fixture
def learner(environment):
    """Starts learners as processes; those that are left are killed."""
    started = []

    def start(**options):
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_learner.py"), json.dumps(options)],
            env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def cutter():
    made = []

    def make(target):
        made.append(fault_relay.Cutter(target))
        return made[-1]

    yield make
    for each in made:
        each.close()
