r"""Notation and vocabulary; no algorithm.

    s, a, r    state, action, reward                      T, B      horizon, number of start states
    f, pi      dynamics s' = f(s, a), policy a = pi(s)    n, m      state and action dimension
    theta      the policy's parameters, P of them         J         return, maximised
    A_t, B_t   df/ds, df/da                               K_t, G_t  dpi/ds, dpi/dtheta
    w_t        weight of time step t in the return        phi       terminal reward

$$J(\pi) = E_{s_0}\Big[\sum_{t<T} w_t\, r(s_t, a_t) + w_T\, \phi(s_T)\Big],\quad a_t = \pi(s_t),\; s_{t+1} = f(s_t, a_t)$$

Control texts minimise a cost; here the reward is maximised, and the sign changes in one place, `linearize.py`.
Everything is a callable `equinox.Module` whose leaves are all arrays, so plain `jit`, `grad`, `vmap`, `ravel_pytree` and
optax take it as it is. Write for one stream, `vmap` for many.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from diffmbrl.info import EvaluationCounts, Info

State = PyTree
Params = PyTree


@runtime_checkable
class Dynamics(Protocol):
    """`s' = f(s, a)`; a stochastic one draws from `key`, and is at its mean (or has fixed noise) when `key` is None."""

    def __call__(self, s: State, a: Array, *, key: PRNGKeyArray | None = None) -> State: ...


@runtime_checkable
class Policy(Protocol):
    """`a = pi(s)`, of shape [m]; a stochastic one draws from `key` by reparameterisation, and is at its mean without."""

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Array: ...


@runtime_checkable
class PlanPolicy(Policy, Protocol):
    """A policy whose leaves have a leading time axis, so that step t uses slice t (`OpenLoop`, `Affine`).

    Declared by `is_plan: ClassVar[bool] = True`; a wrapper of policies forwards it. A policy that does not declare it is none.
    """

    @property
    def is_plan(self) -> bool:
        """Whether the leaves have a leading time axis."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """A policy with a memory, such as a receding-horizon controller or a recurrent network.

    Declared by `is_stateful: ClassVar[bool] = True`. The memory is a pytree of arrays whose shapes do not change. Everything
    that evaluates policies (`rollout`, `episode_return`, `mean_return` ...) accepts it.
    """

    @property
    def is_stateful(self) -> bool:
        """Whether it acts by `start` and `step`."""
        ...

    def start(self, task: Any) -> PyTree:
        """The memory before the first step of an episode of `task`."""
        ...

    def step(self, memory: PyTree, s: State, *, key: PRNGKeyArray | None = None) -> tuple[Array, PyTree]:
        """The action in state s, and the memory for the next step."""
        ...


@runtime_checkable
class Reward(Protocol):
    """`r(s, a)`, of shape []."""

    def __call__(self, s: State, a: Array) -> Array: ...


@runtime_checkable
class Solver(Protocol):
    """Improves a policy by one update at a time, as Adam on BPTT, Gauss-Newton and iLQR do.

    A policy solver takes start states with a batch axis and improves the mean return. Hyperparameters are leaves, so that a
    sweep is a `vmap` and a new value does not recompile.
    """

    @property
    def kind(self) -> str:
        """Either "policy", or "plan" for a `Planner`."""
        ...

    def init(self, policy: Any, task: Any) -> Any:
        """The carry before the first update."""
        ...

    def update(
        self, policy: Any, carry: Any, task: Any, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, Any, Info]:
        """The improved policy, the carry for the next update, and a report of this one."""
        ...

    def on_objective_change(self, policy: Any, carry: Any, task: Any) -> Any:
        """The carry with which to continue on another objective.

        Discard all that was learned of the old objective (moments, curvature); retain how far the solver has come (counts).
        A solver that retains nothing says so in one line: `on_objective_change = restart`.
        """
        ...


@runtime_checkable
class Planner(Solver, Protocol):
    """A solver of kind "plan": improves the plan of one start state, and is `vmap`ped for many."""

    @property
    def keeps_limits(self) -> bool:
        """Whether its plans keep within the task's action limits; if not, it plans on `tasks.squashed(task)`."""
        ...

    def first_plan(self, task: Any) -> Any:
        """The plan to start from."""
        ...

    def shift(self, carry: Any) -> Any:
        """The carry for the next step of a receding horizon, whose plan has moved on by one step."""
        ...


def restart(solver: Solver, policy: Any, carry: Any, task: Any) -> Any:
    """Start a solver again for another objective: the `on_objective_change` of a solver that retains nothing.

    Args:
        solver: The solver whose method this is.
        policy: The policy to continue from.
        carry: The carry under the old objective, which is discarded.
        task: The task with the new objective.

    Returns:
        The carry that `solver.init` makes.
    """
    return solver.init(policy, task)


