import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from scenefit.data.correlated import CorrelatedNoise
from scenefit.data.noise import (
    SMALLEST_COUNTS,
    AbstractNoise,
    FloorNoise,
    PoissonNoise,
    StudentTNoise,
    WhiteNoise,
)
from tests.helpers import final_classes

SHAPE = (2, 4, 5)
WINDOW = (slice(1, 4), slice(0, 3))
SERIES = 2e-8
"""Where series stand for a function: the first term left out is below this fraction."""


@dataclass
class Example:
    """A noise, and what it stands for, all arrays of shape (channel, y, x).

    Attributes
    ----------
    noise : AbstractNoise
    sigma : array
        Standard deviation of each pixel; NaN for pixels without information.
    residual : array
        Model minus data.
    log_density : callable
        From model minus data to the log-likelihood of each pixel.
    """

    noise: AbstractNoise
    sigma: np.ndarray
    residual: np.ndarray
    log_density: Callable[[np.ndarray], np.ndarray]

    @property
    def valid(self):
        return np.isfinite(self.sigma)

    @property
    def is_empty(self):
        return np.asarray(getattr(self.noise, "counts", np.ones(SHAPE))) == 0

    def uniform(self, draws, rng):
        """Return draws (n, channel, y, x) as what is uniform if they have the distribution: values of its integral."""
        if isinstance(self.noise, StudentTNoise):
            scale = self.sigma * np.sqrt(1 - 2 / self.noise.degrees_of_freedom)
            return scipy.stats.t(self.noise.degrees_of_freedom, 0, scale).cdf(draws)
        if isinstance(self.noise, PoissonNoise):
            # Spread evenly over the step of each number.
            numbers = np.round(draws * self.noise.gain[:, None, None] + self.noise.counts)
            mean = scipy.stats.poisson(self.noise.counts)
            return mean.cdf(numbers - 1) + rng.random(draws.shape) * mean.pmf(numbers)
        return scipy.stats.norm(0, self.sigma).cdf(draws)


def sigmas(generator):
    """Standard deviations over two decades, an odd number of pixels with information in both channels."""
    sigma = 10 ** generator.uniform(-1, 1, SHAPE)
    sigma[0, 1, 2] = sigma[1, :, 3] = sigma[1, 0, 0] = np.nan
    return sigma


def gaussian_example(make, total):
    """Noise made from weights, with standard deviations `total(sigma)`."""
    generator = np.random.default_rng(1)
    sigma = sigmas(generator)
    whole = total(sigma)
    residual = whole * generator.normal(size=SHAPE)
    noise = make(np.nan_to_num(1 / sigma**2))
    return Example(noise, whole, np.nan_to_num(residual), lambda r: scipy.stats.norm(0, whole).logpdf(r))


def student_example():
    """As Gaussian noise, with some residuals far out."""
    nu, white = 4.0, gaussian_example(WhiteNoise, lambda sigma: sigma)
    noise = StudentTNoise(white.noise.weights, nu)
    residual = white.residual * np.where(np.arange(5) == 4, 30, 1)
    scale = white.sigma * np.sqrt((nu - 2) / nu)
    return Example(noise, white.sigma, residual, lambda r: scipy.stats.t(nu, 0, scale).logpdf(r))


def poisson_example():
    """Counts from none to many, models above and below them."""
    generator = np.random.default_rng(2)
    gain, counts = np.array([1.0, 40.0]), generator.poisson(10 ** generator.uniform(-1, 4, SHAPE)).astype(float)
    counts[:, 3] = [0, 1, 2, 0, 3]
    counts[np.isnan(sigmas(generator))] = np.nan
    sigma = np.sqrt(np.maximum(counts, 1)) / gain[:, None, None]
    model = (counts + 0.3) * np.exp(generator.normal(0, 2, SHAPE) / np.sqrt(counts + 1))
    residual = np.nan_to_num((model - counts) / gain[:, None, None])

    def log_density(residual):
        # Numbers of events are whole.
        return scipy.stats.poisson.logpmf(counts, counts + residual * gain[:, None, None])

    return Example(PoissonNoise(counts, gain), sigma, residual, log_density)


