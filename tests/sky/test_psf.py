import astropy.units as u
import galsim
import numpy as np
import pytest

from scenefit.sky.mixture import GaussianMixturePSF
from scenefit.sky.psf import EXTENT_TOLERANCE, AbstractPSF, GaussianPSF, ImagePSF, as_psf
from scenefit.sky.resampledpsf import ResampledPSF, kernel_transform, kernel_widths
from tests.helpers import final_classes, gaussian_image, spectrum_sum


def elliptical_image(shape, center, sigma=1.6):
    """An asymmetric PSF: two Gaussians out of line."""
    wing = gaussian_image(shape, (center[0] + 0.8, center[1] - 0.5), 1.5 * sigma)
    return 0.7 * gaussian_image(shape, center, sigma) + 0.3 * wing


def gaussian_reference(sigma, integrate_pixel):
    return profile_transform(galsim.Gaussian(sigma=sigma), integrate_pixel)


def profile_transform(profile, integrate_pixel):
    if integrate_pixel:
        profile = galsim.Convolve(profile, galsim.Pixel(1.0))

    def transform(qy, qx):
        values = [profile.kValue(2 * np.pi * x, 2 * np.pi * y) for y, x in zip(qy.ravel(), qx.ravel(), strict=True)]
        return np.array(values).reshape(qy.shape)

    return transform


def mixture(*channels, integrate_pixel=False):
    """A mixture, and its references: channels of components (weight, matrix that stretches a round Gaussian in x, y)."""
    # Squared, these matrices are covariances; those of the PSF are in (y, x).
    weights = [[w for w, _ in components] for components in channels]
    covariances = [[(np.array(a) @ np.transpose(a))[::-1, ::-1] for _, a in components] for components in channels]
    round_one = galsim.Gaussian(sigma=1.0)
    profiles = [galsim.Sum([round_one.transform(*np.ravel(a)).withFlux(w) for w, a in each]) for each in channels]
    references = [profile_transform(profile, integrate_pixel) for profile in profiles]
    return GaussianMixturePSF(weights, covariances, integrate_pixel=integrate_pixel), references


def image_reference(image, center, oversampling=1.0):
    return lambda qy, qx: spectrum_sum(image / image.sum(), qy, qx, center, 1 / oversampling)


def resampled(psf, references, affine, order):
    """A PSF on other pixels, and its references; `tests/sky/test_resampledpsf.py` has the kernel's transform by quadrature."""
    widths = kernel_widths(affine)

    def onto(reference):
        def transform(qy, qx):
            native = np.einsum("ab,a...->b...", affine, np.stack([qy, qx]))
            kernel = [kernel_transform(q, order, width) for q, width in zip(native, widths, strict=True)]
            inside = np.abs(native).max(axis=0) < psf.band_limit
            return np.where(inside, reference(*native) * kernel[0] * kernel[1], 0.0)

        return transform

    return ResampledPSF(psf, affine, order), [onto(reference) for reference in references]


# Of any flux: only sums near 1 mean anything.
ODD = 7.0 * elliptical_image((21, 23), (10, 11))
FINE = 7.0 * elliptical_image((45, 45), (22, 22), sigma=4.5)
EVEN = 7.0 * elliptical_image((20, 22), (9.7, 10.4))

NARROW, WIDE, TILTED = [[1.0, 0.3], [0.2, 1.3]], [[3.0, 0.0], [0.0, 3.5]], [[1.5, 0.8], [0.0, 0.9]]

ANGLE = np.deg2rad(23.0)
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
# name: PSF, and the transfer function of each of its channels by other means
EXAMPLES = {
    "gaussian": (GaussianPSF(1.3), [gaussian_reference(1.3, False)]),
    "gaussian with pixel": (
        GaussianPSF([0.9, 1.8], integrate_pixel=True),
        [gaussian_reference(0.9, True), gaussian_reference(1.8, True)],
    ),
    "mixture": mixture([(0.7, NARROW), (0.3, WIDE)]),
    "mixtures with pixel": mixture([(0.6, NARROW), (0.4, TILTED)], [(0.2, WIDE), (0.8, NARROW)], integrate_pixel=True),
    "image": (ImagePSF(3.0 * ODD), [image_reference(ODD, (10, 11))]),
    "images": (
        ImagePSF(np.stack([ODD, ODD[::-1, ::-1]])),
        [image_reference(plane, (10, 11)) for plane in (ODD, ODD[::-1, ::-1])],
    ),
    "oversampled image": (ImagePSF(FINE, oversampling=3), [image_reference(FINE, (22, 22), 3.0)]),
    "even image": (ImagePSF(EVEN, center=(9.7, 10.4)), [image_reference(EVEN, (9.7, 10.4))]),
    "resampled image": resampled(ImagePSF(ODD), [image_reference(ODD, (10, 11))], 1.4 * TURN, 3),
    "resampled onto larger pixels": resampled(GaussianPSF(2.4), [gaussian_reference(2.4, False)], np.eye(2) / 1.5, 5),
}

