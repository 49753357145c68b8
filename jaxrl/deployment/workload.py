"""What a run asks of its machines: models, recipe and sizes."""

from dataclasses import dataclass, field, replace

from jaxrl.learner import OptimizerConfig
from jaxrl.models import DecoderConfig
from jaxrl.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step of a run, without a machine.

    Attributes:
      recipe: the algorithm.
      policy: the decoder that is trained; the reference policy has the same structure.
      prompts_per_step: B of an update.
      prompt_len: P, tokens of a prompt.
      completion_len: T, tokens of a completion, the longest.
      reward_model: trunk of a learned reward; None: a function on the host.
      cost_model: trunk of a learned cost; None: a function on the host.
      critic: trunk of the critic, where the recipe has value heads; None: like the policy.
      optimizer: of policy and critic.
      density: share of the bf16 weights that an update changes, for the cost of publishing them.
    """

    recipe: Recipe
    policy: DecoderConfig
    prompts_per_step: int = 64
    prompt_len: int = 512
    completion_len: int = 512
    reward_model: DecoderConfig | None = None
    cost_model: DecoderConfig | None = None
    critic: DecoderConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-6))
    density: float = 0.01

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "prompt_len", "completion_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density is a share of the weights in (0, 1], got {self.density}")

    @property
    def group_size(self) -> int:
        return self.recipe.group_size

    @property
    def trained_tokens(self) -> int:
        """Completion tokens of one update, each at its longest."""
        return self.prompts_per_step * self.group_size * self.completion_len

    @property
    def critic_trunk(self) -> DecoderConfig | None:
        """Of the critic; None for a recipe without."""
        return (self.critic or self.policy) if self.recipe.value_heads else None

    def executed(self, model: DecoderConfig) -> DecoderConfig:
        """A model as a large run executes it: bf16, layers recomputed, logits in chunks."""
        return replace(
            model,
            max_len=self.prompt_len + self.completion_len,
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
        return "\n".join([
            f"recipe {self.recipe.name}; policy {size(self.policy)} parameters, trained in float32",
            f"{b} prompts × {g} completions a step; prompts of {self.prompt_len} and completions "
            f"of up to {self.completion_len} tokens: {self.trained_tokens:,} trained tokens a step",
            f"reward model {size(self.reward_model)}; cost model {size(self.cost_model)}; "
            f"critic {'none' if critic is None else size(critic)}",
            f"{self.density:.2%} of the bf16 weights change in a step (assumed)",
        ])  # fmt: skip
