"""Noise that is independent from pixel to pixel: Gaussian, with wide wings, with a floor, of counts."""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import lax
from jaxtyping import Array
from numpyro.distributions import constraints

from scenefit.data.abstractnoise import AbstractGaussianNoise, AbstractNoise
from scenefit.data.nuisances import SCALE, Nuisance
from scenefit.data.weights import (
    as_positive,
    as_weights,
    gaussian_log_normalization,
    level_of,
    restricted_weights,
    scaled_weights,
    sigma_of,
    spread_of_scale,
)


class WhiteNoise(AbstractGaussianNoise):
    """Independent Gaussian noise, `log L = -1/2 sum_j [w_j r_j^2 - log(w_j / 2 pi)]` over pixels with `w_j > 0`.

    Parameters
    ----------
    weights : array, shape (channel, y, x)
        Inverse variances; 0 means no information.
    scale : float or array, shape (channel,)
        By what the standard deviations that follow from the weights are multiplied; can be fitted.

    Raises
    ------
    ValueError
        If a weight is negative, NaN or infinite, or a scale isn't finite and positive.
    """

    weights: np.ndarray | Array
    scale: np.ndarray | Array
    host_only: ClassVar = ()
    parameters: ClassVar = {"scale": SCALE}

    def __init__(self, weights, scale: np.ndarray | Array | float = 1.0):
        self.weights = as_weights(weights)
        self.scale = as_positive(scale, len(self.weights), "WhiteNoise wants a positive scale")

    @property
    def valid(self) -> np.ndarray:  # noqa: D102
        return np.asarray(self.weights) > 0

    @property
    def modes(self) -> np.ndarray:  # noqa: D102
        return self.valid

    @property
    def reach(self) -> int:  # noqa: D102
        return 0

    def independent(self):  # noqa: D102
        return self, None

    def level(self) -> np.ndarray:  # noqa: D102
        return level_of(np.asarray(self.weights, float) / np.asarray(self.scale, float)[:, None, None] ** 2)

    def whiten(self, residual):  # noqa: D102
        # A root of zero has no derivative along the scale.
        has_weight = self.weights > 0
        root = jnp.where(has_weight, jnp.sqrt(jnp.where(has_weight, self.weights, 1.0)), 0.0)
        return root / self.scale[:, None, None] * residual

    @property
    def stiffness(self) -> float:  # noqa: D102
        return 1.0

    def log_normalization(self) -> float:  # noqa: D102
        return gaussian_log_normalization(
            np.asarray(self.weights, float) / np.asarray(self.scale, float)[:, None, None] ** 2
        )

    def log_spread(self):  # noqa: D102
        return spread_of_scale(self.weights, self.scale)

    def sample(self, key):  # noqa: D102
        sigma = sigma_of(self.weights) * self.scale[:, None, None]
        return sigma * jax.random.normal(key, sigma.shape, sigma.dtype)

    def scaled(self, unit):  # noqa: D102
        return WhiteNoise(scaled_weights(self.weights, unit), self.scale)

    def restricted(self, keep, window):  # noqa: D102
        return WhiteNoise(restricted_weights(self.weights, keep, window), self.scale)


