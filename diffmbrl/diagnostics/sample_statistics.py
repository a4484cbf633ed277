r"""Statistics of per-sample gradients: the noise of the mean over a batch of rollouts.

With samples $g_i$ of a gradient (one rollout each), mean $\bar g$ and covariance trace $\mathrm{tr}\,S$,

$$\mathrm{SNR} = \frac{|E g|^2}{\mathrm{tr}\,\mathrm{Cov}(g)},\qquad |E g|^2 \approx |\bar g|^2 - \mathrm{tr}\,S / N .$$

1 / SNR is the batch size at which noise and gradient have the same size (the simple noise scale). The subtraction makes the
estimate unbiased: N samples of pure noise have $|\bar g|^2 \approx \mathrm{tr}\,S / N$, not 0. An SNR far below 1 / N cannot be
detected.

Reference: McCandlish et al. 2018, An empirical model of large-batch training, section 2.2; Suh et al. 2022 (empirical
variance).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.core import GradientEstimator, Policy, State, Stateful, Task

CHUNK = 64  # samples differentiated at a time: their gradients stay in the caches
TOP = 100  # the tail is the share of the variance in one of 100 samples


class SampleStatistics(NamedTuple):
    """Statistics of the finite samples; NaN where fewer than two are finite.

    Args:
        norm: Norm of the mean.
        variance: Trace of the covariance of one sample.
        snr: Signal-to-noise ratio of one sample; 0 if noise explains the mean, infinite without noise, NaN if all are 0.
        tail: Share of the variance in the top 1% of samples (at least one sample).
        nonfinite: Number of samples with a value that is not finite.
    """

    norm: Float[Array, "*batch"]
    variance: Float[Array, "*batch"]
    snr: Float[Array, "*batch"]
    tail: Float[Array, "*batch"]
    nonfinite: Int[Array, "*batch"]


def sample_statistics(samples: Float[Array, "N P"]) -> SampleStatistics:
    """Norm, variance, signal-to-noise ratio and tail of N per-sample gradients.

    No intermediate result overflows unless a sample does.

    Args:
        samples: The gradients, shape [N, P]; those that are not finite are counted and left out.

    Returns:
        The statistics, all scalars.

    >>> found = sample_statistics(jnp.array([[1.0, 0.0], [3.0, 0.0], [2.0, 1.0], [2.0, -1.0]]))
    >>> round(float(found.norm), 3), round(float(found.variance), 3), round(float(found.snr), 3)
    (2.0, 1.333, 2.75)
    """
    fine = jnp.all(jnp.isfinite(samples), axis=1)
    mask = fine.astype(samples.dtype)
    count = jnp.sum(mask)
    kept = jnp.where(fine[:, None], samples, 0.0)
    # The square of a large number may overflow, so everything is in units of the largest until the end.
    unit = jnp.max(jnp.abs(kept))
    safe = jnp.where(unit > 0, unit, 1.0)
    kept = kept / safe
    mean = jnp.sum(kept, axis=0) / count
    squares = jnp.sum((kept - mean) ** 2, axis=1) * mask
    enough = count > 1
    total = jnp.sum(squares)
    variance = jnp.where(enough, total / (count - 1), jnp.nan)
    size = jnp.sum(mean**2)
    # Equal samples have a variance of rounding alone.
    noise = jnp.where(variance > (jnp.finfo(samples.dtype).eps ** 2) * size, variance, 0.0 * variance)
    snr = jnp.maximum(size - noise / count, 0.0) / noise
    top = jax.lax.top_k(squares, -(-samples.shape[0] // TOP))[0]
    tail = jnp.where(total > 0, jnp.sum(top) / total, jnp.nan)
    nonfinite = jnp.sum(~fine, dtype=jnp.int32)
    return SampleStatistics(jnp.sqrt(size) * safe, variance * safe**2, snr, tail, nonfinite)


def gradient_samples(
    estimator: GradientEstimator,
    policy: Policy | Stateful,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None,
    *,
    size: int = CHUNK,
) -> tuple[Float[Array, " N"], Float[Array, "N P"]]:
    """Per-sample gradients of an estimator as flat vectors, computed a chunk of starts at a time.

    Args:
        estimator: The estimator, whose `samples` are computed.
        policy: The policy.
        task: The task.
        s0: Start states, shape [N, ...].
        key: Key of the noise; chunk i uses `fold_in(key, i)`. None for no noise.
        size: Number of starts in a chunk. If they do not fill the last chunk, it is filled with the first starts, whose samples
            are dropped.

    Returns:
        The returns [N] and the gradients [N, P], in the order of `ravel_pytree(policy)`.
    """
    count = jax.tree.leaves(s0)[0].shape[0]
    size = min(size, count)
    chunks = -(-count // size)
    index = (jnp.arange(chunks * size) % count).reshape(chunks, size)

    def one(x):
        i, rows = x
        some = jax.tree.map(lambda leaf: leaf[rows], s0)
        J, gradient = estimator.samples(policy, task, some, None if key is None else jax.random.fold_in(key, i))
        return J, jax.vmap(lambda g: ravel_pytree(g)[0])(gradient)

    J, gradients = jax.lax.map(one, (jnp.arange(chunks), index))
    return J.reshape(-1)[:count], gradients.reshape(chunks * size, -1)[:count]
