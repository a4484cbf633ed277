"""The tasks of contact against closed forms and against integrators that stop at events."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from diffmbrl import Linear, OpenLoop, episode_return, rollout, tasks
from diffmbrl.tasks.bouncing import OnTheGrid, Penalty, TimeOfImpact
from diffmbrl.tasks.pushing import Friction, Pushing
from diffmbrl.tasks.tennis import Racket
from diffmbrl.tasks.throwing import Throw

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


@partial(jax.jit, static_argnums=3)
def follow(dynamics, s, a, count):
    """The state after `count` steps of the same action."""
    return jax.lax.fori_loop(0, count, lambda _, s: dynamics(s, a), s)


# Landscapes.


def test_edges(x64):
    s = jnp.asarray([-1.0, -1e-3, -1e-9, 0.0, 1e-3, 1.0])[:, None]
    hard, soft = tasks.heaviside(low=0.0, high=1.0), tasks.soft_heaviside(low=-1.0, high=1.0)
    close(jax.vmap(hard.terminal)(s), [0, 0, 0, 1, 1, 1])
    close(jax.vmap(soft.terminal)(s), [-1, -0.4, -4e-7, 0, 0.4, 1])
    close(jax.vmap(jax.grad(hard.terminal))(s), np.zeros((6, 1)))
    close(jax.vmap(jax.grad(soft.terminal))(s)[:, 0], [0, 400, 400, 400, 400, 0])
    assert episode_return(OpenLoop(jnp.asarray([[0.7]])), hard, jnp.asarray([-0.6])) == 1


def test_a_sinusoid_is_metzs_loss(x64):
    x = np.linspace(-10, 10, 7)
    loss = 0.1 * np.sin(x * 30 / np.pi) + (x / 10) ** 2 + 0.1
    close(jax.vmap(tasks.sinusoid(frequency=30.0).terminal)(jnp.asarray(x)[:, None]), -loss)


# A ball thrown over a wall.


def test_flight_is_suhs_formula(x64):
    d, height, g, v = 0.06, 0.02, 9.81, 1.0
    angles = np.linspace(0.01, np.pi / 2 - 0.01, 400)
    flight = 2 * v**2 * np.sin(angles) * np.cos(angles) / g
    at_wall = d * np.tan(angles) - g * d**2 / (2 * v**2 * np.cos(angles) ** 2)
    expected = np.where(flight <= d, flight, np.where(at_wall <= height, d, flight))
    found = jax.vmap(lambda a: Throw()(jnp.asarray([d, 0.3]), a[None]))(jnp.asarray(angles))
    close(found[:, 1], expected)
    close(found[:, 0], d)
    assert np.mean(expected == d) > 0.1 and np.any(expected > d)
    # The wall is met by a parabola, and straight up nothing is undefined.
    t = np.linspace(0, 0.2, 20001)
    for angle, x in zip(angles[::40], expected[::40], strict=True):
        path_x, path_z = v * np.cos(angle) * t, v * np.sin(angle) * t - g * t**2 / 2
        beyond = (path_x >= d) & (path_z > height)
        assert (x > d) == np.any(beyond & (path_x < d + 1e-4))
    slope = jax.grad(lambda a: Throw()(jnp.asarray([d, 0.0]), a)[1])(jnp.asarray([np.pi / 2]))
    close(slope, -2 / 9.81)


# Pushing.


def test_pushing_step_by_step(x64):
    k, m, keep, h = 800.0, 0.1, 0.99, 0.005
    task = tasks.pushing(k=k, horizon=120)
    x1, x2, v1, v2 = s0 = np.asarray([0.02, 1.0, 0.0, 0.0])
    u = 1.5 + np.sin(np.arange(120))
    cost, touching = 0.0, 0
    for a in u:
        e = np.asarray([x1 - 1, x2 - 2, v1, v2])
        cost += e @ np.diag([0.1, 10, 0.1, 0.1]) @ e + a**2
        force = k * (x2 - x1 - 1) if x2 - x1 < 1 else 0.0
        touching += force != 0
        v1, v2 = keep * v1 + h / m * (force + a), keep * v2 - h / m * force
        x1, x2 = x1 + h * v1, x2 + h * v2
    e = np.asarray([x1 - 1, x2 - 2, v1, v2])
    cost += e @ np.diag([0.1, 10, 0.1, 0.1]) @ e
    trajectory = jax.jit(rollout)(OpenLoop(jnp.asarray(u)[:, None]), task, jnp.asarray(s0))
    close(trajectory.s_T, [x1, x2, v1, v2])
    close(episode_return(OpenLoop(jnp.asarray(u)[:, None]), task, jnp.asarray(s0)), -cost)
    assert 10 < touching < 100


def test_a_touching_pair_is_stable_up_to_its_limit(x64):
    def growth(k):
        dynamics = Pushing(k)
        A = jax.jacfwd(lambda s: dynamics(s, jnp.zeros(1)))(jnp.asarray([0.5, 1.0, 0.0, 0.0]))
        # In the distance and its rate: beside them the middle of both only slows down.
        T = np.asarray([[-1.0, 1, 0, 0], [0, 0, -1, 1]])
        return np.abs(np.linalg.eigvals(T @ A @ np.linalg.pinv(T))).max()

    limit = float(Pushing().stable())
    assert limit == pytest.approx(1.99 * 0.1 / 0.005**2)
    assert growth(0.999 * limit) < 1 < growth(1.001 * limit)


@pytest.mark.parametrize("share, gains", [(0.49, False), (0.6, True), (0.9, True)])
def test_impacts_gain_speed_from_half_the_limit_on(share, gains, x64):
    dynamics = Pushing(share * Pushing().stable())
    starts = jnp.stack([jnp.asarray([-0.02 + gap, 1.0, 1.0, -1.0]) for gap in np.linspace(0, 0.01, 41)])
    after = jax.vmap(lambda s: follow(dynamics, s, jnp.zeros(1), 12))(starts)
    assert np.all(after[:, 1] - after[:, 0] > 1)
    assert (np.max(after[:, 3] - after[:, 2]) > 2) == gains


# Friction.


def test_friction_carries_slips_and_lets_go(x64):
    friction = Friction()
    mu, m = 0.18, 0.1
    together = follow(friction, jnp.zeros(4), jnp.asarray([0.3]), 100)
    assert together[2] - together[3] < 0.1
    close(together[2] + together[3], 100 * 0.005 * 0.3 / m)
    close(together[2] - together[3], 0.1 * 0.15 / mu, rtol=1e-3)  # the slip at which friction is half the push
    slipping = friction(jnp.asarray([0.0, 0.05, 1.0, 0.0]), jnp.asarray([0.7]))
    close(slipping[2:], [1 + 0.005 * (0.7 - mu) / m, 0.005 * mu / m])
    close(slipping[:2], [0.005 * slipping[2], 0.05 + 0.005 * slipping[3]])
    lost = friction(jnp.asarray([0.0, -0.11, 1.0, 0.3]), jnp.asarray([0.7]))
    close(lost[2:], [1 + 0.005 * 0.7 / m, 0.3])


# Bouncing.


def integrate(derivative, event, jump, s, span):
    """The state after `span` seconds, by an integrator that stops at each event; and how many there were."""
    event.terminal, event.direction = True, -1
    t, count = 0.0, 0
    while t < span:
        found = solve_ivp(derivative, (t, span), s, events=event, rtol=1e-11, atol=1e-12)
        t, s = found.t[-1], found.y[:, -1]
        if found.status == 1:
            s, count = jump(s), count + 1
    return s, count


def bounced(s, span, *, e, alpha):
    return integrate(lambda t, s: [s[1], alpha], lambda t, s: s[0], lambda s: np.asarray([0, -e * s[1]]), s, span)


@pytest.mark.parametrize("e, alpha, dt, count", [(1.0, 0.0, 0.1, 1), (0.8, -9.81, 0.04, 3), (0.9, -2.0, 0.1, 2)])
def test_bounces_are_those_of_an_integrator_with_events(e, alpha, dt, count, x64):
    s0, steps = np.asarray([0.73, -1.0]), 40 if alpha < -5 else 30
    expected, seen = bounced(s0, steps * dt, e=e, alpha=alpha)
    assert seen == count
    ball = TimeOfImpact(mass=2.0, e=e, g=1.0, dt=dt)
    a = jnp.asarray([2.0 * (alpha + 1)])
    close(follow(ball, jnp.asarray(s0), a, steps), expected, atol=1e-8)
    A = jax.jacrev(lambda s: rolled(ball, s, a, steps))(jnp.asarray(s0))
    nudged = [(bounced(s0 + d, steps * dt, e=e, alpha=alpha)[0], bounced(s0 - d, steps * dt, e=e, alpha=alpha)[0])
              for d in 1e-5 * np.eye(2)]  # fmt: skip
    close(A, np.stack([(up - down) / 2e-5 for up, down in nudged], axis=1), rtol=1e-5, atol=1e-5)
    close(np.linalg.det(A), e ** (2 * count))  # each impact's saltation matrix has the determinant e^2


def rolled(dynamics, s, a, count):
    return jax.lax.scan(lambda s, _: (dynamics(s, a), None), s, None, length=count)[0]


def test_one_step_of_impact_has_the_saltation_matrix(x64):
    e, g, dt, q, v = 0.7, 9.81, 0.04, 0.02, -1.3
    A = jax.jacfwd(lambda s: TimeOfImpact(1.0, e, g, dt)(s, jnp.zeros(1)))(jnp.asarray([q, v]))
    fall = np.sqrt(v**2 + 2 * g * q)
    time = (fall + v) / g
    jump = np.asarray([[-e, 0], [(1 + e) * -g / -fall, -e]])
    before, after = np.asarray([[1, time], [0, 1]]), np.asarray([[1, dt - time], [0, 1]])
    close(A, after @ jump @ before)


def test_a_ball_comes_to_rest_and_stays(x64):
    ball = TimeOfImpact(e=0.5, g=9.81)
    end = follow(ball, jnp.asarray([0.3, 0.0]), jnp.zeros(1), 60)
    np.testing.assert_array_equal(end, [0, 0])
    A = jax.jacrev(lambda s: rolled(ball, s, jnp.zeros(1), 60))(jnp.asarray([0.3, 0.0]))
    np.testing.assert_array_equal(A, np.zeros((2, 2)))
    assert follow(ball, end, jnp.asarray([20.0]), 5)[0] > 0.1


@pytest.mark.parametrize("dt", [0.1, 1e-3])
def test_on_the_grid_the_derivative_has_the_wrong_sign(dt, x64):
    steps = round(2 / dt)
    run = jax.jit(lambda q: rolled(OnTheGrid(dt=dt), jnp.stack([q, -jnp.ones(())]), jnp.zeros(1), steps)[0])
    exact = jax.jit(lambda q: rolled(TimeOfImpact(dt=dt), jnp.stack([q, -jnp.ones(())]), jnp.zeros(1), steps)[0])
    q, apart = jnp.asarray(0.5 + 0.3 * dt), 0.2
    assert jax.grad(run)(q) == 1
    assert jax.grad(exact)(q) == pytest.approx(-1)
    assert (run(q + apart) - run(q - apart)) / (2 * apart) == pytest.approx(-1)
    assert abs(run(q) - exact(q)) <= dt
    close(exact(q), 2 - q)


def sprung(q0, *, k, c, g, span=2.0):
    """Height after `span` seconds on spring and damper, the switch between flight and contact being an event."""

    def derivative(s):
        return [s[1], -k * s[0] - c * s[1] - g] if s[2] else [s[1], -g]

    t, s = 0.0, np.asarray([q0, -1.0, 0.0])
    while t < span:
        event = (lambda t, s: -s[0] + 1e-30) if s[2] else (lambda t, s: s[0])
        event.terminal, event.direction = True, -1
        found = solve_ivp(lambda t, s: [*derivative(s), 0.0], (t, span), s, events=event, rtol=1e-11, atol=1e-12)
        t, s = found.t[-1], found.y[:, -1]
        if found.status == 1:
            s = np.asarray([1e-14 if s[2] else -1e-14, s[1], 1 - s[2]])
    return s[0]


@pytest.mark.parametrize("c, g, right", [(0.0, 0.0, True), (1.0, 0.0, True), (0.0, 5.0, True), (5.0, 5.0, False)])
def test_the_derivative_through_a_penalty_misses_jumps_of_its_force(c, g, right, x64):
    """It converges with the step, but where damping makes the force jump and entry and exit do not cancel (under gravity)."""
    gradient = jax.jit(
        jax.grad(lambda q, dt, n: rolled(Penalty(c=c, g=g, dt=dt), jnp.stack([q, -jnp.ones(())]), jnp.zeros(1), n)[0]),
        static_argnums=(1, 2),
    )
    d = 1e-4
    true = (sprung(0.5 + d, k=50.0, c=c, g=g) - sprung(0.5 - d, k=50.0, c=c, g=g)) / (2 * d)
    errors = [abs(float(gradient(jnp.asarray(0.5), dt, round(2 / dt))) - true) for dt in (1e-3, 1e-4)]
    if right:
        assert errors[1] < 0.3 * errors[0] < 0.1
    else:
        assert 0.9 < errors[1] / errors[0] < 1.1 and errors[1] > 0.5 * abs(true)


# Tennis.


def returned(s, a, span, *, g=9.81, e=0.9, w=0.15):
    """Ball and racket by events: the ball passes the racket's line, and turns if that is on the racket."""

    def frame(s):
        n, t = np.asarray([-np.sin(s[5]), np.cos(s[5])]), np.asarray([np.cos(s[5]), np.sin(s[5])])
        return n, t, s[:2] - np.asarray([s[4], 0.0])

    def jump(s):
        n, t, r = frame(s)
        if abs(t @ r) > w:
            return s - np.asarray([0, 1e-11, 0, 0, 0, 0])
        point = np.asarray([a[0], 0.0]) + a[1] * np.asarray([-r[1], r[0]])
        v = s[2:4] - (1 + e) * (n @ (s[2:4] - point)) * n
        return np.concatenate([s[:2] + 1e-13 * n, v, s[4:]])

    return integrate(
        lambda t, s: [s[2], s[3], 0.0, -g, a[0], a[1]], lambda t, s: frame(s)[0] @ frame(s)[2], jump, s, span
    )


