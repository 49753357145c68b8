"""What came out: tables, plots, the report."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from experiments.asynchrony import figures, scenarios
from experiments.asynchrony.config import METHODS, TBA_SYNC_EVERY, AsynchronyConfig
from experiments.asynchrony.machine import machine_cores
from experiments.asynchrony.scenarios import ACTORS, TBA_SPEEDUP, Speedups
from experiments.asynchrony.simulator import Durations, Network, Outcome
from experiments.asynchrony.training import Trained
from experiments.harness import Report, Run, Table, to_json
from experiments.harness.pictures import save_png

FOURFOLD_ACTORS = (1, 2, 4, 16, 64)
QUIET = 0.1
"""Processors that others may use on a machine that counts as quiet."""
PICTURE = "asynchrony.png"

Trainings = Mapping[str, Sequence[Trained]]
"""By method, one for each seed."""
Outcomes = Mapping[str, Sequence[Outcome]]
"""What the model says of them, on this machine as it was then."""


def finish(run: Run, config: AsynchronyConfig, trained: Trainings) -> None:
    """Simulates, tabulates, draws, and writes it all."""
    outcomes: Outcomes = {
        name: [scenarios.this_machine(config, t) for t in each] for name, each in trained.items()
    }
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
        publishing_table(trained),
        speedup_table(config, curves),
    ]
    notes = findings(trained, outcomes, typical)
    overview = figures.overview(
        *_learning_curves(config, trained),
        before=first_of(trained).snapshots[0].sampled,
        speedups=curves,
        grid=grid,
        actors=FOURFOLD_ACTORS,
        here=typical.ratio,
    )
    seeds = f"seeds {config.seed} to {config.seed + config.seeds - 1}"
    report = Report(
        "What does asynchrony buy?",
        subtitle=f"{config.data}, {seeds if config.seeds > 1 else f'seed {config.seed}'}",
    )
    report.text("\n\n".join(notes)).table(tables[0])
    report.figure(
        overview,
        "Above: accuracy of sampled answers to held-out problems, at the temperature of the "
        "training; the thin line is the policy before RL. Below, every actor on a machine of its "
        f"own: simulated speed-up over one that alternates, on a link of {config.link} (thin "
        "lines: (G + T) / max(T, G/N)); and where the fourfold speed-up that TBA reports can come "
        "from (lines (1 + r) / max(1, r/N), dots simulated with the measured spread of durations).",
    )
    report.figure(
        figures.idle(
            {METHODS[m].title: _mean(t.learner_idle for t in each) for m, each in trained.items()},
            {METHODS[m].title: _mean(t.actor_idle for t in each) for m, each in trained.items()},
        ),
        "Time without work. A synchronous machine alternates: as an actor it is idle while it "
        "updates, as a learner while it generates.",
    )
    aged = {METHODS[m].title: ages(each) for m, each in trained.items() if each[0].staleness}
    if aged:
        report.figure(figures.staleness(aged), "How old what was trained on was.")
    report.heading("Measured and simulated on this machine")
    for table in tables[1:4]:
        report.table(table)
    report.figure(
        figures.agreement(
            {METHODS[m].title: _rate(each) for m, each in trained.items()},
            {METHODS[m].title: _rate(each) for m, each in outcomes.items()},
        ),
        f"Dots: measured. Bars: the discrete-event model with the durations of the parts alone, "
        f"on what was left of the {machine_cores()} cores that learner and actors share.",
    )
    report.heading("Many actors, each with a machine of its own").table(tables[4])
    report.record("Config", to_json(config, cosmetics=False))
    report.write(run.folder / "report.html")
    save_png(overview, run.folder / PICTURE)
    run.finish(
        {
            "cores": machine_cores(),
            "methods": {name: [t.to_json() for t in each] for name, each in trained.items()},
            "simulated": {name: [asdict(o) for o in each] for name, each in outcomes.items()},
            "speedups": {name: asdict(curve) for name, curve in curves.items()},
            "fourfold": {str(ratio): asdict(curve) for ratio, curve in grid.items()},
            "findings": notes,
        },
        "\n".join([*(table.text() for table in tables), *(f"- {note}" for note in notes)]),
    )


def first_of(trained: Trainings) -> Trained:
    return next(iter(trained.values()))[0]


def typical_durations(trained: Trainings) -> Durations:
    """Of the method with the most actors: what asynchronous training costs."""
    return trained[max(trained, key=lambda name: METHODS[name].actors)][0].durations


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


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _rate(each: Sequence[Trained] | Sequence[Outcome]) -> float:
    return _mean(one.updates_per_s for one in each)


def cell(each: Sequence[Trained], value: Callable[[Trained], float | None]) -> float | str | None:
    """A number of a method: the mean over its seeds, with the standard error where there are more.

    >>> cell([], lambda t: 1.0) is None
    True
    """
    found = [v for t in each if (v := value(t)) is not None]
    if len(found) < len(each) or not found:
        return None  # not with every seed
    if len(found) == 1:
        return found[0]
    error = float(np.std(found, ddof=1)) / len(found) ** 0.5
    digits = 3 if max(map(abs, found)) < 10 else 1
    return f"{np.mean(found):.{digits}f} ± {error:.{digits}f}"


def ages(each: Sequence[Trained]) -> dict[int, float]:
    """Share of the trained tokens by age, over all seeds."""
    return {
        age: _mean(t.staleness.get(age, 0.0) for t in each)
        for age in sorted({age for t in each for age in t.staleness})
    }


def _learning_curves(
    config: AsynchronyConfig, trained: Trainings
) -> tuple[dict[str, figures.Curve], dict[str, figures.Curve]]:
    batch = config.prompts_per_step * config.group_size
    by_clock: dict[str, figures.Curve] = {}
    by_samples: dict[str, figures.Curve] = {}
    for name, each in trained.items():
        together = list(zip(*(t.snapshots for t in each), strict=True))
        accuracy = [_mean(s.sampled for s in at) for at in together]
        title = METHODS[name].title
        by_clock[title] = [_mean(s.elapsed_s for s in at) for at in together], accuracy
        by_samples[title] = [at[0].step * batch / 1000 for at in together], accuracy
    return by_clock, by_samples


def common_level(trained: Trainings) -> float:
    """The highest accuracy of samples that every training has reached."""
    return min(max(s.sampled for s in t.snapshots) for each in trained.values() for t in each)


def seconds_to(trained: Trained, level: float) -> float | None:
    """When a training's accuracy of samples first reached a level, between snapshots linearly."""
    snapshots = trained.snapshots
    if snapshots[0].sampled >= level:
        return 0.0
    for before, after in itertools.pairwise(snapshots):
        if after.sampled >= level:
            share = (level - before.sampled) / (after.sampled - before.sampled)
            return before.elapsed_s + share * (after.elapsed_s - before.elapsed_s)
    return None


