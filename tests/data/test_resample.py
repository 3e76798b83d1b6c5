import astropy.units as u
import galsim
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS

from scenefit.data.observation import Observation
from scenefit.data.resample import MASK_TOLERANCE, Resampling
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF, ImagePSF
from scenefit.sky.resampledpsf import ResampledPSF, kernel_transform, kernel_widths
from tests.helpers import gaussian_image, tangent_header, tangent_wcs, with_sip, with_tpv

SCALE = 0.2
SHAPE = (30, 32)
NATIVE = tangent_wcs(SHAPE, SCALE)
DISTORTED = WCS(with_sip(tangent_header(SHAPE, SCALE), 1e-3))

# name: native WCS, and shape, pixel scale and options of the target
GRIDS = {
    "shift": (NATIVE, (30, 32), 1.0, {"offset": (0.3, -0.45)}),
    "rotation": (NATIVE, (24, 25), 1.0, {"rotation_deg": 23, "offset": (0.3, 0.2)}),
    "finer": (NATIVE, (96, 90), 1 / 5.6, {"rotation_deg": 23, "flip": (True, False)}),
    "coarser": (NATIVE, (12, 13), 2.5, {"rotation_deg": 23}),
    "SIP": (DISTORTED, (24, 25), 0.9, {"rotation_deg": 10, "offset": (0.3, 0.2)}),
    "TPV": (WCS(with_tpv(tangent_header(SHAPE, SCALE), 30.0)), (24, 25), 0.9, {"offset": (0.3, 0.2)}),
}


def target(name):
    """Return native WCS, target WCS and target shape."""
    native, shape, ratio, options = GRIDS[name]
    return native, tangent_wcs(shape, ratio * SCALE, **options), shape


def resampling(name, order=3):
    native, wcs, shape = target(name)
    return Resampling.between(native, SHAPE, wcs, shape, order)


def dense(resample, valid):
    """The linear map of one channel, column by column: each native pixel resampled by itself."""
    units = np.eye(np.prod(SHAPE)).reshape(-1, *SHAPE)
    planes, usable = resample.apply(units, np.broadcast_to(valid, units.shape))
    return planes.reshape(len(units), -1).T, usable[0].ravel()


def sky_place(wcs, y, x, other):
    """Where a pixel lies on another grid, (y, x), by way of a SkyCoord."""
    x, y = other.world_to_pixel(wcs.pixel_to_world(x, y))
    return np.array([float(y), float(x)])


def weights_by_hand(name, y, x, order):
    """Share of every native pixel in one target pixel, (y, x), from the definition."""
    native, wcs, shape = target(name)
    place = sky_place(wcs, y, x, native)
    corners = [
        sky_place(wcs, y + dy, x + dx, native) for dy, dx in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
    ]
    shoelace = [a[0] * b[1] - a[1] * b[0] for a, b in zip(corners, corners[1:] + corners[:1], strict=True)]
    middle = (shape[0] - 1) / 2, (shape[1] - 1) / 2
    weight = []
    for axis in (0, 1):
        slope = [
            (
                sky_place(wcs, middle[0] + dy, middle[1] + dx, native)
                - sky_place(wcs, middle[0] - dy, middle[1] - dx, native)
            )[axis]
            for dy, dx in ((0.5, 0), (0, 0.5))
        ]
        width = max(1.0, np.hypot(*slope))
        distance = (place[axis] - np.arange(-40, SHAPE[axis] + 40)) / width
        kernel = np.sinc(distance) * np.sinc(distance / order) * (np.abs(distance) < order)
        weight.append(kernel[40:-40] / kernel.sum())
    return abs(sum(shoelace)) / 2 * np.outer(*weight)


