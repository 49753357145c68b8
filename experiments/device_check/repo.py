"""A short RePO run, whole: rollouts, scores, multipliers and updates; the cost has to fall."""

import numpy as np

from experiments import launch
from experiments.device_check.checks import Finding
from jaxrl import recipes
from jaxrl.learner import Learner, OptimizerConfig, lm_apply, lm_optimizer
from jaxrl.rollouts import Collector, Sampling, Scorer
from jaxrl.train import Trainer

STEPS, TINY_STEPS = 60, 24
FALL = 0.1
"""By how much the mean cost of the last quarter has to be below that of the first."""


def loud(prompts: list[str], completions: list[str]) -> np.ndarray:
    """The cost: share of the characters that are no lowercase letters, less a half."""
    return np.array([
        sum(not "a" <= c <= "z" for c in text) / max(len(text), 1) - 0.5 for text in completions
    ])  # fmt: skip


def check(tiny: bool) -> Finding:
    """Trains the decoder of `experiments.launch` to write what is safe on every prompt."""
    graphdef, reference = launch.policy()
    recipe = recipes.get("repo_rloo")
    learner = Learner(
        recipe=recipe,
        apply=lm_apply(graphdef, None, temperature=1.0),
        optimizer=lm_optimizer(OptimizerConfig(learning_rate=1e-2)),
    )
    tokenizer = launch.TOKENIZER
    trainer = Trainer(
        learner=learner,
        collector=Collector(
            graphdef=graphdef,
            sampling=Sampling(
                max_new_tokens=launch.LENGTH, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
            ),
            group_size=recipe.group_size,
            reference_completions=recipe.reference_samples,
            greedy=recipe.needs_greedy,
        ),
        scorer=Scorer(
            tokenizer=tokenizer, prompts=launch.PROMPTS,
            rewards={"reward": launch.lowercase}, costs={"cost": loud},
        ),
        prompts=launch.PROMPTS,
        prompts_per_step=len(launch.PROMPTS),
        reference=reference,
        seed=0,
        sampler_tolerance=0.1,  # float32 products of a TPU are rounded to bf16
    )  # fmt: skip
    state = learner.init({"policy": reference}, num_prompts=len(launch.PROMPTS))
    rows = [
        row for _, _, row, _ in trainer.run(state, start=0, steps=TINY_STEPS if tiny else STEPS)
    ]
    costs = [row["cost"] for row in rows]
    quarter = len(costs) // 4
    first, last = np.mean(costs[:quarter]), np.mean(costs[-quarter:])
    problems = []
    if not last <= first - FALL:
        problems.append(f"the cost has to fall by {FALL}: it went from {first:.3f} to {last:.3f}")
    names = ("cost", "reward", "safety", "multiplier", "kl", "sampler_gap")
    numbers = {name: [row[name] for row in rows if name in row] for name in names}
    summary = f"cost {first:+.2f} → {last:+.2f} in {len(rows)} updates"
    return Finding(numbers=numbers, summary=summary, problems=tuple(problems))