FLOOR = np.array([0.5, 2.0])
EXAMPLES = {
    "white": gaussian_example(WhiteNoise, lambda sigma: sigma),
    "white, of a scale": gaussian_example(
        lambda weights: WhiteNoise(weights, FLOOR), lambda sigma: sigma * FLOOR[:, None, None]
    ),
    "student": student_example(),
    "floor": gaussian_example(
        lambda weights: FloorNoise(weights, FLOOR), lambda sigma: np.hypot(sigma, FLOOR[:, None, None])
    ),
    "poisson": poisson_example(),
}


@pytest.fixture(params=EXAMPLES)
def example(request):
    return EXAMPLES[request.param]


@pytest.fixture
def residual(rng):
    return rng.normal(size=SHAPE)


@functools.cache
def draws_of(name):
    """4000 draws of an example, in one image of so many copies."""
    count = 4000
    copies = jax.tree.map(lambda x: np.tile(x, (1, count, 1)) if x.ndim == 3 else x, EXAMPLES[name].noise)
    draws = np.asarray(copies.sample(jax.random.key(2025)), float)
    return np.moveaxis(draws.reshape(SHAPE[0], count, *SHAPE[1:]), 1, 0)


def to_jax(residual):
    return jnp.asarray(residual, jnp.result_type(float))


def loss(noise, residual):
    """Return minus the log-likelihood but for its normalization."""
    return 0.5 * jnp.sum(noise.deviance_residual(residual) ** 2)


@jax.jit
def loss_and_gradient(noise, residual):
    """Return the loss and its gradient along the residual."""
    return jax.value_and_grad(loss, argnums=1)(noise, residual)


@jax.jit
def deviance_and_slope(noise, residual):
    """Return the deviance residual and its derivative, pixel by pixel."""
    return jax.jvp(noise.deviance_residual, (residual,), (jnp.ones_like(residual),))


def of_row(noise, row):
    """Return deviance residuals of a row of pixels, and their slopes, in float64."""
    with jax.enable_x64(True):
        result = deviance_and_slope(jax.tree.map(to_jax, noise), to_jax(row[None, None]))
        return [np.asarray(each)[0, 0] for each in result]


# ---- all noises


def test_every_noise_has_an_example():
    # Noise that is correlated has tests of its own.
    assert final_classes(AbstractNoise) - {CorrelatedNoise} == {type(each.noise) for each in EXAMPLES.values()}


def test_valid_pixels(example):
    np.testing.assert_array_equal(example.noise.valid, example.valid)
    assert list(example.valid.sum(axis=(1, 2))) == [19, 15]


def test_every_valid_pixel_is_a_mode(example):
    noise = example.noise
    np.testing.assert_array_equal(noise.modes, example.valid)
    np.testing.assert_array_equal(noise.num_modes(), [19, 15])
    some = noise.restricted(np.indices((3, 3))[0] > 0, WINDOW)
    np.testing.assert_array_equal(some.num_modes(), example.valid[:, 2:4, :3].sum(axis=(1, 2)))


def test_whitened_pixels_are_made_of_themselves(example):
    assert example.noise.reach == 0
    pixel = np.zeros(SHAPE)
    pixel[:, 2, 1] = 1
    np.testing.assert_array_equal(np.asarray(example.noise.whiten(to_jax(pixel))) != 0, pixel == 1)


def test_on_the_device_noise_is_arrays(example, eps):
    there = example.noise.on_device()
    assert type(there) is type(example.noise)
    assert example.noise.host_only == ()
    leaves = jax.tree.leaves(there)
    assert len(leaves) == len(jax.tree.leaves(example.noise))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.result_type(float) for leaf in leaves)
    residual = to_jax(example.residual)
    # 50 eps: weights and counts are rounded before their roots rather than after.
    for method in ("whiten", "deviance_residual"):
        expected = getattr(example.noise, method)(residual)
        np.testing.assert_allclose(getattr(there, method)(residual), expected, rtol=50 * eps, atol=50 * eps)


def test_level_is_the_typical_sigma(example):
    # 1e-12: rounding. The median of an odd number of pixels is that of their weights, too.
    np.testing.assert_allclose(example.noise.level(), np.nanmedian(example.sigma, axis=(1, 2)), rtol=1e-12)


def test_level_of_a_channel_without_information_is_one(example):
    nothing = example.noise.restricted(np.arange(2)[:, None, None] == np.zeros((4, 5)), (slice(None), slice(None)))
    assert not nothing.valid[1].any()
    np.testing.assert_array_equal(nothing.level(), [example.noise.level()[0], 1.0])


