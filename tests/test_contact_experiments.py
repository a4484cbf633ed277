"""What the experiments on contact compute, against closed forms and integrators; what they say, against made-up numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl import OpenLoop, rollout, tasks
from experiments import ball_and_wall, bouncing, heaviside, pushing, sinusoid, tennis
from tests.test_contact import sprung

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


def test_the_jump_is_what_the_pathwise_gradient_misses():
    """F' less the pathwise mean is the sum over jumps of their height times the density of landing on them."""
    theta, sigma = np.linspace(0.3, 1.4, 12), 0.1
    found = ball_and_wall.smoothed(theta, sigma)
    d = 1e-5
    up, down = ball_and_wall.smoothed(theta + d, sigma).value, ball_and_wall.smoothed(theta - d, sigma).value
    close(found.gradient, (up - down) / (2 * d), rtol=1e-6)
    # The angles at which the ball just clears the wall: 2 d sin cos - g d^2 = 2 height cos^2, a quadratic in tan.
    g, d, height = 9.81, 0.06, 0.02
    roots = np.roots([-g * d**2 / 2, d, -g * d**2 / 2 - height])
    missing = 0
    for angle, side in zip(sorted(np.arctan(roots)), (1, -1), strict=True):
        jump = side * ((np.sin(2 * angle) / g) ** 2 - d**2)
        missing += jump * np.exp(-(((angle - theta) / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi))
    close(found.gradient - found.pathwise, missing, atol=1e-9)
    assert np.max(missing) > 0.02


def test_the_settled_ball_is_the_integrators():
    for q in (0.1, 0.7, 1.4, 1.7, 1.95, 2.4):
        close(bouncing.settled(np.asarray([q]))[0], sprung(q, k=50.0, c=1.0, g=0.0), atol=1e-7)


def test_slopes_of_a_bounce(x64):
    size = bouncing.QUICK._replace(starts=24, steps=(0.1,))
    *_, numbers = bouncing.measure(size, lambda key, compute: compute())
    shares = {
        name: bouncing._agreement(model["0.1"], np.asarray(model["slope"])) for name, model in numbers["models"].items()
    }
    # Without a bounce, from 2 m on, all are right; after one the grid's is always wrong.
    q = np.asarray(numbers["q"])
    grid = numbers["models"][bouncing.GRID]
    bounced = q < 1.9
    close(grid["0.1"]["autodiff"][~bounced & (q > 2)], -1)
    wrong = np.asarray(grid["0.1"]["autodiff"])[bounced] * np.asarray(grid["slope"])[bounced]
    assert np.mean(np.isclose(wrong, -1)) > 0.9
    assert shares[bouncing.IMPACT]["autodiff"] == 1
    assert shares[bouncing.SPRING]["autodiff"] < 1
    assert all(share["narrow"] > 0.9 for share in shares.values())
    said = bouncing.conclude(numbers)
    assert "time of impact, h = 0.1: 100% of signs right" in said


def test_smaller_steps_of_the_same_force(x64):
    plan, s0 = OpenLoop(jnp.full((200, 1), 0.1)), jnp.asarray([0.0, 1.0, 0.0, 0.0])
    run = jax.jit(lambda task: rollout(plan, task, s0).s_T)
    whole = run(tasks.pushing(k=100.0))
    close(run(pushing._task("h", 100.0)), whole)
    fine, finer = run(pushing._task("h/4", 100.0)), run(pushing._task("h/16", 100.0))
    assert np.max(np.abs(finer - fine)) < 0.5 * np.max(np.abs(fine - whole)) < 0.01


def test_conclusions_follow_the_numbers():
    theta, zero = [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]
    exact = {"gradient": [0.1, 2.0, 0.1], "score_variance": [1, 8, 25], "baseline_variance": [1, 2, 1]}
    right = {"mean": exact["gradient"], "variance": exact["score_variance"]}
    hard = {"theta": theta, "exact": exact, heaviside.PATHWISE: {"mean": zero, "variance": zero}}
    hard |= {heaviside.SCORE: right, heaviside.BASELINE: right}
    assert "exactly 0 with variance 0" in heaviside.conclude({"hard": hard})
    hard[heaviside.PATHWISE] = right
    assert "the pathwise gradient is not 0" in heaviside.conclude({"hard": hard})

    dense = np.geomspace(1, 300, 50)
    flat = {"exact": np.ones(50), "off": [0.01], "z": 1.0}
    said = sinusoid.conclude({
        "dense": dense, sinusoid.PATHWISE: flat | {"exact": dense**2 / 1e4},
        sinusoid.SCORE: flat, sinusoid.BASELINE: flat | {"exact": np.full(50, 10.0)},
    })  # fmt: skip
    assert (
        "the power 2.00" in said and "without a baseline changes by a factor of 1 in all and is lower from 10" in said
    )
    assert "with one changes by a factor of 1 in all and is lower nowhere" in said


def test_what_is_said_of_policies():
    ends = {"return": [[-9.0, -9.0], [-1.0, -3.0]], "success": [[0.0, 0.0], [0.5, 0.7]], "rate": 0.01}
    bias = {"pathwise norm": 1.0, "score norm": 4.0, "cosine": -0.5, "z": 30.0}
    found = dict.fromkeys(tennis.STYLES, ends) | {"bias at the start": bias, "bias at the end": bias}
    said = tennis.conclude({"court": found})
    assert "0.25 of the score function's norm, a cosine of -0.50 with it and z = 30" in said
    assert "alpha-order -2 (60% of starts, rate 0.01)" in said
