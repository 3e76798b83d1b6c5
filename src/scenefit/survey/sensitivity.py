"""How measured shapes change with the free parameters, to first order.

Center, moments and radii of a source are where sums over its image, with certain weights, vanish. An image that
changes by dI therefore moves them by the sum of dI times a map, their influence function (Hampel 1974, J. Am. Stat. Assoc. 69,
383, doi:10.1080/01621459.1974.10482962); dI comes from the derivatives of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
from scipy import ndimage

from scenefit.arrays.box import Box
from scenefit.arrays.progress import with_progress
from scenefit.infer.posterior import Layout, flux_coordinates
from scenefit.infer.problem import Problem
from scenefit.infer.slopes import StampSlopes, slot_of_elements
from scenefit.model.packing import model_psf_sigma
from scenefit.model.scene import Scene
from scenefit.survey.measure import (
    FRACTIONS,
    MARGIN,
    SMOOTHING,
    Shape,
    growth_radius,
    has_own_center,
    source_image,
    weighted_window,
)

NUM_MEASURES = 5 + len(FRACTIONS)
"""Numbers that are measured of a shape: center (y, x), moments (yy, xy, xx), squares of the radii that hold `FRACTIONS` of the
light; in pixels."""
NUM_ANGLES = 64
"""Points of a circle that an image is integrated over."""


class _Part(NamedTuple):
    """A component of a source that is measured.

    row : int
        Of the first of the source's measures among all.
    is_centered : bool
        Whether the source is where the component's center says.
    maps : array, shape (measure, h, w)
        Influence functions on the component's stamp.
    stamp : array, shape (plane, h, w)
    weighted_flux, channel_weights : arrays, shape (channel,)
    entries : array of int, shape (channel,)
        Which entry of the spectrum each channel shows; -1 for none.
    """

    row: int
    is_centered: bool
    maps: np.ndarray
    stamp: np.ndarray
    weighted_flux: np.ndarray
    channel_weights: np.ndarray
    entries: np.ndarray

    def along_shape(self, change: np.ndarray) -> np.ndarray:
        """Return the change of the measures, shape (measure,), when the stamp changes, shape (plane, h, w)."""
        planes = self.weighted_flux if len(change) > 1 else self.weighted_flux.sum(keepdims=True)
        return _products(self.maps, planes, change)

    def along_flux(self, entry: int) -> np.ndarray:
        """Return the change of the measures, shape (measure,), with an entry of the spectrum."""
        shown = np.where(self.entries == entry, self.channel_weights, 0.0)
        # The shape of a single profile doesn't depend on its flux, as long as it is the same in all channels.
        if self.is_centered and len(self.stamp) == 1:
            return np.zeros(NUM_MEASURES)
        planes = shown if len(self.stamp) > 1 else shown.sum(keepdims=True)
        return _products(self.maps, planes, self.stamp)


def _products(maps: np.ndarray, planes: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return the sums over pixels of maps (k, y, x) times the sum of images (plane, y, x) with weights."""
    total = planes[0] * images[0] if len(images) == 1 else np.tensordot(planes, images, axes=1)
    return maps.reshape(len(maps), -1) @ total.ravel().astype(float)


def shape_slopes(
    problem: Problem,
    layout: Layout,
    changes: Sequence[StampSlopes],
    scene: Scene,
    stamps: Mapping[str, tuple[Box, np.ndarray]],
    shapes: Sequence[Shape],
    channel_weights: np.ndarray,
    progress: bool = False,
) -> scipy.sparse.csr_matrix:
    """Return the derivatives of measured shapes along the coordinates of the vector, free images held fixed.

    Parameters
    ----------
    problem, layout
        Of the scene, as `posterior.build` gives them.
    changes : sequence of StampSlopes
        `stamp_slopes` of the problem.
    scene : Scene
    stamps : dict of (Box, array)
        `Scene.stamps`.
    shapes : sequence of Shape
        What `measure_shapes` finds, one a source.
    channel_weights : array, shape (channel,)
        Those of the measurement.
    progress : bool
        Whether to show a progress bar if it takes more than two seconds.

    Returns
    -------
    sparse matrix, shape (source * NUM_MEASURES, n)
        For each source center (y, x), moments (yy, xy, xx) and squared radii, in pixels; NaN for the shape of a source without
        light. Squares of radii are taken to grow as those of the image, model PSF included, do.
    """
    parts = _measured_parts(scene, stamps, shapes, channel_weights, progress)
    index = np.asarray(problem.index)
    rows, columns, values = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)]
    for path, coordinate, slopes in _slopes(problem, layout, changes, parts, index):
        rows.append(parts[path].row + np.arange(NUM_MEASURES))
        columns.append(np.full(NUM_MEASURES, coordinate))
        values.append(slopes)
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    # Tied elements share a coordinate; their slopes are added up.
    result = scipy.sparse.csr_matrix(entries, shape=(len(shapes) * NUM_MEASURES, len(problem.lowest.vector)))
    result.eliminate_zeros()
    return result


