r"""Policies `a = pi(s)`, and plans, which are policies with a leading time axis.

The leaves of a policy are its parameters theta; features and action limits, which are not learned, are static.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, is_concrete, is_plan
from diffmbrl.nets import MLP


class Linear(eqx.Module):
    r"""A linear policy $a = K s + b$ on the flattened state.

    Args:
        K: Gains, shape [m, n].
        b: Offset, shape [m].

    >>> from diffmbrl import tasks
    >>> Linear.zeros(tasks.lqr()).K.shape
    (1, 2)
    """

    K: Float[Array, "m n"]
    b: Float[Array, " m"]

    @classmethod
    def zeros(cls, task: Task) -> "Linear":
        """The policy a = 0."""
        dtype = task.a_low.dtype
        return cls(jnp.zeros((task.m, task.n), dtype), jnp.zeros(task.m, dtype))

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        return self.K @ ravel_pytree(s)[0] + self.b


class Neural(eqx.Module):
    r"""A network on the task's features, squashed into the action limits: $a = c + h\tanh(\mathrm{net}(\mathrm{features}(s)))$.

    `c` and `h` are the centre and half width of the limits; actions without limits are not squashed. Made by `Neural.init`.

    Args:
        net: The network, from [k] features to [m] numbers.
        features: The task's features, s -> [k], without leaves.
        low: Lower action limits, m numbers.
        high: Upper action limits, m numbers.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.cartpole_balance()
    >>> policy = Neural.init(task, hidden=[16, 16], key=jax.random.key(0))
    >>> policy(task.initial(jax.random.key(1))).shape
    (1,)
    """

    net: MLP
    features: Callable
    low: tuple[float, ...] = eqx.field(static=True)
    high: tuple[float, ...] = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        task: Task,
        *,
        key: PRNGKeyArray,
        hidden: Sequence[int] = (32, 32),
        output_scale: float = 0.1,
        activation: Callable = jnp.tanh,
    ) -> "Neural":
        """Draw the weights of a network for a task.

        Args:
            task: Gives the features, the action limits and the sizes of input and output.
            key: The random key.
            hidden: Sizes of the hidden layers.
            output_scale: Factor on the weights of the last layer; small, so that first actions are near the centre.
            activation: Activation function of the hidden layers.

        Returns:
            The policy.

        Raises:
            ValueError: If an action is limited on one side only, the features have more than one axis, or they have leaves.
        """
        low, high = np.asarray(task.a_low), np.asarray(task.a_high)
        if np.any(np.isfinite(low) != np.isfinite(high)):
            raise ValueError(
                f"task '{task.name}' limits an action on one side only: {low} to {high}; limit both or none"
            )
        inputs = jax.eval_shape(task.features, task.state_shape).shape
        if len(inputs) != 1:
            raise ValueError(f"the features of task '{task.name}' have shape {list(inputs)}; expected one axis")
        if leaves := jax.tree.leaves(task.features):
            raise ValueError(
                f"the features of task '{task.name}' have {len(leaves)} leaves, which would be learned with the policy's "
                "weights; make them a function of the state alone, or their numbers static"
            )
        net = MLP.init(inputs[0], hidden, task.m, key=key, activation=activation, output_scale=output_scale)
        return cls(net, task.features, tuple(low.tolist()), tuple(high.tolist()))

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        return squash(self.net(self.features(s)), np.asarray(self.low), np.asarray(self.high))


class Gaussian(eqx.Module):
    r"""Reparameterised noise around any policy: $a = \mu(s) + e^{\log\sigma} \epsilon$, $\epsilon \sim N(0, I)$.

    Without a key it returns its mean. The noise is added after any squashing and is not clipped. Around a plan it is a plan.

    Args:
        mean: The policy mu.
        log_std: Logarithm of the standard deviation, shape [m], or [T, m] around a plan.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.lqr()
    >>> Gaussian.around(Linear.zeros(task), task, std=0.1).log_std.shape
    (1,)
    """

    mean: Policy
    log_std: Float[Array, "*T m"]

    @classmethod
    def around(cls, mean: Policy, task: Task, *, std: float) -> "Gaussian":
        """Add noise of one standard deviation to all actions of a policy.

        Args:
            mean: The policy mu.
            task: Gives the number of actions and, for a plan, of steps.
            std: The standard deviation, in the units of the actions.

        Returns:
            The stochastic policy.

        Raises:
            ValueError: If `std` is not positive.
        """
        if not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        shape = (task.horizon, task.m) if is_plan(mean) else (task.m,)
        return cls(mean, jnp.full(shape, np.log(std), task.a_low.dtype))

    @property
    def is_plan(self) -> bool:
        """Whether the mean is a plan."""
        return is_plan(self.mean)

    def log_prob(self, s: State, a: Float[Array, " m"]) -> Float[Array, ""]:
        r"""$\log\pi(a \mid s) = -\sum_j \tfrac12 ((a_j - \mu_j(s)) / \sigma_j)^2 + \log\sigma_j + \tfrac12 \log 2\pi$."""
        z = (a - self.mean(s)) * jnp.exp(-self.log_std)
        return -jnp.sum(0.5 * z**2 + self.log_std + 0.5 * np.log(2 * np.pi))

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        mean = self.mean(s)
        if key is None:
            return mean
        return mean + jnp.exp(self.log_std) * jax.random.normal(key, mean.shape, mean.dtype)


class OpenLoop(eqx.Module):
    r"""A plan $a_t$ that does not depend on the state.

    Args:
        a: Actions, shape [T, m].

    >>> from diffmbrl import tasks
    >>> OpenLoop.zeros(tasks.lqr(horizon=20)).a.shape
    (20, 1)
    """

    a: Float[Array, "*T m"]
    is_plan: ClassVar[bool] = True

    @classmethod
    def zeros(cls, task: Task) -> "OpenLoop":
        """The task's resting action at every step: 0, or the centre of the limits."""
        return cls(jnp.tile(resting_action(task), (task.horizon, 1)))

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        return self.a


