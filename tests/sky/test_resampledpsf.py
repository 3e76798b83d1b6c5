import math
from itertools import pairwise

import galsim
import numpy as np
import pytest
from scipy.integrate import quad

from scenefit.sky.psf import EXTENT_TOLERANCE, GaussianPSF, ImagePSF
from scenefit.sky.resampledpsf import (
    ORDERS,
    ResampledPSF,
    kernel_transform,
    kernel_widths,
    lanczos,
    normalized_kernel,
)
from tests.helpers import gaussian_image, spectrum_sum

ANGLE = np.deg2rad(23.0)
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
# d(target) / d(native): finer target pixels are larger numbers.
AFFINE = {
    "identity": np.eye(2),
    "finer": 5.6 * np.eye(2),
    "coarser": np.eye(2) / 2.5,
    "turned": TURN,
    "coarser and turned": TURN @ np.diag([1.0, -1.0]) / 1.7,
    "oblong": np.diag([0.5, 2.0]),
    "quarter turn": np.array([[0.0, -1.5], [1.5, 0.0]]),
}


def kernel_sum(x, order, width):
    """The normalised kernel, written out anew."""
    reach = math.ceil(order * width)
    places = {n: math.pi * (x + n) / width for n in range(-2 * reach - 1, reach + 2) if abs(x + n) < order * width}
    values = {n: order * math.sin(z) * math.sin(z / order) / z**2 if z else 1.0 for n, z in places.items()}
    return values.get(0, 0.0) / sum(values.values())


def kernel_integral(q, order, width):
    """Its Fourier transform, by adaptive quadrature between the places where it isn't smooth."""
    edge = order * width
    breaks = (
        {0.0, edge} | {n + side * (edge % 1) for n in range(30) for side in (-1, 1)} | {float(n) for n in range(30)}
    )
    breaks = sorted(b for b in breaks if 0 <= b <= edge)
    return 2 * sum(
        quad(lambda x: kernel_sum(x, order, width) * np.cos(2 * np.pi * q * x), low, high, epsabs=1e-11)[0]
        for low, high in pairwise(breaks)
        if high - low > 1e-12
    )


def convolved(offset, sigma, order, width):
    """A Gaussian convolved with the kernel, in one dimension, by a fine sum in real space."""
    x, step = np.linspace(-order * width, order * width, 6001, retstep=True)
    gauss = np.exp(-((offset[:, None] - x) ** 2) / (2 * sigma**2)) / np.sqrt(2 * np.pi * sigma**2)
    return gauss @ normalized_kernel(x, order, width) * step


@pytest.mark.parametrize("order", ORDERS)
def test_the_kernel_is_that_of_galsim(order):
    x = np.linspace(-order - 0.5, order + 0.5, 83)
    plain = galsim.Lanczos(order, conserve_dc=False)
    # 1e-14: rounding.
    np.testing.assert_allclose(lanczos(x, order), plain.xval(x), atol=1e-14)


@pytest.mark.parametrize("order", [3, 5])
def test_the_normalized_kernel_is_that_of_galsim(order):
    other = galsim.Lanczos(order, conserve_dc=True)
    x, q = np.linspace(-order - 0.5, order + 0.5, 83), np.linspace(0, 2.2, 40)
    # 5e-6: GalSim divides by a few terms of the Fourier series of the sum, and tabulates the transform.
    np.testing.assert_allclose(normalized_kernel(x, order, 1.0), other.xval(x), atol=5e-6)
    np.testing.assert_allclose(kernel_transform(q, order, 1.0), other.kval(2 * np.pi * q), atol=5e-6)


@pytest.mark.parametrize("width", [1.0, 1.37, 2.5])
@pytest.mark.parametrize("order", ORDERS)
def test_the_weights_of_any_place_sum_to_one(order, width, rng):
    place = rng.uniform(-3, 3, 50)
    total = normalized_kernel(place[:, None] - np.arange(-40, 41), order, width).sum(axis=1)
    # 1e-14: rounding.
    np.testing.assert_allclose(total, 1.0, atol=1e-14)


