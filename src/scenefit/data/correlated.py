"""Noise that is correlated between pixels."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array

from scenefit.arrays.vecchia import AbstractWhitening, Order, whitening
from scenefit.data.abstractnoise import AbstractGaussianNoise
from scenefit.data.blanksky import LONG_RANGE, measure_blank_sky
from scenefit.data.correlation import AbstractCorrelation, PropagatedCorrelation, StationaryCorrelation, propagate
from scenefit.data.noise import WhiteNoise
from scenefit.data.nuisances import SCALE
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

LARGEST_LAG = 64
"""Correlations are followed no farther than so many pixels."""
SMOOTH = 0.25
"""Frequency (cycles per pixel, along each axis) that models of sources hardly pass."""


class CorrelatedNoise(AbstractGaussianNoise):
    """Gaussian noise of covariance `C_ij = rho_ij / sqrt(w_i w_j)`: weights of any kind times a correlation.

    Pixels without information are marginalised over: the likelihood is that of the valid pixels, with the determinant of their
    covariance, whatever the mask looks like. Images of up to `arrays.vecchia.MAX_DENSE` pixels are whitened exactly, larger ones
    by predictions from near pixels, of which chi-square has the right mean (`num_modes`) in any case: see `arrays.vecchia`.

    Parameters
    ----------
    weights : array, shape (channel, y, x)
        Inverse variances; 0 means no information.
    correlation : AbstractCorrelation or array, shape (2 R + 1, 2 R + 1) or (channel, 2 R + 1, 2 R + 1)
        See `StationaryCorrelation` for arrays.
    scale : float or array, shape (channel,)
        By what the standard deviations that follow from the weights are multiplied; can be fitted.
    progress : bool
        Whether to show a progress bar on standard error while the whitening is made, here or when a part of the image is used,
        if that takes more than 2 s.

    Raises
    ------
    ValueError
        If a weight is negative, NaN or infinite, a scale isn't finite and positive, or the correlation isn't one, or is that of
        other pixels or another number of channels.
    """

    weights: np.ndarray | Array
    correlation: AbstractCorrelation | None
    average: np.ndarray | None
    scale: np.ndarray | Array
    whitening: AbstractWhitening
    kept: np.ndarray | Array
    amplification: np.ndarray | Array
    progress: bool = eqx.field(static=True)
    parameters: ClassVar = {"scale": SCALE}
    host_only: ClassVar = ("correlation", "average")

    def __init__(self, weights, correlation, scale: np.ndarray | Array | float = 1.0, *, progress: bool = True):
        weights = as_weights(weights)
        self.scale = as_positive(scale, len(weights), "CorrelatedNoise wants a positive scale")
        if not isinstance(correlation, AbstractCorrelation):
            correlation = StationaryCorrelation(correlation)
        if correlation.num_channels not in (1, len(weights)):
            raise ValueError(f"The correlation has {correlation.num_channels} channels, the weights {len(weights)}.")
        if isinstance(correlation, PropagatedCorrelation) and correlation.shape != weights.shape[1:]:
            raise ValueError(f"The correlation is that of {correlation.shape} pixels, the weights {weights.shape[1:]}.")
        self.weights, self.correlation, self.progress = weights, correlation, progress
        self.average = average = correlation.average()
        orders = correlation.orders(average)
        # One order for all channels: that of the channel which needs most.
        order = Order(
            *(pick(values) for pick, values in zip((min, max, max, max, max), zip(*orders, strict=True), strict=True))
        )
        self.whitening = whitening(correlation.bands, self.valid, order, progress)
        self.kept = np.broadcast_to(self.whitening.diagonal() > 0, weights.shape).astype(float)
        self.amplification = np.array([_amplification(each) for each in average])

    @classmethod
    def from_power_spectrum(
        cls, power, *, weights=None, shape: tuple[int, int] | None = None, progress: bool = True
    ) -> CorrelatedNoise:
        """Build the noise from its power spectrum.

        Parameters
        ----------
        power : array, shape (ky, kx) or (channel, ky, kx)
            Variance of the modes, at the frequencies `numpy.fft.fftfreq` of an image as large as the array: the mean is the
            variance of a pixel. Symmetric, as spectra of real images are.
        weights : array, shape (channel, y, x), optional
            Inverse variances of pixels, 0 for no information; with them, the normalisation of the spectrum doesn't count.
        shape : (int, int), optional
            Of the image, if there are no weights; by default that of the spectrum.
        progress : bool
            See `CorrelatedNoise`.

        Raises
        ------
        ValueError
            If a mode is 0, negative, NaN or infinite, shapes don't match, or pixels are correlated across half the image.
        """
        power = np.asarray(power, dtype=float)
        power = power[None] if power.ndim == 2 else power
        if power.ndim != 3 or min(power.shape) < 1:
            raise ValueError(f"A power spectrum wants shape (ky, kx) or (channel, ky, kx); got {power.shape}.")
        for kind, bad in (("NaN or infinite", ~np.isfinite(power)), ("negative", power < 0), ("zero", power == 0)):
            if bad.any():
                raise ValueError(
                    f"A power spectrum wants finite, positive variances; {int(bad.sum())} of {power.size} modes are {kind}. "
                    "Modes without noise would count without limit: add the smallest power that you trust."
                )
        mirrored = np.roll(power[:, ::-1, ::-1], (1, 1), axis=(1, 2))
        if not np.allclose(power, mirrored, rtol=1e-4, atol=1e-6 * power.max()):
            raise ValueError(
                "A power spectrum of real noise is the same at k and -k (in the order of numpy.fft.fftfreq)."
            )
        covariance = np.fft.fftshift(np.fft.ifft2(power).real, axes=(1, 2))
        middle = [n // 2 for n in power.shape[1:]]
        reach = [min((n - 1) // 2, LARGEST_LAG) for n in power.shape[1:]]
        rows, columns = (slice(m - r, m + r + 1) for m, r in zip(middle, reach, strict=True))
        variance = covariance[:, middle[0], middle[1]]
        if weights is None:
            weights = np.broadcast_to(1 / variance[:, None, None], (len(power), *(shape or power.shape[1:])))
        smaller = np.minimum(power.shape[1:], np.shape(weights)[1:])
        function = _checked_range(covariance[:, rows, columns] / variance[:, None, None], smaller)
        return cls(weights, StationaryCorrelation(function), progress=progress)

    @classmethod
    def measured(
        cls, data, weights, *, mask=None, max_lag: int | None = None, varying: bool = False, progress: bool = True
    ) -> CorrelatedNoise:
        """Build the noise from what pixels without sources look like.

        Parameters
        ----------
        data : array, shape (channel, y, x)
            The sky subtracted, but for a constant.
        weights : array, shape (channel, y, x)
            Inverse variances, 0 for no information; only their ratios count: their normalisation is measured.
        mask : array of bool, shape (y, x) or (channel, y, x), optional
            True on pixels to leave out beside those where sources and artefacts are found.
        max_lag : int, optional
            Pixels up to which correlations are looked for.
        varying : bool
            Whether the variance in units of that of the weights changes slowly over the image.
        progress : bool
            See `CorrelatedNoise`.

        Raises
        ------
        ValueError
            If shapes don't match, data with weight aren't finite, too few clean pixels are left, or these are still correlated
            at the largest lag, as those of a sky that varies are.

        Warns
        -----
        UserWarning
            If there are so few that the power spectrum is uncertain by more than 10 per cent.
        """
        weights = as_weights(weights)
        blank = measure_blank_sky(
            np.asarray(data, dtype=float), np.asarray(weights), mask=mask, max_lag=max_lag, varying=varying
        )
        correlation = StationaryCorrelation(_checked_range(blank.function, weights.shape[1:]))
        return cls(weights / blank.variance, correlation, progress=progress)

    @classmethod
    def propagated(cls, resampling, weights, shape: tuple[int, int], *, progress: bool = True) -> CorrelatedNoise:
        """Build the noise of pixels that somebody else made as weighted sums of others: exactly `A D A^T`.

        Parameters
        ----------
        resampling : sparse matrix of scipy, shape (y * x, input pixel)
            The sums A: data are `A @ input`. Pixels are counted as in `image.ravel()`, y before x. The input may be any number of
            images, one after the other; channels share the matrix. Rows without any input have no information.
        weights : array, shape (channel, input pixel) or (channel, ...)
            Inverse variances 1 / D of the input, whose noise is independent. Input without information has weight 0, and so has
            every pixel with a share of it.
        shape : (int, int)
            Rows y and columns x of the result.
        progress : bool
            See `CorrelatedNoise`.

        Raises
        ------
        TypeError
            If the resampling isn't a sparse matrix.
        ValueError
            If shapes don't match, the matrix isn't finite, weights are negative, NaN or infinite, or no pixel has information.

        Notes
        -----
        The weights of the pixels are the inverse of the diagonal of `A D A^T`. Pixels that follow from others but for 6 per cent
        of their variance are left out of `modes`, as are those of images that have more pixels than input.
        """
        new_weights, correlation = propagate(resampling, weights, shape)
        return cls(new_weights, correlation, progress=progress)

    @property
    def valid(self) -> np.ndarray:  # noqa: D102
        return np.asarray(self.weights) > 0

    def level(self) -> np.ndarray:  # noqa: D102
        return level_of(np.asarray(self.weights, float) / np.asarray(self.scale, float)[:, None, None] ** 2)

    def whiten(self, residual):  # noqa: D102
        return self.whitening(jnp.sqrt(jnp.asarray(self.weights)) * residual) / self.scale[:, None, None]

    @property
    def stiffness(self):  # noqa: D102
        return self.amplification[:, None, None]

    def log_normalization(self) -> float:  # noqa: D102
        diagonal = np.broadcast_to(self.whitening.diagonal(), self.weights.shape)
        # Of pixels that are left out, nothing counts.
        scale = np.asarray(self.scale, dtype=float)[:, None, None]
        return gaussian_log_normalization(np.asarray(self.weights, dtype=float) * (diagonal / scale) ** 2)

    def log_spread(self):  # noqa: D102
        return spread_of_scale(self.kept, self.scale)

    def sample(self, key):  # noqa: D102
        channels, height, width = self.weights.shape
        sigma = sigma_of(self.weights) * self.scale[:, None, None]
        return sigma * self._known_correlation().sample(key, (channels, height, width))

    def scaled(self, unit):  # noqa: D102
        return eqx.tree_at(lambda noise: noise.weights, self, scaled_weights(self.weights, unit))

    def restricted(self, keep, window):  # noqa: D102
        weights = restricted_weights(self.weights, keep, window)
        if weights.shape == self.weights.shape and ((weights > 0) == self.valid).all():
            return self
        return CorrelatedNoise(weights, self._known_correlation().window(window), self.scale, progress=self.progress)

    def _known_correlation(self) -> AbstractCorrelation:
        """Return the correlation, of noise on the host."""
        if self.correlation is None:
            raise ValueError(
                "This noise has been stripped of its correlation for the solver: use that of the observation."
            )
        return self.correlation

    def independent(self):  # noqa: D102
        return WhiteNoise(self.weights, self.scale), self.average

    @property
    def reach(self) -> int:  # noqa: D102
        return self.whitening.reach

    @property
    def modes(self) -> np.ndarray:  # noqa: D102
        return np.asarray(self.kept) > 0


def _checked_range(function: np.ndarray, shape) -> np.ndarray:
    """Return the correlation function if pixels half an image apart are independent."""
    middle = [n // 2 for n in function.shape[1:]]
    for axis, (half, size) in enumerate(zip(middle, shape, strict=True)):
        lag = int(size - 1) // 2
        if lag == 0 or half < lag:
            continue
        far = np.abs(np.take(function, [half - lag, half + lag], axis=1 + axis)).max()
        if far > LONG_RANGE:
            raise ValueError(
                f"Noise is correlated by {far:.2g} between pixels {lag} {('rows', 'columns')[axis]} apart, half the image: "
                "what varies so slowly is a background, which can be fitted, not noise. Subtract it, or use a larger image."
            )
    return function


def _amplification(function: np.ndarray) -> float:
    """Return by how much the whitening of smooth models may exceed that of a constant: the root of a ratio of noise powers."""
    frequency = np.linspace(0, SMOOTH, 9)
    lags = np.arange(len(function)) - len(function) // 2
    wave = np.exp(2j * np.pi * np.outer(frequency, lags))
    power = np.real(np.concatenate([wave @ function @ wave.T, wave @ function @ wave.conj().T]))
    constant = max(float(power[0, 0]), 1e-3)
    return float(np.sqrt(constant / np.clip(power.min(), 1e-3, constant)))
