"""Drawings and animations: states as shapes, trajectories as self-contained HTML or GIF.

`DRAWINGS` maps the name of a task to its drawing; `frames` draws a trajectory, `animate` and `gif` show it.
"""

from diffmbrl.render.animated_gif import gif
from diffmbrl.render.html import animate, animation_page
from diffmbrl.render.registry import DRAWINGS, frames
from diffmbrl.render.shapes import Circle, Line, Polygon, Rod

__all__ = ["DRAWINGS", "Circle", "Line", "Polygon", "Rod", "animate", "animation_page", "frames", "gif"]