@pytest.mark.parametrize("x, a", [(0.05, (0.0, 0.0)), (0.3, (0.9, -0.8)), (-0.2, (-0.3, 1.5)), (0.4, (0.1, 0.0))])
def test_the_ball_is_an_integrators_with_events(x, a, x64):
    s0 = np.asarray([x, 0.8, 0.2, 0.0, 0.0, 0.1])
    steps = 40
    expected, _ = returned(s0, a, steps * 0.015)
    run = lambda s: rolled(Racket(), s, jnp.asarray(a), steps)  # noqa: E731
    close(jax.jit(run)(jnp.asarray(s0)), expected, atol=1e-8)
    A = jax.jit(jax.jacfwd(run))(jnp.asarray(s0))
    d = 1e-5
    differences = [(returned(s0 + d * e, a, 0.6)[0] - returned(s0 - d * e, a, 0.6)[0]) / (2 * d) for e in np.eye(6)]
    close(A, np.stack(differences, axis=1), rtol=1e-4, atol=1e-4)
    assert (expected[3] > -3) == (x != 0.4)  # the last one is a miss


def test_the_racket_has_edges(x64):
    fall = lambda x: follow(Racket(), jnp.asarray([x, 0.8, 0.0, 0.0, 0.0, 0.0]), jnp.zeros(2), 40)  # noqa: E731
    hits = [float(fall(x)[1]) > 0 for x in (-0.151, -0.149, 0.0, 0.149, 0.151)]
    assert hits == [False, True, True, True, False]
    # From below it is passed.
    up = follow(Racket(), jnp.asarray([0.0, -0.1, 0.0, 2.0, 0.0, 0.0]), jnp.zeros(2), 10)
    assert up[1] > 0 and up[3] > 0


def test_a_linear_policy_can_return_every_ball(x64):
    """Under the ball, tilted by what its place and speed need: the task is solvable by the policies of the experiment."""
    task = tasks.tennis()
    K = jnp.zeros((2, 6)).at[0].set(jnp.asarray([12.0, 0, 4.0, 0, -12.0, 0])).at[1, 5].set(-10.0)
    policy = Linear(K, jnp.asarray([0.0, -2.0]))
    s = jax.jit(jax.vmap(lambda s: rollout(policy, task, s).s_T))(task.starts(jax.random.key(0), 64))
    assert np.mean(np.asarray(s[:, 1]) > 0) > 0.9
