"""Residuals and gradients from the derivatives of stamps, against those of the whole loss by JAX, which knows of no stamps."""

import jax
import numpy as np
import pytest

from scenefit.arrays.compilation import as_floats, compiled
from scenefit.data.noise import FloorNoise, PoissonNoise
from scenefit.data.observation import Observation
from scenefit.infer import posterior
from scenefit.infer.gradient import residuals_and_gradient
from scenefit.infer.problem import State
from scenefit.infer.slopes import slopes_of_stamps, untied
from scenefit.model import link
from scenefit.model.clumpy import ClumpyMorphology
from scenefit.model.morphology import MultiGaussianMorphology, PixelMorphology, PointMorphology, SersicMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.spectrum import StaticSpectrum, TransientSpectrum
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF

SHAPE, CHANNELS = (31, 33), (("g", 0), ("g", 1), ("i", 0))
RNG = np.random.default_rng(11)


def make_scene():
    """Stamps of one plane and of one a channel, of two sizes; spectra of epochs; an image that is held; a source on the edge."""
    linked = link.Polynomial([3.0, 2.5], {"g": 0.48, "i": 0.77})
    host = CompositeSource(
        {
            "disk": Source((14.2, 13.1), [4.0, 6.0, 5.0], SersicMorphology(linked, 1.2, (0.2, 0.1))),
            "nucleus": Source((14.2, 13.1), [0.5, 0.6, 0.7], PointMorphology()),
        }
    )
    clumpy = ClumpyMorphology(1.5, 1.0, (0.2, 0.1), [(1.0, -2.0), (0.5, 1.0)], [0.1, 0.05])
    rings = MultiGaussianMorphology([0.8, 1.6, 3.2], [0.3, 0.4, 0.3], (0.0, 0.3))
    image = PixelMorphology(RNG.uniform(0.5, 1.0, (5, 5)))
    sources = {
        "host": host,
        "clumpy": Source((8.4, 24.6), TransientSpectrum([2.0, 3.0, 4.0], [0]), clumpy),
        "rings": Source((20.5, 22.3), [3.0, 2.0, 1.0], rings),
        "edge": Source((-1.0, 6.3), StaticSpectrum([2.0, 3.0], ["g", "i"]), SersicMorphology(1.5, 2.0, (0.1, 0.3))),
        "image": Source((25.0, 9.0), [1.0, 2.0, 3.0], image),
    }
    return Scene(Frame(SHAPE, channels=CHANNELS, padding=12, margin=4), sources)


def make_parameters(scene, observations, kind):
    parameters = Parameters.default(scene, observations).fix("sources.image.morphology.image")
    parameters = parameters.free("observations.c.astrometry.shift").free("observations.*.background")
    parameters = parameters.free("observations.*.background_slope")
    if kind == "floor":
        parameters = parameters.free("observations.*.noise.floor")
    return parameters.tie("sources.host.parts.disk.center", "sources.host.parts.nucleus.center")


def options(kind, counts):
    """Return options of an observation for its noise, and the sky of counts."""
    if kind == "poisson":
        return {"noise": PoissonNoise(counts), "background": 20.0}
    return {"noise": FloorNoise(np.full((1, *SHAPE), 1 / 20.0), 1.0)}


def all_at_once(problem, state):
    """Return residuals, deviance and gradient by reverse differentiation of all from the parameters to the residuals."""
    expected, transpose = jax.vjp(problem.residuals, state)
    return expected, problem.residuals(state, "deviance"), transpose(expected)[0].vector


@pytest.mark.parametrize("kind", ["floor", "poisson"])
def test_the_gradient_is_that_of_the_whole_loss(kind):
    with jax.enable_x64(True):
        scene = make_scene()
        counts = RNG.poisson(20.0, (3, *SHAPE)).astype(float)
        observations = [
            Observation(image, psf=GaussianPSF(1.3), channels=[channel], name=name, **options(kind, image)).match(
                scene.frame
            )
            for name, channel, image in zip("abc", CHANNELS, counts, strict=True)
        ]
        problem, state, _ = posterior.build(scene, observations, make_parameters(scene, observations, kind))
        # Off the start, where ellipticities and ranges bend.
        state = State(state.vector + as_floats(0.05 * RNG.normal(size=state.vector.shape)), state.images)
        slopes = compiled(lambda p, s: slopes_of_stamps(*untied(p, s)))(problem, state)
        residuals, deviance, gradient = compiled(residuals_and_gradient)(problem, state, slopes)
        expected, other, slope = compiled(all_at_once)(problem, state)
        pairs = [(residuals, expected), (deviance, other)]
    for found, wanted in pairs:
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9 * np.abs(b).max())
    free = np.asarray(problem.free.vector)
    assert (np.asarray(slope)[free] != 0).sum() > 40
    np.testing.assert_allclose(gradient, slope, atol=1e-9 * np.abs(slope).max())
