"""Command line: plan, simulate, validate and calibrate. `python -m sharding COMMAND --help`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sharding import calibrate, constants, evaluation
from sharding.runs import read_runs
from sharding.table import Table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sharding", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_validate(commands)
    _add_calibrate(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_validate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("validate", help="predicted against measured, for a table of runs")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="CSV files of runs")
    parser.add_argument("--calibration", type=Path, help="constants; the shipped ones if absent")
    parser.add_argument("--held-out", action="store_true", help="refit without each row's model")
    parser.add_argument("--json", action="store_true", help="JSON on stdout and nothing else")
    parser.set_defaults(run=_validate)


def _validate(options: argparse.Namespace) -> int:
    runs, skipped = [], []
    for path in options.runs:
        some, without = read_runs(path)
        runs += some
        skipped += without
    if not runs:
        raise ValueError(f"no row of {options.runs} has a measured quantity that could be read")
    calibration = constants.load(options.calibration)
    table = Table.of(runs)
    predicted = (
        calibrate.held_out(runs, calibration) if options.held_out else table.predict(calibration)
    )
    memory = table.memory_bytes()
    summary = evaluation.summarise(table.runs, skipped, predicted, memory)
    fits = evaluation.feasible(table.runs, memory)
    if not options.json:
        _print_summary(summary)
        return 0
    rows = [
        {
            "row": run.row,
            "source": run.source,
            "hardware": run.hardware,
            "model": run.model,
            "predicted_s": float(predicted[i]),
            "measured_s": run.measured_s,
            "feasible": bool(fits[i]),
        }
        for i, run in enumerate(table.runs)
    ]
    json.dump({"rows": rows, "summary": summary}, sys.stdout, indent=1)
    print()
    return 0


def _print_summary(summary: dict) -> None:
    print(f"{summary['predicted']} of {summary['rows']} rows predicted")
    for entry in summary["skipped"]:
        print(f"  skipped row {entry['row']}: {entry['reason']}")
    print(f"{'source':60s} {'rows':>5s} {'mean':>7s} {'median':>7s} {'<=15%':>6s} {'bias':>6s}")
    for name, errors in {**summary["sources"], "all": summary["error"],
                         "all, constant MFU": summary["constant_mfu_error"]}.items():  # fmt: skip
        if errors:
            print(
                f"{name[:60]:60s} {errors['count']:5d} {errors['mean']:7.1%} "
                f"{errors['median']:7.1%} {errors['within_15']:6.0%} {errors['bias']:6.2f}"
            )
    if summary["problems"]:
        print(
            f"{summary['problems']} problems: mean rank correlation "
            f"{summary['spearman_mean']:.3f}, regret mean {summary['regret_mean']:.1%}, "
            f"worst {summary['regret_worst']:.1%}"
        )
    if summary["failed_launches"]:
        print(
            f"failed launches: {summary['failed_predicted']} of {summary['failed_launches']} "
            f"predicted, {summary['false_alarms']} false alarms"
        )
    for rule, count in sorted(summary["filled"].items()):
        print(f"  filled {count:5d} x {rule}")


def _add_calibrate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("calibrate", help="fit the constants to tables of runs")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="CSV files of runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    runs = [run for path in options.runs for run in read_runs(path)[0]]
    if not any(run.measured_s for run in runs):
        raise ValueError(f"no row of {options.runs} has a measured quantity that could be read")
    about = {
        "runs": ", ".join(path.name for path in options.runs),
        "rows": str(sum(run.measured_s is not None for run in runs)),
        "fit": "sharding.calibrate: soft_l1 on log predicted/measured, priors at the defaults",
    }
    fitted = calibrate.fit(runs, about=about)
    options.out.write_text(fitted.to_json() + "\n")
    ran = [run for run in runs if run.measured_s]
    measured = np.asarray([run.measured_s for run in ran], float)
    errors = evaluation.Errors.of(Table.of(ran).predict(fitted), measured)
    if errors:
        print(f"{errors.count} runs: mean error {errors.mean:.1%}, median {errors.median:.1%}")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
