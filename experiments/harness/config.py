"""Typed configs on the command line, as JSON and as the name of a run."""

import dataclasses
import difflib
import enum
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

Config = TypeVar("Config")

COSMETIC = {"cosmetic": True}
"""Metadata of a config field that cannot change results: left out of hash and comparisons."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every experiment takes; their configs inherit from it.

    Raises:
      ValueError: a negative seed.
    """

    seed: int = 0
    """Seed of all randomness of the run."""
    out: Path | None = field(default=None, metadata=COSMETIC)
    """Output folder; by default runs/NAME-<hash of the config>. Give it again to resume."""
    wandb: bool = field(default=False, metadata=COSMETIC)
    """Also send the metrics to Weights & Biases (needs the extra `wandb`)."""
    profile: bool = field(default=False, metadata=COSMETIC)
    """Write a JAX trace and a timeline of rollout, scoring and update to OUT/profile."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or greater: seed={self.seed}; pass --seed 0")


def cli(
    config_type: type[Config],
    *,
    presets: Mapping[str, Config] | None = None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> Config:
    """Reads a config from the command line: every field is a flag, nested ones too.

    A wrong flag, value or preset prints what is allowed to stderr and exits with status 2; so
    does a `ValueError` of a config's `__post_init__`. Lists are comma-separated.

    Args:
      config_type: a frozen dataclass; docstrings under its fields become the help.
      presets: named starting points; the first is the default. `--preset NAME` picks one and
        the other flags change it. Without presets the class's own defaults are the start.
      argv: arguments without the program's name; by default those of this process.
      prog: the program's name in the help, such as "python -m experiments.safety".
      description: shown on top of the help.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    chosen = _requested_preset(args)
    start = _starting_point(config_type, presets, chosen)
    program = _program(config_type, presets, start)
    registry = ConstructorRegistry()
    registry.primitive_rule(_comma_separated)
    try:
        with registry:
            parsed, unknown = tyro.cli(
                program,
                args=args,
                prog=prog,
                description=description or "",
                return_unknown_args=True,
            )
    except ValueError as error:  # raised by a `__post_init__`: the values do not go together
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    _refuse_unknown(unknown, config_type, presets)
    return parsed.config


def _requested_preset(args: Sequence[str]) -> str | None:
    """The last `--preset` on the command line; the defaults must be known before parsing."""
    found = None
    for at, arg in enumerate(args):
        if arg == "--preset" and at + 1 < len(args):
            found = args[at + 1]
        elif arg.startswith("--preset="):
            found = arg.split("=", 1)[1]
    return found


def _starting_point(
    config_type: type[Config], presets: Mapping[str, Config] | None, chosen: str | None
) -> Config:
    if not presets:
        return config_type()
    # An unknown name is left to the parser, which lists the known ones.
    return presets.get(chosen or "", next(iter(presets.values())))


def _program(
    config_type: type[Config], presets: Mapping[str, Config] | None, start: Config
) -> type:
    """A dataclass of one config and, where there are presets, the flag that names one."""
    fields: list[Any] = [
        ("config", Annotated[config_type, tyro.conf.arg(name="")], field(default=start))
    ]
    if presets:
        names = tuple(presets)
        preset = Annotated[
            Literal[names],  # pyright: ignore[reportInvalidTypeForm]  # known only at run time
            tyro.conf.arg(help="Where the values start; the other flags change it."),
        ]
        fields.insert(0, ("preset", preset, field(default=names[0])))
    return dataclasses.make_dataclass("Program", fields, frozen=True, kw_only=True)


def _comma_separated(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """`--algorithms a,b` for tuples of any length, instead of tyro's space-separated lists."""
    args = get_args(info.type)
    if get_origin(info.type) is not tuple or len(args) != 2 or args[1] is not Ellipsis:
        return None
    item = args[0]
    allowed = get_args(item) if get_origin(item) is Literal else ()
    convert = str if allowed else item
    if convert not in (str, int, float):
        return None

    def read(values: list[str]) -> tuple[Any, ...]:
        items = tuple(convert(v.strip()) for v in values[0].split(",") if v.strip())
        wrong = [v for v in items if allowed and v not in allowed]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not one of {', '.join(map(str, allowed))}")
        return items

    shown = "|".join(map(str, allowed)) if allowed else item.__name__.upper()
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{shown},...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def flag_names(config_type: type, prefix: str = "") -> list[str]:
    """The flags of a config class, in order: `--seed`, `--model.layers`, ..."""
    names: list[str] = []
    types = get_type_hints(config_type)
    for entry in dataclasses.fields(config_type):
        path = f"{prefix}{entry.name}".replace("_", "-")
        kind = types[entry.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            names.extend(flag_names(kind, f"{path}."))
        else:
            names.append(f"--{path}")
    return names


def _refuse_unknown(unknown: list[str], config_type: type, presets: Mapping[str, Any] | None):
    if not unknown:
        return
    allowed = (["--preset"] if presets else []) + flag_names(config_type)
    wrong = next((arg for arg in unknown if arg.startswith("-")), unknown[0]).split("=", 1)[0]
    near = difflib.get_close_matches(wrong.replace("_", "-"), allowed, n=3)
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    listing = " ".join(allowed)
    print(f"error: unknown argument {wrong}.{guess}\nAllowed: {listing}", file=sys.stderr)
    raise SystemExit(2)


def to_json(value: Any, *, cosmetics: bool = True) -> Any:
    """A config as JSON values. Nested dataclasses carry the name of their class as "type".

    Args:
      value: a dataclass, or anything that may stand in one.
      cosmetics: whether fields marked `COSMETIC` are included.

    Raises:
      TypeError: a value that has no JSON form; names its type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if cosmetics or "cosmetic" not in f.metadata]
        return {f.name: _nested_json(getattr(value, f.name), cosmetics) for f in fields}
    return _nested_json(value, cosmetics)


def _nested_json(value: Any, cosmetics: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | to_json(value, cosmetics=cosmetics)
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _nested_json(item, cosmetics) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_nested_json(item, cosmetics) for item in items]
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(
        f"a config holds {type(value).__name__}, which has no JSON form; use plain types"
    )


def config_hash(name: str, config: Any) -> str:
    """Ten hexadecimal digits that name the results: the experiment and its relevant fields.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Example:
    ...     seed: int = 0
    ...     colour: str = field(default="blue", metadata=COSMETIC)
    >>> config_hash("x", Example()) == config_hash("x", Example(colour="red"))
    True
    >>> config_hash("x", Example()) == config_hash("x", Example(seed=1))
    False
    """
    payload = json.dumps([name, to_json(config, cosmetics=False)], sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()[:10]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Paths at which two JSON values differ, with both values: "train.steps: 10, now 20"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(old) + [key for key in new if key not in old]
        absent = "absent"
        return [
            line
            for key in keys
            for line in differences(old.get(key, absent), new.get(key, absent), f"{prefix}{key}.")
        ]
    return [] if old == new else [f"{prefix[:-1]}: {old!r}, now {new!r}"]
