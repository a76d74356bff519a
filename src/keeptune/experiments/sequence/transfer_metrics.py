r"""What the continual-learning literature measures of a sequence of tasks.

R is the matrix of scores, ``R[i][j]`` on task j after the stages 1 to i; higher is better, T tasks and T stages.

    ACC   = 1/T sum_{i=1..T} R_{T,i}                                    (1)   GEM, eq. 2
    BWT   = 1/(T-1) sum_{i=1..T-1} (R_{T,i} - R_{i,i})                  (2)   GEM, eq. 3
    FWT   = 1/(T-1) sum_{i=2..T} (R_{i-1,i} - b_i)                      (3)   GEM, eq. 4
    f_j^k = max_{l in 1..k-1} R_{l,j} - R_{k,j},  j < k                 (4)   Chaudhry et al., eq. 3
    F_k   = 1/(k-1) sum_{j=1..k-1} f_j^k                                (5)   ibid.

GEM: "Gradient Episodic Memory for Continual Learning", David Lopez-Paz, Marc'Aurelio Ranzato, NIPS 2017. Chaudhry et
al.: "Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence", Arslan Chaudhry, Puneet K.
Dokania, Thalaiyasingam Ajanthan, Philip H. S. Torr, ECCV 2018.

Departure: b in (3) is the score of the pre-trained base, not that of random weights as in GEM: a base may know some of
a task before any stage, and forward transfer is to be what the stages add to that.

Every function takes R as ``(T, T)`` scores, a row for each stage; it returns None where a score is not finite or there
are too few tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Matrix = Sequence[Sequence[float]]


def average_accuracy(R: Matrix) -> float | None:  # noqa: N803
    """Averages the scores of all tasks at the end (1); between the least and the largest score of the last row.

    >>> average_accuracy([[0.8, 0.1], [0.6, 0.9]])
    0.75
    """
    return _mean(R[-1]) if R else None


def backward_transfer(R: Matrix) -> float | None:  # noqa: N803
    """Computes how later stages changed the score of each task after its own stage (2); negative is forgetting.

    Law: 0 where no stage changes the score of an earlier task.

    >>> round(backward_transfer([[0.8, 0.1], [0.6, 0.9]]), 3)
    -0.2
    """
    return _mean([R[-1][i] - R[i][i] for i in range(len(R) - 1)])


def forward_transfer(R: Matrix, base: Sequence[float]) -> float | None:  # noqa: N803
    """Computes what earlier stages gave to a task before its own stage (3); ``base`` is the base's ``(T,)`` scores.

    Law: 0 where no stage changes the score of a later task.

    >>> round(forward_transfer([[0.8, 0.1], [0.6, 0.9]], [0.0, 0.05]), 3)
    0.05
    """
    return _mean([R[i - 1][i] - base[i] for i in range(1, len(R))])


def forgetting_of_each(R: Matrix) -> list[float]:  # noqa: N803
    """Computes how far the last score of each task but the last is below its best before (4), with k = T; ``(T - 1,)``.

    Negative where a task is better at the end than it ever was.

    >>> [round(f, 3) for f in forgetting_of_each([[0.8, 0.1, 0], [0.9, 0.7, 0], [0.6, 0.75, 1]])]
    [0.3, -0.05]
    """
    return [float(np.max([row[j] for row in R[:-1]])) - R[-1][j] for j in range(len(R) - 1)]  # NaN stays


def forgetting(R: Matrix) -> float | None:  # noqa: N803
    """Averages what was forgotten of each task (5), with k = T; at least -BWT, as no score is above the best one.

    >>> round(forgetting([[0.8, 0.1, 0], [0.9, 0.7, 0], [0.6, 0.75, 1]]), 3)
    0.125
    """
    return _mean(forgetting_of_each(R))


def _mean(values: Sequence[float]) -> float | None:
    if not values or not all(map(math.isfinite, values)):
        return None
    return math.fsum(values) / len(values)
