"""Measurements of model sources: moments, sizes, positions."""

from __future__ import annotations

import enum

import equinox as eqx
import numpy as np

from scenefit.model.packing import model_psf_sigma
from scenefit.model.scene import Scene
from scenefit.model.source import AbstractSource, Source


class Flag(enum.IntFlag):
    """What a user of a catalogue row should know; bits of the column `flags`."""

    EDGE = 1
    """The source's stamp reaches the edge of the model frame."""
    NO_DATA = 2
    """At least one channel has no valid pixel: its flux is NaN, its error infinite."""
    NOT_CONVERGED = 4
    """The fit ended before it met its tolerance."""
    ZERO_FLUX = 8
    """The flux is at its lower bound in at least one channel that has data."""
    VANISHED = 16
    """No light is left in any channel: shape and position are meaningless."""


class Shape(eqx.Module):
    """Shape of a source's light on the frame, the model PSF taken out.

    Attributes
    ----------
    center : array, shape (2,)
        (y, x) in pixels.
    half_light_radius : float
        Radius, in pixels, of the circle around the center that holds half the light.
    moments : array, shape (2, 2)
        Second moments of the elliptical Gaussian that matches the light best, pixels squared, (y, x) order.
    """

    center: np.ndarray
    half_light_radius: float
    moments: np.ndarray


def measure_shape(scene: Scene, name: str) -> Shape:
    """Measure a source on its noise-free model image, all channels added.

    Moments are weighted with the matched Gaussian itself (adaptive moments: Bernstein & Jarvis 2002, AJ 123, 583,
    doi:10.1086/338085), which noise in the outskirts hardly changes; the model PSF's moments are subtracted.
    """
    image = scene.evaluate([name]).sum(axis=0)
    sigma = model_psf_sigma(scene.frame)
    source = scene.sources[name]
    start = _first_center(source)
    if not image.sum() > 0:
        return Shape(start, float("nan"), np.full((2, 2), np.nan))
    center, moments = _adaptive_moments(image, start)
    if isinstance(source, Source) and "image" not in source.morphology.constraints:
        center = start
    radius = _half_light_radius(image, center)
    intrinsic = np.sqrt(max(radius**2 - 2 * np.log(2) * sigma**2, 0.0))
    return Shape(center, float(intrinsic), moments - sigma**2 * np.eye(2))


def _first_center(source: AbstractSource) -> np.ndarray:
    """Return the position of a source's first component."""
    return np.asarray(next(iter(source.components("")))[1].center, dtype=float)


def _adaptive_moments(image: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return centroid and second moments of the Gaussian that fits the image best."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(float)
    center, moments = start.copy(), 4.0 * np.eye(2)
    for _ in range(100):
        dy, dx = y - center[0], x - center[1]
        inverse = np.linalg.inv(moments)
        weight = image * np.exp(-0.5 * (inverse[0, 0] * dy**2 + 2 * inverse[0, 1] * dy * dx + inverse[1, 1] * dx**2))
        total = weight.sum()
        if not total > 0:
            break
        step = np.array([(weight * dy).sum(), (weight * dx).sum()]) / total
        dy, dx = dy - step[0], dx - step[1]
        cross = (weight * dy * dx).sum()
        # A Gaussian times itself has half its moments.
        measured = 2 * np.array([[(weight * dy**2).sum(), cross], [cross, (weight * dx**2).sum()]]) / total
        change = np.abs(measured - moments).max() / np.trace(moments)
        center, moments = center + step, measured
        if np.linalg.det(moments) <= 1e-6 or change < 1e-5:
            break
    return center, moments


def _half_light_radius(image: np.ndarray, center: np.ndarray) -> float:
    """Return the radius of the circle around `center` that holds half of the image's sum."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    radius = np.hypot(y - center[0], x - center[1]).ravel()
    order = np.argsort(radius)
    growth = np.cumsum(image.ravel()[order])
    # Pixels enter as discs of their own area: their light is spread evenly over radius half a pixel either side.
    smooth = np.interp(np.linspace(0, radius.max(), 20 * int(radius.max()) + 2), radius[order], growth)
    grid = np.linspace(0, radius.max(), len(smooth))
    return float(np.interp(0.5 * growth[-1], np.maximum.accumulate(smooth), grid))
