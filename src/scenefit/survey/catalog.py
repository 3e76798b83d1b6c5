"""The catalogue of a fit: one row a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

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
from scenefit.infer.slopes import stamp_slopes
from scenefit.model.morphology import AbstractImageMorphology
from scenefit.model.packing import member_stamps
from scenefit.sky import units
from scenefit.sky.frame import Channel, Frame
from scenefit.survey.columns import describe
from scenefit.survey.flags import Flag, catalog_flags
from scenefit.survey.footprint import FootprintMeasures, measure_footprints
from scenefit.survey.measure import FRACTIONS, INNER_FRACTION, default_channel_weights, measure_shapes, radius_name
from scenefit.survey.modelerror import flux_model_errors
from scenefit.survey.radii import light_radii
from scenefit.survey.sensitivity import shape_slopes
from scenefit.survey.skyshapes import SHAPE_NAMES, sky_shapes
from scenefit.survey.stars import sharpest_area, star_scores

UNKNOWN_ANGLE = float(180 / np.sqrt(12))
"""Standard deviation, in degrees, of a position angle of which nothing is known; no error is larger."""


def channel_label(channel: Channel) -> str:
    """Return a channel's name in column names: the name itself, or BAND_EPOCH."""
    return "_".join(str(part) for part in channel) if isinstance(channel, tuple) else str(channel)


def catalog(result: FitResult, *, model_error: bool = True, progress: bool = True) -> QTable:
    """Measure every source of a fit.

    Fluxes are totals of the model. Errors are those of a simultaneous fit of all fluxes, analytic shapes, free offsets,
    backgrounds and other free parameters to all pixels (neighbours included), the free-pixel images held fixed; those of
    positions and shapes follow from the derivatives of what is measured, to first order. Fluxes of all but points have an error
    besides, since no model of a galaxy is right (`scenefit.survey.modelerror`): 1.5 % of themselves and 3 % of the light of
    others that lies over their own.

    Parameters
    ----------
    result : FitResult
    model_error : bool
        Whether errors of fluxes and magnitudes include that of models.
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    QTable
        The columns that `COLUMNS` and, with the name of a channel appended, `CHANNEL_COLUMNS` of `scenefit.survey.columns` list,
        with units: positions in degrees and pixels of the model frame, their errors in arcsec and pixels, fluxes in nJy (or data
        units if the observations have no zeropoint), AB magnitudes, sizes in arcsec (or pix without a WCS). Each column has its
        description in `info.description` and its UCD in `info.meta["ucd"]`. `flags` are bits of `Flag`, listed in the metadata.

    Notes
    -----
    A channel without any valid pixel has NaN flux and infinite error. Errors of positions and shapes are 0 where all that they
    depend on is fixed, infinite where nothing determines it, and NaN for sources with free pixels. See `measure_footprints` for
    blendedness, chi-square and masked fraction, `light_radii` for radii, and `star_scores` for the score.
    """
    return _measure(result, model_error, progress).table


class CatalogCovariance(eqx.Module):
    """Covariances of what a catalogue lists, of all sources with one another.

    Attributes
    ----------
    names : tuple of (str, str)
        Source and column of every row of the matrix: `flux_CH` of every channel, `y`, `x`, `ra`, `dec`, `half_light_radius`,
        `r80`, `r90`, `axis_ratio`, `position_angle`.
    matrix : array, shape (q, q)
        In the units of the table's errors (`ra` and `dec` in arcsec on the sky). Where an error is infinite so is the variance,
        and its covariances are 0; NaN with what has no error.
    """

    names: tuple[tuple[str, str], ...] = eqx.field(static=True)
    matrix: np.ndarray

    def __getitem__(self, pair: tuple[tuple[str, str], tuple[str, str]]) -> float:
        """Return the covariance of two quantities, each given as (source, column).

        Raises
        ------
        KeyError
            If there is no such source or column.
        """
        if unknown := [each for each in pair if tuple(each) not in self.names]:
            columns = list(dict.fromkeys(column for _, column in self.names))
            raise KeyError(f"There is no {unknown}: want (source, column), with the columns {columns}.")
        first, second = (self.names.index(tuple(each)) for each in pair)
        return float(self.matrix[first, second])


