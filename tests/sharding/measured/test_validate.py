"""Tables of runs: what a row becomes, what blanks mean, and what the command prints."""

import csv
import json

import numpy as np
import pytest

from sharding.__main__ import main
from sharding.costs.constants import shipped
from sharding.measured.evaluation import Errors, regret, spearman
from sharding.measured.runs import parse_rows
from sharding.measured.table import Table

ROW = {
    "source": "MaxText v5e README", "hardware": "TPU v5e", "n_chips": "256", "model": "m-16b",
    "params_b": "16", "n_layers": "32", "d_model": "4096", "n_heads": "64", "d_ff": "28672",
    "vocab": "32000", "seq_len": "2048", "global_batch_sequences": "1536", "microbatch": "6",
    "dp": "1", "fsdp": "256", "tp": "1", "pp": "1", "dtype": "bf16", "remat": "full",
    "optimizer_sharding": "fsdp(zero3)", "step_time_s": "8.5",
}  # fmt: skip


def run_of(**changes):
    runs, skipped = parse_rows([{**ROW, **changes}])
    assert not skipped, skipped
    return runs[0]


def test_a_full_row_says_what_ran():
    run = run_of()
    assert run.measured_s == 8.5
    assert run.cluster.shape == (16, 16)
    assert run.strategy.mesh == {"fsdp": 256}
    assert (run.strategy.microbatches, run.strategy.zero, run.remat) == (1, 3, "full")
    assert run.stack == "xla_tpu"


def test_the_measured_time_follows_from_other_columns():
    tokens = 1536 * 2048
    speed = run_of(step_time_s="", tokens_per_s_per_chip="1500")
    assert np.isclose(speed.measured_s, tokens / (1500 * 256))
    rate = run_of(step_time_s="", tflops_per_chip="100")
    share = run_of(step_time_s="", mfu=str(100 / 197))
    assert np.isclose(rate.measured_s, share.measured_s)
    # Six FLOPs a parameter and token, and attention: 12 L s d a token, counted in full. Of the
    # row's 64 heads 64 wide, 13.6e9 parameters would follow; 128 wide, the 16e9 that it says.
    params = 32 * (4 * 4096 * 64 * 128 + 3 * 4096 * 28672) + 4096 * 32000
    flops = tokens * (6 * params + 12 * 32 * 2048 * 64 * 128)
    assert np.isclose(rate.measured_s, flops / (100e12 * 256), rtol=1e-3)


def test_blank_degrees_are_what_the_others_leave():
    gpu = {"hardware": "H100 SXM 80GB", "optimizer_sharding": "", "source": "table"}
    run = run_of(**gpu, n_chips="64", dp="4", fsdp="", tp="", pp="", chips_per_node="8")
    assert run.strategy.mesh == {"stage": 2, "fsdp": 4, "tensor": 8}
    assert run.strategy.zero == 1
    assert "tp: what dp leaves, up to a node" in run.filled
    assert run.stack == "megatron"


def test_degrees_that_contradict_the_devices_give_way():
    run = run_of(tp="7", fsdp="10")
    assert run.strategy.mesh == {"fsdp": 256}
    assert any("do not make the devices" in rule for rule in run.filled)
    assert not run.is_complete
    assert run_of().is_complete


def test_adapters_have_no_gradients_of_weights():
    full, adapters = run_of(), run_of(source="table (LoRA)")
    costs = Table.of([full, adapters]).predict(shipped())
    # Four FLOPs a parameter and token instead of six, and recomputation in both.
    assert 0.7 < costs[1] / costs[0] < 0.85


def test_the_least_recomputation_that_fits_is_taken():
    small = run_of(remat="", microbatch="1", global_batch_sequences="256", seq_len="512")
    large = run_of(remat="", microbatch="32", global_batch_sequences="8192")
    table = Table.of([small, large])
    assert [run.strategy.remat for run in table.runs] == ["none", "full"]


def test_a_failed_launch_recomputes_as_those_that_ran_did():
    problem = {"remat": "", "global_batch_sequences": "8192", "seq_len": "512"}
    ran = run_of(**problem, microbatch="1")
    failed = run_of(**problem, microbatch="32", step_time_s="", notes="INFEASIBLE: out of memory")
    assert failed.problem == ran.problem
    assert failed.measured_s is None
    (alone,) = Table.of([failed]).runs
    assert alone.remat == "none"  # of no launch that ran
    together = Table.of([ran, failed])
    assert [run.remat for run in together.runs] == ["none", "none"]
    fits = together.memory_bytes() <= ran.cluster.memory_bytes
    assert fits.tolist() == [True, False]
    # If it had run, it would be read as one that recomputed enough to fit.
    (came_back,) = Table.of([run_of(**problem, microbatch="32")]).runs
    assert came_back.remat != "none"


