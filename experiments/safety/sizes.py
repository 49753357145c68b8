"""What a run of this experiment asks of machines, for `--dry-run`."""

from experiments.dry_run.config import OWN
from experiments.dry_run.hand_over import Sizes
from experiments.safety.config import SafetyConfig
from jaxrl import recipes


def sizes(config: SafetyConfig) -> Sizes:
    """The recommended recipe where it is trained, else the last; on the preset's lengths.

    Learned reward and cost models start from the policy. They are planned wherever the preset has
    transformers for scorers, although data with exact evaluators would need none.
    """
    name = config.algorithms[-1]
    if recipes.RECOMMENDED in config.algorithms:
        name = recipes.RECOMMENDED
    group = config.recipe(name).group_size
    model = config.model.pretrained or OWN
    scorer = model if config.scorers.transformer else ""
    return {
        "own": config.model.decoder(config.vocab_size, config.prompt_len + config.completion_len),
        "model": model,
        "reward_model": scorer,
        "cost_model": scorer,
        "algorithm": name,
        "group_size": group,
        "prompts": (config.samples_per_step // group,),
        "prompt_len": config.prompt_len,
        "completion_len": config.completion_len,
    }
