"""What a detection searches in: the planes of all observations, and the sources so far."""

from __future__ import annotations

from typing import NamedTuple

import astropy.units as u
import equinox as eqx
import numpy as np
from jax import Array

from scenefit.model.scene import Scene
from scenefit.sky.frame import Frame
from scenefit.survey.candidates import HALF_LIGHT, Candidate, Host
from scenefit.survey.envelopes import psf_width
from scenefit.survey.outliers import without_outliers
from scenefit.survey.significance import ALIKE, Layer, Sky
from scenefit.survey.subtraction import RingShape, sharp_image


class Entry(NamedTuple):
    """A source so far: a candidate, its row in the catalogue (-1: none), and whether the data show it."""

    candidate: Candidate
    row: int
    is_detected: bool


class Search(NamedTuple):
    """What does not change from one look to the next: `pulls` and `planes` of the data, `image` of the sharpest observations."""

    sky: Sky
    frame: Frame
    layers: list[Layer]
    pulls: list[Array]
    planes: np.ndarray
    scene_planes: np.ndarray
    image: np.ndarray
    known: list[tuple[str, Host]]
    threshold: float
    unit: u.UnitBase


def search_in(frame: Frame, observations, scales, threshold, scene) -> tuple[Search, dict[str, np.ndarray]]:
    """Return what to search in, and the pixels of each observation that are left out."""
    model = None if scene is None else scene.evaluate(outer=True)
    residuals, outliers, cleaned = [], {}, []
    for obs in observations:
        sky = obs.background_image()
        known = sky if model is None else obs.render(model)
        residual = np.where(obs.noise.valid, obs.data - known, 0.0)
        residual, outliers[obs.name] = without_outliers(obs, residual)
        residuals.append(residual)
        cleaned.append(eqx.tree_at(lambda o: o.data, obs, residual + sky))
    sky = Sky.build(frame, observations, residuals, scales)
    pulls = sky.pull(np.zeros(frame.shape))
    planes, scene_planes = sky.coadded(pulls), np.zeros((len(sky.groups), len(sky.sizes), *sky.shape))
    if model is not None:
        scene_planes = planes - sky.coadded(sky.pull(model[(slice(None), *frame.inner_box.slices)]))
    widths = np.array([psf_width(frame, obs) for obs in observations])
    search = Search(
        sky=sky,
        frame=frame,
        layers=sky.layers(),
        pulls=pulls,
        planes=planes,
        scene_planes=scene_planes,
        image=sharp_image(frame, cleaned, widths, ALIKE),
        known=[] if scene is None else _known(sky, scene),
        threshold=threshold,
        unit=u.nJy if all(obs.flux_unit == "nJy" for obs in observations) else u.dimensionless_unscaled,
    )
    return search, outliers


def _known(sky: Sky, scene: Scene) -> list[tuple[str, Host]]:
    """Return the sources of a scene as hosts."""
    result = []
    for (path, component), (box, image) in zip(scene.components(), scene.stamps().values(), strict=True):
        flux = np.asarray(component.spectrum.evaluate(scene.frame.channels), dtype=float) / sky.unit
        y, x = np.mgrid[box.slices]
        distance = np.hypot(y - component.center[0], x - component.center[1]).ravel()
        order = np.argsort(distance)
        light = np.cumsum(np.maximum(image.mean(axis=0).ravel()[order], 0.0))
        radius = float(distance[order][np.searchsorted(light, 0.5 * light[-1])]) if light[-1] > 0 else 0.0
        own = HALF_LIGHT * float(scene.frame.psf.effective_sigma[0])
        name = path.removeprefix("sources.")
        center = np.asarray(component.center, dtype=float)
        result.append((name, Host(center, float(np.sqrt(max(radius**2 - own**2, 0.0))), sky.brightness(flux))))
    return result


def flux_information(sky: Sky, place: np.ndarray, shape: RingShape) -> np.ndarray:
    """Return about what each group of observations knows of the flux of a source, shape (group, channel)."""
    order = np.argsort(sky.sizes)
    sizes = order[sky.sizes[order] >= 0.7 * shape.radius(0.5) / HALF_LIGHT]
    known = []
    for each in sky.information:
        planes = each[(slice(None), slice(None), *place)]
        # The next larger size where a narrow one isn't known.
        used = next((size for size in sizes if planes[size].any()), int(order[-1]))
        known.append(planes[used])
    return np.stack(known)
