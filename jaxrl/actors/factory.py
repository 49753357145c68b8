"""How an actor is made in another process: a function by its name, with JSON values."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrl.actors.work import AbstractActor


@dataclass(frozen=True, kw_only=True)
class Factory:
    """Calls `module:function(name, **config)` to make the actor of a name.

    It travels as text, so that processes and machines need to share nothing but the code.

    Attributes:
      target: "package.module:function".
      config: JSON values, its keyword arguments.

    Raises:
      ValueError: `target` is not of that form.
      TypeError: `config` is no JSON.
    """

    target: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, colon, function = self.target.partition(":")
        if not (
            colon and function.isidentifier() and all(map(str.isidentifier, module.split(".")))
        ):
            raise ValueError(
                f"a factory's target is 'package.module:function', got {self.target!r}"
            )
        json.dumps(dict(self.config))

    def __call__(self, name: str) -> AbstractActor:
        """Imports the function and calls it.

        Raises:
          ImportError: there is no such module.
          AttributeError: the module has no such function.
        """
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)(name, **self.config)
