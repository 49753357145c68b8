"""From weights on a device to a payload and back into the weights of another: each part timed.

What `diff` + `finish` and `apply(donate=True)` do, in their own steps, so that the device's part is
told from the host's.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import sparse_delta
from kernels.sparse_delta import host, parse
from kernels.sparse_delta.backends import Backend, device_backend
from kernels.sparse_delta.resident import ResidentLeaf
from kernels.sparse_delta.trees import named_leaves
from kernels.sparse_delta.unpack import Unpacker

DEVICE_STEPS = {
    "encode": ("diff",),
    "apply": ("count classes", "rehearse", "write"),
}
"""Steps that the devices do, the host's being reading, coding and copying."""


def round_trip(
    shape: tuple[int, int], count: int, *, density: float, rounds: int
) -> dict[str, Any]:
    """Times every step, and checks that the receiver ends with the sender's bits.

    Args:
      shape: of each tensor of bf16.
      count: of tensors, all on the first device.
      density: share of the elements that change by one step.
      rounds: of which the fastest counts; one more is run first, for compilation.

    Returns:
      `ms` by step, `elements`, `payload_bytes`, `bits_per_change` and `same_bits`.
    """
    backend = device_backend(jax.devices()[0]) or "reference"
    old, new = _weights(shape, count, density)
    best: dict[str, float] = {}
    found: dict[str, Any] = {"elements": count * shape[0] * shape[1], "same_bits": True}
    base = sparse_delta.digest(old)
    for round_ in range(rounds + 1):
        timed = _Timer()
        delta = timed("diff", lambda: sparse_delta.diff(old, new, backend=backend))
        payload = timed("finish", lambda d=delta: sparse_delta.finish(d, base_digest=base))
        receiver = jax.tree.map(jnp.copy, old)
        got = _received(receiver, payload, backend, timed)
        found["same_bits"] &= _same(got, new)
        if round_:
            best = {step: min(ms, best.get(step, ms)) for step, ms in timed.ms.items()}
        info = sparse_delta.inspect(payload)
        found |= {"payload_bytes": len(payload), "bits_per_change": info.bits_per_change}
    return found | {"ms": best, "rounds": rounds}


class _Timer:
    """Wall-clock milliseconds of steps, each waited for."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    def __call__(self, step: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        done = jax.block_until_ready(work())
        self.ms[step] = 1e3 * (time.perf_counter() - start)
        return done


def _weights(shape: tuple[int, int], count: int, density: float) -> tuple[Any, Any]:
    @jax.jit
    def pair(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        for_value, for_place, for_sign = jax.random.split(key, 3)
        old = 0.02 * jax.random.normal(for_value, shape, jnp.bfloat16)
        bits = lax.bitcast_convert_type(old, jnp.uint16)
        step = jnp.where(jax.random.bernoulli(for_sign, shape=shape), 1, -1).astype(jnp.uint16)
        changed = jax.random.uniform(for_place, shape, jnp.bfloat16) < density
        new = jnp.where(changed, bits + step, bits)
        return old, lax.bitcast_convert_type(new, jnp.bfloat16)

    pairs = {f"w{k:03d}": pair(jax.random.key(k)) for k in range(count)}
    return {name: old for name, (old, _) in pairs.items()}, {
        name: new for name, (_, new) in pairs.items()
    }


def _received(receiver: Any, payload: bytes, backend: Backend, timed: _Timer) -> dict[str, Any]:
    """`apply(receiver, payload, donate=True)` step by step."""
    leaves, _ = named_leaves(receiver, role="old")

    def read() -> Unpacker:
        parsed = parse.read(payload)
        parsed.verify()
        return Unpacker.of(parsed, threads=host.default_threads(), spread=False)

    unpacker = timed("read and verify", read)
    resident = [
        ResidentLeaf(unpacker, leaf, tensor.grid, index, backend, in_place=True)
        for index, (leaf, tensor) in enumerate(
            zip(leaves, unpacker.payload.manifest.tensors, strict=True)
        )
    ]
    counts = timed("count classes", lambda: [leaf.request() for leaf in resident])
    timed("fetch counts", lambda: [np.asarray(one) for of_leaf in counts for one in of_leaf])

    def decode() -> list[Any]:
        for leaf in resident:
            leaf.decode()
        return [leaf.edits for leaf in resident]

    timed("decode and upload", decode)
    timed("rehearse", lambda: [leaf.rehearse() for leaf in resident])
    arrays = timed("write", lambda: [leaf.array() for leaf in resident])
    return {leaf.name: array for leaf, array in zip(leaves, arrays, strict=True)}


def _same(got: Any, want: Any) -> bool:
    @jax.jit
    def differing(a: jax.Array, b: jax.Array) -> jax.Array:
        one, other = (lax.bitcast_convert_type(x, jnp.uint16) for x in (a, b))
        return jnp.any(one != other)

    return not any(bool(differing(got[name], want[name])) for name in want)
