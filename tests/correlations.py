"""Correlated noise from first principles: kernels on white noise, dense covariances, whitenings as matrices."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import scipy.signal

from scenefit.data.correlation import PropagatedCorrelation

HAT = np.array([1.0, 2.0, 1.0])


def gaussian_kernel(sigma, reach):
    """Return a kernel of shape (2 reach + 1, 2 reach + 1)."""
    row = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return np.outer(row, row)


def shift_kernel(y, x):
    """Return the weights that interpolate an image bilinearly, shifted by fractions of a pixel."""
    return np.outer([1 - y, y], [1 - x, x])


KERNELS = {
    "white": np.ones((1, 1)),
    # Its power vanishes at the Nyquist frequency.
    "hat": np.outer(HAT, HAT),
    # As does that of a shift by half a pixel, along one axis here.
    "shift": shift_kernel(0.5, 0.4),
    "gaussian": gaussian_kernel(0.7, 4),
}


def autocorrelation(kernel):
    """Return the correlation function of white noise after a convolution."""
    sums = scipy.signal.convolve2d(kernel, kernel[::-1, ::-1])
    return sums / sums[len(kernel) - 1, kernel.shape[1] - 1]


def drizzled(pixfrac=0.8, scale=0.6):
    """Return the correlation function of a drizzled image, shape (5, 5): the mean over where output pixels fall on native ones.

    Drops of `pixfrac` native pixels go to output pixels of `scale` native ones in proportion to the overlap, normalised by
    the total weight (Fruchter & Hook 2002, PASP 114, 144, doi:10.1086/338393).
    """
    lags, drops = np.arange(-2, 3), np.arange(-4, 6)
    total = np.zeros(5)
    for phase in (np.arange(12) + 0.5) / 12:
        middle = (phase + scale * lags)[:, None]
        low, high = (
            np.maximum(middle - scale / 2, drops - pixfrac / 2),
            np.minimum(middle + scale / 2, drops + pixfrac / 2),
        )
        weight = np.maximum(high - low, 0.0)
        weight /= weight.sum(axis=1, keepdims=True)
        total += weight @ weight[2]
    total = total + total[::-1]
    return np.outer(total, total) / total[2] ** 2


CORRELATIONS = {name: autocorrelation(kernel) for name, kernel in KERNELS.items()} | {"drizzled": drizzled()}


def bands_of(*functions):
    """Return what whitenings want of correlation functions, one for each channel."""

    def bands(step):
        return [
            each[tuple(slice(n // 2 % step, None, step) for n in each.shape)][:, :, None, None] for each in functions
        ]

    return bands


def covariance_of(function, shape):
    """Return the dense covariance of all pixels of an image with a correlation function, shape (y * x, y * x)."""
    result = np.zeros((*shape, *shape))
    for (dy, dx), value in np.ndenumerate(function):
        dy, dx = dy - len(function) // 2, dx - function.shape[1] // 2
        for y in range(max(0, -dy), min(shape[0], shape[0] - dy)):
            columns = np.arange(max(0, -dx), min(shape[1], shape[1] - dx))
            result[y, columns, y + dy, columns + dx] = value
    return result.reshape(np.prod(shape), np.prod(shape))


def propagated(shape, density, *, seed=1, num_channels=1):
    """Return pixels that are random positive sums of four independent numbers each, and the dense maps from these to pixels.

    Parameters
    ----------
    density : float
        Pixels to an independent number along each axis.
    """
    generator = np.random.default_rng(seed)
    width = int(shape[1] / density) + 2
    y, x = (n.ravel() for n in np.indices(shape))
    first = (y / density).astype(int) * width + (x / density).astype(int)
    index = first[:, None] + [0, 1, width, width + 1]
    weight = generator.uniform(0.1, 1, (num_channels, len(index), 4))
    maps = np.zeros((num_channels, len(index), index.max() + 1))
    for k in range(4):
        maps[:, np.arange(len(index)), index[:, k]] = weight[..., k]
    maps /= np.sqrt((maps**2).sum(axis=2, keepdims=True))
    return PropagatedCorrelation(index, weight, shape), maps


def holes(shape, fraction, seed=3):
    """Return which pixels are valid: all but single ones, a bad column, a corner and a round hole, if there are any."""
    valid = np.random.default_rng(seed).random(shape) >= fraction
    if fraction:
        y, x = np.indices(shape)
        valid &= (x != shape[1] // 3) & (y + x > 4)
        valid &= np.hypot(y - 0.6 * shape[0], x - 0.7 * shape[1]) > 2.5
    return valid


def matrix_of(whiten, shape):
    """Return the matrix of a linear map of images: each image with a single pixel is a channel."""
    size = int(np.prod(shape))
    unit = jnp.eye(size, dtype=jnp.result_type(float)).reshape(size, *shape)
    return np.asarray(whiten(unit), float).reshape(size, size).T


def gaussian_noise(kernel, shape, generator):
    """Return white noise of unit variance after a convolution with a kernel, in units that keep the variance."""
    white = generator.normal(size=tuple(n + m - 1 for n, m in zip(shape, kernel.shape, strict=True)))
    return scipy.signal.fftconvolve(white, kernel, "valid") / np.sqrt((kernel**2).sum())
