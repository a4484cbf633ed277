"""Decoupled backpropagation: the states of the true dynamics, the Jacobians of another model."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.core import Dynamics, GradientEstimator, Policy, State, Stateful, Task
from diffmbrl.gradients.bptt import BPTT
from diffmbrl.info import EvaluationCounts
from diffmbrl.rollout import describe


class TrueForward(eqx.Module):
    r"""Dynamics with the values $f(s, a)$ of one function and the derivatives $\partial\hat f / \partial(s, a)$ of another.

    This holds in forward and reverse mode; both functions get the same key. Derivatives with respect to parameters are the
    model's as well.

    Args:
        truth: The dynamics f that are evaluated.
        model: The dynamics that are differentiated, at the same (s, a).
    """

    truth: Dynamics
    model: Dynamics

    def __call__(self, s: State, a: Array, *, key: PRNGKeyArray | None = None) -> State:
        return _follow(self.truth, self.model, s, a, key)


@jax.custom_jvp
def _follow(truth: Any, model: Any, s: State, a: Array, key: PRNGKeyArray | None) -> State:
    return truth(s, a, key=key)


@_follow.defjvp
def _(primals, tangents):
    truth, model, s, a, key = primals
    _, *inwards, _ = tangents
    _, tangent = jax.jvp(lambda model, s, a: model(s, a, key=key), (model, s, a), tuple(inwards))
    return truth(s, a, key=key), tangent


class Decoupled(eqx.Module):
    r"""Any estimator on rollouts of the task's own dynamics, differentiated through the Jacobians of `model`.

    $$\lambda_t = w_t \nabla_s r_t + (\hat A_t + \hat B_t K_t)^\top \lambda_{t+1} + K_t^\top w_t \nabla_a r_t,\quad
    s_{t+1} = f(s_t, a_t)$$

    The model's errors do not accumulate along the rollout, and f needs no (useful) derivatives: it may be a simulator with
    contacts, and the model smooth. The bias is that of the Jacobians alone; a model equal to f has none.

    Args:
        model: Dynamics whose Jacobians are used.
        inner: The estimator; `BPTT()` by default.

    Raises:
        ValueError: If the model's next state is not like the state.

    Cost: the inner estimator's, and one evaluation of the model for each reverse step.
    Reference: Amigo et al. 2025, First order model-based RL through decoupled backpropagation.

    >>> import jax
    >>> from diffmbrl import Neural, tasks
    >>> task, heavier = tasks.pendulum(horizon=10), tasks.pendulum(m=1.2)
    >>> key = jax.random.key(0)
    >>> J, gradient = Decoupled(heavier.dynamics)(Neural.init(task, key=key), task, task.starts(key, 8), None)
    >>> J.shape
    ()
    """

    model: Dynamics
    inner: GradientEstimator

    def __init__(self, model: Dynamics, inner: GradientEstimator | None = None):
        self.model = model
        self.inner = BPTT() if inner is None else inner

    @property
    def remat(self) -> int | None:
        """The inner estimator's."""
        return self.inner.remat

    def __call__(
        self, policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], PyTree]:
        return self.inner(policy, self.on(task), s0, key)

    def samples(
        self, policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree]:
        """The inner estimator's, on the decoupled task."""
        return self.inner.samples(policy, self.on(task), s0, key)

    def on(self, task: Task) -> Task:
        """The task with decoupled dynamics, for other functions that differentiate it, such as diagnostics and Gauss-Newton."""
        s, a = task.state_shape, jax.ShapeDtypeStruct(task.a_low.shape, task.a_low.dtype)
        made = jax.eval_shape(lambda s, a: self.model(s, a), s, a)
        if describe(made) != describe(s):
            raise ValueError(
                f"the model maps a state of task '{task.name}', {describe(s)}, to {describe(made)}; expected the same"
            )
        return eqx.tree_at(lambda t: t.dynamics, task, TrueForward(task.dynamics, self.model))

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """The inner estimator's counts: steps of f in the forward pass, of the model in the reverse pass."""
        return self.inner.work(task, batch)
