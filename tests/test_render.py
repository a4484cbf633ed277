"""What tiny runs leave to look at: TensorBoard's files, which are read back, and animations of their policies and plans."""

import io
import json
import re
import struct
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffmbrl.jobs import compare, plan
from diffmbrl.jobs import learn as race
from diffmbrl.jobs.configs import CompareConfig, LearnConfig, PlanConfig, RenderConfig, RunOptions
from diffmbrl.jobs.render import render_run
from diffmbrl.render import solids as geometry
from diffmbrl.render.animated_gif import gif
from diffmbrl.render.html import animate
from diffmbrl.render.shapes import Line, Polygon, Rod
from diffmbrl.report.plan_report import _shape, shape_record
from diffmbrl.runs import read_metrics
from tests.problems import of

COMPARE = CompareConfig(
    task="lqr",
    methods=("adam",),
    horizon=5,
    parameters={},
    hidden=(4,),
    seeds=2,
    starts=4,
    steps=4,
    budget=100.0,
    rates=(0.01, 0.1),
    continuation="none",
    x64=False,
    key=0,
)
LEARN = LearnConfig(
    task="lqr",
    agents=("random",),
    options={"warmup": 20, "every": 20},
    real_steps=60,
    budget=100.0,
    seeds=2,
    evaluations=3,
    horizon=10,
    parameters={},
    noise=0.0,
    sensor_noise=0.0,
    key=0,
    x64=False,
)
PLAN = PlanConfig(
    task="lqr",
    planner="ilqr",
    mpc=False,
    horizon=8,
    steps=None,
    iterations=3,
    parameters={},
    mismatch={},
    noise=0.0,
    delay=0,
    starts=1,
    key=0,
    x64=False,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place, quiet = tmp_path_factory.mktemp("runs"), {"stream": io.StringIO(), "track": ("tensorboard",)}
    return {
        "compare": compare.compare_methods(COMPARE, RunOptions(out=place / "compare", **quiet)),
        "learn": race.race_agents(LEARN, RunOptions(out=place / "learn", **quiet)),
        "plan": plan.make_plan(PLAN, RunOptions(out=place / "plan", **quiet)),
    }


def events(folder) -> dict[tuple[str, int], float]:
    """Scalars of TensorBoard's files: records of a length, a checksum, an event and a checksum."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in (folder / "tensorboard").iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            [size] = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += size + 16
    return found


def test_tensorboard_of_a_comparison(runs):
    found, (records, _) = events(runs["compare"]), read_metrics(runs["compare"] / "metrics.jsonl")
    rows = of(records, "eval")
    assert {row["rate"] for row in rows} == {0.01, 0.1}
    for row in rows:
        group = f"adam-{row['rate']:g}"
        np.testing.assert_allclose(found[f"{group}/test", row["update"]], np.mean(row["test"]), rtol=1e-5)
        np.testing.assert_allclose(found[f"{group}/train/seed-1", row["update"]], row["train"][1], rtol=1e-5)


def test_tensorboard_of_an_agent_and_of_a_plan(runs):
    found, (records, _) = events(runs["learn"]), read_metrics(runs["learn"] / "metrics.jsonl")
    for row in of(records, "iteration"):
        mean = np.mean(row["evaluation"])
        np.testing.assert_allclose(found["random/evaluation", row["real_steps"]], mean, rtol=1e-5)
    found, (records, _) = events(runs["plan"]), read_metrics(runs["plan"] / "metrics.jsonl")
    [updates] = of(records, "updates")
    np.testing.assert_allclose([found["start-0/J", k] for k in range(len(updates["J"]))], updates["J"], rtol=1e-5)
    np.testing.assert_allclose(found["result/return", 0], of(records, "result")[0]["return"], rtol=1e-5)


class Outside(HTMLParser):
    """Whatever a page would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


def film(path) -> dict:
    """The data of the animation in a page."""
    page = path.read_text()
    parser = Outside()
    parser.feed(page)
    assert parser.found == [] and "@import" not in page and "url(" not in page
    return json.loads(re.search(r"data = (\{.*?\});\n", page)[1])


@pytest.mark.parametrize(("job", "steps"), [("compare", 5), ("learn", 10), ("plan", 8)])
def test_every_run_is_drawn(runs, job, steps):
    path = render_run(RenderConfig(runs[job]))
    assert path == runs[job] / "animation.html"
    data = film(path)
    assert data["steps"] == list(range(steps + 1)) and len(data["actions"]) == steps
    assert "start 0: return" in path.read_text()


def test_the_plan_that_is_drawn_is_the_one_that_was_kept(runs):
    data = film(render_run(RenderConfig(runs["plan"])))
    [kept] = of(read_metrics(runs["plan"] / "metrics.jsonl")[0], "trajectory")
    np.testing.assert_allclose(
        [float(a[0].replace("\u2212", "-")) for a in data["actions"]], np.ravel(kept["a"]), rtol=6e-3
    )


def test_what_is_drawn_can_be_chosen(runs, tmp_path):
    default = film(render_run(RenderConfig(runs["compare"], out=tmp_path / "a.html")))
    other = film(render_run(RenderConfig(runs["compare"], out=tmp_path / "b.html", method="adam", seed=1, start=3)))
    assert default["frames"] != other["frames"]
    assert (
        "adam at rate" in (tmp_path / "b.html").read_text() and "seed 1, start 3" in (tmp_path / "b.html").read_text()
    )
    assert film(render_run(RenderConfig(runs["learn"], out=tmp_path / "c.html"))) != film(
        render_run(RenderConfig(runs["learn"], out=tmp_path / "d.html", seed=1, start=1))
    )


def test_a_gif(runs):
    path = render_run(RenderConfig(runs["plan"], gif=True))
    with Image.open(path) as image:
        assert image.format == "GIF" and image.n_frames == 9 and image.info["loop"] == 0


@pytest.mark.parametrize(
    ("job", "options", "message"),
    [
        ("plan", {"seed": 1}, "takes --start alone"),
        ("plan", {"start": 7}, "the run has starts 0, got 7"),
        ("compare", {"method": "adm"}, "did you mean 'adam'"),
        ("compare", {"seed": 5}, "the run has seeds 0 to 1, got 5"),
        ("learn", {"method": "rndom"}, "did you mean 'random'"),
        ("learn", {"seed": 2}, "the run has seeds 0 to 1, got 2"),
        ("learn", {"start": -1}, "start must be at least 0, got -1"),
    ],
)
def test_what_a_run_does_not_have(runs, job, options, message):
    with pytest.raises(ValueError, match=message):
        render_run(RenderConfig(runs[job], **options))


def test_runs_that_leave_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="is not a run"):
        render_run(RenderConfig(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"job": "diagnose"}))
    with pytest.raises(ValueError, match="a run of 'diagnose': only plan, compare, learn leave"):
        render_run(RenderConfig(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"job": "compare", "task": "lqr"}))
    with pytest.raises(ValueError, match="whose plans are not kept: `diffmbrl plan lqr`"):
        render_run(RenderConfig(tmp_path))


