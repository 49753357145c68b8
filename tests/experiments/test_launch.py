"""The launch recipes of docs/launch.md, with their own commands."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import launch
from jaxrl.sync import MemoryStore, StoreServer, TcpStore

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
ENVIRONMENT = os.environ | {"JAXRL_SECRET": "of the launch tests", "XLA_FLAGS": ""}


def started(command):
    """A command as the page has it, with this interpreter."""
    words = shlex.split(command)
    assert words[0] == "python"
    return subprocess.Popen(
        [sys.executable, *words[1:]], cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(process):
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err[-3000:]
    return out


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def documented(beginning):
    """The first command of the page that begins so, its lines joined."""
    commands = (" ".join(line.split()) for line in DOC.replace("\\\n", " ").splitlines())
    return next(line for line in commands if line.startswith(beginning))


def test_every_flag_on_the_page_exists():
    known = {flag for action in launch.parser()._actions for flag in action.option_strings}
    text = DOC.replace("\\\n", " ")
    used = set()
    for command in re.findall(r"python -m experiments\.launch([^\n`'\"]*)", text):
        used |= set(re.findall(r"--[a-z-]+", command))
    assert used
    assert used <= known


def test_the_default_runs_learns_and_goes_on_from_where_it_was(tmp_path):
    first = finished(started(f"python -m experiments.launch --steps 40 --out {tmp_path}"))
    assert first.splitlines()[-1].startswith("step   40 ")
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", first)]
    assert rewards[-1] > rewards[0]
    second = finished(started(f"python -m experiments.launch --steps 50 --out {tmp_path}"))
    assert second.splitlines()[0].startswith("step   50 ")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["staleness_max"] <= 3


@pytest.mark.timeout(300)
def test_told_to_stop_it_saves_exits_with_75_and_goes_on(tmp_path):
    """A learner of two processes, of which the second gets the signal."""
    command = documented("python -m experiments.launch --coordinator 127.0.0.1:1234")
    command = command.removesuffix(" &").replace("127.0.0.1:1234", free_address())
    numbers = ("--process-id 0", "--process-id 1")
    running = [
        started(f"{command} --steps 3000 --out {tmp_path}".replace(numbers[0], number))
        for number in numbers
    ]
    try:
        while not (line := running[0].stdout.readline()).startswith("step   10 "):
            assert line, running[0].communicate()[1][-3000:]
        running[1].send_signal(signal.SIGTERM)
        for process in running:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 75, err[-3000:]
    finally:
        for process in running:
            process.kill()
    saved = max(int(path.stem) for path in (tmp_path / "checkpoints").glob("*.json"))
    out = finished(started(f"python -m experiments.launch --steps {saved + 5} --out {tmp_path}"))
    assert out.splitlines()[-1].startswith(f"step {saved + 5:4d} ")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("learners", "actors"),
    [("", {}), ("--replay --actor-dtype int8", {"dtype": "bfloat16"})],
    ids=["plain", "replay and quantised actors"],
)
def test_a_learner_of_two_processes_with_actors_elsewhere(tmp_path, learners, actors):
    """The page's commands for a pod: process K of N, and an actor as a job of its own."""
    items, weights, coordinator = free_address(), free_address(), free_address()
    learner = documented(
        "python -m experiments.launch --actors remote --listen 0.0.0.0:7777 "
        "--weights 0.0.0.0:7778 --coordinator HOST0:1234"
    )
    actor = documented("python -m jaxrl.actors --learner LEARNER:7777")
    for placeholder, value in (
        ("0.0.0.0:7777", items), ("LEARNER:7777", items), ("0.0.0.0:7778", weights),
        ("LEARNER:7778", weights), ("HOST0:1234", coordinator), ("processes N", "processes 2"),
        ("/mnt/run", str(tmp_path)),
    ):  # fmt: skip
        learner, actor = learner.replace(placeholder, value), actor.replace(placeholder, value)
    running = [
        started(f"{learner} --steps 6 {learners}".replace("--process-id K", f"--process-id {k}"))
        for k in (0, 1)
    ]
    actor = actor.replace('"}', '"' + "".join(f', "{k}": "{v}"' for k, v in actors.items()) + "}")
    running.append(started(actor))
    try:
        leader, follower, far = map(finished, running)
    finally:
        for process in running:
            process.kill()
    assert leader.splitlines()[-1].startswith("step    6 ")
    assert "step" not in follower + far  # the first process speaks for all
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.json")] == ["00000006.json"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", ["processes", "ray"])
def test_actors_run_wherever_the_page_says(tmp_path, place):
    if place == "ray":
        pytest.importorskip("ray", reason='needs Ray: pip install -e ".[ray]"')
    command = documented(f"| {place if place == 'processes' else 'Ray'} | ").rpartition(" | ")[0]
    command = next(x for x in command.split("`") if x.startswith("python -m experiments.launch"))
    out = finished(started(f"{command} --steps 3 --out {tmp_path}"))
    assert out.splitlines()[-1].startswith("step    3 ")


def test_a_secret_that_is_missing_is_asked_for(monkeypatch, capsys):
    monkeypatch.delenv("JAXRL_SECRET", raising=False)
    for argv in (["--actors", "remote"], ["--weights", "127.0.0.1:0", "--process-id", "0"]):
        with pytest.raises(SystemExit) as ended:
            launch.main(argv)
        assert ended.value.code == 2
        assert "JAXRL_SECRET is not set" in capsys.readouterr().err


def test_actors_get_a_folder_that_means_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = launch.parser().parse_args(["--actors", "processes"])
    with launch.pool_of(args, Path("weights")) as pool:
        assert pool._build.config["weights"] == str(tmp_path / "weights")


def test_an_actor_closes_its_connections_to_the_store(monkeypatch):
    monkeypatch.setenv("JAXRL_SECRET", "s" * 32)
    closed = []
    monkeypatch.setattr(TcpStore, "close", lambda store: closed.append(store))
    with (
        StoreServer(MemoryStore(), secret="s" * 32) as server,
        launch.build("a", weights=server.address),
    ):
        assert not closed
    assert len(closed) == 1
