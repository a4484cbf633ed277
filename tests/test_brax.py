"""Brax's environments as tasks, held step by step against Brax's own `step`."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

from diffmbrl import (
    BPTT,
    MPC,
    GaussNewton,
    Neural,
    OpenLoop,
    OptaxSolver,
    ShortHorizon,
    episode_return,
    rollout,
    solve,
    tasks,
)
from diffmbrl.agents import learn
from diffmbrl.agents.registry import make_agent as make_agent
from diffmbrl.core import Trajectory
from diffmbrl.methods import METHODS, solver
from diffmbrl.optimizers import Krylov
from diffmbrl.render.registry import frames
from diffmbrl.render.shapes import Circle, Line
from diffmbrl.tasks.adapters import brax
from diffmbrl.tasks.adapters.brax import seen
from diffmbrl.tasks.adapters.brax_rewards import brax_rewards
from diffmbrl.tasks.registry import TASKS, state_names
from tests.agents import AGENTS

KEY = jax.random.key(0)
slow = pytest.mark.slow
NAMES = [name for name in TASKS if name.startswith("brax-")]
RUNNERS = ("brax-swimmer", "brax-halfcheetah", "brax-hopper", "brax-walker2d", "brax-ant")
QUICK = [("brax-inverted-pendulum", "spring")]
OTHERS = [(name, "generalized") for name in NAMES]
OTHERS += [("brax-inverted-pendulum", "positional"), ("brax-inverted-pendulum", "mjx"), ("brax-reacher", "spring")]
OTHERS += [("brax-halfcheetah", "spring"), ("brax-hopper", "positional"), ("brax-ant", "spring")]
every_body = pytest.mark.parametrize("name, backend", [*QUICK, *(pytest.param(*pair, marks=slow) for pair in OTHERS)])


def spring(horizon=5, **parameters):
    """The cheapest to compile of all that have a gradient."""
    return tasks.make("brax-inverted-pendulum-shaped", horizon=horizon, backend="spring", **parameters)


def random_actions(task):
    return jax.random.uniform(jax.random.key(1), (task.horizon, task.m), minval=-1)


def followed(body, key, a):
    """Brax's own rollout: states as numbers, observations, rewards and ends of each step, and |M X - 1| for its inverse X."""
    with jax.numpy_dtype_promotion("standard"):
        env = brax._brax("envs").get_environment(body.env, backend=body.backend)
        if body.backend == "mjx":
            env.sys = env.sys.tree_replace({"opt.iterations": 1})

        def step(state, a):
            after = env.step(state.replace(metrics={}, info={}), a)
            x = (after.pipeline_state.x.pos[0, 0] - state.pipeline_state.x.pos[0, 0]) / env.dt
            numbers = brax._numbers(body, after.pipeline_state)
            numbers = jnp.append(numbers, x) if body.runs else numbers
            like = state.replace(pipeline_state=after.pipeline_state, obs=after.obs, metrics={}, info={})
            p, wrong = after.pipeline_state, jnp.zeros(())
            if body.backend == "generalized":
                wrong = jnp.abs(p.mass_mx @ p.mass_mx_inv - jnp.eye(len(p.mass_mx))).max()
            return like, (numbers, after.obs, jnp.asarray(after.reward), jnp.asarray(after.done), wrong)

        begun = jax.jit(env.reset)(key)
        run = jax.jit(lambda state, a: jax.lax.scan(step, state.replace(metrics={}, info={}), a)[1])
        return brax._numbers(body, begun.pipeline_state), run(begun, a)


@every_body
@pytest.mark.filterwarnings("ignore")
def test_states_observations_rewards_and_ends_are_braxs(name, backend):
    task = tasks.make(name, horizon=12, backend=backend)
    body, a = task.dynamics.body, random_actions(task)
    trajectory = jax.jit(rollout)(OpenLoop(a), task, task.initial(KEY))
    start, (numbers, seen, rewards, done, wrong) = followed(body, KEY, a)
    np.testing.assert_allclose(trajectory.s[0][: start.size], start, atol=1e-6)
    reached = jnp.concatenate([trajectory.s[1:], trajectory.s_T[None]])
    # Brax iterates its inverse of the mass matrix from the last one. A walker's is lost in one fast step and does not come
    # back (.67 in |M X - 1|): from there on its steps are not those of the equations, which ours are.
    alive = int(trajectory.alive[:-1].sum())
    steps = int((np.cumsum(np.asarray(wrong) > 0.1) == 0)[:alive].sum())
    assert steps >= min(alive, 4)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4 if body.env in RUNNERS else 1e-5)
    # A runner's speed is a difference of places over a step of .01 s, and contacts magnify what rounding leaves.
    loose = partial(np.testing.assert_allclose, rtol=2e-2, atol=2e-2) if body.runs else close
    loose(reached[:steps], numbers[:steps])
    loose(jax.vmap(task.features)(reached)[:steps], seen[:steps])
    if name != "brax-inverted-pendulum-shaped":
        loose(brax_rewards(task, trajectory)[:steps], rewards[:steps])
    if task.done is None:
        assert not np.any(done)
        return
    # An end between two steps that only rounding tells apart would be a coincidence.
    np.testing.assert_array_equal(jax.vmap(task.done)(reached)[:steps], np.asarray(done[:steps], bool))


