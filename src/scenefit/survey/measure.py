"""Measurements of model sources: moments, sizes, positions."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

import equinox as eqx
import numpy as np
import scipy.optimize
from scipy import ndimage

from scenefit.arrays.box import Box
from scenefit.arrays.progress import with_progress
from scenefit.model.morphology import AbstractImageMorphology
from scenefit.model.packing import model_psf_sigma
from scenefit.model.scene import Scene
from scenefit.model.source import AbstractSource, Source

SMOOTHING = 1.0
"""Standard deviation, in pixels, of the Gaussian that an image is smoothed with before its moments are taken: a matched
weight as narrow as the model PSF would be sampled too coarsely. Taken out again."""
MARGIN = int(np.ceil(4 * SMOOTHING))
"""Pixels around an image that its light is smoothed into."""


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
    weights = default_channel_weights(scene) if channel_weights is None else np.asarray(channel_weights, dtype=float)
    stamps, sigma = scene.stamps(), model_psf_sigma(scene.frame)
    result = []
    for name, source in with_progress(scene.sources.items(), "shapes", progress):
        box, image = source_image(scene, name, stamps, weights)
        first = next(iter(source.components("")))[1]
        start = np.asarray(first.center, dtype=float) - box.origin
        shape = _measure_image(image, start, sigma, has_own_center(source))
        result.append(Shape(shape.center + box.origin, shape.half_light_radius, shape.moments))
    return result


def default_channel_weights(scene: Scene) -> np.ndarray:
    """Return the inverse of each channel's flux in the whole scene, shape (channel,); 0 where there is none."""
    channels = scene.frame.channels
    spectra = [np.asarray(c.spectrum.evaluate(channels), dtype=float) for _, c in scene.components()]
    total = np.sum([np.zeros(len(channels)), *spectra], axis=0)
    return np.where(total > 0, 1 / np.where(total > 0, total, 1.0), 0.0)


def has_own_center(source: AbstractSource) -> bool:
    """Return whether a source is where its center says: one profile, no sum of parts and no free image."""
    return isinstance(source, Source) and not isinstance(source.morphology, AbstractImageMorphology)


def source_image(
    scene: Scene, name: str, stamps: Mapping[str, tuple[Box, np.ndarray]], channel_weights: np.ndarray
) -> tuple[Box, np.ndarray]:
    """Return where a source's light is, and its image there, the channels added with weights.

    Parameters
    ----------
    scene : Scene
    name : str
        Of the source.
    stamps : dict of (Box, array)
        Of all components of the scene, as `Scene.stamps` gives them.
    channel_weights : array, shape (channel,)

    Returns
    -------
    box : Box
        On the frame: that of all parts together.
    image : array, shape (h, w)
    """
    parts = list(scene.sources[name].components(f"sources.{name}"))
    box = stamps[parts[0][0]][0]
    for path, _ in parts[1:]:
        box = box.union(stamps[path][0])
    image = np.zeros(box.shape)
    for path, part in parts:
        place, stamp = stamps[path]
        flux = np.asarray(part.spectrum.evaluate(scene.frame.channels), dtype=float) * channel_weights
        image[place.shift((-box.origin[0], -box.origin[1])).slices] += np.einsum(
            "c,cyx->yx", flux, np.broadcast_to(stamp, (len(flux), *stamp.shape[1:]))
        )
    return box, image


def _measure_image(image: np.ndarray, start: np.ndarray, psf_sigma: float, keep_center: bool) -> Shape:
    """Measure an image with its center near `start`, or there (`keep_center`)."""
    if not image.sum() > 0:
        return Shape(start, float("nan"), np.full((2, 2), np.nan))
    smooth = ndimage.gaussian_filter(np.pad(image, MARGIN), SMOOTHING, mode="constant")
    center, moments = _adaptive_moments(smooth, start + MARGIN)
    center = start if keep_center else center - MARGIN
    moments = moments - (psf_sigma**2 + SMOOTHING**2) * np.eye(2)
    squared = _half_light_radius(image, center) ** 2 - blurring(psf_sigma)
    return Shape(center, float(np.sqrt(max(squared, 0.0))), moments)


def blurring(psf_sigma: float) -> float:
    """Return what the model PSF and a pixel add to the square of a half-light radius, as if all were Gaussian."""
    # A pixel has the variance 1/12.
    return 2 * np.log(2) * (psf_sigma**2 + 1 / 12)


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
