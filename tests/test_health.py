"""Gradient health on systems whose disease is known, and the verdict on records whose numbers were made up."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffmbrl import BPTT, Linear, Neural, OpenLoop, episode_return, mean_return, tasks
from diffmbrl.core import Box, Task, parameter
from diffmbrl.diagnostics import (
    BiasTest,
    Health,
    SampleStatistics,
    bias_test,
    difference_error,
    gradient_health,
    gradient_samples,
    log_singular_values,
    products,
    sample_statistics,
)
from diffmbrl.diagnostics import health as measuring
from diffmbrl.diagnostics.verdict import least_z, verdict
from diffmbrl.tasks.transforms.prefix import Seeing, prefix, prefix_start
from diffmbrl.tasks.transforms.refined import refined


class Motion(eqx.Module):
    """p' = rate p + v, v' = a."""

    rate: jax.Array = parameter(0.9)

    def __call__(self, s, a, *, key=None):
        return jnp.stack([self.rate * s[0] + s[1], a[0]])


class Pay(eqx.Module):
    """offset + jump 1[p > 0] - weight (p^2 + a^2) / 2."""

    jump: jax.Array = parameter(0.0)
    weight: jax.Array = parameter(1.0)
    offset: jax.Array = parameter(0.0)

    def __call__(self, s, a):
        up = jnp.where(s[0] > 0, jnp.ones_like(s[0]), jnp.zeros_like(s[0]))
        return self.offset + self.jump * up - self.weight * (s[0] ** 2 + jnp.sum(a**2)) / 2


T = 60


def sick(rate=0.9, **pay) -> tuple[Task, Linear]:
    """All of them have one structure, so one program measures all."""
    task = Task(
        name="sick",
        dynamics=Motion(rate),
        reward=Pay(**pay),
        initial=Box([-1.0, -1.0], [1.0, 1.0]),
        a_low=[-jnp.inf],
        a_high=[jnp.inf],
        horizon=T,
        dt=1.0,
    )
    return task, Linear(jnp.array([[-0.1, 0.1]]), jnp.array([0.05]))


def examined(task, policy):
    health = gradient_health(task, policy, (2, 10, T), key=jax.random.key(0), starts=512, std=0.2)
    return health, verdict(health)


@pytest.mark.slow
def test_a_stable_system_takes_plain_bptt():
    health, found = examined(*sick())
    assert found.estimator == "bptt" and found.states == ("good",) * 3 and found.safe == T
    assert np.all(health.float32 < 1e-5) and np.all(health.difference < 1e-6) and np.isnan(health.refinement).all()
    assert np.all(health.bias.z < least_z(3)) and health.growth[-1] < 1 and health.where is None
    task, policy = sick()
    s0 = task.starts(jax.random.split(jax.random.key(0), 3)[0], 512)
    direct = jax.grad(mean_return)(policy, task, s0)
    np.testing.assert_allclose(health.plain.norm[-1], np.linalg.norm(ravel_pytree(direct)[0]), rtol=1e-5)
    assert health.contributions.shape == (3, T) and np.isnan(health.contributions[0, 2:]).all()


def test_an_unstable_one_takes_short_horizons():
    health, found = examined(*sick(rate=1.5))
    assert found.states[:2] == ("good", "good") and found.states[2] == "exploding"
    assert (found.estimator, found.window) == ("short-horizon", 10)
    np.testing.assert_allclose(health.growth[-1], 1.5, rtol=0.1)
    assert any("multiplies perturbations" in reason for reason in found.reasons)


def test_a_jump_alone_takes_the_score_function():
    health, found = examined(*sick(jump=1.0, weight=0.0))
    assert found.estimator == "likelihood-ratio" and "flat" in found.states
    assert np.all(health.norms == 0) and np.any(health.score.norm > 0) and np.nanmax(health.bias.z) > 10


def test_a_jump_beside_a_slope_is_seen_by_the_test_of_bias():
    health, found = examined(*sick(jump=30.0, weight=0.1))
    assert "biased" in found.states and found.estimator in ("mixed", "likelihood-ratio")
    assert np.nanmax(health.bias.z) > least_z(3)


def test_a_constant_reward_has_no_gradient():
    _, found = examined(*sick(weight=0.0, offset=1.0))
    assert found.estimator == "none" and found.states == ("zero",) * 3 and found.safe is None
    assert "There is no gradient" in found.headline


def test_what_overflows_is_named():
    health, found = examined(*sick(rate=1e8))
    assert health.where is not None and health.where.startswith(("s[", "r[")) and found.states[-1] == "non-finite"
    assert any(health.where in reason for reason in found.reasons)
    assert health.overflow[-1] > 0 and health.float32[-1] == np.inf


def test_one_program_measures_all_horizons_and_all_values():
    before = measuring._double._cache_size()
    examined(*sick(rate=0.5, weight=2.0))
    assert measuring._double._cache_size() == max(before, 1)


BAD = {
    "none": ((), {}, "horizons needs at least one number of steps"),
    "zero": ((0, 5), {}, "a horizon must be a whole number of at least 1, got 0"),
    "twice": ((5, 5), {}, "each horizon can be named once, got 5 5"),
    "falling": ((5, 2), {}, "horizons must increase, got 5 2"),
    "too far": ((5, 61), {}, "the task ends after 60 steps: make it with horizon=61"),
    "few starts": ((5,), {"starts": 63}, "starts must be at least 64, one sample each, got 63"),
    "no noise": ((5,), {"std": 0.0}, "std must be a finite positive number, got 0"),
    "nan": ((5,), {"std": float("nan")}, "std must be a finite positive number, got nan"),
}  # fmt: skip


@pytest.mark.parametrize("horizons, options, message", BAD.values(), ids=BAD)
def test_bad_input(horizons, options, message):
    task, policy = sick()
    with pytest.raises(ValueError) as refused:
        gradient_health(task, policy, horizons, key=jax.random.key(0), **options)
    assert message in str(refused.value)


def test_a_plan_is_refused():
    task, _ = sick()
    with pytest.raises(ValueError, match="policies of the state alone, not OpenLoop"):
        gradient_health(task, OpenLoop.zeros(task), (5,), key=jax.random.key(0))


# The verdict on made-up records.

GOOD = {"snr": 0.5, "tail": 0.05, "float32": 1e-6, "difference": 1e-8, "growth": 1.0, "z": 0.0, "size": 0.0}


def record(*rows, horizons=(10, 50, 400), where=None) -> Health:
    """A good record, but for what `rows` say of each horizon."""
    rows = [
        GOOD
        | {
            "score": 0.01,
            "J": -1.0,
            "overflow": 0,
            "refinement": 1e-3,
            "norm": 1.0,
            "condition": 10.0,
            "curvature": 1.0,
        }
        | row
        for row in rows
    ]
    column = lambda name: np.array([row[name] for row in rows], float)  # noqa: E731
    K = len(rows)
    ones, zeros = np.ones(K), np.zeros(K, int)
    plain = SampleStatistics(column("norm"), ones, column("snr"), column("tail"), zeros)
    return Health(
        horizons=np.array(horizons), J=column("J"), norms=np.repeat(column("norm")[:, None], 100, 1), plain=plain,
        pathwise=plain, score=plain._replace(snr=column("score")),
        bias=BiasTest(column("z"), column("size"), 0.1 * ones), difference=column("difference"),
        refinement=column("refinement"), float32=column("float32"), overflow=column("overflow").astype(int),
        condition=column("condition"), curvature=column("curvature"), growth=column("growth"), early=0.1 * ones,
        contributions=np.ones((K, 400)), std=0.1, where=where,
    )  # fmt: skip


EXPLODES = {"growth": 1.1, "snr": 1e-5}
RULES = {
    "good": ([{}, {}, {}], "bptt", None, "healthy up to T"),
    "exploding, a short horizon good": ([{}, {}, EXPLODES], "short-horizon", 50, "windows of 50 steps with a critic"),
    "float32 wrong and growing": ([{}, {}, {"growth": 1.1, "float32": 2.0}], "short-horizon", 50, "has exploded"),
    "none good, the score function better": ([EXPLODES | {"growth": 3.0}] * 3, "likelihood-ratio", None, "more signal"),
    "none good at all": ([EXPLODES | {"growth": 3.0, "score": 0.0}] * 3, "continuation", None, "test shorter ones"),
    "biased in part": ([{}, {"z": 9.0, "size": 0.5}, {}], "mixed", None, "biased at T = 50"),
    "biased in whole": ([{}, {"z": 9.0, "size": 1.0}, {}], "likelihood-ratio", None, "wrong at T = 50"),
    "a bias too small to matter": ([{}, {"z": 9.0, "size": 0.01}, {}], "bptt", None, "healthy"),
    "a bias too unsure": ([{}, {"z": 3.0, "size": 0.9}, {}], "bptt", None, "healthy"),
    "noisy": ([{}, {}, {"snr": 1e-3}], "bptt", None, "1,000 rollouts"),
    "heavy": ([{}, {}, {"tail": 0.9}], "continuation", None, "90% of its variance"),
    "heavy, and so noisy": ([{}, {}, {"tail": 0.9, "snr": 0.0}], "continuation", None, "a few rollouts dominate"),
    "steep": (
        [{}, {}, {"curvature": 1e5, "condition": 1e9}],
        "continuation",
        None,
        "100,000 times as steep as at T = 10",
    ),
    "steep, but well conditioned": ([{}, {}, {"curvature": 1e5}], "bptt", None, "healthy"),
    "float32 wrong": ([{}, {}, {"float32": 0.2}], "bptt", None, "off by 20% at T = 400"),
    "differences disagree": ([{}, {}, {"difference": 0.3}], "short-horizon", 50, "not the slope"),
    "nothing finite": (
        [{"J": np.nan, "overflow": 3}] * 3,
        "none",
        None,
        "Even the return is not finite: s[1] of start 0",
    ),
}


@pytest.mark.parametrize("rows, estimator, window, words", RULES.values(), ids=RULES)
def test_rules(rows, estimator, window, words):
    found = verdict(
        record(*rows, where="s[1] of start 0" if "nothing" in str(rows) or rows[0].get("overflow") else None)
    )
    assert (found.estimator, found.window) == (estimator, window) and words in found.headline


def test_a_window_of_a_quarter_is_truncated():
    found = verdict(record({}, {}, EXPLODES | {"growth": 1.2}, horizons=(10, 50, 200)))
    assert (found.estimator, found.window, found.safe) == ("truncated", 50, 50)


def test_the_integrator_and_the_condition_are_mentioned():
    health = record({}, {}, {"refinement": 0.4})._replace(condition=np.full(3, 1e9))
    reasons = " ".join(verdict(health).reasons)
    assert "changes the gradient by 40%" in reasons and "at least 1e+09" in reasons


# The pieces.


def test_spread_of_known_samples(x64):
    rng = np.random.default_rng(0)
    mean = rng.normal(size=5)
    samples = jnp.asarray(mean + 2 * rng.normal(size=(20000, 5)))
    found = sample_statistics(samples)
    np.testing.assert_allclose(found.variance, 20.0, rtol=0.03)
    np.testing.assert_allclose(found.snr, mean @ mean / 20, rtol=0.1)
    assert 0.01 < found.tail < 0.06 and found.nonfinite == 0
    noise = sample_statistics(samples - jnp.mean(samples, axis=0))
    assert noise.snr == 0


def test_spread_counts_what_is_not_finite_and_does_not_overflow():
    samples = jnp.array([[1e30, 0.0], [3e30, 0.0], [jnp.nan, 0.0], [0.0, jnp.inf]], jnp.float32)
    found = sample_statistics(samples)
    assert found.nonfinite == 2 and found.norm == pytest.approx(2e30)
    assert found.snr == pytest.approx(1.5) and found.variance == jnp.inf
    assert sample_statistics(jnp.ones((4, 2))).snr == jnp.inf and jnp.isnan(sample_statistics(jnp.zeros((4, 2))).snr)
    one = sample_statistics(jnp.zeros((200, 1)).at[7].set(1.0))
    assert one.tail > 0.99


@pytest.mark.slow
def test_the_test_of_bias_holds_its_level(x64):
    """z is standard normal without a bias, in any dimension and with any covariance; a bias is found and measured."""
    keys = jax.random.split(jax.random.key(0), 2000)
    scale = jnp.asarray(np.geomspace(1e-3, 1.0, 20))

    def z(key, shift):
        k1, k2 = jax.random.split(key)
        g, h = (3.0 + scale * jax.random.normal(k, (128, 20)) for k in (k1, k2))
        return bias_test(g + shift, h)

    null = jax.vmap(lambda k: z(k, 0.0).z)(keys)
    # Standard errors of the mean and of the standard deviation of 2000: .022 and .016.
    assert abs(np.mean(null)) < 0.09 and abs(np.std(null) - 1) < 0.07
    assert np.mean(null > 2.33) < 0.022
    found = z(keys[0], 1.0)
    assert found.z > 10 and found.size == pytest.approx(0.25, rel=0.1)


def test_a_difference_without_noise_is_certain():
    found = bias_test(jnp.zeros((8, 2)), jnp.tile(jnp.array([1.0, 0.0]), (8, 1)))
    assert found.z == jnp.inf and found.size == 1
    assert jnp.isnan(bias_test(jnp.ones((8, 2)), jnp.ones((8, 2))).z)


def test_differences_see_a_wrong_gradient(x64):
    task = tasks.pendulum_swingup(horizon=20)
    policy = Neural.init(task, hidden=(4,), key=jax.random.key(0))
    s0 = task.starts(jax.random.key(1), 4)
    gradient = ravel_pytree(BPTT()(policy, task, s0, None)[1])[0]
    error = jax.jit(difference_error)
    assert error(policy, task, s0, gradient, jax.random.key(2)) < 1e-7
    np.testing.assert_allclose(error(policy, task, s0, 1.1 * gradient, jax.random.key(2)), 0.1 / 1.1, rtol=1e-3)


@pytest.mark.parametrize("make", [pytest.param(tasks.cartpole_swingup, marks=pytest.mark.slow), tasks.lqr])
def test_a_prefix_is_the_shorter_task(make, x64):
    long, key = make(horizon=12), jax.random.key(0)
    policy = Neural.init(long, hidden=(4,), key=key)
    s0 = long.starts(key, 3)

    @jax.jit
    def cut(task, length):
        starts = jax.vmap(lambda s: prefix_start(s, length))(s0)
        return BPTT()(Seeing(policy), prefix(task, length), starts, None)

    for length in (1, 5, 12):
        J, gradient = cut(long, jnp.int32(length))
        wanted, same = BPTT()(policy, make(horizon=length), s0, None)
        np.testing.assert_allclose(J, wanted, rtol=1e-12)
        np.testing.assert_allclose(ravel_pytree(gradient)[0], ravel_pytree(same)[0], rtol=1e-9, atol=1e-12)
    assert cut._cache_size() == 1


def test_nothing_beyond_a_prefix_spoils_it():
    task, policy = sick(rate=1e8)
    s0 = jnp.array([0.5, 0.5])
    for length, finite in ((3, True), (T, False)):
        J, gradient = jax.value_and_grad(
            lambda pi, length: episode_return(Seeing(pi), prefix(task, length), prefix_start(s0, length))
        )(policy, jnp.int32(length))
        assert bool(jnp.isfinite(J)) is finite
        assert bool(jnp.all(jnp.isfinite(ravel_pytree(gradient)[0]))) is finite


def test_the_integrator_is_refined_wherever_it_is(x64):
    task = tasks.pendulum_swingup()
    s, a = jnp.array([1.0, 0.5]), jnp.array([0.3])
    half = tasks.pendulum_swingup().dynamics
    half = type(half)(**{name: getattr(half, name) for name in ("gravity", "gain")}, dt=half.dt / 2)
    wanted = half(half(s, a), a)
    np.testing.assert_allclose(refined(task).dynamics(s, a), wanted, rtol=1e-15)
    np.testing.assert_allclose(refined(tasks.noisy(task, std=0.0)).dynamics(s, a), wanted, rtol=1e-15)
    assert refined(tasks.lqr()) is None
    with pytest.raises(ValueError, match="substeps must be a whole number of at least 2, got 1"):
        refined(task, substeps=1)


def test_samples_in_chunks_are_the_samples():
    task, policy = sick()
    s0 = task.starts(jax.random.key(0), 7)
    J, gradients = gradient_samples(BPTT(), policy, task, s0, None, size=3)
    wanted, whole = BPTT().samples(policy, task, s0, None)
    np.testing.assert_allclose(J, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradients, jax.vmap(lambda g: ravel_pytree(g)[0])(whole), rtol=1e-5)


def test_products_of_numbers(x64):
    """A system of one state variable has Jacobians of one number, which no rotation is needed for."""
    found = log_singular_values(products(jnp.full((4, 1, 1), -2.0)))
    np.testing.assert_allclose(found[:, 0], np.log(2.0) * np.arange(1, 5), rtol=1e-12)
