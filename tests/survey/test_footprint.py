import numpy as np
import pytest
import scipy.optimize
import scipy.special

import scenefit as sf
from scenefit.arrays.profiles import sersic_b
from scenefit.infer.fit import FitResult, Status
from scenefit.survey.footprint import FOOTPRINT_LIGHT, measure_footprints
from scenefit.survey.measure import measure_shapes
from scenefit.survey.radii import light_radii
from scenefit.survey.stars import star_scores
from tests.helpers import tangent_wcs

SIZE, PSF = 61, 1.6
CENTERS, RADII, FLUXES = (
    {"a": (28.3, 25.2), "b": (31.0, 33.7)},
    {"a": 2.0, "b": 3.0},
    {"a": [900.0, 500.0], "b": [300.0, 800.0]},
)


def blend(seed=3):
    """Return two round Gaussians that overlap, and images with white noise in g and r, and sharper ones of half the size in r."""
    rng = np.random.default_rng(seed)
    wide = sf.Observation(
        np.zeros((2, SIZE, SIZE)),
        weights=1.0,
        psf=sf.GaussianPSF(PSF),
        wcs=tangent_wcs((SIZE, SIZE), 0.1),
        channels=["g", "r"],
        name="wide",
    )
    sharp = sf.Observation(
        np.zeros((1, 40, 40)),
        weights=4.0,
        psf=sf.GaussianPSF(1.2),
        wcs=tangent_wcs((40, 40), 0.15, rotation_deg=20.0),
        channels=["r"],
        name="sharp",
    )
    frame = sf.Frame.from_observations([wide])
    scene = sf.Scene(frame, {n: sf.Source(CENTERS[n], FLUXES[n], sf.GaussianMorphology(RADII[n])) for n in CENTERS})
    observations = []
    for obs, background in ((wide, [2.0, -1.0]), (sharp, [0.5])):
        obs = obs.match(frame).with_background(background)
        data = obs.render(scene) + rng.normal(size=obs.shape) / np.sqrt(obs.noise.weights)
        new = sf.Observation(
            data, weights=obs.noise.weights, psf=obs.psf, wcs=obs.wcs, channels=obs.channels, name=obs.name
        )
        observations.append(new.match(frame).with_background(background))
    return scene, tuple(observations)


def as_result(scene, observations) -> FitResult:
    """Return a scene as if it had been fitted."""
    parameters = sf.Parameters.default(scene, observations)
    return FitResult(scene, tuple(observations), parameters, Status.CONVERGED, 0.0, {}, 0, {})


@pytest.fixture(scope="module")
def blended():
    return blend()


# ---- images of single sources


def test_sources_add_up_to_the_scene(blended, eps):
    scene, observations = blended
    apart = sf.deblend(as_result(scene, observations))
    for obs in observations:
        total = sum(image for _, image in apart.images(obs.name)) + obs.background_image()
        # Rounding of Fourier transforms, in units of the brightest pixel; and wings that are cut at 1e-5 of the flux of 1500.
        np.testing.assert_allclose(total, obs.render(scene), atol=1500 * (2e-5 + 10 * eps))
        for name in scene.sources:
            alone = obs.render(scene.evaluate([name])) - obs.background_image()
            np.testing.assert_allclose(apart.image(name, obs.name), alone, atol=1500 * (2e-5 + 10 * eps))


def test_the_data_without_all_others(blended):
    scene, observations = blended
    apart = sf.deblend(scene, observations, names=["a"])
    for obs in observations:
        left = apart.without_others("a", obs.name)
        known = np.isfinite(left)
        assert known.mean() > 0.5
        others = obs.render(scene.without("a"))
        # As above.
        np.testing.assert_allclose(left[known], (obs.data - others)[known], atol=0.05)
    assert [name for name, _ in apart.images("wide")] == ["a"]


