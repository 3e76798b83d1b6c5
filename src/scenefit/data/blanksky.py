"""The noise of an image, measured where there are no sources."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.optimize
import scipy.signal

DETECTION, OUTLIER = 4.0, 5.0
"""Standard deviations above which a smoothed pixel, and a pixel by itself, isn't blank."""
SMOOTHING = (1.0, 2.0, 4.0)
"""Standard deviations, in pixels, of the Gaussians that images are smoothed with to find sources."""
GROWTH = 2.5
"""What is found is enlarged by a disk of this radius in units of the smoothing."""
ROUNDS = 4
"""How often sources are looked for, each time against the noise that is left."""
MAX_LAG = 12
"""Pixels up to which correlations are looked for."""
SIGNIFICANT = 4.0
"""Standard errors above which the correlation at a lag is taken for one."""
LONG_RANGE = 0.05
"""What is correlated by more than this at half the size of the image, or as far as one looks, isn't noise but a background."""
NEAR = 3
"""Pixels up to which correlations are thought to have a part in the errors of others."""
MIN_PER_LAG, MIN_CLEAN, CERTAIN = 10, 200, 0.1
"""Clean pixels for each lag, and in all, at least; relative uncertainty of the power spectrum above which there is a warning."""
KERNEL_ROOM = 2
"""Pixels by which the moving average that a correlation is fitted with reaches farther than the correlation."""
FIT_TOLERANCE = 1e-4
"""Relative change of chi-square at which the fit of a correlation ends: what is left is far below the standard errors."""
VARIATION_SCALE = 1 / 6
"""Scale, in units of the image, on which a varying variance is smoothed."""


class BlankSky(NamedTuple):
    """What the blank pixels of an image say about its noise.

    function : array, shape (channel, 2 R + 1, 2 R + 1)
        Correlation at lags (dy, dx): positive definite.
    variance : array, shape (channel, y, x) or (channel, 1, 1)
        Of a pixel, in units of its inverse weight.
    clean : array of bool, shape (channel, y, x)
        The pixels that were used.
    """

    function: np.ndarray
    variance: np.ndarray
    clean: np.ndarray