def test_parameters_have_a_constraint_and_a_value_per_channel(example):
    for name, kind in example.noise.parameters.items():
        value = getattr(example.noise, name)
        assert value.shape == SHAPE[:1]
        assert np.all(kind.constraint(value))


def test_whitening_divides_by_sigma(example, eps):
    whitened = np.asarray(example.noise.whiten(to_jax(example.residual)))
    assert (whitened[~example.valid] == 0).all()
    expected = (example.residual / example.sigma)[example.valid]
    # 5 eps: rounding of a root, a product and the sigma.
    np.testing.assert_allclose(whitened[example.valid], expected, rtol=5 * eps)
    # 50 eps: a sum of 34 squares.
    chi_square = float(example.noise.chi_square(to_jax(example.residual)).sum())
    assert chi_square == pytest.approx((expected**2).sum(), rel=50 * eps)


def test_whitening_is_linear(example, residual, eps):
    noise = example.noise
    first, second = to_jax(residual), to_jax(residual[::-1])
    combined, parts = noise.whiten(2 * first - second), (noise.whiten(first), noise.whiten(second))
    # 20 eps of the largest value: rounding of three operations.
    largest = max(float(jnp.abs(part).max()) for part in parts)
    np.testing.assert_allclose(combined, 2 * parts[0] - parts[1], atol=20 * eps * largest)


def test_chi_square_is_per_channel(example, residual):
    changed = residual.copy()
    changed[1] *= 2
    before, after = (np.asarray(example.noise.chi_square(to_jax(r))) for r in (residual, changed))
    assert before.shape == (SHAPE[0],)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_half_the_squared_deviance_is_the_loss_of_each_pixel(example, eps):
    valid, deviance = example.valid, np.asarray(example.noise.deviance_residual(to_jax(example.residual)))
    assert (deviance[~valid] == 0).all()
    losses = example.log_density(np.zeros(SHAPE))[valid] - example.log_density(example.residual)[valid]
    # 50 eps of the loss, or of 1e4 counts that the residual is added to; and what the series leave out. Where scipy's own
    # densities of up to 1e4 cancel: 1e-11.
    scale = 50 * eps * np.maximum(1, np.sqrt(2 * losses * 1e4)) + 1e-11
    np.testing.assert_array_less(np.abs(deviance[valid] ** 2 / 2 - losses), scale + (50 * eps + SERIES) * losses)
    np.testing.assert_array_equal(np.sign(deviance[valid]), np.sign(example.residual[valid]))


def test_log_likelihood_is_that_of_scipy(example, eps):
    valid = example.valid
    # 1e-11: sums of up to 1e4 in float64.
    peak = example.log_density(np.zeros(SHAPE))[valid].sum()
    assert example.noise.log_normalization() == pytest.approx(peak, rel=1e-12, abs=1e-11)
    expected = example.log_density(example.residual)[valid].sum()
    # 100 eps of the sum, and of roots of 1e4 counts, as above, once for each pixel at worst.
    tolerance = 100 * eps * (abs(expected) + abs(peak) + 34 * 1e2) + SERIES * abs(expected)
    assert float(example.noise.log_likelihood(to_jax(example.residual))) == pytest.approx(expected, abs=tolerance)


def test_compiled_is_the_same(example, eps):
    noise, residual = jax.tree.map(to_jax, example.noise), to_jax(example.residual)
    for method in ("whiten", "deviance_residual", "chi_square"):
        plain = getattr(noise, method)(residual)
        traced = jax.jit(lambda n, r, method=method: getattr(n, method)(r))(noise, residual)
        # 50 eps: operations fused or in another order, of a counts' ratio near 1 as well.
        np.testing.assert_allclose(traced, plain, rtol=50 * eps, atol=50 * eps)
    # The same, of a sum of 34.
    value = float(jax.jit(lambda r: example.noise.log_likelihood(r))(residual))
    assert value == pytest.approx(float(example.noise.log_likelihood(residual)), rel=50 * eps)
    assert float(jax.jit(lambda n: jnp.sum(n.log_spread()))(noise)) == pytest.approx(
        float(jnp.sum(noise.log_spread())), rel=50 * eps
    )


