"""The bench's limits are entropies, its peers are lossless and its pairs are what they say."""

import itertools
import json
import math
import shutil
from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import bench_sparse_delta, harness
from experiments.delta_bench import cold, device, loops, measure, synthetic, tables, traffic
from experiments.delta_bench.codec import Codec, RoundTripError
from experiments.delta_bench.limits import entropy_bits, limits, order, outward_steps
from experiments.delta_bench.measure import FLOOR, Size, floor, speeds
from experiments.delta_bench.ours import FAST, NAME, UNKNOWN
from experiments.delta_bench.pairs import Pair, bits_of, load_versions, save_versions
from experiments.delta_bench.peers import DENSE_XOR, peers
from experiments.delta_bench.recorded import Recording, record
from experiments.delta_bench.synthetic import Simulation, Trajectory, synthetic_pairs
from experiments.delta_bench.targets import notes
from experiments.harness import Run
from experiments.safety.config import ModelConfig

PEERS = {peer.name: peer for peer in peers()}
TINY = Simulation(elements=1 << 16, layers=2)
TINY_RECORDING = Recording(
    model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16),
    sft_steps=2,
    warmup=1,
)


def pair_of(old, new, shape=None):
    shape = shape or np.shape(old)
    sides = [{"w": np.array(x, np.uint16).reshape(shape)} for x in (old, new)]
    return Pair(name="test", old=sides[0], new=sides[1])


def changed_pair(seed, sizes, density, far=False):
    """Random weights of which about this share is changed, by little or to anything."""
    rng = np.random.default_rng(seed)
    old, new = {}, {}
    for i, size in enumerate(sizes):
        before = rng.normal(0, 0.02, size).astype(ml_dtypes.bfloat16).view(np.uint16)
        step = rng.integers(1, 1 << 16 if far else 3, size).astype(np.uint16)
        old[f"t{i}"] = before
        new[f"t{i}"] = np.where(rng.random(size) < density, before + step, before)
    return Pair(name="random", old=old, new=new)


# Limits


def test_one_of_four_changed_by_one_of_two_steps_costs_the_entropy_of_both():
    # Four elements of one exponent, of which one is changed: 4·H(1/4) = 4·(1/4·2 + 3/4·log2 4/3)
    # bits of mask on one change, and the step is always the same: 0 bits.
    found = limits(pair_of([0x3F80] * 4, [0x3F80, 0x3F81, 0x3F80, 0x3F80]))
    expected = 4 * (0.25 * 2 + 0.75 * math.log2(4 / 3))
    assert found.iid == pytest.approx(expected) == pytest.approx(found.given_exponent)


def test_an_exponent_that_tells_all_makes_the_conditional_limit_zero():
    # Every element of exponent 1 changes by +1, none of exponent 127 does: given the old values
    # nothing is left to say. Without them: mask 4·H(1/2)/2 = 2 bits, one kind of step.
    found = limits(pair_of([0x0080, 0x3F80, 0x0090, 0x3F81], [0x0081, 0x3F80, 0x0091, 0x3F81]))
    assert found.given_exponent == 0
    assert found.iid == pytest.approx(2)


def test_limits_agree_with_counting_one_by_one():
    pair = changed_pair(1, [(40, 30), (700,)], 0.2)
    seen, steps, masks = Counter(), Counter(), Counter()
    for name, before in pair.old.items():
        for a, b in zip(before.ravel().tolist(), pair.new[name].ravel().tolist(), strict=True):
            exponent = (a >> 7) % 256
            seen[exponent] += 1
            if a != b:
                masks[exponent] += 1
                plain = [x ^ (0xFFFF if x >= 0x8000 else 0x8000) for x in (a, b)]
                step = plain[1] - plain[0]
                steps[exponent, -step if a >= 0x8000 else step] += 1
    bits = 0.0
    for exponent, count in seen.items():
        share = masks[exponent] / count
        for p in (share, 1 - share):
            bits -= count * p * math.log2(p) if p else 0
    for (exponent, _), count in steps.items():
        bits -= count * math.log2(count / masks[exponent])
    assert limits(pair).given_exponent == pytest.approx(bits / pair.changed, rel=1e-9)


