r"""Planning and a policy together: the policy proposes, a planner improves, a learned value says what comes after the plan."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

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
    r"""MPC through the model with a learned policy as its proposal and a learned value as the end of its plans.

    $$a_t = \arg\max_{a_{t:t+H}} \sum_{j<H} w_{t+j}\, r(\hat s_j, a_{t+j}) + V(\hat s_H, t + H),\qquad
    \text{searched from } \hat s_{j+1} = \hat f(\hat s_j, \pi_\theta(\hat s_j)) \text{ and from the plan of before}$$

    `learner` is a `PolicyAgent` whose solver is `ShortHorizon`: policy and critic V are learned in the model by its windows. To
    act, `planner` makes `iterations` updates at each real step on H = `horizon` steps of the ensemble, each beginning from the
    better of the plan of before and what the policy would do (`Proposed`). So what the policy has learned of the whole task is
    where the search begins, and what it has got wrong nearby is put right by planning. Planning sees rewards undiscounted; V is
    the solver's, discounted as that is.

    The planner must keep the task's limits and take `OpenLoop` plans, as `Sampling` (CEM, MPPI) does.

    Cost of a real step: `iterations` of the planner's updates and of rollouts of the policy.
    Raises: `TypeError` if the learner's solver is not `ShortHorizon`, or the planner is not of kind "plan" or does not keep the
    limits; `ValueError` for a horizon or iterations below 1, negative noise, or a learner that imagines less than the task;
    what the planner raises for the actions of `task`.
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
        noise: Any = 0.05,
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
            planner.init(OpenLoop.zeros(task), task)  # which says what is wrong, as it could not in a compiled run
        self.learner, self.planner, self.noise = learner, planner, as_float(noise)
        self.horizon, self.iterations = horizon, iterations

    @property
    def warmup(self) -> int:
        return self.learner.warmup

    @property
    def every(self) -> int:
        return self.learner.every

    @property
    def environments(self) -> int:
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
        """What it plans on."""
        return self.learner.model(carry, task)

    def update(
        self, carry: PolicyCarry, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[PolicyCarry, dict[str, Array]]:
        return self.learner.update(carry, task, buffer, fresh, key)


def hybrid(
    task: Task, *, updates: int = 150, horizon: int = 15, iterations: int = 2, warmup: int = 200, every: int = 200
) -> Hybrid:
    """`short_horizon`'s policy and critic, with CEM in front of them."""
    return Hybrid(
        task, short_horizon(task, updates=updates, warmup=warmup, every=every), horizon=horizon, iterations=iterations
    )


class Proposed(eqx.Module):
    """A planner that begins from what a policy would do in the model, wherever that is better than the plan it is given."""

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
        # A search around another place begins anew.
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
    """A policy on states that know how many steps are left."""

    inner: Policy

    def __call__(self, s: Clocked, *, key: PRNGKeyArray | None = None) -> Array:
        return self.inner(s.s, key=key)


class ToCritic(eqx.Module):
    """Windows as `Ending` has them, at whose end, if the episode goes on, is the critic's value of the state and the time."""

    critic: Critic

    def task(self, task: Task, horizon: int) -> Task:
        """The planning task, of `horizon` steps."""
        made = Ending().task(task, horizon)
        return eqx.tree_at(lambda t: t.terminal, made, _Ahead(task, self.critic))

    def at(self, task: Task, weights: Float[Array, " T1"], t: Int[Array, ""]) -> Task:
        """The planning task with the weights of the window that begins at t; the critic's value has those of what is ahead."""
        made = Ending().at(task, weights, t)
        ahead = t + task.horizon < weights.shape[0] - 1
        return reweighted(made, made.weights.at[-1].set(jnp.where(ahead, 1, made.weights[-1])))

    def state(self, s: State, t: Int[Array, ""], T: int) -> Clocked:
        """Where the window begins."""
        return Ending().state(s, t, T)


class _Ahead(eqx.Module):
    """The task's terminal reward at the end of the episode, the critic's value before it."""

    task: Task
    critic: Critic

    def __call__(self, state: Clocked) -> Float[Array, ""]:
        t = self.task.horizon - jnp.round(state.left).astype(jnp.int32)
        ahead = self.critic(inputs(self.task, state.s, t))
        return jnp.where(state.left > 0, ahead, self.task.terminal(state.s))
