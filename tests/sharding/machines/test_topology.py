"""Clusters: names, files, devices, and the speed of groups on their wires."""

import json
from dataclasses import dataclass

import jax
import pytest

from sharding.machines.topology import AXES, Cluster, catalog, find_chip


def degrees(**sizes):
    return tuple(sizes.get(axis, 1) for axis in AXES)


def speed(name, axis, first="tensor", **sizes):
    found = Cluster.from_name(name).axis_bandwidth(degrees(**sizes), first)
    return found[AXES.index(axis)] / 1e9


@pytest.mark.parametrize(
    ("name", "devices", "node"),
    [
        ("v5e:16x16", 256, 256),
        ("v5p:8x8x16x2slices", 2048, 1024),
        ("tpu7x:4x4x8", 256, 256),
        ("h100:8x8", 64, 8),
        ("h100:64", 64, 8),
        ("v5p:64", 64, 64),
    ],
)
def test_names(name, devices, node):
    cluster = Cluster.from_name(name)
    assert (cluster.device_count, cluster.node_size) == (devices, node)
    assert not cluster.warnings


@pytest.mark.parametrize(
    "name", ["v5q:4x4", "v5e", "v5e:4x", "h100:2x2x2", "v5e:4x4x4", "h100:2x8x2slices"]
)
def test_a_name_that_makes_no_sense_lists_what_does(name):
    with pytest.raises(ValueError, match=r"write CHIP:SHAPE, as v5e:16x16|is wired as"):
        Cluster.from_name(name)


def test_a_shape_larger_than_is_sold_is_a_warning():
    assert "sold up to 16x16 a slice" in Cluster.from_name("v5e:32x16").warnings[0]
    assert "up to 8 chips in one switch domain" in Cluster.from_name("h100:1x16").warnings[0]


def test_closed_rings_move_twice_what_lines_do():
    # v5e: 45 GB/s a link and way; only a dimension of 16 is closed.
    assert speed("v5e:16x16", "tensor", tensor=16, fsdp=16) == 2 * 45
    assert speed("v5e:8x8", "fsdp", fsdp=64) == 2 * 45
    assert speed("v5e:16x16", "fsdp", fsdp=256) == 2 * 2 * 45
    # v5p: three closed dimensions of 90 GB/s.
    assert speed("v5p:4x4x4", "fsdp", fsdp=64) == 3 * 2 * 90


def test_the_first_axis_takes_the_best_dimensions():
    wide = speed("v5e:16x16", "fsdp", first="fsdp", fsdp=16, tensor=16)
    narrow = speed("v5e:16x8", "fsdp", first="tensor", tensor=16, fsdp=8)
    assert (wide, narrow) == (90, 45)


def test_slices_and_nodes_pool_their_networks():
    # 8 chips of a v5p... each has its share of 25 GB/s a host of four.
    assert speed("v5p:4x4x4x2slices", "data", data=2, fsdp=64) == 25 / 4
    # A group of 16 over two nodes: eight network cards of 50 GB/s, below NVLink's 450.
    assert speed("h100:2x8", "fsdp", fsdp=16) == 400
    assert speed("h100:2x8", "data", tensor=8, data=2) == 50
    assert speed("h100:2x8", "tensor", tensor=8, data=2) == 450


def test_devices_of_a_chip_are_nearest():
    assert speed("tpu7x:4x4x4", "tensor", tensor=2, fsdp=64) > speed(
        "tpu7x:4x4x4", "fsdp", tensor=2, fsdp=64
    )


