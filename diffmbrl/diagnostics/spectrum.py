"""Eigenvalues of the Gauss-Newton matrix of a policy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffmbrl.core import State, Task
from diffmbrl.curvature import dense, gauss_newton
from diffmbrl.krylov import lanczos

DENSE = 1500  # parameters up to which the whole matrix is formed
RANK = 100  # Ritz values beyond that


def gauss_newton_spectrum(policy: Any, task: Task, s0: State) -> np.ndarray:
    """Eigenvalues of N = G'MG, decreasing, in float64 whatever the precision of the run.

    All of them up to 1500 parameters, beyond that the Ritz values of 100 Lanczos steps from the gradient.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> gauss_newton_spectrum(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).shape
    (3,)
    """
    with jax.enable_x64(True):
        policy, task, s0 = in_double((policy, task, s0))
        return np.asarray(_eigenvalues(policy, task, s0))[::-1]


def in_double(tree: Any) -> Any:
    """Every float leaf in float64; call it where x64 is enabled."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@jax.jit
def _eigenvalues(policy: Any, task: Task, s0: State):
    model = gauss_newton(policy, task, s0)
    if ravel_pytree(policy)[0].size <= DENSE:
        return jnp.linalg.eigvalsh(dense(model, policy, task))
    return lanczos(model.product, model.gradient, RANK).values
