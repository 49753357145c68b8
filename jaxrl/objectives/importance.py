"""Importance weights for completions of a policy that is not the present one.

An actor's completions reach the learner some updates late, and its sampler may round otherwise
than the learner does. Three policies are then to be told apart: the *behaviour* policy μ that
wrote the tokens, the *proximal* policy that the learner has before the update, and the policy π
that the update moves. The weight proximal/μ corrects for the first difference; the clipped ratio
π/proximal bounds the second (decoupled PPO, Hilton et al., arXiv:2110.00641; in asynchronous
training: AReaL, arXiv:2505.24298).
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Level = Literal["token", "sequence"]
BeyondCap = Literal["truncate", "mask"]


def importance_ratio(
    log_probs: Float[Array, "B G T"],
    behaviour_log_probs: Float[Array, "B G T"],
    mask: Bool[Array, "B G T"],
    *,
    level: Level,
) -> Float[Array, "B G T"]:
    """π/μ of each token, or of each completion at all of its tokens; 1 on padding of the former.

    Args:
      log_probs: of the policy in the numerator.
      behaviour_log_probs: of the policy that wrote the tokens.
      mask: True on tokens the policy chose.
      level: "token": its own ratio, which ignores how the tokens before it were drawn;
        "sequence": the product over the completion, the unbiased one, of a variance that grows
        exponentially with the length.

    >>> two = jnp.log(jnp.full((1, 1, 2), 2.0))
    >>> importance_ratio(two, 0 * two, two > 0, level="sequence")[0, 0]
    Array([4., 4.], dtype=float32)
    """
    log_ratio = jnp.where(mask, log_probs - behaviour_log_probs, 0.0)
    if level == "sequence":
        log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, axis=-1, keepdims=True), log_ratio.shape)
    return jnp.exp(log_ratio)


def held_to_cap(
    ratio: Float[Array, "*shape"], *, cap: float | None, beyond: BeyondCap
) -> Float[Array, "*shape"]:
    """Importance weights with less variance, at the price of a bias.

    "truncate": min(ratio, cap) (truncated importance sampling, Ionides 2008); "mask": 0 where
    ratio > cap, so that what the present policy would write so much more often says nothing.

    >>> held_to_cap(jnp.array([0.5, 3.0]), cap=2.0, beyond="truncate")
    Array([0.5, 2. ], dtype=float32)
    >>> held_to_cap(jnp.array([0.5, 3.0]), cap=2.0, beyond="mask")
    Array([0.5, 0. ], dtype=float32)
    """
    if cap is None:
        return ratio
    return jnp.minimum(ratio, cap) if beyond == "truncate" else jnp.where(ratio > cap, 0.0, ratio)


@dataclass(frozen=True, kw_only=True)
class ImportanceCorrected:
    """Options that all policy-gradient objectives share.

    Attributes:
      correction: "none": the behaviour policy is the one before the update, as it is when
        actors and learner take turns; "token" or "sequence": the loss is multiplied by the
        weight proximal/behaviour at that level, and any clipped ratio is π/proximal.
      correction_cap: the greatest weight; None for none.
      beyond_cap: what becomes of greater ones, see `held_to_cap`.
    """

    correction: Literal["none", "token", "sequence"] = "none"
    correction_cap: float | None = 2.0
    beyond_cap: BeyondCap = "truncate"

    def __post_init__(self) -> None:
        if self.correction not in ("none", "token", "sequence"):
            raise ValueError(
                f"correction must be 'none', 'token' or 'sequence': {self.correction!r}"
            )
        if self.correction_cap is not None and not self.correction_cap > 0.0:
            raise ValueError(f"correction_cap must be positive or None: {self.correction_cap!r}")
        if self.beyond_cap not in ("truncate", "mask"):
            raise ValueError(f"beyond_cap must be 'truncate' or 'mask': {self.beyond_cap!r}")

    def weights(
        self,
        proximal_log_probs: Float[Array, "B G T"] | None,
        behaviour_log_probs: Float[Array, "B G T"],
        mask: Bool[Array, "B G T"],
    ) -> Float[Array, "B G T"]:
        """The factor of every token's loss; 1 without correction.

        Raises:
          ValueError: a correction without `proximal_log_probs`.
        """
        if self.correction == "none":
            return jnp.ones(mask.shape, behaviour_log_probs.dtype)
        if proximal_log_probs is None:
            raise ValueError(
                f"correction={self.correction!r} weighs by the policy before the update: give "
                "its log-probabilities (`recipe.targets(…, log_probs=…)`), or correction='none'"
            )
        ratio = importance_ratio(
            proximal_log_probs, behaviour_log_probs, mask, level=self.correction
        )
        return held_to_cap(ratio, cap=self.correction_cap, beyond=self.beyond_cap)
