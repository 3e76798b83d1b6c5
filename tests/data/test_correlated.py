import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from scenefit.arrays import vecchia
from scenefit.arrays.vecchia import DenseWhitening, SparseWhitening
from scenefit.data.correlated import LARGEST_LAG, CorrelatedNoise
from scenefit.data.correlation import PropagatedCorrelation, StationaryCorrelation
from scenefit.data.noise import WhiteNoise
from tests.correlations import (
    CORRELATIONS,
    KERNELS,
    autocorrelation,
    covariance_of,
    gaussian_kernel,
    gaussian_noise,
    holes,
    matrix_of,
    propagated,
)

SMALL, LARGE = (24, 24), (36, 33)
"""Whitened exactly, and from near pixels."""


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def varying_weights(valid):
    """Return weights that vary by 4 over the image, and from pixel to pixel, shape (channel, y, x)."""
    y, x = np.indices(valid.shape[1:])
    trend = 4.0 ** (0.8 * x / valid.shape[2]) * (1 + 0.15 * (-1.0) ** (x + y))
    return np.where(valid, np.array([0.3, 5.0])[: len(valid), None, None] * trend, 0.0)


def dense_covariance(function, weights):
    """Return the covariance of the valid pixels of one channel."""
    valid = (weights > 0).ravel()
    sigma = 1 / np.sqrt(weights.ravel()[valid])
    return covariance_of(function, weights.shape)[np.ix_(valid, valid)] * sigma * sigma[:, None]


def dense_log_likelihood(covariance, residual):
    """Return the log-density of a Gaussian distribution."""
    logarithm = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return -0.5 * (logarithm + residual @ np.linalg.solve(covariance, residual))


def to_jax(image):
    return jnp.asarray(image, jnp.result_type(float))


# ---- the likelihood


@pytest.mark.parametrize(("fraction", "x64"), [(0.0, True), (0.05, True), (0.2, True), (0.2, False)])
@pytest.mark.parametrize("name", ["white", "hat", "shift", "drizzled"])
def test_the_likelihood_is_the_dense_gaussian(name, fraction, x64):
    function, valid = CORRELATIONS[name], holes(SMALL, fraction)
    weights = varying_weights(valid[None])
    residual = gaussian_noise(KERNELS.get(name, KERNELS["gaussian"]), SMALL, np.random.default_rng(1))
    # What is masked counts for nothing, however large it is.
    residual = np.where(valid, residual / np.sqrt(np.where(valid, weights[0], 1)), 1e3)
    expected = dense_log_likelihood(dense_covariance(function, weights[0]), residual[valid])
    with jax.enable_x64(x64):
        noise = CorrelatedNoise(weights, function)
        assert isinstance(noise.whitening, DenseWhitening)
        found = float(noise.log_likelihood(to_jax(residual[None])))
        np.testing.assert_array_equal(noise.num_modes(), [valid.sum()])
    # 1e-6 in double precision. In single, values and coefficients are rounded by 6e-8, in rows whose norm is up to 1500 for the
    # power that vanishes: a whitened value by 1e-4, the likelihood, a sum of 500 squares of them, by 1e-4 of itself.
    assert found == pytest.approx(expected, rel=1e-6 if x64 else 1e-4)