AFFINE = {
    "identity": np.eye(2),
    "coarser": 5.6 * np.eye(2),
    "finer": 0.4 * np.eye(2),
    "flip": np.diag([1.0, -2.0]),
    "quarter turn": np.array([[0.0, -1.5], [1.5, 0.0]]),
    "rotation": 2.0 * TURN,
    "rotation and flip": 1.3 * TURN @ np.diag([-1.0, 1.0]),
    "shear": np.array([[1.2, 0.3], [-0.1, 0.9]]),
}


@pytest.fixture(params=EXAMPLES)
def example(request):
    return EXAMPLES[request.param]


@pytest.fixture(params=AFFINE)
def affine(request):
    return AFFINE[request.param]


def mapped(ky, kx, affine):
    """Frequencies on the PSF's own grid: cycles per its pixel, q = A^T k."""
    k = np.stack(np.meshgrid(ky, kx, indexing="ij"))
    return np.einsum("ab,akl->bkl", affine, k)


def test_every_psf_has_an_example():
    assert final_classes(AbstractPSF) == {type(psf) for psf, _ in EXAMPLES.values()}


def test_transfer_conserves_flux(example, affine):
    psf, _ = example
    value = psf.transfer(np.zeros(1), np.zeros(1), affine)
    assert value.shape == (psf.num_channels, 1, 1)
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(value, 1.0, atol=1e-12)


def test_transfer_is_the_transform_of_the_psf(example, affine, rng):
    psf, references = example
    largest = 0.6 * psf.band_limit / np.abs(affine).max()
    ky, kx = rng.uniform(-largest, largest, 9), rng.uniform(-largest, largest, 7)
    q = mapped(ky, kx, affine)
    inside = np.abs(q).max(axis=0) < psf.band_limit
    assert inside.any()
    for value, reference in zip(psf.transfer(ky, kx, affine), references, strict=True):
        # 3e-5: the accuracy of the non-uniform transform, 1.5e-5 in each direction.
        np.testing.assert_allclose(value[inside], reference(*q)[inside], atol=3e-5)


def test_transfer_is_zero_beyond_the_band_limit(example, affine, rng):
    psf, _ = example
    reach = 3 * psf.band_limit / np.abs(affine).max()
    ky, kx = rng.uniform(-reach, reach, 40), rng.uniform(-reach, reach, 40)
    beyond = np.abs(mapped(ky, kx, affine)).max(axis=0) >= psf.band_limit
    assert 0 < beyond.sum() < beyond.size
    assert (psf.transfer(ky, kx, affine)[:, beyond] == 0).all()


def test_transfer_of_a_real_psf_is_hermitian(example, affine, rng):
    psf, _ = example
    ky, kx = rng.uniform(-0.2, 0.2, 5), rng.uniform(-0.2, 0.2, 6)
    # 1e-12: the errors of the non-uniform transform are Hermitian too.
    np.testing.assert_allclose(psf.transfer(-ky, -kx, affine), psf.transfer(ky, kx, affine).conj(), rtol=0, atol=1e-12)


def test_effective_sigma_gives_the_peak(example):
    psf, _ = example
    count = 240
    k = (np.arange(count) - count / 2 + 0.5) * 2 * psf.band_limit / count
    # The PSF where it is largest, within a quarter of a pixel, from its own transfer function.
    offset = np.arange(-1.5, 1.51, 0.25)
    phase = np.exp(2j * np.pi * np.outer(offset, k))
    image = np.einsum("yk,ckl,xl->cyx", phase, psf.transfer(k, k, np.eye(2)), phase).real * (k[1] - k[0]) ** 2
    # 3 %: a sample may miss the peak by half a sample, and a pixel isn't quite a Gaussian.
    np.testing.assert_allclose(psf.effective_sigma, np.sqrt(1 / (2 * np.pi * image.max(axis=(1, 2)))), rtol=0.03)


