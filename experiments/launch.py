"""One small asynchronous run, wherever its parts run: the launch recipes of docs/launch.md, whole.

Question: does the same run work with actors as threads, as processes, on Ray, and on machines of
their own, with a learner of one process or of many, and does it resume after a kill?

    python -m experiments.launch                                  # all in this process
    python -m experiments.launch --actors processes --count 2     # processes of this machine
    python -m experiments.launch --actors ray --count 2           # a Ray cluster

The task: trajectory balance teaches a byte-sized decoder to write lowercase letters. What counts is
how it is put together: `build` makes an actor from JSON wherever it is called, and everything else
is in `main`. On several machines the learner listens for actors and lends them its weights:

    JAXRL_SECRET=… python -m experiments.launch --actors remote --listen 0.0.0.0:7777 \
        --weights 0.0.0.0:7778
    JAXRL_SECRET=… python -m jaxrl.actors --learner LEARNER:7777 --build experiments.launch:build \
        --config '{"weights": "LEARNER:7778"}'

A learner of many processes starts the first command in each, with `--coordinator`,
`--num-processes` and `--process-id`. Killed, it resumes when started again with the same folder;
told to stop by SIGTERM, it saves first and exits with status 75.

Hardware: two CPU cores, under a minute. Expected: the reward, the share of letters that are
lowercase, rises from about .1 to above .5; the staleness stays within `--max-staleness`.
"""

import argparse
import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl import recipes
from jaxrl.actors import (
    Actor,
    Factory,
    Journal,
    Pool,
    Processes,
    RayActors,
    RolloutChecks,
    Threads,
)
from jaxrl.checkpoint import Checkpointer
from jaxrl.data.batches import PromptSet
from jaxrl.learner import Learner, OptimizerConfig, lm_apply, lm_optimizer
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.recipes import Recipe
from jaxrl.replay import RECTIFIED, Replay
from jaxrl.rollouts import Collector, Sampling, Scorer
from jaxrl.sync import (
    FsspecStore,
    Publisher,
    Store,
    StoreServer,
    Subscriber,
    SyncConfig,
    TcpStore,
)
from jaxrl.sync.connection import secret_from_environment
from jaxrl.tokenizers import PLAIN, train_bpe
from jaxrl.train import AsynchronousTrainer, Preempted, Preemption
from sharding import Plan

RUN = "launch"
GROUP, LENGTH = 8, 16
TEXTS = tuple(f"Write word {i}:" for i in range(16))
TOKENIZER = train_bpe(TEXTS, 260)  # bytes and special tokens
PROMPTS = PromptSet.encode(TOKENIZER, TEXTS, PLAIN, max_len=16)
MODEL = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, embed=32, heads=2, kv_heads=1, head_dim=16, mlp=64,
    max_len=32, remat="none",
)  # fmt: skip
CHECKS = RolloutChecks(
    prompts=PROMPTS, group_size=GROUP, completion_len=LENGTH, vocab_size=MODEL.vocab_size
)


SIZES = {
    "own": MODEL, "model": "own", "reward_model": "", "cost_model": "", "algorithm": "tba",
    "group_size": GROUP, "prompts": (8,), "prompt_len": 16, "completion_len": LENGTH,
}  # fmt: skip
"""What `--dry-run CLUSTER` plans, with the other flags of `python -m experiments.dry_run`."""


