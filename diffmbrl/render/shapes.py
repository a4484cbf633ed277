"""Drawings of states: lines, circles and solids in metres, y up, for figures and animations (`render/html.py`).

A drawing is a function (task, s [n]) -> shapes, named in the table of `registry.py`. The number of shapes and of their points
does not depend on the state. Lengths are read from the task's dynamics; dynamics without them, such as a learned model, are
drawn with default lengths.
"""

import math
from typing import NamedTuple

import numpy as np

from diffmbrl.core import Task

Array = np.ndarray
GROUND, TARGET, OBSTACLE, BODY, ACCENT = ROLES = ("ground", "target", "obstacle", "body", "accent")


class Line(NamedTuple):
    """A line through points, closed if the last point is the first.

    Args:
        points: Shape [k, 2], in metres.
        role: `ground`, `target`, `obstacle`, `body` or `accent`: sets the colour.
    """

    points: Array
    role: str = BODY


class Circle(NamedTuple):
    """A disc.

    Args:
        centre: Shape [2], in metres.
        radius: In metres.
        role: `ground`, `target`, `obstacle`, `body` or `accent`: sets the colour.
    """

    centre: Array
    radius: float
    role: str = BODY


class Rod(NamedTuple):
    """A capsule seen from the side, with round ends.

    Args:
        points: The two ends, shape [2, 2], in metres.
        radius: In metres.
        role: `ground`, `target`, `obstacle`, `body` or `accent`: sets the colour.
        depth: Distance along the line of sight; deeper shapes are drawn behind.
    """

    points: Array
    radius: float
    role: str = BODY
    depth: float = 0.0


class Polygon(NamedTuple):
    """A filled polygon.

    Args:
        points: The corners, shape [k, 2], in metres.
        role: `ground`, `target`, `obstacle`, `body` or `accent`: sets the colour.
        depth: Distance along the line of sight; deeper shapes are drawn behind.
    """

    points: Array
    role: str = BODY
    depth: float = 0.0


Shape = Line | Circle | Rod | Polygon


def phase(s: Array) -> list[list[Shape]]:
    """Plot the second state against the first (or the first against time), scaled to [-1, 1], with a dot at the present."""
    columns = s[:, :2] if s.shape[1] > 1 else np.column_stack([np.arange(len(s)), s])
    finite = np.where(np.isfinite(columns), columns, np.nan)
    low, high = np.nanmin(finite, axis=0), np.nanmax(finite, axis=0)
    scaled = (columns - (low + high) / 2) / np.where(high > low, (high - low) / 2, 1.0)
    return [[Line(scaled, GROUND), Circle(point, 0.04, ACCENT)] for point in scaled]


def draw_block(task: Task, s: Array) -> list[Shape]:
    """Double integrator: a block on a table and its target."""
    return [_level(-1.5, 1.5), Line(np.array([[0, 0], [0, 0.3]]), TARGET), Line(_box(s[0], 0.1, 0.3, 0.2))]


def draw_pendulum(task: Task, s: Array) -> list[Shape]:
    """Pendulum: pivot, rod and weight."""
    length = _leaf(task, "l", 1.0)
    tip = length * _from_top(s[0])
    reach = _ring(length)
    return [
        Line(np.stack([np.zeros(2), tip])),
        Circle(tip, 0.08, ACCENT),
        Circle(np.zeros(2), 0.03),
        Line(reach, GROUND),
    ]


def draw_cartpole(task: Task, s: Array) -> list[Shape]:
    """Cart-pole: a cart on its rail, the pole and its weight."""
    pivot = np.array([s[0], 0.0])
    tip = pivot + _leaf(task, "l", 0.5) * _from_top(s[1])
    cart = Line(_box(s[0], -0.06, 0.3, 0.12))
    return [_level(-1.5, 1.5), cart, Line(np.stack([pivot, tip])), Circle(tip, 0.06, ACCENT), Circle(pivot, 0.02)]


def draw_rod_on_cart(task: Task, s: Array) -> list[Shape]:
    """Cart-pole with a uniform rod: a cart on its rail and the whole rod."""
    length, end = 2 * _leaf(task, "l", 0.5), float(getattr(task.dynamics, "end", 1.5))
    pivot = np.array([s[0], 0.0])
    rod = np.stack([pivot, pivot + length * _from_top(s[1] + _leaf(task, "lean", 0.0))])
    cart = Line(_box(s[0], -0.06, 0.3, 0.12))
    return [_level(-end, end), cart, Line(rod, ACCENT), Circle(pivot, 0.02)]


def draw_two_links(task: Task, s: Array) -> list[Shape]:
    """Double pendulum: two links from a pivot, with their joints."""
    elbow = _leaf(task, "l_1", 1.0) * _from_top(s[0])
    tip = elbow + _leaf(task, "l_2", 1.0) * _from_top(s[0] + s[1])
    length = _leaf(task, "l_1", 1.0) + _leaf(task, "l_2", 1.0)
    joints = [Circle(np.zeros(2), 0.02 * length), Circle(elbow, 0.03 * length), Circle(tip, 0.03 * length, ACCENT)]
    return [Line(_ring(length), GROUND), Line(np.stack([np.zeros(2), elbow, tip])), *joints]