def test_what_cannot_be_deblended(blended):
    scene, observations = blended
    apart = sf.deblend(scene, observations[0])
    with pytest.raises(KeyError, match=r"no observation 'sharp'; there are \['wide'\]"):
        apart.image("a", "sharp")
    with pytest.raises(KeyError, match="'z' isn't among them"):
        apart.without_others("z", "wide")
    with pytest.raises(KeyError, match=r"no source \['z'\]"):
        sf.deblend(scene, observations, names=["z"])
    with pytest.raises(ValueError, match="wants observations, too"):
        sf.deblend(scene)
    with pytest.raises(ValueError, match="'wide' repeat"):
        sf.deblend(scene, [observations[0], observations[0]])


@pytest.mark.usefixtures("as_users_have_it")
def test_what_is_neither_a_fit_nor_a_scene():
    with pytest.raises(TypeError, match=r"wants a FitResult, or a Scene and observations; got a str\."):
        sf.deblend("field.fits")


# ---- footprints


def gaussian_overlap(first, second, sigma, scale):
    """Return the integral of the product of two Gaussians of unit flux, convolved with a PSF of width `sigma`, in pixels."""
    one, other = ((RADII[n] * scale) ** 2 / (2 * np.log(2)) + sigma**2 for n in (first, second))
    distance = scale**2 * np.sum(np.subtract(CENTERS[first], CENTERS[second]) ** 2)
    return np.exp(-0.5 * distance / (one + other)) / (2 * np.pi * (one + other))


def test_blendedness_of_two_gaussians(blended):
    """Against the integrals in closed form: in g of one observation; in r of two, weighted with their inverse variances."""
    scene, observations = blended
    found = measure_footprints(scene, observations, scene.stamps())
    # Pixels of the second are 1.5 times as large: the same flux, fewer of them.
    settings = {0: [(PSF, 1.0, 1.0)], 1: [(PSF, 1.0, 1.0), (1.2, 1 / 1.5, 4.0)]}
    for channel, parts in settings.items():
        for n, (name, other) in enumerate((("a", "b"), ("b", "a"))):
            own = sum(w * FLUXES[name][channel] * gaussian_overlap(name, name, psf, scale) for psf, scale, w in parts)
            rest = sum(
                w * FLUXES[other][channel] * gaussian_overlap(name, other, psf, scale) for psf, scale, w in parts
            )
            # 2e-3: PSFs sampled on pixels, wings that are cut.
            assert found.blendedness[n, channel] == pytest.approx(rest / (own + rest), abs=2e-3)
    np.testing.assert_allclose(found.seen, 1, atol=2e-3)


def test_chi_square_in_the_footprint(blended):
    """White noise: the mean square of residuals over the brightest pixels, which are a disk of four fifths of the light."""
    scene, observations = blended
    found = measure_footprints(scene, observations[:1], scene.stamps())
    variance = RADII["a"] ** 2 / (2 * np.log(2)) + PSF**2
    area = 2 * np.pi * variance * -np.log(1 - FOOTPRINT_LIGHT)
    # A pixel's width of the rim, at random on or off it.
    np.testing.assert_allclose(found.num_pixels[0], area, rtol=0.1)
    obs = observations[0]
    y, x = np.mgrid[:SIZE, :SIZE]
    inside = np.hypot(y - CENTERS["a"][0], x - CENTERS["a"][1]) ** 2 < area / np.pi
    squares = ((obs.data - obs.render(scene)) ** 2 * obs.noise.weights)[:, inside].sum(axis=1)
    # As many pixels differ as those at the rim do.
    np.testing.assert_allclose(found.chi_square[0] / found.num_pixels[0], squares / inside.sum(), atol=0.15)
    # Six standard errors of a mean of squares; a model that lacks a tenth of the flux is far beyond.
    ratio = found.chi_square / found.num_pixels
    assert (np.abs(ratio - 1) < 6 * np.sqrt(2 / found.num_pixels)).all()
    dim = sf.Source(CENTERS["a"], 0.7 * np.array(FLUXES["a"]), sf.GaussianMorphology(RADII["a"]))
    wrong = measure_footprints(scene.with_sources(a=dim), observations[:1], scene.with_sources(a=dim).stamps())
    assert wrong.chi_square[0, 0] / wrong.num_pixels[0, 0] > 3


