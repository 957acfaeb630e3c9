"""Sums of X^T X, which covariances and regressions are made of."""

import math

from torch import Tensor


def add_gram(total: Tensor, X: Tensor) -> None:
    """total [k, k] += X^T X for X [n, k], on and above the diagonal only, as it is symmetric.

    Products are of the type of X. What reads the total has to read its upper triangle.
    """
    k = X.shape[-1]
    step = math.ceil(k / 4)
    for start in range(0, k, step):
        rows, left = slice(start, start + step), X[:, start : start + step].T
        if total.dtype == X.dtype:
            total[rows, start:].addmm_(left, X[:, start:])
        else:
            total[rows, start:] += left @ X[:, start:]
