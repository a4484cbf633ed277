"""The error of an agent's model k steps ahead: its rollouts against true ones under the same actions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from diffmbrl.agents.collect import Acting, Collected, Real
from diffmbrl.agents.learn import Learned
from diffmbrl.agents.protocol import Agent
from diffmbrl.core import State, Task
from diffmbrl.models.particles import ParticleDynamics

STEPS = 50  # ahead, at most
EPISODES = 4  # of each seed
PARTICLES = 20


def model_rollout_error(agent: Agent, system: Real, learned: Learned, keys: Key[Array, " S"]) -> dict[str, Any] | None:
    r"""Compare rollouts of an agent's model with true rollouts of `agent.best`, from the same starts under the same actions.

    $$e_k = \sqrt{\tfrac1n \sum_i ((\hat s_i - s_i) / \sigma_i)^2}$$

    $\hat s$ is the particles' mean k steps ahead, $\sigma$ the standard deviations of the states in the buffer.

    Args:
        agent: The agent.
        system: The system that it has learned from.
        learned: The result of `learn`.
        keys: The keys of the seeds that were given to `learn`, shape [S].

    Returns:
        `error` [S, H], the median of $e_k$ over a few episodes, and `spread` [S, H], the particles' own deviation in the same
        units; both are NaN once no episode continues. `s` [h+1, n] is a true trajectory of the first seed, and `low`,
        `middle` and `high` are the 5%, 50% and 95% quantiles of the particles. None for an agent without a model.

    Cost: 4 episodes of at most 50 steps of each seed, and 20 rollouts of the model for each.
    """
    first = jax.tree.map(lambda x: x[0], learned.carry)
    if jax.eval_shape(lambda carry: agent.model(carry, system.view), first) is None:
        return None
    episodes, draws = system.ready(_episodes, agent, system, learned.carry, keys)(agent, system, learned.carry, keys)
    found = _rollouts(agent, system.view, learned.carry, episodes, draws)
    true, predicted, going = (np.asarray(x, np.float64) for x in found)
    scale = _scales(learned)[:, None, None, :]
    with np.errstate(invalid="ignore", over="ignore"):
        error = (predicted.mean(axis=3) - true[:, :, 1:]) / scale
        error = np.sqrt(np.mean(error**2, axis=-1))
        spread = np.sqrt(np.mean((predicted.std(axis=3) / scale) ** 2, axis=-1))
        length = max(1, int(going[0, 0].sum()))
        drawn = np.quantile(predicted[0, 0, :length], [0.05, 0.5, 0.95], axis=1)
    start = true[0, 0, :1]
    low, middle, high = (np.concatenate([start, x]) for x in drawn)
    shown = {"s": true[0, 0, : length + 1], "low": low, "middle": middle, "high": high}
    return {"error": _median(error, going), "spread": _median(spread, going)} | shown


@jax.jit
def _episodes(
    agent: Agent, system: Real, carries: PyTree, keys: Key[Array, " S"]
) -> tuple[Collected, Key[Array, " S"]]:
    """The first steps of `agent.best` from each of a few starts, and keys for the model."""
    key_begin, key_act, key_model = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 3), 3))(keys).T
    who = Acting(agent, system.view, "best")
    places = system.begin(who, carries, key_begin, EPISODES, jnp.zeros(keys.shape, jnp.int32))
    return system.collect(who, carries, places, key_act, steps=min(STEPS, system.horizon))[1], key_model


@jax.jit
def _rollouts(
    agent: Agent, view: Task, carries: PyTree, found: Collected, keys: Key[Array, " S"]
) -> tuple[Array, Array, Array]:
    """True states [S, E, H+1, n], the particles' [S, E, H, P, n], and whether the first episode still continues [S, E, H]."""
    H = found.t.shape[2]

    def one(carry: PyTree, found: Collected, key: PRNGKeyArray):
        model = agent.model(carry, view)
        assert model is not None  # else there are no episodes to compare it with
        steps, cloud = found.steps, ParticleDynamics(model, None)

        def ahead(s: State, a: Array, key: PRNGKeyArray) -> Array:
            s0 = jax.tree.map(lambda x: jnp.broadcast_to(x[0], (PARTICLES, *x.shape[1:])), s)

            def step(s, inputs):
                t, a = inputs
                s = cloud(s, a, key=jax.random.fold_in(key, t))
                return s, _flat(s, 1)

            return jax.lax.scan(step, s0, (jnp.arange(H, dtype=jnp.int32), a))[1]

        predicted = jax.vmap(ahead)(steps.s, steps.a, jax.random.split(key, EPISODES))
        true = jnp.concatenate([_flat(steps.s, 2)[:, :1], _flat(steps.s_next, 2)], axis=1)
        ended = steps.last.astype(jnp.int32)
        going = (jnp.cumsum(ended, axis=1) - ended == 0) & found.keep
        return true, predicted, going

    return jax.vmap(one)(carries, found, keys)


def _flat(states: State, axes: int) -> Array:
    """States with `axes` leading axes as vectors [..., n]."""
    return jnp.concatenate([x.reshape(*x.shape[:axes], -1) for x in jax.tree.leaves(states)], axis=-1)


def _scales(learned: Learned) -> np.ndarray:
    """Standard deviation of each state variable in each seed's buffer [S, n]; 1 for one that does not change."""
    states = np.asarray(_flat(learned.buffer.rows.s, 2), np.float64)
    sizes = np.asarray(learned.buffer.size)
    std = np.stack([x[:size].std(axis=0) for x, size in zip(states, sizes, strict=True)])
    return np.where(std > 0, std, 1.0)


def _median(values: np.ndarray, going: np.ndarray) -> np.ndarray:
    """Median over the episodes that continue, [S, E, H] -> [S, H]; a non-finite value counts as infinity."""
    out = np.full((values.shape[0], values.shape[2]), np.nan)
    for i, t in np.ndindex(*out.shape):
        seen = values[i, going[i, :, t] > 0, t]
        if seen.size:
            out[i, t] = np.median(np.where(np.isfinite(seen), seen, np.inf))
    return out
