"""What does a version of the weights cost learner and actors, on a given link?

    python -m experiments.weight_sync
    python -m experiments.weight_sync --link 1gbit,20ms

Records consecutive versions of a small policy from this project's RePO training (float32 master
weights, Adam, low learning rates, bf16 actors) and brings them from a learner to an actor: all
weights (dense), as int32 indices and bf16 values (COO, what SparseRL-Sync ships), as int16 gaps
and entropy-coded values (which that paper models), and by `jaxrl.sync` (ours). Over links that are
emulated by waiting, and over TCP to another process on this machine. Every version is compared bit
for bit. SparseRL-Sync's cost model stands beside the measured points.

Two to three minutes on 2 quiet CPU cores, most of which is training. To expect at a learning rate
of 1e-6: about 180 times fewer bytes than dense and 7 times fewer than COO; a pause of a few
microseconds, since the next weights are built beside those that serve. Models of this size travel
in little more than the latency by any of the sparse ways, and ours takes the most CPU time, for
smaller payloads and for verifying every bit; bytes decide where models are large or links slow.
"""

import os
import platform
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from experiments import dry_run, harness
from experiments.delta_bench.pairs import Bits
from experiments.delta_bench.peers import COO, peers
from experiments.delta_bench.recorded import Recording, Versions, record
from experiments.harness import Report, Run, RunOptions
from experiments.safety.config import ModelConfig
from experiments.safety.sizes import sizes as sizes_of_safety
from experiments.sync_bench import figures, tables, transports
from experiments.sync_bench.contestants import Contestant, Dense, Measured, Ours, Peer
from jaxrl.sync import Link

_TIMED = 7  # versions that go over each link
_WARM = 2  # versions at first that are not counted: the whole weights, and compilation


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All of experiments.weight_sync."""

    link: str = "100mbit,50ms 1gbit,20ms 10gbit,1ms"
    """Emulated links as bandwidth,latency, separated by spaces."""
    copies: int = 8
    """The recorded weights are also sent so many times beside each other, as one larger model."""
    loopback: bool = True
    """Also over TCP to another process."""
    learning_rates: tuple[float, ...] = (3e-7, 1e-6, 3e-6)
    """Of the recorded training; the times are of the middle one."""
    recording: Recording = field(default_factory=lambda: Recording(sft_steps=100, warmup=12))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.links and not self.loopback:
            raise ValueError("there is nothing to measure; give --link or leave out --no-loopback")
        for link in self.links:
            Link.parse(link)
        if self.copies < 1:
            raise ValueError(f"copies must be 1 or greater, got {self.copies}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates must be above 0, got {self.learning_rates}")

    @property
    def links(self) -> tuple[str, ...]:
        """The emulated links, each as it was given."""
        return tuple(self.link.split())

    @property
    def reference_rate(self) -> float:
        """The learning rate whose versions are timed."""
        return sorted(self.learning_rates)[len(self.learning_rates) // 2]


_TINY = ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16)
PRESETS = {
    "quick": Config(),
    "tiny": Config(
        link="10gbit,1ms",
        copies=2,
        learning_rates=(1e-3,),
        recording=Recording(model=_TINY, sft_steps=2, warmup=1),
    ),
}


def experiment(run: Run) -> None:
    """Records, measures, reports."""
    config: Config = run.config
    (run.folder / "pairs").mkdir(exist_ok=True)
    with run.span("recording"):
        versions = record(run, config.recording, config.learning_rates, seed=config.seed)
    by_rate = {v.learning_rate: v for v in versions if v.squashed().changed}
    if config.reference_rate not in by_rate:
        raise ValueError(
            f"at learning rate {config.reference_rate:g} no bf16 weight changed; give higher "
            "--learning-rates"
        )
    summary: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "processor": platform.processor()},
        "reference_rate": f"{config.reference_rate:g}",
        "emulated": list(config.links),
        "step_s": step_seconds(run, config.reference_rate),
        "rates": {f"{rate:g}": sizes(v) for rate, v in by_rate.items()},
        "links": timings(run, by_rate[config.reference_rate], copies=1),
        "copies": config.copies,
        "larger": timings(run, by_rate[config.reference_rate], copies=config.copies),
    }
    shown = [tables.sizes(summary), tables.times(summary), tables.times_of_copies(summary)]
    shown.append(tables.models(summary, config.links or ("1gbit,20ms",)))
    report(summary, shown).write(run.folder / "report.html")
    run.finish(summary, "\n".join(table.text() for table in shown))


def step_seconds(run: Run, rate: float) -> float:
    """Median seconds of a training step; metrics stand in the run's folder, so also resumed."""
    stage = f"recorded_{rate:g}"
    at = [row["time_s"] for row in run.metrics.rows() if row["stage"] == stage]
    return statistics.median(np.diff(at)[1:].tolist())


def contestants(ends: transports.Ends, first: Bits) -> list[Contestant]:
    """All that are measured, on stores of one transport."""
    threads = os.cpu_count() or 1
    compressed = next(codec for codec in peers() if codec.name == "int16 gaps + coded values")
    learner, actor = ends
    return [
        Dense(*_below(learner, actor, "dense")),
        Peer("COO", COO, *_below(learner, actor, "coo"), threads),
        Peer("gaps + values", compressed, *_below(learner, actor, "compressed"), threads),
        Ours(learner, actor, first),
    ]


