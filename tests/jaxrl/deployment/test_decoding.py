"""Which division decoding takes, where the search has a short table to choose from."""

import sys
from dataclasses import dataclass, replace

import pytest
from jax.sharding import PartitionSpec as P

from jaxrl import recipes
from jaxrl.deployment import Program, Workload
from jaxrl.deployment.decoding import Decoding, full_decode
from jaxrl.deployment.parts import Part, Plans
from jaxrl.deployment.programs import Written
from jaxrl.models import DecoderConfig
from sharding import Cluster, DoesNotFit, Plan

LAYERS = 16
POLICY = DecoderConfig(vocab_size=64, layers=LAYERS, embed=32, heads=8, kv_heads=4, head_dim=8)
WORKLOAD = Workload(
    recipe=recipes.get("repo_tb"), policy=POLICY, reward_model=POLICY, prompts_per_step=16,
    prompt_len=64, completion_len=128,
)  # fmt: skip
CLUSTER = Cluster.from_name("h100:1x8")
GB = 1e9
LIMIT = CLUSTER.memory_bytes / 2


@dataclass(frozen=True)
class Row:
    """A division: seconds a layer, and bytes of a device that layers share and that each takes.

    The stage of ZeRO says whether what is no expert is divided over the experts' axis.
    """

    mesh: dict[str, int]
    seconds: float
    once: float
    layer: float
    zero: int = 0

    def bytes(self, layers: int) -> float:
        return self.once + layers * self.layer


class Table(Plans):
    """The fastest division of a table that keeps to the pins and fits."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows

    def planned(self, program, cluster, *, pinned=None, memory=1.0) -> Part:
        (layers,) = program.args
        kept = [
            r for r in self.rows
            if all({"zero": r.zero, **r.mesh}.get(name, 1) == n
                   for name, n in (pinned or {}).items())
        ]  # fmt: skip
        if not kept:
            raise ValueError("nothing divides")
        limit = memory * cluster.memory_bytes
        fits = [r for r in kept if r.bytes(layers) <= limit]
        if not fits:
            raise DoesNotFit("too large", min(r.bytes(layers) for r in kept), limit)
        best = min(fits, key=lambda r: r.seconds)
        size = best.bytes(layers)
        return Part(
            program=program,
            plan=Plan(mesh=best.mesh, inputs={"0/head": P("expert") if best.zero == 3 else P()}),
            step_s=layers * best.seconds, memory_bytes=size, resident_bytes=size,
        )  # fmt: skip


class Lengths(Written):
    """Programs that hold the number of their layers alone."""

    def get(self, write, workload, *sizes) -> list[Program]:
        layers = workload.policy.layers
        return [Program(name="decode", side="actor", step=write, args=(layers,))]


def planned(*rows: Row) -> Part:
    decoding = Decoding(WORKLOAD, Table(list(rows)), Lengths())
    return decoding.planned(CLUSTER, 16, LIMIT / CLUSTER.memory_bytes)


def test_a_lack_of_memory_is_said_where_heads_cannot_be_divided_further():
    """The division that fits has more ways than there are heads of keys."""
    wide = Row({"tensor": 8}, 1.0, 1 * GB, 0.1 * GB)
    with pytest.raises(DoesNotFit) as got:
        planned(
            wide,
            Row({"tensor": 4, "data": 2}, 2.0, LIMIT + 3 * GB, GB),
            Row({"tensor": 2, "data": 4}, 2.0, LIMIT + 1 * GB, GB),
            Row({"data": 8}, 2.0, LIMIT + 5 * GB, GB),
        )
    assert got.value.shortfall_bytes == pytest.approx((1 + 4) * GB)  # four layers are planned
    with pytest.raises(ValueError, match="nothing divides decoding of 16 prompts") as refused:
        planned(wide)
    assert not isinstance(refused.value, DoesNotFit)


@pytest.mark.parametrize("once", [0.0, 0.1, 0.4])
def test_smaller_shards_are_taken_where_all_layers_need_them(once):
    """Few layers fit with experts whole, and all of them only with experts divided."""
    whole = Row({"tensor": 4, "data": 2}, 1.0, once * LIMIT, 0.10 * LIMIT)
    halves = Row({"tensor": 4, "expert": 2}, 1.5, once * LIMIT, 0.03 * LIMIT)
    assert whole.bytes(4) < LIMIT < whole.bytes(LAYERS)
    got = planned(whole, halves)
    assert got.plan.mesh == halves.mesh
    assert got.step_s == pytest.approx(LAYERS * halves.seconds)
    assert got.memory_bytes == pytest.approx(halves.bytes(LAYERS))
    # Where there is memory enough, what is faster is taken.
    roomy = replace(whole, layer=(1 - once) * LIMIT / LAYERS)
    assert planned(roomy, halves).plan.mesh == whole.mesh


def test_the_smallest_that_was_tried_says_what_is_missing():
    rows = [
        Row({"tensor": 4, "data": 2}, 1.0, 0.4 * LIMIT, 0.10 * LIMIT),
        Row({"tensor": 4, "expert": 2}, 2.0, 0.0, 0.10 * LIMIT),
        Row({"tensor": 2, "expert": 4}, 3.0, 0.0, 0.15 * LIMIT),
    ]
    with pytest.raises(DoesNotFit, match="decoding 16 prompts on h100:1x8 needs") as got:
        planned(*rows)
    assert got.value.needed_bytes == pytest.approx(LAYERS * 0.10 * LIMIT)
    assert got.value.limit_bytes == pytest.approx(LIMIT)


def test_other_numbers_of_layers_are_divided_alike(monkeypatch):
    """Half the layers fit with all but experts whole, all of them where the rest is divided too."""
    whole = Row({"expert": 8}, 1.0, 0.30 * LIMIT, 0.05 * LIMIT, zero=0)
    divided = Row({"expert": 8}, 2.0, 0.05 * LIMIT, 0.04 * LIMIT, zero=3)
    got = planned(whole, divided)
    assert got.memory_bytes == pytest.approx(divided.bytes(LAYERS))
    assert got.step_s == pytest.approx(LAYERS * divided.seconds)
    # With the whole device's memory the faster one would fit.
    module = sys.modules["jaxrl.deployment.decoding"]
    monkeypatch.setattr(module, "planned", Table([whole, divided]).planned)
    assert full_decode(got, CLUSTER).memory_bytes == divided.bytes(LAYERS)
    assert whole.bytes(LAYERS) < CLUSTER.memory_bytes
