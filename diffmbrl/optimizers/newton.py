"""Newton's method on the policy's parameters: Gauss-Newton first, and the true Hessian made safe at saddles."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, as_float, restart
from diffmbrl.info import Info, count_evaluations
from diffmbrl.optimizers.damped_update import StepGate, damped_update
from diffmbrl.optimizers.damping import Choice, DampingGrid, Evaluate, best_of
from diffmbrl.optimizers.systems import Dense, Krylov
from diffmbrl.optimizers.wrappers.minibatch import in_turn
from diffmbrl.rollout import mean_return
from diffmbrl.second_order.curvature import Vector, gauss_newton, hessian
from diffmbrl.second_order.krylov import Spectral, eigen, lanczos

NewtonCarry = tuple[Float[Array, ""], Int[Array, ""]]  # the factor on all dampings, and the number of updates


class ThreePaths(eqx.Module):
    """A grid of dampings in each of three spaces, judged together by true returns.

    Args:
        path: Dampings; the third space takes every other one.
        margin: Factor by which a step of the first space must improve the return more than the best of the others to be taken.
    """

    path: DampingGrid
    margin: Float[Array, ""]

    def choose(
        self,
        carry: Float[Array, ""],
        spaces: tuple[Spectral, Spectral, Spectral],
        J: Float[Array, ""],
        evaluate: Evaluate,
    ) -> tuple[Array, Choice]:
        """The next carry, and the best step."""
        dampings = [self.path.along(carry, space)[::every] for space, every in zip(spaces, (1, 1, 2), strict=True)]
        paths = [jax.vmap(space.step)(each) for space, each in zip(spaces, dampings, strict=True)]
        steps, predicted = (jnp.concatenate(x) for x in zip(*paths, strict=True))
        first, *others = (jnp.ones_like(each) for each in dampings)
        worth = jnp.concatenate([first / self.margin.astype(J.dtype), *others])
        choice = best_of(steps, predicted, jnp.concatenate(dampings), J, evaluate, worth=worth)
        return self.path.next(carry, choice), choice

    def refuse(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        """The carry after a refused step."""
        return self.path.refuse(carry)


class KrylovNewton(eqx.Module):
    r"""Gauss-Newton, saddle-free Newton and imitation of the gradient, each with a grid of dampings, judged by true returns.

    $$d(\lambda) = -V^\top U\,(|\rho| + \lambda)^{-1}\,U^\top e_1\,|g|$$

    V are the fully re-orthogonalised Lanczos vectors from g of $\nabla^2_\theta(-J)$ in one space, of the Gauss-Newton matrix
    $G^\top M G$ in the next and of $G^\top G$ in the third, and $U\,\mathrm{diag}(\rho)\,U^\top$ is their tridiagonal matrix.
    The absolute value of a negative curvature repels the step from a saddle, and every step is downhill. The return never
    falls.

    The three fail in different places. Gauss-Newton leaves out the curvature of network and dynamics, and with it the negative
    curvature by which a pendulum's policy leaves the plateaus between swinging left and right. The Hessian's steps are often
    better for one update, but can lead a long rollout into worse regions: with the best of both at every update, one seed of
    `cartpole-swingup` ends at a cost of 32, and at 21 with a margin of 4. Both can stop far from an optimum, where the reward
    or the limits of the actions have kinks. The third step uses no curvature of the return: it is the damped regression of the
    policy onto a gradient step in the actions, a natural gradient whose products take no pass over time. On the cart-pole it is
    never the best; on `pendulum` (T = 200) it saves one seed of five and loses another, and `MultiStart` saves all.

    Args:
        damping: The dampings of each space.
        margin: Factor by which a step of the Hessian must improve the return more than the best of the others to be taken.
        gate: Condition on steps besides the return, or None.
        rank: Dimension of the Hessian's Krylov space. None takes all eigenvectors of the first two matrices, each formed in one
            batched pass: a dozen sequential passes over the horizon rather than 58, for P times the work.
        structured: Dimension of the other two Krylov spaces.
        starts: Number of starts over which the Hessian is averaged, others at each update. Gradient, Gauss-Newton matrix and
            the returns that judge a step are of all starts.

    Raises:
        ValueError: If `rank`, `structured` or `starts` is below 1.

    Cost: `structured` products of about .7 BPTT gradients; `rank` products of about 2.4, times the share `starts` / B; B
    rollouts for each of 30 candidates.
    Reference: Dauphin et al. 2014, section 4; O'Leary-Roseberry, Alger, Ghattas 2021 (low-rank saddle-free Newton); Byrd, Chin,
    Neveitt, Nocedal 2011 (Hessians of a part of the sample); Amari 1998 (the natural gradient).

    >>> import jax
    >>> from diffmbrl import Neural, solve, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> key = jax.random.key(0)
    >>> policy, history = solve(KrylovNewton(rank=10), Neural.init(task, key=key), task, task.starts(key, 8), key, steps=3)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    damping: DampingGrid = eqx.field(default_factory=DampingGrid)
    margin: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(4.0), converter=as_float)
    gate: StepGate | None = None
    rank: int | None = eqx.field(static=True, default=15)
    structured: int = eqx.field(static=True, default=10)
    starts: int = eqx.field(static=True, default=64)

    def __check_init__(self):
        for name, number in (("rank", self.rank), ("structured", self.structured), ("starts", self.starts)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")

    @property
    def kind(self) -> str:
        """ "policy": it takes a batch of starts."""
        return "policy"

    def init(self, policy: Policy, task: Task) -> NewtonCarry:
        return self.damping.start(ravel_pytree(policy)[0].dtype), jnp.zeros((), jnp.int32)

    on_objective_change = restart

    def update(
        self, policy: Policy, carry: NewtonCarry, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Policy, NewtonCarry, Info]:
        damping, updates = carry
        model = gauss_newton(policy, task, s0, key)
        batch = model.g.shape[-1]
        some = (task, s0) if batch <= self.starts else in_turn(task, s0, updates, self.starts)
        full = hessian(policy, *some, key)
        space = self._space(full.product, model.gradient)
        system = Dense() if self.rank is None else Krylov(self.structured)
        other = system(model, policy, task, key)
        imitation = lanczos(lambda v: model.pull(model.push(v)), model.gradient, self.structured)
        imitation = imitation._replace(values=jnp.maximum(imitation.values, 0))
        steps, partial = batch * task.horizon, min(self.starts, batch) * task.horizon

        gated = int(self.gate is not None)

        def work(candidates):
            return count_evaluations(
                # The rollout, its linearisation, the candidates and the gate's rollouts; the Hessian's, and its recomputation.
                forward=steps * (2 + candidates + 2 * gated) + 2 * partial,
                jvp=steps * (task.n + task.m) * (1 + gated) + partial * space.products,
                vjp=partial * (1 + space.products),
                # Rollout and adjoint, and Gauss-Newton's passes; three of the Hessian's gradient, two of a tangent for each
                # product or for all together; all candidates at once.
                sequential=2
                + system.passes(model.gradient.size)
                + 3
                + 2 * (1 if self.rank is None else space.products)
                + 1
                + 3 * gated,
            )

        policy, damping, info = damped_update(
            ThreePaths(self.damping, self.margin),
            policy,
            damping,
            model,
            (space, other, imitation),
            lambda pi: mean_return(pi, task, s0, key),
            work,
            allows=None if self.gate is None else self.gate.around(policy, model, task, s0, key),
        )
        return policy, (damping, updates + 1), info

    def _space(self, product: Callable[[Vector], Vector], g: Vector) -> Spectral:
        if self.rank is None:
            space = eigen(jax.vmap(product)(jnp.eye(g.size, dtype=g.dtype)), g)  # one batched pass
        else:
            space = lanczos(product, g, self.rank)
        return space._replace(values=jnp.abs(space.values))