def test_single_precision_is_enough(example):
    values = {}
    for x64 in (False, True):
        with jax.enable_x64(x64):
            values[x64] = np.asarray(example.noise.deviance_residual(to_jax(example.residual)))
            assert values[x64].dtype == (np.float64 if x64 else np.float32)
    # 1e-5: float32 rounds the sum of 1e4 counts and their residual by 6e-8, which is 6e-6 of their sigma.
    np.testing.assert_allclose(values[False], values[True], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["example", "data"])
def test_derivatives_equal_finite_differences(example, place):
    """At the model of the example, and where it equals the data, or is just above if there are no counts."""
    valid = example.valid
    with jax.enable_x64(True):
        at = example.residual if place == "example" else np.where(example.is_empty, 0.02, 0.0)
        step, noise = 1e-5 * np.where(valid, example.sigma, 1.0), jax.tree.map(to_jax, example.noise)
        above, below, (value, slope) = (
            [np.asarray(each) for each in deviance_and_slope(noise, to_jax(at + side * step))] for side in (1, -1, 0)
        )
        expected = (above[0] - below[0]) / (2 * step)
        gradient = np.asarray(loss_and_gradient(noise, to_jax(at))[1])
    # 1e-6: steps of 1e-5 sigma err by their square times the third derivative, which is large for few counts; rounding of
    # 1e-16 times 1e4 counts, over the step, is 1e-8.
    np.testing.assert_allclose(slope[valid], expected[valid], rtol=1e-6)
    assert (slope[valid] > 0).all()
    assert (slope[~valid] == 0).all()
    # 1e-12: the chain rule in float64.
    np.testing.assert_allclose(gradient, value * slope, rtol=1e-12, atol=1e-12)


def test_the_slope_at_the_data_is_the_stiffness(example):
    """In units of the whitened one: it is largest there, or all along; pixels without counts have no data to be near."""
    some = example.valid & ~example.is_empty
    with jax.enable_x64(True):
        noise = jax.tree.map(to_jax, example.noise)
        slope = np.asarray(deviance_and_slope(noise, jnp.zeros(SHAPE))[1] / noise.whiten(jnp.ones(SHAPE)))
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(slope[some], example.noise.stiffness, rtol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e5, -1e5])
def test_pixels_without_information_neither_count_nor_pull(example, size):
    residual = to_jax(np.where(example.valid, example.residual, size))
    noise = jax.tree.map(to_jax, example.noise)
    value, gradient = loss_and_gradient(noise, residual)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[~example.valid] == 0).all()
    assert float(value) == float(loss_and_gradient(noise, to_jax(example.residual))[0])
    whitened = jax.grad(lambda r: jnp.sum(noise.whiten(r)))(residual)
    assert np.isfinite(whitened).all()
    assert (np.asarray(whitened)[~example.valid] == 0).all()


def test_data_that_equal_the_model_have_no_gradient(example):
    noise = jax.tree.map(to_jax, example.noise)
    np.testing.assert_array_equal(loss_and_gradient(noise, to_jax(np.zeros(SHAPE)))[1], 0)


def test_derivatives_along_parameters_are_finite(example):
    """Where pixels carry no information, too."""
    noise = jax.tree.map(to_jax, example.noise)
    if not noise.parameters:
        assert float(jnp.sum(noise.log_spread())) == 0
        return
    for name in noise.parameters:
        residuals = jax.jit(jax.jacfwd(lambda n: n.deviance_residual(to_jax(example.residual))))(noise)
        assert np.isfinite(getattr(residuals, name)).all()
        slope = jax.jit(jax.grad(lambda n: loss(n, to_jax(example.residual)) + jnp.sum(n.log_spread())))(noise)
        assert np.isfinite(getattr(slope, name)).all()
        assert (np.asarray(getattr(slope, name)) != 0).all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_samples_have_mean_and_variance(name):
    example, draws = EXAMPLES[name], draws_of(name)
    count = len(draws)
    assert (draws[:, ~example.valid] == 0).all()
    # Numbers of events scatter by their own root, those that are none not at all.
    sigma = example.sigma
    if isinstance(example.noise, PoissonNoise):
        sigma = np.sqrt(example.noise.counts) / example.noise.gain[:, None, None]
    certain = example.valid & (sigma == 0)
    assert (draws[:, certain] == 0).all()
    pulls = draws[:, example.valid & ~certain] / sigma[example.valid & ~certain]
    # Means of unit-variance draws scatter by 1 / sqrt(count): 5 sigma of it.
    np.testing.assert_allclose(pulls.mean(axis=0), 0, atol=5 / np.sqrt(count))
    # Products of two pixels scatter as much; squares by sqrt(2) more, with wings of a Student t, whose fourth moment is
    # large, by more than that: of these, the whole distribution is tested below.
    product = pulls.T @ pulls / count
    off_diagonal = ~np.eye(len(product), dtype=bool)
    np.testing.assert_allclose(product[off_diagonal], 0, atol=5 / np.sqrt(count))
    if not isinstance(example.noise, StudentTNoise):
        # Counts of 1 have a kurtosis of 4 instead of 3: sqrt(3) at most.
        np.testing.assert_allclose(np.diag(product), 1, atol=5 * np.sqrt(3 / count))


