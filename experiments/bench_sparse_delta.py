"""How small and how fast is a sparse delta of bf16 weights, against the limits and the peers?

    python -m experiments.bench_sparse_delta

Encodes pairs of weights with this project's codec and with what others ship, each implemented
from its published layout, checks every round trip bit for bit, and sets the sizes against the
entropies of the same data. Pairs are synthetic, of given densities, and recorded from this
project's own RePO training at several learning rates. Speeds are measured in one process,
interleaved, with 1 and 2 threads.

About 5 minutes on 2 CPU cores, of which recording takes 2. To expect: at 0.62 % changed at most
8.5 bits a change (300 times smaller than dense), within 10 % of the conditional limit at 1 % and
5 %, and 3 times the speed of dense XOR + zstd-1 at half its size or less.

    python -m experiments.bench_sparse_delta --device

checks and times the kernels of the accelerator that is there, and nothing else.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from experiments import harness
from experiments.delta_bench import cold, device, figures, tables
from experiments.delta_bench.codec import Codec
from experiments.delta_bench.limits import limits
from experiments.delta_bench.measure import FLOOR, Size, floor, speeds
from experiments.delta_bench.ours import NAME, UNKNOWN, anatomy, anchor_sizes, ours, squash_sizes
from experiments.delta_bench.pairs import Pair
from experiments.delta_bench.peers import DENSE_XOR, peers
from experiments.delta_bench.recorded import Recording, Versions, record
from experiments.delta_bench.synthetic import Simulation, pair_path, synthetic_pairs
from experiments.delta_bench.targets import notes, targets
from experiments.delta_bench.traffic import traffic, traffic_by_model
from experiments.harness import Run
from experiments.harness.report import Report
from experiments.harness.tables import Table


@dataclass(frozen=True, kw_only=True)
class BenchConfig(harness.RunOptions):
    """What is measured."""

    densities: tuple[float, ...] = (0.001, 0.0062, 0.01, 0.05, 0.3, 1.0)
    """Shares of changed elements of the synthetic pairs."""
    learning_rates: tuple[float, ...] = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5)
    """Of the recorded training runs."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of threads that are timed; the first must be 1."""
    rounds: int = 9
    """Timed rounds; each contestant encodes and applies once in each."""
    device: bool = False
    """Check and time the kernels on this machine's accelerator instead."""
    tiny: bool = False
    """With --device: small sizes, on a CPU in interpret mode."""
    simulation: Simulation = field(default_factory=Simulation)
    recording: Recording = field(default_factory=Recording)

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [d for d in self.densities if not 0 < d <= 1]
        if wrong or not self.densities:
            raise ValueError(f"densities must be above 0 and at most 1, at least one: {wrong=}")
        if any(rate <= 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates must be above 0, got {self.learning_rates}")
        if self.tiny and not self.device:
            raise ValueError("tiny is a size of --device alone; add --device or leave out --tiny")
        if self.rounds < 1 or self.threads[:1] != (1,) or any(t < 1 for t in self.threads):
            raise ValueError(
                f"rounds must be ≥ 1, threads begin with 1: {self.rounds=}, {self.threads=}"
            )


def experiment(run: Run) -> None:
    """Measures and reports."""
    if run.config.device:
        run.finish(device.run(run.folder, tiny=run.config.tiny), "")
        return
    synthetic, versions = pairs_of(run)
    codecs = [*ours(), *peers()]
    # What both ends know beforehand changes their speed alone.
    pairs = sizes(run, [c for c in codecs if c.name != UNKNOWN], synthetic, versions)
    summary: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "processor": platform.processor()},
        "pairs": pairs,
        "speeds": timings(run, [*codecs, floor()], synthetic),
        "catch_up": catch_up(versions, pairs),
        "cold": first_calls(run),
        "traffic": traffic(),
        "traffic_by_model": traffic_by_model(),
        "took_s": dict(run.timeline.totals_s),
    }
    summary["targets"] = targets(summary, NAME)
    shown = all_tables(summary)
    report(summary, shown).write(run.folder / "report.html")
    prose = notes(summary, NAME)
    text = [
        part
        for heading, group in shown.items()
        for part in (*(table.text() for table in group), prose.get(heading, "").lstrip())
    ]
    run.finish(summary, "\n".join(filter(None, text)))


def pairs_of(run: Run) -> tuple[list[Pair], list[Versions]]:
    """Synthetic pairs and recorded versions; made once, then read from the run's folder."""
    config: BenchConfig = run.config
    folder = run.folder / "pairs"
    folder.mkdir(exist_ok=True)
    with run.span("synthetic pairs"):
        synthetic = synthetic_pairs(folder, config.simulation, config.densities, seed=config.seed)
    with run.span("recording"):
        versions = record(run, config.recording, config.learning_rates, seed=config.seed)
    return synthetic, versions


