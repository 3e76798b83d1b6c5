"""Fits with correlated noise: errors against dense linear algebra, and scatter over draws of the noise."""

import jax
import numpy as np
import pytest

import scenefit as sf
from scenefit.arrays.compilation import compiled
from scenefit.infer import posterior
from scenefit.infer.dense import dense_footprints
from scenefit.infer.information import information

CORRELATION = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 36


def observation(data, noise):
    return sf.Observation(data, noise=noise, psf=sf.GaussianPSF(1.5), channels=["i"], name="camera")


def scene(frame, fluxes=(900.0, 700.0)):
    middle = (np.array(frame.shape[1:]) - 1) / 2
    return sf.Scene(
        frame,
        {
            "galaxy": sf.Source(middle - 3.3, sf.ArraySpectrum([fluxes[0]]), sf.GaussianMorphology(2.5)),
            "star": sf.Source(middle + 2.6, sf.ArraySpectrum([fluxes[1]]), sf.PointMorphology()),
        },
    )


def dense_covariance(function, shape):
    y, x = (each.ravel() for each in np.mgrid[: shape[0], : shape[1]])
    reach = len(function) // 2
    dy, dx = y[:, None] - y, x[:, None] - x
    near = (np.abs(dy) <= reach) & (np.abs(dx) <= reach)
    return np.where(near, function[np.where(near, dy, 0) + reach, np.where(near, dx, 0) + reach], 0.0)


@pytest.mark.parametrize("size", [24, 44])
def test_errors_of_fluxes_are_those_of_the_dense_covariance(size):
    """Fluxes free alone: with m the images of unit flux, the covariance is the inverse of m^T C^-1 m."""
    noise = sf.CorrelatedNoise(np.ones((1, size, size)), CORRELATION)
    blank = observation(np.zeros((1, size, size)), noise)
    frame = sf.Frame.from_observations([blank])
    blank = blank.match(frame)
    images = np.stack([blank.render(scene(frame, f)).ravel() for f in ((1.0, 0.0), (0.0, 1.0))])
    covariance = dense_covariance(CORRELATION, (size, size))
    expected = np.sqrt(np.diag(np.linalg.inv(images @ np.linalg.solve(covariance, images.T))))
    obs = observation(blank.render(scene(frame)), noise)
    parameters = sf.Parameters.default(scene(frame), [obs]).fix("sources.*.center").fix("sources.*.morphology.*")
    table = sf.catalog(sf.fit(scene(frame), obs, parameters, progress=False), model_error=False, progress=False)
    # Up to 1024 pixels the whitening is exact: 1e-3 is the iteration's and single precision's. Beyond, for this noise whose
    # power vanishes at the highest frequency, stated errors are up to a tenth too small for a star, less for galaxies.
    tolerance = 1e-3 if size == 24 else 0.1
    np.testing.assert_allclose(table["flux_err_i"], expected, rtol=tolerance)


def test_fluxes_scatter_as_their_errors_say():
    size, fluxes = 44, np.array([900.0, 700.0])
    noise = sf.CorrelatedNoise(np.ones((1, size, size)), CORRELATION)
    blank = observation(np.zeros((1, size, size)), noise)
    frame = sf.Frame.from_observations([blank])
    clean = blank.match(frame).render(scene(frame))
    pulls = {"correlated": [], "white": []}
    for number in range(40):
        data = clean + np.asarray(noise.sample(jax.random.key(number)), float)
        for kind, own in (("correlated", noise), ("white", sf.WhiteNoise(np.ones((1, size, size))))):
            result = sf.fit(scene(frame), observation(data, own), progress=False)
            assert result.is_converged
            table = sf.catalog(result, model_error=False, progress=False)
            pulls[kind].append((table["flux_i"] - fluxes) / table["flux_err_i"])
    # 80 numbers: a width is known to 0.08.
    assert np.std(pulls["correlated"]) == pytest.approx(1, abs=0.25)
    assert np.abs(np.mean(pulls["correlated"])) < 4 / np.sqrt(80)
    assert np.std(pulls["white"]) > 1.7


