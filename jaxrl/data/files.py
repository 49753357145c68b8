"""Rows of text from files and from the Hugging Face hub, with errors that name the place."""

import csv
import gzip
import importlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_PREFIX = "hub:"
PROMPT_FIELDS = ("prompt", "text", "question", "instruction", "Behavior", "input")
"""Names under which prompt files carry their prompts, the likeliest first."""
_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")


class DataError(ValueError):
    """A data file is not what it should be; the message names file, place and field."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record and where it stands, for messages."""

    where: str
    fields: Mapping[str, Any]

    def text(self, name: str, *, may_be_empty: bool = False) -> str:
        """The text under `name`.

        Raises:
          DataError: the field is missing, no text, or empty.
        """
        if name not in self.fields:
            raise DataError(
                f"{self.where}: field {name!r} is missing; the row has {sorted(self.fields)}"
            )
        value = self.fields[name]
        if not isinstance(value, str) or not (value.strip() or may_be_empty):
            raise DataError(
                f"{self.where}: field {name!r} must be non-empty text, got {value!r:.80}"
            )
        return value

    def flag(self, name: str) -> bool:
        """The truth value under `name`; 0, 1, "true" and "false" count.

        Raises:
          DataError: the field is missing or is no truth value.
        """
        value = self._present(name)
        known = {True: True, False: False, "true": True, "false": False}
        key = value.lower() if isinstance(value, str) else value
        try:
            return known[key]
        except (KeyError, TypeError):
            raise DataError(
                f"{self.where}: field {name!r} must be true or false, got {value!r:.80}"
            ) from None

    def choice(self, name: str, options: int) -> int:
        """The index under `name`, below `options`.

        Raises:
          DataError: the field is missing or is no such index.
        """
        value = self._present(name)
        try:
            index = int(value)
        except (TypeError, ValueError):
            index = -1
        if not 0 <= index < options:
            raise DataError(
                f"{self.where}: field {name!r} must be 0 to {options - 1}, got {value!r:.80}"
            )
        return index

    def _present(self, name: str) -> Any:
        if name not in self.fields:
            raise DataError(
                f"{self.where}: field {name!r} is missing; the row has {sorted(self.fields)}"
            )
        return self.fields[name]


def read_rows(source: str | Path) -> list[Row]:
    """Rows of a json, jsonl, csv, parquet or txt file, plain or gzipped, or of `hub:NAME[:SPLIT]`.

    A txt file has one prompt per line, under the field "prompt".

    Raises:
      FileNotFoundError: no such file.
      ImportError: parquet or hub without the optional extra.
      DataError: malformed, with file and line or row; or no rows at all.
    """
    if str(source).startswith(HUB_PREFIX):
        rows = _from_hub(str(source))
    else:
        path = Path(source)
        if not path.is_file():
            hint = "it is a folder; name a file in it" if path.is_dir() else "check the path"
            raise FileNotFoundError(f"no data file at {path}: {hint}")
        rows = _from_file(path)
    if not rows:
        raise DataError(f"{source} has no rows; an empty data set cannot be used")
    return rows


def read_prompts(source: str | Path, *, field: str | None = None) -> tuple[str, ...]:
    """Distinct prompts of a file in their order.

    Args:
      source: what `read_rows` takes.
      field: the field that holds them; by default the first of `PROMPT_FIELDS` in the row.

    Raises:
      DataError: a row without that field, or no rows.
    """
    prompts = []
    for row in read_rows(source):
        name = field or next((name for name in PROMPT_FIELDS if name in row.fields), None)
        if name is None:
            raise DataError(
                f"{row.where}: no prompt field; the row has {sorted(row.fields)}, and prompts are "
                f"looked for under {PROMPT_FIELDS}; name the field"
            )
        prompts.append(row.text(name))
    return tuple(dict.fromkeys(prompts))


def _from_file(path: Path) -> list[Row]:
    gzipped = path.suffix == ".gz"
    suffix = path.with_suffix("").suffix if gzipped else path.suffix
    if suffix not in _SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of file {suffix!r}; use one of {', '.join(_SUFFIXES)}, "
            "all but parquet also as .gz"
        )
    if suffix == ".parquet":
        return _from_parquet(path)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if gzipped else content).decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text: {error}") from error
    if suffix == ".json":
        return _from_json(path, text)
    if suffix == ".jsonl":
        return _from_json_lines(path, text)
    if suffix == ".csv":
        return _from_csv(path, text)
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [Row(where=f"{path}, line {n}", fields={"prompt": line}) for n, line in lines if line]


def _from_json(path: Path, text: str) -> list[Row]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: must hold a list of records, got a {type(content).__name__}")
    return [_record(f"{path}, row {number}", row) for number, row in enumerate(content, 1)]


def _from_json_lines(path: Path, text: str) -> list[Row]:
    rows = []
    # Not splitlines(): it also cuts at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_record(f"{path}, line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from error
    return rows


def _from_csv(path: Path, text: str) -> list[Row]:
    # Model completions reach the csv module's default limit of 128 KiB a field.
    csv.field_size_limit(2**24)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    for record in reader:
        where = f"{path}, line {reader.line_num}"
        if None in record or None in record.values():
            columns = len(reader.fieldnames or ())
            raise DataError(f"{where}: must have the header's {columns} columns")
        rows.append(Row(where=where, fields=record))
    return rows


def _from_parquet(path: Path) -> list[Row]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            f'{path}: parquet files need pyarrow; pip install "jaxrl-safe[hub]"'
        ) from error
    try:
        records = parquet.read_table(str(path)).to_pylist()
    except Exception as error:  # pyarrow's errors share no useful base
        raise DataError(f"{path}: not readable as parquet: {error}") from error
    return [Row(where=f"{path}, row {n}", fields=record) for n, record in enumerate(records, 1)]


def _from_hub(source: str) -> list[Row]:
    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise DataError(f"a hub source is hub:NAME or hub:NAME:SPLIT, got {source!r}")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f'{source}: the hub needs the datasets library; pip install "jaxrl-safe[hub]"'
        ) from error
    try:
        records: Iterable[Any] = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # network, name and split fail in many ways
        raise DataError(
            f"{source}: could not be loaded ({type(error).__name__}: {error}); check the name, "
            "the split and the network, or download it and give the file"
        ) from error
    return [_record(f"{source}, row {number}", row) for number, row in enumerate(records, 1)]


def _record(where: str, content: Any) -> Row:
    if not isinstance(content, Mapping):
        raise DataError(f"{where}: must be a record with named fields, got {content!r:.80}")
    return Row(where=where, fields=content)