class StudentTNoise(AbstractNoise):
    """Independent noise with wide wings, `p(r) ~ [1 + w r^2 / (nu - 2)]^(-(nu + 1) / 2)`: robust against outliers.

    A pixel's standard deviation is `1 / sqrt(w)`, wings included.

    Parameters
    ----------
    weights : array, shape (channel, y, x)
        Inverse variances; 0 means no information.
    degrees_of_freedom : float
        nu, above 2; the wings of 5 are wide, those of 30 nearly Gaussian.

    Raises
    ------
    ValueError
        If a weight is negative, NaN or infinite, or nu isn't above 2.
    """

    weights: np.ndarray | Array
    degrees_of_freedom: float = eqx.field(static=True)
    host_only: ClassVar = ()
    parameters: ClassVar = {}
    is_gaussian: ClassVar = False

    def __init__(self, weights, degrees_of_freedom: float = 5.0):
        if not 2 < degrees_of_freedom < np.inf:
            raise ValueError(
                f"StudentTNoise wants degrees_of_freedom above 2 (finite variance); got {degrees_of_freedom}."
            )
        self.weights, self.degrees_of_freedom = as_weights(weights), float(degrees_of_freedom)

    @property
    def valid(self) -> np.ndarray:  # noqa: D102
        return np.asarray(self.weights) > 0

    @property
    def modes(self) -> np.ndarray:  # noqa: D102
        return self.valid

    @property
    def reach(self) -> int:  # noqa: D102
        return 0

    def independent(self):  # noqa: D102
        return self, None

    def level(self) -> np.ndarray:  # noqa: D102
        return level_of(self.weights)

    def whiten(self, residual):  # noqa: D102
        return jnp.sqrt(self.weights) * residual

    def deviance_residual(self, residual):  # noqa: D102
        # The root of (nu + 1) log(1 + z^2 / (nu - 2)) is z times a smooth function of z^2.
        nu, z = self.degrees_of_freedom, self.whiten(residual)
        square = z**2 / (nu - 2)
        small = square < 1e-3
        safe = jnp.where(small, 1.0, square)
        ratio = jnp.where(small, 1 - square / 2 + square**2 / 3, jnp.log1p(safe) / safe)
        return z * jnp.sqrt((nu + 1) / (nu - 2) * ratio)

    def score_residual(self, residual):  # noqa: D102
        nu, z = self.degrees_of_freedom, self.whiten(residual)
        return z * jnp.sqrt((nu + 1) / (nu - 2 + lax.stop_gradient(z) ** 2))

    def fisher_residual(self, residual):  # noqa: D102
        nu = self.degrees_of_freedom
        return self.whiten(residual) * np.sqrt((nu + 1) / (nu + 3) * nu / (nu - 2))

    @property
    def stiffness(self) -> float:  # noqa: D102
        return float(np.sqrt((self.degrees_of_freedom + 1) / (self.degrees_of_freedom - 2)))

    def log_normalization(self) -> float:  # noqa: D102
        nu, gamma = self.degrees_of_freedom, scipy.special.gammaln
        peak = gamma((nu + 1) / 2) - gamma(nu / 2) - 0.5 * np.log((nu - 2) / 2)
        return gaussian_log_normalization(self.weights) + float(peak) * int(self.valid.sum())

    def log_spread(self):  # noqa: D102
        return jnp.zeros(())

    def sample(self, key):  # noqa: D102
        sigma, nu = sigma_of(self.weights), self.degrees_of_freedom
        return sigma * np.sqrt((nu - 2) / nu) * jax.random.t(key, nu, sigma.shape, sigma.dtype)

    def scaled(self, unit):  # noqa: D102
        return StudentTNoise(scaled_weights(self.weights, unit), self.degrees_of_freedom)

    def restricted(self, keep, window):  # noqa: D102
        return StudentTNoise(restricted_weights(self.weights, keep, window), self.degrees_of_freedom)


