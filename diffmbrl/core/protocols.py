"""Protocols of the pieces of a problem and of what solves it: dynamics, policies, rewards, gradient estimators, solvers."""

from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

from jaxtyping import Array, PRNGKeyArray, PyTree

from diffmbrl.core.task import State, Task
from diffmbrl.info import EvaluationCounts, Info


@runtime_checkable
class Dynamics(Protocol):
    """The dynamics s' = f(s, a). Stochastic ones draw from `key`; without a key they return their mean, or fixed noise."""

    def __call__(self, s: State, a: Array, *, key: PRNGKeyArray | None = None) -> State: ...


@runtime_checkable
class Policy(Protocol):
    """A policy a = pi(s), shape [m]. A stochastic one draws from `key` by reparameterisation, or returns its mean."""

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

    is_stateful: ClassVar[bool]

    def start(self, task: Task) -> PyTree:
        """The memory before the first step of an episode of `task`."""
        ...

    def step(self, memory: PyTree, s: State, *, key: PRNGKeyArray | None = None) -> tuple[Array, PyTree]:
        """The action in state s, and the memory for the next step."""
        ...


@runtime_checkable
class Reward(Protocol):
    """The reward r(s, a), shape []."""

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

    def init(self, policy: Any, task: Task) -> Any:
        """The carry before the first update."""
        ...

    def update(
        self, policy: Any, carry: Any, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, Any, Info]:
        """The improved policy, the carry for the next update, and a report of this one."""
        ...

    def on_objective_change(self, policy: Any, carry: Any, task: Task) -> Any:
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

    def first_plan(self, task: Task) -> Any:
        """The plan to start from."""
        ...

    def shift(self, carry: Any) -> Any:
        """The carry for the next step of a receding horizon, whose plan has moved on by one step."""
        ...


def restart(solver: Solver, policy: Any, carry: Any, task: Task) -> Any:
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
    """Estimates the return J and its gradient dJ/dtheta, a pytree like the policy, from start states s0 [B, ...]."""

    @property
    def remat(self) -> int | None:
        """The `remat` of its rollouts (see `rollout`), for a line search that differentiates the same ones."""
        ...

    def __call__(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Array, Any]:
        """J and dJ/dtheta, the means over the starts."""
        ...

    def samples(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Array, Any]:
        """J and dJ/dtheta of each start, with a leading axis of B; for more samples, repeat the starts.

        Start i uses key i of `rollout.split(key, s0)`, so that estimators with the same key see the same noise.
        """
        ...

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """The evaluations that one call on `batch` starts takes."""
        ...


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
