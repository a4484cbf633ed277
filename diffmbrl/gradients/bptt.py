"""Backpropagation through time: the exact gradient of the sampled rollouts."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Stateful, Task, reweighted
from diffmbrl.info import EvaluationCounts, count_evaluations
from diffmbrl.rollout import AdjointRule, episode_return, episode_returns, split_keys, weights_axis


class BPTT(eqx.Module):
    r"""Reverse-mode differentiation of the rollout: $\nabla_\theta J = \sum_t G_t^\top \frac{dJ}{da_t}$.

    It is unbiased for smooth dynamics; with noise it is the pathwise (reparameterised) gradient for the keys drawn. Its size
    is governed by products of the closed-loop Jacobians, and explodes or vanishes with the horizon as they do.

    Args:
        adjoint: Rule `(t, dJ/ds_t) -> dJ/ds_t` that the reverse pass applies at every step: `Truncated`, `Clipped` or
            `Decayed` backpropagation. J stays the same; the gradient is then biased, with less variance and a bounded size.
            None for the exact gradient.
        remat: As in `rollout`.

    Cost: a forward pass, its recomputation, and a reverse pass: at most five rollouts in all (benchmarks/primitives.py).
    Reference: Werbos 1990, Backpropagation through time.

    >>> import jax
    >>> from diffmbrl import Neural, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> policy = Neural.init(task, key=jax.random.key(0))
    >>> J, gradient = BPTT()(policy, task, task.starts(jax.random.key(1), 4), None)
    >>> J.shape
    ()
    """

    adjoint: AdjointRule | None = None
    remat: int | None = eqx.field(static=True, default=1, kw_only=True)

    def __call__(
        self, policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], PyTree]:
        def total(pi):
            J = episode_returns(pi, task, s0, key, remat=self.remat, adjoint=self.adjoint)
            return jnp.sum(J), J.shape[0]

        # The gradient of the sum, divided by B: a rule must see each start's own adjoint, not a B-th of it.
        (J, batch), gradient = jax.value_and_grad(total, has_aux=True)(policy)
        return J / batch, jax.tree.map(lambda x: x / batch, gradient)

    def samples(
        self, policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree]:
        """Return and gradient of each start, whose means a call returns. Memory: B gradients."""

        def one(s, k, w):
            return jax.value_and_grad(episode_return)(
                policy, reweighted(task, w), s, k, remat=self.remat, adjoint=self.adjoint
            )

        return jax.vmap(one, in_axes=(0, 0, weights_axis(task, s0)))(s0, split_keys(key, s0), task.weights)

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """Dynamics evaluations of one call, recomputed steps included."""
        passes = 1 if self.remat is None else 2 if self.remat == 1 else 3
        steps = task.horizon * batch
        return count_evaluations(forward=passes * steps, vjp=steps, sequential=passes + 1)
