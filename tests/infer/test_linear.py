"""Truncated normal densities against quadrature and SciPy; linear posteriors against brute force, quadrature and NUTS."""

import itertools

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats

from scenefit.arrays.compilation import as_floats
from scenefit.data.noise import FloorNoise, StudentTNoise
from scenefit.data.observation import Observation
from scenefit.infer import posterior as packing
from scenefit.infer import truncated
from scenefit.infer.diagnostics import PosteriorStatus
from scenefit.infer.fit import fit
from scenefit.infer.linear import data_losses, linear_model
from scenefit.infer.rings import ring_prior
from scenefit.infer.sample import sample
from scenefit.infer.truncated import TruncatedDensity, log_evidence
from scenefit.model import link
from scenefit.model.morphology import GaussianMorphology, MultiGaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.average import average_profiles, evidence_weights
from scenefit.survey.profile import profile

INF = np.inf
PATH = "sources.a.morphology.amplitudes"
FLUX, SKY = "sources.a.spectrum.flux", "observations.one.background"


def density_of(precision, shift, low=None, scale=None, constant=0.0):
    n = len(shift)
    low = np.zeros(n) if low is None else np.array(low, dtype=float)
    scale = np.full(n, INF) if scale is None else np.array(scale, dtype=float)
    return TruncatedDensity(np.array(precision, dtype=float), np.array(shift, dtype=float), low, scale, constant)


def draws_of(density, rng, count=1500, **options):
    values, is_complete = truncated.draw(density, rng, 4, count, **options)
    assert is_complete
    return values


def standard_error(values):
    """Standard error of the mean of chains, shape (chain, draw)."""
    return values.std() / np.sqrt(truncated._effective_size(values))


# ---- truncated normal densities


@pytest.mark.parametrize("mean", [-4.0, 0.3, 5.0])
def test_one_dimension_is_scipys_truncated_normal(rng, mean):
    """Far outside, at the bound and far inside; the bound is not at zero."""
    sigma, low = 0.7, -0.4
    density = density_of([[sigma**-2]], [mean / sigma**2], [low])
    expected = scipy.stats.truncnorm((low - mean) / sigma, INF, mean, sigma)
    values = draws_of(density, rng)[..., 0]
    assert values.min() >= low
    # Nearly independent draws: 1e-4 leaves a false alarm in 10^4.
    assert scipy.stats.kstest(values[:, ::4].ravel(), expected.cdf).pvalue > 1e-4
    exact = 0.5 * (mean / sigma) ** 2 + np.log(sigma * np.sqrt(2 * np.pi)) + scipy.stats.norm.logsf(low, mean, sigma)
    # The proposal is the density itself, but for rounding.
    assert log_evidence(density, values[..., None], rng)[0] == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("scale", [None, (0.3, 0.5)])
def test_two_correlated_dimensions_against_quadrature(rng, scale):
    density = density_of([[2.0, -1.9], [-1.9, 2.5]], [0.5, -0.6], scale=scale)
    grid = np.linspace(0, 14, 1401)
    x, y = np.meshgrid(grid, grid, indexing="ij")
    table = np.exp(density.log_density(np.stack([x, y], axis=-1)))

    def integral(values):
        return scipy.integrate.simpson(scipy.integrate.simpson(values, x=grid), x=grid)

    total = integral(table)
    values = draws_of(density, rng)
    for place, axis in enumerate((x, y)):
        for power in (1, 2):
            column = values[..., place] ** power
            # Four standard errors.
            assert abs(column.mean() - integral(axis**power * table) / total) < 4 * standard_error(column)
    cross = values[..., 0] * values[..., 1]
    assert abs(cross.mean() - integral(x * y * table) / total) < 4 * standard_error(cross)
    evidence, error = log_evidence(density, values, rng)
    assert error < 0.05
    assert abs(evidence - np.log(total)) < 4 * error


