"""Envelopes: what sources look like on the sharpest image, as non-negative sums of elliptical Gaussians."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
from scipy import ndimage

from scenefit.arrays.box import Box
from scenefit.arrays.progress import with_progress
from scenefit.data.observation import Observation
from scenefit.sky.frame import Frame, pixel_map, pixel_scale_of
from scenefit.sky.mixture import GaussianMixturePSF

RING_SIGMAS = 0.6 * 2.0 ** np.arange(7)
"""Standard deviations, in model pixels, of the Gaussian rings whose non-negative sum is a source's envelope."""
RING_EXTENT = 4.0
"""Half-size, in standard deviations, of the window on which a ring is compared with the data."""
SHAPE_ROUNDS = 4
"""Rounds of solving for all rings and measuring every source's shape with the others subtracted."""
MAX_ELLIPTICITY = 0.85
"""Largest ellipticity of a starting envelope."""
MAX_ENTRIES = 5_000_000
"""Entries of the ring design matrix; a larger one is thinned out by using every second, third ... pixel."""
GRADIENT_STEPS = 100, 25
"""Accelerated gradient steps for more rings than that, in the first round and in later ones."""
MAX_DENSE_RINGS = 700
"""Columns up to which the rings are solved for with dense matrices."""
PSF_REACH = 12.0
"""Widths of a PSF up to which its image reaches."""
BLUR_COMPONENTS = 2
"""Gaussians that stand for the PSF in which rings are seen."""


class Blur(NamedTuple):
    """The PSF of an image as round Gaussians: `sigmas` in pixels, and `weights`, shape (g,)."""

    sigmas: np.ndarray
    weights: np.ndarray

    @property
    def effective_sigma(self) -> float:
        """Standard deviation of the Gaussian of equal peak value and flux."""
        return float(np.sqrt(1 / (2 * np.pi * (self.weights / (2 * np.pi * self.sigmas**2)).sum())))

    @classmethod
    def gaussian(cls, sigma: float) -> Blur:
        """Return a Gaussian blur."""
        return cls(np.array([sigma]), np.ones(1))

    @classmethod
    def of(cls, frame: Frame, obs: Observation) -> Blur:
        """Return the blur of an observation, its channels added, on the pixels of the frame."""
        image = psf_image(obs, _local_jacobian(obs.wcs, frame.wcs, [(n - 1) / 2 for n in obs.shape[1:]]))
        with warnings.catch_warnings():
            # A rough description will do.
            warnings.simplefilter("ignore", UserWarning)
            mixture = GaussianMixturePSF.fit(image, BLUR_COMPONENTS, round=True)
        weights, covariances = (each[0] for each in mixture.components)
        used = weights > 0
        return cls(np.sqrt(covariances[used, 0, 0]), weights[used] / weights[used].sum())


def channel_shares(obs: Observation) -> np.ndarray:
    """Return the weights of an observation's channels in their mean, by inverse variance; 0 for those without data."""
    weights = np.where(obs.noise.valid.any(axis=(1, 2)), obs.noise.level() ** -2.0, 0.0)
    return weights / weights.sum()


def psf_image(obs: Observation, jacobian: np.ndarray) -> np.ndarray:
    """Return the image of a point of unit flux in the middle of a square, the channels added with their inverse variances.

    `jacobian` is d(y, x) on the pixels of the image / d(y, x) on the observation's, shape (2, 2).
    """
    reach = min(obs.psf.extent, PSF_REACH * obs.psf.effective_sigma.max()) * np.sqrt(abs(np.linalg.det(jacobian)))
    size = 2 * int(np.ceil(reach)) + 3
    shares = channel_shares(obs)
    ky, kx = np.fft.fftfreq(size), np.fft.rfftfreq(size)
    modes = np.broadcast_to(obs.psf.transfer(ky, kx, jacobian), (len(shares), size, len(kx)))
    return np.fft.fftshift(np.fft.irfft2(np.einsum("c,ckl->kl", shares, modes), (size, size)))


