"""Many runs of one method in one program: replicas over learning rates or sweep points, over seeds, and over starts.

`BatchedPolicyRuns` and `BatchedPlanRuns` share the protocol `BatchedRuns`, which `compare` and `sweep` call. A variant is one
solver with its task and draws; the arrays that they return have axes [variants, seeds]. Draws may be sharded over devices
(`shared`): policies then shard the starts of each seed and sum over them, planners shard the plans.
"""

from diffmbrl.jobs.batch.learning_curve import LearningCurve, learning_curve
from diffmbrl.jobs.batch.plans import BatchedPlanRuns, planned_task
from diffmbrl.jobs.batch.policies import BatchedPolicyRuns
from diffmbrl.jobs.batch.protocol import BatchedRuns
from diffmbrl.jobs.batch.starts import NOISE, Draws, draw_starts, shared

__all__ = [
    "NOISE",
    "BatchedPlanRuns",
    "BatchedPolicyRuns",
    "BatchedRuns",
    "Draws",
    "LearningCurve",
    "draw_starts",
    "learning_curve",
    "planned_task",
    "shared",
]
