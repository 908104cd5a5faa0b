"""Numbers that say how well label words are predicted: accuracy, macro F1, AUC, each with an interval, and batch calibration.

Everything works on log-likelihoods [N, K] of K options a row and the right options [N]. The intervals describe the sampling of the
rows and nothing else: not the seed of the training run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import log_softmax, logsumexp

from probes.records_parts import Interval

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def accuracy(predicted: Labels, label: Labels) -> tuple[float, Interval]:
    """Share of right predictions with its 95 % Wilson interval (which stays inside [0, 1] and is no point at 0 or 1)."""
    right = int((predicted == label).sum())
    ends = stats.binomtest(right, len(label)).proportion_ci(0.95, method="wilson")
    return right / len(label), (float(ends.low), float(ends.high))


def floor(label: Labels) -> float:
    """Accuracy of always answering with the most frequent label."""
    return float(np.bincount(label).max() / len(label))


def macro_f1(predicted: Labels, label: Labels, classes: int) -> Array:
    """Mean over the classes of 2 TP/(2 TP + FP + FN); a class that is neither there nor predicted counts nothing.

    Over the last dimension: [..., N] -> [...].
    """
    total, counted = np.zeros(label.shape[:-1]), np.zeros(label.shape[:-1])
    for k in range(classes):
        hit = ((predicted == k) & (label == k)).sum(-1)
        size = (label == k).sum(-1) + (predicted == k).sum(-1)
        total += np.where(size > 0, 2 * hit / np.maximum(size, 1), 0.0)
        counted += size > 0
    found: Array = total / counted
    return found


def auc(scores: Array, label: Labels) -> Array:
    """Chance that a row of the class outranks one that is not of it (ties count half), mean over one-against-rest for K > 2.

    [..., N, K], [..., N] -> [...]. Two options are ranked by the difference of their log-likelihoods, more by the normalised ones.
    nan where a class has no row, or all of them.
    """
    classes = scores.shape[-1]
    ranked = scores[..., 1:] - scores[..., :1] if classes == 2 else log_softmax(scores, axis=-1)
    found: Array = np.zeros(label.shape[:-1])
    for j, k in enumerate([1] if classes == 2 else range(classes)):
        there = label == k
        n = there.sum(-1)
        m = there.shape[-1] - n
        above = (stats.rankdata(ranked[..., j], axis=-1) * there).sum(-1) - n * (n + 1) / 2
        found = found + np.where(n * m > 0, above / np.maximum(n * m, 1), np.nan)
    return found / (1 if classes == 2 else classes)


def bootstrap(statistic: Callable[[NDArray[np.intp]], Array], n: int, seed: int, draws: int = 400) -> Interval | None:
    """95 % percentile interval of ``statistic(row indices [draws, n])`` over resampled rows; None where most resamples have none."""
    values = statistic(np.random.default_rng(seed).integers(0, n, (draws, n)))
    values = values[np.isfinite(values)]
    if len(values) < draws // 2:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def batch_calibrated(scores: Array) -> Array:
    """log p(option | row) minus the log of its mean over the rows: batch calibration (Zhou et al. 2024, arXiv 2309.17249).

    It takes out the preference that a model has for a label word whatever the row says; it reads all scored rows at once, without
    their labels, and assumes that their classes are roughly balanced.
    """
    logp = log_softmax(scores, axis=1)
    calibrated: Array = logp - (logsumexp(logp, axis=0) - np.log(len(scores)))
    return calibrated


def summary(scores: Array, label: Labels, calibrate: bool, seed: int = 0) -> dict[str, Any]:
    """All of it, under the names of `probes.records.Evaluation`. ``calibrate`` False: the options differ from row to row."""
    classes = scores.shape[1]

    def f1(predicted: Labels) -> tuple[float, Interval | None]:
        interval = bootstrap(lambda i: macro_f1(predicted[i], label[i], classes), len(label), seed)
        return float(macro_f1(predicted, label, classes)), interval

    plain = scores.argmax(1)
    found: dict[str, Any] = {"floor": floor(label)}
    found["accuracy"], found["accuracy_interval"] = accuracy(plain, label)
    found["f1"], found["f1_interval"] = f1(plain)
    area = float(auc(scores, label))
    if np.isfinite(area):
        found["auc"] = area
        found["auc_interval"] = bootstrap(lambda i: auc(scores[i], label[i]), len(label), seed)
    if calibrate:
        shifted = batch_calibrated(scores).argmax(1)
        found["calibration"] = "batch"
        found["calibrated_accuracy"], found["calibrated_accuracy_interval"] = accuracy(shifted, label)
        found["calibrated_f1"], found["calibrated_f1_interval"] = f1(shifted)
    return found
