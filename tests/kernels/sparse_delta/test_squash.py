"""Several deltas as one, against applying them one after the other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import sparse_delta
from kernels.sparse_delta import codec


def raw(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def trained(n_versions, *, size=200_000, rate=3e-6):
    """bf16 views of float32 masters under steps of a size, as a low learning rate makes them.

    Directions persist from step to step (AR(1)), as those of Adam do.
    """
    rng = np.random.default_rng(0)
    master = rng.normal(scale=0.02, size=size).astype(np.float32)
    direction = rng.normal(size=size).astype(np.float32)
    for _ in range(n_versions):
        yield {"w": jnp.asarray(master, jnp.bfloat16).reshape(-1, 400)}
        direction = 0.8 * direction + 0.6 * rng.normal(size=size).astype(np.float32)
        master = master - rate * direction


def chain(versions):
    return [
        sparse_delta.encode(old, new, base_version=k, version=k + 1)
        for k, (old, new) in enumerate(itertools.pairwise(versions))
    ]


def test_one_delta_does_what_eight_do_and_is_far_smaller():
    versions = list(trained(9))
    steps = chain(versions)
    squashed = sparse_delta.squash(versions[0], *steps)
    assert raw(sparse_delta.apply(versions[0], squashed)) == raw(versions[-1])
    info = sparse_delta.inspect(squashed)
    assert (info.base_version, info.version) == (0, 8)
    assert info.base_digest == sparse_delta.digest(versions[0]).root
    assert info.target_digest == sparse_delta.digest(versions[-1])
    # Coded from both ends, without the versions in between, it could be no other.
    assert squashed == sparse_delta.encode(versions[0], versions[-1], base_version=0, version=8)
    assert len(squashed) < 0.5 * sum(map(len, steps))


def test_composition_is_associative():
    versions = list(trained(5, size=40_000))
    one, two, three, four = chain(versions)
    squash = sparse_delta.squash
    whole = squash(versions[0], one, two, three, four)
    left = squash(versions[0], squash(versions[0], one, two), three, four)
    right = squash(versions[0], one, squash(versions[1], two, three, four))
    assert whole == left == right


def test_there_and_back_is_nothing():
    old, new = trained(2, size=4_000)
    there, back = sparse_delta.encode(old, new), sparse_delta.encode(new, old)
    nothing = sparse_delta.squash(old, there, back)
    assert sparse_delta.inspect(nothing).changed == 0
    assert raw(sparse_delta.apply(old, nothing)) == raw(old)


def test_only_touched_tiles_are_looked_at(monkeypatch):
    rng = np.random.default_rng(0)
    old = {
        "experts": rng.normal(size=(6, 256, 512)).astype(np.float16),
        "rows": rng.normal(size=(2048, 512)).astype(np.float16),
        "cold": rng.normal(size=(256, 512)).astype(np.float16),
    }
    middle = {name: leaf.copy() for name, leaf in old.items()}
    middle["experts"][2, 100, 100] += 1
    middle["rows"][700] += 1
    new = {name: leaf.copy() for name, leaf in middle.items()}
    new["experts"][3, :, 9] += 1
    new["rows"][1800, 4] += 1
    steps = [sparse_delta.encode(old, middle), sparse_delta.encode(middle, new)]
    looked, plain = [], codec.encode_box

    def watched(before, after, *rest, **options):
        looked.append(after.shape)
        return plain(before, after, *rest, **options)

    monkeypatch.setattr(codec, "encode_box", watched)
    squashed = sparse_delta.squash(old, *steps)
    monkeypatch.undo()
    assert raw(sparse_delta.apply(old, squashed)) == raw(new)
    # Experts 2 and 3 of 6; the rows' tiles are 256 high: bands 2 (row 700) and 7 (row 1800) of 8.
    assert sorted(looked) == [(1, 256, 512), (1, 256, 512), (2, 256, 512)]


def test_sharded_tied_and_with_other_tiles():
    mesh = Mesh(np.asarray(jax.devices()), ("a",))
    split = NamedSharding(mesh, P("a"))
    versions = [
        {"tied": (w := jax.device_put(v["w"], split)), "w": w} for v in trained(4, size=64_000)
    ]
    steps = chain(versions)
    alone = jax.tree.map(np.asarray, versions[0])
    for base in (versions[0], alone):
        squashed = sparse_delta.squash(base, *steps)
        assert raw(sparse_delta.apply(base, squashed)) == raw(versions[-1])


def test_an_anchor_in_between():
    versions = list(trained(4, size=4_000))
    steps = chain(versions)
    anchor = sparse_delta.encode(None, versions[2], version=2)
    squashed = sparse_delta.squash(versions[0], anchor, steps[2])
    assert raw(sparse_delta.apply(versions[0], squashed)) == raw(versions[3])


def test_gaps_in_the_chain_and_damage_are_refused():
    versions = list(trained(4, size=4_000))
    steps = chain(versions)
    with pytest.raises(sparse_delta.WrongBase):
        sparse_delta.squash(versions[0], steps[0], steps[2])
    with pytest.raises(sparse_delta.Damaged):
        sparse_delta.squash(versions[0], steps[0], steps[1][:-1])
    with pytest.raises(ValueError, match="at least one payload"):
        sparse_delta.squash(versions[0])