def draw_reacher(task: Task, s: Array) -> list[Shape]:
    """Reacher from above: the arm, its reach, and the target in the size that counts as success."""
    l_1, l_2 = _leaf(task, "l_1", 0.5), _leaf(task, "l_2", 0.5)
    elbow = l_1 * _direction(s[0])
    tip = elbow + l_2 * _direction(s[0] + s[1])
    arm = [Line(np.stack([np.zeros(2), elbow, tip])), Circle(np.zeros(2), 0.03), Circle(elbow, 0.02)]
    return [Line(_ring(l_1 + l_2), GROUND), Circle(s[4:], 0.05, TARGET), *arm, Circle(tip, 0.025, ACCENT)]


def draw_car(task: Task, s: Array) -> list[Shape]:
    """Car from above: outline, centre of the rear axle, parking place, and the discs that the centre must not enter."""
    base = _leaf(task, "wheelbase", 2.5)
    outline = _box(base / 2, 0.0, 1.4 * base, 0.5 * base)
    turned = outline @ np.stack([_direction(s[2]), _direction(s[2] + math.pi / 2)]) + s[:2]
    obstacles = getattr(task.constraints, "inequality", None)
    round_ones = (
        [] if obstacles is None else zip(np.asarray(obstacles.centres), np.asarray(obstacles.radii), strict=True)
    )
    return [
        *[Circle(np.asarray(centre, np.float64), float(radius), OBSTACLE) for centre, radius in round_ones],
        *[Line(outline, TARGET), Line(turned), Circle(s[:2], 0.12, ACCENT)],
    ]


def draw_quadrotor2d(task: Task, s: Array) -> list[Shape]:
    """Planar quadrotor: the beam with its two rotors, and the target."""
    arm = _leaf(task, "arm", 0.25)
    along, up = _direction(s[2]), _direction(s[2] + math.pi / 2)
    ends = [s[:2] + side * arm * along for side in (-1, 1)]
    masts = [Line(np.stack([end, end + 0.08 * up])) for end in ends]
    rotors = [Line(np.stack([end + 0.08 * up - 0.12 * along, end + 0.08 * up + 0.12 * along]), ACCENT) for end in ends]
    return [Circle(np.zeros(2), 0.05, TARGET), Line(np.stack(ends)), *masts, *rotors]


def draw_quadrotor(task: Task, s: Array) -> list[Shape]:
    """Quadrotor in parallel projection: arms (blue: ahead), rotors, a plumb line to the level of the origin, the target."""
    target = np.asarray(getattr(task.reward, "target", np.zeros(3)), np.float64)
    R = _rotation(*s[3:6])
    turn = np.linspace(0, 2 * math.pi, 9)
    rim = 0.1 * np.stack([np.cos(turn), np.sin(turn), np.zeros(9)], axis=1)
    shapes: list[Shape] = [Line(_seen(np.array([[0, 0, 0], end])), GROUND) for end in np.eye(3)]
    shapes += [Circle(_seen(target), 0.05, TARGET), Line(_seen(np.stack([s[:3], [s[0], s[1], 0.0]])), GROUND)]
    for x, y, role in [(1, 1, ACCENT), (1, -1, ACCENT), (-1, 1, BODY), (-1, -1, BODY)]:
        hub = 0.2 * np.array([x, y, 0.0])
        shapes += [Line(_seen(s[:3] + np.stack([np.zeros(3), hub]) @ R.T), role)]
        shapes += [Line(_seen(s[:3] + (hub + rim) @ R.T), role)]
    return shapes


def draw_edge(task: Task, s: Array) -> list[Shape]:
    """Heaviside: a ledge at 0 and a dot at the state."""
    ledge = np.array([[-1.5, 0.0], [0.0, 0.0], [0.0, 0.3], [1.5, 0.3]])
    return [Line(ledge, GROUND), Circle(np.array([s[0], 0.35 if s[0] >= 0 else 0.05]), 0.05, ACCENT)]


def draw_ball_and_wall(task: Task, s: Array) -> list[Shape]:
    """Ball and wall: the wall, and the ball on the ground."""
    wall = Line(np.array([[s[0], 0.0], [s[0], _leaf(task, "height", 0.02)]]), OBSTACLE)
    return [_level(0.0, 0.12), wall, Circle(np.array([s[1], 0.002]), 0.002, ACCENT)]


def draw_pushing(task: Task, s: Array) -> list[Shape]:
    """Pushing: two blocks, which touch at a distance of 1 m, and the target of the second."""
    blocks = [Line(_box(x, 0.2, 1.0, 0.4)) for x in s[:2]]
    return [_level(-1.0, 3.0), Line(np.array([[2.0, 0.0], [2.0, 0.4]]), TARGET), *blocks, _dot(s[1], 0.2)]


