import jax
import jax.flatten_util
import numpy as np
import numpyro.distributions as dist
import pytest

from scenefit.arrays.compilation import as_integers, compiled
from scenefit.infer import posterior
from scenefit.infer.dense import potential_hessian
from scenefit.infer.jacobian import information_matrix
from scenefit.infer.laplace import marginal_covariance, vector_covariance
from scenefit.model import link
from scenefit.model.morphology import GaussianMorphology, MultiGaussianMorphology, PixelMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from tests.blends import dense_jacobian, fitted_shift, frame_of, gaussian_density, observe, true_scene
from tests.helpers import make_observation


def build_precise(tie=False):
    """Problem of the true blend in double precision: offset, background and a prior free."""
    observations = observe()
    frame = frame_of(observations)
    scene = true_scene(frame)
    parameters = Parameters.default(scene, observations).free("observations.coarse.astrometry.shift")
    parameters = parameters.free("observations.coarse.background").free("observations.coarse.background_slope")
    parameters = parameters.prior("sources.b.morphology.half_light_radius", dist.Normal(2.0, 0.05))
    if tie:
        parameters = parameters.tie("sources.a.morphology.ellipticity", "sources.c.morphology.ellipticity")
    matched = [obs.match(frame) for obs in observations]
    return *posterior.build(scene, matched, parameters), scene, matched


@pytest.mark.parametrize("tie", [False, True], ids=["plain", "tied"])
def test_vector_covariance_equals_the_dense_inverse(tie):
    with jax.enable_x64(True):
        problem, state, layout, scene, observations = build_precise(tie)
        index, covariance = vector_covariance(problem, state, layout, scene, observations)
        columns = dense_jacobian(problem, state)
        radius = next(leaf for leaf in problem.leaves if leaf.name == "morphology.half_light_radius").start + 1
        # The prior on a radius r = exp(c): the density in r, curvature (r / sigma)^2 of its square, as r sits on the mean.
        curvature = np.zeros(columns.shape[1])
        curvature[radius] = (2.0 / 0.05) ** 2
    free = np.asarray(problem.free.vector)
    expected = np.linalg.inv((columns.T @ columns + np.diag(curvature))[np.ix_(free, free)])
    np.testing.assert_array_equal(index, np.nonzero(free)[0])
    sigma = np.sqrt(np.diag(expected))
    # 1e-3: derivative images are cut where they fall below 1e-5 of their peak and beyond the stamps.
    np.testing.assert_allclose(
        covariance.toarray() / np.outer(sigma, sigma), expected / np.outer(sigma, sigma), atol=1e-3
    )


def test_information_of_all_kinds_of_parameters_equals_the_dense_product():
    """A radius linked over channels, tied centers of a composite, amplitudes of a sum of Gaussians, a joint prior, noise free."""
    shape = (24, 26)
    frame = Frame(shape, channels=("g", "r"), padding=10)
    observations = [
        make_observation(shape, channels=("g", "r"), psf=GaussianPSF(1.9), wcs=None, name="blurred").match(frame)
    ]
    linked = GaussianMorphology(link.PerBand({"g": 1.5, "r": 2.1}), (0.1, 0.2))
    rings = MultiGaussianMorphology([0.8, 2.0], [0.4, 0.6], (0.0, 0.1))
    parts = {"in": Source((14.0, 15.2), [90.0, 60.0], linked), "out": Source((14.0, 15.2), [50.0, 70.0], rings)}
    sources = {"sum": CompositeSource(parts), "alone": Source((7.3, 6.1), [80.0, 120.0], GaussianMorphology(1.8))}
    scene = Scene(frame, sources)
    parameters = Parameters.default(scene, observations).tie(
        "sources.sum.parts.out.center", "sources.sum.parts.in.center"
    )
    for path in ("background", "background_slope", "noise.scale"):
        parameters = parameters.free(f"observations.blurred.{path}")
    shift = "observations.blurred.astrometry.shift"
    parameters = parameters.prior(shift, dist.Normal(0, 0.3)).free(shift)
    width = np.array([[0.02, 0.015], [0.015, 0.02]])
    joint = dist.MultivariateNormal(np.zeros(2), covariance_matrix=width**2)
    parameters = parameters.prior("sources.alone.morphology.ellipticity", joint)
    with jax.enable_x64(True):
        problem, state, layout = posterior.build(scene, observations, parameters)
        index, information = information_matrix(problem, state, layout, scene, observations)
        columns = dense_jacobian(problem, state)[:, index]
        expected = columns.T @ columns + np.asarray(compiled(potential_hessian)(problem, state, as_integers(index)))
    assert {leaf.name for leaf in problem.leaves} >= {"morphology.amplitudes", "noise.scale", "shift"}
    unit = 1 / np.sqrt(np.diag(expected))
    # 1e-5 of the peaks of derivatives is left out, over a few hundred pixels.
    np.testing.assert_allclose(information.toarray() * np.outer(unit, unit), expected * np.outer(unit, unit), atol=1e-4)
    radius = next(leaf for leaf in problem.leaves if leaf.name == "morphology.half_light_radius")
    assert len(index) == len(np.unique(problem.index)) > radius.stop


