import dataclasses

import astropy.units as u
import equinox as eqx
import numpy as np
import numpyro.distributions as dist
import pytest
from astropy.coordinates import SkyCoord
from astropy.table import QTable
from numpyro.distributions import constraints

from scenefit.infer.fit import FitResult, Status
from scenefit.infer.posterior import with_parameters
from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology, SersicMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.catalog import catalog, channel_label, nuisance_errors, offset_errors
from scenefit.survey.flags import Flag
from tests.blends import (
    COARSE_PSF,
    COARSE_ROTATION,
    COARSE_SCALE,
    DISPLACEMENT,
    FINE_PSF,
    FINE_SCALE,
    GALAXIES,
    draw,
    fit_blend,
    fitted,
    fitted_shift,
    frame_of,
    observe,
    true_scene,
)
from tests.helpers import CENTER_DEG, make_observation
from tests.survey.test_measure import circular_half_light_radius

MEASURED = ["ra", "dec", "y", "x", "half_light_radius", "axis_ratio", "position_angle"]
PLAIN = [
    "id",
    "snr",
    "flags",
    "r20",
    "r80",
    "r80_err",
    "r90",
    "r90_err",
    "concentration",
    "star_score",
    "flux_correlation",
    "masked_fraction",
]
PLAIN += [*MEASURED, *(f"{name}_err" for name in MEASURED)]
BY_CHANNEL = ["flux", "flux_err", "mag", "mag_err", "blendedness", "chi_square", "num_pixels"]


def as_result(scene, observations, parameters=None, status=Status.CONVERGED) -> FitResult:
    """Return a scene as if it had been fitted."""
    matched = tuple(obs.match(scene.frame) for obs in observations)
    parameters = Parameters.default(scene, matched) if parameters is None else parameters
    return FitResult(scene, matched, parameters, status, 0.0, {}, 0, {})


@pytest.fixture(scope="module")
def table():
    return catalog(fitted())


# ---- columns and units


def test_columns_and_units_without_a_zeropoint(table):
    assert isinstance(table, QTable)
    assert set(table.colnames) == {*PLAIN, *(f"{kind}_{c}" for kind in BY_CHANNEL for c in ("v", "g", "r"))}
    units = {name: table[name].unit for name in table.colnames if hasattr(table[name], "unit")}
    assert units["ra"] == units["dec"] == units["position_angle"] == u.deg
    assert units["y"] == units["x"] == u.pix
    assert units["half_light_radius"] == u.arcsec
    assert units["mag_g"] == units["mag_err_g"] == u.mag
    assert units["flux_g"] == units["flux_err_g"] == u.dimensionless_unscaled
    assert np.isnan(table["mag_g"]).all()
    assert list(table["id"]) == list(GALAXIES)
    assert table.meta["status"] == "CONVERGED"
    assert table.meta["flags"] == {flag.name: flag.value for flag in Flag}


def test_with_zeropoints_fluxes_are_in_njy_and_magnitudes_in_ab():
    zeropoint = 27.0
    calibrated = catalog(fit_blend_calibrated(zeropoint))
    plain = catalog(fitted())
    for channel in ("v", "g", "r"):
        flux, error = calibrated[f"flux_{channel}"], calibrated[f"flux_err_{channel}"]
        assert flux.unit == error.unit == u.nJy
        counts, count_errors = plain[f"flux_{channel}"].value, plain[f"flux_err_{channel}"].value
        expected = (zeropoint * u.ABmag).to(u.nJy).value
        # 1e-3 of values known to 1 %: both fits stop within 0.03 standard errors of one minimum.
        np.testing.assert_allclose(flux.value / expected, counts, rtol=1e-3)
        np.testing.assert_allclose(error.value / expected, count_errors, rtol=1e-3)
        np.testing.assert_allclose(calibrated[f"mag_{channel}"].value, zeropoint - 2.5 * np.log10(counts), atol=1.1e-3)
        np.testing.assert_allclose(calibrated[f"mag_err_{channel}"].value, 1.0857 * count_errors / counts, rtol=2e-3)


def fit_blend_calibrated(zeropoint):
    """Fit the default blend with a zeropoint: the start is in nJy then."""
    factor = (zeropoint * u.ABmag).to(u.nJy).value
    observations = observe(zeropoint=zeropoint)
    scaled = {
        name: type(galaxy)(
            galaxy.position,
            galaxy.half_light_radius,
            galaxy.ellipticity,
            {c: factor * f for c, f in galaxy.flux.items()},
        )
        for name, galaxy in GALAXIES.items()
    }
    return fit_blend(observations, scaled)


