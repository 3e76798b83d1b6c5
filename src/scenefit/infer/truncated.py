"""Normal densities cut off at lower bounds, with half-Cauchy priors: exact draws, and the integral."""

from __future__ import annotations

import equinox as eqx
import numpy as np
from arviz_stats.base.array import array_stats
from scipy.special import log_ndtr, logsumexp, ndtri_exp
from tqdm.auto import tqdm

from scenefit.arrays.progress import DELAY_SECONDS

MAX_BOUNCES = 10_000
"""Bounces off walls of a trajectory at most; a few are usual."""
QUARTER_TURN = 0.5 * np.pi
"""Length of a trajectory: without walls its end doesn't depend on its beginning."""
MAX_BRIDGES, BRIDGE_TOLERANCE = 1000, 1e-9
"""Iterations of bridge sampling at most, and the relative change of the integral at which they end."""


class TruncatedDensity(eqx.Module):
    """`exp(constant - x.P.x / 2 + h.x) prod_i HalfCauchy(x_i | scale_i)` for x >= low, 0 elsewhere.

    Attributes
    ----------
    precision : array, shape (n, n)
        P, positive definite for what has no half-Cauchy prior.
    shift : array, shape (n,)
        h.
    low : array, shape (n,)
        Lower bounds, -inf for none.
    cauchy_scale : array, shape (n,)
        Of the half-Cauchy priors, inf for none; where there is one, `low` is 0.
    constant : float
    """

    precision: np.ndarray
    shift: np.ndarray
    low: np.ndarray
    cauchy_scale: np.ndarray
    constant: float

    def log_density(self, values: np.ndarray) -> np.ndarray:
        """Return the logarithm of the density within the bounds, at points of shape (..., n)."""
        quadratic = np.einsum("...i,ij,...j->...", values, self.precision, values)
        known = np.isfinite(self.cauchy_scale)
        scale = self.cauchy_scale[known]
        priors = np.log(2 / (np.pi * scale)) - np.log1p((values[..., known] / scale) ** 2)
        return self.constant - 0.5 * quadratic + values @ self.shift + priors.sum(axis=-1)

    def split(self) -> tuple[TruncatedDensity, Unbounded]:
        """Return the density of `x - low` of what is bounded, all else integrated over, and what leads back."""
        bounded = np.isfinite(self.low)
        low = self.low[bounded]
        inner, cross, outer = (self.precision[rows][:, columns] for rows, columns in _blocks(bounded))
        root = _scaled_cholesky(outer)
        slope, mean = _solve(root, cross.T), _solve(root, self.shift[~bounded])
        precision = inner - cross @ slope
        shift = self.shift[bounded] - cross @ mean
        constant = (
            self.constant
            + 0.5 * self.shift[~bounded] @ mean
            - np.log(np.diag(root)).sum()
            + 0.5 * len(mean) * np.log(2 * np.pi)
            + shift @ low
            - 0.5 * low @ precision @ low
        )
        rest = TruncatedDensity(
            0.5 * (precision + precision.T),
            shift - precision @ low,
            np.zeros(len(low)),
            self.cauchy_scale[bounded],
            float(constant),
        )
        return rest, Unbounded(bounded, low, slope, mean, root)


