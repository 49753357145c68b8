"""Runs every check in a process of its own, shows them as they come, and writes the result."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from experiments.device_check import __doc__ as description
from experiments.device_check.checks import CHECKS, check, device
from experiments.harness.files import plain, write_atomically

BUDGET_S = 460.0
LEAST_S = 20.0  # less is not worth starting with
_SHOWN = {
    True: "[green]passed[/green]",
    False: "[red]FAILED[/red]",
    None: "[yellow]skipped[/yellow]",
}


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.device_check", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--out", type=Path, default=Path("runs/device_check.json"), help="where to write the result"
    )
    add("--tiny", action="store_true", help="sizes for a CPU, on which kernels are interpreted")
    add("--budget", type=float, default=BUDGET_S, metavar="S", help="seconds for all checks")
    add(
        "--only", nargs="+", choices=tuple(CHECKS), default=tuple(CHECKS), help="these checks alone"
    )
    add("--child", choices=tuple(CHECKS), help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the checks; 0 when none failed."""
    args = command_line().parse_args(argv)
    if args.child:
        return _child(args.child, args.out, args.tiny)
    began, results = time.monotonic(), dict[str, dict[str, Any]]()
    about: dict[str, Any] = {}
    console = Console(width=None if sys.stdout.isatty() else 140)
    with Live(console=console, auto_refresh=sys.stdout.isatty(), transient=True) as live:
        for name in args.only:
            live.update(_table(results, about, running=name), refresh=True)
            left = args.budget - (time.monotonic() - began)
            results[name], found = run_one(name, tiny=args.tiny, limit_s=left)
            about = found or about
            record = about | {
                "tiny": args.tiny,
                "budget_s": args.budget,
                "seconds": round(time.monotonic() - began, 1),
                "passed": not any(row["passed"] is False for row in results.values()),
                "checks": results,
            }
            write_atomically(args.out, json.dumps(plain(record), indent=1) + "\n")
    console.print(_table(results, about))
    for name, row in results.items():
        for problem in row["problems"]:
            console.print(f"{name}: {problem}", markup=False, highlight=False)
    console.print(f"written: {args.out}", highlight=False)
    return int(any(row["passed"] is False for row in results.values()))


def run_one(name: str, *, tiny: bool, limit_s: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """One check in a process of its own: its row, and what it ran on ({} where it did not say).

    Args:
      name: of the check.
      tiny: whether at sizes for a CPU.
      limit_s: what is left of the budget. With less than `LEAST_S` it is skipped; a check that
        needs more is stopped and counts as skipped too, not as failed.
    """
    row = {"passed": None, "seconds": 0.0, "summary": "", "numbers": {}, "problems": []}
    if limit_s < LEAST_S:
        return row | {"summary": f"no room: {max(limit_s, 0):.0f} s of the budget were left"}, {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "found.json", Path(folder) / "log"
        command = [sys.executable, "-m", "experiments.device_check", "--child", name]
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*command, "--out", str(out), *["--tiny"] * tiny],
                stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=_environment(),
            )  # fmt: skip
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                row["summary"] = f"stopped after {limit_s:.0f} s, the rest of the budget"
            finally:
                process.kill()
                process.wait()
        row["seconds"] = round(time.monotonic() - began, 1)
        if out.exists():
            found = json.loads(out.read_text())
            return row | found["row"], found["device"]
        if not row["summary"]:
            tail = log.read_text(errors="replace")[-1500:].strip()
            said = f"the process ended with status {process.returncode}: {tail}"
            row |= {"passed": False, "summary": "crashed", "problems": [said]}
    return row, {}


def _environment() -> dict[str, str]:
    """This process's, in which the package is found wherever the command is called."""
    folders = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", ""))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def _child(name: str, out: Path, tiny: bool) -> int:
    found = check(name)(tiny)
    row = {
        "passed": not found.problems,
        "summary": found.summary,
        "numbers": found.numbers,
        "problems": list(found.problems),
    }
    write_atomically(out, json.dumps(plain({"row": row, "device": device()})))
    return 0


def _table(
    results: dict[str, dict[str, Any]], about: dict[str, Any], *, running: str | None = None
) -> Table:
    title = "device check"
    if about:
        title += f": {about['count']} × {about['device']}, jax {about['versions']['jax']}"
    table = Table(title=title, title_justify="left")
    for heading in ("check", "", "s", "found"):
        table.add_column(heading, justify="right" if heading == "s" else "left")
    for name, row in results.items():
        verdict, seconds = _SHOWN[row["passed"]], f"{row['seconds']:.0f}"
        table.add_row(CHECKS[name], verdict, seconds, row["summary"])
    if running is not None:
        table.add_row(CHECKS[running], Spinner("dots"), "", "")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
