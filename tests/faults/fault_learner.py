"""A learner as a process: python fault_learner.py JSON, killed and started again by the tests."""

import contextlib
import json
import logging
import re
import resource
import signal
import sys
import threading
from pathlib import Path

signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to fill a disk for

import fault_world as world  # noqa: E402

from jaxrl.actors import PoolConfig, Processes, Threads  # noqa: E402
from jaxrl.checkpoint import Checkpointer  # noqa: E402
from jaxrl.sync import FsspecStore, StoreServer  # noqa: E402


def main(
    folder, steps, kill="", marker="", save_every=4, actors=2, address="", store_address="",
    secret="", disk_bytes=0, until="", **options,
):  # fmt: skip
    """Trains up to `steps`, or until a file called "stop" is there.

    Its actors are `actors` threads, or with an `address` whoever connects there.
    """
    folder = Path(folder)
    logging.basicConfig(level=logging.INFO)  # to standard error: the disk may be full
    claims = world.Claims(folder / "updates.jsonl")
    store = FsspecStore(folder / "store")
    server = contextlib.nullcontext()
    if store_address:
        server = StoreServer(store, store_address, secret=secret)
    if address:
        pool = Processes(0, address=address, secret=secret, config=PoolConfig(lease_s=30.0))
    else:
        pool = Threads(
            actors,
            lambda name: world.build(name, store=store, claims=str(folder / "claims.jsonl")),
        )
    loop = world.trainer(pool, store, folder, **options)
    if kill:
        world.KILLS[kill](marker or folder / f"killed in {kill}")
    signal.signal(signal.SIGUSR1, lambda *_: fill_the_disk(200, 2.0))
    with server, loop.journal, Checkpointer(folder / "checkpoints") as checkpoints:
        start, state = loop.restore(checkpoints, world.started())
        claims.add(start=start)
        for done, present, metrics, refusals in loop.run(state, start=start, steps=steps):
            claims.add(
                done=done,
                digest=world.digest(present.params["policy"]),
                refused=[(refusal.item, refusal.reason) for refusal in refusals],
                staleness=metrics.get("staleness_max"),
            )
            if disk_bytes and done == start + 2:
                fill_the_disk(disk_bytes, 0.5, until)
            if done % save_every == 0:
                try:
                    loop.save(checkpoints, done, present)
                except Exception as error:  # of the save before; this one is tried again later
                    logging.error("a checkpoint could not be saved: %s", error)
            if (folder / "stop").exists():
                break
    claims.add(finished=done)


def fill_the_disk(size, seconds, until=""):
    """For some seconds no file may grow beyond `size` bytes: the system refuses as a full disk.

    They begin when something is logged that the regular expression `until` is found in.
    """
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    room = threading.Timer(seconds, resource.setrlimit, (resource.RLIMIT_FSIZE, (hard, hard)))

    def listen(record):
        if re.search(until, record.getMessage()):
            with contextlib.suppress(RuntimeError):  # it is started once
                room.start()
        return True

    if until:
        logging.getLogger().handlers[0].addFilter(listen)
    else:
        room.start()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
