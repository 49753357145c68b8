"""Which implementation of the device half runs: TPU kernels, GPU kernels or plain jnp."""

import math
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.sparse_delta import reference
from kernels.sparse_delta.elements import element_format
from kernels.sparse_delta.tiles import TileGrid
from kernels.sparse_delta.trees import Leaf

Backend = Literal["reference", "tpu", "gpu"]

# A leaf below this is copied to the host and back in less time than kernels are launched in.
_LEAST_ELEMENTS = 1 << 14
# What the kernels index with 32 bits, and the largest tile that they hold in fast memory.
_MOST_ELEMENTS, _LARGEST_TILE = 1 << 31, 1 << 18


def platform_backend(platform: str) -> Backend:
    """The kernels for a platform as JAX names it; plain jnp where there are none."""
    kernels: dict[str, Backend] = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
    return kernels.get(platform, "reference")


def device_backend(device: Any) -> Backend | None:
    """The kernels that run on a device; None where there are none."""
    kernels = platform_backend(device.platform)
    if kernels == "gpu":
        from kernels.sparse_delta.gpu_registers import supports

        return kernels if supports(device) else None
    return None if kernels == "reference" else kernels


def takes(shard: tuple[int, ...], grid: TileGrid) -> bool:
    """Whether the kernels take a shard of this shape; others go by the host."""
    handy = grid.tile[0] * grid.tile[1] <= _LARGEST_TILE
    return handy and bool(shard) and _LEAST_ELEMENTS <= math.prod(shard) < _MOST_ELEMENTS


def backend_of(leaf: Leaf, grid: TileGrid, wanted: Backend | None) -> Backend | None:
    """Which kernels rebuild a leaf; None where the host does.

    Args:
      leaf: of the receiver.
      grid: of its tiles.
      wanted: what the caller asks for; the devices' own kernels, and on CPUs the host, where None.
    """
    value = leaf.value
    if not isinstance(value, jax.Array) or not leaf.shape:
        return None
    sharding = value.sharding
    platform = next(iter(sharding.device_set)).platform
    shard = sharding.shard_shape(leaf.shape)
    in_its_memory = sharding.memory_kind in (None, "device") or platform == "cpu"
    if not in_its_memory or not takes(shard, grid):
        return None
    return wanted or device_backend(next(iter(sharding.device_set)))


def implementation(backend: Backend) -> ModuleType:
    """The module of kernels. Pallas is imported by those who use it only."""
    if backend == "tpu":
        from kernels.sparse_delta import tpu

        return tpu
    if backend == "gpu":
        from kernels.sparse_delta import gpu

        return gpu
    return reference


def operand(array: Array, backend: Backend) -> Array:
    """An array as the kernels of a backend take it: its bits.

    On a TPU a bit-cast by XLA is a copy (other elements may lie in registers in another order), so
    the kernels there take bf16 and float32 as they are.
    """
    if backend == "tpu" and array.dtype in (jnp.bfloat16, jnp.float32):
        return array
    return reference.bits_of(array, element_format(array.dtype))


def dispatch(name: str, backend: Backend, *args: Any, **options: Any) -> Any:
    """Calls a kernel, or the jnp definition where the backend has none for these arguments.

    Args:
      name: of the function in `reference`.
      backend: which kernels.
      *args: of that function; boxes of weights as `operand` gives them.
      **options: of that function.
    """
    kernel = getattr(implementation(backend), name, None)
    if kernel is not None:
        try:
            return kernel(*args, **options)
        except NotImplementedError:
            pass  # for this shape or dtype; the definition takes any
    fused = name.startswith("epilogue")  # whose first operand are float32 weights, no bits
    bits = [arg if fused and k == 0 else _bits_of(arg) for k, arg in enumerate(args)]
    return getattr(reference, name)(*bits, **options)


def _bits_of(arg: Any) -> Any:
    if isinstance(arg, jax.Array) and jnp.issubdtype(arg.dtype, jnp.floating):
        return reference.bits_of(arg, element_format(arg.dtype))
    return arg
