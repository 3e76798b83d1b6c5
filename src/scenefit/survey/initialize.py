"""A starting point: sources at given positions, with stamps, images and spectra read off the data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import astropy.units as u
import numpy as np
import scipy.optimize
import scipy.sparse
from astropy.coordinates import SkyCoord
from scipy import ndimage

from scenefit.arrays.box import Box
from scenefit.arrays.progress import with_progress
from scenefit.data.observation import Observation
from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.packing import model_psf_sigma
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame, pixel_map, pixel_scale_of

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
MIN_HALF_SIZE = 8
"""Smallest half stamp size in model pixels."""
STAMP_FAINT, STAMP_FLUX = 0.03, 0.995
"""A stamp ends where the envelope falls below this fraction of the noise of a pixel, or holds this fraction of the flux."""
GRADIENT_STEPS = 100, 25
"""Accelerated gradient steps for more rings than that, in the first round and in later ones."""
MAX_DENSE_RINGS = 700
"""Columns up to which the rings are solved for with dense matrices."""
PSF_EXTENT, FLUX_STEPS = 3.0, 100
"""The first fluxes: how many standard deviations of the PSF an envelope reaches beyond its stamp, and accelerated gradient
steps for many sources."""


def initialize(
    frame: Frame,
    observations: Sequence[Observation] | Observation,
    catalog: SkyCoord | np.ndarray | None = None,
    *,
    model: str = "pixel",
    half_size=None,
    progress: bool = True,
) -> Scene:
    """Place a source at each catalogue position and start it from the data.

    The image with the sharpest PSF gives the shapes: a non-negative sum of elliptical Gaussian rings for every source,
    solved for jointly so that neighbours share the light as least squares has it. (Multi-Gaussian expansion: Emsellem,
    Monnet & Bacon 1994, A&A 285, 723; Cappellari 2002, MNRAS 333, 400.) This envelope is the start of a free-pixel image
    and the mean of its prior. The stamp reaches to where the envelope fades into the noise. The spectra are those with which
    all envelopes together fit each channel best, with Gaussian PSFs; `sf.fit` begins by solving for them exactly.

    Parameters
    ----------
    frame : Frame
    observations : sequence of Observation
    catalog : SkyCoord or array, shape (n, 2)
        Positions on the sky, or (y, x) on the frame.
    model : "pixel", "gaussian" or "point"
        What every source is made of: free non-negative pixels, an elliptical Gaussian, a point.
    half_size : Quantity, int or None
        Half the side of all stamps (a number: model pixels) instead of what the data suggest.
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    Scene
        Sources are named "0", "1", ... by their place in the catalogue. Those outside the frame are left out, with a
        warning.

    Raises
    ------
    ValueError
        If there is no catalogue, it has NaN positions, or none of its sources lies in the frame.
    """
    observations = [observations] if isinstance(observations, Observation) else list(observations)
    if model not in ("pixel", "gaussian", "point"):
        raise ValueError(f"model is 'pixel', 'gaussian' or 'point'; got {model!r}.")
    centers, names = _centers(frame, catalog)
    sharpest = min(observations, key=_sky_sigma)
    image, noise = detection_image(frame, sharpest)
    psf_sigma = _sky_sigma(sharpest) / (1.0 if frame.wcs is None else frame.pixel_scale)
    amplitudes, ellipticities = fit_rings(image, centers, psf_sigma, progress)
    asked = _half_size(frame, half_size)
    halves = [asked or _extent(a, e, noise, frame.box) for a, e in zip(amplitudes, ellipticities, strict=True)]
    rings = [_envelope_rings(model, row) for row in amplitudes]
    fluxes = _linear_fluxes(frame, observations, centers, ellipticities, rings, halves)
    sources = {}
    for n, (name, center) in enumerate(zip(names, centers, strict=True)):
        box = Box.around(tuple(center), halves[n]).intersection(frame.box)
        y, x = np.mgrid[box.slices]
        envelope = _rings(y - center[0], x - center[1], ellipticities[n], model_psf_sigma(frame)) @ amplitudes[n]
        sources[name] = Source(center, fluxes[n], _morphology(model, envelope, center, box))
    return Scene(frame, sources)


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


def _centers(frame, catalog):
    """Return positions (n, 2) on the frame and names of the catalogue sources inside it."""
    if catalog is None:
        raise ValueError("initialize() wants catalog=: a SkyCoord or an array of positions (y, x), one per source.")
    positions = np.atleast_2d(frame.to_pixel(catalog))
    if len(positions) == 0:
        raise ValueError("The catalogue is empty: nothing to fit.")
    bad = [int(n) for n in np.nonzero(~np.isfinite(positions).all(axis=1))[0]]
    if bad:
        raise ValueError(f"Catalogue positions must be finite and visible from the frame; rows {bad} aren't.")
    inside = [frame.box.contains(tuple(position)) for position in positions]
    if not any(inside):
        raise ValueError(
            f"None of the {len(positions)} catalogue sources lies in the model frame of {frame.box.shape} pixels; the "
            f"first is at (y, x) = ({positions[0][0]:.1f}, {positions[0][1]:.1f}). Check coordinates and their units (degrees)."
        )
    if not all(inside):
        outside = [n for n, is_inside in enumerate(inside) if not is_inside]
        warnings.warn(
            f"{len(outside)} catalogue source(s) outside the model frame left out: rows {outside}.", stacklevel=3
        )
    return positions[inside], [str(n) for n, is_inside in enumerate(inside) if is_inside]


def _sky_sigma(obs) -> float:
    """Return the width of the sharpest PSF of an observation, in arcsec (pixels without a WCS)."""
    return float(obs.psf.effective_sigma.min()) * (1.0 if obs.wcs is None else pixel_scale_of(obs.wcs))


def _half_size(frame, half_size):
    """Return a half stamp size in model pixels, or None."""
    if isinstance(half_size, u.Quantity):
        return int(np.ceil(half_size.to_value(u.arcsec) / frame.pixel_scale))
    return half_size


def fit_rings(
    image: np.ndarray, centers: np.ndarray, psf_sigma: float, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Fit every source by a non-negative sum of elliptical Gaussian rings, all together.

    Parameters
    ----------
    image : array, shape (y, x)
        NaN where there are no data.
    centers : array, shape (n, 2)
    psf_sigma : float
        Standard deviation of the image's PSF in pixels.

    Returns
    -------
    amplitudes : array, shape (n, ring)
        Total flux of each ring; at least a trace in the second.
    ellipticities : array, shape (n, 2)
        `(1 - q^2) / (1 + q^2) (cos 2 theta, sin 2 theta)` of all rings of a source.
    """
    ellipticities = np.zeros((len(centers), 2))
    windows = [_ring_windows(center, psf_sigma, image.shape) for center in centers]
    size = sum(box.shape[0] * box.shape[1] for boxes in windows for box in boxes)
    stride = int(np.ceil(np.sqrt(size / MAX_ENTRIES)))
    amplitudes = np.zeros((len(centers), len(RING_SIGMAS)))
    for round_number in with_progress(range(SHAPE_ROUNDS), "initialize", progress):
        design = _design(image, centers, ellipticities, windows, psf_sigma, stride)
        steps = GRADIENT_STEPS[min(round_number, 1)]
        amplitudes = _solve_nonnegative(design, image, amplitudes.ravel(), steps).reshape(amplitudes.shape)
        rest = image - (design @ amplitudes.ravel()).reshape(image.shape) if stride == 1 else image
        for n, center in enumerate(centers):
            ellipticities[n] = _ring_shape(rest, center, amplitudes[n], ellipticities[n], psf_sigma)
    trace = 1e-3 * max(amplitudes.max(), 1e-30)
    amplitudes[:, 1] = np.where(amplitudes.sum(axis=1) > trace, amplitudes[:, 1], trace)
    return amplitudes, ellipticities


