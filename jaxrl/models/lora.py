"""Low-rank adapters: parameters of their own type, so that a run can train them alone.

    graphdef, adapters, rest = nnx.split(model, LoraParam, ...)

Gradients taken with respect to `adapters` alone never make those of the frozen kernels.
"""

from flax import nnx
from jaxtyping import Array, Float

from jaxrl.models.config import LoraConfig

Weights = dict[str, Float[Array, "..."]]


class LoraParam(nnx.Param):
    """A or B of an adapter."""


def factors(name: str) -> tuple[str, str]:
    """Names of A [inputs, rank] and B [rank, outputs] of a kernel's adapter, both flattened."""
    return f"{name}_lora_a", f"{name}_lora_b"


def merged(weights: Weights, config: LoraConfig | None) -> Weights:
    """Weights of a layer, or of all stacked, with the adapters added to their kernels.

    W + s·A·B; what decoding reads, where a product of its own would cost more than it saves.
    """
    if config is None:
        return weights
    weights = dict(weights)
    for name in config.targets:
        a, b = (weights.pop(factor) for factor in factors(name))
        kernel = weights[name]
        weights[name] = kernel + (config.scale * (a @ b)).astype(kernel.dtype).reshape(kernel.shape)
    return weights
