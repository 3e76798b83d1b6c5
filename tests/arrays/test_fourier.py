import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from scenefit.arrays import fourier
from tests.helpers import spectrum_sum


def smooth(length: int) -> bool:
    for factor in (2, 3, 5):
        while length % factor == 0:
            length //= factor
    return length == 1


@pytest.mark.parametrize("length", [0, 1, 2, 7, 11, 97, 128, 331])
def test_fast_length_is_the_next_product_of_2_3_5(length):
    expected = next(n for n in range(max(1, length), 1000) if smooth(n))
    assert fourier.fast_length(length) == expected


@pytest.mark.parametrize("length", [0, 1, 8, 9, 97, 128, 331])
def test_coarse_fast_length_is_the_next_fast_multiple_of_8(length):
    expected = next(n for n in range(max(1, length), 1000) if smooth(n) and n % 8 == 0)
    assert fourier.coarse_fast_length(length) == expected


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (4, 1)])
def test_transforms_and_their_transposes_are_the_direct_sums(rng, shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    ky, kx = np.fft.fftfreq(shape[0]), np.arange(shape[1] // 2 + 1) / shape[1]
    phase = np.exp(-2j * np.pi * (ky[:, None, None, None] * y + kx[:, None, None] * x))
    image, weights = rng.normal(size=(2, *shape)), fourier.half_plane_weights(shape[1])
    modes = rng.normal(size=(2, len(ky), len(kx))) + 1j * rng.normal(size=(2, len(ky), len(kx)))

    def inverse(modes):
        return fourier.inverse_transform(modes, shape)

    with jax.enable_x64(True):
        image, modes = jnp.asarray(image), jnp.asarray(modes)
        spectrum = np.einsum("klyx,cyx->ckl", phase, image)
        # 1e-12: rounding in double precision.
        np.testing.assert_allclose(fourier.transform(image), spectrum, atol=1e-12)
        np.testing.assert_allclose(jax.jvp(fourier.transform, (image,), (image,))[1], spectrum, atol=1e-12)
        # The transpose, without conjugation, of a map from real to complex numbers: the real part of the sum.
        transposed = jax.linear_transpose(jax.linearize(fourier.transform, image)[1], image)(modes)[0]
        np.testing.assert_allclose(transposed, np.einsum("klyx,ckl->cyx", phase, modes).real, atol=1e-12)
        # The last column of an even width and the first stand for themselves only: their imaginary parts are left out by
        # the transform along x, so compare with modes of a real image.
        modes = jnp.asarray(spectrum)
        total = np.einsum("klyx,ckl,l->cyx", phase.conj(), spectrum, weights).real
        np.testing.assert_allclose(inverse(modes), total, atol=1e-12)
        np.testing.assert_allclose(jax.jvp(inverse, (modes,), (modes,))[1], total, atol=1e-12)
        transposed = jax.linear_transpose(jax.linearize(inverse, modes)[1], modes)(image)[0]
        expected = np.einsum("klyx,cyx,l->ckl", phase.conj(), image, weights)
        np.testing.assert_allclose(transposed, expected, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_half_plane_weights_count_every_mode_of_a_row(rng, width):
    row = rng.normal(size=width)
    total = (fourier.half_plane_weights(width) * np.abs(np.fft.rfft(row)) ** 2).sum()
    # Parseval; 1e-12: rounding in float64.
    assert total == pytest.approx(width * (row**2).sum(), rel=1e-12)


@pytest.mark.parametrize(("origin", "spacing"), [((0.0, 0.0), 1.0), ((2.3, -1.1), 0.5)])
def test_sample_spectrum_is_the_direct_sum(rng, origin, spacing):
    image, ky, kx = rng.normal(size=(3, 6, 9)), rng.uniform(-1, 1, 5), rng.uniform(-1, 1, 7)
    sampled = fourier.sample_spectrum(image, ky, kx, origin, spacing)
    grid_y, grid_x = np.meshgrid(ky, kx, indexing="ij")
    expected = np.stack([spectrum_sum(plane, grid_y, grid_x, origin, spacing) for plane in image])
    assert sampled.shape == (3, 5, 7)
    # 1e-12: the same sum in float64 in another order.
    np.testing.assert_allclose(sampled, expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 9), (17, 8), (25, 25), (1, 4)])
@pytest.mark.parametrize(("origin", "spacing"), [((0.0, 0.0), 1.0), ((2.3, -1.1), 0.5)])
def test_sample_spectrum_nonuniform_is_the_direct_sum(rng, shape, origin, spacing):
    image, ky, kx = rng.normal(size=shape), rng.uniform(-1, 1, (40, 3)), rng.uniform(-1, 1, (40, 3))
    sampled = fourier.sample_spectrum_nonuniform(image, ky, kx, origin, spacing)
    error = np.abs(sampled - spectrum_sum(image, ky, kx, origin, spacing)).max()
    # The window's error of 1.5e-5 in each direction, relative to the largest value possible.
    assert error < 3e-5 * np.abs(image).sum()


def test_sample_spectrum_nonuniform_keeps_leading_axes(rng):
    image, k = rng.normal(size=(2, 7, 7)), rng.uniform(-0.5, 0.5, (2, 11))
    sampled = fourier.sample_spectrum_nonuniform(image, *k)
    expected = np.stack([fourier.sample_spectrum_nonuniform(plane, *k) for plane in image])
    # 1e-12: the same operations in float64.
    np.testing.assert_allclose(sampled, expected, atol=1e-12)


@pytest.mark.parametrize("frequency", [0.0, 0.1, 0.25, 0.5, 1.3])
def test_window_transform_is_the_integral_over_the_window(frequency):
    def integrand(x):
        first, weights = fourier.window_weights(np.array([x]))
        return weights[0, -first[0]] * np.cos(2 * np.pi * frequency * x)

    half = fourier.WINDOW_WIDTH / 2
    expected = scipy.integrate.quad(integrand, -half + 1e-12, half - 1e-12, epsabs=1e-12, limit=200)[0]
    # 1e-8: the tolerance of the quadrature at the window's steep ends.
    assert fourier.window_transform(np.array([frequency]))[0] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("position", [0.0, 0.5, -2.3, 7.999])
def test_window_covers_the_nearest_grid_points(position):
    first, weights = fourier.window_weights(np.array([position]))
    points = first[0] + np.arange(fourier.WINDOW_WIDTH)
    assert np.abs(points - position).max() <= fourier.WINDOW_WIDTH / 2
    # The window falls with distance.
    order = np.argsort(np.abs(points - position))
    assert (np.diff(weights[0][order]) <= 1e-15).all()
