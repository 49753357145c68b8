"""A learner as a process: python fault_learner.py JSON, killed and started again by the tests."""

import json
import logging
import resource
import sys
import threading
from pathlib import Path

import fault_world as world

from jaxrl.actors import Processes, Threads
from jaxrl.checkpoint import Checkpointer
from jaxrl.sync import FsspecStore


def main(
    folder, steps, kill="", save_every=4, actors=2, address="", secret="", disk_bytes=0, **options
):
    folder = Path(folder)
    logging.basicConfig(level=logging.INFO)  # to standard error: the disk may be full
    claims = world.Claims(folder / "updates.jsonl")
    store = FsspecStore(folder / "store")
    if address:
        pool = Processes(0, address=address, secret=secret)
    else:
        pool = Threads(
            actors,
            lambda name: world.build(name, store=store, claims=str(folder / "claims.jsonl")),
        )
    loop = world.trainer(pool, store, folder, **options)
    if kill:
        world.KILLS[kill](folder / f"killed in {kill}")
    with Checkpointer(folder / "checkpoints") as checkpoints:
        start, state = loop.restore(checkpoints, world.started())
        claims.add(start=start)
        for done, present, metrics, _ in loop.run(state, start=start, steps=steps):
            claims.add(done=done, digest=world.digest(present.params["policy"]), **metrics)
            if disk_bytes and done == start + 2:
                fill_the_disk(disk_bytes, folder)
            if done % save_every == 0:
                loop.save(checkpoints, done, present)
    claims.add(finished=steps)


def fill_the_disk(size, folder):
    """For some seconds no file may grow beyond `size` bytes: the system refuses as a full disk."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def free():
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    threading.Timer(3.0, free).start()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
