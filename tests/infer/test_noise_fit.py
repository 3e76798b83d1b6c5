"""Fits of small scenes with a tilted sky and noise of every kind."""

import functools

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from scenefit.data.noise import FloorNoise, PoissonNoise, StudentTNoise, WhiteNoise
from scenefit.infer import posterior
from scenefit.infer.fit import fit
from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.survey.catalog import catalog
from tests.helpers import gaussian_image, make_observation

SHAPE = (31, 31)
FLUX, CENTER, RADIUS = 1000.0, (15.3, 14.6), 2.0
RTOL = 0.02
"""Tolerance of a fit, in standard errors."""
NUM_FREE = 7
"""Flux, center, size, ellipticity and background or floor: all of the tolerance may be in one of them."""


def galaxy(flux=FLUX, center=CENTER, radius=RADIUS, frame_shape=SHAPE):
    source = Source(center, [flux], GaussianMorphology(radius))
    return Scene(Frame(frame_shape, channels=("g",)), {"a": source})


def start(flux=FLUX):
    """A start for the galaxy, off in everything."""
    return galaxy(0.5 * flux, (15.0, 15.0), 2.6)


def star(flux):
    return Scene(Frame(SHAPE, channels=("g",)), {"a": Source((15.2, 14.7), [flux], PointMorphology())})


def observe(data, **options):
    return make_observation(np.shape(data)[-2:], data=data, wcs=None, **options)


def render(scene, shape=SHAPE, **options):
    """Return the image of a scene."""
    return observe(np.zeros(shape), **options).render(scene)


def fit_freely(scene, obs, *more, fixed=(), **options):
    """Fit with the parameters that the patterns `more` name free and the `fixed` ones fixed, and check that it converged."""
    parameters = Parameters.default(scene, [obs])
    for pattern in more:
        parameters = parameters.free(pattern)
    for pattern in fixed:
        parameters = parameters.fix(pattern)
    result = fit(scene, obs, parameters, progress=False, **{"rtol": RTOL, **options})
    assert result.is_converged
    return result


def flux_of(result):
    """Return flux and error of the source."""
    (row,) = catalog(result, model_error=False)
    return float(row["flux_g"].value), float(row["flux_err_g"].value)


SKY = ("observations.obs.background", "observations.obs.background_slope")


def check_loss(result):
    """Check that the loss is minus the log-likelihood, up to its value for floors of zero where the model is the data."""
    (obs,) = result.observations
    peak = obs.noise.log_normalization()
    if isinstance(obs.noise, FloorNoise):
        peak = WhiteNoise(obs.noise.weights).log_normalization()
    # 1e-5: sums of 961 in single precision.
    assert result.loss == pytest.approx(peak - obs.log_likelihood(result.scene), rel=1e-5)


# ---- tilted sky


def test_a_tilted_sky_is_recovered():
    """From an observation that the frame doesn't fill: the slope is about the middle of the observation."""
    shape, background, slope = (35, 33), 3.0, (0.05, -0.02)
    truth = galaxy(frame_shape=(29, 31))
    obs = observe(render(truth, shape, background=background, background_slope=slope))
    scene = Scene(truth.frame, start().sources)
    result = fit_freely(scene, obs, *SKY, rtol=1e-4)
    (fitted,) = result.observations
    source = result.scene.sources["a"]
    # The fit stops within 1e-4 standard errors, which are 1.3 % of the flux and size, 0.04 of the background and 0.004 of
    # the slope; rounding in single precision of peaks of 30 adds 1e-6 of these.
    np.testing.assert_allclose(source.spectrum.flux, FLUX, rtol=1e-5)
    np.testing.assert_allclose(source.center, CENTER, atol=1e-5)
    np.testing.assert_allclose(source.morphology.half_light_radius, RADIUS, rtol=1e-5)
    np.testing.assert_allclose(fitted.background, background, atol=1e-5)
    np.testing.assert_allclose(fitted.background_slope, [slope], atol=1e-6)
    np.testing.assert_allclose(
        fitted.background_image(),
        render(truth, shape, background=3.0, background_slope=slope) - render(truth, shape),
        atol=3e-5,
    )


