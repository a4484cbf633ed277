r"""Test of whether two estimators of one gradient have the same mean.

For the same starts and noise, $d_i = g_i^{\text{pathwise}} - g_i^{\text{score}}$ has mean 0 if both are unbiased, and does not
if the pathwise one differentiates past a jump. In P dimensions a direction must be chosen: half A of the samples chooses it,
$u = \bar d_A / |\bar d_A|$, and the other half B tests along it,

$$z = \frac{\mathrm{mean}_B(u^\top d)}{\mathrm{std}_B(u^\top d) / \sqrt{N_B}},$$

which is standard normal if there is no bias, whatever P and the covariance, and large if there is. The test is one-sided, and
needs no correction for multiple comparisons.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class BiasTest(NamedTuple):
    """A difference of means and its standard error.

    Args:
        z: The difference along u in standard errors; infinite if the difference has no noise, NaN if there is no difference.
        size: The difference along u, in multiples of the gradient's norm.
        error: Standard error of `size`; a bias below a few of these cannot be detected.
    """

    z: Float[Array, "*batch"]
    size: Float[Array, "*batch"]
    error: Float[Array, "*batch"]


def bias_test(pathwise: Float[Array, "N P"], score: Float[Array, "N P"]) -> BiasTest:
    """Test whether the pathwise and the score-function gradient have the same mean, on paired samples.

    The gradient's norm, the unit of `size`, is that of the pathwise mean or of the score function's mean less its noise,
    whichever is larger.

    Args:
        pathwise: Samples of the pathwise gradient, shape [N, P].
        score: Samples of the score-function gradient for the same starts and noise, shape [N, P]. Samples in which either
            estimate is not finite are left out.

    Returns:
        The test's result.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (2, 400, 3))
    >>> bool(bias_test(x[0], x[1]).z < 4), bool(bias_test(x[0] + 1, x[1]).z > 4)
    (True, True)
    """
    fine = jnp.all(jnp.isfinite(pathwise) & jnp.isfinite(score), axis=1)
    # Alternate samples, so that both halves see the same starts where starts are repeated in blocks.
    first = (jnp.arange(fine.shape[0]) % 2 == 0) & fine
    second = fine & ~first
    g, h = (jnp.where(fine[:, None], x, 0.0) for x in (pathwise, score))
    d = g - h
    u = _mean(d, first)
    along = jnp.matmul(d, u / _positive(jnp.linalg.norm(u)), precision="highest")
    count = jnp.sum(second.astype(d.dtype))
    mean = _mean(along[:, None], second)[0]
    error = jnp.sqrt(_mean(((along - mean) ** 2)[:, None], second)[0] / (count - 1))
    means = _mean(g, fine), _mean(h, fine)
    noise = jnp.sum(_mean((h - means[1]) ** 2, fine)) / jnp.sum(fine.astype(d.dtype))
    unit = jnp.sqrt(jnp.maximum(jnp.sum(means[0] ** 2), jnp.sum(means[1] ** 2) - noise))
    return BiasTest(mean / error, mean / unit, error / unit)


def _mean(x: Float[Array, "N k"], mask: Array) -> Float[Array, " k"]:
    weight = mask.astype(x.dtype)
    return jnp.sum(x * weight[:, None], axis=0) / jnp.sum(weight)


def _positive(x: Array) -> Array:
    return jnp.where(x > 0, x, 1.0)
