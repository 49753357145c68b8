"""The policies of a run: where it starts, what of it is trained, what comes out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from experiments.harness import Run
from experiments.safety import pretrained
from experiments.safety.config import SafetyConfig
from experiments.safety.task import Task
from jaxrl.learner import LearnerState
from jaxrl.models import Decoder, DecoderConfig, LoraParam
from jaxrl.models.huggingface import Pretrained, save_adapter, save_pretrained, with_adapter
from jaxrl.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A decoder's structure with one set of parameters.

    Attributes:
      graphdef: the structure.
      params: the parameters, on the devices of the run's mesh once training has begun.
      document: the `config.json` that it came with; None of a model that was made here.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    document: Mapping[str, Any] | None = None

    @property
    def decoder(self) -> DecoderConfig:
        return nnx.merge(self.graphdef, self.params).config

    @property
    def pretrained(self) -> Pretrained:
        """The same as what `jaxrl.models.huggingface` reads, writes and adapts."""
        assert self.document is not None
        return Pretrained(
            config=self.decoder,
            document=self.document,
            graphdef=self.graphdef,
            params=self.params,
        )


def initial_policy(config: SafetyConfig, task: Task) -> Policy:
    """The pretrained decoder, or an untrained one that is a function of the seed."""
    if config.model.pretrained:
        found = pretrained.load(config, task.tokenizer)
        return Policy(graphdef=found.graphdef, params=found.params, document=found.document)
    decoder = config.model.decoder(
        task.tokenizer.vocab_size, config.prompt_len + config.completion_len
    )
    graphdef, params = nnx.split(Decoder(decoder, rngs=nnx.Rngs(config.seed)))
    return Policy(graphdef=graphdef, params=params)


@dataclass(frozen=True, kw_only=True)
class LearnedPart:
    """What of a policy is trained.

    Attributes:
      graphdef: structure of the whole.
      params: what is trained: everything, or adapters.
      frozen: the rest; None where there is none.
      reference: parameters of the frozen reference, in the structure of `graphdef`.
      adapted: the policy with fresh adapters; None without.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    reference: nnx.State
    frozen: nnx.State | None = None
    adapted: Pretrained | None = None


def learned_part(config: SafetyConfig, reference: Policy) -> LearnedPart:
    """The policy that a recipe starts from, as the learner holds it."""
    lora = config.model.lora()
    if lora is None:
        return LearnedPart(
            graphdef=reference.graphdef, params=reference.params, reference=reference.params
        )
    adapted = with_adapter(reference.pretrained, lora, seed=config.seed)
    graphdef, params, frozen = nnx.split(adapted.model(), LoraParam, ...)
    return LearnedPart(
        graphdef=graphdef, params=params, frozen=frozen, reference=adapted.params, adapted=adapted
    )


def trained_policy(
    run: Run, config: SafetyConfig, recipe: Recipe, reference: Policy, state: LearnerState
) -> Policy:
    """The policy of a learner's state; a pretrained one is also saved as it came.

    models/RECIPE is what `transformers` loads; models/RECIPE-adapter, where adapters were trained,
    what PEFT loads beside the base model.
    """
    params = state.params["policy"]
    if reference.document is None:
        return replace(reference, params=params)
    folder = run.folder / "models" / recipe.name
    if config.model.lora_rank:
        parts = learned_part(config, reference)
        assert parts.adapted is not None
        assert parts.frozen is not None
        adapted = replace(parts.adapted, params=nnx.merge_state(params, parts.frozen))
        adapter = folder.with_name(f"{recipe.name}-adapter")
        save_adapter(adapter, adapted, base_model=config.model.pretrained)
        params = pretrained.without_adapters(adapted, reference.pretrained).params
    policy = replace(reference, params=params)
    document = reference.document
    dtype = document.get("dtype") or document.get("torch_dtype") or "bfloat16"
    save_pretrained(folder, policy.decoder, params, document=document, dtype=jnp.dtype(dtype))
    pretrained.copy_beside(pretrained.folder_of(config.model.pretrained), folder)
    return policy
