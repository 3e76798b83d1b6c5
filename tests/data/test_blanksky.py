import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from scenefit.data.blanksky import CERTAIN, MAX_LAG, MIN_CLEAN, blank_pixels, measure_blank_sky
from scenefit.data.correlated import CorrelatedNoise
from tests.correlations import CORRELATIONS, KERNELS, gaussian_noise

SHAPE = (128, 120)
SIGMA = 3.0


def to_jax(image):
    return jnp.asarray(image, jnp.result_type(float))


def noise_image(name, seed, shape=SHAPE):
    """Return noise of standard deviation SIGMA."""
    return SIGMA * gaussian_noise(KERNELS[name], shape, np.random.default_rng(seed))


def sources(shape, number, seed=5):
    """Return Gaussian profiles with peaks from 2 to 300 standard deviations of the noise, in units of these."""
    generator = np.random.default_rng(seed)
    y, x = np.indices(shape)
    image = np.zeros(shape)
    for _ in range(number):
        square = (y - generator.uniform(0, shape[0])) ** 2 + (x - generator.uniform(0, shape[1])) ** 2
        image += 10 ** generator.uniform(0.3, 2.5) * np.exp(-square / (2 * generator.uniform(1.2, 3) ** 2))
    return image


def drizzled_noise(shape, generator):
    """Return noise of the correlation `drizzled`: through the root of its power, on a torus far larger than its reach."""
    function = np.zeros([n + 8 for n in shape])
    lags = np.arange(-2, 3)
    function[np.ix_(lags, lags)] = CORRELATIONS["drizzled"]
    gain = np.sqrt(np.maximum(np.fft.fft2(function).real, 0))
    return np.fft.ifft2(gain * np.fft.fft2(generator.normal(size=function.shape))).real[: shape[0], : shape[1]]


