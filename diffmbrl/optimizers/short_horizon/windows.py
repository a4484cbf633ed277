r"""Environments that step on from window to window, and the objective of one window, a function of the policy.

The windows of an episode are h steps long; what comes after is the critic's value. An episode ends at the horizon T, with the
terminal reward, or when `task.done`, with nothing, and the environment goes on from the next start: inside a window, if that
is where it ends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import State, Task, reweighted, where
from diffmbrl.optimizers.short_horizon.critic import inputs
from diffmbrl.optimizers.short_horizon.cuts import stiffness
from diffmbrl.optimizers.short_horizon.exploration import Entropy, StateNoise, acted
from diffmbrl.rollout import is_done, step_keys, terminal_reward, transition, weights_axis


class Environments(NamedTuple):
    """Where N environments are: their states, the step of the episode, and which start it began from."""

    s: State  # [N, ...]
    t: Int[Array, "*N"]
    start: Int[Array, "*N"]


class Steps(NamedTuple):
    """What the steps of a window leave for the critic, the temperature and the horizon; [N, h] each."""

    x: Float[Array, "*N h k"]  # the critic's inputs before the step
    r: Float[
        Array, "*N h"
    ]  # reward as the critic counts it: weighted, with the price of entropy and the terminal reward
    ended: Bool[Array, "*N h"]  # the episode ended with this step
    value_next: Float[Array, "*N h"]  # the critic's value after it
    excess: Float[Array, "*N h"] | None  # entropy above its target
    stiffness: Float[Array, "*N h"] | None


def start_environments(s0: State, count: int, task: Task, *, staggered: bool = True) -> Environments:
    """`count` environments from the starts `s0` [B, ...] in turn, the i-th at step i T / count of its first episode.

    So every window sees all parts of an episode, the critic's as well as the policy's: in step they would see one after another
    and forget the rest. Not `staggered` they all begin at 0.
    """
    number = jnp.arange(count, dtype=jnp.int32)
    start = number % jax.tree.leaves(s0)[0].shape[0]
    t = number * task.horizon // count if staggered else jnp.zeros_like(number)
    return Environments(jax.tree.map(lambda x: x[start], s0), t, start)


def window(
    policy: Any,
    task: Task,
    s0: State,
    environments: Environments,
    value: Callable[[Float[Array, " k"]], Float[Array, ""]],
    *,
    length: int,
    discount: Float[Array, ""],
    key: PRNGKeyArray | None = None,
    spread: StateNoise | None = None,
    epsilon: Float[Array, "N h m"] | None = None,
    entropy: Entropy | None = None,
    log_temperature: Float[Array, ""] | None = None,
    reach: Any = None,
    reach_state: Any = None,
) -> tuple[Float[Array, ""], tuple[Environments, Steps]]:
    r"""The mean over environments of $\sum_k [\sum_{l<h_k} \gamma^l w\,r_l + \gamma^{h_k} V_k]$, `length` steps in segments k.

    A segment ends with its episode, $V_k = w_T \phi(s_T)$ at the horizon and 0 where the task is done; else where `reach` cuts
    it or with the window, $V_k = V(s, t)$, the critic's. With the policy's true value and $\gamma = 1$ its gradient, summed
    over the windows of an episode, is that of J. `value` takes the critic's inputs.
    Shapes: `s0` [B, ...]; `environments` [N, ...].
    """
    N = environments.t.shape[0]
    axis = weights_axis(task, s0)

    def one(env: Environments, k: PRNGKeyArray | None, eps: Float[Array, "h m"] | None):
        def step(carry, x):
            env, g, since = carry
            l, e = x
            w = task.weights if axis is None else task.weights[env.start]
            s, t = env.s, env.t
            key_a, key_s = step_keys(k, l)
            a, log_std = acted(policy, spread, task, s, e, key_a)
            r, s_next = transition(task, s, a, key_s)
            excess = None if entropy is None or log_std is None else entropy.excess(log_std)
            if entropy is not None and log_temperature is not None and log_std is not None:
                r = r + entropy.bonus(log_std, log_temperature)
            r = w[t] * r

            following = (env.start + N) % jax.tree.leaves(s0)[0].shape[0]
            first, again = (jax.tree.map(lambda y, i=i: y[i], s0) for i in (env.start, following))
            timeout = t + 1 >= task.horizon
            over = is_done(task, s)  # a start may be beyond the end already
            r = jnp.where(over, jnp.zeros_like(r), r)
            done = over | is_done(task, s_next)
            r = r + discount * (w[-1] * terminal_reward(task, s_next, timeout & ~done, first))
            ended = timeout | done
            after = Environments(
                where(ended, again, s_next),
                jnp.where(ended, 0, t + 1),
                jnp.where(ended, following, env.start),
            )

            stiff = None if reach is None else stiffness(task, s, a)
            cut = jnp.zeros((), bool) if reach is None else reach.cuts(reach_state, stiff, since)
            cut = (cut | (l == length - 1)) & ~ended
            carried = after._replace(s=where(cut, jax.lax.stop_gradient(after.s), after.s))
            fresh = cut | ended
            g_next = jnp.where(fresh, jnp.ones_like(g), g * discount)
            out = (s, t, r, ended, after.s, after.t, g, cut, excess, stiff)
            return (carried, g_next, jnp.where(fresh, 0, since + 1)), out

        ones = jnp.ones((), discount.dtype)
        steps = (jnp.arange(length, dtype=jnp.int32), eps)
        carry = (env, ones, jnp.zeros((), jnp.int32))
        carry, out = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, steps)
        s, t, r, ended, s_next, t_next, g, cut, excess, stiff = out
        V = jax.vmap(lambda s, t: value(inputs(task, s, t)))(s_next, t_next)
        objective = jnp.sum(g * (r + discount * jnp.where(cut, V, jnp.zeros_like(V))))
        x = jax.vmap(lambda s, t: inputs(task, s, t))(s, t)
        return objective, (carry[0], Steps(x, r, ended, V, excess, stiff))

    keys = None if key is None else jax.random.split(key, N)
    objective, out = jax.vmap(one)(environments, keys, epsilon)
    return jnp.mean(objective), jax.lax.stop_gradient(out)


def first_starts(task: Task, s0: State, count: int) -> tuple[Task, State]:
    """The first `count` starts, or all if there are fewer, and the task with their weights."""
    if weights_axis(task, s0) is not None:
        task = reweighted(task, task.weights[:count])
    return task, jax.tree.map(lambda x: x[:count], s0)
