r"""Weights of a mixture $k x + (1 - k) y$ of two estimates, from the variances of their samples.

Of two unbiased estimates with variances $v_x, v_y$ and covariance c the mixture has the least variance at

$$k = \frac{v_y - c}{v_x + v_y - 2c},\qquad \text{and for } c = 0:\;\; k = \frac{v_y}{v_x + v_y}.$$

The variances are estimated from the samples themselves. Weights that depend on the samples they multiply bias the mean by
O(1/B). With F >= 2 folds the weights of each part of the batch come from the other parts (`exchange`), and the mean is exactly
that of the two estimates.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

# (v_x, v_y, c) -> the weight of x.
Weigh = Callable[[Array, Array, Array], Array]


def inverse_variance(v_x: Array, v_y: Array, c: Array) -> Array:
    r"""The weight of x without regard to the covariance, $v_y / (v_x + v_y)$.

    Args:
        v_x: Variance of x, any shape; the weight is 0 where it is not finite.
        v_y: Variance of y, same shape; the weight is 1/2 where neither varies.
        c: Covariance, not used.

    Returns:
        The weight, same shape.

    >>> print(inverse_variance(jnp.array(1.0), jnp.array(3.0), jnp.array(0.0)))
    0.75
    """
    return _ratio(v_y, v_x + v_y, v_x)


def minimum_variance(v_x: Array, v_y: Array, c: Array) -> Array:
    r"""The weight of x of least variance with covariance, $(v_y - c) / (v_x + v_y - 2c)$, limited to [0, 1].

    Both estimates come from one rollout and often err together. The optimum may then lie outside [0, 1], where sampling errors
    of the weight cost most.

    Args:
        v_x: Variance of x, any shape; the weight is 0 where it is not finite.
        v_y: Variance of y, same shape.
        c: Covariance, same shape.

    Returns:
        The weight, same shape; 1/2 where the difference of x and y does not vary.

    >>> print(minimum_variance(jnp.array(1.0), jnp.array(3.0), jnp.array(0.5)))
    0.8333333
    """
    return jnp.clip(_ratio(v_y - c, v_x + v_y - 2 * c, v_x), 0, 1)


def _ratio(share: Array, total: Array, v_x: Array) -> Array:
    known = total > 0
    k = jnp.where(known, share / jnp.where(known, total, 1), 0.5)
    # An overflowed x has no weight. An overflow of y is not hidden.
    return jnp.where(jnp.isfinite(v_x), k, 0).astype(total.dtype)


def fold_moments(
    x: Float[Array, "B *n"], y: Float[Array, "B *n"], folds: int
) -> tuple[Float[Array, "F *n"], Float[Array, "F *n"], Float[Array, "F *n"]]:
    """Variances and covariance of one sample of x and y in each of `folds` parts of the batch."""
    x, y = (z.reshape(folds, -1, *z.shape[1:]) for z in (x, y))
    degrees = x.shape[1] - 1
    x, y = (z - jnp.mean(z, axis=1, keepdims=True) for z in (x, y))
    v_x, v_y, c = (jnp.sum(z, axis=1) / degrees for z in (x * x, y * y, x * y))
    return v_x, v_y, c


def trace_weights(
    x: Float[Array, "B *n m"], y: Float[Array, "B *n m"], weigh: Weigh, folds: int
) -> Float[Array, "F *n"]:
    """One weight for all m components, from the traces of the covariances in each fold."""
    return weigh(*(jnp.sum(v, axis=-1) for v in fold_moments(x, y, folds)))


def exchange(k: Float[Array, "F *n"]) -> Float[Array, "F *n"]:
    """For each fold the mean of the other folds' weights; a single fold uses its own."""
    folds = k.shape[0]
    return k if folds == 1 else (jnp.sum(k, axis=0) - k) / (folds - 1)


def mix(k: Float[Array, "F *n"], x: Float[Array, "B *m"], y: Float[Array, "B *m"]) -> Float[Array, "B *m"]:
    """k x + (1 - k) y with each fold's k; an estimate without weight does not enter, even if it is not finite."""
    k = jnp.repeat(k, x.shape[0] // k.shape[0], axis=0)
    k = k.reshape(k.shape + (1,) * (x.ndim - k.ndim)).astype(x.dtype)
    return jnp.where(k > 0, k * x, 0) + jnp.where(k < 1, (1 - k) * y, 0)