def test_free_images_converge():
    """Galaxies of free pixels, whose curvature must be bounded for correlated noise, too."""
    size = 44
    noise = sf.CorrelatedNoise(np.ones((1, size, size)), CORRELATION)
    blank = observation(np.zeros((1, size, size)), noise)
    frame = sf.Frame.from_observations([blank])
    data = blank.match(frame).render(scene(frame)) + np.asarray(noise.sample(jax.random.key(7)), float)
    obs = observation(data, noise)
    middle = (np.array(frame.shape[1:]) - 1) / 2
    start = sf.initialize(frame, obs, np.stack([middle - 3.3, middle + 2.6]), model="pixel", progress=False)
    result = sf.fit(start, obs, progress=False)
    assert result.is_converged
    # The residual is noise: chi-square within 6 standard deviations of the modes, less some for what is fitted.
    modes = noise.num_modes()[0]
    chi_square = result.observations[0].chi_square(result.scene)[0]
    assert -12 * np.sqrt(2 * modes) < chi_square - modes < 6 * np.sqrt(2 * modes)


@pytest.mark.parametrize("correlated", [False, True])
def test_a_scale_of_the_noise_is_fitted(correlated):
    """The most likely one is the root of chi-square per pixel; its error is 1 / sqrt(2 n) of it."""
    size = 44
    weights = np.ones((1, size, size))
    noise = sf.CorrelatedNoise(weights, CORRELATION) if correlated else sf.WhiteNoise(weights)
    blank = observation(np.zeros((1, size, size)), noise)
    frame = sf.Frame.from_observations([blank])
    data = blank.match(frame).render(scene(frame)) + 1.6 * np.asarray(noise.sample(jax.random.key(3)), float)
    obs = observation(data, noise)
    parameters = sf.Parameters.default(scene(frame), [obs]).free("observations.camera.noise.scale")
    result = sf.fit(scene(frame), obs, parameters, progress=False)
    assert result.is_converged
    (fitted,) = result.observations
    expected = np.sqrt(obs.match(frame).chi_square(result.scene)[0] / noise.num_modes()[0])
    # The fit stops within 0.02 standard errors, of 1.6 per cent.
    assert fitted.noise.scale[0] == pytest.approx(expected, rel=1e-3)
    assert fitted.chi_square(result.scene)[0] == pytest.approx(noise.num_modes()[0], rel=2e-3)
    error = sf.parameter_errors(result)["observations.camera.noise.scale"]
    np.testing.assert_allclose(error, expected / np.sqrt(2 * noise.num_modes()), rtol=0.02)
    assert result.loss == pytest.approx(noise.log_normalization() - fitted.log_likelihood(result.scene), rel=1e-5)


def test_curvatures_for_steps_are_nearly_exact():
    """Steps take the noise as the same everywhere, whitened by the transfer function: edges and masks make little difference."""
    size = 48
    weights = np.ones((1, size, size))
    weights[0, :, 30] = 0.0
    noise = sf.CorrelatedNoise(weights, CORRELATION)
    blank = observation(np.zeros((1, size, size)), noise)
    frame = sf.Frame.from_observations([blank])
    start = scene(frame)
    data = blank.match(frame).render(start) + np.asarray(noise.sample(jax.random.key(5)), float)
    obs = observation(data, noise).match(frame)
    parameters = sf.Parameters.default(start, [obs])
    for name in ("background", "noise.scale", "calibration.psf_variance"):
        parameters = parameters.free(f"observations.camera.{name}")
    problem, state, layout = posterior.build(start, [obs], parameters)
    exact, quick = (
        np.asarray(compiled(information)(problem, state, dense_footprints(problem, layout, start, [obs], quick=each)))
        for each in (False, True)
    )
    scale = 1 / np.sqrt(np.diag(exact))
    ratio = np.linalg.eigvals(np.linalg.solve(exact * scale[:, None] * scale, quick * scale[:, None] * scale)).real
    # A star's cusp is whitened less well by near pixels than by all; a bad column takes up to a tenth of the information.
    assert ratio.min() > 0.7
    assert ratio.max() < 1.4