def _rings(y, x, ellipticity, psf_sigma, sigmas=RING_SIGMAS) -> np.ndarray:
    """Return rings at offsets (y, x) from the center, shape (..., ring), each of unit integral."""
    norm = ellipticity[0] ** 2 + ellipticity[1] ** 2
    mean = sigmas**2 / np.sqrt(1 - norm)
    xx, yy = mean * (1 + ellipticity[0]) + psf_sigma**2, mean * (1 - ellipticity[0]) + psf_sigma**2
    xy = mean * ellipticity[1]
    determinant = xx * yy - xy**2
    y, x = y[..., None], x[..., None]
    exponent = (xx * y**2 - 2 * xy * x * y + yy * x**2) / determinant
    return np.exp(-0.5 * exponent) / (2 * np.pi * np.sqrt(determinant))


def _envelope_rings(model, amplitudes) -> tuple[np.ndarray, np.ndarray]:
    """Return the sigmas and weights of the rings a source of unit flux starts from; a point is a ring without width."""
    if model == "point":
        return np.zeros(1), np.ones(1)
    used = amplitudes > 0
    return RING_SIGMAS[used], amplitudes[used] / amplitudes.sum()


def _ring_windows(center, psf_sigma, shape) -> list[Box]:
    """Return the windows on which the rings of a source are compared with the data."""
    half = np.ceil(RING_EXTENT * np.hypot(RING_SIGMAS, psf_sigma)).astype(int)
    return [Box.around(tuple(center), int(h)).intersection(Box(shape)) for h in half]