def test_knowing_more_never_costs_more():
    found = limits(changed_pair(2, [(64, 64), (5000,)], 0.05))
    assert found.given_tensor <= found.given_exponent <= found.iid < found.new_value


def test_limits_need_a_change():
    with pytest.raises(ValueError, match="bits per change need a change"):
        limits(pair_of([1, 2], [1, 2]))


def test_order_is_that_of_the_numbers_and_steps_point_away_from_zero():
    values = np.array([-np.inf, -1.0, -1e-40, 0.0, 1e-40, 1.0, np.inf], ml_dtypes.bfloat16)
    assert (np.diff(order(values.view(np.uint16))) > 0).all()
    old, new = np.array([[1.0, -1.0], [1.0078125, -1.0078125]], ml_dtypes.bfloat16)
    assert outward_steps(old.view(np.uint16), new.view(np.uint16)).tolist() == [1, 1]


def test_entropy_of_equal_counts_is_the_logarithm():
    assert entropy_bits(np.array([5, 5, 5, 5, 0])) == pytest.approx(20 * 2)


# Peers


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(
    "pair",
    [
        pair_of([1, 2, 3], [1, 2, 3]),
        pair_of([0x8000, 0x7FC1, 0xFF80], [0x0000, 0x7FC2, 0x7F80]),
        pair_of([7], [9], shape=()),
        pair_of(np.zeros(200_000), np.eye(1, 200_000, 199_999), shape=(2, 100_000)),
        pair_of(np.zeros(140_000), np.eye(1, 140_000, 139_999)[0], shape=(140_000,)),
        pair_of(np.zeros(300 * 3), np.eye(1, 900, 899), shape=(300, 3)),
        pair_of(np.arange(1030), np.arange(1030) + 1, shape=(2, 5, 103)),
        changed_pair(3, [(33, 7), (1,), (513,), (4, 4, 4)], 0.3, far=True),
    ],
    ids=["none", "specials", "scalar", "far", "far in a row", "far rows", "all", "odd"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_peers_are_lossless(name, pair, threads):
    assert PEERS[name].payload(pair, threads)  # which raises RoundTripError itself


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 2000), min_size=1, max_size=4),
    density=st.floats(0, 1),
    far=st.booleans(),
)
def test_peers_are_lossless_on_any_pair(seed, sizes, density, far):
    pair = changed_pair(seed, sizes, density, far)
    for peer in PEERS.values():
        assert peer.payload(pair)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 400), density=st.floats(0, 1))
def test_the_search_finds_all_changes(seed, size, density):
    pair = changed_pair(seed, [size], density)
    old, new = pair.old["t0"], pair.new["t0"]
    np.testing.assert_array_equal(loops.changed(old, new), np.flatnonzero(old != new))


def test_a_codec_that_loses_a_bit_is_refused():
    lossy = replace(DENSE_XOR, apply=lambda old, payload, threads: dict(old))
    with pytest.raises(RoundTripError, match="1 elements of w"):
        lossy.payload(pair_of([1, 2, 3], [1, 2, 4]))


