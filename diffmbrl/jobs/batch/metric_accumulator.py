"""What the updates of many lanes reported, summed and averaged for the records of their evaluations."""

import warnings
from typing import Any

import jax
import numpy as np

from diffmbrl.info import EvaluationCounts, Info, Quadratic


class MetricAccumulator:
    """What the updates reported so far, [rates, seeds]: `lanes` lanes of each seed are summed (work) or averaged."""

    def __init__(self, rates: int, seeds: int, lanes: int = 1):
        self.shape = (rates, seeds, lanes)
        self.totals = {name: np.zeros(self.shape) for name in (*EvaluationCounts._fields, "nonfinite")}
        self.latest = {name: np.full(self.shape, np.nan) for name in ("J", "gradient_norm", "damping", "accepted")}
        self.takes_gradients = True
        self.first: Quadratic | None = None  # what each lane's first update said of its model

    def add(self, info: Info, made: Any) -> None:
        """The rows of one call; those beyond `made` are zero."""
        made = np.asarray(made)
        lane = np.arange(made.size)
        counts = {name: np.asarray(getattr(info.work, name), np.float64) for name in EvaluationCounts._fields}
        counts["nonfinite"] = np.asarray(info.nonfinite)
        # New arrays: those of before may be on their way to a checkpoint.
        self.totals = {name: x + counts[name].sum(1).reshape(self.shape) for name, x in self.totals.items()}
        for name in ("J", "gradient_norm", "damping"):
            if (values := getattr(info, name)) is not None:
                self.latest[name] = np.asarray(values)[lane, made - 1].reshape(self.shape)
        self.takes_gradients = info.gradient_norm is not None
        self.latest["accepted"] = (np.asarray(info.accepted).sum(1) / made).reshape(self.shape)
        if info.model is not None:
            model = jax.tree.map(np.asarray, info.model)
            self.first = self.first or jax.tree.map(lambda x: x[:, 0], model)
            self.latest |= {name: x.reshape(self.shape) for name, x in _quality(model, made).items()}

    @property
    def state(self) -> dict[str, Any]:
        """All of it as arrays; what it has depends on what the first update reported."""
        return {"totals": self.totals, "latest": dict(self.latest), "first": self.first}

    def restore(self, state: dict[str, Any], info: Info) -> None:
        """As it was, of updates that report such `info`."""
        form = self.after(info)  # in its order, for the records: a tree's dictionaries come back sorted
        self.totals = {name: state["totals"][name] for name in form["totals"]}
        self.latest = {name: state["latest"][name] for name in form["latest"]}
        self.first = state["first"]
        self.takes_gradients = info.gradient_norm is not None

    def after(self, info: Info) -> dict[str, Any]:
        """A state in the form that it has once updates have reported such `info` (shapes suffice)."""
        blank = MetricAccumulator(*self.shape)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), info)
        blank.add(zeros, np.ones(self.shape, int).ravel())
        return blank.state

    def fields(self) -> dict[str, np.ndarray]:
        """For an evaluation's record."""
        # Lanes of one seed run side by side, so they add to the work but not to its depth.
        totals = {name: x.max(2) if name == "sequential" else x.sum(2) for name, x in self.totals.items()}
        return totals | {name: x.mean(2) for name, x in self.latest.items()}

    def broken(self, rate: int) -> int | None:
        """The first lane of this rate whose last return or gradient was not finite, once any update was made."""
        last = self.latest["J"][rate] + (self.latest["gradient_norm"][rate] if self.takes_gradients else 0)
        begun = self.totals["sequential"][rate] > 0
        bad = np.flatnonzero(begun & ~np.isfinite(last))
        return int(bad[0]) if bad.size else None


def _quality(model: Quadratic, made: np.ndarray) -> dict[str, np.ndarray]:
    """What the updates of one call said of their models, for each lane: medians over updates, but for the last Ritz values."""
    filled = np.arange(model.gap.shape[1]) < made[:, None]
    ritz, predicted, improved = (np.asarray(x) for x in (model.ritz, model.predicted, model.improved))
    best = np.argmax(np.nan_to_num(improved, nan=-np.inf), axis=-1)[..., None]
    predicted, improved = (np.take_along_axis(x, best, -1)[..., 0] for x in (predicted, improved))
    ratio = improved / np.where(predicted > 0, predicted, np.nan)
    lane = np.arange(made.size)
    out = {"agreement": ratio, "negative": np.asarray(model.negative), "gap": np.asarray(model.gap)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a lane without any is NaN
        out = {name: np.nanmedian(np.where(filled, x, np.nan), axis=1) for name, x in out.items()}
    if ritz.shape[-1]:
        out |= {"curvature": ritz[lane, made - 1].max(-1), "lowest": ritz[lane, made - 1].min(-1)}
    return out
