"""The command `jaxrl`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxrl import doctor


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxrl COMMAND`.

    Returns:
      The exit status: 0, or 1 where the doctor found a fault.
    """
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxrl", description="Safe reinforcement learning of language models in JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "doctor",
        help="check this machine and say how to mend what is wrong",
        description="Checks versions, devices, memory, a collective, a tiny step, the disk and "
        "a checkpoint; exits with 1 when one of them fails.",
    )
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.add_argument(
        "--out", type=Path, default=Path("runs"), help="folder where runs go (default: runs)"
    )
    check.add_argument(
        "--timeout", type=float, default=120.0, help="seconds for each check (default: 120)"
    )
    check.add_argument(
        "--fake-devices",
        type=int,
        default=0,
        metavar="N",
        help="check with N fake CPU devices instead of the real ones",
    )
    check.set_defaults(run=_doctor)
    return parser


def _doctor(args: argparse.Namespace) -> int:
    if args.fake_devices:
        _fake_devices(args.fake_devices)
    found = []
    for check in doctor.diagnose(args.out, timeout_s=args.timeout):
        found.append(check)
        if not args.json:
            print(check.line(), flush=True)
    result = doctor.report(found)
    if args.json:
        print(json.dumps(result, indent=2))
    sys.stdout.flush()
    if any("no answer" in check.detail for check in found):
        os._exit(1)  # a hanging device would also hang an orderly end
    return 0 if result["ok"] else 1


def _fake_devices(count: int) -> None:
    import jax  # before its backend starts, the number can still be chosen

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


if __name__ == "__main__":
    sys.exit(main())
