"""The pre-registered hypotheses H1–H5: each decided by a rule that was fixed before the runs.

Arrays in, one verdict out; the exact benchmark and the experiments on text share these rules.
Axes: E seeds, N prompts, K values of a knob.

H1  PPO-Lagrangian at d = 0 keeps the mean cost at 0 while its worst decile is unsafe
    (mean C ≤ 0, worst-decile C > 0, safety < .9); refuted if the safety is ≥ .95.
H2  At equal safety RePO has a higher J than PPO-Lagrangian with a retuned threshold
    (95 % interval over prompts × seeds above 0).
H3  RePO makes at least 95 % of the prompts safe.
H4  The exact gradient gives RePO a lower J but a better worst decile than the switch with the
    raw critic (sign tests over seeds).
H5  Where costs carry no graded conflict (binary, shuffled or benign costs), the families of
    penalties do not differ at equal safety.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jaxrl.evaluation import Interval, at_least, bootstrap

Seeds = Float[np.ndarray, " E"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One line of a report.

    Attributes:
      name: "H1" … "H5", with the algorithm where several are asked.
      claim: what was predicted.
      outcome: "holds", "refuted", or "undecided" where the rule has a gap or data are missing.
      numbers: what decided it.
    """

    name: str
    claim: str
    outcome: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.name} {self.outcome}: {self.claim} ({self.numbers})"


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What one algorithm reaches over the values of a knob.

    Attributes:
      safety: safe mass of each prompt, in [0, 1].
      objective: J of each prompt.
    """

    safety: Float[np.ndarray, "K E N"]
    objective: Float[np.ndarray, "K E N"]

    def __post_init__(self) -> None:
        if self.safety.shape != self.objective.shape or self.safety.ndim != 3:
            raise ValueError(
                "a frontier has axes knob, seed, prompt for both: "
                f"{self.safety.shape=}, {self.objective.shape=}"
            )


def _undecided(name: str, claim: str, seeds: int, *, least: int) -> Verdict | None:
    if seeds >= least:
        return None
    return Verdict(
        name=name,
        claim=claim,
        outcome="undecided",
        numbers=f"{seeds} seeds, at least {least} needed",
    )


def h1(
    mean_cost: Seeds,
    worst_decile_cost: Seeds,
    safety: Seeds,
    *,
    slack: float = 0.05,
    least_seeds: int = 5,
) -> Verdict:
    """PPO-Lagrangian at d = 0 compensates unsafe prompts by safe ones.

    Args:
      mean_cost: E C of each seed.
      worst_decile_cost: of each seed.
      safety: safety rate of each seed.
      slack: how far above 0 the mean cost may be and still count as met, in cost units: the
        multiplier keeps it at 0 only on the average of the last steps.
      least_seeds: fewer are undecided.
    """
    claim = "PPO-Lagrangian at d=0 meets mean C ≤ 0 with worst-decile C > 0 and safety < .9"
    numbers = (
        f"mean C {mean_cost.mean():.3f}, worst-decile C {worst_decile_cost.mean():.3f}, "
        f"safety {safety.mean():.3f}"
    )
    short = _undecided("H1", claim, safety.size, least=least_seeds)
    if short:
        return short
    met = mean_cost.mean() <= slack and worst_decile_cost.mean() > 0.0
    if met and safety.mean() < 0.9:
        outcome = "holds"
    else:
        between = 0.9 <= safety.mean() < 0.95 and met
        outcome = "undecided" if between else "refuted"
    return Verdict(name="H1", claim=claim, outcome=outcome, numbers=numbers)


def h2(
    repo: Frontier,
    lagrangian: Frontier,
    *,
    name: str = "H2",
    draws: int = 1000,
    least_seeds: int = 5,
    rng: np.random.Generator,
) -> Verdict:
    """J at equal safety, RePO against a retuned PPO-Lagrangian; `rng` is consumed."""
    claim = "at equal safety J(RePO) > J(PPO-Lagrangian, threshold retuned)"
    _, seeds, prompts = repo.safety.shape
    short = _undecided(name, claim, seeds, least=least_seeds)
    if short:
        return short
    found, target = matched(repo, lagrangian, draws=draws, rng=rng)
    numbers = (
        f"ΔJ {found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}] "
        f"at safety {target:.3f}, {seeds} seeds × {prompts} prompts"
    )
    if math.isnan(found.low):
        return Verdict(name=name, claim=claim, outcome="undecided", numbers=numbers)
    outcome = "holds" if found.low > 0.0 else "refuted"
    return Verdict(name=name, claim=claim, outcome=outcome, numbers=numbers)


def matched(
    a: Frontier, b: Frontier, *, draws: int, rng: np.random.Generator
) -> tuple[Interval, float]:
    """J(a) − J(b) at the largest safety that both reach, paired over seeds and prompts."""
    if a.safety.shape[1:] != b.safety.shape[1:]:
        raise ValueError(
            "paired frontiers need the same seeds and prompts: "
            f"{a.safety.shape[1:]} and {b.safety.shape[1:]}"
        )

    def reduced(values: np.ndarray, seeds: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        return values[:, seeds][:, :, prompts].mean(axis=(1, 2))

    def level(seeds: np.ndarray, prompts: np.ndarray) -> float:
        return min(float(reduced(f.safety, seeds, prompts).max()) for f in (a, b))

    def difference(seeds: np.ndarray, prompts: np.ndarray) -> float:
        target = level(seeds, prompts)
        ours, theirs = (
            at_least(
                reduced(f.safety, seeds, prompts), reduced(f.objective, seeds, prompts), target
            )
            for f in (a, b)
        )
        return ours - theirs

    _, seeds, prompts = a.safety.shape
    interval = bootstrap(difference, seeds=seeds, prompts=prompts, draws=draws, rng=rng)
    return interval, level(np.arange(seeds), np.arange(prompts))


def h3(safe_prompt_share: Seeds, *, name: str = "H3", least_seeds: int = 5) -> Verdict:
    """RePO makes nearly every prompt safe (all of its samples, or ≥ 99 % of the mass)."""
    claim = "RePO reaches prompt-safety ≥ .95"
    short = _undecided(name, claim, safe_prompt_share.size, least=least_seeds)
    if short:
        return short
    reached = float(safe_prompt_share.mean())
    return Verdict(
        name=name,
        claim=claim,
        outcome="holds" if reached >= 0.95 else "refuted",
        numbers=f"{reached:.3f} of the prompts",
    )


def h4(
    exact_objective: Seeds,
    switch_objective: Seeds,
    exact_worst_decile: Seeds,
    switch_worst_decile: Seeds,
    *,
    least_seeds: int = 5,
) -> Verdict:
    """The exact gradient trades J for the worst decile; sign tests at 5 %, one-sided."""
    claim = "the exact gradient has lower J but a better worst decile than the raw-critic switch"
    short = _undecided("H4", claim, exact_objective.size, least=least_seeds)
    if short:
        return short
    lower = sign_test(switch_objective - exact_objective)
    better = sign_test(switch_worst_decile - exact_worst_decile)
    numbers = (
        f"ΔJ {np.mean(exact_objective - switch_objective):+.3f} (p = {lower:.3f}), "
        f"Δ worst-decile unsafe {np.mean(exact_worst_decile - switch_worst_decile):+.3f} "
        f"(p = {better:.3f}), {exact_objective.size} seeds"
    )
    outcome = "holds" if lower < 0.05 and better < 0.05 else "refuted"
    return Verdict(name="H4", claim=claim, outcome=outcome, numbers=numbers)


def sign_test(differences: Seeds) -> float:
    """P(as many positive signs or more, if both were equally likely); ties are left out.

    >>> sign_test(np.ones(5)), sign_test(np.zeros(3))
    (0.03125, 1.0)
    """
    signs = np.sign(differences[differences != 0.0])
    count, positive = signs.size, int((signs > 0).sum())
    return sum(math.comb(count, k) for k in range(positive, count + 1)) / 2**count


def h5(differences: Mapping[str, Seeds], *, slack: float = 0.01, least_seeds: int = 5) -> Verdict:
    """Negative controls.

    Args:
      differences: per control, ΔJ between the families at equal safety, for each seed.
      slack: a mean within ± this, in reward units, counts as none.
      least_seeds: fewer are undecided.
    """
    claim = "no difference between families on " + ", ".join(differences)
    short = _undecided(
        "H5", claim, min((d.size for d in differences.values()), default=0), least=least_seeds
    )
    if short:
        return short
    none = {name: abs(float(d.mean())) <= slack for name, d in differences.items()}
    numbers = ", ".join(
        f"{name} ΔJ {d.mean():+.4f} ± {standard_error(d):.4f}" for name, d in differences.items()
    )
    return Verdict(
        name="H5",
        claim=claim,
        outcome="holds" if all(none.values()) else "refuted",
        numbers=numbers,
    )


def h5_sampled(
    differences: Mapping[str, Interval],
    *,
    seeds: int,
    slack: float = 0.01,
    least_seeds: int = 5,
) -> Verdict:
    """Negative controls where policies are sampled, not exact.

    Args:
      differences: per control, ΔJ between the families at equal safety with its 95 % interval
        over prompts × seeds.
      seeds: how many seeds stand behind each.
      slack: as in `h5`; a difference counts as none while its interval meets ± this.
      least_seeds: fewer are undecided.
    """
    claim = "no difference between families on " + ", ".join(differences)
    short = _undecided("H5", claim, seeds if differences else 0, least=least_seeds)
    if short:
        return short
    none = [d.low <= slack and d.high >= -slack for d in differences.values()]
    return Verdict(
        name="H5",
        claim=claim,
        outcome="holds" if all(none) else "refuted",
        numbers=", ".join(
            f"{name} ΔJ {d.estimate:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
            for name, d in differences.items()
        ),
    )


def standard_error(values: Seeds) -> float:
    """Of the mean over seeds; NaN for a single seed.

    >>> standard_error(np.array([0.0, 2.0]))
    1.0
    """
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
