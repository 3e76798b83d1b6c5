import astropy.units as u
import equinox as eqx
import numpy as np
import pytest
import scipy.special

from scenefit.app.serialization import load, save
from scenefit.data.observation import Observation
from scenefit.sky.mixture import RESIDUAL_LIMIT, RESIDUAL_TARGET, GaussianMixturePSF
from scenefit.sky.psf import EXTENT_TOLERANCE, GaussianPSF
from tests.helpers import gaussian_image, spectrum_sum

ROUND = [[1.0, 0.0], [0.0, 1.0]]
NARROW = [[1.9, 0.5], [0.5, 2.4]]
WIDE = [[7.0, -1.5], [-1.5, 9.0]]
PAIR = {flag: GaussianMixturePSF([0.6, 0.4], [NARROW, WIDE], integrate_pixel=flag) for flag in (False, True)}
METHOD = {False: "no_pixel", True: "auto"}
"""GalSim's names for samples and for integrals over pixels."""


@pytest.fixture
def galsim():
    return pytest.importorskip("galsim")


@pytest.fixture(params=[False, True], ids=["sampled", "integrated"])
def integrate_pixel(request):
    return request.param


def elliptical_image(shape, center, covariance):
    """Samples of a Gaussian of unit flux, from the formula of its density."""
    y, x = np.arange(shape[0])[:, None] - center[0], np.arange(shape[1]) - center[1]
    (yy, yx), (_, xx) = covariance
    det = yy * xx - yx**2
    return np.exp(-(xx * y**2 - 2 * yx * y * x + yy * x**2) / (2 * det)) / (2 * np.pi * np.sqrt(det))


def gaussian_profile(galsim, covariance):
    """GalSim's Gaussian of unit flux with a covariance in (y, x)."""
    root = np.linalg.cholesky(np.array(covariance)[::-1, ::-1])
    return galsim.Gaussian(sigma=1.0).transform(*root.ravel()).withFlux(1.0)


def pair_profile(galsim):
    return 0.6 * gaussian_profile(galsim, NARROW) + 0.4 * gaussian_profile(galsim, WIDE)


def draw(profile, shape, integrate_pixel=False, offset=(0.0, 0.0), scale=1.0):
    """GalSim's drawing, the source displaced from the middle by `offset` (y, x) samples."""
    dy, dx = offset
    options = {"method": METHOD[integrate_pixel], "scale": scale, "dtype": float}
    return profile.drawImage(nx=shape[1], ny=shape[0], offset=(dx, dy), **options).array


def ring_image(size=31, radius=6.0):
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.exp(-((np.hypot(y, x) - radius) ** 2) / 2)


def test_transfer_is_that_of_a_fine_image(rng):
    spacing = 0.2
    fine = [elliptical_image((251, 251), (125, 125), np.array(c) / spacing**2) for c in (NARROW, WIDE)]
    ky, kx = rng.uniform(-0.5, 0.5, 9), rng.uniform(-0.5, 0.5, 7)
    image = 0.6 * fine[0] + 0.4 * fine[1]
    reference = spectrum_sum(image, *np.meshgrid(ky, kx, indexing="ij"), (125, 125), spacing)
    # 1e-8: what is cut off at the band limit; the wings outside the image hold less.
    np.testing.assert_allclose(PAIR[False].transfer(ky, kx, np.eye(2))[0], reference, rtol=0, atol=1e-8)


def test_drawn_image_has_the_transfer_of_the_psf(rng, integrate_pixel):
    psf = PAIR[integrate_pixel]
    k = rng.uniform(-0.2, 0.2, 8)
    drawn = spectrum_sum(psf.image((61, 61))[0], *np.meshgrid(k, k, indexing="ij"), (30, 30))
    # 1e-5: the quadrature inside the pixels; aliases are below exp(-2 pi^2 0.8^2 1.8).
    np.testing.assert_allclose(psf.transfer(k, k, np.eye(2))[0], drawn, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(33, 29), (24, 30)])
