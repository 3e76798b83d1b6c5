import astropy.units as u
import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

from scenefit.data.noise import FloorNoise
from scenefit.data.observation import Observation
from scenefit.infer import sample as module
from scenefit.infer.diagnostics import Diagnostics, PosteriorStatus, of_approximation, of_chains
from scenefit.infer.fit import fit
from scenefit.infer.posterior import with_parameters
from scenefit.infer.sample import sample
from scenefit.model import link
from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF

SHAPE, SIGMA, FLUX = (17, 19), 0.1, 5.0
FRAME, PSF = Frame(SHAPE, channels="g", padding=8), GaussianPSF(1.4)
PATH = "sources.0.spectrum.flux"


def observe(flux=FLUX, noise=SIGMA, seed=3, **options):
    """A point source on a sky."""
    blank = Observation(np.zeros(SHAPE), sigma=SIGMA, psf=PSF, channels="g", name="one").match(FRAME)
    scene = Scene(FRAME, [Source((8.2, 9.1), [flux], PointMorphology())])
    data = blank.render(scene)[0] + 0.05 + noise * np.random.default_rng(seed).normal(size=SHAPE)
    return Observation(data, **({"sigma": SIGMA} | options), psf=PSF, channels="g", name="one", background=0.05)


def linear_fit(obs, prior=None):
    """Fit flux and sky alone: a linear problem."""
    scene = Scene(FRAME, [Source((8.2, 9.1), [1.0], PointMorphology())])
    parameters = Parameters.default(scene, [obs]).fix("sources.*.center").free("observations.one.background")
    if prior is not None:
        parameters = parameters.prior(PATH, prior)
    return fit(scene, obs, parameters, rtol=1e-3, progress=False)


def dense_normal(obs):
    """Mean and covariance of (flux, sky) by least squares."""
    scene = Scene(FRAME, [Source((8.2, 9.1), [1.0], PointMorphology())])
    stamp = obs.with_background(0.0).match(FRAME).render(scene)[0]
    design = np.stack([stamp.ravel(), np.ones(stamp.size)], axis=1) / SIGMA
    covariance = np.linalg.inv(design.T @ design)
    return covariance @ design.T @ (obs.data[0].ravel() / SIGMA), covariance


@pytest.fixture(scope="module")
def bright():
    return linear_fit(observe())


METHODS = {"laplace": {}, "svi": {}, "flow": {"guide": "flow"}, "nuts": {"num_warmup": 100}}


@pytest.mark.parametrize("name", METHODS)
def test_a_linear_problem_is_normal(bright, name):
    method = "svi" if name == "flow" else name
    posterior = sample(bright, method, key=jax.random.key(1), progress=False, **METHODS[name])
    mean, covariance = dense_normal(bright.observations[0])
    draws = np.column_stack([posterior[PATH][:, 0], posterior["observations.one.background"][:, 0]])
    sigma = np.sqrt(np.diag(covariance))
    assert posterior.status is PosteriorStatus.GOOD, posterior.message
    # 2000 draws, of chains a third as many independent ones: 0.15 is three standard errors of a mean; the same of a width.
    np.testing.assert_allclose((draws.mean(axis=0) - mean) / sigma, 0, atol=0.15)
    np.testing.assert_allclose(draws.std(axis=0) / sigma, 1, atol=0.1)
    correlation = covariance[0, 1] / sigma.prod()
    assert np.corrcoef(draws.T)[0, 1] == pytest.approx(correlation, abs=0.12)


def test_a_flux_near_zero_is_a_truncated_normal():
    obs = observe(flux=0.1, seed=4)
    result = linear_fit(obs)
    posterior = sample(result, "nuts", key=jax.random.key(2), num_samples=3000, progress=False)
    mean, covariance = dense_normal(obs)
    sigma = np.sqrt(covariance[0, 0])
    # Zero is within the data's reach.
    assert abs(mean[0]) < 2 * sigma
    expected = scipy.stats.truncnorm(-mean[0] / sigma, np.inf, mean[0], sigma)
    draws = posterior[PATH][:, 0]
    assert draws.min() >= 0
    for quantile in (0.1, 0.5, 0.9):
        # 0.05: three standard errors of a probability from some 1000 independent draws.
        assert expected.cdf(np.quantile(draws, quantile)) == pytest.approx(quantile, abs=0.05)


