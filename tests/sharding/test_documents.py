"""What README.md and docs/planner.md say of the planner: code runs as pasted, lists are whole."""

import csv
import dataclasses
import json
import re
import shlex
import sys
from importlib import resources
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec

import sharding
from sharding.__main__ import main
from sharding.compiled.compile_check import Report
from sharding.costs.strategies import REMAT, Strategies
from sharding.explain import Prediction
from sharding.machines.topology import Chip, Cluster, catalog
from sharding.search.space import Constraints

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Sharding planner\n")[2].partition("\n## ")[0]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def no_compiler(monkeypatch):
    """Compilers of other machines are an extra: `plan.check()` gets a report without them."""
    asked = []

    def check(step, args, execution, cluster, *, predicted_bytes, predicted_collectives, **_):
        asked.append(cluster.name)
        return Report(
            peak_bytes=round(predicted_bytes), argument_bytes=1, output_bytes=1, aliased_bytes=0,
            groups=(), compile_s=0.0, predicted_bytes=predicted_bytes,
            predicted_collectives=predicted_collectives,
        )  # fmt: skip

    # The name `sharding.plan` is the function, which hides its module.
    monkeypatch.setattr(sys.modules[sharding.Plan.__module__], "check", check)
    return asked


def executed(source, folder, monkeypatch):
    """The names that a document's blocks leave behind, run one after the other."""
    monkeypatch.chdir(folder)
    names = {}
    for number, text in enumerate(source):
        exec(compile(text, f"block {number}", "exec"), names)
    return names


def test_the_code_of_the_readme_runs_as_pasted(tmp_path, monkeypatch, no_compiler, capsys):
    source = blocks(SECTION, "python")
    assert source
    names = executed(source, tmp_path, monkeypatch)
    assert isinstance(names["plan"], sharding.Plan)
    assert names["plan"].explain() in capsys.readouterr().out


def test_the_code_of_the_page_runs_in_its_order(tmp_path, monkeypatch, no_compiler, capsys):
    names = executed(blocks(PAGE, "python"), tmp_path, monkeypatch)
    assert no_compiler == ["v5e:2x4"]
    printed = capsys.readouterr().out
    assert "no plan of" in printed
    assert names["kept"].inputs["0/head"] == PartitionSpec()
    # Programs that share parameters have them at the same places.
    shared = {path: spec for path, spec in names["plan"].inputs.items() if path.startswith("0/")}
    assert shared == {path: names["beside"].inputs[path] for path in shared}
    assert names["theirs"].mesh == {"all": 8}
    # Every line that the page explains can be printed.
    plan = names["plan"]
    rare = dataclasses.replace(
        plan, offload="optimizer", accumulation_steps=2, pipeline=(2, 2), notes=("n",),
        prediction=dataclasses.replace(plan.prediction, tied=3),
    )  # fmt: skip
    assert isinstance(rare.prediction, Prediction)
    said = plan.explain() + rare.explain()
    lines = re.findall(
        r"^\| `([^`]+)` \|", PAGE.partition("## What `explain()` says")[2], re.MULTILINE
    )
    assert len(lines) > 10
    assert [line for line in lines if line not in said] == []


@pytest.mark.parametrize("text", blocks(PAGE, "json"))
def test_cluster_files_of_the_page_are_cluster_files(tmp_path, text):
    path = tmp_path / "cluster.json"
    path.write_text(text)
    cluster = Cluster.from_json(path)
    held = json.loads(text)
    assert cluster.name == held["name"]
    count = sum(n["count"] * n["repeat"] for n in held.get("nodes", ()))
    assert cluster.chip_count == (count or 2 * 4 * 4 * 8)
    assert dict(cluster.measured) == held.get("measured", {})


def test_the_page_s_lists_are_whole():
    listing = re.search(r"^Chips: (.*?)\.", PAGE, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`([^`]+)`", listing[1])) == set(catalog())
    pins = re.findall(r"^\| `(\w+)` \|", PAGE.partition("| pin |")[2].partition("\n\n")[0], re.M)
    assert set(pins) == set(Strategies.__dataclass_fields__)
    (remat,) = re.findall(r"^\| `remat` \| (.*?) \|", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", remat)) == set(REMAT)
    files = PAGE.partition("Fields of a chip")[2].partition("##")[0]
    assert set(re.findall(r"`(\w+)`", files)) == set(Chip.__dataclass_fields__) - {"name"}
    constraints = PAGE.partition("## Constraints")[2]
    said = set(re.findall(r"[`(\s](\w+)[`=]", constraints))
    assert {f.name for f in dataclasses.fields(Constraints)} - {"uneven_shares"} <= said
    for name in re.findall(r"`([a-z0-9]+:\d+(?:x\d+)*(?:x\d+slices)?)`", PAGE):
        assert Cluster.from_name(name).chip_count > 1


def commands():
    found = re.findall(r"^ *(python -m sharding .*)$", PAGE + SECTION, re.MULTILINE)
    return list(dict.fromkeys(found))


def test_there_are_commands():
    assert {shlex.split(command)[3] for command in commands()} == {
        "plan", "simulate", "validate", "calibrate", "profile",
    }  # fmt: skip


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_runs(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(command)[3:]
    if argv[0] == "profile":
        argv += ["--budget", "1"]
    with (resources.files("sharding") / "catalog/published_runs.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if "H100 80GB BF16 (Large" in r["source"]][:3]
    with open("FILE.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert main(argv) == 0
    printed = capsys.readouterr().out
    if "--json" in argv:
        assert json.loads(printed)
    elif "--out" in argv:
        assert json.loads(Path(argv[argv.index("--out") + 1]).read_text())
    else:
        assert "step" in printed
