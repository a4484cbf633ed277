r"""Rules that turn the measurements of gradient health into a suggestion, in plain English.

Each horizon is in the first of these states that holds:

    non-finite  a float32 or float64 sample of the gradient is not finite
    flat        every sample of the pathwise gradient is exactly 0, though the return changes with noise on the actions
    zero        the same, and the return does not change
    biased      pathwise and score-function gradients differ: z above the bound for a false alarm in a thousand over all
                horizons, and the difference at least a tenth of the gradient
    exploding   perturbations grow a thousandfold over the horizon, and a batch of 128 cannot see the gradient (SNR < 1/128) or
                float32 is off by more than 1%; or they grow by 10^8
    float32     the float32 gradient is off by more than 1%
    wrong       the gradient disagrees with finite differences by 1% or more, at every step size
    heavy       the top 1% of samples have more than half of the variance
    noisy       SNR < 1/128, though little grows and no few starts dominate: they disagree, or the policy is near an optimum
    steep       the largest curvature is 10^4 times that of the shortest horizon or more, and the condition number over 10^6
    good        none of these

The suggestion is for the longest horizon:

    flat at any horizon     likelihood-ratio
    biased at any horizon   likelihood-ratio if the difference is 90% of the gradient or more, else mixed (alpha-order)
    zero at all horizons    none: there is no gradient
    good                    bptt
    heavy                   continuation: a schedule of trust or discounts that lets no start dominate
    steep                   continuation, and second order: the gradient is right, but steps along it are tiny
    noisy                   bptt with a larger batch, of 1/SNR
    float32                 bptt in float64
    any other               let h be the largest tested horizon that is good, steep or heavy, with SNR >= 1/128: truncated at h
                            if 4 h >= T, when little credit is lost, else short-horizon, windows of h with a critic. Without an
                            h: none if even the return is not finite, likelihood-ratio if its SNR is the higher one, else
                            continuation

The measurements hold for this policy; measure again during training.
"""

import math
from statistics import NormalDist
from typing import NamedTuple, SupportsFloat

import numpy as np

from diffmbrl.diagnostics.health import Health

BATCH = 128  # rollouts whose mean gradient should rise above its noise
FLOAT32 = 0.01  # relative error of the float32 gradient
WRONG = 0.01  # relative error against finite differences
TAIL = 0.5  # share of the variance in the top 1% of samples
FALSE_ALARM = 1e-3  # probability over all horizons
BIAS = 0.1  # share of the gradient
MISSED = 0.9  # share of the gradient
THOUSANDFOLD, HOPELESS = 1e3, 1e8  # growth over the horizon
COVERS = 4  # windows of at least T / 4 are truncated, shorter ones continued by a critic
INTEGRATOR = 0.1  # relative change when the step is halved
CONDITION, STEEP = 1e6, 1e4
ROUNDING = 1e-9  # share of the return
HEALTHY = ("good", "heavy", "steep")


class Verdict(NamedTuple):
    """A suggested estimator and its reasons.

    Args:
        estimator: bptt, truncated, short-horizon, likelihood-ratio, mixed, continuation or none.
        window: Steps of a truncated or short-horizon gradient; None for other estimators.
        headline: The suggestion in a sentence.
        reasons: Findings in the measurements, one sentence each, the most serious first.
        states: State of each horizon (see the top of this file).
        safe: The result of `safe_horizon`.
    """

    estimator: str
    window: int | None
    headline: str
    reasons: tuple[str, ...]
    states: tuple[str, ...]
    safe: int | None


def verdict(health: Health) -> Verdict:
    """Suggest an estimator for the longest horizon, by the rules at the top of this file.

    Args:
        health: The measurements of `gradient_health`.

    Returns:
        The suggestion and its reasons.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> from diffmbrl.diagnostics.health import gradient_health
    >>> task = tasks.lqr(horizon=20)
    >>> verdict(gradient_health(task, Linear.zeros(task), [5, 20], key=jax.random.key(0), starts=64)).estimator
    'bptt'
    """
    found = horizon_states(health)
    T = [int(t) for t in health.horizons]
    healthy = [state in HEALTHY and _seen(health, k) for k, state in enumerate(found)]
    window = max((t for t, fine in zip(T, healthy, strict=True) if fine), default=None)
    estimator, headline = _suggest(health, found, window)
    if estimator not in ("truncated", "short-horizon"):
        window = None
    return Verdict(estimator, window, headline, tuple(_reasons(health, found)), tuple(found), safe_horizon(health))


def horizon_states(health: Health) -> list[str]:
    """The state of each horizon, by the rules at the top of this file.

    Args:
        health: The measurements of `gradient_health`.

    Returns:
        One state for each horizon, such as `good` or `exploding`.
    """
    return [_state(health, k) for k in range(len(health.horizons))]