class _Below:
    """A store whose keys stand in a folder of another."""

    def __init__(self, store: Any, folder: str) -> None:
        self._store, self._folder = store, f"{folder}/"

    def put(self, key: str, data: bytes) -> None:
        self._store.put(self._folder + key, data)

    def get(self, key: str) -> bytes:
        return self._store.get(self._folder + key)

    def keys(self, prefix: str) -> list[str]:
        return [key.removeprefix(self._folder) for key in self._store.keys(self._folder + prefix)]

    def delete(self, key: str) -> None:
        self._store.delete(self._folder + key)


def _below(learner: Any, actor: Any, folder: str) -> tuple[_Below, _Below]:
    return _Below(learner, folder), _Below(actor, folder)


def sizes(versions: Versions) -> dict[str, Any]:
    """Bytes of a version at one learning rate, medians."""
    with transports.emulated(Link(bits_per_s=1e15)) as ends:
        found = _through(contestants(ends, versions.weights[0]), versions.weights)
    pairs = [versions.consecutive(i) for i in range(_WARM - 1, len(versions.weights) - 1)]
    return {
        "elements": pairs[0].elements,
        "dense_bytes": pairs[0].dense_bytes,
        "density": statistics.median(pair.density for pair in pairs),
        "sizes": {name: _median(list_, "size_bytes") for name, list_ in found.items()},
    }


def timings(run: Run, versions: Versions, *, copies: int) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of all that `Measured` holds, by link and contestant.

    Args:
      run: whose config names the links.
      versions: of the weights.
      copies: of all tensors beside each other, as one model.
    """
    config: Config = run.config
    weights = [repeated(version, copies) for version in versions.weights[:_TIMED]]
    ways: dict[str, AbstractContextManager[transports.Ends]] = {
        link: transports.emulated(Link.parse(link)) for link in config.links
    }
    if config.loopback:
        ways[transports.LOOPBACK] = transports.loopback()
    measured = {}
    with run.progress(f"{copies}× the weights", len(ways)) as bar, run.span("links"):
        for done, (link, way) in enumerate(ways.items(), 1):
            with way as ends:
                found = _through(contestants(ends, weights[0]), weights)
            measured[link] = {
                name: {key: _median(list_, key) for key in (*asdict(list_[0]), "total_s")}
                for name, list_ in found.items()
            }
            bar.update(done)
    return measured


def repeated(weights: Bits, copies: int) -> Bits:
    """A model of which every tensor is there several times, changes and all.

    The longest axis of each copy is in another order, the same in all versions: a general
    compressor would notice that they are copies.
    """
    larger = {}
    for i in range(copies):
        for name, x in weights.items():
            axis = int(np.argmax(x.shape))
            order = np.random.default_rng(i).permutation(x.shape[axis])
            larger[f"{i}/{name}"] = np.ascontiguousarray(x.take(order, axis))
    return larger


def _through(
    contestants: Sequence[Contestant], weights: Sequence[Bits]
) -> dict[str, list[Measured]]:
    """All versions by all contestants, interleaved; without the first ones."""
    found: dict[str, list[Measured]] = {contestant.name: [] for contestant in contestants}
    for index, new in enumerate(weights):
        for contestant in contestants:
            measured = contestant.sync(index, new)
            if index >= _WARM:
                found[contestant.name].append(measured)
    return found


def _median(measured: Sequence[Measured], key: str) -> float:
    return statistics.median(getattr(one, key) for one in measured)


def report(summary: dict[str, Any], shown: Sequence[harness.Table]) -> Report:
    """The page."""
    page = Report("Weights on their way to the actors", "python -m experiments.weight_sync")
    page.text((__doc__ or "").split("\n\n")[2])
    bytes_, times, copies, models = shown
    page.heading("Bytes").figure(
        figures.ratio_against_density(summary),
        "How many times smaller than all weights; lines are SparseRL-Sync's cost model.",
    )
    page.table(bytes_)
    page.heading("Seconds").figure(
        figures.seconds_by_link(summary),
        f"One version of the weights repeated {summary['copies']} times, from the learner to the "
        "actor. Only 'ours' counts versions and verifies what it has built.",
    )
    page.table(times).table(copies)
    page.text(
        "The pause of `ours` is an exchange of two references, for the price of a second copy of "
        "the weights: it is a matter of the protocol, not of the codec. The others rebuild while "
        "generation waits, as their systems do."
    )
    page.heading("Larger models").table(models)
    return page.record("Summary", summary)


def planned_sizes(config: Config) -> dry_run.Sizes:
    """Those of the recorded training, over the first of the links."""
    between = config.links[0] if config.links else ""
    return {
        **sizes_of_safety(config.recording.safety(config.reference_rate, config.seed)),
        "between": between,
    }


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m experiments.weight_sync`."""
    if dry_run.hand_over(Config, planned_sizes, presets=PRESETS, argv=argv):
        return
    config = harness.cli(
        Config, presets=PRESETS, argv=argv, prog="python -m experiments.weight_sync",
        description=__doc__,
    )  # fmt: skip
    harness.main(experiment, "weight_sync", config)


if __name__ == "__main__":
    main()
