"""What can be set, and the presets."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from experiments.harness import ProcessOptions
from experiments.harness.config import COSMETIC
from jaxrl import recipes
from jaxrl.learner import OptimizerConfig
from jaxrl.models import DecoderConfig
from jaxrl.models.config import LoraConfig
from jaxrl.rollouts import Sampling


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder; its vocabulary is the tokenizer's.

    Raises:
      ValueError: adapters without a pretrained model, or of a negative rank.
    """

    pretrained: str = ""
    """Folder of a Hugging Face model, or its name on the hub, to start from; its tokenizer is used
    and the sizes below are not. `--model NAME` is short for it, with the preset `pretrained`."""
    lora_rank: int = 0
    """Train adapters of this rank beside the frozen weights of the pretrained model; 0 trains all
    weights."""
    lora_alpha: float = 16.0
    """Numerator of the adapters' scale."""
    layers: int = 2
    """Decoder blocks."""
    embed: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key and value heads, a divisor of the query heads."""
    head_dim: int = 32
    """Width of one head."""
    mlp: int = 384
    """Width of the feed-forward block."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products; parameters are float32."""

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or (self.lora_rank and not self.pretrained):
            raise ValueError(
                "adapters stand beside the weights of a pretrained model: "
                f"lora_rank={self.lora_rank}, pretrained={self.pretrained!r}; give --model"
            )

    def decoder(self, vocab_size: int, max_len: int) -> DecoderConfig:
        """The untrained decoder, where none is pretrained."""
        return DecoderConfig(
            vocab_size=vocab_size,
            max_len=max_len,
            scan_unroll=self.layers if self.layers <= 4 else 1,
            layers=self.layers,
            embed=self.embed,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp=self.mlp,
            compute_dtype=self.compute_dtype,
        )

    def lora(self) -> LoraConfig | None:
        if not self.lora_rank:
            return None
        return LoraConfig(rank=self.lora_rank, alpha=self.lora_alpha)


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning of the starting policy."""

    steps: int = 500
    """Gradient steps; 0 leaves it out, which only a pretrained model allows."""
    batch: int = 64
    """Demonstrations a step; rows a step where they are packed."""
    pack: int = 0
    """Columns of a row in which several demonstrations stand side by side; 0: one a row."""
    learning_rate: float = 2e-3
    """Peak of AdamW's rate; it falls along a cosine."""

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            warmup_steps=min(20, max(self.steps - 1, 1)),
            decay_steps=self.steps,
            weight_decay=0.01,
        )


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Reward, cost and judge models, where the data has no exact evaluators."""

    steps: int = 400
    """Gradient steps of each model at most; training stops early on the validation AUC."""
    batch: int = 64
    """Pairs a step."""
    transformer: bool = False
    """Read answers with a transformer that starts from the SFT policy, beside the n-grams: worth
    its time on the full set only, see docs/decisions/0003-learned-scorers.md."""
    learning_rate: float = 3e-4
    """Peak of AdamW's rate for the transformer."""
    ngrams: int = 3
    """Longest n-gram of tokens that has a weight of its own; 0 leaves them out."""
    reward_scale: float = 1.0
    """Root mean square that learned rewards are scaled to on labelled answers."""
    cost_scale: float = 1.0
    """Root mean square that learned costs are scaled to there; zero stays the boundary."""
    fluency: float = 2.0
    """Weight of the penalty on repetition and stray symbols, which learned rewards do not see."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on each policy."""

    samples: int = 16
    """Completions of each prompt."""
    prompts: int = 0
    """Held-out prompts at most; 0 takes all."""
    extra_prompts: int = 100
    """Prompts at most of each further set that was found beside the data; 0 takes all."""
    extra_samples: int = 4
    """Completions of each of those."""
    batch: int = 16
    """Prompts that are generated at once."""