def test_bounded_and_free_numbers_together(rng):
    """Three dimensions, of which one has no bound and one a bound other than zero, against quadrature."""
    precision = [[2.0, -1.6, 0.5], [-1.6, 2.5, 0.2], [0.5, 0.2, 1.0]]
    density = density_of(precision, [0.5, -0.3, 0.7], [0, 0.4, -INF], [0.3, INF, INF], 1.0)
    # Simpson's rule on a grid of 0.1, a fifth of the narrowest width.
    grids = np.linspace(0, 10, 201), np.linspace(0.4, 8.4, 81), np.linspace(-8, 8, 161)
    table = np.exp(density.log_density(np.stack(np.meshgrid(*grids, indexing="ij"), axis=-1)))
    free = np.asarray(table)
    for grid in reversed(grids):
        free = scipy.integrate.simpson(free, x=grid)
    values = draws_of(density, rng)
    evidence, error = log_evidence(density, values, rng)
    assert abs(evidence - np.log(free)) < 4 * error
    marginal = scipy.integrate.simpson(scipy.integrate.simpson(table, x=grids[0], axis=0), x=grids[1], axis=0)
    mean = scipy.integrate.simpson(marginal * grids[2], x=grids[2]) / free
    # Four standard errors.
    assert abs(values[..., 2].mean() - mean) < 4 * standard_error(values[..., 2])


def collinear(count, rng):
    """A density like that of rings: neighbours nearly alike, amplitudes at and away from zero."""
    radius = np.linspace(0.05, 12, 300)
    rings = np.exp(-0.5 * (radius[:, None] / np.geomspace(0.6, 6, count)) ** 2)
    design = rings * np.sqrt(radius)[:, None] / 0.05
    truth = np.where(np.arange(count) % 3 == 1, 0.0, 1.0)
    data = design @ truth + rng.normal(size=300)
    return density_of(design.T @ design, design.T @ data, constant=-0.5 * data @ data)


@pytest.mark.parametrize("has_prior", [False, True])
def test_nearly_collinear_rings_mix(rng, has_prior):
    density = collinear(9, rng)
    scale = 1 / np.sqrt(np.diag(density.precision))
    # Of the normalised columns: what a sampler along coordinates would crawl through.
    assert np.linalg.cond(density.precision * scale[:, None] * scale) > 1e5
    if has_prior:
        density = density_of(density.precision, density.shift, scale=np.full(9, 0.2), constant=density.constant)
    values = draws_of(density, rng, 600)
    assert min(truncated._effective_size(values[..., n]) for n in range(9)) > 400
    assert np.isfinite(values).all()
    assert values.min() >= 0


def test_evidence_in_nine_dimensions_agrees_with_thermodynamic_integration(rng):
    """The likelihood is switched on by a power t; the logarithm of the evidence is the integral of its mean logarithm."""
    full = collinear(9, rng)
    scale = np.full(9, 0.5)
    density = density_of(full.precision, full.shift, scale=scale, constant=full.constant)
    powers = np.linspace(0.02, 1, 26) ** 5
    means, errors = [], []
    for power in powers:
        tempered = density_of(power * full.precision, power * full.shift, scale=scale)
        logs = full.log_density(draws_of(tempered, rng, 400, num_warmup=50, num_sweeps=1))
        means.append(logs.mean())
        errors.append(standard_error(logs))
    # The first panel, from 0 to 3e-9, changes nothing: the likelihood is still 1 there but for a permille.
    # d log Z = <log L> dt = <log L> t d(log t), smooth in log t.
    logarithm = np.log(powers)
    expected = scipy.integrate.simpson(np.array(means) * powers, x=logarithm)
    panel = np.gradient(logarithm) * powers * np.array(errors)
    evidence, error = log_evidence(density, draws_of(density, rng), rng)
    # Three joint standard errors, and 0.15 for the rule's panels.
    assert abs(evidence - expected) < 3 * np.hypot(error, np.sqrt((panel**2).sum())) + 0.15


# ---- posteriors of scenes

SHAPE, SIGMA, WIDTHS = (31, 33), 0.05, (1.0, 2.2)
PSF = GaussianPSF(1.4)


