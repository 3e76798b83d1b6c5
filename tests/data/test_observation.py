import astropy.units as u
import jax
import numpy as np
import pytest
import scipy.stats
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS

from scenefit.data.noise import FloorNoise, PoissonNoise, StudentTNoise, WhiteNoise
from scenefit.data.observation import Astrometry, Observation
from scenefit.model.morphology import PointMorphology
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame, is_same_frame, pixel_map
from scenefit.sky.psf import GaussianPSF, ImagePSF
from tests.helpers import CENTER_DEG, gaussian_image, make_observation, tangent_header, tangent_wcs

SHAPE = (2, 12, 14)
CHANNELS = ("g", "r")


@pytest.fixture
def data(rng):
    return rng.normal(10, 3, SHAPE)


def observe(data, **options):
    options = {"weights": 1.0, "psf": GaussianPSF(1.5), "channels": CHANNELS[: len(np.atleast_3d(data.T).T)], **options}
    return Observation(data, **options)


@pytest.fixture
def frame():
    return Frame(SHAPE[1:], channels=CHANNELS)


@pytest.fixture
def model():
    """A model image of two galaxies on a pixel frame."""
    image = 50 * gaussian_image(SHAPE[1:], (6, 6), 1.6) + 30 * gaussian_image(SHAPE[1:], (4, 9), 2.0)
    return np.stack([image, 0.3 * image])


# ---- construction


@pytest.mark.parametrize("kind", [">f4", "<f4", ">f8", "<f8", ">i2", "<i4", "uint16"])
def test_any_number_type_and_byte_order(data, kind):
    stored = np.round(data).astype(kind)
    obs = observe(stored, weights=np.ones(SHAPE, dtype=">f4"))
    assert obs.data.dtype == np.dtype(float)
    assert obs.data.dtype.isnative
    np.testing.assert_array_equal(obs.data, np.round(data))


def test_memory_mapped_fits_arrays(data, tmp_path):
    path = tmp_path / "image.fits"
    header = tangent_header(SHAPE[1:])
    units = [fits.PrimaryHDU(data.astype("f4"), header), fits.ImageHDU(np.full(SHAPE, 4, "f4"))]
    fits.HDUList(units).writeto(path)
    with fits.open(path, memmap=True) as hdus:
        obs = observe(hdus[0].data, weights=hdus[1].data, wcs=fits.Header(hdus[0].header))
        stored = hdus[0].data.astype(float)
    np.testing.assert_array_equal(obs.data, stored)
    np.testing.assert_array_equal(obs.noise.weights, 4.0)


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": 2.0 * u.uJy, "background": 500 * u.nJy},
        {"variance": 4e6 * u.nJy**2, "background": 0.5},
        {"weights": 0.25 / u.uJy**2, "background": [0.5, 0.5] * u.uJy},
        {"sigma": 2.0, "background": 0.5},
    ],
)
def test_data_with_a_unit_are_calibrated(data, options):
    plain = observe(data, weights=None, sigma=2.0, background=0.5, unit="uJy")
    obs = observe(data * u.uJy, **{"weights": None, **options})
    assert obs.flux_unit == "nJy"
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(obs.data, plain.data, rtol=1e-12)
    np.testing.assert_allclose(obs.noise.weights, plain.noise.weights, rtol=1e-12)
    np.testing.assert_allclose(obs.background, plain.background, rtol=1e-12)


def test_plain_numbers_are_in_the_unit_asked_for(data):
    plain = observe(data, unit="uJy")
    obs = observe(data * u.uJy, weights=1.0, unit="nJy")
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(obs.data, plain.data, rtol=1e-12)
    np.testing.assert_allclose(obs.noise.weights, 1.0, rtol=1e-12)
    np.testing.assert_allclose(observe(data * u.uJy / u.pix).data, plain.data, rtol=1e-12)


def test_counts_with_a_unit_need_a_zeropoint(data):
    counts = data * u.electron / u.s
    assert observe(counts).flux_unit == "data units"
    obs = observe(counts, weights=None, sigma=2 * u.electron / u.s, zeropoint=25.0)
    np.testing.assert_array_equal(obs.data, observe(data, zeropoint=25.0).data)


def test_masked_pixels_carry_no_information(data):
    bad = data > 12
    expected = observe(data, mask=bad)
    with_mask = observe(np.ma.masked_array(data, bad))
    np.testing.assert_array_equal(with_mask.noise.valid, ~bad)
    np.testing.assert_array_equal(with_mask.data, expected.data)
    for kind in ("weights", "variance", "sigma"):
        obs = observe(data, **{"weights": None, kind: np.ma.masked_array(np.ones(SHAPE), bad)})
        np.testing.assert_array_equal(obs.noise.valid, ~bad)
    integers = np.ma.masked_array(np.round(data).astype(">i2"), bad)
    np.testing.assert_array_equal(observe(integers).noise.valid, ~bad)


def test_epochs_of_one_band(data):
    obs = observe(data, channels=[("i", 1), ["i", "second"]])
    assert obs.channels == (("i", 1), ("i", "second"))


