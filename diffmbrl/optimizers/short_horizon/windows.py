r"""Environments that continue from window to window, and the objective of one window as a function of the policy.

The windows of an episode are h steps long; the critic's value stands for the later rewards. An episode ends at the horizon T,
with the terminal reward, or when `task.done`, without it. The environment then continues from the next start, also inside a
window.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, reweighted, where
from diffmbrl.optimizers.short_horizon.critic import inputs
from diffmbrl.optimizers.short_horizon.cuts import stiffness
from diffmbrl.optimizers.short_horizon.exploration import Entropy, StateNoise, acted
from diffmbrl.rollout import is_done, step_keys, terminal_reward, transition, weights_axis


class Environments(NamedTuple):
    """The positions of N environments.

    Args:
        s: Their states, shape [N, ...].
        t: Step of the episode, shape [N].
        start: Number of the start state of the episode, shape [N].
    """

    s: State
    t: Int[Array, "*N"]
    start: Int[Array, "*N"]


class Steps(NamedTuple):
    """The steps of a window for the fits of the critic, the temperature and the horizon; [N, h] each.

    Args:
        x: The critic's inputs before the step, shape [N, h, k].
        r: Reward of the critic's regression: weighted, with the entropy bonus and the terminal reward.
        ended: Whether the episode ended with this step.
        value_next: The critic's value after the step.
        excess: Entropy above its target; None without an entropy bonus.
        stiffness: Stiffness of the step; None with a fixed horizon.
    """

    x: Float[Array, "*N h k"]
    r: Float[Array, "*N h"]
    ended: Bool[Array, "*N h"]
    value_next: Float[Array, "*N h"]
    excess: Float[Array, "*N h"] | None
    stiffness: Float[Array, "*N h"] | None


def start_environments(s0: State, count: int, task: Task, *, staggered: bool = True) -> Environments:
    """Place environments on the start states in turn.

    Args:
        s0: Start states, shape [B, ...].
        count: Number of environments N.
        task: The task.
        staggered: Whether environment i begins at step i T / N of its first episode, so that every window covers all parts of
            an episode; otherwise all begin at step 0, and the fits would see one part after another and forget the others.

    Returns:
        The environments.
    """
    number = jnp.arange(count, dtype=jnp.int32)
    start = number % jax.tree.leaves(s0)[0].shape[0]
    t = number * task.horizon // count if staggered else jnp.zeros_like(number)
    return Environments(jax.tree.map(lambda x: x[start], s0), t, start)


def window(
    policy: Policy,
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
    r"""The objective of one window, the mean over environments of the sum over the segments k of a window.

    $$\sum_k \Big[\sum_{l<h_k} \gamma^l w\,r_l + \gamma^{h_k} V_k\Big]$$

    A segment ends with its episode, where $V_k = w_T \phi(s_T)$ at the horizon and 0 if the task is done; or else where `reach`
    cuts it or with the window, where $V_k$ is the critic's value. With the policy's true value and $\gamma = 1$ the gradient,
    summed over the windows of an episode, is that of J.

    Args:
        policy: The policy.
        task: The task.
        s0: Start states, shape [B, ...].
        environments: Positions of N environments at the beginning of the window.
        value: The critic, a function of its inputs (`critic.inputs`).
        length: Steps of the window.
        discount: gamma within a segment.
        key: Key of the noise; environment i uses key i of N. None for no noise.
        spread: Exploration noise that depends on the state; None for the policy's own.
        epsilon: Standard normal draws of the exploration noise, shape [N, h, m].
        entropy: Entropy bonus; None for no bonus.
        log_temperature: Log weight of the entropy bonus.
        reach: Rule that ends a segment early; None for segments as long as the window.
        reach_state: State of that rule.

    Returns:
        The objective, the environments after the window, and its steps (without a gradient).
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
            over = is_done(task, s)  # A start may be beyond the end already.
            r = jnp.where(over, jnp.zeros_like(r), r)
            done = over | is_done(task, s_next)
            r = r + discount * terminal_reward(lambda s: w[-1] * task.terminal(s), s_next, timeout & ~done, first)
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
    """The first `count` starts (all if there are fewer), and the task with their weights."""
    if weights_axis(task, s0) is not None:
        task = reweighted(task, task.weights[:count])
    return task, jax.tree.map(lambda x: x[:count], s0)