def test_drawn_image_is_that_of_galsim(galsim, integrate_pixel, shape):
    drawn, reference = PAIR[integrate_pixel].image(shape)[0], draw(pair_profile(galsim), shape, integrate_pixel)
    # 2e-5 of the peak: the accuracy of both drawings.
    np.testing.assert_allclose(drawn, reference, rtol=0, atol=2e-5 * reference.max())


@pytest.mark.parametrize("sigma", [0.001, 0.05, 0.1, 0.2, 0.4, 1.5])
@pytest.mark.parametrize("shape", [(5, 7), (4, 7)])
def test_round_gaussians_are_integrated_over_pixels(sigma, shape):
    image = GaussianMixturePSF([1.0], [sigma**2 * np.eye(2)], integrate_pixel=True).image(shape)[0]
    edges = [np.arange(n + 1) - n / 2 for n in shape]
    rows, columns = (np.diff(scipy.special.ndtr(edge / sigma)) for edge in edges)
    # 2e-5: the quadrature, 1e-5 in each direction.
    np.testing.assert_allclose(image, np.outer(rows, columns), rtol=0, atol=2e-5)


def test_one_round_component_is_a_gaussian_psf(rng, integrate_pixel):
    sigma = np.array([1.3, 2.0])
    one = GaussianMixturePSF(
        [[1.0], [1.0]], (sigma**2)[:, None, None, None] * np.eye(2), integrate_pixel=integrate_pixel
    )
    reference = GaussianPSF(sigma, integrate_pixel=integrate_pixel)
    ky, kx = rng.uniform(-0.6, 0.6, 9), rng.uniform(-0.6, 0.6, 8)
    affine = np.array([[1.2, 0.3], [-0.1, 0.9]])
    # 1e-12: rounding.
    np.testing.assert_allclose(one.transfer(ky, kx, affine), reference.transfer(ky, kx, affine), rtol=0, atol=1e-12)
    assert one.band_limit == pytest.approx(reference.band_limit, rel=1e-12)
    assert one.num_channels == reference.num_channels == 2
    assert one.size == reference.size == 0
    # 1 %: the GaussianPSF takes the pixel for a Gaussian here.
    np.testing.assert_allclose(one.effective_sigma, reference.effective_sigma, rtol=1e-2 if integrate_pixel else 1e-12)
    assert one.extent == pytest.approx(reference.extent, rel=1e-2 if integrate_pixel else 1e-9)


def test_nothing_is_lost_beyond_the_band_limit():
    weights = np.array([[0.001, 0.6, 0.399]])
    covariances = np.array([[[[0.1, 0.0], [0.0, 0.2]], NARROW, [[40.0, 39.0], [39.0, 40.0]]]])
    psf = GaussianMixturePSF(weights, covariances)
    edge = np.linspace(-1, 1, 2001)
    along, across = np.full_like(edge, 1.0), edge
    rim = psf.band_limit * np.concatenate([np.stack([along, across]), np.stack([across, along])], axis=1)
    exponent = np.einsum("an,gab,bn->gn", rim, covariances[0], rim)
    largest = (weights[0] @ np.exp(-2 * np.pi**2 * exponent)).max()
    # Between the limit and a fifth of it: components that share the limit aren't all at their largest together.
    assert 2e-9 < largest <= 1e-8


def test_extent_leaves_only_faint_pixels_outside(integrate_pixel):
    psf = PAIR[integrate_pixel]
    image = psf.image((61, 61))[0]
    radius = np.hypot(*np.mgrid[-30:31, -30:31])
    brightest = np.array([image[radius > limit].max() for limit in (psf.extent, 0.9 * psf.extent)]) / image.max()
    assert brightest[0] <= EXTENT_TOLERANCE < brightest[1]


def test_effective_sigma_gives_the_peak(galsim, integrate_pixel):
    peak = draw(pair_profile(galsim), (31, 31), integrate_pixel).max()
    # 1e-5: the accuracy of both drawings.
    np.testing.assert_allclose(PAIR[integrate_pixel].effective_sigma, np.sqrt(1 / (2 * np.pi * peak)), rtol=1e-5)