def make_scene(frame, flux, amplitudes, widths=WIDTHS):
    morphology = MultiGaussianMorphology(widths, amplitudes, (0.2, 0.1))
    return Scene(frame, {"a": Source((15.2, 16.1), flux, morphology)})


def simulated(channels=("g",), amplitudes=(0.9, 0.1), noise=None, seed=1):
    """One observation with all channels, of a galaxy of two rings."""
    frame = Frame(SHAPE, channels=channels, padding=8)
    count = len(channels)
    truth = make_scene(frame, 6.0 * (1 + np.arange(count)), np.array(amplitudes))
    blank = Observation(np.zeros((count, *SHAPE)), sigma=SIGMA, psf=PSF, channels=channels, name="one").match(frame)
    data = blank.render(truth) + SIGMA * np.random.default_rng(seed).normal(size=(count, *SHAPE))
    how = {"sigma": SIGMA} if noise is None else {"noise": noise(np.full((count, *SHAPE), SIGMA**-2))}
    return frame, Observation(data, psf=PSF, channels=channels, name="one", **how)


def fitted(frame, obs, amplitudes=None, prior=None, fixed=("center", "morphology.ellipticity"), flux=None, **more):
    flux = 5.0 * np.ones(len(frame.channels)) if flux is None else flux
    scene = make_scene(frame, flux, amplitudes, more.pop("widths", WIDTHS))
    parameters = Parameters.default(scene, [obs]).prior(PATH, prior)
    for name in fixed:
        parameters = parameters.fix(f"sources.a.{name}")
    if more.pop("sky", False):
        parameters = parameters.free(SKY, prior=dist.Normal(0.0, 0.01))
    return fit(scene, obs, parameters, rtol=1e-3, progress=False)


@pytest.fixture(scope="module")
def single():
    """Two rings and a sky, a half-Cauchy prior on the rings."""
    return fitted(*simulated(), prior=dist.HalfCauchy(0.05), sky=True)


def brute_force(result, prior_scale):
    """Return a grid of both ring fluxes and the posterior there, the sky integrated over by hand."""
    (obs,), frame = result.observations, result.scene.frame
    blank = obs.with_background(0.0)
    columns = [
        blank.match(frame).render(make_scene(frame, [1.0], amplitudes))[0].ravel() / SIGMA for amplitudes in np.eye(2)
    ]
    shape = result.scene.sources["a"].morphology.ellipticity
    assert shape == pytest.approx([0.2, 0.1], abs=1e-6)
    sky, data = np.full(obs.data[0].size, 1 / SIGMA), obs.data[0].ravel() / SIGMA
    design = np.stack([*columns, sky], axis=1)
    precision, shift = design.T @ design, design.T @ data
    precision[2, 2] += 0.01**-2
    # Schur complement: the sky is normal.
    rest = precision[:2, :2] - np.outer(precision[:2, 2], precision[2, :2]) / precision[2, 2]
    moved = shift[:2] - precision[:2, 2] * shift[2] / precision[2, 2]
    first, second = np.linspace(3, 8, 801), np.linspace(0, 4, 801)
    w = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1)
    log = w @ moved - 0.5 * np.einsum("...i,ij,...j->...", w, rest, w)
    log -= np.log1p((w / prior_scale) ** 2).sum(axis=-1)
    return first, second, np.exp(log - log.max())


def test_the_posterior_of_two_rings_against_quadrature(single):
    posterior = sample(single, "linear", key=jax.random.key(1), progress=False)
    assert posterior.status is PosteriorStatus.GOOD, posterior.message
    assert posterior.method == "linear"
    flux = single.scene.sources["a"].spectrum.flux[0]
    first, second, table = brute_force(single, 0.05 * flux)
    fluxes = posterior[FLUX] * posterior[PATH]
    # Single precision.
    np.testing.assert_allclose(posterior[PATH].sum(axis=1), 1, atol=1e-6)
    assert fluxes.min() >= 0
    # Zero is within reach of the second ring.
    assert (fluxes[:, 1] < 0.1).mean() > 0.02
    for place, (grid, axis) in enumerate(((first, 1), (second, 0))):
        marginal = table.sum(axis=axis)
        mean = (marginal * grid).sum() / marginal.sum()
        width = np.sqrt((marginal * (grid - mean) ** 2).sum() / marginal.sum())
        # Of some 1500 independent draws: four standard errors, 0.026 of the width each for the mean, 0.018 for the width.
        assert fluxes[:, place].mean() == pytest.approx(mean, abs=0.1 * width)
        assert fluxes[:, place].std() == pytest.approx(width, rel=0.1)