def test_coo_sends_six_bytes_a_change_up_to_its_padding():
    pair = changed_pair(4, [(512, 512)], 0.01)
    payload = PEERS["COO (SparseRL-Sync)"].payload(pair)
    padded = -(-pair.changed // 256) * 256
    assert 6 * padded <= len(payload) <= 6 * padded + 64


def test_fixed_width_blocks_cost_a_byte_each_and_a_byte_and_a_half_a_small_change():
    pair = changed_pair(5, [(256 * 40,)], 0.02)
    size = len(PEERS["block-256, fixed width"].payload(pair))
    expected = 40 + pair.changed + -(-pair.changed // 2)
    assert expected <= size <= expected + 64


# Pairs


def test_versions_survive_their_file(tmp_path):
    versions = [dict(changed_pair(i, [(9, 4), (3,)], 0.5, far=True).new) for i in range(3)]
    versions[1]["t0"] = versions[0]["t0"].copy()
    save_versions(tmp_path / "v.npz", versions)
    found = load_versions(tmp_path / "v.npz")
    assert len(found) == 3
    for saved, read in zip(versions, found, strict=True):
        for name, bits in saved.items():
            np.testing.assert_array_equal(read[name], bits)


def test_synthetic_pairs_have_their_densities_and_are_made_once(tmp_path, monkeypatch):
    made = synthetic_pairs(tmp_path, TINY, (0.01, 0.3, 1.0), seed=0)
    assert [p.density for p in made] == pytest.approx([0.01, 0.3, 1.0], rel=0.03)
    assert made[2].changed == made[2].elements == 1 << 16
    monkeypatch.setattr(synthetic.Trajectory, "run", lambda *_: pytest.fail("simulated again"))
    read = synthetic_pairs(tmp_path, TINY, (0.01, 0.3, 1.0), seed=0)
    for a, b in zip(made, read, strict=True):
        assert a.name == b.name
        assert all(np.array_equal(a.new[n], b.new[n]) for n in a.new)


def test_the_last_update_is_adams():
    # An independent Adam, in float64 and for one layer, on the same gradients.
    simulation = replace(TINY, elements=512, layers=1, steps=5)
    found = Trajectory.run(simulation, seed=0)
    rng = np.random.default_rng(np.random.SeedSequence(0).spawn(1)[0])
    std = 0.02 * np.exp(0.5 * rng.standard_normal())
    start = std * rng.standard_normal((1, 512), np.float32)
    d = rng.standard_normal((1, 512), np.float32).astype(float)
    m, v, total, update = 0.0, 0.0, 0.0, 0.0
    for t in range(1, 6):
        total = total + update
        d = 0.9 * d + math.sqrt(1 - 0.81) * rng.standard_normal((1, 512), np.float32)
        g = 0.3 * d + rng.standard_normal((1, 512), np.float32)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        update = m / (1 - 0.9**t) / np.sqrt(v / (1 - 0.999**t))
    np.testing.assert_allclose(found.start[0], start, rtol=1e-6)
    np.testing.assert_allclose(found.before[0], total, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.last[0], update, rtol=1e-3, atol=1e-4)


def test_bits_are_rounded_as_bf16_rounds():
    # 1 + 2^-8 lies between 1 and 1 + 2^-7 and goes to the even one; a bit more goes up.
    found = bits_of(np.array([1 + 2**-8, 1 + 2**-8 + 2**-20, -0.0], np.float32))
    assert found.tolist() == [0x3F80, 0x3F81, 0x8000]


def test_a_pair_needs_equal_shapes():
    with pytest.raises(ValueError, match="equal names and shapes"):
        Pair(name="x", old={"w": np.zeros(2, np.uint16)}, new={"w": np.zeros(3, np.uint16)})


# Measurements


def test_ratios_are_taken_to_the_baseline_within_rounds(monkeypatch):
    wall, cpu = [0.0], [0.0]
    rounds = itertools.cycle([1.0] * 4 + [10.0] * 4)
    slowdown = itertools.chain([1.0] * 2, rounds)  # both encode before the rounds begin
    monkeypatch.setattr(measure.time, "perf_counter", lambda: wall[0])
    monkeypatch.setattr(measure.time, "process_time", lambda: cpu[0])

    def working(name, seconds):
        """On half a core, of a machine that is ten times slower in every second round."""

        def work(share):
            took = seconds * share * next(slowdown)
            wall[0] += took
            cpu[0] += took / 2

        return Codec(
            name=name,
            encode=lambda o, n, t: work(1.0) or b"",
            apply=lambda o, p, t: work(0.5),
        )

    pair = changed_pair(6, [(1000,)], 0.1)
    contestants = [working("slow", 0.09), working("fast", 0.03)]
    found = speeds(contestants, pair, baseline="slow", rounds=4, threads=1)
    assert found["slow"].encode_times == found["slow"].apply_times == 1
    assert found["fast"].encode_times == pytest.approx(3)
    assert found["fast"].apply_times == pytest.approx(3)
    # The median of two rounds of .03 s and two of .3 s.
    assert found["fast"].encode == pytest.approx(2000 / 0.165 / 1e9)
    assert found["fast"].encode_cores == pytest.approx(0.5)


def test_the_floor_copies():
    pair = changed_pair(7, [(10, 10)], 0.5)
    copied = floor().apply(pair.old, b"", 1)
    assert np.array_equal(copied["t0"], pair.old["t0"])
    assert copied["t0"] is not pair.old["t0"]


def test_size_counts_bits_per_change_and_the_excess():
    pair = changed_pair(8, [(4096,)], 0.1)
    limit = limits(pair)
    size = Size.of(bytes(1000), pair, limit)
    assert size.bits == 8000 / pair.changed
    assert size.ratio == 8192 / 1000
    assert size.over_exponent == pytest.approx(size.bits / limit.given_exponent - 1)


def test_the_nearest_pair_is_nearest_by_its_factor():
    pairs = {n: {"source": "synthetic", "density": d} for n, d in (("a", 0.002), ("b", 0.03))}
    assert tables.nearest({"pairs": pairs}, 0.01) == "b"


# The bench


def finished_config(out):
    return bench_sparse_delta.BenchConfig(
        out=out, densities=(0.01, 1.0), learning_rates=(1e-3,), threads=(1, 2), rounds=1,
        simulation=TINY, recording=TINY_RECORDING,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a small but whole run; first calls are measured by a test of their own."""
    out = tmp_path_factory.mktemp("bench") / "run"
    config = finished_config(out)
    with pytest.MonkeyPatch.context() as patch:
        calls = dict.fromkeys(cold.KEYS, 0.5)
        patch.setattr(cold, "cold_and_cached", lambda _: {"cold": calls, "cached": calls})
        harness.main(bench_sparse_delta.experiment, "bench_sparse_delta", config)
    return out


def test_recorded_versions_are_of_one_training_and_read_the_second_time(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr("experiments.safety.stages.fine_tune", lambda *_: pytest.fail("again"))
    shutil.copytree(finished / "pairs", tmp_path / "run" / "pairs")
    shutil.copy(finished / "config.json", tmp_path / "run")
    config = replace(finished_config(finished), out=tmp_path / "run")
    with Run.open("bench_sparse_delta", config) as run:
        (versions,) = record(run, TINY_RECORDING, (1e-3,), seed=0)
    assert len(versions.weights) == 9
    one, eight = versions.consecutive(), versions.squashed()
    assert one.old is eight.old
    assert 0 < one.density < eight.density < 1
    assert {"embedding", "final_norm"} < set(one.old)


def test_the_bench_weighs_and_times_everybody_on_every_pair(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(tables.pairs_of(summary, "synthetic")) == {"synthetic, 1 %", "synthetic, 100 %"}
    for pair in summary["pairs"].values():
        assert set(pair["sizes"]) == {NAME, FAST, *PEERS}
    for by_threads in summary["speeds"].values():
        assert all(
            set(found) == {NAME, FAST, UNKNOWN, FLOOR, *PEERS} for found in by_threads.values()
        )
    (row,) = summary["catch_up"].values()
    assert row["growth"] > 1
    assert row["squash_bytes"] < row["sum_bytes"]


def test_the_bench_says_what_was_wanted_and_reached(finished):
    summary = json.loads((finished / "summary.json").read_text())
    rows = summary["targets"]
    size = summary["pairs"]["synthetic, 1 %"]["sizes"]
    assert rows["size at 1 %, ÷ slime's"]["got"] == pytest.approx(
        size[NAME]["payload_bytes"] / size[DENSE_XOR.name]["payload_bytes"]
    )
    over = rows["over the conditional limit at 1 %, %"]
    assert over["met"] == (over["got"] <= 10)
    assert rows["largest payload ÷ (dense + 1 % + 4 KiB)"]["met"]


def test_the_report_shows_plots_tables_and_why_squashing_saves_what_it_saves(finished):
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("<table>") >= 8
    # √(8 + 2·(7·.9 + 6·.81 + 5·.729 + 4·.6561 + 3·.59049 + 2·.531441 + .4782969)) = √49.5
    assert "= 7.0 times as far" in page
    assert "Numbers that the codec was asked for" in (finished / "table.txt").read_text()


def test_time_is_parted_into_what_every_element_and_what_every_change_costs():
    # 10⁶ elements of 2 bytes at 2 and 1 GB/s: 1 ms for 1,000 changes and 2 ms for 10,000. Then a
    # change is 1 ms / 9,000 = 111 ns, and 1 ms − 0.111 ms = 0.89 ms is for all elements.
    pairs = {
        name: {"source": "synthetic", "density": d, "elements": 10**6, "changed": int(1e6 * d)}
        for name, d in (("few", 0.001), ("many", 0.01))
    }
    floor_speed = {"encode": 20.0, "apply": 20.0}
    timed = {
        name: {"1": {NAME: {"encode": speed, "apply": speed}, FLOOR: floor_speed}}
        for name, speed in (("few", 2.0), ("many", 1.0))
    }
    summary = {"pairs": pairs, "speeds": timed, "targets": {}, "catch_up": {}}
    note = " ".join(notes(summary, NAME)["Speed"].split())
    assert "ours takes 2.00 ms and 2.00 ms" in note
    assert "0.89 and 0.89 ms of that" in note
    assert "111 and 111 ns for each of the 10 thousand changes" in note


def test_kernel_traffic_is_near_what_cannot_be_avoided():
    # Old and new of bf16 are 4 bytes an element, a bit of mask 1/8: nobody moves less.
    found = traffic.traffic()
    assert 4.125 <= found["TPU pack"]["bytes_per_element"] <= 4.2
    assert 4.125 <= found["GPU pack"]["bytes_per_element"] <= 4.2
    # What the GPU's compaction gathers comes from its cache, but is counted.
    near = {name: row["ratio"] for name, row in found.items() if name != "GPU compact"}
    assert all(1 <= ratio < 1.15 for ratio in near.values()), near


def test_kernels_read_a_model_in_place_between_usual_shardings():
    found = traffic.traffic_by_model()
    single = {name: row["bytes_per_element"] for name, row in traffic.traffic().items()}
    for ways in (1, 4):
        row = found[f"Llama-3.1-8B to {ways} × TP"]
        for chip in traffic.CHIPS:
            assert row[f"{chip}_pack"] == pytest.approx(single[f"{chip} pack"], rel=0.01)
            assert row[f"{chip}_compact"] == pytest.approx(single[f"{chip} compact"], rel=0.01)
    # Over eight, 11,008 columns are 1,376 each, which no multiple of 256 divides.
    assert found["Llama-2-7B to 8 × TP"]["TPU_pack"] > 1.5 * single["TPU pack"]


def test_the_device_bench_runs_instead_of_the_others(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        device, "run", lambda out, *, tiny: asked.append((out, tiny)) or {"device": "x"}
    )
    config = bench_sparse_delta.BenchConfig(out=tmp_path / "run", device=True, tiny=True)
    harness.main(bench_sparse_delta.experiment, "bench_sparse_delta", config)
    assert asked == [(tmp_path / "run", True)]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"device": "x"}
    assert not (tmp_path / "run" / "pairs").exists()


def test_first_calls_are_timed(tmp_path, capsys):
    (pair,) = synthetic_pairs(tmp_path, TINY, (0.01,), seed=0)
    cold.main(str(synthetic.pair_path(tmp_path, 0.01)))
    times = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(times) == set(cold.KEYS)
    assert all(value > 0 for value in times.values())
    assert pair.changed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"densities": (0.0,)}, "densities must be above 0 and at most 1"),
        ({"learning_rates": (-1.0,)}, "learning_rates must be above 0"),
        ({"threads": (2, 1)}, "threads begin with 1"),
        ({"rounds": 0}, "rounds must be ≥ 1"),
        ({"tiny": True}, "tiny is a size of --device alone"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        bench_sparse_delta.BenchConfig(**values)
