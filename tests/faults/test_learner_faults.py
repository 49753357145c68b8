"""The learner is killed and started again; nothing acknowledged is lost or trained on twice."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import fault_world as world
import pytest

SECRET = "a secret of the fault tests"


ENDLESS = 10**6


def finish(process, timeout=280):
    return process.communicate(timeout=timeout)[1]


def steps_done(folder):
    return max(done for life in lives(folder) for done, _ in life)


def lives(folder):
    """The updates of each life: lists of (done, digest)."""
    found = []
    for claim in world.Claims(folder / "updates.jsonl").read():
        if "start" in claim:
            found.append([])
        elif "done" in claim:
            found[-1].append((claim["done"], claim["digest"]))
    return found


def check(folder, steps):
    """What must hold after every fault."""
    updates, acknowledged = world.used(folder)
    trained_on = [item for step in sorted(updates) for item in updates[step]]
    assert len(trained_on) == len(set(trained_on))  # none twice
    assert set(trained_on) <= set(acknowledged)
    by_step = {}
    for life in lives(folder):
        for done, digest in life:
            # A step that a life repeats comes out as it came out before, bit for bit.
            assert by_step.setdefault(done, digest) == digest
    assert sorted(by_step) == list(range(1, steps + 1))
    claims = world.Claims(folder / "claims.jsonl").read()
    published = world.Claims(folder / "published.jsonl").read()
    assert world.mismatches(published, claims) == []
    return trained_on, acknowledged


@pytest.mark.parametrize(
    "places", [["payload", "before manifest", "after manifest"], ["checkpoint", "update"]]
)
def test_a_learner_killed_in_a_publish_a_checkpoint_and_an_update(tmp_path, learner, places):
    before, logs = [], []
    for place in places:
        logs.append(finish(learner(kill=place, folder=str(tmp_path), steps=ENDLESS)))
        assert (tmp_path / f"killed in {place}").exists(), logs[-1]
        before.append(set(world.used(tmp_path)[1]))
    steps = steps_done(tmp_path) + 4
    logs.append(finish(learner(folder=str(tmp_path), steps=steps)))
    claims = world.Claims(tmp_path / "updates.jsonl").read()
    assert claims[-1] == {"finished": steps}, logs[-1]
    assert any("the journal has" in log for log in logs)
    refused = {item for claim in claims for item, _ in claim.get("refused", ())}
    starts = [c["start"] for c in world.Claims(tmp_path / "updates.jsonl").read() if "start" in c]
    assert len(starts) == len(places) + 1
    trained_on, acknowledged = check(tmp_path, steps)
    for number, victims_had in enumerate(before):
        # Nothing that a victim had acknowledged was asked for again, and all but what waits in
        # the journal at the end was trained on, once, unless it had become too old.
        assert victims_had <= set(acknowledged), number
        assert len(victims_had - set(trained_on) - refused) <= 4
    assert len(acknowledged) == len(set(acknowledged))


def test_an_actor_outlives_its_learner_and_finds_it_again(tmp_path, learner, environment):
    # Bound, nobody else is given this port; not listening, it is free for the learners.
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{held.getsockname()[1]}"
    config = {"store": str(tmp_path / "store"), "claims": str(tmp_path / "claims.jsonl")}
    actor = subprocess.Popen(
        [
            sys.executable, "-m", "jaxrl.actors", "--learner", address, "--name", "survivor",
            "--build", "fault_world:build", "--config", json.dumps(config),
        ],
        env=environment | {"JAXRL_SECRET": SECRET}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    options = {"folder": str(tmp_path), "address": address, "secret": SECRET}
    first = learner(steps=ENDLESS, **options)
    end = time.monotonic() + 250
    while time.monotonic() < end and not any(len(life) >= 6 for life in lives(tmp_path)):
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    finish(first)
    steps = steps_done(tmp_path) + 6
    log = finish(learner(steps=steps, **options))
    assert world.Claims(tmp_path / "updates.jsonl").read()[-1] == {"finished": steps}, log
    heard = actor.communicate(timeout=200)[1]
    held.close()
    assert actor.returncode == 0
    assert "lost its learner and looks for it" in heard
    check(tmp_path, steps)
    claims = world.Claims(tmp_path / "claims.jsonl").read()
    assert {claim["actor"] for claim in claims} == {"survivor"}


@pytest.mark.parametrize(
    ("disk_bytes", "reason"),
    [
        (600, r"cannot be made durable and is not acknowledged: .*free some space"),
        (200, r"cannot be published and is tried again; .*no room in .*free some space"),
    ],
)
def test_a_full_disk_stops_nothing_for_good_and_loses_nothing(
    tmp_path, learner, disk_bytes, reason
):
    """No file may grow beyond so many bytes until that is said; then there is room again."""
    log = finish(
        learner(
            folder=str(tmp_path),
            steps=12,
            save_every=100,
            disk_bytes=disk_bytes,
            until=reason,
            actors=1,
        )
    )
    assert world.Claims(tmp_path / "updates.jsonl").read()[-1] == {"finished": 12}, log
    assert re.search(reason, log)
    trained_on, acknowledged = check(tmp_path, 12)
    assert len(acknowledged) == len(set(acknowledged))
    assert sorted(trained_on)[:8] == list(range(8))  # nor was any item forgotten
