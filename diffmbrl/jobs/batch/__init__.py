"""Many runs of one method as one program: lanes over learning rates and seeds, or over start states for planners.

`PolicyLanes` and `PlanLanes` have the same methods, `Lanes`, which `compare` calls; arrays that they return have axes [rates,
seeds]. Draws that are shared out among devices (`shared`) are worked on where they are: policies share the starts of each seed,
and add up what they say of them; planners share the plans.
"""

from diffmbrl.jobs.batch.course import Course, course
from diffmbrl.jobs.batch.draws import NOISE, draw, shared
from diffmbrl.jobs.batch.plans import PlanLanes
from diffmbrl.jobs.batch.policies import PolicyLanes
from diffmbrl.jobs.batch.protocol import Lanes

__all__ = ["NOISE", "Course", "Lanes", "PlanLanes", "PolicyLanes", "course", "draw", "shared"]
