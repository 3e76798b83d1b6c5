"""Starlets against direct convolutions by SciPy and the norms of impulse responses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from scenefit.arrays import starlet

SHAPE, NUM_SCALES = (23, 40), 4
transform = jax.jit(starlet.transform, static_argnums=(1, 2))
inverse = jax.jit(starlet.inverse, static_argnums=1)


def smoothed(image, scale):
    """Convolution with the kernel in two dimensions, its taps 2^scale pixels apart, of the image and its mirror images."""
    taps = np.zeros(4 * 2**scale + 1)
    taps[:: 2**scale] = np.array([1, 4, 6, 4, 1]) / 16
    wide = np.pad(image, 2 * 2**scale, mode="symmetric")
    return scipy.signal.convolve(wide, np.outer(taps, taps), mode="valid", method="direct")


def direct(image, num_scales, generation):
    """Planes of one image in float64."""
    planes = []
    for scale in range(num_scales - 1):
        smooth = smoothed(image, scale)
        planes.append(image - (smooth if generation == 1 else smoothed(smooth, scale)))
        image = smooth
    return np.array([*planes, image])


@pytest.fixture
def images(rng):
    return rng.normal(size=(2, *SHAPE))


@pytest.mark.parametrize("generation", [1, 2])
def test_planes_equal_direct_convolutions(images, generation, eps):
    planes = transform(jnp.asarray(images), NUM_SCALES, generation)
    expected = np.array([direct(image, NUM_SCALES, generation) for image in images])
    # 20 eps: up to 12 weighted sums of values of about 1.
    np.testing.assert_allclose(planes, expected, atol=20 * eps)


@pytest.mark.parametrize("generation", [1, 2])
def test_the_inverse_is_exact(images, generation, eps):
    planes = transform(jnp.asarray(images), NUM_SCALES, generation)
    # 20 eps: as above, there and back.
    np.testing.assert_allclose(inverse(planes, generation), images, atol=20 * eps)


@pytest.mark.parametrize("num_scales", [1, 7])
def test_any_number_of_scales(num_scales, eps):
    """The seventh kernel reaches 128 pixels beyond an image of 5."""
    image = np.arange(15.0).reshape(3, 5)
    planes = starlet.transform(jnp.asarray(image), num_scales)
    # 100 eps: rounding of sums of values up to 14.
    np.testing.assert_allclose(planes, direct(image, num_scales, 1), atol=100 * eps)
    # What is left of so short axes when all structure is taken away is the mean. 1e-3: float32 of values of 7.
    assert num_scales == 1 or np.ptp(planes[-1]) < 1e-3


def test_a_constant_has_no_structure(eps):
    planes = np.asarray(starlet.transform(jnp.full(SHAPE, 3.0), NUM_SCALES))
    # 20 eps: weights that sum to one.
    np.testing.assert_allclose(planes[:-1], 0, atol=60 * eps)
    np.testing.assert_allclose(planes[-1], 3, rtol=20 * eps)


def test_splines_are_positive_of_unit_sum_and_known_width(eps):
    """Of the second generation, the inverse of a single coefficient is a B-spline; its variance is the sum of its steps'."""
    middle, size = 40, 81
    for scale in range(NUM_SCALES):
        planes = np.zeros((NUM_SCALES, size, size))
        planes[scale, middle, middle] = 1
        spline = np.asarray(inverse(jnp.asarray(planes), 2), float)
        assert spline.min() >= 0
        # 100 eps: rounding of sums over 81 x 81 pixels.
        assert spline.sum() == pytest.approx(1, abs=100 * eps)
        along = spline.sum(axis=0) @ (np.arange(size) - middle) ** 2
        # Variance 4^k of each step k.
        assert along == pytest.approx(sum(4**k for k in range(scale)), abs=1e-3)


def test_sums_are_kept_up_to_the_edges(rng, eps):
    planes = rng.uniform(size=(NUM_SCALES, *SHAPE))
    image = np.asarray(inverse(jnp.asarray(planes), 2), float)
    assert image.min() > 0
    # 100 eps: sums over 3680 values.
    assert image.sum() == pytest.approx(planes.sum(), rel=100 * eps)


@pytest.mark.parametrize("generation", [1, 2])
def test_noise_is_the_norm_of_the_impulse_response(generation):
    """White noise in a plane has the variance of a sum of independent pixels, with the squares of the weights."""
    size, count = 129, 5
    image = np.zeros((size, size))
    image[size // 2, size // 2] = 1
    expected = np.sqrt(np.sum(direct(image, count, generation) ** 2, axis=(1, 2)))
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(starlet.scale_noise(count, generation), expected, rtol=1e-12)


def test_matrices_make_the_same_image(rng):
    planes = rng.normal(size=(NUM_SCALES, *SHAPE))
    rows, columns = (starlet.spline_matrices(size, NUM_SCALES) for size in SHAPE)
    with jax.enable_x64(True):
        expected = np.asarray(starlet.inverse(jnp.asarray(planes), 2))
    # 1e-13: rounding in float64.
    np.testing.assert_allclose(np.sum(rows @ planes @ columns, axis=0), expected, atol=1e-13)
    for matrices in (rows, columns):
        np.testing.assert_allclose(matrices, np.swapaxes(matrices, 1, 2), atol=1e-15)
        np.testing.assert_allclose(matrices.sum(axis=1), 1, rtol=1e-14)


def test_the_derivative_is_the_transpose(images, eps):
    """Inner products with planes are those of the image with what the reverse derivative makes of the planes."""
    image = jnp.asarray(images[0])
    planes, pullback = jax.vjp(lambda x: starlet.transform(x, NUM_SCALES), image)
    other = jnp.asarray(np.random.default_rng(1).normal(size=planes.shape), planes.dtype)
    (back,) = pullback(other)
    # 1000 eps: inner products of 3680 numbers of either sign.
    assert float(jnp.vdot(planes, other)) == pytest.approx(float(jnp.vdot(image, back)), abs=1000 * eps)


def test_bad_input(as_users_have_it):
    with pytest.raises(ValueError, match=r"images of shape \(\.\.\., y, x\); got shape \(4,\)"):
        starlet.transform(jnp.ones(4), 2)
    with pytest.raises(ValueError, match=r"planes of shape \(\.\.\., scale, y, x\); got shape \(4, 4\)"):
        starlet.inverse(jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="at least one scale and generation 1 or 2; got 0 scales, generation 1"):
        starlet.transform(jnp.ones((4, 4)), 0)
    with pytest.raises(ValueError, match="got 3 scales, generation 3"):
        starlet.scale_noise(3, 3)