def test_positions(table):
    sky = SkyCoord(table["ra"], table["dec"])
    center = SkyCoord(*CENTER_DEG, unit="deg")
    for row, place in zip(table, sky, strict=True):
        source = fitted().scene.sources[row["id"]]
        np.testing.assert_array_equal([row["y"].value, row["x"].value], source.center)
        east, north = center.spherical_offsets_to(place)
        galaxy = GALAXIES[row["id"]]
        # 15 mas: 4 standard errors of a tenth of a fine pixel over a signal-to-noise ratio of 30.
        np.testing.assert_allclose([north.arcsec, -east.arcsec], galaxy.position, atol=0.015)


def test_the_signal_to_noise_ratio_is_that_of_all_channels(table):
    bare = catalog(fitted(), model_error=False)
    ratios = [(bare[f"flux_{c}"] / bare[f"flux_err_{c}"]).value for c in ("v", "g", "r")]
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(table["snr"], np.sqrt(np.sum(np.square(ratios), axis=0)), rtol=1e-12)


def test_epochs_have_columns_of_their_own():
    assert channel_label("i") == "i"
    assert channel_label(("i", 2)) == "i_2"
    assert channel_label(("i", "2024-03-01")) == "i_2024-03-01"


def test_without_a_wcs_positions_and_sizes_are_pixels():
    shape = (30, 32)
    obs = make_observation(shape, channels=(("g", 1), ("g", 2)), wcs=None)
    frame = Frame(shape, channels=obs.channels, padding=8)
    morphology = GaussianMorphology(3.0, (0.3, 0.3))
    table = catalog(as_result(Scene(frame, {"a": Source((14.0, 15.0), [100.0, 50.0], morphology)}), [obs]))
    assert np.isnan(table["ra"]).all()
    assert np.isnan(table["dec"]).all()
    assert table["half_light_radius"].unit == u.pix
    assert {"flux_g_1", "flux_err_g_2"} <= set(table.colnames)
    # 22.5 degrees counter-clockwise from +x; 0.1: pixels and adaptive moments.
    assert table["position_angle"][0].value == pytest.approx(22.5, abs=0.1)


def test_rows_come_in_the_order_of_the_sources():
    result = fitted()
    source = result.scene.sources["a"]
    names = ["zeta", "10", "9", "alpha"]
    scene = Scene(result.scene.frame, {name: source for name in names})
    assert list(catalog(as_result(scene, result.observations))["id"]) == names


def test_a_result_that_was_saved_has_no_renderers():
    result = fitted_shift()
    bare = [
        eqx.tree_at(lambda o: o.renderer, obs, None, is_leaf=lambda leaf: leaf is None) for obs in result.observations
    ]
    loaded = dataclasses.replace(result, observations=tuple(bare))
    np.testing.assert_array_equal(catalog(loaded)["flux_err_g"], catalog(result)["flux_err_g"])
    np.testing.assert_array_equal(offset_errors(loaded)["coarse"], offset_errors(result)["coarse"])


# ---- errors


def test_flux_errors_are_calibrated():
    """The pulls of 40 realisations of one blend have zero mean and unit width, for every source and channel."""
    pulls = []
    for seed in range(40):
        table = catalog(fit_blend(observe(seed=100 + seed)), model_error=False)
        assert table.meta["status"] == "CONVERGED"
        truth = np.array([[g.flux[c] for c in ("v", "g", "r")] for g in GALAXIES.values()])
        measured, error = (
            np.array([table[f"{kind}_{c}"].value for c in ("v", "g", "r")]).T for kind in ("flux", "flux_err")
        )
        pulls.append((measured - truth) / error)
    pulls = np.array(pulls)
    # A width from 40 draws is known to 11 %, that of all 360 (120 independent ones at least) to 6.5 %.
    assert pulls.std(ddof=1) == pytest.approx(1, abs=0.25)
    assert (np.abs(pulls.std(axis=0, ddof=1) - 1) < 4 * 0.112).all()
    # Means of 40 draws scatter by 0.16.
    assert (np.abs(pulls.mean(axis=0)) < 4 * 0.158).all()


