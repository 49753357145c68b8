"""How programs that train a model are compiled."""

# Products that XLA:TPU takes apart to move shards of a weight meanwhile ("windowed einsum",
# arXiv:2105.04663, section 4.3) are loops, and between them and the attention kernel of the
# backward pass its layout assignment negotiates without end: Llama-3-8B on v5e:8x8 was given up
# after ten minutes, and takes 71 s with products whole. Gathers still overlap with products, for
# they are asynchronous.
_WHOLE_PRODUCTS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def training_options(platform: str) -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for a step that trains a decoder.

    Args:
      platform: "tpu", "gpu" or "cpu".

    Returns:
      None where the compiler's own defaults serve.
    """
    return dict(_WHOLE_PRODUCTS) if platform == "tpu" else None