def catalog_covariance(result: FitResult, *, model_error: bool = True, progress: bool = True) -> CatalogCovariance:
    """Return the covariances of fluxes, positions and shapes of all sources of a fit, of which `catalog` has the errors.

    Parameters
    ----------
    result : FitResult
    model_error : bool
        Whether variances of fluxes include those of models, which all channels of a source have in common.
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    CatalogCovariance
        Neighbours and nuisances marginalised, to first order in what is measured.
    """
    measured = _measure(result, model_error, progress)
    table, (index, covariance) = measured.table, measured.known
    fluxes = [name for name in table.colnames if name.startswith("flux_err_")]
    names = [(str(n), name.replace("flux_err_", "flux_")) for n in table["id"] for name in fluxes]
    errors = [measured.flux_error.ravel()]
    names += [(str(n), name) for n in table["id"] for name in SHAPE_NAMES]
    errors += [np.stack([np.asarray(table[f"{name}_err"]) for name in SHAPE_NAMES], axis=-1).ravel()]
    sigma = np.concatenate(errors)
    finite = np.isfinite(covariance.diagonal())
    inside = measured.slopes[:, index[finite]]
    product = (inside @ covariance[finite][:, finite] @ inside.T).toarray()
    # Columns are their own multiples of what has slopes.
    scale = np.sqrt(np.diag(product))
    scale = np.where(scale > 0, scale, np.inf)
    correlation = product / scale[:, None] / scale
    known = np.isfinite(sigma)
    finite_sigma = np.where(known, sigma, 0.0)
    matrix = np.where(known[:, None] & known, correlation * finite_sigma[:, None] * finite_sigma, 0.0)
    lost = np.isnan(sigma)
    matrix[lost], matrix[:, lost] = np.nan, np.nan
    matrix[np.diag_indices_from(matrix)] = sigma**2
    for n, each in enumerate(measured.model_error):
        block = slice(n * len(each), (n + 1) * len(each))
        matrix[block, block] += np.sign(measured.flux[n])[:, None] * np.sign(measured.flux[n]) * np.outer(each, each)
    return CatalogCovariance(tuple(names), matrix)


class _Measured(NamedTuple):
    """A catalogue; fluxes and their errors without and of models alone, shape (source, channel).

    Derivatives of fluxes (source, channel), then shapes (source, column); coordinates and their covariance.
    """

    table: QTable
    flux: np.ndarray
    flux_error: np.ndarray
    model_error: np.ndarray
    slopes: scipy.sparse.csr_matrix
    known: tuple