def test_errors_of_a_blend_of_points_equal_the_dense_inverse():
    """Two stars close together as one source, a third beside them: fluxes only, with all their covariances."""
    observations = observe()
    frame = frame_of(observations)
    places = {"first": (18.0, 19.0), "second": (19.5, 20.5), "third": (21.0, 17.0)}
    stars = {name: Source(place, [500.0, 400.0, 300.0], PointMorphology()) for name, place in places.items()}
    scene = Scene(frame, {"pair": CompositeSource({n: stars[n] for n in ("first", "second")}), "third": stars["third"]})
    parameters = Parameters.default(scene, observations).fix("sources.*.center")
    table = catalog(as_result(scene, observations, parameters))
    settings = {
        "v": ((40, 40), FINE_SCALE, FINE_PSF, 0.0),
        "g": ((16, 16), COARSE_SCALE, COARSE_PSF, COARSE_ROTATION),
    }
    for channel, setting in settings.items():
        obs = observations[0 if channel == "v" else 1].match(frame)
        columns = []
        for place in places.values():
            position = tuple((np.array(place) - 19.5) * FINE_SCALE)
            point = type(GALAXIES["a"])(position, 1e-6, (0.0, 0.0), {channel: 1.0})
            columns.append(draw(point, channel, *setting)[obs.renderer.window.slices][obs.renderer.inside])
        covariance = np.linalg.inv(np.array(columns) @ np.array(columns).T)
        expected = [np.sqrt(covariance[:2, :2].sum()), np.sqrt(covariance[2, 2])]
        # 3e-3: rendering to 1e-5 of the peak, through the inverse of a matrix of condition number 100.
        np.testing.assert_allclose(table[f"flux_err_{channel}"].value, expected, rtol=3e-3)
        np.testing.assert_allclose(table[f"flux_{channel}"].value, np.array([2, 1]) * {"v": 500, "g": 400}[channel])


def test_what_is_fixed_has_no_error():
    observations = observe()
    scene = true_scene(frame_of(observations))
    parameters = Parameters.default(scene, observations).fix("sources.b")
    table = catalog(as_result(scene, observations, parameters))
    np.testing.assert_array_equal(table["flux_err_g"][1], 0)
    assert (table["flux_err_g"][[0, 2]] > 0).all()


def test_offsets_without_a_free_one_have_no_error():
    assert all(np.isnan(error).all() for error in offset_errors(fitted()).values())


ROTATION, NOISE_SCALE = "observations.coarse.astrometry.rotation", "observations.fine.noise.scale"
ROTATION_PRIOR = 0.5


def turned_blend() -> FitResult:
    """Two galaxies and an image of 3 x 3 free pixels, seen by two instruments, the second displaced and turned; not fitted."""
    fine, coarse = observe(noise=False)
    observations = [fine, coarse.with_shift(DISPLACEMENT).with_rotation(0.3).with_background(1.0)]
    frame = frame_of(observations)
    sources = dict(list(true_scene(frame).sources.items())[:2])
    y, x = np.mgrid[-1:2, -1:2]
    envelope = np.exp(-(y**2 + x**2) / 4)
    free = PixelMorphology(envelope * (1 + 0.3 * np.sin(3 * y + x)), envelope=envelope)
    scene = Scene(frame, {**sources, "pixels": Source((26.0, 28.0), [400.0, 300.0, 800.0], free)})
    rng = np.random.default_rng(8)
    observations = [
        eqx.tree_at(lambda o: o.data, obs, obs.render(scene) + rng.normal(size=obs.shape)) for obs in observations
    ]
    parameters = Parameters.default(scene, observations).free("observations.coarse.astrometry.*").free(NOISE_SCALE)
    parameters = parameters.free("observations.coarse.background").prior(ROTATION, dist.Normal(0, ROTATION_PRIOR))
    return as_result(scene, observations, parameters)


STEPS = {"flux": 20.0, "image": 1e-3, "background": 1.0, "shift": 5e-3, "rotation": 0.1, "ellipticity": 0.01}
"""Of finite differences: small against the scales on which images change, large against rounding in float32. Of centers and radii
0.02 pixels."""


def dense_information(result) -> tuple[list[tuple[str, tuple]], np.ndarray]:
    """Return all free numbers but the scale of the noise, as (path, index), and J^T J, by differences; priors are residuals."""

    def whitened(values):
        scene, observations = with_parameters(result.scene, result.observations, values)
        model = scene.evaluate()
        rows = [
            obs.render(model)[(slice(None), *obs.renderer.window.slices)][:, obs.renderer.inside].ravel()
            for obs in observations
        ]
        free = scene.sources["pixels"].morphology
        return np.concatenate(
            [*rows, (free.image / free.prior().scale).ravel(), values[ROTATION].ravel() / ROTATION_PRIOR]
        )

    values = {path: np.asarray(value, float) for path, value in free_values(result).items()}
    names, columns = [], []
    for path, value in values.items():
        step = STEPS.get(path.rpartition(".")[2], 0.02)
        for place in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                changed = value.copy()
                changed[place] += sign * step
                ends.append(whitened({**values, path: changed}))
            names.append((path, place))
            columns.append((ends[0] - ends[1]) / (2 * step))
    derivative = np.array(columns)
    return names, derivative @ derivative.T