class Unbounded(eqx.Module):
    """What isn't bounded, given what is: normal with mean `mean - slope x` and precision `root root^T`."""

    bounded: np.ndarray
    low: np.ndarray
    slope: np.ndarray
    mean: np.ndarray
    root: np.ndarray

    def join(self, above: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return points, shape (..., n), from the distances of the bounded values above their bounds; draws of all others."""
        values = np.empty((*above.shape[:-1], len(self.bounded)))
        values[..., self.bounded] = above + self.low
        noise = rng.normal(size=(*above.shape[:-1], len(self.mean)))
        scatter = noise @ np.linalg.inv(self.root)
        values[..., ~self.bounded] = self.mean - values[..., self.bounded] @ self.slope.T + scatter
        return values


def draw(
    density: TruncatedDensity,
    rng: np.random.Generator,
    num_chains: int,
    num_draws: int,
    *,
    num_warmup: int = 150,
    num_sweeps: int = 4,
    progress: bool = False,
) -> tuple[np.ndarray, bool]:
    """Run chains whose stationary density is a `TruncatedDensity`.

    A half-Cauchy prior is a normal one whose precision, in units of the scale, is a chi-square variable of one degree of freedom;
    given x, that precision is an exponential variable. A sweep draws precisions, then moves x by exact Hamiltonian dynamics in
    the normal density, which bounce off the walls x = low. There are `num_sweeps` from one draw to the next.

    Returns
    -------
    draws : array, shape (chain, draw, n)
    is_complete : bool
        Whether all were drawn before an interruption.

    References
    ----------
    Pakman & Paninski 2014, J. Comput. Graph. Stat. 23, 518, doi:10.1080/10618600.2013.788448; Makalic & Schmidt 2016, IEEE Signal
    Process. Lett. 23, 179, doi:10.1109/LSP.2015.2503725.
    """
    rest, unbounded = density.split()
    size = len(rest.low)
    draws, done = np.empty((num_chains, num_draws, size)), 0
    if not size:
        return unbounded.join(draws, rng), True
    unit = 1 / np.sqrt(np.diag(_with_priors(rest, np.ones((1, size)))[0]))
    scaled = TruncatedDensity(
        rest.precision * unit[:, None] * unit, rest.shift * unit, rest.low, rest.cauchy_scale / unit, 0.0
    )
    sweep = _sweeper(scaled, rng, num_chains)
    position = np.abs(rng.normal(size=(num_chains, size)))
    total = num_warmup + num_sweeps * num_draws
    with tqdm(total=total, desc="linear", disable=not progress, delay=DELAY_SECONDS, leave=False) as bar:
        try:
            for number in range(1 - num_warmup, num_sweeps * num_draws + 1):
                position = sweep(position)
                if number > 0 and number % num_sweeps == 0:
                    draws[:, done] = position * unit
                    done += 1
                bar.update()
        except KeyboardInterrupt:
            if not done:
                raise
    return unbounded.join(draws[:, :done], rng), done == num_draws


def log_evidence(density: TruncatedDensity, draws: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Return the logarithm of the integral of a density, and its standard error, by bridge sampling.

    The bridge leads from the draws to others of a known density: normal, with the mean precisions of the half-Cauchy priors, cut
    off at the bounds one coordinate after the other.

    Parameters
    ----------
    density : TruncatedDensity
    draws : array, shape (chain, draw, n)
        From it.

    References
    ----------
    Meng & Wong 1996, Statistica Sinica 6, 831; Fruehwirth-Schnatter 2004, Econometrics J. 7, 143,
    doi:10.1111/j.1368-423X.2004.00125.x; Genz 1992, J. Comput. Graph. Stat. 1, 141, doi:10.1080/10618600.1992.10477010.
    """
    rest, unbounded = density.split()
    if not len(rest.low):
        return rest.constant, 0.0
    above = np.maximum(draws[..., unbounded.bounded] - unbounded.low, 0.0)
    # The draws that make the proposal aren't those that are compared with it.
    half = above.shape[1] // 2
    proposal = _Sequential.build(rest, above[:, :half])
    compared = above[:, half:]
    own, log_proposal = proposal.draw(rng, compared.shape[0] * compared.shape[1])
    first = rest.log_density(compared) - proposal.log_density(compared)
    return _bridge(first, rest.log_density(own) - log_proposal)


def _bridge(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return log-integral and standard error from log-ratios, at draws (chain, draw) of the density and of the proposal."""
    count = len(second)
    size = _effective_size(first)
    log_share, log_other = np.log(size / (size + count)), np.log(count / (size + count))
    level = np.median(first)
    first, second = first - level, second - level
    value = 0.0
    for _ in range(MAX_BRIDGES):
        upper = second - np.logaddexp(log_share + second, log_other + value)
        lower = -np.logaddexp(log_share + first, log_other + value)
        new = logsumexp(upper) - np.log(count) - (logsumexp(lower) - np.log(first.size))
        if abs(new - value) < BRIDGE_TOLERANCE:
            break
        value = new
    upper, lower = (np.exp(each - logsumexp(each)) * each.size for each in (upper, lower))
    return float(value + level), float(np.sqrt(upper.var() / count + lower.var() / _effective_size(lower)))


def _effective_size(values: np.ndarray) -> float:
    """Return how many independent draws give as good a mean as those of chains (chain, draw)."""
    return min(float(np.asarray(array_stats.ess(values, method="mean"))), float(values.size))


class _Sequential(eqx.Module):
    """A normal density cut off at 0, drawn one coordinate after the other: not the truncated normal, but near it, and known."""

    order: np.ndarray
    mean: np.ndarray
    root: np.ndarray

    @classmethod
    def build(cls, density: TruncatedDensity, draws: np.ndarray) -> _Sequential:
        """Build from a density and draws of it."""
        ratio = draws.reshape(-1, draws.shape[-1]) / density.cauchy_scale
        precision = _with_priors(density, np.mean(2 / (1 + ratio**2), axis=0)[None])[0]
        covariance = np.linalg.inv(precision)
        mean = covariance @ density.shift
        # What is cut off most goes first: the others then know of it.
        order = np.argsort(mean / np.sqrt(np.diag(covariance)))
        return cls(order, mean[order], np.linalg.cholesky(covariance[order][:, order]))

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return draws, shape (count, n), and their log-densities."""
        noise, result = np.zeros((count, len(self.mean))), np.empty((count, len(self.mean)))
        for n, row in enumerate(self.root):
            wall = -(self.mean[n] + noise @ row) / row[n]
            noise[:, n] = -ndtri_exp(np.log1p(-rng.random(count)) + log_ndtr(-wall))
        result[:, self.order] = np.maximum(self.mean + noise @ self.root.T, 0.0)
        return result, self.log_density(result)

    def log_density(self, values: np.ndarray) -> np.ndarray:
        """Return the log-density at points of shape (..., n)."""
        centered = values[..., self.order] - self.mean
        noise = centered @ np.linalg.inv(self.root).T
        diagonal = np.diag(self.root)
        walls = noise - values[..., self.order] / diagonal
        each = -0.5 * noise**2 - 0.5 * np.log(2 * np.pi) - np.log(diagonal) - log_ndtr(-walls)
        return each.sum(axis=-1)


def _sweeper(density: TruncatedDensity, rng: np.random.Generator, num_chains: int):
    """Return the function that moves positions, shape (chain, n), by a sweep."""
    size = len(density.low)

    def normals(weights):
        """Return means, covariances and their roots, given the precisions of the half-Cauchy priors in units of the scales."""
        covariance = np.linalg.inv(_with_priors(density, weights))
        covariance = 0.5 * (covariance + covariance.swapaxes(1, 2))
        return covariance @ density.shift, covariance, np.linalg.cholesky(covariance)

    has_priors = np.isfinite(density.cauchy_scale).any()
    fixed = None if has_priors else normals(np.zeros((num_chains, size)))

    def sweep(position):
        parts = fixed
        if parts is None:
            weights = rng.exponential(size=position.shape) * 2 / (1 + (position / density.cauchy_scale) ** 2)
            parts = normals(weights)
        mean, covariance, root = parts
        velocity = np.einsum("cij,cj->ci", root, rng.normal(size=position.shape))
        return _trajectory(position, velocity, mean, covariance)

    return sweep


def _trajectory(position, velocity, mean, covariance) -> np.ndarray:
    """Return where points (chain, n) are after a quarter turn in normal densities, walls at 0 reflecting them."""
    position, velocity = position.copy(), velocity.copy()
    variance = np.einsum("cii->ci", covariance)
    left, moving = np.full(len(position), QUARTER_TURN), np.arange(len(position))
    for _ in range(MAX_BOUNCES):
        offset, speed = position[moving] - mean[moving], velocity[moving]
        # Coordinate i is mean + amplitude cos(time - phase), and reaches 0 from above once a turn, if at all.
        amplitude, phase = np.hypot(speed, offset), np.arctan2(speed, offset)
        level = -mean[moving] / np.maximum(amplitude, 1e-300)
        times = (phase + np.arccos(np.clip(level, -1, 1))) % (2 * np.pi)
        times = np.where(np.abs(level) < 1, times, np.inf)
        wall, rows = np.argmin(times, axis=1), np.arange(len(moving))
        is_hit = times[rows, wall] < left[moving]
        time = np.minimum(times[rows, wall], left[moving])
        cos, sin = np.cos(time)[:, None], np.sin(time)[:, None]
        position[moving] = np.maximum(mean[moving] + speed * sin + offset * cos, 0.0)
        speed = speed * cos - offset * sin
        kick = np.where(is_hit, 2 * speed[rows, wall] / variance[moving, wall], 0.0)
        velocity[moving] = speed - kick[:, None] * covariance[moving, :, wall]
        position[moving[is_hit], wall[is_hit]] = 0.0
        left[moving] -= time
        moving = moving[is_hit]
        if not len(moving):
            return position
    raise RuntimeError(
        f"A trajectory bounced more than {MAX_BOUNCES} times: the density is too narrow between its bounds."
    )


def _with_priors(density: TruncatedDensity, weights: np.ndarray) -> np.ndarray:
    """Return precisions, shape (k, n, n), with half-Cauchy priors of given precisions (k, n) in units of their scales."""
    result = np.repeat(density.precision[None], len(weights), axis=0)
    place = np.arange(len(density.low))
    result[:, place, place] += weights / density.cauchy_scale**2
    return result


def _blocks(bounded):
    """Return the rows and columns of the blocks bounded-bounded, bounded-free and free-free."""
    return (bounded, bounded), (bounded, ~bounded), (~bounded, ~bounded)


def _scaled_cholesky(matrix: np.ndarray) -> np.ndarray:
    """Return the lower Cholesky factor, computed at unit diagonal."""
    scale = np.sqrt(np.diag(matrix))
    return np.linalg.cholesky(matrix / scale[:, None] / scale) * scale[:, None]


def _solve(root: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return `(root root^T)^-1 right`."""
    return np.linalg.solve(root.T, np.linalg.solve(root, right))
