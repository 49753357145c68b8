"""Checkpoints: what goes in comes out, and no damage goes unnoticed."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.checkpoint import Checkpointer


def state(value: float = 1.0):
    """Every kind of leaf that a training state holds."""
    return {
        "params": {"w": jnp.arange(6.0).reshape(2, 3) * value, "b": jnp.ones(3, jnp.bfloat16)},
        "empty": jnp.zeros((0, 4)),
        "key": jax.random.key(int(value)),
        "raw_key": jax.random.PRNGKey(3),
        "multiplier": np.float32(value),
        "history": np.arange(4) * float(value),
        "step": int(value),
        "ready": True,
        "nested": [(jnp.int32(2),), None],
    }


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b)
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def saved(folder, steps=(1, 2), keep=2):
    with Checkpointer(folder, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, state(step), metadata={"epoch": step, "names": ["é"]})
    return Checkpointer(folder, keep=keep)


def test_every_kind_of_leaf_comes_back(tmp_path):
    found = saved(tmp_path).restore_latest(state(9))
    assert (found.step, found.metadata) == (2, {"epoch": 2, "names": ["é"]})
    assert_same(found.tree, state(2))


def test_template_may_be_shapes_only(tmp_path):
    checkpointer = saved(tmp_path)
    shapes = jax.eval_shape(lambda: state(9)["params"])
    with Checkpointer(tmp_path / "params") as other:
        other.save(0, state(2)["params"])
        assert_same(other.restore_latest(shapes).tree, state(2)["params"])
    assert checkpointer.steps() == [1, 2]


def test_model_and_optimiser_state(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    other = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, nnx.state(model))
        found = checkpointer.restore_latest(nnx.state(other)).tree
    nnx.update(other, found)
    x = jnp.ones((1, 2))
    np.testing.assert_array_equal(model(x), other(x))


def test_restored_arrays_do_not_trigger_recompilation(tmp_path):
    # An array pinned to its device is another argument type to `jit` than a free one.
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree))
    tree = {"w": jnp.ones(3)}
    step(tree)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree)
        step(checkpointer.restore_latest(tree).tree)
    assert step._cache_size() == 1


def test_sharding_of_the_template_is_kept(tmp_path):
    mesh = jax.make_mesh((len(jax.devices()),), ("embed",))
    sharding = jax.NamedSharding(mesh, jax.P("embed"))
    tree = {"w": jax.device_put(jnp.arange(16.0), sharding)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree)
        found = checkpointer.restore_latest(jax.tree.map(jnp.zeros_like, tree)).tree
    assert found["w"].sharding.is_equivalent_to(sharding, 1)
    np.testing.assert_array_equal(found["w"], np.arange(16.0))


def test_saved_state_may_be_donated_or_changed_at_once(tmp_path):
    donate = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(5):
            array, counts = jnp.full((512, 512), float(step)), np.full(8, step)
            checkpointer.save(step, {"array": array, "counts": counts})
            donate(array).block_until_ready()
            counts[:] = -1
            found = checkpointer.restore_latest({"array": jnp.zeros((512, 512)), "counts": counts})
            np.testing.assert_array_equal(found.tree["array"], step)
            np.testing.assert_array_equal(found.tree["counts"], step)


def test_nothing_to_restore(tmp_path):
    assert Checkpointer(tmp_path / "new").restore_latest(state()) is None


def test_only_the_newest_are_kept(tmp_path):
    checkpointer = saved(tmp_path, steps=(1, 5, 10, 20), keep=2)
    assert checkpointer.steps() == [10, 20]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["00000010", "00000020"]


def test_saving_earlier_than_the_newest_forgets_what_is_later(tmp_path):
    # After falling back to step 1, the run repeats step 2: the later ones are of another past.
    checkpointer = saved(tmp_path, steps=(1, 7, 9), keep=3)
    checkpointer.save(2, state(2))
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2]


def files_of(folder, step):
    data = sorted(p for p in (folder / f"{step:08d}").rglob("*") if p.is_file())
    return [*data, folder / f"{step:08d}.json"]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes() or b"\0")
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.unlink()])
def test_damage_to_any_file_falls_back_to_the_one_before(tmp_path, damage, caplog):
    saved(tmp_path / "good")
    for index, file in enumerate(files_of(tmp_path / "good", 2)):
        if damage is truncate and file.stat().st_size == 0:
            continue
        copy = tmp_path / f"copy{index}"
        shutil.copytree(tmp_path / "good", copy)
        victim = copy / file.relative_to(tmp_path / "good")
        caplog.clear()
        damage(victim)
        found = Checkpointer(copy).restore_latest(state())
        assert found.step == 1, victim
        assert_same(found.tree, state(1))
        if victim.exists() or victim.suffix != ".json":  # without a seal it never was one
            assert "is damaged" in caplog.text


def test_damage_to_all_gives_none(tmp_path):
    checkpointer = saved(tmp_path)
    for step in (1, 2):
        flip_a_bit(files_of(tmp_path, step)[0])
    assert checkpointer.restore_latest(state()) is None


def test_another_state_is_an_error_that_names_the_leaf(tmp_path):
    checkpointer = saved(tmp_path)
    wrong = state()
    wrong["params"]["w"] = jnp.zeros((2, 4))
    wrong["extra"] = 1
    with pytest.raises(ValueError, match=r"of another state.*\['extra'\] is missing.*\['w'\]"):
        checkpointer.restore_latest(wrong)


def test_what_is_no_array_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"\['name'\] is str"):
        Checkpointer(tmp_path).save(1, {"name": "x"})
    with pytest.raises(ValueError, match="keep"):
        Checkpointer(tmp_path, keep=0)


def test_failed_save_is_reported_and_the_earlier_one_stays(tmp_path, monkeypatch):
    checkpointer = saved(tmp_path)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("jaxrl.checkpoint._write_atomically", full)
    checkpointer.save(3, state(3))
    with pytest.raises(OSError, match="No space"):
        checkpointer.wait()
    assert Checkpointer(tmp_path).restore_latest(state()).step == 2
    monkeypatch.undo()  # once there is space again, the run goes on
    checkpointer.save(4, state(4))
    assert checkpointer.restore_latest(state()).step == 4


def test_waiting_has_an_end(tmp_path, monkeypatch):
    checkpointer, disk = Checkpointer(tmp_path), threading.Event()
    monkeypatch.setattr("jaxrl.checkpoint._checksums", lambda _: disk.wait(200.0) and {})
    checkpointer.save(1, state())
    with pytest.raises(TimeoutError, match="is not done"):
        checkpointer.wait(0.05)
    disk.set()
    checkpointer.wait(200.0)


SAVE_FOREVER = """
    import sys
    import jax.numpy as jnp
    from jaxrl.checkpoint import Checkpointer
    checkpointer = Checkpointer(sys.argv[1], keep=2)
    step = 0
    while True:
        step += 1
        checkpointer.save(step, {"w": jnp.full((256, 1024), float(step)), "step": step})
        print(step, flush=True)