def assert_measured(blank, name, *, within, variance=SIGMA**2):
    """Assert that variance and correlation are those of a kernel, within so many standard errors."""
    truth, (found,), count = CORRELATIONS[name], blank.function, blank.clean.sum()
    size = max(len(truth), len(found))
    assert len(found) % 2 == found.shape[1] % 2 == 1
    deviation = np.pad(found, (size - len(found)) // 2)
    deviation -= np.pad(truth, [((size - n) // 2, (size - n) // 2) for n in truth.shape])
    # Bartlett's formula (see the module) for lags without correlation; at others the error is smaller. That of a variance
    # has twice the sum of squares.
    error = np.sqrt((truth**2).sum() / count)
    assert np.abs(deviation).max() < within * error
    assert blank.variance.mean() / variance == pytest.approx(1, abs=within * np.sqrt(2) * error)
    # Noise can have it.
    power = np.fft.fft2(np.fft.ifftshift(np.pad(found, len(found)))).real
    # 1e-12: rounding.
    assert power.min() > -1e-12 * power.max()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_noise_alone_is_measured(name, seed):
    blank = measure_blank_sky(noise_image(name, seed)[None], np.ones((1, *SHAPE)))
    # Peaks of noise are seldom taken for sources.
    assert blank.clean.mean() > 0.98
    # 3.5 standard errors: of some ten independent numbers.
    assert_measured(blank, name, within=3.5)


def test_white_noise_has_no_correlation():
    blank = measure_blank_sky(noise_image("white", 2)[None], np.ones((1, *SHAPE)))
    np.testing.assert_array_equal(blank.function, np.ones((1, 1, 1)))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("number", [12, 25])
def test_noise_between_sources_is_measured(name, number):
    data = noise_image(name, 3) + SIGMA * sources(SHAPE, number)
    blank = measure_blank_sky(data[None], np.ones((1, *SHAPE)))
    assert 0.1 < blank.clean.mean() < 0.75
    # What is left of sources, below a quarter of the noise, adds less than one standard error: 5 in all.
    assert_measured(blank, name, within=5)
    assert np.abs(sources(SHAPE, number)[blank.clean[0]]).mean() < 0.1


def test_blank_pixels_hold_no_sources():
    data = noise_image("hat", 3) + SIGMA * sources(SHAPE, 12)
    clean = blank_pixels(data, np.ones(SHAPE, bool))
    assert sources(SHAPE, 12)[clean].max() < 2
    use = np.random.default_rng(0).random(SHAPE) < 0.9
    assert not blank_pixels(data, use)[~use].any()


def test_artefacts_do_not_matter():
    """Cosmic rays, a hot column, a dead one without weight."""
    generator = np.random.default_rng(4)
    plain = noise_image("hat", 4)
    data, weights = plain.copy(), np.ones(SHAPE)
    hit = generator.random(SHAPE) < 0.01
    data[hit] += 50 * SIGMA
    data[:, 31] += 30 * SIGMA
    data[:, 77], weights[:, 77] = np.nan, 0
    blank = measure_blank_sky(data[None], weights[None])
    assert not blank.clean[0][hit].any()
    assert not blank.clean[0][:, [31, 77]].any()
    assert blank.clean.mean() > 0.6
    # As of noise alone, though neighbors of what was hit are left out.
    assert_measured(blank, "hat", within=3.5)


@pytest.mark.parametrize("offset", [-1e3, 40.0])
def test_a_sky_level_does_not_matter(offset):
    data = noise_image("hat", 5) + SIGMA * sources(SHAPE, 12)
    plain, lifted = (measure_blank_sky(image[None], np.ones((1, *SHAPE))) for image in (data, data + offset))
    np.testing.assert_array_equal(plain.clean, lifted.clean)
    # 1e-6: rounding of 1e3, and where the fit ends.
    np.testing.assert_allclose(plain.function, lifted.function, rtol=0, atol=1e-6)
    np.testing.assert_allclose(plain.variance, lifted.variance, rtol=1e-9)


@pytest.mark.parametrize("varying", [False, True])
def test_weights_take_out_what_they_know(varying):
    """Exposures that vary by 4, in weights of another normalisation."""
    x = np.indices(SHAPE)[1] / SHAPE[1]
    trend = 4.0**x
    data = noise_image("hat", 6) / np.sqrt(trend)
    blank = measure_blank_sky(data[None], 0.1 * trend[None], varying=varying)
    # The variance in units of the inverse weights; a smoothed one averages to the same.
    assert_measured(blank, "hat", within=4, variance=0.1 * SIGMA**2)
    assert blank.variance.shape == ((1, *SHAPE) if varying else (1, 1, 1))


def test_what_weights_do_not_know_is_measured_if_it_varies():
    x = np.indices(SHAPE)[1] / SHAPE[1]
    trend = 4.0 ** (x - 0.5)
    data = noise_image("hat", 7) * np.sqrt(trend)
    blank = measure_blank_sky(data[None], np.ones((1, *SHAPE)), varying=True)
    ratio = blank.variance[0] / (SIGMA**2 * trend)
    # 10 per cent, over the inner part: the variance in a Gaussian window of 20 pixels has a standard error of 5 per cent, and
    # is that of a trend smoothed over as much, 1.4 per cent high.
    middle = (slice(20, -20), slice(20, -20))
    assert ratio[middle].mean() == pytest.approx(1, abs=0.1)
    assert ratio[middle].std() < 0.1
    # At the edges half of the window is left: its mean is off by a factor of 1.2, its error is 10 per cent in the corners.
    assert 1 / 1.5 < ratio.min() < ratio.max() < 1.5
    # Correlations are those in units of the local variance.
    truth, (found,) = CORRELATIONS["hat"], blank.function
    cut = (len(found) - len(truth)) // 2
    inner = found[cut : cut + len(truth), cut : cut + len(truth)]
    # 4 standard errors, see above.
    np.testing.assert_allclose(inner, truth, rtol=0, atol=4 * np.sqrt((truth**2).sum() / blank.clean.sum()))


def test_channels_have_their_own_noise():
    data = np.stack([noise_image("white", 8), 5 * noise_image("hat", 9)])
    blank = measure_blank_sky(data, np.ones((2, *SHAPE)))
    assert blank.function.shape[0] == 2
    assert blank.function.shape[1] == blank.function.shape[2]
    for channel, (name, factor) in enumerate((("white", 1), ("hat", 25))):
        each = blank._replace(**{field: getattr(blank, field)[channel : channel + 1] for field in blank._fields})
        # As above.
        assert_measured(each, name, within=3.5, variance=factor * SIGMA**2)


def test_masked_pixels_are_left_out():
    generator = np.random.default_rng(10)
    mask = np.zeros(SHAPE, bool)
    mask[:, :50] = True
    # Faint enough not to be found by itself.
    data = noise_image("white", 10) + np.where(mask, 0.8 * SIGMA * generator.normal(size=SHAPE), 0)
    for each in (mask, mask[None]):
        blank = measure_blank_sky(data[None], np.ones((1, *SHAPE)), mask=each)
        assert not blank.clean[0][mask].any()
        assert_measured(blank, "white", within=3.5)
    everything = measure_blank_sky(data[None], np.ones((1, *SHAPE)))
    assert everything.variance.item() > 1.2 * SIGMA**2


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_correlations_are_looked_for_so_far(max_lag):
    blank = measure_blank_sky(noise_image("hat", 11)[None], np.ones((1, *SHAPE)), max_lag=max_lag)
    reach = len(blank.function[0]) // 2
    if max_lag == 0:
        assert reach == 0
        return
    # The moving average has some room beyond.
    assert reach >= max_lag
    middle = slice(reach - 1, reach + 2)
    truth = CORRELATIONS["hat"]
    # 0.12: with nothing at lag 2, where there is 0.17, no noise has as much at lag 1; 4 standard errors otherwise.
    error = 0.12 if max_lag == 1 else 4 * np.sqrt((truth**2).sum() / blank.clean.sum())
    np.testing.assert_allclose(blank.function[0][middle, middle], truth[1:4, 1:4], rtol=0, atol=error)


def test_noise_ends_within_what_is_looked_at():
    """That of a drizzled image, in any draw, on images large and small."""
    for seed in range(20):
        shape = SHAPE if seed < 10 else (50, 44)
        noise = drizzled_noise(shape, np.random.default_rng(100 + seed))
        blank = measure_blank_sky(noise[None], np.ones((1, *shape)), max_lag=(None, 3)[seed % 2])
        assert blank.variance.item() == pytest.approx(1, abs=0.15 if shape == SHAPE else 0.3)


@pytest.mark.parametrize("kernel", ["white", "hat"])
@pytest.mark.parametrize("max_lag", [None, 0, 3])
@pytest.mark.parametrize("kind", ["gradient", "waves"])
def test_a_sky_that_varies_is_no_noise(kind, max_lag, kernel):
    """A slope by 1.5 standard deviations of the noise from side to side, or waves: only a constant is taken out."""
    y, x = np.indices(SHAPE)
    sky = {"gradient": 1.5 * x / SHAPE[1], "waves": np.sin(x / 20) * np.cos(y / 25)}[kind]
    data = noise_image(kernel, 0) + SIGMA * sky
    message = (
        r"channel 1 are still correlated by 0\.\d+ \+- 0\.\d+ at a distance of 12, .* is a background, .* not noise\. "
        r"Subtract it, or set background= .* give a larger max_lag="
    )
    for varying in (False, True):
        with pytest.raises(ValueError, match=message):
            CorrelatedNoise.measured(
                np.stack([noise_image("white", 0), data]), np.ones((2, *SHAPE)), max_lag=max_lag, varying=varying
            )
    assert len(measure_blank_sky((data - SIGMA * sky)[None], np.ones((1, *SHAPE))).function) == 1


@pytest.mark.parametrize("max_lag", [-1, 120, 500])
def test_lags_beyond_the_image_are_refused(max_lag):
    with pytest.raises(ValueError, match=rf"at least 0 and less than the image of 128 x 120; got {max_lag}"):
        measure_blank_sky(noise_image("white", 0)[None], np.ones((1, *SHAPE)), max_lag=max_lag)


def test_bad_data_are_refused():
    data, weights = np.zeros((1, 24, 24)), np.ones((1, 24, 24))
    with pytest.raises(ValueError, match=r"the same shape \(channel, y, x\); got \(1, 24, 20\) and \(1, 24, 24\)"):
        measure_blank_sky(data[..., :20], weights)
    data[0, 3, :2] = np.nan, np.inf
    with pytest.raises(ValueError, match="NaN or infinite at 2 pixels with weight: give these weight 0"):
        measure_blank_sky(data, weights)


def test_few_clean_pixels_are_refused():
    data = noise_image("white", 12, (24, 24))
    weights = np.zeros((2, 24, 24))
    weights[0] = 1
    weights[1, :7] = 1
    message = r"Only 168 of 168 valid pixels of channel 1 are free of sources; measuring .* lags of 0 pixels takes 200: give a"
    with pytest.raises(ValueError, match=message):
        measure_blank_sky(np.stack([data, data]), weights)
    # So many lags take more.
    message = r"Only 576 of 576 valid .* channel 0 .* lags of 6 pixels takes 845: give .* a smaller max_lag="
    with pytest.raises(ValueError, match=message):
        measure_blank_sky(data[None], weights[:1], max_lag=6)
    assert MIN_CLEAN == 200


@pytest.mark.parametrize("how", ["mask", "weights"])
def test_nothing_to_measure_is_refused(how):
    data = noise_image("white", 12, (24, 24))[None]
    weights = np.zeros((1, 24, 24)) if how == "weights" else np.ones((1, 24, 24))
    with pytest.raises(ValueError, match="Only 0 of 0 valid pixels of channel 0 are free of sources"):
        measure_blank_sky(data, weights, mask=np.ones((24, 24), bool) if how == "mask" else None)


def test_bright_sources_all_over_leave_too_few_pixels():
    data = noise_image("white", 13, (30, 30)) + SIGMA * sources((30, 30), 12)
    with pytest.raises(ValueError, match=r"Only \d+ of 900 valid pixels of channel 0 are free of sources"):
        measure_blank_sky(data[None], np.ones((1, 30, 30)))


def test_uncertain_noise_is_warned_of():
    """By how much follows from the number of pixels, and of the lags with a correlation: 3 x 3 are seen in so small an image."""
    data = noise_image("hat", 14, (20, 24))[None]
    percent = round(100 * np.sqrt(9 / 480))
    assert percent > 100 * CERTAIN
    message = f"channel 0 was measured on 480 pixels without sources: its power spectrum is uncertain by {percent} %, the errors"
    with pytest.warns(UserWarning, match=message):
        CorrelatedNoise.measured(data, np.ones((1, 20, 24)))


def test_large_images_are_certain():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blank = measure_blank_sky(noise_image("hat", 14)[None], np.ones((1, *SHAPE)))
    assert len(blank.function[0]) // 2 <= 2 * (MAX_LAG + 2)


# ---- the noise that is made of it


@pytest.fixture(scope="module")
def measured():
    """Noise measured between sources, in weights of another normalisation, and what it was measured on."""
    data = noise_image("hat", 15) + SIGMA * sources(SHAPE, 12)
    weights = np.full((1, *SHAPE), 7.0)
    weights[0, :, 40] = 0
    return CorrelatedNoise.measured(data[None], weights), weights


def test_measured_noise_whitens_other_noise(measured):
    noise, weights = measured
    np.testing.assert_array_equal(noise.valid, weights > 0)
    image = np.where(weights > 0, noise_image("hat", 16), 0.0)
    whitened = np.asarray(noise.whiten(to_jax(image)))[noise.modes]
    # Where the power all but vanishes, as that of a hat does for half of all modes, the error of the measured one is as large as
    # it: 20 per cent in all. The mean of so many squares itself has an error of 1 per cent.
    assert (whitened**2).mean() == pytest.approx(1, abs=0.2)
    # The variance, measured on 7000 pixels with a standard error of 3.5 per cent.
    np.testing.assert_allclose(1 / noise.weights[weights > 0], SIGMA**2, rtol=3 * 0.035)


def test_errors_from_measured_noise_are_those_of_the_true_noise(measured):
    """Of the flux of a Gaussian profile."""
    noise, weights = measured
    true = CorrelatedNoise(np.where(weights > 0, SIGMA**-2, 0.0), CORRELATIONS["hat"])
    y, x = np.indices(SHAPE)
    for sigma in (1.5, 3.0):
        profile = np.exp(-((y - 60) ** 2 + (x - 70) ** 2) / (2 * sigma**2))[None]
        found, expected = (1 / np.sqrt(each.chi_square(to_jax(profile))[0]) for each in (noise, true))
        # 10 per cent: the power where the profile has it is an average of hundreds of modes at least, each with an error as
        # large as itself.
        assert float(found / expected) == pytest.approx(1, abs=0.1)


def test_measured_noise_varies_with_the_image():
    trend = 4.0 ** (np.indices(SHAPE)[1] / SHAPE[1] - 0.5)
    noise = CorrelatedNoise.measured(
        (noise_image("white", 17) * np.sqrt(trend))[None], np.ones((1, *SHAPE)), varying=True
    )
    ratio = 1 / noise.weights[0] / (SIGMA**2 * trend)
    # As above.
    assert ratio[20:-20, 20:-20].std() < 0.1
    assert ratio[20:-20, 20:-20].mean() == pytest.approx(1, abs=0.1)
