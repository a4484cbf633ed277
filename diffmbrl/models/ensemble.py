r"""An ensemble of dynamics: one module whose leaves have a leading axis of members, and how uncertainty is propagated.

With E members $f_e$ and particles p, each of which is a state under the same actions (Chua et al. 2018, section 4.2):
* `Mean`: $s' = \tfrac1E \sum_e f_e(s, a)$;
* `TS1`: each particle draws a new member at every step, each member equally often among the particles;
* `TSInfinity`: particle p uses member $p \bmod E$ for the whole rollout, so the members' futures stay separate.

The draws for a particle depend on the key of the step alone, so sequences of actions that are compared under one key
meet the same members and the same noise.
"""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from diffmbrl.core import Dynamics, State


@runtime_checkable
class Propagation(Protocol):
    """How one state, or P particles together, pass through the members of an ensemble."""

    def one(self, members: Dynamics, s: State, a: Array, key: PRNGKeyArray | None) -> State: ...

    def many(self, members: Dynamics, s: State, a: Array, key: PRNGKeyArray | None) -> State: ...


class Mean(eqx.Module):
    """Propagation to the mean of the members' next states; each member draws its own noise."""

    def one(self, members: Dynamics, s: State, a: Float[Array, " m"], key: PRNGKeyArray | None) -> State:
        keys = None if key is None else jax.random.split(key, size(members))
        step = jax.vmap(lambda f, k: f(s, a, key=k), in_axes=(0, None if key is None else 0))
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), step(members, keys))

    def many(self, members: Dynamics, s: State, a: Float[Array, " m"], key: PRNGKeyArray | None) -> State:
        keys = None if key is None else jax.random.split(key, particle_count(s))
        in_axes = (0, None if key is None else 0)
        return jax.vmap(lambda s, k: self.one(members, s, a, k), in_axes=in_axes)(s, keys)


class TS1(eqx.Module):
    """Propagation through a new random member at every step, or through the mean of the members if there is no key."""

    def one(self, members: Dynamics, s: State, a: Float[Array, " m"], key: PRNGKeyArray | None) -> State:
        if key is None:
            return Mean().one(members, s, a, None)
        key_member, key_noise = jax.random.split(key)
        e = jax.random.randint(key_member, (), 0, size(members))
        return member(members, e)(s, a, key=key_noise)

    def many(self, members: Dynamics, s: State, a: Float[Array, " m"], key: PRNGKeyArray | None) -> State:
        if key is None:
            return Mean().many(members, s, a, None)
        key_member, key_noise = jax.random.split(key)
        order = jax.random.permutation(key_member, slots(members, s))
        return grouped(members, s, a, key_noise, order)


class TSInfinity(eqx.Module):
    """Propagation through one member for the whole rollout: particle p uses member p mod E; a single state has no member."""

    def one(self, members: Dynamics, s: State, a: Float[Array, " m"], key: PRNGKeyArray | None) -> State:
        raise ValueError(
            "TSInfinity keeps a member for a whole rollout, which a single state cannot know: roll out "
            "particles(task, count) from replicate_start(s0, task, count), or one member, ensemble.member(e)"
        )

    def many(self, members: Dynamics, s: State, a: Float[Array, " m"], key: PRNGKeyArray | None) -> State:
        if particle_count(s) < size(members):
            raise ValueError(
                f"TSInfinity needs at least one particle for each of {size(members)} members, got {particle_count(s)}"
            )
        return grouped(members, s, a, key, slots(members, s))


