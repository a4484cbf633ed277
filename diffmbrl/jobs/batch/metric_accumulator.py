"""Sums and averages of the reports of batched updates, for the records of evaluations."""

import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from diffmbrl.info import EvaluationCounts, Info, Quadratic


class MetricAccumulator:
    """Accumulates the `Info` of updates per variant and seed: counts are summed over the replicas of a seed, the rest averaged.

    Args:
        variants: The number of variants.
        seeds: The number of seeds of each variant.
        replicas: The number of replicas of each seed: the starts of a planner, one for a policy.
    """

    def __init__(self, variants: int, seeds: int, replicas: int = 1):
        self.shape = (variants, seeds, replicas)
        self.totals = {name: np.zeros(self.shape) for name in (*EvaluationCounts._fields, "nonfinite")}
        self.latest = {name: np.full(self.shape, np.nan) for name in ("J", "gradient_norm", "damping", "accepted")}
        self.takes_gradients = True
        self.first: Quadratic | None = None  # the model that each replica's first update reported

    def add(self, info: Info, made: Int[Array | np.ndarray, " replicas"]) -> None:
        """Add the reports of one call.

        Args:
            info: A row for each update, [replicas, CHUNK]; rows beyond `made` are zero.
            made: The number of updates that each replica made.
        """
        made = np.asarray(made)
        index = np.arange(made.size)
        counts = {name: np.asarray(getattr(info.work, name), np.float64) for name in EvaluationCounts._fields}
        counts["nonfinite"] = np.asarray(info.nonfinite)
        # New arrays: a checkpoint may still be writing the previous ones.
        self.totals = {name: x + counts[name].sum(1).reshape(self.shape) for name, x in self.totals.items()}
        for name in ("J", "gradient_norm", "damping"):
            if (values := getattr(info, name)) is not None:
                self.latest[name] = np.asarray(values)[index, made - 1].reshape(self.shape)
        self.takes_gradients = info.gradient_norm is not None
        self.latest["accepted"] = (np.asarray(info.accepted).sum(1) / made).reshape(self.shape)
        if info.model is not None:
            model = jax.tree.map(np.asarray, info.model)
            self.first = self.first or jax.tree.map(lambda x: x[:, 0], model)
            self.latest |= {name: x.reshape(self.shape) for name, x in _quality(model, made).items()}

    @property
    def state(self) -> dict[str, Any]:
        """Everything as arrays; its form depends on the first update's report."""
        return {"totals": self.totals, "latest": dict(self.latest), "first": self.first}

    def restore(self, state: dict[str, Any], info: Info) -> None:
        """Restore a state.

        Args:
            state: What `state` returned.
            info: The report of an update; its shapes suffice.
        """
        form = self.after(info)  # in the order of the records: the dictionaries of a tree come back sorted
        self.totals = {name: state["totals"][name] for name in form["totals"]}
        self.latest = {name: state["latest"][name] for name in form["latest"]}
        self.first = state["first"]
        self.takes_gradients = info.gradient_norm is not None

    def after(self, info: Info) -> dict[str, Any]:
        """Make a state of the form that it has after the first update.

        Args:
            info: The report of an update; its shapes suffice.

        Returns:
            A state of zeros.
        """
        blank = MetricAccumulator(*self.shape)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), info)
        blank.add(zeros, np.ones(self.shape, int).ravel())
        return blank.state

    def fields(self) -> dict[str, np.ndarray]:
        """Summarise the reports for an evaluation's record.

        Returns:
            Sums of the counts and averages of the latest values, [variants, seeds] each.
        """
        # The replicas of a seed run in parallel: they add to the work, but not to its depth.
        totals = {name: x.max(2) if name == "sequential" else x.sum(2) for name, x in self.totals.items()}
        return totals | {name: x.mean(2) for name, x in self.latest.items()}

    def broken(self, variant: int) -> int | None:
        """Find the first replica of a variant whose last return or gradient was not finite.

        Args:
            variant: The number of the variant.

        Returns:
            The number of the replica among the variant's, or None if there is none, or no update was made.
        """
        last = self.latest["J"][variant] + (self.latest["gradient_norm"][variant] if self.takes_gradients else 0)
        begun = self.totals["sequential"][variant] > 0
        bad = np.flatnonzero(begun & ~np.isfinite(last))
        return int(bad[0]) if bad.size else None


def _quality(model: Quadratic, made: np.ndarray) -> dict[str, np.ndarray]:
    """How good each replica's quadratic models were: medians over the updates of one call, and the last Ritz values."""
    filled = np.arange(model.gap.shape[1]) < made[:, None]
    ritz, predicted, improved = (np.asarray(x) for x in (model.ritz, model.predicted, model.improved))
    best = np.argmax(np.nan_to_num(improved, nan=-np.inf), axis=-1)[..., None]
    predicted, improved = (np.take_along_axis(x, best, -1)[..., 0] for x in (predicted, improved))
    ratio = improved / np.where(predicted > 0, predicted, np.nan)
    index = np.arange(made.size)
    out = {"agreement": ratio, "negative": np.asarray(model.negative), "gap": np.asarray(model.gap)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a replica without any is NaN
        out = {name: np.nanmedian(np.where(filled, x, np.nan), axis=1) for name, x in out.items()}
    if ritz.shape[-1]:
        out |= {"curvature": ritz[index, made - 1].max(-1), "lowest": ritz[index, made - 1].min(-1)}
    return out
