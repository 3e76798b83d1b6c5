"""What is wrong with fluxes because no model of a galaxy is right, noise apart."""

from __future__ import annotations

import numpy as np

from scenefit.model.morphology import PointMorphology
from scenefit.model.scene import Scene

OWN_LIGHT, OTHERS_LIGHT = 0.015, 0.03
"""Error of a galaxy's flux in parts of itself, and of the light of others that lies over its own."""
MOST_DROWNED = 0.99
"""Blendedness that counts at most."""


def flux_model_errors(scene: Scene, flux: np.ndarray, blendedness: np.ndarray) -> np.ndarray:
    """Return the errors of fluxes that come from the shapes of models, shape (source, channel).

    Galaxies have arms, clumps and outskirts that no smooth profile has. How far that moves the flux of one of them, and how much
    light of its neighbours it moves to it, was measured on simulated fields of galaxies with clumps and bulges, seen from space
    and from the ground (`benchmarks/blend_photometry.py`). Both move the fluxes of all channels together. Points have no such
    error: their shape is that of the PSF.

    Parameters
    ----------
    scene : Scene
    flux : array, shape (source, channel)
    blendedness : array, shape (source, channel)
        As `measure_footprints` has it: b / (1 - b) is the light of others over the source's own, each weighted with the source's.
        Where it is unknown (NaN) there are no others.
    """
    shown = np.clip(np.nan_to_num(blendedness), 0.0, MOST_DROWNED)
    overlap = shown / (1 - shown)
    is_extended = [
        any(not isinstance(part.morphology, PointMorphology) for _, part in source.components(""))
        for source in scene.sources.values()
    ]
    error = np.abs(flux) * np.hypot(OWN_LIGHT, OTHERS_LIGHT * overlap)
    return np.where(np.array(is_extended, bool).reshape(-1, 1), error, 0.0)