class FloorNoise(AbstractGaussianNoise):
    """Independent Gaussian noise of variance `1 / w + floor^2`, with a floor that can be fitted: errors that no weight knows.

    Parameters
    ----------
    weights : array, shape (channel, y, x)
        Inverse variances; 0 means no information.
    floor : float or array, shape (channel,)
        Additional standard deviation of every pixel, in data units; positive to be fitted.

    Raises
    ------
    ValueError
        If a weight is negative, NaN or infinite, or a floor isn't finite and positive.
    """

    weights: np.ndarray | Array
    floor: np.ndarray | Array
    host_only: ClassVar = ()
    parameters: ClassVar = {"floor": Nuisance(constraints.positive, "flux/pixel", True, True)}

    def __init__(self, weights, floor):
        self.weights = as_weights(weights)
        self.floor = as_positive(floor, len(self.weights), "FloorNoise wants a positive floor")

    @property
    def valid(self) -> np.ndarray:  # noqa: D102
        return np.asarray(self.weights) > 0

    def _total(self):
        """Return the inverse of the whole variance."""
        return self.weights / (1 + self.weights * self.floor[:, None, None] ** 2)

    @property
    def modes(self) -> np.ndarray:  # noqa: D102
        return self.valid

    @property
    def reach(self) -> int:  # noqa: D102
        return 0

    def independent(self):  # noqa: D102
        return self, None

    def level(self) -> np.ndarray:  # noqa: D102
        return level_of(np.asarray(self._total()))

    def whiten(self, residual):  # noqa: D102
        # A root of zero has no derivative along the floor.
        has_weight = self.weights > 0
        return jnp.where(has_weight, jnp.sqrt(jnp.where(has_weight, self._total(), 1.0)) * residual, 0.0)

    @property
    def stiffness(self) -> float:  # noqa: D102
        return 1.0

    def log_normalization(self) -> float:  # noqa: D102
        return gaussian_log_normalization(np.asarray(self._total(), dtype=float))

    def log_spread(self):  # noqa: D102
        return 0.5 * jnp.log1p(jnp.asarray(self.weights) * jnp.asarray(self.floor)[:, None, None] ** 2)

    def sample(self, key):  # noqa: D102
        sigma = sigma_of(np.asarray(self._total()))
        return sigma * jax.random.normal(key, sigma.shape, sigma.dtype)

    def scaled(self, unit):  # noqa: D102
        return FloorNoise(scaled_weights(self.weights, unit), np.asarray(self.floor, float) / np.asarray(unit, float))

    def restricted(self, keep, window):  # noqa: D102
        return FloorNoise(restricted_weights(self.weights, keep, window), self.floor)