def test_a_slope_is_fixed_unless_asked_for():
    obs = observe(render(galaxy(), background_slope=(0.05, -0.02)), background_slope=(0.05, -0.02))
    (fitted,) = fit_freely(start(), obs).observations
    # 1e-6: through single precision once.
    np.testing.assert_allclose(fitted.background_slope, [(0.05, -0.02)], rtol=1e-6)


# ---- counts


@functools.cache
def star_of_counts(flux, sky, seed, gain=1.0, zeropoint=None):
    """Return the fit of the flux of a star in counts, its counts and the image of a star of unit flux."""
    stamp = render(star(1.0))
    counts = np.random.default_rng(seed).poisson(sky + flux * stamp).astype(float)
    obs = observe(counts / gain, noise=PoissonNoise(counts, gain), background=sky / gain, zeropoint=zeropoint)
    scene = star(0.5 * flux / gain * obs.nanojansky[0])
    return fit_freely(scene, obs, fixed=["sources.a.center"], rtol=1e-3), counts, stamp


@pytest.mark.parametrize(("flux", "sky"), [(200.0, 5.0), (30.0, 0.05)])
@pytest.mark.parametrize("seed", range(4))
def test_a_flux_of_counts_is_the_most_likely_one(flux, sky, seed):
    result, counts, stamp = star_of_counts(flux, sky, seed)
    value, error = flux_of(result)
    # 3 standard errors: a chance of 2 % for all of eight; the noise is the same in every run.
    assert abs(value - flux) < 3 * error

    def loss(trial):
        return -scipy.stats.poisson.logpmf(counts, sky + trial * stamp).sum()

    best = scipy.optimize.minimize_scalar(loss, bounds=(0, 5 * flux), method="bounded", options={"xatol": 1e-4 * error})
    # The fit stops within 1e-3 standard errors, by an approximate curvature: twice that.
    assert value == pytest.approx(best.x, abs=2e-3 * error)
    check_loss(result)


@pytest.mark.parametrize(("gain", "zeropoint"), [(50.0, None), (1e-3, 24.0), (1e6, None)])
def test_the_gain_is_counts_per_data_unit(gain, zeropoint):
    plain, (value, error) = (
        flux_of(star_of_counts(30.0, 0.05, 0)[0]),
        flux_of(star_of_counts(30.0, 0.05, 0, gain, zeropoint)[0]),
    )
    unit = (1 if zeropoint is None else 10 ** (-0.4 * (zeropoint - 31.4))) / gain
    # 2e-3 of the error, as above; 1e-3 of the error itself, which changes with the flux.
    assert value / unit == pytest.approx(plain[0], abs=2e-3 * plain[1])
    assert error / unit == pytest.approx(plain[1], rel=1e-3)


def test_a_galaxy_on_a_tilted_sky_of_counts():
    sky, slope = 4.0, np.array([0.1, -0.05])
    counts = np.random.default_rng(0).poisson(render(galaxy(), background=sky, background_slope=slope))
    # Level and tilt are those of 4 counts a pixel: 2 / 31, and that over the scatter of 31 coordinates; 4 of them.
    errors = np.array([2 / 31, 2 / 31 / np.std(np.arange(31))])
    result = fit_freely(start(), observe(counts, noise=PoissonNoise(counts), background=1.0), *SKY)
    check_loss(result)
    value, error = flux_of(result)
    assert abs(value - FLUX) < 4 * error
    np.testing.assert_allclose(result.observations[0].background, sky, atol=4 * errors[0])
    np.testing.assert_allclose(result.observations[0].background_slope, [slope], atol=4 * errors[1])


def test_no_counts_mean_no_flux():
    counts = np.zeros(SHAPE)
    obs = observe(counts, noise=PoissonNoise(counts), background=0.01)
    result = fit_freely(star(20.0), obs, fixed=["sources.a.center"])
    # Exact: at the bound.
    np.testing.assert_array_equal(result.scene.sources["a"].spectrum.flux, 0)
    # The loss is all that the model says there should be. 1e-5: single precision.
    assert result.loss == pytest.approx(0.01 * counts.size, rel=1e-5)


# ---- wild pixels