@pytest.mark.parametrize("name", EXAMPLES)
def test_samples_have_the_distribution(name, rng):
    example = EXAMPLES[name]
    uniform = example.uniform(draws_of(name)[:1000], rng)[:, example.valid]
    # 1e-3: the Kolmogorov-Smirnov probability of 34 000 draws with this key.
    assert scipy.stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3


def test_scaled_noise_is_that_of_the_scaled_data(example, eps):
    noise, unit = example.noise, np.array([3.0, 1e-5])
    scaled, residual = noise.scaled(unit), to_jax(example.residual / unit[:, None, None])
    # 100 eps: rounding of residuals and weights, which the difference from 1e4 counts enlarges where it is small.
    for method in ("whiten", "deviance_residual"):
        plain = getattr(noise, method)(to_jax(example.residual))
        np.testing.assert_allclose(getattr(scaled, method)(residual), plain, rtol=100 * eps, atol=100 * eps)
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(scaled.level(), noise.level() / unit, rtol=1e-12)
    np.testing.assert_array_equal(scaled.valid, noise.valid)
    # A density changes by the Jacobian, the probability of a number of events doesn't; 1e-9: rounding in float64.
    change = scaled.log_normalization() - noise.log_normalization()
    jacobian = 0.0 if isinstance(noise, PoissonNoise) else (example.valid.sum(axis=(1, 2)) * np.log(unit)).sum()
    assert change == pytest.approx(jacobian, rel=1e-9, abs=1e-9)
    assert float(jnp.sum(scaled.log_spread())) == pytest.approx(float(jnp.sum(noise.log_spread())), rel=50 * eps)


@pytest.mark.parametrize("unit", [3e-20, 1e10])
def test_any_unit_passes_once_it_is_scaled(example, unit, eps):
    """Data of 1e-20 are legal where they are scaled by the level of the noise on the host, in float64."""
    there = example.noise.scaled(np.full(2, 1 / unit))
    again, level = there.scaled(there.level()), there.level()[:, None, None]
    plain = np.asarray(example.noise.deviance_residual(to_jax(example.residual)))
    # As above.
    scaled = again.deviance_residual(to_jax(example.residual * unit / level))
    np.testing.assert_allclose(scaled, plain, rtol=100 * eps, atol=100 * eps)
    peak = example.log_density(np.zeros(SHAPE))[example.valid].sum()
    jacobian = 0.0 if isinstance(example.noise, PoissonNoise) else 34 * np.log(unit)
    # 1e-11: sums of up to 1e4 in float64.
    assert there.log_normalization() == pytest.approx(peak - jacobian, rel=1e-11)


@pytest.mark.parametrize("shape", ["plane", "cube"])
def test_restricted_noise_forgets_the_rest(example, shape, eps):
    noise, cut = example.noise, (slice(None), *WINDOW)
    keep = np.random.default_rng(3).random((3, 3) if shape == "plane" else (2, 3, 3)) < 0.7
    restricted = noise.restricted(keep, WINDOW)
    assert type(restricted) is type(noise)
    np.testing.assert_array_equal(restricted.valid, example.valid[cut] & keep)
    for method in ("whiten", "deviance_residual"):
        expected = np.asarray(getattr(noise, method)(to_jax(example.residual)))[cut] * keep
        # 5 eps: rounding.
        np.testing.assert_allclose(
            getattr(restricted, method)(to_jax(example.residual[cut])), expected, rtol=5 * eps, atol=5 * eps
        )
    peak = np.where(keep, example.log_density(np.zeros(SHAPE))[cut], 0)[restricted.valid].sum()
    # 1e-11: sums of up to 1e3 in float64.
    assert restricted.log_normalization() == pytest.approx(peak, rel=1e-12, abs=1e-11)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("noise", [WhiteNoise, StudentTNoise, lambda weights: FloorNoise(weights, 1.0)])