def test_channels_are_independent(double):
    """Of different correlation, mask and weights."""
    functions = np.stack([CORRELATIONS["drizzled"], np.pad(CORRELATIONS["shift"], 1)])
    valid = np.stack([holes(SMALL, 0.2), holes(SMALL, 0.05, seed=4)])
    weights = varying_weights(valid)
    residual = np.random.default_rng(0).normal(size=(2, *SMALL))
    noise = CorrelatedNoise(weights, functions)
    covariances = [dense_covariance(*each) for each in zip(functions, weights, strict=True)]
    expected = sum(
        dense_log_likelihood(covariance, plane[inside])
        for covariance, plane, inside in zip(covariances, residual, valid, strict=True)
    )
    # 1e-6: rounding, times the condition number.
    assert float(noise.log_likelihood(to_jax(residual))) == pytest.approx(expected, rel=1e-6)
    chi_square = [
        plane[inside] @ np.linalg.solve(covariance, plane[inside])
        for covariance, plane, inside in zip(covariances, residual, valid, strict=True)
    ]
    np.testing.assert_allclose(noise.chi_square(to_jax(residual)), chi_square, rtol=1e-6)
    # One correlation serves any number of channels.
    shared = CorrelatedNoise(weights, functions[0])
    second = dense_log_likelihood(dense_covariance(functions[0], weights[1]), residual[1][valid[1]])
    first = dense_log_likelihood(covariances[0], residual[0][valid[0]])
    assert float(shared.log_likelihood(to_jax(residual))) == pytest.approx(first + second, rel=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_the_likelihood_of_sums_of_independent_numbers(double, fraction):
    """More numbers than pixels: none of these says nothing new."""
    shape = (16, 15)
    correlation, maps = propagated(shape, 0.6, num_channels=2)
    valid = np.stack([holes(shape, fraction), holes(shape, 0.05)])
    weights = varying_weights(valid)
    residual = np.random.default_rng(0).normal(size=(2, *shape))
    noise = CorrelatedNoise(weights, correlation)
    expected = 0.0
    for channel in range(2):
        inside = valid[channel].ravel()
        sigma = 1 / np.sqrt(weights[channel].ravel()[inside])
        covariance = (maps[channel] @ maps[channel].T)[np.ix_(inside, inside)] * sigma * sigma[:, None]
        expected += dense_log_likelihood(covariance, residual[channel].ravel()[inside])
    np.testing.assert_array_equal(noise.num_modes(), valid.sum(axis=(1, 2)))
    # 1e-6: rounding, times the condition number.
    assert float(noise.log_likelihood(to_jax(residual))) == pytest.approx(expected, rel=1e-6)


def test_uncorrelated_noise_is_white(eps):
    weights = varying_weights(np.stack([holes(SMALL, 0.1), holes(SMALL, 0.2)]))
    residual = to_jax(np.random.default_rng(0).normal(size=(2, *SMALL)))
    noise, white = CorrelatedNoise(weights, np.ones((1, 1))), WhiteNoise(weights)
    # 10 eps: rounding of a sum with zeros.
    np.testing.assert_allclose(noise.whiten(residual), white.whiten(residual), rtol=10 * eps, atol=10 * eps)
    assert noise.log_normalization() == pytest.approx(white.log_normalization(), rel=1e-7)
    np.testing.assert_array_equal(noise.num_modes(), white.num_modes())
    np.testing.assert_array_equal(noise.stiffness, np.ones((1, 1, 1)))


def test_large_images_are_whitened_nearly_exactly(double):
    """The likelihood of noise that has the covariance, against that of the dense Gaussian."""
    function, valid = CORRELATIONS["drizzled"], holes(LARGE, 0.1)
    weights = varying_weights(valid[None])
    noise = CorrelatedNoise(weights, function)
    assert isinstance(noise.whitening, SparseWhitening)
    covariance = dense_covariance(function, weights[0])
    factor = np.linalg.cholesky(covariance)
    independent = np.random.default_rng(0).normal(size=(40, valid.sum()))
    images = np.zeros((40, 1, *LARGE))
    images[:, 0, valid] = independent @ factor.T
    chi_square = np.array(jax.vmap(noise.chi_square)(to_jax(images))[:, 0])
    found = noise.log_normalization() - 0.5 * chi_square
    peak = -np.log(np.diag(factor)).sum() - 0.5 * valid.sum() * np.log(2 * np.pi)
    expected = peak - 0.5 * (independent**2).sum(axis=1)
    # Per pixel, the mean is the divergence: below 3e-3 (see the tests of the whitening). 2e-3: the scatter of the mean of 40
    # draws, of which each has 1100 pixels with half a whitened value's variance times the correlation that is left, 0.1.
    assert (expected - found).mean() / valid.sum() == pytest.approx(1.5e-3, abs=2e-3)
    # Chi-square has the right mean; its standard deviation is sqrt(2 n) for independent values, more by little. 4 standard
    # errors.
    assert chi_square.mean() == pytest.approx(valid.sum(), abs=4 * 1.1 * np.sqrt(2 * valid.sum() / 40))


def test_masked_pixels_neither_count_nor_pull():
    weights = varying_weights(np.stack([holes(LARGE, 0.2), holes(LARGE, 0.05)]))
    noise = CorrelatedNoise(weights, CORRELATIONS["drizzled"]).on_device()
    residual = np.random.default_rng(0).normal(size=weights.shape)

    @jax.jit
    def loss_and_gradient(residual):
        return jax.value_and_grad(lambda r: 0.5 * jnp.sum(noise.deviance_residual(r) ** 2))(residual)

    value, gradient = loss_and_gradient(to_jax(residual))
    other, pull = loss_and_gradient(to_jax(np.where(weights > 0, residual, 1e6)))
    assert float(value) == float(other)
    np.testing.assert_array_equal(gradient, pull)
    assert (np.asarray(gradient)[weights == 0] == 0).all()
    assert (np.asarray(gradient)[weights > 0] != 0).all()


def test_all_residuals_are_the_whitened_one():
    noise = CorrelatedNoise(varying_weights(np.ones((2, *SMALL), bool)), CORRELATIONS["hat"])
    residual = to_jax(np.random.default_rng(0).normal(size=(2, *SMALL)))
    assert noise.is_gaussian
    for other in (noise.deviance_residual, noise.score_residual, noise.fisher_residual):
        np.testing.assert_array_equal(other(residual), noise.whiten(residual))
    assert float(jnp.sum(noise.log_spread())) == 0


# ---- parts, units, draws


@pytest.mark.parametrize("kind", ["window", "mask", "both"])
@pytest.mark.parametrize("propagates", [False, True])
def test_restricted_noise_is_marginalised(double, kind, propagates):
    shape, function = (14, 13), CORRELATIONS["hat"]
    weights = varying_weights(np.stack([holes(shape, 0.1), holes(shape, 0.0)]))
    dense = np.broadcast_to(covariance_of(function, shape), (2, 182, 182))
    correlation = StationaryCorrelation(function)
    if propagates:
        correlation, maps = propagated(shape, 0.6, num_channels=2)
        dense = maps @ np.swapaxes(maps, 1, 2)
    window = (slice(None), slice(None)) if kind == "mask" else (slice(3, 12), slice(2, 13))
    size = np.zeros(shape)[window].shape
    keep = np.ones(size, bool) if kind == "window" else np.random.default_rng(0).random((2, *size)) < 0.7
    noise = CorrelatedNoise(weights, correlation).restricted(keep, window)
    part = weights[(slice(None), *window)] * keep
    np.testing.assert_array_equal(noise.valid, part > 0)
    residual = np.random.default_rng(0).normal(size=part.shape)
    expected = 0.0
    for channel in range(2):
        inside = np.zeros(shape, bool)
        inside[window] = part[channel] > 0
        sigma = 1 / np.sqrt(weights[channel][inside])
        covariance = dense[channel][np.ix_(inside.ravel(), inside.ravel())] * sigma * sigma[:, None]
        expected += dense_log_likelihood(covariance, residual[channel][part[channel] > 0])
    # 1e-6: rounding, times the condition number.
    assert float(noise.log_likelihood(to_jax(residual))) == pytest.approx(expected, rel=1e-6)
    scratch = CorrelatedNoise(part, correlation.window(window))
    np.testing.assert_array_equal(noise.whiten(to_jax(residual)), scratch.whiten(to_jax(residual)))
    assert noise.log_normalization() == scratch.log_normalization()


def test_noise_that_keeps_everything_stays_as_it_is():
    noise = CorrelatedNoise(varying_weights(np.ones((1, *SMALL), bool)), CORRELATIONS["drizzled"])
    assert noise.restricted(np.ones(SMALL, bool), (slice(None), slice(0, 24))) is noise


def test_restricted_large_images_are_those_made_from_scratch():
    weights = varying_weights(holes((40, 45), 0.1)[None])
    window = (slice(2, 38), slice(5, 38))
    keep = holes(LARGE, 0.05, seed=7)
    noise = CorrelatedNoise(weights, CORRELATIONS["drizzled"]).restricted(keep, window)
    scratch = CorrelatedNoise(weights[(slice(None), *window)] * keep, CORRELATIONS["drizzled"])
    assert isinstance(noise.whitening, SparseWhitening)
    for found, expected in zip(jax.tree.leaves(noise), jax.tree.leaves(scratch), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_channel_without_information_counts_for_nothing():
    weights = varying_weights(np.ones((2, *SMALL), bool)) * np.array([1, 0])[:, None, None]
    index = np.arange(576)[:, None]
    nothing = PropagatedCorrelation(index, np.broadcast_to([[[1.0]], [[0.0]]], (2, 576, 1)), SMALL)
    for correlation in (CORRELATIONS["drizzled"], nothing):
        noise = CorrelatedNoise(weights, correlation)
        one = CorrelatedNoise(weights[:1], CORRELATIONS["drizzled"] if correlation is not nothing else np.ones((1, 1)))
        np.testing.assert_array_equal(noise.num_modes(), [576, 0])
        assert noise.level()[1] == 1
        assert noise.log_normalization() == pytest.approx(one.log_normalization(), rel=1e-12)
        assert not np.asarray(noise.whiten(jnp.ones((2, *SMALL))))[1].any()
        assert np.isfinite(noise.stiffness).all()


def test_scaled_noise_is_that_of_data_in_other_units():
    weights = varying_weights(holes(SMALL, 0.1)[None].repeat(2, axis=0))
    noise, unit = CorrelatedNoise(weights, CORRELATIONS["drizzled"]), np.array([2.0, 0.01])
    scaled = noise.scaled(unit)
    residual = np.random.default_rng(0).normal(size=weights.shape)
    # 1e-5: rounding in single precision.
    np.testing.assert_allclose(
        scaled.whiten(to_jax(residual / unit[:, None, None])), noise.whiten(to_jax(residual)), rtol=0, atol=1e-5
    )
    jacobian = (noise.num_modes() * np.log(unit)).sum()
    # 1e-12: sums of 1e3 in double precision.
    assert scaled.log_normalization() == pytest.approx(noise.log_normalization() + jacobian, rel=1e-12)
    np.testing.assert_allclose(scaled.level(), noise.level() / unit, rtol=1e-12)
    np.testing.assert_array_equal(scaled.correlation.function, noise.correlation.function)


def test_level_is_the_typical_sigma():
    weights = varying_weights(holes(SMALL, 0.1)[None].repeat(2, axis=0))
    noise = CorrelatedNoise(weights, CORRELATIONS["drizzled"])
    expected = [1 / np.sqrt(np.median(each[each > 0])) for each in weights]
    np.testing.assert_allclose(noise.level(), expected, rtol=1e-12)


@pytest.mark.parametrize("propagates", [False, True])
def test_drawn_noise_has_the_covariance(key, propagates):
    shape, function = (9, 8), CORRELATIONS["drizzled"]
    correlation, dense = StationaryCorrelation(function), covariance_of(function, shape)
    if propagates:
        correlation, (to_pixels,) = propagated(shape, 1.3)
        dense = to_pixels @ to_pixels.T
    valid = holes(shape, 0.1)
    weights = varying_weights(valid[None])
    noise = CorrelatedNoise(weights, correlation)
    keys = jax.random.split(key, 300)
    draws = np.array([noise.sample(each) for each in keys] if propagates else jax.vmap(noise.sample)(keys), float)[:, 0]
    assert (draws[:, ~valid] == 0).all()
    sigma = 1 / np.sqrt(weights[0][valid])
    expected = dense[np.ix_(valid.ravel(), valid.ravel())]
    scatter = draws[:, valid] / sigma
    # The variance of a product of Gaussian numbers is 1 + rho^2: means of 300, at 1800 pairs, within 4.5 standard errors.
    np.testing.assert_array_less(np.abs(scatter.T @ scatter / 300 - expected), 4.5 * np.sqrt((1 + expected**2) / 300))


def test_drawn_noise_is_worth_its_modes(key):
    """Chi-square of draws from the correlation itself, in an image that is whitened from near pixels."""
    noise = CorrelatedNoise(varying_weights(holes(LARGE, 0.1)[None]), CORRELATIONS["shift"])
    chi_square = np.array(jax.vmap(lambda each: noise.chi_square(noise.sample(each))[0])(jax.random.split(key, 30)))
    # 4 standard errors of the mean; what correlation is left makes chi-square scatter more by 10 per cent.
    assert chi_square.mean() == pytest.approx(
        noise.num_modes()[0], abs=4 * 1.1 * np.sqrt(2 * noise.num_modes()[0] / 30)
    )


def test_modes_are_the_pixels_that_are_whitened(double):
    """Of noise that is smoother than the pixels, every third row and column at most."""
    noise = CorrelatedNoise(np.ones((1, *LARGE)), autocorrelation(gaussian_kernel(3.0, 12)))
    assert noise.whitening.order.step == 3
    np.testing.assert_array_equal(noise.num_modes(), noise.modes.sum(axis=(1, 2)))
    assert 0.8 * 12 * 11 < noise.num_modes()[0] <= 12 * 11
    matrix = matrix_of(noise.whiten, LARGE)
    np.testing.assert_array_equal(np.abs(matrix).max(axis=1).reshape(LARGE) > 0, noise.modes[0])
    # Pixels that are left out have no part in the determinant.
    expected = np.log(np.diag(matrix)[noise.modes.ravel()] ** 2 / (2 * np.pi)).sum() / 2
    assert noise.log_normalization() == pytest.approx(expected, rel=1e-12)


def test_channels_share_an_order_that_does_for_all(double):
    """One is smooth, the other white: neither is decimated, and both have the right mean of chi-square."""
    smooth = autocorrelation(gaussian_kernel(3.0, 12))
    white = np.zeros_like(smooth)
    white[24, 24] = 1
    noise = CorrelatedNoise(np.ones((2, *LARGE)), np.stack([smooth, white]))
    assert noise.whitening.order.step == 1
    assert noise.num_modes()[1] == np.prod(LARGE)
    assert 12 * 11 < noise.num_modes()[0] < 0.3 * np.prod(LARGE)
    coefficients = jax.tree.map(lambda each: each[:1], noise.whitening)
    matrix = matrix_of(coefficients, LARGE)
    whitened = np.einsum("pq,qr,pr->p", matrix, covariance_of(smooth, LARGE), matrix, optimize=True)
    # 1e-8 times squares of up to 1e6.
    np.testing.assert_allclose(whitened[noise.modes[0].ravel()], 1.0, rtol=0, atol=1e-2)


def test_on_the_device_there_is_no_correlation(key):
    noise = CorrelatedNoise(varying_weights(holes(LARGE, 0.1)[None]), CORRELATIONS["drizzled"])
    there = noise.on_device()
    assert noise.host_only == ("correlation", "average")
    assert there.correlation is None
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(there))
    residual = to_jax(np.random.default_rng(0).normal(size=(1, *LARGE)))
    # 1e-5: weights rounded to single precision before or after their root.
    np.testing.assert_allclose(there.whiten(residual), noise.whiten(residual), rtol=0, atol=1e-5)
    assert there.reach == noise.reach > 0
    with pytest.raises(ValueError, match="stripped of its correlation for the solver: use that of the observation"):
        there.sample(key)
    with pytest.raises(ValueError, match="stripped of its correlation"):
        there.restricted(np.ones((9, 9), bool), (slice(0, 9), slice(0, 9)))


def test_blends_of_one_shape_share_a_program():
    traces = []

    @jax.jit
    def chi_square(noise, residual):
        traces.append(residual.shape)
        return noise.chi_square(residual)

    residual = to_jax(np.random.default_rng(0).normal(size=(1, *LARGE)))
    values = []
    for seed, name in ((1, "drizzled"), (2, "drizzled")):
        noise = CorrelatedNoise(varying_weights(holes(LARGE, 0.1, seed=seed)[None]), CORRELATIONS[name])
        values.append(float(chi_square(noise.on_device(), residual)[0]))
    assert len(traces) == 1
    assert values[0] != values[1]


@pytest.mark.parametrize("name", ["white", "drizzled", "hat", "gaussian"])
def test_stiffness_is_how_much_more_smooth_models_are_whitened(name):
    """Of waves up to a quarter of a cycle per pixel, relative to a constant: the root of a ratio of noise powers."""
    function = CORRELATIONS[name]
    noise = CorrelatedNoise(np.ones((1, *SMALL)), function)
    y, x = np.indices(function.shape) - len(function) // 2
    frequency = np.linspace(-0.25, 0.25, 33)
    power = [(function * np.cos(2 * np.pi * (ky * y + kx * x))).sum() for ky in frequency for kx in frequency]
    expected = np.sqrt(function.sum() / min(power))
    # 1e-3: single precision, and what is trimmed.
    np.testing.assert_allclose(noise.stiffness, np.full((1, 1, 1), max(expected, 1.0)), rtol=1e-3)


def test_noise_without_power_in_constants_is_no_stiffer():
    difference = autocorrelation(np.array([[1.0, -1.0]]))
    np.testing.assert_array_equal(CorrelatedNoise(np.ones((1, *SMALL)), difference).stiffness, np.ones((1, 1, 1)))


@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [
        ((2, 9, 8), 3, "The correlation has 3 channels, the weights 2"),
        ((2, 8, 9), 1, r"The correlation is that of \(9, 8\) pixels, the weights \(8, 9\)"),
        ((2, 9, 9), 2, r"The correlation is that of \(9, 8\) pixels, the weights \(9, 9\)"),
    ],
)
def test_correlations_of_other_images_are_refused(shape, channels, message):
    with pytest.raises(ValueError, match=message):
        CorrelatedNoise(np.ones(shape), propagated((9, 8), 1.0, num_channels=channels)[0])


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_bad_weights_are_refused(value):
    weights = np.ones((1, *SMALL))
    weights[0, 2, 3] = value
    with pytest.raises(ValueError, match=r"finite and >= 0; got 1 .* value\(s\)"):
        CorrelatedNoise(weights, np.ones((1, 1)))


