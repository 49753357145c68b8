"""One actor as a process of its own: `python -m jaxrl.actors --help`.

`Processes` starts such processes on its machine; on other machines a launcher does. The shared
secret comes in the environment, where other users of the machine cannot read it.
"""

import argparse
import json
import logging
import os
import socket
import sys
import threading

from jaxrl.actors.factory import Factory
from jaxrl.actors.remote import serve
from jaxrl.sync import SyncError
from jaxrl.sync.connection import secret_from_environment


def command_line() -> argparse.ArgumentParser:
    """What an actor's process is told."""
    parser = argparse.ArgumentParser(prog="python -m jaxrl.actors", description=__doc__)
    parser.add_argument("--learner", required=True, metavar="HOST:PORT", help="of its pool")
    parser.add_argument(
        "--build", required=True, metavar="MODULE:FUNCTION", help="makes the actor of a name"
    )
    parser.add_argument(
        "--config", type=json.loads, default={}, metavar="JSON", help="arguments of that function"
    )
    parser.add_argument(
        "--name", default=f"{socket.gethostname()}-{os.getpid()}", help="different from all others"
    )
    parser.add_argument(
        "--patience", type=float, default=600.0, metavar="S", help="to look for the learner"
    )
    parser.add_argument("--life", default="", help=argparse.SUPPRESS)
    parser.add_argument(
        "--with-parent", action="store_true", help="end as soon as standard input is closed"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serves a learner; 0 when it is done, 1 when it cannot be reached or refuses."""
    parser = command_line()
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {args.name} %(levelname)s %(name)s: %(message)s"
    )
    try:
        secret = secret_from_environment()
    except ValueError as error:
        parser.error(str(error))
    if args.with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    build = Factory(target=args.build, config=args.config)
    try:
        serve(
            build,
            name=args.name,
            learner=args.learner,
            secret=secret,
            life=args.life,
            patience_s=args.patience,
        )
    except SyncError as error:
        logging.error("%s", error)
        return 1
    return 0


def _end_with_parent() -> None:
    # Below Python's own buffer, whose lock would be held while the interpreter shuts down.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)  # whoever held the other end is gone


if __name__ == "__main__":
    raise SystemExit(main())
