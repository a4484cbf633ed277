"""Brax's environments as tasks, with Brax's own bodies, starts, limits, observations, rewards and ends.

Every one takes `mass`, `gear` and, where they matter, `damping` and `friction`: factors on Brax's values, one number or one for
each link, motor, joint or geom, leaves of `task.dynamics.physics`. `backend` is generalized (Brax's default), spring,
positional or mjx, as far as Brax has them for the body. Horizons are for rollouts that are differentiated; Brax trains and
evaluates on 1000 steps.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import ArrayLike

from diffmbrl.core import Task
from diffmbrl.tasks.adapters import brax_rewards as rewards
from diffmbrl.tasks.adapters.brax import Body, BraxDynamics, Observation, Reset, environment, physics, timestep


def brax_inverted_pendulum(
    *,
    horizon: int = 1000,
    mass: ArrayLike = 1.0,
    gear: ArrayLike = 1.0,
    damping: ArrayLike = 1.0,
    backend: str = "generalized",
    iterations: int | float = 1,
) -> Task:
    """Brax's inverted pendulum: 1 a step until the pole leans .2 rad; an action of 1 is 300 N. The reward has no gradient.

    The system of `inverted-pendulum`, in Brax's engines.
    """
    body = _body("inverted_pendulum", backend, iterations)
    lean = rewards.Lean(body)
    factors = {"mass": mass, "gear": gear, "damping": damping}
    return _task(
        "brax-inverted-pendulum",
        body,
        horizon,
        factors,
        reward=rewards.Upright(),
        done=lean,
        success=rewards.Not(lean),
    )


def brax_inverted_pendulum_shaped(
    *,
    horizon: int = 200,
    mass: ArrayLike = 1.0,
    gear: ArrayLike = 1.0,
    damping: ArrayLike = 1.0,
    backend: str = "generalized",
    iterations: int | float = 1,
) -> Task:
    """Brax's inverted pendulum, paid less as it leans, leaves the middle or pushes: a reward with a gradient.

    1 - .45 (angle / .2)^2 - .45 x^2 - .1 a^2, within [0, 1] as long as the pole stands and the cart is on its rail, so that an
    early end is never worth seeking.
    """
    body = _body("inverted_pendulum", backend, iterations)
    lean = rewards.Lean(body)
    factors = {"mass": mass, "gear": gear, "damping": damping}
    return _task(
        "brax-inverted-pendulum-shaped",
        body,
        horizon,
        factors,
        reward=rewards.NearlyUpright(body),
        done=lean,
        success=rewards.Not(lean),
    )


def brax_inverted_double_pendulum(
    *,
    horizon: int = 200,
    mass: ArrayLike = 1.0,
    gear: ArrayLike = 1.0,
    damping: ArrayLike = 1.0,
    backend: str = "generalized",
    iterations: int | float = 1,
) -> Task:
    """Brax's inverted double pendulum: 10 a step, less the tip's distance from 2 m and both rates, until it is at 1 m."""
    body = _body("inverted_double_pendulum", backend, iterations)
    tip = rewards.Tip(body)
    down, balanced = rewards.Down(tip), rewards.Balanced(tip)
    factors = {"mass": mass, "gear": gear, "damping": damping}
    return _task(
        "brax-inverted-double-pendulum",
        body,
        horizon,
        factors,
        reward=balanced,
        terminal=rewards.LastPosture(balanced),
        done=down,
        success=rewards.Not(down),
    )


def brax_reacher(
    *,
    horizon: int = 50,
    mass: ArrayLike = 1.0,
    gear: ArrayLike = 1.0,
    damping: ArrayLike = 1.0,
    backend: str = "generalized",
    iterations: int | float = 1,
) -> Task:
    """Brax's reacher: -|fingertip - target| - |a|^2, a target anywhere within .2 m. Success: within 2 cm at the end."""
    body = _body("reacher", backend, iterations)
    miss = rewards.Miss(body)
    reach = rewards.ReachReward(miss)
    factors = {"mass": mass, "gear": gear, "damping": damping}
    return _task("brax-reacher", body, horizon, factors, reward=reach, terminal=reach, success=rewards.Reached(miss))


def brax_swimmer(
    *,
    horizon: int = 200,
    mass: ArrayLike = 1.0,
    gear: ArrayLike = 1.0,
    backend: str = "generalized",
) -> Task:
    """Brax's swimmer: forward speed - .0001 |a|^2, three links in a fluid. Success: faster than .2 m/s at the end."""
    body = _body("swimmer", backend, 1)
    return _runner("brax-swimmer", body, horizon, {"mass": mass, "gear": gear}, control=1e-4, alive=0.0, speed=0.2)


