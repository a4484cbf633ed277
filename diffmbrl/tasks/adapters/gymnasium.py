"""Any Gymnasium environment with Box spaces, as the real system of a model-based loop, stepped on the host.

Its reward and its end are unknown (`NotGiven`) and must be learned (`agents/learned_reward.py`), except for the environments
in `KNOWN`, whose formulas are written here. Needs the extra `gym`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.choices import validate_choice
from diffmbrl.core import State, Task, as_float

PREFIX = "gym:"
STARTS = 64  # resets that represent the start distribution
PARTS = ("reward", "end")  # what can be given


class NotGiven(eqx.Module):
    """Placeholder of a reward, an end or a dynamics that the environment does not reveal."""

    what: str = eqx.field(static=True)

    def __call__(self, s: State, a: Any = None, *, key: PRNGKeyArray | None = None) -> Any:
        raise TypeError(f"the {self.what} of this system is not given: learn it, and put the model in its place")


class Resets(eqx.Module):
    """Starts drawn uniformly from resets of the environment."""

    s: Float[Array, "k n"]

    def __call__(self, key: PRNGKeyArray) -> Float[Array, " n"]:
        return self.s[jax.random.randint(key, (), 0, self.s.shape[0])]


class PendulumReward(eqx.Module):
    """Pendulum-v1's, of its observation (cos angle, sin angle, rate): -(angle^2 + .1 rate^2 + .001 torque^2)."""

    def __call__(self, s: Float[Array, "3"], a: Float[Array, "1"]) -> Float[Array, ""]:
        return -(jnp.arctan2(s[1], s[0]) ** 2 + 0.1 * s[2] ** 2 + 0.001 * jnp.clip(a[0], -2, 2) ** 2)


class Upright(eqx.Module):
    """InvertedPendulum's reward: 1 for each step except the last of a fall."""

    def __call__(self, s: Float[Array, "4"], a: Float[Array, "1"]) -> Float[Array, ""]:
        return jnp.ones((), s.dtype)


class Fallen(eqx.Module):
    """InvertedPendulum's end: the pole leans more than .2 rad."""

    def __call__(self, s: Float[Array, "4"]) -> Bool[Array, ""]:
        return jnp.abs(s[1]) > 0.2


class Formulas(NamedTuple):
    """Formulas of an environment's observation, and the names of its numbers."""

    reward: Callable
    end: Callable | None  # None: it never ends but by the clock
    states: tuple[str, ...]


KNOWN: dict[str, Formulas] = {
    "Pendulum-v1": Formulas(PendulumReward(), None, ("cos angle [1]", "sin angle [1]", "rate [rad/s]")),
    "InvertedPendulum-v5": Formulas(Upright(), Fallen(), ("x [m]", "angle [rad]", "v [m/s]", "w [rad/s]")),
}


class Environment(NamedTuple):
    """A constructor of the environment, and the task as an agent knows it."""

    make: Callable[[], Any]
    task: Task