@pytest.mark.parametrize(("order", "width"), [(2, 1.0), (3, 1.0), (3, 1.37), (5, 2.5)])
def test_the_transform_of_the_kernel_is_its_integral(order, width):
    q = np.array([0.0, 0.13, 0.47, 0.5, 0.81, 1.6, 2.4])
    expected = [kernel_integral(each, order, width) for each in q]
    # 1e-10: that of the adaptive quadrature.
    np.testing.assert_allclose(kernel_transform(q, order, width), expected, atol=1e-10)
    # Many frequencies are interpolated.
    many = np.concatenate([q, np.linspace(-2.5, 2.5, 2000)])
    np.testing.assert_allclose(kernel_transform(many, order, width)[: len(q)], expected, atol=1e-10)


@pytest.mark.parametrize("width", [1.0, 1.37])
def test_the_kernel_keeps_a_constant(width):
    expected = [1.0, 0.0, 0.0, 0.0]
    # 1e-13: rounding.
    np.testing.assert_allclose(kernel_transform(np.arange(4.0), 3, width), expected, atol=1e-13)


def test_no_frequency_at_all():
    assert kernel_transform(np.zeros((0, 3)), 3, 1.0).shape == (0, 3)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("identity", [1, 1]),
        ("finer", [1, 1]),
        ("coarser", [2.5, 2.5]),
        ("turned", [1, 1]),
        ("coarser and turned", [1.7, 1.7]),
        ("oblong", [2, 1]),
    ],
)
def test_the_kernel_is_widened_for_larger_pixels_alone(name, widths):
    # 1e-6: the rounding of the widths.
    np.testing.assert_allclose(kernel_widths(AFFINE[name]), widths, atol=1e-6)


PLANE = gaussian_image((21, 23), (10, 11), 1.6) + 0.4 * gaussian_image((21, 23), (10.8, 10.5), 2.2)


@pytest.mark.parametrize("order", [3, 5])
@pytest.mark.parametrize("name", AFFINE)
def test_transfer_is_that_of_the_native_psf_times_the_kernel(name, order, rng):
    """On a grid that isn't parallel to either."""
    onto = 0.8 * TURN.T @ np.diag([1.3, 1.0])
    native = np.eye(2) if name == "identity" else onto @ AFFINE[name]
    largest = 0.45 / np.abs(native).max()
    ky, kx = rng.uniform(-largest, largest, 2), rng.uniform(-largest, largest, 2)
    q = np.einsum("ab,akl->bkl", native, np.stack(np.meshgrid(ky, kx, indexing="ij")))
    inside = np.abs(q).max(axis=0) < 0.5
    widths = kernel_widths(AFFINE[name])
    expected = spectrum_sum(PLANE / PLANE.sum(), *q, (10, 11))
    for axis in (0, 1):
        expected[inside] *= [kernel_integral(each, order, widths[axis]) for each in q[axis][inside]]
    value = ResampledPSF(ImagePSF(PLANE), AFFINE[name], order).transfer(
        ky, kx, np.linalg.inv(AFFINE[name]) if name == "identity" else onto
    )
    # 3e-5: the accuracy of the non-uniform transform, 1.5e-5 in each direction.
    np.testing.assert_allclose(value[0], np.where(inside, expected, 0), atol=3e-5)
    assert inside.any()


@pytest.mark.parametrize("name", AFFINE)
def test_flux_is_conserved_and_the_band_limit_native(name, rng):
    psf = ResampledPSF(GaussianPSF([1.2, 1.5]), AFFINE[name])
    np.testing.assert_allclose(psf.transfer(np.zeros(1), np.zeros(1), np.eye(2)), 1.0, atol=1e-12)
    k = psf.band_limit * np.array([-1.5, -1 - 1e-9, -0.7, 0.0, 0.3, 1 + 1e-9])
    value = psf.transfer(k, k, np.eye(2))
    assert psf.num_channels == len(value) == 2
    assert (value[:, [0, 1, 5]] == 0).all()
    assert (value[:, :, [0, 1, 5]] == 0).all()
    # The corner of the native band that reaches furthest on the target.
    corners = np.linalg.inv(AFFINE[name]).T @ np.array([[1, 1, -1, -1], [1, -1, 1, -1]])
    assert psf.band_limit == pytest.approx(GaussianPSF(1.2).band_limit * np.abs(corners).max(), rel=1e-12)


