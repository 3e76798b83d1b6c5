"""Truncated normal densities against quadrature and SciPy; linear posteriors against brute force, quadrature and NUTS."""

import dataclasses

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
from scenefit.infer.fit import FitResult, Status
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


def draws_of(density, rng, count=800, **options):
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


@pytest.mark.parametrize("scale", [None, 0.5])
def test_evidence_in_nine_dimensions(rng, scale):
    """Against the probability of the orthant by SciPy (Genz), times the mean of the half-Cauchy priors there."""
    flat = collinear(9, rng)
    covariance = np.linalg.inv(flat.precision)
    mean = covariance @ flat.shift
    inside = scipy.stats.multivariate_normal(np.zeros(9), covariance, maxpts=10**6, abseps=1e-9, seed=rng).cdf(mean)
    expected = (
        flat.constant + 0.5 * flat.shift @ mean + 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1] + np.log(inside)
    )
    spread = 0.0
    if scale is not None:
        density = density_of(flat.precision, flat.shift, scale=np.full(9, scale), constant=flat.constant)
        values = draws_of(flat, rng, 2000)
        log_prior = density.log_density(values) - flat.log_density(values)
        weight = np.exp(log_prior - log_prior.max())
        expected += log_prior.max() + np.log(weight.mean())
        spread = standard_error(weight) / weight.mean()
        flat = density
    evidence, error = log_evidence(flat, draws_of(flat, rng), rng)
    assert error < 0.1
    # Four joint standard errors; SciPy's probability is good to a percent.
    assert abs(evidence - expected) < 4 * np.hypot(error, spread) + 0.01


# ---- posteriors of scenes

SHAPE, SIGMA, WIDTHS = (31, 33), 0.05, (1.0, 2.2)
PSF, CENTER, ELLIPTICITY = GaussianPSF(1.4), (15.2, 16.1), (0.2, 0.1)


def make_scene(frame, flux, amplitudes, widths=WIDTHS, center=CENTER, ellipticity=ELLIPTICITY):
    return Scene(frame, {"a": Source(center, flux, MultiGaussianMorphology(widths, amplitudes, ellipticity))})


def blank_of(channels, sigma=SIGMA):
    frame = Frame(SHAPE, channels=channels, padding=8)
    data = np.zeros((len(channels), *SHAPE))
    return Observation(data, sigma=sigma, psf=PSF, channels=channels, name="one").match(frame), frame


def rendered(scene, channels=("g",)):
    """Image of a scene in standard deviations of the noise."""
    return blank_of(channels)[0].render(scene) / SIGMA


def simulated(channels=("g",), amplitudes=(0.9, 0.1), sigma=SIGMA, seed=1):
    """One observation with all channels of a galaxy of two rings, and the true scene."""
    blank, frame = blank_of(channels, sigma)
    scene = make_scene(frame, 6.0 * (1 + np.arange(len(channels))), np.array(amplitudes))
    data = blank.render(scene)
    data = data + sigma * np.random.default_rng(seed).normal(size=data.shape)
    return scene, Observation(data, sigma=sigma, psf=PSF, channels=channels, name="one").match(frame)


def as_result(scene, obs, prior=None, fixed=("center", "morphology.ellipticity"), change=lambda p: p):
    """Return a scene as if it had been fitted: exact posteriors don't depend on the point that they are computed from."""
    parameters = Parameters.default(scene, [obs]).prior("*.amplitudes", prior)
    for name in fixed:
        parameters = parameters.fix(f"sources.*.{name}")
    return FitResult(scene, (obs,), change(parameters), Status.CONVERGED, 0.0, {}, 0, {})


def ring_columns(channels=("g",)):
    """Images of unit flux of both rings, one channel after the other, in standard deviations; shape (ring, channel, pixel)."""
    frame = blank_of(channels)[1]
    images = [rendered(make_scene(frame, np.ones(len(channels)), row), channels) for row in np.eye(2)]
    return np.array(images).reshape(2, len(channels), -1)


