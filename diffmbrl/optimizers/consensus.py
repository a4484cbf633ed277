"""Consensus of planner and policy: guided policy search over the batched iLQR, by ADMM."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, Trajectory, as_float, is_plan, parameter, restart, reweighted
from diffmbrl.info import Info, count_evaluations
from diffmbrl.optimizers.damped_update import damped_update
from diffmbrl.optimizers.damping import Choice, DampingGrid, Evaluate, Proposals, best_of
from diffmbrl.rollout import mean_return, returns, rollout, split_keys, weights_axis
from diffmbrl.second_order.curvature import TIME_FIRST, CurvatureModel, Vector, actions, gauss_newton
from diffmbrl.second_order.krylov import lanczos
from diffmbrl.second_order.linearize import Linearization, feedback, flat_states, linearize
from diffmbrl.second_order.riccati import closed_loop, riccati
from diffmbrl.second_order.small_matrices import matmul, matvec

FLOOR = 1e-6  # damping, relative to the one-step curvature in the actions, for time steps of weight 0


class Consensus(eqx.Module):
    r"""ADMM between trajectories, which dynamic programming improves, and the policy, which regresses onto them.

    $$\min_{\tau, \theta} -J(\tau)\quad\text{subject to}\quad a_t = \pi_\theta(s_t)\ \text{along every trajectory}$$

    With $w = a - \pi(s)$ and the scaled dual variable u, each update starts from w = u = 0 and makes `rounds` of
    1. $\tau \leftarrow \arg\min -J(\tau) + \tfrac\rho2\sum_t |w_t + u_t|^2_{S_t}$ by `iterations` of iLQR around the policy's
       own closed loop, $s' = f(s, \pi(s) + w)$, with the best of the step `lengths` for each start by true rollouts, or none;
    2. $\theta \leftarrow \arg\min \sum_t |a_t + u_t - \pi_\theta(s_t)|^2_{S_t}$ by `regressions` steps of Gauss-Newton in a
       Krylov space of dimension `rank`: supervised learning, with no recursion over time;
    3. $u \leftarrow u + a - \pi_\theta(s)$.

    $S_t = Q_{aa}$, the pivot of $M$ in the first Riccati sweep, is the cost of an action's error if the planner acts
    afterwards. It has the units of the cost and the weights of the task, and stays moderate where the policy's own closed loop,
    and with it M, grows by orders of magnitude. Actions keep the task's limits, so that a policy can follow them.

    True rollouts judge the proposal of every round and its `blends` with the current policy, so the return never falls. The
    carry multiplies `rho`: by ten if nothing improves, and back towards 1 as steps are accepted. One round of one iteration
    imitates the planner's step; a large `rho` is gradient descent in the metric $G^\top S G$. `Info.model` lists the blends of
    each round, and as predicted the gain of a policy that follows the trajectories.

    Args:
        rho: Penalty on leaving the policy, relative to S.
        lengths: Step lengths of iLQR's line search.
        blends: Fractions of each proposal that are judged.
        fit: Choice of the damping of the regression.
        rounds: Number of rounds in an update.
        iterations: Number of iLQR's iterations in a round.
        regressions: Number of Gauss-Newton steps of the regression in a round.
        rank: Dimension of the Krylov space of the regression.

    Raises:
        ValueError: If a count is below 1.
        TypeError: If a state has leaves that are not float.

    Cost: For each iteration a linearisation, a Riccati sweep and B rollouts for each of `lengths`; for each round `rank`
    products with G and its transpose; B rollouts for each blend of each round.
    Reference: Levine and Koltun 2013; Mordatch and Todorov 2014 (ADMM); Boyd et al. 2011, section 3.1.1.

    >>> import jax
    >>> from diffmbrl import Neural, solve, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> key = jax.random.key(0)
    >>> policy, history = solve(Consensus(), Neural.init(task, key=key), task, task.starts(key, 8), key, steps=3)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    rho: Float[Array, ""] = parameter(10.0)
    lengths: Float[Array, " k"] = eqx.field(
        default_factory=lambda: jnp.asarray([1.0, 0.5, 0.25, 0.06], float), converter=as_float
    )
    blends: Float[Array, " c"] = eqx.field(
        default_factory=lambda: jnp.asarray([1.0, 0.5, 0.25, 0.1, 0.03], float), converter=as_float
    )
    fit: DampingGrid = eqx.field(default_factory=lambda: DampingGrid(jnp.logspace(-8, 0, 5, dtype=float)))
    rounds: int = eqx.field(static=True, default=2)
    iterations: int = eqx.field(static=True, default=2)
    regressions: int = eqx.field(static=True, default=1)
    rank: int = eqx.field(static=True, default=10)

    def __check_init__(self) -> None:
        for name in ("rounds", "iterations", "regressions", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def kind(self) -> str:
        """ "policy": it takes a batch of starts."""
        return "policy"

    def init(self, policy: Policy, task: Task) -> Float[Array, ""]:
        return jnp.ones((), ravel_pytree(policy)[0].dtype)

    on_objective_change = restart

    def update(
        self, policy: Policy, carry: Float[Array, ""], task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Policy, Float[Array, ""], Info]:
        model = gauss_newton(policy, task, s0, key)
        rho = carry * self.rho.astype(carry.dtype)
        proposals, spoilt = _Rounds(self, task, s0, key, rho, model).propose(policy, model)
        steps, effort = model.g.shape[0] * model.g.shape[-1], self.rounds * self.iterations

        def work(candidates):
            return count_evaluations(
                forward=steps * (2 + effort * (self.lengths.size + 1) + candidates),
                jvp=steps * (task.n + task.m) * (1 + effort),
                # Rollout and adjoint, the pivots, a sweep and a line search for each iteration, all candidates at once.
                sequential=2 + 1 + 2 * effort + 1,
            )

        def objective(pi):
            return mean_return(pi, task, s0, key)

        policy, carry, info = damped_update(_Judge(), policy, carry, model, proposals, objective, work)
        return policy, carry, info._replace(damping=rho, nonfinite=info.nonfinite + spoilt)


class _Judge(eqx.Module):
    """The rule by which `damped_update` chooses among the proposals and adapts rho."""

    def choose(
        self, carry: Float[Array, ""], found: Proposals, J: Float[Array, ""], evaluate: Evaluate
    ) -> tuple[Array, Choice]:
        """The next carry, and the best of the blends."""
        choice = best_of(found.steps, found.predicted, found.shares, J, evaluate)
        return jnp.where(choice.accepted, jnp.maximum(carry / 10, 1.0), self.refuse(carry)), choice

    def refuse(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        """The carry after a refused step, bounded because at an optimum every step is refused."""
        return jnp.minimum(carry * 10, 1e8)


class _Plans(NamedTuple):
    """The planner's state for all starts: trajectories, the policy's gains K, w = a - pi(s), and the dual variable u."""

    trajectory: Trajectory  # leaves [T, B, ...]
    J: Float[Array, " B"]
    lin: Linearization
    K: Float[Array, "T m n B"]
    w: Float[Array, "T m B"]
    u: Float[Array, "T m B"]


class _Around(eqx.Module):
    r"""A plan around a policy: $a_t = \pi(s_t) + w_t + K_t (s_t - \bar s_t)$, within the limits."""

    policy: Policy
    w: Float[Array, "*T m"]
    K: Float[Array, "*T m n"]
    s: Float[Array, "*T n"]
    low: Float[Array, "*T m"]
    high: Float[Array, "*T m"]
    is_plan: ClassVar[bool] = True

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        x = s if isinstance(s, jax.Array) else ravel_pytree(s)[0]
        w = self.w + jnp.sum(self.K * (x - self.s), axis=-1)
        return jnp.clip(self.policy(s, key=key) + w, self.low, self.high)


class _Rounds:
    """The rounds of one update, with the task, starts, noise and prices S that they share."""

    def __init__(
        self,
        solver: Consensus,
        task: Task,
        s0: State,
        key: PRNGKeyArray | None,
        rho: Float[Array, ""],
        model: CurvatureModel,
    ):
        self.solver, self.task, self.s0, self.rho = solver, task, s0, rho
        self.keys: Key[Array, " B"] | None = split_keys(key, s0)
        self.axis = weights_axis(task, s0)
        self.floor = FLOOR * _one_step(model.linearization)
        self.S = riccati(closed_loop(model.linearization, model.K), self.floor).Q_aa

    def propose(self, policy: Policy, model: CurvatureModel) -> tuple[Proposals, Int[Array, ""]]:
        """Steps for every blend of every round, and the number of the planner's rollouts that were not finite."""
        theta, unravel = ravel_pytree(policy)
        value = jax.vmap(
            lambda tau, w: returns(tau, reweighted(self.task, w)), in_axes=(TIME_FIRST, self.axis), out_axes=0
        )
        J, zero = value(model.trajectory, self.task.weights), jnp.zeros_like(model.g)
        plans = _Plans(model.trajectory, J, model.linearization, model.K, zero, zero)

        def one_round(state, _):
            theta_r, plans, spoilt, damping = state

            def iteration(_, state):
                plans, spoilt = state
                plans, more = self._improve(unravel(theta_r), plans)
                return self._linearize(unravel(theta_r), plans), spoilt + more

            plans, spoilt = jax.lax.fori_loop(0, self.solver.iterations, iteration, (plans, spoilt))
            theta_r, damping = self._regress(theta_r, unravel, plans, damping)
            w = _last(plans.trajectory.a) - self._actions(unravel(theta_r), plans.trajectory.s)
            plans = plans._replace(w=w, u=plans.u + w, K=self._gains(unravel(theta_r), plans.trajectory))
            return (theta_r, plans, spoilt, damping), (theta_r - theta, jnp.mean(plans.J) - jnp.mean(J))

        start = (theta, plans, jnp.zeros((), jnp.int32), self.solver.fit.start(theta.dtype))
        (*_, spoilt, _), (steps, gains) = jax.lax.scan(one_round, start, length=self.solver.rounds)
        shares = self.solver.blends.astype(theta.dtype)
        each = self.solver.iterations + self.solver.regressions * min(self.solver.rank, theta.size)
        return Proposals(
            steps=(steps[:, None] * shares[:, None]).reshape(-1, theta.size),
            predicted=(gains[:, None] * shares).ravel(),
            shares=jnp.tile(shares, self.solver.rounds),
            products=jnp.asarray(self.solver.rounds * each, jnp.int32),
            negative=jnp.zeros((), theta.dtype),
        ), spoilt

    def _improve(self, policy: Policy, plans: _Plans) -> tuple[_Plans, Int[Array, ""]]:
        """One iteration of iLQR from every start: each takes its best step length, or none."""
        n, m, T = self.task.n, self.task.m, self.task.horizon
        loop = closed_loop(plans.lin, plans.K)
        loop = loop._replace(
            c_a=loop.c_a + self.rho * self._price(plans.trajectory, plans.w + plans.u),
            H=loop.H.at[:, n:, n:].add(self.rho * self._alive(plans.trajectory)[:, None, None] * self.S),
        )
        sweep = riccati(loop, self.floor)
        # A plan has a policy of its own at every step.
        repeated = policy if is_plan(policy) else jax.tree.map(lambda x: jnp.broadcast_to(x, (T, *x.shape)), policy)
        low, high = (jnp.broadcast_to(x, (T, m)) for x in (self.task.a_low, self.task.a_high))

        def follow(trajectory, w, K, s, key, weights):
            task = reweighted(self.task, weights)
            new = rollout(_Around(repeated, w, K, flat_states(trajectory.s)[0], low, high), task, s, key)
            return new, returns(new, task)

        def attempt(length):
            axes = (TIME_FIRST, -1, -1, 0, 0, self.axis)
            new, J = jax.vmap(follow, in_axes=axes, out_axes=(TIME_FIRST, 0))(
                plans.trajectory, plans.w + length * sweep.k, sweep.K, self.s0, self.keys, self.task.weights
            )
            w = _last(new.a) - self._actions(policy, new.s)  # as the limits left it
            return new, J, w, self._augmented(new, J, w, plans.u)

        *tried, cost = jax.vmap(attempt)(self.solver.lengths.astype(self.rho.dtype))
        finite = jnp.isfinite(cost)
        cost = jnp.where(finite, cost, jnp.inf)
        best = jnp.argmin(cost, axis=0)
        better = sweep.definite & (jnp.min(cost, axis=0) < self._augmented(plans.trajectory, plans.J, plans.w, plans.u))

        def pick(axis, tried, old):
            """The best trial of each start, or its old values; `axis` is the axis of the starts in `old`."""

            def leaf(x, y):
                shape = [-1 if i == axis % y.ndim else 1 for i in range(y.ndim)]
                chosen = jnp.take_along_axis(x, best.reshape(1, *shape), axis=0)[0]
                return jnp.where(better.reshape(shape), chosen, y)

            return jax.tree.map(leaf, tried, old)

        trajectory = Trajectory(*map(pick, TIME_FIRST, tried[0], plans.trajectory))
        plans = plans._replace(trajectory=trajectory, J=pick(0, tried[1], plans.J), w=pick(-1, tried[2], plans.w))
        return plans, jnp.sum(~finite, dtype=jnp.int32)

    def _regress(
        self, theta: Vector, unravel: Callable[[Vector], Policy], plans: _Plans, damping: Array
    ) -> tuple[Vector, Array]:
        """Gauss-Newton on the squared distance of the policy's actions to a + u, at the trajectories' states."""
        target = _last(plans.trajectory.a) + plans.u

        def predict(x):
            return self._actions(unravel(x), plans.trajectory.s)

        def gained(made):
            return -jnp.sum((target - made) * self._price(plans.trajectory, target - made)) / 2

        def step(_, state):
            x, damping = state
            made, push = jax.linearize(predict, x)
            transpose = jax.linear_transpose(push, x)

            def pull(y):
                return transpose(self._price(plans.trajectory, y))[0]

            space = lanczos(lambda v: pull(push(v)), pull(made - target), self.solver.rank)
            space = space._replace(values=jnp.maximum(space.values, 0))
            damping, choice = self.solver.fit.choose(
                damping, space, gained(made), lambda steps: jax.lax.map(lambda d: gained(predict(x + d)), steps)
            )
            return x + choice.step, damping

        return jax.lax.fori_loop(0, self.solver.regressions, step, (theta, damping))

    def _linearize(self, policy: Policy, plans: _Plans) -> _Plans:
        """Linearise plant and policy along the current trajectories."""

        def one(trajectory, key, weights):
            return linearize(reweighted(self.task, weights), trajectory, key)

        lin = jax.vmap(one, in_axes=(TIME_FIRST, 0, self.axis), out_axes=-1)(
            plans.trajectory, self.keys, self.task.weights
        )
        return plans._replace(lin=lin, K=self._gains(policy, plans.trajectory))

    def _gains(self, policy: Policy, trajectory: Trajectory) -> Float[Array, "T m n B"]:
        along = jax.vmap(lambda tau, key: feedback(policy, tau, key), in_axes=(TIME_FIRST, 0), out_axes=-1)
        return along(trajectory, self.keys)

    def _actions(self, policy: Policy, s: State) -> Float[Array, "T m B"]:
        return actions(policy, s, self.keys, None)

    def _alive(self, trajectory: Trajectory) -> Float[Array, "T B"]:
        return trajectory.alive[:-1].astype(self.S.dtype)

    def _price(self, trajectory: Trajectory, w: Float[Array, "T m B"]) -> Float[Array, "T m B"]:
        """S w, zero after the end of the episode."""
        return self._alive(trajectory)[:, None] * jax.vmap(matvec)(self.S, w)

    def _augmented(self, trajectory: Trajectory, J: Array, w: Array, u: Array) -> Float[Array, " B"]:
        return -J + self.rho / 2 * jnp.sum((w + u) * self._price(trajectory, w + u), axis=(0, 1))


def _one_step(lin: Linearization) -> Float[Array, ""]:
    """The mean curvature of the cost in an action, here and through the next state; 1 where there is none."""
    n = lin.c_s.shape[1]
    through = jnp.sum(lin.B * jax.vmap(matmul)(lin.H[:, :n, :n], lin.B))
    size = (jnp.sum(jnp.trace(lin.H[:, n:, n:], axis1=1, axis2=2)) + through) / lin.c_a.size
    return jnp.where(size > 0, size, 1.0).astype(lin.H.dtype)


def _last(a: Float[Array, "T B m"]) -> Float[Array, "T m B"]:
    """The batch as the last axis."""
    return jnp.moveaxis(a, 1, -1)
