"""A starting point: sources at given positions, with stamps, images and spectra read off the data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import astropy.units as u
import numpy as np
import scipy.sparse
from astropy.coordinates import SkyCoord
from astropy.table import Table

from scenefit.arrays.box import Box
from scenefit.data.observation import Observation
from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.packing import model_psf_sigma
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame, pixel_map
from scenefit.survey.detect import THRESHOLD, detect
from scenefit.survey.envelopes import (
    MAX_ENTRIES,
    RING_SIGMAS,
    Blur,
    Envelope,
    columns,
    detection_image,
    fit_rings,
    psf_width,
    ring_images,
    solve_nonnegative,
)
from scenefit.survey.families import automatic_scene
from scenefit.survey.forced import forced_photometry
from scenefit.survey.listed import catalog_positions, usable_rows

MODELS = ("auto", "pixel", "gaussian", "point")
"""What sources can be made of."""
MIN_HALF_SIZE = 8
"""Smallest half stamp size in model pixels."""
STAMP_FAINT, STAMP_FLUX = 0.03, 0.995
"""A stamp ends where the envelope falls below this fraction of the noise of a pixel, or holds this fraction of the flux."""
PSF_EXTENT, FLUX_STEPS = 3.0, 100
"""The first fluxes: how many standard deviations of the PSF an envelope reaches beyond its stamp, and accelerated gradient
steps for many sources."""


def initialize(
    frame: Frame,
    observations: Sequence[Observation] | Observation,
    catalog: SkyCoord | np.ndarray | Table | None = None,
    *,
    model: str = "auto",
    half_size=None,
    progress: bool = True,
) -> Scene:
    """Place a source at each catalogue position and start it from the data.

    The image with the sharpest PSF gives the shapes: a non-negative sum of elliptical Gaussian rings for every source,
    solved for jointly so that neighbours share the light as least squares has it. (Multi-Gaussian expansion: Emsellem,
    Monnet & Bacon 1994, A&A 285, 723; Cappellari 2002, MNRAS 333, 400.) This envelope is the start of a free-pixel image
    and the mean of its prior. The stamp reaches to where the envelope fades into the noise. The spectra are those with which
    all envelopes together fit each channel best, with Gaussian PSFs; `sf.fit` begins by solving for them exactly.

    Parameters
    ----------
    frame : Frame
    observations : sequence of Observation
    catalog : SkyCoord, array of shape (n, 2), or Table with columns RA and DEC, optional
        Positions on the sky, (y, x) on the frame, or degrees. Without them, sources are detected (`detect`). Of these, those that
        the models of all leave no light are left out, see Notes; positions that are given stay.
    model : "auto", "pixel", "gaussian" or "point"
        What every source is made of: what the sharpest image asks for (`scenefit.survey.families`: points, disks with clumps,
        disks with bulges); free non-negative pixels; an elliptical Gaussian; a point.
    half_size : Quantity, int or None
        Half the side of all stamps of free pixels (a number: model pixels) instead of what the data suggest.
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    Scene
        Sources are named "0", "1", ... by their place in the catalogue. Those outside the frame, and those at the place of one
        before them, are left out, with a warning. If nothing is detected it has no sources, with a warning.

    Raises
    ------
    ValueError
        If the catalogue is empty, has NaN positions, or none of its sources lies in the frame.

    Warns
    -----
    UserWarning
        If detected sources were left out.

    Notes
    -----
    A peak may be detected in what simple models leave of a galaxy, and have no light of its own once that is modelled better.
    With `model="auto"`, a detected source is left out if it is below 5 standard errors both in the profiles fitted to the
    sharpest image and in all images together, where its flux is solved for with those of all others, shapes held.
    """
    observations = [observations] if isinstance(observations, Observation) else list(observations)
    if model not in MODELS:
        raise ValueError(f"model is one of {', '.join(map(repr, MODELS))}; got {model!r}.")
    if catalog is not None:
        return _placed(frame, observations, catalog, model, half_size, progress)[0]
    detected = detect(observations, frame, progress=progress).positions
    if not len(detected):
        warnings.warn("No source was detected: the scene is empty.", stacklevel=2)
        return Scene(frame, {})
    scene, significances = _placed(frame, observations, detected, model, half_size, progress)
    lost = _insignificant(scene, observations, significances, progress)
    if not lost:
        return scene
    left = np.delete(detected, [int(name) for name in lost], axis=0)
    warnings.warn(
        f"{len(lost)} of {len(detected)} detected sources had no significant light beside the models of the others, and were "
        "left out. Give positions to keep them (detect finds them).",
        stacklevel=2,
    )
    return _placed(frame, observations, left, model, half_size, progress)[0] if len(left) else Scene(frame, {})


def _placed(
    frame: Frame, observations: Sequence[Observation], catalog, model: str, half_size, progress: bool
) -> tuple[Scene, dict[str, float]]:
    """Return sources at positions, and how significant single profiles are in the sharpest image, if those were fitted."""
    positions = catalog_positions(frame, catalog)
    if len(positions) == 0:
        raise ValueError("The catalogue is empty: nothing to fit.")
    if not any(frame.box.contains(tuple(position)) for position in positions):
        raise ValueError(
            f"None of the {len(positions)} catalogue sources lies in the model frame of {frame.box.shape} pixels; the "
            f"first is at (y, x) = ({positions[0][0]:.1f}, {positions[0][1]:.1f}). Check coordinates and their units (degrees)."
        )
    rows = usable_rows(frame, positions, min(psf_width(frame, obs) for obs in observations))
    centers, names = positions[rows], [str(row) for row in rows]
    sharpest = min(observations, key=lambda obs: psf_width(frame, obs))
    image, noise = detection_image(frame, sharpest)
    blur = Blur.of(frame, sharpest)
    shapes = fit_rings(image, centers, blur, progress)
    envelopes = [Envelope(*each) for each in zip(centers, *shapes, strict=True)]
    asked = _half_size(frame, half_size)
    halves = [asked or _extent(each.amplitudes, each.ellipticity, noise, frame.box) for each in envelopes]
    rings = [_envelope_rings(model, each.amplitudes) for each in envelopes]
    fluxes = _linear_fluxes(frame, observations, centers, [each.ellipticity for each in envelopes], rings, halves)
    if model == "auto":
        return automatic_scene(frame, sharpest, dict(zip(names, envelopes, strict=True)), fluxes, progress)
    sources = {}
    for name, envelope, half, flux in zip(names, envelopes, halves, fluxes, strict=True):
        box = Box.around(tuple(envelope.center), half).intersection(frame.box)
        sources[name] = Source(envelope.center, flux, _morphology(model, envelope, box, model_psf_sigma(frame)))
    return Scene(frame, sources), {}


def _insignificant(
    scene: Scene, observations: Sequence[Observation], significances: Mapping[str, float], progress: bool
) -> list[str]:
    """Return which sources are significant neither in the sharpest image nor in all, shapes held."""
    doubtful = [name for name, value in significances.items() if value < THRESHOLD]
    # Fluxes of unlike units can't be added.
    if not doubtful or len({obs.flux_unit for obs in observations}) > 1:
        return []
    with warnings.catch_warnings():
        # Sources that can't be told apart have infinite errors.
        warnings.simplefilter("ignore", UserWarning)
        table = forced_photometry(scene, observations, progress=progress).table
    flux, error = table["flux"].value, table["flux_err"].value
    is_known = np.isfinite(error) & (error > 0)
    weight = np.where(is_known, 1 / np.square(np.where(is_known, error, 1.0)), 0.0)
    numerator = np.where(is_known, flux, 0.0) * weight
    own = {name: np.asarray(table["id"]) == name for name in doubtful}
    return [name for name, rows in own.items() if numerator[rows].sum() <= THRESHOLD * np.sqrt(weight[rows].sum())]


def _half_size(frame, half_size):
    """Return a half stamp size in model pixels, or None."""
    if isinstance(half_size, u.Quantity):
        return int(np.ceil(half_size.to_value(u.arcsec) / frame.pixel_scale))
    return half_size


def _envelope_rings(model, amplitudes) -> tuple[np.ndarray, np.ndarray]:
    """Return the sigmas and weights of the rings a source of unit flux starts from; a point is a ring without width."""
    if model == "point":
        return np.zeros(1), np.ones(1)
    used = amplitudes > 0
    return RING_SIGMAS[used], amplitudes[used] / amplitudes.sum()


def _extent(amplitudes, ellipticity, noise, frame_box) -> int:
    """Return the half-size of a stamp: where the envelope is lost in the noise, or holds nearly all flux."""
    norm = np.hypot(*ellipticity)
    stretch = ((1 + norm) / (1 - norm)) ** 0.25
    radius = np.arange(0.5, max(frame_box.shape))
    profile = ring_images(np.zeros_like(radius), radius / stretch, np.zeros(2), 1.0) @ amplitudes
    growth = np.cumsum(profile * radius)
    end = min(np.searchsorted(-profile, -STAMP_FAINT * noise), np.searchsorted(growth, STAMP_FLUX * growth[-1]))
    return max(MIN_HALF_SIZE, int(end) + 2)


def _linear_fluxes(frame, observations, centers, ellipticities, rings, halves) -> np.ndarray:
    """Return first fluxes (source, channel): of all sources together, with their envelopes, by non-negative least squares.

    For this every PSF is the Gaussian of its effective sigma. `rings` are the sigmas and weights of each source's envelope
    and `halves` the half-sizes of their stamps. Fluxes are at least a tenth of their standard errors.
    """
    blocks: dict[int, list] = {}
    for obs in observations:
        positions, jacobians = _local_maps(frame, obs, centers)
        data = np.where(obs.noise.valid, obs.data - obs.background_image(), np.nan)
        sigmas = np.broadcast_to(obs.psf.effective_sigma, len(obs.channels))
        designs = {
            s: _envelopes(obs.shape[1:], positions, jacobians, ellipticities, rings, halves, s) for s in set(sigmas)
        }
        for plane, channel, sigma, level in zip(
            data, frame.channel_index(obs.channels), sigmas, obs.noise.level(), strict=True
        ):
            blocks.setdefault(channel, []).append((designs[sigma] / level, plane.ravel() / level))
    flux = np.zeros((len(centers), len(frame.channels)))
    for channel, parts in blocks.items():
        design, values = scipy.sparse.vstack([d for d, _ in parts], format="csc"), np.concatenate([v for _, v in parts])
        norm = design.power(2).T @ np.isfinite(values).astype(float)
        floor = np.divide(0.1, np.sqrt(norm), where=norm > 0, out=np.zeros(len(centers)))
        flux[:, channel] = np.maximum(solve_nonnegative(design, values, floor, FLUX_STEPS), floor)
    return flux


def _local_maps(frame, obs, centers) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (n, 2) in an observation, and d(frame) / d(observation) there (n, 2, 2)."""
    positions = pixel_map(frame.wcs, obs.wcs, centers[:, 0], centers[:, 1])
    moved = [pixel_map(frame.wcs, obs.wcs, centers[:, 0] + dy, centers[:, 1] + dx) for dy, dx in ((1, 0), (0, 1))]
    return positions, np.linalg.inv(np.stack([m - positions for m in moved], axis=-1))


