from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from mmefficient.evaluation.statistics import Array, compare, mcnemar, resampled_sums


def means(*plans: Array) -> Array:
    """The table of one metric, a mean over records, for several plans."""
    return np.stack([np.stack([plan, np.ones_like(plan)], axis=-1) for plan in plans], axis=1)[:, :, None, None]


def names(count: int, repeat: int = 1) -> list[str]:
    return [f"p{i // repeat}" for i in range(count)]


def test_interval_of_a_mean_equals_scipys() -> None:
    data = np.random.default_rng(1).exponential(size=400)
    values, _ = compare(means(data), names(400), resamples=20_000)
    expected = stats.bootstrap((data,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    assert values[0, 0, 0] == pytest.approx(data.mean())
    assert values[0, 0, 1:] == pytest.approx([expected.low, expected.high], abs=0.006)


def test_interval_of_a_share_equals_the_binomial_one() -> None:
    data = np.array([1.0] * 300 + [0.0] * 100)
    values, _ = compare(means(data), names(400), resamples=20_000)
    assert values[0, 0, 1:] == pytest.approx(stats.binom(400, 0.75).ppf([0.025, 0.975]) / 400, abs=0.003)


def test_ratio_of_sums_is_resampled_as_a_ratio() -> None:
    rng = np.random.default_rng(3)
    below = rng.integers(1, 9, 500).astype(float)
    above = rng.binomial(below.astype(int), 0.2).astype(float)
    table = np.stack([above, below], axis=-1)[:, None, None, None]
    values, _ = compare(table, names(500), resamples=20_000)
    expected = stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=4,
    ).confidence_interval
    assert values[0, 0, 0] == above.sum() / below.sum()
    assert values[0, 0, 1:] == pytest.approx([expected.low, expected.high], abs=0.002)


def test_paired_difference_is_that_of_the_record_differences() -> None:
    rng = np.random.default_rng(5)
    first = rng.normal(size=300)
    second = first + rng.normal(0.1, 0.05, size=300)
    values, differences = compare(means(first, second), names(300), resamples=10_000)
    alone, _ = compare(means(second - first), names(300), resamples=10_000)
    assert differences[1] == pytest.approx(alone[0])
    assert (differences[0] == 0).all()
    width = differences[1, 0, 2] - differences[1, 0, 1]
    assert width < 0.2 * (values[1, 0, 2] - values[1, 0, 1]), "pairing is lost"


def test_questions_about_one_picture_are_one_observation() -> None:
    one = np.random.default_rng(6).random(100)
    single, _ = compare(means(one), names(100), resamples=4000)
    copied, _ = compare(means(one.repeat(9)), names(900, repeat=9), resamples=4000)
    naive, _ = compare(means(one.repeat(9)), names(900), resamples=4000)
    assert copied == pytest.approx(single)
    assert np.ptp(naive[0, 0, 1:]) == pytest.approx(np.ptp(single[0, 0, 1:]) / 3, rel=0.1)


def test_clusters_of_unequal_size_keep_their_rows_together() -> None:
    columns = np.arange(12.0).reshape(6, 2)
    pictures = ["b", "a", "b", "c", "a", "b"]
    sums = resampled_sums(columns, pictures, 500, 0)
    totals = {"a": columns[[1, 4]].sum(0), "b": columns[[0, 2, 5]].sum(0), "c": columns[3]}
    possible = {tuple(x + y + z) for x in totals.values() for y in totals.values() for z in totals.values()}
    assert {tuple(row) for row in sums} == possible


def test_mean_over_parts_is_unweighted() -> None:
    table = np.zeros((30, 1, 1, 2, 2))
    table[:10, 0, 0, 0] = 1, 1
    table[10:, 0, 0, 1] = 0, 1
    values, _ = compare(table, names(30))
    assert values[0, 0].tolist() == [0.5, 0.5, 0.5]


def test_undefined_metrics_are_nan_and_undefined_resamples_are_left_out() -> None:
    table = np.zeros((3, 1, 2, 1, 2))
    table[0, 0, 1] = 1, 1  # the second metric rests on one record, which a resample may miss
    values, _ = compare(table, names(3))
    assert np.isnan(values[0, 0]).all()
    assert values[0, 1].tolist() == [1, 1, 1]


def test_seed_decides() -> None:
    table, pictures = means(np.random.default_rng(7).random(50)), names(50)
    first, second, third = (compare(table, pictures, seed=seed)[0] for seed in (1, 1, 2))
    assert (first == second).all()
    assert not (first == third).all()


def test_25_thousand_records_take_seconds() -> None:
    table = np.random.default_rng(8).integers(0, 2, (25_000, 5, 1, 11, 2)).astype(float)
    start = time.perf_counter()
    compare(table, names(25_000, repeat=3))
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    ("lost", "gained", "kept", "p"),
    [(0, 0, 5, 1.0), (5, 0, 0, 0.0625), (1, 5, 3, 0.21875), (3, 3, 1, 1.0), (2000, 2000, 0, 1.0)],
)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int, kept: int, p: float) -> None:
    before = np.array([True] * lost + [False] * gained + [True] * kept)
    after = np.array([False] * lost + [True] * gained + [True] * kept)
    assert mcnemar(before, after) == (lost, gained, pytest.approx(p))
    if lost + gained:
        assert stats.binomtest(lost, lost + gained).pvalue == pytest.approx(p)


def test_a_contrast_is_with_the_mean_of_others() -> None:
    rng = np.random.default_rng(0)
    table = np.ones((40, 4, 1, 1, 2))
    table[..., 0] = rng.integers(0, 2, size=(40, 4, 1, 1))
    means = table[..., 0].mean(0)[:, 0, 0]
    names = [str(i) for i in range(40)]
    value, low, high = compare(table, names, [(0, [1, 2, 3])], resamples=200)[1][0, 0]
    assert value == pytest.approx(means[0] - means[1:].mean())
    assert low < value < high