def test_weights_are_shares(rng):
    psf = GaussianMixturePSF([[3.0, 2.0], [0.0, 5.0]], [[NARROW, WIDE], [ROUND, WIDE]])
    weights, covariances = psf.components
    # 1e-15: rounding.
    np.testing.assert_allclose(weights, [[0.6, 0.4], [0.0, 1.0]], rtol=1e-15)
    np.testing.assert_array_equal(covariances, [[NARROW, WIDE], [ROUND, WIDE]])
    assert psf.residual is None
    k = rng.uniform(-0.5, 0.5, 5)
    # 1e-8: the limits differ, and cut there.
    np.testing.assert_allclose(
        psf.transfer(k, k, np.eye(2))[0], PAIR[False].transfer(k, k, np.eye(2))[0], rtol=0, atol=1e-8
    )


def test_a_component_without_weight_counts_for_nothing():
    psf = GaussianMixturePSF([1.0, 0.0, 0.0], [NARROW, 1e-4 * np.eye(2), 1e4 * np.eye(2)])
    alone = GaussianMixturePSF([1.0], [NARROW])
    assert psf.band_limit == alone.band_limit
    # 1e-9: the root finder's tolerance.
    assert psf.extent == pytest.approx(alone.extent, rel=1e-9)
    np.testing.assert_array_equal(psf.effective_sigma, alone.effective_sigma)


def test_covariances_are_in_pixels():
    np.testing.assert_array_equal(GaussianMixturePSF([1.0], [NARROW] * u.pix**2).covariances, [[NARROW]])
    with pytest.raises(ValueError, match=r"covariances of a GaussianMixturePSF must be in pix2 or a unit"):
        GaussianMixturePSF([1.0], [NARROW] * u.arcsec**2)


@pytest.mark.parametrize("size", [31, 63])
@pytest.mark.parametrize("name", ["moffat", "kolmogorov"])
def test_fit_of_seeing(galsim, integrate_pixel, name, size):
    profile = {"moffat": galsim.Moffat(beta=3, fwhm=4), "kolmogorov": galsim.Kolmogorov(fwhm=4)}[name]
    image = draw(profile, (size, size), integrate_pixel, offset=(0.3, -0.2))
    psf = GaussianMixturePSF.fit(image, integrate_pixel=integrate_pixel)
    assert psf.residual[0] < RESIDUAL_TARGET
    assert psf.weights.shape[1] <= 5
    model, truth = psf.image((15, 15))[0], draw(profile, (15, 15), integrate_pixel)
    # 1e-3 of the peak: in shape the core is described to the residual.
    np.testing.assert_allclose(model / model.sum(), truth / truth.sum(), rtol=0, atol=1e-3 * truth.max())
    # The core holds its share of the flux, but for the light outside the image, and wings below the residual (2e-3).
    assert model.sum() == pytest.approx(truth.sum(), abs=(1 - image.sum()) + 2e-3)


@pytest.mark.parametrize("oversampling", [1, 3])
@pytest.mark.parametrize("round", [False, True], ids=["elliptical", "round"])
def test_fit_recovers_a_gaussian(galsim, integrate_pixel, oversampling, round):
    covariance = 1.7 * np.eye(2) if round else np.array([[1.2, 0.4], [0.4, 1.9]])
    profile = gaussian_profile(galsim, covariance)
    if integrate_pixel:
        profile = galsim.Convolve(profile, galsim.Pixel(1.0))
    image = draw(profile, (15 * oversampling, 17 * oversampling), offset=(0.4, -1.3), scale=1 / oversampling)
    psf = GaussianMixturePSF.fit(1e4 * image, integrate_pixel=integrate_pixel, oversampling=oversampling, round=round)
    np.testing.assert_array_equal(psf.weights, [[1.0]])
    # 1e-3: the accuracy of GalSim's convolution, 1e-4 of the peak or so.
    np.testing.assert_allclose(psf.covariances[0, 0], covariance, rtol=0, atol=1e-3)
    assert psf.integrate_pixel is integrate_pixel


