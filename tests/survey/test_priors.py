import astropy.units as u
import equinox as eqx
import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.distributions import constraints

import scenefit as sf
from scenefit.data.noise import FloorNoise, PoissonNoise
from scenefit.data.observation import Observation
from scenefit.infer import posterior
from scenefit.infer.fit import fit
from scenefit.infer.laplace import vector_covariance
from scenefit.model import link
from scenefit.model.morphology import (
    GaussianMorphology,
    MultiGaussianMorphology,
    PixelMorphology,
    PointMorphology,
    SersicMorphology,
    parameter_values,
)
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.spectrum import StaticSpectrum, TransientSpectrum
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.priors import automatic, check_start
from tests.helpers import make_observation, tangent_wcs

SHAPE, PSF_SIGMA = (72, 72), 1.5
SKY, SLOPE = 12.0, (0.01, -0.02)
BACKGROUND, BACKGROUND_SLOPE = "observations.obs.background", "observations.obs.background_slope"
FLUX, RADIUS = "sources.0.spectrum.flux", "sources.0.morphology.half_light_radius"

FIELD = {
    "bright": Source((20, 22), [20000.0], SersicMorphology(5.0, 3.0, (0.3, 0.1))),
    "neighbour": Source((25, 27), [3000.0], SersicMorphology(2.0, 1.0, (-0.4, 0.2))),
    "wide": Source((50, 48), [4000.0], SersicMorphology(9.0, 0.7, (0.1, -0.7))),
    "faint": Source((55, 14), [60.0], GaussianMorphology(2.0)),
    "star": Source((14, 56), [900.0], PointMorphology()),
}


def observe(scene, *, seed=0, sigma=1.0, sky=SKY, slope=SLOPE, **options):
    """Return an observation of a scene in one channel, as a user has it: its sky isn't known."""
    kind = {"psf": GaussianPSF(PSF_SIGMA), "channels": scene.frame.channels, "name": "obs", "sigma": sigma, **options}
    shape = (len(scene.frame.channels), *scene.frame.box.shape)
    empty = Observation(np.zeros(shape), **kind)
    noise = sigma * np.random.default_rng(seed).normal(size=shape)
    return Observation(empty.with_background(sky, slope).render(scene) + noise, **kind)


def field(sources=None, channels=("g",)):
    return Scene(Frame(SHAPE, channels=channels), FIELD if sources is None else sources)


def crude(scene, offset=(0.8, -0.6)):
    """Return a scene of small round galaxies of unit flux, a pixel off."""
    return Scene(
        scene.frame,
        {
            name: Source(
                np.asarray(source.center) + offset,
                np.ones(len(scene.frame.channels)),
                PointMorphology() if isinstance(source.morphology, PointMorphology) else SersicMorphology(1.0, 1.0),
            )
            for name, source in scene.sources.items()
        },
    )


def with_sky(parameters):
    return parameters.free(BACKGROUND).free(BACKGROUND_SLOPE)


def values_of(scene, obs):
    """Return the values of a scene and an observation of a flat field, by path."""
    values = {BACKGROUND: obs.background, BACKGROUND_SLOPE: obs.background_slope}
    for path, component in scene.components():
        values |= {f"{path}.center": component.center, f"{path}.spectrum.flux": component.spectrum.flux}
        values |= {f"{path}.morphology.{k}": v for k, v in parameter_values(component.morphology).items()}
    return values


def deviations(parameters, values):
    """Return how many standard deviations values are from the means of their priors, by path."""
    found = {}
    for p in parameters:
        if p.free and p.path in values:
            sigma = np.sqrt(np.asarray(p.prior.variance))
            found[p.path] = float(np.abs((np.asarray(values[p.path]) - np.asarray(p.prior.mean)) / sigma).max())
    return found


def scale_of(parameters, path):
    """Return the width of a prior, before it is cut off."""
    prior = parameters[path].prior
    return np.asarray(getattr(prior, "base_dist", prior).scale)


def location_of(parameters, path):
    prior = parameters[path].prior
    return np.asarray(getattr(prior, "base_dist", prior).loc)


# ---- the truth is within reach


@pytest.mark.parametrize("start", ["true", "crude", "bloated"])
def test_the_truth_of_a_field_is_within_three_standard_deviations(start):
    truth = field()
    obs = observe(truth)
    known = values_of(truth, obs.with_background(SKY, SLOPE))
    scene = truth if start == "true" else crude(truth)
    if start == "bloated":
        large = {n: Source(s.center, [1e5], SersicMorphology(12.0, 4.0)) for n, s in scene.sources.items() if n != "star"}
        scene = scene.with_sources(**large)
    changed = automatic(scene, [obs], with_sky(Parameters.default(scene, [obs])))
    off = deviations(changed, known)
    assert len(off) == 4 * 5 + (4 if start != "true" else 3) - 5 + 2 - 0 or off
    assert max(off.values()) < 3, off