def test_a_source_alone_and_one_without_light():
    scene, observations = blend()
    dark = sf.Source((10.0, 50.0), [0.0, 0.0], sf.GaussianMorphology(2.0))
    alone = sf.Scene(scene.frame, {"a": scene.sources["a"], "dark": dark})
    found = measure_footprints(alone, observations[:1], alone.stamps())
    # Wings that are cut, and rounding in float32.
    np.testing.assert_allclose(found.blendedness[0], 0, atol=1e-4)
    assert (found.num_pixels[1] > 10).all()


# ---- radii


def sersic_radius(fraction, index, radius):
    """Return the radius of a circle that holds a fraction of a round Sersic profile."""
    return radius * (scipy.special.gammaincinv(2 * index, fraction) / sersic_b(index)) ** index


def radii_of(source, fractions=(0.2, 0.5, 0.8, 0.9), weights=(1.0, 1.0)):
    scene, observations = blend()
    result = as_result(sf.Scene(scene.frame, {"s": source}), observations)
    shapes = measure_shapes(result.scene, weights)
    return light_radii(result, shapes, np.array(weights), fractions, result.scene.stamps())[0]


@pytest.mark.parametrize("index", [0.5, 1.0, 4.0])
def test_radii_of_round_profiles(index):
    morphology = sf.GaussianMorphology(2.2) if index == 0.5 else sf.SersicMorphology(2.2, index)
    expected = [sersic_radius(f, index, 2.2) for f in (0.2, 0.5, 0.8, 0.9)]
    # 2e-4: tables of curves of growth.
    np.testing.assert_allclose(radii_of(sf.Source((30.0, 30.0), [5.0, 3.0], morphology)), expected, rtol=2e-4)


def test_radii_of_an_elliptical_profile():
    """Circles, not ellipses: light inside one is an average over angles."""
    ellipticity, index = (0.3, -0.2), 1.5
    norm = np.hypot(*ellipticity)
    ratio = np.sqrt((1 - norm) / (1 + norm))
    angle = 2 * np.pi * (np.arange(400) + 0.5) / 400
    stretch = np.hypot(np.cos(angle) / np.sqrt(ratio), np.sin(angle) * np.sqrt(ratio))

    def missing(radius, fraction):
        inside = scipy.special.gammainc(2 * index, sersic_b(index) * (radius / stretch / 2.5) ** (1 / index))
        return fraction - inside.mean()

    expected = [scipy.optimize.brentq(missing, 0.01, 30, args=(f,)) for f in (0.2, 0.5, 0.8, 0.9)]
    found = radii_of(sf.Source((30.0, 30.0), [5.0, 3.0], sf.SersicMorphology(2.5, index, ellipticity)))
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_radii_of_a_sum_in_weighted_channels():
    """A point in a Gaussian: 30 % of the light at the center, so that a fifth of it has no radius."""
    parts = {
        "point": sf.Source((30.0, 30.0), [1.0, 9.0], sf.PointMorphology()),
        "disk": sf.Source((30.0, 30.0), [2.0, 3.0], sf.GaussianMorphology(3.0)),
    }
    found = radii_of(sf.CompositeSource(parts), weights=(5.0, 1.0))
    point = 14 / 27
    expected = [0.0, 0.0, *(3.0 * np.sqrt(-np.log2(1 - (f - point) / (1 - point))) for f in (0.8, 0.9))]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    np.testing.assert_array_equal(radii_of(sf.Source((30.0, 30.0), [1.0, 1.0], sf.PointMorphology())), 0)
    assert np.isnan(radii_of(sf.Source((30.0, 30.0), [0.0, 0.0], sf.GaussianMorphology(2.0)))).all()