def policy() -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and first parameters, which are also the reference: a function of nothing."""
    return nnx.split(Decoder(MODEL, rngs=nnx.Rngs(0)))


def lowercase(prompts: list[str], completions: list[str]) -> list[float]:
    """The reward: share of the characters that are lowercase letters a–z."""
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in completions]


def nothing(prompts: list[str], completions: list[str]) -> np.ndarray:
    """The cost: no completion is unsafe here."""
    return np.zeros(len(completions))


def build(name: str, *, weights: str, dtype: str = "float32") -> Actor:
    """An actor of this run, in whatever process this is called.

    Args:
      name: of the actor.
      weights: where the learner publishes: a folder or URL of fsspec's, or "host:port" of a
        learner that lends them to who has the secret in JAXRL_SECRET.
      dtype: of the weights that it generates with; those that come quantised are expanded to it.
    """
    graphdef, reference = policy()
    store = store_at(weights)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), reference)
    return Actor(
        name=name,
        collector=Collector(
            graphdef=graphdef,
            sampling=Sampling(
                max_new_tokens=LENGTH, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id
            ),
            group_size=GROUP,
        ),
        scorer=Scorer(
            tokenizer=TOKENIZER, prompts=PROMPTS,
            rewards={"reward": lowercase}, costs={"cost": nothing},
        ),
        prompts=PROMPTS,
        reference=reference,
        subscriber=Subscriber(store, run_id=RUN, like=like, name=name, dequantise=True),
        close=store.close if isinstance(store, TcpStore) else None,
    )  # fmt: skip


def store_at(weights: str) -> Store:
    """The store of a folder, URL or address."""
    if weights.rpartition(":")[2].isdecimal():
        return TcpStore(weights, secret=secret_from_environment())
    return FsspecStore(weights)


ACTOR_DTYPES = {
    "float32": SyncConfig(),
    "bfloat16": SyncConfig(dtype=jnp.bfloat16),
    # What a block shares a scale with is 8 bits wide; the rest (norms, embeddings) is bfloat16.
    "int8": SyncConfig(dtype=jnp.bfloat16, quantise="int8"),
    "fp8": SyncConfig(dtype=jnp.bfloat16, quantise="fp8"),
}
"""How versions are published, by --actor-dtype."""
SAMPLER_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5, "int8": 0.5, "fp8": 1.0}
"""Largest honest difference between an actor's and the learner's log-probability, in nats."""


def pool_of(args: argparse.Namespace, folder: Path) -> Pool:
    """The actors, where the command line wants them; they read the weights from the folder."""
    dtype = "float32" if args.actor_dtype == "float32" else "bfloat16"
    # Actors may have another working directory than this process has, as Ray's do.
    config = {"weights": str(folder.resolve()), "dtype": dtype}
    factory = Factory(target="experiments.launch:build", config=config)
    match args.actors:
        case "threads":
            return Threads(args.count, factory)
        case "processes":
            return Processes(args.count, factory)
        case "ray":
            return RayActors(args.count, factory)
        case _:
            return Processes(0, address=args.listen, secret=secret_from_environment())


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Trajectory balance of what has just been written, or of a replay of all that was."""
    return recipes.get("repo_tb_replay" if args.replay else "tba", group_size=GROUP)


def learner_of(recipe: Recipe, graphdef: nnx.GraphDef) -> Learner:
    """Over several processes the batch is split among all their devices."""
    plan = Plan.single_device()
    if jax.process_count() > 1:
        plan = Plan.from_rules({}, mesh={"data": jax.device_count()}, rules={}, batch=("data",))
    return Learner(
        recipe=recipe,
        apply=lm_apply(graphdef, None, temperature=1.0),
        optimizer=lm_optimizer(OptimizerConfig(learning_rate=1e-2)),
        plan=plan,
    )


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m experiments.launch", description=(__doc__ or "").partition("\n")[0]
    )
    add = found.add_argument
    add("--actors", choices=("threads", "processes", "ray", "remote"), default="threads",
        help="where they run; remote ones join by `python -m jaxrl.actors`")  # fmt: skip
    add("--count", type=int, default=2, help="actors to start; remote ones start themselves")
    add("--listen", default="127.0.0.1:7777", help="address for remote actors")
    add("--actor-dtype", choices=tuple(ACTOR_DTYPES), default="float32",
        help="of the weights that travel; with int8 and fp8 matrices are quantised, and remote "
        "actors get \"dtype\": \"bfloat16\" in their --config")  # fmt: skip
    add("--weights", default="", help="address to lend the weights at; else actors read the folder")
    add(
        "--coordinator",
        default="",
        help="host:port of process 0 of a learner of many processes; `auto` on TPU pods, GKE and "
        "Slurm; by default JAX_COORDINATOR_ADDRESS, else there is one process",
    )
    add("--num-processes", "--processes", type=int, default=0,
        help="processes of the learner; by default JAX_NUM_PROCESSES")  # fmt: skip
    add("--process-id", "--process", type=int, default=-1,
        help="number of this process of the learner; by default JAX_PROCESS_ID")  # fmt: skip
    add("--steps", type=int, default=60, help="updates")
    add("--dry-run", metavar="CLUSTER",
        help="plan and compile for machines that are not here, such as v5p:4x4x4, with the other "
        "flags of `python -m experiments.dry_run`, such as --model llama3-8b")  # fmt: skip
    add(
        "--replay",
        action="store_true",
        help="draw updates from a replay, so that learner and actors do not wait for each other",
    )
    add("--max-staleness", type=int, help="versions that new rollouts may lie behind: 3, or 64")
    add("--out", type=Path, default=Path("runs/launch"), help="folder of the run")
    return found


