"""Many runs of one method as one program: lanes over learning rates and seeds, or over start states for planners.

`BatchedPolicyRuns` and `BatchedPlanRuns` have the same methods, `BatchedRuns`, which `compare` calls; arrays that they
return have axes [rates, seeds]. Draws that are shared out among devices (`shared`) are worked on where they are:
policies share the starts of each seed, and add up what they say of them; planners share the plans.
"""

from diffmbrl.jobs.batch.learning_curve import LearningCurve, learning_curve
from diffmbrl.jobs.batch.plans import BatchedPlanRuns
from diffmbrl.jobs.batch.policies import BatchedPolicyRuns
from diffmbrl.jobs.batch.protocol import BatchedRuns
from diffmbrl.jobs.batch.starts import NOISE, draw_starts, shared

__all__ = [
    "NOISE",
    "BatchedPlanRuns",
    "BatchedPolicyRuns",
    "BatchedRuns",
    "LearningCurve",
    "draw_starts",
    "learning_curve",
    "shared",
]