@dataclass(frozen=True, kw_only=True)
class SafetyConfig(ProcessOptions):
    """All of experiments.safety."""

    algorithms: tuple[str, ...] = ("ppo_lagrangian", "repo", recipes.RECOMMENDED)
    """Recipes to train, each from the same SFT policy; see `jaxrl.recipes.RECIPES`."""
    options: tuple[str, ...] = ()
    """Options of single algorithms as ALGORITHM.OPTION=VALUE, such as repo.max_value=50
    repo.rectify=prompt repo_tb.bound=12; a wrong name lists what there is."""
    data: str = "world"
    """"world" for the embedded one (or world_binary, world_shuffled, world_benign: controls), a
    file of labelled pairs, or hub:NAME."""
    data_seed: int = 0
    """Of the embedded world, and of the splits of real text; the same for all seeds of a study."""
    xstest: Path | None = None
    """Folder of XSTest, whose human labels train the reward where the data has no helpfulness
    labels. Looked for beside the data's own folder when not given."""
    steps: int = 600
    """Policy updates of each algorithm; their learning rates fall along a cosine."""
    samples_per_step: int = 64
    """Completions a step, over all prompts and groups."""
    kl_coef: float = 0.1
    """β: weight of the KL divergence from the SFT policy, in reward units a nat."""
    ptx_coef: float = 0.0
    """Weight of a likelihood loss on general instructions, where the data has them (safe-rlhf
    uses 16)."""
    sampler_tolerance: float = 1e-2
    """Largest honest gap between the sampler's and the trainer's log-probability of a token, in
    nats; beyond it the run stops with an alarm."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 takes all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens of this probability."""
    prompt_len: int = 16
    """Longest prompt with its template, in tokens."""
    drop_long: bool = False
    """Leave out rows whose prompt is longer, and say how many, instead of an error."""
    completion_len: int = 20
    """Longest completion, in tokens."""
    vocab_size: int = 768
    """Of the tokenizer that is trained on the data."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json to use instead."""
    template: Literal["plain", "safe_rlhf", "chatml", "llama3", "model"] = "plain"
    """What stands around a prompt; `model` is the chat template of the pretrained model."""
    checkpoint_every: int = 50
    """Updates between checkpoints."""
    mesh: str = field(default="auto", metadata=COSMETIC)
    """Devices by axis, as data=4 or fsdp=8,tensor=4: `data` divides prompts, `fsdp` also all
    parameters, `tensor` heads and feed-forward. `planned` is the mesh that the planner finds for
    all devices; `auto` is the same on accelerators or with several processes, and one device
    elsewhere. A resumed run may take another."""
    tape: Path | None = field(default=None, metadata=COSMETIC)
    """Folder of recorded rollouts, below it one of each algorithm: steps that it holds use them,
    others are added. Runs on different machines are comparable to the last digits only so."""
    critic_free_learning_rate: float = 1e-3
    """Peak of AdamW's rate for algorithms without a critic, in the place of
    --optimizer.learning-rate, which is for those with one. Of 5e-4 and 1e-3 this is the better for
    repo_tb, and the smaller the better for repo, on one seed: its critic cannot follow a policy
    that moves fast."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-4, critic_learning_rate=1e-3)
    )
    sft: SftConfig = field(default_factory=SftConfig)
    scorers: ScorerConfig = field(default_factory=ScorerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def optimizer_of(self, recipe: recipes.Recipe) -> OptimizerConfig:
        """The optimiser of one algorithm's run."""
        rate = self.optimizer.learning_rate
        if not recipe.value_heads:
            rate = self.critic_free_learning_rate
        return replace(self.optimizer, learning_rate=rate, decay_steps=self.steps)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.algorithms:
            raise ValueError("name at least one algorithm, such as --algorithms repo")
        counts = {
            "steps": self.steps,
            "samples_per_step": self.samples_per_step,
            "checkpoint_every": self.checkpoint_every,
            "sft.steps": self.sft.steps or bool(self.model.pretrained),
            "sft.batch": self.sft.batch,
            "evaluation.samples": self.evaluation.samples,
            "evaluation.batch": self.evaluation.batch,
            "evaluation.extra_samples": self.evaluation.extra_samples,
            "prompt_len": self.prompt_len,
            "scorers.steps": self.scorers.steps,
            "scorers.batch": self.scorers.batch,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.sft.pack < 0:
            raise ValueError(f"sft.pack is the width of a row, or 0: got {self.sft.pack}")
        self._check_numbers()
        if self.model.lora_rank and self.sft.steps:
            raise ValueError(
                "adapters are trained by reinforcement alone: give --sft.steps 0 with "
                "--model.lora-rank, or a model that was fine-tuned whole before"
            )
        if self.template == "model" and not self.model.pretrained:
            raise ValueError("template `model` is that of a pretrained model: give --model")
        # What the stages build, built here once: a wrong value must not wait for the SFT to end.
        self.model.decoder(self.vocab_size, self.prompt_len + self.completion_len)
        self.sft.optimizer()
        self.sampling(eos_id=0, pad_id=0)
        if len(set(self.algorithms)) < len(self.algorithms):
            raise ValueError(f"an algorithm is named twice: {', '.join(self.algorithms)}")
        for name in self.algorithms:
            group = self.recipe(name).group_size
            if self.samples_per_step % group:
                raise ValueError(
                    f"samples_per_step must be a multiple of the group size of {name}: "
                    f"{self.samples_per_step} and {group}"
                )

    def _check_numbers(self) -> None:
        for name, value in (
            ("evaluation.prompts", self.evaluation.prompts),
            ("evaluation.extra_prompts", self.evaluation.extra_prompts),
        ):
            if value < 0:
                raise ValueError(f"{name} must be 0 (all) or more, got {value}")
        for name, value in (
            ("data_seed", self.data_seed),
            ("ptx_coef", self.ptx_coef),
            ("scorers.ngrams", self.scorers.ngrams),
            ("scorers.fluency", self.scorers.fluency),
        ):
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        for name, value in (
            ("sampler_tolerance", self.sampler_tolerance),
            ("scorers.learning_rate", self.scorers.learning_rate),
            ("scorers.reward_scale", self.scorers.reward_scale),
            ("scorers.cost_scale", self.scorers.cost_scale),
            ("critic_free_learning_rate", self.critic_free_learning_rate),
        ):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not (self.scorers.ngrams or self.scorers.transformer):
            raise ValueError("scorers need n-grams or a transformer: raise scorers.ngrams")
        if self.optimizer.decay_steps:
            raise ValueError(
                f"optimizer.decay_steps is always --steps here, got {self.optimizer.decay_steps}; "
                "leave it out"
            )

    def recipe(self, name: str) -> recipes.Recipe:
        """The recipe of that name with this run's β and options."""
        found = recipes.with_options(recipes.get(name), self._options().get(name, {}))
        return replace(found, kl=found.kl.constant(self.kl_coef))

    def _options(self) -> dict[str, dict[str, str]]:
        """Option texts by algorithm."""
        found: dict[str, dict[str, str]] = {}
        for text in self.options:
            target, equals, value = text.partition("=")
            algorithm, dot, option = target.partition(".")
            if not (equals and dot and algorithm in self.algorithms):
                raise ValueError(
                    "options are written ALGORITHM.OPTION=VALUE, with an algorithm of this run "
                    f"({', '.join(self.algorithms)}): {text!r}"
                )
            if option == "kl.coef":
                raise ValueError(f"the KL coefficient is set by --kl-coef: {text!r}")
            found.setdefault(algorithm, {})[option] = value
        return found

    def sampling(self, *, eos_id: int, pad_id: int) -> Sampling:
        """How completions are drawn, in training and in evaluation."""
        return Sampling(
            max_new_tokens=self.completion_len,
            eos_id=eos_id,
            pad_id=pad_id,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


QUICK = SafetyConfig()

SMALL = SafetyConfig(
    steps=150,
    prompt_len=72,
    drop_long=True,
    completion_len=64,
    vocab_size=2048,
    template="safe_rlhf",
    model=ModelConfig(layers=4, embed=192, heads=6, kv_heads=2, head_dim=32, mlp=512),
    sft=SftConfig(steps=1200, batch=32, learning_rate=1.5e-3),
    optimizer=OptimizerConfig(learning_rate=2e-4, critic_learning_rate=5e-4),
    critic_free_learning_rate=4e-4,
)

BASE = SafetyConfig(
    steps=2000,
    samples_per_step=512,
    sampler_tolerance=0.5,
    prompt_len=256,
    drop_long=True,
    completion_len=256,
    vocab_size=32_768,
    template="safe_rlhf",
    model=ModelConfig(
        layers=24, embed=1024, heads=16, kv_heads=8, head_dim=64, mlp=2816,
        compute_dtype="bfloat16",
    ),
    sft=SftConfig(steps=6000, batch=128, learning_rate=3e-4),
    scorers=ScorerConfig(steps=3000, batch=128, transformer=True, learning_rate=1e-4),
    optimizer=OptimizerConfig(learning_rate=1e-5, critic_learning_rate=2e-5),
    critic_free_learning_rate=2e-5,
)  # fmt: skip

PRETRAINED = replace(
    BASE,
    steps=500,
    template="model",
    model=ModelConfig(pretrained="Qwen/Qwen2.5-0.5B-Instruct", compute_dtype="bfloat16"),
    sft=SftConfig(steps=0),
    optimizer=OptimizerConfig(learning_rate=1e-6, critic_learning_rate=5e-6),
    critic_free_learning_rate=1e-6,
)
"""What `--model FOLDER` starts from: an instruction-tuned model with its own tokenizer."""

PRESETS = {"quick": QUICK, "small": SMALL, "base": BASE, "pretrained": PRETRAINED}
