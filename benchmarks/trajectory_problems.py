"""The trajectory optimisation problems that iLQR is timed on: semi-implicit Euler, quadratic costs, no limits.

With q the positions, v the velocities, x = (q, v): v' = v + dt a(q, v, u), q' = q + dt (velocity of q at v'). Cost
sum_t dt/2 [(x - xg)' Wx (x - xg) + u' R u] + 1/2 (x_T - xg)' Wf (x_T - xg). Angles are 0 hanging, pi upright. dt = .05 s.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffmbrl.core import Box, Task

DT = 0.05
G = 9.81


class Pendulum(eqx.Module):
    """A point mass on a rod, m = l = 1: torque u."""

    def __call__(self, s, a, *, key=None):
        q, v = s
        v = v + DT * (a[0] - G * jnp.sin(q))
        return jnp.stack([q + DT * v, v])


class CartPole(eqx.Module):
    """m_c = 1, m_p = .1, l = .5: force u on the cart."""

    def __call__(self, s, a, *, key=None):
        x, q, v, w = s
        m_c, m_p, l = 1.0, 0.1, 0.5
        sin, cos = jnp.sin(q), jnp.cos(q)
        den = m_c + m_p * sin**2
        v_dot = (a[0] + m_p * sin * (l * w**2 + G * cos)) / den
        w_dot = (-a[0] * cos - m_p * l * w**2 * cos * sin - (m_c + m_p) * G * sin) / (l * den)
        v, w = v + DT * v_dot, w + DT * w_dot
        return jnp.stack([x + DT * v, q + DT * w, v, w])


class Acrobot(eqx.Module):
    """Sutton's constants: masses, first link's length and inertias 1, centres at 1/2; torque u on the second joint."""

    def __call__(self, s, a, *, key=None):
        q1, q2, w1, w2 = s
        sin2, cos2 = jnp.sin(q2), jnp.cos(q2)
        d1, d2 = 3.5 + cos2, 1.25 + 0.5 * cos2
        phi2 = 0.5 * G * jnp.sin(q1 + q2)
        phi1 = -0.5 * w2 * (w2 + 2 * w1) * sin2 + 1.5 * G * jnp.sin(q1) + phi2
        w2_dot = (a[0] + d2 / d1 * phi1 - 0.5 * w1**2 * sin2 - phi2) / (1.25 - d2**2 / d1)
        w1_dot = -(d2 * w2_dot + phi1) / d1
        w1, w2 = w1 + DT * w1_dot, w2 + DT * w2_dot
        return jnp.stack([q1 + DT * w1, q2 + DT * w2, w1, w2])


class Quadrotor(eqx.Module):
    """Twelve states: position, roll-pitch-yaw, world velocity, body rates; u = (thrust - m g, torques)."""

    def __call__(self, s, a, *, key=None):
        mass, Jx, Jy, Jz = 0.5, 0.0023, 0.0023, 0.004
        x, y, z, roll, pitch, yaw, vx, vy, vz, p, q, r = s
        sr, cr, sp, cp, sy, cy = (f(angle) for angle in (roll, pitch, yaw) for f in (jnp.sin, jnp.cos))
        thrust = (a[0] + mass * G) / mass
        vx = vx + DT * thrust * (cr * sp * cy + sr * sy)
        vy = vy + DT * thrust * (cr * sp * sy - sr * cy)
        vz = vz + DT * (thrust * cr * cp - G)
        p, q, r = (
            p + DT * (a[1] - (Jz - Jy) * q * r) / Jx,
            q + DT * (a[2] - (Jx - Jz) * p * r) / Jy,
            r + DT * (a[3] - (Jy - Jx) * p * q) / Jz,
        )
        tan = sp / cp
        roll, pitch, yaw = (
            roll + DT * (p + (q * sr + r * cr) * tan),
            pitch + DT * (q * cr - r * sr),
            yaw + DT * (q * sr + r * cr) / cp,
        )
        return jnp.stack([x + DT * vx, y + DT * vy, z + DT * vz, roll, pitch, yaw, vx, vy, vz, p, q, r])


class Tracking(eqx.Module):
    """-1/2 (x - xg)' diag(w) (x - xg), and likewise for the actions."""

    goal: Float[Array, " n"]
    w: Float[Array, " n"]
    w_a: Float[Array, " m"]

    def __call__(self, s, a=None):
        cost = jnp.sum(self.w * (s - self.goal) ** 2)
        return -(cost if a is None else cost + jnp.sum(self.w_a * a**2)) / 2


def problem(name: str, horizon: int) -> Task:
    """One of PROBLEMS as a task, its start drawn around x0 with standard deviation 0 (a batch adds its own noise)."""
    dynamics, start, goal, W, R, W_T = PROBLEMS[name]
    goal, W, R, W_T, start = (jnp.asarray(x, float) for x in (goal, W, R, W_T, start))
    m = R.size
    return Task(
        name=name,
        dynamics=dynamics(),
        reward=Tracking(goal, DT * W, DT * R),
        terminal=Tracking(goal, W_T, R),
        initial=Box(start, start),
        a_low=-jnp.inf * jnp.ones(m),
        a_high=jnp.inf * jnp.ones(m),
        horizon=horizon,
        dt=DT,
    )


PI = 3.141592653589793
PROBLEMS = {
    "pendulum": (Pendulum, [0, 0], [PI, 0], [1, 0.1], [0.1], [100, 10]),
    "cart-pole": (CartPole, [0] * 4, [0, PI, 0, 0], [0.1, 1, 0.1, 0.1], [0.01], [100, 100, 10, 10]),
    "acrobot": (Acrobot, [0] * 4, [PI, 0, 0, 0], [0.1] * 4, [0.01], [1000] * 4),
    "quadrotor": (
        Quadrotor,
        [0, 0, 0, 0.1, -0.1, 0.2, 0, 0, 0, 0, 0, 0],
        [2, 1.5, 1] + [0] * 9,
        [1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05],
        [0.1, 10, 10, 10],
        [100] * 3 + [10] * 6 + [1] * 3,
    ),
}
