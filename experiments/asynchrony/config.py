"""What can be set, the presets, and the methods that are compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from experiments.asynchrony.simulator import Schedule
from experiments.harness import RunOptions
from experiments.safety.config import ModelConfig, SftConfig
from jaxrl import recipes, sync
from jaxrl.learner import OptimizerConfig
from jaxrl.recipes import Recipe
from jaxrl.replay import GSM8K, ReplayConfig
from jaxrl.rollouts import Sampling


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train.

    Attributes:
      name: on the command line and in results.
      title: in tables and plots.
      recipe: the algorithm, of `jaxrl.recipes`.
      actors: threads that write and score rollouts; 0 for synchronous training.
      max_staleness: see `AsynchronousTrainer`.
      sync_every: updates between two published versions.
      replay: updates draw from a replay, so that neither side waits for the other.
    """

    name: str
    title: str
    recipe: str
    actors: int = 0
    max_staleness: int = 0
    sync_every: int = 1
    replay: bool = False

    @property
    def schedule(self) -> Schedule:
        """The same for the simulator, where one machine that alternates is one actor."""
        return Schedule(
            actors=max(self.actors, 1),
            max_staleness=self.max_staleness,
            sync_every=self.sync_every,
            replay=self.replay,
            poll_s=POLL_S,
        )


POLL_S = 0.01
"""Seconds between two looks of an actor for new weights, which lie in this process's memory."""
TBA_SYNC_EVERY = 2
"""Updates between two versions that TBA's actors get: the paper's k on GSM8K."""


def _tba(actors: int) -> Method:
    """Trajectory balance from a replay, whose `max_staleness` bounds first uses only.

    Completions grow older in the replay: it keeps the newest `replay_capacity` of each prompt.
    """
    return Method(
        name=f"tba_{actors}",
        title=f"TBA, {actors} actor{'s' * (actors > 1)}",
        recipe="tba",
        actors=actors,
        max_staleness=64,
        sync_every=TBA_SYNC_EVERY,
        replay=True,
    )


def _corrected(name: str) -> Method:
    """A method whose rollouts may be some versions old, with truncated importance weights."""
    return Method(
        name=f"async_{name}",
        title=f"{name.upper()}, 2 actors, importance weights",
        recipe=f"async_{name}",
        actors=2,
        max_staleness=4,
    )


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(name="ppo", title="PPO", recipe="ppo"),
            Method(name="grpo", title="GRPO", recipe="grpo"),
            Method(name="rloo", title="RLOO", recipe="rloo"),
            Method(
                name="one_step_off",
                title="one step off (RLOO)",
                recipe="async_rloo",
                actors=1,
                max_staleness=1,
            ),
            *map(_tba, (1, 2, 4, 8)),
            *map(_corrected, ("ppo", "grpo", "rloo")),
        )
    }
)