def test_round_components_stay_round():
    image = elliptical_image((31, 31), (15, 15), [[2.0, 0.0], [0.0, 5.0]])
    with pytest.warns(UserWarning, match="differs from the PSF image"):
        covariances = GaussianMixturePSF.fit(image, 2, round=True).covariances
    np.testing.assert_array_equal(covariances, covariances[..., :1, :1] * np.eye(2))


def test_fit_recovers_a_sum_of_two(galsim, integrate_pixel):
    image = draw(pair_profile(galsim), (31, 31), integrate_pixel, offset=(-0.2, 0.4))
    psf = GaussianMixturePSF.fit(image, integrate_pixel=integrate_pixel)
    # 1 %: the components overlap, so that GalSim's errors of 1e-5 of the peak grow a hundred times.
    np.testing.assert_allclose(psf.weights[0], [0.6, 0.4], rtol=1e-2)
    np.testing.assert_allclose(psf.covariances[0], [NARROW, WIDE], rtol=1e-2, atol=0.01)
    assert psf.residual[0] < RESIDUAL_TARGET


def test_noise_adds_no_components(rng):
    sigma, noise = 1.7, 2e-3
    clean = gaussian_image((41, 41), (20.2, 19.7), sigma)
    psf = GaussianMixturePSF.fit(clean + rng.normal(0, noise * clean.max(), clean.shape))
    assert psf.weights.shape == (1, 1)
    # Five standard errors of a variance: 2 noise / (sigma sqrt(pi)) of it for the width, sqrt(2) more for one axis.
    error = sigma**2 * np.sqrt(2) * 2 * noise / (sigma * np.sqrt(np.pi))
    np.testing.assert_allclose(psf.covariances[0, 0], sigma**2 * np.eye(2), rtol=0, atol=5 * error)
    # The largest of 1681 normal deviates.
    assert 3 * noise < psf.residual[0] < 5 * noise


def test_noisy_seeing(galsim, rng):
    profile, noise = galsim.Moffat(beta=3, fwhm=4), 2e-3
    image = draw(profile, (41, 41))
    psf = GaussianMixturePSF.fit(image + rng.normal(0, noise * image.max(), image.shape))
    assert psf.weights.shape[1] < 5
    # 1 % of the peak: the wings' flux has an error of that order, noise / peak times pixels under the wings.
    assert np.abs(psf.image((41, 41))[0] - image).max() < 1e-2 * image.max()


@pytest.mark.parametrize("name", ["moffat", "airy", "ring"])
def test_residual_is_the_largest_difference(galsim, integrate_pixel, name):
    image = {
        "moffat": draw(galsim.Moffat(beta=3, fwhm=4), (31, 31), integrate_pixel),
        "airy": draw(galsim.Airy(lam_over_diam=3.0), (31, 31), integrate_pixel),
        "ring": ring_image(),
    }[name]
    fit = GaussianMixturePSF.fit
    if name == "moffat":
        psf = fit(image, 3, integrate_pixel=integrate_pixel)
    else:
        with pytest.warns(UserWarning, match=r"differs from the PSF image by up to"):
            psf = fit(image, 1, integrate_pixel=integrate_pixel)
    model = psf.image(image.shape)[0]
    difference = image - model * (image * model).sum() / (model * model).sum()
    # 1e-3: the fitted centre is the middle to about 1e-5 pixels.
    assert psf.residual[0] == pytest.approx(np.abs(difference).max() / image.max(), rel=1e-3)


def test_what_no_mixture_describes_is_reported():
    images = np.stack([gaussian_image((31, 31), (15, 15), 2.0), ring_image(), ring_image(radius=8.0)])
    with pytest.warns(UserWarning, match="PSF image by up to") as caught:
        psf = GaussianMixturePSF.fit(images)
    assert psf.residual[0] < RESIDUAL_TARGET
    assert (psf.residual[1:] > RESIDUAL_LIMIT).all()
    message = str(caught[0].message)
    figures = [f"{100 * psf.residual[c]:.2g} % of the peak in channel {c}" for c in (1, 2)]
    assert f"by up to {', '.join(figures)} (limit 2 %)" in message
    assert "channel 0" not in message
    assert "num_components=" in message
    assert "ImagePSF(image)" in message


