"""The device check on a CPU: what it finds, what it writes, and what does not stop it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.device_check import __main__ as program
from experiments.device_check import model
from experiments.device_check.checks import CHECKS, Finding
from jaxrl import recipes
from jaxrl.deployment import Workload
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.types import Prompts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(400)
def test_tiny_passes_on_a_cpu(tmp_path):
    out = tmp_path / "device.json"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.device_check", "--tiny", "--out", str(out)],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=False,
        timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    assert (written["device"], written["tiny"], written["passed"]) == ("cpu", True, True)
    assert written["versions"]["jax"] == jax.__version__
    assert list(written["checks"]) == list(CHECKS)
    for name, row in written["checks"].items():
        assert row["passed"] is True
        assert row["problems"] == []
        assert row["seconds"] > 0
        assert CHECKS[name] in done.stdout
    numbers = {name: row["numbers"] for name, row in written["checks"].items()}
    assert all(kernel["same_bits"] for kernel in numbers["kernels"]["kernels"].values())
    assert {key.split(",")[0] for key in numbers["attention"]["differences"]} == {"xla", "splash"}
    step = numbers["step"]
    assert step["mfu"] * step["peak_tflop_per_s"] == pytest.approx(step["model_tflop_per_s"])
    assert step["predicted_step_s"] > 0
    assert numbers["generation"]["tokens_per_s"] > 0
    assert numbers["repo"]["cost"][-1] < numbers["repo"]["cost"][0]


def test_without_room_everything_is_skipped_and_says_so(tmp_path):
    out = tmp_path / "device.json"
    assert program.main(["--tiny", "--budget", "5", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["checks"].values()
    assert [row["passed"] for row in rows] == [None] * len(CHECKS)
    assert all("no room: 5 s" in row["summary"] for row in rows)


class Child(subprocess.Popen):
    """Stands in for the command of one check: a script that gets the check's name and `--out`.

    However long it runs, the clock shows the beginning; who waits in vain waits to the end.
    """

    script, now = "", 0.0

    def __init__(self, command, **options):
        self.name = command[command.index("--child") + 1]
        out = command[command.index("--out") + 1]
        super().__init__([sys.executable, "-c", self.script, self.name, out], **options)

    def wait(self, timeout=None):
        if timeout is not None and self.name == "generation":
            Child.now += timeout
            raise subprocess.TimeoutExpired(self.args, timeout)
        return super().wait()


def test_one_that_crashes_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch):
    script = """
import json, os, sys, time
name, out = sys.argv[1:]
if name == "kernels":
    print("illegal instruction", flush=True)
    os.abort()
if name == "attention":
    row = {"passed": False, "summary": "differs", "numbers": {"by": 2.0}, "problems": ["too much"]}
if name == "step":
    row = {"passed": True, "summary": "fine", "numbers": {}, "problems": []}
if name == "generation":
    time.sleep(600)
device = {"device": "X1", "count": 4, "versions": {"jax": "0"}}
open(out, "w").write(json.dumps({"row": row, "device": device}))
"""

    class Popen:
        Popen = Child
        DEVNULL = subprocess.DEVNULL
        TimeoutExpired = subprocess.TimeoutExpired

    monkeypatch.setattr(program, "subprocess", Popen)
    monkeypatch.setattr(Child, "script", script)
    monkeypatch.setattr(Child, "now", 0.0)
    monkeypatch.setattr(program.time, "monotonic", lambda: Child.now)
    out = tmp_path / "device.json"
    assert program.main(["--budget", "80", "--out", str(out)]) == 1
    written = json.loads(out.read_text())
    assert (written["device"], written["passed"]) == ("X1", False)
    rows = written["checks"]
    assert [rows[name]["passed"] for name in CHECKS] == [False, False, True, None, None]
    assert "illegal instruction" in rows["kernels"]["problems"][0]
    assert rows["attention"]["problems"] == ["too much"]
    assert "the rest of the budget" in rows["generation"]["summary"]
    assert "no room" in rows["repo"]["summary"]


def test_a_check_that_finds_problems_fails(tmp_path, monkeypatch):
    found = Finding(numbers={"gap": np.float32(0.5)}, summary="s", problems=("gap is 0.5",))
    monkeypatch.setattr(program, "check", lambda name: lambda tiny: found)
    assert program.main(["--child", "repo", "--out", str(tmp_path / "found.json")]) == 0
    row = json.loads((tmp_path / "found.json").read_text())["row"]
    assert (row["passed"], row["numbers"], row["problems"]) == (False, {"gap": 0.5}, ["gap is 0.5"])


def products(jaxpr):
    """Floating-point operations of the matrix products of a program, loops counted in full."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = int(np.prod([shape[axis] for axis in contracted]))
            total += 2 * inner * int(np.prod(equation.outvars[0].aval.shape))
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * products(inner)
    return total


def test_the_operations_of_an_update_are_three_forward_passes():
    """Counted in the program, of a model so wide that the scores hardly count."""
    config = DecoderConfig(
        vocab_size=512, layers=3, embed=256, heads=4, kv_heads=2, head_dim=64, mlp=512, max_len=64
    )
    workload = Workload(
        recipe=recipes.get("rloo"), policy=config, prompts_per_step=2, prompt_len=4,
        completion_len=40,
    )  # fmt: skip
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    groups = workload.group_size

    def forward(params, tokens):
        decoder = nnx.merge(graphdef, params)
        prompts = Prompts(tokens=tokens[:, 0, :4], mask=tokens[:, 0, :4] >= 0, ids=tokens[:, 0, 0])
        return decoder.logits(decoder.completion_hidden(prompts, tokens))

    tokens = np.zeros((2, groups, 40), np.int32)
    counted = 3 * products(jax.make_jaxpr(forward)(params, tokens).jaxpr)
    found = model.Large(
        name="", workload=workload, config=config, graphdef=graphdef, params=params, mesh={}
    )
    # The program computes masked scores too, and leaves out the last token, which nobody reads.
    assert model.update_flops(found) == pytest.approx(counted, rel=0.04)
    longer = replace(found, workload=replace(workload, prompt_len=8))
    assert model.update_flops(longer) > model.update_flops(found)
