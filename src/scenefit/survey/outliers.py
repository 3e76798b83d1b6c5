"""Single pixels that are sharper than the PSF: cosmic rays, hot pixels and the like."""

from __future__ import annotations

import numpy as np
from scipy import fft, ndimage

from scenefit.data.observation import Observation

SHARPNESS, MARGIN = 1.5, 5.0
"""A pixel alone must be more significant than a point source there by this factor, and by so many standard deviations.

For a well sampled PSF of standard deviation s pixels, an outlier is by sqrt(pi) s more significant than the point source that
fits it best, and a point source is never less significant than its brightest pixel: those of PSFs narrower than 0.85 pixels can't
be told apart, and are left."""


def without_outliers(obs: Observation, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a residual whose sharp outliers have the median of their neighbours, and which pixels these are.

    Parameters
    ----------
    obs : Observation
    residual : array, shape (channel, y, x)
        Data minus background and what else is known; 0 without information.
    """
    residual = residual.copy()
    found = np.zeros(residual.shape, bool)
    valid = obs.noise.valid
    level = obs.noise.level()
    height, width = residual.shape[1:]
    margin = min(int(np.ceil(4 * obs.psf.effective_sigma.max())) + 1, height, width)
    shape = [fft.next_fast_len(n + margin, real=True) for n in (height, width)]
    kernels = obs.psf.transfer(np.fft.fftfreq(shape[0]), np.fft.rfftfreq(shape[1]), np.eye(2))
    kernels = np.broadcast_to(fft.irfft2(kernels, shape), (len(residual), *shape))
    for plane, mask, kernel, sigma, bad in zip(residual, valid, kernels, level, found, strict=True):
        if not mask.any():
            continue
        alone = plane / sigma
        candidates = alone > MARGIN
        if not candidates.any():
            continue
        kept = fft.rfft2(kernel).conj()
        square = fft.rfft2(kernel**2).conj()
        numerator = fft.irfft2(fft.rfft2(alone, shape) * kept, shape)[:height, :width]
        known = fft.irfft2(fft.rfft2(mask.astype(float), shape) * square, shape)[:height, :width]
        point = numerator / np.sqrt(np.maximum(known, 1e-3 * known.max()))
        bad |= mask & candidates & (alone > SHARPNESS * point + MARGIN)
        if bad.any():
            hollow = np.where(bad | ~mask, np.nan, plane)
            for y, x in np.argwhere(bad):
                near = hollow[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
                plane[y, x] = np.nanmedian(near) if np.isfinite(near).any() else 0.0
    return residual, found


def single_pixels(found: np.ndarray) -> np.ndarray:
    """Return which outliers touch at most one other: extended tracks and saturated trails aren't outliers of this kind."""
    structure = np.ones((1, 3, 3))
    return found & (ndimage.convolve(found.astype(int), structure.astype(int), mode="constant") <= 2)
