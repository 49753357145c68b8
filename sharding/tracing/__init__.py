"""From any JAX function to a `Program`: its jaxpr, walked, with its dimensions named."""
