import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from scenefit.data.noise import AbstractNoise, WhiteNoise
from tests.helpers import final_classes

SHAPE = (2, 4, 5)


def white_example():
    """Weights over four decades, pixels without information in both channels."""
    weights = 10 ** np.random.default_rng(1).uniform(-2, 2, SHAPE)
    weights[0, 1, 2] = weights[1, :, 3] = 0
    valid = weights > 0
    return WhiteNoise(weights), valid, np.diag(1 / weights[valid])


# name: noise, valid pixels, covariance of the valid pixels as a dense matrix (C order)
EXAMPLES = {"white": white_example()}


@pytest.fixture(params=EXAMPLES)
def example(request):
    return EXAMPLES[request.param]


@pytest.fixture
def residual(rng):
    return rng.normal(size=SHAPE)


def to_jax(residual):
    return jnp.asarray(residual, jnp.result_type(float))


def test_every_noise_has_an_example():
    assert final_classes(AbstractNoise) == {type(noise) for noise, *_ in EXAMPLES.values()}


def test_valid_pixels(example):
    noise, valid, _ = example
    np.testing.assert_array_equal(noise.valid, valid)


def test_whitening_gives_the_dense_chi_square(example, residual, eps):
    noise, valid, covariance = example
    whitened = np.asarray(noise.whiten(to_jax(residual)))
    assert (whitened[~valid] == 0).all()
    expected = residual[valid] @ np.linalg.solve(covariance, residual[valid])
    # 50 eps: a sum of 35 squares.
    assert (whitened**2).sum() == pytest.approx(expected, rel=50 * eps)
    assert float(noise.chi_square(to_jax(residual)).sum()) == pytest.approx(expected, rel=50 * eps)


def test_whitening_is_linear(example, residual, eps):
    noise, *_ = example
    first, second = to_jax(residual), to_jax(residual[::-1])
    combined = noise.whiten(2 * first - second)
    # 20 eps of the largest value, 10 x 3: rounding of three operations.
    np.testing.assert_allclose(combined, 2 * noise.whiten(first) - noise.whiten(second), atol=20 * eps * 30)


def test_chi_square_is_per_channel(example, residual):
    noise, *_ = example
    changed = residual.copy()
    changed[1] *= 2
    before, after = (np.asarray(noise.chi_square(to_jax(r))) for r in (residual, changed))
    assert before.shape == (SHAPE[0],)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_log_likelihood_is_the_dense_gaussian(example, residual, eps):
    noise, valid, covariance = example
    expected = scipy.stats.multivariate_normal(np.zeros(valid.sum()), covariance).logpdf(residual[valid])
    # 50 eps of the chi-square, the larger part: a sum of 35 squares.
    scale = float(noise.chi_square(to_jax(residual)).sum())
    assert float(noise.log_likelihood(to_jax(residual))) == pytest.approx(expected, abs=50 * eps * scale)
    assert noise.log_normalization() == pytest.approx(float(noise.log_likelihood(jnp.zeros(SHAPE))), rel=1e-6)


def test_log_likelihood_is_the_same_jitted(example, residual, eps):
    noise, *_ = example
    # 50 eps: sums in another order.
    assert float(jax.jit(lambda r: noise.log_likelihood(r))(to_jax(residual))) == pytest.approx(
        float(noise.log_likelihood(to_jax(residual))), rel=50 * eps
    )


def test_samples_have_the_covariance(example, key):
    noise, valid, covariance = example
    count = 4000
    draws = np.asarray(jax.vmap(noise.sample)(jax.random.split(key, count)))
    assert (draws[:, ~valid] == 0).all()
    sigma = np.sqrt(np.diag(covariance))
    pulls = draws[:, valid] / sigma
    # Mean and covariance of unit-variance draws scatter by 1 / sqrt(count), 5 sigma of it; squares by sqrt(2) more.
    np.testing.assert_allclose(pulls.mean(axis=0), 0, atol=5 / np.sqrt(count))
    correlation = covariance / np.outer(sigma, sigma)
    np.testing.assert_allclose(pulls.T @ pulls / count, correlation, atol=5 * np.sqrt(2 / count))


