"""The experiment on weight synchronisation at its smallest, and its cost model."""

import json

import numpy as np
import pytest

from experiments import weight_sync
from experiments.sync_bench import cost_model, transports
from experiments.sync_bench.contestants import from_dense
from jaxrl.sync import Link


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "weight_sync"
    weight_sync.main(["--preset", "tiny", "--out", str(out)])
    return out


def test_every_contestant_is_measured_on_every_link(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["links"]) == ["10gbit,1ms", transports.LOOPBACK]
    for found in (*summary["links"].values(), *summary["larger"].values()):
        assert list(found) == ["dense", "COO", "gaps + values", "ours"]
        for m in found.values():
            assert m["total_s"] >= m["fetch_s"] > 0
            assert 0 < m["pause_s"] <= m["total_s"]
    emulated = summary["links"]["10gbit,1ms"]
    for m in emulated.values():
        model = cost_model.seconds(
            Link.parse("10gbit,1ms"), m["size_bytes"], requests=m["requests"]
        )
        assert m["fetch_s"] >= model
    (found,) = summary["rates"].values()
    assert found["sizes"]["dense"] == found["dense_bytes"] == 2 * found["elements"]
    assert summary["step_s"] > 0


def test_the_report_shows_tables_and_plots(folder, capsys):
    page = (folder / "report.html").read_text()
    assert "model: compressed" in page
    assert "loopback TCP" in page
    assert "Computed, not measured" in page
    # Finished: shows the same table again, and measures nothing.
    before = (folder / "summary.json").stat().st_mtime_ns
    weight_sync.main(["--preset", "tiny", "--out", str(folder)])
    assert (folder / "table.txt").read_text() in capsys.readouterr().out
    assert (folder / "summary.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--link", "fast"], "such as 1gbit,20ms"),
        (["--link", "", "--no-loopback"], "nothing to measure"),
        (["--learning-rates", "0"], "learning_rates must be above 0"),
        (["--copies", "0"], "copies must be 1 or greater"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        weight_sync.main([*flags, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


def test_the_cost_model_has_the_papers_numbers():
    """Table of arXiv:2605.07330: raw and compressed ratios of models of 8 B to 671 B weights."""
    for density, raw, compressed in ((0.0074, 45, 85), (0.0062, 54, 101), (0.0104, 32, 60)):
        found = cost_model.sizes(1e9, density)
        assert found.dense / found.sparse == pytest.approx(raw, rel=0.01)
        assert found.dense / found.compressed == pytest.approx(compressed, rel=0.01)
    link = Link.parse("8gbit,20ms")
    assert cost_model.seconds(link, 1e9, requests=3) == pytest.approx(1.06)


def test_copies_are_one_model():
    weights = {"a": np.arange(6, dtype=np.uint16).reshape(2, 3), "b": np.zeros(1, np.uint16)}
    larger = weight_sync.repeated(weights, 3)
    assert sorted(larger) == ["0/a", "0/b", "1/a", "1/b", "2/a", "2/b"]
    assert sum(x.size for x in larger.values()) == 21
    data = b"".join(x.tobytes() for x in larger.values())
    back = from_dense(data, larger)
    assert all(np.array_equal(back[name], larger[name]) for name in larger)
    assert all(sorted(larger[f"{i}/a"].ravel()) == list(range(6)) for i in range(3))