# ---- power spectra


def power_of(function, shape):
    """Return the power spectrum of a correlation function on a torus, by its definition."""
    y, x = np.indices(function.shape)
    y, x = y - function.shape[0] // 2, x - function.shape[1] // 2
    ky, kx = np.fft.fftfreq(shape[0]), np.fft.fftfreq(shape[1])
    waves = [np.cos(2 * np.pi * (ky[:, None, None, None] * y + kx[:, None, None] * x))]
    return (waves[0] * function).sum(axis=(2, 3))


@pytest.mark.parametrize("shape", [(24, 24), (25, 22), (17, 30)])
@pytest.mark.parametrize("name", ["white", "drizzled", "shift"])
def test_power_spectra_and_correlations_say_the_same(name, shape):
    function = CORRELATIONS[name]
    # What the shift by half a pixel leaves without power gets 1 per cent, white.
    power = 3.0 * (power_of(function, shape) + 0.01) / 1.01
    noise = CorrelatedNoise.from_power_spectrum(np.stack([power, 2 * power]))
    expected = function.copy()
    expected[tuple(n // 2 for n in function.shape)] += 0.01
    expected = StationaryCorrelation(expected).function[0]
    # 1e-9: rounding of the transform.
    for found in noise.correlation.function:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(1 / noise.weights, np.broadcast_to([[[3.0]], [[6.0]]], (2, *shape)), rtol=1e-9)


def test_weights_go_before_the_normalisation_of_the_spectrum():
    power = power_of(CORRELATIONS["drizzled"], (20, 21))
    weights = varying_weights(holes((30, 18), 0.1)[None])
    noise = CorrelatedNoise.from_power_spectrum(7 * power, weights=weights)
    np.testing.assert_array_equal(noise.weights, weights)
    np.testing.assert_allclose(noise.correlation.function[0], CORRELATIONS["drizzled"], rtol=0, atol=1e-9)
    assert CorrelatedNoise.from_power_spectrum(7 * power, shape=(30, 18)).weights.shape == (1, 30, 18)


def test_a_row_of_pixels_has_a_spectrum():
    power = power_of(CORRELATIONS["drizzled"][2:3], (1, 40))
    noise = CorrelatedNoise.from_power_spectrum(power)
    np.testing.assert_allclose(noise.correlation.function[0], CORRELATIONS["drizzled"][2:3], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("value", "kind"), [(0.0, "zero"), (-1.0, "negative"), (np.nan, "NaN or infinite"), (np.inf, "NaN or infinite")]
)
def test_impossible_modes_are_refused(value, kind):
    power = np.ones((6, 8))
    power[2, 3] = power[-2, -3] = value
    with pytest.raises(
        ValueError, match=rf"finite, positive variances; 2 of 48 modes are {kind}\. Modes without noise"
    ):
        CorrelatedNoise.from_power_spectrum(power)


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8, 8), (0, 8)])
def test_spectra_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"wants shape \(ky, kx\) or \(channel, ky, kx\); got"):
        CorrelatedNoise.from_power_spectrum(np.ones(shape))


