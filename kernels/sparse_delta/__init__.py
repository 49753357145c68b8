"""Lossless sparse deltas between two versions of a pytree of arrays."""
