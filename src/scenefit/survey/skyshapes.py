"""Sizes and orientations on the sky, from shapes on the model frame, and how they change with these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from scenefit.sky.frame import Frame
from scenefit.survey.measure import FRACTIONS, Shape, radius_name
from scenefit.survey.sensitivity import NUM_MEASURES

UNRESOLVED = 0.03
"""Second moment along the major axis, in model pixels squared, below which a source has no axis ratio or angle."""
SHAPE_NAMES = ("y", "x", "ra", "dec", *map(radius_name, FRACTIONS), "axis_ratio", "position_angle")
"""Columns of a catalogue that `sky_shapes` has slopes of; of radii, the squares."""
ROUND = 1e-6
"""Relative difference of the moments along the axes below which a source has no direction."""


def sky_shapes(shapes: Sequence[Shape], frame: Frame) -> tuple[np.ndarray, np.ndarray, scipy.sparse.csr_matrix]:
    """Return axis ratios and position angles [deg] on the sky, and derivatives.

    The derivatives, shape (source * column, source * measure), are those of y, x, east, north, the squares of the radii, axis
    ratio and position angle along what `shape_slopes` is about.
    """
    # d(y, x) / d(east, north); without a WCS the columns stand for x and y.
    inverse = np.linalg.inv(frame.sky_jacobian())
    scale = np.sqrt(abs(np.linalg.det(inverse)))
    frame_area = 1 / scale**2
    ratio, angle = np.full(len(shapes), np.nan), np.full(len(shapes), np.nan)
    slopes = np.zeros((len(shapes), len(SHAPE_NAMES), NUM_MEASURES))
    slopes[:, :2, :2], slopes[:, 2:4, :2] = np.eye(2), inverse
    slopes[:, 4:-2, 5:] = scale**2 * np.eye(len(FRACTIONS))
    slopes[:, -2:, 2:5] = np.nan
    for n, shape in enumerate(shapes):
        moments = inverse @ shape.moments @ inverse.T
        if not np.isfinite(moments).all():
            continue
        values, vectors = np.linalg.eigh(moments)
        if values[1] * frame_area < UNRESOLVED:
            continue
        ratio[n] = np.sqrt(np.clip(values[0] / values[1], 0, 1))
        first, second = vectors[:, 1]
        angle[n] = np.rad2deg(np.arctan2(first, second) if frame.wcs is not None else np.arctan2(second, first)) % 180
        slopes[n, -2:, 2:5] = _axis_slopes(values, inverse.T @ vectors)
    # Without the zeros, or the NaN of one quantity would be that of all.
    source, row, column = np.nonzero(slopes)
    entries = slopes[source, row, column], (source * len(SHAPE_NAMES) + row, source * NUM_MEASURES + column)
    size = (len(shapes) * len(SHAPE_NAMES), len(shapes) * NUM_MEASURES)
    return ratio, angle, scipy.sparse.csr_matrix(entries, shape=size)


def _axis_slopes(values: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Return the derivatives of axis ratio and angle [deg] along the moments (yy, xy, xx) of the frame, shape (2, 3).

    Parameters
    ----------
    values : array, shape (2,)
        Moments along the axes on the sky, the smaller first.
    axes : array, shape (2, axis)
        What the moments on the frame are multiplied with from both sides to have those on the sky.
    """
    minor, major = axes.T

    def product(a, b):
        return np.array([a[0] * b[0], a[0] * b[1] + a[1] * b[0], a[1] * b[1]])

    if values[0] <= 0:
        return np.full((2, 3), np.nan)
    ratio = np.sqrt(values[0] / values[1])
    of_ratio = 0.5 * ratio * (product(minor, minor) / values[0] - product(major, major) / values[1])
    difference = max(values[1] - values[0], ROUND * values[1])
    return np.stack([of_ratio, np.rad2deg(product(minor, major) / difference)])