def main(argv: list[str] | None = None) -> None:
    """Runs a learner, and its actors where it has to start them."""
    # What these bring is not for every actor: figures, tables, command lines.
    from experiments.dry_run import hand_over_sizes
    from experiments.harness import join

    if hand_over_sizes(SIZES, sys.argv[1:] if argv is None else argv):
        return
    flags = parser()
    args = flags.parse_args(argv)
    # Actors talk to the first process alone; which that is may not be known yet.
    if args.process_id <= 0 and (args.actors == "remote" or args.weights):
        try:
            secret_from_environment()
        except ValueError as error:
            flags.error(str(error))
    logging.basicConfig(level=logging.WARNING)
    join(args.coordinator, args.num_processes, args.process_id)
    first = jax.process_index() == 0
    store = FsspecStore(args.out / "weights")
    graphdef, reference = policy()
    recipe = recipe_of(args)
    learner = learner_of(recipe, graphdef)
    max_staleness = args.max_staleness
    if max_staleness is None:
        max_staleness = 64 if args.replay else 3
    state = learner.init({"policy": reference}, num_prompts=len(PROMPTS))
    with contextlib.ExitStack() as stack:
        if first and args.weights:
            stack.enter_context(StoreServer(store, args.weights, secret=secret_from_environment()))
        trainer = AsynchronousTrainer(
            learner=learner,
            pool=pool_of(args, args.out / "weights") if first else None,
            publisher=Publisher(store, run_id=RUN, config=ACTOR_DTYPES[args.actor_dtype]),
            checks=CHECKS,
            prompts_per_item=8,
            seed=0,
            max_staleness=max_staleness,
            replay=Replay(RECTIFIED, seed=0) if args.replay and first else None,
            sampler_tolerance=SAMPLER_TOLERANCE[args.actor_dtype],
            journal=stack.enter_context(Journal(args.out / "journal")) if first else None,
        )
        checkpoints = stack.enter_context(Checkpointer(args.out / "checkpoints"))
        start, state = trainer.restore(checkpoints, state)
        row: dict[str, Any] = {}
        preemption = stack.enter_context(Preemption())
        stopping, done = False, start
        for done, present, row, _ in trainer.run(state, start=start, steps=args.steps):
            if first and (done % 10 == 0 or done == args.steps):
                print(
                    f"step {done:4d}  reward {row['reward']:.2f}  "
                    f"staleness {row['staleness']:.1f}  "
                    f"learner idle {row['learner_idle_share']:.0%}  "
                    f"actors idle {row.get('actor_idle_share', 0.0):.0%}",
                    flush=True,
                )
            stopping = preemption.reached()
            if done % 20 == 0 or done == args.steps or stopping:
                trainer.save(checkpoints, done, present)
            if stopping:
                break
    if stopping:  # all is closed, and so saved
        raise Preempted(f"after step {done}")
    if first and row:
        (args.out / "summary.json").write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
