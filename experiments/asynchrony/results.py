"""What came out: tables, plots, the report."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from experiments.asynchrony import figures, scenarios
from experiments.asynchrony.calibration import machine_cores
from experiments.asynchrony.config import METHODS, TBA_SYNC_EVERY, AsynchronyConfig
from experiments.asynchrony.scenarios import ACTORS, TBA_SPEEDUP, Speedups
from experiments.asynchrony.simulator import Durations, Network, Outcome
from experiments.asynchrony.training import Trained
from experiments.harness import Report, Run, Table, to_json

FOURFOLD_ACTORS = (1, 2, 4, 16, 64)
QUIET = 0.8
"""Share of the cores that a process which wants all of them gets on a quiet machine, or more."""


def finish(run: Run, config: AsynchronyConfig, trained: Sequence[Trained]) -> None:
    """Simulates, tabulates, draws, and writes it all."""
    outcomes = {t.method: scenarios.this_machine(config, t) for t in trained}
    typical = typical_durations(trained)
    curves = speedup_curves(config, typical)
    grid = scenarios.fourfold(
        typical,
        actors=FOURFOLD_ACTORS,
        updates=config.simulated_updates,
        sync_every=TBA_SYNC_EVERY,
        seed=config.seed,
    )
    tables = [
        method_table(config, trained),
        agreement_table(trained, outcomes),
        parts_table(trained),
        speedup_table(config, curves),
    ]
    notes = findings(config, trained, outcomes, typical)
    report = Report("What does asynchrony buy?", subtitle=f"{config.data}, seed {config.seed}")
    report.text("\n\n".join(notes)).table(tables[0])
    report.figure(
        figures.learning(*_learning_curves(config, trained), trained[0].snapshots[0].sampled),
        "Accuracy of sampled answers to held-out problems, at the temperature of the training. "
        "The thin line is the policy before RL.",
    )
    report.figure(
        figures.idle(
            {METHODS[t.method].title: t.learner_idle for t in trained},
            {METHODS[t.method].title: t.actor_idle for t in trained},
        ),
        "Time without work. A synchronous machine alternates: as an actor it is idle while it "
        "updates, as a learner while it generates.",
    )
    aged = {METHODS[t.method].title: t.staleness for t in trained if t.staleness}
    if aged:
        report.figure(figures.staleness(aged), "How old what was trained on was.")
    report.heading("Measured and simulated on this machine").table(tables[1]).table(tables[2])
    report.figure(
        figures.agreement(
            {METHODS[t.method].title: t.updates_per_s for t in trained},
            {METHODS[t.method].title: outcomes[t.method].updates_per_s for t in trained},
        ),
        f"Dots: measured. Bars: the discrete-event model with the durations of the parts alone, "
        f"on {machine_cores()} cores that learner and actors share.",
    )
    report.heading("Many actors, each with a machine of its own").table(tables[3])
    report.figure(
        figures.many_actors(curves),
        "Simulated speed-up over one machine that alternates between generation and training, on "
        f"a link of {config.link}; thin lines are (G + T) / max(T, G/N).",
    )
    report.figure(
        figures.fourfold(grid, FOURFOLD_ACTORS, here=typical.ratio),
        "Where the fourfold speed-up that TBA reports can come from: lines (1 + r) / max(1, r/N), "
        "dots simulated with the measured spread of durations and the measured publications, which "
        "the lines leave out.",
    )
    report.record("Config", to_json(config, cosmetics=False))
    report.write(run.folder / "report.html")
    run.finish(
        {
            "cores": machine_cores(),
            "methods": {t.method: t.to_json() for t in trained},
            "simulated": {name: asdict(outcome) for name, outcome in outcomes.items()},
            "speedups": {name: asdict(curve) for name, curve in curves.items()},
            "fourfold": {str(ratio): asdict(curve) for ratio, curve in grid.items()},
            "findings": notes,
        },
        "\n".join([*(table.text() for table in tables), *(f"- {note}" for note in notes)]),
    )


def typical_durations(trained: Sequence[Trained]) -> Durations:
    """Of the method with the most actors: what asynchronous training costs."""
    return max(trained, key=lambda t: METHODS[t.method].actors).durations


def speedup_curves(config: AsynchronyConfig, durations: Durations) -> dict[str, Speedups]:
    """By actors: the durations of this run, and the same with a longer generation."""
    updates, link = config.simulated_updates, scenarios.network_of(config.link)

    def curve(ratio: float, network: Network) -> Speedups:
        return scenarios.many_actors(
            scenarios.at_ratio(durations, ratio),
            network,
            updates=updates,
            sync_every=TBA_SYNC_EVERY,
            seed=config.seed,
        )

    measured = durations.ratio
    curves = {
        f"G/T = {measured:.2f}, free link": curve(measured, Network()),
        f"G/T = {measured:.2f}, as measured": curve(measured, link),
    }
    return curves | {f"G/T = {r:g}": curve(r, link) for r in (3.0, 10.0, 100.0)}


def _learning_curves(
    config: AsynchronyConfig, trained: Sequence[Trained]
) -> tuple[dict[str, figures.Curve], dict[str, figures.Curve]]:
    batch = config.prompts_per_step * config.group_size
    by_clock: dict[str, figures.Curve] = {}
    by_samples: dict[str, figures.Curve] = {}
    for t in trained:
        title, accuracy = METHODS[t.method].title, [s.sampled for s in t.snapshots]
        by_clock[title] = [s.elapsed_s for s in t.snapshots], accuracy
        by_samples[title] = [s.step * batch / 1000 for s in t.snapshots], accuracy
    return by_clock, by_samples


def common_level(trained: Sequence[Trained]) -> float:
    """The highest accuracy of samples that every method has reached."""
    return min(max(s.sampled for s in t.snapshots) for t in trained)


def seconds_to(trained: Trained, level: float) -> float | None:
    """When a method's accuracy of samples first reached a level, between snapshots linearly."""
    snapshots = trained.snapshots
    if snapshots[0].sampled >= level:
        return 0.0
    for before, after in itertools.pairwise(snapshots):
        if after.sampled >= level:
            share = (level - before.sampled) / (after.sampled - before.sampled)
            return before.elapsed_s + share * (after.elapsed_s - before.elapsed_s)
    return None