def measure_blank_sky(
    data: np.ndarray, weights: np.ndarray, *, mask=None, max_lag: int | None = None, varying: bool = False
) -> BlankSky:
    """Measure variance and correlation of the noise on pixels without sources or artefacts; see `CorrelatedNoise.measured`."""
    if data.shape != weights.shape:
        raise ValueError(f"Data and weights want the same shape (channel, y, x); got {data.shape} and {weights.shape}.")
    if bad := int((~np.isfinite(data) & (weights > 0)).sum()):
        raise ValueError(f"Data are NaN or infinite at {bad} pixels with weight: give these weight 0.")
    if max_lag is not None and not 0 <= max_lag < min(data.shape[1:]):
        raise ValueError(
            f"max_lag must be at least 0 and less than the image of {data.shape[1]} x {data.shape[2]}; got {max_lag}."
        )
    usable = weights > 0 if mask is None else (weights > 0) & ~np.broadcast_to(np.asarray(mask, bool), weights.shape)
    functions, variances, masks = [], [], []
    for channel, (plane, weight, use) in enumerate(zip(data, weights, usable, strict=True)):
        residual = np.where(use, plane, 0.0) * np.sqrt(weight)
        clean = blank_pixels(residual, use)
        lags = [_largest_lag(clean, use, each, channel) for each in (max_lag, None)]
        residual = np.where(clean, residual - residual[clean].mean(), 0.0)
        variance = np.full((1, 1), residual[clean].var())
        if varying:
            variance = _local_variance(residual, clean)
            residual = residual / np.sqrt(variance)
        functions.append(_correlation(residual, clean, lags[0], max(lags), channel))
        variances.append(variance * (residual[clean].var() if varying else 1.0))
        masks.append(clean)
    reach = max(len(f) // 2 for f in functions)
    return BlankSky(np.stack([np.pad(f, reach - len(f) // 2) for f in functions]), np.stack(variances), np.stack(masks))


def blank_pixels(residual: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Return which pixels of an image hold neither sources nor artefacts.

    Parameters
    ----------
    residual : array, shape (y, x)
        In units that make the noise alike everywhere.
    use : array of bool, shape (y, x)
        Pixels with information.
    """
    clean = use.copy()
    for _ in range(ROUNDS):
        if clean.sum() < 2:
            break
        centered = np.where(use, residual - np.median(residual[clean]), 0.0)
        limit = OUTLIER * _robust_sigma(centered[clean])
        found = use & (np.abs(centered) > limit)
        # Outliers by themselves, such as cosmic rays, must not look like sources once they are smoothed.
        centered = np.clip(centered, -limit, limit)
        for scale in SMOOTHING:
            smooth = _smoothed(centered, use, scale)
            high = use & (np.abs(smooth) > DETECTION * _robust_sigma(smooth[clean]))
            # A peak of noise isn't a source, nor worth more than a few pixels.
            high = scipy.ndimage.binary_opening(high, iterations=1)
            found |= scipy.ndimage.distance_transform_edt(~high) <= GROWTH * scale if high.any() else high
        clean, before = use & ~found, clean
        if (clean == before).all():
            break
    return clean


def _smoothed(image: np.ndarray, use: np.ndarray, scale: float) -> np.ndarray:
    """Return the image smoothed over the pixels in use."""
    weight = scipy.ndimage.gaussian_filter(use.astype(float), scale, mode="constant")
    return scipy.ndimage.gaussian_filter(image, scale, mode="constant") / np.maximum(weight, 0.1)


def _robust_sigma(values: np.ndarray) -> float:
    """Return the standard deviation from the median absolute deviation."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _largest_lag(clean: np.ndarray, use: np.ndarray, max_lag: int | None, channel: int) -> int:
    """Return up to which lag correlations are looked for: as asked for, or as far as the clean pixels allow."""
    count = int(clean.sum())
    possible = int(np.sqrt(2 * count / MIN_PER_LAG) - 1) // 2
    if count < MIN_CLEAN or possible < (max_lag or 0):
        lag = max_lag or 0
        raise ValueError(
            f"Only {count} of {int(use.sum())} valid pixels of channel {channel} are free of sources; measuring the noise up to "
            f"lags of {lag} pixels takes {max(MIN_PER_LAG * (2 * lag + 1) ** 2 // 2, MIN_CLEAN)}: give a larger image, a smaller "
            "max_lag=, or the noise of another image."
        )
    return min(MAX_LAG, min(clean.shape) // 4, possible) if max_lag is None else max_lag


def _local_variance(residual: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Return the variance about every pixel, smoothed over a part of the image."""
    scale = VARIATION_SCALE * min(residual.shape)
    total, weight = (
        scipy.ndimage.gaussian_filter(each, scale, mode="constant")
        for each in (np.where(clean, residual**2, 0.0), clean.astype(float))
    )
    return np.maximum(total / np.maximum(weight, 1e-3), 1e-12)


def _correlation(residual: np.ndarray, clean: np.ndarray, max_lag: int, look: int, channel: int) -> np.ndarray:
    """Return the correlation function, shape (2 R + 1, 2 R + 1), that of a moving average: positive definite.

    Correlations farther away than `max_lag` don't count. Those `look` away, if there are any, are those of a background.
    """
    raw, count = (_autocorrelation(each, look) for each in (residual, clean.astype(float)))
    raw = raw / np.maximum(count, 1.0)
    raw = raw / raw[look, look]
    _check_background(raw, _standard_error(raw, count), channel)
    raw, count = (_cut(each, max_lag) for each in (raw, count))
    error = _standard_error(raw, count)
    lags = np.arange(-max_lag, max_lag + 1)
    distance = np.maximum(np.abs(lags[:, None]), np.abs(lags))
    significant = (np.abs(raw) > SIGNIFICANT * error) & (distance > 0)
    reach = int(distance[significant].max(initial=0))
    uncertainty = float(np.sqrt((2 * reach + 1) ** 2 / clean.sum()))
    if uncertainty > CERTAIN:
        warnings.warn(
            f"The noise of channel {channel} was measured on {int(clean.sum())} pixels without sources: its power spectrum is "
            f"uncertain by {100 * uncertainty:.0f} %, the errors of what is fitted by half as much.",
            stacklevel=4,
        )
    if reach == 0:
        return np.ones((1, 1))
    wanted, error = (_cut(each, reach) for each in (raw, error))
    return _moving_average(wanted, error, reach + KERNEL_ROOM)


def _standard_error(raw: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the standard errors of a measured correlation, of `count` pairs of pixels at each lag.

    Bartlett's formula (1946, Suppl. J. R. Stat. Soc. 8, 27) for lags without correlation.
    """
    near = (_cut(raw, min(len(raw) // 2, NEAR)) ** 2).sum()
    return np.sqrt(max(near, 1.0) / np.maximum(count, 1.0))


def _check_background(raw: np.ndarray, error: np.ndarray, channel: int):
    """Raise ValueError if pixels as far apart as one looks are still correlated."""
    far = len(raw) // 2
    if far == 0:
        return
    inner = np.zeros_like(raw, dtype=bool)
    inner[1:-1, 1:-1] = True
    excess = np.where(inner, -np.inf, raw - SIGNIFICANT * error)
    if excess.max() > LONG_RANGE:
        found, uncertainty = (each.flat[excess.argmax()] for each in (raw, error))
        raise ValueError(
            f"The blank pixels of channel {channel} are still correlated by {found:.2g} +- {uncertainty:.1g} at a distance of "
            f"{far}, as far as was looked: what varies so slowly is a background, which can be fitted, not noise. Subtract it, "
            "or set background= of the observation; if it is noise, give a larger max_lag=."
        )


def _cut(function: np.ndarray, reach: int) -> np.ndarray:
    """Return a function of lags up to some reach."""
    middle = len(function) // 2
    return function[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]


def _autocorrelation(image: np.ndarray, max_lag: int) -> np.ndarray:
    """Return the sums of products of pixels up to `max_lag` apart, shape (2 max_lag + 1, 2 max_lag + 1)."""
    shape = [scipy.fft.next_fast_len(n + max_lag, real=True) for n in image.shape]
    power = np.abs(scipy.fft.rfft2(image, shape)) ** 2
    sums = scipy.fft.irfft2(power, shape)
    lags = np.arange(-max_lag, max_lag + 1)
    return sums[np.ix_(lags % shape[0], lags % shape[1])]


def _moving_average(function: np.ndarray, error: np.ndarray, half: int) -> np.ndarray:
    """Fit a measured correlation by that of a symmetric moving average of white noise, shape (2 half + 1, 2 half + 1).

    The correlation of any kernel is positive definite, and where the power all but vanishes it is known better than from the
    measured function, whose errors are the same at all frequencies. Returns shape (4 half + 1, 4 half + 1).
    """
    reach = len(function) // 2
    size = 4 * max(half, reach) + 1
    image = np.zeros((size, size))
    lags = np.arange(-reach, reach + 1)
    image[np.ix_(lags % size, lags % size)] = function
    root = np.fft.ifft2(np.sqrt(np.maximum(np.fft.fft2(image).real, 1e-3))).real
    lags = np.arange(-half, half + 1)
    kernel = root[np.ix_(lags % size, lags % size)]

    # Half of a symmetric function, its middle included, is all there is of it.
    free, lags = kernel.size // 2 + 1, (4 * half + 1) ** 2 // 2 + 1

    def whole(values):
        return np.concatenate([values, values[-2::-1]]).reshape(kernel.shape)

    def correlation(values):
        return scipy.signal.convolve2d(whole(values), whole(values))

    # Beyond the reach of what is significant there is none.
    wanted, scale = np.pad(function, 2 * half - reach), np.pad(error, 2 * half - reach, mode="edge")
    scale = scale.ravel()[:lags]

    def misfit(values):
        return (correlation(values) - wanted).ravel()[:lags] / scale

    def slopes(values):
        # Convolved with one pixel, and the opposite one, the kernel is displaced.
        displaced = np.lib.stride_tricks.sliding_window_view(np.pad(whole(values), 2 * half), wanted.shape)
        displaced = displaced.reshape(kernel.size, -1)[:, :lags]
        columns = 2 * (displaced + displaced[::-1])[:free]
        columns[-1] /= 2
        return (columns / scale).T

    # MINPACK's: other methods decompose the slopes in singular values, which takes a hundred times longer.
    options = {"method": "lm", "ftol": FIT_TOLERANCE, "max_nfev": 100}
    solution = scipy.optimize.least_squares(misfit, kernel.ravel()[:free], jac=slopes, **options)
    result = correlation(solution.x)
    return result / result[2 * half, 2 * half]
