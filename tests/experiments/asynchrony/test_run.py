"""The command, from end to end with a model of nothing."""

import json
import math
import re

import pytest

from experiments.asynchrony import results
from experiments.asynchrony.__main__ import main
from experiments.asynchrony.config import METHODS as METHODS_OF_ALL
from experiments.asynchrony.simulator import Activity, Durations
from experiments.asynchrony.training import Snapshot, Trained

METHODS = ("rloo", "one_step_off", "tba_2")
ARGS = ("--preset", "tiny", "--methods", ",".join(METHODS), "--seeds", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asynchrony") / "run"
    main([*ARGS, "--out", str(folder)])
    return folder


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_every_method_is_trained_measured_and_simulated(finished):
    found = summary(finished)
    assert tuple(found["methods"]) == tuple(found["simulated"]) == METHODS
    records = [record for each in found["methods"].values() for record in each]
    assert [record["seed"] for record in records] == [0, 1] * len(METHODS)
    for record in records:
        assert len(record["step_s"]) == len(record["rewards"]) == 4
        assert [s["step"] for s in record["snapshots"]] == [0, 2, 4]
        assert record["items"] >= 3
        assert record["refused"] == 0
        assert 0 < record["usable_share"] <= 1
        assert record["left_cores"] > 0
        for share in ("learner_idle", "actor_idle"):
            assert 0 <= record[share] <= 1
    for name in ("one_step_off", "tba_2"):
        record, other = found["methods"][name]
        assert record["step_s"] != other["step_s"]
        assert record["durations"] == other["durations"]
        assert 0 < record["publishing"] < 1
        assert sum(record["staleness"].values()) == pytest.approx(1)
        assert record["durations"]["payload_bytes"] > 0
    oldest = max(map(int, found["methods"]["one_step_off"][0]["staleness"]))
    assert oldest == 1
    outcomes = [o for each in found["simulated"].values() for o in each]
    assert all(math.isfinite(o["updates_per_s"]) for o in outcomes)


def test_all_start_from_one_policy(finished):
    found = [record for each in summary(finished)["methods"].values() for record in each]
    starts = {(r["snapshots"][0]["greedy"], r["snapshots"][0]["sampled"]) for r in found}
    assert len(starts) == 1


def test_the_report_shows_what_was_asked(finished):
    page = (finished / "report.html").read_text()
    for text in ("idle", "versions behind", "Many actors", "simulated", "TBA, 2 actors"):
        assert text in page
    assert page.count("<figure>") == 4
    assert "±" in page
    picture = (finished / "asynchrony.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    samples = (finished / "samples" / "tba_2-seed0.jsonl").read_text().splitlines()
    assert {"prompt", "completion", "gold", "right"} <= set(json.loads(samples[0]))


def test_policy_gradients_run_with_actors_and_importance_weights(tmp_path):
    methods = ("async_ppo", "async_grpo")  # with a critic and without; async_rloo is one step off
    main(["--preset", "tiny", "--methods", ",".join(methods), "--out", str(tmp_path / "run")])
    found = summary(tmp_path / "run")["methods"]
    for name in methods:
        (record,) = found[name]
        assert record["items"] >= 4
        assert max(map(int, record["staleness"])) <= 4
        assert METHODS_OF_ALL[name].actors == 2
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    weights = [row["importance_weight"] for row in rows if row["stage"].startswith("async")]
    assert len(weights) == 2 * 4
    assert all(0 < weight <= 2 for weight in weights)


def test_an_interrupted_run_keeps_its_finished_methods(finished, capsys):
    before = summary(finished)
    (finished / "summary.json").unlink()
    (finished / "methods" / "tba_2-seed1.json").unlink()
    main([*ARGS, "--out", str(finished)])
    after = summary(finished)
    for name in ("rloo", "one_step_off"):
        assert after["methods"][name] == before["methods"][name]
    assert after["methods"]["tba_2"][0] == before["methods"]["tba_2"][0]
    assert after["methods"]["tba_2"][1]["step_s"] != before["methods"]["tba_2"][1]["step_s"]
    rows = (finished / "metrics.jsonl").read_text().splitlines()
    steps = [r["step"] for r in map(json.loads, rows) if r["stage"] == "tba_2-seed1"]
    assert steps == [1, 2, 3, 4]
    assert "sft" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--methods", "rloo,dpo"), "methods are one or more of ppo, grpo, .*tba_4"),
        (("--methods", "rloo,rloo"), "each once"),
        (("--steps", "0"), "steps must be 1 or more, got 0"),
        (("--group-size", "1"), "group_size must be 2 or more"),
        (("--link", "fast"), "fast"),
        (("--worked-share", "1.5"), r"worked_share must lie in \[0, 1\]"),
        (("--data", "nowhere.jsonl"), "no data file at nowhere.jsonl"),
        (("--template", "fancy"), "template must be one of plain, problem"),
        (("--levels", "0,1"), "levels are numbers of operations"),
    ],
)
def test_wrong_values_end_with_what_is_allowed(tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as ended:
        main([*ARGS, *argv, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said
    assert "Traceback" not in said


# --- numbers by hand ----------------------------------------------------------------------------


def trained(*points, method="rloo", **changes):
    """A method with snapshots (seconds, accuracy)."""
    snapshots = tuple(
        Snapshot(step=i, elapsed_s=s, written=8 * i, greedy=a, sampled=a)
        for i, (s, a) in enumerate(points)
    )
    fields = {
        "method": method,
        "seed": 0,
        "snapshots": snapshots,
        "step_s": (1.0,) + (0.25,) * 19,
        "rewards": (0.5,) * 20,
        "items": 23,
        "learner_idle": 0.5,
        "actor_idle": 0.25,
        "pause_s": None,
        "staleness": {1: 0.25, 3: 0.75},
        "refused": 0,
        "durations": Durations(rollout=Activity.fixed(0.2), update=Activity.fixed(0.1)),
        "publishing": None,
        "usable_share": 0.5,
        "left_cores": 1.5,
    }
    return Trained(**fields | changes)


def test_seconds_to_a_level_are_read_between_snapshots():
    found = trained((0.0, 0.3), (10.0, 0.5), (20.0, 0.9))
    assert results.seconds_to(found, 0.3) == 0.0
    assert results.seconds_to(found, 0.4) == pytest.approx(5.0)
    assert results.seconds_to(found, 0.7) == pytest.approx(15.0)
    assert results.seconds_to(found, 0.95) is None
    slower = trained((0.0, 0.3), (10.0, 0.6), (20.0, 0.55))
    assert results.common_level({"rloo": [found], "ppo": [slower]}) == 0.6


def test_rates_leave_the_start_out_and_ages_are_weighed():
    found = trained((0.0, 0.3))
    assert found.updates_per_s == pytest.approx(4.0)  # the first tenth is left out
    assert found.items_per_s == pytest.approx(23 / 5.75)
    assert found.usable_cores == pytest.approx(0.75)
    assert results.mean_age(found.staleness) == pytest.approx(2.5)
    assert results.mean_age({}) is None


def test_several_seeds_are_a_mean_and_its_standard_error():
    three = [trained((0.0, value)) for value in (0.2, 0.3, 0.7)]
    # Mean .4, standard deviation √((.04 + .01 + .09)/2) = .2646, over √3.
    assert results.cell(three, lambda t: t.snapshots[0].sampled) == "0.400 ± 0.153"
    assert results.cell(three[:1], lambda t: t.snapshots[0].sampled) == 0.2
    assert results.cell(three, lambda t: t.pause_s) is None
    assert results.ages([trained(), trained(staleness={1: 0.75, 2: 0.25})]) == {
        1: 0.5, 2: 0.125, 3: 0.375,
    }  # fmt: skip


def test_what_was_trained_survives_json():
    found = trained((0.0, 0.3), (1.0, 0.4), pause_s=0.01)
    assert Trained.from_json(json.loads(json.dumps(found.to_json()))) == found
