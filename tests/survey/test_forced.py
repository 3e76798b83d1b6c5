"""Forced photometry against dense least squares, over noise draws, and where data are missing."""

from __future__ import annotations

import functools

import astropy.units as u
import jax.numpy as jnp
import numpy as np
import pytest

from scenefit.data.correlated import CorrelatedNoise
from scenefit.data.noise import FloorNoise, PoissonNoise, StudentTNoise
from scenefit.data.nuisances import Astrometry, Calibration
from scenefit.data.observation import Observation
from scenefit.infer import fluxes
from scenefit.model import link
from scenefit.model.morphology import ExponentialMorphology, GaussianMorphology, PointMorphology
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.spectrum import TransientSpectrum
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.flags import PhotometryFlag
from scenefit.survey.forced import forced_photometry
from tests.helpers import gaussian_image, tangent_wcs, with_sip

SHAPE, SCALE = (40, 44), 0.12


@functools.cache
def field(extra: tuple = ()) -> Scene:
    """Return a blend of three, one of them of two components, and whatever else (name, y, x) as points."""
    frame = Frame((56, 60), channels=["detection"], wcs=tangent_wcs((56, 60), 0.1), padding=24)
    host = CompositeSource(
        {
            "disk": Source((26.0, 24.5), [5.0], ExponentialMorphology(2.5, ellipticity=(0.3, 0.1))),
            "transient": Source((28.2, 26.1), [1.0], PointMorphology()),
        }
    )
    sources = {
        "host": host,
        "neighbour": Source((30.4, 31.2), [1.0], GaussianMorphology(1.8, ellipticity=(-0.2, 0.2))),
        "star": Source((17.7, 40.1), [1.0], PointMorphology()),
    }
    points = {name: Source((y, x), [1.0], PointMorphology()) for name, y, x in extra}
    return Scene(frame, {**sources, **points})


TRUTH = {"host.disk": 300.0, "host.transient": 80.0, "neighbour": 150.0, "star": 0.0}
"""Fluxes of the components, where noise has a standard deviation of 1."""


def observation(
    rng, *, channels=("r",), name="obs", rotation=7.0, offset=(0.4, -0.7), truth=None, scene=None, drawn=None, **options
):
    """Return an image of the field with noise, elongated PSF and its own pixels."""
    psf = gaussian_image((15, 15), (7, 7), 1.5) * np.exp(-0.03 * (np.arange(15)[:, None] - 7) * (np.arange(15) - 7))
    known = {
        "psf": np.stack([psf + 0.1 * c * gaussian_image((15, 15), (7, 7), 2.0) for c in range(len(channels))]),
        "wcs": tangent_wcs(SHAPE, SCALE, rotation_deg=rotation, offset=offset),
        "channels": channels,
        "name": name,
        "sigma": 1.0,
    }
    known.update(options)
    if "noise" in options:
        del known["sigma"]
    empty = Observation(np.zeros((len(channels), *SHAPE)), **known)
    truth = TRUTH if truth is None else truth
    scene = field() if scene is None else scene
    images = templates(scene, empty)
    sky = empty.background_image() / empty.nanojansky[:, None, None]
    signal = sum(truth[path] * image for path, image in images.items())
    sigma = np.asarray(known.get("sigma", 1.0))
    drawn = sigma * rng.normal(size=empty.shape) if drawn is None else drawn
    return Observation(signal + sky + 3.0 + drawn, **known)


def templates(scene, obs) -> dict[str, np.ndarray]:
    """Return images of every component with unit flux, rendered one by one."""
    obs = obs.with_background(0.0, (0.0, 0.0))
    frame = Frame(scene.frame.box.shape, channels=obs.channels, wcs=scene.frame.wcs, padding=scene.frame.padding)
    return {
        path.removeprefix("sources.").replace(".parts.", "."): obs.render(
            Scene(frame, [Source(part.center, np.ones(len(obs.channels)), part.morphology)])
        )
        for path, part in scene.components()
    }