def test_marginal_covariance_of_a_vector_equals_vector_covariance():
    result = fitted_shift()
    problem, state, layout = posterior.build(result.scene, result.observations, result.parameters)
    index, covariance = vector_covariance(problem, state, layout, result.scene, result.observations)
    shift = next(leaf for leaf in problem.leaves if leaf.name == "shift")
    numbers = np.arange(shift.start, shift.stop)
    places = np.searchsorted(index, numbers)
    marginal = marginal_covariance(problem, state, numbers)
    sigma = np.sqrt(np.diag(marginal))
    # 2e-2: the conjugate gradients stop at a squared residual of 1e-6, a permille of the standard error.
    expected = covariance[places][:, places].toarray()
    np.testing.assert_allclose(marginal / np.outer(sigma, sigma), expected / np.outer(sigma, sigma), atol=2e-2)


@pytest.fixture(scope="module")
def pixel_problem():
    """A free image beside a Gaussian in two observations, one with a free offset; some pixels lie at their bound."""
    shape = (20, 20)
    frame = Frame(shape, channels=("g", "r"), padding=10)
    rng = np.random.default_rng(4)
    observations = [
        make_observation(shape, channels=("g",), psf=GaussianPSF(1.1), wcs=None, name="sharp").match(frame),
        make_observation(shape, channels=("g", "r"), psf=GaussianPSF(1.9), wcs=None, name="blurred").match(frame),
    ]
    envelope = gaussian_density(*np.mgrid[-3:4, -3:4], 2.0 * np.eye(2))
    image = np.where(rng.random((7, 7)) < 0.8, envelope * rng.uniform(0.5, 1.5, (7, 7)), 0.0)
    sources = {
        "image": Source((9, 8), [400.0, 300.0], PixelMorphology(image, envelope=envelope)),
        "galaxy": Source((11.2, 13.4), [300.0, 200.0], GaussianMorphology(1.5, (0.1, 0.2))),
    }
    scene = Scene(frame, sources)
    parameters = Parameters.default(scene, observations).free("observations.blurred.astrometry.shift")
    problem, state, _ = posterior.build(scene, observations, parameters)
    return problem, state, dense_jacobian(problem, state)


@pytest.mark.parametrize("name", ["shift", "center", "flux"])
def test_marginal_covariance_equals_the_dense_block(pixel_problem, name):
    """With the pixels of the image marginalised over; those at zero count as known."""
    problem, state, columns = pixel_problem
    # The model doesn't depend on the sum of an image's pixels: hold it.
    in_image = np.concatenate([np.zeros(len(state.vector)), *(np.ones(image.size) for image in state.images)])
    image = np.asarray(state.images[0])
    pixels = np.asarray(problem.free.images[0])
    face = np.concatenate([np.asarray(problem.free.vector), (pixels & (image > 0)).ravel()])
    assert 3 < (pixels & (image == 0)).sum() < 40
    number = np.nonzero(face)[0]
    everything = columns.T @ columns
    hessian = (everything + np.diag(everything).max() * np.outer(in_image, in_image))[np.ix_(face, face)]
    covariance = np.linalg.inv(hessian)
    leaf = next(leaf for leaf in problem.leaves if leaf.name == name)
    wanted = np.arange(leaf.start, leaf.stop)
    wanted = wanted[np.asarray(problem.free.vector)[wanted]]
    places = np.searchsorted(number, wanted)
    expected = covariance[np.ix_(places, places)]
    marginal = marginal_covariance(problem, state, wanted)
    sigma = np.sqrt(np.diag(expected))
    # 3 %: the conjugate gradients stop at a squared residual of 1e-6, in float32.
    np.testing.assert_allclose(marginal / np.outer(sigma, sigma), expected / np.outer(sigma, sigma), atol=0.03)
    # Pixels held fixed, the errors would be smaller: not the same question.
    vector = face & (np.arange(len(face)) < len(state.vector))
    held = np.linalg.inv((columns.T @ columns)[np.ix_(vector, vector)])
    places = np.searchsorted(np.nonzero(vector)[0], wanted)
    assert (np.sqrt(np.diag(held))[places] < 0.98 * sigma).any()
