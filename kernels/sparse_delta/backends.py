"""Which implementation of the device half runs: TPU kernels, GPU kernels or plain jnp."""

from types import ModuleType
from typing import Any, Literal

from kernels.sparse_delta import reference

Backend = Literal["reference", "tpu", "gpu"]


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


def implementation(backend: Backend) -> ModuleType:
    """The module of kernels. Pallas is imported by those who use it only."""
    if backend == "tpu":
        from kernels.sparse_delta import tpu

        return tpu
    if backend == "gpu":
        from kernels.sparse_delta import gpu

        return gpu
    return reference


def dispatch(name: str, backend: Backend, *args: Any, **options: Any) -> Any:
    """Calls a kernel, or the jnp definition where the backend has none for these arguments."""
    kernel = getattr(implementation(backend), name, None)
    if kernel is not None:
        try:
            return kernel(*args, **options)
        except NotImplementedError:
            pass  # for this shape or dtype; the definition takes any
    return getattr(reference, name)(*args, **options)