@pytest.mark.parametrize("order", [3, 5])
@pytest.mark.parametrize("name", AFFINE)
def test_peak_and_extent(name, order):
    sigma, affine = 1.3, AFFINE[name]
    psf = ResampledPSF(GaussianPSF(sigma), affine, order)
    widths = kernel_widths(affine)
    peak = np.prod([convolved(np.zeros(1), sigma, order, width)[0] for width in widths]) / abs(np.linalg.det(affine))
    # 1e-3: the fine grid of the class has a sample at the middle; the band ends at 1e-4 of the transfer.
    np.testing.assert_allclose(psf.effective_sigma, np.sqrt(1 / (2 * np.pi * peak)), rtol=1e-3)
    offset = np.linspace(-18, 18, 501)
    y, x = (convolved(offset, sigma, order, width) for width in widths)
    image = np.abs(y[:, None] * x) / np.prod([each.max() for each in (y, x)])
    place = np.abs(np.einsum("ab,byx->ayx", affine, np.stack(np.meshgrid(offset, offset, indexing="ij")))).max(axis=0)
    assert image[place > psf.extent].max() < EXTENT_TOLERANCE
    # Half a native pixel, a sample and a half of the class; and half of the tolerance, since it stays on the safe side.
    step = 0.5 * np.sqrt(abs(np.linalg.det(affine)))
    assert image[place > psf.extent - step].max() > 0.5 * EXTENT_TOLERANCE


def test_the_side_of_the_stamp_is_in_target_pixels():
    image = ImagePSF(PLANE[:, :21], center=(10, 11))
    # There is no stamp on the target's pixels, which may be fewer than the native one would cover.
    assert ResampledPSF(image, AFFINE["finer"]).size == 0


@pytest.mark.parametrize(
    ("fwhm", "order", "width", "percent"),
    [
        (2.5, 3, 1.0, 0.82),
        (2.5, 5, 1.0, 0.33),
        (4.0, 3, 1.0, 0.40),
        (4.0, 5, 1.0, 0.14),
        (2.5, 3, 2.5, 0.02),
    ],
)
def test_the_replicas_that_are_left_are_as_large_as_stated(fwhm, order, width, percent):
    """A point source anywhere in its pixel, resampled anywhere, against the PSF alone."""
    sigma = fwhm / np.sqrt(8 * np.log(2))
    offset, native = np.linspace(-15, 15, 601), np.arange(-30, 31)
    expected = convolved(offset, sigma, order, width)
    places = np.linspace(-0.5, 0.5, 40, endpoint=False)
    weight = np.stack([normalized_kernel(offset[:, None] + place - native, order, width) for place in places])
    samples = np.exp(-((native - places[:, None]) ** 2) / (2 * sigma**2)) / np.sqrt(2 * np.pi * sigma**2)
    seen = np.einsum("sxn,sn->sx", weight, samples)
    # The product along y and x is furthest off where each is largest or smallest.
    ends = seen.min(axis=0), seen.max(axis=0)
    error = [np.abs(np.outer(y, x) - np.outer(expected, expected)).max() for y in ends for x in ends]
    # 0.006: the figures have two digits.
    assert 100 * max(error) / expected.max() ** 2 == pytest.approx(percent, abs=0.006)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("order", [1, 6, 2.5, "3", True, None])
def test_orders(order):
    with pytest.raises(ValueError, match=r"order of a Lanczos kernel is one of \(2, 3, 4, 5\); got"):
        ResampledPSF(GaussianPSF(1.0), np.eye(2), order)


@pytest.mark.parametrize("affine", [2.0, np.ones((2, 2)), np.eye(3), [[np.nan, 0], [0, 1]]])
def test_affine_maps(affine):
    with pytest.raises(ValueError, match=r"invertible 2 x 2 matrix d\(target y, x\) / d\(native y, x\); got"):
        ResampledPSF(GaussianPSF(1.0), affine)


def test_the_psf_may_be_its_image():
    assert isinstance(ResampledPSF(PLANE[:, 1:22], np.eye(2)).psf, ImagePSF)