def test_links_that_the_hardware_names_are_taken():
    run = run_of(hardware="16x V100-16GB (4x p3.8xlarge, 10 Gb/s inter, 170 Gb/s intra)",
                 n_chips="16", chips_per_node="4", fsdp="16")  # fmt: skip
    assert run.cluster.link_bytes_per_s == 170e9 / 8
    assert run.cluster.network_bytes_per_s == 10e9 / 8 / 4
    mixed = run_of(hardware="12x V100-16GB + 4x T4 (3x p3.8xlarge)", n_chips="16",
                   chips_per_node="4", fsdp="16")  # fmt: skip
    assert [node.chip.name for node in mixed.cluster.nodes] == ["v100"] * 3 + ["t4"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hardware": "Abacus 9"}, "'Abacus 9' is not in the catalogue"),
        ({"step_time_s": ""}, "no measured quantity"),
        ({"n_chips": "many"}, "n_chips is blank or no number"),
    ],
)
def test_an_odd_row_is_skipped_with_its_reason(changes, reason):
    runs, skipped = parse_rows([{**ROW, **changes}, ROW])
    assert len(runs) == 1
    assert reason in skipped[0].reason


def test_unknown_sizes_follow_from_flops_a_token():
    blank = dict.fromkeys(("n_layers", "d_model", "n_heads", "d_ff", "params_b"), "")
    run = run_of(**blank, model="mystery", step_time_s="", tflops_per_chip="120",
                 tokens_per_s_per_chip="2000")  # fmt: skip
    # 120e12 / 2000 / 6 = 10e9 parameters, of usual proportions
    assert 8e9 < 12 * run.config.layers * run.config.d_model**2 < 12e9


def test_all_rows_at_once_cost_what_each_costs_alone():
    rows = [ROW, {**ROW, "n_layers": "16"}, {**ROW, "model": "gpt", "tp": "8", "fsdp": "32"}]
    runs, _ = parse_rows(rows)
    together = Table.of(runs).predict(shipped())
    alone = [Table.of([run]).predict(shipped())[0] for run in runs]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_the_command_prints_json_and_nothing_else(tmp_path, capsys):
    path = tmp_path / "runs.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROW))
        writer.writeheader()
        writer.writerows([ROW, {**ROW, "fsdp": "64", "tp": "4"}, {**ROW, "hardware": "?"}])
    assert main(["validate", "--runs", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in printed["rows"]] == [0, 1]
    assert set(printed["rows"][0]) == {
        "row", "source", "hardware", "model", "predicted_s", "measured_s", "feasible",
    }  # fmt: skip
    assert 0.5 < printed["rows"][0]["predicted_s"] / 8.5 < 2
    assert len(printed["summary"]["skipped"]) == 1
    assert main(["validate", "--runs", str(tmp_path / "absent.csv"), "--json"]) == 2


def test_errors_ranks_and_regret():
    errors = Errors.of(np.array([1.1, 2.0]), np.array([1.0, 4.0]))
    assert np.isclose(errors.mean, 0.3)
    assert errors.within_15 == 0.5
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == -1
    assert regret(np.array([3.0, 1.0]), np.array([2.0, 3.0])) == 0.5


def test_parameters_tell_the_width_of_heads_and_brackets_are_no_name():
    assert run_of().config.head_dim == 128
    assert run_of(params_b="13.7").config.head_dim is None
    run = run_of(model="DeepSeekV3 (w/o MTP)", params_b="", n_layers="61", d_model="7168",
                 n_heads="128", d_ff="18432", vocab="129280")  # fmt: skip
    assert run.config.experts == 256


def test_megatron_pads_vocabularies_to_even_shards():
    gpu = {"hardware": "A100 SXM 80GB", "n_chips": "8", "chips_per_node": "8", "fsdp": "",
           "dtype": "fp16", "vocab": "50257", "optimizer_sharding": "", "remat": ""}  # fmt: skip
    whole = run_of(**gpu, source="Megatron-LM README Jan-2021", dp="8")
    assert whole.config.vocab == 50304  # a multiple of 128
    divided = run_of(**gpu, source="Megatron-LM README Jan-2021", dp="1", tp="8")
    assert divided.config.vocab == 51200  # of 128 x 8


def test_no_constant_is_fitted_to_what_is_no_decoder():
    assert run_of().is_complete
    for model in ("TransGAN generator", "wan2.1-14b (video DiT)"):
        assert not run_of(model=model).is_complete
