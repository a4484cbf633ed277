"""Drawings of states, animations and figures of plans."""

import json
import re
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffmbrl import tasks
from diffmbrl.render import shapes as drawing
from diffmbrl.render.animated_gif import gif
from diffmbrl.render.html import animate, animation_page
from diffmbrl.render.registry import frames
from diffmbrl.render.scene import ROLES
from diffmbrl.render.shapes import Circle, Line
from diffmbrl.report.plans import plan_figure
from diffmbrl.tasks import TASKS, squashed

every_task = pytest.mark.parametrize("name", TASKS)
limits = {"dt": 0.1, "a_low": [-1.0], "a_high": [1.0]}


def states(task, count=4, seed=0):
    return np.random.default_rng(seed).normal(size=(count, task.n))


def numbers(shapes):
    return [np.ravel(shape.points if isinstance(shape, Line) else shape.centre) for shape in shapes]


def lines(shapes, role="body"):
    return [shape.points for shape in shapes if isinstance(shape, Line) and shape.role == role]


# Drawings.


@every_task
def test_every_state_has_the_same_shapes_in_other_places(name):
    task = tasks.make(name, horizon=3)
    drawn = frames(task, states(task))
    kinds = [[(type(shape), shape.role, part.size) for shape, part in zip(f, numbers(f), strict=True)] for f in drawn]
    assert kinds[0] and all(kind == kinds[0] for kind in kinds)
    assert all(shape.role in ROLES and shape.role in drawing.ROLES for shape in drawn[0])
    assert all(np.all(np.isfinite(part)) for f in drawn for part in numbers(f))
    assert any(not np.array_equal(*pair) for pair in zip(numbers(drawn[0]), numbers(drawn[1]), strict=True))


@every_task
def test_a_drawing_shows_where_a_body_is(name):
    """Every number of the state that is a place or an angle moves something; a rate moves nothing."""
    task, names = tasks.make(name, horizon=3), TASKS[name].states
    s = 0.3 * np.ones((1, task.n))
    here = np.concatenate(numbers(frames(task, s)[0]))
    for i, text in enumerate(names):
        there = np.concatenate(numbers(frames(task, s + 0.5 * np.eye(task.n)[i])[0]))
        assert np.any(here != there) == (text.endswith(("[m]", "[rad]")) or text.startswith("quaternion")), text


def test_links_have_their_lengths_and_angles():
    [shapes] = frames(tasks.acrobot(l_1=0.7, l_2=1.3), np.asarray([[np.pi, np.pi / 2, 0, 0]]))
    [links] = lines(shapes)
    np.testing.assert_allclose(links, [[0, 0], [0, -0.7], [-1.3, -0.7]], atol=1e-6)
    task = tasks.reacher()
    s = states(task)
    for shapes, state in zip(frames(task, s), s, strict=True):
        tip = lines(shapes)[0][-1]
        np.testing.assert_allclose(tip - state[4:], task.success.miss(jnp.asarray(state, jnp.float32)), atol=1e-5)


def test_a_car_is_turned_about_its_rear_axle():
    task = tasks.car()
    [[*shapes]] = frames(task, np.asarray([[3.0, 2.0, np.pi / 2, 1.0]]))
    [outline] = lines(shapes)
    np.testing.assert_allclose(outline.mean(axis=0)[0], 3.0, atol=0.3)
    np.testing.assert_allclose([outline[:, 1].min(), outline[:, 1].max()], [1.5, 5.0], atol=1e-6)
    circles = [shape for shape in shapes if isinstance(shape, Circle) and shape.role == "obstacle"]
    np.testing.assert_allclose([c.centre for c in circles], task.constraints.inequality.centres)