@pytest.mark.parametrize("method", ["laplace", "nuts"])
def test_the_prior_counts_as_much_as_it_should(method):
    obs = observe()
    mean, covariance = dense_normal(obs)
    tight = dist.Normal(3.0, np.sqrt(covariance[0, 0]))
    posterior = sample(linear_fit(obs, tight), method, key=jax.random.key(3), progress=False)
    # Product of two normals of equal width, but for the sky that goes along.
    draws, sigma = posterior[PATH][:, 0], np.sqrt(covariance[0, 0])
    # 0.1: three standard errors.
    assert draws.mean() == pytest.approx(0.5 * (3.0 + mean[0]), abs=0.15 * sigma)
    assert draws.std() == pytest.approx(sigma / np.sqrt(2), rel=0.1)


def test_parameters_of_observations_are_sampled_from_data_not_from_priors():
    """A wide prior on the offset of a second image, whose data know it well."""
    frame = Frame((25, 25), channels="g", padding=8)
    blank = [Observation(np.zeros((25, 25)), sigma=0.05, psf=PSF, channels="g", name=n).match(frame) for n in "ab"]
    scene = Scene(frame, [Source((12.1, 12.3), [20.0], GaussianMorphology(2.0))])
    rng = np.random.default_rng(5)
    moved = (0.3, -0.2)
    images = [
        obs.with_shift(shift).render(scene)[0] + 0.05 * rng.normal(size=(25, 25))
        for obs, shift in zip(blank, ((0, 0), moved), strict=True)
    ]
    observations = [
        Observation(image, sigma=0.05, psf=PSF, channels="g", name=n) for n, image in zip("ab", images, strict=True)
    ]
    parameters = Parameters.default(scene, observations).free(
        "observations.b.astrometry.shift", prior=dist.Normal(0, 3.0)
    )
    result = fit(scene, observations, parameters, progress=False)
    posterior = sample(result, "laplace", key=jax.random.key(4), progress=False)
    shift = posterior["observations.b.astrometry.shift"]
    # The prior is 3 pixels wide; a source of signal-to-noise ratio 60 and radius 2 is located to a few hundredths of it.
    assert (shift.std(axis=0) < 0.1).all()
    # Four standard deviations.
    assert (np.abs(shift.mean(axis=0) - moved) < 4 * shift.std(axis=0)).all()


def test_a_fitted_floor_is_sampled_too():
    obs = observe(noise=0.3)
    obs = Observation(
        obs.data,
        noise=FloorNoise(np.full((1, *SHAPE), SIGMA**-2), 0.2),
        psf=PSF,
        channels="g",
        name="one",
        background=0.05,
    )
    result = linear_fit(obs)
    posterior = sample(result, "nuts", key=jax.random.key(5), num_samples=2000, progress=False)
    floor = posterior["observations.one.noise.floor"][:, 0]
    # The standard deviation of a sample of n has the standard error sigma / sqrt(2 n); that of the floor is larger by s / f.
    expected = np.sqrt(0.3**2 - SIGMA**2)
    error = 0.3 / np.sqrt(2 * np.prod(SHAPE)) * 0.3 / expected
    assert floor.std() == pytest.approx(error, rel=0.15)
    # Four standard errors.
    assert floor.mean() == pytest.approx(expected, abs=4 * error)


