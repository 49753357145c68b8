"""Ten minutes of training under random faults: python tests/faults/soak.py --minutes 10 --seed 0.

A learner and two actors, each a process of its own, talk over TCP by relays that can be cut. The
faults come from a seed: processes killed at a random moment or in a chosen place, stopped for some
seconds, connections cut, the disk filled, deliveries damaged. Whatever dies is started again. In
the end the books are compared; the last line of output says whether they agree.
"""

import argparse
import collections
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Whoever comes back shall not compile again what its predecessor has compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import fault_relay  # noqa: E402  # of this folder
import fault_world as world  # noqa: E402
import numpy as np  # noqa: E402

SECRET = "a secret of the soak test"
ACTORS = ("ada", "bob")
ACTOR_PLACES = ("rollout", "fetch", "apply")
LEARNER_PLACES = ("payload", "before manifest", "after manifest", "checkpoint", "update")
MAX_STALENESS = 3


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


class Soak:
    """The processes of a run, and what is done to them."""

    def __init__(self, folder, seed):
        self.folder, self.rng = Path(folder), np.random.default_rng(seed)
        self.items, self.weights = free_address(), free_address()
        self.relays = [fault_relay.Cutter(self.items), fault_relay.Cutter(self.weights)]
        self.faults, self.surprises = collections.Counter(), []
        self.lives = 0
        self.processes, self.markers, self.paused = {}, {}, {}
        self.log = (self.folder / "log.txt").open("ab")

    def start(self, name):
        """Starts a process, which may have been told where to kill itself."""
        self.lives += 1
        places = LEARNER_PLACES if name == "learner" else ACTOR_PLACES
        place = places[self.rng.integers(len(places))] if self.rng.random() < 0.35 else ""
        marked = self.folder / f"life {self.lives}"
        marked.mkdir()
        self.markers[name] = (place, marked / f"killed in {place}")
        if name == "learner":
            options = {
                "folder": str(self.folder), "steps": 10**9, "kill": place,
                "marker": str(self.markers[name][1]), "save_every": 10, "address": self.items,
                "store_address": self.weights, "secret": SECRET, "segment_bytes": 1 << 16,
                "max_staleness": MAX_STALENESS,
            }  # fmt: skip
            command = [str(HERE / "fault_learner.py"), json.dumps(options)]
        else:
            config = {
                "store": self.relays[1].address, "secret": SECRET, "folder": str(marked),
                "claims": str(self.folder / "claims.jsonl"), "kills": {name: [place] * bool(place)},
                "bad_seed": int(self.rng.integers(1 << 30)),
            }  # fmt: skip
            command = [
                "-m", "jaxrl.actors", "--learner", self.relays[0].address, "--name", name,
                "--build", "fault_world:build", "--config", json.dumps(config),
            ]  # fmt: skip
        self.processes[name] = subprocess.Popen(
            [sys.executable, *command], stderr=self.log, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{HERE}:{ROOT}", "JAXRL_SECRET": SECRET},
        )  # fmt: skip

    def revive(self):
        """Starts again what has died, and counts why."""
        for name, process in self.processes.items():
            if process.poll() is None:
                continue
            place, marker = self.markers[name]
            role = "learner" if name == "learner" else "actor"
            if marker.exists():
                self.faults[f"{role} killed in {place}"] += 1
            elif process.returncode != -signal.SIGKILL:
                self.surprises.append(f"{name} ended with {process.returncode}")
            self.start(name)

    def hurt(self):
        """One random fault."""
        actor = ACTORS[self.rng.integers(len(ACTORS))]
        match self.rng.integers(7):
            case 0 | 1:
                self.processes[actor].send_signal(signal.SIGKILL)
                self.faults["actor killed"] += 1
            case 2:
                self.processes["learner"].send_signal(signal.SIGKILL)
                self.faults["learner killed"] += 1
            case 3 | 4:
                self.relays[self.rng.integers(2)].cut()
                self.faults["connections cut"] += 1
            case 5:
                if any(life.get("done") for life in self.updates()[-1:]):
                    self.processes["learner"].send_signal(signal.SIGUSR1)
                    self.faults["disk full"] += 1
            case 6:
                self.processes[actor].send_signal(signal.SIGSTOP)
                self.paused[actor] = time.monotonic() + self.rng.uniform(2.0, 8.0)
                self.faults["actor stopped for seconds"] += 1

    def wake(self, everybody=False):
        for actor, until in list(self.paused.items()):
            if everybody or time.monotonic() > until:
                self.processes[actor].send_signal(signal.SIGCONT)
                del self.paused[actor]

    def updates(self):
        return world.Claims(self.folder / "updates.jsonl").read()

    def run(self, minutes, say):
        begun = time.monotonic()
        end, told = begun + 60 * minutes, begun
        for name in ("learner", *ACTORS):
            self.start(name)
        next_fault = begun + 20.0  # let all of them come up once
        while time.monotonic() < end:
            time.sleep(0.2)
            self.wake()
            self.revive()
            if time.monotonic() > next_fault:
                self.hurt()
                next_fault = time.monotonic() + self.rng.exponential(8.0)
            if time.monotonic() - told > 60:
                told = time.monotonic()
                say(f"{(told - begun) / 60:4.1f} min: {self.summary()}")
        self.finish()

    def finish(self):
        """Lets the last life of the learner train some more, and stops all."""
        self.wake(everybody=True)
        end = time.monotonic() + 120
        while time.monotonic() < end:  # a learner that lives and has got somewhere
            self.revive()
            last = self.updates()[-1]
            if last.get("done", 0) > max(c.get("done", 0) for c in self.updates()[:-1]) - 1:
                break
            time.sleep(0.5)
        (self.folder / "stop").touch()
        while time.monotonic() < end and "finished" not in self.updates()[-1]:
            self.revive()
            time.sleep(0.5)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for relay in self.relays:
            relay.close()
        self.log.close()

    def summary(self):
        published = world.Claims(self.folder / "published.jsonl").read()
        applied = world.Claims(self.folder / "claims.jsonl").read()
        return (
            f"{len({c['version'] for c in published})} versions published, "
            f"{len({(c['actor'], c['version']) for c in applied})} applied by actors, "
            f"{sum(self.faults.values())} faults injected, "
            f"{len(world.mismatches(published, applied))} mismatches"
        )

    def verdict(self):
        """What is wrong with the books: a list that should be empty."""
        problems = []
        updates, acknowledged = world.used(self.folder)
        trained_on = [item for step in sorted(updates) for item in updates[step]]
        if len(trained_on) != len(set(trained_on)):
            problems.append(f"{len(trained_on) - len(set(trained_on))} items trained on twice")
        if not set(trained_on) <= set(acknowledged):
            problems.append("items trained on without acknowledgement")
        refused = {item for c in self.updates() for item, _ in c.get("refused", ())}
        lost = set(acknowledged) - set(trained_on) - refused
        if len(lost) > MAX_STALENESS + 1:  # what waits at the end
            problems.append(f"{len(lost)} acknowledged items neither used nor refused")
        digests = {}
        for claim in self.updates():
            if "done" in claim:
                digests.setdefault(claim["done"], set()).add(claim["digest"])
        twofold = sum(len(found) > 1 for found in digests.values())
        if twofold:
            problems.append(f"{twofold} updates came out differently when they were repeated")
        stale = max((c.get("staleness") or 0 for c in self.updates()), default=0)
        if stale > MAX_STALENESS:
            problems.append(f"rollouts {stale} versions old were trained on")
        published = world.Claims(self.folder / "published.jsonl").read()
        applied = world.Claims(self.folder / "claims.jsonl").read()
        if wrong := world.mismatches(published, applied):
            problems.append(f"{len(wrong)} actors' claims are not what was published: {wrong[:3]}")
        return problems

    def report(self, minutes, seed):
        """What a reader wants to know, as JSON values."""
        published = world.Claims(self.folder / "published.jsonl").read()
        applied = world.Claims(self.folder / "claims.jsonl").read()
        updates, acknowledged = world.used(self.folder)
        starts = [claim for claim in self.updates() if "start" in claim]
        return {
            "minutes": minutes,
            "seed": seed,
            "machine": f"{os.cpu_count()} CPU cores",
            "versions_published": len({c["version"] for c in published}),
            "versions_applied": len({(c["actor"], c["version"]) for c in applied}),
            "rollouts_written": len(applied),
            "items_acknowledged": len(set(acknowledged)),
            "updates": len(updates),
            "lives_of_the_learner": len(starts),
            "faults_injected": sum(self.faults.values()),
            "faults": dict(sorted(self.faults.items())),
            "other_ends": sorted(self.surprises),
            "mismatches": len(world.mismatches(published, applied)),
            "problems": self.verdict(),
        }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for soak.json")
    parser.add_argument("--keep", type=Path, help="folder to work in, to look at afterwards")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        soak = Soak(folder, args.seed)
        soak.run(args.minutes, say=lambda line: print(line, flush=True))
        report = soak.report(args.minutes, args.seed)
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "soak.json").write_text(text)
    print("mismatches: {}; problems: {}".format(report["mismatches"], report["problems"] or "none"))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
