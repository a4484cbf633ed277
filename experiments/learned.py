"""Data of random actions, and models fitted to them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffmbrl.core import Task
from diffmbrl.models.buffer import Transition

HELD = 5  # steps for which a random action stays


@partial(jax.jit, static_argnames=("episodes", "length"))
def random_windows(task: Task, key: Any, *, episodes: int, length: int) -> Transition:
    """[episodes, length] from the task's starts. Actions lie evenly within the limits, or within +-4 where there are none."""
    key_s, key_a = jax.random.split(key)
    s0 = task.starts(key_s, episodes)
    u = jax.random.uniform(key_a, (episodes, -(-length // HELD), task.m), minval=-1, maxval=1)
    bounded = jnp.isfinite(task.a_high)
    a = jnp.where(bounded, u * jnp.where(bounded, task.a_high, 1), 4 * u).repeat(HELD, axis=1)[:, :length]

    def follow(s, a):
        def step(s, a):
            s_next = task.dynamics(s, a)
            return s_next, (s, s_next)

        return jax.lax.scan(step, s, a)[1]

    s, s_next = jax.vmap(follow)(s0, a)
    r = jax.vmap(jax.vmap(task.reward))(s, a)
    no = jnp.zeros(r.shape, bool)
    return Transition(s, a, r, s_next, no, no)


def annealed_adam(rate: Any, steps: int) -> optax.GradientTransformation:
    """Adam, its rate falling to 0 along a cosine over so many updates."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))