def psf_width(frame: Frame, obs: Observation) -> float:
    """Return the standard deviation of the sharpest PSF of an observation, in model pixels."""
    scale = 1.0 if frame.wcs is None else pixel_scale_of(obs.wcs) / frame.pixel_scale
    return float(obs.psf.effective_sigma.min()) * scale


def ring_radius(sigmas: np.ndarray, weights: np.ndarray, fraction: float) -> float:
    """Return the circularised radius, in pixels, that holds a fraction of the light of rings; 0 for a point."""
    if not np.any(sigmas):
        return 0.0
    radius = np.geomspace(1e-2, 6 * np.max(sigmas), 400)
    growth = (1 - np.exp(-0.5 * (radius[:, None] / np.maximum(sigmas, 1e-3)) ** 2)) @ weights / np.sum(weights)
    return float(np.interp(fraction, growth, radius))


def _local_jacobian(source, target, position) -> np.ndarray:
    """Return d(y, x) on the target / d(y, x) on the source's pixels, shape (2, 2)."""
    steps = np.asarray(position) + np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    moved = pixel_map(source, target, steps[:, 0], steps[:, 1])
    return (moved[1:] - moved[0]).T


class Envelope(NamedTuple):
    """What a source looks like.

    Attributes
    ----------
    center : array, shape (2,)
        (y, x).
    amplitudes : array, shape (ring,)
        Flux of each of the rings of `RING_SIGMAS`.
    ellipticity : array, shape (2,)
        `(1 - q^2) / (1 + q^2) (cos 2 theta, sin 2 theta)` of all rings.
    """

    center: np.ndarray
    amplitudes: np.ndarray
    ellipticity: np.ndarray


def detection_image(frame: Frame, obs: Observation) -> tuple[np.ndarray, float]:
    """Return the sum of an observation's channels, weighted by inverse variance, on the model pixels.

    Returns
    -------
    image : array, shape (y, x)
        Flux per observed pixel, interpolated linearly; NaN without data.
    sigma : float
        Standard deviation of a pixel.
    """
    weights = np.where(obs.noise.valid, 1 / obs.noise.level()[:, None, None] ** 2, 0.0)
    norm = weights.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        plane = np.where(norm > 0, (weights * (obs.data - obs.background_image())).sum(axis=0) / norm, np.nan)
    y, x = np.mgrid[: frame.box.shape[0], : frame.box.shape[1]]
    position = pixel_map(frame.wcs, obs.wcs, y, x)
    image = ndimage.map_coordinates(plane, [position[..., 0], position[..., 1]], order=1, cval=np.nan)
    return image, float(1 / np.sqrt(np.median(norm[norm > 0])))


def _stride(windows) -> int:
    """Return which pixels count: every one, second, third ..."""
    size = sum(box.shape[0] * box.shape[1] for boxes in windows for box in boxes)
    return int(np.ceil(np.sqrt(size / MAX_ENTRIES)))


def _with_trace(amplitudes: np.ndarray) -> np.ndarray:
    """Return amplitudes with at least a trace in the second ring of each source."""
    amplitudes = amplitudes.copy()
    trace = 1e-3 * max(amplitudes.max(), 1e-30)
    amplitudes[:, 1] = np.where(amplitudes.sum(axis=1) > trace, amplitudes[:, 1], trace)
    return amplitudes