def test_radii_of_an_image():
    y, x = np.mgrid[-14:15, -14:15]
    sigma = 3.0
    image = np.exp(-0.5 * (y**2 + x**2) / sigma**2)
    found = radii_of(sf.Source((30, 30), [4.0, 4.0], sf.PixelMorphology(image)), fractions=(0.2, 0.5, 0.8))
    # The image is the light convolved with the model PSF of 0.7 pixels. A tenth of a pixel: curves of growth from pixels.
    expected = np.sqrt(-2 * np.log(1 - np.array([0.2, 0.5, 0.8])) * (sigma**2 - 0.7**2))
    np.testing.assert_allclose(found, expected, atol=0.1)


# ---- stars


def test_the_score_is_the_ratio_of_evidences():
    """Against quadrature: a Gaussian likelihood of the area, an exponential prior of it for galaxies."""
    for area, error, psf_area in [(0.0, 0.1, 2.0), (0.3, 0.1, 2.0), (1.0, 3.0, 2.0), (0.05, 0.02, 0.5)]:
        grid = np.linspace(0, area + 40 * error, 400_001)
        density = np.exp(-grid / psf_area) / psf_area * np.exp(-0.5 * ((grid - area) / error) ** 2)
        galaxy, star = np.trapezoid(density, grid), np.exp(-0.5 * (area / error) ** 2)
        expected = star / (star + galaxy)
        # 1e-6: the trapezoidal rule.
        assert star_scores(np.array([area]), np.array([error]), psf_area)[0] == pytest.approx(expected, abs=1e-6)


def test_scores_at_the_limits():
    area, error = np.array([0.0, 1.0, 5.0, 0.1, np.nan, 1e-8]), np.array([0.0, 0.0, np.inf, np.nan, 1.0, 1e-9])
    np.testing.assert_array_equal(star_scores(area, error, 2.0)[:4], [1.0, 0.0, 0.5, np.nan])
    assert np.isnan(star_scores(area, error, 2.0)[4])
    assert star_scores(area, error, 2.0)[5] < 1e-10
    # Nothing but the prior, however large the error.
    assert star_scores(np.array([3.0]), np.array([1e6]), 2.0)[0] == pytest.approx(0.5, abs=1e-3)


def test_stars_and_galaxies_are_told_apart():
    """Points and Gaussians of 0.6 and 1.2 half-light radii of the PSF, of signal-to-noise ratio 60, all fitted as Gaussians."""
    rng = np.random.default_rng(5)
    places = [(y, x) for y in (15, 40, 65) for x in (15, 40, 65)]
    psf_radius = PSF * np.sqrt(2 * np.log(2))
    sizes = np.repeat([0.0, 0.6 * psf_radius, 1.2 * psf_radius], 3)
    shape = (1, 80, 80)
    blank = sf.Observation(np.zeros(shape), weights=1.0, psf=sf.GaussianPSF(PSF), channels=["g"])
    frame = sf.Frame.from_observations([blank])
    flux = 60 * 2 * np.sqrt(np.pi) * PSF
    centers = np.array(places) + rng.uniform(-0.5, 0.5, (9, 2))
    kinds = [sf.GaussianMorphology(size) if size else sf.PointMorphology() for size in sizes]
    truth = sf.Scene(frame, [sf.Source(c, [flux], kind) for c, kind in zip(centers, kinds, strict=True)])
    data = blank.match(frame).render(truth) + rng.normal(size=shape)
    obs = sf.Observation(data, weights=1.0, psf=sf.GaussianPSF(PSF), channels=["g"])
    start = sf.Scene(frame, [sf.Source(c, [flux], sf.GaussianMorphology(1.0)) for c in centers])
    table = sf.catalog(sf.fit(start, obs, progress=False), progress=False)
    scores = np.array(table["star_score"]).reshape(3, 3)
    # A point's area is 0 within 0.1 of that of the PSF, 1/30: one in twenty is beyond two standard errors and has less than 0.8.
    assert np.sort(scores[0])[1] > 0.8
    assert (scores[0] > 0.3).all()
    # 0.6^2 = 0.36 and more are ten standard errors.
    assert (scores[1:] < 1e-3).all()
