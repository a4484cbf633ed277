r"""Model-based RL 2.0: a policy improved by derivatives through a learned model.

The solver decides on the estimator of the gradient, the length of the horizon and the order of the method.
"""

from typing import NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

from diffmbrl.agents.collect import RandomActions
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.exploration import GaussianExploration
from diffmbrl.core import Policy, Solver, State, Task, as_float
from diffmbrl.models import Ensemble, Mean, NetworkDynamics, Training
from diffmbrl.models.buffer import Buffer, Transition
from diffmbrl.models.ensemble import Propagation
from diffmbrl.nets import MLP
from diffmbrl.optimizers.newton import KrylovNewton
from diffmbrl.optimizers.optax_solver import OptaxSolver
from diffmbrl.optimizers.short_horizon.solver import ShortHorizon
from diffmbrl.optimizers.wrappers.continuation import Continuation
from diffmbrl.planners.windows import Receding
from diffmbrl.policies import Neural

Tree = TypeVar("Tree")


class PolicyCarry(NamedTuple):
    """All that a `PolicyAgent` has learned.

    Args:
        policy: The policy.
        solver: The solver's carry.
        members: All members of the ensemble, with a leading axis on every leaf.
        elites: The members that are used.
        updates: The number of the agent's updates so far.
    """

    policy: PyTree
    solver: PyTree
    members: PyTree
    elites: PyTree
    updates: Int[Array, "*batch"]


