"""What generation remembers between two tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32


class KeyValue(NamedTuple):
    """Keys and values of one layer, [..., kv_heads, head_dim] each."""

    key: Float[Array, "*batch K d"]
    value: Float[Array, "*batch K d"]


class CachedKeyValue(NamedTuple):
    """Keys and values of S positions of one layer, in the order in which attention reads them.

    Scores are queries · key and results weights · value: products of two matrices as they stand.
    With the positions first, the product for the scores transposed all keys at every token.
    """

    key: Float[Array, "*batch d S"]
    value: Float[Array, "*batch S d"]

    @classmethod
    def of_prompt(cls, kv: KeyValue) -> "CachedKeyValue":
        """From [B, P, kv_heads, head_dim] to [B, kv_heads, …]."""
        return cls(jnp.transpose(kv.key, (0, 2, 3, 1)), jnp.swapaxes(kv.value, 1, 2))

    @classmethod
    def empty(cls, batch: tuple[int, ...], head_dim: int, dtype: jnp.dtype) -> "CachedKeyValue":
        """No position yet; see `with_room`."""
        return cls(jnp.zeros((*batch, head_dim, 0), dtype), jnp.zeros((*batch, 0, head_dim), dtype))

    def with_room(self, size: int) -> "CachedKeyValue":
        """The same with `size` positions; what is added is zero."""
        more = size - self.value.shape[-2]
        unchanged = [(0, 0)] * (self.value.ndim - 2)
        return CachedKeyValue(
            jnp.pad(self.key, [*unchanged, (0, 0), (0, more)]),
            jnp.pad(self.value, [*unchanged, (0, more), (0, 0)]),
        )

    def write(self, new: KeyValue, step: Int32[Array, ""]) -> "CachedKeyValue":
        """Puts one position, [B, G, kv_heads, head_dim], into caches of [B, kv_heads, G, …]."""
        key, value = (jnp.swapaxes(x, 1, 2) for x in new)
        update = jax.lax.dynamic_update_slice_in_dim
        return CachedKeyValue(
            update(self.key, key[..., None], step, axis=-1),
            update(self.value, value[..., None, :], step, axis=-2),
        )


class Rotation(NamedTuple):
    """Cosine and sine by which rotary embeddings turn each pair at each position."""

    cos: Float32[Array, "*batch 1 half"]
    sin: Float32[Array, "*batch 1 half"]


class Turns(NamedTuple):
    """Rotations of one pass through the network.

    Attributes:
      everywhere: of layers that see all tokens, and of all where `windowed` is None.
      windowed: of layers with a window, where theirs is another one (Gemma 3).
    """

    everywhere: Rotation
    windowed: Rotation | None

    def of_layer(self, has_window: bool | Bool[Array, ""]) -> Rotation:
        """The rotation of a layer; what it is may be known only inside a scan."""
        if self.windowed is None:
            return self.everywhere
        if isinstance(has_window, bool):
            return self.windowed if has_window else self.everywhere
        return jax.tree.map(
            lambda local, rest: jnp.where(has_window, local, rest), self.windowed, self.everywhere
        )


class Cache(NamedTuple):
    """A batch that is being generated, one entry for each layer.

    Layers stand apart, not stacked, so that a step writes to them in place: it would copy every
    slice that it took from a stack.

    Attributes:
      prompt: of the prompts, batch axes [B, kv_heads].
      prompt_mask: True on real prompt tokens.
      turns: of every completion token to come, batch axes [T, B]: a table, because inside the
        loop cosine and sine were computed again in every operation that reads them.
      own: of the completions, batch axes [B, kv_heads, G].
    """

    prompt: tuple[CachedKeyValue, ...]
    prompt_mask: Bool[Array, "B P"]
    turns: Turns
    own: tuple[CachedKeyValue, ...]

    def with_room(self, size: int) -> "Cache":
        """The same with room for `size` tokens of every completion."""
        return self._replace(own=tuple(kv.with_room(size) for kv in self.own))
