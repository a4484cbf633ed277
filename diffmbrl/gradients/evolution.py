"""Evolution strategies: differences of returns between antithetic pairs of perturbed policies."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.batching import map_chunks
from diffmbrl.core import Policy, State, Stateful, Task, as_float, is_concrete, reweighted
from diffmbrl.gradients.smoothed import require_key
from diffmbrl.info import EvaluationCounts, count_evaluations
from diffmbrl.rollout import episode_return, split_keys, weights_axis

# Folded into a start's key to draw its direction; larger than any time step's number.
DIRECTION = 2**31 - 1
# Returns [2, B] of both signs -> the numbers whose differences weigh the directions.
Shaping = Callable[[Float[Array, "2 B"]], Float[Array, "2 B"]]


class Returns(eqx.Module):
    """Shaping that leaves the returns unchanged: unbiased for F."""

    def __call__(self, J: Float[Array, "2 B"]) -> Float[Array, "2 B"]:
        return J


class CentredRanks(eqx.Module):
    """Shaping by the rank of each return among all 2B, from -1/2 (worst) to 1/2 (best).

    Equal returns share a rank, and NaN is the worst. The gradient is then not dF/dtheta: it has no scale and no unit, outliers
    have no extra weight, and it is the same for any increasing function of the return.

    Reference: Wierstra et al. 2014, Natural evolution strategies, section 3.1 (fitness shaping); Salimans et al. 2017.
    """

    def __call__(self, J: Float[Array, "2 B"]) -> Float[Array, "2 B"]:
        flat = jnp.where(jnp.isnan(J), -jnp.inf, J).ravel()
        below, up_to = (jnp.searchsorted(jnp.sort(flat), flat, side=side) for side in ("left", "right"))
        return (((below + up_to - 1) / 2).astype(J.dtype) / (flat.size - 1) - 0.5).reshape(J.shape)


class Evolution(eqx.Module):
    r"""Evolution strategies: differences of returns between antithetic pairs of perturbed policies.

    $$g = \frac{1}{B} \sum_i \frac{c_i^+ - c_i^-}{2\sigma} \epsilon_i,\qquad \epsilon_i \sim N(0, I)$$

    $c_i^\pm$ is the shaped return $J_i(\theta \pm \sigma\epsilon_i)$; every start has its own direction, and both of its
    rollouts the same noise. With `Returns` the gradient of $F(\theta) = E[J(\theta + \sigma\epsilon)]$ is unbiased for any
    dynamics, reward and policy; its variance grows with the number of parameters rather than with the horizon. The J returned
    is the mean of the pairs and estimates F.

    Args:
        std: Standard deviation sigma of the perturbation, in the units of the parameters.
        shaping: Shaping of the returns: `Returns()` (the default) or `CentredRanks()`.
        remat: As in `rollout`. Not used here; for solvers that differentiate the same rollouts.

    Raises:
        ValueError: Without a key, or if `std` is not positive.

    Cost: two rollouts for each start and no reverse pass. Memory: 2 B policies.
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
    shaping: Shaping
    remat: int | None = eqx.field(static=True)

    def __init__(self, *, std: float | Float[Array, ""], shaping: Shaping | None = None, remat: int | None = 1):
        if is_concrete(std) and not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        self.std, self.remat = as_float(std), remat
        self.shaping = Returns() if shaping is None else shaping

    def __call__(
        self, policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], PyTree]:
        J, directions, slopes = self._pairs(policy, task, s0, key)
        g = jnp.tensordot(slopes.astype(directions.dtype), directions, axes=1, precision="highest") / slopes.shape[0]
        return jnp.mean(J), ravel_pytree(policy)[1](g)

    def samples(
        self, policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree]:
        """Mean return and gradient of each pair."""
        J, directions, slopes = self._pairs(policy, task, s0, key)
        return jnp.mean(J, axis=0), jax.vmap(ravel_pytree(policy)[1])(
            slopes.astype(directions.dtype)[:, None] * directions
        )

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """Two rollouts for each start, at the same time."""
        return count_evaluations(forward=2 * task.horizon * batch, sequential=1)

    def _pairs(
        self, policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "2 B"], Float[Array, "B P"], Float[Array, " B"]]:
        """Returns of each pair, its direction epsilon, and the shaped difference divided by 2 sigma."""
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

        # The loop stores its result; otherwise XLA would compute the normals again at each use.
        directions = map_chunks(draw, keys, theta.size)
        axes = (0, 0, weights_axis(task, s0), 0)
        J = jax.vmap(one, in_axes=axes, out_axes=1)(s0, keys, task.weights, directions)
        shaped = self.shaping(J)
        return J, directions, (shaped[0] - shaped[1]) / (2 * self.std.astype(J.dtype))