def dense(scene, obs):
    """Return fluxes and covariance of every channel, the background last, by dense least squares in float64.

    Of the pixels on the frame, and of independent noise.
    """
    rows = np.stack([*templates(scene, obs).values(), np.ones(obs.shape)], axis=1)
    frame = Frame(scene.frame.box.shape, channels=obs.channels, wcs=scene.frame.wcs, padding=scene.frame.padding)
    renderer = obs.match(frame).matched_renderer
    weights = np.zeros(obs.shape)
    weights[(slice(None), *renderer.window.slices)] = renderer.inside
    # Of one weight each: the inverse variance of that pixel.
    weights *= np.asarray(obs.noise.whiten(np.ones(obs.shape)), float) ** 2
    target = (weights * (obs.data - obs.background_image())).reshape(len(rows), -1)
    rows = rows.reshape(*rows.shape[:2], -1)
    covariance = np.linalg.inv((rows * weights.reshape(len(rows), 1, -1)) @ rows.swapaxes(1, 2))
    return np.einsum("cij,cjp,cp->ci", covariance, rows, target), covariance


def compare(result, obs, expected, count):
    """Assert that fluxes and their covariances in an observation are those expected."""
    flux, covariance = expected
    rows = result.table[np.asarray(result.table["observation"]) == obs.name]
    found = rows["flux"].value.reshape(len(obs.channels), count)
    for c, channel in enumerate(obs.channels):
        error = np.sqrt(np.diag(covariance[c]))
        # A thousandth of the errors: a hundred times the rounding of single precision for these signals.
        np.testing.assert_allclose(found[c] / error[:count], flux[c, :count] / error[:count], rtol=0, atol=1e-3)
        scaled = result.covariance(obs.name, channel) / np.outer(error, error)[:count, :count]
        np.testing.assert_allclose(scaled, (covariance[c] / np.outer(error, error))[:count, :count], atol=1e-3)
    background = result.images[np.asarray(result.images["observation"]) == obs.name]
    error = np.sqrt(covariance[:, -1, -1])
    np.testing.assert_allclose(background["background_err"].value, error, rtol=1e-3)
    np.testing.assert_allclose(
        (background["background"].value - obs.background) / error, flux[:, -1] / error, rtol=0, atol=2e-3
    )


# ---- against dense least squares


def unlike_observations(rng) -> list[Observation]:
    """Return two channels of unlike depth, with a mask; and an image with all that may be known of it."""
    mask = rng.random(SHAPE) < 0.1
    deep = observation(rng, channels=("g", "r"), name="deep", sigma=np.array([1.0, 0.3])[:, None, None], mask=mask)
    odd = observation(
        rng,
        name="odd",
        rotation=-31.0,
        sigma=1 + 0.5 * rng.random(SHAPE),
        psf=GaussianPSF(1.6),
        astrometry=Astrometry((0.05, -0.08), 0.4),
        calibration=Calibration(1.1, 0.3),
        background=2.0,
        background_slope=(0.02, -0.01),
    )
    return [deep, odd]


def test_fluxes_and_covariances_are_those_of_dense_least_squares(rng):
    observations = unlike_observations(rng)
    result = forced_photometry(field(), observations, components=True)
    assert result.ids == tuple(TRUTH)
    for obs in observations:
        compare(result, obs, dense(field(), obs), len(TRUTH))


def test_links_are_evaluated_in_the_bands_of_the_observations(rng):
    radius = link.PerBand({"g": 1.2, "i": 2.8})
    frame = field().frame
    scene = Scene(
        frame,
        {
            "changing": Source((26.0, 25.0), [1.0], GaussianMorphology(radius)),
            "point": Source((30.0, 31.0), [1.0], PointMorphology()),
        },
    )
    # Neither band is one of the scene's, nor has its spectrum entries for them.
    truth = {"changing": 200.0, "point": 100.0}
    obs = observation(rng, channels=(("i", 3), ("g", 3)), truth=truth, scene=scene)
    compare(forced_photometry(scene, obs), obs, dense(scene, obs), 2)
    with pytest.raises(ValueError, match="z"):
        forced_photometry(scene, observation(rng, channels=("z",)))


