"""Arms of a comparison: the records of one method at one learning rate as arrays."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from diffmbrl.runs.statistics import interquartile_mean

SHARED = ("update", "seconds", "lanes")  # one number for each evaluation
MODEL = ("agreement", "gap", "curvature", "lowest", "negative", "damping")  # of a second-order method's quadratic model
SPREAD = (
    "spread_norm",
    "spread_variance",
    "spread_snr",
    "spread_tail",
    "spread_nonfinite",
)  # of single rollouts' gradients
PER_SEED = ("forward", "jvp", "vjp", "sequential", "train", "test", "success", "nonfinite", *MODEL, *SPREAD)
Array = np.ndarray


@dataclass
class Arm:
    """A method at one learning rate. Work and seconds are cumulative; arrays run over evaluations (E) and seeds (S)."""

    method: str
    rate: float | None
    label: str
    order: int | None = None
    policy_kind: str = "policy"
    parameters: int | None = None
    compile_seconds: float | None = None
    continuation: list[list[Any]] = field(
        default_factory=list
    )  # [discount, updates, bound of trust if any] of each stage
    evaluations: dict[str, Array] = field(default_factory=dict)  # SHARED: [E], PER_SEED: [E, S]
    profiles: dict[str, Array] = field(default_factory=dict)  # "start", "end": |dJ/da_t| for each t
    spectra: dict[str, Array] = field(default_factory=dict)  # "start", "end": eigenvalues, decreasing
    path: dict[str, Array] = field(
        default_factory=dict
    )  # dampings of the first update, and predicted and true improvement
    stops: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Array:
        return self.evaluations[name]

    @property
    def measured(self) -> bool:
        """Whether there is any evaluation."""
        return bool(self.evaluations)

    @property
    def plans(self) -> bool:
        """Whether the method plans each start separately instead of learning one policy for all."""
        return self.policy_kind == "plan"

    @property
    def seeds(self) -> int:
        return self["train"].shape[1]

    @property
    def dynamics(self) -> Float[np.ndarray, "E S"]:
        """Dynamics evaluations: forward, jvp and vjp."""
        return self["forward"] + self["jvp"] + self["vjp"]

    @property
    def score(self) -> float:
        """The criterion of the best rate: the interquartile mean of the final training return."""
        return float(interquartile_mean(self["train"][-1])) if self.measured else -math.inf


def collect_arms(records: list[dict[str, Any]]) -> list[Arm]:
    """Collect the records of each arm, in order of appearance; some kinds of records may be missing."""
    arms: dict[tuple[str, float | None], Arm] = {}
    evaluations: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for record in records:
        if "method" not in record:
            continue
        method, rate = str(record["method"]), record.get("rate")
        arm = arms.setdefault((method, rate), Arm(method, rate, method))
        kind = record.get("kind")
        if kind == "arm":
            arm.label, arm.order = str(record.get("label", method)), record.get("order")
            arm.policy_kind = record.get("policy_kind", "policy")
            arm.parameters, arm.compile_seconds = record.get("parameters"), record.get("compile_seconds")
            arm.continuation = record.get("continuation") or []
        elif kind == "eval":
            evaluations.setdefault((method, rate), []).append(record)
        elif kind == "gradient_profile":
            arm.profiles[record["when"]] = np.asarray(record["values"], float)
        elif kind == "spectrum":
            arm.spectra[record["when"]] = np.asarray(record["values"], float)
        elif kind == "path":
            arm.path = {name: np.asarray(record[name], float) for name in ("dampings", "predicted", "improved")}
        elif kind == "stop":
            arm.stops.append(str(record.get("reason", "")))
    for key, rows in evaluations.items():
        arms[key].evaluations = _columns(rows)
    return list(arms.values())


def best_rates(arms: list[Arm]) -> list[Arm]:
    """Return one arm for each method: the highest interquartile mean of the final training return."""
    best: dict[str, Arm] = {}
    for arm in arms:
        if arm.method not in best or arm.score > best[arm.method].score:
            best[arm.method] = arm
    return list(best.values())


def _columns(rows: list[dict[str, Any]]) -> dict[str, Array]:
    """Convert evaluations to arrays; a missing number is NaN."""
    seeds = max(np.size(row.get("train", math.nan)) for row in rows)
    columns = {name: np.array([_number(row.get(name)) for row in rows]) for name in SHARED}
    for name in PER_SEED:
        columns[name] = np.array([_per_seed(row.get(name), seeds) for row in rows])
    if np.isnan(columns["lanes"]).all():
        columns["lanes"] = np.full(len(rows), float(seeds))
    return columns


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _per_seed(value: Any, seeds: int) -> Array:
    numbers = np.array([_number(item) for item in (value if np.ndim(value) else [value])])
    return np.broadcast_to(numbers, (seeds,)) if numbers.size in (1, seeds) else np.full(seeds, math.nan)
