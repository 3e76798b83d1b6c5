import jax
import numpy as np
import pytest

from scenefit.arrays.vecchia import choose_order
from scenefit.data.correlation import (
    SUPPORT,
    SUPPORT_OF_SUMS,
    PropagatedCorrelation,
    StationaryCorrelation,
    power_at,
    torus_power,
)
from tests.correlations import (
    CORRELATIONS,
    KERNELS,
    autocorrelation,
    covariance_of,
    drizzled,
    gaussian_kernel,
    propagated,
)

SHAPE = (9, 7)


def assert_bands_are(covariance, bands, shape, step=1):
    """Assert that a band is all that a dense covariance of pixels holds."""
    rows, columns = (np.arange(n)[::step] for n in shape)
    reach = [n // 2 for n in bands.shape[:2]]
    found = np.zeros((len(rows), len(columns), len(rows), len(columns)))
    full = np.broadcast_to(bands, (*bands.shape[:2], len(rows), len(columns)))
    for dy, dx, i, j in np.ndindex(full.shape):
        other = i + dy - reach[0], j + dx - reach[1]
        if 0 <= other[0] < len(rows) and 0 <= other[1] < len(columns):
            found[i, j, other[0], other[1]] = full[dy, dx, i, j]
    expected = covariance.reshape(*shape, *shape)[::step, ::step, ::step, ::step]
    # 1e-12: rounding.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def lag_means(draws, lags):
    """Return means of products of pixels some lags (dy, dx) apart, and their standard errors from draws (n, y, x)."""
    result = []
    for dy, dx in lags:
        height, width = draws.shape[1] - dy, draws.shape[2] - abs(dx)
        first = draws[:, :height, max(0, -dx) : max(0, -dx) + width]
        second = draws[:, dy:, max(0, dx) : max(0, dx) + width]
        products = (first * second).mean(axis=(1, 2))
        result.append((products.mean(), products.std() / np.sqrt(len(draws))))
    return np.array(result).T


# ---- the same everywhere


@pytest.mark.parametrize("name", CORRELATIONS)
def test_covariances_become_correlations(name):
    function = CORRELATIONS[name]
    found = StationaryCorrelation(7.0 * np.stack([function, 2 * function]))
    assert found.num_channels == 2
    expected = np.broadcast_to(np.where(np.abs(function) > 1e-6, function, 0), (2, *function.shape))
    reach = [(n - m) // 2 for n, m in zip(function.shape, found.function.shape[1:], strict=True)]
    padded = np.pad(found.function, [(0, 0), *[(n, n) for n in reach]])
    # 1e-6: what counts for nothing.
    np.testing.assert_allclose(padded, expected, rtol=0, atol=1.01e-6)
    average = found.average()
    assert average.shape[1] == average.shape[2] == max(found.function.shape[1:])
    assert average[0].sum() == pytest.approx(found.function[0].sum(), rel=1e-12)
    assert found.window((slice(1, 5), slice(2, 4))) is found


def test_what_is_negligible_is_trimmed():
    function = np.zeros((15, 11))
    function[6:9, 4:7] = drizzled()[1:4, 1:4]
    function[0, 5] = function[-1, 5] = 1e-7
    np.testing.assert_array_equal(StationaryCorrelation(function).function, drizzled()[None, 1:4, 1:4])


@pytest.mark.parametrize("sigma", [1.5, 2.0, 3.0])
def test_smooth_noise_is_noise(sigma):
    """However little power there is at high frequencies, and though its wings are cut."""
    found = StationaryCorrelation(autocorrelation(gaussian_kernel(sigma, int(5 * sigma))))
    row = np.arange(-2, 3)
    expected = np.exp(-(row[:, None] ** 2 + row**2) / (4 * sigma**2))
    middle = found.function.shape[1] // 2
    # 1e-4: the kernel's wings beyond 5 sigma, exp(-12.5) = 4e-6 of its middle, for each of some ten pixels.
    part = found.function[0, middle - 2 : middle + 3, middle - 2 : middle + 3]
    np.testing.assert_allclose(part, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("name", ["white", "hat", "shift", "drizzled"])
def test_bands_are_the_dense_covariance(name, step):
    (band,) = StationaryCorrelation(CORRELATIONS[name]).bands(step)
    assert_bands_are(covariance_of(CORRELATIONS[name], SHAPE), band, SHAPE, step)


def test_orders_are_those_of_each_channel():
    functions = np.stack([np.pad(CORRELATIONS["white"], 2), CORRELATIONS["drizzled"]])
    assert StationaryCorrelation(functions).orders(functions) == [choose_order(each, SUPPORT) for each in functions]


def test_power_is_the_transform_of_the_correlation():
    function, shape = CORRELATIONS["drizzled"][None], (8, 3)
    ky, kx = (2 * np.pi * np.fft.fftfreq(n) for n in shape)
    lags = np.arange(-2, 3)
    phases = np.exp(1j * ky[:, None, None, None] * lags[:, None]) * np.exp(1j * kx[:, None, None] * lags)
    # 1e-12: rounding. The torus is smaller than the function is wide.
    np.testing.assert_allclose(
        torus_power(function, shape)[0], (phases * function[0]).sum(axis=(2, 3)).real, atol=1e-12
    )


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_power_at_any_frequency(name):
    function = autocorrelation(KERNELS[name])
    lags = [np.arange(n) - n // 2 for n in function.shape]
    ky, kx = np.random.default_rng(4).uniform(-0.5, 0.5, (2, 30))
    waves = np.exp(2j * np.pi * (ky[:, None, None] * lags[0][:, None] + kx[:, None, None] * lags[1]))
    expected = np.sum(waves * function, axis=(1, 2)).real
    found = power_at(function[None], ky, kx)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * expected.max())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (np.ones((2, 3)), r"odd number of rows and of columns.*got \(1, 2, 3\)"),
        (np.ones(3), r"got \(3,\)"),
        (np.full((3, 3), np.nan), "finite values, with a positive one in the middle"),
        (np.zeros((3, 3)), "finite values, with a positive one in the middle"),
        (-np.ones((1, 1)), "finite values, with a positive one in the middle"),
        (np.array([[0.1, 1.0, 0.2]]), "the same at opposite lags"),
        (np.ones((3, 3)), "isn't positive definite: its power spectrum goes down to -3 of the mean power"),
        (np.array([[0.6, 1.0, 0.6]]), "isn't positive definite: its power spectrum goes down to -0.2 of"),
    ],
)
def test_bad_functions_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        StationaryCorrelation(function)


@pytest.mark.parametrize("name", ["hat", "drizzled"])
def test_drawn_noise_has_the_correlation(name, key):
    function = CORRELATIONS[name]
    # Two channels are independent; sides where opposite edges would meet on a torus without margins.
    draws = np.asarray(StationaryCorrelation(function).sample(key, (400, 12, 11)), float)
    lags = [(0, 0), (0, 1), (1, 0), (1, 1), (1, -1), (2, 1), (11, 0), (11, 10), (0, 10)]
    middle = [n // 2 for n in function.shape]
    padded = np.pad(function, 12)
    expected = [padded[12 + middle[0] + dy, 12 + middle[1] + dx] for dy, dx in lags]
    mean, error = lag_means(draws, lags)
    # 4 standard errors: 1 of 600 runs with other keys has one of 9 lags beyond.
    np.testing.assert_array_less(np.abs(mean - expected), 4 * error)


# ---- sums of independent numbers


@pytest.mark.parametrize("density", [0.8, 1.0, 1.6])
def test_propagated_bands_are_the_dense_covariance(density):
    correlation, maps = propagated(SHAPE, density, num_channels=2)
    assert correlation.num_channels == 2
    for step in (1, 2, 3):
        for channel, band in enumerate(correlation.bands(step)):
            assert_bands_are(maps[channel] @ maps[channel].T, band, SHAPE, step)


def test_the_average_is_that_of_the_dense_covariance():
    correlation, maps = propagated(SHAPE, 1.3, num_channels=2)
    average = correlation.average()
    reach = average.shape[1] // 2
    for channel in range(2):
        covariance = (maps[channel] @ maps[channel].T).reshape(*SHAPE, *SHAPE)
        for dy, dx in np.ndindex(average.shape[1:]):
            dy, dx = dy - reach, dx - reach
            # Over all pairs of pixels inside the image.
            pairs = [
                covariance[y, x, y + dy, x + dx]
                for y, x in np.ndindex(SHAPE)
                if 0 <= y + dy < SHAPE[0] and 0 <= x + dx < SHAPE[1]
            ]
            # 1e-12: rounding.
            assert average[channel, dy + reach, dx + reach] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert covariance[0, 0, reach + 1 :].max(initial=0) == 0
    np.testing.assert_allclose(average[:, reach, reach], 1.0, rtol=1e-12)
    assert correlation.orders(average) == [choose_order(each, SUPPORT_OF_SUMS) for each in average]


def test_the_average_of_a_large_image_is_that_of_some_pixels():
    """The same weights everywhere: the average is the correlation itself."""
    shape = (40, 31)
    y, x = (n.ravel() for n in np.indices(shape))
    index = (y * 32 + x)[:, None] + [0, 1, 32, 33]
    weight = np.broadcast_to(KERNELS["shift"].ravel(), (1, len(index), 4))
    # 1e-12: rounding.
    np.testing.assert_allclose(
        PropagatedCorrelation(index, weight, shape).average()[0], CORRELATIONS["shift"], rtol=0, atol=1e-12
    )


def test_a_channel_that_nothing_contributes_to_is_white():
    index, weight = np.arange(63)[:, None], np.ones((2, 63, 1))
    weight[1] = 0
    correlation = PropagatedCorrelation(index, weight, SHAPE)
    np.testing.assert_array_equal(correlation.average(), np.ones((2, 1, 1)))
    assert len(correlation.orders(correlation.average())) == 2


def test_a_window_is_that_part_of_the_covariance():
    window = slice(2, 8), slice(1, 6)
    correlation, (to_pixels,) = propagated(SHAPE, 1.0)
    part = correlation.window(window)
    inside = np.arange(63).reshape(SHAPE)[window].ravel()
    assert part.shape == (6, 5)
    assert_bands_are((to_pixels @ to_pixels.T)[np.ix_(inside, inside)], part.bands(1)[0], (6, 5))


def test_drawn_sums_have_the_covariance(key):
    correlation, (to_pixels,) = propagated((4, 5), 1.2)
    draws = np.asarray(correlation.sample(key, (4000, 4, 5)), float).reshape(4000, 20)
    expected = to_pixels @ to_pixels.T
    # The variance of a product of Gaussian numbers is C_ii C_jj + C_ij^2; 4.5 standard errors, of 210 numbers.
    error = np.sqrt((1 + expected**2) / 4000)
    np.testing.assert_array_less(np.abs(draws.T @ draws / 4000 - expected), 4.5 * error)


def test_channels_of_sums_are_drawn_apart(key):
    correlation, maps = propagated((4, 5), 1.2, num_channels=2)
    keys = jax.random.split(key, 150)
    draws = np.array([np.asarray(correlation.sample(each, (2, 4, 5)), float).reshape(2, 20) for each in keys])
    across = np.einsum("ni,nj->ij", draws[:, 0], draws[:, 1]) / 150
    # 4.5 standard errors of 400 products of independent numbers.
    assert np.abs(across).max() < 4.5 / np.sqrt(150)
    for channel in range(2):
        own = np.einsum("ni,nj->ij", draws[:, channel], draws[:, channel]) / 150
        expected = maps[channel] @ maps[channel].T
        np.testing.assert_array_less(np.abs(own - expected), 4.5 * np.sqrt((1 + expected**2) / 150))


@pytest.mark.parametrize(("index", "weight"), [((63, 3), (1, 63, 4)), ((60, 4), (1, 60, 4)), ((63, 4), (60, 4))])
def test_sums_of_other_pixels_are_refused(index, weight):
    with pytest.raises(ValueError, match=r"don't go with 9 x 7 pixels: got shapes \(6[03], [34]\) and \(1, 6[03], 4\)"):
        PropagatedCorrelation(np.zeros(index, int), np.ones(weight), SHAPE)
