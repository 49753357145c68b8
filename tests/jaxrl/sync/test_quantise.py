"""Quantised actors: the format's own bounds, and bit for bit what the learner quantised."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl import sync

LARGEST = {"int8": 127 / 64, "fp8": 448.0}


def by_hand(block: np.ndarray, how: str) -> tuple[np.ndarray, int]:
    """Codes and scale exponent of one block, as OCP MX describes them, in float64."""
    largest = float(np.abs(block).max())
    exponent = -127
    if largest:
        # The smallest at which the largest element fits.
        exponent = next(e for e in range(-127, 128) if largest <= LARGEST[how] * 2.0**e)
    scaled = block.astype(np.float64) / 2.0**exponent
    if how == "int8":
        return np.rint(scaled * 64).astype(np.int8), exponent
    return scaled.astype(np.float32).astype(ml_dtypes.float8_e4m3fn), exponent


@pytest.mark.parametrize("how", ["int8", "fp8"])
@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(
        np.float32,
        (2, 70),
        elements=st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30),
    )
)
def test_blocks_are_those_of_the_standard(how, values):
    found = sync.quantise({"w": jnp.asarray(values)}, how)["w"]
    assert found.values.shape == (2, 70)
    assert found.exponents.shape == (2, 3)
    for row in range(2):
        for block in range(3):
            cut = slice(32 * block, min(70, 32 * block + 32))
            codes, exponent = by_hand(values[row, cut], how)
            assert int(found.exponents[row, block]) - 127 == exponent
            got = np.asarray(found.values[row, cut])
            # A zero may have a sign in fp8.
            np.testing.assert_array_equal(got.astype(np.float32), codes.astype(np.float32))


@pytest.mark.parametrize(("how", "share"), [("int8", 2**-7), ("fp8", 2**-5)])
def test_the_error_is_at_most_half_a_step(how, share):
    """Half a step of the block's scale; in fp8 of the octave of the largest element, 448 · 2⁻⁵."""
    w = np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)
    quantised = sync.quantise({"w": jnp.asarray(w)}, how)
    back = np.asarray(sync.dequantise(quantised, jnp.float32)["w"])
    scale = np.exp2(np.asarray(quantised["w"].exponents).astype(np.float32) - 127)
    bound = np.repeat(scale, 32, axis=-1) * (share if how == "int8" else 16.0)
    assert np.all(np.abs(back - w) <= bound)
    largest = np.abs(w.reshape(16, 8, 32)).max(-1)
    # The scale is the smallest that does not saturate.
    assert np.all(largest <= LARGEST[how] * scale)
    assert np.all(largest > LARGEST[how] * scale / 2)


@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_bfloat16_holds_what_was_quantised_exactly(how):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
    quantised = sync.quantise({"w": w}, how)
    wide = sync.dequantise(quantised, jnp.float32)["w"]
    narrow = sync.dequantise(quantised)["w"]
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(narrow, np.float32), np.asarray(wide))


@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_zeros_and_what_is_not_finite(how):
    w = np.zeros((3, 64), np.float32)
    w[1, 3], w[2, 40] = np.inf, np.nan
    back = np.asarray(sync.dequantise(sync.quantise({"w": jnp.asarray(w)}, how))["w"], np.float32)
    assert np.all(back[0] == 0)
    assert np.all(np.isnan(back[1, :32]))
    assert np.all(back[1, 32:] == 0)
    assert np.all(np.isnan(back[2, 32:]))


def test_only_matrices_that_are_not_kept_are_quantised():
    tree = {
        "wq": jnp.ones((4, 32)),
        "norm_1": jnp.ones((4, 32)),
        "token_embedding": jnp.ones((8, 32)),
        "vector": jnp.ones(32),
        "ids": jnp.ones((4, 32), jnp.int32),
    }
    found = sync.quantise(tree, "int8")
    assert [name for name, leaf in found.items() if isinstance(leaf, sync.Quantised)] == ["wq"]
    all_of_them = sync.quantise(tree, "int8", kept=())
    assert [n for n, leaf in all_of_them.items() if not isinstance(leaf, sync.Quantised)] == [
        "ids", "vector",
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["int8", "fp8"])
@pytest.mark.parametrize("spec", [P("a"), P(None, "a"), P(), P(("a", "b")), P("b", "a")])
def test_quantised_actors_have_what_the_learner_quantised(how, spec):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("a", "b"))
    fsdp = NamedSharding(mesh, P(("a", "b")))
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 192)).astype(np.float32)  # 6 blocks, which 4 shards would cut
    norm = np.ones(16, np.float32)

    def master():
        return {"w": jax.device_put(w, fsdp), "norm": jax.device_put(norm, fsdp)}

    like = {
        "w": jax.ShapeDtypeStruct(w.shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)),
        "norm": jax.ShapeDtypeStruct(norm.shape, jnp.bfloat16, sharding=NamedSharding(mesh, P())),
    }
    store = sync.MemoryStore()
    config = sync.SyncConfig(dtype=jnp.bfloat16, quantise=how)
    publisher = sync.Publisher(store, run_id="r", config=config, receivers=[like])
    actor = sync.Subscriber(store, run_id="r", like=like)
    for version in range(3):
        published = publisher.publish(master(), version)
        assert actor.prepare(), actor.problem
        actor.flip()
        expected = sync.quantise({"w": jnp.asarray(w)}, how)["w"]
        got = actor.params["w"]
        assert got.how == how
        assert got.values.sharding.is_equivalent_to(like["w"].sharding, 2)
        assert np.asarray(got.values).tobytes() == np.asarray(expected.values).tobytes()
        assert np.asarray(got.exponents).tobytes() == np.asarray(expected.exponents).tobytes()
        assert actor.params["norm"].dtype == jnp.bfloat16
        shape = sync.dequantise(actor.params)["w"]
        assert shape.shape == w.shape
        w[3, 5:9] *= np.float32(1.02)
    # Four elements of one block moved a little: neither their scale nor their neighbours did.
    assert published.density <= 5 / (16 * 192)


def test_fewer_codes_than_bf16_weights_change_in_small_steps():
    """A step of 1e-6 moves 1 in 100 bf16 weights, and fewer of their 8-bit codes."""
    rng = np.random.default_rng(0)
    w = (0.02 * rng.normal(size=(256, 256))).astype(np.float32)
    step = 1e-6 * np.sign(rng.normal(size=w.shape)).astype(np.float32)
    density = {}
    for name, config in {
        "bf16": sync.SyncConfig(dtype=jnp.bfloat16),
        "int8": sync.SyncConfig(quantise="int8"),
        "fp8": sync.SyncConfig(quantise="fp8"),
    }.items():
        publisher = sync.Publisher(sync.MemoryStore(), run_id="r", config=config)
        publisher.publish({"w": jnp.asarray(w)}, 0)
        density[name] = publisher.publish({"w": jnp.asarray(w + step)}, 1).density
    assert 0.001 < density["bf16"] < 0.05
    assert density["int8"] < density["bf16"]
    assert density["fp8"] < density["bf16"]
