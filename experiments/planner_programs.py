"""Programs that the planner is checked on with the production compilers, and what they said.

A case is a published decoder in training, prefill or decoding on a cluster. Its plan and the
compiler's figures are kept as a small JSON file, so that predictions can be compared again
without a compiler.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

import sharding
from sharding.compiled.compile_check import Report
from sharding.compiled.hlo import Group
from sharding.decoder import decoder_cache, decoder_params, decoder_problem, decoder_step
from sharding.explain import Prediction
from sharding.programs.transformer import TransformerConfig, named_model
from sharding.simulation import find_cluster, with_footprint

Mode = Literal["train", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decoder, what is done with it, and where.

    Attributes:
      name: of the case, and of its file.
      model: published decoder, a name of `sharding.programs.transformer.models`.
      cluster: as `sharding.plan` takes it.
      mode: a train step with AdamW, or inference.
      batch: sequences.
      length: tokens of a sequence; of the cache when decoding.
      pinned: fields of `Strategy` that are not searched for.
      changes: fields of `TransformerConfig` that differ from the published model.
    """

    name: str
    model: str
    cluster: str
    mode: Mode
    batch: int
    length: int
    pinned: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> Mapping[str, str] | None:
        """Of the compiler; None: its own defaults."""
        return None

    @property
    def config(self) -> TransformerConfig:
        """The decoder: trained in float32 with products in bfloat16, served in bfloat16."""
        training = self.mode == "train"
        return named_model(
            self.model,
            global_batch=self.batch,
            seq_len=self.length,
            training=training,
            weight_dtype="float32" if training else "bfloat16",
            **self.changes,
        )

    def problem(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The step and the shapes of its arguments."""
        config = self.config
        if self.mode != "decode":
            return decoder_problem(config)
        tokens = jax.ShapeDtypeStruct((self.batch, 1), jnp.int32)
        position = jax.ShapeDtypeStruct((), jnp.int32)
        cache = decoder_cache(config, self.length)
        return decoder_step(config), (decoder_params(config), cache, tokens, position)

    def planned(self) -> sharding.Plan:
        """The plan that the search finds today."""
        step, args = self.problem()
        constraints = sharding.Constraints(pinned=dict(self.pinned))
        return sharding.plan(step, args, cluster=self.cluster, constraints=constraints)


def compile_case(case: Case, folder: Path) -> dict[str, Any]:
    """Plans and compiles a case, and keeps plan and figures in the folder.

    Raises:
      ValueError: there is no plan.
      RuntimeError: the compiler refused, or is not installed.
    """
    plan = case.planned()
    report = plan.check(options=case.options)
    bare = dataclasses.replace(plan, prediction=None, alternatives=(), notes=(), specs={})
    held = {
        "case": dataclasses.asdict(case),
        "predicted_step_s": plan.step_time_s,
        # As it was predicted before it was compiled; `predicted` predicts it as of today.
        "first": {
            "bytes": plan.memory_bytes,
            "error_share": report.memory_error,
            "collective_error_share": report.collective_error,
        },
        "compiled": {
            name: value
            for name, value in dataclasses.asdict(report).items()
            if not name.startswith("predicted") and name != "compile_s"
        },
        "jax": jax.__version__,
        "plan": json.loads(bare.to_json()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(held, separators=(",", ":"))
    (folder / f"{case.name}.json").write_text(text + "\n", encoding="utf-8")
    return held


def kept(case: Case, folder: Path) -> dict[str, Any] | None:
    """What `compile_case` kept of a case; None if there is nothing, or of another case."""
    path = folder / f"{case.name}.json"
    if not path.exists():
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    mine = json.loads(json.dumps(dataclasses.asdict(case)))
    return held if held["case"] == mine else None


def predicted(case: Case, held: Mapping[str, Any]) -> tuple[sharding.Plan, Report]:
    """A kept plan as it is predicted today, against what the compiler said of it."""
    step, args = case.problem()
    cluster = find_cluster(case.cluster)
    bare = sharding.Plan.from_json(json.dumps(held["plan"]))
    nothing = Prediction(
        step_time_s=held["predicted_step_s"], memory_bytes=0.0, breakdown={}, memory_breakdown={}
    )
    plan = with_footprint(
        dataclasses.replace(bare, step=step, args=args, where=cluster, prediction=nothing)
    )
    assert plan.prediction is not None
    figures = {**held["compiled"], "compile_s": 0.0}
    figures["groups"] = tuple(Group(**group) for group in figures["groups"])
    report = Report(
        **figures,
        predicted_bytes=plan.memory_bytes,
        predicted_collectives=plan.prediction.collectives,
    )
    return plan, report
