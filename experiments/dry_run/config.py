"""What can be set, and the configurations that are planned together."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.harness import COSMETIC
from jaxrl import recipes
from jaxrl.deployment import Workload
from jaxrl.models import DecoderConfig
from jaxrl.models.attention.choice import Implementation
from jaxrl.models.named import named
from jaxrl.sync import Link

OWN = "own"
"""Name of the decoder of the experiment that asks."""


@dataclass(frozen=True, kw_only=True)
class DryRunConfig:
    """What is planned."""

    cluster: str = "v5p:4x4x4"
    """All chips, as `v5e:16x16` or `h100:8x8`, or a JSON file; the learner's where --actors is
    given."""
    actors: str = ""
    """The actors' machines where they are others, unequal chips for instance."""
    model: str = "llama3-8b"
    """The policy, by name."""
    reward_model: str = "llama3-8b"
    """Trunk of the reward model, by name; empty: a function on the host."""
    cost_model: str = "llama3-8b"
    """Trunk of the cost model, by name; empty: a function on the host."""
    critic: str = ""
    """Trunk of the critic, where the recipe has one; empty: like the policy."""
    algorithm: str = recipes.RECOMMENDED
    """The recipe."""
    group_size: int = 0
    """Completions of a prompt; 0: as the recipe has it."""
    prompts: tuple[int, ...] = (64,)
    """Prompts of one update, to choose among."""
    prompt_len: int = 512
    """Tokens of a prompt."""
    completion_len: int = 512
    """Tokens of the longest completion."""
    mean_len: float = 0.0
    """Tokens of a completion on average; 0: all are the longest."""
    density: float = 0.01
    """Share of the bf16 weights that an update changes."""
    between: str = ""
    """The link that all actors share on their way to the weights, as `10gbit,20ms`; empty: only
    the hosts' own networks limit it."""
    max_staleness: int = 8
    """Versions by which a rollout may be old."""
    suite: bool = False
    """Run the configurations of the README's table instead of one."""
    workloads: bool = False
    """Plan other lengths and links instead of one configuration; nothing is compiled."""
    attention: Implementation = "auto"
    """Attention of every model; "auto" is the machine's own kernel."""
    compile: bool = True
    """Whether to ask the compilers."""
    answers: Path = field(default=Path("runs/dry_run"), metadata=COSMETIC)
    """Folder that keeps what the compilers said."""
    timeout_s: float = field(default=1800.0, metadata=COSMETIC)
    """Seconds until one compilation is given up."""
    json: Path | None = field(default=None, metadata=COSMETIC)
    """Where to write the result as JSON."""

    def __post_init__(self) -> None:
        if not self.prompts or min(self.prompts) < 1:
            raise ValueError(f"prompts must be 1 or more, got {self.prompts}")
        if self.max_staleness < 1:
            raise ValueError(f"max_staleness must be 1 or more, got {self.max_staleness}")
        self.link()

    def link(self) -> Link | None:
        """What is between learner and actors."""
        return Link.parse(self.between) if self.between else None

    def workload(self, own: DecoderConfig | None = None) -> Workload:
        """The run.

        Args:
          own: what the model's name `OWN` stands for.

        Raises:
          ValueError: an unknown model or algorithm.
        """

        def model(name: str) -> DecoderConfig | None:
            if not name:
                return None
            config = own if name == OWN and own is not None else named(name)
            if self.attention == "auto":
                return config
            return replace(config, attention=self.attention)

        policy = model(self.model)
        if policy is None:
            raise ValueError("a run needs a policy; pass --model llama3-8b")
        group = {"group_size": self.group_size} if self.group_size else {}
        return Workload(
            recipe=recipes.get(self.algorithm, **group), policy=policy,
            prompts_per_step=self.prompts[0], prompt_len=self.prompt_len,
            completion_len=self.completion_len, mean_len=self.mean_len or None,
            reward_model=model(self.reward_model), cost_model=model(self.cost_model),
            critic=model(self.critic), density=self.density,
        )  # fmt: skip


# Batches that also learners of three quarters of a power of two can divide.
_EVEN = {"prompts": (48, 64, 96)}
SUITE: Mapping[str, Mapping[str, Any]] = {
    f"{model} {cluster} {actors}".strip(): _EVEN
    | {"model": model, "cluster": cluster, "actors": actors}
    for model, cluster, actors in (
        ("llama3-8b", "h100:8x8", ""),
        ("llama3-8b", "v5p:4x4x4", ""),
        ("llama3-8b", "v5e:8x16", ""),
        ("llama3-70b", "h100:32x8", ""),
        ("llama3-70b", "v5p:8x8x8", ""),
        ("qwen3-30b-a3b", "v6e:16x16", ""),
        ("llama3-8b", "v5e:8x16x2slices", ""),  # learner and actors on slices
        ("llama3-8b", "v5p:4x4x4", "v6e:8x8"),  # unequal chips
    )
}
"""Configurations that `--suite` plans, by name."""

_LONG = {"prompt_len": 512, "completion_len": 8192, "mean_len": 3000.0, "cost_model": "",
         "reward_model": "", "prompts": (32, 48, 64)}  # fmt: skip
_SHORT = {"prompt_len": 1024, "completion_len": 256, "mean_len": 128.0, "prompts": (64, 96, 128)}
WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "answers of 512 tokens": _EVEN,
    "reasoning of up to 8192": _LONG,
    "answers of up to 256": _SHORT,
    "512, over 10 Gbit/s": _EVEN | {"between": "10gbit,30ms"},
    "512, over 1 Gbit/s": _EVEN | {"between": "1gbit,30ms"},
}
"""Runs that `--workloads` plans, by name."""