def test_bad_weights_are_refused(noise, value):
    weights = np.ones(SHAPE)
    weights[1, 2, 3] = value
    kind = {"-1.0": "negative", "nan": "NaN", "inf": "infinite"}[str(value)]
    message = rf"finite and >= 0; got 1 {kind} value\(s\), the first at \(channel, y, x\) = \(1, 2, 3\)"
    with pytest.raises(ValueError, match=message):
        noise(weights)


# ---- white


def test_white_likelihood_is_the_dense_gaussian(eps):
    example = EXAMPLES["white"]
    valid, residual = example.valid, example.residual[example.valid]
    expected = scipy.stats.multivariate_normal(np.zeros(34), np.diag(example.sigma[valid] ** 2)).logpdf(residual)
    # 50 eps: sums of 34 squares and logarithms of order one.
    assert float(example.noise.log_likelihood(to_jax(example.residual))) == pytest.approx(expected, abs=50 * eps * 34)


def test_weights_can_be_traced(residual):
    @jax.jit
    def chi_square(weights):
        return WhiteNoise(weights).chi_square(to_jax(residual)).sum()

    slope = jax.grad(chi_square)(jnp.ones(SHAPE))
    # 1e-6: single precision.
    np.testing.assert_allclose(slope, residual**2, rtol=1e-6)


# ---- Student t


def test_student_joins_are_smooth():
    """Near zero a series stands for the function: value and slope are right on both sides of where it begins."""
    z, nu = np.concatenate([np.logspace(-5, 1, 61), np.sqrt(2e-3) * (1 + np.array([-1e-9, 1e-9]))]), 4.0
    value, slope = of_row(StudentTNoise(np.ones((1, 1, len(z))), nu), z)
    expected = np.sqrt((nu + 1) * np.log1p(z**2 / (nu - 2)))
    # The first term that the series leaves out, 1e-9 / 4, is halved in the root; the slope has 7 times as much.
    np.testing.assert_allclose(value, expected, rtol=2e-10)
    np.testing.assert_allclose(slope, (nu + 1) * z / (nu - 2 + z**2) / expected, rtol=1e-9)


def test_student_wings_let_go():
    """The pull of a pixel grows no further once it is far out; that of Gaussian noise does."""
    z = np.array([1.0, 3.0, 30.0, 3000.0])
    value, slope = of_row(StudentTNoise(np.ones((1, 1, 4)), 5.0), z)
    pull = value * slope
    # 1e-12: rounding. The derivative of minus the log-density.
    np.testing.assert_allclose(pull, 6 * z / (3 + z**2), rtol=1e-12)
    assert pull[3] < pull[2] < pull[1]


@pytest.mark.parametrize("nu", [1e4, 1e6])
def test_student_becomes_white(residual, nu):
    weights = np.full(SHAPE, 0.5)
    student, white = StudentTNoise(weights, nu), WhiteNoise(weights)
    with jax.enable_x64(True):
        # Differences of order z^4 / nu, and 1 / nu for each pixel.
        np.testing.assert_allclose(
            student.deviance_residual(to_jax(residual)), white.whiten(to_jax(residual)), atol=20 / nu
        )
    assert student.log_normalization() == pytest.approx(white.log_normalization(), abs=5 * residual.size / nu)


@pytest.mark.parametrize("nu", [2.0, -1.0, np.nan, np.inf])
def test_bad_degrees_of_freedom_are_refused(nu):
    with pytest.raises(ValueError, match=rf"degrees_of_freedom above 2 \(finite variance\); got {nu}"):
        StudentTNoise(np.ones(SHAPE), nu)


# ---- floor


