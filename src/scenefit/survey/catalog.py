"""The catalogue of a fit: one row a source."""

from __future__ import annotations

import dataclasses

import astropy.units as u
import numpy as np
from astropy.table import QTable

from scenefit.infer import posterior
from scenefit.infer.fit import FitResult
from scenefit.infer.laplace import marginal_covariance, vector_covariance
from scenefit.model.morphology import parameter_values
from scenefit.model.packing import component_box
from scenefit.model.parameters import IMAGES
from scenefit.sky import units
from scenefit.sky.frame import Channel
from scenefit.survey.measure import Flag, measure_shapes

BOUND_MARGIN, SMALLEST_RADIUS = 0.01, 1e-3
"""A parameter is at the end of its range within this fraction of it; one with a lower bound alone (a radius, in pixels) within
this distance."""
UNRESOLVED = 0.03
"""Second moment along the major axis, in model pixels squared, below which a source has no axis ratio or angle."""


def channel_label(channel: Channel) -> str:
    """Return a channel's name in column names: the name itself, or BAND_EPOCH."""
    return "_".join(str(part) for part in channel) if isinstance(channel, tuple) else str(channel)


def catalog(result: FitResult, *, progress: bool = True) -> QTable:
    """Measure every source of a fit.

    Fluxes are totals of the model. Their errors are those of a simultaneous fit of all fluxes, analytic shapes, free
    offsets and backgrounds to all pixels (neighbours included), the free-pixel images held fixed.

    Parameters
    ----------
    result : FitResult
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    QTable
        id; ra, dec [deg, ICRS] (NaN without a WCS) and y, x [pix] on the model frame; for every channel CH flux_CH and
        flux_err_CH [nJy, or in data units if the observations have no zeropoint], mag_CH and mag_err_CH [AB mag];
        half_light_radius [arcsec, or pix without a WCS; circular, model PSF removed], axis_ratio, position_angle [deg, east
        of north; counter-clockwise from +x without a WCS; both NaN for a source without a measurable size], snr (of the
        flux over all channels), flags (`Flag` bits, explained in the table's metadata). A channel without any valid pixel
        has NaN flux and infinite error.
    """
    result = _matched(result)
    scene, frame = result.scene, result.scene.frame
    names = list(scene.sources)
    flux, error = _fluxes(result, progress)
    shapes = measure_shapes(scene, _channel_weights(error), progress)
    table = QTable()
    table["id"] = np.array(names, dtype=str)
    centers = np.array([shape.center for shape in shapes]).reshape(len(names), 2)
    if frame.wcs is not None:
        sky = frame.to_sky(centers).icrs
        table["ra"], table["dec"] = sky.ra.deg * u.deg, sky.dec.deg * u.deg
    else:
        table["ra"] = table["dec"] = np.full(len(names), np.nan) * u.deg
    table["y"], table["x"] = centers[:, 0] * u.pix, centers[:, 1] * u.pix
    calibrated = all(obs.flux_unit == "nJy" for obs in result.observations)
    unit = u.nJy if calibrated else u.dimensionless_unscaled
    for c, channel in enumerate(frame.channels):
        label = channel_label(channel)
        table[f"flux_{label}"], table[f"flux_err_{label}"] = flux[:, c] * unit, error[:, c] * unit
        magnitude = units.ab_magnitude(flux[:, c]) if calibrated else np.full(len(names), np.nan)
        magnitude_error = units.ab_magnitude_error(flux[:, c], error[:, c])
        table[f"mag_{label}"], table[f"mag_err_{label}"] = magnitude * u.mag, magnitude_error * u.mag
    radius, ratio, angle = _sky_shapes(shapes, frame)
    table["half_light_radius"] = radius * (u.pix if frame.wcs is None else u.arcsec)
    table["axis_ratio"], table["position_angle"] = ratio, angle * u.deg
    with np.errstate(invalid="ignore", divide="ignore"):
        table["snr"] = np.sqrt(np.nansum(np.where(np.isfinite(error), flux / error, 0.0) ** 2, axis=1))
    table["flags"] = _flags(result, flux, error)
    table.meta["flags"] = {flag.name: int(flag) for flag in Flag}
    table.meta["status"] = result.status.name
    return table


def offset_errors(result: FitResult, *, progress: bool = True) -> dict[str, np.ndarray]:
    """Return the standard errors of every observation's offset.

    Everything else is marginalised over, the pixels of free images included.

    Parameters
    ----------
    result : FitResult
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    dict of array, shape (2,)
        (east, north) [arcsec] by the name of the observation, (x, y) [pix] without a WCS; NaN where the offset was fixed.
    """
    result = _matched(result)
    problem, state, _ = posterior.build(result.scene, result.observations, result.parameters)
    errors = {obs.name: np.full(2, np.nan) for obs in result.observations}
    for leaf in problem.leaves:
        if leaf.kind == "image" and leaf.name == "shift":
            index = np.asarray(problem.index)[leaf.start : leaf.stop].tolist()
            covariance = marginal_covariance(problem, state, index, progress)
            errors[result.observations[leaf.number].name] = np.sqrt(np.diag(covariance))
    return errors


