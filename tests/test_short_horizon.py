"""Windows with a critic: against BPTT, finite differences and hand-written loops; their options; what they learn."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from diffmbrl import (
    BPTT,
    Affine,
    Linear,
    Neural,
    OptaxSolver,
    ShortHorizon,
    mean_return,
    rollout,
    rollouts,
    solve,
    tasks,
)
from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts
from diffmbrl.methods import METHODS, solver
from diffmbrl.optimizers import AdaptiveHorizon, Entropy, Noise, StiffCut
from diffmbrl.optimizers.clipped import clipped_adam
from diffmbrl.optimizers.short_horizon.critic import Critic, fit, inputs, running_moments, td_lambda
from diffmbrl.optimizers.short_horizon.cuts import stiffness
from diffmbrl.optimizers.short_horizon.exploration import StateNoise
from diffmbrl.optimizers.short_horizon.windows import Environments, start_environments, window
from tests.problems import bent, changed, matrices, same, same_tree

KEY = jax.random.key(0)


def number(x):
    return jnp.asarray(x, float)


def nothing(x):
    return jnp.zeros((), x.dtype)


def network(task):
    return Neural.init(task, hidden=[4], key=jax.random.key(3), output_scale=1.0)


def at(s, t, start=0):
    """One environment."""
    return Environments(s[None], jnp.array([t], jnp.int32), jnp.array([start], jnp.int32))


def gradient(policy, *args, **options):
    return jax.jit(lambda pi: jax.grad(lambda pi: window(pi, *args, **options)[0])(pi))(policy)


# The critic.


@pytest.mark.parametrize("discount, trace", [(1.0, 1.0), (0.9, 0.0), (0.97, 0.6)])
def test_targets_are_a_loop(discount, trace, x64):
    rng = np.random.default_rng(0)
    r, v, ended = rng.normal(size=7), rng.normal(size=7), np.array([0, 0, 1, 0, 0, 0, 0], bool)
    wanted = []
    for l in range(7):
        # The mean over n-step returns, weighted by (1 - lambda) lambda^(n-1), the last one by what is left.
        total, weight, earned, g = 0.0, 1.0, 0.0, 1.0
        for k in range(l, 7):
            earned += g * r[k]
            g *= discount
            bootstrap = 0.0 if ended[k] else g * v[k]
            last = k == 6 or ended[k]
            total += weight * (1.0 if last else 1 - trace) * (earned + bootstrap)
            if last:
                break
            weight *= trace
        wanted.append(total)
    found = td_lambda(
        jnp.asarray(r), jnp.asarray(v), jnp.asarray(ended), discount=number(discount), trace=number(trace)
    )
    same(found, wanted)


def test_rescaling_a_critic_changes_no_value(x64):
    task = tasks.pendulum()
    critic = Critic.init(task, hidden=(8,), key=KEY)
    critic = eqx.tree_at(lambda c: c.net.weights[-1], critic, jnp.ones((1, 8)))
    x = jax.vmap(lambda s: inputs(task, s, jnp.array(7)))(task.starts(KEY, 5))
    other = critic.rescaled(number(-3.0), number(0.2))
    same(jax.vmap(other)(x), jax.vmap(critic)(x), rtol=1e-12)
    assert np.ptp(jax.vmap(critic)(x)) > 0.1
    same(x[:, -1], np.full(5, 7 / 200))


def test_a_critic_is_held_where_no_target_was(x64):
    """It is itself within six deviations; beyond, finite and without a slope."""
    critic = Critic.init(tasks.lqr(), hidden=(8,), key=KEY)
    critic = eqx.tree_at(lambda c: c.net.weights[-1], critic, jnp.ones((1, 8))).rescaled(number(-1.0), number(0.7))
    near, far = jnp.zeros(3), jnp.full(3, 1e3)
    assert abs(critic.net(near)[0]) < 6 < abs(critic.net(far)[0])
    same(critic.held(near), critic(near), rtol=0)
    same(jax.grad(critic.held)(near), jax.grad(critic)(near), rtol=0)
    assert not np.isfinite(critic(far)) and abs(critic.held(far)) < np.exp(1 + 6 * 0.7)
    same(jax.grad(critic.held)(far), np.zeros(3))


@pytest.mark.slow
def test_an_unstable_system_does_not_end_the_search():
    """Its critic was infinite after three updates, in a state of 150, and every update from then on was rejected."""
    task = tasks.random_lqr(jax.random.key(0), 8, 3, stability="unstable", horizon=50)
    train, _, keys = draw_starts(task, 10, 256, 1, 0)
    search = METHODS["short-horizon"].make(5e-3, 1200, task)
    policy = Neural.init(task, hidden=(16, 16), key=keys[9])
    _, history = solve(search, policy, task, train[9], None, steps=20)
    assert history.updates == 20 and not history.info.nonfinite.any()


@jax.jit
def advanced(search, policy, carry, task, starts):
    return search.update(policy, carry, task, starts, key=None)


def test_a_window_that_is_not_finite_is_followed_by_new_environments():
    """One in a lost state would spoil every window after it; of two in a row the second ends the run."""
    task = tasks.lqr(horizon=32)
    policy, starts = Linear.zeros(task), task.starts(KEY, 8)
    search = ShortHorizon(OptaxSolver(optax.sgd, learning_rate=1e-3), window=4, environments=8, hidden=(4,))
    learned, before, info = advanced(search, policy, search.init(policy, task), task, starts)
    environments = before.environments
    lost = before._replace(environments=environments._replace(s=environments.s.at[3].set(1e30)))

    kept, after, rejected = advanced(search, learned, lost, task, starts)
    assert rejected.nonfinite == 1 and not rejected.accepted and np.isfinite(rejected.J)
    assert rejected.gradient_norm == info.gradient_norm and after.updates == 2
    same_tree(kept, learned, rtol=0)
    same_tree((after.critic, after.target, after.descend), (before.critic, before.target, before.descend), rtol=0)

    moved, _, accepted = advanced(search, kept, after, task, starts)
    assert accepted.nonfinite == 0 and accepted.accepted and not np.array_equal(moved.K, kept.K)
    anew = before._replace(environments=start_environments(starts, 8, task), updates=after.updates)
    same_tree(moved, advanced(search, learned, anew, task, starts)[0], rtol=0)
    second = advanced(search, kept, after, task, starts.at[3].set(1e30))[2]
    assert second.nonfinite == 1 and np.isnan(second.gradient_norm)


def test_the_scale_follows_the_targets_and_stays_positive(x64):
    critic = Critic.init(tasks.lqr(), hidden=(4,), key=KEY)
    G = number([-3.0, -1.0, 4.0, 9.0])
    mean, std = running_moments(critic, G, number(1.0))
    shrunk = np.sign(G) * np.log1p(np.abs(G))
    same([mean, std], [shrunk.mean(), shrunk.std()])
    mean, std = running_moments(critic, jnp.zeros(4), number(1.0))
    assert mean == 0 and 0 < std < 1e-7


def test_the_critic_learns_values_over_several_orders_of_magnitude():
    x = jax.random.uniform(KEY, (512, 3), minval=-1.0)
    G = -jnp.exp(5 * x[:, 0]) + x[:, 1]
    critic = Critic.init(tasks.lqr(), hidden=(32,), key=KEY)
    critic = critic.rescaled(*running_moments(critic, G, jnp.ones(())))
    rule = optax.adam(5e-3)
    run = jax.jit(lambda c: fit(c, rule, rule.init(c.net), x, G, KEY, epochs=60, batches=4, factor=jnp.ones(())))
    learned, _, loss = run(critic)
    assert loss < 0.02
    error = np.abs(jax.vmap(learned)(x) - G) / (1 + np.abs(G))
    assert np.median(error) < 0.15
    still, _, _ = jax.jit(
        lambda c: fit(c, rule, rule.init(c.net), x, G, KEY, epochs=2, batches=4, factor=jnp.zeros(()))
    )(critic)
    same_tree(still, critic)


# The window.


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("ends", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_window_of_the_whole_episode_is_bptt(noise, ends, x64):
    task = changed(bent(horizon=8, ends=ends), noise=noise, weights=0.95 ** np.arange(9))
    policy, s0 = network(task), task.starts(KEY, 5)
    environments = start_environments(s0, 5, task, staggered=False)

    @jax.jit
    def run(policy):
        def J(pi):
            # An episode that is done early goes on from the next start: what comes after does not count here.
            return window(pi, task, s0, environments, nothing, length=8, discount=number(1.0), key=KEY)

        return jax.value_and_grad(J, has_aux=True)(policy)

    (J, (after, steps)), slope = run(policy)
    if ends:
        first = np.cumsum(steps.ended, axis=1) - np.asarray(steps.ended, int) == 0
        assert np.sum(~first) > 0
        same(jnp.mean(jnp.sum(jnp.where(first, steps.r, 0), axis=1)), mean_return(policy, task, s0, KEY))
        return
    wanted, bptt = jax.jit(BPTT())(policy, task, s0, KEY)
    same(J, wanted)
    same_tree(slope, bptt)
    assert jnp.all(steps.ended[:, -1]) and not jnp.any(steps.ended[:, :-1]) and jnp.all(after.t == 0)


@pytest.mark.parametrize("ends", [False, True])
def test_the_gradient_is_that_of_finite_differences(ends, x64):
    task = bent(horizon=6, ends=ends)
    policy, s0 = network(task), task.starts(KEY, 4)
    critic = Critic.init(task, hidden=(5,), key=KEY)
    critic = eqx.tree_at(lambda c: c.net.weights[-1], critic, jnp.ones((1, 5)))
    environments = start_environments(s0, 5, task)
    epsilon = jax.random.normal(KEY, (5, 4, 1), float)
    spread = StateNoise.init(task, std=number(0.2), key=KEY)

    @jax.jit
    def J(learned):
        policy, spread = learned
        return window(
            policy, task, s0, environments, critic, length=4, discount=number(0.9), spread=spread, epsilon=epsilon,
            entropy=Entropy(), log_temperature=number(-1.0),
        )[0]  # fmt: skip

    check_grads(J, ((policy, spread),), order=1, modes=["rev"], eps=1e-6)


def test_windows_with_the_true_value_add_up_to_bptt(x64):
    """The slope of the value carries what a window does to the rest of the episode."""
    T, h = 6, 2
    task = tasks.lqr(horizon=T)
    policy, s0 = Linear(jnp.array([[-0.5, -0.8]]), jnp.array([0.2])), task.starts(KEY, 1)
    states = rollout(policy, task, s0[0]).s

    def value(x):
        """By the loop itself, of the policy as it is."""
        s, J = x[:2], 0.0
        for k in range(T):
            going = x[2] * T + k < T - 0.5
            a = policy(s)
            J += jnp.where(going, task.reward(s, a), 0.0)
            s = jnp.where(going, task.dynamics(s, a), s)
        return J + task.terminal(s)

    slopes = [
        gradient(policy, task, s0, at(states[t], t), value, length=h, discount=number(1.0)) for t in range(0, T, h)
    ]
    total = jax.tree.map(lambda *xs: sum(xs), *slopes)
    same_tree(total, BPTT()(policy, task, s0, None)[1], rtol=1e-8)
    assert np.abs(total.K).max() > 1e-2


def test_environments_carried_across_windows_follow_the_rollout(x64):
    task = changed(bent(horizon=12), noise=0.3)
    policy, s0 = network(task), task.starts(KEY, 3)
    environments = start_environments(s0, 3, task, staggered=False)
    step = jax.jit(
        lambda e: window(policy, changed(task, noise=0.0), s0, e, nothing, length=5, discount=number(0.9))[1]
    )
    seen = []
    for _ in range(3):
        environments, steps = step(environments)
        seen.append(steps)
    x = jnp.concatenate([steps.x for steps in seen], axis=1)
    wanted = rollouts(policy, changed(task, noise=0.0), s0)
    same(x[:, :12, :2], wanted.s)
    same(x[:, :12, 2], np.tile(np.arange(12) / 12, (3, 1)))
    # The next episodes begin from the next starts, here the same ones.
    same(x[:, 12:, :2], wanted.s[:, :3])
    assert environments.t.tolist() == [3] * 3
    assert jnp.concatenate([steps.ended for steps in seen], axis=1).sum(axis=1).tolist() == [1] * 3


def test_episodes_begin_in_turn_at_all_phases():
    task = bent(horizon=8)
    s0 = task.starts(KEY, 5)
    environments = start_environments(s0, 4, task)
    assert environments.t.tolist() == [0, 2, 4, 6] and environments.start.tolist() == [0, 1, 2, 3]
    after, steps = window(network(task), task, s0, environments, nothing, length=2, discount=jnp.ones(()))[1]
    assert after.t.tolist() == [2, 4, 6, 0] and after.start.tolist() == [0, 1, 2, 2]  # (3 + 4) mod 5
    same(after.s[3], s0[2])
    assert steps.ended.tolist() == [[False, False]] * 3 + [[False, True]]


def test_a_terminated_episode_earns_nothing_more_and_has_no_value(x64):
    task = bent(horizon=8, ends=True)
    s0 = jnp.array([[0.1, 0.0], [2.0, 0.0]])  # the second is beyond the end
    policy = network(task)

    def run(value, env, length):
        return window(policy, task, s0, env, value, length=length, discount=number(1.0))

    J, (after, steps) = run(lambda x: 100.0 + 0 * x[0], at(jnp.array([1.29, 2.0]), 3), 1)
    same(J, task.reward(jnp.array([1.29, 2.0]), policy(jnp.array([1.29, 2.0]))))
    assert steps.ended.all() and after.t.tolist() == [0] and after.start.tolist() == [1]
    # Neither does one that starts there: it is over at once.
    J, (after, steps) = run(nothing, after._replace(s=s0[1:]), 1)
    assert J == 0 and steps.ended.all() and after.start.tolist() == [0]


def test_weights_of_each_start_are_its_own(x64):
    task = bent(horizon=4)
    s0, policy = task.starts(KEY, 2), network(bent(horizon=4))
    weights = jnp.stack([jnp.ones(5), jnp.asarray(0.5 ** np.arange(5))])
    weighted = changed(task, weights=weights)
    environments = start_environments(s0, 2, task, staggered=False)
    J = window(policy, weighted, s0, environments, nothing, length=4, discount=number(1.0))[0]
    same(J, mean_return(policy, weighted, s0))


# How far the gradient reaches.


@pytest.mark.slow
def test_cut_behind_every_step_the_gradient_is_that_of_windows_of_one(x64):
    task = bent(horizon=12)
    policy, s0 = network(task), task.starts(KEY, 1)
    critic = Critic.init(task, hidden=(5,), key=KEY)
    critic = eqx.tree_at(lambda c: c.net.weights[-1], critic, jnp.ones((1, 5)))
    states = rollout(policy, task, s0[0]).s
    options = {"discount": number(0.9)}
    cut = gradient(policy, task, s0, at(s0[0], 0), critic, length=4, reach=StiffCut(1e-6), reach_state=(), **options)
    slopes = [gradient(policy, task, s0, at(states[t], t), critic, length=1, **options) for t in range(4)]
    same_tree(cut, jax.tree.map(lambda *xs: sum(xs), *slopes))
    whole = gradient(policy, task, s0, at(s0[0], 0), critic, length=4, **options)
    uncut = gradient(policy, task, s0, at(s0[0], 0), critic, length=4, reach=StiffCut(1e6), reach_state=(), **options)
    same_tree(uncut, whole)
    assert np.abs(whole.net.weights[0] - cut.net.weights[0]).max() > 1e-3


def test_an_adaptive_horizon_cuts_every_h_steps_and_stays_within_its_bounds(x64):
    rule = AdaptiveHorizon(bound=2.0, rate=0.5, initial=3.0, low=2.0, high=5.0)
    state = rule.start(jnp.float64)
    assert [bool(rule.cuts(state, number(1.0), jnp.array(since))) for since in range(4)] == [False, False, True, True]
    same(rule.after(state, jnp.full((4, 6), 1.0)), 3.0 + 0.5 * (1 - 0.5))
    soft = stiff = state
    for _ in range(20):
        soft, stiff = rule.after(soft, jnp.full((4, 6), 0.1)), rule.after(stiff, jnp.full((4, 6), 9.0))
    assert soft == 5.0 and stiff == 2.0


def test_stiffness_is_the_norm_of_the_jacobian(x64):
    task = tasks.lqr()
    A = matrices(task)[0]
    same(stiffness(task, jnp.array([0.3, -1.0]), jnp.array([0.5])), np.linalg.norm(A) / np.sqrt(2))


# Entropy.


def one_step(rate: float, temperature: float, target: float):
    """A noisy step towards 0: the best deviation is the root of alpha over the curvature in a."""
    task = tasks.lqr(horizon=1)
    _, B, _, R, Q_T = matrices(task)
    curvature = float((R + B.T @ Q_T @ B)[0, 0])
    solver = ShortHorizon(
        OptaxSolver(optax.adam, learning_rate=3e-2, anneal=400.0),
        noise=Noise(0.2, entropy=Entropy(temperature=temperature, target=target, rate=rate)),
        window=2, environments=64, epochs=1, batches=1, hidden=(4,), discount=1.0,
    )  # fmt: skip
    policy, s0 = Linear.zeros(task), task.starts(KEY, 64)
    carry = solver.init(policy, task)

    @jax.jit
    def run(policy, carry):
        def step(state, _):
            policy, carry, info = solver.update(*state, task, s0, key=None)
            return (policy, carry), info.nonfinite

        return jax.lax.scan(step, (policy, carry), None, length=400)

    (policy, carry), rejected = run(policy, carry)
    assert not rejected.any()
    std = jnp.exp(jax.vmap(lambda s: carry.spread.log_std(task, s))(s0))
    return curvature, np.asarray(std), float(jnp.exp(carry.log_temperature))


@pytest.mark.slow
def test_at_a_fixed_price_noise_ends_where_entropy_is_worth_its_cost():
    curvature, std, temperature = one_step(0.0, 0.05, -0.5)
    assert temperature == pytest.approx(0.05, rel=1e-5)
    np.testing.assert_allclose(std, np.sqrt(temperature / curvature), rtol=0.15)


@pytest.mark.slow
def test_the_temperature_ends_where_entropy_is_its_target():
    wanted = np.exp(-0.7 - 0.5 * np.log(2 * np.pi * np.e))
    curvature, std, temperature = one_step(0.05, 0.001, -0.7)
    np.testing.assert_allclose(np.exp(np.log(std).mean()), wanted, rtol=0.05)
    assert temperature == pytest.approx(curvature * wanted**2, rel=0.25)


# Bad input.

RULE = OptaxSolver(optax.adam, learning_rate=1e-2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ShortHorizon(RULE, window=0), "window must be a whole number of at least 1, got 0"),
        (lambda: ShortHorizon(RULE, epochs=-1), "epochs must be a whole number of at least 1, got -1"),
        (
            lambda: ShortHorizon(RULE, window=1, environments=3),
            "1 steps of 3 environments do not fill 4 mini-batches",
        ),
        (lambda: ShortHorizon(RULE, discount=1.1), r"discount must lie in \[0, 1\], got 1.1"),
        (lambda: ShortHorizon(RULE, mixing=-0.1), r"mixing must lie in \[0, 1\], got -0.1"),
        (lambda: ShortHorizon(RULE, critic_rate=0.0), "critic_rate must be positive, got 0.0"),
        (lambda: StiffCut(0.0), "bound must be positive, got 0.0"),
        (lambda: AdaptiveHorizon(initial=80.0), "low 4.0, initial 80.0, high 64.0"),
        (lambda: Noise(2.0), "std must lie between .0025 and 1.6 half widths of the action limits, got 2.0"),
        (lambda: Entropy(temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: Entropy(rate=-1.0), "rate must not be negative, got -1.0"),
    ],
)  # fmt: skip
def test_bad_numbers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_line_search_is_refused():
    task = tasks.lqr()
    with pytest.raises(ValueError, match="a line search would search another objective"):
        ShortHorizon(OptaxSolver(optax.lbfgs)).init(Linear.zeros(task), task)


def test_what_is_no_rule_and_what_is_no_policy_are_refused():
    with pytest.raises(TypeError, match=r"descend must be a rule, OptaxSolver\(.*\); got GradientTransformation"):
        ShortHorizon(optax.adam(1e-2))
    task = tasks.lqr()
    with pytest.raises(TypeError, match="windows need a policy that depends on the state alone; got Affine"):
        ShortHorizon(RULE).init(Affine.zeros(task), task)


# What they learn, from random weights at the full horizon and with the settings of the table of methods.

# T, updates, and the highest cost of a seed that has learned.
BANDS = {"pendulum": (200, 800, 175.0), "cartpole-swingup": (100, 1200, 12.0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", BANDS)
def test_it_learns(name):
    horizon, updates, band = BANDS[name]
    task = tasks.make(name, horizon=horizon)
    made = solver(METHODS["short-horizon"], task, rate=5e-3, steps=updates, continuation="none")
    lanes = BatchedPolicyRuns([made], task, (32, 32), draw_starts(task, 5, 64, 256, 0), sequential=False)
    lanes.advance(0, updates)
    found = lanes.evaluate()
    assert np.all((-found["test"] < band) & (found["success"] >= 0.9)), found


@pytest.mark.slow
@pytest.mark.parametrize("name", BANDS)
def test_the_full_unroll_does_not(name):
    """Clipped, at four rates, without continuation: of five seeds no rate brings more than one to success."""
    horizon = BANDS[name][0]
    task = tasks.make(name, horizon=horizon)
    solvers = [OptaxSolver(clipped_adam, learning_rate=rate, anneal=800.0) for rate in (1e-3, 3e-3, 1e-2, 3e-2)]
    lanes = BatchedPolicyRuns(solvers, task, (32, 32), draw_starts(task, 5, 64, 256, 0), sequential=False)
    lanes.advance(0, 800)
    success = lanes.evaluate()["success"]
    assert np.all(np.sum(success >= 0.95, axis=1) <= 1), success
