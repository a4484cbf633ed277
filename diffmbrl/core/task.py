"""A problem, one rollout of it, and the simplest features, terminal reward and start states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from diffmbrl.core.trees import as_float, is_concrete

State = PyTree


class Trajectory(NamedTuple):
    """One rollout, or a batch of them. After the end of an episode the state is held and rewards are 0.

    Args:
        s: States s_0 ... s_{T-1}, each leaf [*batch, T, ...].
        a: Actions, shape [*batch, T, m].
        r: Rewards without weights, shape [*batch, T].
        alive: Whether the episode has not ended before or at s_t, shape [*batch, T+1].
        s_T: The last state, each leaf [*batch, ...].
    """

    s: State
    a: Float[Array, "*batch T m"]
    r: Float[Array, "*batch T"]
    alive: Bool[Array, "*batch T1"]
    s_T: State


class Task(eqx.Module):
    r"""A problem: maximise $E \sum_{t<T} w_t r(s_t, a_t) + w_T \phi(s_T)$ over policies.

    Every callable is a module whose leaves are arrays, so masses are differentiable and a learned model replaces the true one
    by `eqx.tree_at(lambda t: t.dynamics, task, model)`. The weights w, shape [T+1] or one row for each start of a batch
    [B, T+1], are ones at first and a leaf: `reweighted` sets a discount or a horizon mask without recompiling.

    Args:
        name: Its name in reports and messages.
        dynamics: The next state s' = f(s, a).
        reward: The reward r(s, a), shape [].
        initial: The distribution of start states: key -> s_0.
        a_low: The lower action limits, shape [m]; -inf where there is none.
        a_high: The upper action limits, shape [m].
        horizon: The number of steps T of an episode.
        dt: The duration of a step in seconds.
        terminal: The reward phi(s_T) of an episode that reaches the horizon, 0 by default; a terminated one earns nothing more.
        features: The input of networks, s -> [k], without leaves; the state itself by default.
        done: Whether an episode terminates in a state, s -> bool; None if it never does.
        success: Whether an episode that ends in s_T has reached the task's goal, s_T -> bool.
        constraints: `Constraints` for planners that enforce them.

    Raises:
        ValueError: If the horizon is below 1, dt is not positive, or the action limits are crossed or of unequal shape.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.cartpole_balance(horizon=50)
    >>> task.starts(jax.random.key(0), 32).shape
    (32, 4)
    """

    dynamics: Callable
    reward: Callable
    terminal: Callable
    initial: Callable
    features: Callable
    done: Callable | None
    success: Callable | None
    constraints: Any
    a_low: Float[Array, " m"]
    a_high: Float[Array, " m"]
    weights: Float[Array, "*batch T1"]
    horizon: int = eqx.field(static=True)
    dt: float = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __init__(
        self,
        *,
        name: str,
        dynamics: Callable,
        reward: Callable,
        initial: Callable,
        a_low: Any,
        a_high: Any,
        horizon: int,
        dt: float,
        terminal: Callable | None = None,
        features: Callable | None = None,
        done: Callable | None = None,
        success: Callable | None = None,
        constraints: Any = None,  # `Constraints`, whose module imports this one
    ):
        if not isinstance(horizon, int) or horizon < 1:
            raise ValueError(f"horizon must be a whole number of at least 1, got {horizon!r}")
        if not dt > 0:
            raise ValueError(f"dt must be a positive number of seconds, got {dt!r}")
        self.name, self.horizon, self.dt = name, horizon, float(dt)
        self.dynamics, self.reward, self.initial = dynamics, reward, initial
        self.terminal = terminal if terminal is not None else NoTerminal()
        self.features = features if features is not None else Identity()
        self.done, self.success, self.constraints = done, success, constraints
        self.a_low, self.a_high = as_float(a_low), as_float(a_high)
        if self.a_low.ndim != 1 or self.a_low.shape != self.a_high.shape:
            raise ValueError(
                f"a_low and a_high must both have shape [m], got {list(self.a_low.shape)} and {list(self.a_high.shape)}"
            )
        if is_concrete(self.a_low, self.a_high) and not bool(jnp.all(self.a_low < self.a_high)):
            raise ValueError(f"a_low must lie below a_high, got {self.a_low} and {self.a_high}")
        self.weights = jnp.ones(horizon + 1, self.a_low.dtype)

    @property
    def m(self) -> int:
        """Action dimension."""
        return self.a_low.shape[0]

    @property
    def n(self) -> int:
        """State dimension: the number of scalars in one state."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state_shape))

    @property
    def state_shape(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one state, without drawing it."""
        return jax.eval_shape(self.initial, jax.random.key(0))

    def starts(self, key: PRNGKeyArray, count: int) -> State:
        """Draw start states.

        Args:
            key: The random key.
            count: Their number B.

        Returns:
            States with a leading axis of B.

        Raises:
            ValueError: If `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"the number of starts must be at least 1, got {count}")
        return jax.vmap(self.initial)(jax.random.split(key, count))


def reweighted(task: Task, weights: Float[Array, "*batch T1"]) -> Task:
    """Replace the weights of a task over time.

    Args:
        task: The task.
        weights: The new weights, shape [T+1] or [B, T+1].

    Returns:
        The task with them.
    """
    return eqx.tree_at(lambda t: t.weights, task, weights)


class Identity(eqx.Module):
    """Features of a flat state: the state itself."""

    def __call__(self, s: Float[Array, " n"]) -> Float[Array, " n"]:
        return s


class NoTerminal(eqx.Module):
    """phi(s) = 0."""

    def __call__(self, s: State) -> Float[Array, ""]:
        return jnp.zeros((), jax.tree.leaves(s)[0].dtype)


class Box(eqx.Module):
    """Start states drawn uniformly from a box.

    Args:
        low: The lower corner, shape [n].
        high: The upper corner, shape [n]; with `low == high` there is one start state only.
    """

    low: Float[Array, " n"] = eqx.field(converter=lambda x: as_float(x))
    high: Float[Array, " n"] = eqx.field(converter=lambda x: as_float(x))

    def __call__(self, key: PRNGKeyArray) -> Float[Array, " n"]:
        u = jax.random.uniform(key, self.low.shape, self.low.dtype)
        return self.low + u * (self.high - self.low)
