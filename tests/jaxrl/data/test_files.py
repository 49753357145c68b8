import csv
import gzip
import importlib
import io
import json
import sys
import types

import pytest

from jaxrl.data.files import DataError, Row, read_prompts, read_rows

RECORDS = [{"prompt": "Why?", "n": 1}, {"prompt": 'How,\n\u2028and "when"?', "n": 2}]


def _as_csv(records):
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


FORMATS = {
    "json": json.dumps,
    "jsonl": lambda records: "\n\n".join(
        json.dumps(record, ensure_ascii=False) for record in records
    ),
    "csv": _as_csv,
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("gzipped", [False, True])
def test_every_format_gives_the_same_prompts(tmp_path, suffix, gzipped):
    path = tmp_path / (f"data.{suffix}" + (".gz" if gzipped else ""))
    content = FORMATS[suffix](RECORDS).encode()
    path.write_bytes(gzip.compress(content) if gzipped else content)
    assert read_prompts(path) == tuple(record["prompt"] for record in RECORDS)
    assert [str(row.fields["n"]) for row in read_rows(path)] == ["1", "2"]


def test_text_files_have_a_prompt_per_line(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \none\n")
    assert read_prompts(tmp_path / "p.txt") == ("one", "two")
    assert read_rows(tmp_path / "p.txt")[1].where.endswith("p.txt, line 3")


def test_prompts_are_found_under_their_usual_names(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"instruction": "Do it", "other": "no"}\n{"text": "Say it"}\n')
    assert read_prompts(path) == ("Do it", "Say it")
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: field 'other' is missing.*\['text'\]"):
        read_prompts(path, field="other")
    path.write_text('{"query": "Do it"}')
    with pytest.raises(DataError, match=r"line 1: no prompt field; the row has \['query'\]"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"prompt": "x"},\n {"prompt" "y"}]', r"a\.json, line 2: not JSON"),
        ("a.json", b'{"prompt": "x"}', r"a\.json: must hold a list of records, got a dict"),
        ("a.json", b'[{"prompt": "x"}, 3]', r"a\.json, row 2: must be a record .* got 3"),
        ("a.json", b"[]", r"a\.json has no rows"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n[1]\n', r"a\.jsonl, line 2: must be a record"),
        ("a.jsonl", b"", r"a\.jsonl has no rows"),
        ("a.jsonl", b'{"prompt": "\xff"}', r"a\.jsonl: not readable as UTF-8"),
        ("a.jsonl.gz", b'{"prompt": "x"}', r"a\.jsonl\.gz: not readable as UTF-8"),
        ("a.csv", b"prompt,n\nx,1\ny\n", r"a\.csv, line 3: must have the header's 2 columns"),
        ("a.csv", b"prompt,n\nx,1,2\n", r"a\.csv, line 2: must have the header's 2 columns"),
        ("a.csv", b"prompt,n\n", r"a\.csv has no rows"),
        ("a.xml", b"<x/>", r"a\.xml: unknown kind of file '\.xml'; use one of"),
        ("a.jsonl", b'{"prompt": "  "}', r"a\.jsonl, line 1: field 'prompt' must be non-empty"),
        ("a.jsonl", b'{"prompt": 7}', r"field 'prompt' must be non-empty text, got 7"),
    ],
)
def test_malformed_files_name_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data file at .*no\.json: check the path"):
        read_rows(tmp_path / "no.json")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        read_rows(tmp_path)


def test_fields_are_checked():
    row = Row(where="f, line 3", fields={"a": "TRUE", "b": 0, "c": "maybe", "d": 2, "e": None})
    assert row.flag("a") is True
    assert row.flag("b") is False
    assert row.choice("d", 3) == 2
    for call, message in (
        (lambda: row.flag("c"), "f, line 3: field 'c' must be true or false, got 'maybe'"),
        (lambda: row.flag("d"), "field 'd' must be true or false"),
        (lambda: row.flag("e"), "field 'e' must be true or false, got None"),
        (lambda: row.choice("d", 2), "field 'd' must be 0 to 1, got 2"),
        (lambda: row.choice("c", 2), "field 'c' must be 0 to 1, got 'maybe'"),
        (lambda: row.choice("z", 2), "f, line 3: field 'z' is missing"),
    ):
        with pytest.raises(DataError, match=message):
            call()


def _fake_datasets(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_the_hub_is_read_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return iter(RECORDS)

    _fake_datasets(monkeypatch, load_dataset)
    rows = read_rows("hub:org/set:test")
    assert [dict(row.fields) for row in rows] == RECORDS
    assert rows[1].where == "hub:org/set:test, row 2"
    read_rows("hub:org/set")
    assert asked == [("org/set", "test"), ("org/set", "train")]


def test_hub_failures_say_what_to_check(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("offline")

    _fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(DataError, match=r"hub:org/set: could not be loaded \(ConnectionError: off"):
        read_rows("hub:org/set")
    with pytest.raises(DataError, match="hub:NAME or hub:NAME:SPLIT"):
        read_rows("hub:")


@pytest.mark.parametrize(("module", "source"), [("datasets", "hub:a/b"), ("pyarrow", "x.parquet")])
def test_missing_extras_name_the_command(monkeypatch, tmp_path, module, source):
    importing = importlib.import_module

    def refuse(name, package=None):
        if name.startswith(module):
            raise ImportError(name)
        return importing(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    path = source if source.startswith("hub:") else tmp_path / source
    with pytest.raises(ImportError, match=r'pip install "jaxrl-safe\[hub\]"'):
        read_rows(path)


def test_parquet_files(monkeypatch, tmp_path):
    """With a stand-in for pyarrow, which is no dependency of the tests."""
    (tmp_path / "x.parquet").write_bytes(b"PAR1")

    class Table:
        def to_pylist(self):
            return RECORDS

    def read_table(path):
        if not path.endswith("x.parquet"):
            raise OSError("broken")
        return Table()

    parquet = types.ModuleType("pyarrow.parquet")
    parquet.read_table = read_table
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert read_prompts(tmp_path / "x.parquet") == tuple(r["prompt"] for r in RECORDS)
    (tmp_path / "y.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"y\.parquet: not readable as parquet: broken"):
        read_rows(tmp_path / "y.parquet")