def _measured_parts(scene: Scene, stamps, shapes, channel_weights, progress: bool) -> dict[str, _Part]:
    """Return all components of a scene, by path."""
    psf_sigma, channels = model_psf_sigma(scene.frame), scene.frame.channels
    result = {}
    sources = list(zip(scene.sources.items(), shapes, strict=True))
    for number, ((name, source), shape) in enumerate(with_progress(sources, "errors of shapes", progress)):
        box, image = source_image(scene, name, stamps, channel_weights)
        is_centered = has_own_center(source)
        maps = _influence(image, shape, np.array(box.origin), psf_sigma, is_centered)
        for path, part in source.components(f"sources.{name}"):
            place, stamp = stamps[path]
            own = maps[:, *place.shift((-box.origin[0], -box.origin[1])).slices]
            flux = np.asarray(part.spectrum.evaluate(channels), dtype=float) * channel_weights
            result[path] = _Part(
                NUM_MEASURES * number, is_centered, own, stamp, flux, channel_weights, part.spectrum.layout(channels)
            )
    return result


def _slopes(problem: Problem, layout: Layout, changes, parts: dict[str, _Part], index: np.ndarray) -> Iterator:
    """Yield path, coordinate and the slopes of the measures along it, for all elements of components."""
    fluxes = zip(layout.members, flux_coordinates(problem, layout), strict=True)
    for member, (coordinates, units) in fluxes:
        for entry, (coordinate, unit) in enumerate(zip(coordinates, units, strict=True)):
            if coordinate >= 0:
                yield member.path, coordinate, unit * parts[member.path].along_flux(entry)
    members = {(member.stack, member.row): member for member in layout.members}
    slot, _ = slot_of_elements(problem)
    stamps = [np.asarray(each.stamps) for each in changes]
    for leaf in problem.leaves:
        if leaf.kind != "stack" or leaf.name == "flux":
            continue
        for (row, entry), element in np.ndenumerate(leaf.elements()):
            if (leaf.number, row) not in members:
                continue
            member = members[leaf.number, row]
            part = parts[member.path]
            if part.is_centered and leaf.name == "center":
                yield member.path, index[element], (np.arange(NUM_MEASURES) == entry).astype(float)
            else:
                change = stamps[leaf.number][(slot[element], row, slice(None), *member.window)]
                yield member.path, index[element], part.along_shape(change)


def _influence(image: np.ndarray, shape: Shape, origin: np.ndarray, psf_sigma: float, is_centered: bool) -> np.ndarray:
    """Return the influence functions of the measures on an image's pixels, shape (measure, h, w); NaN for one without light.

    Parameters
    ----------
    image : array, shape (h, w)
    shape : Shape
        Of the image.
    origin : array, shape (2,)
        First pixel of the image on the frame.
    psf_sigma : float
    is_centered : bool
        Whether the center isn't measured, but given.
    """
    if not (image.sum() > 0 and np.isfinite(shape.moments).all()):
        unknown = np.full((NUM_MEASURES, *image.shape), np.nan)
        unknown[:2] = 0.0 if is_centered else np.nan
        return unknown
    center = shape.center - origin
    of_moments = _moment_influence(image, center, shape.moments + (psf_sigma**2 + SMOOTHING**2) * np.eye(2))
    if is_centered:
        of_moments[:2] = 0.0
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    dy, dx = y - center[0], x - center[1]
    distance = np.hypot(dy, dx)
    coefficients = ndimage.spline_filter(image, order=3, mode="mirror")
    of_radii = []
    for fraction in FRACTIONS:
        radius = growth_radius(image, center, fraction)
        edge, outwards = _light_at(coefficients, center, radius)
        inside = np.clip(radius - distance + 0.5, 0.0, 1.0)
        # A free image may be dark there.
        slope = -2 * radius / edge if edge > 0 else np.nan
        of_radii.append(slope * (inside - fraction + np.tensordot(outwards, of_moments[:2], axes=1)))
    return np.concatenate([of_moments, of_radii])


