r"""Whether two estimators of one gradient have the same mean.

For the same starts and noise, $d_i = g_i^{\text{pathwise}} - g_i^{\text{score}}$ has mean 0 if both are unbiased, and does not
where the pathwise one differentiates past a jump. In P dimensions the question is along which direction to look: half of the
samples say, $u = \bar d_A / |\bar d_A|$, the other half answer,

$$z = \frac{\mathrm{mean}_B(u^\top d)}{\mathrm{std}_B(u^\top d) / \sqrt{N_B}},$$

which is standard normal if there is no bias, whatever P and the covariance, and large if there is: a one-sided test, of which
no
multiple comparisons have to be corrected for.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Bias(NamedTuple):
    """A difference of means, and how sure it is."""

    z: Float[Array, "*batch"]  # standard errors above 0; infinite if the difference has no noise, NaN if there is none
    size: Float[Array, "*batch"]  # the difference along u, in multiples of the gradient's norm
    error: Float[Array, "*batch"]  # its standard error, in the same unit: a bias below a few of these cannot be seen


def bias_test(pathwise: Float[Array, "N P"], score: Float[Array, "N P"]) -> Bias:
    """The test on paired samples, in units of the pathwise mean's norm, or of the score function's less its noise, if larger.

    Samples where either is not finite are left out.

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
    return Bias(mean / error, mean / unit, error / unit)


def _mean(x: Float[Array, "N k"], mask: Array) -> Float[Array, " k"]:
    weight = mask.astype(x.dtype)
    return jnp.sum(x * weight[:, None], axis=0) / jnp.sum(weight)


def _positive(x: Array) -> Array:
    return jnp.where(x > 0, x, 1.0)