def test_nothing_is_judged_as_approximate_that_is_exact(single):
    posterior = sample(single, "linear", key=jax.random.key(1), num_samples=400, progress=False)
    assert np.isnan(posterior.diagnostics.pareto_k)
    assert np.isnan(posterior.diagnostics.divergent)
    assert "Pareto" not in posterior.message
    assert posterior.log_density.shape == (4, 100)
    again = sample(single, "linear", key=jax.random.key(1), num_samples=400, progress=False)
    np.testing.assert_array_equal(again[PATH], posterior[PATH])


def test_profiles_of_the_draws(single):
    posterior = sample(single, "linear", key=jax.random.key(3), num_samples=400, progress=False)
    found = profile(posterior, "a")
    assert found.is_sampled
    # 1e-6: the same numbers, of single precision.
    np.testing.assert_allclose(found.flux[:, 0], posterior[FLUX][:, 0], rtol=1e-6)
    assert np.isfinite(found.r50).all()


@pytest.fixture(scope="module")
def whole():
    """All of the galaxy is free, and its second ring well measured, so that nothing is at a bound."""
    return fitted(*simulated(amplitudes=(0.4, 0.6), seed=2), prior=None, fixed=())


def test_derivatives_stand_in_for_centre_and_shape(whole):
    """The normal approximation with the exact Hessian is as good there; its widths are those of the linear draws."""
    linear = sample(whole, "linear", key=jax.random.key(4), progress=False)
    assert linear.status is PosteriorStatus.GOOD, linear.message
    assert "Pareto k" in linear.message
    assert np.isnan(linear.log_evidence)
    normal = sample(whole, "laplace", key=jax.random.key(5), progress=False)
    for path in ("sources.a.center", "sources.a.morphology.ellipticity", FLUX):
        width = normal[path].std(axis=0)
        # 2400 draws: four standard errors of a width are 6 %, of a mean 0.1 widths; as much again for Laplace's approximation.
        np.testing.assert_allclose(linear[path].std(axis=0), width, rtol=0.12)
        np.testing.assert_allclose((linear[path].mean(axis=0) - normal[path].mean(axis=0)) / width, 0, atol=0.2)


TWO_BANDS = ("g", "r")


def both_bands(noise=None):
    return simulated(TWO_BANDS, amplitudes=(0.6, 0.4), noise=noise, seed=3)


def test_the_linear_model_is_the_model():
    """For rings free in every band the likelihood is exactly quadratic, far from the fit, too."""
    frame, obs = both_bands()
    amplitudes = link.PerBand({"g": (0.6, 0.4), "r": (0.6, 0.4)})
    result = fitted(frame, obs, amplitudes, dist.HalfCauchy(0.1))
    problem, state, layout = packing.build(result.scene, result.observations, result.parameters)
    model = linear_model(problem, state, layout, result)
    assert model.is_exact
    assert len(model.rings) == 2
    draws = np.abs(np.random.default_rng(0).normal(size=(5, 4))) * model.start
    losses = np.asarray(data_losses(problem, state, as_floats(model.vectors(draws))))
    # 1e-4: single precision; the losses are of some thousands.
    np.testing.assert_allclose(-losses, model.log_likelihood(draws), rtol=1e-4)