@pytest.mark.parametrize("astrometry", [(0.03, -0.02), [30, -20] * u.mas, Astrometry((0.03, -0.02))])
def test_astrometry_or_its_shift(data, astrometry):
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(observe(data, astrometry=astrometry).astrometry.shift, [0.03, -0.02], rtol=1e-12)


@pytest.mark.parametrize("rotation", [0.1, 6 * u.arcmin, np.array(0.1), np.deg2rad(0.1) * u.rad])
def test_a_rotation_in_any_unit(data, rotation):
    obs = observe(data, astrometry=Astrometry((0.03, -0.02), rotation))
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(obs.astrometry.rotation, 0.1, rtol=1e-12)
    np.testing.assert_allclose(observe(data).with_rotation(rotation).astrometry.rotation, 0.1, rtol=1e-12)
    assert observe(data).astrometry.rotation == 0


def test_shift_and_rotation_leave_each_other(data):
    obs = observe(data).with_shift((0.1, -0.2)).with_rotation(0.3)
    np.testing.assert_array_equal(obs.astrometry.shift, [0.1, -0.2])
    assert obs.with_shift((0.0, 0.0)).astrometry.rotation == 0.3
    changed = obs.with_nuisances({"astrometry.rotation": np.array(0.4)})
    assert changed.nuisances()["astrometry.rotation"] == 0.4
    np.testing.assert_array_equal(changed.astrometry.shift, [0.1, -0.2])


def test_the_data_handed_in_stay_as_they_are(data):
    data[0, 0, 0] = np.nan
    before, weights = data.copy(), np.full(SHAPE, 2.0)
    obs = observe(data, weights=weights, zeropoint=25.0, mask=data > 12)
    obs.data[:] = 0
    np.testing.assert_array_equal(data, before)
    np.testing.assert_array_equal(weights, 2.0)


def test_a_plane_is_one_channel(data):
    obs = observe(data[0], channels="g")
    assert obs.shape == (1, *SHAPE[1:])
    np.testing.assert_array_equal(obs.data[0], data[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weights": 4.0}, 4.0),
        ({"variance": 0.25}, 4.0),
        ({"sigma": 0.5}, 4.0),
        ({"weights": [1.0, 4.0]}, np.array([1.0, 4.0])[:, None, None]),
        ({"sigma": np.array([1.0, 0.5])}, np.array([1.0, 4.0])[:, None, None]),
        ({"weights": np.full(SHAPE[1:], 3)}, 3.0),
        ({"variance": np.full(SHAPE, 0.5)}, 2.0),
        ({"sigma": np.where(np.arange(14) == 3, np.inf, 1.0) * np.ones(SHAPE)}, 1.0 * (np.arange(14) != 3)),
        ({"weights": None, "noise": WhiteNoise(np.full(SHAPE, 5.0))}, 5.0),
    ],
    ids=["weight", "variance", "sigma", "weights", "sigmas", "weight map", "variances", "infinite", "noise"],
)
def test_every_way_to_give_the_noise(data, options, expected):
    obs = observe(data, **{"weights": None, **options})
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(obs.noise.weights, np.broadcast_to(expected, SHAPE), rtol=1e-12)


def test_nan_mask_and_weight_zero_mean_the_same(data, rng, frame, model):
    bad = rng.random(SHAPE) < 0.2
    weights = rng.uniform(0.5, 2, SHAPE)
    variants = [
        observe(np.where(bad, np.nan, data), weights=weights),
        observe(np.where(bad, np.inf, data), weights=weights),
        observe(data, weights=weights, mask=bad),
        observe(data, weights=weights, mask=bad.astype("uint8")),
        observe(data, weights=np.where(bad, 0.0, weights)),
        observe(data, weights=None, variance=np.where(bad, np.inf, 1 / weights)),
    ]
    for obs in variants:
        assert (obs.data[bad] == 0).all()
        np.testing.assert_array_equal(obs.noise.valid, ~bad)
    values = [obs.match(frame).log_likelihood(model) for obs in variants]
    # 1e-6: 1 / (1 / w) rounds.
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


def test_a_mask_of_one_plane_holds_for_all_channels(data):
    mask = np.zeros(SHAPE[1:], dtype=bool)
    mask[3, 4] = True
    np.testing.assert_array_equal(observe(data, mask=mask).noise.valid, np.broadcast_to(~mask, SHAPE))


