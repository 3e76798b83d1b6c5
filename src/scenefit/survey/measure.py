"""Measurements of model sources: moments, sizes, positions."""

from __future__ import annotations

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
from scenefit.model.source import AbstractSource, CompositeSource, Source

FRACTIONS, INNER_FRACTION = (0.5, 0.8, 0.9), 0.2
"""Of the light, whose radii are measured: those with errors, and one without. Errors come from the image through the model
PSF, which doesn't tell that of a radius so far inside."""
SMOOTHING = 1.0
"""Standard deviation, in pixels, of the Gaussian that an image is smoothed with before its moments are taken: a matched
weight as narrow as the model PSF would be sampled too coarsely. Taken out again."""
CUT = 6.0
"""Standard deviations beyond which a matched weight, of 1e-8 there, is left out."""
MARGIN = int(np.ceil(4 * SMOOTHING))
"""Pixels around an image that its light is smoothed into."""


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
    scene: Scene,
    channel_weights: Sequence[float] | np.ndarray | None = None,
    progress: bool = False,
    *,
    stamps: Mapping[str, tuple[Box, np.ndarray]] | None = None,
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
    stamps : dict of (Box, array), optional
        `Scene.stamps`, if they are known already.

    Returns
    -------
    list of Shape
        One a source, in order.
    """
    weights = default_channel_weights(scene) if channel_weights is None else np.asarray(channel_weights, dtype=float)
    stamps, sigma = scene.stamps() if stamps is None else stamps, model_psf_sigma(scene.frame)
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
    """Return whether a source is where its center says: one profile, or several about one center, and no free image."""
    if isinstance(source, CompositeSource):
        return source.concentric and all(has_own_center(part) for part in source.parts.values())
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
    squared = growth_radius(image, center, 0.5) ** 2 - blurring(psf_sigma)
    return Shape(center, float(np.sqrt(max(squared, 0.0))), moments)


def radius_name(fraction: float) -> str:
    """Return the name of the radius of a circle that holds a fraction of the light: half_light_radius, or r20 and the like."""
    return "half_light_radius" if fraction == 0.5 else f"r{100 * fraction:.0f}"


def blurring(psf_sigma: float, fraction: float = 0.5) -> float:
    """Return what the model PSF and a pixel add to the square of the radius of a fraction of the light, were all Gaussian."""
    # A pixel has the variance 1/12.
    return -2 * np.log1p(-fraction) * (psf_sigma**2 + 1 / 12)


def _adaptive_moments(image: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return centroid and second moments of the Gaussian that fits the image best."""
    center, moments = start.copy(), 4.0 * np.eye(2)
    for _ in range(100):
        window = weighted_window(image.shape, center, moments)
        part = image[window]
        dy, dx = (np.arange(each.start, each.stop) - c for each, c in zip(window, center, strict=True))
        dy = dy[:, None]
        inverse = np.linalg.inv(moments)
        weight = part * np.exp(-0.5 * (inverse[0, 0] * dy**2 + 2 * inverse[0, 1] * dy * dx + inverse[1, 1] * dx**2))
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


def weighted_window(shape: tuple[int, ...], center: np.ndarray, moments: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of an image where a Gaussian weight of these moments is more than nothing."""
    reach = CUT * np.sqrt(np.diag(moments)) + 1
    low = np.clip(np.floor(center - reach), 0, shape).astype(int)
    high = np.clip(np.ceil(center + reach) + 1, low, shape).astype(int)
    return slice(low[0], high[0]), slice(low[1], high[1])


def growth_radius(image: np.ndarray, center: np.ndarray, fraction: float) -> float:
    """Return the radius of the circle around `center` that holds a fraction of the image's sum.

    The light of a pixel is spread evenly over radii half a pixel either side, as if the image were convolved with a pixel.
    """
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    radius, total = np.hypot(y - center[0], x - center[1]), image.sum()

    def excess(limit):
        return float((image * np.clip(limit - radius + 0.5, 0.0, 1.0)).sum() - fraction * total)

    # Half of the pixel in the middle may be more than that.
    return 0.0 if excess(0.0) >= 0 else float(scipy.optimize.brentq(excess, 0.0, radius.max() + 0.5, xtol=1e-4))