def test_spectra_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="The correlation has 3 channels, the weights 2"):
        CorrelatedNoise.from_power_spectrum(np.ones((3, 8, 8)), weights=np.ones((2, 8, 8)))


def test_asymmetric_spectra_are_refused():
    power = np.ones((6, 8))
    power[2, 3] = 2
    with pytest.raises(ValueError, match="the same at k and -k"):
        CorrelatedNoise.from_power_spectrum(power)


@pytest.mark.parametrize("shape", [(40, 40), (41, 41), (40, 41), (16, 200)])
def test_what_is_correlated_across_the_image_is_a_background(shape):
    ky, kx = np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])
    # A stronger wave along y.
    slow = 1 / (0.1 * kx**2 + ky**2 + 1e-4)
    with pytest.raises(
        ValueError, match=r"correlated by 0\.\d+ between pixels \d+ (rows|columns) apart, half the image"
    ):
        CorrelatedNoise.from_power_spectrum(slow)
    # An image smaller than that of the spectrum, of noise that is correlated over half of it.
    power = power_of(autocorrelation(gaussian_kernel(2.0, 8)), (40, 40)) + 0.01
    CorrelatedNoise.from_power_spectrum(power, shape=(36, 36))
    with pytest.raises(ValueError, match=r"correlated by 0\.\d+ between pixels 3 rows apart"):
        CorrelatedNoise.from_power_spectrum(power, shape=(7, 36))