def test_a_band_without_valid_pixels_is_legal(data, frame, model):
    data[1] = np.nan
    obs = observe(data).match(frame)
    chi_square = obs.chi_square(model)
    assert chi_square[1] == 0
    assert chi_square[0] == observe(data[0], channels="g").match(frame).chi_square(model)[0]
    assert np.isfinite(obs.log_likelihood(model))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"zeropoint": 27.0}, (27.0 * u.ABmag).to_value(u.nJy)),
        ({"zeropoint": [27.0, 30.0]}, ([27.0, 30.0] * u.ABmag).to_value(u.nJy)),
        ({"unit": "uJy"}, 1e3),
        ({"unit": u.Jy}, 1e9),
    ],
    ids=["zeropoint", "zeropoints", "uJy", "Jy"],
)
def test_fluxes_become_nanojansky(data, options, expected):
    weights = np.full(SHAPE, 2.0)
    obs = observe(data, weights=weights, background=[0.5, 1.0], **options)
    factor = np.broadcast_to(expected, 2)
    assert obs.flux_unit == "nJy"
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(obs.nanojansky, factor, rtol=1e-12)
    np.testing.assert_allclose(obs.data, data * factor[:, None, None], rtol=1e-12)
    np.testing.assert_allclose(obs.noise.weights, weights / factor[:, None, None] ** 2, rtol=1e-12)
    np.testing.assert_allclose(obs.background, [0.5, 1.0] * factor, rtol=1e-12)


def test_without_zeropoint_the_units_stay(data):
    obs = observe(data)
    assert obs.flux_unit == "data units"
    np.testing.assert_array_equal(obs.nanojansky, [1.0, 1.0])
    np.testing.assert_array_equal(obs.data, data)


@pytest.mark.parametrize("psf", [GaussianPSF(1.5), gaussian_image((9, 9), (4, 4), 1.5)])
def test_psf_or_its_image(data, psf):
    assert observe(data, psf=psf).psf.num_channels == 1


def test_wcs_or_its_header(data):
    header = tangent_header(SHAPE[1:])
    from_header, from_wcs = observe(data, wcs=header), observe(data, wcs=WCS(header))
    assert from_header.wcs.to_header_string() == from_wcs.wcs.to_header_string()


# ---- prediction and comparison


def test_render_adds_the_background(data, frame, model):
    plain, lifted = observe(data).match(frame), observe(data, background=[1.0, 2.0]).match(frame)
    # 1e-12: the same rendering plus a constant in float64.
    np.testing.assert_allclose(
        lifted.render(model), plain.render(model) + np.array([1.0, 2.0])[:, None, None], rtol=1e-12
    )
    np.testing.assert_allclose(plain.with_background([1.0, 2.0]).render(model), lifted.render(model), rtol=1e-12)