@pytest.mark.parametrize("sigma", [0.8, 2.5])
def test_extent_of_a_gaussian(sigma):
    radius = GaussianPSF(sigma).extent
    # 1e-9: rounding; the profile falls to EXTENT_TOLERANCE of its peak there.
    assert np.exp(-(radius**2) / (2 * sigma**2)) == pytest.approx(EXTENT_TOLERANCE, rel=1e-9)
    assert GaussianPSF(sigma, integrate_pixel=True).extent == radius + 0.5


@pytest.mark.parametrize("oversampling", [1, 3])
def test_extent_of_an_image_leaves_only_faint_samples_outside(oversampling):
    sigma = 1.2 * oversampling
    image = gaussian_image((61, 61), (30, 30), sigma)
    psf = ImagePSF(image, oversampling=oversampling)
    y, x = np.abs(np.arange(61) - 30)[:, None], np.abs(np.arange(61) - 30)
    outside = np.maximum(y, x) / oversampling > psf.extent
    assert image[outside].max() <= EXTENT_TOLERANCE * image.max()
    # One sample: the extent ends on one.
    assert psf.extent == pytest.approx(GaussianPSF(1.2).extent, abs=1 / oversampling)
    assert psf.size == pytest.approx(61 / oversampling)


@pytest.mark.parametrize("oversampling", [1, 2, 3.5])
def test_oversampled_image_has_the_transfer_of_the_profile(oversampling, rng):
    sigma = 1.4
    psf = ImagePSF(gaussian_image((61, 61), (30, 30), sigma * oversampling), oversampling=oversampling)
    k = rng.uniform(-0.45, 0.45, 12)
    # 3e-4: aliasing of samples one pixel apart, exp(-2 pi^2 sigma^2 0.55^2) in each direction and sign.
    np.testing.assert_allclose(psf.transfer(k, k, np.eye(2)), GaussianPSF(sigma).transfer(k, k, np.eye(2)), atol=3e-4)


def test_oversampling_moves_the_band_limit():
    image = gaussian_image((31, 31), (15, 15), 3.0)
    assert [ImagePSF(image, oversampling=factor).band_limit for factor in (1, 2, 3)] == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("shape", [(24, 24), (25, 30), (31, 31)])
@pytest.mark.parametrize(
    ("center", "tolerance"),
    [
        ("given", 1e-3),  # aliasing and truncation of the samples only
        ("centroid", 1e-3),  # the same: the centroid of a Gaussian is its centre
        ("peak", 0.02),  # a parabola isn't a Gaussian: bias of 0.01 pixels, times 2 pi |k|
    ],
)
def test_recentring_puts_the_source_at_zero_phase(shape, center, tolerance, rng):
    place = (11.3, 12.8)
    image = gaussian_image(shape, place, 1.7)
    psf = ImagePSF(image, center=place if center == "given" else center)
    k = rng.uniform(-0.3, 0.3, 10)
    np.testing.assert_allclose(
        psf.transfer(k, k, np.eye(2)), GaussianPSF(1.7).transfer(k, k, np.eye(2)), rtol=0, atol=tolerance
    )


def test_each_channel_has_its_own_centre():
    images = np.stack([gaussian_image((25, 25), place, 1.5) for place in ((12, 12), (11.5, 12.75))])
    # 1e-6: truncation of the wings at seven sigma.
    np.testing.assert_allclose(ImagePSF(images, center="centroid").center, [(12, 12), (11.5, 12.75)], atol=1e-6)


def test_peak_on_the_edge_is_taken_as_it_is():
    image = gaussian_image((9, 9), (0, 4), 1.0)
    np.testing.assert_allclose(ImagePSF(image, center="peak").center, [(0.0, 4.0)])


def test_as_psf_takes_arrays_and_leaves_psfs():
    psf = GaussianPSF(1.0)
    assert as_psf(psf) is psf
    assert isinstance(as_psf(ODD.astype(">f4")), ImagePSF)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("psf", [None, 1.5, {"sigma": 1.0}])
def test_what_is_no_psf(psf):
    with pytest.raises(TypeError, match="A PSF is a GaussianPSF, an ImagePSF or an array of its image; got"):
        as_psf(psf)


