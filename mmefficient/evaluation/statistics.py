"""Percentile bootstrap over pictures, for values and paired differences between plans; McNemar's exact test."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_BLOCK = 2_000_000  # counts drawn at a time: memory stays at tens of MB whatever the number of pictures


def resampled_sums(columns: Array, pictures: Sequence[str], resamples: int, seed: int) -> Array:
    """Column sums of `columns` [n, K] in bootstrap samples of whole pictures (Efron 1979): [resamples, K].

    Rows of one picture are not independent, so pictures are drawn, with replacement, as many as there are.
    """
    clusters = np.unique(np.asarray(pictures), return_inverse=True)[1]
    count = int(clusters.max()) + 1
    sums = np.zeros((count, columns.shape[1]))
    np.add.at(sums, clusters, columns)
    rng = np.random.default_rng(seed)
    result = np.empty((resamples, columns.shape[1]))
    step = max(1, _BLOCK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, count, size=(rows, count)) + np.arange(rows)[:, None] * count
        weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        result[start : start + rows] = weights.astype(np.float64) @ sums
    return result


def compare(
    table: Array,
    pictures: Sequence[str],
    contrasts: Sequence[tuple[int, Sequence[int]]] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Values of metrics under several plans and paired differences between them, with 95 % intervals.

    Args:
        table: [n, plans, metrics, parts, 2], the numerators and denominators of every record. A metric is the
            unweighted mean over its parts of Σ numerator / Σ denominator (one part, or one per kind of a group).
        pictures: the n records' pictures, the unit that is resampled.
        contrasts: pairs of a plan and the plans whose mean is taken from it; by default every plan against the first.
        resamples: bootstrap samples, shared by all plans and metrics, which is what pairs the differences.
        seed: of the resampling.

    Returns:
        Values [plans, metrics, 3] and differences [contrasts, metrics, 3]: value, low, high; NaN where a denominator is
        zero. Resamples in which a metric is undefined are left out of its interval.
    """
    contrasts = [(plan, [0]) for plan in range(table.shape[1])] if contrasts is None else contrasts
    sampled = resampled_sums(table.reshape(len(table), -1), pictures, resamples, seed)
    observed = _metrics(table.sum(axis=0))
    samples = _metrics(sampled.reshape(resamples, *table.shape[1:]))
    differences = [
        _estimate(observed[i] - observed[others].mean(0), samples[:, i] - samples[:, others].mean(1))
        for i, others in ((i, list(others)) for i, others in contrasts)
    ]
    return _estimate(observed, samples), np.stack(differences)


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Answers lost, answers gained, and the two-sided p of McNemar's exact test (1947) on paired outcomes [n].

    Under the null hypothesis each answer that changed was as likely to be lost as gained. The test takes questions to
    be independent, which those on one picture are not quite; the bootstrap intervals do not need that.
    """
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    changed = lost + gained
    tail = sum(math.comb(changed, i) for i in range(min(lost, gained) + 1))
    return lost, gained, min(1.0, 2 * tail / 2**changed)


def _metrics(sums: Array) -> Array:
    """[..., plans, metrics, parts, 2] sums -> [..., plans, metrics]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = sums[..., 0] / sums[..., 1]
    return np.asarray(quotients.mean(axis=-1), dtype=np.float64)


def _estimate(observed: Array, samples: Array) -> Array:
    """[...] and [resamples, ...] -> [..., 3]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        low, high = np.nanpercentile(samples, [2.5, 97.5], axis=0)
    return np.stack([observed, low, high], axis=-1)