def test_rewards_by_hand_and_none_after_the_end():
    """A pole that leans by an angle on a cart at x, over three steps of which the third is after the end."""
    task = spring(horizon=3)
    s, a = task.initial(KEY), jnp.asarray([[0.5], [0.1], [-0.2]])
    x, angle = seen(task.reward.body, s).q
    path = Trajectory(jnp.stack([s] * 3), a, jnp.zeros(3), jnp.asarray([True, True, False, False]), s)
    wanted = 1 - 0.45 * (angle / 0.2) ** 2 - 0.45 * x**2 - 0.1 * a[:, 0] ** 2
    np.testing.assert_allclose(brax_rewards(task, path), [wanted[0], wanted[1], 0], rtol=1e-5)


@slow
@pytest.mark.parametrize("name", ["brax-reacher", "brax-swimmer", "brax-inverted-pendulum"])
def test_J_is_braxs_return_and_what_the_start_earns(name, x64):
    task = tasks.make(name, horizon=6)
    s0 = task.initial(KEY)
    policy = OpenLoop(0.1 * random_actions(task))
    trajectory = jax.jit(rollout)(policy, task, s0)
    J = jax.jit(episode_return)(policy, task, s0)
    np.testing.assert_allclose(J, brax_rewards(task, trajectory).sum() + task.terminal(s0), rtol=1e-12)


