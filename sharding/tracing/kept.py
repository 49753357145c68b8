"""What was found out about a function, kept for as long as the function lives.

JAX keeps what it traced of a function, and traces it again when something that it depends on has
changed: shapes, the mesh of the context, an option. What follows from a trace is right for as long
as JAX gives out that very trace.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Found = TypeVar("Found")


class Kept(Generic[Found]):
    """Results that follow from the traces of functions."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[
            Callable[..., Any], dict[Hashable, tuple[weakref.ref[Any], Found]]
        ] = weakref.WeakKeyDictionary()

    def get(
        self,
        function: Callable[..., Any],
        key: Hashable,
        jaxpr: Any,
        make: Callable[[], Found],
    ) -> Found:
        """What was made before of the same function, key and trace; else what `make` returns.

        Args:
          function: that was traced; of one that cannot be hashed or weakly referenced nothing is
            kept. What is made must not refer to it, or neither is ever freed.
          key: what else the result depends on.
          jaxpr: the `Jaxpr` of the trace.
          make: the result.
        """
        try:
            of = self._of.setdefault(function, {})
        except TypeError:
            return make()
        known = of.get(key)
        if known is None or known[0]() is not jaxpr:
            known = of[key] = weakref.ref(jaxpr), make()
        return known[1]
