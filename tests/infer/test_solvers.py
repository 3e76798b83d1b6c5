"""The solver against dense linear algebra, where the model is linear in what is free."""

import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.optimize

from scenefit.infer.fit import fit
from scenefit.model.morphology import PixelMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.catalog import catalog
from tests.blends import (
    CHANNELS,
    COARSE_PSF,
    COARSE_ROTATION,
    COARSE_SCALE,
    COARSE_SHAPE,
    FINE_PSF,
    FINE_SCALE,
    FINE_SHAPE,
    GALAXIES,
    Galaxy,
    draw,
    frame_of,
    gaussian_density,
    observe,
    true_scene,
)
from tests.helpers import make_observation

SETTINGS = {
    "fine": (FINE_SHAPE, FINE_SCALE, FINE_PSF),
    "coarse": (COARSE_SHAPE, COARSE_SCALE, COARSE_PSF, COARSE_ROTATION),
}
# Galaxy c takes light away in g and r: its best flux is at the bound.
DARK = GALAXIES | {"c": Galaxy((0.72, 0.83), 0.24, (0.05, -0.25), {"v": 400.0, "g": -300.0, "r": -30.0})}


def dense_problem(observations, frame):
    """Return, for every channel, images of unit flux of all galaxies (columns) and the data, in units of the noise."""
    result = {}
    for obs in observations:
        matched = obs.match(frame)
        window = (slice(None), *matched.renderer.window.slices)
        for plane, channel in enumerate(CHANNELS[obs.name]):
            unit = [Galaxy(g.position, g.half_light_radius, g.ellipticity, {channel: 1.0}) for g in GALAXIES.values()]
            columns = [draw(g, channel, *SETTINGS[obs.name])[window[1:]][matched.renderer.inside] for g in unit]
            result[channel] = np.stack(columns, axis=-1), obs.data[window][plane][matched.renderer.inside]
    return result


def fluxes_only(scene, observations, mean, sigma):
    """Free the fluxes, each with a normal prior."""
    parameters = Parameters.default(scene, observations).fix("sources.*.center").fix("sources.*.morphology")
    for name in scene.sources:
        parameters = parameters.prior(f"sources.{name}.spectrum.flux", dist.Normal(mean[name], sigma[name]))
    return parameters


def fitted_fluxes(result):
    """Return fluxes, shape (source, channel)."""
    return np.array([source.spectrum.flux for source in result.scene.sources.values()])


@pytest.mark.parametrize("galaxies", [GALAXIES, DARK], ids=["inside", "at the bound"])
def test_fluxes_are_those_of_non_negative_least_squares(galaxies):
    """With priors so broad that they say nothing."""
    observations = observe(galaxies, seed=3)
    frame = frame_of(observations)
    scene = true_scene(frame)
    parameters = fluxes_only(scene, observations, dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 1e7))
    result = fit(scene, observations, parameters, progress=False, rtol=1e-3)
    assert result.is_converged
    expected, errors = np.zeros((3, 3)), np.zeros((3, 3))
    for channel, (columns, data) in dense_problem(observations, frame).items():
        number = frame.channels.index(channel)
        expected[:, number] = scipy.optimize.nnls(columns, data)[0]
        errors[:, number] = np.sqrt(np.diag(np.linalg.inv(columns.T @ columns)))
    # 1e-2 standard errors: the tolerance of 1e-3, and rounding in float32 of the images.
    assert (np.abs(fitted_fluxes(result) - expected) < 1e-2 * errors).all()
    if galaxies is DARK:
        assert (expected == 0).any()
        np.testing.assert_array_equal(fitted_fluxes(result)[expected == 0], 0)
    else:
        table = catalog(result, model_error=False)
        measured = np.array([table[f"flux_err_{c}"].value for c in frame.channels]).T
        # 1e-3: derivative images are cut at 1e-5 of their peak.
        np.testing.assert_allclose(measured, errors, rtol=1e-3)


