"""Brax's environments as tasks, with Brax's own bodies, starts, limits, observations, rewards and ends.

`ROWS` is the table of them; each public constructor is made from its row. Default horizons suit rollouts that are
differentiated; Brax itself trains and evaluates on 1000 steps.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from diffmbrl.core import Task
from diffmbrl.tasks.adapters import brax_rewards as rewards
from diffmbrl.tasks.adapters.brax import Body, BraxDynamics, Observation, Reset, environment, physics, timestep

FACTORS = {
    "mass": "Factor on the links' masses and inertias, one number or shape [links].",
    "gear": "Factor on the motors' gears (N or N m per unit of action), one number or shape [m].",
    "damping": "Factor on the joints' damping, one number or shape [dofs].",
    "friction": "Factor on the sliding friction of contacts, one number or shape [geoms].",
}
HINGED = ("mass", "gear", "damping")
TOUCHING = ("mass", "gear", "damping", "friction")


class BraxRow(NamedTuple):
    """How a task is made from one of Brax's environments.

    Args:
        env: Brax's name of the environment.
        summary: First line of the constructor's docstring.
        pieces: Function of the body that returns `reward` and, where there are any, `terminal`, `done` and `success`.
        factors: Names of the physical parameters, keys of `FACTORS`.
        horizon: Default number of steps.
        iterations: Whether the constructor takes `iterations`; false if Brax has the body on its generalized backend only.
        detail: Further sentences of the docstring.
    """

    env: str
    summary: str
    pieces: Callable[[Body], Mapping[str, Callable | None]]
    factors: tuple[str, ...]
    horizon: int = 200
    iterations: bool = True
    detail: str = ""


def _inverted_pendulum(reward: Callable[[Body], Callable]) -> Callable[[Body], Mapping[str, Callable]]:
    def pieces(body: Body) -> Mapping[str, Callable]:
        lean = rewards.Lean(body)
        return {"reward": reward(body), "done": lean, "success": rewards.Not(lean)}

    return pieces


def _double_pendulum(body: Body) -> Mapping[str, Callable]:
    tip = rewards.Tip(body)
    down, balanced = rewards.Down(tip), rewards.Balanced(tip)
    return {
        "reward": balanced,
        "terminal": rewards.LastPosture(balanced),
        "done": down,
        "success": rewards.Not(down),
    }


def _reacher(body: Body) -> Mapping[str, Callable]:
    miss = rewards.Miss(body)
    reach = rewards.ReachReward(miss)
    return {"reward": reach, "terminal": reach, "success": rewards.Reached(miss)}


def _runner(
    *, control: float, alive: float, speed: float, fallen: Callable[[Body], rewards.Fallen] | None = None
) -> Callable[[Body], Mapping[str, Callable | None]]:
    """Forward speed, plus `alive`, less `control` |a|^2; success is a last step faster than `speed` [m/s]."""

    def pieces(body: Body) -> Mapping[str, Callable | None]:
        end = None if fallen is None else fallen(body)
        return {
            "reward": rewards.Forward(jnp.asarray(control, float), jnp.asarray(alive, float)),
            "terminal": rewards.Speed(),
            "done": end,
            "success": rewards.Faster(jnp.asarray(speed, float), end),
        }

    return pieces


def _range(low: float, high: float) -> Array:
    return jnp.asarray([low, high], float)


ROWS: dict[str, BraxRow] = {
    "brax-inverted-pendulum": BraxRow(
        env="inverted_pendulum",
        summary="Brax's inverted pendulum: 1 a step until the pole leans .2 rad; an action of 1 is 300 N. "
        "The reward has no gradient.",
        pieces=_inverted_pendulum(lambda body: rewards.Upright()),
        factors=HINGED,
        horizon=1000,
        detail="The system of `inverted-pendulum`, in Brax's engines.",
    ),
    "brax-inverted-pendulum-shaped": BraxRow(
        env="inverted_pendulum",
        summary="Brax's inverted pendulum, paid less as it leans, leaves the middle or pushes: a reward with a gradient.",
        pieces=_inverted_pendulum(rewards.NearlyUpright),
        factors=HINGED,
        detail="The reward 1 - .45 (angle / .2)^2 - .45 x^2 - .1 a^2 stays within [0, 1] while the pole stands and the\n"
        "cart is on its rail, so ending the episode early never pays.",
    ),
    "brax-inverted-double-pendulum": BraxRow(
        env="inverted_double_pendulum",
        summary="Brax's inverted double pendulum: 10 a step, less the tip's distance from 2 m and both rates, "
        "until it is at 1 m.",
        pieces=_double_pendulum,
        factors=HINGED,
    ),
    "brax-reacher": BraxRow(
        env="reacher",
        summary="Brax's reacher: -|fingertip - target| - |a|^2, a target anywhere within .2 m. "
        "Success: within 2 cm at the end.",
        pieces=_reacher,
        factors=HINGED,
        horizon=50,
    ),
    "brax-swimmer": BraxRow(
        env="swimmer",
        summary="Brax's swimmer: forward speed - .0001 |a|^2, three links in a fluid. "
        "Success: faster than .2 m/s at the end.",
        pieces=_runner(control=1e-4, alive=0.0, speed=0.2),
        factors=("mass", "gear"),
        iterations=False,
    ),
    "brax-halfcheetah": BraxRow(
        env="halfcheetah",
        summary="Brax's half cheetah: forward speed - .1 |a|^2. Success: faster than 1 m/s at the end.",
        pieces=_runner(control=0.1, alive=0.0, speed=1.0),
        factors=TOUCHING,
    ),
    "brax-hopper": BraxRow(
        env="hopper",
        summary="Brax's hopper: 1 + forward speed - .001 |a|^2 until it falls. "
        "Success: standing and faster than .5 m/s at the end.",
        pieces=_runner(
            control=1e-3,
            alive=1.0,
            speed=0.5,
            fallen=lambda body: rewards.Fallen(
                body, _range(0.7, jnp.inf), _range(-0.2, 0.2), jnp.asarray(100.0, float)
            ),
        ),
        factors=TOUCHING,
    ),
    "brax-walker2d": BraxRow(
        env="walker2d",
        summary="Brax's walker: 1 + forward speed - .001 |a|^2 until it falls. "
        "Success: standing and faster than .5 m/s at the end.",
        pieces=_runner(
            control=1e-3,
            alive=1.0,
            speed=0.5,
            fallen=lambda body: rewards.Fallen(body, _range(0.8, 2.0), _range(-1.0, 1.0)),
        ),
        factors=TOUCHING,
    ),
    "brax-ant": BraxRow(
        env="ant",
        summary="Brax's ant: 1 + forward speed - .5 |a|^2 until it falls. "
        "Success: standing and faster than .5 m/s at the end.",
        pieces=_runner(control=0.5, alive=1.0, speed=0.5, fallen=lambda body: rewards.Fallen(body, _range(0.2, 1.0))),
        factors=TOUCHING,
    ),
}


def _constructor(name: str) -> Callable[..., Task]:
    """The constructor of a row, with a signature and a docstring like those of every other task."""
    row = ROWS[name]
    signature = _signature(row)

    def brax_task(**given: Any) -> Task:
        bound = signature.bind(**given)
        bound.apply_defaults()
        values = bound.arguments
        body = _body(row.env, values["backend"], values.get("iterations", 1))
        factors = {factor: values[factor] for factor in row.factors}
        m = environment(body).action_size
        return Task(
            name=name,
            dynamics=BraxDynamics(physics(body, name, **factors), body),
            initial=Reset(body),
            features=Observation(body),
            a_low=[-1.0] * m,
            a_high=[1.0] * m,
            horizon=values["horizon"],
            dt=timestep(body),
            **row.pieces(body),  # pyright: ignore[reportArgumentType]
        )

    brax_task.__name__ = brax_task.__qualname__ = name.replace("-", "_")
    brax_task.__doc__ = _docstring(row)
    brax_task.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return brax_task


def _signature(row: BraxRow) -> inspect.Signature:
    def keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    parameters = [keyword("horizon", row.horizon, int)]
    parameters += [keyword(factor, 1.0, ArrayLike) for factor in row.factors]
    parameters.append(keyword("backend", "generalized", str))
    if row.iterations:
        parameters.append(keyword("iterations", 1, int | float))
    return inspect.Signature(parameters, return_annotation=Task)


def _docstring(row: BraxRow) -> str:
    described = {
        "horizon": "Number of steps.",
        **{factor: FACTORS[factor] for factor in row.factors},
        "backend": "Brax's engine: generalized, spring, positional or mjx; not every body has all of them.",
    }
    if row.iterations:
        described["iterations"] = "Iterations of MJX's solver; only 1 has a reverse-mode derivative."
    lines = [row.summary, "", *([row.detail, ""] if row.detail else []), "Args:"]
    lines += [f"    {name}: {text}" for name, text in described.items()]
    lines += [
        *("", "Returns:", "    The task; its physical parameters are the leaves of `task.dynamics.physics`."),
        *(
            "",
            "Raises:",
            "    ValueError: If Brax has no such backend for the body, `iterations` is not 1, or a factor is not",
        ),
        *("        finite and positive, has another shape or changes nothing on this backend.",),
        *("    ImportError: If brax or mujoco-mjx is not installed.",),
    ]
    return "\n".join(lines)


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


brax_inverted_pendulum = _constructor("brax-inverted-pendulum")
brax_inverted_pendulum_shaped = _constructor("brax-inverted-pendulum-shaped")
brax_inverted_double_pendulum = _constructor("brax-inverted-double-pendulum")
brax_reacher = _constructor("brax-reacher")
brax_swimmer = _constructor("brax-swimmer")
brax_halfcheetah = _constructor("brax-halfcheetah")
brax_hopper = _constructor("brax-hopper")
brax_walker2d = _constructor("brax-walker2d")
brax_ant = _constructor("brax-ant")