def test_shared_amplitudes_and_a_spectrum():
    """Rings of one shape in two bands: against No-U-Turn chains."""
    frame, obs = both_bands()
    result = fitted(frame, obs, (0.5, 0.5), dist.HalfNormal(0.5))
    linear = sample(result, "linear", key=jax.random.key(6), progress=False)
    assert linear.status is PosteriorStatus.GOOD, linear.message
    nuts = sample(result, "nuts", key=jax.random.key(7), num_samples=1600, progress=False)
    shares = [p[PATH] / p[PATH].sum(axis=1, keepdims=True) for p in (linear, nuts)]
    pairs = [(linear[FLUX], nuts[FLUX]), (shares[0], shares[1])]
    for ours, theirs in pairs:
        width = theirs.std(axis=0)
        # Some 500 independent draws: three standard errors.
        np.testing.assert_allclose(ours.std(axis=0), width, rtol=0.12)
        np.testing.assert_allclose((ours.mean(axis=0) - theirs.mean(axis=0)) / width, 0, atol=0.17)


def test_evidence_prefers_the_right_widths_and_averages_follow():
    frame, obs = simulated(amplitudes=(0.5, 0.5), seed=5)
    prior = dist.HalfCauchy(0.3)
    sets = {"right": WIDTHS, "too narrow": (0.3, 0.9)}
    found = [
        sample(fitted(frame, obs, prior=prior, widths=widths), "linear", key=jax.random.key(8), progress=False)
        for widths in sets.values()
    ]
    weights = evidence_weights(found)
    assert weights.sum() == pytest.approx(1)
    # The images differ by many standard deviations.
    assert weights[0] > 0.999
    equal = [found[0], found[0]]
    mean = average_profiles(equal, "a", key=jax.random.key(9), num_samples=600, radii=[1.0, 2.0, 4.0])
    assert mean.total.curve_of_growth.shape == (600, 1, 3)
    alone = profile(found[0], "a", radii=[1.0, 2.0, 4.0])
    np.testing.assert_allclose(np.median(mean.r50), np.median(alone.r50), rtol=0.02)  # a quarter of its error
    with pytest.raises(ValueError, match="at least one posterior"):
        evidence_weights([])
    other = sample(fitted(*simulated(seed=6), prior=prior), "linear", key=jax.random.key(8), progress=False)
    with pytest.raises(ValueError, match="posterior 1 is that of other data"):
        evidence_weights([found[0], other])
    with pytest.raises(ValueError, match="num_samples is at least 1; got 0"):
        average_profiles(equal, "a", key=jax.random.key(9), num_samples=0)


def test_average_takes_draws_by_evidence(single):
    """Two copies of a posterior, of which one is said to be three times as probable, and has twice the flux."""
    posterior = sample(single, "linear", key=jax.random.key(1), num_samples=400, progress=False)
    draws = {**posterior.draws, FLUX: 2 * posterior.draws[FLUX]}
    import dataclasses

    bright = dataclasses.replace(posterior, draws=draws, log_evidence=posterior.log_evidence + np.log(3))
    mean = average_profiles([posterior, bright], "a", key=jax.random.key(2), num_samples=1000)
    share = (mean.flux[:, 0] > 1.5 * np.median(posterior[FLUX])).mean()
    # Four standard errors of a binomial share.
    assert share == pytest.approx(0.75, abs=0.055)
    nothing = dataclasses.replace(posterior, log_evidence=float("nan"))
    with pytest.raises(ValueError, match=r"Posterior\(s\) \[1\] have no evidence"):
        evidence_weights([posterior, nothing])


# ---- bad input


def test_noise_that_is_not_gaussian_or_not_known():
    for noise, message in ((StudentTNoise, "that of one isn't"), (FloorNoise, "fix observations.one.noise.floor")):
        frame, obs = simulated(noise=(lambda w: FloorNoise(w, 0.01)) if noise is FloorNoise else noise)
        result = fitted(frame, obs)
        with pytest.raises(ValueError, match=message):
            sample(result, "linear", key=jax.random.key(0))


