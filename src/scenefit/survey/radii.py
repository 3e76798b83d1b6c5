"""Radii of circles that hold given fractions of the light of a source, the model PSF removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from scenefit.arrays.box import Box
from scenefit.arrays.progress import with_progress
from scenefit.infer.fit import FitResult
from scenefit.model.morphology import AbstractRingMorphology, GaussianMorphology, PointMorphology, links
from scenefit.model.packing import model_psf_sigma
from scenefit.survey.ellipses import AbstractLight, GrowthTable, RingLight, SersicLight, outermost_fall
from scenefit.survey.measure import Shape, blurring, growth_radius, source_image
from scenefit.survey.parts import Part, part_of, table_radii


def light_radii(
    result: FitResult,
    shapes: Sequence[Shape],
    channel_weights: np.ndarray,
    fractions: Sequence[float],
    stamps: Mapping[str, tuple[Box, np.ndarray]],
    progress: bool = False,
) -> np.ndarray:
    """Return the radii of circles around the center of each source that hold fractions of its light, the channels added.

    For sums of profiles they are those of the profiles, before any PSF (see `scenefit.survey.ellipses`): good to 1e-4. Those of
    images are measured on their pixels: of the square of each radius is taken what the model PSF and the pixels would add if all
    were Gaussian.

    Parameters
    ----------
    result : FitResult
    shapes : sequence of Shape
        What `measure_shapes` finds.
    channel_weights : array, shape (channel,)
        What the flux of a channel is multiplied with, as in `measure_shapes`.
    fractions : sequence of float
        Between 0 and 1.
    stamps : dict of (Box, array)
        `Scene.stamps`.
    progress : bool
        Whether to show a progress bar if it takes more than two seconds.

    Returns
    -------
    array, shape (source, fraction)
        In model pixels; 0 for a point, NaN for a source whose light doesn't sum to more than 0.
    """
    scene, sigma = result.scene, model_psf_sigma(result.scene.frame)
    radii = np.full((len(scene.sources), len(fractions)), np.nan)
    sources = list(zip(scene.sources.items(), shapes, strict=True))
    for n, ((name, source), shape) in enumerate(with_progress(sources, "radii", progress)):
        components = dict(source.components(f"sources.{name}"))
        if all(isinstance(each.morphology, AbstractRingMorphology) for each in components.values()):
            radii[n] = _profile_radii(result, components, shape.center, channel_weights, fractions)
            continue
        box, image = source_image(scene, name, stamps, channel_weights)
        if image.sum() > 0:
            own = [growth_radius(image, shape.center - box.origin, fraction) for fraction in fractions]
            excess = [blurring(sigma, fraction) for fraction in fractions]
            radii[n] = np.sqrt(np.maximum(np.square(own) - excess, 0.0))
    return radii


def _profile_radii(result: FitResult, components, center, channel_weights, fractions) -> np.ndarray:
    """Return the radii of a sum of profiles."""
    channels = result.scene.frame.channels
    planes = len(channels) if any(links(each.morphology) for each in components.values()) else 1
    parts = [_part(result, channels, path, each, planes) for path, each in components.items()]
    fluxes = np.array([part.flux[0] * channel_weights for part in parts])
    total = fluxes.sum()
    if not total > 0:
        return np.full(len(fractions), np.nan)
    if all(part.is_point for part in parts) and np.ptp([part.center for part in parts], axis=0).max() == 0:
        return np.zeros(len(fractions))
    circles, middle = np.zeros((1, planes, 2)), np.asarray(center, float)[None]
    log_radius = table_radii(parts, middle, circles, None)
    tables = [part.table(log_radius, middle, circles) for part in parts]
    wanted = np.asarray(fractions, float)[:, None]
    nodes = np.broadcast_to(log_radius, (planes, len(log_radius)))

    def missing(log_radius):
        """Return what is missing inside circles at radii (1, fraction, 1), shape (1, fraction, 1)."""
        at = np.broadcast_to(log_radius.ravel(), (planes, log_radius.size))
        return wanted[None] - _growth(tables, fluxes, at)[None, :, None] / total

    at_nodes = wanted - _growth(tables, fluxes, nodes) / total
    radius = outermost_fall(log_radius, at_nodes[None], missing)[0]
    return np.where(at_nodes[:, 0] < 0, 0.0, radius)


def _growth(tables: Sequence[GrowthTable], fluxes: np.ndarray, log_radius: np.ndarray) -> np.ndarray:
    """Return the light inside circles at radii (plane, n), all channels together, shape (n,)."""
    total = np.zeros(log_radius.shape[1])
    for table, flux in zip(tables, fluxes, strict=True):
        growth = table.at(log_radius[None])[1][0]
        total = total + (flux if len(growth) > 1 else flux.sum(keepdims=True)) @ growth
    return total


def _part(result: FitResult, channels, path: str, component, planes: int) -> Part:
    """Return a component, a plain Gaussian or point among them without a detour over the rings of a compiled model."""
    morphology = component.morphology
    light: AbstractLight
    if type(morphology) is PointMorphology:
        light, ellipticity = RingLight(np.zeros((1, planes, 1)), np.ones((1, planes, 1))), np.zeros(2)
    elif type(morphology) is GaussianMorphology and not links(morphology):
        radius = np.broadcast_to(np.asarray(morphology.half_light_radius, float), (1, planes))
        light, ellipticity = SersicLight(np.full((1, planes), 0.5), radius), np.asarray(morphology.ellipticity, float)
    else:
        return jax.tree.map(np.asarray, part_of(result, channels, path, component, planes))
    flux = np.asarray(component.spectrum.evaluate(channels), float)[None]
    center = np.asarray(component.center, float)[None]
    return Part(light=light, flux=flux, center=center, ellipticity=np.broadcast_to(ellipticity, (1, planes, 2)))