def test_more_components_fit_better(galsim):
    image = draw(galsim.Moffat(beta=3, fwhm=4), (31, 31))
    with pytest.warns(UserWarning, match="by up to 9 % of the peak in channel 0"):
        found = [GaussianMixturePSF.fit(image, n) for n in (1, 2, 3, 4)]
    assert [psf.weights.shape[1] for psf in found] == [1, 2, 3, 4]
    residual = np.array([psf.residual[0] for psf in found])
    # Each component more makes the residual of a Moffat profile 5 times smaller or so.
    assert (residual[1:] < 0.3 * residual[:-1]).all()


@pytest.mark.parametrize("shape", [(31, 31), (30, 33)])
@pytest.mark.parametrize("offset", [(2.3, -1.6), (-4.5, 0.0)])
def test_the_centre_is_taken_out(galsim, integrate_pixel, shape, offset, rng):
    profile = galsim.Moffat(beta=4, fwhm=3.5)
    fits = [
        GaussianMixturePSF.fit(draw(profile, shape, integrate_pixel, offset=each), integrate_pixel=integrate_pixel)
        for each in (offset, (0.0, 0.0))
    ]
    k = rng.uniform(-0.4, 0.4, 10)
    moved, centered = (psf.transfer(k, k, np.eye(2)) for psf in fits)
    # 3e-3: other parts of the wings are on the image.
    np.testing.assert_allclose(moved, centered, rtol=0, atol=3e-3)


def test_a_star_on_the_corner():
    psf = GaussianMixturePSF.fit(gaussian_image((15, 15), (0, 0), 1.5))
    # 1e-6: where the least-squares steps end.
    np.testing.assert_allclose(psf.covariances, [[1.5**2 * np.eye(2)]], rtol=0, atol=1e-6)
    pixel = np.zeros((9, 9))
    pixel[0, 0] = 1.0
    with pytest.warns(UserWarning, match="integrate_pixel=True if the image is undersampled"):
        narrow = GaussianMixturePSF.fit(pixel)
    assert np.isfinite(narrow.residual).all()


def test_channels_are_fitted_on_their_own(galsim):
    images = [gaussian_image((31, 31), (14.3, 15.1), 1.5), draw(galsim.Moffat(beta=3, fwhm=4), (31, 31))]
    both = GaussianMixturePSF.fit(np.stack(images))
    alone = [GaussianMixturePSF.fit(image) for image in images]
    assert [psf.num_channels for psf in (both, *alone)] == [2, 1, 1]
    for c, psf in enumerate(alone):
        count = psf.weights.shape[1]
        np.testing.assert_array_equal(both.weights[c, :count], psf.weights[0])
        np.testing.assert_array_equal(both.weights[c, count:], 0)
        np.testing.assert_array_equal(both.covariances[c, :count], psf.covariances[0])
        np.testing.assert_array_equal(both.residual[c], psf.residual[0])
    assert both.weights.shape[1] > alone[0].weights.shape[1] == 1
    assert both.band_limit == max(psf.band_limit for psf in alone)


def test_fit_is_deterministic(rng):
    image = gaussian_image((21, 21), (10, 10), 1.5) + rng.normal(0, 2e-4, (21, 21))
    assert eqx.tree_equal(*(GaussianMixturePSF.fit(image, 3) for _ in range(2)))