class PolicyAgent(eqx.Module):
    r"""Fits an ensemble to all real steps, improves its policy through it, acts, and repeats: model-based RL 2.0.

    $$\theta \leftarrow \mathrm{update}^k\Big(\theta;\; \tfrac1B \sum_i E \sum_{t<H} w_t\, r(s_t, \pi_\theta(s_t))\Big),\qquad
    s_0 = s^{(i)},\; s_{t+1} = \hat f(s_t, \pi_\theta(s_t), \epsilon_t)$$

    The solver is any of kind "policy":
    * `OptaxSolver(optax.adam, gradient=BPTT())` is the lecture's; `BPTT(Truncated(k))`, `LikelihoodRatio(...)`,
      `Smoothed(...)` or another estimator of `gradients/` may replace its gradient;
    * `GaussNewton()`, `KrylovNewton()`, `NewtonCG()` ... are second order, within a `Continuation` or without;
    * `ShortHorizon(...)` uses windows with a critic at their ends.

    Its carry (moments, damping, a critic, the stage of a continuation) is retained from model to model. The policy acts with
    normal noise, clipped to the limits. Updates that the solver rejects are counted in `nonfinite`.

    Args:
        solver: The solver.
        policy: The first policy; every seed draws the weights of its networks again (`redrawn`).
        world: Makes and fits the ensemble.
        propagation: Makes one dynamics of the ensemble: `Mean()` of the members, or `TS1()`, which draws a member at each step.
            The members' noise is reparameterised, and the same in all k updates.
        noise: Standard deviation of the noise of collected actions, in half widths of the limits.
        fresh: The share of the B starts that are starts of the task; the others are states of the buffer.
        horizon: The number H of imagined steps; None for the task's own. A shorter one ends with the task's terminal reward.
        starts: The number B of starts of each round of updates.
        updates: The number k of the solver's updates in a round.
        warmup: Real steps before the first update.
        every: Real steps between two rounds.
        environments: Real systems in parallel, which share these steps.

    Raises:
        TypeError: If the solver is not of kind "policy".
        ValueError: If a size is below 1, `fresh` is outside [0, 1], or the noise is negative.

    Cost: of an update, a fit, and k updates of the solver on B rollouts of H steps of the ensemble.
    Reference: the lecture's model-based RL 2.0; Deisenroth and Rasmussen 2011 (PILCO); Heess et al. 2015, SVG(infinity).

    >>> from diffmbrl import tasks
    >>> policy = Neural.init(tasks.pendulum(), key=jax.random.key(0))
    >>> PolicyAgent(OptaxSolver(optax.adam, learning_rate=1e-2), policy, horizon=30).starts
    64
    """

    solver: Solver
    given: Policy
    world: EnsembleTrainer
    propagation: Propagation
    noise: Float[Array, ""]
    fresh: Float[Array, ""]
    horizon: int | None = eqx.field(static=True)
    starts: int = eqx.field(static=True)
    updates: int = eqx.field(static=True)
    warmup: int = eqx.field(static=True)
    every: int = eqx.field(static=True)
    environments: int = eqx.field(static=True)

    def __init__(
        self,
        solver: Solver,
        policy: Policy,
        *,
        world: EnsembleTrainer | None = None,
        propagation: Propagation | None = None,
        noise: ArrayLike = 0.1,
        fresh: ArrayLike = 0.25,
        horizon: int | None = None,
        starts: int = 64,
        updates: int = 20,
        warmup: int = 200,
        every: int = 100,
        environments: int = 1,
    ):
        if not isinstance(solver, Solver) or solver.kind != "policy":
            raise TypeError(
                f"solver must be one of kind 'policy', such as OptaxSolver(optax.adam, learning_rate=1e-2); "
                f"got {type(solver).__name__}"
            )
        sizes = {"starts": starts, "updates": updates} | ({} if horizon is None else {"horizon": horizon})
        for name, number in sizes.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")
        if not bool(jnp.all((jnp.asarray(fresh) >= 0) & (jnp.asarray(fresh) <= 1))):
            raise ValueError(f"fresh must be a share of the starts, in [0, 1], got {fresh}")
        if not bool(jnp.all(jnp.asarray(noise) >= 0)):
            raise ValueError(f"noise must not be negative, got {noise}")
        self.solver, self.world = solver, EnsembleTrainer() if world is None else world
        self.propagation = Mean() if propagation is None else propagation
        self.noise, self.fresh, self.given = as_float(noise), as_float(fresh), policy
        self.horizon, self.starts, self.updates = horizon, starts, updates
        self.warmup, self.every, self.environments = warmup, every, environments

    def init(self, task: Task, key: PRNGKeyArray) -> PolicyCarry:
        key_policy, key_members = jax.random.split(key)
        members = self.world.init(task, key_members)
        policy = redrawn(self.given, key_policy)
        elites = self.world.first(members)
        solver = self.solver.init(policy, self.imagined(task, elites))
        return PolicyCarry(policy, solver, members, elites, jnp.zeros((), jnp.int32))

    def first(self, carry: PolicyCarry, task: Task) -> RandomActions:
        return RandomActions(task)

    def policy(self, carry: PolicyCarry, task: Task) -> GaussianExploration:
        return GaussianExploration(carry.policy, self.noise, task.a_low, task.a_high)

    def best(self, carry: PolicyCarry, task: Task) -> Policy:
        return carry.policy

    def model(self, carry: PolicyCarry, task: Task) -> Ensemble:
        """The ensemble that the policy is improved through."""
        return Ensemble(carry.elites, self.propagation)

    def imagined(self, task: Task, members: PyTree) -> Task:
        """Make the task of the imagined rollouts: with an ensemble for its dynamics, and H steps.

        Args:
            task: The real system's task.
            members: The members of the ensemble.

        Returns:
            The task.
        """
        model = eqx.tree_at(lambda t: t.dynamics, task, Ensemble(members, self.propagation))
        return model if self.horizon is None else Receding().task(model, self.horizon)

    def update(
        self, carry: PolicyCarry, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[PolicyCarry, dict[str, Array]]:
        key_fit, key_starts, key_solver = jax.random.split(key, 3)
        members, elites, metrics = self.world.fit(carry.members, buffer, key_fit)
        imagined, s0 = self.imagined(task, elites), self._starts(task, buffer, key_starts)

        def step(state, _):
            policy, solver = state
            policy, solver, info = self.solver.update(policy, solver, imagined, s0, key=key_solver)
            return (policy, solver), info

        (policy, solver), info = jax.lax.scan(step, (carry.policy, carry.solver), None, length=self.updates)
        metrics |= {
            "J_model_before": info.J[0],
            "J_model": info.J[-1],
            "accepted": jnp.mean(info.accepted.astype(info.J.dtype)),
            "nonfinite": jnp.sum(info.nonfinite, dtype=jnp.int32),
        }
        if info.gradient_norm is not None:
            metrics["gradient_norm"] = jnp.max(info.gradient_norm)
        return PolicyCarry(policy, solver, members, elites, carry.updates + 1), metrics

    def _starts(self, task: Task, buffer: Buffer, key: PRNGKeyArray) -> State:
        key_real, key_fresh, key_which = jax.random.split(key, 3)
        real, fresh = buffer.sample(key_real, self.starts).s, task.starts(key_fresh, self.starts)
        which = jax.random.uniform(key_which, (self.starts,), self.fresh.dtype) < self.fresh

        def pick(x, y):
            return jnp.where(which.reshape(-1, *[1] * (x.ndim - 1)), x, y)

        return jax.tree.map(pick, fresh, real)


def redrawn(policy: Tree, key: PRNGKeyArray) -> Tree:
    """Draw the weights of all networks of a policy again: normal, with each layer's own root mean square.

    Args:
        policy: The policy.
        key: The random key.

    Returns:
        The policy with the new weights.
    """

    def is_net(x: object) -> bool:
        return isinstance(x, MLP)

    nets, tree = jax.tree.flatten(policy, is_leaf=is_net)
    return tree.unflatten(_redrawn(x, jax.random.fold_in(key, i)) if is_net(x) else x for i, x in enumerate(nets))


def _redrawn(net: MLP, key: PRNGKeyArray) -> MLP:
    keys = jax.random.split(key, len(net.weights))
    drawn = [
        jnp.sqrt(jnp.mean(W**2)) * jax.random.normal(k, W.shape, W.dtype)
        for k, W in zip(keys, net.weights, strict=True)
    ]
    return eqx.tree_at(lambda net: net.weights, net, tuple(drawn))


def bptt(
    task: Task, *, rate: float = 3e-3, updates: int = 30, continued: int = 0, warmup: int = 200, every: int = 200
) -> PolicyAgent:
    """Make the lecture's model-based RL 2.0: Adam through the whole horizon.

    Args:
        task: The task.
        rate: The learning rate.
        updates: Updates of the policy after each fit.
        continued: The number of updates over which the discount rises to 1; 0 for no continuation.
        warmup: Real steps before the first update.
        every: Real steps between two fits.

    Returns:
        The agent.
    """
    adam = OptaxSolver(optax.adam, learning_rate=rate)
    solver = Continuation.discounted(adam, continued) if continued else adam
    return _small(task, solver, updates, warmup, every)


def second_order(
    task: Task, *, updates: int = 4, continued: int = 36, warmup: int = 200, every: int = 200
) -> PolicyAgent:
    """Make model-based RL 2.0 with Krylov-Newton through the whole horizon.

    Args:
        task: The task.
        updates: Updates of the policy after each fit.
        continued: The number of updates over which the discount rises to 1; 0 for no continuation.
        warmup: Real steps before the first update.
        every: Real steps between two fits.

    Returns:
        The agent.
    """
    newton = KrylovNewton()
    solver = Continuation.discounted(newton, continued) if continued else newton
    return _small(task, solver, updates, warmup, every)


def short_horizon(
    task: Task, *, rate: float = 3e-3, updates: int = 150, window: int = 12, warmup: int = 200, every: int = 200
) -> PolicyAgent:
    """Make model-based RL 2.0 on windows of the model's rollouts with a critic at their ends, from 32 environments at once.

    Args:
        task: The task.
        rate: The policy's learning rate.
        updates: Updates of the policy after each fit.
        window: The number of steps of a window.
        warmup: Real steps before the first update.
        every: Real steps between two fits.

    Returns:
        The agent.
    """
    solver = ShortHorizon(OptaxSolver(optax.adam, learning_rate=rate), window=window, environments=32, discount=0.99)
    return _small(task, solver, updates, warmup, every)


def _small(task: Task, solver: Solver, updates: int, warmup: int, every: int) -> PolicyAgent:
    """A `PolicyAgent` with networks large enough for a few state variables."""
    training = Training(optax.adam, learning_rate=2e-3, epochs=20, batch=64, patience=3)
    world = EnsembleTrainer(training, members=3, elites=3, hidden=(32, 32), model=NetworkDynamics.init)
    policy = Neural.init(task, key=jax.random.key(0))
    return PolicyAgent(solver, policy, world=world, starts=32, updates=updates, warmup=warmup, every=every)
