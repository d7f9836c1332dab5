"""Percentile bootstrap over pictures, for values and for paired differences between plans."""

from __future__ import annotations

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


def compare(table: Array, pictures: Sequence[str], *, resamples: int = 2000, seed: int = 0) -> tuple[Array, Array]:
    """Values of metrics under several plans and their paired differences to the first plan, with 95 % intervals.

    Args:
        table: [n, plans, metrics, parts, 2], the numerators and denominators of every record. A metric is the
            unweighted mean over its parts of Σ numerator / Σ denominator (one part, or one per kind of a group).
        pictures: the n records' pictures, the unit that is resampled.
        resamples: bootstrap samples, shared by all plans and metrics, which is what pairs the differences.
        seed: of the resampling.

    Returns:
        `(values, differences)`, both [plans, metrics, 3]: value, low, high; NaN where a denominator is zero. Resamples
        in which a metric is undefined are left out of its interval.
    """
    sampled = resampled_sums(table.reshape(len(table), -1), pictures, resamples, seed)
    observed = _metrics(table.sum(axis=0))
    samples = _metrics(sampled.reshape(resamples, *table.shape[1:]))
    return _estimate(observed, samples), _estimate(observed - observed[:1], samples - samples[:, :1])


def _metrics(sums: Array) -> Array:
    """[..., plans, metrics, parts, 2] sums -> [..., plans, metrics]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = sums[..., 0] / sums[..., 1]
    return np.asarray(quotients.mean(axis=-1), dtype=np.float64)


def _estimate(observed: Array, samples: Array) -> Array:
    """[plans, metrics] and [resamples, plans, metrics] -> [plans, metrics, 3]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        low, high = np.nanpercentile(samples, [2.5, 97.5], axis=0)
    return np.stack([observed, low, high], axis=-1)