def test_small_and_scaled_images():
    small = gaussian_image((5, 5), (2, 2), 0.8)
    fits = [GaussianMixturePSF.fit(scale * small, 1) for scale in (1e-12, 1.0, 1e12)]
    for psf in fits:
        # 1e-6: where the least-squares steps end.
        np.testing.assert_allclose(psf.covariances[0, 0], 0.64 * np.eye(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fitted", [False, True])
def test_saving_and_loading(tmp_path, fitted):
    images = np.stack([gaussian_image((15, 15), (7, 7), s) for s in (1.1, 1.4)])
    psf = GaussianMixturePSF.fit(images, 2, integrate_pixel=True) if fitted else PAIR[False]
    observation = Observation(np.ones((2, 16, 18)), weights=1.0, psf=psf, channels=["g", "r"])
    save(tmp_path / "file.asdf", (psf, observation))
    loaded, seen = load(tmp_path / "file.asdf")
    assert eqx.tree_equal(loaded, psf)
    assert eqx.tree_equal(seen.psf, psf)
    assert (loaded.residual is None) is not fitted


INDEFINITE = [[1.0, 2.0], [2.0, 1.0]]
BAD_MIXTURES = {
    "axes": (([[[1.0]]], [NARROW]), r"weights \(channel, component\) and .* got weights \(1, 1, 1\)"),
    "empty": (([], np.zeros((0, 2, 2))), r"got weights \(0,\), covariances \(0, 2, 2\)"),
    "components": (([0.5, 0.5], [NARROW]), r"got weights \(2,\), covariances \(1, 2, 2\)"),
    "channels": (([[1.0], [1.0]], [[NARROW]]), r"got weights \(2, 1\), covariances \(1, 1, 2, 2\)"),
    "one channel axis": (([[1.0]], [NARROW]), r"got weights \(1, 1\), covariances \(1, 2, 2\)"),
    "negative weight": (([1.5, -0.5], [NARROW, WIDE]), "weights of a GaussianMixturePSF are >= 0, some"),
    "no weight": (([[1.0], [0.0]], [[NARROW], [NARROW]]), "some of each channel > 0"),
    "NaN weight": (([np.nan, 1.0], [NARROW, WIDE]), "weights of a GaussianMixturePSF are >= 0"),
    "indefinite": (([1.0], [INDEFINITE]), "must be symmetric and positive definite; got"),
    "negative": (([1.0], [-np.eye(2)]), "must be symmetric and positive definite"),
    "asymmetric": (([1.0], [[[1.0, 0.5], [0.0, 1.0]]]), "must be symmetric and positive definite"),
    "infinite": (([1.0], [[[np.inf, 0.0], [0.0, 1.0]]]), "must be symmetric and positive definite"),
    "NaN": (([1.0], [[[np.nan, 0.0], [0.0, 1.0]]]), "must be symmetric and positive definite"),
}


@pytest.mark.parametrize("case", BAD_MIXTURES)
def test_bad_mixtures_are_refused(case):
    arguments, message = BAD_MIXTURES[case]
    with pytest.raises(ValueError, match=message):
        GaussianMixturePSF(*arguments)


def test_residuals_are_one_per_channel():
    with pytest.raises(ValueError, match=r"residual must have shape \(1,\), one per channel; got \[0.1, 0.2\]"):
        GaussianMixturePSF([1.0], [NARROW], residual=[0.1, 0.2])


STAR = gaussian_image((9, 9), (4, 4), 1.2)
BAD_FITS = {
    "axes": (np.ones(5), {}, r"shape \(y, x\) or \(channel, y, x\); got \(5,\)"),
    "NaN": (np.stack([STAR, STAR * np.nan]), {}, r"must be finite; channel\(s\) \[1\]"),
    "negative": (-STAR, {}, "positive sum in every channel"),
    "small": (np.ones((2, 3)), {}, r"at least 3 x 3 samples; got shape \(2, 3\)"),
    "no component": (STAR, {"num_components": 0}, "'auto' or an integer of at least 1; got 0"),
    "a word": (STAR, {"num_components": "many"}, "'auto' or an integer of at least 1; got 'many'"),
    "a fraction": (STAR, {"num_components": 1.5}, "'auto' or an integer of at least 1; got 1.5"),
    "undersampled": (STAR, {"oversampling": 0.5}, "oversampling must be at least 1"),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("case", BAD_FITS)
def test_bad_fits_are_refused(case):
    image, options, message = BAD_FITS[case]
    with pytest.raises(ValueError, match=message):
        GaussianMixturePSF.fit(image, **options)