@dataclass(frozen=True, kw_only=True)
class AsynchronyConfig(RunOptions):
    """All of experiments.asynchrony."""

    methods: tuple[str, ...] = ("ppo", "grpo", "rloo", "one_step_off", "tba_1", "tba_2", "tba_4")
    """What is compared, each from the same SFT policy; tba_8 exists too, and async_ppo, async_grpo
    and async_rloo: two actors and truncated importance weights."""
    data: str = "arithmetic"
    """"arithmetic" for problems made from --data-seed, or a file in the form of GSM8K: rows of
    question and answer, the answer ending in "#### n"."""
    heldout: Path | None = None
    """A file of problems to evaluate on; without it a tenth of --data is kept for that."""
    data_seed: int = 0
    """Of the problems made, or of the split of a file."""
    problems: int = 4096
    """Problems that are made to train on."""
    heldout_problems: int = 256
    """Problems to evaluate on: that are made, or that are taken of a file at most."""
    levels: tuple[int, ...] = (1, 2, 3)
    """Numbers of operations of the problems made, all equally frequent."""
    worked_share: float = 0.5
    """Share of the demonstrations of SFT that show their steps; the others guess, and RL has to
    find out that steps pay."""
    template: str = "plain"
    """What stands around a question: "plain", or "problem" for TBA's prompt on GSM8K."""
    steps: int = 300
    """Updates of each method."""
    seeds: int = 1
    """Times that each method is trained, from --seed on; all from the one SFT policy."""
    prompts_per_step: int = 8
    """Prompts of an update, and of a work item of an actor."""
    group_size: int = 8
    """Completions of each prompt."""
    kl_coef: float = 0.01
    """β: weight of the KL divergence from the SFT policy, in units of the reward a nat."""
    sampler_tolerance: float = 1e-2
    """Largest honest gap between the sampler's and the learner's log-probability of a token, in
    nats; beyond it the run stops with an alarm."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability."""
    prompt_len: int = 40
    """Longest prompt with its template, in tokens; longer ones of a file are left out."""
    completion_len: int = 20
    """Longest completion, in tokens."""
    vocab_size: int = 512
    """Of the tokenizer that is trained on the problems."""
    evaluate_every: int = 25
    """Updates between two snapshots, whose held-out accuracy is measured afterwards."""
    calibration: int = 12
    """Times that each part of a method is measured alone before it runs."""
    critic_free_learning_rate: float = 1e-4
    """Peak of AdamW's rate for methods without a critic."""
    replay_capacity: int = 100
    """Completions that TBA's replay keeps of each prompt."""
    recent_share: float = 0.95
    """m: share of TBA's batches that is drawn of the newest rollouts (the paper's on GSM8K)."""
    link: str = "1gbit,20ms"
    """Bandwidth and latency of the simulated learner's link to its actors."""
    simulated_updates: int = 600
    """Length of a simulation, in updates."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(embed=96, mlp=288))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, critic_learning_rate=5e-4)
    )
    sft: SftConfig = field(default_factory=lambda: SftConfig(steps=650, learning_rate=3e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (
            "problems", "heldout_problems", "steps", "prompts_per_step", "prompt_len",
            "completion_len", "evaluate_every", "calibration", "replay_capacity", "seeds",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name, value in (("sft.steps", self.sft.steps), ("sft.batch", self.sft.batch)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        for name in ("kl_coef", "critic_free_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.worked_share <= 1:
            raise ValueError(f"worked_share must lie in [0, 1], got {self.worked_share}")
        if self.group_size < 2:
            raise ValueError(f"group_size must be 2 or more, got {self.group_size}")
        if self.simulated_updates < 20:
            raise ValueError(f"simulated_updates must be 20 or more, got {self.simulated_updates}")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods are one or more of {', '.join(METHODS)}, each once: "
                f"got {', '.join(self.methods) or 'none'}"
            )
        # What the stages build, built here once: a wrong value must not wait for the SFT to end.
        self.model.decoder(self.vocab_size, self.prompt_len + self.completion_len)
        self.sft.optimizer()
        self.sampling(eos_id=0, pad_id=0)
        self.replay()
        sync.Link.parse(self.link)
        for name in self.methods:
            self.recipe(METHODS[name])

    def recipe(self, method: Method) -> Recipe:
        """The algorithm of a method with this run's β and group size."""
        found = recipes.get(method.recipe, group_size=self.group_size)
        return replace(found, kl=found.kl.constant(self.kl_coef))

    def optimizer_of(self, recipe: Recipe) -> OptimizerConfig:
        """Its optimiser; the rate falls along a cosine."""
        rate = self.optimizer.learning_rate
        if not recipe.value_heads:
            rate = self.critic_free_learning_rate
        return replace(self.optimizer, learning_rate=rate, decay_steps=self.steps)

    def sampling(self, *, eos_id: int, pad_id: int, greedy: bool = False) -> Sampling:
        """How completions are drawn."""
        return Sampling(
            max_new_tokens=self.completion_len,
            eos_id=eos_id,
            pad_id=pad_id,
            temperature=self.temperature,
            greedy=greedy,
        )

    def replay(self) -> ReplayConfig:
        """How TBA keeps and draws completions: uniformly, as on GSM8K."""
        return replace(GSM8K, capacity=self.replay_capacity, recent_share=self.recent_share)


QUICK = AsynchronyConfig()

TINY = AsynchronyConfig(
    problems=64,
    heldout_problems=8,
    steps=4,
    prompts_per_step=2,
    group_size=2,
    evaluate_every=2,
    calibration=2,
    simulated_updates=20,
    model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16),
    sft=SftConfig(steps=4, batch=8),
)

BASE = AsynchronyConfig(
    worked_share=1.0,
    template="problem",
    steps=1000,
    prompts_per_step=16,
    group_size=16,
    heldout_problems=1024,
    sampler_tolerance=0.5,
    temperature=0.7,
    prompt_len=256,
    completion_len=256,
    vocab_size=16_384,
    evaluate_every=50,
    critic_free_learning_rate=2e-5,
    model=ModelConfig(
        layers=24, embed=1024, heads=16, kv_heads=8, head_dim=64, mlp=2816,
        compute_dtype="bfloat16",
    ),
    optimizer=OptimizerConfig(learning_rate=1e-5, critic_learning_rate=2e-5),
    sft=SftConfig(steps=6000, batch=128, learning_rate=3e-4),
)  # fmt: skip

PRESETS = {"quick": QUICK, "tiny": TINY, "base": BASE}