@pytest.mark.parametrize("seed", range(4))
def test_wild_pixels_bias_white_noise_but_not_a_student_t(seed):
    rng = np.random.default_rng(seed)
    data = render(galaxy(), background=3.0) + rng.normal(size=(1, *SHAPE))
    clean, weights = data.copy(), np.ones(data.shape)
    data += np.where(rng.random(data.shape) < 0.02, rng.uniform(30, 100, data.shape), 0)
    results = {
        "clean": fit_freely(start(), observe(clean, noise=WhiteNoise(weights)), *SKY),
        "white": fit_freely(start(), observe(data, noise=WhiteNoise(weights)), *SKY),
        "student": fit_freely(start(), observe(data, noise=StudentTNoise(weights)), *SKY),
    }
    check_loss(results["student"])
    _, error = flux_of(results["clean"])
    off = {name: abs(flux_of(result)[0] - FLUX) / error for name, result in results.items()}
    # 3 standard errors of clean data: a chance of 1 % for all seeds; the noise is the same in every run.
    assert off["student"] < 3
    # Outliers of 65 times the noise weigh as many as 5 standard errors even in the wings.
    assert off["white"] > 5
    background = {name: float(result.observations[0].background[0]) for name, result in results.items()}
    # The mean of the wild pixels is 0.02 * 65; the error of the background is 0.04. What remains of 2 % of outliers on one
    # side is 2 % of the noise times the largest pull.
    assert background["student"] == pytest.approx(3.0, abs=4 * 0.04)
    assert background["white"] > 3.5


# ---- a floor


@functools.cache
def scattered(floor, amplitude=1.0):
    """Return data of noise 1 and an additional scatter, times the amplitude."""
    rng = np.random.default_rng(1)
    return amplitude * (render(galaxy()) + np.hypot(1, floor) * rng.normal(size=(1, *SHAPE)))


def floor_error(floor):
    """Return the standard error of a floor above noise 1: the Fisher information is 2 n (floor / variance)^2."""
    return (1 + floor**2) / (floor * np.sqrt(2 * SHAPE[0] * SHAPE[1]))


def check_floor(result, floor, amplitude=1.0):
    """Check a fitted floor against the truth, and the most likely one: noise and floor make up the scatter."""
    check_loss(result)
    (fitted,) = result.observations
    value = float(fitted.noise.floor[0]) / amplitude
    # 3 standard errors; the noise is the same in every run.
    assert value == pytest.approx(floor, abs=3 * floor_error(floor))
    scatter = np.mean((fitted.residual(result.scene) / amplitude) ** 2)
    best = np.sqrt(scatter - 1)
    assert value == pytest.approx(best, abs=np.sqrt(NUM_FREE) * RTOL * floor_error(best))