@pytest.mark.parametrize("slope", [(0.5, -0.25), [(0.5, -0.25), (0.0, 2.0)]])
def test_the_background_is_a_plane(data, slope):
    obs = observe(data, background=[1.0, 2.0], background_slope=slope)
    slope = np.broadcast_to(slope, (2, 2))
    np.testing.assert_array_equal(obs.background_slope, slope)
    image = obs.background_image()
    assert image.shape == SHAPE
    # 1e-12: rounding in float64. The value in the middle, between pixels, is the mean, and that of opposite corners.
    np.testing.assert_allclose(image.mean(axis=(1, 2)), [1.0, 2.0], rtol=1e-12)
    np.testing.assert_allclose((image[:, 0, 0] + image[:, -1, -1]) / 2, [1.0, 2.0], rtol=1e-12)
    np.testing.assert_allclose(np.diff(image, axis=1), slope[:, :1, None] + np.zeros((2, 11, 14)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.diff(image, axis=2), slope[:, 1:, None] + np.zeros((2, 12, 13)), rtol=0, atol=1e-12)


def test_without_a_slope_the_background_is_constant(data):
    obs = observe(data, background=[1.0, 2.0])
    np.testing.assert_array_equal(obs.background_slope, np.zeros((2, 2)))
    np.testing.assert_array_equal(obs.background_image(), np.ones(SHAPE) * np.array([1.0, 2.0])[:, None, None])
    np.testing.assert_array_equal(observe(data).background_image(), 0)


def test_render_adds_the_slope(data, frame, model):
    plain, tilted = (
        observe(data, **o).match(frame) for o in ({}, {"background": 3.0, "background_slope": (0.5, -1.0)})
    )
    # 1e-12: the same rendering plus a plane in float64.
    np.testing.assert_allclose(tilted.render(model), plain.render(model) + tilted.background_image(), rtol=1e-12)
    expected = observe(data - tilted.background_image()).match(frame)
    # 1e-5: single precision.
    np.testing.assert_allclose(tilted.chi_square(model), expected.chi_square(model), rtol=1e-5)


def test_outside_the_frame_there_is_the_tilted_sky():
    obs = make_observation((20, 20), background=0.5, background_slope=(0.1, 0.2))
    small = Frame((8, 8), channels="g", wcs=tangent_wcs((8, 8), 0.1))
    image = obs.match(small).render(np.zeros((1, 8, 8)))
    # Exact: nothing is added.
    np.testing.assert_array_equal(image, obs.background_image())


@pytest.mark.parametrize(
    ("options", "slope"),
    [
        ({"zeropoint": [27.0, 30.0]}, [(0.1, 0.2), (0.3, 0.4)]),
        ({"unit": "uJy"}, (0.1, 0.2)),
        ({"unit": "uJy"}, [100, 200] * u.nJy),
        ({"unit": "uJy"}, (100 * u.nJy, 0.2 * u.uJy)),
    ],
)
def test_slopes_become_nanojansky(data, options, slope):
    obs = observe(data, background_slope=slope, **options)
    plain = [(0.1, 0.2), (0.3, 0.4)] if "zeropoint" in options else [(0.1, 0.2)] * 2
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(obs.background_slope, np.array(plain) * obs.nanojansky[:, None], rtol=1e-12)


def test_with_background_changes_the_slope_if_asked(data):
    obs = observe(data, unit="nJy", background_slope=(0.1, 0.2))
    np.testing.assert_array_equal(obs.with_background(2.0).background_slope, [(0.1, 0.2)] * 2)
    both = obs.with_background([2.0, 3.0], slope=[0.001, 0.002] * u.uJy)
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(both.background_slope, [(1.0, 2.0)] * 2, rtol=1e-12)
    np.testing.assert_array_equal(both.background, [2.0, 3.0])
    each = obs.with_background(2.0, [(1.0, 2.0), (3.0, 4.0)])
    np.testing.assert_array_equal(each.background_slope, [(1.0, 2.0), (3.0, 4.0)])
    np.testing.assert_array_equal(obs.background_slope, [(0.1, 0.2)] * 2)


@pytest.mark.parametrize(
    ("slope", "error", "message"),
    [
        (0.5, ValueError, r"background_slope wants finite \(y, x\), or \(y, x\) for each of 2 channels; got 0.5"),
        ([1.0, 2.0, 3.0], ValueError, r"background_slope wants finite \(y, x\).*got \[1. 2. 3.\]"),
        ([1.0, np.nan], ValueError, r"background_slope wants finite \(y, x\)"),
        ([1.0, 2.0] * u.m, ValueError, "background_slope must be in nJy or a unit that converts"),
        ("steep", TypeError, "background_slope must be real numbers .*got 'steep'"),
    ],
)
@pytest.mark.usefixtures("as_users_have_it")
def test_bad_slopes_are_refused(data, slope, error, message):
    with pytest.raises(error, match=f"^HSC: {message}"):
        observe(data, unit="nJy", name="HSC", background_slope=slope)
    with pytest.raises(error, match=f"^HSC: {message}"):
        observe(data, unit="nJy", name="HSC").with_background(1.0, slope=slope)


def test_render_needs_a_renderer(data, model):
    with pytest.raises(ValueError, match=r"obs-x has no renderer yet: use obs\.match\(frame\)"):
        observe(data, name="obs-x").render(model)


def test_a_model_image_must_be_one_of_the_frame(data, frame):
    with pytest.raises(
        ValueError, match=r"wants the shape \(channel, y, x\) = \(2, 12, 14\) of the frame .*got \(12, 14\)"
    ):
        observe(data).match(frame).render(np.ones(SHAPE[1:]))


def star_on(frame):
    """Return a scene with one star in the middle of the test field."""
    return Scene(frame, {"star": Source(SkyCoord(*CENTER_DEG, unit="deg"), [100.0], PointMorphology())})


@pytest.mark.parametrize("other", [(20, 24), (30, 30)])
def test_render_follows_the_scene_to_another_frame(other):
    """An observation matched to one frame predicts a scene on another one as if it had never been matched."""
    obs = make_observation((20, 20), background=0.5)
    first, second = (Frame(shape, channels="g", wcs=tangent_wcs(shape, 0.1)) for shape in ((20, 24), (30, 30)))
    turned = Frame(other, channels=("r", "g"), wcs=tangent_wcs(other, 0.07, rotation_deg=40))
    scene = Scene(turned, {"star": Source(turned.center, [7.0, 100.0], PointMorphology())})
    expected = obs.render(scene)
    np.testing.assert_array_equal(obs.match(first).render(scene), expected)
    np.testing.assert_array_equal(obs.match(first).match(turned).render(scene), expected)
    for frame in (first, second):
        matched = obs.match(turned).match(frame)
        assert is_same_frame(matched.frame, frame)
        # 1e-4: aliasing of the point.
        assert matched.render(star_on(frame)).sum() == pytest.approx(100 + 0.5 * 400, rel=1e-4)


def test_matching_again_to_the_same_frame_does_nothing():
    obs = make_observation((20, 20))
    first, second = (Frame((20, 24), channels="g", wcs=tangent_wcs((20, 24), 0.1)) for _ in range(2))
    matched = obs.match(first)
    assert matched.match(second) is matched
    assert matched.with_shift((0.1, 0.0)).match(second).renderer.transfer is matched.renderer.transfer


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("thing", [None, (20, 24), GaussianPSF(1.0)])
def test_match_wants_a_frame(thing):
    with pytest.raises(TypeError, match=r"obs: match\(\) wants a Frame; got a"):
        make_observation().match(thing)


def test_outside_the_frame_there_is_only_background():
    obs = make_observation((20, 20), background=0.5)
    small = Frame((8, 8), channels="g", wcs=tangent_wcs((8, 8), 0.1))
    image = obs.match(small).render(100 * gaussian_image((1, 8, 8)[1:], (3, 3), 1.2)[None])
    # Pixel centres fall on pixel centres: the frame is the 8 x 8 pixels in the middle.
    outside = np.ones((20, 20), dtype=bool)
    outside[6:14, 6:14] = False
    assert (image[0][outside] == 0.5).all()
    assert (image[0][~outside] > 0.5).all()


def test_residual_chi_square_and_likelihood(data, rng, frame, model):
    weights = rng.uniform(0.5, 2, SHAPE)
    weights[0, 2] = 0
    obs = observe(data, weights=weights, background=0.3).match(frame)
    valid, prediction = weights > 0, obs.render(model)
    residual = np.where(valid, data - prediction, 0)
    np.testing.assert_array_equal(obs.residual(model), residual)
    # 1e-5: sums of 168 squares in single precision.
    np.testing.assert_allclose(obs.chi_square(model), (weights * residual**2).sum(axis=(1, 2)), rtol=1e-5)
    expected = scipy.stats.norm(prediction[valid], 1 / np.sqrt(weights[valid])).logpdf(data[valid]).sum()
    assert obs.log_likelihood(model) == pytest.approx(expected, rel=1e-5)


NOISES = {
    "white": (WhiteNoise, lambda w: scipy.stats.norm(0, w**-0.5)),
    "student": (StudentTNoise, lambda w: scipy.stats.t(5, 0, (0.6 / w) ** 0.5)),
    "floor": (lambda w: FloorNoise(w, [0.7, 2.0]), lambda w: scipy.stats.norm(0, np.sqrt(1 / w + FLOOR_VARIANCE))),
}
FLOOR_VARIANCE = np.array([0.7, 2.0])[:, None, None] ** 2


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("options", [{}, {"zeropoint": [20.0, 60.0]}])
def test_the_likelihood_has_the_noise(data, rng, frame, model, name, options):
    """In nJy, too, of which a data unit is 4e4 and 4e-12: it changes by the Jacobian alone."""
    make, distribution = NOISES[name]
    weights, mask = rng.uniform(0.5, 2, SHAPE), rng.random(SHAPE) < 0.1
    obs = observe(data, weights=None, noise=make(weights), mask=mask, background=0.3, **options).match(frame)
    unit = obs.nanojansky[:, None, None]
    prediction = observe(data, background=0.3).match(frame).render(model)
    expected = (distribution(weights).logpdf(data - prediction) - np.log(unit))[~mask].sum()
    # 1e-5: sums of 300 squares in single precision.
    assert obs.log_likelihood(model * unit) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"zeropoint": [20.0, 60.0]}])