def free_values(result) -> dict[str, np.ndarray]:
    """Return the values of all free parameters but the scale of the noise."""
    values = {}
    for path, source in result.scene.components():
        values |= {f"{path}.center": source.center, f"{path}.spectrum.flux": source.spectrum.flux}
        values |= {
            f"{path}.morphology.{name}": getattr(source.morphology, name) for name in source.morphology.constraints
        }
    for obs in result.observations:
        values |= {f"observations.{obs.name}.{path}": value for path, value in obs.nuisances().items()}
    return {path: value for path, value in values.items() if result.parameters.is_fitted(path)}


def test_errors_of_observations_equal_the_dense_inverse():
    """Everything else marginalised over: shapes, fluxes, free pixels and their priors."""
    result = turned_blend()
    names, information = dense_information(result)
    unit = 1 / np.sqrt(np.diag(information))
    values, vectors = np.linalg.eigh(information * unit[:, None] * unit)
    # Of the sum of an image nothing depends: an eigenvalue of 0, up to rounding in float32.
    kept = values > 1e-5
    assert kept.sum() == len(kept) - 1
    variance = np.sum(vectors[:, kept] ** 2 / values[kept], axis=1) * unit**2
    expected = {
        path: np.zeros(np.shape(v)) for path, v in free_values(result).items() if path.startswith("observations.")
    }
    for (path, place), value in zip(names, variance, strict=True):
        if path in expected:
            expected[path][place] = np.sqrt(value)
    errors = nuisance_errors(result, progress=False)
    assert errors.keys() == {*expected, NOISE_SCALE}
    for path, value in expected.items():
        # 0.5 %: where conjugate gradients stop, in units of the error.
        np.testing.assert_allclose(errors[path], value, rtol=0.005)
    # The prior and the data have both a say, and what is marginalised over, too.
    alone = 1 / np.sqrt(information[names.index((ROTATION, ())), names.index((ROTATION, ()))])
    assert 1.02 * alone < errors[ROTATION] < 0.98 * ROTATION_PRIOR
    # Of n numbers, the standard deviation is known to 1 / sqrt(2 n). 5 %: what their squares add up to, which has been drawn.
    np.testing.assert_allclose(errors[NOISE_SCALE], 1 / np.sqrt(2 * 1600), rtol=0.05)
    np.testing.assert_array_equal(offset_errors(result)["coarse"], errors["observations.coarse.astrometry.shift"])
    assert np.isnan(offset_errors(result)["fine"]).all()
    # At the end of its range a parameter has the same error: what is asked for is free.
    ended = result.parameters.constrain(ROTATION, constraints.interval(-0.3, 0.3))
    at_bound = nuisance_errors(dataclasses.replace(result, parameters=ended), ROTATION, progress=False)
    assert list(at_bound) == [ROTATION]
    # 1e-3: rounding in float32, of the angle as of the rest.
    np.testing.assert_allclose(at_bound[ROTATION], errors[ROTATION], rtol=1e-3)


def test_errors_that_cannot_be_asked_for():
    assert nuisance_errors(fitted()) == {}
    assert nuisance_errors(fitted(), "observations.coarse.background") == {}
    with pytest.raises(ValueError, match=r"wants parameters of observations; '\*' matches 'sources\.a\.center'"):
        nuisance_errors(fitted(), "*")
    with pytest.raises(KeyError, match=r"No parameter matches 'observations\.corse'"):
        nuisance_errors(fitted(), "observations.corse")


# ---- shapes on the sky


@pytest.mark.parametrize("turn", [0.0, 33.0, 140.0])
def test_shapes_on_a_turned_sky(turn):
    """The same pixels, on a sky turned by an angle: position angles turn along."""
    observations = observe(noise=False, turn=turn)
    result = fit_blend(observations, rtol=1e-3)
    table = catalog(result)
    for row in table:
        galaxy = GALAXIES[row["id"]]
        norm = np.hypot(*galaxy.ellipticity)
        ratio = np.sqrt((1 - norm) / (1 + norm))
        # x points west and y north where the turn is 0: theta = 0 is a position angle of 90 degrees.
        theta = np.rad2deg(0.5 * np.arctan2(galaxy.ellipticity[1], galaxy.ellipticity[0]))
        difference = (row["position_angle"].value - (theta + turn + 90) + 90) % 180 - 90
        # Half a degree and 1 %: aliasing of the moments on pixels, at ellipticities of 0.2.
        assert abs(difference) < 0.5
        assert row["axis_ratio"] == pytest.approx(ratio, rel=0.01)
        values = np.sqrt(np.linalg.eigvalsh(galaxy.moments))
        truth = circular_half_light_radius(values[1], values[0])
        # 5 %: as in the tests of the measurement.
        assert row["half_light_radius"].value == pytest.approx(truth, rel=0.05)


