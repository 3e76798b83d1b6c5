"""Measurements of model sources: moments, sizes, positions."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import equinox as eqx
import numpy as np
import scipy.optimize
from scipy import ndimage

from scenefit.infer.progress import with_progress
from scenefit.model.morphology import AbstractImageMorphology
from scenefit.model.packing import model_psf_sigma
from scenefit.model.scene import Scene
from scenefit.model.source import Source

SMOOTHING = 1.0
"""Standard deviation, in pixels, of the Gaussian that an image is smoothed with before its moments are taken: a matched
weight as narrow as the model PSF would be sampled too coarsely. Taken out again."""


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
    AT_BOUND = 32
    """A shape parameter is at the end of its range, such as the largest Sersic index: it isn't measured."""


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


def measure_shapes(
    scene: Scene, channel_weights: Sequence[float] | np.ndarray | None = None, progress: bool = False
) -> list[Shape]:
    """Measure every source on its noise-free model image, the channels added with weights.

    Moments are weighted with the matched Gaussian itself (adaptive moments: Bernstein & Jarvis 2002, AJ 123, 583,
    doi:10.1086/338085), which noise in the outskirts hardly changes; the model PSF's moments are subtracted.

    Parameters
    ----------
    scene : Scene
    channel_weights : array, shape (channel,), optional
        What the flux of a channel is multiplied with before all are added, best the inverse of its standard error. By
        default the inverse of the channel's flux in the whole scene. Only ratios matter.
    progress : bool
        Whether to show a progress bar if it takes more than two seconds.

    Returns
    -------
    list of Shape
        One a source, in order.
    """
    channels = scene.frame.channels
    spectra = {path: np.asarray(c.spectrum.evaluate(channels), dtype=float) for path, c in scene.components()}
    if channel_weights is None:
        total = np.sum([np.zeros(len(channels)), *spectra.values()], axis=0)
        channel_weights = np.where(total > 0, 1 / np.where(total > 0, total, 1.0), 0.0)
    stamps, sigma = scene.stamps(), model_psf_sigma(scene.frame)
    result = []
    for name, source in with_progress(scene.sources.items(), "shapes", progress):
        paths = [path for path, _ in source.components(f"sources.{name}")]
        fluxes = [spectra[path] * channel_weights for path in paths]
        box = stamps[paths[0]][0]
        for path in paths[1:]:
            box = box.union(stamps[path][0])
        image = np.zeros(box.shape)
        for path, flux in zip(paths, fluxes, strict=True):
            part, stamp = stamps[path]
            image[part.shift((-box.origin[0], -box.origin[1])).slices] += np.einsum(
                "c,cyx->yx", flux, np.broadcast_to(stamp, (len(flux), *stamp.shape[1:]))
            )
        first = next(iter(source.components("")))[1]
        is_analytic = isinstance(source, Source) and not isinstance(source.morphology, AbstractImageMorphology)
        start = np.asarray(first.center, dtype=float) - box.origin
        shape = _measure_image(image, start, sigma, is_analytic)
        result.append(Shape(shape.center + box.origin, shape.half_light_radius, shape.moments))
    return result


def _measure_image(image: np.ndarray, start: np.ndarray, psf_sigma: float, keep_center: bool) -> Shape:
    """Measure an image with its center near `start`, or there (`keep_center`)."""
    if not image.sum() > 0:
        return Shape(start, float("nan"), np.full((2, 2), np.nan))
    margin = int(np.ceil(4 * SMOOTHING))
    smooth = ndimage.gaussian_filter(np.pad(image, margin), SMOOTHING, mode="constant")
    center, moments = _adaptive_moments(smooth, start + margin)
    center = start if keep_center else center - margin
    moments = moments - (psf_sigma**2 + SMOOTHING**2) * np.eye(2)
    # As if all were Gaussian; a pixel has the variance 1/12.
    squared = _half_light_radius(image, center) ** 2 - 2 * np.log(2) * (psf_sigma**2 + 1 / 12)
    return Shape(center, float(np.sqrt(max(squared, 0.0))), moments)


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
    """Return the radius of the circle around `center` that holds half of the image's sum.

    The light of a pixel is spread evenly over radii half a pixel either side, as if the image were convolved with a pixel.
    """
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    radius = np.hypot(y - center[0], x - center[1])

    def excess(limit):
        return float((image * np.clip(limit - radius + 0.5, 0.0, 1.0)).sum() - 0.5 * image.sum())

    return float(scipy.optimize.brentq(excess, 0.0, radius.max() + 0.5, xtol=1e-4))
