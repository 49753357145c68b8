"""Command line: plan, simulate, validate, calibrate, profile; each says more with --help."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from sharding import report
from sharding.compiled.compile_check import Report
from sharding.costs import constants
from sharding.costs.strategies import REMAT, Strategies, Strategy
from sharding.machines.topology import AXES, Cluster
from sharding.measured import calibrate, evaluation
from sharding.measured.runs import read_runs
from sharding.measured.table import Table
from sharding.planner import plan
from sharding.programs.model_file import read_model
from sharding.programs.program import Program
from sharding.programs.transformer import named_model, transformer
from sharding.search.candidate import TIE_TOLERANCE
from sharding.search.solver import evaluate, solve
from sharding.search.space import Constraints


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sharding", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands)
    _add_simulate(commands)
    _add_validate(commands)
    _add_calibrate(commands)
    _add_profile(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_problem(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="a published model, as llama3-8b, or a JSON file: fields of "
        "TransformerConfig, or a Program as its to_json writes it",
    )
    parser.add_argument("--cluster", required=True,
                        help="CHIP:SHAPE, as v5p:4x4x8 or h100:8x8, or a JSON file")  # fmt: skip
    parser.add_argument("--global-batch", type=int, help="sequences of a step")
    parser.add_argument("--seq-len", type=int, help="tokens of a sequence; 4,096 if nothing says")
    parser.add_argument("--precision", choices=("bf16", "fp8", "fp4", "int8"))
    parser.add_argument("--inference", action="store_true", help="a forward pass only")
    parser.add_argument("--calibration", type=Path, help="constants; the shipped ones if absent")
    parser.add_argument("--json", action="store_true", help="JSON on stdout and nothing else")


def _problem(options: argparse.Namespace) -> tuple[Program, Cluster]:
    cluster = Cluster.from_name(options.cluster)
    said = {
        "global_batch": options.global_batch,
        "seq_len": options.seq_len,
        "precision": options.precision,
        "training": False if options.inference else None,
    }
    said = {name: value for name, value in said.items() if value is not None}
    # Two sequences a device keep small and large clusters busy where nothing is said.
    default = {"global_batch": 2 * cluster.device_count}
    if options.model.endswith(".json"):
        return read_model(Path(options.model), said, default), cluster
    return transformer(named_model(options.model, **{**default, **said})), cluster


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("plan", help="find the fastest division of a model that fits")
    _add_problem(parser)
    parser.add_argument("--top", type=int, default=5, help="how many strategies to list")
    parser.add_argument(
        "--tie",
        type=float,
        default=TIE_TOLERANCE,
        help="predicted times within this share tie, and memory decides; 0 for the fastest",
    )
    parser.add_argument("--pin", action="append", default=[], metavar="FIELD=VALUE",
                        help="a choice that is made, as tensor=1 or remat=full")  # fmt: skip
    parser.add_argument("--remat-at-most", default="", choices=tuple(REMAT),
                        help="policy that recomputes most of those allowed")  # fmt: skip
    parser.add_argument(
        "--no-tensor-across-hosts",
        action="store_true",
        help="keep groups of tensor parallelism to chips that share a host",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compile the plan for the cluster, which need not be here, and compare; needs "
        "jax[tpu] or jax-cuda13-plugin, and flatbuffers",
    )
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    program, cluster = _problem(options)
    pinned = dict(_pin(text) for text in options.pin)
    if options.check:  # what is compiled is what can be executed
        pinned.setdefault("interleave", 1)
    constraints = Constraints(
        pinned=pinned,
        remat_at_most=options.remat_at_most,
        tensor_across_hosts=not options.no_tensor_across_hosts,
        uneven_shares=not options.check,
    )
    calibration = constants.load(options.calibration)
    found = solve(program, cluster, constraints=constraints, calibration=calibration,
                  top=max(1, options.top), tie_tolerance=options.tie)  # fmt: skip
    checked = _checked(options, cluster, found.best[0].strategy) if options.check else None
    if options.json:
        stages = report.stage_cuts(program, cluster, found.best[0].strategy)
        document = report.solution_json(program, cluster, found, stages=stages)
        if checked is not None:
            document["check"] = report.check_json(checked)
        print(json.dumps(document, indent=1))
        return 0
    print(report.solution_text(program, cluster, found))
    if checked is not None:
        print(f"as a program (sharding.decoder: attention without a kernel):\n{checked}")
    return 0


def _checked(options: argparse.Namespace, cluster: Cluster, strategy: Strategy) -> Report:
    """A strategy compiled as the decoder's program, for the cluster's machines."""
    from sharding.decoder import decoder_problem  # with the optimisers: half a second of import

    if options.model.endswith(".json"):
        raise ValueError("--check compiles published decoders; plan.check() compiles your own step")
    said = {"global_batch": options.global_batch or 2 * cluster.device_count}
    said |= {"seq_len": options.seq_len} if options.seq_len else {}
    said |= {"precision": options.precision} if options.precision else {}
    config = named_model(options.model, training=not options.inference, **said)
    if options.inference:
        config = replace(config, weight_dtype=config.compute_dtype)
    step, args = decoder_problem(config)
    pins = {field.name: getattr(strategy, field.name) for field in fields(Strategies)}
    made = plan(step, args, cluster=cluster, constraints=Constraints(pinned=pins))
    return made.check()


def _pin(text: str) -> tuple[str, int | bool | str]:
    name, _, value = text.partition("=")
    if not value:
        raise ValueError(f"--pin takes FIELD=VALUE, got {text!r}")
    if name == "sequence_parallel":
        if value.lower() not in ("true", "false"):
            raise ValueError(f"--pin sequence_parallel is true or false, got {value!r}")
        return name, value.lower() == "true"
    return name, int(value) if value.isdigit() else value


def _add_simulate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("simulate", help="cost a division that somebody else made")
    _add_problem(parser)
    for axis in reversed(AXES):
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"degree of the {axis} axis")
    parser.add_argument("--microbatches", type=int, default=1, help="of a step and a replica")
    parser.add_argument("--interleave", type=int, default=1, help="stretches of layers a stage")
    parser.add_argument("--zero", type=int, default=3, choices=(0, 1, 2, 3))
    parser.add_argument("--remat", default="none", choices=tuple(REMAT))
    parser.add_argument("--offload", default="none", choices=("none", "activations", "optimizer"))
    parser.set_defaults(run=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    program, cluster = _problem(options)
    names = (*AXES, "microbatches", "interleave", "zero", "remat", "offload")
    strategy = Strategy(**{name: getattr(options, name) for name in names})
    calibration = constants.load(options.calibration)
    (found,) = evaluate(program, [strategy], cluster, calibration=calibration)
    fits = found.memory_bytes <= cluster.memory_bytes
    if options.json:
        document = {"model": program.name, "cluster": cluster.name,
                    **report.candidate_json(found), "fits": fits,
                    "model_flops_utilisation": report.utilisation(program, cluster, found),
                    "warnings": list(cluster.warnings)}  # fmt: skip
        print(json.dumps(document, indent=1))
        return 0
    print(report.simulation_text(program, cluster, found))
    if not fits:
        print(f"  does not fit into {cluster.memory_bytes / 1e9:.1f} GB")
    return 0


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
    parser.add_argument("--without", action="append", default=[], metavar="TEXT",
                        help="leave out rows whose source starts so")  # fmt: skip
    parser.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    runs = [
        run
        for path in options.runs
        for run in read_runs(path)[0]
        if not run.source.startswith(tuple(options.without))
    ]
    if not any(run.measured_s for run in runs):
        raise ValueError(f"no row of {options.runs} has a measured quantity that could be read")
    about = {
        "runs": ", ".join(path.name for path in options.runs),
        "without": ", ".join(options.without) or "nothing",
        "rows": str(sum(run.measured_s is not None for run in runs)),
        "fit": f"{calibrate.__name__}: soft_l1 on log predicted/measured, priors at the defaults",
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


def _add_profile(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("profile", help="measure the devices that are here")
    parser.add_argument("--out", type=Path, required=True,
                        help="JSON file to write, which --cluster reads")  # fmt: skip
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of measuring")
    parser.set_defaults(run=_profile)


def _profile(options: argparse.Namespace) -> int:
    from sharding.machines.profiling import profile

    found = profile(budget_s=options.budget)
    options.out.write_text(found.to_json() + "\n")
    for name, value in found.measured.items():
        print(f"{name:10s} {value:.4g}{' s' if name.endswith('_s') else ' of the nominal figure'}")
    peaks = ", ".join(f"{n} {v / 1e12:.4g} TFLOP/s" for n, v in found.chip.peak_flops.items())
    print(f"{found.name}: {peaks}, memory {found.chip.hbm_bytes_per_s / 1e9:.4g} GB/s a chip")
    print(f"wrote {options.out}; plan with --cluster {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