class Ensemble(eqx.Module):
    r"""Several dynamics as one, which rollouts, iLQR and gradient methods use like any other dynamics.

    `models.particles(task, P)` makes the task of P particles, in which each member steps its own group of particles.

    Args:
        members: Dynamics whose every leaf has a leading axis E: models drawn under `vmap`, or analytic dynamics
            with several masses.
        propagation: How a state passes through the members: `Mean()` (default), `TS1()` or `TSInfinity()`.

    Raises:
        ValueError: If the leaves have no common leading axis.

    Cost: E members per state with `Mean`, one otherwise.
    Reference: Chua et al. 2018, section 4.2.

    >>> import jax
    >>> from diffmbrl import rollout, tasks, OpenLoop
    >>> from diffmbrl.models import NetworkDynamics
    >>> task = tasks.lqr(horizon=5)
    >>> members = jax.vmap(lambda k: NetworkDynamics.init(task, hidden=[8], key=k))(jax.random.split(jax.random.key(0), 3))
    >>> f = Ensemble(members, TS1())
    >>> f.size, f(jax.numpy.ones(2), jax.numpy.ones(1), key=jax.random.key(1)).shape
    (3, (2,))
    """

    members: Dynamics
    propagation: Propagation

    def __init__(self, members: Dynamics, propagation: Propagation | None = None):
        axes = {leaf.shape[:1] for leaf in jax.tree.leaves(members)}
        if len(axes) != 1 or () in axes:
            found = ", ".join(sorted(str(list(leaf.shape)) for leaf in jax.tree.leaves(members)))
            raise ValueError(f"every leaf of an ensemble needs the same leading axis of members, got shapes {found}")
        self.members = members
        self.propagation = Mean() if propagation is None else propagation

    @property
    def size(self) -> int:
        """Number of members."""
        return size(self.members)

    def member(self, e: int | Int[Array, ""]) -> Dynamics:
        """Return the dynamics of one member."""
        return member(self.members, e)

    def __call__(self, s: State, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> State:
        return self.propagation.one(self.members, s, a, key)

    def many(self, s: State, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> State:
        """Step P particles [P, ...] together under one action."""
        return self.propagation.many(self.members, s, a, key)


def size(members: PyTree) -> int:
    """Number of members."""
    return jax.tree.leaves(members)[0].shape[0]


def member(members: PyTree, e: int | Int[Array, ""]) -> Any:
    """Return member e."""
    return jax.tree.map(lambda x: x[e], members)


def elites(members: PyTree, holdout: Float[Array, " E"], number: int) -> Any:
    """Select the members of the lowest hold-out error.

    Args:
        members: Models whose every leaf has a leading axis E.
        holdout: Hold-out error of each member, shape [E], as in `Curves.holdout`.
        number: Number of members to select.

    Returns:
        The selected members, the best first; a member whose error is NaN counts as the worst.

    Raises:
        ValueError: If `number` is not from 1 to E.
    """
    if not 1 <= number <= holdout.shape[0]:
        raise ValueError(f"elites are 1 to {holdout.shape[0]} of {holdout.shape[0]} members, got {number}")
    best = jnp.argsort(holdout)[:number]
    return jax.tree.map(lambda x: x[best], members)


def disagreement(ensemble: Ensemble, s: State, a: Float[Array, " m"]) -> Float[Array, ""]:
    r"""Disagreement of learned members at (s, a), relative to the scale of the changes in their data.

    $$\Big[\tfrac1n \sum_i \mathrm{Var}_e\big(f_e(s, a)_i\big) / \sigma_{\Delta,i}^2\Big]^{1/2}$$

    The mean is over the n state variables that changed in the data.

    Args:
        ensemble: Ensemble of learned dynamics with a common normaliser.
        s: State, shape [n].
        a: Action, shape [m].

    Returns:
        The disagreement, shape []; 1 is as much as a typical step. Noise of the members does not count.
    """
    s_next = jax.vmap(lambda f: f(s, a))(ensemble.members)
    normalizer = member(ensemble.members, 0).normalizer
    spread = normalizer.average(jnp.var(s_next, axis=0) / jnp.where(normalizer.varies, normalizer.scale, 1) ** 2)
    # The root has no derivative where members agree; 0 is used instead.
    return jnp.where(spread > 0, jnp.sqrt(jnp.where(spread > 0, spread, 1)), 0)


def particle_count(s: State) -> int:
    """Number of particles."""
    return jax.tree.leaves(s)[0].shape[0]


def slots(members: Dynamics, s: State) -> Int[Array, " slots"]:
    """Numbers of the slots: one per particle, and as many more as give each member an equal number."""
    return jnp.arange(-(-particle_count(s) // size(members)) * size(members), dtype=jnp.int32)


def grouped(
    members: Dynamics, s: State, a: Float[Array, " m"], key: PRNGKeyArray | None, order: Int[Array, " slots"]
) -> State:
    """Step the particles in groups: slot i belongs to member i mod E, and particle p takes slot `order[p]`.

    A member is applied to its whole group, so that a layer is one matrix product for the group and for the groups of all
    sequences that are scored together; the members run one after another, so that activations stay in a core's cache. Slots
    beyond the number of particles repeat the first particle and are dropped.
    """
    E, P, total = size(members), particle_count(s), order.shape[0]
    particle = jnp.arange(total, dtype=jnp.int32)
    held = jnp.zeros_like(particle).at[order].set(jnp.where(particle < P, particle, 0))
    keys = None if key is None else jax.random.split(key, total).reshape(total // E, E).T

    def group(x):
        return jnp.swapaxes(x[held].reshape(total // E, E, *x.shape[1:]), 0, 1)

    def step(args):
        f, s, k = args
        return jax.vmap(lambda s, k: f(s, a, key=k), in_axes=(0, None if k is None else 0))(s, k)

    out = jax.lax.map(step, (members, jax.tree.map(group, s), keys))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(total, *x.shape[2:])[order[:P]], out)
