"""Where the components of a scene, and its frame, lie in an observation."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import numpy as np
from astropy.coordinates import SkyCoord

from scenefit.arrays.box import Box
from scenefit.arrays.stamps import rounded_up
from scenefit.data.observation import Observation
from scenefit.sky.frame import Frame, pixel_map

PROBE = 8.0
"""Model pixels over which the scale of an observation is measured."""
STEPS = np.concatenate([np.zeros((1, 2)), np.eye(2), -np.eye(2)]) * PROBE
MAX_MISPLACED = 0.05
"""Model pixels by which a pixel may be misplaced that is asked whether it is on the frame."""
WINDOW_DIGITS = 2
"""Leading binary digits of the sides of images that are cut to what lies on the frame: few shapes to compile."""


class Geometry(eqx.Module):
    """Where the components and the frame lie in an observation.

    Attributes
    ----------
    places : array, shape (component, 2)
        (y, x) in the observation.
    jacobian : array, shape (2, 2)
        d(observed)/d(model pixel).
    bend : float
        Largest change of the jacobian over the components in the image: observed pixels per model pixel.
    window : Box
        The part of the observation that holds its pixels on the frame.
    inside : array of bool, shape of the window, or None
        Which are on it; None for all.
    """

    places: np.ndarray
    jacobian: np.ndarray
    bend: float
    window: Box
    inside: np.ndarray | None


def probes(frame: Frame, places: np.ndarray) -> SkyCoord | np.ndarray:
    """Return components at `places` (component, 2) on the frame and points around them, shape (5, component).

    On the sky if the frame has a WCS, else (y, x), shape (5, component, 2).
    """
    probed = places + STEPS[:, None]
    return probed if frame.wcs is None else frame.to_sky(probed)


def geometry(frame: Frame, obs: Observation, places: np.ndarray, on_sky: SkyCoord | np.ndarray) -> Geometry:
    """Return where components lie in an observation, its astrometry included.

    Parameters
    ----------
    frame : Frame
    obs : Observation
    places : array, shape (component, 2)
        (y, x) on the frame.
    on_sky : SkyCoord or array
        Their `probes`.

    Raises
    ------
    ValueError
        If no pixel lies on the frame.
    """
    seen = _seen(frame, obs, places, on_sky)
    jacobians = np.stack([seen[1] - seen[3], seen[2] - seen[4]], axis=-1) / (2 * PROBE)
    at, shape = seen[0], np.array(obs.shape[1:])
    near = np.all((at > -shape / 2) & (at < 1.5 * shape), axis=-1)
    if not near.any():
        near = np.arange(len(at)) == np.argmin(np.abs(at - shape / 2).max(axis=-1))
    jacobian = jacobians[near].mean(axis=0)
    bend = float(np.abs(jacobians[near] - jacobian).max())
    pixels = np.moveaxis(np.indices(obs.shape[1:], float), 0, -1)
    if bend * shape.max() < MAX_MISPLACED and not _is_displaced(obs):
        on_frame = places[near][0] + (pixels - at[near][0]) @ np.linalg.inv(jacobian).T
    else:
        on_frame = pixel_map(obs.wcs, frame.wcs, pixels[..., 0], pixels[..., 1])
    return Geometry(at, jacobian, bend, *_part_inside(frame, obs, on_frame))


def _is_displaced(obs: Observation) -> bool:
    """Return whether an observation shows the sky elsewhere than its WCS says."""
    return bool(obs.astrometry.rotation or obs.astrometry.shift.any())


def _seen(frame: Frame, obs: Observation, places: np.ndarray, on_sky) -> np.ndarray:
    """Return where probes of components lie in an observation, shape (5, component, 2)."""
    if _is_displaced(obs):
        apparent = obs.apparent_positions(places + STEPS[:, None], frame)
        return pixel_map(frame.wcs, obs.wcs, apparent[..., 0], apparent[..., 1])
    wcs: Any = obs.wcs
    if wcs is not None and isinstance(on_sky, SkyCoord):
        x, y = wcs.world_to_pixel(on_sky)
        return np.stack([y, x], axis=-1)
    return on_sky


def _part_inside(frame: Frame, obs: Observation, on_frame: np.ndarray) -> tuple[Box, np.ndarray | None]:
    """Return the part of an observation on the frame, and which of its pixels, at `on_frame` (y, x, 2), are (None: all)."""
    half = np.array(frame.box.shape) / 2 + 1e-6
    inside = np.all(np.abs(on_frame - frame.center) < half, axis=-1)
    if inside.all():
        return Box(inside.shape), None
    if not inside.any():
        raise ValueError(f"No pixel of {obs.name} lies on the model frame of {frame.box.shape} pixels.")
    bounds = []
    for axis, count in enumerate(inside.shape):
        (used,) = np.nonzero(inside.any(axis=1 - axis))
        size = min(rounded_up(int(used[-1] - used[0] + 1), WINDOW_DIGITS), count)
        first = int(min(used[0], count - size))
        bounds.append((first, first + size))
    window = Box.from_bounds(*bounds)
    return window, inside[window.slices]
