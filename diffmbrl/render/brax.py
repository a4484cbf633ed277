"""Brax's bodies as shapes: capsules as lines, balls as circles, seen from the side, from above or obliquely."""

from functools import cache
from typing import Any

import jax
import numpy as np

from diffmbrl.core import Task
from diffmbrl.render.shapes import ACCENT, BODY, GROUND, TARGET, Circle, Line, Shape
from diffmbrl.tasks.adapters.brax import Body, environment, seen

SIDE = np.array([[1, 0, 0], [0, 0, 1]], float)  # rows: the weights of (x, y, z) to the right and up
ABOVE = np.array([[1, 0, 0], [0, 1, 0]], float)
OBLIQUE = np.array([[1, 0.35, 0], [0, 0.35, 1]])
VIEWS = {"reacher": ABOVE, "swimmer": ABOVE, "ant": OBLIQUE}
PLANE, SPHERE, CAPSULE = 0, 2, 3  # MuJoCo's kinds of geoms


def bodies(task: Task, s: np.ndarray) -> list[Shape]:
    """Return every geometry of the links, the target of a reacher, and the ground below a runner, 2 m to either side."""
    starts: Any = getattr(task.initial, "inner", task.initial)  # inner: of a task with delayed actions
    body = starts.body
    view, model = VIEWS.get(body.env, SIDE), environment(body).sys.mj_model
    place, turn = _frames(body, s)
    shapes: list[Shape] = []
    for i in np.flatnonzero(model.geom_bodyid > 0):
        link = model.geom_bodyid[i] - 1
        matrix = _matrix(turn[link])
        centre = place[link] + matrix @ model.geom_pos[i]
        target = model.body(int(link) + 1).name == "target"
        if model.geom_type[i] == CAPSULE:
            along = matrix @ _matrix(model.geom_quat[i])[:, 2] * model.geom_size[i, 1]
            shapes.append(Line(np.stack([centre - along, centre + along]) @ view.T, ACCENT if link else BODY))
        else:
            shapes.append(Circle(view @ centre, float(model.geom_size[i, 0]), TARGET if target else BODY))
    if body.runs and body.env != "swimmer":
        x = (view @ place[0])[0]
        shapes.append(Line(np.array([[x - 2, 0.0], [x + 2, 0.0]]), GROUND))
    elif body.env != "swimmer" and body.env != "reacher":
        shapes.append(Line(np.array([[-1.0, 0.0], [1.0, 0.0]]), GROUND))
    return shapes


@cache
def _compiled(body: Body):
    def frames(s):
        x = seen(body, s).x
        return x.pos, x.rot

    return jax.jit(frames)


def _frames(body: Body, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place, turn = _compiled(body)(np.asarray(s, np.float32))
    return np.asarray(place, float), np.asarray(turn, float)


def _matrix(q: np.ndarray) -> np.ndarray:
    """Return the rotation matrix of a quaternion (w, x, y, z)."""
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