class Affine(eqx.Module):
    r"""A plan with feedback, as iLQR returns it: $a_t = \bar a_t + K_t (s - \bar s_t)$ on flat states.

    Args:
        K: Gains, shape [T, m, n].
        a: Nominal actions, shape [T, m].
        s: Nominal states, shape [T, n].
        low: Lower limits to which actions are clipped, m numbers; None for no limits.
        high: Upper limits, m numbers.

    >>> from diffmbrl import tasks
    >>> Affine.zeros(tasks.lqr(horizon=20)).K.shape
    (20, 1, 2)
    >>> Affine.with_limits(tasks.cartpole_balance(horizon=20)).high
    (10.0,)
    """

    K: Float[Array, "*T m n"]
    a: Float[Array, "*T m"]
    s: Float[Array, "*T n"]
    low: tuple[float, ...] | None = eqx.field(static=True, default=None)
    high: tuple[float, ...] | None = eqx.field(static=True, default=None)
    is_plan: ClassVar[bool] = True

    @classmethod
    def zeros(cls, task: Task) -> "Affine":
        """The task's resting action at every step, without feedback and without limits."""
        T, m, n, dtype = task.horizon, task.m, task.n, task.a_low.dtype
        return cls(jnp.zeros((T, m, n), dtype), jnp.tile(resting_action(task), (T, 1)), jnp.zeros((T, n), dtype))

    @classmethod
    def with_limits(cls, task: Task) -> "Affine":
        """The plan of `zeros`, whose actions are clipped to the task's limits.

        Args:
            task: The task, whose limits must be known now: they are static.

        Returns:
            The plan.

        Raises:
            ValueError: If the limits are traced.
        """
        if not is_concrete(task.a_low, task.a_high):
            raise ValueError("the limits of a plan are static: make it outside jit, or pass it in")
        low, high = np.asarray(task.a_low).tolist(), np.asarray(task.a_high).tolist()
        zeros = cls.zeros(task)
        return cls(zeros.K, zeros.a, zeros.s, tuple(low), tuple(high))

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        x = s if isinstance(s, jax.Array) and s.ndim == 1 else ravel_pytree(s)[0]
        # Multiply and sum rather than a matrix product: it fuses into the scan's step, which is then several times faster.
        a = self.a + jnp.sum(self.K * (x - self.s), axis=-1)
        if self.low is None or self.high is None:
            return a
        return jnp.clip(a, jnp.asarray(self.low, a.dtype), jnp.asarray(self.high, a.dtype))


def squash(z: Float[Array, " m"], low: ArrayLike, high: ArrayLike) -> Float[Array, " m"]:
    r"""Squash into limits: $c + h\tanh z$, c their centre and h their half width; z itself where they are infinite."""
    finite = np.isfinite(low) & np.isfinite(high)
    if not finite.any():
        return z
    centre, half = (x.astype(z.dtype) for x in centre_and_half(low, high, of=np))
    squashed = jnp.tanh(z) * half + centre
    return squashed if finite.all() else jnp.where(finite, squashed, z)


def centre_and_half(low: Any, high: Any, *, of: Any = jnp) -> tuple[Any, Any]:
    """Centre and half width of the limits of each action, 0 and 1 for an action without; `of` is numpy for known limits."""
    finite = of.isfinite(low) & of.isfinite(high)
    low, high = of.where(finite, low, -1), of.where(finite, high, 1)
    return (low + high) / 2, (high - low) / 2


def resting_action(task: Task) -> Float[Array, " m"]:
    """0 where an action is unlimited, the centre of its limits elsewhere."""
    return centre_and_half(task.a_low, task.a_high)[0]