def test_log_spread_is_what_the_floor_adds():
    """Two floors differ in the normalization by what their spreads do."""
    example = EXAMPLES["floor"].noise
    first, second = (FloorNoise(example.weights, factor * FLOOR) for factor in (1.0, 3.0))
    expected = first.log_normalization() - second.log_normalization()
    # 1e-5: sums of 34 logarithms in single precision.
    assert float(jnp.sum(second.log_spread() - first.log_spread())) == pytest.approx(expected, rel=1e-5)


def test_the_best_floor_makes_up_for_the_scatter(rng):
    """With equal weights, the likelihood is largest where the whole variance is that of the residuals."""
    residual = rng.normal(0, 3, (1, 30, 30))
    weights = np.full(residual.shape, 0.25)

    def total(floor):
        noise = FloorNoise(jnp.asarray(weights), floor)
        return loss(noise, jnp.asarray(residual)) + jnp.sum(noise.log_spread())

    with jax.enable_x64(True):
        best = np.sqrt((residual**2).mean() - 4)
        gradient = jax.jit(jax.grad(total))
        below, at, above = (float(gradient(np.full(1, factor * best))[0]) for factor in (1 - 1e-4, 1.0, 1 + 1e-4))
    assert below < 0 < above
    # 1e-8 of the slopes beside: rounding in float64.
    assert abs(at) < 1e-8 * above
    # The Fisher information of a standard deviation, 2 n (floor / variance)^2; 1e-6: steps of 1e-4, squared.
    assert (above - below) / (2e-4 * best) == pytest.approx(2 * 900 * (best / (4 + best**2)) ** 2, rel=1e-6)


def test_a_small_floor_is_white_noise(residual, eps):
    white = EXAMPLES["white"].noise
    floor = FloorNoise(white.weights, 1e-9)
    # 5 eps: rounding; the floor changes nothing in 16 digits.
    np.testing.assert_allclose(floor.whiten(to_jax(residual)), white.whiten(to_jax(residual)), rtol=5 * eps)
    assert floor.log_normalization() == pytest.approx(white.log_normalization(), rel=1e-12)


@pytest.mark.parametrize("floor", [0.0, -1.0, np.nan, np.inf, [1.0, 0.0], [1.0, 2.0, 3.0]])
def test_bad_floors_are_refused(floor):
    with pytest.raises(ValueError, match="FloorNoise wants a positive floor, or one for each of 2 channels; got"):
        FloorNoise(np.ones(SHAPE), floor)


def test_floors_are_per_channel():
    np.testing.assert_array_equal(FloorNoise(np.ones(SHAPE), 3).floor, [3.0, 3.0])
    np.testing.assert_array_equal(FloorNoise(np.ones(SHAPE), [3, 4]).floor, [3.0, 4.0])


# ---- Poisson


def poisson_deviance(counts, model):
    """Deviance residual and its slope of one pixel in float64."""
    value, slope = of_row(PoissonNoise(np.full((1, 1, 1), counts)), np.array([model - counts]))
    return np.array([value[0], slope[0]])