def method_table(config: AsynchronyConfig, trained: Trainings) -> Table:
    level = common_level(trained)
    batch = config.prompts_per_step * config.group_size
    rows = tuple(
        (
            METHODS[name].title,
            cell(each, lambda t: t.snapshots[-1].greedy),
            cell(each, lambda t: t.snapshots[-1].sampled),
            cell(each, lambda t: t.elapsed_s),
            cell(each, lambda t: seconds_to(t, level)),
            cell(each, lambda t: t.updates_per_s),
            cell(each, lambda t: t.items_per_s * batch),
            cell(each, lambda t: t.learner_idle),
            cell(each, lambda t: t.actor_idle),
            cell(each, lambda t: mean_age(t.staleness)),
        )
        for name, each in trained.items()
    )
    before = first_of(trained).snapshots[0]
    several = f"; mean ± standard error over {config.seeds} seeds" if config.seeds > 1 else ""
    return Table(
        columns=(
            "", "greedy", "sampled", "seconds", f"s to {level:.2f}", "updates/s", "written/s",
            "learner idle", "actors idle", "staleness",
        ),
        rows=rows,
        caption=f"{config.steps} updates of {batch} completions from one SFT policy "
        f"(greedy {before.greedy:.3f}, sampled {before.sampled:.3f}); accuracy on "
        f"{config.heldout_problems} held-out problems; {machine_cores()} CPU cores{several}.",
    )  # fmt: skip


def mean_age(shares: Mapping[int, float]) -> float | None:
    """Mean staleness of trained tokens, in versions; None for synchronous training."""
    return sum(age * share for age, share in shares.items()) if shares else None


def agreement_table(trained: Trainings, outcomes: Outcomes) -> Table:
    rows = []
    for name, each in trained.items():
        updates, items = _rate(each), _mean(t.items_per_s for t in each)
        simulated = _rate(outcomes[name]), _mean(o.items_per_s for o in outcomes[name])
        rows.append(
            (
                METHODS[name].title,
                updates,
                simulated[0],
                _percent(simulated[0], updates),
                items,
                simulated[1],
                _percent(simulated[1], items),
                _mean(t.left_cores for t in each),
                _mean(t.usable_cores for t in each),
            )
        )
    return Table(
        columns=(
            "", "updates/s", "simulated", "off", "batches written/s", "simulated", "off",
            "cores left", "usable",
        ),
        rows=tuple(rows),
        caption=f"Throughput, measured and simulated. Of the machine's {machine_cores()} cores "
        "others left so many during the training, and all threads together can keep so many busy.",
    )  # fmt: skip