def safe_horizon(health: Health) -> int | None:
    """The largest measured horizon at which the float32 gradient is right to 1% and the SNR at least 1/128.

    Args:
        health: The measurements of `gradient_health`.

    Returns:
        The horizon in steps; None if there is none.
    """
    fine = (health.float32 <= FLOAT32) & (health.plain.snr * BATCH >= 1) & (health.plain.nonfinite == 0)
    return max((int(t) for t in health.horizons[fine]), default=None)


def least_z(count: int) -> float:
    """The bound on z that without a bias any of several tests exceeds with a probability of 0.1%.

    Args:
        count: Number of tests.

    Returns:
        The bound in standard errors.
    """
    return NormalDist().inv_cdf(1 - FALSE_ALARM / count)


def total_growth(health: Health) -> np.ndarray:
    """The factor by which perturbations of the closed loop grow over each horizon.

    Args:
        health: The measurements of `gradient_health`.

    Returns:
        The factors, shape [K]; infinite beyond the largest float.
    """
    with np.errstate(over="ignore"):
        return health.growth ** health.horizons.astype(float)


def _state(health: Health, k: int) -> str:
    plain, growth = health.plain, total_growth(health)[k]
    unseen = not _seen(health, k)
    if health.overflow[k] or plain.nonfinite[k] or not math.isfinite(health.J[k]):
        return "non-finite"
    if not np.any(health.norms[k]) and health.pathwise.norm[k] == 0 and health.pathwise.variance[k] == 0:
        # If the returns are equal, the score is rounding.
        changes = math.sqrt(_or_zero(health.score.variance[k])) > ROUNDING * max(1.0, abs(health.J[k]))
        return "flat" if changes else "zero"
    if _biased(health, k):
        return "biased"
    imprecise = not health.float32[k] <= FLOAT32
    if growth >= HOPELESS or (growth >= THOUSANDFOLD and (unseen or imprecise)):
        return "exploding"
    if imprecise:
        return "float32"
    if health.difference[k] >= WRONG:
        return "wrong"
    if plain.tail[k] > TAIL:
        return "heavy"
    if unseen:
        return "noisy"
    steep = health.condition[k] > CONDITION and health.curvature[k] >= STEEP * health.curvature[0]
    return "steep" if steep else "good"


def _seen(health: Health, k: int) -> bool:
    return bool(health.plain.snr[k] * BATCH >= 1)


def _biased(health: Health, k: int) -> bool:
    return bool(health.bias.z[k] > least_z(len(health.horizons)) and health.bias.size[k] >= BIAS)


def _suggest(health: Health, found: list[str], window: int | None) -> tuple[str, str]:
    T, last, final = int(health.horizons[-1]), len(found) - 1, found[-1]
    if "flat" in found:
        return "likelihood-ratio", (
            f"The pathwise gradient is exactly 0 at T = {health.horizons[found.index('flat')]}, without noise, though the "
            "return changes with the actions: reward or dynamics jump, and are flat between. Use the likelihood ratio "
            "(score function)."
        )
    if "biased" in found:
        k = max((k for k, state in enumerate(found) if state == "biased"), key=lambda k: health.bias.z[k])
        at = f"at T = {health.horizons[k]}"
        if health.bias.size[k] >= MISSED:
            return "likelihood-ratio", (
                f"The pathwise gradient is wrong {at}: reward or dynamics jump, and it does not see the jump. Use the "
                "likelihood ratio (score function)."
            )
        return "mixed", (
            f"The pathwise gradient is biased {at}: it misses the part that comes from jumps in reward or dynamics. Mix it "
            "with the likelihood ratio (alpha-order), which bounds that bias."
        )
    if all(state == "zero" for state in found):
        return "none", (
            f"There is no gradient: the return does not depend on the actions within {T} steps, neither by derivatives nor by "
            "sampling. No estimator can help; the reward needs a term that the policy can change."
        )
    if final == "good":
        return "bptt", f"BPTT is healthy up to T = {T}: use it."
    if final == "heavy":
        return "continuation", (
            f"At T = {T} a few rollouts dominate the gradient: {health.plain.tail[last]:.0%} of its variance is in the top 1% "
            "of samples. Use BPTT with continuation (trust or discounts), so that no start dominates."
        )
    if final == "steep":
        return "continuation", (
            f"BPTT is right up to T = {T}, but the return has become {_size(health.curvature[last] / health.curvature[0])} "
            f"times as steep as at T = {health.horizons[0]}: steps along the gradient must be tiny. Use continuation "
            "(discounts raised to 1) and second order (krylov-newton)."
        )
    if final == "noisy":
        return "bptt", (
            f"BPTT is right at T = {T}, but {_noise(health, last)}: average more rollouts, or stop if the policy is near "
            "an optimum."
        )
    if final == "float32":
        return "bptt", (
            f"The float32 gradient is off by {_percent(health.float32[last])} at T = {T}, though little grows: use float64."
        )
    what = {
        "non-finite": f"overflows by T = {T}",
        "wrong": f"is not the slope of the return at T = {T}",
        "exploding": f"has exploded by T = {T}",
        "zero": f"vanishes at T = {T}",
    }[final]
    if window is not None and COVERS * window >= T:
        return "truncated", f"BPTT is healthy to {window} steps and {what}: truncate the gradient every {window} steps."
    if window is not None:
        return "short-horizon", (
            f"BPTT is healthy to {window} steps and {what}: use windows of {window} steps with a critic at their end "
            f"(short-horizon), or truncate every {window} steps."
        )
    if not math.isfinite(health.J[0]):
        return "none", f"Even the return is not finite: {health.where}. Correct the task or the policy first."
    unhealthy = f"BPTT {what}, and no shorter horizon that was tested is healthy"
    if _or_zero(health.score.snr[last]) > _or_zero(health.pathwise.snr[last]):
        return (
            "likelihood-ratio",
            f"{unhealthy}; the likelihood ratio has more signal: use it, or test shorter horizons.",
        )
    return "continuation", (
        f"{unhealthy}: test shorter ones, and train with continuation (discounts raised as the loop becomes less sensitive)."
    )