# Bodies.


@pytest.fixture(scope="module")
def ant():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Brax about itself
        from brax import envs

        return envs.get_environment("ant", backend="positional").sys


def test_the_ant_stands_where_its_links_are(ant):
    body = geometry.solids(ant, azimuth=0.0, elevation=0.0)  # from the side: x to the right, z up
    pos, rot = geometry.poses(ant, ant.init_q)
    shapes = geometry.solid_shapes(body, pos, rot)
    rods = [shape for shape in shapes if isinstance(shape, Rod)]
    assert len(rods) == 17 and all(isinstance(shape, Line) for shape in shapes[: len(shapes) - 17])
    torso = rods[0]
    np.testing.assert_allclose(torso.points, [[0, pos[0, 2]]] * 2, atol=1e-6)
    assert torso.radius == 0.25
    # Its feet touch the ground, nothing is below it by more than the softness of a start, and the legs are alike.
    lowest = min(float(np.min(rod.points[:, 1])) - rod.radius for rod in rods)
    assert -0.1 < lowest < 0.4
    np.testing.assert_allclose(np.sum([rod.points.mean(0)[0] for rod in rods]), 0, atol=1e-4)
    # Moved and turned as a whole it looks the same from above, but for the ground, which moves below it.
    above = geometry.solids(ant, azimuth=0.0, elevation=np.pi / 2)
    quarter = np.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)])
    turned = geometry.rotated(pos, quarter) + np.array([5.3, -2.0, 0.0])
    spun = np.stack([_product(quarter, r) for r in rot])
    for rod, other in zip(
        geometry.solid_shapes(above, pos, rot), geometry.solid_shapes(above, turned, spun), strict=True
    ):
        if isinstance(rod, Rod):
            np.testing.assert_allclose(other.points, np.stack([-rod.points[:, 1], rod.points[:, 0]], 1), atol=1e-5)


