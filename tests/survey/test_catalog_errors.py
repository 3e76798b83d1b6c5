"""Errors of all columns of the catalogue with correlated noise: dense linear algebra, quadrature, and draws of the noise."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special

import scenefit as sf
from scenefit.arrays.profiles import sersic_b
from scenefit.infer import posterior
from scenefit.infer.fit import FitResult, Status
from scenefit.infer.slopes import stamp_slopes
from scenefit.survey.measure import FRACTIONS, measure_shapes
from scenefit.survey.radii import light_radii
from scenefit.survey.sensitivity import NUM_MEASURES, shape_slopes
from tests.correlations import CORRELATIONS, covariance_of
from tests.helpers import tangent_wcs

SHARP_SCALE, BLURRED_SCALE, BLURRED_SIZE = 0.1, 0.2, 24
FREE = ("observations.blurred.astrometry.shift", "observations.blurred.background", "observations.sharp.background")
PLACES = {"galaxy": (-3.3, -4.1), "disk": (4.2, 2.6)}


def observations_of(size, name):
    """Return a sharp image in g with correlated noise, and a blurred and turned one in r with white noise; both empty."""
    noise = sf.CorrelatedNoise(np.full((1, size, size), 1 / 1.3**2), CORRELATIONS[name])
    sharp = sf.Observation(
        np.zeros((1, size, size)),
        noise=noise,
        psf=sf.GaussianPSF(1.5),
        wcs=tangent_wcs((size, size), SHARP_SCALE),
        channels=["g"],
        name="sharp",
    )
    shape = (BLURRED_SIZE, BLURRED_SIZE)
    blurred = sf.Observation(
        np.zeros((1, *shape)),
        weights=1.0,
        psf=sf.GaussianPSF(1.6),
        wcs=tangent_wcs(shape, BLURRED_SCALE, rotation_deg=15.0),
        channels=["r"],
        name="blurred",
    )
    return [sharp, blurred]


def scene_of(frame, fluxes=((900.0, 500.0), (1200.0, 800.0))):
    """Return a Gaussian galaxy that overlaps a Sersic one, both elliptical."""
    middle = (np.array(frame.shape[1:]) - 1) / 2
    shapes = [sf.GaussianMorphology(2.5, (0.3, 0.1)), sf.SersicMorphology(3.0, 1.4, (-0.1, 0.35))]
    parts = zip(PLACES.items(), shapes, fluxes, strict=True)
    return sf.Scene(frame, {name: sf.Source(middle + place, flux, shape) for (name, place), shape, flux in parts})


def as_result(scene, observations, parameters) -> FitResult:
    """Return a scene as if it had been fitted."""
    matched = tuple(obs.match(scene.frame) for obs in observations)
    return FitResult(scene, matched, parameters, Status.CONVERGED, 0.0, {}, 0, {})


def values_of(scene, observations, parameters):
    """Return the values of all free parameters, by path."""
    values = {}
    for path, source in scene.components():
        values |= {f"{path}.center": source.center, f"{path}.spectrum.flux": source.spectrum.flux}
        for name in source.morphology.constraints:
            values[f"{path}.morphology.{name}"] = getattr(source.morphology, name)
    for obs in observations:
        values[f"observations.{obs.name}.astrometry.shift"] = obs.astrometry.shift
        values[f"observations.{obs.name}.background"] = obs.background
    return {path: np.asarray(value, float) for path, value in values.items() if parameters.table[path].free}


def differences(function, values, steps):
    """Return the derivatives of a function of all values, shape (quantity, entry), by central differences."""
    columns = []
    for path, value in values.items():
        for entry in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[entry] += sign * steps(path)
                ends.append(function({**values, path: moved}))
            columns.append((ends[0] - ends[1]) / (2 * steps(path)))
    return np.stack(columns, axis=-1)


def step_of(path):
    """Return a step: rendering in single precision leaves a permille of derivatives, and the second order as much."""
    if path.endswith("flux"):
        return 20.0
    return 0.5 if path.endswith("background") else 0.01 if path.endswith(("ellipticity", "shift")) else 0.04


def circular_radius(radius, index, ellipticity, fraction):
    """Return the radius of the circle that holds a fraction of the light of an elliptical Sersic profile.

    A ray at an angle leaves the circle on the ellipse of circularised radius R / |A u|, with the map A from circles to ellipses.
    """
    angle = 2 * np.pi * (np.arange(200) + 0.5) / 200
    norm = np.hypot(*ellipticity)
    ratio = np.sqrt((1 - norm) / (1 + norm))
    stretch = np.hypot(np.cos(angle) / np.sqrt(ratio), np.sin(angle) * np.sqrt(ratio))

    def excess(limit):
        growth = scipy.special.gammainc(2 * index, sersic_b(index) * (limit / stretch / radius) ** (1 / index))
        return growth.mean() - fraction

    return scipy.optimize.brentq(excess, 0.1 * radius, 10 * radius)


def truth_of(values):
    """Return fluxes (g, r), y, x, ra, dec, radii, axis ratio and angle of both sources from the parameters, shape (22,).

    The axis ratio is the model's own: that of the matching Gaussian is the same for the Gaussian galaxy alone.
    """
    result = []
    for name, index in (("galaxy", 0.5), ("disk", None)):
        center, flux, radius, ellipticity = (
            values[f"sources.{name}.{what}"]
            for what in ("center", "spectrum.flux", "morphology.half_light_radius", "morphology.ellipticity")
        )
        index = values["sources.disk.morphology.sersic_index"] if index is None else index
        norm = np.hypot(*ellipticity)
        # x points west, y north.
        result += [*flux, *center, -SHARP_SCALE * center[1], SHARP_SCALE * center[0]]
        result += [SHARP_SCALE * circular_radius(radius, float(index), ellipticity, each) for each in FRACTIONS]
        result += [np.sqrt((1 - norm) / (1 + norm))]
        # East of north: clockwise from x.
        result += [-np.rad2deg(0.5 * np.arctan2(ellipticity[1], ellipticity[0]))]
    return np.array(result)


COLUMNS = ["flux_err_g", "flux_err_r", "y_err", "x_err", "ra_err", "dec_err"]
COLUMNS += ["half_light_radius_err", "r80_err", "r90_err", "axis_ratio_err", "position_angle_err"]


def errors_in(table, columns=tuple(COLUMNS)):
    """Return the errors of all columns, flat, source by source."""
    return np.concatenate([[float(getattr(row[name], "value", row[name])) for name in columns] for row in table])


@pytest.mark.parametrize(("size", "name"), [(32, "hat"), (40, "drizzled")])
def test_errors_are_those_of_the_dense_covariance(size, name):
    """With J the derivatives of all pixels along all free parameters, and C the covariance: (J^T C^-1 J)^-1.

    Whitening is exact for 32 x 32 = 1024 pixels, of whatever noise. With 40 x 40 it is approximate.
    """
    observations = observations_of(size, name)
    frame = sf.Frame.from_observations(observations, coverage="union")
    scene = scene_of(frame)
    parameters = sf.Parameters.default(scene, observations)
    for path in FREE:
        parameters = parameters.free(path)
    result = as_result(scene, observations, parameters)
    sharp = result.observations[0]
    values = values_of(scene, observations, parameters)
    assert sharp.renderer.inside.all()
    factor = np.linalg.cholesky(1.3**2 * covariance_of(CORRELATIONS[name], (size, size)))

    def images(values):
        moved, (first, second) = posterior.with_parameters(scene, result.observations, values)
        window = (0, *second.renderer.window.slices)
        return np.concatenate([first.render(moved).ravel(), second.render(moved)[window][second.renderer.inside]])

    pixels = differences(images, values, step_of)
    pixels[: size**2] = np.linalg.solve(factor, pixels[: size**2])
    covariance = np.linalg.inv(pixels.T @ pixels)
    slopes = differences(truth_of, values, lambda path: 0.01 * step_of(path))
    slopes[20] = differences(lambda moved: ratios(with_values(result, moved)), values, step_of)[1]
    expected = np.sqrt(np.einsum("qi,ij,qj->q", slopes, covariance, slopes))
    found = errors_in(sf.catalog(result, model_error=False, progress=False))
    # 2e-2: radii are measured from pixels, their errors have been within 9e-3; all others within 2e-3.
    np.testing.assert_allclose(found, expected, rtol=0.02)
    together = sf.catalog_covariance(result, model_error=False, progress=False)
    names = [(source, column.replace("_err", "", 1)) for source in ("galaxy", "disk") for column in COLUMNS]
    order = [together.names.index(each) for each in names]
    correlation = together.matrix[np.ix_(order, order)] / np.outer(found, found)
    exact = slopes @ covariance @ slopes.T / np.outer(expected, expected)
    np.testing.assert_allclose(correlation, exact, atol=0.02)
    pair = ("galaxy", "flux_g"), ("disk", "flux_g")
    assert together[pair] == together.matrix[names_at(together, pair)]
    with pytest.raises(KeyError, match=r"want \(source, column\)"):
        together[("galaxy", "flux_z"), ("disk", "y")]


def names_at(together, pair):
    """Return row and column of a pair of quantities."""
    return tuple(together.names.index(each) for each in pair)


def with_values(result, values):
    """Return the scene with other values of parameters."""
    return posterior.with_parameters(result.scene, result.observations, values)[0]


def ratios(scene):
    """Return the axis ratios that are measured, shape (source,)."""
    values = np.array([np.linalg.eigvalsh(shape.moments) for shape in measure_shapes(scene)])
    return np.sqrt(values[:, 0] / values[:, 1])


def test_slopes_of_sums_of_parts_are_finite_differences_of_the_measurement():
    """A bulge in a disk, with one center; two parts side by side; a radius that depends on the channel."""
    observations = observations_of(40, "drizzled")
    frame = sf.Frame.from_observations(observations, coverage="union")
    bulge, disk = sf.SersicMorphology(1.3, 3.0, (0.0, 0.1)), sf.GaussianMorphology(3.0, (-0.2, 0.1))
    linked = sf.GaussianMorphology(sf.link.PerBand({"g": 2.0, "r": 2.8}), (0.2, 0.1))
    sources = {
        "whole": sf.CompositeSource(
            {"bulge": sf.Source((14.3, 15.2), [30.0, 60.0], bulge), "disk": sf.Source((14.3, 15.2), [90.0, 50.0], disk)}
        ),
        "pair": sf.CompositeSource(
            {"one": sf.Source((27.4, 13.0), [60.0, 40.0], disk), "other": sf.Source((29.1, 16.0), [40.0, 80.0], bulge)}
        ),
        "colored": sf.Source((26.0, 29.0), [70.0, 80.0], linked),
    }
    scene = sf.Scene(frame, sources)
    parameters = sf.Parameters.default(scene, observations).tie(
        "sources.whole.parts.bulge.center", "sources.whole.parts.disk.center"
    )
    result = as_result(scene, observations, parameters)
    problem, state, layout = posterior.build(scene, result.observations, parameters)
    weights = np.array([1.0, 0.6])

    def shapes_of(scene):
        rows = [
            [*each.center, *each.moments[[0, 0, 1], [0, 1, 1]], each.half_light_radius**2]
            for each in measure_shapes(scene, weights)
        ]
        return np.array(rows)

    def radii_of(scene):
        moved = dataclasses.replace(result, scene=scene)
        return light_radii(moved, measure_shapes(scene, weights), weights, FRACTIONS[1:], scene.stamps()) ** 2

    changes, shapes = stamp_slopes(problem, state), measure_shapes(scene, weights)
    found = shape_slopes(problem, layout, changes, scene, scene.stamps(), shapes, weights).toarray()
    vector, free = np.asarray(state.vector), np.nonzero(np.asarray(problem.free.vector))[0]
    flux = np.concatenate([where for where, _ in posterior.flux_coordinates(problem, layout)])
    checked = set()
    for coordinate in free:
        # All slopes are along coordinates that change shapes by about as much as pixels, logarithms and ellipticities do.
        unit = vector[coordinate] if coordinate in flux else 1.0

        def slopes_of(measured, step, coordinate=coordinate, unit=unit):
            ends = []
            for sign in (1, -1):
                moved = vector.copy()
                moved[coordinate] += sign * step * unit
                at = posterior.State(jax.numpy.asarray(moved), state.images)
                ends.append(measured(posterior.unpack(problem, at, layout, scene, result.observations)[0]))
            return (ends[0] - ends[1]) / (2 * step)

        slopes = unit * found[:, coordinate].reshape(-1, NUM_MEASURES)
        # Second order, and moments that are iterated to 1e-5 of some ten pixels squared.
        np.testing.assert_allclose(slopes[:, :5], slopes_of(shapes_of, 0.03)[:, :5], rtol=5e-3, atol=1e-2)
        # The curve of growth from pixels goes in waves of a tenth of a pixel squared; the second order of long steps is 3 %.
        np.testing.assert_allclose(slopes[:, 5], slopes_of(shapes_of, 0.2)[:, 5], rtol=0.05, atol=0.3)
        # Radii of profiles, of which the PSF is taken out.
        np.testing.assert_allclose(slopes[:, 6:], slopes_of(radii_of, 0.03), rtol=0.05, atol=0.3)
        checked |= set(np.nonzero(np.abs(slopes).max(axis=1))[0])
    assert checked == {0, 1, 2}
    assert found.shape == (3 * NUM_MEASURES, len(vector))


def test_what_is_fixed_free_or_unknown():
    """Errors of 0 for what is fixed, NaN for free pixels, infinite ones where nothing is known, and angles of round sources."""
    observations = observations_of(40, "drizzled")[:1]
    frame = sf.Frame.from_observations(observations)
    y, x = np.mgrid[-3:4, -3:4]
    sources = {
        "fixed": sf.Source((10.0, 11.0), [300.0], sf.GaussianMorphology(2.0, (0.2, 0.1))),
        "pixels": sf.Source((28, 11), [300.0], sf.PixelMorphology(np.exp(-(y**2 + x**2) / 6))),
        "dark": sf.Source((12.0, 29.0), [0.0], sf.GaussianMorphology(2.0)),
        "round": sf.Source((29.0, 28.0), [300.0], sf.GaussianMorphology(2.0)),
        "star": sf.Source((20.0, 20.0), [300.0], sf.PointMorphology()),
    }
    scene = sf.Scene(frame, sources)
    parameters = sf.Parameters.default(scene, observations).fix("sources.fixed.center").fix("sources.fixed.morphology")
    table = sf.catalog(as_result(scene, observations, parameters), progress=False)
    rows = dict(zip(table["id"], errors_in(table, ["flux_err_g", *COLUMNS[2:]]).reshape(len(table), -1), strict=True))
    assert 0 < rows["fixed"][0] < np.inf
    np.testing.assert_array_equal(rows["fixed"][1:], 0)
    assert np.isfinite(rows["pixels"][0])
    assert np.isnan(rows["pixels"][1:]).all()
    np.testing.assert_array_equal(rows["dark"][1:5], np.inf)
    assert np.isnan(rows["dark"][5:]).all()
    assert (rows["round"][:9] > 0).all()
    # That of a uniform distribution over half a turn.
    assert rows["round"][9] == pytest.approx(180 / np.sqrt(12))
    assert (rows["star"][1:5] > 0).all()
    np.testing.assert_array_equal(rows["star"][5:8], 0)


def test_pulls_have_unit_width():
    """Draws of correlated noise: differences from the truth over the errors of the catalogue."""
    observations = observations_of(40, "drizzled")[:1]
    frame = sf.Frame.from_observations(observations)
    (blank,), columns = observations, ["flux_g", "y", "x", "half_light_radius"]
    scene = scene_of(frame, ((1500.0,), (2500.0,)))
    clean = blank.match(frame).render(scene)
    truth = sf.catalog(as_result(scene, observations, sf.Parameters.default(scene, observations)), progress=False)
    pulls = []
    for number in range(60):
        noise = np.asarray(blank.noise.sample(jax.random.key(number)), float)
        obs = sf.Observation(
            clean + noise, noise=blank.noise, psf=blank.psf, wcs=blank.wcs, channels=["g"], name="sharp"
        )
        result = sf.fit(scene, obs, progress=False)
        assert result.is_converged
        table = sf.catalog(result, progress=False)
        errors = ["flux_err_g", "y_err", "x_err", "half_light_radius_err"]
        pulls.append([(table[c] - truth[c]) / table[e] for c, e in zip(columns, errors, strict=True)])
    pulls = np.array(pulls, float)
    # A width from 60 draws of two sources, which are nearly independent, is known to 6.5 %, a mean to 0.09: three of these.
    np.testing.assert_allclose(pulls.std(axis=(0, 2), ddof=1), 1, atol=0.2)
    assert (np.abs(pulls.mean(axis=(0, 2))) < 0.27).all()