@pytest.mark.slow
def test_a_gradient_is_central_differences(x64):
    task = spring()
    f = jax.jit(lambda s, a, physics: eqx.tree_at(lambda d: d.physics, task.dynamics, physics)(s, a))
    arguments = (task.initial(KEY), jnp.asarray([0.3]), task.dynamics.physics)
    check_grads(f, arguments, order=1, modes=["rev"], eps=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_sweep_over_masses_is_a_vmap_and_another_mass_compiles_nothing():
    task = spring()
    s, a, traced = task.initial(KEY), jnp.asarray([0.3]), []

    @jax.jit
    def f(dynamics):
        traced.append(0)
        return dynamics(s, a)

    each = np.stack([f(spring(mass=mass).dynamics) for mass in (0.5, 1.0, 2.0)])
    assert len(traced) == 1 and np.abs(each[0] - each[2]).max() > 1e-4
    masses = jnp.asarray([0.5, 1.0, 2.0])[:, None] * task.dynamics.physics.mass
    sweep = jax.vmap(lambda mass: eqx.tree_at(lambda d: d.physics.mass, task.dynamics, mass)(s, a))
    np.testing.assert_allclose(jax.jit(sweep)(masses), each, rtol=1e-4, atol=1e-6)
    by_link = spring(mass=jnp.asarray([1.0, 2.0])).dynamics.physics.mass
    np.testing.assert_allclose(by_link, task.dynamics.physics.mass * jnp.asarray([1, 2.0]))


def test_the_physics_are_braxs():
    physics = tasks.make("brax-hopper").dynamics.physics
    np.testing.assert_allclose(physics.mass, [3.66519143, 4.05789051, 2.7813567, 5.31557477])
    np.testing.assert_allclose(physics.damping, [0, 0, 0, 1, 1, 1])
    assert physics.friction.shape == (5,) and physics.gear.shape == (3,)
    assert tasks.make("brax-reacher").dynamics.physics.friction is None
    assert spring().dynamics.physics.damping is None


REFUSED = [
    ({"backend": "bullet"}, "backend must be one of generalized, spring, positional, mjx, got 'bullet'"),
    (
        {"backend": "mjx", "iterations": 4},
        "iterations must be 1, got 4: with more than one MJX's solver is a while loop",
    ),
    ({"iterations": 2}, "iterations must be 1, got 2: only MJX's solver takes them, and the backend is 'generalized'"),
    ({"mass": float("nan")}, "mass of task 'brax-reacher' must be a finite positive number, got nan"),
    ({"mass": np.ones(2)}, r"mass of task 'brax-reacher' must be one number or 3, got shape \[2\]"),
    ({"gear": -1.0}, "gear of task 'brax-reacher' must be a finite positive number, got -1"),
    ({"damping": 2.0, "backend": "spring"}, "damping of task 'brax-reacher' changes nothing on backend 'spring'"),
    ({"friction": 2.0}, "unknown parameter of task 'brax-reacher' 'friction'"),
]


@pytest.mark.parametrize("parameters, message", REFUSED)
def test_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        tasks.make("brax-reacher", **parameters)


def test_a_body_without_a_backend():
    with pytest.raises(ValueError, match="Brax's swimmer has no backend 'spring'"):
        tasks.make("brax-swimmer", backend="spring")


def test_without_brax(monkeypatch):
    def missing(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(brax.importlib, "import_module", missing)
    brax._brax.cache_clear()
    try:
        with pytest.raises(ImportError, match="tasks of Brax need brax and mujoco-mjx"):
            brax._brax("envs")
    finally:
        monkeypatch.undo()
        brax._brax.cache_clear()


def test_names_and_drawings_fit_the_states():
    for name in NAMES:
        task = tasks.make(name)
        assert len(state_names(task)) == task.n and len(TASKS[name].actions) == task.m
        assert state_names(task)[0] != "state 1", name
    assert state_names(spring()) == [f"state {i + 1}" for i in range(26)]


@pytest.mark.slow
def test_a_pole_is_drawn_where_it_is():
    task = tasks.make("brax-inverted-pendulum")
    [shapes] = frames(task, np.asarray([[0.3, np.pi / 2, 0, 0]]))
    pole = next(shape for shape in shapes if isinstance(shape, Line) and shape.role == "accent")
    np.testing.assert_allclose(np.sort(pole.points, axis=0), [[0.3, -0.001], [0.9, 0.0]], atol=1e-6)
    arm = frames(tasks.make("brax-reacher"), np.asarray([[0, 0, 0.1, -0.05, 0, 0, 0, 0.0]]))[0]
    [target] = [shape for shape in arm if isinstance(shape, Circle) and shape.role == "target"]
    np.testing.assert_allclose(target.centre, [0.1, -0.05], atol=1e-6)


# Everything runs on it unchanged: one update of each kind.

SHORT = ShortHorizon(
    OptaxSolver(optax.adam, learning_rate=1e-2), window=2, environments=4, epochs=1, batches=2, hidden=(8,)
)
SOLVERS = {
    "bptt": OptaxSolver(optax.adam, gradient=BPTT(), learning_rate=1e-2),
    "short-horizon": SHORT,
    "gauss-newton": GaussNewton(system=Krylov(3)),
}


@slow
@pytest.mark.parametrize("name", SOLVERS)
def test_a_policy_is_updated(name):
    task = spring()
    policy = Neural.init(task, hidden=[4], key=KEY)
    after, history = solve(SOLVERS[name], policy, task, task.starts(KEY, 4), KEY, steps=1)
    moved = np.abs(ravel_pytree(after)[0] - ravel_pytree(policy)[0]).max()
    assert moved > 0 and np.all(np.isfinite(ravel_pytree(after)[0]))
    assert history.info.accepted[0] and not history.info.nonfinite.any()


@slow
@pytest.mark.parametrize("name", ["cem", "mppi", "ilqr"])
def test_it_is_planned_for(name):
    task = spring()
    planner = solver(METHODS[name], task, rate=None, steps=8, continuation="none")
    s0 = task.initial(KEY)
    # Near upright, resting is the best of the first draws: what draws needs some updates to beat it.
    key, count = (KEY, 20) if METHODS[name].order == 0 else (None, 1)
    controller = MPC.init(planner, task, horizon=3, iterations=count, key=key)
    trajectory = jax.jit(rollout)(controller, task, s0, KEY)
    assert np.all(np.isfinite(trajectory.s)) and np.any(trajectory.a != 0)


@slow
@pytest.mark.parametrize("name", ["mbpo", "sac", "ppo", "mpc", "short-horizon"])
def test_it_is_learned_from(name):
    task = spring(horizon=10)
    row = next(row for row in AGENTS if row.name == name)
    agent = row.make(task) if name != "mpc" else make_agent("mpc", task, {"warmup": 20, "every": 20, "units": 8})
    learned = learn(agent, task, jax.random.split(KEY, 1), real_steps=40)
    assert len(learned.records) >= 1
    policy = agent.best(jax.tree.map(lambda x: x[0], learned.carry), task)
    a = policy(task.initial(KEY)) if name != "mpc" else jnp.zeros(1)
    assert np.all(np.isfinite(a))