def test_a_file_of_nodes(tmp_path):
    path = tmp_path / "mixed.json"
    nodes = [
        {"chip": "v100", "count": 4, "repeat": 3, "network_bytes_per_s": 1.25e9},
        {"chip": "t4", "count": 4, "memory_bytes": 12e9},
    ]
    path.write_text(json.dumps({"name": "mixed", "nodes": nodes}))
    cluster = Cluster.from_name(str(path))
    assert (cluster.chip_count, cluster.node_size) == (16, 4)
    assert cluster.memory_bytes == 12e9  # the least
    assert cluster.network_bytes_per_s == 1.25e9 / 4
    matrix = [[0.0, 4e9], [4e9, 0.0]]
    path.write_text(json.dumps({"nodes": [nodes[0] | {"repeat": 2}], "bandwidth": matrix}))
    assert Cluster.from_json(path).network_bytes_per_s == 1e9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no cluster file"),
        ('{"chips": 3}', "is no cluster file"),
        ('{"nodes": [{"chip": "abacus"}]}', "a node's chip is 'abacus'; one of"),
        ('{"nodes": [{"chip": "t4", "beads": 10}]}', r"a chip has no fields \['beads'\]"),
        ('{"nodes": [{"chip": "t4"}], "bandwidth": []}', None),
        ('{"nodes": [{"chip": "t4"}], "bandwidth": [[1, 2], [3, 4]]}', "2 rows for 1 nodes"),
        ('{"nodes": [{"chip": "t4"}, {"chip": "t4"}], "bandwidth": [[1, 2], [3]]}', "for 2 nodes"),
        ('{"nodes": [{"chip": "t4"}], "measured": 3}', "measured holds constants by name"),
        ('{"nodes": ["h100"]}', r'nodes is a list of objects as {"chip": NAME, "count": CHIPS}'),
        ('{"nodes": []}', "a cluster needs at least one node"),
        ('{"nodes": [{"chip": ["t4"]}]}', "one of .*h100"),
        ('{"nodes": [{"chip": "t4", "count": 0}]}', "takes positive whole numbers"),
        ('{"nodes": [{"chip": "t4", "network_bytes_per_s": "1 GB"}]}', "numbers of bytes/s"),
        ('{"nodes": [{"chip": "t4"}], "bandwidth": 5e9}', "bandwidth takes numbers of bytes/s"),
        ('{"chip": "v5e", "shape": "4x4"}', r"shape takes positive whole numbers, as \[4, 4, 8\]"),
        ('{"chip": "v5e", "shape": [4, 4], "slice": 2}', r"no fields \['slice'\], only"),
        ('{"chip": "v5e", "shape": [4, 4, 4]}', "v5e is wired as torus of rank 2"),
    ],
)
def test_a_file_that_makes_no_sense_says_why(tmp_path, text, message):
    path = tmp_path / "cluster.json"
    path.write_text(text)
    if message is None:
        assert Cluster.from_json(path).chip_count == 1
        return
    with pytest.raises(ValueError, match=message):
        Cluster.from_json(path)


def test_every_error_of_a_file_lists_what_it_may_hold(tmp_path):
    path = tmp_path / "cluster.json"
    for text in ("[1]", '{"nodes": ["h100"]}', '{"shape": [4]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r'is no cluster file: .*"shape": \[SIZES\]'):
            Cluster.from_json(path)
    with pytest.raises(ValueError, match="is no cluster file"):
        Cluster.from_json(tmp_path / "absent.json")


def test_one_node_with_a_bandwidth_matrix_has_its_own_network(tmp_path):
    path = tmp_path / "cluster.json"
    path.write_text('{"nodes": [{"chip": "t4", "count": 4}], "bandwidth": [[0]]}')
    found = Cluster.from_json(path)
    assert found.network_bytes_per_s == find_chip("t4").host_bytes_per_s / 4


@dataclass(frozen=True)
class _Gpu:
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class _Tpu:
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_a_process_for_each_gpu_makes_no_node_of_it():
    gpus = [_Gpu(process_index=i, slice_index=i // 8) for i in range(16)]
    assert Cluster.from_devices(gpus).shape == (2, 8)
    with pytest.raises(ValueError, match=r"nodes of \[4, 8\] devices"):
        Cluster.from_devices(gpus[:12])


def test_devices_that_are_no_box_are_refused():
    tpus = [_Tpu((x, y, 0)) for x in range(2) for y in range(4)]
    assert Cluster.from_devices(tpus).shape == (2, 4)
    with pytest.raises(ValueError, match=r"7 devices do not fill the box that they span"):
        Cluster.from_devices(tpus[:-1])
    with pytest.raises(ValueError, match="a cluster needs devices, got none"):
        Cluster.from_devices([])


def test_the_devices_that_are_there():
    cluster = Cluster.from_devices(jax.devices())
    assert cluster.device_count == len(jax.devices())
    assert cluster.chip.name == "cpu"


@pytest.mark.parametrize(
    ("text", "chip"),
    [
        ("A100 SXM 40GB (1600 Gb/s RoCE per node)", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("GB200 NVL72", "gb200"),
        ("TPU7x (Ironwood)", "tpu7x"),
        ("TPU v5 lite", "v5e"),
        ("V100 SXM3 32GB (DGX-2)", "v100-32gb"),
    ],
)
def test_spellings_of_chips(text, chip):
    found = find_chip(text)
    assert found is not None
    assert found.name == chip


def test_the_catalogue_is_physical():
    for chip in catalog().values():
        assert chip.peak_flops["bf16"] > 0
        assert chip.source
        # More than an hour's worth of memory in a second, or less than a millisecond's, is a typo.
        assert 1e-3 < chip.memory_bytes / chip.hbm_bytes_per_s < 10
        assert chip.kind == ("torus" if chip.torus_rank else "switch")