def _percent(found: float, truth: float) -> str:
    return f"{found / truth - 1:+.0%}"


def parts_table(trained: Trainings) -> Table:
    rows = []
    for name, each in trained.items():
        d = each[0].durations
        asynchronous = METHODS[name].actors > 0
        rows.append(
            (
                METHODS[name].title,
                1e3 * d.rollout.mean_s,
                d.rollout.cores,
                1e3 * d.update.mean_s,
                d.update.cores,
                d.ratio,
                1e3 * d.publish.mean_s if asynchronous else None,
                1e3 * d.prepare.mean_s if asynchronous else None,
                1e3 * d.flip.mean_s if asynchronous else None,
                d.payload_bytes / 1e3 if asynchronous else None,
            )
        )
    return Table(
        columns=(
            "", "G ms", "cores", "T ms", "cores", "G/T", "publish ms", "prepare ms", "flip ms",
            "version kB",
        ),
        rows=tuple(rows),
        caption="The parts alone, from their processor seconds, as they take on a quiet machine: "
        "generation with scoring (G) and update (T) of one batch, with the cores each keeps busy; "
        "weights at the learner and at an actor.",
    )  # fmt: skip


def publishing_table(trained: Trainings) -> Table:
    """What publications cost the learner, and what they would if it waited for them."""
    rows = []
    for name, each in trained.items():
        method, d = METHODS[name], each[0].durations
        if not method.actors:
            continue
        period = method.sync_every * d.update.mean_s
        waiting = d.publish.mean_s / (period + d.publish.mean_s)
        beside = _mean(t.publishing or 0.0 for t in each)
        rows.append((method.title, f"{waiting:.1%}", f"{beside:.1%}", waiting / max(beside, 1e-4)))
    return Table(
        columns=("", "waiting for it", "beside the updates", "times less"),
        rows=tuple(rows),
        caption="Share of the learner's time that publications take: publication and update one "
        "after the other, from the parts alone; and as it was.",
    )


def speedup_table(config: AsynchronyConfig, curves: Mapping[str, Speedups]) -> Table:
    shown = [i for i, n in enumerate(ACTORS) if n in (1, 2, 4, 8, 16, 64, 256, 1024)]
    return Table(
        columns=("", *(f"{ACTORS[i]:,}" for i in shown)),
        rows=tuple((name, *(curve.speedups[i] for i in shown)) for name, curve in curves.items()),
        caption="Simulated speed-up by number of actors, every completion trained on once; "
        f"link {config.link}.",
    )


def findings(trained: Trainings, outcomes: Outcomes, durations: Durations) -> list[str]:
    """What the numbers say, as sentences."""
    off = [abs(_rate(outcomes[name]) / _rate(each) - 1) for name, each in trained.items()]
    notes = []
    alone = [name for name in trained if not METHODS[name].actors]
    apart = [name for name in trained if METHODS[name].actors]
    if alone and apart:
        fastest, best = (max(names, key=lambda n: _rate(trained[n])) for names in (alone, apart))
        notes.append(
            f"On {machine_cores()} shared cores {METHODS[best].title} does "
            f"{_rate(trained[best]) / _rate(trained[fastest]):.2f} times the updates a second of "
            f"{METHODS[fastest].title}, the fastest synchronous method."
        )
    left = [t.left_cores for each in trained.values() for t in each]
    if min(left) < machine_cores() - QUIET:
        notes.append(
            f"The machine was not quiet: others left {min(left):.2f} to {max(left):.2f} of its "
            f"{machine_cores()} cores."
        )
    notes += [
        f"Simulated updates a second are {np.median(off):.0%} off the measured ones in the median, "
        f"{max(off):.0%} at worst.",
        f"With a machine for every actor the durations of this run (G/T = {durations.ratio:.2f}) "
        f"allow at most 1 + G/T = {1 + durations.ratio:.2f} times the speed of alternating, "
        "however many actors there are.",
        f"{TBA_SPEEDUP:g} times faster takes G/T ≥ {TBA_SPEEDUP - 1:g} and at least "
        f"{TBA_SPEEDUP:g}·r/(1 + r) actors of r = G/T: 3 at r = 3, and never more than 4.",
    ]
    return notes
