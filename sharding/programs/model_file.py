"""Models from JSON files, for the command line: a decoder's sizes, or a whole program."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sharding.programs.program import Program
from sharding.programs.transformer import TransformerConfig, named_model, transformer


def read_model(path: Path, said: Mapping[str, Any], default: Mapping[str, Any]) -> Program:
    """Reads a model.

    A file with `blocks` is a `Program` as its `to_json` writes it, and is run as it is. Any other
    holds fields of `TransformerConfig`; with `"model": NAME` they change a published model.

    Args:
      path: the file.
      said: fields of `TransformerConfig` that win over the file's.
      default: fields where neither says anything.

    Raises:
      ValueError: not such a file, or sizes said of a program that has its own.
    """
    known = [field.name for field in fields(TransformerConfig)]
    try:
        held = json.loads(path.read_text())
        if not isinstance(held, dict):
            raise TypeError(f"it holds a {type(held).__name__}")
        if "blocks" in held:
            program = Program.from_json(json.dumps(held))
        else:
            name = held.pop("model", None)
            given = {**default, **held, **said}
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise TypeError(f"it names {unknown}")
            config = named_model(name, **given) if name else TransformerConfig(**given)
            return transformer(config)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no model file ({error}); it holds what Program.to_json writes, or fields "
            f'of TransformerConfig ({", ".join(known)}), with "model": NAME to start from a '
            "published one"
        ) from error
    if said:
        raise ValueError(
            f"{path} is a whole program with sizes of its own: leave out {', '.join(said)}, or "
            "write fields of TransformerConfig"
        )
    return program