@pytest.fixture(scope="module")
def curved():
    """A linked size in two bands, fitted and sampled."""
    frame = Frame((25, 25), channels=("g", "r"), padding=8)
    radius = link.Polynomial([2.0, 3.0], {"g": 0.5, "r": 0.7})
    scene = Scene(frame, {"a": Source((12.1, 12.3), [20.0, 30.0], GaussianMorphology(radius))})
    rng = np.random.default_rng(6)
    observations = []
    for band in ("g", "r"):
        blank = Observation(np.zeros((25, 25)), sigma=0.05, psf=PSF, channels=band, name=band).match(frame)
        data = blank.render(scene)[0] + 0.05 * rng.normal(size=(25, 25))
        observations.append(Observation(data, sigma=0.05, psf=PSF, channels=band, name=band))
    result = fit(scene, observations, progress=False)
    return sample(result, "laplace", key=jax.random.key(7), num_samples=500, progress=False)


def test_curves_of_linked_parameters(curved):
    path = "sources.a.morphology.half_light_radius"
    values = curved[path]
    middle = curved.curve(path, 600 * u.nm)
    # 1e-12: a mean of two numbers.
    np.testing.assert_allclose(middle[:, 0], values.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(curved.in_channels(path), values, rtol=1e-12)
    # Four standard deviations.
    assert (np.abs(values.mean(axis=0) - [2, 3]) < 4 * values.std(axis=0)).all()
    with pytest.raises(ValueError, match="isn't a linked parameter"):
        curved.curve("sources.a.center", 0.6)


def test_the_model_of_a_draw(curved):
    scene, observations = curved.model(17)
    component = scene.sources["a"]
    np.testing.assert_array_equal(
        component.morphology.half_light_radius.values, curved["sources.a.morphology.half_light_radius"][17]
    )
    np.testing.assert_array_equal(component.center, curved["sources.a.center"][17])
    assert len(observations) == 2
    with pytest.raises(KeyError, match="There is no parameter"):
        with_parameters(scene, observations, {"sources.b.center": np.zeros(2)})


def test_the_summary_has_a_row_for_every_number(curved):
    table = curved.summary()
    names = list(table["parameter"])
    assert "sources.a.morphology.half_light_radius[1]" in names
    row = table[names.index("sources.a.spectrum.flux[0]")]
    draws = curved["sources.a.spectrum.flux"][:, 0]
    # 1e-12: the same operations.
    assert row["mean"] == pytest.approx(draws.mean(), rel=1e-12)
    assert row["q16"] < row["q50"] < row["q84"]
    with pytest.raises(KeyError, match="No draws of 'flux'"):
        curved["flux"]


# ---- judgement


def test_chains_that_have_not_mixed_say_so(rng):
    apart = rng.normal(size=(4, 300)) + np.arange(4)[:, None]
    status, message = of_chains({"x": apart}, 0.0).judge()
    assert status is PosteriorStatus.NOT_MIXED
    assert "(x; good up to 1.01)" in message
    few = of_chains({"x": rng.normal(size=(4, 30))}, 0.0).judge()
    assert few[0] is PosteriorStatus.NOT_MIXED
    many = rng.normal(size=(4, 1000))
    assert of_chains({"x": many}, 0.0).judge()[0] is PosteriorStatus.GOOD
    assert of_chains({"x": many}, 0.2).judge()[0] is PosteriorStatus.DIVERGENT


def test_r_hat_and_sample_size_of_known_chains(rng):
    """An autoregressive chain of correlation rho has the effective size n (1 - rho) / (1 + rho)."""
    rho, chains, length = 0.6, 4, 4000
    steps = rng.normal(size=(chains, length)) * np.sqrt(1 - rho**2)
    draws = np.zeros((chains, length))
    for n in range(length):
        draws[:, n] = rho * (draws[:, n - 1] if n else steps[:, 0]) + steps[:, n]
    found = of_chains({"x": draws}, 0.0)
    # 20 %: the scatter of the estimate; the tail's size, which may be the smaller one, is larger for such chains.
    assert float(found.ess["x"]) == pytest.approx(chains * length * (1 - rho) / (1 + rho), rel=0.2)
    assert float(found.r_hat["x"]) < 1.01


def test_the_shape_of_the_tail_of_normal_ratios(rng):
    """For a normal proposal of width s of a unit normal, the ratios have a Pareto tail of shape 1 - s^2."""
    for width in (0.3, 0.6, 0.9):
        draws = width * rng.normal(size=20000)
        found = of_approximation(scipy.stats.norm.logpdf(draws), scipy.stats.norm(0, width).logpdf(draws))
        # 0.12: the scatter of the estimate from the largest 3 sqrt(20000) ratios, and its slow approach to the limit.
        assert found.pareto_k == pytest.approx(1 - width**2, abs=0.12)
        good = width > 0.55
        expected = PosteriorStatus.GOOD if good else PosteriorStatus.POOR_APPROXIMATION
        status, message = found.judge()
        assert status is expected
        assert message.startswith("Pareto k ")


def test_too_few_draws_are_not_good(bright):
    posterior = sample(bright, "nuts", key=jax.random.key(1), num_samples=40, num_warmup=25, progress=False)
    assert posterior.status is PosteriorStatus.NOT_MIXED
    assert isinstance(posterior.diagnostics, Diagnostics)


def test_an_interruption_keeps_the_draws_so_far(bright, monkeypatch):
    original, calls = module.chains._mover, []

    def interrupted(num_warmup):
        def move(target, states):
            calls.append(None)
            if len(calls) > 8:
                raise KeyboardInterrupt
            return original(num_warmup)(target, states)

        return move

    monkeypatch.setattr(module.chains, "_mover", interrupted)
    posterior = sample(bright, "nuts", key=jax.random.key(1), num_warmup=100, progress=False)
    assert posterior.status is PosteriorStatus.INTERRUPTED
    assert posterior.draws[PATH].shape == (4, 100, 1)


# ---- bad input


def test_bad_input(bright):
    with pytest.raises(ValueError, match="method is one of laplace, svi, nuts, linear; got 'mcmc'"):
        sample(bright, "mcmc", key=jax.random.key(0))
    with pytest.raises(ValueError, match="guide is one of normal, flow; got 'iaf'"):
        sample(bright, "svi", key=jax.random.key(0), guide="iaf")
    with pytest.raises(ValueError, match=r"at least 1; got \{'num_samples': 0\}"):
        sample(bright, "laplace", key=jax.random.key(0), num_samples=0)


def test_draws_for_arviz(bright):
    posterior = sample(bright, "laplace", key=jax.random.key(1), num_samples=300, progress=False)
    tree = posterior.to_arviz()
    assert dict(tree["posterior"].sizes)["draw"] == 300
    np.testing.assert_array_equal(tree["posterior"][PATH].values, posterior.draws[PATH])
    np.testing.assert_array_equal(tree["sample_stats"]["lp"].values, posterior.log_density)
    assert tree["posterior"].attrs["method"] == "laplace"


def test_free_images_can_not_be_sampled():
    scene = Scene(FRAME, [Source((8.0, 9.0), [1.0], PixelMorphology(np.ones((5, 5))))])
    result = fit(scene, observe(), max_steps=2, progress=False)
    with pytest.raises(ValueError, match=r"no free image: fix some, such as parameters.fix"):
        sample(result, "laplace", key=jax.random.key(0))


def test_parameters_that_nothing_determines():
    """The center of a source without flux."""
    scene = Scene(FRAME, [Source((8.0, 9.0), [0.0], PointMorphology())])
    parameters = Parameters.default(scene, [observe()]).fix(PATH)
    result = fit(scene, observe(), parameters, max_steps=1, progress=False)
    with pytest.raises(
        ValueError,
        match=r"Neither the data nor a prior determine the combination of sources\.0\.center\[[01]\]; nor that of",
    ):
        sample(result, "laplace", key=jax.random.key(0))
