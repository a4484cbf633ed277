"""The jobs of the command line as functions, each with a config: compare, learn, race, plan, diagnose, render, resume."""

import importlib
from typing import TYPE_CHECKING, Any

from diffmbrl.jobs.configs import (
    CompareConfig,
    DiagnoseConfig,
    DoctorConfig,
    LearnConfig,
    PlanConfig,
    RenderConfig,
    ReportConfig,
    ResumeConfig,
    RunOptions,
    SweepConfig,
)

if TYPE_CHECKING:
    from diffmbrl.jobs.compare import compare_methods
    from diffmbrl.jobs.diagnose import diagnose_gradient
    from diffmbrl.jobs.doctor import check_installation
    from diffmbrl.jobs.learn import learn_agent, race_agents
    from diffmbrl.jobs.plan import make_plan
    from diffmbrl.jobs.render import render_run
    from diffmbrl.jobs.resume import resume_run

# Imported on first access: `diffmbrl --help` does not need them.
_FUNCTIONS = {
    "check_installation": "diffmbrl.jobs.doctor",
    "compare_methods": "diffmbrl.jobs.compare",
    "diagnose_gradient": "diffmbrl.jobs.diagnose",
    "learn_agent": "diffmbrl.jobs.learn",
    "make_plan": "diffmbrl.jobs.plan",
    "race_agents": "diffmbrl.jobs.learn",
    "render_run": "diffmbrl.jobs.render",
    "resume_run": "diffmbrl.jobs.resume",
}

__all__ = [
    "CompareConfig",
    "DiagnoseConfig",
    "DoctorConfig",
    "LearnConfig",
    "PlanConfig",
    "RenderConfig",
    "ReportConfig",
    "ResumeConfig",
    "RunOptions",
    "SweepConfig",
    "check_installation",
    "compare_methods",
    "diagnose_gradient",
    "learn_agent",
    "make_plan",
    "race_agents",
    "render_run",
    "resume_run",
]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FUNCTIONS[name]), name)
