"""Newton's method on the policy's parameters: the true Hessian made safe at saddles, and Gauss-Newton before it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import State, Task, as_float
from diffmbrl.info import Info, count_evaluations
from diffmbrl.optimizers.damping import Choice, DampingGrid, Evaluate, StepGate, best_of, damped_update
from diffmbrl.optimizers.systems import Dense, Krylov
from diffmbrl.optimizers.wrappers.minibatch import in_turn
from diffmbrl.rollout import mean_return
from diffmbrl.second_order.curvature import Vector, gauss_newton, hessian
from diffmbrl.second_order.krylov import Spectral, eigen, lanczos


class ThreePaths(eqx.Module):
    """A path of dampings through each of three spaces; a step of the first must improve `margin` times as much to be taken.

    The third takes every other damping of the path.
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
        dampings = [self.path.along(carry, space)[::every] for space, every in zip(spaces, (1, 1, 2), strict=True)]
        paths = [jax.vmap(space.step)(each) for space, each in zip(spaces, dampings, strict=True)]
        steps, predicted = (jnp.concatenate(x) for x in zip(*paths, strict=True))
        first, *others = (jnp.ones_like(each) for each in dampings)
        worth = jnp.concatenate([first / self.margin.astype(J.dtype), *others])
        choice = best_of(steps, predicted, jnp.concatenate(dampings), J, evaluate, worth=worth)
        return self.path.next(carry, choice), choice

    def refuse(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        return self.path.refuse(carry)


class KrylovNewton(eqx.Module):
    r"""Gauss-Newton, saddle-free Newton and the gradient's imitation, a path of dampings through each, judged by true returns.

    $$d(\lambda) = -V^\top U\,(|\rho| + \lambda)^{-1}\,U^\top e_1\,|g|$$

    with V the Lanczos vectors from g, fully re-orthogonalised, of $\nabla^2_\theta(-J)$ in one space, of the Gauss-Newton
    matrix $G^\top M G$ in the next and of $G^\top G$ in the third, and $U\,\mathrm{diag}(\rho)\,U^\top$ their tridiagonal
    matrix. Where the Hessian's curvature is negative its absolute value stands: the step is repelled by a saddle as fast as it
    is attracted by a minimum, and every step is downhill.

    They fail in different places. Gauss-Newton leaves out the curvature of network and dynamics, and with it the negative
    curvature by which a pendulum's policy leaves the plateaus between swinging left and right. The Hessian's steps are often
    the better ones of the moment, but can lead a long rollout into poorer places: of the best of both at every update one seed
    of `cartpole-swingup` ends at a cost of 32 that ends at 21 with a margin of 4. So a step of the Hessian is taken only if it
    improves the return `margin` times as much as the best of the others, as where those have come to rest.

    Both can rest far from an optimum, where the reward or the limits of the actions have kinks. The third step trusts no
    curvature: it is the regression of the policy onto a gradient step in the actions, damped, a natural gradient whose products
    are the network's alone and take no pass over time. On the cart-pole it is never the best; on `pendulum` (T = 200) it saves
    one seed of five and loses another, and first policies that race (`Raced`) save all.

    A `rank` of None takes all eigenvectors of the first two matrices, each formed in one batched pass: an update is then
    a dozen passes over the horizon, one after another, rather than 58, for P times the work. That is for devices with cores to
    spare.

    The Hessian is averaged over `starts` of the starts, others at each update; gradient, Gauss-Newton matrix and the returns
    that judge a step are of all of them. The return never falls, nor, with a `gate`, does the closed loop become much more
    sensitive in one step.

    Shapes: policy leaves any; `s0` [B, ...]. Cost: `structured` products of about .7 BPTT gradients; `rank` of about 2.4, times
    the share `starts` / B; B rollouts for each of 30 candidates.
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
        """It takes a batch of starts."""
        return "policy"

    def init(self, policy: Any, task: Task) -> Any:
        return self.damping.start(ravel_pytree(policy)[0].dtype), jnp.zeros((), jnp.int32)

    def update(
        self, policy: Any, carry: Any, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, Any, Info]:
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
                # The rollout, its linearisation, the candidates and the gate's; the Hessian's rollout, and its recomputation.
                forward=steps * (2 + candidates + 2 * gated) + 2 * partial,
                jvp=steps * (task.n + task.m) * (1 + gated) + partial * space.products,
                vjp=partial * (1 + space.products),
                # Rollout and adjoint, Gauss-Newton's passes; three of the Hessian's gradient, a tangent of two for each product
                # or for all together; and the candidates all at once.
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