def _light_at(coefficients: np.ndarray, center: np.ndarray, radius: float) -> tuple[float, np.ndarray]:
    """Return the integral of an image, of which the coefficients of splines are given, over a circle, and over its normal (y, x).

    Averaged over a pixel along the radius, as the curve of growth is, but from interpolated values: those on the pixels near
    the circle come and go with the radius, so that the curve of growth has slopes that are off by a tenth here and there.
    """
    angles = 2 * np.pi * (np.arange(NUM_ANGLES) + 0.5) / NUM_ANGLES
    normals = np.stack([np.sin(angles), np.cos(angles)])
    # Three nodes of Gauss and Legendre.
    total, outwards = 0.0, np.zeros(2)
    for step, share in zip(np.sqrt(0.15) * np.array([-1.0, 0.0, 1.0]), np.array([5, 8, 5]) / 18, strict=True):
        at = max(radius + step, 0.0)
        places = center[:, None] + at * normals
        values = ndimage.map_coordinates(coefficients, places, order=3, mode="constant", prefilter=False)
        total += share * 2 * np.pi * at * values.mean()
        outwards += share * 2 * np.pi * at * (normals * values).mean(axis=1)
    return total, outwards


def _moment_influence(image: np.ndarray, center: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Return the influence functions of center and adaptive moments, shape (5, h, w).

    The smoothed image S has them where the sums of S w g vanish, with w = exp(-d.M^-1 d / 2) for offsets d from the center,
    and g the components of d and 2 d d^T - M.
    """
    height, width = image.shape
    padded = np.pad(image, 2 * MARGIN)
    # All that the weights see, once smoothed.
    rows, columns = weighted_window(padded.shape, center + 2 * MARGIN, moments)
    window = tuple(slice(max(part.start - MARGIN, 0), part.stop + MARGIN) for part in (rows, columns))
    smooth = ndimage.gaussian_filter(padded[window], SMOOTHING, mode="constant")
    y, x = np.mgrid[: smooth.shape[0], : smooth.shape[1]]
    dy, dx = (each + part.start - 2 * MARGIN - c for each, part, c in zip((y, x), window, center, strict=True))
    inverse = np.linalg.inv(moments)
    uy, ux = inverse[0, 0] * dy + inverse[0, 1] * dx, inverse[0, 1] * dy + inverse[1, 1] * dx
    weight = np.exp(-0.5 * (uy * dy + ux * dx))
    (yy, yx), (_, xx) = moments
    terms = np.stack([dy, dx, 2 * dy**2 - yy, 2 * dy * dx - yx, 2 * dx**2 - xx])
    # Derivatives of the sums along center and moments: those of w, then those of g.
    slopes = np.stack([uy, ux, 0.5 * uy**2, uy * ux, 0.5 * ux**2])
    matrix = (terms * (smooth * weight)).reshape(5, -1) @ slopes.reshape(5, -1).T
    total, first_y, first_x = ((smooth * weight * each).sum() for each in (1.0, dy, dx))
    matrix -= total * np.eye(5)
    matrix[2:, 0] -= [4 * first_y, 2 * first_x, 0.0]
    matrix[2:, 1] -= [0.0, 2 * first_y, 4 * first_x]
    # What an image is summed with after smoothing is what it is summed with before, smoothed.
    kernels = np.stack([ndimage.gaussian_filter(weight * term, SMOOTHING, mode="constant") for term in terms])
    maps = np.zeros((5, *padded.shape))
    maps[(slice(None), *window)] = -np.linalg.solve(matrix, kernels.reshape(5, -1)).reshape(kernels.shape)
    return maps[:, 2 * MARGIN : 2 * MARGIN + height, 2 * MARGIN : 2 * MARGIN + width]