def _design(image, centers, ellipticities, windows, psf_sigma, stride) -> scipy.sparse.csc_matrix:
    """Return the rings of all sources as columns over the pixels of the image."""
    pieces = []
    for n, (center, boxes) in enumerate(zip(centers, windows, strict=True)):
        for k, box in enumerate(boxes):
            step = stride if RING_SIGMAS[k] > 2 * stride else 1
            window = tuple(slice(s.start, s.stop, step) for s in box.slices)
            y, x = np.ogrid[window]
            piece = _rings(y - center[0], x - center[1], ellipticities[n], psf_sigma, RING_SIGMAS[k : k + 1])
            pieces.append((window, piece))
    return _columns(image.shape, pieces)


def _columns(shape, pieces) -> scipy.sparse.csc_matrix:
    """Return a sparse matrix with a row a pixel and a column for each (window, values there)."""
    number = np.arange(shape[0] * shape[1]).reshape(shape)
    rows = np.concatenate([number[window].ravel() for window, _ in pieces])
    values = np.concatenate([piece.ravel() for _, piece in pieces])
    starts = np.cumsum([0, *(piece.size for _, piece in pieces)])
    # Sorted by columns already; within one, by rows.
    return scipy.sparse.csc_matrix((values, rows, starts), shape=(number.size, len(pieces)))


def _solve_nonnegative(design, image, start, steps) -> np.ndarray:
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
    own = _rings(y, x, ellipticity, psf_sigma) @ amplitudes + np.nan_to_num(rest[box.slices])
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


def _extent(amplitudes, ellipticity, noise, frame_box) -> int:
    """Return the half-size of a stamp: where the envelope is lost in the noise, or holds nearly all flux."""
    norm = np.hypot(*ellipticity)
    stretch = ((1 + norm) / (1 - norm)) ** 0.25
    radius = np.arange(0.5, max(frame_box.shape))
    profile = _rings(np.zeros_like(radius), radius / stretch, np.zeros(2), 1.0) @ amplitudes
    growth = np.cumsum(profile * radius)
    end = min(np.searchsorted(-profile, -STAMP_FAINT * noise), np.searchsorted(growth, STAMP_FLUX * growth[-1]))
    return max(MIN_HALF_SIZE, int(end) + 2)