def test_normal_priors_pull_as_the_analytic_posterior_says():
    observations = observe(seed=3)
    frame = frame_of(observations)
    scene = true_scene(frame)
    mean, sigma = {"a": 700.0, "b": 600.0, "c": 500.0}, {"a": 20.0, "b": 5.0, "c": 300.0}
    parameters = fluxes_only(scene, observations, mean, sigma)
    result = fit(scene, observations, parameters, progress=False, rtol=1e-3)
    assert result.is_converged
    table = catalog(result, model_error=False)
    for channel, (columns, data) in dense_problem(observations, frame).items():
        precision = np.diag([1 / s**2 for s in sigma.values()])
        covariance = np.linalg.inv(columns.T @ columns + precision)
        expected = covariance @ (columns.T @ data + precision @ list(mean.values()))
        errors = np.sqrt(np.diag(covariance))
        number = frame.channels.index(channel)
        # 1e-2 standard errors and 1e-3: as without priors.
        assert (np.abs(fitted_fluxes(result)[:, number] - expected) < 1e-2 * errors).all()
        np.testing.assert_allclose(table[f"flux_err_{channel}"].value, errors, rtol=1e-3)


def test_pixels_are_those_of_bounded_least_squares():
    """One image of 7 x 7 free pixels of unit sum in two observations of a channel, as 49 unknowns of a dense problem."""
    shape, side, center = (18, 18), 7, (8, 9)
    frame = Frame(shape, channels=("g",), padding=10)
    rng = np.random.default_rng(4)
    offsets = np.mgrid[-3:4, -3:4]
    envelope = gaussian_density(*offsets, 2.0 * np.eye(2))
    truth = np.where(rng.random((side, side)) < 0.6, envelope * rng.uniform(0.2, 3, (side, side)), 0.0)
    observations = [
        make_observation(shape, data=np.zeros((1, *shape)), psf=GaussianPSF(s), wcs=None, name=n).match(frame)
        for n, s in (("sharp", 1.1), ("blurred", 2.0))
    ]
    flux = 400.0
    columns = []
    for pixel in np.ndindex(side, side):
        image = np.zeros((1, *shape))
        image[0, center[0] - 3 + pixel[0], center[1] - 3 + pixel[1]] = flux
        columns.append(np.concatenate([obs.render(image).ravel() for obs in observations]))
    design = np.array(columns).T
    data = design @ (truth / truth.sum()).ravel() + rng.normal(size=len(design))
    observed = [
        make_observation(shape, data=plane.reshape(1, *shape), psf=obs.psf, wcs=None, name=obs.name)
        for plane, obs in zip(np.split(data, 2), observations, strict=True)
    ]
    scene = Scene(frame, {"a": Source(center, [flux], PixelMorphology(envelope, envelope=envelope))})
    parameters = Parameters.default(scene, observed).fix("sources.a.spectrum.flux")
    result = fit(scene, observed, parameters, progress=False, rtol=1e-3, max_steps=400)
    prior = parameters["sources.a.morphology.image"].prior
    loc, scale = np.asarray(prior.loc, float).ravel(), np.asarray(prior.scale, float).ravel()
    # Unit sum: an equation that counts 1e6 times as much as a pixel of data.
    unit = 1e6 * np.ones((1, side**2))
    rows = np.concatenate([design, np.diag(1 / scale), unit])
    solution = scipy.optimize.lsq_linear(
        rows, np.concatenate([data, loc / scale, [1e6]]), bounds=(0, np.inf), tol=1e-14
    )
    assert result.is_converged
    # Half the squared distance of 1e-3 for 49 pixels is 2e-5; sums of 648 residuals in float32 are off by 1e-3.
    assert result.loss == pytest.approx(solution.cost, abs=5e-3)
    source = result.scene.sources["a"]
    pixels = (source.morphology.image * source.spectrum.flux[0] / flux).ravel()
    sigma = np.sqrt(np.diag(np.linalg.inv(rows.T @ rows)))
    # A tenth of a standard deviation: the cost is flat to second order, sqrt(2 * 5e-3).
    assert (np.abs(pixels - solution.x) < 0.1 * sigma).all()
    assert (solution.x < 1e-6).sum() > 3
    assert (pixels >= 0).all()
