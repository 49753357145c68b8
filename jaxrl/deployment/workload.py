"""What a run asks of its machines: models, recipe and sizes."""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
from scipy.optimize import root_scalar

from jaxrl.learner import OptimizerConfig
from jaxrl.models import DecoderConfig
from jaxrl.recipes import Recipe

EXPERT_CAPACITY = 2.0
"""Rows that a device takes from each other, as a multiple of a balanced router's, where a model
does not say it: room for whatever comes is more memory than the rest of an update."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step of a run, without a machine.

    Attributes:
      recipe: the algorithm.
      policy: the decoder that is trained; the reference policy has the same structure.
      prompts_per_step: B of an update.
      prompt_len: P, tokens of a prompt.
      completion_len: T, tokens of a completion, the longest.
      mean_len: tokens of a completion on average; None: all are the longest. Every token ends its
        completion with equal probability, until T ends it.
      reward_model: trunk of a learned reward; None: a function on the host.
      cost_model: trunk of a learned cost; None: a function on the host.
      critic: trunk of the critic, where the recipe has value heads; None: like the policy.
      optimizer: of policy and critic.
      density: share of the bf16 weights that an update changes, for the cost of publishing them.
      as_configured: models are executed as their configurations say, and not as a large run would
        (see `executed`), and the learner's devices generate with its own parameters.

    Raises:
      ValueError: a size or share out of its range.
    """

    recipe: Recipe
    policy: DecoderConfig
    prompts_per_step: int = 64
    prompt_len: int = 512
    completion_len: int = 512
    mean_len: float | None = None
    reward_model: DecoderConfig | None = None
    cost_model: DecoderConfig | None = None
    critic: DecoderConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-6))
    density: float = 0.01
    as_configured: bool = False

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "prompt_len", "completion_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mean_len is not None and not 1 <= self.mean_len <= self.completion_len:
            raise ValueError(
                "mean_len lies between 1 and completion_len, or is None: "
                f"{self.mean_len=}, {self.completion_len=}"
            )
        if not 0 < self.density <= 1:
            raise ValueError(f"density is a share of the weights in (0, 1], got {self.density}")

    @property
    def group_size(self) -> int:
        return self.recipe.group_size

    @property
    def trained_tokens(self) -> float:
        """Completion tokens of one update, on average."""
        mean = self.completion_len if self.mean_len is None else self.mean_len
        return float(self.prompts_per_step * self.group_size * mean)

    def decoding_steps(self, prompts: int) -> float:
        """Tokens of the longest completion of a batch of prompts, on average: it ends the batch.

        Σₜ 1 − (1 − S(t))ⁿ over t < T, where S(t) = (1 − p)ᵗ is the share of completions that are
        longer than t, and n their number.
        """
        if self.mean_len is None:
            return float(self.completion_len)
        longer = (1 - self._ending()) ** np.arange(self.completion_len)
        return float(np.sum(1 - (1 - longer) ** (prompts * self.group_size)))

    def _ending(self) -> float:
        """p, with which a token is a completion's last: Σₜ (1 − p)ᵗ over t < T is the mean."""
        longest, mean = self.completion_len, self.mean_len
        assert mean is not None
        if mean >= longest:
            return 0.0
        if mean <= 1:
            return 1.0
        return root_scalar(
            lambda p: -np.expm1(longest * np.log1p(-p)) / p - mean, bracket=(1e-12, 1 - 1e-12)
        ).root

    @property
    def generation_dtype(self) -> jnp.dtype:
        """Of the parameters that completions are written with.

        Actors receive bf16. A run as it is configured writes with the learner's own parameters,
        which are float32; weights of layers and caches are in the model's compute type either way
        (`Decoder.layer_weights`).
        """
        return jnp.dtype(jnp.float32 if self.as_configured else jnp.bfloat16)

    @property
    def critic_trunk(self) -> DecoderConfig | None:
        """Of the critic; None for a recipe without."""
        return (self.critic or self.policy) if self.recipe.value_heads else None

    def executed(self, model: DecoderConfig) -> DecoderConfig:
        """A model as a large run executes it: bf16, layers recomputed, logits in chunks.

        Experts have room for `EXPERT_CAPACITY` where the model does not say for how much.
        """
        model = replace(model, max_len=self.prompt_len + self.completion_len)
        if self.as_configured:
            return model
        capacity = model.expert_capacity
        if model.experts and capacity is None:
            capacity = EXPERT_CAPACITY
        return replace(
            model,
            expert_capacity=capacity,
            compute_dtype="bfloat16",
            remat="full",
            logit_chunk=min(128, self.completion_len),
        )

    def summary(self) -> str:
        """The sizes that a prediction rests on, in one line each."""
        b, g = self.prompts_per_step, self.group_size

        def size(model: DecoderConfig | None) -> str:
            return "a function on the host" if model is None else f"{model.num_params / 1e9:.2f}B"

        critic = self.critic_trunk
        mean = "" if self.mean_len is None else f", {self.mean_len:g} on average"
        experts = []
        if self.policy.experts:
            room = self.executed(self.policy).expert_capacity
            experts = [f"a device's experts take {room:g} times a balanced router's tokens; what "
                       "is beyond is dropped"]  # fmt: skip
        return "\n".join([
            f"recipe {self.recipe.name}; policy {size(self.policy)} parameters, trained in float32",
            f"{b} prompts × {g} completions a step; prompts of {self.prompt_len} and completions "
            f"of up to {self.completion_len} tokens{mean}: {self.trained_tokens:,.0f} trained "
            "tokens a step",
            f"reward model {size(self.reward_model)}; cost model {size(self.cost_model)}; "
            f"critic {'none' if critic is None else size(critic)}",
            f"{self.density:.2%} of the bf16 weights change in a step (assumed)",
            *experts,
        ])  # fmt: skip