def compare(values, grid, marginal, bias=0.1, scale=0.1):
    """Compare draws with a density on a grid: of some 1500 independent ones, 0.1 widths are four standard errors."""
    mean = (marginal * grid).sum() / marginal.sum()
    width = np.sqrt((marginal * (grid - mean) ** 2).sum() / marginal.sum())
    assert values.mean() == pytest.approx(mean, abs=bias * width)
    assert values.std() == pytest.approx(width, rel=scale)


@pytest.fixture(scope="module")
def single():
    """Two rings and a sky, a half-Cauchy prior on the rings."""
    scene, obs = simulated()
    return as_result(scene, obs, dist.HalfCauchy(0.05), change=lambda p: p.free(SKY, prior=dist.Normal(0.0, 0.01)))


@pytest.fixture(scope="module")
def drawn(single):
    return sample(single, "linear", key=jax.random.key(1), progress=False)


def test_the_posterior_of_two_rings_against_quadrature(single, drawn):
    assert drawn.status is PosteriorStatus.GOOD, drawn.message
    assert drawn.method == "linear"
    data = single.observations[0].data.ravel() / SIGMA
    design = np.stack([*ring_columns()[:, 0], np.full(data.size, 1 / SIGMA)], axis=1)
    precision, shift = design.T @ design + np.diag([0, 0, 0.01**-2]), design.T @ data
    # The sky is normal: a Schur complement.
    rest = precision[:2, :2] - np.outer(precision[:2, 2], precision[2, :2]) / precision[2, 2]
    moved = shift[:2] - precision[:2, 2] * shift[2] / precision[2, 2]
    grids = np.linspace(3, 8, 801), np.linspace(0, 4, 801)
    w = np.stack(np.meshgrid(*grids, indexing="ij"), axis=-1)
    log = w @ moved - 0.5 * np.einsum("...i,ij,...j->...", w, rest, w)
    # The prior is that of fractions of the flux of the fit.
    log -= np.log1p((w / (0.05 * 6.0)) ** 2).sum(axis=-1)
    table = np.exp(log - log.max())
    fluxes = drawn[FLUX] * drawn[PATH]
    # Single precision.
    np.testing.assert_allclose(drawn[PATH].sum(axis=1), 1, atol=1e-6)
    assert fluxes.min() >= 0
    # Zero is within reach of the second ring.
    assert (fluxes[:, 1] < 0.1).mean() > 0.02
    for place, grid in enumerate(grids):
        compare(fluxes[:, place], grid, table.sum(axis=1 - place))


def test_what_is_exact_is_not_judged_as_an_approximation(single, drawn):
    assert np.isnan(drawn.diagnostics.pareto_k)
    assert np.isnan(drawn.diagnostics.divergent)
    assert "Pareto" not in drawn.message
    assert drawn.log_density.shape == (4, 600)
    again = sample(single, "linear", key=jax.random.key(1), progress=False)
    np.testing.assert_array_equal(again[PATH], drawn[PATH])


def test_profiles_of_the_draws(drawn):
    found = profile(drawn, "a")
    assert found.is_sampled
    # 1e-6: the same numbers, of single precision.
    np.testing.assert_allclose(found.flux[:, 0], drawn[FLUX][:, 0], rtol=1e-6)
    assert np.isfinite(found.r50).all()


def whole(sigma):
    """All of a galaxy is free, and both rings are well measured, so that nothing is at a bound."""
    return as_result(*simulated(amplitudes=(0.4, 0.6), sigma=sigma, seed=2), fixed=())