def _reasons(health: Health, found: list[str]) -> list[str]:
    """Findings in sentences, the most serious first; of the longest horizon unless another is named."""
    last, horizons = len(found) - 1, [int(t) for t in health.horizons]
    T, out = horizons[-1], []
    if health.where is not None:
        first = horizons[int(np.argmax(health.overflow > 0))]
        out.append(
            f"In float32 the first value that is not finite is {health.where}; gradients break from T = {first}."
        )
    seen = [k for k in range(len(horizons)) if _biased(health, k)]
    if seen:
        k = max(seen, key=lambda k: health.bias.z[k])
        out.append(
            f"Pathwise and score-function gradients of the same smoothed return differ at T = {horizons[k]} by "
            f"{_percent(health.bias.size[k])} of the gradient, {health.bias.z[k]:.1f} standard errors."
        )
    grown = total_growth(health)[last]
    if grown >= THOUSANDFOLD:
        out.append(
            f"The closed loop multiplies perturbations by {health.growth[last]:.3f} a step, by {_size(grown)} over {T}: an "
            "instability or chaos dominates the effect of early actions."
        )
    if math.isfinite(health.float32[last]) and health.float32[last] > FLOAT32:
        out.append(f"At T = {T} float32 gets the gradient wrong by {_percent(health.float32[last])}.")
    if health.difference[last] >= WRONG:
        out.append(f"Finite differences disagree with it by {_percent(health.difference[last])} at every step size.")
    if found[last] != "noisy" and np.any(health.norms[last]) and not _seen(health, last):
        out.append(f"At T = {T} {_noise(health, last)}.")
    if found[last] != "heavy" and health.plain.tail[last] > TAIL:
        out.append(f"The top 1% of samples have {health.plain.tail[last]:.0%} of the gradient's variance.")
    if health.refinement[last] > INTEGRATOR:
        out.append(
            f"Halving the integrator's step changes the gradient by {_percent(health.refinement[last])}: it is the "
            "integrator's, not that of the equations of motion. Take smaller steps."
        )
    if health.early[last] > 0.5 and found[last] != "good":
        out.append(f"The first tenth of the steps makes up {health.early[last]:.0%} of the gradient.")
    if health.condition[last] > CONDITION and found[last] in (*HEALTHY, "noisy"):
        out.append(
            f"The Gauss-Newton matrix has a condition number of at least {health.condition[last]:.0e}: an accurate gradient "
            "still makes slow progress. Use second order (krylov-newton)."
        )
    blind = [T for k, T in enumerate(horizons) if least_z(len(horizons)) * health.bias.error[k] >= 1]
    if blind and not seen and found[last] not in ("flat", "zero"):
        listed = ", ".join(map(str, blind))
        out.append(f"The test of bias is too noisy to see a bias as large as the gradient at T = {listed}.")
    return out


def _noise(health: Health, k: int) -> str:
    snr = health.plain.snr[k]
    if not snr > 0:
        return f"the {health.norms.shape[1]} samples cannot tell it from 0"
    return f"one rollout's signal-to-noise ratio is {snr:.1e}: a batch would need {_size(1 / snr)} rollouts to see it"


def _size(x: SupportsFloat) -> str:
    x = float(x)
    return f"{x:,.0f}" if x < 1e6 else f"{x:.0e}"


def _percent(x: SupportsFloat) -> str:
    x = float(x)
    return f"{x:.0%}" if x < 10 else f"a factor of {_size(x)}"


def _or_zero(x: SupportsFloat) -> float:
    x = float(x)
    return 0.0 if math.isnan(x) else x
