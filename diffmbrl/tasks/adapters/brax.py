r"""Any Brax environment as a task's dynamics: $s' = f(s, a)$ with Brax's own step, and its physical parameters as leaves.

The state is a vector [n] of the smallest set of floats from which Brax's own state can be made again to rounding; what else
Brax carries (mass matrices, contacts, joint frames) is a function of them. Which they are depends on the backend:

* generalized: q, qd. One step from the state made again differs from Brax's by 1e-6 (float32; its inverse of the mass matrix
  is iterated from the last one, here it starts exact), and by 6e-5 at a halfcheetah's joint rates of 20 rad/s. Brax's own
  inverse X can be lost in one fast step (a walker's, |M X - 1| from 4e-12 to .66): its steps then differ from these;
* mjx: q, qd, and the acceleration at which its solver starts, since one iteration does not forget it;
* spring, positional: the place, quaternion, angular velocity and velocity of each link's centre of mass. q and qd would not
  do: these engines hold joints by springs and corrections, and what lies between two links is part of the motion. Made again
  from q and qd, a step of the inverted pendulum is off by .6 with springs and by .05 with corrections.

A runner's state ends with one more number, the mean forward speed of the step that led to it: what Brax pays for.
Brax is imported when the first of its tasks is made.
"""

import contextlib
import copy
import dataclasses
import importlib
import inspect
import io
import warnings
from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import as_float, is_concrete

BACKENDS = ("generalized", "spring", "positional", "mjx")
MAXIMAL = ("spring", "positional")  # whose coordinates are places and rotations of links
RUNNERS = ("hopper", "walker2d", "halfcheetah", "swimmer", "ant")


@dataclasses.dataclass(frozen=True)
class Body:
    """Environment and backend, both static."""

    env: str  # Brax's name
    backend: str

    @property
    def runs(self) -> bool:
        """Whether the state has a forward speed."""
        return self.env in RUNNERS


class Physics(eqx.Module):
    """Physical parameters; None where the environment or the backend has none that matters."""

    mass: Float[Array, " links"]  # kg; inertias grow with them, the softness of constraints stays
    gear: Float[Array, " m"]  # N or N m per unit of action
    damping: Float[Array, " dofs"] | None  # N s/m or N m s/rad, of the joints
    friction: Float[Array, " geoms"] | None  # sliding; a contact has the larger one of the two