def test_derivatives_stand_in_for_centre_and_shape():
    sigma = SIGMA / 10
    posterior = sample(whole(sigma), "linear", key=jax.random.key(4), progress=False)
    assert posterior.status is PosteriorStatus.GOOD, posterior.message
    assert "Pareto k" in posterior.message
    # Amplitudes have no prior.
    assert np.isnan(posterior.log_evidence)
    frame, step = blank_of("g")[1], 0.02

    def moved(**changes):
        return rendered(make_scene(frame, [6.0], (0.4, 0.6), **changes)).ravel()

    columns = list(ring_columns()[:, 0])
    for name, start in (("center", CENTER), ("ellipticity", ELLIPTICITY)):
        for axis in np.eye(2):
            ends = [moved(**{name: np.array(start) + sign * step * axis}) for sign in (1, -1)]
            columns.append((ends[0] - ends[1]) / (2 * step))
    covariance = np.linalg.inv(np.array(columns) @ np.array(columns).T) * (sigma / SIGMA) ** 2
    width = np.sqrt(np.diag(covariance))
    found = [*posterior["sources.a.center"].T, *posterior["sources.a.morphology.ellipticity"].T]
    # 2400 draws: four standard errors of a width are 6 %; differences over 0.02 pixels and map of the disk add a percent.
    np.testing.assert_allclose([each.std() for each in found], width[2:], rtol=0.07)
    total = np.sqrt(covariance[:2, :2].sum())
    assert posterior[FLUX].std() == pytest.approx(total, rel=0.07)


def test_a_poor_linearisation_says_so():
    """A galaxy whose centre and ellipticity the noise leaves open."""
    posterior = sample(whole(8 * SIGMA), "linear", key=jax.random.key(4), progress=False)
    assert posterior.status is PosteriorStatus.POOR_APPROXIMATION, posterior.message


TWO_BANDS = ("g", "r")


def test_the_linear_model_is_the_model():
    """For rings that are free in every band the likelihood is exactly quadratic, far from the fit, too."""
    scene, obs = simulated(TWO_BANDS, amplitudes=(0.6, 0.4), seed=3)
    amplitudes = link.PerBand({"g": (0.6, 0.4), "r": (0.3, 0.7)})
    result = as_result(make_scene(scene.frame, [6.0, 12.0], amplitudes), obs, dist.HalfCauchy(0.1))
    problem, state, layout = packing.build(result.scene, result.observations, result.parameters)
    model = linear_model(problem, state, layout, result)
    assert model.is_exact
    assert len(model.rings) == 2
    draws = np.abs(np.random.default_rng(0).normal(size=(5, 4))) * model.start
    losses = np.asarray(data_losses(problem, state, as_floats(model.vectors(draws))))
    # 1e-4: single precision; the losses are of some thousands.
    np.testing.assert_allclose(-losses, model.log_likelihood(draws), rtol=1e-4)


def test_shared_amplitudes_and_a_spectrum():
    """Rings of one shape in two bands, against quadrature of the bilinear model."""
    sigma = SIGMA / 5
    scene, obs = simulated(TWO_BANDS, amplitudes=(0.6, 0.4), sigma=sigma, seed=3)
    posterior = sample(as_result(scene, obs, dist.HalfNormal(0.5)), "linear", key=jax.random.key(6), progress=False)
    assert posterior.status is PosteriorStatus.GOOD, posterior.message
    columns, data = ring_columns(TWO_BANDS) * SIGMA / sigma, obs.data.reshape(2, -1) / sigma
    gram, shift = np.einsum("icp,jcp->cij", columns, columns), np.einsum("icp,cp->ic", columns, data)
    # Ring fluxes in r, the brighter band, and the ratio of g to r.
    grids = np.linspace(6.4, 8.0, 91), np.linspace(4.0, 5.6, 91), np.linspace(0.46, 0.54, 81)
    w = np.stack(np.meshgrid(*grids[:2], indexing="ij"), axis=-1)[:, :, None]
    log = -0.5 * ((w / (0.5 * 12.0)) ** 2).sum(axis=-1)
    for channel, factor in ((1, np.ones(81)), (0, grids[2])):
        quadratic = np.einsum("...i,ij,...j->...", w, gram[channel], w)
        log = log + factor * (w @ shift[:, channel]) - 0.5 * factor**2 * quadratic
    table = np.exp(log - log.max())
    red = posterior[FLUX][:, 1:] * posterior[PATH]
    compare(red[:, 0], grids[0], table.sum(axis=(1, 2)))
    compare(red[:, 1], grids[1], table.sum(axis=(0, 2)))
    compare(posterior[FLUX][:, 0] / posterior[FLUX][:, 1], grids[2], table.sum(axis=(0, 1)))


