r"""MPC with a learned policy and value: the policy proposes plans, a planner improves them, the value extends their horizon."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from diffmbrl.agents.bptt_agent import PolicyAgent, PolicyCarry, short_horizon
from diffmbrl.agents.collect import RandomActions
from diffmbrl.agents.exploration import ExploredMPC
from diffmbrl.core import Planner, Policy, State, Task, as_float, is_concrete, is_planner, reweighted
from diffmbrl.info import Info, count_evaluations
from diffmbrl.models import Ensemble
from diffmbrl.models.buffer import Buffer, Transition
from diffmbrl.optimizers.short_horizon.critic import Critic, inputs
from diffmbrl.optimizers.short_horizon.solver import ShortHorizon
from diffmbrl.planners.mpc import MPC
from diffmbrl.planners.sampling import Sampling
from diffmbrl.planners.scoring import plan_returns
from diffmbrl.planners.windows import Clocked, Ending
from diffmbrl.policies import OpenLoop
from diffmbrl.rollout import rollout


class Hybrid(eqx.Module):
    r"""Plans through a model at every step, with a learned policy's proposals and a learned value at the end of the plans.

    $$a_t = \arg\max_{a_{t:t+H}} \sum_{j<H} w_{t+j}\, r(\hat s_j, a_{t+j}) + V(\hat s_H, t + H),\qquad
    \text{searched from } \hat s_{j+1} = \hat f(\hat s_j, \pi_\theta(\hat s_j)) \text{ and from the previous plan}$$

    The learner improves the policy and the critic V in the model by windows. The search of each step starts from the better of
    the previous plan and the policy's rollout (`Proposed`), so that planning corrects the policy's local mistakes. Plans see
    undiscounted rewards; V is discounted as the solver's is.

    Args:
        task: The task, on which the planner is checked.
        learner: A `PolicyAgent` whose solver is `ShortHorizon`.
        planner: A planner that keeps the task's limits and takes `OpenLoop` plans; by default `Sampling(samples=64)`.
        noise: Standard deviation of the noise of collected actions, in half widths of the limits.
        horizon: The number H of steps of a plan.
        iterations: The planner's updates at each real step.

    Raises:
        TypeError: If the learner's solver is not `ShortHorizon`, or the planner is not of kind "plan" or ignores the limits.
        ValueError: If `horizon` or `iterations` is below 1, the noise is negative, or the learner imagines less than whole
            episodes; if the planner refuses the task.

    Cost: of a real step, `iterations` of the planner's updates and of rollouts of the policy.
    Reference: Lowrey et al. 2019 (POLO); Hansen, Wang and Su 2022 (TD-MPC), whose policy proposes, too.

    >>> from diffmbrl import tasks
    >>> task = tasks.pendulum()
    >>> Hybrid(task, short_horizon(task), horizon=10).horizon
    10
    """

    learner: PolicyAgent
    planner: Any
    noise: Float[Array, ""]
    horizon: int = eqx.field(static=True)
    iterations: int = eqx.field(static=True)

    def __init__(
        self,
        task: Task,
        learner: PolicyAgent,
        planner: Any = None,
        *,
        noise: ArrayLike = 0.05,
        horizon: int = 15,
        iterations: int = 2,
    ):
        planner = Sampling(samples=64) if planner is None else planner
        if not isinstance(learner, PolicyAgent) or not isinstance(learner.solver, ShortHorizon):
            raise TypeError("learner must be a PolicyAgent with a ShortHorizon solver, which has a critic")
        if learner.horizon is not None:
            raise ValueError(
                f"the learner must imagine whole episodes, horizon=None, for its critic to know the time; got {learner.horizon}"
            )
        if not is_planner(planner) or not planner.keeps_limits:
            raise TypeError(
                f"planner must be one of kind 'plan' that keeps the limits, such as Sampling(); got {type(planner).__name__}"
            )
        for name, number in {"horizon": horizon, "iterations": iterations}.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")
        if not bool(jnp.all(jnp.asarray(noise) >= 0)):
            raise ValueError(f"noise must not be negative, got {noise}")
        if is_concrete(task):
            planner.init(OpenLoop.zeros(task), task)  # raises its errors here: a compiled run could not
        self.learner, self.planner, self.noise = learner, planner, as_float(noise)
        self.horizon, self.iterations = horizon, iterations

    @property
    def warmup(self) -> int:
        """The learner's."""
        return self.learner.warmup

    @property
    def every(self) -> int:
        """The learner's."""
        return self.learner.every

    @property
    def environments(self) -> int:
        """The learner's."""
        return self.learner.environments

    def init(self, task: Task, key: PRNGKeyArray) -> PolicyCarry:
        return self.learner.init(task, key)

    def first(self, carry: PolicyCarry, task: Task) -> RandomActions:
        return self.learner.first(carry, task)

    def policy(self, carry: PolicyCarry, task: Task) -> ExploredMPC:
        return ExploredMPC(self.best(carry, task), self.noise)

    def best(self, carry: PolicyCarry, task: Task) -> MPC:
        model = eqx.tree_at(lambda t: t.dynamics, task, Ensemble(carry.elites, self.learner.propagation))
        return MPC.init(
            Proposed(self.planner, carry.policy),
            model,
            horizon=self.horizon,
            iterations=self.iterations,
            plan=OpenLoop.zeros(Ending().task(model, self.horizon)),
            window=ToCritic(carry.solver.target),
            key=jax.random.key(0),
        )

    def model(self, carry: PolicyCarry, task: Task) -> Ensemble:
        """The ensemble that it plans on."""
        return self.learner.model(carry, task)

    def update(
        self, carry: PolicyCarry, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[PolicyCarry, dict[str, Array]]:
        return self.learner.update(carry, task, buffer, fresh, key)


def hybrid(
    task: Task, *, updates: int = 150, horizon: int = 15, iterations: int = 2, warmup: int = 200, every: int = 200
) -> Hybrid:
    """Make a `Hybrid` of CEM with the policy and critic of `short_horizon`.

    Args:
        task: The task.
        updates: Updates of the policy after each fit.
        horizon: The number of steps of a plan.
        iterations: Updates of CEM at each real step.
        warmup: Real steps before the first update.
        every: Real steps between two fits.

    Returns:
        The agent.
    """
    return Hybrid(
        task, short_horizon(task, updates=updates, warmup=warmup, every=every), horizon=horizon, iterations=iterations
    )


class Proposed(eqx.Module):
    """A planner that starts from a policy's rollout in the model if its return is higher than the given plan's.

    Args:
        planner: The planner.
        proposal: The policy.
    """

    planner: Planner
    proposal: Policy

    @property
    def kind(self) -> str:
        """It takes one start."""
        return "plan"

    @property
    def keeps_limits(self) -> bool:
        return self.planner.keeps_limits

    def first_plan(self, task: Task) -> Any:
        """The inner planner's first plan."""
        return self.planner.first_plan(task)

    def init(self, policy: OpenLoop, task: Task) -> Any:
        return self.planner.init(policy, task)

    def shift(self, carry: Any) -> Any:
        """The inner planner's carry one step on."""
        return self.planner.shift(carry)

    def on_objective_change(self, policy: OpenLoop, carry: Any, task: Task) -> Any:
        """Tell the inner planner."""
        return self.planner.on_objective_change(policy, carry, task)

    def update(
        self, policy: OpenLoop, carry: Any, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[OpenLoop, Any, Info]:
        a = jnp.clip(rollout(_OnClock(self.proposal), task, s0, key, remat=None).a, task.a_low, task.a_high)
        J, nonfinite = plan_returns(jnp.stack([policy.a, a]), task, s0, key)
        better = J[1] > J[0]
        proposal = OpenLoop(a)
        # The search around another plan starts with a new carry.
        state = jax.tree.map(
            lambda x, y: jnp.where(better, x, y).astype(y.dtype),
            (proposal, self.planner.init(proposal, task)),
            (policy, carry),
        )
        plan, carry = state
        plan, carry, info = self.planner.update(plan, carry, task, s0, key=key)
        own = count_evaluations(forward=3 * task.horizon, sequential=2)
        work = jax.tree.map(jnp.add, info.work, own)
        return plan, carry, info._replace(nonfinite=info.nonfinite + nonfinite, work=work)


class _OnClock(eqx.Module):
    """A policy on states with the number of remaining steps, which it ignores."""

    inner: Policy

    def __call__(self, s: Clocked, *, key: PRNGKeyArray | None = None) -> Array:
        return self.inner(s.s, key=key)


class ToCritic(eqx.Module):
    """The windows of `Ending`, with the critic's value at their ends before the end of the episode.

    Args:
        critic: The critic, of state and time.
    """

    critic: Critic

    def task(self, task: Task, horizon: int) -> Task:
        """Make the planning task.

        Args:
            task: The task of whole episodes.
            horizon: The number of steps of a plan.

        Returns:
            The planning task.
        """
        made = Ending().task(task, horizon)
        return eqx.tree_at(lambda t: t.terminal, made, _Ahead(task, self.critic))

    def at(self, task: Task, weights: Float[Array, " T1"], t: Int[Array, ""]) -> Task:
        """Set the planning task's weights to those of one window; the critic's value has weight 1.

        Args:
            task: The planning task.
            weights: The weights of the whole episode, shape [T+1].
            t: The time at which the window begins.

        Returns:
            The planning task.
        """
        made = Ending().at(task, weights, t)
        ahead = t + task.horizon < weights.shape[0] - 1
        return reweighted(made, made.weights.at[-1].set(jnp.where(ahead, 1, made.weights[-1])))

    def state(self, s: State, t: Int[Array, ""], T: int) -> Clocked:
        """The state in which a window begins.

        Args:
            s: The state.
            t: Its time.
            T: The horizon of whole episodes.

        Returns:
            The state with the number of remaining steps.
        """
        return Ending().state(s, t, T)


class _Ahead(eqx.Module):
    """The task's terminal reward at the end of the episode, the critic's value before it."""

    task: Task
    critic: Critic

    def __call__(self, state: Clocked) -> Float[Array, ""]:
        t = self.task.horizon - jnp.round(state.left).astype(jnp.int32)
        ahead = self.critic(inputs(self.task, state.s, t))
        return jnp.where(state.left > 0, ahead, self.task.terminal(state.s))