def _product(p, q):
    """Of quaternions."""
    return np.array([p[0] * q[0] - p[1:] @ q[1:], *(p[0] * q[1:] + q[0] * p[1:] + np.cross(p[1:], q[1:]))])


def test_rotations_are_braxs(ant):
    from brax import math

    rng = np.random.default_rng(0)
    q = rng.normal(size=4)
    q, v = q / np.linalg.norm(q), rng.normal(size=(3, 3))
    np.testing.assert_allclose(geometry.rotated(v, q), [math.rotate(x, q) for x in v], atol=1e-5)
    with pytest.raises(ValueError, match="of at least 9 links"):
        geometry.solid_shapes(geometry.solids(ant), np.zeros((3, 3)), np.zeros((3, 4)))


def test_other_solids():
    box = geometry.Solid(0, geometry.BOX, geometry.CORNERS * [1.0, 2.0, 3.0], 0.0, "body")
    round_one = geometry.Solid(
        0, geometry.CYLINDER, geometry._local(None, 0, geometry.CYLINDER, np.array([1.0, 2.0, 0]))[0], 0.0, "body"
    )
    body = geometry.Solids((box, round_one), None, 1.0, False, 0.0, 0.0)
    *faces, outline = geometry.solid_shapes(body, np.zeros((1, 3)), np.array([[1.0, 0, 0, 0]]))
    assert len(faces) == 6 and all(isinstance(face, Polygon) and face.points.shape == (4, 2) for face in faces)
    near = min(faces, key=lambda face: face.depth)  # the side towards the eye, whole: x by z
    assert near.depth == -2.0 and np.ptp(near.points, axis=0).tolist() == [2.0, 6.0]
    assert outline.points.shape == (24, 2) and np.ptp(outline.points, axis=0).round(6).tolist() == [2.0, 4.0]
    with pytest.raises(ValueError, match="MuJoCo's type 1 cannot be drawn"):
        geometry._local(None, 0, 1, np.zeros(3))
    for shape in (*faces, outline, Rod(np.zeros((2, 2)), 0.5, "accent", 2.0)):
        again = _shape(json.loads(json.dumps(shape_record(shape))))
        assert type(again) is type(shape)
        np.testing.assert_allclose(again[0], shape[0], atol=1e-4)
        assert again.depth == pytest.approx(shape.depth, abs=1e-4) and again.role == shape.role


def test_what_is_deeper_is_drawn_first(tmp_path):
    def frame(depth):
        return [
            Rod(np.array([[0.0, 0], [1, 0]]), 0.2, "accent", depth),
            Line(np.eye(2), "ground"),
            Rod(np.array([[0.5, -1], [0.5, 1]]), 0.2, "body", 0.0),
        ]

    states, a = [frame(1.0), frame(-1.0), frame(1.0)], np.zeros((2, 1))
    looks = {"dt": 0.1, "a_low": [-1.0], "a_high": [1.0]}
    html = animate(states, a, **looks)
    data = json.loads(re.search(r"data = (\{.*?\});\n", html)[1])
    assert data["orders"] == [[0, 1, 2], [0, 2, 1]] and data["order"] == [0, 1, 0]
    assert html.index("<polyline") < html.index("<g>")  # the line without a depth behind all
    gif(tmp_path / "a.gif", states, a, **looks)
    with Image.open(tmp_path / "a.gif") as image:
        colours = []
        for k in (0, 1):
            image.seek(k)
            colours.append(image.convert("RGB").getpixel((280, 30 + 212)))
    blue = [colour[2] - colour[0] for colour in colours]
    assert blue[0] < 40 < blue[1]  # where they cross: grey in front, then blue
