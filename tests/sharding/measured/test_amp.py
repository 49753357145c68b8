"""AMP's cost model against the 105 predictions that its authors released."""

import csv
import re
from importlib import resources

import pytest

from sharding.measured.amp import GPT2, AmpCluster, amp_step_time, gigabits

CLUSTERS = {
    "AMP homogeneous": AmpCluster(
        node_size=4, within=(gigabits(50.0),) * 4, between=(gigabits(50.0),) * 4
    ),
    "AMP het_cluster": AmpCluster(
        node_size=4,
        within=(gigabits(170.0),) * 3 + (gigabits(50.0),),
        between=(gigabits(10.0),) * 3 + (gigabits(50.0),),
    ),
}


def rows(name):
    with resources.files("sharding").joinpath(f"catalog/{name}").open() as file:
        return list(csv.DictReader(file))


def forward(source, tensor):
    """Seconds of each layer: of T4s, or of 12 V100s and 4 T4s in the mean."""
    weights = {"T4": 1.0} if source == "AMP homogeneous" else {"V100": 0.75, "T4": 0.25}
    layers = [0.0] * 30
    for row in rows("amp_profiles.csv"):
        if row["profile"] == "gpt2" and int(row["tp"]) == tensor:
            weight = weights.get(row["gpu"].split()[0], 0.0)
            layers[int(row["layer_index"])] += weight * float(row["forward_seconds_per_sample"])
    return layers


def test_all_released_predictions_are_reproduced():
    worst, count = 0.0, 0
    profiles = {(s, t): forward(s, t) for s in CLUSTERS for t in (1, 2, 4)}
    for row in rows("published_runs.csv"):
        if row["source"] not in CLUSTERS:
            continue
        notes = re.search(r"predicted ([\d.]+) s; stage boundaries \[([\d;]+)\]", row["notes"])
        predicted = amp_step_time(
            GPT2,
            CLUSTERS[row["source"]],
            profiles[row["source"], int(row["tp"])],
            cuts=[int(x) for x in notes[2].split(";")],
            tensor=int(row["tp"]),
            data=int(row["dp"]),
            microbatch=int(row["microbatch"]),
            global_batch=32,
        )
        worst = max(worst, abs(predicted / float(notes[1]) - 1))
        count += 1
    assert count == 105
    assert worst < 1e-4  # the log's own rounding allows 5e-5


def test_cuts_that_leave_layers_out_are_refused():
    with pytest.raises(ValueError, match="cuts run from 0 to 30 layers"):
        amp_step_time(GPT2, CLUSTERS["AMP homogeneous"], [0.1] * 30, cuts=[0, 29], tensor=1,
                      data=1, microbatch=1, global_batch=1)  # fmt: skip