@pytest.mark.parametrize("order", [2, 5])
@pytest.mark.parametrize("name", GRIDS)
def test_weights_are_those_of_the_definition(name, order):
    resample = resampling(name, order)
    shape = resample.shape
    # Near the middle, away from it, and where the kernel reaches over the edge.
    for y, x in ((shape[0] // 2, shape[1] // 2), (shape[0] // 2 - 3, shape[1] // 2 + 2), (0, 1)):
        j = y * shape[1] + x
        found = np.zeros(SHAPE)
        np.add.at(found.reshape(-1), resample.index[j], resample.weight[j])
        expected = weights_by_hand(name, y, x, order)
        # 1e-4 of an area: the middle of the overlap, where the width is taken, isn't quite that of the target.
        np.testing.assert_allclose(found, expected, atol=1e-4 * resample.area[j] if "coarser" in name else 1e-6)


@pytest.mark.parametrize("order", [3, 5])
@pytest.mark.parametrize("name", ["shift", "rotation", "finer"])
def test_resampling_is_that_of_galsim(name, order, rng):
    """Its interpolation of an image, drawn with the affine map of the two WCS."""
    resample = resampling(name, order)
    native, wcs, shape = target(name)
    plane = rng.normal(size=SHAPE)
    image = galsim.Image(plane.copy(), scale=1.0)
    kernel = galsim.Lanczos(order, conserve_dc=True)
    profile = galsim.InterpolatedImage(image, x_interpolant=kernel, normalization="flux")
    (yy, yx), (xy, xx) = np.linalg.inv(resample.affine)
    shift = sky_place(wcs, (shape[0] - 1) / 2, (shape[1] - 1) / 2, native) - (np.array(SHAPE) - 1) / 2
    canvas = galsim.ImageD(shape[1], shape[0], wcs=galsim.AffineTransform(xx, xy, yx, yy))
    expected = profile.shift(-shift[1], -shift[0]).drawImage(image=canvas, method="no_pixel").array
    planes, usable = resample.apply(plane[None])
    whole = resample.coverage.reshape(shape) == 1
    assert whole.sum() > 100
    assert usable[0][whole].all()
    # 3e-5 of a pixel's area: GalSim normalises by a few terms of a Fourier series, to 2e-6 at each of some ten places along
    # the axes, with values of unit variance.
    np.testing.assert_allclose(planes[0][whole], expected[whole], atol=3e-5 * resample.area.max())


def largest_flux_error(affine, order, sigma):
    """What the kernel passes of a Gaussian source and its replicas at whole numbers of cycles per target pixel."""
    whole = np.stack(np.meshgrid(*2 * [np.arange(-6.0, 7.0)], indexing="ij")).reshape(2, -1)
    q = affine.T @ whole[:, np.abs(whole).sum(axis=0) > 0]
    passed = np.ones(q.shape[1])
    for each, width in zip(q, kernel_widths(affine), strict=True):
        light = np.exp(-2 * np.pi**2 * sigma**2 * (each[:, None] - np.arange(-60, 61)) ** 2).sum(axis=1)
        passed *= np.abs(kernel_transform(each, order, width)) * light
    return passed.sum()


@pytest.mark.parametrize("order", [3, 5])
@pytest.mark.parametrize("name", GRIDS)
def test_the_flux_of_a_compact_source_is_conserved(name, order):
    sigma = 1.3
    _, _, ratio, options = GRIDS[name]
    header = tangent_header((100, 100), SCALE)
    native = WCS({"SIP": with_sip(header, 1e-3), "TPV": with_tpv(header, 30.0)}.get(name, header))
    shape = (int(48 / ratio), int(50 / ratio))
    resample = Resampling.between(native, (100, 100), tangent_wcs(shape, ratio * SCALE, **options), shape, order)
    plane = gaussian_image((100, 100), (49.2, 50.1), sigma)
    planes, usable = resample.apply(plane[None])
    assert usable.all()
    # 1e-6: rounding of the WCS, and the edge of the source.
    largest = largest_flux_error(resample.affine, order, sigma) + 1e-6
    error = abs(planes.sum() / plane.sum() - 1)
    assert error < largest
    # As stated in the docstring of Resampling.
    assert error < {3: 2e-3, 5: 4e-4}[order]


@pytest.mark.parametrize("name", GRIDS)
def test_a_constant_surface_brightness_stays_constant(name):
    """Also over masked pixels that are tolerated, and near the edge."""
    shape = GRIDS[name][1]
    resample = resampling(name)
    valid = np.ones((1, *SHAPE), bool)
    valid[0, 10, 10] = False
    planes, usable = resample.apply(np.full((1, *SHAPE), 3.0), valid)
    area = resample.area.reshape(shape)
    assert 0 < usable.sum() < usable.size
    # 1e-12: rounding.
    np.testing.assert_allclose(planes[usable], 3 * area[usable[0]], rtol=1e-12)
    assert (planes[~usable] == 0).all()
    if name not in ("SIP", "TPV"):
        # 1e-6: the tangent plane over arcseconds.
        np.testing.assert_allclose(area[usable[0]], GRIDS[name][2] ** 2, rtol=1e-6)


def test_areas_follow_the_distortion():
    native, wcs, _ = target("SIP")
    resample = resampling("SIP")
    step = 1e-3
    areas = []
    for y, x in ((12, 12), (3, 20)):
        dy = (sky_place(wcs, y + step, x, native) - sky_place(wcs, y - step, x, native)) / (2 * step)
        dx = (sky_place(wcs, y, x + step, native) - sky_place(wcs, y, x - step, native)) / (2 * step)
        areas.append(abs(dy[0] * dx[1] - dy[1] * dx[0]))
        # 1e-5: the area of a quadrilateral differs from the local slope by third derivatives, a few times 1e-3 squared.
        assert resample.area[y * 25 + x] == pytest.approx(areas[-1], rel=1e-5)
    assert abs(areas[0] / areas[1] - 1) > 0.01


def test_pixels_that_coincide_are_copied(rng):
    planes, valid = rng.normal(size=(2, *SHAPE)), rng.random((2, *SHAPE)) > 0.2
    for resample in (Resampling.between(None, SHAPE, None, SHAPE), Resampling.between(NATIVE, SHAPE, NATIVE, SHAPE)):
        copied, usable = resample.apply(np.where(valid, planes, np.nan))
        # A masked pixel spoils no other, and there is no edge. 1e-6: WCS there and back.
        np.testing.assert_array_equal(usable, valid)
        np.testing.assert_allclose(copied[valid], planes[valid], atol=1e-6)
        np.testing.assert_allclose(resample.affine, np.eye(2), atol=1e-7)


def test_without_wcs_only_the_shapes_differ(rng):
    plane = rng.normal(size=(1, *SHAPE))
    smaller, usable = Resampling.between(None, SHAPE, None, (20, 40)).apply(plane)
    np.testing.assert_allclose(smaller[0, :, :32], plane[0, :20], atol=1e-14)
    assert usable[0, :, :32].all()
    assert not usable[0, :, 32:].any()


@pytest.mark.parametrize("name", ["rotation", "coarser"])
def test_coverage_is_the_part_of_the_kernel_on_the_image(name):
    _, wcs, shape = target(name)
    larger = tangent_wcs((60, 62), SCALE)
    whole = Resampling.between(larger, (60, 62), wcs, shape)
    cut = resampling(name)
    # The native image is the middle of a larger one.
    y, x = np.divmod(whole.index, 62)
    inside = (y >= 15) & (y < 45) & (x >= 15) & (x < 47)
    size = np.abs(whole.weight)
    expected = (size * inside).sum(axis=1) / size.sum(axis=1)
    # 1e-9: the WCS, through which positions pass.
    np.testing.assert_allclose(cut.coverage, expected, atol=1e-9)
    assert cut.coverage.min() < 1
    assert cut.coverage.max() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", ["rotation", "coarser"])
def test_masked_pixels_spoil_what_they_weigh_in(name, rng):
    resample = resampling(name)
    valid = rng.random((2, *SHAPE)) > 0.003
    planes = rng.normal(size=valid.shape)
    full = [np.zeros((len(resample.area), np.prod(SHAPE))) for _ in range(2)]
    for matrix in full:
        np.add.at(matrix, (np.arange(len(matrix))[:, None], resample.index), resample.weight)
    result, usable = resample.apply(np.where(valid, planes, np.nan))
    for c in range(2):
        size = np.abs(full[c])
        kept = resample.coverage * (size @ valid[c].ravel()) / np.maximum(size.sum(axis=1), 1e-300)
        np.testing.assert_array_equal(usable[c].ravel(), kept >= 1 - MASK_TOLERANCE)
        left = full[c] * valid[c].ravel()
        expected = resample.area * (left @ np.nan_to_num(planes[c]).ravel()) / left.sum(axis=1)
        good = usable[c].ravel()
        # 1e-12: rounding.
        np.testing.assert_allclose(result[c].ravel()[good], expected[good], atol=1e-12)
    # Some pixels with a masked one under the kernel's faint parts are kept.
    touched = (full[0] != 0) @ ~valid[0].ravel()
    assert (usable[0].ravel() & touched).any()


def test_what_is_masked_does_not_matter(rng):
    resample = resampling("rotation")
    valid = rng.random((1, *SHAPE)) > 0.003
    one = rng.normal(size=valid.shape)
    for value in (np.nan, np.inf, 1e30):
        planes, usable = resample.apply(np.where(valid, one, value), valid)
        np.testing.assert_array_equal(planes, resample.apply(np.where(valid, one, 0.0), valid)[0])
        assert usable.any()


def test_channels_have_their_own_masks(rng):
    resample = resampling("rotation")
    valid = rng.random((3, *SHAPE)) > 0.01
    valid[1] = valid[0]
    planes = rng.normal(size=valid.shape)
    together, usable = resample.apply(planes, valid)
    rows = resample.rows(valid)
    assert rows[0].weight is rows[1].weight
    for c in range(3):
        alone, good = resample.apply(planes[c : c + 1], valid[c : c + 1])
        np.testing.assert_array_equal(together[c], alone[0])
        np.testing.assert_array_equal(usable[c], good[0])
    assert (usable[2] != usable[0]).any()


@pytest.mark.parametrize("name", ["rotation", "coarser"])
def test_variance_and_covariance_are_those_of_the_dense_map(name, rng):
    resample = resampling(name)
    valid = rng.random((1, *SHAPE)) > 0.003
    matrix, usable = dense(resample, valid)
    variance = rng.uniform(0.5, 2.0, (1, *SHAPE))
    expected = matrix @ np.diag(variance.ravel()) @ matrix.T
    (rows,) = resample.rows(valid)
    np.testing.assert_array_equal(rows.usable, usable)
    sparse = resample.matrix(rows)
    # 1e-13: rounding.
    np.testing.assert_allclose(sparse.toarray(), matrix, atol=1e-13)
    by_hand = sparse.multiply(variance.ravel()) @ sparse.T
    np.testing.assert_allclose(by_hand.toarray(), expected, atol=1e-12)
    found = resample.variance(np.where(valid, variance, np.inf))[0].ravel()
    np.testing.assert_array_equal(found, resample.variance(variance, valid)[0].ravel())
    np.testing.assert_allclose(found[usable], np.diag(expected)[usable], rtol=1e-12)
    assert np.isinf(found[~usable]).all()


def test_the_noise_of_draws_has_that_covariance(rng):
    resample = resampling("rotation")
    sigma = rng.uniform(0.5, 2.0, SHAPE)
    count = 4000
    draws, usable = resample.apply(sigma * rng.normal(size=(count, *SHAPE)))
    expected = resample.variance(sigma[None] ** 2)[0]
    good = usable[0]
    pulls = (draws[:, good].var(axis=0) / expected[good] - 1) / np.sqrt(2 / count)
    # Neighbours are correlated, so the mean and width of the pulls are those of fewer: 0.3 is five standard errors of 300.
    assert abs(pulls.mean()) < 0.3
    assert pulls.std() == pytest.approx(1.0, abs=0.25)
    (rows,) = resample.rows(np.ones((1, *SHAPE), bool))
    matrix = resample.matrix(rows)
    covariance = (matrix.multiply(sigma.ravel() ** 2) @ matrix.T).toarray().reshape(24, 25, 24, 25)
    pairs = (draws[:, 12, 12, None] * draws[:, 12, 11:15]).mean(axis=0)
    # Five standard errors of a product of two unit normals.
    np.testing.assert_allclose(pairs, covariance[12, 12, 12, 11:15], atol=5 * expected[good].max() / np.sqrt(count))


FRAME = Frame((144, 144), channels=["g", "r"], wcs=tangent_wcs((144, 144), SCALE / 4), padding=48)


def star(y, x):
    """The model image of a point source, seen through the model PSF."""
    return gaussian_image(FRAME.box.shape, (y, x), FRAME.psf.sigma[0])


@pytest.mark.parametrize(
    ("order", "ratio", "percent"),
    [
        # The replicas that are left of stars of FWHM 4 and 2.5 pixels: see ResampledPSF.
        (3, 0.5, (0.40, 0.82)),
        (5, 0.5, (0.14, 0.33)),
        (3, 2.5, (0.02, 0.02)),
    ],
)
def test_a_resampled_rendering_is_a_rendering_with_the_resampled_psf(order, ratio, percent):
    fwhm = np.array([4.0, 2.5])
    native_psf = GaussianPSF(fwhm / np.sqrt(8 * np.log(2)))
    model = np.stack([star(60.3, 61.1) + 0.5 * star(80.9, 88.4)] * 2)
    shape = (36, 36)
    native = Observation(
        np.zeros((2, *shape)), sigma=1.0, psf=native_psf, wcs=tangent_wcs(shape, SCALE), channels=["g", "r"]
    )
    count = int(22 / ratio)
    wcs = tangent_wcs((count, count), ratio * SCALE, rotation_deg=23)
    resample = Resampling.between(native.wcs, shape, wcs, (count, count), order)
    planes, usable = resample.apply(native.match(FRAME).render(model))
    psf = resample.resampled_psf(native_psf)
    assert isinstance(psf, ResampledPSF)

    def error(psf):
        obs = Observation(planes, sigma=1.0, psf=psf, wcs=wcs, channels=["g", "r"]).match(FRAME)
        image = obs.render(model)
        return np.array(
            [100 * np.abs((p - i)[ok]).max() / i.max() for p, i, ok in zip(planes, image, usable, strict=True)]
        )

    # Half as much again: those of the other star.
    assert (error(psf) < 1.5 * np.array(percent)).all()
    if ratio > 1:
        # The native PSF alone isn't that of the averaged pixels.
        assert (error(GaussianPSF(native_psf.sigma / ratio)) > 100 * np.array(percent)).all()


def test_the_resampled_psf_of_an_image():
    psf = resampling("rotation").resampled_psf(gaussian_image((15, 15), (7, 7), 1.4))
    assert isinstance(psf.psf, ImagePSF)
    # Turned by 23 degrees about the middle, the scales agree.
    np.testing.assert_allclose(psf.affine @ psf.affine.T, np.eye(2), atol=1e-6)
    assert psf.affine[0, 1] == pytest.approx(-psf.affine[1, 0], abs=1e-6)
    assert abs(psf.affine[0, 1]) == pytest.approx(np.sin(np.deg2rad(23)), abs=1e-6)


def test_a_sky_position_stays_where_it_is():
    """The affine map and the positions have the same sense: a star keeps its place on the sky."""
    place = SkyCoord(*NATIVE.pixel_to_world_values(17.0, 12.0), unit=u.deg)
    _, wcs, shape = target("finer")
    planes, _ = resampling("finer").apply(gaussian_image(SHAPE, (12.0, 17.0), 1.5)[None])
    y, x = np.mgrid[: shape[0], : shape[1]]
    centroid = [(each * planes[0]).sum() / planes[0].sum() for each in (y, x)]
    expected = wcs.world_to_pixel(place)
    # 0.01 target pixels: the kernel and the edge.
    np.testing.assert_allclose(centroid, [float(expected[1]), float(expected[0])], atol=0.01)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_thin_grids(shape):
    resample = Resampling.between(NATIVE, SHAPE, tangent_wcs(shape, SCALE * 0.7, rotation_deg=10), shape)
    planes, usable = resample.apply(np.ones((1, *SHAPE)))
    assert usable.all()
    # 1e-6: the tangent plane.
    np.testing.assert_allclose(planes, 0.49, rtol=1e-6)


def test_a_target_that_reaches_far_beyond_the_image():
    wcs = tangent_wcs((40, 40), 20 * SCALE, rotation_deg=23, offset=(3, 5))
    resample = Resampling.between(DISTORTED, SHAPE, tangent_wcs((200, 200), SCALE, offset=(60, 0)), (200, 200))
    assert (resample.coverage == 0).any()
    assert (resample.coverage == 1).any()
    # In native pixels the kernel is wider than the image.
    coarse = Resampling.between(NATIVE, SHAPE, wcs, (40, 40))
    assert not coarse.apply(np.ones((1, *SHAPE)))[1].any()


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("order", [1, 6, 2.5, "3", True])
def test_bad_orders(order):
    with pytest.raises(ValueError, match=r"order of a Lanczos kernel is one of \(2, 3, 4, 5\); got"):
        Resampling.between(NATIVE, SHAPE, NATIVE, SHAPE, order)


@pytest.mark.parametrize("shape", [(0, 3), (3,), 5, (2.5, 3), (1, 2, 3), None])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match=r"The target shape wants \(height, width\) of at least one pixel each; got"):
        Resampling.between(NATIVE, SHAPE, NATIVE, shape)


def test_wcs_on_one_side_only():
    with pytest.raises(ValueError, match="The native image has a WCS and the target doesn't"):
        Resampling.between(NATIVE, SHAPE, None, SHAPE)
    with pytest.raises(ValueError, match="The target has a WCS and the native image doesn't"):
        Resampling.between(None, SHAPE, NATIVE, SHAPE)


@pytest.mark.parametrize("native", [NATIVE, DISTORTED])
@pytest.mark.filterwarnings("ignore:'WCS.all_world2pix' failed", "ignore:All-NaN")
def test_no_overlap(native):
    elsewhere = tangent_wcs((20, 20), SCALE, center_deg=(150.5, 2.05))
    message = r"covers 6.0 x 6.4 arcsec around \(150\.30000, 2\.05000\), the target 4.0 x 4.0 arcsec around \(150\.5"
    with pytest.raises(ValueError, match=message):
        Resampling.between(native, SHAPE, elsewhere, (20, 20))


ONES = np.ones((1, *SHAPE))
BAD = {
    "two axes": (lambda r: r.apply(ONES[0]), r"planes wants the shape \(channel, 30, 32\).*got \(30, 32\)"),
    "other shape": (lambda r: r.apply(ONES[:, 1:]), r"planes wants the shape .*got \(1, 29, 32\)"),
    "mask of one plane": (lambda r: r.rows(ONES[0] > 0), r"valid wants the shape .*got \(30, 32\)"),
    "channels": (lambda r: r.apply(ONES, np.ones((2, *SHAPE), bool)), "planes has 1 channels and valid 2"),
    "NaN": (lambda r: r.apply(ONES * np.nan, ONES > 0), "planes must be finite wherever valid is True"),
    "negative": (lambda r: r.variance(-ONES), "Variances must be at least 0; got -1"),
    "infinite": (lambda r: r.variance(ONES * np.inf, ONES > 0), "variance must be finite wherever valid"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_planes(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(resampling("coarser"))