def test_evidence_prefers_the_right_widths_and_averages_follow():
    scene, obs = simulated(amplitudes=(0.5, 0.5), seed=5)
    found = []
    for widths in (WIDTHS, (0.3, 0.9)):
        start = make_scene(scene.frame, [6.0], (0.5, 0.5), widths)
        result = as_result(start, obs, dist.HalfCauchy(0.3))
        found.append(sample(result, "linear", key=jax.random.key(8), progress=False))
    weights = evidence_weights(found)
    assert weights.sum() == pytest.approx(1)
    # The images differ by many standard deviations.
    assert weights[0] > 0.999
    mean = average_profiles(found, "a", key=jax.random.key(9), num_samples=600, radii=[1.0, 2.0, 4.0])
    assert mean.total.curve_of_growth.shape == (600, 1, 3)
    alone = profile(found[0], "a", radii=[1.0, 2.0, 4.0])
    # 600 of 2400 draws: four standard errors of the mean.
    assert mean.r50.mean() == pytest.approx(alone.r50.mean(), abs=4 * alone.r50.std() / np.sqrt(600))


def test_averages_take_draws_by_evidence(drawn):
    """Two copies of a posterior, of which one is said to be three times as probable, and has twice the flux."""
    draws = {**drawn.draws, FLUX: 2 * drawn.draws[FLUX]}
    bright = dataclasses.replace(drawn, draws=draws, log_evidence=drawn.log_evidence + np.log(3))
    mean = average_profiles([drawn, bright], "a", key=jax.random.key(2), num_samples=1000)
    share = (mean.flux[:, 0] > 1.5 * np.median(drawn[FLUX])).mean()
    # Four standard errors of a binomial share.
    assert share == pytest.approx(0.75, abs=0.055)


def test_evidence_that_can_not_be_compared(single, drawn):
    with pytest.raises(ValueError, match="at least one posterior"):
        evidence_weights([])
    nothing = dataclasses.replace(drawn, log_evidence=float("nan"))
    with pytest.raises(ValueError, match=r"Posterior\(s\) \[1\] have no evidence"):
        evidence_weights([drawn, nothing])
    scene, obs = simulated(seed=6)
    other = dataclasses.replace(drawn, result=as_result(scene, obs, dist.HalfCauchy(0.05)))
    with pytest.raises(ValueError, match="posterior 1 is that of other data"):
        evidence_weights([drawn, other])
    flat = as_result(single.scene, single.observations[0], dist.HalfCauchy(0.05), change=lambda p: p.free(SKY))
    with pytest.raises(ValueError, match=f"differ in parameters without prior.*{SKY}"):
        evidence_weights([drawn, dataclasses.replace(drawn, result=flat)])
    with pytest.raises(ValueError, match="num_samples is at least 1; got 0"):
        average_profiles([drawn], "a", key=jax.random.key(9), num_samples=0)


