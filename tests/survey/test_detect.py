import warnings

import astropy.units as u
import equinox as eqx
import jax
import numpy as np
import pytest
from astropy.table import Table

from scenefit.data.correlated import CorrelatedNoise
from scenefit.data.observation import Observation
from scenefit.infer.matched import camera, channel_units, information, pulled, smoothed
from scenefit.model.morphology import GaussianMorphology
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.detect import detect
from scenefit.survey.initialize import initialize
from scenefit.survey.significance import Sky
from tests.helpers import compiled_for, tangent_wcs

FINE, COARSE = 1.3, 1.4
KERNEL = np.outer([1.0, 2.0, 1.0], [1.0, 2.0, 1.0]) / 16
CORRELATION = np.outer([1.0, 4.0, 6.0, 4.0, 1.0], [1.0, 4.0, 6.0, 4.0, 1.0]) / 36
STARS = np.array([[20.3, 24.6], [48.2, 55.7], [57.4, 18.1]])


def spot(shape, center, variance):
    """A round Gaussian of unit flux."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    square = (y - center[0]) ** 2 + (x - center[1]) ** 2
    return np.exp(-0.5 * square / variance) / (2 * np.pi * variance)


def fields(sources, *, seed=0, noise=1.0, unit=1.0, shape=(80, 80), rotation=0.0, correlated=False, **options):
    """A fine image and a coarse one, of 2.5 times its pixels, of round Gaussians (y, x, flux, sigma) in fine pixels."""
    rng = np.random.default_rng(seed)
    coarse = tuple(int(n / 2.5) for n in shape)
    wcs, wide = tangent_wcs(shape, 0.1), tangent_wcs(coarse, 0.25, rotation_deg=rotation)
    frame = Frame(shape, channels=("v", "g"), wcs=wcs)
    fine_image, coarse_image = np.zeros(shape), np.zeros(coarse)
    for y, x, flux, sigma in sources:
        fine_image += flux * spot(shape, (y, x), sigma**2 + FINE**2)
        column, row = wide.world_to_pixel(frame.to_sky(np.array([y, x])))
        coarse_image += flux * spot(coarse, (row, column), sigma**2 / 2.5**2 + COARSE**2)
    white = rng.normal(size=(shape[0] + 2, shape[1] + 2))
    if correlated:
        white = sum(
            KERNEL[i, j] * np.roll(white, (i - 1, j - 1), (0, 1)) for i in range(3) for j in range(3)
        ) / np.sqrt((KERNEL**2).sum())
    weights = np.ones((1, *shape)) / (noise * unit) ** 2
    kind = {"noise": CorrelatedNoise(weights, CORRELATION)} if correlated else {"weights": weights}
    fine = Observation(
        unit * (fine_image + noise * white[1:-1, 1:-1]),
        psf=GaussianPSF(FINE),
        wcs=wcs,
        channels=("v",),
        name="fine",
        **kind,
        **options,
    )
    ground = Observation(
        unit * (coarse_image + noise * rng.normal(size=coarse)),
        weights=1 / (noise * unit) ** 2,
        psf=GaussianPSF(COARSE),
        wcs=wide,
        channels=("g",),
        name="coarse",
    )
    return frame, [fine, ground]


def distances(found, places):
    return np.hypot(*(found.positions[:, None] - np.asarray(places)[None]).transpose(2, 0, 1))


def of_stars(flux=300.0, **options):
    return fields([(y, x, flux, 0.0) for y, x in STARS], **options)


# ---- matched filters


@pytest.mark.parametrize("rotation", [0.0, 20.0])
def test_information_is_that_of_the_rendered_column(rotation):
    frame, observations = fields([], rotation=rotation)
    rng = np.random.default_rng(3)
    weights = rng.uniform(0.5, 2.0, (1, 80, 80))
    weights[0, 30:33, 40:42] = 0
    observations[0] = eqx.tree_at(lambda o: o.noise.weights, observations[0], weights)
    observations = [obs.match(frame) for obs in observations]
    unit = channel_units(frame, observations)
    cameras = tuple(camera(frame, obs, np.zeros(obs.shape), unit) for obs in observations)
    sizes = jax.numpy.array([0.0, 2.0])
    canvas = (2, *frame.fft_shape)
    found = np.asarray(information(cameras, sizes, ((0, 0), (1, 1), (0, 1)), canvas, frame.inner_box))
    for place in ((40, 36), (31, 40), (25, 52)):
        columns = []
        for size in (0.0, 2.0):
            model = np.broadcast_to(spot((80, 80), place, size**2 + 0.7**2), (2, 80, 80))
            columns.append([obs.render(model)[0] for obs in observations])
        for number, (i, j) in enumerate(((0, 0), (1, 1), (0, 1))):
            exact = [
                (np.asarray(obs.noise.weights)[0] * columns[i][k] * columns[j][k]).sum() * unit[k] ** 2
                for k, obs in enumerate(observations)
            ]
            # 2 %: the square of a coarse PSF has frequencies that its pixels can't hold, and a hole in the weights, too.
            np.testing.assert_allclose(found[(number, slice(None), *place)], exact, rtol=0.02)


def test_numerators_are_products_with_the_rendered_column(key):
    frame, observations = fields([], rotation=20.0, correlated=True)
    observations = [obs.match(frame) for obs in observations]
    unit = channel_units(frame, observations)
    residuals = [np.asarray(obs.noise.sample(key), float) for obs in observations]
    cameras = tuple(camera(frame, obs, r, unit) for obs, r in zip(observations, residuals, strict=True))
    ky, kx = np.fft.fftfreq(frame.fft_shape[0]), np.fft.rfftfreq(frame.fft_shape[1])
    response = jax.numpy.asarray(frame.psf.transfer(ky, kx, np.eye(2))[0].real, float)
    pulls = pulled(cameras, jax.numpy.zeros(frame.shape))
    found = np.asarray(smoothed(pulls, response, jax.numpy.array([0.0, 2.0]), frame.inner_box))
    for number, size in enumerate((0.0, 2.0)):
        model = np.broadcast_to(spot((80, 80), (38, 44), size**2 + 0.7**2), (2, 80, 80))
        for k, obs in enumerate(observations):
            level = obs.noise.level()[:, None, None]
            noise = obs.noise.scaled(obs.noise.level())
            both = [np.asarray(noise.whiten(each / level)) for each in (obs.render(model), residuals[k])]
            # 5e-3 of the largest: a point of the frame is a Gaussian that its pixels cut off at their Nyquist frequency.
            assert found[number, k, 38, 44] == pytest.approx(
                float((both[0] * both[1]).sum()) * unit[k] / level[0, 0, 0],
                abs=5e-3 * float(np.abs(found[number, k]).max()),
            )


@pytest.mark.parametrize("correlated", [False, True])
def test_noise_has_unit_significance(correlated):
    squares = []
    for seed in range(8):
        frame, observations = fields([], seed=seed, rotation=20.0, correlated=correlated)
        observations = [obs.match(frame) for obs in observations]
        sky = Sky.build(frame, observations, [obs.data for obs in observations], np.array([0.0, 2.5]))
        planes = sky.coadded(sky.pull(np.zeros(frame.shape)))
        for layer in sky.layers():
            numerator = sky.chosen(layer, planes)
            squares.append([sky.significance(layer, numerator, 0), sky.contrast(layer, numerator, 1)])
    widths = np.sqrt(np.mean(np.square(squares), axis=(0, 2, 3)))
    # 15 %: 8 fields of about a hundred independent patches each, edges included.
    np.testing.assert_allclose(widths, 1.0, atol=0.15)


# ---- sources


@pytest.mark.parametrize("unit", [1.0, 1e-20, 1e10])
def test_stars_are_found_where_they_are(unit):
    frame, observations = of_stars(unit=unit)
    found = detect(observations, frame, progress=False)
    assert len(found) == 3
    distance = distances(found, STARS)
    # A tenth of a pixel: five standard errors of a star of S/N 65 in a PSF of 1.3 pixels.
    assert (distance.min(axis=0) < 0.1).all()
    assert found.table["is_compact"].all()
    assert (found.table["half_light_radius"] == 0).all()
    nearest = distance.argmin(axis=0)
    for channel in "vg":
        flux = found.table[f"flux_{channel}"][nearest] / unit
        error = found.table[f"flux_err_{channel}"][nearest] / unit
        # Five standard errors, and one per cent for misplaced stars.
        assert (np.abs(flux - 300) < 5 * error + 3).all()
    # Of a Gaussian PSF: sigma sqrt(4 pi) times the noise.
    assert found.table["flux_err_v"][0].value / unit == pytest.approx(FINE * np.sqrt(4 * np.pi), rel=0.01)
    assert [found.segmentation[tuple(np.rint(p).astype(int))] for p in found.positions] == [1, 2, 3]


def test_all_observations_count():
    """Stars too faint for each image alone."""
    flux = 4.0 * FINE * np.sqrt(4 * np.pi)
    frame, observations = of_stars(flux=flux, noise=1e-3)
    observations = [
        eqx.tree_at(lambda o: o.noise.weights, obs, np.full(obs.shape, weight))
        for obs, weight in zip(observations, (1.0, (COARSE / FINE) ** 2), strict=True)
    ]
    alone = [detect(obs, Frame((80, 80), channels=obs.channels, wcs=frame.wcs), progress=False) for obs in observations]
    both = detect(observations, frame, progress=False)
    assert [len(each) for each in alone] == [0, 0]
    assert len(both) == 3
    # sqrt(2) times 4, up to where the stars lie on the pixels.
    np.testing.assert_allclose(both.table["significance"], 4 * np.sqrt(2), rtol=0.05)


def test_a_galaxy_and_its_neighbours():
    """A faint extended source, and a compact one on the flank of a bright galaxy."""
    galaxy, star, faint = (40.0, 40.0, 30000.0, 6.0), (47.0, 50.0, 2500.0, 0.0), (15.0, 65.0, 600.0, 5.0)
    frame, observations = fields([galaxy, star, faint])
    found = detect(observations, frame, progress=False)
    assert len(found) == 3
    # A pixel: the two pull each other's peaks; for the faint source of S/N 20 some of its widths / S/N.
    assert (distances(found, [galaxy[:2], star[:2]]).min(axis=0) < 1.0).all()
    assert distances(found, [faint[:2]]).min() < 1.5
    rows = distances(found, [galaxy[:2], star[:2], faint[:2]]).argmin(axis=0)
    assert found.table["is_compact"][rows].tolist() == [False, True, False]
    # 10 %: rings stand for a Gaussian; half-light radius 1.1774 sigma.
    assert found.table["half_light_radius"][rows[0]].to_value(u.arcsec) == pytest.approx(0.1 * 1.1774 * 6, rel=0.1)
    assert float(found.table["flux_v"][rows[0]]) == pytest.approx(30000, rel=0.1)


def test_clumps_belong_to_their_host():
    # As wide as one of the rings of the model.
    galaxy, clump = (40.0, 40.0, 20000.0, 4.8), (46.0, 47.0, 400.0, 0.0)
    frame, observations = fields([galaxy, clump], noise=0.5)
    found = detect(observations, frame, progress=False)
    assert len(found) == 1
    assert (found.clumps["host"] == found.table["id"][0]).all()
    distance = np.hypot(found.clumps["y"].value - 46, found.clumps["x"].value - 47)
    # A pixel: the slope of the host moves the peak.
    assert distance.min() < 1.0
    # 40 %: the model of the host has some of its light.
    assert found.clumps["fraction"][distance.argmin()] == pytest.approx(0.02, rel=0.4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("apart", [11, 15])
def test_overlapping_galaxies_are_two(apart, seed):
    """The first model takes light of both; once both are modelled each has its own, and is where it is."""
    low = 40 - apart / 2
    places = [(low, 38), (low + apart, 42)]
    frame, observations = fields([(*places[0], 6000.0, 5.0), (*places[1], 2400.0, 3.0)], seed=seed)
    found = detect(observations, frame, progress=False)
    assert len(found) == 2
    away = distances(found, places)
    # Standard errors are below 0.1; the profiles of one are seen through models of the other.
    assert (away.min(axis=0) < 0.5).all()
    # 10 %: fluxes are first ones, of sums of rings of certain sizes.
    np.testing.assert_allclose(found.table["flux_v"].value[away.argmin(axis=0)], [6000, 2400], rtol=0.1)


def test_neighbours_that_the_sharp_image_does_not_see():
    """They are no parts of one another, although it shows no light of either."""
    places = [(30.0, 50.0), (46.0, 66.0)]
    frame, observations = fields([(*places[0], 6000.0, 3.0), (*places[1], 900.0, 3.0)])
    fine = observations[0]
    weights = np.array(fine.noise.weights)
    weights[:, :, 30:] = 0
    observations[0] = eqx.tree_at(lambda o: o.noise.weights, fine, weights)
    found = detect(observations, frame, progress=False)
    assert len(found) == 2
    assert (distances(found, places).min(axis=0) < 1.5).all()


def test_significance_where_only_the_blurred_image_has_data():
    """However deep the sharp image is elsewhere."""
    place = (40.0, 60.0)
    frame, observations = fields([(*place, 300.0, 0.0)])
    fine = observations[0]
    weights = 1e4 * np.array(fine.noise.weights)
    weights[:, :, 40:] = 0
    observations[0] = eqx.tree_at(lambda o: o.noise.weights, fine, weights)
    found = detect(observations, frame, progress=False)
    # The matched filter of a Gaussian PSF, up to where the star lies on the pixels and to the noise.
    expected = 300.0 / (COARSE * np.sqrt(4 * np.pi))
    assert found.significance[40, 60] == pytest.approx(expected, abs=3)
    assert distances(found, [place]).min() < 0.5


def test_correlated_noise_makes_no_sources():
    frame, observations = of_stars(correlated=True, rotation=20.0)
    found = detect(observations, frame, progress=False)
    assert len(found) == 3
    assert (distances(found, STARS).min(axis=0) < 0.2).all()


# ---- catalogues and scenes


def test_catalogue_rows_are_matched_and_kept(recwarn):
    frame, observations = of_stars()
    places = np.array([STARS[0] + 0.3, [70.0, 70.0], STARS[2]])
    for catalog in (
        places,
        frame.to_sky(places),
        Table({"RA": frame.to_sky(places).ra, "DEC": frame.to_sky(places).dec}),
    ):
        found = detect(observations, frame, catalog=catalog, progress=False)
        assert len(found) == 4
        assert sorted(found.table["origin"]) == ["both", "both", "catalog", "detected"]
        assert found.undetected_rows.tolist() == [1]
        assert found.matched_rows.tolist() == [0, 2]
        np.testing.assert_allclose(found.positions[-1], [70, 70], atol=1e-6)
        assert abs(found.table["significance"][-1]) < 5
    assert len(recwarn) == 0


def test_catalogues_that_can_not_be_used():
    frame, observations = of_stars()
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        detect(observations, frame, catalog=np.array([[3.0, 4.0], [np.nan, 2.0]]), progress=False)
    with pytest.raises(ValueError, match="RA and DEC"):
        detect(observations, frame, catalog=Table({"a": [1.0]}), progress=False)
    with pytest.warns(UserWarning, match=r"rows \[1\]"):
        found = detect(observations, frame, catalog=np.array([STARS[0], STARS[0] + 0.1]), progress=False)
    assert found.matched_rows.tolist() == [0]
    with pytest.warns(UserWarning, match="outside the model frame"):
        detect(observations, frame, catalog=np.array([[500.0, 3.0], STARS[0]]), progress=False)


def test_only_what_a_scene_lacks_is_found():
    galaxy, star = (40.0, 40.0, 20000.0, 4.0), (55.0, 52.0, 1600.0, 0.0)
    frame, observations = fields([galaxy, star])
    known = Source(np.array(galaxy[:2]), np.array([20000.0, 20000.0]), GaussianMorphology(4.0 * np.sqrt(2 * np.log(2))))
    found = detect(observations, frame, scene=Scene(frame, {"galaxy": known}), progress=False)
    assert len(found) == 1
    assert distances(found, [star[:2]])[0, 0] < 0.2
    assert found.known["id"].tolist() == ["galaxy"]
    assert found.known["y"][0] == 40 * u.pix


# ---- what images are like


def test_nothing_is_found_in_noise():
    frame, observations = fields([], rotation=20.0)
    found = detect(observations, frame, progress=False)
    assert len(found) == 0
    assert len(found.skycoord) == 0
    assert len(found.table) == len(found.clumps) == 0
    assert found.segmentation.shape == found.significance.shape == (80, 80)
    assert not found.segmentation.any()


def test_a_band_without_data_is_unknown():
    frame, observations = of_stars()
    wide = observations[1]
    observations[1] = Observation(
        np.concatenate([wide.data, wide.data]),
        weights=np.concatenate([np.zeros(wide.shape), np.ones(wide.shape)]),
        psf=wide.psf,
        wcs=wide.wcs,
        channels=("z", "g"),
        name="coarse",
    )
    frame = Frame((80, 80), channels=("v", "z", "g"), wcs=frame.wcs)
    found = detect(observations, frame, progress=False)
    assert len(found) == 3
    assert np.isnan(found.table["flux_z"]).all()
    assert np.isinf(found.table["flux_err_z"]).all()
    assert np.isfinite(found.table["flux_g"]).all()


def test_outliers_are_left_out():
    frame, observations = of_stars()
    data = observations[0].data.copy()
    data[0, 33, 60] = 400.0
    data[0, 10, 70] = 60.0
    observations[0] = eqx.tree_at(lambda o: o.data, observations[0], data)
    found = detect(observations, frame, progress=False)
    assert len(found) == 3
    assert (distances(found, STARS).min(axis=0) < 0.2).all()
    assert np.argwhere(found.outliers["fine"]).tolist() == [[0, 10, 70], [0, 33, 60]]
    assert not found.outliers["coarse"].any()


def test_a_saturated_star_is_one_source():
    y, x = np.mgrid[:80, :80]
    core = np.hypot(y - 40, x - 40) < 3
    frame, observations = fields([(40.0, 40.0, 1e5, 0.0)], mask=core)
    found = detect(observations, frame, progress=False)
    assert distances(found, [(40, 40)]).min() < 1.0
    assert len(found) == 1


def test_a_star_at_the_edge():
    frame, observations = fields([(0.2, 40.0, 5000.0, 0.0), (50.0, 20.0, 300.0, 0.0)])
    found = detect(observations, frame, progress=False)
    assert len(found) == 2
    # The star's light is cut off, not its peak.
    assert (distances(found, [(0.2, 40), (50, 20)]).min(axis=0) < 1.0).all()


def test_corners_without_data_do_not_count():
    _, observations = fields([(40.0, 40.0, 500.0, 0.0)], rotation=30.0)
    wide = observations[1]
    found = detect(wide, Frame((80, 80), channels=("g",), wcs=tangent_wcs((80, 80), 0.1)), progress=False)
    assert len(found) == 1
    assert (found.significance[0, 0], found.significance[-1, -1]) == (0, 0)


def test_pixels_without_a_sky():
    rng = np.random.default_rng(4)
    image = 300 * spot((60, 60), (20.3, 31.2), FINE**2) + rng.normal(size=(60, 60))
    obs = Observation(image, weights=1.0, psf=GaussianPSF(FINE), channels=("v",), name="plain")
    found = detect(obs, Frame.from_observations([obs]), progress=False)
    assert distances(found, [(20.3, 31.2)])[0, 0] < 0.2
    assert np.isnan(found.table["ra"]).all()
    assert found.table["half_light_radius"].unit == u.pix


# ---- use


def test_a_scene_starts_from_detections():
    frame, observations = of_stars()
    found = detect(observations, frame, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scene = initialize(frame, observations, found.skycoord, progress=False)
    # A tenth of a pixel: the start may be nearer to the peak.
    np.testing.assert_allclose([s.center for s in scene.sources.values()], found.positions, atol=0.1)


def test_fields_of_one_shape_share_programs():
    compiled = []
    for seed in (0, 1):
        frame, observations = of_stars(seed=seed)
        matched = [obs.match(frame) for obs in observations]
        sky = Sky.build(frame, matched, [obs.data for obs in matched], np.array([0.0, 2.5]))
        compiled.append(compiled_for(sky.groups))
    assert compiled[0] == compiled[1]


def test_options_out_of_range(as_users_have_it):
    frame, observations = of_stars()
    for options, message in (
        ({"threshold": 0.0}, "threshold"),
        ({"scales": (2.0, 1.0)}, "scales"),
        ({"iterate": -1}, "iterate"),
    ):
        with pytest.raises(ValueError, match=message):
            detect(observations, frame, **options)
    with pytest.raises(ValueError, match="at least one"):
        detect([], frame)
    with pytest.raises(TypeError, match="Observations"):
        detect([frame], frame)
    with pytest.raises(TypeError, match="Frame"):
        detect(observations, observations[0])
    with pytest.raises(TypeError, match="Scene"):
        detect(observations, frame, scene=frame)
