"""Detected sources as smooth models, with the fluxes that fit all observations best, to be subtracted before the next look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
from jax import Array
from scipy import ndimage

from scenefit.arrays.box import Box
from scenefit.arrays.peaks import climb, refine_peak
from scenefit.data.observation import Observation
from scenefit.sky.frame import Frame
from scenefit.survey.candidates import HALF_LIGHT
from scenefit.survey.envelopes import RING_SIGMAS, columns, detection_image, fit_rings, ring_images, ring_radius
from scenefit.survey.significance import Sky

STAMP_LIGHT, RING_EXTENT = 0.99, 4.0
"""A model ends where it holds this fraction of the light of its rings, or at so many standard deviations of the widest."""
MAX_STEPS, TOLERANCE = 12, 0.3
"""Conjugate gradient steps for the fluxes, and the part of the gradient, in standard deviations, at which they end."""
CENTER_SMOOTHING, CENTER_REACH = 0.4, 0.5
"""The middle of a resolved source is the peak of its smoothed light: standard deviation of the Gaussian, and how far it is looked
for, in half-light radii, PSF included."""


class RingShape(NamedTuple):
    """Rings of one ellipticity: standard deviations, in pixels, and shares in the flux; a point is a ring without width."""

    sigmas: np.ndarray
    weights: np.ndarray
    ellipticity: np.ndarray

    def radius(self, fraction: float) -> float:
        """Return the circularised radius, in pixels, that holds a fraction of the light."""
        return ring_radius(self.sigmas, self.weights, fraction)

    @classmethod
    def point(cls) -> RingShape:
        """Return a point."""
        return cls(np.zeros(1), np.ones(1), np.zeros(2))


def sharp_image(frame: Frame, observations: Sequence[Observation], widths: np.ndarray, alike: float) -> np.ndarray:
    """Return the mean of the images about as sharp as the sharpest, on the pixels of the frame; NaN without data."""
    total, norm = np.zeros(frame.box.shape), np.zeros(frame.box.shape)
    for obs, width in zip(observations, widths, strict=True):
        if width >= alike * widths.min():
            continue
        image, sigma = detection_image(frame, obs)
        area = float(np.median(np.asarray(obs.matched_renderer.area)))
        weight = np.where(np.isfinite(image), (area / sigma) ** 2, 0.0)
        total += weight * np.nan_to_num(image) / area
        norm += weight
    return np.where(norm > 0, total / np.where(norm > 0, norm, 1.0), np.nan)


def fit_shapes(
    image: np.ndarray, psf_sigma: float, positions: np.ndarray, sizes: np.ndarray, is_compact: np.ndarray
) -> list[RingShape]:
    """Return the shapes of sources on the sharpest image; where that has no data, Gaussians of the sizes they were found with."""
    nearest = np.clip(np.rint(positions).astype(int), 0, np.array(image.shape) - 1)
    is_seen = np.isfinite(image)[tuple(nearest.T)] if len(positions) else np.zeros(0, bool)
    # A few pixels may be masked in the middle of a bright star.
    for number in np.flatnonzero(~is_seen):
        box = Box.around(tuple(positions[number]), int(np.ceil(4 * psf_sigma))).intersection(Box(image.shape))
        is_seen[number] = np.isfinite(image[box.slices]).any()
    result = [RingShape(np.array([size]), np.ones(1), np.zeros(2)) for size in sizes]
    if is_seen.any():
        scale = float(np.nanmax(np.abs(image))) or 1.0
        amplitudes, ellipticities = fit_rings(image / scale, positions[is_seen], psf_sigma)
        for number, row, ellipticity in zip(np.flatnonzero(is_seen), amplitudes, ellipticities, strict=True):
            used = row > 0
            result[number] = RingShape(RING_SIGMAS[used], row[used] / row.sum(), ellipticity)
    return [RingShape.point() if compact else shape for compact, shape in zip(is_compact, result, strict=True)]


def middles(
    image: np.ndarray,
    psf_sigma: float,
    positions: np.ndarray,
    shapes: Sequence[RingShape],
    images: scipy.sparse.csr_matrix,
) -> np.ndarray:
    """Return where the light of each resolved source, all others subtracted, is brightest when smoothed by a part of its size.

    Points stay where they are. A source that has no such peak nearby stays where it is. So do all where the image has no data.

    Parameters
    ----------
    image : array, shape (y, x)
        The sharpest one (`sharp_image`); NaN without data.
    psf_sigma : float
        Of that image.
    positions : array, shape (source, 2)
    shapes : sequence of RingShape
    images : sparse matrix, shape (source, pixel)
        Of the sources (`templates`).
    """
    result, whole = np.array(positions, dtype=float), Box(image.shape)
    is_seen = np.isfinite(image)
    seen = images[:, is_seen.ravel()]
    fluxes = np.linalg.lstsq((seen @ seen.T).toarray(), seen @ image[is_seen], rcond=None)[0]
    rest = np.where(is_seen, image, 0.0) - (images.T @ fluxes).reshape(image.shape)
    for number, (position, shape) in enumerate(zip(positions, shapes, strict=True)):
        if not shape.sigmas.any():
            continue
        radius = float(np.hypot(shape.radius(0.5), HALF_LIGHT * psf_sigma))
        sigma, reach = max(CENTER_SMOOTHING * radius, HALF_LIGHT * psf_sigma), CENTER_REACH * radius
        box = Box.around(tuple(position), int(np.ceil(reach + RING_EXTENT * sigma))).intersection(whole)
        place = tuple((np.rint(position).astype(int) - box.origin).tolist())
        if not (box.contains(tuple(position)) and is_seen[box.slices].all() and fluxes[number] > 0):
            continue
        own = _window(images, number, box, image.shape)
        smooth = ndimage.gaussian_filter(rest[box.slices] + fluxes[number] * own, sigma)
        top = climb(smooth, place, reach)
        if top == climb(smooth, top, np.sqrt(2)):
            result[number] = refine_peak(smooth, top) + box.origin
    return result


def _window(images: scipy.sparse.csr_matrix, row: int, box: Box, shape: tuple[int, int]) -> np.ndarray:
    """Return an image of `images` on a box."""
    part = slice(*images.indptr[row : row + 2])
    places = np.stack(np.unravel_index(images.indices[part], shape)) - np.array(box.origin)[:, None]
    inside = ((places >= 0) & (places < np.array(box.shape)[:, None])).all(axis=0)
    result = np.zeros(box.shape)
    result[tuple(places[:, inside])] = images.data[part][inside]
    return result


def templates(frame: Frame, positions: np.ndarray, shapes: Sequence[RingShape]) -> scipy.sparse.csr_matrix:
    """Return images of unit flux on the frame, with its PSF, one a row."""
    psf_sigma = float(frame.psf.effective_sigma[0])
    whole = Box(frame.box.shape)
    pieces = []
    for position, shape in zip(positions, shapes, strict=True):
        norm = float(np.hypot(*shape.ellipticity))
        stretch = ((1 + norm) / (1 - norm)) ** 0.25
        wide = min(shape.radius(STAMP_LIGHT), RING_EXTENT * shape.sigmas.max()) * stretch
        box = Box.around(tuple(position), int(np.ceil(np.hypot(wide, RING_EXTENT * psf_sigma)))).intersection(whole)
        y, x = np.ogrid[box.slices]
        rings = ring_images(y - position[0], x - position[1], shape.ellipticity, psf_sigma, shape.sigmas)
        pieces.append((box.slices, rings @ shape.weights))
    return columns(whole.shape, pieces).T if pieces else scipy.sparse.csr_matrix((0, whole.shape[0] * whole.shape[1]))


def fit_fluxes(
    sky: Sky,
    frame: Frame,
    images: scipy.sparse.csr_matrix,
    information: np.ndarray,
    pulls: Sequence[Array],
    start: np.ndarray,
) -> tuple[np.ndarray, list[Array]]:
    """Return fluxes (source, channel), in units of the sky, that fit all observations best, and what is then left to pull.

    Linear least squares by conjugate gradients, all channels side by side.

    Parameters
    ----------
    sky : Sky
    frame : Frame
    images : sparse matrix, shape (source, pixel)
    information : array, shape (source, channel)
        About that of each flux; 0 where there are no data.
    pulls : sequence of arrays
        `sky.pull` of nothing.
    start : array, shape (source, channel)
    """
    inner = frame.inner_box.slices
    has_data = information > 0
    step_size = np.where(has_data, 1 / np.where(has_data, information, 1.0), 0.0)

    def gradient(left) -> np.ndarray:
        canvas = np.asarray(sum(left), dtype=float)[(slice(None), *inner)]
        return images @ canvas.reshape(len(canvas), -1).T

    def pulled(fluxes) -> list[Array]:
        return sky.pull((images.T @ fluxes).T.reshape(frame.shape) * sky.unit[:, None, None])

    fluxes = np.where(has_data, start, 0.0)
    left = pulled(fluxes) if fluxes.any() else list(pulls)
    rest = gradient(left)
    ahead = step_size * rest
    size = (rest * ahead).sum(axis=0)
    for _ in range(MAX_STEPS):
        if not (np.abs(rest) * np.sqrt(step_size)).max(initial=0.0) > TOLERANCE:
            break
        along = [before - after for before, after in zip(pulls, pulled(ahead), strict=True)]
        bent = gradient(along)
        curvature = (ahead * bent).sum(axis=0)
        step = np.where(curvature > 0, size / np.where(curvature > 0, curvature, 1.0), 0.0)
        fluxes = fluxes + step * ahead
        rest = rest - step * bent
        new = step_size * rest
        new_size = (rest * new).sum(axis=0)
        ahead = new + np.where(size > 0, new_size / np.where(size > 0, size, 1.0), 0.0) * ahead
        size = new_size
        moved = np.asarray(step, np.float32)[:, None, None]
        left = [now - moved * change for now, change in zip(left, along, strict=True)]
    return fluxes, left