def test_a_scene_without_rings_is_linear_in_fluxes():
    """A star that isn't there and a galaxy of fixed shape on a sky: covariance of least squares."""
    obs, frame = simulated()[1], blank_of("g")[1]
    sources = {"star": (PointMorphology(), (8.0, 8.0)), "a": (GaussianMorphology(1.5, ELLIPTICITY), CENTER)}
    scene = Scene(frame, {name: Source(center, [1.0], shape) for name, (shape, center) in sources.items()})
    parameters = Parameters.default(scene, [obs]).free(SKY).prior(FLUX, dist.Exponential(0.01))
    parameters = parameters.fix("sources.*.center").fix("sources.*.morphology")
    result = FitResult(scene, (obs,), parameters, Status.CONVERGED, 0.0, {}, 0, {})
    posterior = sample(result, "linear", key=jax.random.key(0), progress=False)
    stamps = [rendered(Scene(frame, {name: source})).ravel() for name, source in scene.sources.items()]
    design = np.stack([*stamps, np.full(obs.data.size, 1 / SIGMA)], axis=1)
    width = np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    ours = np.column_stack([posterior["sources.star.spectrum.flux"], posterior[FLUX], posterior[SKY]])
    assert ours[:, 0].min() >= 0
    # 6 %: four standard errors; cutting the star's flux off at zero moves the others by less than a percent.
    np.testing.assert_allclose(ours[:, 1:].std(axis=0), width[1:], rtol=0.07)
    assert np.isfinite(posterior.log_evidence)


# ---- bad input


@pytest.mark.parametrize(
    ("noise", "message"),
    [(StudentTNoise, "that of one isn't"), (lambda w: FloorNoise(w, 0.01), r"fix observations\.one\.noise\.floor")],
)
def test_noise_that_is_not_gaussian_or_not_known(noise, message):
    scene, obs = simulated()
    weights = np.full(obs.data.shape, SIGMA**-2)
    other = Observation(obs.data, noise=noise(weights), psf=PSF, channels="g", name="one").match(scene.frame)
    with pytest.raises(ValueError, match=message):
        sample(as_result(scene, other), "linear", key=jax.random.key(0))


CURVE = link.Polynomial(np.full((2, 2), 0.5), {"g": 0.5, "r": 0.6, "i": 0.8})


@pytest.mark.parametrize(
    ("message", "change", "morphology"),
    [
        ("HalfCauchy, HalfNormal or Exponential; got Gamma", lambda p: p.prior(PATH, dist.Gamma(2.0, 3.0)), None),
        (f"no prior on {FLUX}, or Normal.*got LogNormal", lambda p: p.prior(FLUX, dist.LogNormal(1.0, 1.0)), None),
        (f"{PATH} is free and {FLUX} isn't", lambda p: p.fix(FLUX), None),
        ("linked by Polynomial", lambda p: p, MultiGaussianMorphology(WIDTHS, CURVE, ELLIPTICITY)),
        ("no free image", lambda p: p, PixelMorphology(np.ones((5, 5)))),
        ("1 to 400 free numbers; there are 0", lambda p: p.fix("sources"), None),
    ],
)
def test_what_linear_sampling_can_not_do(message, change, morphology):
    scene, obs = simulated(TWO_BANDS)
    if morphology is not None:
        scene = Scene(scene.frame, {"a": Source(CENTER, [5.0, 5.0], morphology)})
    result = FitResult(scene, (obs,), change(Parameters.default(scene, [obs])), Status.CONVERGED, 0.0, {}, 0, {})
    with pytest.raises(ValueError, match=message):
        sample(result, "linear", key=jax.random.key(0))


def test_ties_of_rings_are_refused():
    scene, obs = simulated()
    scene = Scene(scene.frame, {"a": scene.sources["a"], "b": scene.sources["a"]})
    result = as_result(scene, obs, change=lambda p: p.tie(PATH, "sources.b.morphology.amplitudes"))
    with pytest.raises(ValueError, match=r"aren't tied; sources\.b\.morphology\.amplitudes are"):
        sample(result, "linear", key=jax.random.key(0))


def test_priors_of_rings_fall_outside_a_source():
    scale = np.asarray(ring_prior([1.0, 8.0, 16.0], 4.0).scale)
    # 0.1 up to two half-light radii, then by 2^-6.
    np.testing.assert_allclose(scale, [0.1, 0.1, 0.1 / 64], rtol=1e-6)
    for sigmas, radius in (([1.0, -1.0], 4.0), ([1.0], 0.0)):
        with pytest.raises(ValueError, match="are positive"):
            ring_prior(sigmas, radius)
