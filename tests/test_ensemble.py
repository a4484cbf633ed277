"""Ensembles, particles and the planners that go through them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import ILQR, Affine, MultipleShooting, OpenLoop, OptaxSolver, episode_return, rollout, solve, tasks
from diffmbrl.models import (
    TS1,
    Ensemble,
    GaussianDynamics,
    Mean,
    NetworkDynamics,
    TSInfinity,
    particles,
    replicate_start,
)
from diffmbrl.planners import CEM, Sampling, Shooting, plan_returns
from tests.problems import bent, same

KEY = jax.random.key(0)
T, E = 6, 3
TASK = tasks.lqr(horizon=T)
PLAN = OpenLoop(0.3 * jnp.ones((T, 1)))
S0 = jnp.asarray([1.0, -0.5])


def draw(kind, count=E, equal=False):
    """Networks that differ, or copies of one."""
    keys = jax.random.split(KEY, count)
    if equal:
        keys = jnp.stack([keys[0]] * count)
    return jax.vmap(lambda key: kind.init(TASK, hidden=[5, 5], output_scale=0.5, key=key))(keys)


def through(dynamics, task=TASK):
    return eqx.tree_at(lambda t: t.dynamics, task, dynamics)


@pytest.mark.parametrize("propagation", [Mean(), pytest.param(TS1(), marks=pytest.mark.slow)])
def test_an_ensemble_of_equals_is_one(propagation):
    ensemble = Ensemble(draw(NetworkDynamics, equal=True), propagation)
    alone = episode_return(PLAN, through(ensemble.member(0)), S0)
    same(episode_return(PLAN, through(ensemble), S0, KEY), alone, rtol=1e-5)
    cloud = particles(through(ensemble), 5)
    same(episode_return(PLAN, cloud, replicate_start(S0, cloud, 5), KEY), alone, rtol=1e-5)


def test_the_mean_is_of_the_members_next_states():
    members = draw(NetworkDynamics)
    ensemble, a = Ensemble(members), jnp.ones(1)
    each = [ensemble.member(e)(S0, a) for e in range(E)]
    same(ensemble(S0, a), np.mean(each, axis=0), rtol=1e-6)
    # Without a key there is nothing to draw a member by.
    same(Ensemble(members, TS1())(S0, a), ensemble(S0, a))


@pytest.mark.parametrize("count", [E, 2 * E])
def test_members_kept_for_a_rollout_earn_their_mean(count):
    ensemble = Ensemble(draw(NetworkDynamics), TSInfinity())
    each = [episode_return(PLAN, through(ensemble.member(e)), S0) for e in range(E)]
    assert np.ptp(each) > 0.01
    task = through(ensemble)
    same(episode_return(PLAN, particles(task, count), replicate_start(S0, task, count), KEY), np.mean(each), rtol=1e-5)


@pytest.mark.parametrize("count", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (5, 7))])
def test_a_member_drawn_anew_is_drawn_evenly(count):
    """One step of members that add their own number: the particles show which they had."""
    members = jax.vmap(lambda e: tasks.lqr(mass=1.0 + e).dynamics)(jnp.arange(3, dtype=float))
    ensemble = Ensemble(members, TS1())
    s, a = replicate_start(S0, TASK, count), jnp.ones(1)
    each = np.stack([ensemble.member(e)(S0, a) for e in range(3)])
    found = []
    for k in range(20):
        moved = ensemble.many(s, a, key=jax.random.key(k))
        who = np.argmin(np.abs(each[:, 1] - np.asarray(moved)[:, 1, None]), axis=1)
        same(moved, each[who], rtol=1e-6)
        counts = np.bincount(who, minlength=3)
        assert counts.max() <= -(-count // 3)
        found.append(who)
    assert len({tuple(who) for who in found}) > 3
    same(ensemble.many(s, a, key=KEY), ensemble.many(s, a, key=KEY))


def test_particles_of_noisy_members_differ_and_follow_the_key():
    task = through(Ensemble(draw(GaussianDynamics), TS1()))
    cloud, s = particles(task, 4), replicate_start(S0, task, 4)
    one, again, other = (rollout(PLAN, cloud, s, jax.random.key(k)).s_T for k in (0, 0, 1))
    same(one, again)
    assert not np.any(one == other) and np.ptp(one[:, 0]) > 1e-3


def test_the_deviation_is_that_of_the_bent_logarithm(x64):
    """In closed form or by two softplus, far below its bounds, between them and far above; with its derivatives."""
    task = tasks.lqr()
    f = GaussianDynamics.init(task, hidden=[], key=jax.random.key(0), log_std=(-3.0, 0.5))
    f = eqx.tree_at(lambda f: f.normalizer.scale, f, jnp.asarray([2.0, 0.5]))

    def deviations(raw, f):
        net = eqx.tree_at(lambda net: net.biases[-1], f.net, jnp.concatenate([jnp.zeros(2), jnp.full(2, raw)]))
        f = eqx.tree_at(lambda f: f.net, f, net)
        s, a = jnp.zeros(2), jnp.zeros(1)
        return f.moments(s, a)[1], f.normalizer.scale * jnp.exp(f.heads(s, a)[1])

    for raw in (-40.0, -3.0, -1.0, 0.5, 2.0, 40.0):
        found, wanted = deviations(raw, f)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        found, wanted = jax.jacrev(deviations)(raw, f)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-15)


def test_gaussian_members_have_the_moments_they_say():
    f = GaussianDynamics.init(TASK, hidden=[5], key=KEY)
    mean, std = f.moments(S0, jnp.ones(1))
    s = jax.vmap(lambda k: f(S0, jnp.ones(1), key=k))(jax.random.split(KEY, 20_000))
    np.testing.assert_allclose(np.mean(s, axis=0), mean, atol=0.03)
    np.testing.assert_allclose(np.std(s, axis=0), std, rtol=0.03)
    same(f(S0, jnp.ones(1)), mean)


def test_each_particle_has_its_own_end():
    """Particles of a task that ends are separate rollouts of it, those that ended earn nothing more."""
    task = bent(ends=True)
    members = jax.vmap(lambda mass: eqx.tree_at(lambda f: f.mass, task.dynamics, mass))(jnp.asarray([0.1, 0.8, 5.0]))
    s0, plan = jnp.asarray([1.2, 0.2]), OpenLoop(0.6 * jnp.ones((8, 1)))
    ensemble = Ensemble(members, TSInfinity())
    alone = [rollout(plan, through(ensemble.member(e), task), s0) for e in range(3)]
    assert len({int(x.alive.sum()) for x in alone}) > 1
    ended = through(ensemble, task)
    each = [episode_return(plan, through(ensemble.member(e), task), s0) for e in range(3)]
    same(episode_return(plan, particles(ended, 3), replicate_start(s0, ended, 3), KEY), np.mean(each), rtol=1e-5)


def test_every_sequence_meets_the_same_members_and_noise():
    task = through(Ensemble(draw(GaussianDynamics), TS1()))
    a = jnp.stack([PLAN.a, PLAN.a, -PLAN.a])
    J, _ = plan_returns(a, particles(task, 4), replicate_start(S0, task, 4), KEY)
    same(J[0], J[1])
    alone = episode_return(PLAN, particles(task, 4), replicate_start(S0, task, 4), KEY)
    same(J[0], alone, rtol=1e-5)


@pytest.mark.parametrize("propagation", [TS1(), pytest.param(TSInfinity(), marks=pytest.mark.slow)])
@pytest.mark.slow
def test_sampling_and_shooting_plan_through_particles(propagation):
    task = through(Ensemble(draw(NetworkDynamics), propagation))
    cloud = particles(task, 4), replicate_start(S0, task, 4)
    rest = OpenLoop.zeros(task)
    for planner in (
        Sampling(CEM(elites=6), samples=48, std=1.0, particles=4),
        Shooting(OptaxSolver(optax.adam, learning_rate=0.1), particles=4),
    ):
        plan, history = solve(planner, rest, task, S0, KEY, 8) if isinstance(propagation, TS1) else _one(planner, task)
        assert episode_return(plan, *cloud, KEY) > episode_return(rest, *cloud, KEY) + 0.01
        assert not np.any(history.nonfinite if hasattr(history, "nonfinite") else history.info.nonfinite)


def _one(planner, task):
    """Updates without `solve`, whose report of what is not finite follows a single state."""
    plan, carry, info = OpenLoop.zeros(task), planner.init(OpenLoop.zeros(task), task), None
    update = jax.jit(lambda plan, carry, key: planner.update(plan, carry, task, S0, key=key))
    for k in range(8):
        plan, carry, info = update(plan, carry, jax.random.key(k))
    return plan, info


@pytest.mark.slow
def test_derivatives_plan_through_the_mean_and_through_particles():
    """iLQR and multiple shooting, which must end at the same plan."""
    task = through(Ensemble(draw(NetworkDynamics), Mean()))
    kept = particles(through(Ensemble(draw(NetworkDynamics), TSInfinity())), E)
    for problem, s0 in ((task, S0), (kept, replicate_start(S0, kept, E))):
        found = []
        for planner in (ILQR(), MultipleShooting()):
            plan, history = solve(planner, Affine.zeros(problem), problem, s0, None, 30, relative=1e-7)
            assert plan.K.shape == (T, 1, problem.n)
            assert history.info.J[-1] > history.info.J[0] + 0.01 and np.all(np.diff(history.info.J) >= -1e-6)
            found.append(plan.a)
        same(*found, atol=1e-2)


def test_wrong_arguments():
    members = draw(NetworkDynamics)
    with pytest.raises(ValueError, match="every leaf of an ensemble needs the same leading axis of members"):
        Ensemble(NetworkDynamics.init(TASK, hidden=[5], key=KEY))
    with pytest.raises(ValueError, match=r"a single state cannot know: roll out particles\(task, count\)"):
        Ensemble(members, TSInfinity())(S0, jnp.ones(1))
    with pytest.raises(ValueError, match="needs at least one particle for each of 3 members, got 2"):
        Ensemble(members, TSInfinity()).many(replicate_start(S0, TASK, 2), jnp.ones(1))
    with pytest.raises(ValueError, match="the number of particles must be at least 1, got 0"):
        particles(TASK, 0)
    with pytest.raises(ValueError, match="log_std must be a lower and a higher bound, got 1 and 0"):
        GaussianDynamics.init(TASK, key=KEY, log_std=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"a network takes flat states \[n\]; task 'lqr' has \[4, 2\]"):
        NetworkDynamics.init(particles(TASK, 4), key=KEY)