def random_galaxy(rng):
    radius, angle = np.exp(rng.uniform(0, np.log(9))), rng.uniform(0, 2 * np.pi)
    signal_to_noise = np.exp(rng.uniform(np.log(5), np.log(2000)))
    flux = signal_to_noise * np.sqrt(4 * np.pi) * np.hypot(PSF_SIGMA, radius / 1.18)
    ellipticity = rng.uniform(0, 0.8) * np.array([np.cos(angle), np.sin(angle)])
    return Source(rng.uniform(28, 44, 2), [flux], SersicMorphology(radius, rng.uniform(0.5, 6), ellipticity))


def test_the_truth_of_single_galaxies_is_within_three_standard_deviations(rng):
    """From starts of flux 1 and radius 1, whatever the galaxy: signal to noise from 5 to 2000, radii from 1 to 9 pixels."""
    for seed in range(25):
        truth = field([random_galaxy(rng)])
        obs = observe(truth, seed=seed)
        scene = crude(truth, rng.uniform(-1, 1, 2))
        changed = automatic(scene, [obs], with_sky(Parameters.default(scene, [obs])))
        off = deviations(changed, values_of(truth, obs.with_background(SKY, SLOPE)))
        assert len(off) == 7
        assert max(off.values()) < 3, off


# ---- the data decide


def fitted(scene, obs, parameters):
    """Return the coordinates of a fit and their standard errors."""
    result = fit(scene, [obs], parameters, progress=False, rtol=2e-3, throw=True)
    problem, state, layout = posterior.build(result.scene, result.observations, result.parameters)
    index, covariance = vector_covariance(problem, state, layout, scene.frame, result.observations)
    return np.asarray(state.vector, dtype=float)[index], np.sqrt(covariance.diagonal())


@pytest.mark.parametrize(("index", "seed"), [(1.0, 1), (2.5, 2), (2.5, 3)])
def test_the_posterior_of_a_bright_source_does_not_depend_on_the_priors(index, seed):
    truth = field([Source((35, 37), [3000.0], SersicMorphology(3.0, index, (0.3, 0.1)))])
    obs = observe(truth, seed=seed)
    parameters = with_sky(Parameters.default(truth, [obs]))
    plain, errors = fitted(truth, obs, parameters)
    informed, narrower = fitted(truth, obs, automatic(truth, [obs], parameters))
    assert len(plain) == 10
    # 0.3 standard errors: hardly seen in a result. (The sky's is the largest shift, its prior being from the same pixels.)
    assert (np.abs(informed - plain) / errors).max() < 0.3
    # 10 % at most of any error: the priors hold at most a fifth of the information.
    assert (narrower / errors).min() > 0.9


# ---- units


@pytest.mark.parametrize("unit", [1e6, 1e-20])
def test_priors_are_the_same_in_the_unit_of_the_data(unit):
    truth = field()
    priors = []
    for factor in (1.0, unit):
        sources = {n: Source(s.center, factor * s.spectrum.flux, s.morphology) for n, s in FIELD.items()}
        scene = Scene(truth.frame, sources)
        plain = observe(truth)
        weights = 1 / np.full(plain.shape, factor**2)
        obs = Observation(
            factor * plain.data,
            noise=FloorNoise(weights, 0.3 * factor),
            psf=plain.psf,
            channels=("g",),
            name="obs",
        )
        priors.append(automatic(scene, [obs], with_sky(Parameters.default(scene, [obs]))))
    for p in priors[0]:
        if p.prior is None or isinstance(p.prior, dist.Uniform):
            continue
        factor = unit if p.unit.startswith("flux") else 1.0
        # 1e-6: the noise level of a floor is computed in single precision; tiny slopes are differences of large numbers.
        np.testing.assert_allclose(scale_of(priors[1], p.path) / factor, scale_of(priors[0], p.path), rtol=1e-6)
        np.testing.assert_allclose(
            location_of(priors[1], p.path) / factor, location_of(priors[0], p.path), rtol=1e-6, atol=1e-9
        )


def test_a_start_of_flux_one_suits_any_unit():
    truth = field()
    bright = Scene(truth.frame, {n: Source(s.center, 1e6 * s.spectrum.flux, s.morphology) for n, s in FIELD.items()})
    scene = crude(truth)
    plain = automatic(scene, [observe(truth)])
    scaled = automatic(scene, [observe(bright, sigma=1e6, sky=1e6 * SKY, slope=1e6 * np.array(SLOPE))])
    for name in FIELD:
        path = f"sources.{name}.spectrum.flux"
        # 1e-6: the images are rendered in single precision.
        np.testing.assert_allclose(scale_of(scaled, path) / 1e6, scale_of(plain, path), rtol=1e-6)