"""


def test_kill_during_a_save_leaves_a_good_one(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(tmp_path)]
    template = {"w": jnp.zeros((256, 1024)), "step": 0}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    last = 0
    for lines in (3, 4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(lines):  # the save that the last line announces is under way
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=200)
        process.stdout.close()
        found = Checkpointer(tmp_path).restore_latest(template)
        assert found.step >= lines - 2
        assert found.tree["step"] == found.step
        np.testing.assert_array_equal(found.tree["w"], float(found.step))
        last = found.step
    assert last > 0


def test_saving_blocks_only_for_the_copy(tmp_path, monkeypatch):
    """What is saved may change while the disk is still at work, and is saved as it was."""
    disk = threading.Event()

    def slow(source, target, replace=os.replace):
        assert disk.wait(200.0), "save() waits for the disk"
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    weights = np.ones((300, 1000), np.float32)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": weights})
        weights[:] = 7.0
        assert checkpointer.steps() == []
        disk.set()
        checkpointer.wait()
        found = checkpointer.restore_latest({"w": weights})
    assert found.step == 1
    np.testing.assert_array_equal(found.tree["w"], 1.0)


def test_a_template_may_be_made_of_the_metadata(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"grown": np.arange(5)}, metadata={"size": 5})
        found = checkpoints.restore_latest(
            lambda metadata: {"grown": np.zeros(metadata["size"], int)}
        )
    np.testing.assert_array_equal(found.tree["grown"], np.arange(5))