def test_the_likelihood_of_counts(rng, frame, model, options):
    gain, sky = np.array([1.5, 40.0]), np.array([2.0, 0.05])
    prediction = observe(np.zeros(SHAPE), background=sky).match(frame).render(model)
    counts = rng.poisson(prediction * gain[:, None, None])
    mask = rng.random(SHAPE) < 0.1
    noise = PoissonNoise(counts, gain)
    data = counts / gain[:, None, None]
    obs = observe(data, weights=None, noise=noise, mask=mask, background=sky, **options).match(frame)
    expected = scipy.stats.poisson.logpmf(counts, prediction * gain[:, None, None])[~mask].sum()
    # 1e-5: sums of 300 squares in single precision.
    assert obs.log_likelihood(model * obs.nanojansky[:, None, None]) == pytest.approx(expected, rel=1e-5)


def test_another_noise(data, frame, model):
    """It is in the units of the observation, and what was masked stays so."""
    mask = data > 12
    obs = observe(data, mask=mask, unit="uJy").match(frame)
    other = obs.with_noise(WhiteNoise(np.full(SHAPE, 4.0)))
    np.testing.assert_array_equal(other.noise.weights, 4.0 * ~mask)
    np.testing.assert_array_equal(obs.noise.weights, 1e-6 * ~mask)
    expected = observe(data * 1e3, weights=4.0, mask=mask).match(frame).log_likelihood(model)
    # 1e-5: sums of 300 squares in single precision.
    assert other.log_likelihood(model) == pytest.approx(expected, rel=1e-5)
    # What it has no information about is lost.
    fewer = obs.with_noise(WhiteNoise(np.where(np.arange(14) == 3, 0.0, np.ones(SHAPE))))
    np.testing.assert_array_equal(fewer.noise.valid, ~mask & (np.arange(14) != 3))
    with pytest.raises(ValueError, match=r"^obs: the noise has shape \(1, 2, 3\), the data \(1, 12, 14\)"):
        make_observation().with_noise(WhiteNoise(np.ones((1, 2, 3))))


@pytest.mark.usefixtures("as_users_have_it")
def test_another_noise_is_a_noise():
    with pytest.raises(TypeError, match=r"^obs: noise= wants a noise model .*; got 3.0"):
        make_observation().with_noise(3.0)