def test_squashed_and_modelled_tasks_are_drawn_too():
    task = tasks.cartpole_balance(l=0.8)
    s = states(task, 1)
    for x, y in zip(numbers(frames(task, s)[0]), numbers(frames(squashed(task), s)[0]), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_task_without_a_drawing_has_a_phase_plot():
    task = tasks.linear_quadratic(
        np.eye(3), np.ones((3, 1)), np.eye(3), [[1]], np.eye(3), horizon=5, dt=0.1, name="own"
    )
    s = states(task, 6)
    drawn = frames(task, s)
    path = drawn[0][0].points
    np.testing.assert_allclose(np.abs(path).max(axis=0), 1)
    np.testing.assert_allclose([f[1].centre for f in drawn], path)
    order = np.argsort(path[:, 0])
    np.testing.assert_array_equal(order, np.argsort(s[:, 0]))
    assert np.all(np.isfinite(drawing.phase(np.ones((4, 1)))[0][0].points))


def test_states_of_another_task():
    with pytest.raises(ValueError, match=r"states of task 'car' must have shape \[T\+1, 4\], got \[5, 2\]"):
        frames(tasks.car(), np.zeros((5, 2)))


# Animations.


def moving(count=6):
    """A dot that goes right above a line that rests."""
    ground = Line(np.asarray([[-1.0, 0.0], [1.0, 0.0]]), "ground")
    return [[ground, Circle(np.asarray([x, 0.5]), 0.1)] for x in np.linspace(-1, 1, count)]


def data_of(fragment):
    return json.loads(re.search(r", data = (\{.*\});\n", fragment)[1])


class Tags(HTMLParser):
    """Checks that tags close, and gathers what could load something."""

    VOID = frozenset({"input", "meta", "link", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.seen = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.loads += [(tag, key) for key, _ in attrs if key in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_whole_and_loads_nothing():
    a = np.linspace(-1, 1, 5)[:, None]
    text = animate(moving(), a, title="a <b> & 'c'", action_names=["push </script>"], **limits)
    tags = Tags(animation_page("one", text + animate(moving(), -a, **limits)))
    assert tags.open == [] and tags.loads == []
    assert "http" not in text
    assert "a &lt;b&gt; &amp;" in text and text.count("</script>") == 1
    ids = re.findall(r'id="(film-\w+)"', text + animate(moving(), -a, **limits))
    assert len(set(ids)) == 2
    assert text == animate(moving(), a, title="a <b> & 'c'", action_names=["push </script>"], **limits)


def test_html_moves_what_moves():
    a = np.linspace(-1, 1, 5)[:, None]
    text = animate(moving(), a, **limits)
    data = data_of(text)
    assert data["times"] == [0, 0.1, 0.2, 0.3, 0.4, 0.5] and data["end"] == 0.5
    assert data["actions"] == [["\u22121"], ["\u22120.5"], ["0"], ["0.5"], ["1"]]
    places = np.asarray(data["frames"]) / 10
    assert places.shape == (6, 2)
    assert text.count("data-moves") == 2  # of the dot, and in the script
    steps = np.diff(places[:, 0])
    np.testing.assert_allclose(steps, steps[0], atol=0.2)
    assert steps[0] > 50 and np.ptp(places[:, 1]) == 0
    # y points up, and the dot lies above the line.
    line = float(re.search(r'points="[\d.]+ ([\d.]+)', text)[1])
    assert places[0, 1] < line
    assert text.count("stroke-dasharray") == 2
    unlimited = animate(moving(), a, dt=0.1, a_low=[-np.inf], a_high=[np.inf])
    assert "stroke-dasharray" not in unlimited


def test_long_trajectories_leave_frames_out():
    drawn, a = moving(1201), np.zeros((1200, 1))
    text = animate(drawn, a, **limits)
    data = data_of(text)
    assert data["steps"][:2] == [0, 3] and data["steps"][-1] == 1200
    assert len(data["frames"]) == len(data["times"]) == 401
    assert data["end"] == 120.0


@every_task
def test_animations_are_small(name):
    task, row = tasks.make(name), TASKS[name]
    s = np.cumsum(states(task, task.horizon + 1), axis=0)
    a = np.random.default_rng(1).normal(size=(task.horizon, task.m))
    text = animate(
        frames(task, s), a, dt=task.dt, a_low=task.a_low, a_high=task.a_high, action_names=row.actions, title=name
    )
    most = 130_000 if name == "brax-ant" else 120_000  # of fifteen bodies, 123,000
    assert len(text) < most
    Tags(text)


def test_gif(tmp_path):
    a = np.linspace(-2, 2, 5)[:, None]
    gif(tmp_path / "one.gif", moving(), a, title="dot", **limits)
    with Image.open(tmp_path / "one.gif") as image:
        assert image.format == "GIF" and image.n_frames == 6
        assert image.info["duration"] == 100 and image.info["loop"] == 0
        pictures = []
        for k in range(6):
            image.seek(k)
            pictures.append(np.asarray(image.convert("L"), np.int64))
    # The dot: dark, above the strip, from left to right.
    centres = [np.nonzero((picture[:120] < 60).sum(axis=0) > 15)[0].mean() for picture in pictures]
    assert np.all(np.diff(centres) > 60)
    assert pictures[0][0, 0] == 255


def test_gif_of_a_long_trajectory(tmp_path):
    gif(tmp_path / "one.gif", moving(301), np.zeros((300, 1)), dt=0.01, a_low=[-1.0], a_high=[1.0], most_frames=11)
    with Image.open(tmp_path / "one.gif") as image:
        assert image.n_frames == 11 and image.info["duration"] == 300


def test_what_cannot_be_animated(tmp_path):
    a = np.zeros((5, 1))
    with pytest.raises(ValueError, match=r"expected actions \[T, m\] and T\+1 frames, got \[5, 1\] and 5 frames"):
        animate(moving(5), a, **limits)
    with pytest.raises(ValueError, match=r"a_low must have shape \[1\], got \[2\]"):
        animate(moving(), a, dt=0.1, a_low=[0, 0], a_high=[1])
    with pytest.raises(ValueError, match=r"action_names must have shape \[1\], got \[2\]"):
        animate(moving(), a, action_names=["x", "y"], **limits)
    broken = moving()
    broken[3][1] = Circle(np.asarray([np.nan, 0.0]), 0.1)
    with pytest.raises(ValueError, match="step 3 is not finite"):
        gif(tmp_path / "no.gif", broken, a, **limits)
    with pytest.raises(ValueError, match="step 2 is not finite"):
        animate(moving(), np.where(np.arange(5)[:, None] == 2, np.inf, a), **limits)
    with pytest.raises(ValueError, match="most_frames must be at least 2, got 1"):
        gif(tmp_path / "no.gif", moving(), a, most_frames=1, **limits)
    other = moving()
    other[2] = other[2][:1]
    with pytest.raises(ValueError, match="every frame must have the same shapes"):
        animate(other, a, **limits)


# The figure of a plan.


def test_plan_figure():
    rng = np.random.default_rng(0)
    s, a, K = rng.normal(size=(3, 11, 4)), rng.normal(size=(3, 10, 2)), rng.normal(size=(3, 10, 2, 4))
    figure = plan_figure(
        s, a, K, a_low=[-1.0, -np.inf], a_high=[2.0, np.inf], dt=0.1, state_names=list("wxyz"), action_names=["u", "$v"]
    )
    axes = figure.axes
    assert [axis.get_title(loc="left") for axis in axes] == ["w", "x", "y", "z", "u", "$v", "gain |K|"]
    assert all(axis.get_xlim() == (0, 1) for axis in axes)
    for i in range(4):
        for line, values in zip(axes[i].lines, s[..., i], strict=True):
            np.testing.assert_array_equal(line.get_ydata(), values)
    assert [line.get_ydata()[0] for line in axes[4].lines] == [-1, 2]
    assert len(axes[5].lines) == 0
    np.testing.assert_allclose(axes[6].lines[1].get_ydata(), np.linalg.norm(K[1].reshape(10, 8), axis=1))
    figure.canvas.draw()


def test_plan_figure_counts_what_is_not_finite():
    s = np.zeros((6, 2))
    s[3:, 1] = np.nan
    figure = plan_figure(s, np.zeros((5, 1)), np.zeros((5, 1, 2)), **limits)
    figure.canvas.draw()
    assert [axis.get_title(loc="right") for axis in figure.axes] == ["", "3 not finite", "", ""]


def test_plan_figure_errors():
    s, a = np.zeros((6, 2)), np.zeros((5, 1))
    with pytest.raises(ValueError, match=r"expected states \[\*batch, T\+1, n\]"):
        plan_figure(s[1:], a, **limits)
    with pytest.raises(ValueError, match=r"K must have shape \[5, 1, 2\], got \[5, 2, 1\]"):
        plan_figure(s, a, np.zeros((5, 2, 1)), **limits)
    with pytest.raises(ValueError, match=r"state_names must have shape \[2\], got \[3\]"):
        plan_figure(s, a, state_names=list("abc"), **limits)
    with pytest.raises(ValueError, match=r"a_high must have shape \[1\], got \[2\]"):
        plan_figure(s, a, dt=0.1, a_low=[-1.0], a_high=[1.0, 1.0])
