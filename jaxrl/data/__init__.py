"""Prompts, labelled answers and evaluators: the embedded world, files and the hub."""

from collections.abc import Callable, Mapping
from pathlib import Path

from jaxrl.data.dataset import (
    PARTS,
    ComplianceRow,
    LabelledResponse,
    Pair,
    Preferences,
    PromptRow,
    SafetyData,
)
from jaxrl.data.files import DataError, read_prompts, read_rows
from jaxrl.data.limits import cut_completion, fit_prompts
from jaxrl.data.preferences import Companions, load_preferences, load_xstest
from jaxrl.data.world import World, make_world

WORLDS: Mapping[str, Callable[[World], World]] = {
    "world": lambda world: world,
    "world_binary": World.with_binary_cost,
    "world_shuffled": World.with_shuffled_cost,
    "world_benign": lambda world: world.only("benign"),
}
"""The embedded world and its negative controls, by the name `load` knows them under."""


def load(
    source: str | Path,
    *,
    seed: int = 0,
    companions: Companions | None = None,
    needs_reward: bool = True,
) -> SafetyData:
    """Any data set of the safety experiments.

    Args:
      source: a name of `WORLDS`, a file of labelled pairs, or `hub:NAME[:SPLIT]`.
      seed: of the world, or of the splits.
      companions: see `load_preferences`; not for worlds.
      needs_reward: see `load_preferences`; not for worlds.

    Raises:
      FileNotFoundError: neither a world nor a file.
    """
    if str(source) in WORLDS:
        return WORLDS[str(source)](make_world(seed)).data()
    if not str(source).startswith("hub:") and not Path(source).exists():
        raise FileNotFoundError(
            f"no data at {source}: give one of {', '.join(WORLDS)}, a file of labelled pairs or "
            "hub:NAME[:SPLIT]"
        )
    return load_preferences(source, seed=seed, companions=companions, needs_reward=needs_reward)


__all__ = [
    "PARTS",
    "WORLDS",
    "Companions",
    "ComplianceRow",
    "DataError",
    "LabelledResponse",
    "Pair",
    "Preferences",
    "PromptRow",
    "SafetyData",
    "World",
    "cut_completion",
    "fit_prompts",
    "load",
    "load_preferences",
    "load_xstest",
    "make_world",
    "read_prompts",
    "read_rows",
]
