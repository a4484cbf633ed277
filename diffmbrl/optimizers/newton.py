"""Newton's method on the policy's parameters with the true Hessian, made safe at saddles."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray

from diffmbrl.core import Info, State, Task, count_work
from diffmbrl.curvature import hessian
from diffmbrl.krylov import lanczos
from diffmbrl.optimizers.damping import LevenbergMarquardt, Path, take
from diffmbrl.rollout import expected


class KrylovNewton(eqx.Module):
    r"""Saddle-free Newton in the Krylov space of the true Hessian from the gradient.

    $$d(\lambda) = -V^\top U\,(|\rho| + \lambda)^{-1}\,U^\top e_1\,|g|$$

    with V the Lanczos vectors of $\nabla^2_\theta(-J)$ from g, fully re-orthogonalised, and $U\,\mathrm{diag}(\rho)\,U^\top$
    their tridiagonal matrix. Where the curvature is negative its absolute value stands: the step is repelled by a saddle as
    fast as it is attracted by a minimum, and every step is downhill. The Hessian of a policy through a rollout has hundreds of
    negative eigenvalues, which Gauss-Newton leaves out together with the curvature of network and dynamics.

    `damping` is `GaussNewton`'s: a path of dampings judged by their true returns. The return never falls.

    Shapes: policy leaves any; `s0` [B, ...]. Cost: `rank` products of about 2.4 BPTT gradients, B rollouts a damping.
    Reference: Dauphin et al. 2014, section 4; O'Leary-Roseberry, Alger, Ghattas 2021 (low-rank saddle-free Newton).

    >>> import jax
    >>> from diffmbrl import Neural, solve, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> key = jax.random.key(0)
    >>> policy, history = solve(KrylovNewton(rank=10), Neural.init(task, key=key), task, task.starts(key, 8), key, steps=3)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    damping: Path | LevenbergMarquardt = eqx.field(default_factory=Path)
    rank: int = eqx.field(static=True, default=30)

    @property
    def kind(self) -> str:
        """It takes a batch of starts."""
        return "policy"

    def init(self, policy: Any, task: Task) -> Any:
        return self.damping.start(ravel_pytree(policy)[0].dtype)

    def update(
        self, policy: Any, carry: Any, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, Any, Info]:
        model = hessian(policy, task, s0, key)
        space = lanczos(model.product, model.gradient, self.rank)
        space = space._replace(values=jnp.abs(space.values))
        steps = jax.tree.leaves(s0)[0].shape[0] * task.horizon

        def work(candidates):
            return count_work(
                forward=steps * (2 + candidates),  # the rollout, its recomputation, the candidates
                jvp=steps * space.products,
                vjp=steps * (1 + space.products),
                # The gradient's three passes, a tangent of two for each product, and the candidates all at once.
                sequential=3 + 2 * space.products + 1,
            )

        return take(self.damping, policy, carry, model, space, lambda pi: expected(pi, task, s0, key), work)
