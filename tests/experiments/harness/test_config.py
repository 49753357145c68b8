"""The command line and the JSON form of configs."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from experiments.harness import COSMETIC, RunOptions, cli, config_hash, to_json
from experiments.harness.config import differences, flag_names


@dataclass(frozen=True, kw_only=True)
class Train:
    learning_rate: float = 1e-3
    """Step size of Adam."""
    kind: Literal["cosine", "constant"] = "cosine"
    """Schedule."""


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    algorithms: tuple[str, ...] = ("repo",)
    """Names of recipes."""
    metrics: tuple[Literal["auc", "kl"], ...] = ("auc",)
    """What to measure."""
    sizes: tuple[int, ...] | None = None
    """Sizes to try."""
    steps: int = 10
    """Updates."""
    data: Path | None = None
    """Data file."""
    train: Train = Train()
    """Training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1: steps={self.steps}; pass --steps 1")


PRESETS = {"quick": Config(), "small": Config(steps=99, train=Train(learning_rate=0.5))}


def read(*argv):
    return cli(Config, presets=PRESETS, argv=argv)


def test_defaults_are_the_first_preset():
    assert read() == Config()


@pytest.mark.parametrize("argv", [["--preset", "small"], ["--preset=small"]])
def test_preset_is_the_start_and_flags_change_it(argv):
    config = read(*argv, "--train.kind", "constant", "--seed", "3")
    assert config == Config(steps=99, seed=3, train=Train(learning_rate=0.5, kind="constant"))


def test_every_field_is_a_flag():
    assert read("--algorithms", "a, b").algorithms == ("a", "b")
    assert read("--metrics", "kl,auc").metrics == ("kl", "auc")
    assert read("--sizes", "1,2").sizes == (1, 2)
    assert read("--train.learning_rate", ".1").train.learning_rate == 0.1  # either spelling
    assert read("--data", "x.json").data == Path("x.json")
    assert read("--profile").profile is True
    assert set(flag_names(Config)) == {
        "--seed",
        "--out",
        "--wandb",
        "--profile",
        "--algorithms",
        "--metrics",
        "--sizes",
        "--steps",
        "--data",
        "--train.learning-rate",
        "--train.kind",
    }


def test_help_shows_every_flag_with_its_text(capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--help")
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--preset {quick,small}" in shown
    for flag in flag_names(Config):
        assert flag in shown
    for text in ("Step size of Adam.", "Names of recipes.", "Output folder; by default"):
        assert text in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "3"], "unknown argument --step. Did you mean --steps"),
        (["--zzz=1"], "Allowed: --preset --seed --out"),
        (["stray"], "unknown argument stray"),
        (["--preset", "huge"], "Expected one of ('quick', 'small')"),
        (["--steps", "many"], "--steps"),
        (["--steps", "0"], "steps must be at least 1: steps=0; pass --steps 1"),
        (["--seed", "-1"], "seed must be 0 or greater"),
        (["--train.kind", "linear"], "Expected one of ('cosine', 'constant')"),
        (["--metrics", "auc,x"], "'x' is not one of auc, kl"),
        (["--sizes", "1,x"], "--sizes"),
    ],
)
def test_what_is_wrong_and_what_is_allowed(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        read(*argv)
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown
    assert "Traceback" not in shown


def test_without_presets():
    assert cli(Train, argv=["--kind", "constant"]) == Train(kind="constant")


def test_hash_ignores_what_cannot_change_results_and_sees_everything_else():
    base = config_hash("x", Config())
    assert base == config_hash("x", Config(out=Path("y"), wandb=True, profile=True))
    changed = [
        Config(seed=1),
        Config(algorithms=("repo", "ppo")),
        Config(sizes=(1,)),
        Config(train=Train(learning_rate=0.1)),
        Config(data=Path("y")),
    ]
    hashes = [config_hash("x", c) for c in changed] + [config_hash("y", Config())]
    assert len({base, *hashes}) == 7


def test_hash_tells_classes_of_the_same_fields_apart():
    @dataclass(frozen=True)
    class One:
        x: int = 1

    @dataclass(frozen=True)
    class Two:
        x: int = 1

    @dataclass(frozen=True)
    class Holder:
        part: One | Two = field(default_factory=One)

    assert config_hash("x", Holder(One())) != config_hash("x", Holder(Two()))


def test_json_round_trip_and_what_has_none():
    @dataclass(frozen=True)
    class Odd:
        path: Path = Path("a/b")
        number: object = np.float32(0.5)
        rule: object = max
        seen: object = None
        secret: int = field(default=0, metadata=COSMETIC)

    record = to_json(Odd())
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "path": "a/b",
        "number": 0.5,
        "rule": "builtins.max",
        "seen": None,
        "secret": 0,
    }
    assert "secret" not in to_json(Odd(), cosmetics=False)
    with pytest.raises(TypeError, match="which has no JSON form"):
        to_json(dataclasses.replace(Odd(), seen=np.zeros(3)))


def test_differences_name_nested_fields():
    old, new = to_json(Config()), to_json(Config(seed=4, train=Train(kind="constant")))
    assert differences(old, new) == ["seed: 0, now 4", "train.kind: 'cosine', now 'constant'"]
    assert differences(old, old) == []
    assert differences({"a": 1}, {"b": 1}) == ["a: 1, now 'absent'", "b: 'absent', now 1"]