def test_correlations_are_followed_so_far():
    """An image that is larger than twice the largest lag."""
    shape = (2 * LARGEST_LAG + 12, 16)
    power = power_of(CORRELATIONS["drizzled"], shape)
    noise = CorrelatedNoise.from_power_spectrum(power)
    np.testing.assert_allclose(noise.correlation.function[0], CORRELATIONS["drizzled"], rtol=0, atol=1e-9)


# ---- resamplings of somebody else


def dithered(shape, generator):
    """Return a sparse map from two dithered exposures to an image: bilinear, but for some noise in the shares."""
    height, width = shape
    y, x = (n.ravel() for n in np.indices(shape))
    rows, columns, shares = [], [], []
    for number, (dy, dx) in enumerate(((0.3, 0.6), (0.7, 0.1))):
        for j, i in np.ndindex(2, 2):
            inside = (y + j < height) & (x + i < width)
            rows.append(np.flatnonzero(inside))
            columns.append((number * height * width + (y + j) * width + x + i)[inside])
            shares.append(np.full(inside.sum(), 0.5 * (dy if j else 1 - dy) * (dx if i else 1 - dx)))
    shares = np.concatenate(shares) * generator.uniform(0.8, 1.2, sum(map(len, shares)))
    places = np.concatenate(rows), np.concatenate(columns)
    return scipy.sparse.coo_matrix((shares, places), shape=(height * width, 2 * height * width))


