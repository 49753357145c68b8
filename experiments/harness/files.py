"""Writing files so that a reader sees the old one or the new one, never half of it."""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path | str, content: str | bytes) -> None:
    """Replaces a file in one step; a crash leaves what was there before. Text is UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def plain(value: Any) -> Any:
    """JSON values of arrays, scalars and containers; NaN and infinities become None.

    >>> import numpy as np
    >>> plain({"a": np.float32(0.5), "b": [float("nan")], "c": np.arange(2)})
    {'a': 0.5, 'b': [None], 'c': [0, 1]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def write_json(path: Path | str, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_atomically(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    lines = [json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows]
    write_atomically(path, "".join(lines))


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line cut short by a crash is left out.

    Raises:
      ValueError: a broken line before the last one; names file and line.
    """
    file = Path(path)
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if any(lines[number:]):
                raise ValueError(f"{file}, line {number}: not JSON ({error}); remove it") from error
    return rows
