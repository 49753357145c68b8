"""`--dry-run CLUSTER` of other experiments: the same command with their sizes."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from experiments import harness
from experiments.dry_run.config import DryRunConfig
from experiments.dry_run.running import main
from experiments.harness.config import flag_names
from jaxrl.models import DecoderConfig

FLAG = "--dry-run"
Config = TypeVar("Config")
Sizes = Mapping[str, object]
"""Fields of `DryRunConfig` that an experiment decides, and its own decoder under "own"."""


def hand_over(
    config_type: type[Config],
    sizes: Callable[[Config], Sizes],
    *,
    presets: Mapping[str, Config] | None = None,
    argv: Sequence[str] | None = None,
) -> bool:
    """Does what `--dry-run CLUSTER` of another experiment asks for.

    Flags that the experiment has are read as its own, and decide what is planned; others, such as
    `--model llama3-8b` or `--no-compile`, are those of `python -m experiments.dry_run`.

    Args:
      config_type: of the experiment.
      sizes: from its config to what is planned.
      presets: of the experiment.
      argv: its arguments; those of this process where None.

    Returns:
      Whether there was such a flag.

    Raises:
      SystemExit: with status 1 where it does not fit, with 2 where a flag is wrong.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if FLAG not in given:
        return False
    own, others = _parted(given, {"--preset", *flag_names(config_type)})
    config = harness.cli(config_type, presets=presets, argv=own)
    return hand_over_sizes(sizes(config), others)


def hand_over_sizes(sizes: Sizes, argv: Sequence[str]) -> bool:
    """`hand_over` of an experiment whose sizes are known; all other flags are the dry run's.

    Args:
      sizes: what is planned, where `argv` does not say otherwise.
      argv: arguments.

    Returns:
      Whether `--dry-run` was among them.

    Raises:
      SystemExit: as of `hand_over`.
    """
    given = list(argv)
    if FLAG not in given:
        return False
    at = given.index(FLAG)
    if at + 1 == len(given) or given[at + 1].startswith("--"):
        print(f"error: {FLAG} needs a cluster, such as v5p:4x4x4", file=sys.stderr)
        raise SystemExit(2)
    decided = dict(sizes)
    decoder = decided.pop("own", None)
    assert decoder is None or isinstance(decoder, DecoderConfig)
    flags = [part for name, value in decided.items() for part in flag(name, value)]
    main(["--cluster", given[at + 1], *flags, *given[:at], *given[at + 2 :]], own=decoder)
    return True


def flag(name: str, value: object) -> tuple[str, str]:
    """A field of `DryRunConfig` as an argument and its value."""
    assert name in DryRunConfig.__dataclass_fields__, name
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"--{name.replace('_', '-')}", text


def _parted(given: Sequence[str], known: set[str]) -> tuple[list[str], list[str]]:
    """Arguments that are flags of an experiment, with their values, and the others."""
    dry = {FLAG, *flag_names(DryRunConfig)} - known
    dry |= {f"--no-{name[2:]}" for name in dry}
    own: list[str] = []
    others: list[str] = []
    place = own
    for arg in given:
        if arg.startswith("--"):
            name = arg.split("=", 1)[0].replace("_", "-")
            place = others if name in dry else own
        place.append(arg)
    return own, others