def environment(
    source: str | Callable[[], Any],
    *,
    horizon: int | None = None,
    given: Sequence[str] = (),
    reward: Callable | None = None,
    done: Callable | None = None,
    dt: float | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Environment:
    """Make a Gymnasium environment and its task.

    Args:
        source: Id of a Gymnasium environment, or a function that makes one.
        horizon: Number of steps; None for the time limit of the id.
        given: Parts to take from `KNOWN`: "reward", "end".
        reward: Reward as a function of observation and action; None to leave it unknown.
        done: End as a function of the observation; None to leave it unknown.
        dt: Duration of a step [s]; None for the environment's own `dt`, or one frame of its `render_fps`.
        parameters: Arguments of `gymnasium.make`.

    Returns:
        A constructor of the environment, and the task: states are observations, limits those of the action space,
        and starts 64 resets with seeds 0 to 63.

    Raises:
        ValueError: If the id is unknown, a space is no flat Box of floats, horizon or dt is neither given nor
            known, or a part cannot be given.
        ModuleNotFoundError: If Gymnasium, or a package that the environment needs, is not installed.

    >>> made = environment("Pendulum-v1", given=["reward"])
    >>> made.task.n, made.task.m, made.task.horizon, made.task.dt
    (3, 1, 200, 0.05)
    """
    gymnasium = _gymnasium()
    name = source if isinstance(source, str) else getattr(source, "__name__", "environment")
    if horizon is not None and (not isinstance(horizon, int) or horizon < 1):
        raise ValueError(f"horizon must be a whole number of at least 1, got {horizon!r}")
    formulas = _given(name, given)

    def make() -> Any:
        if not isinstance(source, str):
            return source()
        limit = {} if horizon is None else {"max_episode_steps": horizon}
        return gymnasium.make(source, disable_env_checker=True, **limit, **(parameters or {}))

    try:
        first = make()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"'{name}' needs the package {error.name}: pip install 'diffmbrl[gym]'") from None
    except gymnasium.error.Error as error:
        raise ValueError(f"Gymnasium does not make '{name}': {error}") from None
    except TypeError as error:
        raise ValueError(f"'{name}' does not take {', '.join(parameters or ['these arguments'])}: {error}") from None
    try:
        _check(name, "observation", first.observation_space)
        _check(name, "action", first.action_space)
        task = Task(
            name=f"{PREFIX}{name}",
            dynamics=NotGiven("dynamics"),
            reward=reward or formulas.get("reward") or NotGiven("reward"),
            done=done if done is not None else formulas["end"] if "end" in formulas else NotGiven("end"),
            initial=Resets(as_float(np.stack([observed(first.reset(seed=k)[0]) for k in range(STARTS)]))),
            a_low=first.action_space.low,
            a_high=first.action_space.high,
            horizon=_horizon(name, first, horizon),
            dt=_dt(name, first) if dt is None else dt,
        )
    finally:
        first.close()
    return Environment(make, task)


def observed(observation: Any) -> np.ndarray:
    """Convert an observation to a state [n] in the working precision."""
    return np.array(observation, jax.dtypes.canonicalize_dtype(float))


def names(task: Task) -> tuple[str, ...]:
    """Return names and units of the n numbers of an observation; numbered if they are unknown."""
    row = KNOWN.get(task.name.removeprefix(PREFIX))
    return tuple(f"observation {i + 1}" for i in range(task.n)) if row is None else row.states


def _gymnasium() -> Any:
    try:
        return importlib.import_module("gymnasium")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Gymnasium is not installed: pip install 'diffmbrl[gym]'") from None


def _given(name: str, given: Sequence[str]) -> dict[str, Callable | None]:
    """Return the requested formulas."""
    for part in given:
        validate_choice("part that can be given", part, PARTS)
    if given and name not in KNOWN:
        raise ValueError(
            f"the {' and '.join(given)} of '{name}' cannot be given by name, only of: {', '.join(KNOWN)}; leave it to be "
            "learned, or pass a formula in Python"
        )
    return {part: getattr(KNOWN[name], part) for part in given}


def _check(name: str, what: str, space: Any) -> None:
    """Raise a `ValueError` unless a space is a flat Box of floats."""
    kind = type(space).__name__
    if kind != "Box":
        way = (
            "gymnasium.wrappers.FlattenObservation" if what == "observation" else "an environment of continuous actions"
        )
        raise ValueError(f"the {what} space of '{name}' is {space}: expected a Box of floats; try {way}")
    if len(space.shape) != 1 or space.shape[0] < 1:
        raise ValueError(
            f"the {what} space of '{name}' has shape {list(space.shape)}: expected one axis; images are not for this, other "
            "arrays go through gymnasium.wrappers.FlattenObservation"
        )
    if not np.issubdtype(space.dtype, np.floating):
        raise ValueError(f"the {what} space of '{name}' is a Box of {space.dtype}: expected floats")


def _horizon(name: str, env: Any, horizon: int | None) -> int:
    limit = horizon or getattr(env.spec, "max_episode_steps", None)
    if limit is None:
        raise ValueError(f"'{name}' has no time limit of its own: give a horizon")
    return int(limit)


def _dt(name: str, env: Any) -> float:
    own, frames = getattr(env.unwrapped, "dt", None), env.metadata.get("render_fps")
    if own is None and not frames:
        raise ValueError(f"'{name}' has neither a dt nor a render_fps, so the duration of a step is unknown: give dt")
    return float(own) if own is not None else 1 / float(frames)