def _envelopes(shape, positions, jacobians, ellipticities, rings, halves, psf_sigma) -> scipy.sparse.csc_matrix:
    """Return the sources' envelopes of unit flux, convolved with a Gaussian PSF, as columns over an image's pixels."""
    areas = np.abs(np.linalg.det(jacobians))
    reach = np.asarray(halves) / np.sqrt(areas) + PSF_EXTENT * psf_sigma
    boxes = [
        Box.around(tuple(p), int(np.ceil(r))).intersection(Box(shape)) for p, r in zip(positions, reach, strict=True)
    ]
    step = int(np.ceil(np.sqrt(sum(box.shape[0] * box.shape[1] for box in boxes) / MAX_ENTRIES))) or 1
    pieces = []
    for n, (box, position, jacobian, area) in enumerate(zip(boxes, positions, jacobians, areas, strict=True)):
        window = tuple(slice(s.start, s.stop, step) for s in box.slices)
        y, x = np.ogrid[window]
        y, x = y - position[0], x - position[1]
        (yy, yx), (xy, xx) = jacobian
        sigmas, weights = rings[n]
        density = (
            ring_images(yy * y + yx * x, xy * y + xx * x, ellipticities[n], psf_sigma * np.sqrt(area), sigmas) @ weights
        )
        pieces.append((window, area * density))
    return columns(shape, pieces)


def _morphology(model, envelope: Envelope, box: Box, psf_sigma: float):
    """Return the starting morphology of the named kind from the envelope on `box`."""
    if model == "point":
        return PointMorphology()
    y, x = np.mgrid[box.slices]
    center = envelope.center
    start = ring_images(y - center[0], x - center[1], envelope.ellipticity, psf_sigma) @ envelope.amplitudes
    if model == "gaussian":
        variance = 0.5 * (start * ((y - center[0]) ** 2 + (x - center[1]) ** 2)).sum() / start.sum()
        return GaussianMorphology(float(np.sqrt(max(variance, 0.25))) * 0.8)
    nearest = np.rint(center).astype(int)
    return PixelMorphology(start, (int(nearest[0]) - box.origin[0], int(nearest[1]) - box.origin[1]), envelope=start)