def _linear_fluxes(frame, observations, centers, ellipticities, rings, halves) -> np.ndarray:
    """Return first fluxes (source, channel): of all sources together, with their envelopes, by non-negative least squares.

    For this every PSF is the Gaussian of its effective sigma. `rings` are the sigmas and weights of each source's envelope
    and `halves` the half-sizes of their stamps. Fluxes are at least a tenth of their standard errors.
    """
    blocks: dict[int, list] = {}
    for obs in observations:
        positions, jacobians = _local_maps(frame, obs, centers)
        data = np.where(obs.noise.valid, obs.data - obs.background_image(), np.nan)
        sigmas = np.broadcast_to(obs.psf.effective_sigma, len(obs.channels))
        designs = {
            s: _envelopes(obs.shape[1:], positions, jacobians, ellipticities, rings, halves, s) for s in set(sigmas)
        }
        for plane, channel, sigma, level in zip(
            data, frame.channel_index(obs.channels), sigmas, obs.noise.level(), strict=True
        ):
            blocks.setdefault(channel, []).append((designs[sigma] / level, plane.ravel() / level))
    flux = np.zeros((len(centers), len(frame.channels)))
    for channel, parts in blocks.items():
        design, values = scipy.sparse.vstack([d for d, _ in parts], format="csc"), np.concatenate([v for _, v in parts])
        norm = design.power(2).T @ np.isfinite(values).astype(float)
        floor = np.divide(0.1, np.sqrt(norm), where=norm > 0, out=np.zeros(len(centers)))
        flux[:, channel] = np.maximum(_solve_nonnegative(design, values, floor, FLUX_STEPS), floor)
    return flux


def _local_maps(frame, obs, centers) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (n, 2) in an observation, and d(frame) / d(observation) there (n, 2, 2)."""
    positions = pixel_map(frame.wcs, obs.wcs, centers[:, 0], centers[:, 1])
    moved = [pixel_map(frame.wcs, obs.wcs, centers[:, 0] + dy, centers[:, 1] + dx) for dy, dx in ((1, 0), (0, 1))]
    return positions, np.linalg.inv(np.stack([m - positions for m in moved], axis=-1))


def _envelopes(shape, positions, jacobians, ellipticities, rings, halves, psf_sigma) -> scipy.sparse.csc_matrix:
    """Return the sources' envelopes of unit flux, convolved with a Gaussian PSF, as columns over an image's pixels."""
    areas = np.abs(np.linalg.det(jacobians))
    reach = np.asarray(halves) / np.sqrt(areas) + PSF_EXTENT * psf_sigma
    boxes = [
        Box.around(tuple(p), int(np.ceil(r))).intersection(Box(shape)) for p, r in zip(positions, reach, strict=True)
    ]
    step = int(np.ceil(np.sqrt(sum(box.shape[0] * box.shape[1] for box in boxes) / MAX_ENTRIES))) or 1
    pieces = []
    for n, (box, position, jacobian, area) in enumerate(zip(boxes, positions, jacobians, areas, strict=True)):
        window = tuple(slice(s.start, s.stop, step) for s in box.slices)
        y, x = np.ogrid[window]
        y, x = y - position[0], x - position[1]
        (yy, yx), (xy, xx) = jacobian
        sigmas, weights = rings[n]
        density = (
            _rings(yy * y + yx * x, xy * y + xx * x, ellipticities[n], psf_sigma * np.sqrt(area), sigmas) @ weights
        )
        pieces.append((window, area * density))
    return _columns(shape, pieces)


def _morphology(model, start, center, box):
    """Return the starting morphology of the named kind from a starting image on `box`."""
    if model == "point":
        return PointMorphology()
    if model == "gaussian":
        y, x = np.mgrid[box.slices]
        variance = 0.5 * (start * ((y - center[0]) ** 2 + (x - center[1]) ** 2)).sum() / start.sum()
        return GaussianMorphology(float(np.sqrt(max(variance, 0.25))) * 0.8)
    nearest = np.rint(center).astype(int)
    return PixelMorphology(start, (int(nearest[0]) - box.origin[0], int(nearest[1]) - box.origin[1]), envelope=start)
