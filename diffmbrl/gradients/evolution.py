"""Evolution strategies: differences of returns between antithetic pairs of perturbed policies."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.batching import map_chunks
from diffmbrl.core import State, Task, as_float, is_concrete, reweighted
from diffmbrl.gradients.smoothed import require_key
from diffmbrl.info import EvaluationCounts, count_evaluations
from diffmbrl.rollout import episode_return, split_keys, weights_axis

DIRECTION = 2**31 - 1  # folded into a start's key: beyond the numbers of the time steps


class Returns(eqx.Module):
    """The returns themselves: unbiased for F."""

    def __call__(self, J: Float[Array, "2 B"]) -> Float[Array, "2 B"]:
        return J


class CentredRanks(eqx.Module):
    """The rank of each return among all 2B, from -1/2 (worst) to 1/2 (best); equal returns share theirs, NaN is the worst.

    The gradient is then not dF/dtheta: it keeps no scale and no unit, an outlier counts as any other best or worst, and it is
    the same for any increasing function of the return.

    Reference: Wierstra et al. 2014, Natural evolution strategies, section 3.1 (fitness shaping); Salimans et al. 2017.
    """

    def __call__(self, J: Float[Array, "2 B"]) -> Float[Array, "2 B"]:
        flat = jnp.where(jnp.isnan(J), -jnp.inf, J).ravel()
        below, up_to = (jnp.searchsorted(jnp.sort(flat), flat, side=side) for side in ("left", "right"))
        return (((below + up_to - 1) / 2).astype(J.dtype) / (flat.size - 1) - 0.5).reshape(J.shape)


class Evolution(eqx.Module):
    r"""Antithetic pairs: $\frac{1}{B} \sum_i \frac{c_i^+ - c_i^-}{2\sigma} \epsilon_i$ with $\epsilon_i \sim N(0, I)$.

    $c_i^\pm$ is the shaped return $J_i(\theta \pm \sigma\epsilon_i)$; every start has a direction of its own, and both of its
    rollouts the same noise. With `Returns` this is the gradient of $F(\theta) = E[J(\theta + \sigma\epsilon)]$, unbiased for
    any dynamics, reward and policy, with a memory or without. Its variance grows with the number of parameters rather than
    with the horizon. The J returned is the mean of the pairs: it estimates F, not J at theta.

    Shapes: `s0` [B, ...]; `std` ($\sigma$) in the units of the parameters. Cost: two rollouts a start and no reverse pass; in
    memory, 2B policies.
    Raises: `ValueError` without a key, or if `std` is not positive.
    Reference: Salimans et al. 2017, Evolution strategies as a scalable alternative to reinforcement learning; for the
    antithetic difference, Nesterov and Spokoiny 2017.

    >>> import jax
    >>> from diffmbrl import Neural, tasks
    >>> task = tasks.pendulum(horizon=10)
    >>> key = jax.random.key(0)
    >>> J, gradient = Evolution(std=0.05)(Neural.init(task, key=key), task, task.starts(key, 8), key)
    >>> J.shape
    ()
    """

    std: Float[Array, ""]
    shaping: Any
    remat: int | None = eqx.field(static=True)  # for whoever differentiates the same rollouts; this does not

    def __init__(self, *, std: float | Float[Array, ""], shaping: Any = None, remat: int | None = 1):
        if is_concrete(std) and not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        self.std, self.remat = as_float(std), remat
        self.shaping = Returns() if shaping is None else shaping

    def __call__(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Float[Array, ""], Any]:
        J, directions, slopes = self._pairs(policy, task, s0, key)
        g = jnp.tensordot(slopes.astype(directions.dtype), directions, axes=1, precision="highest") / slopes.shape[0]
        return jnp.mean(J), ravel_pytree(policy)[1](g)

    def samples(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Float[Array, " B"], Any]:
        """Mean return and gradient of each pair."""
        J, directions, slopes = self._pairs(policy, task, s0, key)
        return jnp.mean(J, axis=0), jax.vmap(ravel_pytree(policy)[1])(
            slopes.astype(directions.dtype)[:, None] * directions
        )

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """Two rollouts a start, side by side."""
        return count_evaluations(forward=2 * task.horizon * batch, sequential=1)

    def _pairs(self, policy, task, s0, key) -> tuple[Float[Array, "2 B"], Float[Array, "B P"], Float[Array, " B"]]:
        """Returns of each pair, its direction epsilon, and the shaped difference over 2 sigma."""
        theta, unravel = ravel_pytree(policy)
        keys = split_keys(require_key(key), s0)

        def draw(k):
            return jax.random.normal(jax.random.fold_in(k, DIRECTION), theta.shape, theta.dtype)

        def one(s, k, w, epsilon):
            epsilon = unravel(epsilon)

            def perturbed(sign):
                pi = jax.tree.map(lambda x, e: x + (sign * self.std).astype(x.dtype) * e, policy, epsilon)
                return episode_return(pi, reweighted(task, w), s, k, remat=None)

            return jax.vmap(perturbed)(jnp.array([1, -1], self.std.dtype))

        # In a loop, whose result is stored: XLA would compute the normals again at each of their uses.
        directions = map_chunks(draw, keys, theta.size)
        axes = (0, 0, weights_axis(task, s0), 0)
        J = jax.vmap(one, in_axes=axes, out_axes=1)(s0, keys, task.weights, directions)
        shaped = self.shaping(J)
        return J, directions, (shaped[0] - shaped[1]) / (2 * self.std.astype(J.dtype))
