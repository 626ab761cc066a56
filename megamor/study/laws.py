"""Is a recursion worth a layer? The iso-depth scaling law of arXiv 2604.21106, fitted to the runs of a study.

    L = E + A · (N_once + r^phi · N_rec)^-alpha + B · D^-beta

N_once and N_rec are the parameters outside and inside the shared core (no embedding), r the recursions (for routed
models the realised mean depth) and D the training tokens. phi = 1 would make a recursion as good as a layer of its own,
phi = 0 worth nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamor.config import Config, config_from_dict
from megamor.config.derive import layer_parameters, recursion_parameters
from megamor.config.segments import segments

Array = NDArray[np.float64]
LEVEL = 0.9
_ROUNDS = 200
_STARTS = [(phi, alpha, beta) for phi in (0.2, 0.8) for alpha in (0.2, 0.5) for beta in (0.2, 0.5)]
PHI_BOUNDS = (-1.0, 2.0)
_BOUNDS = [PHI_BOUNDS, (0.05, 1.5), (0.05, 1.5)]


@dataclass(frozen=True)
class Points:
    """Runs [n] of a fit."""

    once: Array
    shared: Array
    recursions: Array
    tokens: Array
    loss: Array

    def __getitem__(self, chosen: NDArray[np.intp]) -> Points:
        return Points(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Law:
    """The fitted constants, and the root mean squared residual in nats."""

    phi: float
    alpha: float
    beta: float
    floor: float
    a: float
    b: float
    residual: float


def fit(points: Points, starts: Sequence[tuple[float, ...]] = _STARTS) -> Law:
    """Least squares by variable projection: given phi, alpha and beta, the law is linear in E, A and B, all >= 0."""
    from scipy.optimize import minimize, nnls

    def linear(exponents: Array) -> tuple[Array, float]:
        phi, alpha, beta = exponents
        size = points.once + points.recursions**phi * points.shared
        columns = [np.ones_like(size), (size / 1e6) ** -alpha, (points.tokens / 1e6) ** -beta]
        constants, residual = nnls(np.stack(columns, 1), points.loss)
        return constants, float(residual)

    found = [
        minimize(lambda x: linear(x)[1] ** 2, start, method="Nelder-Mead", bounds=_BOUNDS, options={"maxiter": 2000})
        for start in starts
    ]
    best = min(found, key=lambda result: result.fun)
    (floor, a, b), residual = linear(best.x)
    phi, alpha, beta = best.x
    scale = (a * 1e6**alpha, b * 1e6**beta)
    return Law(phi, alpha, beta, floor, *scale, residual / len(points.loss) ** 0.5)


def interval(points: Points, law: Law, rounds: int = _ROUNDS, seed: int = 0) -> tuple[float, float]:
    """Bounds of phi's 90 % interval: percentiles over fits to runs drawn with replacement."""
    generator = np.random.default_rng(seed)
    n, loops = len(points.loss), np.abs(points.recursions - 1) > 1e-3
    if loops.all() or not loops.any():
        return _BOUNDS[0]  # the runs say nothing about phi
    found: list[float] = []
    while len(found) < rounds:
        chosen = generator.integers(n, size=n)
        if len(np.unique(loops[chosen])) == 2:  # both kinds, or phi means nothing
            found.append(fit(points[chosen], [(law.phi, law.alpha, law.beta)]).phi)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def split_parameters(config: Config) -> tuple[int, int]:
    """Parameters outside and inside shared cores, without embedding and routers: what each recursion has of its own
    (norms, low-rank updates) is outside."""
    blocks, once, shared = layer_parameters(config.model), config.model.dim, 0  # the final norm
    for segment in segments(config):
        once += segment.num_blocks * (recursion_parameters(segment.config) if segment.schedule else blocks)
        shared += segment.num_blocks * blocks if segment.schedule else 0
    return once, shared


def points_of(runs: Sequence[Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]]) -> Points:
    """The runs of a result file; `configs` are the arms' by name."""
    rows = []
    for run in runs:
        config = config_from_dict(configs[run["arm"]])
        once, shared = split_parameters(config)
        # A fixed loop's depth counts recursions of the stage, and a vanilla model has none.
        depth = run["mean_depth"] if shared else 1.0
        rows.append((once, shared, depth, run["tokens"], run["loss"]))
    return Points(*np.array(rows, dtype=np.float64).T)


def fit_families(law: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """phi of each family of arms, together with the baseline: `law` has `baseline` and `families`, name endings."""
    configs = {arm["name"]: arm["config"] for arm in results["arms"]}
    fits = {}
    for family in law["families"]:
        endings = (law["baseline"], family)
        runs = [run for run in results["runs"] if run["arm"].endswith(tuple(f"_{name}" for name in endings))]
        points = points_of(runs, configs)
        found = fit(points)
        low, high = interval(points, found)
        fits[family] = {**found.__dict__, "low": low, "high": high, "level": LEVEL, "runs": len(runs)}
    return fits