def test_a_floor_of_the_noise_counts(rng):
    noise = FloorNoise(np.ones((1, *SHAPE)), 0.7)
    obs = observation(rng, noise=noise)
    compare(forced_photometry(field(), obs, components=True), obs, dense(field(), obs), len(TRUTH))


def test_correlated_noise_is_that_of_its_covariance(rng, key):
    distance = np.hypot(*np.mgrid[-3:4, -3:4])
    function = np.maximum(1 - distance / 3, 0.0) ** 2
    noise = CorrelatedNoise(np.ones((1, *SHAPE)), function[None], progress=False)
    obs = observation(rng, noise=noise, drawn=np.asarray(noise.sample(key)))
    result = forced_photometry(field(), obs, components=True)
    # Generalised least squares with the covariance of all pixels.
    y, x = (part.ravel() for part in np.mgrid[: SHAPE[0], : SHAPE[1]])
    dy, dx = y[:, None] - y, x[:, None] - x
    near = (np.abs(dy) <= 3) & (np.abs(dx) <= 3)
    matrix = np.where(near, function[np.clip(dy, -3, 3) + 3, np.clip(dx, -3, 3) + 3], 0.0)
    rows = np.stack([*(image[0] for image in templates(field(), obs).values()), np.ones(SHAPE)]).reshape(5, -1)
    covariance = np.linalg.inv(rows @ np.linalg.solve(matrix, rows.T))
    error = np.sqrt(np.diag(covariance))[:4]
    # Whitening by predictions from near pixels is an approximation: a few thousandths of the information.
    np.testing.assert_allclose(np.sqrt(np.diag(result.covariance("obs"))), error, rtol=0.01)
    # The same whitening, which is linear, of templates and data by themselves.
    rows, data = (
        np.stack([np.asarray(noise.whiten(jnp.asarray(image.reshape(1, *SHAPE)))).ravel() for image in images])
        for images in (rows, obs.data)
    )
    flux = np.linalg.lstsq(rows.T.astype(float), data[0].astype(float), rcond=None)[0][:4]
    np.testing.assert_allclose(result.table["flux"].value / error, flux / error, rtol=0, atol=1e-3)


def test_large_images_and_distorted_ones_take_another_way_to_the_same(rng, monkeypatch):
    # Both ways depend on WCS and nuisances alike; two channels, for the order of the unknowns.
    observations = unlike_observations(rng)[:1]
    quick = forced_photometry(field(), observations)
    monkeypatch.setattr(fluxes, "MAX_SIZE", 0)
    general = forced_photometry(field(), observations)
    error = quick.table["flux_err"].value
    # Both agree with dense least squares to a thousandth of the errors.
    np.testing.assert_allclose(
        (general.table["flux"].value - quick.table["flux"].value) / error, 0.0, rtol=0, atol=2e-3
    )
    np.testing.assert_allclose(general.table["flux_err"].value, error, rtol=2e-3)
    np.testing.assert_allclose(general.images["background"].value, quick.images["background"].value, rtol=0, atol=1e-3)
    np.testing.assert_allclose(general.images["chi_square"], quick.images["chi_square"], rtol=1e-4)
    np.testing.assert_array_equal(general.table["flags"], quick.table["flags"])
    np.testing.assert_array_equal(general.images["num_pixels"], quick.images["num_pixels"])


# ---- noise that isn't Gaussian