def method_table(config: AsynchronyConfig, trained: Sequence[Trained]) -> Table:
    level = common_level(trained)
    batch = config.prompts_per_step * config.group_size
    rows = tuple(
        (
            METHODS[t.method].title,
            t.snapshots[-1].greedy,
            t.snapshots[-1].sampled,
            t.elapsed_s,
            seconds_to(t, level),
            t.updates_per_s,
            t.items_per_s * batch,
            t.learner_idle,
            t.actor_idle,
            mean_age(t.staleness),
        )
        for t in trained
    )
    before = trained[0].snapshots[0]
    return Table(
        columns=(
            "", "greedy", "sampled", "seconds", f"s to {level:.2f}", "updates/s", "written/s",
            "learner idle", "actors idle", "staleness",
        ),
        rows=rows,
        caption=f"{config.steps} updates of {batch} completions from one SFT policy "
        f"(greedy {before.greedy:.3f}, sampled {before.sampled:.3f}); accuracy on "
        f"{config.heldout_problems} held-out problems; {machine_cores()} CPU cores.",
    )  # fmt: skip


def mean_age(shares: Mapping[int, float]) -> float | None:
    """Mean staleness of trained tokens, in versions; None for synchronous training."""
    return sum(age * share for age, share in shares.items()) if shares else None


def agreement_table(trained: Sequence[Trained], outcomes: Mapping[str, Outcome]) -> Table:
    rows = []
    for t in trained:
        found = outcomes[t.method]
        rows.append(
            (
                METHODS[t.method].title,
                t.updates_per_s,
                found.updates_per_s,
                _percent(found.updates_per_s, t.updates_per_s),
                t.items_per_s,
                found.items_per_s,
                _percent(found.items_per_s, t.items_per_s),
            )
        )
    return Table(
        columns=(
            "", "updates/s", "simulated", "off", "batches written/s", "simulated", "off",
        ),
        rows=tuple(rows),
        caption=f"Throughput, measured and simulated on {machine_cores()} shared cores.",
    )  # fmt: skip