# ---- flags


def test_flags_are_raised_where_they_should(table):
    assert list(table["flags"]) == [0, 0, 0]
    result = fitted()
    dark = result.scene.sources["a"]
    dark = Source(dark.center, [100.0, 0.0, 30.0], dark.morphology)
    gone = result.scene.sources["b"]
    gone = Source(gone.center, [0.0, 0.0, 0.0], gone.morphology)
    edge = Source((1.0, 20.0), [10.0, 10.0, 10.0], GaussianMorphology(2.0))
    scene = Scene(result.scene.frame, {"dark": dark, "gone": gone, "edge": edge})
    flags = catalog(as_result(scene, result.observations))["flags"]
    # A third of the last one's light is beyond the images.
    assert list(flags) == [Flag.ZERO_FLUX, Flag.ZERO_FLUX | Flag.VANISHED, Flag.EDGE | Flag.MASKED]
    stopped = catalog(as_result(scene, result.observations, status=Status.MAX_STEPS))
    assert (stopped["flags"] & Flag.NOT_CONVERGED).all()
    assert stopped.meta["status"] == "MAX_STEPS"


def test_shapes_at_the_ends_of_their_range():
    frame = Frame((61, 61), channels="g", padding=8)
    obs = make_observation(shape=(61, 61), channels=["g"], wcs=None)
    indices = {"low": 0.42, "inside": 2.0, "high": 7.97}
    sources = {
        name: Source((30.0, 15.0 + 15 * n), [5.0], SersicMorphology(1.0, index))
        for n, (name, index) in enumerate(indices.items())
    }
    sources["shrunk"] = Source((20.0, 30.0), [5.0], GaussianMorphology(5e-4))
    scene = Scene(frame, sources)
    found = dict(zip(sources, catalog(as_result(scene, [obs]))["flags"] & Flag.AT_BOUND, strict=True))
    assert {name for name, flag in found.items() if flag} == {"low", "high", "shrunk"}
    # What is held there on purpose isn't flagged.
    fixed = Parameters.default(scene, [obs]).fix("sources.*.morphology")
    assert not (catalog(as_result(scene, [obs], fixed))["flags"] & Flag.AT_BOUND).any()


def test_a_vanished_source_has_no_shape():
    result = fitted()
    gone = Source((20.0, 20.0), [0.0, 0.0, 0.0], GaussianMorphology(2.0))
    row = catalog(as_result(result.scene.with_sources(gone=gone), result.observations))[-1]
    assert np.isnan(row["half_light_radius"])
    assert np.isnan(row["axis_ratio"])
    assert np.isnan(row["position_angle"])
    assert row["flux_v"] == 0


def test_a_star_is_round():
    observations = observe()
    frame = frame_of(observations)
    places = [(12.3, 25.2), (25.1, 10.4), (28.5, 27.5)]
    scene = Scene(frame, [Source(place, [500.0, 500.0, 500.0], PointMorphology()) for place in places])
    table = catalog(as_result(scene, observations))
    # A fifth: there is hardly a size to have a ratio; certainly not the 0 of a line.
    assert (np.isnan(table["axis_ratio"]) | (table["axis_ratio"] > 0.2)).all()
    # 0.6 pixels: as in the tests of the measurement.
    assert (table["half_light_radius"] < 0.06 * u.arcsec).all()


def test_an_image_is_measured_from_its_pixels():
    shape = (31, 33)
    obs = make_observation(shape, psf=GaussianPSF(1.2))
    frame = Frame.from_observations(obs)
    y, x = np.mgrid[-10:11, -10:11]
    image = np.exp(-0.5 * (y**2 / 4 + x**2 / 9))
    scene = Scene(frame, {"a": Source((15, 16), [100.0], PixelMorphology(image))})
    row = catalog(as_result(scene, [obs]))[0]
    # 1 %: what the stamp cuts off, 3.3 standard deviations away. x points west.
    assert row["axis_ratio"] == pytest.approx(np.sqrt((4 - 0.49) / (9 - 0.49)), rel=0.01)
    assert row["position_angle"].to_value(u.deg) == pytest.approx(90, abs=0.5)
