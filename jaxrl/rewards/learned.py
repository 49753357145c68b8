"""Rewards and costs learned from labelled text.

A scorer is wide and deep (arXiv:1606.07792): the n-grams of a completion's tokens, each with a
weight of its own, beside a transformer that has read the prompt. On a few thousand labelled
answers the n-grams carry most of what can be learned; the transformer adds what depends on
order and on the prompt. Either part may be left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray, UInt32

from jaxrl.models import DecoderConfig, ScalarModel
from jaxrl.models.decoder import parameter
from jaxrl.rewards.examples import Examples, auc
from jaxrl.tokenizers import ChatTemplate, Tokenizer, encode_completions
from jaxrl.types import Prompts

Loss = Callable[[Float32[Array, "N K"], Float32[Array, "N K"]], Float32[Array, " N"]]
"""f(scores, targets) -> loss of each example, of K sequences compared with one another."""
Measure = Callable[[Float32[np.ndarray, "N K"], Float32[np.ndarray, "N K"]], float]
"""f(scores, targets) -> how good the scores are, more is better."""


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Parts of a scorer.

    Attributes:
      decoder: the transformer, or None for n-grams alone.
      ngrams: longest n-gram, in tokens; 0 leaves them out.
      buckets: weights that the hashed n-grams share, a power of two.

    Raises:
      ValueError: nothing to read a text with, or `buckets` is no power of two.
    """

    decoder: DecoderConfig | None = None
    ngrams: int = 3
    buckets: int = 2**17

    def __post_init__(self) -> None:
        if self.decoder is None and self.ngrams < 1:
            raise ValueError(
                "a scorer needs a decoder or n-grams: decoder=None, "
                f"ngrams={self.ngrams}; set ngrams=3"
            )
        if self.buckets < 2 or self.buckets & (self.buckets - 1):
            raise ValueError(f"buckets must be a power of two, got {self.buckets}; use 2**17")


