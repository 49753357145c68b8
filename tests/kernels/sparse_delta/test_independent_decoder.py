"""`FORMAT.md` is enough: a decoder that was written from it alone reads what `encode` writes."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import sparse_delta


def _decoder() -> ModuleType:
    path = Path(__file__).with_name("independent_decoder.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


decoder = _decoder()
# Blank lines and imports do not count.
MAX_LINES = 150
DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "uint8", "int32", "bool")
SHAPES = ((), (0,), (5,), (300, 257), (3, 64, 128))
DENSITIES = (0.0, 0.001, 0.01, 0.3, 1.0)
# Bits of −0, ±inf, NaNs with a payload and either sign, the smallest and largest subnormals.
SPECIAL = {
    "bfloat16": (0x8000, 0x7F80, 0xFF80, 0x7FC5, 0xFF81, 0x0001, 0x807F),
    "float16": (0x8000, 0x7C00, 0xFC00, 0x7E05, 0xFC01, 0x0001, 0x83FF),
    "float32": (1 << 31, 0x7F800000, 0xFF800000, 0x7FC12345, 0xFF800001, 1, 0x807FFFFF),
    "float8_e4m3fn": (0x80, 0x7F, 0xFF, 0x01, 0x87),
}


def _bits(x: jax.Array) -> np.ndarray:
    values = np.asarray(x)
    return values.view(f"<u{values.dtype.itemsize}")


def _array(bits: np.ndarray, dtype: str) -> jax.Array:
    return jnp.asarray(bits.view(jnp.dtype(dtype)))


def _tree(leaves: dict[str, jax.Array]) -> dict[str, tuple[str, np.ndarray]]:
    return {name: (leaf.dtype.name, _bits(leaf)) for name, leaf in leaves.items()}


def _weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(np.uint8).reshape(shape)
    scale = 0.02 if "float" in dtype else 30
    values = np.asarray(rng.normal(scale=scale, size=shape))
    if dtype == "uint8":
        values = np.abs(values)
    values = values.astype(jnp.dtype(dtype))
    return values.view(f"<u{values.dtype.itemsize}")


def _changed(rng: np.random.Generator, bits: np.ndarray, dtype: str, density: float) -> np.ndarray:
    """Steps of a few units in the last place; one change in fifty is to any bits."""
    mask = rng.random(bits.shape) < density
    if dtype == "bool":
        return np.where(mask, 1 - bits, bits).astype(np.uint8)
    step = rng.geometric(0.6, bits.shape) * rng.choice([-1, 1], bits.shape)
    step = np.where(rng.random(bits.shape) < 0.02, rng.integers(1, 1 << 31, bits.shape), step)
    return (bits + np.where(mask, step, 0)).astype(bits.dtype)


def _check(old: dict[str, jax.Array] | None, new: dict[str, jax.Array]) -> set[str]:
    """Decodes the payload from `old` to `new`, compares; returns the modes of its tiles."""
    base_version = None if old is None else 1
    payload = sparse_delta.encode(old, new, version=2, base_version=base_version)
    base, target = None if old is None else _tree(old), _tree(new)
    info = sparse_delta.inspect(payload)
    assert info.target_digest.root == decoder.tree_digest(target)
    decoded = decoder.decode(payload, base)
    assert list(decoded) == sorted(target)
    for name, (dtype, bits) in target.items():
        assert (decoded[name][0], decoded[name][1].dtype) == (dtype, bits.dtype)
        np.testing.assert_array_equal(decoded[name][1], bits, err_msg=name, strict=True)
    return {mode for tensor in info.tensors for mode in tensor.modes}


def _pair(density: float, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]):
    rng = np.random.default_rng([int(density * 1000), len(shapes)])
    old, new = {}, {}
    for dtype in dtypes:
        for shape in shapes:
            name = f"{dtype}{shape}"
            bits = _weights(rng, shape, dtype)
            old[name] = _array(bits, dtype)
            new[name] = _array(_changed(rng, bits, dtype, density), dtype)
    return old, new


@pytest.mark.parametrize("density", DENSITIES)
def test_deltas_of_every_dtype_and_shape(density: float):
    modes = _check(*_pair(density, DTYPES, SHAPES))
    assert modes == set() if density == 0 else "entropy" in modes


@pytest.mark.parametrize("density", [0.001, 0.03])
def test_deltas_and_anchors_of_tensors_of_several_tiles(density: float):
    old, new = _pair(density, ("bfloat16", "float32"), ((1000, 1000),))
    _check(old, new)
    _check(None, new)


def test_anchors():
    _, new = _pair(0.3, DTYPES, SHAPES)
    assert _check(None, new) == {"dense", "planes"}


@pytest.mark.parametrize("dtype", SPECIAL)
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_special_values_in_both_versions(dtype: str, density: float):
    rng = np.random.default_rng(7)
    old = _weights(rng, (64, 100), dtype)
    special = np.array(SPECIAL[dtype], old.dtype)
    old = np.where(rng.random(old.shape) < 0.3, rng.choice(special, old.shape), old)
    new = np.where(rng.random(old.shape) < density, rng.choice(special, old.shape), old)
    leaves = {"w": _array(old, dtype)}, {"w": _array(new, dtype)}
    np.testing.assert_array_equal(_bits(leaves[1]["w"]), new)  # no NaN was made canonical
    _check(*leaves)
    _check(None, leaves[1])


def test_tied_leaves():
    old, new = _pair(0.01, ("bfloat16",), ((300, 257), (5,)))
    (first, second), _ = zip(*old.items(), strict=True)
    old, new = ({"lm_head": t[first], "embed": t[first], "b": t[second]} for t in (old, new))
    _check(old, new)
    _check(None, new)
    tied = {t.name: t.tied_to for t in sparse_delta.inspect(sparse_delta.encode(old, new)).tensors}
    assert tied == {"b": None, "embed": None, "lm_head": "embed"}


def test_few_or_clustered_changes_of_any_size():
    # Few changes are not worth a table; those of a full sub-block have a count that has no byte.
    rng, modes = np.random.default_rng(3), set()
    for n, changed in ((6, [1, 3]), (600, [9]), (1 << 16, range(1024, 1280)), (999, range(99))):
        for bits in (1, 3, 16):
            old = _bits(_array(_weights(rng, (n,), "bfloat16"), "bfloat16"))
            new = old.copy()
            new[list(changed)] ^= rng.integers(1, 1 << bits, len(changed)).astype(np.uint16)
            modes |= _check({"w": _array(old, "bfloat16")}, {"w": _array(new, "bfloat16")})
    assert {"bitmap", "entropy"} <= modes


def test_changes_that_the_tables_do_not_expect():
    # The survey of all changes ends within those of the large tensor, which are of one unit each.
    rng = np.random.default_rng(4)
    large, small = (_weights(rng, (n,), "bfloat16") for n in (1 << 17, 2000))
    far = small.copy()
    far[::67] ^= rng.integers(256, 1 << 15, len(far[::67])).astype(np.uint16)
    far[::300] = small[::300]
    old, new = (
        {"a": _array(first, "bfloat16"), "b": _array(second, "bfloat16")}
        for first, second in ((large, small), (large ^ 1, far))
    )
    assert _check(old, new) == {"entropy", "block-offset"}


def test_the_example_of_the_text():
    text = (Path(sparse_delta.__file__).parent / "FORMAT.md").read_text()
    block = text.split("## An example")[1].split("```")[1]
    payload = bytes.fromhex("".join(re.findall(r"^ *\d+  ((?:[0-9a-f]{2} ?)+)", block, re.M)))
    base, target = (
        {"w": ("bfloat16", _bits(jnp.array(rows, jnp.bfloat16)))}
        for rows in ([[1, 2, -3], [-0.0, 5, 6]], [[1, 2.015625, -3], [0.0, 5, 6]])
    )
    np.testing.assert_array_equal(decoder.decode(payload, base)["w"][1], target["w"][1])
    for tree, sums in ((base, (741444657, 877939985)), (target, (418228183, 1212689693))):
        array = tree["w"][1].view(jnp.bfloat16)
        assert sparse_delta.digest({"w": array}).sums["w"] == sums


@pytest.mark.parametrize("at", [9, 20, 33, 80, 130, 242, 244])
def test_a_damaged_payload_is_refused(at: int):
    old = {"w": jnp.array([[1, 2, -3], [-0.0, 5, 6]], jnp.bfloat16)}
    new = {"w": jnp.array([[1, 2.015625, -3], [0.0, 5, 6]], jnp.bfloat16)}
    payload = bytearray(sparse_delta.encode(old, new, version=7, base_version=6))
    payload[at - 245 if at > 200 else at] ^= 4
    with pytest.raises(AssertionError):
        decoder.decode(bytes(payload), _tree(old))


def test_the_decoder_is_small_and_shares_no_code():
    source = Path(__file__).with_name("independent_decoder.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    passive = {
        line
        for node in imports
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    active = [
        line
        for number, line in enumerate(source.splitlines(), 1)
        if number not in passive and line.strip()
    ]
    assert len(active) <= MAX_LINES
    modules = {
        name.split(".")[0]
        for node in imports
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert modules - set(sys.stdlib_module_names) == {
        "google_crc32c",
        "numpy",
        "xxhash",
        "zstandard",
    }