def draw_friction(task: Task, s: Array) -> list[Shape]:
    """Friction: a sled with a block on it, and the target of the block."""
    sled = Line(_box(s[0], 0.03, 2 * _leaf(task, "width", 0.1), 0.06))
    block = Line(_box(s[1], 0.11, 0.1, 0.1), ACCENT)
    return [_level(-0.5, 2.5), Line(np.array([[2.0, 0.0], [2.0, 0.3]]), TARGET), sled, block]


def draw_bouncing(task: Task, s: Array) -> list[Shape]:
    """Bouncing: a ball above the ground, and its target height."""
    return [_level(-1.0, 1.0), Line(np.array([[-0.3, 1.0], [0.3, 1.0]]), TARGET), _dot(0.0, s[0])]


def draw_tennis(task: Task, s: Array) -> list[Shape]:
    """Tennis: the racket, the ball, and the ball's target."""
    half = _leaf(task, "w", 0.15) * _direction(s[5])
    racket = np.array([s[4], 0.0]) + np.stack([-half, half])
    return [Circle(np.array([0.8, 0.4]), 0.2, TARGET), Line(racket), Circle(s[:2], 0.03, ACCENT)]


def draw_math_test(task: Task, s: Array) -> list[Shape]:
    """Math test: home on the left, the desk on the right, a dot at the position, and the digits of the sheet once seen."""
    house = np.array([[-1.25, 0.0], [-1.25, 0.4], [-1.0, 0.6], [-0.75, 0.4], [-0.75, 0.0]])
    desk = np.array([[0.75, 0.0], [0.75, 0.3], [1.25, 0.3], [1.25, 0.0]])
    sheet = Line(_box(1.0, 0.7, 0.7, 0.5), GROUND)
    seen = 0.5 < s[0] < 1.5
    digits = [part for x, digit in [(0.85, s[1]), (1.15, s[2])] for part in _digit(x, 0.7, digit if seen else math.nan)]
    return [
        _level(-1.5, 2.5),
        Line(house, TARGET),
        Line(desk),
        sheet,
        *digits,
        Circle(np.array([s[0], 0.1]), 0.1, ACCENT),
    ]


# The strokes of each digit, 1 for those that are lit: top, upper left and right, middle, lower left and right, bottom.
STROKES = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")


def _digit(x: float, y: float, digit: float) -> list[Line]:
    """A digit of seven strokes; unlit strokes are shrunk to their middles. NaN lights none."""
    lit = "0000000" if not 0 <= digit + 0.5 < 10 else STROKES[int(digit + 0.5)]
    w, h = 0.08, 0.15
    top, middle, bottom = ([(-w, level), (w, level)] for level in (h, 0.0, -h))
    left, right = ([[(side, 0.0), (side, level)] for level in (h, -h)] for side in (-w, w))
    ends = np.array([top, left[0], right[0], middle, left[1], right[1], bottom])
    centres = ends.mean(axis=1, keepdims=True)
    lengths = np.array([float(stroke) for stroke in lit])[:, None, None]
    return [Line(np.array([x, y]) + stroke, ACCENT) for stroke in centres + lengths * (ends - centres)]


def _dot(x: float, y: float) -> Circle:
    return Circle(np.array([x, y]), 0.05, ACCENT)


def _leaf(task: Task, name: str, default: float) -> float:
    plant = getattr(task.dynamics, "inner", task.dynamics)  # the plant of dynamics that limit the actions
    return float(getattr(plant, name, default))


def _direction(angle: float) -> Array:
    return np.array([math.cos(angle), math.sin(angle)])


def _from_top(angle: float) -> Array:
    return np.array([math.sin(angle), math.cos(angle)])


def _ring(radius: float) -> Array:
    angles = np.linspace(0, 2 * math.pi, 49)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _level(low: float, high: float) -> Line:
    return Line(np.array([[low, 0.0], [high, 0.0]]), GROUND)


def _box(x: float, y: float, width: float, height: float) -> Array:
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]])
    return np.array([x, y]) + corners * np.array([width, height]) / 2


def _rotation(roll: float, pitch: float, yaw: float) -> Array:
    (c_r, c_p, c_y), (s_r, s_p, s_y) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    x = np.array([[1, 0, 0], [0, c_r, -s_r], [0, s_r, c_r]])
    y = np.array([[c_p, 0, s_p], [0, 1, 0], [-s_p, 0, c_p]])
    return np.array([[c_y, -s_y, 0], [s_y, c_y, 0], [0, 0, 1]]) @ y @ x


def _seen(points: Array, *, azimuth: float = 0.5, elevation: float = 0.35) -> Array:
    # Parallel projection onto the plane across the line of sight.
    right = np.array([math.cos(azimuth), math.sin(azimuth), 0.0])
    into = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    up = math.sin(elevation) * into + math.cos(elevation) * np.array([0.0, 0.0, 1.0])
    return points @ np.stack([right, up], axis=1)