def test_outliers_hardly_matter_to_noise_with_wide_wings(rng):
    obs = observation(rng)
    data = obs.data.copy()
    places = rng.integers(0, SHAPE, size=(30, 2))
    data[0, places[:, 0], places[:, 1]] += 60.0
    known = {"psf": obs.psf, "wcs": obs.wcs, "channels": ("r",)}
    robust = Observation(data, noise=StudentTNoise(np.ones((1, *SHAPE))), name="t", **known)
    result = forced_photometry(field(), robust, components=True)
    pulls = (result.table["flux"].value - list(TRUTH.values())) / result.table["flux_err"].value
    # 30 pixels of 60 sigma shift what least squares find by many errors; 4 of these happen by chance in 6 of 10^5.
    assert np.abs(pulls).max() < 4
    assert (result.table["flags"] == 0).all()
    check_stationary(robust, result)


def test_counts_are_fitted_by_their_likelihood(rng):
    images = templates(field(), observation(rng))
    mean = 2.0 + sum(TRUTH[path] * image for path, image in images.items())
    obs = observation(rng)
    counts = rng.poisson(mean).astype(float)
    known = {"psf": obs.psf, "wcs": obs.wcs, "channels": ("r",)}
    obs = Observation(counts, noise=PoissonNoise(counts), name="counts", background=1.5, **known)
    result = forced_photometry(field(), obs, components=True)
    pulls = (result.table["flux"].value - list(TRUTH.values())) / result.table["flux_err"].value
    assert np.abs(pulls).max() < 4
    assert (result.table["flags"] == 0).all()
    check_stationary(obs, result)


def check_stationary(obs, result):
    """Assert that the log-likelihood, by the observation itself, is highest at the fluxes found, in steps of their errors."""
    images = templates(field(), obs)
    flux, error = result.table["flux"].value, result.table["flux_err"].value
    best = sum(f * image for f, image in zip(flux, images.values(), strict=True))
    sky = np.full(obs.shape, result.images["background"].value[0])

    def log_likelihood(model):
        return obs.noise.log_likelihood(jnp.asarray(model + sky - obs.data, jnp.result_type(float)))

    for step, image in zip(error, images.values(), strict=True):
        low, middle, high = (float(log_likelihood(best + sign * 0.5 * step * image)) for sign in (-1, 0, 1))
        # A parabola of curvature 1 / error^2, conditional errors being smaller, with its peak within 0.05 errors.
        curvature = (2 * middle - low - high) / 0.25
        assert curvature > 0.5
        assert abs(high - low) / (2 * 0.5 * curvature) < 0.05


# ---- many epochs


def epochs(rng, count, first=0):
    """Return images of unlike pointing, orientation, PSF and depth."""
    made = []
    for number in range(first, first + count):
        psf = gaussian_image((15, 15), (7, 7), rng.uniform(1.4, 1.7))
        made.append(
            observation(
                rng,
                channels=(("r", number),),
                name=f"epoch{number}",
                rotation=rng.uniform(-3, 3),
                offset=rng.uniform(-1, 1, 2),
                psf=psf,
                sigma=rng.uniform(0.8, 1.3),
            )
        )
    return made


def light(number):
    """Return the fluxes in an epoch: one component changes."""
    return {**TRUTH, "host.transient": 80.0 * np.sin(0.7 * number)}


@functools.cache
def monitored():
    """Return the photometry of a hundred epochs, of five pointings, in which a component changes."""
    rng = np.random.default_rng(11)
    made = []
    for base in epochs(rng, 5):
        images, sigma = templates(field(), base), base.noise.level()[0]
        for number in range(len(made), len(made) + 20):
            signal = 3.0 + sum(light(number)[path] * image for path, image in images.items())
            data = signal + sigma * rng.normal(size=base.shape)
            known = {"sigma": sigma, "psf": base.psf, "wcs": base.wcs}
            made.append(Observation(data, channels=[("r", number)], name=f"epoch{number}", **known))
    return forced_photometry(field(), made, components=True)


