"""The table of jobs: a new job is a file with its functions, a config and a row here.

The functions are imported when a job runs (`job.functions_of`), so that `diffmbrl --help` does not wait for them.
"""

from typing import Any, NamedTuple

from diffmbrl.jobs.configs import CompareConfig, DiagnoseConfig, LearnConfig, PlanConfig


class Job(NamedTuple):
    """A job that leaves a run folder.

    Args:
        name: The entry `job` of its `config.json`.
        config: The dataclass of its options.
        module: The module whose `FUNCTIONS` are the job's.
        single: The field, a tuple, of which the command line takes exactly one.
        resumable: Whether an interrupted run can be resumed.
    """

    name: str
    config: type[Any]
    module: str
    single: str | None = None
    resumable: bool = True


JOBS = {
    "compare": Job("compare", CompareConfig, "diffmbrl.jobs.compare"),
    "race": Job("learn", LearnConfig, "diffmbrl.jobs.learn"),
    "learn": Job("learn", LearnConfig, "diffmbrl.jobs.learn", single="agents"),
    "plan": Job("plan", PlanConfig, "diffmbrl.jobs.plan"),
    "diagnose": Job("diagnose", DiagnoseConfig, "diffmbrl.jobs.diagnose", resumable=False),
}
RESUMABLE = {job.name: job for job in JOBS.values() if job.resumable}
