"""The catalogue of a fit: one row a source."""

from __future__ import annotations

import dataclasses

import astropy.units as u
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from astropy.table import QTable

from scenefit.arrays.compilation import as_floats, compiled
from scenefit.infer import posterior
from scenefit.infer.fit import FitResult
from scenefit.infer.laplace import marginal_covariance, vector_covariance
from scenefit.infer.posterior import Layout
from scenefit.infer.problem import Problem, State
from scenefit.model.morphology import AbstractImageMorphology, parameter_values
from scenefit.model.packing import component_box
from scenefit.model.parameters import IMAGES
from scenefit.sky import units
from scenefit.sky.frame import Channel
from scenefit.survey.measure import Flag, default_channel_weights, measure_shapes
from scenefit.survey.sensitivity import NUM_MEASURES, shape_slopes

BOUND_MARGIN, SMALLEST_RADIUS = 0.01, 1e-3
"""A parameter is at the end of its range within this fraction of it; one with a lower bound alone (a radius, in pixels) within
this distance."""
UNRESOLVED = 0.03
"""Second moment along the major axis, in model pixels squared, below which a source has no axis ratio or angle."""
NUM_COLUMNS = 7
"""Columns of positions and shapes that have errors: y, x, ra, dec, half-light radius, axis ratio and position angle."""
ROUND = 1e-6
"""Relative difference of the moments along the axes below which a source has no direction."""
UNKNOWN_ANGLE = float(180 / np.sqrt(12))
"""Standard deviation, in degrees, of a position angle of which nothing is known; no error is larger."""


def channel_label(channel: Channel) -> str:
    """Return a channel's name in column names: the name itself, or BAND_EPOCH."""
    return "_".join(str(part) for part in channel) if isinstance(channel, tuple) else str(channel)


def catalog(result: FitResult, *, progress: bool = True) -> QTable:
    """Measure every source of a fit.

    Fluxes are totals of the model. Errors are those of a simultaneous fit of all fluxes, analytic shapes, free offsets,
    backgrounds and other free parameters to all pixels (neighbours included), the free-pixel images held fixed; those of
    positions and shapes follow from the derivatives of what is measured, to first order.

    Parameters
    ----------
    result : FitResult
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    QTable
        id; ra, dec [deg, ICRS] (NaN without a WCS), ra_err, dec_err [arcsec, on the sky: not divided by cos(dec)]; y, x and
        y_err, x_err [pix] on the model frame; for every channel CH flux_CH and flux_err_CH [nJy, or in data units if the
        observations have no zeropoint], mag_CH and mag_err_CH [AB mag]; half_light_radius [arcsec, or pix without a WCS;
        circular, model PSF removed], axis_ratio, position_angle [deg, east of north; counter-clockwise from +x without a WCS;
        both NaN for a source without a measurable size] and the errors of these three, called ..._err; snr (of the flux over
        all channels), flags (`Flag` bits, explained in the table's metadata). A channel without any valid pixel has NaN flux
        and infinite error. Errors of positions and shapes are 0 where all that they depend on is fixed, infinite where
        nothing determines it, and NaN for sources with free pixels.
    """
    result = _matched(result)
    scene, frame = result.scene, result.scene.frame
    names = list(scene.sources)
    problem, state, layout = posterior.build(scene, result.observations, result.parameters)
    known = vector_covariance(problem, state, layout, frame, result.observations, progress)
    flux, error = _fluxes(result, problem, layout, known)
    weights = _channel_weights(error)
    weights = default_channel_weights(scene) if weights is None else weights
    shapes = measure_shapes(scene, weights, progress)
    radius, ratio, angle, slopes = _sky_shapes(shapes, frame)
    slopes = slopes @ shape_slopes(problem, state, layout, scene, shapes, weights, progress)
    errors = _shape_errors(result, radius, _standard_errors(slopes, problem, known))
    table = QTable()
    table["id"] = np.array(names, dtype=str)
    centers = np.array([shape.center for shape in shapes]).reshape(len(names), 2)
    if frame.wcs is not None:
        sky = frame.to_sky(centers).icrs
        table["ra"], table["dec"] = sky.ra.deg * u.deg, sky.dec.deg * u.deg
    else:
        table["ra"] = table["dec"] = np.full(len(names), np.nan) * u.deg
    sky_errors = errors[:, 2:4] if frame.wcs is not None else np.full((len(names), 2), np.nan)
    table["ra_err"], table["dec_err"] = sky_errors[:, 0] * u.arcsec, sky_errors[:, 1] * u.arcsec
    table["y"], table["x"] = centers[:, 0] * u.pix, centers[:, 1] * u.pix
    table["y_err"], table["x_err"] = errors[:, 0] * u.pix, errors[:, 1] * u.pix
    calibrated = all(obs.flux_unit == "nJy" for obs in result.observations)
    unit = u.nJy if calibrated else u.dimensionless_unscaled
    for c, channel in enumerate(frame.channels):
        label = channel_label(channel)
        table[f"flux_{label}"], table[f"flux_err_{label}"] = flux[:, c] * unit, error[:, c] * unit
        magnitude = units.ab_magnitude(flux[:, c]) if calibrated else np.full(len(names), np.nan)
        magnitude_error = units.ab_magnitude_error(flux[:, c], error[:, c])
        table[f"mag_{label}"], table[f"mag_err_{label}"] = magnitude * u.mag, magnitude_error * u.mag
    length = u.pix if frame.wcs is None else u.arcsec
    table["half_light_radius"], table["half_light_radius_err"] = radius * length, errors[:, 4] * length
    table["axis_ratio"], table["axis_ratio_err"] = ratio, errors[:, 5]
    table["position_angle"], table["position_angle_err"] = angle * u.deg, errors[:, 6] * u.deg
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
    errors = nuisance_errors(result, "observations.*.astrometry.shift", progress=progress)
    paths = {obs.name: f"observations.{obs.name}.astrometry.shift" for obs in result.observations}
    return {name: errors.get(path, np.full(2, np.nan)) for name, path in paths.items()}