def fit_rings(
    image: np.ndarray, centers: np.ndarray, blur: Blur | float, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Fit every source by a non-negative sum of elliptical Gaussian rings, all together.

    Parameters
    ----------
    image : array, shape (y, x)
        NaN where there are no data.
    centers : array, shape (n, 2)
    blur : Blur or float
        PSF of the image; the standard deviation of a Gaussian one in pixels.

    Returns
    -------
    amplitudes : array, shape (n, ring)
        Total flux of each ring; at least a trace in the second.
    ellipticities : array, shape (n, 2)
        `(1 - q^2) / (1 + q^2) (cos 2 theta, sin 2 theta)` of all rings of a source.
    """
    ellipticities = np.zeros((len(centers), 2))
    blur = blur if isinstance(blur, Blur) else Blur.gaussian(blur)
    windows = [_ring_windows(center, blur.effective_sigma, image.shape) for center in centers]
    stride = _stride(windows)
    amplitudes = np.zeros((len(centers), len(RING_SIGMAS)))
    for round_number in with_progress(range(SHAPE_ROUNDS), "initialize", progress):
        design = _design(image, centers, ellipticities, windows, blur, stride)
        steps = GRADIENT_STEPS[min(round_number, 1)]
        amplitudes = solve_nonnegative(design, image, amplitudes.ravel(), steps).reshape(amplitudes.shape)
        rest = image - (design @ amplitudes.ravel()).reshape(image.shape) if stride == 1 else image
        for n, center in enumerate(centers):
            ellipticities[n] = _ring_shape(rest, center, amplitudes[n], ellipticities[n], blur.effective_sigma)
    return _with_trace(amplitudes), ellipticities


def ring_images(y, x, ellipticity, psf_sigma, sigmas=RING_SIGMAS) -> np.ndarray:
    """Return rings at offsets (y, x) from the center, shape (..., ring), each of unit integral."""
    norm = ellipticity[0] ** 2 + ellipticity[1] ** 2
    mean = sigmas**2 / np.sqrt(1 - norm)
    xx, yy = mean * (1 + ellipticity[0]) + psf_sigma**2, mean * (1 - ellipticity[0]) + psf_sigma**2
    xy = mean * ellipticity[1]
    determinant = xx * yy - xy**2
    y, x = y[..., None], x[..., None]
    exponent = (xx * y**2 - 2 * xy * x * y + yy * x**2) / determinant
    return np.exp(-0.5 * exponent) / (2 * np.pi * np.sqrt(determinant))


def _ring_windows(center, psf_sigma, shape) -> list[Box]:
    """Return the windows on which the rings of a source are compared with the data."""
    half = np.ceil(RING_EXTENT * np.hypot(RING_SIGMAS, psf_sigma)).astype(int)
    return [Box.around(tuple(center), int(h)).intersection(Box(shape)) for h in half]


def _design(image, centers, ellipticities, windows, blur: Blur, stride) -> scipy.sparse.csc_matrix:
    """Return the rings of all sources as columns over the pixels of the image."""
    pieces = []
    for n, (center, boxes) in enumerate(zip(centers, windows, strict=True)):
        for k, box in enumerate(boxes):
            step = stride if RING_SIGMAS[k] > 2 * stride else 1
            window = tuple(slice(s.start, s.stop, step) for s in box.slices)
            y, x = np.ogrid[window]
            y, x = y - center[0], x - center[1]
            piece = sum(
                weight * ring_images(y, x, ellipticities[n], sigma, RING_SIGMAS[k : k + 1])
                for sigma, weight in zip(blur.sigmas, blur.weights, strict=True)
            )
            pieces.append((window, piece))
    return columns(image.shape, pieces)


def columns(shape, pieces) -> scipy.sparse.csc_matrix:
    """Return a sparse matrix with a row a pixel and a column for each (window, values there)."""
    number = np.arange(shape[0] * shape[1]).reshape(shape)
    rows = np.concatenate([number[window].ravel() for window, _ in pieces])
    values = np.concatenate([piece.ravel() for _, piece in pieces])
    starts = np.cumsum([0, *(piece.size for _, piece in pieces)])
    # Sorted by columns already; within one, by rows.
    return scipy.sparse.csc_matrix((values, rows, starts), shape=(number.size, len(pieces)))


def solve_nonnegative(design, image, start, steps) -> np.ndarray:
    """Return the non-negative amplitudes that fit the finite pixels best; many: near the best, from a start."""
    flat = image.ravel()
    valid = np.isfinite(flat)
    design, flat = design[valid], flat[valid]
    if design.shape[1] <= MAX_DENSE_RINGS:
        gram, projection = design.T @ design, design.T @ flat
        # min |L^T a - L^-1 p|^2 over a >= 0 is the same problem in as many rows as columns.
        dense = gram.toarray()
        # Rings without data, or that a PSF makes all alike, would leave the matrix singular.
        diagonal = np.diag(dense)
        dense[np.diag_indices_from(dense)] += 1e-8 * diagonal + 1e-12 * max(diagonal.max(), 1e-30)
        lower = np.linalg.cholesky(dense)
        return scipy.optimize.nnls(lower.T, np.linalg.solve(lower, projection), maxiter=50 * len(dense))[0]
    return _projected_gradient(design, flat, start, steps)


def _projected_gradient(design, data, start, steps) -> np.ndarray:
    """Return non-negative amplitudes near the least-squares solution, by accelerated projected gradients.

    (Beck & Teboulle 2009, SIAM J. Imaging Sci. 2, 183, eq. 4.1-4.3, doi:10.1137/080716542; restarted where the momentum
    points uphill.) The diagonal step is bounded by the row and column sums of the non-negative design.
    """
    # Single precision: the products are bound by the memory's speed.
    unit = float(np.abs(data).max()) or 1.0
    rows = design.tocsr().astype(np.float32)
    transposed, data = rows.T.tocsr(), (data / unit).astype(np.float32)
    curvature = np.maximum(transposed @ (rows @ np.ones(design.shape[1], np.float32)), 1e-30)
    best = (start / unit).astype(np.float32)
    ahead, momentum = best, 1.0
    for _ in range(steps):
        following = np.maximum(ahead - transposed @ (rows @ ahead - data) / curvature, 0.0)
        if ((ahead - following) * curvature) @ (following - best) > 0:
            momentum = 1.0
        faster = 0.5 * (1 + np.sqrt(1 + 4 * momentum**2))
        ahead = following + np.float32((momentum - 1) / faster) * (following - best)
        best, momentum = following, faster
    return best.astype(float) * unit


def _ring_shape(rest, center, amplitudes, ellipticity, psf_sigma) -> np.ndarray:
    """Return the ellipticity of a source from the moments of its model plus what all models leave of the data."""
    if not amplitudes.sum() > 0:
        return ellipticity
    size = float(np.sqrt((amplitudes * RING_SIGMAS).sum() / amplitudes.sum() * RING_SIGMAS[0] + 1.0)) * 2
    size = max(size, 0.7 * float((amplitudes * RING_SIGMAS).sum() / amplitudes.sum()))
    variance = size**2 + psf_sigma**2
    box = Box.around(tuple(center), int(np.ceil(4 * np.sqrt(variance)))).intersection(Box(rest.shape))
    y, x = np.mgrid[box.slices]
    y, x = y - center[0], x - center[1]
    own = ring_images(y, x, ellipticity, psf_sigma) @ amplitudes + np.nan_to_num(rest[box.slices])
    weight = own * np.exp(-0.5 * (y**2 + x**2) / variance)
    total = weight.sum()
    if not total > 0:
        return ellipticity
    measured = np.array([[(weight * x * x).sum(), (weight * x * y).sum()], [0.0, (weight * y * y).sum()]]) / total
    measured[1, 0] = measured[0, 1]
    inverse = np.linalg.inv(measured) - np.eye(2) / variance
    values = np.linalg.eigvalsh(inverse)
    if values.min() <= 1e-3 / variance:
        return ellipticity
    moments = np.linalg.inv(inverse) - psf_sigma**2 * np.eye(2)
    trace = moments[0, 0] + moments[1, 1]
    if trace < 0.5 * psf_sigma**2:
        return np.zeros(2)
    new = np.array([moments[0, 0] - moments[1, 1], 2 * moments[0, 1]]) / trace
    return new * min(1.0, MAX_ELLIPTICITY / max(np.hypot(*new), 1e-9))