@pytest.mark.parametrize("image", ["psf.fits", ODD * 1j, ODD * u.nJy])
def test_psf_images_are_numbers(image):
    with pytest.raises(TypeError, match="A PSF image must be real numbers without a unit; got"):
        ImagePSF(image)


def test_lengths_are_in_pixels():
    np.testing.assert_array_equal(GaussianPSF(1.5 * u.pix).sigma, [1.5])
    np.testing.assert_array_equal(ImagePSF(ODD, center=(5, 6) * u.pix).center, [(5, 6)])
    with pytest.raises(
        ValueError, match=r"sigma of a GaussianPSF \(divide an angle by the pixel scale\) must be in pix"
    ):
        GaussianPSF(0.6 * u.arcsec)


def test_an_image_cut_out_of_a_psf_keeps_its_sum():
    """A point of unit flux through a Gaussian of which a narrow stamp holds 95 % in one channel, all in the other."""
    wide, narrow = (elliptical_image((21, 21), (10, 10), sigma=sigma) for sigma in (3.6, 1.2))
    sums = np.array([wide.sum(), narrow.sum()])
    assert 0.9 < sums[0] < 0.99
    frequency = np.fft.fftfreq(64)
    cut, whole = (
        np.fft.fftshift(np.fft.ifft2(psf.transfer(frequency, frequency, np.eye(2))).real, axes=(-2, -1))
        for psf in (ImagePSF(np.stack([wide, narrow])), ImagePSF(5.0 * np.stack([wide, narrow])))
    )
    np.testing.assert_allclose(cut.sum(axis=(1, 2)), sums, rtol=1e-12)
    # 3e-5: the Nyquist frequency itself, which is left out.
    np.testing.assert_allclose(cut[:, 22:43, 22:43], np.stack([wide, narrow]), atol=3e-5)
    np.testing.assert_allclose(whole.sum(axis=(1, 2)), 1.0, rtol=1e-12)
    told = ImagePSF(5.0 * wide, enclosed_flux=0.8)
    assert told.transfer(np.zeros(1), np.zeros(1), np.eye(2)) == pytest.approx(0.8, rel=1e-12)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, np.nan])
def test_shares_of_the_flux_on_an_image(share):
    with pytest.raises(ValueError, match="enclosed flux"):
        ImagePSF(ODD, enclosed_flux=share)


def test_masked_samples_count_as_missing():
    with pytest.raises(ValueError, match="must be finite"):
        ImagePSF(np.ma.masked_greater(ODD, 0.04))


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf, [1.0, -2.0], [[1.0]]])
def test_gaussian_sigma_must_be_positive(sigma):
    with pytest.raises(ValueError, match=r"positive sigma \(pixels\) per channel; got"):
        GaussianPSF(sigma)


BAD_IMAGES = {
    "axes": (np.ones(5), {}, r"shape \(y, x\) or \(channel, y, x\); got \(5,\)"),
    "NaN": (np.where(ODD > 0.04, np.nan, ODD), {}, r"must be finite; channel\(s\) \[0\] hold NaN"),
    "NaN in one": (np.stack([ODD, ODD * np.inf]), {}, r"must be finite; channel\(s\) \[1\] hold NaN"),
    "negative": (-ODD, {}, "positive sum in every channel; got sums"),
    "zero": (np.zeros((5, 5)), {}, "positive sum in every channel; got sums"),
    "even": (EVEN, {}, r"odd-sized with its peak in the middle; got shape \(20, 22\)"),
    "off-centre": (elliptical_image((21, 21), (7, 10)), {}, r"with the peak at \(y, x\) = \([678], 10\)"),
    "undersampled": (ODD, {"oversampling": 0.5}, "oversampling must be at least 1 sample per pixel; got 0.5"),
    "NaN oversampling": (ODD, {"oversampling": np.nan}, "oversampling must be at least 1 sample per pixel; got nan"),
    "unknown centre": (ODD, {"center": "middle"}, "None, 'peak', 'centroid' or a position .* got 'middle'"),
    "centre outside": (ODD, {"center": (30.0, 2.0)}, r"a position \(y, x\) on it; got \(30.0, 2.0\)"),
    "three coordinates": (ODD, {"center": (1.0, 2.0, 3.0)}, r"a position \(y, x\) on it; got"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(case):
    image, options, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=message):
        ImagePSF(image, **options)