@cache
def environment(body: Body) -> Any:
    """Brax's environment, its numbers in double precision on the host.

    Raises: `ValueError` for an unknown backend, or one that the environment does not have; `ImportError` without Brax.
    """
    if body.backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {body.backend!r}")
    envs = _brax("envs")
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), _unpromoted(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mujoco = importlib.import_module("mujoco")
        mujoco.set_mju_user_warning(lambda text: None)  # else it writes MUJOCO_LOG.TXT into the current folder
        try:
            env = envs.get_environment(body.env, backend=body.backend)
        except ValueError as error:
            raise ValueError(f"Brax's {body.env} has no backend '{body.backend}': {error}") from error
        finally:
            mujoco.set_mju_user_warning(None)
        if body.backend == "mjx":
            env.sys = env.sys.tree_replace({"opt.iterations": 1})
        env.sys = jax.tree.map(np.asarray, env.sys)
    return env


def physics(body: Body, name: str, **factors: Any) -> Physics:
    """Brax's values times factors `mass`, `gear`, `damping`, `friction`: one number, or one for each link, motor, joint, geom.

    Raises: `ValueError` for a factor that is not finite and positive or of another shape, or that would change nothing.
    """
    sys = environment(body).sys
    values = {
        "mass": sys.link.inertia.mass,
        "gear": sys.actuator.gear,
        "damping": sys.dof.damping if body.backend not in MAXIMAL and np.any(sys.dof.damping) else None,
        "friction": sys.geom_friction[:, 0] if touches(body) else None,
    }
    for parameter, factor in factors.items():
        value, x = values[parameter], as_float(factor)
        if value is None:
            if not is_concrete(x) or np.any(np.asarray(x) != 1):
                raise ValueError(f"{parameter} of task '{name}' changes nothing on backend '{body.backend}'")
            continue
        if x.shape not in ((), value.shape):
            raise ValueError(
                f"{parameter} of task '{name}' must be one number or {value.size}, got shape {list(x.shape)}"
            )
        if is_concrete(x) and not bool(jnp.all(jnp.isfinite(x) & (x > 0))):
            raise ValueError(f"{parameter} of task '{name}' must be a finite positive number, got {x}")
        values[parameter] = x * value.astype(x.dtype)
    leaves: dict[str, Any] = {key: None if x is None else as_float(x) for key, x in values.items()}
    return Physics(**leaves)


def touches(body: Body) -> bool:
    """Whether any of its geoms may meet another."""
    return body.env in ("hopper", "walker2d", "halfcheetah", "ant")


class BraxDynamics(eqx.Module):
    """Brax's `step`, from state to state."""

    physics: Physics
    body: Body = eqx.field(static=True)

    def __call__(
        self, s: Float[Array, " n"], a: Float[Array, " m"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " n"]:
        return _step(self.body, self.physics, s, a)


class Reset(eqx.Module):
    """Brax's distribution of starts."""

    body: Body = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray) -> Float[Array, " n"]:
        return _reset(self.body, key)


class Observation(eqx.Module):
    """Brax's observation of a state."""

    body: Body = eqx.field(static=True)

    def __call__(self, s: Float[Array, " n"]) -> Float[Array, " k"]:
        return _observe(self.body, s)


# Traced once for all rollouts, gradients and linearisations of a process: Brax's Python is slow.
@partial(jax.jit, static_argnums=0)
def _step(body: Body, physics: Physics, s: Array, a: Array) -> Array:
    with _unpromoted():
        env = _given(body, _with(body, nominal(body, s.dtype), physics))
        before = _made_again(body, env.sys, s)
        done = _brax("envs.base").State(before, jnp.zeros(0), jnp.zeros(()), jnp.zeros(()))
        after = env.step(done, a).pipeline_state
        numbers = _numbers(body, after)
        if body.runs:
            speed = (after.x.pos[0, 0] - before.x.pos[0, 0]) / timestep(body)
            numbers = jnp.append(numbers, speed)
        return numbers.astype(s.dtype)


@partial(jax.jit, static_argnums=0)
def _reset(body: Body, key: PRNGKeyArray) -> Array:
    with _unpromoted():
        env = _given(body, nominal(body, jnp.zeros(()).dtype))
        if body.backend != "mjx":  # of the rest of a first state, a start needs nothing
            env.pipeline_init = partial(_placed, env.sys)
        numbers = _numbers(body, env.reset(key).pipeline_state)
        return as_float(jnp.append(numbers, 0.0) if body.runs else numbers)


@partial(jax.jit, static_argnums=0)
def _observe(body: Body, s: Array) -> Array:
    with _unpromoted():
        env = environment(body)
        return env._get_obs(seen(body, s)).astype(s.dtype)


@partial(jax.jit, static_argnums=0)
def seen(body: Body, s: Float[Array, " n"]) -> Any:
    """Brax's `base.State` of a state: q, qd, and place and motion of the links' frames in the world."""
    base, kinematics = _brax("base"), _brax("kinematics")
    sys = nominal(body, s.dtype)
    with _unpromoted():
        if body.backend in MAXIMAL:
            x, xd, *_ = _frames(sys, s)
            j, jd, *_ = kinematics.world_to_joint(sys, x, xd)
            q, qd = kinematics.inverse(sys, j, jd)
        else:
            q, qd = _coordinates(sys, s)
            x, xd = kinematics.forward(sys, q, qd)
    return base.State(q=q, qd=qd, x=x, xd=xd, contact=None)


class _Placed(NamedTuple):
    q: Array
    qd: Array
    x: Any
    xd: Any
    x_i: Any
    xd_i: Any


def _placed(sys: Any, q: Array, qd: Array) -> _Placed:
    """Frames of links and centres of mass, which every engine computes first from joint angles and rates."""
    x, xd = _brax("kinematics").forward(sys, q, qd)
    return _Placed(q, qd, x, xd, *_brax("com").from_world(sys, x, xd))


def timestep(body: Body) -> float:
    """Seconds of a step."""
    return float(environment(body).dt)


@cache
def nominal(body: Body, dtype: Any) -> Any:
    """Brax's system with its floats in one precision."""

    def cast(x):
        if np.issubdtype(x.dtype, np.floating):
            return jnp.asarray(x, dtype)
        return jnp.asarray(x, jnp.int32 if x.dtype == np.int64 else x.dtype)

    with jax.ensure_compile_time_eval():
        return jax.tree.map(cast, environment(body).sys)


def _with(body: Body, sys: Any, physics: Physics) -> Any:
    ratio = physics.mass / sys.link.inertia.mass
    inertia = sys.link.inertia.replace(mass=physics.mass, i=sys.link.inertia.i * ratio[:, None, None])
    sys = sys.replace(link=sys.link.replace(inertia=inertia), actuator=sys.actuator.replace(gear=physics.gear))
    if physics.friction is not None:
        sys = sys.replace(geom_friction=sys.geom_friction.at[:, 0].set(physics.friction))
    if physics.damping is not None:
        sys = sys.replace(dof=sys.dof.replace(damping=physics.damping), dof_damping=physics.damping)
    if body.backend == "mjx":  # which has fields of its own; body 0 is the world
        ratio = jnp.concatenate([jnp.ones(1, ratio.dtype), ratio])
        mass, parents = sys.body_mass * ratio, np.asarray(environment(body).sys.body_parentid)
        below = mass
        for child in range(len(parents) - 1, 0, -1):
            below = below.at[int(parents[child])].add(below[child])
        sys = sys.replace(
            body_mass=mass,
            body_inertia=sys.body_inertia * ratio[:, None],
            body_subtreemass=below,
            actuator_gear=sys.actuator_gear.at[:, 0].set(physics.gear),
        )
    return sys


def _given(body: Body, sys: Any) -> Any:
    env = copy.copy(environment(body))
    env.sys = sys
    return env


def _coordinates(sys: Any, s: Array) -> tuple[Array, Array]:
    nq, nv = sys.q_size(), sys.qd_size()
    return s[:nq], s[nq : nq + nv]


def _frames(sys: Any, s: Array) -> tuple[Any, ...]:
    base, com = _brax("base"), _brax("com")
    k = sys.num_links()
    place, turn, ang, vel = jnp.split(s[: 13 * k], [3 * k, 7 * k, 10 * k])
    x_i = base.Transform(pos=place.reshape(k, 3), rot=turn.reshape(k, 4))
    xd_i = base.Motion(ang=ang.reshape(k, 3), vel=vel.reshape(k, 3))
    return *com.to_world(sys, x_i, xd_i), x_i, xd_i


def _numbers(body: Body, state: Any) -> Array:
    if body.backend in MAXIMAL:
        parts = [state.x_i.pos, state.x_i.rot, state.xd_i.ang, state.xd_i.vel]
    else:
        parts = [state.q, state.qd, *([state.qacc_warmstart] if body.backend == "mjx" else [])]
    return jnp.concatenate([x.ravel() for x in parts])


def _made_again(body: Body, sys: Any, s: Array) -> Any:
    pipeline = _brax(f"{body.backend}.pipeline")
    if body.backend not in MAXIMAL:
        q, qd = _coordinates(sys, s)
        state = pipeline.init(sys, q, qd)
        if body.backend == "mjx":
            start = len(q) + len(qd)
            return state.replace(qacc_warmstart=s[start : start + len(qd)])
        return state
    kinematics, com = _brax("kinematics"), _brax("com")
    x, xd, x_i, xd_i = _frames(sys, s)
    j, jd, a_p, a_c = kinematics.world_to_joint(sys, x, xd)
    q, qd = kinematics.inverse(sys, j, jd)
    parts = {"q": q, "qd": qd, "x": x, "xd": xd, "contact": None, "x_i": x_i, "xd_i": xd_i, "j": j, "jd": jd}
    parts |= {"a_p": a_p, "a_c": a_c, "mass": sys.link.inertia.mass ** (1 - sys.spring_mass_scale)}
    if body.backend == "spring":
        parts["i_inv"] = com.inv_inertia(sys, x)
    return _brax(f"{body.backend}.base").State(**parts)


@contextlib.contextmanager
def _unpromoted():
    """Brax mixes dtypes on purpose."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@cache
def _brax(module: str) -> Any:
    """Import a module of Brax without its output.

    Raises: `ImportError` naming the packages to install.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), jax.ensure_compile_time_eval():
            fluid: Any = importlib.import_module("brax.fluid")
            found = importlib.import_module(f"brax.{module}")
    except ImportError as error:
        raise ImportError(f"tasks of Brax need brax and mujoco-mjx, pip install brax mujoco-mjx: {error}") from error
    if "a_min" not in inspect.signature(jnp.clip).parameters and not isinstance(fluid.jp, _OlderNumpy):
        fluid.jp = _OlderNumpy()  # Brax 0.14.2 asks it for what JAX 0.10 no longer has: its swimmer would not swim
    return found


class _OlderNumpy:
    """jax.numpy with the names that `clip` once gave to its limits."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(x: Any, a_min: Any = None, a_max: Any = None) -> Any:
        return jnp.clip(x, a_min, a_max)
