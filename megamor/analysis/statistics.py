"""Statistics of depths with intervals by bootstrap over documents.

Tokens of one document resemble each other, so it is documents that are drawn with replacement, all tokens of a document
together. Everything here follows from tables that count the tokens of each document by (value, depth). A resample is
then a weighted sum of tables, and ranks are computed anew in each. Values that are continuous are grouped into
`GROUPS` groups of equal size, which changes a rank correlation by less than one part in ten thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
GROUPS = 256
Array = NDArray[Any]


@dataclass(frozen=True)
class Bootstrap:
    """`weights` [R, U]: how often each of the U units (documents) is in each of R resamples."""

    weights: Array

    @classmethod
    def of(cls, units: int, resamples: int = 1000, seed: int = 0) -> Bootstrap:
        """Draw the resamples."""
        generator = np.random.default_rng(seed)
        return cls(generator.multinomial(units, np.full(units, 1 / units), resamples).astype(np.float64))

    def tables(self, unit: Array, row: Array, column: Array, size: tuple[int, int] | None = None) -> Array:
        """Counts [1 + R, rows, columns] of tokens by `row` and `column` [n]: of the data, then of each resample."""
        from scipy.sparse import csr_array

        shape = size or (int(row.max(initial=0)) + 1, int(column.max(initial=0)) + 1)
        cells = np.ravel_multi_index((row, column), shape)
        counts = csr_array((np.ones(len(cells)), (unit, cells)), (self.weights.shape[1], shape[0] * shape[1]))
        weights = np.vstack((np.ones(self.weights.shape[1]), self.weights))
        return np.asarray((counts.T @ weights.T).T).reshape(-1, *shape)


def interval(values: Array) -> dict[str, float | None]:
    """`value`, `low`, `high` of a statistic [1 + R] of the data and of the resamples; None where it isn't defined."""
    found = values[np.isfinite(values)]
    if not np.isfinite(values[0]):
        return dict.fromkeys(("value", "low", "high"))
    tails = (1 - LEVEL) / 2
    low, high = np.quantile(found[1:] if len(found) > 1 else found, (tails, 1 - tails))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def grouped(values: Array, groups: int = GROUPS) -> Array:
    """Number of the group of each of `values` [n], in their order. Equal values are in one group."""
    distinct, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(distinct) <= groups:
        return np.asarray(index)
    middle = np.cumsum(counts) - counts / 2
    # Some groups are empty where one value fills several.
    return np.asarray(np.unique((middle * groups / len(values)).astype(np.int64), return_inverse=True)[1][index])


def spearman(tables: Array) -> Array:
    """Rank correlation [...] of rows and columns in tables [..., rows, columns]; NaN where either is constant."""
    centred = []
    for axis in (-1, -2):
        margin = tables.sum(axis)
        ranks = np.cumsum(margin, -1) - margin / 2 - margin.sum(-1, keepdims=True) / 2
        centred.append((ranks, np.square(ranks) * margin))
    (rows, row_squares), (columns, column_squares) = centred
    product = ((tables @ columns[..., None])[..., 0] * rows).sum(-1)
    return ratio(product, np.sqrt(row_squares.sum(-1) * column_squares.sum(-1)))


def row_means(tables: Array) -> Array:
    """Mean column (depth) of each row [..., rows]; NaN for an empty one."""
    return ratio(tables @ np.arange(tables.shape[-1]), tables.sum(-1))


def ratio(a: Array, b: Array) -> Array:
    """a / b, NaN where b isn't positive."""
    return np.asarray(np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0))


def agreement(bootstrap: Bootstrap, unit: Array, a: Array, b: Array) -> dict[str, Any]:
    """How far depths `a` and `b` [n] of the same tokens agree, also beyond what their distributions give by chance.

    `kappa` is Cohen's (1960): (agreement - chance) / (1 - chance), not defined where both are one constant.
    """
    size = int(max(a.max(), b.max())) + 1
    tables = bootstrap.tables(unit, a, b, (size, size))
    total = tables.sum((1, 2))
    equal = np.trace(tables, axis1=1, axis2=2) / total
    chance = (tables.sum(1) * tables.sum(2)).sum(-1) / total**2
    kappa = ratio(equal - chance, 1 - chance)
    figures = {"agreement": equal, "chance": chance, "kappa": kappa, "spearman": spearman(tables)}
    return {name: interval(values) for name, values in figures.items()}