@pytest.mark.parametrize("factor", [1e-20, 1e10])
def test_the_unit_of_the_data_does_not_matter(data, rng, frame, model, factor):
    weights = rng.uniform(0.5, 2, SHAPE)
    plain = observe(data, weights=weights, background=0.3).match(frame)
    scaled = observe(data * factor, weights=weights / factor**2, background=0.3 * factor).match(frame)
    # 1e-5: single precision inside.
    np.testing.assert_allclose(scaled.render(model * factor), plain.render(model) * factor, rtol=1e-5)
    np.testing.assert_allclose(scaled.chi_square(model * factor), plain.chi_square(model), rtol=1e-5)
    num_valid = data.size
    change = scaled.log_likelihood(model * factor) - plain.log_likelihood(model)
    assert change == pytest.approx(-num_valid * np.log(factor), rel=1e-5)


@pytest.mark.parametrize("zeropoint", [10.0, 60.0])
def test_the_zeropoint_does_not_matter(data, frame, model, zeropoint):
    plain, scaled = observe(data).match(frame), observe(data, zeropoint=zeropoint).match(frame)
    # 1e-5: single precision inside.
    np.testing.assert_allclose(scaled.chi_square(model * scaled.nanojansky[0]), plain.chi_square(model), rtol=1e-5)


def test_noise_of_the_truth_has_unit_chi_square(key):
    frame = Frame((40, 40), channels="g")
    model = 1e3 * gaussian_image((40, 40), (19, 21), 3.0)[None]
    blank = make_observation((40, 40), wcs=None, data=np.zeros((1, 40, 40)), sigma=2.5).match(frame)
    noisy = blank.render(model) + np.asarray(blank.noise.sample(key))
    obs = make_observation((40, 40), wcs=None, data=noisy, sigma=2.5).match(frame)
    # 4 standard deviations of the chi-square of 1600 pixels.
    assert obs.chi_square(model)[0] / 1600 == pytest.approx(1.0, abs=4 * np.sqrt(2 / 1600))


def test_changed_copies_leave_the_original(data):
    obs = observe(data)
    moved = obs.with_shift((0.1, -0.2))
    np.testing.assert_array_equal(moved.astrometry.shift, [0.1, -0.2])
    np.testing.assert_array_equal(obs.astrometry.shift, [0.0, 0.0])
    np.testing.assert_array_equal(obs.with_background(2.0).background, [2.0, 2.0])
    np.testing.assert_array_equal(obs.background, [0.0, 0.0])


def test_match_leaves_the_original(data, frame):
    obs = observe(data)
    assert obs.match(frame).renderer is not None
    assert obs.renderer is None


@pytest.mark.parametrize("background", [2.0, [2.0, 2.0] * u.nJy, 0.002 * u.uJy])
def test_backgrounds_take_units(data, background):
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(observe(data, unit="nJy").with_background(background).background, 2.0, rtol=1e-12)
    with pytest.raises(ValueError, match="observation: background must be without a unit"):
        observe(data).with_background(2.0 * u.nJy)


@pytest.mark.parametrize(
    "shift", [[30, -20] * u.mas, [0.03, -0.02] * u.arcsec, (0.03, -0.02), (30 * u.mas, -0.02 * u.arcsec)]
)
def test_shifts_take_units(shift):
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(Astrometry(shift).shift, [0.03, -0.02], rtol=1e-12)


def test_an_observation_is_a_tree_of_arrays(data, frame):
    obs = observe(data).match(frame)
    leaves, structure = jax.tree.flatten(obs)
    rebuilt = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(rebuilt.data, obs.data)
    assert rebuilt.channels == CHANNELS


# ---- bad input