def test_pulls_are_standard_normal_and_what_is_not_there_has_no_flux_on_average():
    result = monitored()
    for path in TRUTH:
        curve = result.light_curve(path)
        true = np.array([light(number)[path] for number in range(100)])
        pulls = (curve["flux"].value - true) / curve["flux_err"].value
        # The mean of 100 scatters by 0.1, the standard deviation by 0.07: four times that.
        assert abs(pulls.mean()) < 0.4
        assert abs(pulls.std() - 1) < 0.28
    star = result.light_curve("star")
    assert 25 < (star["flux"] < 0).sum() < 75
    assert np.isnan(star["mag"][star["flux"] < 0]).all()
    weights = star["flux_err"].value ** -2
    mean = np.sum(weights * star["flux"].value) / weights.sum()
    assert abs(mean) < 4 / np.sqrt(weights.sum())


def test_chi_square_is_that_of_the_noise():
    images = monitored().images
    # Less 5 unknowns; each scatters by 59, their mean by 6, and some pixels are beside the frame.
    excess = images["chi_square"] - (images["num_pixels"] - 5)
    assert abs(excess.mean()) < 24


def test_epochs_of_one_shape_compile_once(rng, compilations):
    scene = field()
    forced_photometry(scene, epochs(rng, 3))
    compilations.clear()
    forced_photometry(scene, epochs(rng, 4, first=10))
    assert compilations == []


def test_light_curves_are_in_the_order_of_the_observations(rng):
    observations = [*epochs(rng, 3)[::-1], observation(rng, channels=("g",), name="still")]
    result = forced_photometry(field(), observations)
    curve = result.light_curve("host")
    assert list(curve["observation"]) == ["epoch2", "epoch1", "epoch0", "still"]
    np.testing.assert_array_equal(curve["epoch"], [2.0, 1.0, 0.0, np.nan])
    assert list(curve["channel"]) == ["r_2", "r_1", "r_0", "g"]
    assert list(result.light_curve("host", "r")["observation"]) == ["epoch2", "epoch1", "epoch0"]
    for wanted in ({"name": "nobody"}, {"name": "host", "band": "u"}):
        with pytest.raises(KeyError):
            result.light_curve(**wanted)
    with pytest.raises(KeyError, match="nowhere"):
        result.covariance("nowhere")
    with pytest.raises(KeyError, match="channels"):
        result.covariance("still", "r")


# ---- what the table says


def test_the_sum_of_a_composite_source_has_the_error_of_the_sum(rng):
    obs = observation(rng, zeropoint=27.0)
    parts = forced_photometry(field(), obs, components=True)
    whole = forced_photometry(field(), obs, num_sigma=5.0)
    covariance = parts.covariance("obs")
    assert whole.table["flux"][0].value == pytest.approx(parts.table["flux"][:2].value.sum())
    assert whole.table["flux_err"][0].value == pytest.approx(np.sqrt(covariance[:2, :2].sum()))
    # The components lie on each other: their sum is known better than either.
    assert covariance[0, 1] < 0
    assert whole.covariance("obs", "r")[0, 1] == pytest.approx(covariance[:2, 2].sum())


def test_units_magnitudes_and_upper_limits(rng):
    plain = forced_photometry(field(), observation(np.random.default_rng(3)))
    calibrated = forced_photometry(field(), observation(np.random.default_rng(3), zeropoint=28.9), num_sigma=5.0)
    assert plain.table["flux"].unit == u.dimensionless_unscaled
    assert np.isnan(plain.table["mag"]).all()
    assert calibrated.table["flux"].unit == u.nJy
    # 2.5 magnitudes below 31.4 a unit is 10 nJy.
    np.testing.assert_allclose(calibrated.table["flux"].value, 10 * plain.table["flux"].value, rtol=1e-6)
    bright = calibrated.table[0]
    assert bright["mag"].value == pytest.approx(31.4 - 2.5 * np.log10(bright["flux"].value))
    assert bright["mag_err"].value == pytest.approx(1.0857 / bright["snr"], rel=1e-4)
    for table, sigmas in ((plain.table, 3.0), (calibrated.table, 5.0)):
        limit = np.maximum(table["flux"], 0) + sigmas * table["flux_err"]
        np.testing.assert_allclose(table["upper_limit"].value, limit.value)
        assert table.meta["num_sigma"] == sigmas
    np.testing.assert_allclose(plain.table["snr"], (plain.table["flux"] / plain.table["flux_err"]).value)