def _matched(result: FitResult) -> FitResult:
    """Return the result with its observations matched: a loaded one has no renderers."""
    observations = tuple(obs.match(result.scene.frame) if obs.renderer is None else obs for obs in result.observations)
    # Not a tree operation: those sort the sources by name.
    return dataclasses.replace(result, observations=observations)


def _fluxes(result: FitResult, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return fluxes and errors, shape (source, channel)."""
    scene, frame = result.scene, result.scene.frame
    problem, state, layout = posterior.build(scene, result.observations, result.parameters)
    index, covariance = vector_covariance(problem, state, layout, frame, result.observations, progress)
    place = np.full(len(state.vector), -1)
    place[index] = np.arange(len(index))
    entries = dict(zip(dict(scene.components()), posterior.flux_coordinates(problem, layout), strict=True))
    shape = (len(scene.sources), len(frame.channels))
    flux, error = np.zeros(shape), np.zeros(shape)
    for n, (name, source) in enumerate(scene.sources.items()):
        parts = list(source.components(f"sources.{name}"))
        flux[n] = sum(np.asarray(part.spectrum.evaluate(frame.channels), float) for _, part in parts)
        for c in range(shape[1]):
            shown = [(entries[path], part.spectrum.layout(frame.channels)[c]) for path, part in parts]
            terms = [(place[where[k]], unit[k]) for (where, unit), k in shown if k >= 0 and where[k] >= 0]
            error[n, c] = _error_of_sum([t for t in terms if t[0] >= 0], covariance)
    seen = np.zeros(shape[1], bool)
    for obs in result.observations:
        seen[list(obs.matched_renderer.channels)] |= obs.noise.valid[
            (slice(None), *obs.matched_renderer.window.slices)
        ].any(axis=(1, 2))
    return np.where(seen, flux, np.nan), np.where(seen, error, np.inf)


def _channel_weights(error: np.ndarray) -> np.ndarray | None:
    """Return the inverse of the typical flux error in each channel; None if no channel has any."""
    typical = np.median(error, axis=0)
    usable = np.isfinite(typical) & (typical > 0)
    return np.where(usable, 1 / np.where(usable, typical, 1.0), 0.0) if usable.any() else None


def _error_of_sum(terms, covariance) -> float:
    """Return the standard error of a sum of coordinates, given as (place, factor); 0 if none of them is free."""
    if not terms:
        return 0.0
    where, factor = np.array([t[0] for t in terms]), np.array([t[1] for t in terms])
    return float(np.sqrt(max(factor @ covariance[where][:, where].toarray() @ factor, 0.0)))


def _sky_shapes(shapes, frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return half-light radii [arcsec], axis ratios and position angles [deg] on the sky."""
    # d(y, x) / d(east, north); without a WCS the columns stand for x and y.
    inverse = np.linalg.inv(frame.sky_jacobian())
    scale = np.sqrt(abs(np.linalg.det(inverse)))
    frame_area = 1 / scale**2
    radius = np.array([shape.half_light_radius * scale for shape in shapes])
    ratio, angle = np.full(len(shapes), np.nan), np.full(len(shapes), np.nan)
    for n, shape in enumerate(shapes):
        moments = inverse @ shape.moments @ inverse.T
        if not np.isfinite(moments).all():
            continue
        values, vectors = np.linalg.eigh(moments)
        if values[1] * frame_area < UNRESOLVED:
            continue
        ratio[n] = np.sqrt(np.clip(values[0] / values[1], 0, 1))
        first, second = vectors[:, 1]
        angle[n] = np.rad2deg(np.arctan2(first, second) if frame.wcs is not None else np.arctan2(second, first)) % 180
    return radius, ratio, angle


def _is_at_bound(component, path, result: FitResult) -> bool:
    """Return whether a free shape parameter is at the end of its range, or a radius has gone to nothing."""
    for name, value in parameter_values(component.morphology).items():
        parameter = result.parameters.table[f"{path}.morphology.{name}"]
        if not parameter.free or name in (*IMAGES, "amplitudes"):
            continue
        low = getattr(parameter.constraint, "lower_bound", -np.inf)
        high = getattr(parameter.constraint, "upper_bound", np.inf)
        margin = BOUND_MARGIN * (high - low) if np.isfinite(high - low) else SMALLEST_RADIUS
        if np.any(np.asarray(value) < low + margin) or np.any(np.asarray(value) > high - margin):
            return True
    return False


def _flags(result: FitResult, flux, error) -> np.ndarray:
    """Return the flags of every source."""
    frame = result.scene.frame
    flags = np.zeros(len(flux), int)
    for n, (name, source) in enumerate(result.scene.sources.items()):
        boxes = [component_box(part, frame) for _, part in source.components(f"sources.{name}")]
        inner = frame.box.grow(-1)
        if any(inner.intersection(box).shape != box.shape for box in boxes):
            flags[n] |= Flag.EDGE
        if any(_is_at_bound(part, path, result) for path, part in source.components(f"sources.{name}")):
            flags[n] |= Flag.AT_BOUND
    flags[~np.isfinite(flux).all(axis=1)] |= Flag.NO_DATA
    flags[(np.isfinite(flux) & (flux <= 0)).any(axis=1)] |= Flag.ZERO_FLUX
    flags[~(np.nan_to_num(flux) > 0).any(axis=1)] |= Flag.VANISHED
    if not result.is_converged:
        flags |= Flag.NOT_CONVERGED
    return flags