def test_samples_are_whitened_to_unit_variance(example, key):
    noise, valid, _ = example
    draws = jax.vmap(lambda k: noise.whiten(noise.sample(k)))(jax.random.split(key, 2000))
    values = np.asarray(draws)[:, valid].ravel()
    # 1e-3: the Kolmogorov-Smirnov probability of 70 000 draws with this key under a standard normal.
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-3


def test_scaled_noise_is_that_of_the_scaled_data(example, residual, eps):
    noise, *_ = example
    unit = np.array([3.0, 1e-5])
    scaled = noise.scaled(unit)
    # 5 eps: rounding of the scaled weights and residuals.
    np.testing.assert_allclose(
        scaled.whiten(to_jax(residual / unit[:, None, None])), noise.whiten(to_jax(residual)), rtol=5 * eps
    )
    per_channel = noise.valid.sum(axis=(1, 2))
    # The density changes by the Jacobian; 1e-9: rounding in float64.
    change = scaled.log_normalization() - noise.log_normalization()
    assert change == pytest.approx((per_channel * np.log(unit)).sum(), rel=1e-9)


def test_restricted_noise_forgets_the_rest(example, residual, eps):
    noise, valid, _ = example
    keep = np.random.default_rng(3).random((3, 3)) < 0.7
    window = (slice(1, 4), slice(0, 3))
    restricted = noise.restricted(keep, window)
    np.testing.assert_array_equal(restricted.valid, valid[:, 1:4, :3] & keep)
    expected = np.asarray(noise.whiten(to_jax(residual)))[:, 1:4, :3] * keep
    # 5 eps: rounding.
    np.testing.assert_allclose(restricted.whiten(to_jax(residual[:, 1:4, :3])), expected, rtol=5 * eps)


@pytest.mark.parametrize("unit", [1.0, 3e-20, 1e10])
def test_white_likelihood_of_scaled_and_restricted_noise_is_that_of_scipy(residual, unit, eps):
    noise, valid, _ = white_example()
    unit = unit * np.array([1.0, 2.0])
    keep = np.random.default_rng(3).random((3, 3)) < 0.7
    used = valid[:, 1:4, :3] & keep
    changed = noise.scaled(unit).restricted(keep, (slice(1, 4), slice(0, 3)))
    scaled = (residual / unit[:, None, None])[:, 1:4, :3]
    sigma = (
        1
        / np.sqrt(np.asarray(noise.weights)[:, 1:4, :3][used])
        / np.broadcast_to(unit[:, None, None], used.shape)[used]
    )
    assert changed.log_normalization() == pytest.approx(scipy.stats.norm(0, sigma).logpdf(0).sum(), rel=1e-12)
    if abs(np.log10(unit[0])) < 15:
        # 50 eps of the chi-square, the larger part: a sum of squares. Outside the range of float32 it is not defined.
        expected = scipy.stats.norm(0, sigma).logpdf(scaled[used]).sum()
        scale = float(changed.chi_square(to_jax(scaled)).sum())
        assert float(changed.log_likelihood(to_jax(scaled))) == pytest.approx(expected, abs=50 * eps * scale + 1e-4)


def test_level_is_the_typical_sigma():
    weights = np.full((3, 3, 3), 4.0)
    weights[1, 0] = 1e6
    weights[2] = 0
    # 1e-12: rounding. The median; 1 where there is no information.
    np.testing.assert_allclose(WhiteNoise(weights).level(), [0.5, 0.5, 1.0], rtol=1e-12)


@pytest.mark.parametrize(("value", "kind"), [(-1.0, "negative"), (np.nan, "NaN"), (np.inf, "infinite")])
def test_bad_weights_are_refused(value, kind):
    weights = np.ones(SHAPE)
    weights[1, 2, 3] = value
    message = rf"finite and >= 0; got 1 {kind} value\(s\), the first at \(channel, y, x\) = \(1, 2, 3\)"
    with pytest.raises(ValueError, match=message):
        WhiteNoise(weights)


def test_weights_can_be_traced(residual):
    @jax.jit
    def chi_square(weights):
        return WhiteNoise(weights).chi_square(to_jax(residual)).sum()

    slope = jax.grad(chi_square)(jnp.ones(SHAPE))
    # 1e-6: single precision.
    np.testing.assert_allclose(slope, residual**2, rtol=1e-6)
