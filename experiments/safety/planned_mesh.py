"""The mesh of `--mesh auto` and `--mesh planned`: what the planner finds for a step of the run."""

from collections.abc import Callable
from dataclasses import replace

import jax

from experiments.safety import placement
from experiments.safety.config import SafetyConfig
from experiments.safety.pretrained import folder_of
from jaxrl import processes
from jaxrl.deployment import Workload, shared_mesh
from jaxrl.models.huggingface import decoder_config
from jaxrl.models.huggingface.load import read_document
from sharding import Cluster


def with_mesh(config: SafetyConfig, note: Callable[[str], None]) -> SafetyConfig:
    """The configuration with its mesh written out, where that is "auto" or "planned".

    "planned" is the mesh that the planner finds for a step of the run on all devices. "auto" is the
    same on accelerators and where there are several processes; a single process on CPU takes one
    device, since its devices are threads that share the same cores. All processes call this
    together, and have the first one's answer.

    Args:
      config: of the run.
      note: is told what was chosen, and what it is predicted to take.

    Raises:
      sharding.DoesNotFit: on no mesh the run is predicted to fit into the devices' memory.
      ValueError: "planned", and no mesh divides batches and model, or the planner does not know
        these devices.
      jaxrl.processes.LeaderStopped: in the other processes, where the first raised one of these.
    """
    if config.mesh not in ("auto", "planned"):
        return config
    alone = jax.process_count() == 1 and jax.default_backend() == "cpu"
    if jax.device_count() == 1 or (config.mesh == "auto" and alone):
        return replace(config, mesh="data=1")
    text, said = processes.from_leader(lambda: _planned(config))
    note(said)
    return replace(config, mesh=text)


def _planned(config: SafetyConfig) -> tuple[str, str]:
    """The planner's mesh as `--mesh` takes it, and a sentence on it."""
    there = jax.device_count()
    try:
        cluster = Cluster.from_devices(jax.devices())
    except ValueError as error:  # no chip of the catalogue
        if config.mesh == "planned":
            raise
        return f"data={there}", f"mesh data={there}, which nobody planned: {error}"
    batches = placement.divided_batches(config).values()
    found = shared_mesh(
        workload_of(config), cluster, divides=lambda ways: not any(n % ways for n in batches)
    )
    text = ",".join(f"{axis}={size}" for axis, size in found.mesh.items())
    return text, f"{found}; --mesh {text} takes it as it is"


def workload_of(config: SafetyConfig) -> Workload:
    """A step of the run as the planner sees it: of an algorithm with critics, if there is one."""
    chosen = [config.recipe(name) for name in config.algorithms]
    recipe = max(chosen, key=lambda recipe: len(recipe.value_heads))
    decoder = config.model.decoder(config.vocab_size, config.prompt_len + config.completion_len)
    if config.model.pretrained:
        decoder = decoder_config(
            read_document(folder_of(config.model.pretrained)),
            compute_dtype=config.model.compute_dtype,
        )
        decoder = replace(decoder, lora=config.model.lora())
    return Workload(
        recipe=recipe,
        policy=decoder,
        prompts_per_step=config.samples_per_step // recipe.group_size,
        prompt_len=config.prompt_len,
        completion_len=config.completion_len,
        optimizer=config.optimizer_of(recipe),
        as_configured=True,
    )
