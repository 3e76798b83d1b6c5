"""Diagnostics: whether draws stand for the posterior."""

from __future__ import annotations

import enum

import equinox as eqx
import numpy as np
from arviz_stats.base.array import array_stats

MAX_R_HAT, MIN_ESS, MAX_PARETO_K = 1.01, 400.0, 0.7
"""Chains have converged below the first and with at least the second (Vehtari et al. 2021, Bayesian Analysis 16, 667,
doi:10.1214/20-BA1221); an approximation is good below the third (Vehtari et al. 2024, JMLR 25, 72)."""
MAX_DIVERGENT = 0.01
"""Fraction of transitions that may diverge."""

TAIL_QUANTILES = (0.05, 0.95)
"""The effective sample size of the tails is that of these quantiles."""


class PosteriorStatus(enum.Enum):
    """Whether draws can be trusted."""

    GOOD = "good"
    NOT_MIXED = "chains haven't mixed: R-hat or the effective sample size is bad"
    DIVERGENT = "transitions diverged: parts of the posterior are out of reach"
    POOR_APPROXIMATION = "the approximation misses the posterior: Pareto k is too large"
    INTERRUPTED = "interrupted"


class Diagnostics(eqx.Module):
    """What the draws of a posterior say about themselves.

    Attributes
    ----------
    r_hat, ess : dict of array
        By path, of the parameter's shape: rank-normalised split R-hat, and effective sample size (the smaller one of bulk and
        tail). Empty for independent draws of an approximation.
    pareto_k : float
        Shape of the tail of the importance ratios of an approximation; NaN for chains of the posterior itself.
    divergent : float
        Fraction of divergent transitions; NaN for what has none.
    """

    r_hat: dict[str, np.ndarray]
    ess: dict[str, np.ndarray]
    pareto_k: float
    divergent: float

    def judge(self) -> tuple[PosteriorStatus, str]:
        """Return the status, and a sentence with the worst figure."""
        status, parts = PosteriorStatus.GOOD, []
        if self.r_hat:
            worst, r_hat = _extreme(self.r_hat, np.nanmax)
            least, ess = _extreme(self.ess, np.nanmin)
            parts += [
                f"R-hat up to {r_hat:.4f} ({worst}; good up to {MAX_R_HAT})",
                f"effective sample size from {ess:.0f} ({least}; good from {MIN_ESS:.0f})",
            ]
            if not (r_hat <= MAX_R_HAT and ess >= MIN_ESS):
                status = PosteriorStatus.NOT_MIXED
        if not np.isnan(self.divergent):
            parts.append(f"{100 * self.divergent:.2g} % divergent")
            if status is PosteriorStatus.GOOD and self.divergent > MAX_DIVERGENT:
                status = PosteriorStatus.DIVERGENT
        if not np.isnan(self.pareto_k):
            parts.append(f"Pareto k {self.pareto_k:.2f} (good up to {MAX_PARETO_K})")
            if status is PosteriorStatus.GOOD and self.pareto_k > MAX_PARETO_K:
                status = PosteriorStatus.POOR_APPROXIMATION
        return status, ", ".join(parts)


def of_chains(draws: dict[str, np.ndarray], divergent: float) -> Diagnostics:
    """Return the diagnostics of chains; draws by path, shape (chain, draw, ...)."""
    r_hat, ess = {}, {}
    for path, values in draws.items():
        moved = np.moveaxis(values, (0, 1), (-2, -1))
        # A single chain is compared with itself, in halves; values that never move say nothing.
        constant = np.ptp(moved.reshape(*moved.shape[:-2], -1), axis=-1) == 0
        noise = np.where(constant[..., None, None], np.random.default_rng(0).normal(size=moved.shape), moved)
        # Chains that never move, each at a place of its own, have an infinite R-hat.
        with np.errstate(divide="ignore", invalid="ignore"):
            r_hat[path] = np.where(constant, np.nan, array_stats.rhat(noise))
            bulk = array_stats.ess(noise, method="bulk")
            tail = array_stats.ess(noise, method="tail", prob=TAIL_QUANTILES)
        ess[path] = np.where(constant, np.nan, np.minimum(bulk, tail))
    return Diagnostics(r_hat, ess, float("nan"), divergent)


def of_approximation(log_density: np.ndarray, log_proposal: np.ndarray) -> Diagnostics:
    """Return the diagnostics of independent draws, whose log-densities under posterior and approximation are given."""
    ratio = np.asarray(log_density - log_proposal, dtype=float).ravel()
    finite = np.where(np.isfinite(ratio), ratio, np.nanmin(np.where(np.isfinite(ratio), ratio, np.nan)) - 50)
    # It takes the logarithms of the inverse ratios.
    _, pareto_k = array_stats.psislw(-finite)
    return Diagnostics({}, {}, float(pareto_k), float("nan"))


def _extreme(values: dict[str, np.ndarray], choose) -> tuple[str, float]:
    """Return the path and value of the worst entry."""
    found = {path: float(choose(array)) for path, array in values.items() if np.isfinite(array).any()}
    if not found:
        return "nothing", float("nan")
    worst = float(choose(list(found.values())))
    return next(path for path, value in found.items() if value == worst), worst