NAN = np.where(np.arange(81).reshape(9, 9) == 7, np.nan, gaussian_image((9, 9), (4, 4), 1.0))
BAD_INPUT = {
    "axes": (np.ones(5), {}, ValueError, r"shape \(y, x\) or \(channel, y, x\) with at least one pixel; got \(5,\)"),
    "no pixels": (np.ones((1, 0, 5)), {}, ValueError, r"with at least one pixel; got \(1, 0, 5\)"),
    "complex": (np.ones((5, 5), complex), {}, TypeError, "must be real numbers; got an array of type complex128"),
    "text": (np.array([["a", "b"]]), {}, TypeError, "must be real numbers; got an array of type <U1"),
    "channel count": (
        None,
        {"channels": ("g",)},
        ValueError,
        r"has 2 channel\(s\), but 1 channel name\(s\) were given",
    ),
    "repeated": (None, {"channels": ("g", "g")}, ValueError, r"must be distinct .*got \['g', 'g'\], where g repeat"),
    "weights shape": (
        None,
        {"weights": np.ones((3, 12, 14))},
        ValueError,
        r"weights of shape \(3, 12, 14\) doesn't match",
    ),
    "sigma shape": (
        None,
        {"weights": None, "sigma": np.ones(5)},
        ValueError,
        r"sigma of shape \(5,\) doesn't match data",
    ),
    "negative weights": (None, {"weights": -1.0}, ValueError, "finite and >= 0; got 336 negative"),
    "NaN weights": (
        None,
        {"weights": [1.0, np.nan]},
        ValueError,
        r"got 168 NaN value\(s\), the first at .* = \(1, 0, 0\)",
    ),
    "negative variance": (None, {"weights": None, "variance": -1.0}, ValueError, "variance must be positive"),
    "zero sigma": (
        None,
        {"weights": None, "sigma": [1.0, 0.0]},
        ValueError,
        "sigma must be positive .*got NaN or <= 0",
    ),
    "NaN sigma": (None, {"weights": None, "sigma": np.nan}, ValueError, "sigma must be positive .*got NaN or <= 0"),
    "no noise": (None, {"weights": None}, ValueError, "exactly one of weights=, variance=, sigma= .*got None"),
    "two noises": (None, {"sigma": 1.0}, ValueError, r"exactly one of .*got \['sigma', 'weights'\]"),
    "noise twice": (None, {"noise": WhiteNoise(np.ones(SHAPE))}, ValueError, "either noise= or one of .*, not both"),
    "noise shape": (
        None,
        {"weights": None, "noise": WhiteNoise(np.ones((1, 12, 14)))},
        ValueError,
        r"the noise has shape \(1, 12, 14\), the data \(2, 12, 14\)",
    ),
    "mask shape": (None, {"mask": np.ones((2, 3), bool)}, ValueError, r"mask of shape \(2, 3\) doesn't match data"),
    "mask type": (None, {"mask": np.ones(SHAPE)}, TypeError, "mask must be boolean or integer .*got type float64"),
    "all masked": (None, {"mask": np.ones(SHAPE, bool)}, ValueError, "no pixel has a positive weight, finite data"),
    "all NaN": (np.full(SHAPE, np.nan), {}, ValueError, "no pixel has a positive weight, finite data"),
    "weights 0": (None, {"weights": 0.0}, ValueError, "no pixel has a positive weight, finite data"),
    "PSF NaN": (None, {"psf": NAN}, ValueError, "PSF image must be finite"),
    "PSF sum": (None, {"psf": -np.ones((3, 3))}, ValueError, "positive sum in every channel; got sums"),
    "PSF channels": (None, {"psf": GaussianPSF([1, 2, 3])}, ValueError, "the PSF has 3 channels, the data 2"),
    "PSF size": (
        None,
        {"psf": gaussian_image((13, 13), (6, 6), 2.0)},
        ValueError,
        "spans 13 pixels, more than the data of 12 x 14 pixels",
    ),
    "zeropoint": (None, {"zeropoint": np.nan}, ValueError, "zeropoint must be a finite AB magnitude"),
    "zeropoint count": (None, {"zeropoint": [25.0] * 3}, ValueError, r"one finite number or one per channel \(2\)"),
    "unit": (None, {"unit": "m"}, ValueError, "unit= wants a flux density"),
    "background": (None, {"background": [1.0, np.nan]}, ValueError, "background wants one finite number or one per"),
    "wcs": (None, {"wcs": WCS(naxis=2)}, ValueError, "two celestial axes"),
    "wcs type": (None, {"wcs": "image.fits"}, TypeError, "a FITS header; got a str"),
    "zeropoint text": (None, {"zeropoint": "bright"}, TypeError, "zeropoint must be real numbers .*got 'bright'"),
    "zeropoint unit": (None, {"zeropoint": 25 * u.STmag}, ValueError, "must be a finite AB magnitude; got 25"),
    "both units": (None, {"zeropoint": 25.0, "unit": "nJy"}, ValueError, "either zeropoint=.*or unit=, not both"),
    "data unit": (np.ones(SHAPE) * u.m, {"unit": "nJy"}, ValueError, "data must be in nJy or a unit that converts"),
    "sigma unit": (None, {"weights": None, "sigma": 2 * u.nJy}, ValueError, "sigma must be without a unit; got"),
    "variance unit": (
        np.ones(SHAPE) * u.nJy,
        {"weights": None, "variance": 2 * u.nJy},
        ValueError,
        "variance must be in nJy2 or a unit that converts",
    ),
    "weights text": (None, {"weights": "ivar"}, TypeError, "weights must be real numbers .*got 'ivar'"),
    "background text": (None, {"background": "sky"}, TypeError, "background must be real numbers .*got 'sky'"),
    "noise type": (
        None,
        {"weights": None, "noise": 3.0},
        TypeError,
        "noise= wants a noise model .*; got 3.0. Use sigma=",
    ),
    "PSF type": (None, {"psf": None}, TypeError, "a GaussianPSF, an ImagePSF or an array of its image; got None"),
    "channels type": (
        None,
        {"channels": ("i", 1)},
        TypeError,
        r"names, each a string or \(band, epoch\), .*\[1\] is neither",
    ),
    "shift": (None, {"astrometry": (1.0, np.nan)}, ValueError, r"a finite shift \(east, north\) in arcsec"),
    "shift unit": (None, {"astrometry": (1, 2) * u.m}, ValueError, r"shift \(east, north\) must be in arcsec"),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(data, case):
    bad_data, options, error, message = BAD_INPUT[case]
    bad_data = data if bad_data is None else bad_data
    with pytest.raises(error, match=f"^HSC: .*{message}"):
        observe(bad_data, **{"name": "HSC", **options})


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("name", ["a.b", "a*", "", 3])
def test_names_that_paths_can_not_hold(data, name):
    with pytest.raises(ValueError, match=r"Observation names are strings without '\.' and '\*'; got"):
        observe(data, name=name)


def test_an_oversampled_psf_may_have_more_samples_than_the_data_pixels(data):
    psf = ImagePSF(gaussian_image((31, 31), (15, 15), 4.5), oversampling=3)
    assert observe(data, psf=psf).psf.size < 12


@pytest.mark.parametrize("shift", [(1.0,), (np.nan, 0.0), (1.0, 2.0, 3.0)])
def test_bad_shifts_are_refused(shift):
    with pytest.raises(ValueError, match=r"a finite shift \(east, north\) in arcsec; got"):
        Astrometry(shift)


@pytest.mark.parametrize("rotation", [np.nan, 6.0, -1 * u.rad, (0.1, 0.2)])
def test_bad_rotations_are_refused(rotation):
    with pytest.raises(ValueError, match=r"one rotation \(north to east\) in degrees, at most 5 either way; got"):
        Astrometry(rotation=rotation)


def test_a_rotation_is_an_angle():
    with pytest.raises(ValueError, match=r"The rotation must be in deg or a unit that converts to it; got"):
        Astrometry(rotation=3 * u.m)


def turned_far():
    """A long image, and a frame of it that is hardly padded."""
    frame = Frame((16, 160), channels="g", wcs=tangent_wcs((16, 160)), padding=4)
    return make_observation((16, 160)), frame


def test_pixels_may_not_look_so_far_beyond_the_frame_that_light_wraps():
    obs, frame = turned_far()
    # 4 pixels of 24 above and below: 4.5 at 79.5 pixels from the middle, 3.2 degrees.
    message = r"^obs: turned by 4 degrees, pixels on the frame would look so far beyond it that light .*; at most 3\.2"
    with pytest.raises(ValueError, match=message):
        obs.with_rotation(4.0).match(frame)
    with pytest.raises(ValueError, match=message):
        obs.match(frame).with_rotation(4.0)
    with pytest.raises(ValueError, match=message):
        obs.match(frame).with_nuisances({"astrometry.rotation": np.array(4.0)})
    with pytest.raises(ValueError, match=message):
        obs.with_rotation(4.0).match_like(obs.match(frame, turning=True))


def test_up_to_there_light_does_not_wrap():
    """Light at one edge of the frame stays there, but for the far wings of the PSF."""
    obs, frame = turned_far()
    model = np.zeros((1, 16, 160))
    model[0, 0, 80] = 1.0
    image = obs.with_rotation(3.1).match(frame).render(model)[0]
    # The opposite edge is 8 pixels or more from where the light wraps to, the PSF 1.5 wide.
    assert np.abs(image[12:]).max() < 1e-4 * image.max()


def test_sources_appear_where_they_are_rendered():
    obs = make_observation((40, 40), scale_arcsec=0.2, rotation_deg=10, psf=GaussianPSF(1.2))
    obs = obs.with_shift((0.13, -0.08)).with_rotation(2.0)
    frame = Frame((64, 64), channels="g", wcs=tangent_wcs((64, 64)), padding=20)
    place = np.array([44.2, 22.6])
    image = obs.match(frame).render(gaussian_image((64, 64), place, 1.5)[None])[0]
    y, x = np.mgrid[:40, :40]
    seen = np.array([(y * image).sum(), (x * image).sum()]) / image.sum()
    # 1e-4 of a pixel: wings cut off, and single precision.
    np.testing.assert_allclose(obs.apparent_positions(place, frame), pixel_map(obs.wcs, frame.wcs, *seen), atol=2e-4)


def test_a_turned_observation_gets_a_renderer_that_turns():
    obs = make_observation()
    frame = Frame((12, 14), channels="g", wcs=tangent_wcs((12, 14)), padding=20)
    plain = obs.match(frame)
    assert plain.renderer.turn is None
    assert plain.match(frame) is plain
    for turned in (
        plain.with_rotation(0.5),
        obs.with_rotation(0.5).match(frame),
        obs.with_rotation(0.5).match_like(plain),
    ):
        assert turned.renderer.turn is not None
        # It serves at other angles as well.
        assert turned.match(frame) is turned
        assert turned.with_rotation(0.0).match(frame).renderer.transfer is turned.renderer.transfer
    model = gaussian_image((12, 14), (6, 7), 1.5)[None]
    # 3e-5 of the peak: the window of the non-uniform transform.
    again = obs.match(frame, turning=True)
    np.testing.assert_allclose(again.render(model), plain.render(model), atol=3e-5 * plain.render(model).max())


def test_messages_name_the_observation():
    with pytest.raises(ValueError, match=r"^HSC: data wants shape"):
        observe(np.ones(3), name="HSC", channels="g")
