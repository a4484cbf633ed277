r"""Rules for the adjoint $\lambda_t = dJ/ds_t$ of backpropagation through time: truncated, clipped, decayed.

A rule is a module `(t, lambda_t) -> lambda_t` that the reverse pass applies once a step, at the states that enter steps
1 to T - 1:

$$\lambda_t = \mathrm{rule}\big(t,\; w_t \nabla_s r_t + (A_t + B_t K_t)^\top \lambda_{t+1} + K_t^\top w_t \nabla_a r_t\big)$$

`BPTT(adjoint=rule)` is the estimator. The derivative of each reward by its own action, and of the terminal reward by the last
one, does not pass through the rule. None of the three changes the return, and all are biased. Their numbers are leaves, so a
sweep over k is a `vmap`. Any other callable module of this signature can be used.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from diffmbrl.core import State, as_float, is_concrete


class Truncated(eqx.Module):
    r"""Adjoint rule that stops the gradient at every k-th state: $\lambda_t \leftarrow 0$ where k divides t.

    Rewards reach back to the start of their window of k steps. With k = 1 an action answers only for its own reward; with
    $k \ge T$ this is BPTT. The windows are fixed (0 to k - 1, k to 2k - 1, ...), as in truncated BPTT for recurrent networks.

    Args:
        every: The window's length k in steps.

    Raises:
        ValueError: If `every` is not a whole number of at least 1.

    Reference: Williams and Peng 1990; Metz et al. 2021, Gradients are not all you need, section 4.

    >>> import jax
    >>> from diffmbrl import BPTT, Neural, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> key = jax.random.key(0)
    >>> J, gradient = BPTT(Truncated(every=5))(Neural.init(task, key=key), task, task.starts(key, 4), None)
    >>> J.shape
    ()
    """

    every: Int[Array, ""]

    def __init__(self, every: int | float | Array):
        if is_concrete(every) and not (jnp.issubdtype(jnp.result_type(every), jnp.integer) and every >= 1):
            raise ValueError(f"every must be a whole number of steps of at least 1, got {every}")
        self.every = jnp.asarray(every, jnp.int32)

    def __call__(self, t: Int[Array, ""], adjoint: State) -> State:
        # Not a multiplication by 0, so that an infinite adjoint is stopped as well.
        ends = t % self.every.astype(t.dtype) == 0
        return jax.tree.map(lambda x: jnp.where(ends, jnp.zeros_like(x), x), adjoint)


class Clipped(eqx.Module):
    r"""Adjoint rule that clips the norm to at most c: $\lambda_t \leftarrow \lambda_t \min(1, c / |\lambda_t|)$.

    Clipping the gradient (`optimizers.clipped`) keeps its direction, which one exploded adjoint may dominate; this rule bounds
    each step's share before it is multiplied by more Jacobians. With an infinite c this is BPTT.

    Args:
        norm: The bound c on the norm over the whole state, whose parts should have comparable units.

    Raises:
        ValueError: If `norm` is not positive.

    Reference: the recurrent form of gradient clipping, Pascanu et al. 2013, section 3.2.

    >>> Clipped(1.0)(jnp.int32(3), jnp.array([3.0, 4.0])).tolist()
    [0.6000000238418579, 0.800000011920929]
    """

    norm: Float[Array, ""]

    def __init__(self, norm: int | float | Array):
        if is_concrete(norm) and not norm > 0:
            raise ValueError(f"norm must be positive (infinite: no clipping), got {norm}")
        self.norm = as_float(norm)

    def __call__(self, t: Int[Array, ""], adjoint: State) -> State:
        length = optax.tree.norm(adjoint)
        bound = self.norm.astype(length.dtype)
        factor = jnp.where(length > bound, bound / length, jnp.ones_like(length))
        return jax.tree.map(lambda x: factor.astype(x.dtype) * x, adjoint)


class Decayed(eqx.Module):
    r"""Adjoint rule that decays the gradient at each step: $\lambda_t \leftarrow \gamma \lambda_t$.

    A reward j steps later counts $\gamma^j$ as much in an action's gradient: the credit is discounted, not the return. The
    gradient is bounded for every T while $\gamma \rho < 1$, with $\rho$ the growth of the closed loop per step.

    Args:
        factor: The decay gamma, in [0, 1]: 1 is BPTT, 0 is `Truncated(1)`.

    Raises:
        ValueError: If `factor` is not in [0, 1].

    Reference: Bengio, Frasconi and Simard 1994 for why products of Jacobians need it; the discount of generalised advantage
    estimation (Schulman et al. 2016) acts on the score function in the same way.

    >>> Decayed(0.5)(jnp.int32(3), jnp.array([3.0, 4.0])).tolist()
    [1.5, 2.0]
    """

    factor: Float[Array, ""]

    def __init__(self, factor: int | float | Array):
        if is_concrete(factor) and not 0 <= factor <= 1:
            raise ValueError(f"factor must be from 0 to 1, got {factor}")
        self.factor = as_float(factor)

    def __call__(self, t: Int[Array, ""], adjoint: State) -> State:
        return jax.tree.map(lambda x: self.factor.astype(x.dtype) * x, adjoint)