@pytest.mark.parametrize("counts", [1.0, 7.0, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
def test_poisson_joins_near_the_counts_are_smooth(counts, sign):
    """Near the counts a series stands for the function: value and slope are right on both sides of where it begins."""
    ratio = sign * np.concatenate([np.logspace(-4, -0.01, 60), 0.03 * (1 + np.array([-1e-9, 1e-9]))])
    value, slope = of_row(PoissonNoise(np.full((1, 1, len(ratio)), counts)), counts * ratio)
    expected = np.sign(ratio) * np.sqrt(2 * counts * (ratio - np.log1p(ratio)))
    # The first term that the series leaves out is 2 / 7 * 0.03^5 = 7e-9, halved in the root; the slope has 6 times as
    # much. Rounding of the expected value, 1e-16 of 1e-4 in 1e-8, is less.
    np.testing.assert_allclose(value, expected, rtol=4e-9)
    np.testing.assert_allclose(slope, ratio / (1 + ratio) / expected, rtol=3e-8)


@pytest.mark.parametrize("counts", [1.0, 7.0, 1e4])
def test_poisson_joins_at_the_counts(counts):
    # 1e-12: rounding. The slope there is 1 / sqrt(counts).
    np.testing.assert_allclose(poisson_deviance(counts, counts), [0.0, counts**-0.5], rtol=1e-12)


@pytest.mark.parametrize("counts", [1.0, 7.0, 1e4])
def test_below_the_smallest_counts_the_likelihood_is_its_tangent(counts):
    edge = SMALLEST_COUNTS * counts
    above, below = (poisson_deviance(counts, edge * (1 + side)) for side in (1e-9, -1e-9))
    # 1e-8: 2e-9 of the edge, which the slope is inversely proportional to.
    np.testing.assert_allclose(above, below, rtol=1e-8)
    peak = scipy.stats.poisson.logpmf(counts, counts)
    for model in (0.5 * edge, 0.0, -1.0, -1e4):
        value, slope = poisson_deviance(counts, model)
        expected = scipy.stats.poisson.logpmf(counts, edge) + (counts / edge - 1) * (model - edge)
        assert value < 0
        # 1e-10: rounding of the difference of the model from counts that are 1e3 times as many.
        assert peak - value**2 / 2 == pytest.approx(expected, rel=1e-10)
        assert value * slope == pytest.approx(1 - counts / edge, rel=1e-10)


@pytest.mark.parametrize("model", [SMALLEST_COUNTS * 1.01, 0.1, 5.0, 1e4])
def test_pixels_without_counts_want_as_little_as_possible(model):
    value, slope = poisson_deviance(0.0, model)
    # 1e-12: rounding. The loss is the model itself.
    assert value**2 / 2 == pytest.approx(model, rel=1e-12)
    assert value * slope == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("model", [0.99 * SMALLEST_COUNTS, 0.0, -5.0])
def test_pixels_without_counts_do_not_mind_negative_models(model):
    np.testing.assert_allclose(poisson_deviance(0.0, model), [np.sqrt(2 * SMALLEST_COUNTS), 0.0], rtol=1e-12)


@pytest.mark.parametrize("counts", [1e-30, 1e-6, 0.999 * SMALLEST_COUNTS])
@pytest.mark.parametrize("model", [-1.0, 0.0, SMALLEST_COUNTS, 1.0, 1e4])
def test_fractions_of_a_count_are_none(counts, model):
    value, slope = poisson_deviance(counts, model)
    expected, expected_slope = poisson_deviance(0.0, model - counts)
    # Exact: the same numbers.
    assert value == expected
    assert slope == expected_slope


@pytest.mark.parametrize("counts", [0.002, 0.4, 2.5])
def test_counts_need_not_be_whole(counts):
    for model in (4 * SMALLEST_COUNTS, 0.3, 3.0):
        value, _ = poisson_deviance(counts, model)
        # 1e-7: the series.
        assert value**2 / 2 == pytest.approx(model - counts - counts * np.log(model / counts), rel=1e-7)


def test_the_poisson_gradient_pushes_up_from_nothing():
    """From a model below zero, all pixels with counts pull it up, in single precision too."""
    noise = PoissonNoise(np.array([[[0.0, 1.0, 100.0, 1e6]]]))
    for model in (0.0, -3.0):
        gradient = loss_and_gradient(jax.tree.map(to_jax, noise), to_jax(model - noise.counts))[1]
        # 1e-5: single precision, roots of sums of 1e9.
        np.testing.assert_allclose(gradient[0, 0], [0, *np.full(3, 1 - 1 / SMALLEST_COUNTS)], rtol=1e-5)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.full(SHAPE, -1.0), r"got shape \(2, 4, 5\), 40 negative or infinite value"),
        (np.where(np.arange(5) == 2, np.inf, np.ones(SHAPE)), r"got shape \(2, 4, 5\), 8 negative or infinite"),
        (np.ones(4), r"got shape \(4,\), 0 negative"),
    ],
)
def test_bad_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=rf"PoissonNoise wants finite counts >= 0 .*{message}"):
        PoissonNoise(counts)


@pytest.mark.parametrize("gain", [0.0, -1.0, np.nan, np.inf, [1.0, 0.0], [1.0, 2.0, 3.0]])
def test_bad_gains_are_refused(gain):
    message = r"wants a positive gain \(counts per data unit\), or one for each of 2 channels; got"
    with pytest.raises(ValueError, match=message):
        PoissonNoise(np.ones(SHAPE), gain)


def test_a_plane_of_counts_is_one_channel():
    noise = PoissonNoise(np.ones(SHAPE[1:], int), 2)
    assert noise.valid.shape == (1, *SHAPE[1:])
    np.testing.assert_array_equal(noise.gain, [2.0])