def nuisance_errors(
    result: FitResult, pattern: str = "observations", *, progress: bool = True
) -> dict[str, np.ndarray]:
    """Return the standard errors of the free parameters of observations: offsets, rotations, backgrounds and the like.

    Everything else is marginalised over, the pixels of free images included: diagonal elements of the inverse of the Gauss-Newton
    Hessian, by conjugate gradients, one solution a number. Pixels and fluxes at a bound count as known, but parameters that
    are asked for as free.

    Parameters
    ----------
    result : FitResult
    pattern : str
        Which parameters, as a path or pattern of `Parameters`, such as "observations.HSC.astrometry"; those that are fixed are
        left out.
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    dict of array
        By path, in the units and shapes of the parameters; infinite where nothing determines them. About a percent too small
        where conjugate gradients converge slowly.

    Raises
    ------
    KeyError
        If no parameter matches.
    ValueError
        If one that matches isn't of an observation.
    """
    result = _matched(result)
    parameters = result.parameters.completed(result.observations)
    paths = parameters.match(pattern)
    if others := [path for path in paths if not path.startswith("observations.")]:
        raise ValueError(
            f"nuisance_errors wants parameters of observations; {pattern!r} matches {others[0]!r}. Errors of fluxes are in "
            "catalog(result), those of all parameters of small scenes in parameter_errors(result)."
        )
    paths = [path for path in paths if parameters.is_fitted(path)]
    if not paths:
        return {}
    problem, state, layout = posterior.build(result.scene, result.observations, result.parameters)
    elements = {path: layout.places[path] for path in paths}
    index = np.asarray(problem.index)
    numbers = np.unique(np.concatenate([index[where].ravel() for where, _ in elements.values()]))
    variance = np.full(len(index), np.nan)
    inside = _inside_bounds(problem, state, numbers)
    variance[numbers] = np.diag(marginal_covariance(problem, inside, numbers, progress))
    sigma = np.sqrt(np.where(np.isfinite(variance), variance, np.inf))
    # Each of these elements is a function of one coordinate.
    slope = np.abs(np.asarray(_slopes(problem, inside), dtype=float))
    return {path: np.asarray(sigma[index[at]] * slope[at] * unit) for path, (at, unit) in elements.items()}


def _inside_bounds(problem: Problem, state: State, numbers: np.ndarray) -> State:
    """Return the state with some coordinates moved off their bounds by a rounding error: they count as free then."""
    low, high = (np.asarray(bound.vector)[numbers] for bound in (problem.lowest, problem.highest))
    vector = np.asarray(state.vector).copy()
    vector[numbers] = np.clip(vector[numbers], np.nextafter(low, high), np.nextafter(high, low))
    return eqx.tree_at(lambda s: s.vector, state, as_floats(vector))


@compiled
def _slopes(problem: Problem, state: State):
    """Return the derivative of every element along its coordinate."""
    return jax.jvp(problem.elements, (state.vector,), (jnp.ones_like(state.vector),))[1]


def _matched(result: FitResult) -> FitResult:
    """Return the result with its observations matched: a loaded one has no renderers."""
    observations = tuple(obs.match(result.scene.frame) if obs.renderer is None else obs for obs in result.observations)
    # Not a tree operation: those sort the sources by name.
    return dataclasses.replace(result, observations=observations)


def _fluxes(result: FitResult, problem: Problem, layout: Layout, known) -> tuple[np.ndarray, np.ndarray]:
    """Return fluxes and errors, shape (source, channel)."""
    scene, channels = result.scene, result.scene.frame.channels
    entries = dict(zip(dict(scene.components()), posterior.flux_coordinates(problem, layout), strict=True))
    shape = (len(scene.sources), len(channels))
    flux, slopes = np.zeros(shape), scipy.sparse.lil_matrix((np.prod(shape), len(problem.index)))
    for n, (name, source) in enumerate(scene.sources.items()):
        for path, part in source.components(f"sources.{name}"):
            flux[n] += np.asarray(part.spectrum.evaluate(channels), float)
            where, unit = entries[path]
            for c, entry in enumerate(part.spectrum.layout(channels)):
                if entry >= 0 and where[entry] >= 0:
                    slopes[n * shape[1] + c, where[entry]] += unit[entry]
    error = _standard_errors(slopes.tocsr(), problem, known).reshape(shape)
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


