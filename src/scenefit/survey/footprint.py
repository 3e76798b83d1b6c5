"""What a source's pixels say of its measurement: overlap with others, missing pixels, goodness of fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_floats, compiled
from scenefit.data.abstractnoise import AbstractNoise
from scenefit.data.observation import Observation
from scenefit.model.scene import Scene
from scenefit.survey.deblend import Cutout, source_cutouts, total_image, unit_images

FOOTPRINT_LIGHT = 0.8
"""Fraction of a source's light that its footprint holds."""
LEAST_LIGHT = 1e-5
"""Fractions of a source's light below this are rounding: a pixel, or all that an observation sees of it."""


class FootprintMeasures(NamedTuple):
    """What is measured on the footprints of all sources.

    The footprint of a source in a channel is made of the pixels where its model is brightest, as many as it takes to hold 80 % of
    its light. Where several observations have the channel, sums go over all of them; `seen` is that of the one that sees most.

    blendedness : array, shape (source, channel)
        `1 - sum(m_s^2) / sum(m_s m)`, with the model m_s of the source and m of all: 0 for a source by itself, 1 for one that
        drowns in the light of others; NaN where the second sum isn't positive or nothing is seen. Observations count by their
        inverse variance.
    seen : array, shape (source, channel)
        Fraction of the flux on pixels with information.
    chi_square : array, shape (source, channel)
        Sum of the squares of whitened residuals in the footprint.
    num_pixels : array, shape (source, channel)
        Independent numbers among them: what the chi-square is on average where the model is right.
    """

    blendedness: np.ndarray
    seen: np.ndarray
    chi_square: np.ndarray
    num_pixels: np.ndarray


def measure_footprints(
    scene: Scene,
    observations: Sequence[Observation],
    stamps: Mapping[str, tuple[Box, np.ndarray]],
    progress: bool = False,
) -> FootprintMeasures:
    """Measure all sources on their footprints.

    Parameters
    ----------
    scene : Scene
    observations : sequence of Observation
        Matched.
    stamps : dict of (Box, array)
        `Scene.stamps`.
    progress : bool
        Whether to show a progress bar if it takes more than two seconds.

    References
    ----------
    Bosch et al. 2018, PASJ 70, S5, section 4.9.11, doi:10.1093/pasj/psx080 (blendedness; without their weight function).
    """
    names = list(scene.sources)
    images = unit_images(scene, names, stamps)
    model = total_image(scene.frame, [(each.box, each.light) for each in images.values()])
    shape = (len(names), len(scene.frame.channels))
    own, shared, chi_square = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    seen, num_pixels = np.zeros(shape), np.zeros(shape, int)
    for obs in observations:
        channels = np.array(obs.matched_renderer.channels)
        cutouts = source_cutouts(scene, obs, images, progress, in_units=True)
        background = obs.background_image()
        rendered = obs.render(model)
        squares, modes = _squares(obs, rendered)
        known, light = obs.compared, rendered - background
        weight = 1 / obs.noise.level() ** 2
        for n, name in enumerate(names):
            window = (slice(None), *cutouts[name].box.slices)
            alone, each = cutouts[name].image, images[name]
            own[n, channels] += weight * each.unit[channels] * (alone**2).sum(axis=(1, 2))
            shared[n, channels] += weight * (alone * light[window]).sum(axis=(1, 2))
            total = each.image[channels].sum(axis=(1, 2)) * obs.calibration.flux_scale
            part = (alone * known[window]).sum(axis=(1, 2)) / np.where(total != 0, total, np.nan)
            seen[n, channels] = np.fmax(seen[n, channels], part)
            inside = _footprint(cutouts[name], total)
            chi_square[n, channels] += (squares[window] * inside).sum(axis=(1, 2))
            num_pixels[n, channels] += (modes[window] & inside).sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        is_known = (shared > 0) & (seen > LEAST_LIGHT)
        blendedness = np.clip(1 - own / np.where(is_known, shared, np.nan), 0.0, 1.0)
    return FootprintMeasures(blendedness, seen, chi_square, num_pixels)


def _squares(obs: Observation, rendered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return squares of whitened residuals, and which of them are independent numbers, shape (channel, y, x)."""
    seen, unit = obs.on_frame(), obs.noise.level()[:, None, None]
    residual = np.where(seen.noise.valid, obs.data - rendered, 0.0) / unit
    whitened = np.asarray(_whitened(seen.noise.scaled(obs.noise.level()), as_floats(residual)), float)
    modes = np.asarray(seen.noise.modes)
    return np.where(modes, whitened, 0.0) ** 2, modes


@compiled
def _whitened(noise: AbstractNoise, residual):
    """Return `noise.whiten(residual)`."""
    return noise.whiten(residual)


def _footprint(cutout: Cutout, total: np.ndarray) -> np.ndarray:
    """Return the brightest pixels that hold a source's light up to `FOOTPRINT_LIGHT`, shape (channel, h, w)."""
    flat = cutout.image.reshape(len(total), -1)
    order = np.argsort(-flat, axis=1)
    growth = np.cumsum(np.take_along_axis(flat, order, axis=1), axis=1)
    brightest = np.zeros(flat.shape, bool)
    # The pixel that takes the sum beyond belongs to it.
    before = np.pad(growth, ((0, 0), (1, 0)))[:, :-1]
    kept = (before < FOOTPRINT_LIGHT * total[:, None]) & (
        np.take_along_axis(flat, order, axis=1) > LEAST_LIGHT * total[:, None]
    )
    np.put_along_axis(brightest, order, kept, axis=1)
    return brightest.reshape(cutout.image.shape)
