"""Bodies of a Brax system as shapes: capsules, spheres, boxes and meshes in parallel projection.

    solids(sys)                    the geometries of each link, read once
    poses(sys, q)                  poses of the links at generalized positions
    solid_shapes(body, pos, rot)   the shapes of one state: positions [L, 3] and rotations [L, 4] of the links

Only the geometry of a system is read, not its dynamics. The view follows a body that can leave (its first link is free, or
slides and turns in a plane): the ground moves below it.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from diffmbrl.render.shapes import ACCENT, BODY, GROUND, TARGET, Line, Polygon, Rod, Shape

Array = np.ndarray
PLANE, SPHERE, CAPSULE, ELLIPSOID, CYLINDER, BOX, MESH = 0, 2, 3, 4, 5, 6, 7  # MuJoCo's numbers
FREE = ("f", "3")  # types of a first link whose body the view follows
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))  # of CORNERS
AROUND = np.stack([[math.cos(t), math.sin(t)] for t in np.arange(24) * math.pi / 12])
LINES = 2  # of the ground on each side of the middle


class Solid(NamedTuple):
    """One geometry in the frame of its link: the two ends of a rod with its radius, or the corners of a convex body."""

    link: int  # -1: of the world
    kind: int
    points: Array  # [k, 3]
    radius: float
    role: str


class Solids(NamedTuple):
    """The geometries of a system, and the direction of the view."""

    each: tuple[Solid, ...]
    level: float | None  # height of the ground, None if no plane is near
    size: float  # of the whole system at its first position, in metres
    follow: bool
    azimuth: float
    elevation: float


def solids(sys: Any, *, azimuth: float = 0.4, elevation: float | None = None) -> Solids:
    """Read the geometries of a Brax `System`. By default, flat systems are seen from above.

    >>> from diffmbrl.tasks.adapters.brax import Body, environment
    >>> ant = solids(environment(Body("ant", "positional")).sys)
    >>> len(ant.each), ant.follow, ant.level
    (17, True, 0.0)
    """
    kinds, owners = np.asarray(sys.geom_type), np.asarray(sys.geom_bodyid) - 1
    sizes, places = np.asarray(sys.geom_size, float), np.asarray(sys.geom_pos, float)
    turns = np.asarray(sys.geom_quat, float)
    names = list(sys.link_names)
    each = []
    for g, kind in enumerate(kinds):
        if kind == PLANE:
            continue
        local, radius = _local(sys, g, int(kind), sizes[g])
        link = int(owners[g])
        role = GROUND if link < 0 else TARGET if "target" in names[link] else ACCENT if link == 0 else BODY
        each.append(Solid(link, int(kind), places[g] + rotated(local, turns[g]), radius, role))
    if not each:
        raise ValueError("the system has no geometry that could be drawn but planes")
    pos, rot = poses(sys, sys.init_q)
    moving = [solid for solid in each if solid.link >= 0] or each
    cloud = np.concatenate([_placed(solid, pos, rot) for solid in moving])
    low, high = cloud.min(axis=0), cloud.max(axis=0)
    size = float(np.max(high - low))
    planes = places[kinds == PLANE][:, 2] if np.any(kinds == PLANE) else np.zeros(0)
    near = [float(z) for z in planes if low[2] - size < z < high[2] + 0.1 * size]
    flat = high[2] - low[2] < 0.2 * size
    tilt = (1.2 if flat else 0.25) if elevation is None else elevation
    return Solids(tuple(each), near[0] if near else None, size, sys.link_types[0] in FREE, azimuth, tilt)


def poses(sys: Any, q: ArrayLike) -> tuple[Array, Array]:
    """Return positions [L, 3] and rotations [L, 4] of the links at generalized positions `q`."""
    from brax import kinematics

    with jax.numpy_dtype_promotion("standard"):  # Brax adds arrays of different dtypes
        x, _ = jax.jit(kinematics.forward)(sys, np.asarray(q), np.zeros(sys.qd_size()))
    return np.asarray(x.pos, float), np.asarray(x.rot, float)


def solid_shapes(body: Solids, pos: ArrayLike, rot: ArrayLike) -> list[Shape]:
    """Return the shapes of one state; their number and their numbers of points do not depend on it.

    Raises:
        ValueError: If positions and rotations do not fit the links.
    """
    pos, rot = np.asarray(pos, float), np.asarray(rot, float)
    links = 1 + max(solid.link for solid in body.each)
    if pos.ndim != 2 or pos.shape[1] != 3 or rot.shape != (len(pos), 4) or len(pos) < links:
        raise ValueError(
            f"expected positions [L, 3] and rotations [L, 4] of at least {links} links, got {list(pos.shape)} and "
            f"{list(rot.shape)}"
        )
    away = np.array([*pos[0, :2], 0.0]) if body.follow else np.zeros(3)
    right, up, into = _axes(body)
    shapes: list[Shape] = list(_ground(body, away))
    for solid in body.each:
        points = _placed(solid, pos, rot) - away
        seen, depth = points @ np.stack([right, up], axis=1), points @ into
        if solid.kind in (SPHERE, CAPSULE):
            shapes.append(Rod(seen, solid.radius, solid.role, float(depth.mean())))
        elif solid.kind == BOX:
            shapes += [Polygon(seen[list(face)], solid.role, float(depth[list(face)].mean())) for face in FACES]
        else:
            # The farthest point in each of 24 directions: the outline has 24 points in every pose.
            shapes.append(Polygon(seen[np.argmax(seen @ AROUND.T, axis=0)], solid.role, float(depth.mean())))
    return shapes


def frames(sys: Any, pos: ArrayLike, rot: ArrayLike) -> list[list[Shape]]:
    """Return the shapes of each state of a trajectory: `pos` [T+1, L, 3], `rot` [T+1, L, 4]."""
    body = solids(sys)
    return [solid_shapes(body, p, r) for p, r in zip(np.asarray(pos), np.asarray(rot), strict=True)]


def rotated(points: Array, rotation: Array) -> Array:
    """Rotate points [k, 3] by a quaternion [4], its real part first."""
    w, u = rotation[0], rotation[1:]
    return points + 2 * np.cross(u, np.cross(u, points) + w * points)


def _placed(solid: Solid, pos: Array, rot: Array) -> Array:
    return solid.points if solid.link < 0 else pos[solid.link] + rotated(solid.points, rot[solid.link])


def _local(sys: Any, g: int, kind: int, size: Array) -> tuple[Array, float]:
    """Return the points of a geometry in its own frame, and the radius around them."""
    if kind == SPHERE:
        return np.zeros((2, 3)), float(size[0])
    if kind == CAPSULE:
        return np.array([[0, 0, -size[1]], [0, 0, size[1]]]), float(size[0])
    if kind == BOX:
        return CORNERS * size, 0.0
    ring = np.concatenate([AROUND, np.zeros((24, 1))], axis=1)
    if kind == CYLINDER:
        return np.concatenate([ring * size[0] + [0, 0, z] for z in (-size[1], size[1])]), 0.0
    if kind == ELLIPSOID:
        levels = np.linspace(-1, 1, 9)
        return size * np.concatenate([ring * math.sqrt(1 - z * z) + [0, 0, z] for z in levels]), 0.0
    if kind == MESH and sys.mj_model is not None:
        model, mesh = sys.mj_model, int(np.asarray(sys.geom_dataid)[g])
        begin, count = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
        return np.asarray(model.mesh_vert[begin : begin + count], float), 0.0
    raise ValueError(
        f"a geometry of MuJoCo's type {kind} cannot be drawn: only spheres, capsules, boxes, cylinders, "
        "ellipsoids and meshes"
    )


def _axes(body: Solids) -> tuple[Array, Array, Array]:
    """Return the directions to the right, up, and into the picture."""
    azimuth, elevation = body.azimuth, body.elevation
    right = np.array([math.cos(azimuth), math.sin(azimuth), 0.0])
    ahead = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    z = np.array([0.0, 0.0, 1.0])
    return (
        right,
        math.sin(elevation) * ahead + math.cos(elevation) * z,
        math.cos(elevation) * ahead - math.sin(elevation) * z,
    )


def _ground(body: Solids, away: Array) -> list[Line]:
    """Return the lines of a grid that is fixed in the world, near the middle of the picture."""
    if body.level is None:
        return []
    step = 2.0 ** math.floor(math.log2(body.size))
    right, up, _ = _axes(body)
    reach, lines = LINES * step, []
    for axis in (0, 1):
        shift = away[axis] % step if body.follow else 0.0
        for k in range(-LINES, LINES + 2):
            place = np.clip(k * step - shift, -reach, reach)  # lines come in at one edge and go out at the other
            ends = np.zeros((2, 3))
            ends[:, axis], ends[:, 1 - axis], ends[:, 2] = place, [-reach, reach], body.level
            lines.append(Line(ends @ np.stack([right, up], axis=1), GROUND))
    return lines