def _standard_errors(slopes: scipy.sparse.csr_matrix, problem: Problem, known) -> np.ndarray:
    """Return the standard errors of quantities, given their derivatives along the coordinates, shape (quantity, n).

    `known` are coordinates and their covariance, as `vector_covariance` gives them. What depends on nothing free has the error
    0, what depends on free coordinates of which nothing is known an infinite one.
    """
    index, covariance = known
    inside = slopes[:, index]
    variance = np.asarray((inside @ covariance).multiply(inside).sum(axis=1)).ravel()
    lost = np.asarray(problem.free.vector).copy()
    lost[index] = False
    # NaN where the slopes are.
    along_lost = np.asarray(abs(slopes[:, lost]).sum(axis=1)).ravel()
    return np.where(along_lost == 0, np.sqrt(np.maximum(variance, 0.0)), along_lost + np.inf)


def _sky_shapes(shapes, frame) -> tuple[np.ndarray, np.ndarray, np.ndarray, scipy.sparse.csr_matrix]:
    """Return half-light radii [arcsec], axis ratios and position angles [deg] on the sky, and derivatives.

    The derivatives, shape (source * 7, source * 6), are those of y, x, east, north, the square of the radius, axis ratio and
    position angle along what `shape_slopes` is about.
    """
    # d(y, x) / d(east, north); without a WCS the columns stand for x and y.
    inverse = np.linalg.inv(frame.sky_jacobian())
    scale = np.sqrt(abs(np.linalg.det(inverse)))
    frame_area = 1 / scale**2
    radius = np.array([shape.half_light_radius * scale for shape in shapes])
    ratio, angle = np.full(len(shapes), np.nan), np.full(len(shapes), np.nan)
    slopes = np.zeros((len(shapes), NUM_COLUMNS, NUM_MEASURES))
    slopes[:, :2, :2], slopes[:, 2:4, :2], slopes[:, 4, 5] = np.eye(2), inverse, scale**2
    slopes[:, 5:, 2:5] = np.nan
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
        slopes[n, 5:, 2:5] = _axis_slopes(values, inverse.T @ vectors)
    # Without the zeros, or the NaN of one quantity would be that of all.
    source, row, column = np.nonzero(slopes)
    entries = slopes[source, row, column], (source * NUM_COLUMNS + row, source * NUM_MEASURES + column)
    size = (len(shapes) * NUM_COLUMNS, len(shapes) * NUM_MEASURES)
    return radius, ratio, angle, scipy.sparse.csr_matrix(entries, shape=size)


def _axis_slopes(values: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Return the derivatives of axis ratio and angle [deg] along the moments (yy, xy, xx) of the frame, shape (2, 3).

    Parameters
    ----------
    values : array, shape (2,)
        Moments along the axes on the sky, the smaller first.
    axes : array, shape (2, axis)
        What the moments on the frame are multiplied with from both sides to have those on the sky.
    """
    minor, major = axes.T

    def product(a, b):
        return np.array([a[0] * b[0], a[0] * b[1] + a[1] * b[0], a[1] * b[1]])

    if values[0] <= 0:
        return np.full((2, 3), np.nan)
    ratio = np.sqrt(values[0] / values[1])
    of_ratio = 0.5 * ratio * (product(minor, minor) / values[0] - product(major, major) / values[1])
    difference = max(values[1] - values[0], ROUND * values[1])
    return np.stack([of_ratio, np.rad2deg(product(minor, major) / difference)])


def _shape_errors(result: FitResult, radius: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return the errors of y, x, east, north, radius, axis ratio and angle, shape (source, 7), from those with its square."""
    errors = errors.reshape(-1, NUM_COLUMNS).copy()
    # That of the square can be larger than the square itself.
    with np.errstate(divide="ignore", invalid="ignore"):
        errors[:, 4] = np.fmin(errors[:, 4] / (2 * radius), np.sqrt(errors[:, 4]))
    errors[:, 6] = np.minimum(errors[:, 6], UNKNOWN_ANGLE)
    for n, (name, source) in enumerate(result.scene.sources.items()):
        if any(_has_free_image(part, path, result) for path, part in source.components(f"sources.{name}")):
            errors[n] = np.nan
    return errors


def _has_free_image(component, path, result: FitResult) -> bool:
    """Return whether a component is made of pixels that were fitted."""
    if not isinstance(component.morphology, AbstractImageMorphology):
        return False
    return any(result.parameters.table[f"{path}.morphology.{name}"].free for name in component.morphology.constraints)


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