class PoissonNoise(AbstractNoise):
    """Counting statistics, `log L = sum_j [N_j log m_j - m_j - log N_j!]` (Cash 1979, ApJ 228, 939, doi:10.1086/156922).

    The model must include all that was counted: give the sky as `background=`. Where the model has less than
    `SMALLEST_COUNTS`, the likelihood goes on as its tangent; in pixels without a count it stays the same.

    Parameters
    ----------
    counts : array, shape (channel, y, x)
        Events per pixel: the data in counts; less than `SMALLEST_COUNTS` is none. NaN means no information.
    gain : float or array, shape (channel,)
        Counts per data unit.

    Raises
    ------
    ValueError
        If counts are negative or infinite, or the gain isn't positive.
    """

    counts: np.ndarray | Array
    gain: np.ndarray | Array
    host_only: ClassVar = ()
    parameters: ClassVar = {}
    is_gaussian: ClassVar = False

    def __init__(self, counts, gain: Any = 1.0):
        if not isinstance(counts, jax.Array):
            counts = np.asarray(counts, dtype=float)
            counts = counts[None] if counts.ndim == 2 else counts
            bad = np.isinf(counts) | (counts < 0)
            if counts.ndim != 3 or bad.any():
                raise ValueError(
                    "PoissonNoise wants finite counts >= 0 (NaN for pixels without information), shape (channel, y, x); "
                    f"got shape {counts.shape}, {int(bad.sum())} negative or infinite value(s)."
                )
            counts = np.where(counts < SMALLEST_COUNTS, 0.0, counts)
        self.counts = counts
        self.gain = as_positive(gain, len(counts), "PoissonNoise wants a positive gain (counts per data unit)")

    @property
    def valid(self) -> np.ndarray:  # noqa: D102
        return np.isfinite(np.asarray(self.counts))

    @property
    def modes(self) -> np.ndarray:  # noqa: D102
        return self.valid

    @property
    def reach(self) -> int:  # noqa: D102
        return 0

    def independent(self):  # noqa: D102
        return self, None

    def level(self) -> np.ndarray:  # noqa: D102
        planes = zip(np.asarray(self.counts, float), np.asarray(self.gain, float), strict=True)
        typical = [np.sqrt(max(np.nanmedian(n), 1.0)) / g if np.isfinite(n).any() else 1.0 for n, g in planes]
        return np.array(typical)

    def whiten(self, residual):  # noqa: D102
        valid = jnp.isfinite(self.counts)
        sigma = jnp.sqrt(jnp.where(valid, jnp.maximum(self.counts, 1.0), 1.0)) / self.gain[:, None, None]
        return jnp.where(valid, residual / sigma, 0.0)

    def deviance_residual(self, residual):  # noqa: D102
        valid, counts, lowest, excess = self._in_counts(residual)
        has_any = counts > 0
        # Branches that aren't taken get numbers that keep their derivatives finite.
        some = jnp.where(has_any, counts, 1.0)
        least = lowest - counts
        is_below = excess < least
        inside = jnp.where(is_below, least, excess)
        # 2 [m - N - N log(m / N)] is (m - N)^2 / N times a smooth function of (m - N) / N.
        ratio = inside / some
        small = jnp.abs(ratio) < 3e-2
        safe = jnp.where(small, 1.0, ratio)
        series = 1 - ratio * (2 / 3 - ratio * (1 / 2 - ratio * (2 / 5 - ratio / 3)))
        curve = jnp.where(small, series, 2 * (safe - jnp.log1p(safe)) / safe**2)
        value = jnp.where(has_any, ratio * jnp.sqrt(some * curve), jnp.sqrt(2 * jnp.where(has_any, 1.0, inside)))
        slope = counts / lowest - 1
        is_beyond = is_below & (slope > 0)
        beyond = -jnp.sqrt(jnp.where(is_beyond, value**2 + 2 * slope * (least - excess), 1.0))
        return jnp.where(valid, jnp.where(is_beyond, beyond, value), 0.0)

    def score_residual(self, residual):  # noqa: D102
        valid, counts, lowest, excess = self._in_counts(residual)
        fixed = lax.stop_gradient(excess)
        # The slope of the loss over the excess: 1 - N / m, or that where the tangent begins.
        slope = jnp.where(counts > 0, jnp.maximum(counts / lowest - 1, 0.0), 0.0)
        beyond = slope / jnp.maximum(-fixed, lowest)
        square = jnp.where(fixed < lowest - counts, beyond, 1 / jnp.maximum(counts + fixed, lowest))
        return jnp.where(valid, excess * jnp.sqrt(square), 0.0)

    def fisher_residual(self, residual):  # noqa: D102
        valid, counts, lowest, excess = self._in_counts(residual)
        model = jnp.maximum(counts + lax.stop_gradient(excess), lowest)
        return jnp.where(valid, excess / jnp.sqrt(model), 0.0)

    def _in_counts(self, residual):
        """Return which pixels are valid, their counts, the least that a model may predict, and the model's excess."""
        valid = jnp.isfinite(self.counts)
        counts = jnp.where(valid, self.counts, 1.0)
        return valid, counts, SMALLEST_COUNTS * jnp.maximum(counts, 1.0), residual * self.gain[:, None, None]

    @property
    def stiffness(self) -> float:  # noqa: D102
        return 1.0

    def log_normalization(self) -> float:  # noqa: D102
        counts = np.asarray(self.counts, dtype=float)
        counts = counts[np.isfinite(counts)]
        return float(np.sum(scipy.special.xlogy(counts, counts) - counts - scipy.special.gammaln(counts + 1)))

    def log_spread(self):  # noqa: D102
        return jnp.zeros(())

    def sample(self, key):  # noqa: D102
        counts = jnp.asarray(np.nan_to_num(self.counts), jnp.result_type(float))
        drawn = jax.random.poisson(key, counts).astype(counts.dtype)
        return jnp.where(jnp.isfinite(self.counts), (drawn - counts) / self.gain[:, None, None], 0.0)

    def scaled(self, unit):  # noqa: D102
        return PoissonNoise(self.counts, np.asarray(self.gain, float) * np.asarray(unit, float))

    def restricted(self, keep, window):  # noqa: D102
        counts = np.asarray(self.counts, dtype=float)[(slice(None), *window)]
        return PoissonNoise(np.where(keep, counts, np.nan), self.gain)


SMALLEST_COUNTS = 1e-3
"""Smallest number of counts that a model may predict for a pixel, in units of what was counted if that is above one."""