def exposures(shape, generator):
    """Return weights of two channels of two exposures, one as deep as four of the other; some bad pixels."""
    weights = generator.uniform(0.5, 1, (2, 2, *shape)) * np.array([1, 4])[None, :, None, None]
    weights[0, 1, 5, 7:9] = weights[1, 0, 3, 20] = 0
    return weights


@pytest.mark.parametrize("make", ["tocsr", "tocoo"])
def test_the_likelihood_of_a_resampling_is_the_dense_gaussian(double, rng, make):
    resampling, weights = dithered(SMALL, rng), exposures(SMALL, rng)
    # A row without input.
    resampling = resampling.tolil()
    resampling[100] = 0
    noise = CorrelatedNoise.propagated(getattr(resampling, make)(), weights, SMALL)
    dense, flat = resampling.toarray(), weights.reshape(2, -1)
    residual = rng.normal(size=(2, *SMALL))
    expected = 0.0
    for channel in range(2):
        inside = ((dense != 0) @ (flat[channel] == 0) == 0) & (dense != 0).any(axis=1)
        assert 4 <= (~inside).sum() <= 10
        assert not inside[100]
        np.testing.assert_array_equal(noise.valid[channel].ravel(), inside)
        variance = (dense**2 / np.where(flat[channel] > 0, flat[channel], np.inf)).sum(axis=1)
        # 1e-12: rounding.
        np.testing.assert_allclose(1 / noise.weights[channel].ravel()[inside], variance[inside], rtol=1e-12)
        # In a corner, a pixel of one share follows from those beside it.
        inside &= noise.modes[channel].ravel()
        assert inside.sum() >= noise.valid[channel].sum() - 1
        # Of input without information no pixel inside has a share.
        shares = dense[inside] / np.sqrt(np.where(flat[channel] > 0, flat[channel], 1.0))
        covariance = shares @ shares.T
        expected += dense_log_likelihood(covariance, residual[channel].ravel()[inside])
    # 1e-6: rounding, times the condition number.
    assert float(noise.log_likelihood(to_jax(residual))) == pytest.approx(expected, rel=1e-6)