def _measure(result: FitResult, model_error: bool, progress: bool) -> _Measured:
    """Measure every source."""
    result = _matched(result)
    scene, frame = result.scene, result.scene.frame
    names = list(scene.sources)
    problem, state, layout = posterior.build(scene, result.observations, result.parameters)
    changes = stamp_slopes(problem, state)
    stamps = member_stamps(layout.members, [each.stamps[0] for each in jax.device_get(changes)])
    known = vector_covariance(problem, state, layout, scene, result.observations, changes, progress)
    flux, error, correlation, flux_slopes = _fluxes(result, problem, layout, known)
    weights = _channel_weights(error)
    weights = default_channel_weights(scene) if weights is None else weights
    shapes = measure_shapes(scene, weights, progress, stamps=stamps)
    ratio, angle, slopes = sky_shapes(shapes, frame)
    radii = light_radii(result, shapes, weights, (*FRACTIONS, INNER_FRACTION), stamps, progress)
    slopes = slopes @ shape_slopes(problem, layout, changes, scene, stamps, shapes, weights, progress)
    scale = 1.0 if frame.wcs is None else frame.pixel_scale
    errors = _shape_errors(result, _standard_errors(slopes, problem, known))
    measures = measure_footprints(scene, result.observations, stamps, progress)
    of_model = flux_model_errors(scene, flux, measures.blendedness) if model_error else np.zeros(flux.shape)
    of_model = np.where((error > 0) & np.isfinite(error), of_model, 0.0)
    table = QTable()
    table["id"] = np.array(names, dtype=str)
    _add_positions(table, frame, np.array([shape.center for shape in shapes]).reshape(len(names), 2), errors)
    is_calibrated = all(obs.flux_unit == "nJy" for obs in result.observations)
    _add_channels(table, frame.channels, flux, np.hypot(error, of_model), measures, is_calibrated)
    length = u.pix if frame.wcs is None else u.arcsec
    radii, squared_errors = scale * radii, dict(zip(SHAPE_NAMES, errors.T, strict=True))
    for fraction, radius in zip(FRACTIONS, radii[:, :-1].T, strict=True):
        name = radius_name(fraction)
        table[name], table[f"{name}_err"] = radius * length, _radius_error(radius, squared_errors[name]) * length
    table[radius_name(INNER_FRACTION)] = radii[:, -1] * length
    with np.errstate(invalid="ignore", divide="ignore"):
        table["concentration"] = 5 * np.log10(table["r80"] / np.where(table["r20"] > 0, table["r20"], np.nan)).value
        table["snr"] = np.sqrt(np.nansum(np.where(np.isfinite(error), flux / error, 0.0) ** 2, axis=1))
    table["axis_ratio"], table["axis_ratio_err"] = ratio, errors[:, -2]
    table["position_angle"], table["position_angle_err"] = angle * u.deg, errors[:, -1] * u.deg
    psf_area = scale**2 * sharpest_area(frame, result.observations)
    table["star_score"] = star_scores(
        table["half_light_radius"].value ** 2, squared_errors["half_light_radius"], psf_area
    )
    has_data = np.isfinite(error).any(axis=0)
    table["masked_fraction"] = np.clip(1 - np.min(measures.seen[:, has_data], axis=1, initial=1.0), 0.0, 1.0)
    table["flux_correlation"] = correlation
    table["flags"] = catalog_flags(
        result, stamps, flux, error, measures.blendedness, correlation, table["masked_fraction"]
    )
    describe(table, frame.channels, [channel_label(channel) for channel in frame.channels], is_calibrated)
    table.meta["flags"] = {flag.name: int(flag) for flag in Flag}
    table.meta["status"] = result.status.name
    slopes = scipy.sparse.vstack([flux_slopes, slopes], format="csr")
    return _Measured(table, flux, error, of_model, slopes, known)


def _add_positions(table: QTable, frame: Frame, centers: np.ndarray, errors: np.ndarray):
    """Add the columns of positions."""
    sky, sky_errors = np.full((2, *centers.shape), np.nan)
    if frame.wcs is not None:
        places = frame.to_sky(centers).icrs
        sky, sky_errors = np.stack([places.ra.deg, places.dec.deg], axis=-1), errors[:, 2:4]
    table["ra"], table["dec"] = sky.T * u.deg
    table["ra_err"], table["dec_err"] = sky_errors.T * u.arcsec
    table["y"], table["x"] = centers.T * u.pix
    table["y_err"], table["x_err"] = errors[:, :2].T * u.pix


def _add_channels(
    table: QTable,
    channels: Sequence[Channel],
    flux: np.ndarray,
    error: np.ndarray,
    measures: FootprintMeasures,
    is_calibrated: bool,
):
    """Add the columns of every channel."""
    unit = u.nJy if is_calibrated else u.dimensionless_unscaled
    for c, channel in enumerate(channels):
        label = channel_label(channel)
        table[f"flux_{label}"], table[f"flux_err_{label}"] = flux[:, c] * unit, error[:, c] * unit
        magnitude = units.ab_magnitude(flux[:, c]) if is_calibrated else np.full(len(flux), np.nan)
        magnitude_error = units.ab_magnitude_error(flux[:, c], error[:, c])
        table[f"mag_{label}"], table[f"mag_err_{label}"] = magnitude * u.mag, magnitude_error * u.mag
        table[f"blendedness_{label}"] = measures.blendedness[:, c]
        count = measures.num_pixels[:, c]
        table[f"chi_square_{label}"] = np.where(count > 0, measures.chi_square[:, c] / np.maximum(count, 1), np.nan)
        table[f"num_pixels_{label}"] = count


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

    Everything else is marginalised over: diagonal elements of the inverse of the Gauss-Newton Hessian. Without free images it is
    the matrix behind `catalog`. With them, their pixels are marginalised over too, by conjugate gradients, one solution a number;
    pixels and fluxes at a bound count as known then.

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
        By path, in the units and shapes of the parameters; infinite where nothing determines them. With free images about a
        percent too small where conjugate gradients converge slowly.

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
    variance, inside = np.full(len(index), np.nan), _inside_bounds(problem, state, numbers)
    if any(np.any(image) for image in problem.free.images):
        variance[numbers] = np.diag(marginal_covariance(problem, inside, numbers, progress))
    else:
        known, covariance = vector_covariance(
            problem, state, layout, result.scene, result.observations, progress=progress
        )
        variance[known] = covariance.diagonal()
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