@pytest.mark.parametrize("floor", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_a_floor_is_recovered(floor, factor):
    weights = np.ones((1, *SHAPE))
    result = fit_freely(start(), observe(scattered(floor), noise=FloorNoise(weights, factor * floor)))
    check_floor(result, floor)
    # 5 with known noise; 10 more from a floor, and so from a scatter, that is off by 5.
    # Where the floor is far off, it changes by a factor of e a step at most.
    assert result.num_steps < 40


@pytest.mark.parametrize("amplitude", [1e-6, 1e6])
@pytest.mark.parametrize("zeropoint", [None, 20.0])
def test_the_floor_is_in_data_units(amplitude, zeropoint):
    """In the units of the observation, to be exact: nJy with a zeropoint."""
    noise = FloorNoise(np.full((1, *SHAPE), amplitude**-2.0), 0.7 * amplitude)
    obs = observe(scattered(2.0, amplitude), noise=noise, zeropoint=zeropoint)
    unit = amplitude * obs.nanojansky[0]
    result = fit_freely(start(FLUX * unit), obs)
    check_floor(result, 2.0, unit)
    value, error = flux_of(result)
    assert abs(value - FLUX * unit) < 4 * error


def test_fluxes_are_those_of_the_whole_noise():
    """Values and errors of a fit whose noise has the fitted floor from the start."""
    result = fit_freely(start(), observe(scattered(2.0), noise=FloorNoise(np.ones((1, *SHAPE)), 1.0)))
    variance = 1 + float(result.observations[0].noise.floor[0]) ** 2
    expected = flux_of(fit_freely(start(), observe(scattered(2.0), variance=variance)))
    value, error = flux_of(result)
    # Two tolerances of all parameters; 1 %: a floor that is free adds next to nothing.
    assert value == pytest.approx(expected[0], abs=2 * np.sqrt(NUM_FREE) * RTOL * expected[1])
    assert error == pytest.approx(expected[1], rel=1e-2)


def test_where_there_is_no_more_scatter_there_is_no_floor():
    data = scattered(1e-9)
    result = fit_freely(start(), observe(data, noise=FloorNoise(np.ones(data.shape), 1.0)))
    white = flux_of(fit_freely(start(), observe(data)))
    # The variance is known to sqrt(2 / 961) = 0.046: a floor of 0.3 would be two errors of it.
    assert 0 < float(result.observations[0].noise.floor[0]) < 0.3
    assert flux_of(result)[0] == pytest.approx(white[0], abs=0.1 * white[1])


def test_a_fixed_floor_stays():
    scene, obs = start(), observe(scattered(2.0), noise=FloorNoise(np.ones((1, *SHAPE)), 0.5))
    parameters = Parameters.default(scene, [obs])
    assert parameters["observations.obs.noise.floor"].free
    observations = [obs.match(scene.frame)]
    problem, state, layout = posterior.build(scene, observations, parameters.fix("observations.obs.noise"))
    assert not any(leaf.name == "noise.floor" for leaf in problem.leaves)
    _, (same,) = posterior.unpack(problem, state, layout, scene, observations)
    # 1e-6: through single precision once.
    np.testing.assert_allclose(same.noise.floor, 0.5, rtol=1e-6)


# ---- errors


@pytest.mark.parametrize(("flux", "sky"), [(200.0, 5.0), (10.0, 0.05)])
def test_errors_of_fluxes_from_counts(flux, sky):
    """Those of the Fisher information, the inverse of what the model expects in a pixel."""
    ratios = []
    for seed in range(4):
        result, _, stamp = star_of_counts(flux, sky, seed)
        value, error = flux_of(result)
        ratios.append(error * np.sqrt((stamp**2 / (sky + value * stamp)).sum()))
    # 3 %: in each of four, the information is a sum over the 28 pixels that a star covers.
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


def test_errors_of_fluxes_with_wings():
    """Those of the Fisher information about a Student t, (nu + 1) / (nu + 3) over its squared scale, (nu - 2) / nu."""
    ratios = []
    for seed in range(4):
        model = render(galaxy(), background=3.0)
        data = model + np.random.default_rng(seed).standard_t(5, model.shape) * np.sqrt(3 / 5)
        noises = (WhiteNoise(np.ones(data.shape)), StudentTNoise(np.ones(data.shape), 5.0))
        results = [fit_freely(start(), observe(data, noise=noise, background=3.0), *SKY) for noise in noises]
        (_, white), (value, error) = map(flux_of, results)
        assert abs(value - FLUX) < 4 * white
        ratios.append(error / white * np.sqrt(6 / 8 * 5 / 3))
    # 3 %: the information of 40 pixels scatters by a tenth, half of it in the error, in each of four.
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


# ---- free pixels


@pytest.mark.parametrize("name", ["counts", "floor"])
def test_images_are_fitted_with_every_noise(name):
    """By conjugate gradients, with pixels that carry no information or no counts."""
    rng = np.random.default_rng(3)
    model = render(galaxy(2 * FLUX), background=0.3)
    if name == "counts":
        data = rng.poisson(model).astype(float)
        noise = PoissonNoise(data)
    else:
        data = model + np.hypot(1, 1.5) * rng.normal(size=model.shape)
        noise = FloorNoise(np.ones(data.shape), 0.5)
    mask = np.zeros(SHAPE, bool)
    mask[4:6, 10:12] = mask[15, 12] = True
    image = gaussian_image((13, 13), (6, 6), 2.2)
    morphology = PixelMorphology(image, envelope=image)
    scene = Scene(galaxy().frame, {"a": Source((15, 15), [FLUX], morphology)})
    result = fit_freely(scene, observe(data, noise=noise, mask=mask, background=0.3))
    value, _ = flux_of(result)
    # 5 %: at least twice the errors, which are 45 for counts and 25 for a floor.
    assert value == pytest.approx(2 * FLUX, rel=0.05)
    if name == "floor":
        # 3 standard errors; pixels that follow the noise, 169 of them, leave a bit less of it to the floor.
        assert float(result.observations[0].noise.floor[0]) == pytest.approx(1.5, abs=3 * floor_error(1.5) + 0.1)