def test_chi_square_of_resampled_noise_has_the_mean_of_its_modes(rng):
    """Of an image that is whitened from near pixels, and of one with four pixels to an independent number."""
    finer = np.kron(np.eye(18), [[1.0], [0.5]]) + np.kron(np.eye(18), [[0.0], [0.5]])[:, np.r_[17, :17]]
    smooth = scipy.sparse.kron(scipy.sparse.csr_matrix(finer), scipy.sparse.csr_matrix(finer))
    for resampling, shape, most in ((dithered(LARGE, rng), LARGE, 36 * 33), (smooth, (36, 36), 18 * 18)):
        weights = rng.uniform(0.5, 2, (1, resampling.shape[1]))
        noise = CorrelatedNoise.propagated(resampling, weights, shape)
        assert isinstance(noise.whitening, SparseWhitening)
        (modes,) = noise.num_modes()
        assert 0.9 * most < modes <= most
        draws = resampling @ (rng.normal(size=(60, weights.size)) / np.sqrt(weights)).T
        images = to_jax(draws.T.reshape(60, 1, *shape))
        chi_square = np.asarray(jax.vmap(noise.chi_square)(images), float)
        # 4 standard errors of the mean; what correlation is left adds up to 15 per cent to the scatter.
        assert chi_square.mean() == pytest.approx(modes, abs=4 * 1.15 * np.sqrt(2 * modes / 60))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, w: (a.toarray(), w), TypeError, "wants to be a sparse matrix of scipy, .*; got a ndarray"),
        (
            lambda a, w: (a[:-1], w),
            ValueError,
            r"a row for each pixel .*, y \* x of shape \(24, 24\); got \(575, 1152\)",
        ),
        (
            lambda a, w: (a, w[:, :1]),
            ValueError,
            r"weights of the input want shape \(channel, 1152\).*; got \(2, 1, 24, 24\)",
        ),
        (lambda a, w: (a, w.ravel()), ValueError, r"want shape \(channel, 1152\).*; got \(2304,\)"),
        (lambda a, w: (a * np.nan, w), ValueError, r"wants finite shares of the input; \d+ are NaN or infinite"),
        (lambda a, w: (a, -w), ValueError, r"finite and >= 0; got \d+ negative"),
        (lambda a, w: (a, w * np.nan), ValueError, r"finite and >= 0; got \d+ NaN"),
        (lambda a, w: (a, 0 * w), ValueError, "No pixel of the result is made of input with information alone"),
        (lambda a, w: (0 * a, w), ValueError, "No pixel of the result is made of input with information alone"),
    ],
)
def test_resamplings_of_other_images_are_refused(rng, change, error, message):
    resampling, weights = change(dithered(SMALL, rng).tocsr(), exposures(SMALL, rng))
    with pytest.raises(error, match=message):
        CorrelatedNoise.propagated(resampling, weights, SMALL)


def test_a_slow_whitening_shows_a_bar_unless_silenced(capsys, monkeypatch):
    monkeypatch.setattr(vecchia, "DELAY_SECONDS", 0.0)
    weights = varying_weights(holes(LARGE, 0.2)[None])
    keep = holes(LARGE, 0.1, seed=5)
    for progress in (True, False):
        noise = CorrelatedNoise(weights, CORRELATIONS["drizzled"], progress=progress)
        assert ("whitening" in capsys.readouterr().err) == progress
        noise.restricted(keep, (slice(None), slice(None)))
        assert ("whitening" in capsys.readouterr().err) == progress
