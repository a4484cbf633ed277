r"""Interquartile mean and bootstrap interval over seeds.

The interquartile mean drops the best and the worst quarter of the seeds, `floor(n / 4)` at each end, and averages the
rest: less moved by one lucky or broken seed than the mean, and less wasteful than the median. Its 95% interval is the
percentile bootstrap: seeds drawn with replacement, 10,000 times, by a generator of fixed seed. (Drawing is
stratified by task; here there is one task, one stratum.)

Few seeds, exactly:

    1      the value; no interval (NaN, NaN)
    2, 3   the mean; the interval is [worst, best], since each end is drawn with probability 1/4 or 1/27, above 2.5%
    4      the mean of the middle two; the interval is again [worst, best] (probability 13/256)
    5      the mean of the middle three; from here on the interval is narrower than the range

An interval from fewer than 5 seeds covers less than 95%: read it as the observed range. A seed whose return is not
finite counts as minus infinity: a run that broke is the worst run, not a missing one.

Reference: Agarwal, Schwarzer, Castro, Courville, Bellemare 2021, "Deep reinforcement learning at the edge of the
statistical precipice", section 4; `trim_mean(0.25)` in its code.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A value and its 95% interval; NaN for an unknown number.

    Args:
        value: The value.
        low, high: The ends of the interval.
    """

    value: float
    low: float
    high: float


def interquartile_mean(x: Float[np.ndarray, "*batch seeds"]) -> Float[np.ndarray, "*batch"]:
    """Mean over the last axis without its lowest and highest quarter.

    Args:
        x: Numbers, shape [..., seeds]; a number that is not finite counts as minus infinity.

    Returns: the means, shape [...].

    >>> float(interquartile_mean(np.array([1.0, 2.0, 3.0, 4.0, 1000.0])))
    3.0
    """
    x = np.sort(np.where(np.isfinite(x), x, -np.inf), axis=-1)
    seeds = x.shape[-1]
    cut = seeds // 4
    return np.asarray(x[..., cut : seeds - cut].mean(axis=-1))


def interval(
    x: Float[np.ndarray, "*batch seeds"], *, resamples: int = RESAMPLES, confidence: float = 0.95, seed: int = 0
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """Percentile bootstrap interval of the interquartile mean over the last axis.

    Args:
        x: Numbers, shape [..., seeds].
        resamples: The number of bootstrap samples.
        confidence: The probability that the interval covers.
        seed: The seed of the random numbers.

    Returns: the lower and the upper ends, shape [...] each; NaN for one seed.
    """
    batch, seeds = x.shape[:-1], x.shape[-1]
    if seeds < 2:
        return np.full(batch, np.nan), np.full(batch, np.nan)
    resampled = np.random.default_rng(seed).integers(seeds, size=(resamples, seeds))
    tail = (1 - confidence) / 2
    low, high = np.empty(batch), np.empty(batch)
    for i in np.ndindex(*batch):  # one after another: [batch, resamples, seeds] at once would fill the memory
        means = interquartile_mean(x[i][resampled])
        # No interpolation: between two infinities it gives NaN.
        low[i] = np.quantile(means, tail, method="lower")
        high[i] = np.quantile(means, 1 - tail, method="higher")
    return low, high


def estimate(x: Float[np.ndarray, " seeds"]) -> Estimate:
    """Interquartile mean with its interval.

    Args:
        x: Numbers of the seeds, shape [seeds].

    Returns: the mean and its 95% interval.
    """
    low, high = interval(x)
    return Estimate(float(interquartile_mean(x)), float(low), float(high))