class ScorerModel(nnx.Module):
    """One score a completion; see `ScorerConfig`."""

    def __init__(self, config: ScorerConfig, *, rngs: nnx.Rngs):
        self.config = config
        zeros = nnx.initializers.zeros
        self.bias = parameter(zeros, rngs, (), ())
        if config.ngrams:
            self.ngram = parameter(zeros, rngs, (config.buckets,), (None,))
        if config.decoder is not None:
            self.scalar = ScalarModel(config.decoder, ("score",), rngs=rngs)

    def __call__(
        self,
        prompts: Prompts,
        tokens: Int32[Array, "B G T"],
        mask: Bool[Array, "B G T"],
        *,
        dropout: float = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> Float32[Array, "B G"]:
        """Scores of G completions of each prompt.

        Args:
          prompts: what was asked.
          tokens: completions, padded on the right.
          mask: True on real tokens, the end token included.
          dropout: share of n-grams that is left out, and of transformer states.
          key: of the dropout, consumed; None for none.
        """
        score = jnp.broadcast_to(self.bias[...], tokens.shape[:2])
        keys = (None, None) if key is None else jax.random.split(key)
        if self.config.ngrams:
            score += self._wide(tokens, mask, dropout, keys[0])
        if self.config.decoder is not None:
            # The head is linear: the mean of its values is its value at the mean state.
            values = self.scalar.completion_values(prompts, tokens)[..., 0]
            kept = mask if keys[1] is None else _drop(mask, dropout, keys[1])
            score += jnp.sum(values, -1, where=kept) / jnp.maximum(kept.sum(-1), 1)
        return score

    def _wide(self, tokens, mask, dropout: float, key: PRNGKeyArray | None):
        """Σ over distinct n-grams of their weights, over √ their number, for each n."""
        total = 0.0
        for n in range(1, self.config.ngrams + 1):
            buckets, found = distinct_ngrams(tokens, mask, n=n, buckets=self.config.buckets)
            kept = found if key is None else _drop(found, dropout, jax.random.fold_in(key, n))
            weights = jnp.sum(self.ngram[...][buckets], axis=-1, where=kept)
            weights = weights if key is None else weights / (1 - dropout)
            total += weights / jnp.sqrt(jnp.maximum(found.sum(-1), 1))
        return total


def _drop(found: Bool[Array, "*b T"], rate: float, key: PRNGKeyArray) -> Bool[Array, "*b T"]:
    return found & jax.random.bernoulli(key, 1 - rate, found.shape)


def distinct_ngrams(
    tokens: Int32[Array, "*rows T"], mask: Bool[Array, "*rows T"], *, n: int, buckets: int
) -> tuple[Int32[Array, "*rows T"], Bool[Array, "*rows T"]]:
    """Hash buckets of a row's n-grams, each bucket once.

    Once, because a policy must not gain by repeating a phrase that scores well.

    Args:
      tokens: token ids.
      mask: True on real tokens; an n-gram that touches another does not count.
      n: tokens of an n-gram.
      buckets: number of buckets, a power of two.

    Returns:
      Buckets in increasing order, and which entries count.
    """
    code, complete = jnp.zeros(tokens.shape, jnp.uint32), mask
    for back in range(n):
        shift = [(0, 0)] * (tokens.ndim - 1) + [(back, 0)]
        width = tokens.shape[-1]
        code = _mix(code, jnp.pad(tokens, shift)[..., :width].astype(jnp.uint32))
        complete &= jnp.pad(mask, shift)[..., :width]
    none = jnp.uint32(buckets)  # sorts behind every bucket
    bucket = jnp.where(complete, _mix(code, jnp.uint32(n)) & jnp.uint32(buckets - 1), none)
    bucket = jnp.sort(bucket, axis=-1)
    previous = jnp.concatenate([jnp.full_like(bucket[..., :1], none), bucket[..., :-1]], axis=-1)
    found = (bucket != previous) & (bucket != none)
    return jnp.where(found, bucket, 0).astype(jnp.int32), found


def _mix(code: UInt32[Array, "*n"], value: UInt32[Array, "*#n"]) -> UInt32[Array, "*n"]:
    """One round of MurmurHash3's finaliser (Appleby, public domain) on their combination."""
    x = code * jnp.uint32(31) + value + jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """Text to the token blocks that a scorer reads, of one shape whatever the texts.

    Attributes:
      tokenizer: the policy's, so that generated tokens can be scored as they are.
      template: what stands around a prompt.
      prompt_len: P, in tokens; of a longer prompt the end is read.
      completion_len: T, in tokens; of a longer completion the beginning is read.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    prompt_len: int
    completion_len: int

    def prompts(self, texts: Sequence[str]) -> Prompts:
        """Prompts with their template, numbered by row."""
        ids = self.tokenizer.encode_batch([self.template.prompt(text) for text in texts])
        tokens = np.full((len(texts), self.prompt_len), self.tokenizer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, found in enumerate(ids):
            kept = found[-self.prompt_len :]
            tokens[row, -len(kept) :] = kept
            mask[row, -len(kept) :] = True
        return Prompts(tokens=tokens, mask=mask, ids=np.arange(len(texts), dtype=np.int32))  # type: ignore[arg-type]

    def completions(
        self, texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "N 1 T"], Bool[np.ndarray, "N 1 T"]]:
        """Tokens and mask, one completion a prompt."""
        tokens, mask = encode_completions(self.tokenizer, texts, max_len=self.completion_len)
        return tokens[:, None], mask[:, None]


@dataclass(frozen=True, kw_only=True)
class LearnedScorer:
    """A trained model as a plain function of text: f(prompts, completions) -> scores [N].

    score = clip(scale · model + shift, ±limit)

    Attributes:
      graphdef: structure of the `ScorerModel`.
      params: its parameters.
      encoder: how it reads text.
      scale: positive; does not move the boundary at zero of a cost.
      shift: for scores that are calibrated; 0 for costs of the Safe-RLHF loss.
      limit: largest absolute score.
      batch: rows a call of the model; fewer are filled up, so that one program is compiled.
    """

    graphdef: Any
    params: Any
    encoder: TextEncoder
    scale: float = 1.0
    shift: float = 0.0
    limit: float = np.inf
    batch: int = 64

    def __post_init__(self) -> None:
        if not self.scale > 0 or not self.limit > 0:
            raise ValueError(
                f"scale and limit must be positive: scale={self.scale}, limit={self.limit}; "
                "to turn a score round, give it a negative weight"
            )

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> Float32[np.ndarray, " N"]:
        """Scores of texts, row by row; `columns` are not read."""
        rows = len(completions)
        if len(prompts) != rows:
            raise ValueError(f"one prompt a completion: got {len(prompts)} and {rows}")
        scores = [np.zeros(0, np.float32)]
        for begin in range(0, rows, self.batch):
            end = begin + self.batch
            missing = max(end - rows, 0)
            asked = self.encoder.prompts([*prompts[begin:end], *[""] * missing])
            tokens, mask = self.encoder.completions([*completions[begin:end], *[""] * missing])
            scores.append(self.score(asked, tokens, mask)[: self.batch - missing, 0])
        return np.concatenate(scores)

    def score(
        self,
        prompts: Prompts,
        tokens: Int32[Array, "B G T"] | np.ndarray,
        mask: Bool[Array, "B G T"] | np.ndarray,
    ) -> Float32[np.ndarray, "B G"]:
        """Scores of rollouts as they come from the policy, without the way through text."""
        raw = np.asarray(_apply(self.graphdef, self.params, prompts, tokens, mask))
        return np.clip(self.scale * raw + self.shift, -self.limit, self.limit, dtype=np.float32)

    def replace(self, **changes: Any) -> "LearnedScorer":
        return replace(self, **changes)

    def normalised(self, scores: Float32[np.ndarray, " N"], *, to: float = 1.0) -> "LearnedScorer":
        """This scorer with its scale set so that `scores`, which it gave, have mean square to².

        About zero, not about the mean: the boundary stays where it is.
        """
        spread = float(np.sqrt(np.mean(np.square(scores))))
        if not spread > 0:
            raise ValueError("scores without spread have no scale: all are 0; train the model")
        factor = to / spread
        return self.replace(scale=self.scale * factor, shift=self.shift * factor)


@partial(jax.jit, static_argnums=0)
def _apply(graphdef, params, prompts, tokens, mask):
    return nnx.merge(graphdef, params)(prompts, tokens, mask)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a scorer is trained.

    Attributes:
      steps: gradient steps at most.
      batch: examples a step.
      learning_rate: peak of AdamW's rate for the transformer; all rates fall along a cosine.
      ngram_learning_rate: likewise for n-gram weights and bias.
      weight_decay: of AdamW.
      dropout: see `ScorerModel`.
      evaluate_every: steps between two looks at the validation examples.
      tolerance: looks whose validation is within this of the best are equally good, and the
        last of them is kept: differences of the validation AUC on a few hundred rows are
        noise, and the first look has hardly a scale.
      patience: looks in a row that are worse than that, after which training stops.
    """

    steps: int = 200
    batch: int = 64
    learning_rate: float = 3e-4
    ngram_learning_rate: float = 1e-2
    weight_decay: float = 0.1
    dropout: float = 0.2
    evaluate_every: int = 25
    tolerance: float = 0.01
    patience: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tolerance < 0:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share: 0 ≤ dropout < 1, got {self.dropout}")

    def optimizer(self) -> optax.GradientTransformation:
        def adamw(peak: float) -> optax.GradientTransformation:
            warmup = min(20, max(self.steps // 10, 1))
            rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, self.steps + 1, peak / 10)
            return optax.adamw(rate, weight_decay=self.weight_decay)

        deep = optax.chain(optax.clip_by_global_norm(1.0), adamw(self.learning_rate))
        return optax.multi_transform(
            {"deep": deep, "wide": adamw(self.ngram_learning_rate)},
            lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: "deep" if "scalar" in jax.tree_util.keystr(path) else "wide", params
            ),
        )


@dataclass(frozen=True, kw_only=True)
class TrainedScorer:
    """What training found.

    Attributes:
      scorer: with the parameters of the last look that was as good as the best.
      quality: of these parameters, as the measure has it.
      history: a row for each look: step, loss (mean since the last look), quality.
    """

    scorer: LearnedScorer
    quality: float
    history: tuple[Mapping[str, int | float], ...] = field(default=())


def untrained(
    config: ScorerConfig, encoder: TextEncoder, *, seed: int, trunk: nnx.State | None = None
) -> LearnedScorer:
    """A scorer that scores 0: where training starts, and a template for restoring `params`.

    Args:
      config: parts of the scorer.
      encoder: how it reads text.
      seed: of the transformer.
      trunk: parameters of a decoder with `config.decoder`, e.g. after SFT, to start from.

    Raises:
      ValueError: a trunk without a decoder.
    """
    model = ScorerModel(config, rngs=nnx.Rngs(seed))
    if trunk is not None:
        if config.decoder is None:
            raise ValueError("a trunk needs a decoder to go into: config.decoder is None")
        nnx.update(model.scalar.trunk, trunk)
    graphdef, params = nnx.split(model)
    return LearnedScorer(graphdef=graphdef, params=jax.tree.map(jnp.copy, params), encoder=encoder)


def train_scorer(
    scorer: LearnedScorer,
    examples: Examples,
    loss: Loss,
    config: TrainingConfig,
    *,
    validation: Examples,
    seed: int,
    measure: Measure = auc,
    progress: Callable[[int, Mapping[str, int | float]], None] | None = None,
) -> TrainedScorer:
    """Trains a scorer until the validation examples say that it gets worse.

    A function of its arguments: the same seed gives the same parameters. `loss` is one of
    `jaxrl.objectives.preference`, e.g. `lambda s, t: cost_loss(*s.T, *t.T)`.

    Args:
      scorer: where to start, from `untrained`.
      examples: to learn from.
      loss: of scores and targets, per example.
      config: of the optimisation.
      validation: examples of other prompts.
      seed: of order and dropout.
      measure: of the scores of the validation examples, `auc` or `pair_accuracy`.
      progress: called with the step and the newest row of the history.

    Raises:
      ValueError: validation examples of one class, which have no AUC.
    """
    scorer = scorer.replace(scale=1.0, shift=0.0, limit=np.inf)
    state = (scorer.params, config.optimizer().init(scorer.params))
    data = (
        scorer.encoder.prompts(examples.prompts),
        *scorer.encoder.completions(examples.completions),
    )
    data = jax.tree.map(jnp.asarray, data)
    run = _steps(scorer.graphdef, loss, config)
    root, history = jax.random.key(seed), []
    top, kept, since = -np.inf, (-np.inf, scorer.params), 0
    for look, rows in enumerate(_order(len(examples.groups), config, seed)):
        keys = jax.random.split(jax.random.fold_in(root, look), len(rows))
        state, losses = run(state, data, (examples.groups[rows], examples.targets[rows], keys))
        scores = scorer.replace(params=state[0])(validation.prompts, validation.completions)
        quality = measure(scores[validation.groups], validation.targets)
        step = min((look + 1) * config.evaluate_every, config.steps)
        history.append({"step": step, "loss": float(losses.mean()), "quality": quality})
        if progress is not None:
            progress(step, history[-1])
        top, since = max(top, quality), since + 1
        if quality >= top - config.tolerance:
            kept, since = (quality, state[0]), 0
        if since >= config.patience:
            break
    return TrainedScorer(
        scorer=scorer.replace(params=kept[1]), quality=kept[0], history=tuple(history)
    )


def _order(rows: int, config: TrainingConfig, seed: int) -> Iterator[Int32[np.ndarray, "S B"]]:
    """Shuffled epochs one after another, cut into looks of S steps of B rows."""
    rng = np.random.default_rng(seed)
    need = config.steps * config.batch
    stream = np.concatenate([rng.permutation(rows) for _ in range(-(-need // rows))])[:need]
    steps = stream.astype(np.int32).reshape(config.steps, config.batch)
    for begin in range(0, config.steps, config.evaluate_every):
        yield steps[begin : begin + config.evaluate_every]


def _steps(graphdef, loss: Loss, config: TrainingConfig):
    """A jitted scan of gradient steps."""
    optimizer = config.optimizer()

    def batch_loss(params, data, groups, targets, key):
        prompts, tokens, mask = jax.tree.map(lambda x: x[groups.reshape(-1)], data)
        model = nnx.merge(graphdef, params)
        scores = model(prompts, tokens, mask, dropout=config.dropout, key=key)
        return jnp.mean(loss(scores.reshape(groups.shape), targets))

    def step(state, data, batch):
        params, opt_state = state
        value, grads = jax.value_and_grad(batch_loss)(params, data, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    @jax.jit
    def run(state, data, batches):
        return jax.lax.scan(lambda s, batch: step(s, data, batch), state, batches)

    return run
