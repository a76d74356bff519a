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

Laws: (1) is between the least and the largest score of the last row; where no stage changes the score of an earlier
(later) task, (2) and (5) are 0 (3 is 0); (5) is at least -(2), as no score is above the best one.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def transfer_of(R: Sequence[Sequence[float]], base: Sequence[float]) -> dict[str, Any]:  # noqa: N803
    """Computes equations 1 to 5; None where a score is not finite or there are too few tasks.

    Args:
        R: ``(T, T)`` scores, a row for each stage.
        base: ``(T,)`` scores of the base.

    Returns:
        ``average_accuracy``, ``backward_transfer`` (negative is forgetting), ``forward_transfer``, ``forgetting``, and
        ``forgetting_of_each`` task but the last, ``(T - 1,)``: negative where it is better at the end than it ever was.

    >>> found = transfer_of([[0.8, 0.1], [0.6, 0.9]], [0.0, 0.05])
    >>> [round(found[key], 3) for key in ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")]
    [0.75, -0.2, 0.05, 0.2]
    """
    last = len(R) - 1
    each = [float(np.max([row[j] for row in R[:-1]])) - R[-1][j] for j in range(last)]  # NaN stays
    return {
        "average_accuracy": _mean(R[-1]),
        "backward_transfer": _mean([R[-1][i] - R[i][i] for i in range(last)]),
        "forward_transfer": _mean([R[i - 1][i] - base[i] for i in range(1, len(R))]),
        "forgetting": _mean(each),
        "forgetting_of_each": each,
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else None