def _percent(found: float, truth: float) -> str:
    return f"{found / truth - 1:+.0%}"


def parts_table(trained: Sequence[Trained]) -> Table:
    rows = []
    for t in trained:
        d = t.durations
        asynchronous = METHODS[t.method].actors > 0
        rows.append(
            (
                METHODS[t.method].title,
                1e3 * d.rollout.mean_s,
                d.rollout.cores,
                1e3 * d.update.mean_s,
                d.update.cores,
                d.ratio,
                1e3 * d.publish.mean_s if asynchronous else None,
                1e3 * d.prepare.mean_s if asynchronous else None,
                1e3 * d.flip.mean_s if asynchronous else None,
                d.payload_bytes / 1e3 if asynchronous else None,
                t.available_cores if asynchronous else None,
            )
        )
    return Table(
        columns=(
            "", "G ms", "cores", "T ms", "cores", "G/T", "publish ms", "prepare ms", "flip ms",
            "version kB", "cores in all",
        ),
        rows=tuple(rows),
        caption="The parts alone: generation with scoring (G) and update (T) of one batch, with "
        "the cores each keeps busy; weights at the learner and at an actor; the cores that all "
        "threads together can keep busy.",
    )  # fmt: skip


def speedup_table(config: AsynchronyConfig, curves: Mapping[str, Speedups]) -> Table:
    shown = [i for i, n in enumerate(ACTORS) if n in (1, 2, 4, 8, 16, 64, 256, 1024)]
    return Table(
        columns=("", *(f"{ACTORS[i]:,}" for i in shown)),
        rows=tuple((name, *(curve.speedups[i] for i in shown)) for name, curve in curves.items()),
        caption="Simulated speed-up by number of actors, every completion trained on once; "
        f"link {config.link}.",
    )


def findings(
    config: AsynchronyConfig,
    trained: Sequence[Trained],
    outcomes: Mapping[str, Outcome],
    durations: Durations,
) -> list[str]:
    """What the numbers say, as sentences."""
    off = [abs(outcomes[t.method].updates_per_s / t.updates_per_s - 1) for t in trained]
    notes = []
    alone = [t for t in trained if not METHODS[t.method].actors]
    apart = [t for t in trained if METHODS[t.method].actors]
    if alone and apart:
        fastest = max(alone, key=lambda t: t.updates_per_s)
        best = max(apart, key=lambda t: t.updates_per_s)
        notes.append(
            f"On {machine_cores()} shared cores {METHODS[best.method].title} does "
            f"{best.updates_per_s / fastest.updates_per_s:.2f} times the updates a second of "
            f"{METHODS[fastest.method].title}, the fastest synchronous method."
        )
    got = [t.available_cores for t in apart]
    if got and min(got) < QUIET * machine_cores():
        notes.append(
            f"The machine was not quiet: all threads together got {min(got):.2f} to "
            f"{max(got):.2f} of its {machine_cores()} cores, and less or more from minute to "
            "minute, which no model of this run can know."
        )
    notes += [
        f"Simulated updates a second are {np.median(off):.0%} off the measured ones in the median, "
        f"{max(off):.0%} at worst.",
        f"With a machine for every actor the durations of this run (G/T = {durations.ratio:.2f}) "
        f"allow at most 1 + G/T = {1 + durations.ratio:.2f} times the speed of alternating, "
        "however many actors there are.",
        f"{TBA_SPEEDUP:g} times faster takes G/T ≥ {TBA_SPEEDUP - 1:g} and at least "
        f"{TBA_SPEEDUP:g}·r/(1 + r) actors of r = G/T: 3 at r = 3, and never more than 4.",
        f"With publications as measured here, every {TBA_SYNC_EVERY} updates, it takes G/T ≥ "
        f"{scenarios.ratio_for(TBA_SPEEDUP, durations, sync_every=TBA_SYNC_EVERY):.1f}.",
    ]
    return notes
