"""Which damped step is taken, on quadratic and other returns whose values are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import GaussNewton, Neural
from diffmbrl.optimizers import DampingGrid, Krylov, LevenbergMarquardt, TrustRegion
from diffmbrl.second_order.krylov import Spectral, TruncatedCG
from tests.problems import bent, changed

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)

N = np.diag([1.0, 4.0, 9.0]).astype(np.float32)
G = np.asarray([1.0, -2.0, 3.0], np.float32)


def space(scale: float = 1.0) -> Spectral:
    """N and g, and steps of either."""
    count = jnp.asarray(3, jnp.int32)
    values = scale * jnp.diag(jnp.asarray(N))
    return Spectral(jnp.eye(3), values, values, scale * jnp.asarray(G), count)


def quadratic(scale: float = 1.0, gain: float = 1.0):
    """Returns of steps: what the model says (`gain` 1), less or more curved."""
    return lambda d: -scale * (d @ G + gain * jnp.sum(d @ N * d, axis=-1) / 2)


def choose(rule, evaluate, *, carry=None, scale=1.0):
    carry = rule.start(jnp.dtype("float32")) if carry is None else jnp.asarray(carry, jnp.float32)
    return jax.jit(lambda rule, carry: rule.choose(carry, space(scale), jnp.zeros(()), evaluate))(rule, carry)


# Path.


def test_the_best_of_the_path_is_taken():
    rule = DampingGrid(dampings=[1e-3, 1e-1, 10.0])
    # Four times the model's curvature: shorter steps than the model's are best.
    true = quadratic(gain=4.0)
    _, choice = choose(rule, true)
    dampings = 9 * rule.dampings
    steps = np.stack([-np.linalg.solve(N + x * np.eye(3), G) for x in dampings])
    best = np.argmax(true(steps))
    assert best != 0
    assert choice.accepted and choice.returns.shape == (3,)
    close(choice.damping, dampings[best])
    close(choice.step, steps[best])
    # All candidates are reported, by the model and in truth.
    close(choice.dampings, dampings)
    close(choice.predicted, quadratic()(steps))
    close(choice.returns, true(steps))


def test_with_an_exact_model_the_least_damping_is_taken():
    carry, choice = choose(DampingGrid(), quadratic())
    close(choice.step, -np.linalg.solve(N, G))
    close(choice.damping, 9e-9)
    assert carry == 1


def test_when_no_step_improves_none_is_taken_and_the_damping_rises():
    rule, carry = DampingGrid(), None
    for turn in range(3):
        carry, choice = choose(rule, lambda d: -jnp.ones(d.shape[0]), carry=carry)
        assert not choice.accepted
        np.testing.assert_array_equal(choice.step, np.zeros(3))
        close(carry, 10.0 ** (turn + 1))
    # An improvement by nothing is none.
    assert not choose(rule, lambda d: jnp.zeros(d.shape[0]))[1].accepted
    # It falls back as steps are accepted, not below 1.
    for wanted in (100.0, 10.0, 1.0, 1.0):
        carry, choice = choose(rule, quadratic(), carry=carry)
        assert choice.accepted
        close(carry, wanted)


def test_steps_that_are_not_finite_are_counted_and_never_taken():
    def partly(d):
        returns = quadratic()(d)
        return jnp.where(
            jnp.arange(d.shape[0]) < 5, jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, jnp.nan, jnp.nan] + [0.0] * 7), returns
        )

    _, choice = choose(DampingGrid(), partly)
    assert choice.accepted and np.isfinite(choice.returns).sum() == 7
    close(choice.damping, 9 * DampingGrid().dampings[5])
    carry, choice = choose(DampingGrid(), lambda d: jnp.full(d.shape[0], jnp.nan))
    assert not choice.accepted and not np.isfinite(choice.returns).any() and carry == 10
    assert np.all(np.isfinite(choice.step))


# Levenberg-Marquardt.


@pytest.mark.parametrize(
    "gain, accepted, factor",
    [
        pytest.param(1.0, True, 0.5, id="as predicted"),
        pytest.param(0.5, True, 0.5, id="better than predicted"),
        pytest.param(1.5, True, 1.0, id="half of it"),
        pytest.param(1.9, True, 4.0, id="a tenth of it"),
        pytest.param(2.5, False, 4.0, id="a loss"),
    ],
)
def test_the_damping_follows_the_ratio(gain, accepted, factor):
    rule = LevenbergMarquardt(initial=1e-6)
    carry, choice = choose(rule, quadratic(gain=gain))
    assert bool(choice.accepted) == accepted and choice.returns.shape == (1,)
    # At this damping predicted and true decrease are those of the undamped step: 1 and 2 - gain.
    close(carry, 1e-6 * factor)
    close(choice.step, -np.linalg.solve(N, G) if accepted else np.zeros(3), rtol=1e-4)
    close(choice.damping, 9e-6)


def test_a_step_that_is_not_finite_raises_the_damping():
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        carry, choice = choose(LevenbergMarquardt(), lambda d, bad=bad: jnp.full(d.shape[0], bad))
        assert not choice.accepted and not np.isfinite(choice.returns).any()
        close(carry, 4e-3)


def test_its_constants_are_its_own():
    rule = LevenbergMarquardt(initial=0.5, grow=3.0, shrink=0.1)
    close(choose(rule, quadratic(gain=9.0))[0], 1.5)
    close(choose(rule, quadratic())[0], 0.05)


def test_the_damping_never_vanishes():
    rule = LevenbergMarquardt()
    again = jax.jit(lambda carry: rule.choose(carry, space(), jnp.zeros(()), quadratic()))
    carry = rule.start(jnp.dtype("float32"))
    for _ in range(60):
        carry, _ = again(carry)
    assert carry > 0
    assert again(carry)[1].accepted


# Trust region.


def ended(length: float, *, boundary: bool) -> TruncatedCG:
    """A step of this length along -g, of the model that N and g make."""
    d = -length * G / np.linalg.norm(G)
    predicted = jnp.asarray(quadratic()(d))
    one, zero, no = jnp.ones((), jnp.int32), jnp.zeros(()), jnp.array(False)
    return TruncatedCG(jnp.asarray(d), predicted, one, zero, no, jnp.array(boundary), jnp.asarray(length))


@pytest.mark.parametrize(
    "gain, boundary, accepted, radius",
    [
        pytest.param(1.0, True, True, 4.0, id="as predicted, and it wanted to go further"),
        pytest.param(1.0, False, True, 2.0, id="as predicted, inside"),
        pytest.param(5.8, True, True, 2.0, id="about half of it"),
        pytest.param(20.0, True, False, 0.025, id="a loss"),
    ],
)
def test_the_radius_follows_the_ratio(gain, boundary, accepted, radius):
    found = ended(0.1, boundary=boundary)
    carry, choice = TrustRegion().choose(jnp.asarray(2.0), found, jnp.zeros(()), quadratic(gain=gain))
    assert bool(choice.accepted) == accepted
    close(carry, radius)
    close(choice.step, found.step if accepted else np.zeros(3))


def test_a_return_that_is_not_finite_shrinks_the_radius_and_no_step_leaves_it():
    def nowhere(d):
        return jnp.full(d.shape[0], jnp.nan)

    carry, choice = TrustRegion().choose(jnp.asarray(2.0), ended(1.0, boundary=False), jnp.zeros(()), nowhere)
    assert not choice.accepted
    close(carry, 0.25)
    carry, choice = TrustRegion().choose(jnp.asarray(2.0), ended(0.0, boundary=False), jnp.zeros(()), quadratic())
    assert not choice.accepted
    close(carry, 2.0)


# Path and Levenberg-Marquardt.

RULES = {"path": DampingGrid(), "levenberg-marquardt": LevenbergMarquardt()}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_units_of_the_reward_do_not_matter(rule):
    carry, choice = choose(rule, quadratic(gain=3.0))
    scaled_carry, scaled_choice = choose(rule, quadratic(1e3, gain=3.0), scale=1e3)
    close(scaled_carry, carry)
    close(scaled_choice.step, choice.step)
    close(scaled_choice.damping, 1e3 * choice.damping)


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, id=name, marks=[pytest.mark.slow] * (name == "path")) for name, rule in RULES.items()]
)
def test_nor_do_they_in_the_solver(rule, x64):
    rule = jax.tree.map(lambda x: x.astype(float), rule)
    task = bent()
    policy, s0 = Neural.init(task, hidden=[4], key=jax.random.key(0)), task.starts(jax.random.key(1), 3)
    solver = GaussNewton(system=Krylov(8), damping=rule)

    @jax.jit
    def two_updates(task):
        carry = solver.init(policy, task)
        moved, carry, _ = solver.update(policy, carry, task, s0, key=None)
        return solver.update(moved, carry, task, s0, key=None)

    (one, _, _), (other, _, _) = two_updates(task), two_updates(changed_units(task, 1e3))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), one, other)


def changed_units(task, factor):
    return changed(task, weights=factor * task.weights)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_without_curvature_it_goes_along_the_gradient(rule):
    flat = Spectral(jnp.eye(3), jnp.zeros(3), jnp.zeros(3), jnp.asarray(G), jnp.asarray(3, jnp.int32))
    carry = rule.start(jnp.dtype("float32"))
    _, choice = rule.choose(carry, flat, jnp.zeros(()), lambda d: -d @ G)
    assert choice.accepted
    close(choice.step / np.linalg.norm(choice.step), -G / np.linalg.norm(G))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_types_are_kept(rule, double):
    with jax.enable_x64(double):
        dtype = jnp.zeros(()).dtype
        rule = jax.tree.map(lambda x: x.astype(dtype), rule)
        exact = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, space())
        carry, choice = rule.choose(rule.start(dtype), exact, jnp.zeros(()), lambda d: -d @ jnp.asarray(G, dtype))
        assert carry.dtype == choice.step.dtype == choice.damping.dtype == dtype
        assert choice.dampings.dtype == choice.predicted.dtype == choice.returns.dtype == dtype