def brax_halfcheetah(
    *,
    horizon: int = 200,
    mass: ArrayLike = 1.0,
    gear: ArrayLike = 1.0,
    damping: ArrayLike = 1.0,
    friction: ArrayLike = 1.0,
    backend: str = "generalized",
    iterations: int | float = 1,
) -> Task:
    """Brax's half cheetah: forward speed - .1 |a|^2. Success: faster than 1 m/s at the end."""
    body = _body("halfcheetah", backend, iterations)
    factors = {"mass": mass, "gear": gear, "damping": damping, "friction": friction}
    return _runner("brax-halfcheetah", body, horizon, factors, control=0.1, alive=0.0, speed=1.0)


def brax_hopper(
    *,
    horizon: int = 200,
    mass: ArrayLike = 1.0,
    gear: ArrayLike = 1.0,
    damping: ArrayLike = 1.0,
    friction: ArrayLike = 1.0,
    backend: str = "generalized",
    iterations: int | float = 1,
) -> Task:
    """Brax's hopper: 1 + forward speed - .001 |a|^2 until it falls. Success: standing and faster than .5 m/s at the end."""
    body = _body("hopper", backend, iterations)
    fallen = rewards.Fallen(body, _range(0.7, jnp.inf), _range(-0.2, 0.2), jnp.asarray(100.0, float))
    factors = {"mass": mass, "gear": gear, "damping": damping, "friction": friction}
    return _runner("brax-hopper", body, horizon, factors, control=1e-3, alive=1.0, speed=0.5, fallen=fallen)


def brax_walker2d(
    *,
    horizon: int = 200,
    mass: ArrayLike = 1.0,
    gear: ArrayLike = 1.0,
    damping: ArrayLike = 1.0,
    friction: ArrayLike = 1.0,
    backend: str = "generalized",
    iterations: int | float = 1,
) -> Task:
    """Brax's walker: 1 + forward speed - .001 |a|^2 until it falls. Success: standing and faster than .5 m/s at the end."""
    body = _body("walker2d", backend, iterations)
    fallen = rewards.Fallen(body, _range(0.8, 2.0), _range(-1.0, 1.0))
    factors = {"mass": mass, "gear": gear, "damping": damping, "friction": friction}
    return _runner("brax-walker2d", body, horizon, factors, control=1e-3, alive=1.0, speed=0.5, fallen=fallen)


def brax_ant(
    *,
    horizon: int = 200,
    mass: ArrayLike = 1.0,
    gear: ArrayLike = 1.0,
    damping: ArrayLike = 1.0,
    friction: ArrayLike = 1.0,
    backend: str = "generalized",
    iterations: int | float = 1,
) -> Task:
    """Brax's ant: 1 + forward speed - .5 |a|^2 until it falls. Success: standing and faster than .5 m/s at the end."""
    body = _body("ant", backend, iterations)
    fallen = rewards.Fallen(body, _range(0.2, 1.0))
    factors = {"mass": mass, "gear": gear, "damping": damping, "friction": friction}
    return _runner("brax-ant", body, horizon, factors, control=0.5, alive=1.0, speed=0.5, fallen=fallen)


def _body(env: str, backend: str, iterations: int | float) -> Body:
    """Raises: `ValueError` for iterations of MJX's solver that have no derivative."""
    body = Body(env, backend)
    environment(body)
    if iterations != 1:
        why = (
            "with more than one MJX's solver is a while loop, which has no reverse-mode derivative"
            if backend == "mjx"
            else f"only MJX's solver takes them, and the backend is '{backend}'"
        )
        raise ValueError(f"iterations must be 1, got {iterations:g}: {why}")
    return body


def _range(low: float, high: float) -> Any:
    return jnp.asarray([low, high], float)


def _runner(
    name: str,
    body: Body,
    horizon: int,
    factors: dict[str, Any],
    *,
    control: float,
    alive: float,
    speed: float,
    fallen: rewards.Fallen | None = None,
) -> Task:
    return _task(
        name,
        body,
        horizon,
        factors,
        reward=rewards.Forward(jnp.asarray(control, float), jnp.asarray(alive, float)),
        terminal=rewards.Speed(),
        done=fallen,
        success=rewards.Faster(jnp.asarray(speed, float), fallen),
    )


def _task(name: str, body: Body, horizon: int, factors: dict[str, Any], **pieces: Any) -> Task:
    m = environment(body).action_size
    return Task(
        name=name,
        dynamics=BraxDynamics(physics(body, name, **factors), body),
        initial=Reset(body),
        features=Observation(body),
        a_low=[-1.0] * m,
        a_high=[1.0] * m,
        horizon=horizon,
        dt=timestep(body),
        **pieces,
    )
