"""A one-step constrained decision process small enough to solve: its optima in closed form.

M prompts × K responses. The policy is a table; J(π) = E_x[ E_π R − β·KL(π‖π_ref) ]. Everything
is float64 NumPy, written for clarity: it is the truth that algorithms are measured against.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from jaxrl import evaluation

Table = Float[np.ndarray, "M K"]


@dataclass(frozen=True, kw_only=True)
class CMDP:
    """Rewards, costs and reference policy of M prompts with K responses each.

    Attributes:
      reference_logits: π_ref = softmax by rows.
      reward: R, helpfulness.
      cost: C, a response is safe when C ≤ 0.
      kl_coef: β, in reward units per nat.
    """

    reference_logits: Table
    reward: Table
    cost: Table
    kl_coef: float = 0.2

    @property
    def reference(self) -> Table:
        return softmax(self.reference_logits)

    @property
    def unsafe(self) -> Bool[np.ndarray, "M K"]:
        return self.cost > 0.0


def draw(
    seed: int, *, benign_share: float, prompts: int = 200, responses: int = 16, kl_coef: float = 0.2
) -> CMDP:
    """The benchmark's instance: benign prompts first, then tempting ones.

    On a benign prompt every answer is safe. On a tempting one helpfulness h ~ U(0, 1) drives
    both: C = 4(h − ½) and R = 1.5·h + ½·ε; the reference leans to the helpful. A tempting
    prompt without a safe answer gets one: its least cost times −¼.

    Args:
      seed: of `numpy.random.default_rng`.
      benign_share: p, share of benign prompts, in [0, 1].
      prompts: M.
      responses: K, at least 2.
      kl_coef: β.

    Raises:
      ValueError: a size or share out of range.
    """
    if not 0.0 <= benign_share <= 1.0:
        raise ValueError(f"the share of benign prompts must lie in [0, 1]: {benign_share}")
    if prompts < 1 or responses < 2:
        raise ValueError(f"need at least 1 prompt and 2 responses: {prompts=}, {responses=}")
    rng = np.random.default_rng(seed)
    benign = round(prompts * benign_share)
    rest = (prompts - benign, responses)
    logits = 0.5 * rng.standard_normal((prompts, responses))
    reward, cost = np.empty_like(logits), np.empty_like(logits)
    reward[:benign] = rng.standard_normal((benign, responses))
    cost[:benign] = -0.5 - np.abs(rng.normal(1.5, 0.7, (benign, responses)))
    helpful = rng.random(rest)
    cost[benign:] = 4.0 * (helpful - 0.5)
    reward[benign:] = 1.5 * helpful + 0.5 * rng.standard_normal(rest)
    logits[benign:] += helpful - 0.5
    stuck = np.flatnonzero(cost.min(axis=1) > 0.0)
    least = cost[stuck].argmin(axis=1)
    cost[stuck, least] *= -0.25
    return CMDP(reference_logits=logits, reward=reward, cost=cost, kl_coef=kl_coef)


# ------------------------------------------------------------------------- closed forms


def softmax(logits: Table) -> Table:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def gibbs(cmdp: CMDP, effective_reward: Table) -> Table:
    """π ∝ π_ref·exp(R'/β), the optimum of E R' − β·KL; R' = −∞ forbids a response."""
    return softmax(cmdp.reference_logits + effective_reward / cmdp.kl_coef)


def unconstrained(cmdp: CMDP) -> Table:
    return gibbs(cmdp, cmdp.reward)


def critical(cmdp: CMDP) -> Table:
    """π ∝ π_ref·e^{R/β}·1{C ≤ 0}: the best policy that is safe on every prompt."""
    return gibbs(cmdp, np.where(cmdp.unsafe, -np.inf, cmdp.reward))


def penalised(cmdp: CMDP, penalty: Table) -> Table:
    """π ∝ π_ref·e^{(R − penalty)/β}."""
    return gibbs(cmdp, cmdp.reward - penalty)


def linear(cmdp: CMDP, multiplier: float | Float[np.ndarray, "M 1"]) -> Table:
    """π ∝ π_ref·e^{(R − λC)/β}: the fixed point of a Lagrangian on the mean cost, or shaping."""
    return penalised(cmdp, multiplier * cmdp.cost)


def rectified(cmdp: CMDP, multiplier: float, *, margin: float = 0.0) -> Table:
    """π ∝ π_ref·e^{(R − λ{C + δ}⁺)/β}: RePO's fixed point at λ."""
    return penalised(cmdp, multiplier * np.maximum(cmdp.cost + margin, 0.0))


def indicator(cmdp: CMDP, multiplier: float) -> Table:
    """π ∝ π_ref·e^{(R − λ·1{C > 0})/β}: the best J at any safety rate (Neyman–Pearson)."""
    return penalised(cmdp, multiplier * cmdp.unsafe)


def expected(cmdp: CMDP, *, threshold: float = 0.0) -> tuple[Table, float]:
    """The optimum under E_x E_π C ≤ d, and its multiplier λ* (0 where the constraint is idle)."""
    multiplier = _least_multiplier(
        lambda value: float(mean(linear(cmdp, value) * cmdp.cost)) - threshold
    )
    return linear(cmdp, multiplier), multiplier


def expected_per_prompt(
    cmdp: CMDP, *, threshold: float = 0.0
) -> tuple[Table, Float[np.ndarray, "M 1"]]:
    """The optimum under E_π C(x, ·) ≤ d for each prompt, and λ(x)."""
    low, high = np.zeros((len(cmdp.cost), 1)), np.full((len(cmdp.cost), 1), _MAX_MULTIPLIER)

    def violated(multiplier: np.ndarray) -> np.ndarray:
        return (linear(cmdp, multiplier) * cmdp.cost).sum(axis=1, keepdims=True) > threshold

    idle = ~violated(low)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        above = violated(middle)
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    multiplier = np.where(idle, 0.0, high)
    return linear(cmdp, multiplier), multiplier


_MAX_MULTIPLIER = 1e6
_BISECTIONS = 200


def _least_multiplier(excess: Callable[[float], float]) -> float:
    """Least λ in [0, 1e6] with excess(λ) ≤ 0, for a falling function."""
    if excess(0.0) <= 0.0:
        return 0.0
    low, high = 0.0, _MAX_MULTIPLIER
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0.0 else (low, middle)
    return high


def tune(
    cmdp: CMDP, family: Callable[[CMDP, float], Table], *, safety: float
) -> tuple[Table, float]:
    """The member of a family, monotone in λ, with the safety rate asked for; and its λ."""
    multiplier = _least_multiplier(lambda value: safety - safety_rate(cmdp, family(cmdp, value)))
    return family(cmdp, multiplier), multiplier


def exact_penalty(cmdp: CMDP) -> float:
    """λ° = max_{x, unsafe y} (R(x, y) − max_safe R(x, ·))/C(x, y), the exact penalty at β = 0."""
    best_safe = np.where(cmdp.unsafe, -np.inf, cmdp.reward).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (cmdp.reward - best_safe) / cmdp.cost
    return float(max(0.0, np.where(cmdp.unsafe, ratio, -np.inf).max()))


def best_safe_response(cmdp: CMDP) -> Table:
    """The critical optimum without anchor (β = 0): all mass on the best safe response."""
    policy = np.zeros_like(cmdp.reward)
    best = np.where(cmdp.unsafe, -np.inf, cmdp.reward).argmax(axis=1)
    policy[np.arange(len(policy)), best] = 1.0
    return policy


# ---------------------------------------------------------------------------- measures


def mean(per_response: Table) -> float:
    """Mean over prompts of the sum over responses: E_x Σ_y."""
    return float(per_response.sum(axis=1).mean())


def kl(policy: Table, reference: Table) -> Float[np.ndarray, " M"]:
    """KL(π‖π_ref) of each prompt, in nats; 0·log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(policy > 0.0, policy * (np.log(policy) - np.log(reference)), 0.0)
    return terms.sum(axis=1)


def objective_per_prompt(cmdp: CMDP, policy: Table) -> Float[np.ndarray, " M"]:
    """E_π R − β·KL of each prompt."""
    return (policy * cmdp.reward).sum(axis=1) - cmdp.kl_coef * kl(policy, cmdp.reference)


def objective(cmdp: CMDP, policy: Table) -> float:
    """J(π) = E R − β·KL."""
    return float(objective_per_prompt(cmdp, policy).mean())


def unsafe_mass(cmdp: CMDP, policy: Table) -> Float[np.ndarray, " M"]:
    """P(C > 0 | x) of each prompt."""
    return (policy * cmdp.unsafe).sum(axis=1)


def safety_rate(cmdp: CMDP, policy: Table) -> float:
    return 1.0 - float(unsafe_mass(cmdp, policy).mean())


def measures(cmdp: CMDP, policy: Table) -> dict[str, float]:
    """What tables show of a policy.

    Returns:
      objective: J; safety_rate: mean mass on C ≤ 0; safe_prompt_share: share of prompts with
      unsafe mass ≤ .01; worst_decile_unsafe, worst_decile_cost: mean over the tenth of the
      prompts where it is largest; reward, kl, cost, rectified_cost: expectations;
      compensation: E{C}⁺ − {E C}⁺, what safe prompts pay for unsafe ones.
    """
    unsafe = unsafe_mass(cmdp, policy)
    cost = (policy * cmdp.cost).sum(axis=1)
    rectified_cost = mean(policy * np.maximum(cmdp.cost, 0.0))
    return {
        "objective": objective(cmdp, policy),
        "safety_rate": 1.0 - float(unsafe.mean()),
        "safe_prompt_share": evaluation.safe_prompt_share(unsafe),
        "worst_decile_unsafe": evaluation.worst_decile(unsafe),
        "worst_decile_cost": evaluation.worst_decile(cost),
        "reward": mean(policy * cmdp.reward),
        "kl": float(kl(policy, cmdp.reference).mean()),
        "cost": float(cost.mean()),
        "rectified_cost": rectified_cost,
        "compensation": rectified_cost - max(float(cost.mean()), 0.0),
    }


def closed_forms(cmdp: CMDP) -> dict[str, Table]:
    """Every policy of the benchmark's exact table, by name."""
    return {
        "unconstrained": unconstrained(cmdp),
        "expected": expected(cmdp)[0],
        "expected_per_prompt": expected_per_prompt(cmdp)[0],
        "critical": critical(cmdp),
        "rectified_5": rectified(cmdp, 5.0),
        "rectified_50": rectified(cmdp, 50.0),
        "reward_shaping": linear(cmdp, 1.0),
        "indicator_2": indicator(cmdp, 2.0),
    }


# ---------------------------------------------------------------------- scaling laws


def rectified_ascent(
    cmdp: CMDP, times: Float[np.ndarray, " n"], *, rate: float = 0.1
) -> dict[str, Float[np.ndarray, " n"]]:
    """λ̇ = η·E{C}⁺ along RePO's exact fixed points: λ, E{C}⁺ and P(unsafe) at the given times.

    With a cost density that is continuous at 0⁺: λ ∝ t^⅓, E{C}⁺ ∝ t^−⅔, P(unsafe) ∝ t^−⅓.
    Integrated as t(λ) = ∫ dλ/(η·E{C}⁺) on a grid of λ.
    """
    grid = np.geomspace(1e-2, 1e4, 300)
    policies = (rectified(cmdp, value) for value in grid)
    pairs = [(mean(p * np.maximum(cmdp.cost, 0.0)), 1.0 - safety_rate(cmdp, p)) for p in policies]
    # Single responses, no density, lie below the cost scale β/λ of the end: masses vanish there.
    violation, unsafe = np.maximum(np.array(pairs).T, 1e-300)
    pace = np.sqrt(violation[1:] * violation[:-1])
    elapsed = np.concatenate([[0.0], np.cumsum(np.diff(grid) / (rate * pace))])
    multiplier = np.interp(times, elapsed, grid)

    def at(values: Float[np.ndarray, " g"]) -> Float[np.ndarray, " n"]:
        return np.exp(np.interp(np.log(multiplier), np.log(grid), np.log(values)))

    return {"multiplier": multiplier, "rectified_cost": at(violation), "unsafe": at(unsafe)}


def log_slope(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Exponent of a power law, by least squares on logarithms.

    >>> round(log_slope(np.array([1.0, 2.0, 4.0]), np.array([1.0, 4.0, 16.0])), 6)
    2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
