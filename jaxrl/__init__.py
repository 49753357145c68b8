"""Safe reinforcement learning of language models in JAX."""