def test_a_background_that_is_held_is_known(rng):
    obs = observation(rng, background=3.0)
    held = forced_photometry(field(), obs.with_background(6.0), background=False)
    free = forced_photometry(field(), obs.with_background(6.0))
    assert held.images["background"][0] == 6.0
    assert held.images["background_err"][0] == 0.0
    assert free.images["background"].value[0] == pytest.approx(6.0, abs=0.2)
    assert (held.table["flux_err"] < free.table["flux_err"]).all()


# ---- missing data


def test_sources_without_data_and_channels_without_pixels():
    rng = np.random.default_rng(8)
    outside = field((("outside", 2.0, 57.5),))
    mask = np.zeros((2, *SHAPE), bool)
    mask[1] = True
    obs = observation(rng, channels=("g", "r"), mask=mask, rotation=0.0, offset=(0.0, 6.0))
    result = forced_photometry(outside, obs)
    seen, blind = result.table[:4], result.table[4:]
    assert list(seen["id"]) == ["host", "neighbour", "star", "outside"]
    assert np.isnan(seen["flux"][3])
    assert np.isinf(seen["flux_err"][3])
    assert seen["flags"][3] & PhotometryFlag.NO_DATA
    without = forced_photometry(field(), obs)
    np.testing.assert_allclose(seen["flux"][:3].value, without.table["flux"][:3].value, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(seen["flux_err"][:3].value, without.table["flux_err"][:3].value, rtol=1e-5)
    assert np.isnan(blind["flux"]).all()
    assert np.isinf(blind["flux_err"]).all()
    assert (blind["flags"] & PhotometryFlag.NO_DATA).all()
    assert np.isnan(result.images["background"][1])
    covariance = result.covariance("obs", "g")
    assert np.isinf(covariance[3, 3])
    np.testing.assert_array_equal(covariance[3, :3], 0.0)


def test_sources_half_in_the_image_are_flagged(rng):
    obs = observation(rng, mask=np.broadcast_to(np.arange(SHAPE[1]) > 17, SHAPE))
    flags = forced_photometry(field(), obs).table["flags"]
    assert flags[0] == PhotometryFlag.PARTIAL
    assert flags[2] & PhotometryFlag.NO_DATA


def test_sources_at_one_place_share_their_light(rng):
    obs = observation(rng)
    alone = forced_photometry(field(), obs)
    scene = field((("ghost", 17.7, 40.1),))
    with pytest.warns(UserWarning, match=r"ghost, star can't be told apart in 1 of 1 image\(s\)"):
        result = forced_photometry(scene, obs)
    table = result.table
    np.testing.assert_array_equal(np.isinf(table["flux_err"]), [False, False, True, True])
    assert (table["flags"][2:] == PhotometryFlag.CONFUSED).all()
    error = alone.table["flux_err"].value
    np.testing.assert_allclose(table["flux_err"][:2].value, error[:2], rtol=1e-3)
    np.testing.assert_allclose(
        table["flux"][:2].value / error[:2], alone.table["flux"][:2].value / error[:2], atol=1e-3
    )
    # To a hundredth of the error, in spite of the singular matrix.
    assert abs(table["flux"][2:].value.sum() - alone.table["flux"][2].value) < 0.01 * error[2]
    pair = CompositeSource({name: scene.sources[name] for name in ("star", "ghost")})
    together = Scene(
        scene.frame, {"host": scene.sources["host"], "neighbour": scene.sources["neighbour"], "pair": pair}
    )
    with pytest.warns(UserWarning, match="can't be told apart"):
        result = forced_photometry(together, obs)
    assert result.table["flux"][2].value == pytest.approx(alone.table["flux"][2].value, abs=0.01 * error[2])
    assert result.table["flux_err"][2].value == pytest.approx(error[2], rel=1e-3)


def test_spectra_of_the_scene_do_not_matter(rng):
    frame = Frame((56, 60), channels=[("r", 1), ("r", 2)], wcs=field().frame.wcs, padding=24)
    sources = dict(field().sources)
    sources["star"] = Source((17.7, 40.1), TransientSpectrum([1.0, 2.0], epochs=[2]), PointMorphology())
    sources["host"] = Source((26.0, 24.5), [1.0, 1.0], ExponentialMorphology(2.5))
    sources["neighbour"] = Source((30.4, 31.2), [0.0, -1.0], GaussianMorphology(1.8))
    result = forced_photometry(Scene(frame, sources), observation(rng, channels=[("r", 1)]))
    assert np.isfinite(result.table["flux_err"]).all()


def test_images_without_wcs_and_with_distortion(rng):
    frame = Frame((40, 40), channels=["r"])
    scene = Scene(frame, {"a": Source((18.0, 21.3), [1.0], PointMorphology())})
    data = 50 * gaussian_image((40, 40), (18.0, 21.3), 1.5) + 0.01 * rng.normal(size=(40, 40))
    obs = Observation(data, sigma=0.01, psf=GaussianPSF(1.5), channels=["r"])
    table = forced_photometry(scene, obs).table
    assert abs(table["flux"][0].value - 50) < 4 * table["flux_err"][0].value
    bent = observation(rng, wcs=with_sip(field().frame.wcs.to_header(), 2e-3))
    assert not fluxes.FluxSolver(field(), [bent]).is_local(bent, fluxes.FluxSolver(field(), [bent]).geometry(bent))


# ---- errors


def test_bad_input_is_named(rng, as_users_have_it):
    scene, obs = field(), observation(rng)
    with pytest.raises(TypeError, match="Scene"):
        forced_photometry("scene", obs)
    with pytest.raises(TypeError, match="Observations"):
        forced_photometry(scene, [obs.data])
    with pytest.raises(ValueError, match="at least one observation"):
        forced_photometry(scene, [])
    with pytest.raises(ValueError, match="at least one source"):
        forced_photometry(Scene(scene.frame, {}), obs)
    with pytest.raises(ValueError, match="'obs' repeat"):
        forced_photometry(scene, [obs, obs])
    with pytest.raises(ValueError, match="calibrated"):
        forced_photometry(scene, [obs, observation(rng, name="nJy", zeropoint=27.0)])
    with pytest.raises(ValueError, match="num_sigma"):
        forced_photometry(scene, obs, num_sigma=0)
    with pytest.raises(ValueError, match="has a WCS"):
        forced_photometry(scene, Observation(obs.data, sigma=1.0, psf=obs.psf, channels=["r"]))
    with pytest.raises(ValueError, match="lies on the model frame"):
        forced_photometry(scene, observation_at(rng, 0.5))
    with pytest.raises(ValueError, match="narrower than the model PSF"):
        forced_photometry(scene, Observation(obs.data, sigma=1.0, psf=GaussianPSF(0.3), wcs=obs.wcs, channels=["r"]))


def observation_at(rng, degrees):
    """Return an image of another part of the sky."""
    wcs = tangent_wcs(SHAPE, SCALE, center_deg=(150.3 + degrees, 2.05))
    return Observation(rng.normal(size=SHAPE), sigma=1.0, psf=GaussianPSF(1.5), wcs=wcs, channels=["r"])