@runtime_checkable
class GradientEstimator(Protocol):
    """An estimator of dJ/dtheta: `(policy, task, s0 [B, ...], key) -> J, dJ/dpi` (a pytree like the policy).

    `samples` gives what it is the mean of, start by start: J [B] and a gradient with a leading axis of B. Start i uses key i of
    `rollout.split(key, s0)`, so estimators that are given the same key see the same noise; for more samples, repeat the starts.
    """

    @property
    def remat(self) -> int | None:
        """How whoever differentiates the same rollouts, such as a line search, recomputes them (see `rollout`)."""
        ...

    def __call__(self, policy: Any, task: Any, s0: State, key: PRNGKeyArray | None) -> tuple[Array, Any]: ...

    def samples(self, policy: Any, task: Any, s0: State, key: PRNGKeyArray | None) -> tuple[Array, Any]: ...

    def work(self, task: Any, batch: int) -> EvaluationCounts: ...


class Trajectory(NamedTuple):
    """One rollout. After the end of an episode the state is held, rewards are 0 and `alive` is False."""

    s: State  # s_0 .. s_{T-1}, each leaf [*batch, T, ...]
    a: Float[Array, "*batch T m"]
    r: Float[Array, "*batch T"]  # not weighted
    alive: Bool[Array, "*batch T1"]  # alive[t]: the episode has not ended before or at s_t
    s_T: State


class Task(eqx.Module):
    r"""A problem: maximise $E \sum_{t<T} w_t r(s_t, a_t) + w_T \phi(s_T)$ over policies.

    Every callable is a module whose leaves are arrays, so masses are differentiable and a learned model takes the place of
    the true one by `eqx.tree_at(lambda t: t.dynamics, task, model)`. `weights` [T+1] is a leaf: a discount or a horizon mask
    changes without recompiling; as [B, T+1] it gives each start of a batch weights of its own. A terminated episode earns
    nothing more, its terminal reward included: `phi` is the value of being cut off by the clock. `features` (s -> [k]), what
    networks see, have no leaves: a policy keeps them, and all of its leaves are learned. `success` (s_T -> bool) says
    in the task's own words whether an episode ended well. `constraints` (`constraints.py`) are for planners that know them.

    Raises: `ValueError` if the horizon is below 1, dt is not positive, or the action limits are crossed or of unequal shape.

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
        constraints: Any = None,
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
        """`count` start states, with a leading batch axis."""
        if count < 1:
            raise ValueError(f"the number of starts must be at least 1, got {count}")
        return jax.vmap(self.initial)(jax.random.split(key, count))


def reweighted(task: Task, weights: Float[Array, "*batch T1"]) -> Task:
    """The task with other weights over time."""
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
    """Start states drawn evenly from a box; with `low == high`, always the same one."""

    low: Float[Array, " n"] = eqx.field(converter=lambda x: as_float(x))
    high: Float[Array, " n"] = eqx.field(converter=lambda x: as_float(x))

    def __call__(self, key: PRNGKeyArray) -> Float[Array, " n"]:
        u = jax.random.uniform(key, self.low.shape, self.low.dtype)
        return self.low + u * (self.high - self.low)


def is_plan(policy: Any) -> bool:
    """Whether a policy is a plan, which is indexed by time before it is called.

    Args:
        policy: Any policy; one that does not declare `is_plan` is none.

    Returns:
        Whether its leaves have a leading time axis.
    """
    return isinstance(policy, PlanPolicy) and policy.is_plan


def is_stateful(policy: Any) -> bool:
    """Whether a policy has a memory, and acts by `start` and `step`.

    Args:
        policy: Any policy; one that does not declare `is_stateful` has none.

    Returns:
        Whether it is a `Stateful` policy.
    """
    return isinstance(policy, Stateful) and policy.is_stateful


def is_planner(solver: Any) -> TypeGuard[Planner]:
    """Whether a solver improves the plan of one start, and not a policy for many.

    Args:
        solver: Anything; only a `Solver` can be a planner.

    Returns:
        Whether its kind is "plan".
    """
    return isinstance(solver, Solver) and solver.kind == "plan"


def is_concrete(*arrays: Any) -> bool:
    """Whether values can be looked at, as they cannot inside a transformation."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))


def where(condition: Bool[Array, "..."], x: Any, y: Any) -> Any:
    """x where the condition holds and y elsewhere, leaf by leaf; the axes of the condition are the first of x's."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b)

    return jax.tree.map(pick, x, y)


def cond_once(asked: Bool[Array, ""], turn: Callable[[Any], Any], state: Any) -> Any:
    """`turn(state)` if it is asked for, else the state: a loop of at most one turn.

    Under `vmap` a `cond` runs both branches, for all lanes; a loop runs if any lane asks.
    """
    return jax.lax.while_loop(lambda loop: loop[0], lambda loop: (jnp.array(False), turn(loop[1])), (asked, state))[1]


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers of all float leaves are finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def as_float(x: Any) -> Array:
    """A float array of the default precision; arrays that are float already keep theirs. Never weakly typed."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.convert_element_type(x, x.dtype)
    return jnp.asarray(x, dtype=float)


def parameter(default: Any) -> Any:
    """A field of a module that is a float leaf, differentiable and changed without recompiling."""
    return eqx.field(default_factory=lambda: as_float(default), converter=as_float)