def sizes(
    run: Run, codecs: Sequence[Codec], synthetic: Sequence[Pair], versions: Sequence[Versions]
) -> dict[str, dict[str, Any]]:
    """Limits and sizes of every pair; every payload is applied and compared."""
    work = [("synthetic", pair) for pair in synthetic]
    work += [("recorded", v.consecutive()) for v in versions]
    work += [("squashed", v.squashed()) for v in versions]
    found = {}
    with run.progress("sizes", len(work)) as bar, run.span("sizes"):
        for done, (source, pair) in enumerate(work, 1):
            if not pair.changed:
                run.note(f"{pair.name}: no bf16 weight changed, so there is nothing to weigh")
                continue
            limit = limits(pair)
            found[pair.name] = {
                "source": source,
                "elements": pair.elements,
                "changed": pair.changed,
                "density": pair.density,
                "limits": asdict(limit),
                "anatomy": anatomy(pair),
                "anchor": anchor_sizes(pair),
                "sizes": {c.name: asdict(Size.of(c.payload(pair), pair, limit)) for c in codecs},
            }
            bar.update(done)
    return found


def timings(run: Run, codecs: Sequence[Codec], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Speeds on every synthetic pair, by threads."""
    config: BenchConfig = run.config
    found: dict[str, Any] = {pair.name: {} for pair in pairs}
    with run.progress("speeds", len(pairs)) as bar, run.span("speeds"):
        for done, pair in enumerate(pairs, 1):
            for threads in config.threads:
                measured = speeds(
                    codecs, pair, baseline=DENSE_XOR.name, rounds=config.rounds, threads=threads
                )
                found[pair.name][str(threads)] = {k: asdict(v) for k, v in measured.items()}
            bar.update(done)
    return found


def catch_up(versions: Sequence[Versions], pairs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Several versions at once, against one and against all in turn; sizes and densities."""
    found = {}
    for recorded in versions:
        if recorded.consecutive().name not in pairs:
            continue
        one, all_ = (pairs[p.name] for p in (recorded.consecutive(), recorded.squashed()))
        bits = [p["changed"] * p["limits"]["given_exponent"] for p in (one, all_)]
        found[recorded.consecutive().name] = squash_sizes(recorded) | {
            "density_one": one["density"],
            "density_all": all_["density"],
            "growth": all_["density"] / one["density"],
            "limit_growth": bits[1] / bits[0],
        }
    return found


def first_calls(run: Run) -> dict[str, dict[str, float]]:
    """Seconds of a process's first calls, on the pair nearest to 1 %."""
    config: BenchConfig = run.config
    density = min(config.densities, key=lambda d: abs(d - 0.01))
    with run.span("cold"):
        return cold.cold_and_cached(pair_path(run.folder / "pairs", density))


def all_tables(summary: Mapping[str, Any]) -> dict[str, list[Table]]:
    """Every table, by the heading that it stands under."""
    timed = tables.nearest(summary, 0.01)
    return {
        "Wanted and reached": [tables.targets(summary)],
        "Size": [
            tables.synthetic(summary),
            tables.recorded(summary),
            tables.excess(summary, NAME),
            tables.anatomy(summary, NAME),
        ],
        "Speed": [
            tables.speed(summary, timed),
            tables.speed_by_density(summary, "encode"),
            tables.speed_by_density(summary, "apply"),
            tables.cold(summary),
        ],
        "Catching up": [tables.catch_up(summary)],
        "Accelerators": [tables.traffic(summary), tables.traffic_by_model(summary)],
    }


def report(summary: Mapping[str, Any], shown: Mapping[str, Sequence[Table]]) -> Report:
    """The page."""
    page = Report("Sparse deltas of bf16 weights", "python -m experiments.bench_sparse_delta")
    page.text((__doc__ or "").split("\n\n")[2])
    for heading, group in shown.items():
        page.heading(heading)
        for figure, caption in plots(summary).get(heading, ()):
            page.figure(figure, caption)
        for table in group:
            page.table(table)
        page.text(notes(summary, NAME).get(heading, ""))
    return page.record("Summary", summary)


def plots(summary: Mapping[str, Any]) -> dict[str, list[tuple[Any, str]]]:
    """The figures with their captions, by the heading that they stand under."""
    timed = tables.nearest(summary, 0.01)
    pair, speed = summary["pairs"][timed], summary["speeds"][timed]["1"]
    order = list(pair["sizes"])
    bits = {name: size["bits"] for name, size in pair["sizes"].items()}
    sources = {"synthetic pairs": "synthetic", "recorded RePO training": "recorded"}
    size = figures.bits_against_density(
        {title: tables.curves(summary, source) for title, source in sources.items()},
        {title: tables.limit_curves(summary, source) for title, source in sources.items()},
        order,
    )
    where = figures.size_against_speed(
        *({n: (speed[n][what], bits[n]) for n in order} for what in ("encode", "apply")),
        floors=(speed[FLOOR]["encode"], speed[FLOOR]["apply"]),
        limit=pair["limits"]["given_exponent"],
        order=order,
    )
    share = tables.density_text(pair["density"])
    return {
        "Size": [(size, "Bits per changed element, headers included; lower is better.")],
        "Speed": [(where, f"Size against speed at {share} changed; down and right is better.")],
    }


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m experiments.bench_sparse_delta`."""
    config = harness.cli(
        BenchConfig, argv=argv, prog="python -m experiments.bench_sparse_delta",
        description=__doc__,
    )  # fmt: skip
    harness.main(experiment, "bench_sparse_delta", config)


if __name__ == "__main__":
    main()