def _fluxes(
    result: FitResult, problem: Problem, layout: Layout, known
) -> tuple[np.ndarray, np.ndarray, np.ndarray, scipy.sparse.csr_matrix]:
    """Return fluxes and errors, shape (source, channel), the largest correlation with another source, and derivatives."""
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
    slopes = slopes.tocsr()
    error = _standard_errors(slopes, problem, known).reshape(shape)
    correlation = _largest_correlation(slopes, known, shape)
    seen = np.zeros(shape[1], bool)
    for obs in result.observations:
        seen[list(obs.matched_renderer.channels)] |= obs.noise.valid[
            (slice(None), *obs.matched_renderer.window.slices)
        ].any(axis=(1, 2))
    return np.where(seen, flux, np.nan), np.where(seen, error, np.inf), correlation, slopes


def _largest_correlation(slopes: scipy.sparse.csr_matrix, known, shape: tuple[int, int]) -> np.ndarray:
    """Return the largest correlation of each source's flux with that of another in the same channel, without its sign."""
    index, covariance = known
    finite = np.isfinite(covariance.diagonal())
    inside = slopes[:, index[finite]]
    # Row after row: a source and channel by coordinates, then by sources in the same channel.
    spread = (inside @ covariance[finite][:, finite]).tocsr()
    largest = np.zeros(shape[0])
    for c in range(shape[1]):
        rows = np.arange(c, np.prod(shape), shape[1])
        matrix = (spread[rows] @ inside[rows].T).toarray()
        sigma = np.sqrt(np.diag(matrix))
        np.fill_diagonal(matrix, 0.0)
        scale = np.where(sigma > 0, 1 / np.where(sigma > 0, sigma, 1.0), 0.0)
        matrix = np.abs(matrix * scale[:, None] * scale)
        # What can't be told apart at all has infinite variances.
        lost = np.asarray(abs(slopes[rows][:, index[~finite]]).sum(axis=1)).ravel() > 0
        matrix[lost & (lost.sum() > 1)] = 1.0
        largest = np.maximum(largest, matrix.max(axis=1, initial=0.0))
    return np.minimum(largest, 1.0)


def _channel_weights(error: np.ndarray) -> np.ndarray | None:
    """Return the inverse of the typical flux error in each channel; None if no channel has any."""
    typical = np.median(error, axis=0) if len(error) else np.full(error.shape[1], np.nan)
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


def _shape_errors(result: FitResult, errors: np.ndarray) -> np.ndarray:
    """Return the errors of what `sky_shapes` has slopes of, shape (source, column)."""
    errors = errors.reshape(-1, len(SHAPE_NAMES)).copy()
    errors[:, -1] = np.minimum(errors[:, -1], UNKNOWN_ANGLE)
    for n, (name, source) in enumerate(result.scene.sources.items()):
        if any(_has_free_image(part, path, result) for path, part in source.components(f"sources.{name}")):
            errors[n] = np.nan
    return errors


def _radius_error(radius: np.ndarray, squared_error: np.ndarray) -> np.ndarray:
    """Return the error of a radius from that of its square, which can be larger than the square itself."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.fmin(squared_error / (2 * radius), np.sqrt(squared_error))


def _has_free_image(component, path, result: FitResult) -> bool:
    """Return whether a component is made of pixels that were fitted."""
    if not isinstance(component.morphology, AbstractImageMorphology):
        return False
    return any(result.parameters.table[f"{path}.morphology.{name}"].free for name in component.morphology.constraints)