def test_what_linear_sampling_can_not_do(single):
    frame, obs = both_bands()

    def refused(message, change=lambda p: p, morphology=None, result=None):
        scene = make_scene(frame, [5.0, 5.0], None)
        if morphology is not None:
            scene = Scene(frame, {"a": Source((15.2, 16.1), [5.0, 5.0], morphology)})
        parameters = change(Parameters.default(scene, [obs]))
        result = fit(scene, obs, parameters, max_steps=1, progress=False)
        with pytest.raises(ValueError, match=message):
            sample(result, "linear", key=jax.random.key(0))

    refused("HalfCauchy, HalfNormal or Exponential; got Gamma", lambda p: p.prior(PATH, dist.Gamma(2.0, 3.0)))
    refused(f"no prior on {FLUX}, or Normal.*got LogNormal", lambda p: p.prior(FLUX, dist.LogNormal(1.0, 1.0)))
    refused(f"{PATH} is free and {FLUX} isn't", lambda p: p.fix(FLUX))
    curve = link.Polynomial(np.full((2, 2), 0.5), {"g": 0.5, "r": 0.6})
    refused("linked by Polynomial", morphology=MultiGaussianMorphology(WIDTHS, curve, (0.2, 0.1)))
    refused("no free image", morphology=PixelMorphology(np.ones((5, 5))))


def test_ties_of_rings_are_refused():
    frame, obs = simulated()
    one = make_scene(frame, [5.0], None).sources["a"]
    scene = Scene(frame, {"a": one, "b": Source((10.0, 10.0), [5.0], one.morphology)})
    parameters = Parameters.default(scene, [obs]).tie(PATH, "sources.b.morphology.amplitudes")
    result = fit(scene, obs, parameters, max_steps=1, progress=False)
    with pytest.raises(ValueError, match=r"aren.t tied; sources\.b\.morphology\.amplitudes are"):
        sample(result, "linear", key=jax.random.key(0))


def test_a_scene_without_rings_is_linear_in_fluxes():
    """A star and a galaxy of fixed shape on a sky: normal with the covariance of least squares."""
    frame, obs = simulated()
    star = Source((8.0, 8.0), [1.0], PointMorphology())
    galaxy = Source((15.2, 16.1), [5.0], GaussianMorphology(1.5, (0.2, 0.1)))
    scene = Scene(frame, {"star": star, "a": galaxy})
    parameters = Parameters.default(scene, [obs]).free(SKY)
    for name in ("*.center", "*.morphology"):
        parameters = parameters.fix(f"sources.{name}")
    parameters = parameters.prior(FLUX, dist.Exponential(0.01))
    result = fit(scene, obs, parameters, rtol=1e-3, progress=False)
    posterior = sample(result, "linear", key=jax.random.key(0), progress=False)
    blank = obs.with_background(0.0).match(frame)
    stamps = [blank.render(Scene(frame, {"x": eqx_flux(source)}))[0].ravel() for source in (star, galaxy)]
    design = np.stack([*stamps, np.ones(obs.data[0].size)], axis=1) / SIGMA
    covariance = np.linalg.inv(design.T @ design)
    ours = np.column_stack([posterior["sources.star.spectrum.flux"], posterior[FLUX], posterior[SKY]])
    # The star isn't there, and cut off at zero; 6 %: four standard errors of a width.
    np.testing.assert_allclose(ours[:, 1:].std(axis=0), np.sqrt(np.diag(covariance))[1:], rtol=0.07)
    assert ours[:, 0].min() >= 0
    assert np.isfinite(posterior.log_evidence)


def eqx_flux(source):
    """Return a source of unit flux."""
    return Source(source.center, [1.0], source.morphology)


def test_priors_of_rings_fall_outside_a_source():
    scale = np.asarray(ring_prior([1.0, 8.0, 16.0], 4.0).scale)
    # 0.1 up to two half-light radii, then by 2^-6.
    np.testing.assert_allclose(scale, [0.1, 0.1, 0.1 / 64], rtol=1e-6)
    for sigmas, radius in itertools.product(([1.0, -1.0],), (4.0,)):
        with pytest.raises(ValueError, match="are positive"):
            ring_prior(sigmas, radius)
    with pytest.raises(ValueError, match="are positive"):
        ring_prior([1.0], 0.0)
