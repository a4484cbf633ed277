r"""Two links in a plane, one on the end of the other: the equations of motion of acrobot, double pendulum and reacher.

With q = (angle of the first link, angle of the second relative to the first), v = dq/dt, centres of mass at $c_i$ along the
links and inertias $I_i$ about them, Lagrange's equations are $M(q)\,\dot v + C(q, v) = \tau$,

$$M = \begin{pmatrix} \alpha + 2\beta\cos q_2 & \delta + \beta\cos q_2 \\ \delta + \beta\cos q_2 & \delta \end{pmatrix},\quad
C = \beta\sin q_2 \begin{pmatrix} -v_2 (2 v_1 + v_2) \\ v_1^2 \end{pmatrix}$$

$\alpha = I_1 + I_2 + m_1 c_1^2 + m_2 (l_1^2 + c_2^2)$, $\beta = m_2 l_1 c_2$, $\delta = I_2 + m_2 c_2^2$.

Source: Tedrake, Underactuated Robotics, appendix B (multi-body dynamics), with centres of mass and inertias apart.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Links(NamedTuple):
    """Masses, lengths and inertias of the links, in SI units."""

    m_1: Float[Array, ""]  # masses
    m_2: Float[Array, ""]
    l_1: Float[Array, ""]  # length of the first link
    c_1: Float[Array, ""]  # from each link's joint to its centre of mass
    c_2: Float[Array, ""]
    I_1: Float[Array, ""] | float  # inertias about the centres of mass
    I_2: Float[Array, ""] | float


def acceleration(
    links: Links, q: Float[Array, "2"], v: Float[Array, "2"], torque: Float[Array, "2"]
) -> Float[Array, "2"]:
    """dv/dt under generalised forces, by the inverse of the 2 x 2 mass matrix."""
    m_1, m_2, l_1, c_1, c_2, I_1, I_2 = links
    alpha, beta, delta = I_1 + I_2 + m_1 * c_1**2 + m_2 * (l_1**2 + c_2**2), m_2 * l_1 * c_2, I_2 + m_2 * c_2**2
    coupling, coriolis = beta * jnp.cos(q[1]), beta * jnp.sin(q[1])
    M_11, M_12, M_22 = alpha + 2 * coupling, delta + coupling, delta
    f_1 = torque[0] + coriolis * v[1] * (2 * v[0] + v[1])
    f_2 = torque[1] - coriolis * v[0] ** 2
    determinant = M_11 * M_22 - M_12**2
    return jnp.stack([M_22 * f_1 - M_12 * f_2, M_11 * f_2 - M_12 * f_1]) / determinant


def weight(links: Links, g: Float[Array, ""], q: Float[Array, "2"]) -> Float[Array, "2"]:
    """The generalised force of gravity, -dV/dq, with the first angle counted from upright."""
    m_1, m_2, l_1, c_1, c_2, *_ = links
    outer = m_2 * c_2 * g * jnp.sin(q[0] + q[1])
    return jnp.stack([(m_1 * c_1 + m_2 * l_1) * g * jnp.sin(q[0]) + outer, outer])
