"""Plans: which spec a leaf gets, and what happens on devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxrl.models import Decoder, DecoderConfig, logical_axes
from sharding import Cluster, Plan, leaf_path

RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}


def test_a_leaf_takes_the_spec_of_the_longest_matching_end():
    plan = Plan(
        mesh={"a": 2, "b": 2},
        specs={"kernel": P("a"), "layers/kernel": P("b"), "policy/layers/kernel": P(("a", "b"))},
    )
    assert plan.spec("kernel") == P("a")
    assert plan.spec("head/kernel") == P("a")
    assert plan.spec("critic/layers/kernel") == P("b")
    assert plan.spec("mu/policy/layers/kernel") == P(("a", "b"))
    # Whole names only, and replicated where nothing matches.
    assert plan.spec("layers/prekernel") == plan.spec("kernel/bias") == P()


@pytest.mark.parametrize(
    ("names", "rules", "expected"),
    [
        (("embed", "mlp"), {"embed": "x", "mlp": "y"}, P("x", "y")),
        (("embed", "mlp"), {"mlp": "y"}, P(None, "y")),
        (("embed", None), {"embed": None}, P(None, None)),
        # One mesh axis splits one dimension of an array, the first that claims it.
        (("embed", "embed"), {"embed": "x"}, P("x", None)),
        (("embed", "mlp"), {"embed": ("x", "y"), "mlp": "y"}, P(("x", "y"), None)),
        (("embed", "mlp"), {"embed": "y", "mlp": ("x", "y")}, P("y", "x")),
    ],
)
def test_rules_give_every_mesh_axis_to_one_dimension(names, rules, expected):
    plan = Plan.from_rules({"w": names}, mesh={"x": 2, "y": 2}, rules=rules)
    assert plan.spec("w") == expected


def test_rules_read_the_axes_that_parameters_carry():
    config = DecoderConfig(vocab_size=8, layers=2, embed=8, heads=4, kv_heads=2, head_dim=4, mlp=8)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    params = {"policy": nnx.state(model)}
    plan = Plan.from_rules(logical_axes(params), mesh={"fsdp": 2, "tensor": 2}, rules=RULES)
    assert plan.spec("policy/layers/query") == P(None, "fsdp", "tensor", None)
    # A parameter whose own name is that of Flax's wrapper.
    assert plan.spec("policy/layers/value") == P(None, "fsdp", "tensor", None)
    assert plan.spec("policy/layers/down") == P(None, "tensor", "fsdp")
    assert plan.spec("policy/final_norm") == P("fsdp")
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert sorted(paths) == sorted(plan.specs)


def test_moments_lie_with_their_parameters():
    plan = Plan(mesh={"x": 4}, specs={"layers/w": P(None, "x")})
    params = {"layers": {"w": jnp.arange(32.0).reshape(4, 8)}, "scale": jnp.ones(3)}
    bound = plan.bind()
    state = bound.place(optax.adam(1e-3).init(params))[0]
    assert state.mu["layers"]["w"].sharding.spec == P(None, "x")
    assert state.nu["layers"]["w"].addressable_shards[0].data.shape == (4, 2)
    assert state.mu["scale"].sharding.is_fully_replicated
    assert state.count.sharding.is_fully_replicated
    placed = bound.place(params)
    np.testing.assert_array_equal(placed["layers"]["w"], params["layers"]["w"])
    # Statistics of less than the parameter (Adafactor's rows) have no such axis.
    (of_row,) = bound.shardings({"layers": {"w": jnp.ones(4)}})
    assert of_row.is_fully_replicated


def test_a_single_device_holds_everything_whole():
    bound = Plan.single_device().bind()
    placed = bound.place({"w": jnp.ones((4, 3))})
    assert placed["w"].sharding.device_set == {jax.devices()[0]}
    assert bound.place_batch({"x": jnp.ones(5)})["x"].sharding.device_set == {jax.devices()[0]}


def test_a_batch_is_split_along_its_leading_axis():
    bound = Plan(mesh={"data": 2, "fsdp": 2, "tensor": 2}, batch=("data", "fsdp")).bind()
    batch = bound.place_batch({"tokens": jnp.arange(8).reshape(4, 2)})
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(1, 2)}
    with pytest.raises(ValueError, match=r"the batch's tokens 4 ways, which its size 6 does not"):
        bound.place_batch({"tokens": jnp.zeros((6, 2))})


def test_what_the_devices_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"needs 16 devices, got 8; plan for the devices"):
        Plan(mesh={"x": 4, "y": 4}).bind()
    with pytest.raises(ValueError, match=r"needs 2 devices, got 1"):
        Plan(mesh={"x": 2}).bind(jax.devices()[:1])
    bound = Plan(mesh={"x": 4}, specs={"w": P("x")}).bind()
    with pytest.raises(ValueError, match=r"w 4 ways, which its size 6 does not allow.*\(6, 2\)"):
        bound.place({"w": jnp.zeros((6, 2))})


def test_a_plan_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match=r"w names mesh axes \['y'\]; the mesh has \['x'\]"):
        Plan(mesh={"x": 2}, specs={"w": P("y")})
    with pytest.raises(ValueError, match=r"spec of batch names mesh axes \['data'\]"):
        Plan(mesh={"x": 2}, batch=("data",))
    with pytest.raises(ValueError, match="at least one device: x=0"):
        Plan(mesh={"x": 0})


def test_a_plan_for_devices_finds_its_cluster_again():
    here = Cluster.from_devices(jax.devices())
    plan = Plan(mesh={"data": 8}, cluster=here.name, where=here)
    assert Plan.from_json(plan.to_json()).where == here


def test_what_is_no_saved_plan_is_refused():
    printed = {"model": "gpt2", "mesh": {"data": 8}, "step_time_s": 1.0}
    with pytest.raises(ValueError, match=r"no plan: it has model, step_time_s.*Plan\.save writes"):
        Plan.from_json(json.dumps(printed))
    with pytest.raises(ValueError, match="an object with a mesh is needed"):
        Plan.from_json("[]")
    # What is left out keeps its default.
    assert Plan.from_json('{"mesh": {"data": 8}}') == Plan(mesh={"data": 8})
