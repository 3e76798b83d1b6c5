import itertools

import astropy.units as u
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_area

from scenefit.arrays.box import Box
from scenefit.data.nuisances import Calibration
from scenefit.data.renderer import (
    AbstractSampling,
    GridSampling,
    NonuniformSampling,
    Renderer,
    SeparableSampling,
)
from scenefit.sky.frame import Frame, pixel_map
from scenefit.sky.psf import GaussianPSF, ImagePSF
from tests.helpers import (
    compiled_for,
    final_classes,
    gaussian_image,
    make_observation,
    spectrum_sum,
    tangent_header,
    tangent_wcs,
    with_sip,
    with_tpv,
)

SCALE = 0.1
FRAME_SHAPE = (21, 24)
PSF_CENTER = (7.0, 7.0)
PSF_IMAGE = 0.7 * gaussian_image((15, 15), PSF_CENTER, 1.3) + 0.3 * gaussian_image((15, 15), (7.6, 6.7), 1.8)
FLIPS = list(itertools.product((False, True), (False, True)))

# name: sampling that must be chosen, and the geometry of the observation: shape, pixel scale, options of the WCS
GEOMETRIES = {
    **{
        f"grid {y:d}{x:d} {angle}": (
            GridSampling,
            (9, 12),
            1.0,
            {"flip": (y, x), "rotation_deg": angle, "offset": (1.3, -0.4)},
            None,
        )
        for (y, x), angle in itertools.product(FLIPS, (0, 90))
    },
    **{
        f"separable {y:d}{x:d} {angle}": (
            SeparableSampling,
            (7, 6),
            2.6,
            {"flip": (y, x), "rotation_deg": angle, "offset": (0.2, 0.1)},
            None,
        )
        for (y, x), angle in itertools.product(FLIPS, (0, 270))
    },
    "rotation": (NonuniformSampling, (10, 11), 1.0, {"rotation_deg": 23}, None),
    "rotation and flip": (NonuniformSampling, (6, 7), 2.0, {"rotation_deg": 23, "flip": (True, False)}, None),
    "SIP": (NonuniformSampling, (10, 11), 1.5, {"rotation_deg": 10, "offset": (0.3, 0.2)}, with_sip),
    "TPV": (NonuniformSampling, (10, 11), 1.5, {"offset": (0.3, 0.2)}, lambda header: with_tpv(header, 300.0)),
}


def geometry(name):
    """Return the expected sampling, the shape and the WCS of an observation."""
    sampling, shape, ratio, options, distort = GEOMETRIES[name]
    header = tangent_header(shape, SCALE * ratio, **options)
    if distort is with_sip:
        header = with_sip(header, 3e-3)
    elif distort is not None:
        header = distort(header)
    return sampling, shape, WCS(header)


def model_frame(shape=FRAME_SHAPE, padding=20, channels=("g",)):
    return Frame(shape, channels=channels, wcs=tangent_wcs(shape, SCALE), padding=padding)


@eqx.filter_jit
def predict(renderer, model, shift):
    return renderer(renderer.transform(model), shift)


def render(renderer, model, shift=(0.0, 0.0)):
    """Render a model image (y, x) or (channel, y, x); return (channel, y, x) in float64."""
    model = jnp.asarray(np.atleast_3d(model.T).T, jnp.result_type(float))
    return np.asarray(predict(renderer, model, jnp.asarray(shift, float)), float)


def central_affine(wcs, frame, shape):
    """Return d(model position)/d(pixel index) in the middle of the image, from small steps."""
    middle, step = (np.array(shape) - 1) / 2, 1e-2
    ends = [pixel_map(wcs, frame.wcs, *(middle + sign * step * axis)) for axis in np.eye(2) for sign in (1, -1)]
    return np.stack([ends[0] - ends[1], ends[2] - ends[3]], axis=-1) / (2 * step)


def brute_force(model, frame, wcs, shape, shift=(0.0, 0.0)):
    """Return the sum of the design, over all modes of the padded model and for each pixel, in float64."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    position = pixel_map(wcs, frame.wcs, y, x)
    affine = central_affine(wcs, frame, shape)
    # Areas of the pixels from their corners.
    corners = pixel_map(wcs, frame.wcs, *(np.mgrid[: shape[0] + 1, : shape[1] + 1] - 0.5))
    diagonal, other = corners[1:, 1:] - corners[:-1, :-1], corners[1:, :-1] - corners[:-1, 1:]
    area = 0.5 * np.abs(diagonal[..., 0] * other[..., 1] - diagonal[..., 1] * other[..., 0])
    ky, kx = np.meshgrid(*(np.fft.fftfreq(n) for n in frame.fft_shape), indexing="ij")
    q = np.einsum("ab,akl->bkl", affine, np.stack([ky, kx]))
    sigma = frame.psf.sigma[0]
    ratio = spectrum_sum(PSF_IMAGE, *q, PSF_CENTER)
    ratio = ratio * np.exp(2 * np.pi**2 * sigma**2 * (ky**2 + kx**2))
    ratio[(np.abs(q).max(axis=0) >= 0.5) | (np.abs(ky) >= 0.5) | (np.abs(kx) >= 0.5)] = 0
    modes = np.fft.fft2(model, s=frame.fft_shape) * ratio
    position = position - frame.sky_jacobian() @ np.asarray(shift)
    rows = np.exp(2j * np.pi * position[..., 0, None] * np.fft.fftfreq(frame.fft_shape[0]))
    columns = np.exp(2j * np.pi * position[..., 1, None] * np.fft.fftfreq(frame.fft_shape[1]))
    return area * np.einsum("yxk,kl,yxl->yx", rows, modes, columns).real / modes.size


@pytest.fixture
def clumps(rng):
    """A model image whose light stays clear of the edges."""
    places = rng.uniform(6, 15, (4, 2))
    return sum(gaussian_image(FRAME_SHAPE, place, sigma) for place, sigma in zip(places, (0.8, 1, 1.5, 2), strict=True))


# ---- the sum itself


def test_every_sampling_has_a_geometry():
    assert final_classes(AbstractSampling) == {sampling for sampling, *_ in GEOMETRIES.values()}


@pytest.mark.parametrize(
    ("name", "padding"),
    # With a padding of 25 the canvas isn't square.
    [*((name, 20) for name in GEOMETRIES), ("grid 01 90", 25), ("separable 10 0", 25), ("rotation", 25)],
)
def test_rendering_is_the_brute_force_sum(name, padding, clumps, eps):
    sampling, shape, wcs = geometry(name)
    frame = model_frame(padding=padding)
    renderer = Renderer.match(frame, psf=ImagePSF(PSF_IMAGE), wcs=wcs, shape=shape, channels=("g",))
    assert type(renderer.sampling) is sampling
    shift = (0.04, -0.03)
    expected = brute_force(clumps, frame, wcs, shape, shift)
    error = np.abs(render(renderer, clumps, shift)[0] - expected[renderer.window.slices])[renderer.inside].max()
    # 100 eps: rounding in transforms of 2000 values; 1e-6 of a pixel: positions are rounded to a regular grid;
    # 6e-5: window of the non-uniform transforms, of the PSF and of the model, 1.5e-5 in each direction.
    tolerance = 6e-5 if sampling is NonuniformSampling else 100 * eps + 1e-6
    # 2e-4: the distortions here are strong enough for the area to vary within a pixel.
    tolerance += 2e-4 if "P" in name else 0
    assert error < tolerance * expected.max()


@pytest.mark.parametrize("angle", [0, 23])
def test_rendering_is_linear_and_its_gradient_the_transpose(rng, angle, eps):
    obs = make_observation((8, 9), scale_arcsec=2 * SCALE, rotation_deg=angle)
    renderer = obs.match(model_frame()).renderer
    model, other = rng.normal(size=(2, 1, *FRAME_SHAPE))
    rendered = render(renderer, model)
    # 1000 eps: rounding in transforms of 2000 values of order one.
    np.testing.assert_allclose(
        render(renderer, 2 * model - other), 2 * rendered - render(renderer, other), atol=1000 * eps
    )
    cotangent = jnp.asarray(rng.normal(size=rendered.shape), jnp.result_type(float))

    @jax.jit
    @jax.grad
    def gradient(image):
        return (predict(renderer, image, jnp.zeros(2)) * cotangent).sum()

    transposed = np.asarray(gradient(jnp.asarray(other, jnp.result_type(float))), float)
    assert (transposed * model).sum() == pytest.approx((rendered * np.asarray(cotangent)).sum(), abs=1000 * eps * 10)


def test_without_wcs_pixels_are_model_pixels(clumps, eps):
    frame = Frame(FRAME_SHAPE, channels="g", padding=20)
    renderer = make_observation(FRAME_SHAPE, wcs=None, psf=ImagePSF(PSF_IMAGE)).match(frame).renderer
    assert isinstance(renderer.sampling, GridSampling)
    same = model_frame()
    expected = brute_force(clumps, same, same.wcs, FRAME_SHAPE)
    # 100 eps: rounding in transforms of 2000 values; 1e-7: the reference goes through degrees on the sky.
    np.testing.assert_allclose(render(renderer, clumps)[0], expected, atol=(100 * eps + 1e-7) * expected.max())


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("distort", [lambda header: header, with_sip])
def test_thin_images(shape, distort, clumps):
    wcs = WCS(distort(tangent_header(shape, SCALE, rotation_deg=23)))
    frame = model_frame()
    renderer = Renderer.match(frame, psf=ImagePSF(PSF_IMAGE), wcs=wcs, shape=shape, channels=("g",))
    expected = brute_force(clumps, frame, wcs, shape)
    # 2e-3: the area of a distorted pixel is taken as that of the middle one.
    np.testing.assert_allclose(render(renderer, clumps)[0], expected, atol=2e-3 * expected.max())


# ---- against GalSim


def accuracy_cases():
    """Every ratio, rotation, flip, sub-pixel position or not, SIP or not: (arguments of the case, galaxy)."""
    pairs = itertools.product((1.0, 2.0, 5.6), (0.0, 23.0, 90.0))
    for (ratio, rotation), flip in zip(pairs, itertools.cycle(("", "x", "y", "xy")), strict=False):
        yield (ratio, rotation, flip, flip != "x"), "clumpy"
    for ratio, rotation in ((1.0, 0.0), (2.0, 90.0), (5.6, 23.0)):
        yield (ratio, rotation, "", True, True), "clumpy"
    for ratio, rotation, distorted in ((1.0, 90.0, False), (2.0, 23.0, False), (5.6, 0.0, False), (2.0, 23.0, True)):
        yield (ratio, rotation, "x", True, distorted), "gaussian"


@pytest.mark.parametrize(("case", "galaxy"), list(accuracy_cases()))
def test_rendering_agrees_with_galsim(rendering_benchmark, case, galaxy):
    errors = rendering_benchmark.measure_errors(rendering_benchmark.Case(*case), galaxy)
    # What the package promises: 1e-3 of the peak and 1e-4 of the flux.
    assert errors.image < 1e-3
    assert errors.flux < 1e-4


def test_the_packaged_field_is_rendered(rendering_benchmark, capsys):
    result = rendering_benchmark.print_speed(rendering_benchmark.DEFAULT_FIELD, repeats=1, peer_python=None)
    assert result["observed_shape"] == [5, 48, 48]
    assert "bare FFTs" in capsys.readouterr().out


# ---- flux and shift


@pytest.mark.parametrize("ratio", [0.8, 1.0, 3.3])
@pytest.mark.parametrize("angle", [0, 37])
def test_flux_is_conserved(ratio, angle):
    shape = (60, 60)
    count = int(60 / ratio / 1.5)
    obs = make_observation(
        (count, count), scale_arcsec=SCALE * ratio, rotation_deg=angle, psf=GaussianPSF(2 / ratio**0.5)
    )
    renderer = obs.match(model_frame(shape, padding=40)).renderer
    total = render(renderer, gaussian_image(shape, (29, 31), 1.5)).sum()
    # 3e-5: light beyond four sigma of the widest case, and the window's error.
    assert total == pytest.approx(1.0, abs=3e-5)


def centroid(image):
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.array([(y * image).sum(), (x * image).sum()]) / image.sum()


@pytest.mark.parametrize("shift", [(0.13, 0.0), (-0.08, -0.21)])
@pytest.mark.parametrize(
    ("ratio", "options"),
    [
        (1.0, {}),
        (1.0, {"flip": (True, False)}),
        (2.0, {"rotation_deg": 90}),
        (2.0, {"rotation_deg": 23, "flip": (False, True)}),
    ],
)
def test_shift_moves_light_east_and_north(shift, ratio, options):
    frame = model_frame((48, 48))
    obs = make_observation((int(44 / ratio),) * 2, scale_arcsec=SCALE * ratio, psf=GaussianPSF(1.2), **options)
    model = gaussian_image((48, 48), (23.4, 24.1), 1.5)[None]
    place = [
        obs.wcs.pixel_to_world(*centroid(obs.match(frame).with_shift(s).render(model)[0])[::-1])
        for s in ((0, 0), shift)
    ]
    east, north = (offset.to_value(u.arcsec) for offset in place[0].spherical_offsets_to(place[1]))
    # 1e-5 arcsec, 1e-4 of a pixel: wings cut off at the edges, and single precision.
    np.testing.assert_allclose([east, north], shift, atol=1e-5)


def test_shift_without_wcs_is_in_x_and_y():
    frame = Frame((40, 40), channels="g", padding=20)
    obs = make_observation((40, 40), wcs=None).match(frame).with_shift((1.5, -0.7))
    image = obs.render(gaussian_image((40, 40), (19, 20), 1.5)[None])[0]
    # 1e-4 of a pixel: wings cut off at the edges, and single precision.
    np.testing.assert_allclose(centroid(image), [19 - 0.7, 20 + 1.5], atol=1e-4)


@pytest.mark.parametrize("angle", [0, 23])
def test_shift_is_differentiable(angle, clumps, eps):
    renderer = make_observation((9, 10), scale_arcsec=1.5 * SCALE, rotation_deg=angle).match(model_frame()).renderer
    spectrum = renderer.transform(jnp.asarray(clumps[None], jnp.result_type(float)))
    shift, direction = jnp.array([0.03, -0.05]), jnp.array([0.8, 0.6])

    @jax.jit
    def moved(shift):
        return renderer(spectrum, shift)

    image, slope = jax.jvp(moved, (shift,), (direction,))
    step = 0.5 * eps ** (1 / 3)
    ends = [np.asarray(moved(shift + sign * step * direction), float) for sign in (1, -1)]
    difference = (ends[0] - ends[1]) / (2 * step)
    # Truncation: (step / width)^2 / 6 with a width of 0.1 arcsec; rounding of the difference.
    tolerance = 20 * step**2 * np.abs(difference).max() + 10 * eps * float(image.max()) / step
    np.testing.assert_allclose(slope, difference, atol=tolerance)


# ---- rotation


TURNED = {
    "grid": ((20, 22), 1.0, {"offset": (1.3, -0.4)}),
    "parallel": ((13, 14), 1.6, {"rotation_deg": 90}),
    "rotated": ((13, 14), 1.6, {"rotation_deg": 23, "flip": (True, False), "offset": (-1.1, 0.7)}),
}
ELLIPTICAL = gaussian_image((13, 13), (6.2, 5.6), 1.3) + gaussian_image((13, 13), (5.8, 6.4), 1.3)


def turned_wcs(wcs, shape, angle):
    """Return the WCS of an image whose sources appear turned by an angle, about its middle, to those who believe `wcs`."""
    middle = [(n - 1) / 2 for n in shape[::-1]]
    sky = wcs.pixel_to_world(*middle)
    step = 0.5 * np.array([[1, -1, 0, 0], [0, 0, 1, -1]])
    offsets = sky.spherical_offsets_to(wcs.pixel_to_world(*(m + s for m, s in zip(middle, step, strict=True))))
    east, north = (part.deg for part in offsets)
    matrix = np.array([[east[0] - east[1], east[2] - east[3]], [north[0] - north[1], north[2] - north[3]]])
    # What seems to be at the position angle p + angle is at p.
    sine, cosine = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    header = tangent_header(shape, SCALE, center_deg=(sky.ra.deg, sky.dec.deg))
    for (i, j), value in np.ndenumerate(np.array([[cosine, -sine], [sine, cosine]]) @ matrix):
        header[f"CD{i + 1}_{j + 1}"] = value
    return WCS(header)


def crowd(shape):
    """A model image with sources everywhere but within 4 pixels of the edges."""
    rng = np.random.default_rng(3)
    places = rng.uniform(4, np.array(shape) - 5, (12, 2))
    return sum(flux * gaussian_image(shape, place, 1.0) for place, flux in zip(places, 1 + rng.random(12), strict=True))


@pytest.mark.parametrize("psf", [GaussianPSF(1.4), ImagePSF(ELLIPTICAL)], ids=["round", "elliptical"])
@pytest.mark.parametrize("name", TURNED)
def test_a_turned_observation_is_one_with_a_turned_wcs(name, psf):
    shape, ratio, options = TURNED[name]
    frame, model = model_frame((32, 34)), crowd((32, 34))[None]
    obs = make_observation(shape, scale_arcsec=SCALE * ratio, psf=psf, **options)
    shift = np.array([0.06, -0.03])
    for angle in (0.3, -4.0):
        sine, cosine = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
        turned = obs.with_rotation(angle).with_shift(shift).match(frame)
        image = turned.render(model)[0]
        truth = make_observation(shape, psf=psf, wcs=turned_wcs(obs.wcs, shape, angle)).match(frame)
        # Displaced after it is turned: by a direction as the believed WCS has it.
        expected = truth.with_shift(np.array([[cosine, -sine], [sine, cosine]]) @ shift).render(model)[0]
        seen = (image != 0) & (expected != 0)
        assert seen.sum() > 0.8 * seen.size
        # 1e-4 of the peak: the windows of both, 6e-5 at worst, and the parabola that turns the PSF.
        np.testing.assert_allclose(image[seen], expected[seen], atol=1e-4 * expected.max())
        unturned = turned.with_rotation(0.0).render(model)[0]
        assert np.abs(unturned - expected)[seen].max() > 5e-3 * expected.max()


def test_rotation_turns_from_north_to_east():
    """The position angle from the middle of the image grows."""
    frame = model_frame((48, 48))
    obs = make_observation((22, 22), scale_arcsec=2 * SCALE, psf=GaussianPSF(1.2), rotation_deg=23, flip=(False, True))
    model = gaussian_image((48, 48), (30.4, 12.1), 1.5)[None]
    middle = obs.wcs.pixel_to_world(10.5, 10.5)
    before, after = (
        obs.wcs.pixel_to_world(*centroid(obs.with_rotation(angle).match(frame).render(model)[0])[::-1])
        for angle in (0.0, 2.5)
    )
    change = (middle.position_angle(after) - middle.position_angle(before)).wrap_at(180 * u.deg)
    # 1e-3 deg, and as much of the distance: 1e-4 of a pixel at 7 pixels.
    assert change.deg == pytest.approx(2.5, abs=1e-3)
    assert middle.separation(after).arcsec == pytest.approx(middle.separation(before).arcsec, rel=2e-5)


def test_rotation_without_wcs_is_from_y_to_x():
    frame = Frame((41, 41), channels="g", padding=20)
    obs = make_observation((41, 41), wcs=None).match(frame).with_rotation(5.0)
    image = obs.render(gaussian_image((41, 41), (30, 20), 1.5)[None])[0]
    expected = 20 + 10 * np.array([np.cos(np.deg2rad(5)), np.sin(np.deg2rad(5))])
    # 1e-4 of a pixel: wings cut off at the edges, and single precision.
    np.testing.assert_allclose(centroid(image), expected, atol=1e-4)


def test_the_blur_of_a_turned_image_stays_round():
    """On rectangular pixels, in which it turns with the image."""
    header = tangent_header((16, 22), 2 * SCALE)
    header["CD2_2"] *= 1.4
    frame, shape, model = model_frame((32, 34)), (16, 22), crowd((32, 34))[None]
    options = {"psf": GaussianPSF(1.3), "calibration": Calibration(psf_variance=0.6)}
    turned = make_observation(shape, wcs=WCS(header), **options).with_rotation(4.0).match(frame)
    truth = make_observation(shape, wcs=turned_wcs(WCS(header), shape, 4.0), **options).match(frame)
    image, expected = turned.render(model)[0], truth.render(model)[0]
    seen = (image != 0) & (expected != 0)
    np.testing.assert_allclose(image[seen], expected[seen], atol=1e-4 * expected.max())


@pytest.fixture(scope="module")
def turning():
    obs = make_observation((13, 14), scale_arcsec=1.6 * SCALE, rotation_deg=23, psf=ImagePSF(ELLIPTICAL))
    return obs.match(model_frame(), turning=True).renderer


def test_rotation_is_differentiable(turning, clumps, eps):
    """Forwards, along angle, shift and model together, against differences; backwards, it is the transpose of that."""
    model = jnp.asarray(clumps[None], jnp.result_type(float))
    shift = jnp.array([0.03, -0.05])

    @jax.jit
    def turned(angle, shift, model):
        return turning(turning.transform(model), shift, None, angle)

    start = jnp.asarray(0.4), shift, model
    for direction in ((1.0, 0.0 * shift, 0 * model), (0.7, jnp.array([0.002, 0.001]), 0.01 * model[:, ::-1])):
        direction = jax.tree.map(lambda d, s: jnp.asarray(d, s.dtype), direction, start)
        image, slope = jax.jit(lambda d: jax.jvp(turned, start, d))(direction)
        step = 0.3
        ends = [
            np.asarray(turned(*jax.tree.map(lambda s, d, f=sign * step: s + f * d, start, direction)), float)
            for sign in (1, -1)
        ]
        difference = (ends[0] - ends[1]) / (2 * step)
        # 5e-3 radians move the corners by 0.08 pixels: differences to third order are 1e-3 off; where positions go from one cell
        # to the next, the window makes a step of 1e-5 of the peak, which is 1e-3 of the slope.
        np.testing.assert_allclose(slope, difference, atol=2e-3 * np.abs(difference).max())
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=image.shape), image.dtype)
        gradient = jax.jit(lambda c: jax.vjp(turned, *start)[1](c))(cotangent)
        product = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, direction, strict=True))
        # 1000 eps: rounding in sums of 2000 values.
        scale = float(jnp.linalg.norm(slope) * jnp.linalg.norm(cotangent))
        assert product == pytest.approx(float(jnp.vdot(slope, cotangent)), abs=1000 * eps * scale)


def test_a_rotation_bends_the_image(turning, clumps):
    """The second derivative, which the Hessian of a posterior takes, against differences of the first."""
    model = turning.transform(jnp.asarray(clumps[None], jnp.result_type(float)))

    def slope(angle):
        return jax.jvp(lambda a: turning(model, jnp.zeros(2), None, a), (angle,), (jnp.ones_like(angle),))[1]

    bend = jax.jit(lambda angle: jax.jvp(slope, (angle,), (jnp.ones_like(angle),))[1])(jnp.asarray(0.4))
    ends = [np.asarray(jax.jit(slope)(jnp.asarray(0.4 + step)), float) for step in (0.4, -0.4)]
    difference = (ends[0] - ends[1]) / 0.8
    # The error of the window, 1e-5, varies by 2 cycles a pixel, twenty times as fast as the image: 400 times that in the bend,
    # and 1e-2 from the step, which is larger than above.
    np.testing.assert_allclose(bend, difference, atol=5e-2 * np.abs(difference).max())


def test_a_renderer_that_is_not_matched_for_it_does_not_turn(clumps):
    renderer = make_observation((9, 10)).match(model_frame()).renderer
    assert renderer.turn is None
    with pytest.raises(ValueError, match=r"can't turn its observation: use match\(\.\.\., turning=True\)"):
        renderer(jnp.zeros((1, 44, 23), complex), jnp.zeros(2), None, jnp.asarray(0.1))


# ---- partial coverage, channels


@pytest.mark.parametrize("angle", [0, 30])
@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_pixels_inside_a_smaller_frame(angle, ratio):
    obs = make_observation((60, 64), scale_arcsec=SCALE * ratio, rotation_deg=angle, offset=(3.2, -5.4))
    small = model_frame((24, 20))
    renderer = obs.match(small).renderer
    y, x = np.mgrid[:60, :64]
    expected_y, expected_x = small.wcs.world_to_pixel(obs.wcs.pixel_to_world(x, y))[::-1]
    inside = (np.abs(expected_y - 11.5) < 12) & (np.abs(expected_x - 9.5) < 10)
    found = np.zeros((60, 64), bool)
    found[renderer.window.slices] = renderer.inside
    np.testing.assert_array_equal(found, inside)
    # The window is hardly larger than need be: by 2 pixels, then rounded up by less than an eighth.
    needed = [np.count_nonzero(renderer.inside.any(axis=axis)) + 2 for axis in (1, 0)]
    assert all(size < 9 / 8 * count for size, count in zip(renderer.window.shape, needed, strict=True))


@pytest.mark.parametrize("angle", [0, 30])
@pytest.mark.parametrize("ratio", [1.0, 0.7, 2.0])
def test_the_shape_of_the_window_does_not_depend_on_its_place(rng, angle, ratio):
    offsets = [(0.0, 0.0), (2.0, -3.0), *rng.uniform(-4, 4, (20, 2))]
    windows = []
    for offset in offsets:
        obs = make_observation((60, 64), scale_arcsec=SCALE * ratio, rotation_deg=angle, offset=offset)
        windows.append(obs.match(model_frame((24, 20))).renderer.window)
    assert len({window.shape for window in windows}) == 1
    assert len({window.origin for window in windows}) > 5


def test_a_window_stays_on_the_observation():
    """Also where the frame hangs over its edge."""
    obs = make_observation((30, 32), scale_arcsec=SCALE, offset=(-12.3, 13.4))
    renderer = obs.match(model_frame((24, 20))).renderer
    # 25 and 21 pixels can lie on the frame; with four binary digits, 26 and 22.
    assert renderer.window.shape == (26, 22)
    assert renderer.window.intersection(Box((30, 32))) == renderer.window
    assert 0 < renderer.inside.sum() < 24 * 20


@pytest.mark.parametrize("angle", [0, 30])
def test_a_smaller_frame_predicts_the_same(angle):
    obs = make_observation((40, 44), scale_arcsec=SCALE, rotation_deg=angle)
    small, large = model_frame((24, 24)), model_frame((64, 64))
    model = np.zeros((1, 64, 64))
    model[0, 20:44, 20:44] = gaussian_image((24, 24), (12, 11), 1.3)
    partial, whole = obs.match(small), obs.match(large)
    seen = np.zeros((40, 44), bool)
    seen[partial.renderer.window.slices] = partial.renderer.inside
    expected = whole.render(model)
    image = partial.render(model[:, 20:44, 20:44])
    # 6e-5: the window of the non-uniform transform.
    np.testing.assert_allclose(image[0][seen], expected[0][seen], atol=6e-5 * expected.max())
    assert (image[0][~seen] == 0).all()


@pytest.mark.parametrize("sigma", [0.8, 1.5, 3.0])
@pytest.mark.parametrize("coverage", ["union", "intersection"])
def test_automatic_padding_suffices_for_turned_observations(sigma, coverage):
    fine = make_observation((40, 40), scale_arcsec=0.03, name="fine")
    coarse = make_observation((40, 40), scale_arcsec=0.1, rotation_deg=30, psf=GaussianPSF(sigma), channels=("r",))
    frame = Frame.from_observations([fine, coarse], coverage)
    image = coarse.match(frame).render(np.ones(frame.shape))
    assert np.isfinite(image).all()
    # A flat sky of one per model pixel; in the middle, far from the edges of the light, is the area of a pixel.
    if coverage == "union":
        assert image[0, 20, 20] == pytest.approx((10 / 3) ** 2, rel=1e-3)


@pytest.mark.parametrize("channels", [("r",), ("i", "g"), ("g", "r", "i")])
def test_channels_are_found_by_name(rng, channels):
    frame = Frame((12, 14), channels=("g", "r", "i"))
    model = rng.uniform(size=(3, 12, 14))
    rendered = make_observation(channels=channels, wcs=None).match(frame).render(model)
    for plane, channel in zip(rendered, channels, strict=True):
        index = frame.channels.index(channel)
        alone = make_observation(wcs=None).match(Frame((12, 14), channels="g")).render(model[index : index + 1])
        # 1e-6 of the peak: single precision.
        np.testing.assert_allclose(plane, alone[0], atol=1e-6 * alone.max())


def test_each_channel_has_its_own_psf():
    psf = GaussianPSF([1.5, 2.0])
    frame = Frame((21, 21), channels=("g", "r"), padding=30)
    model = np.repeat(gaussian_image((21, 21), (10, 10), 0.7)[None], 2, axis=0)
    image = make_observation((21, 21), channels=("g", "r"), wcs=None, psf=psf).match(frame).render(model)
    # The model of a point turns into the PSF; 3e-3: aliasing of a Gaussian of 0.7 pixels.
    np.testing.assert_allclose(image[:, 10, 10], 1 / (2 * np.pi * psf.sigma**2), rtol=3e-3)


@pytest.mark.parametrize("shape", [(14, 14), (15, 18)])
def test_an_off_centre_psf_leaves_sources_in_place(shape):
    psf = ImagePSF(gaussian_image(shape, (6.2, 7.7), 1.3), center=(6.2, 7.7))
    frame = Frame((40, 40), channels="g", padding=30)
    image = (
        make_observation((40, 40), wcs=None, psf=psf).match(frame).render(gaussian_image((40, 40), (19, 21), 1.5)[None])
    )
    # 1e-3 of a pixel: the wings of the PSF are cut off at five sigma on one side.
    np.testing.assert_allclose(centroid(image[0]), [19, 21], atol=1e-3)


# ---- compilation


@pytest.mark.parametrize(
    ("ratio", "angle", "turning"), [(1.0, 0, False), (2.0, 0, False), (2.0, 23, False), (2.0, 23, True)]
)
def test_another_observation_of_the_same_shape_compiles_nothing(ratio, angle, turning):
    traces = []

    @eqx.filter_jit
    def counted(renderer, model, shift, rotation):
        traces.append(1)
        return renderer(renderer.transform(model), shift, None, rotation)

    images = []
    for number in range(3):
        center = (150.3 + 0.1 * number, 2.05 - 0.2 * number)
        frame = Frame((30, 30), channels="g", wcs=tangent_wcs((30, 30), SCALE, center_deg=center), padding=24)
        psf = ImagePSF(gaussian_image((9, 9), (4, 4), 1.2 + 0.1 * number))
        obs = make_observation(
            (9, 9),
            scale_arcsec=SCALE * ratio,
            rotation_deg=angle,
            center_deg=center,
            offset=(0.1 * number, 0.2),
            psf=psf,
        )
        model = jnp.asarray(gaussian_image((30, 30), (14, 15), 1.5)[None], jnp.result_type(float))
        rotation = jnp.asarray(0.1 * number) if turning else None
        renderer = obs.match(frame, turning=turning).renderer
        images.append(np.asarray(counted(renderer, model, jnp.full(2, 0.01 * number), rotation)))
    assert len(traces) == 1
    assert not np.allclose(images[0], images[1], rtol=1e-3)


@pytest.mark.parametrize(("ratio", "angle"), [(1.0, 0), (2.0, 0), (2.0, 23)])
def test_another_part_of_the_observation_compiles_nothing(ratio, angle):
    """The frame sees a part of the image, in every blend another one."""
    traces, origins, images = [], set(), []

    @eqx.filter_jit
    def counted(renderer, model):
        traces.append(1)
        return predict(renderer, model, jnp.zeros(2))

    model = jnp.asarray(gaussian_image((30, 30), (14, 15), 1.5)[None], jnp.result_type(float))
    for offset in ((0.0, 0.0), (3.0, -2.0), (0.4, 0.7), (-5.2, 6.1)):
        obs = make_observation((50, 50), scale_arcsec=SCALE * ratio, rotation_deg=angle, offset=offset)
        renderer = obs.match(model_frame((30, 30))).renderer
        origins.add(renderer.window.origin)
        images.append(np.asarray(counted(renderer, model)) * renderer.inside)
    assert len(traces) == 1
    assert len(origins) > 2
    # 1e-4: all see the whole galaxy but for wings beyond five sigma.
    np.testing.assert_allclose([image.sum() for image in images], 1.0, atol=1e-4)


@pytest.mark.parametrize(("shape", "most"), [((16, 15), 3), ((40, 40), 5)])
def test_images_turned_by_different_angles_share_few_compilations(clumps, shape, most):
    """Modes and windows are rounded up; each image is still the brute-force sum."""
    traces, kinds = [], set()

    @eqx.filter_jit
    def counted(renderer, model):
        traces.append(1)
        return predict(renderer, model, jnp.zeros(2))

    frame, model = model_frame((24, 24)), jnp.asarray(clumps[None], jnp.result_type(float))
    for angle in np.linspace(0.5, 45, 20):
        wcs = tangent_wcs(shape, 1.5 * SCALE, rotation_deg=angle)
        renderer = Renderer.match(frame, psf=ImagePSF(PSF_IMAGE), wcs=wcs, shape=shape, channels=("g",))
        kinds.add(compiled_for(renderer))
        expected = brute_force(clumps, frame, wcs, shape)[renderer.window.slices]
        error = np.abs(np.asarray(counted(renderer, model), float)[0] - expected)[renderer.inside].max()
        # 6e-5: window of the non-uniform transforms, as above.
        assert error < 6e-5 * expected.max()
    # Over these angles the modes grow by 1.4, in steps of a quarter or less; so does the window, in steps of an eighth or
    # less, if the image is larger than the frame.
    assert len(traces) == len(kinds) <= most


@pytest.mark.parametrize(("scales", "angle"), [((1.9, 1.905, 1.91), 0), ((1.9, 1.905, 1.91), 20), ((1.0, 1.005), 20)])
def test_images_of_slightly_different_scale_share_a_compilation(scales, angle):
    kinds = set()
    for scale in scales:
        obs = make_observation((50, 50), scale_arcsec=SCALE * scale, rotation_deg=angle)
        kinds.add(compiled_for(obs.match(model_frame((40, 44))).renderer))
    assert len(kinds) == 1


@pytest.mark.parametrize(("ratio", "angle"), [(1.0, 0), (2.0, 0), (2.0, 23)])
def test_frames_of_slightly_different_size_share_a_compilation(ratio, angle):
    obs = make_observation((60, 60), scale_arcsec=SCALE * ratio, rotation_deg=angle)
    shapes = (40, 40), (41, 40), (40, 41)
    renderers = [obs.match(model_frame(shape)).renderer for shape in shapes]
    assert len({compiled_for(renderer) for renderer in renderers}) == 1
    assert isinstance(renderers[0].sampling, GridSampling) == (ratio == 1)


def test_a_window_is_cut_from_the_canvas_where_the_grids_agree():
    """Rounding it up must not make it too large for that."""
    obs = make_observation((60, 60))
    renderer = obs.match(model_frame((34, 34), padding=6)).renderer
    assert isinstance(renderer.sampling, GridSampling)
    # 35, rounded up, 36; the canvas has 40.
    assert renderer.window.shape == (36, 36)
    renderer = obs.match(model_frame((39, 38), padding=1)).renderer
    assert isinstance(renderer.sampling, GridSampling)
    # 40 and 39; with four binary digits, 40 and 40.
    assert renderer.window.shape == (40, 40)


def test_positions_and_transfer_functions_are_traced_arguments():
    renderer = make_observation((9, 9), rotation_deg=23).match(model_frame()).renderer
    arrays = eqx.filter(renderer, eqx.is_array)
    leaves = [*jax.tree.leaves(arrays.sampling), arrays.transfer, arrays.area, arrays.sky_jacobian]
    assert len(leaves) == 6
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


# ---- bad input


def test_wcs_on_one_side_only_is_refused():
    with pytest.raises(ValueError, match="the frame has a WCS and obs doesn't: give both one, or neither"):
        make_observation(wcs=None).match(model_frame())
    with pytest.raises(ValueError, match="obs has a WCS and the frame doesn't"):
        make_observation().match(Frame((12, 14), channels="g"))


def test_an_observation_elsewhere_is_refused():
    with pytest.raises(ValueError, match="No pixel of obs lies on the model frame of 21 x 24 pixels"):
        make_observation(center_deg=(150.31, 2.05)).match(model_frame())


def test_an_unknown_channel_is_refused():
    with pytest.raises(ValueError, match=r"The frame has channels \['g'\], not \['r'\]"):
        make_observation(channels=("r",)).match(model_frame())


@pytest.mark.parametrize(("observed", "model"), [(0.5, 0.7), (1.5, 2.0), (1.0, 5.0)])
def test_a_model_psf_broader_than_the_observed_is_refused(observed, model):
    frame = Frame(FRAME_SHAPE, channels="g", wcs=tangent_wcs(FRAME_SHAPE, SCALE), psf=GaussianPSF(model))
    with pytest.raises(
        ValueError, match=r"PSF of obs is narrower than the model PSF \(gain .*, at most 1.5\): use a Frame"
    ):
        make_observation(psf=GaussianPSF(observed)).match(frame)


def test_frequencies_that_neither_psf_passes_stay_zero():
    frame = Frame(FRAME_SHAPE, channels="g", wcs=tangent_wcs(FRAME_SHAPE, SCALE), psf=GaussianPSF(2.5))
    renderer = make_observation(psf=GaussianPSF(2.6)).match(frame).renderer
    assert np.isfinite(np.asarray(renderer.transfer)).all()


def test_the_real_pair_is_sampled_at_the_right_places(scenefit_data):
    with fits.open(scenefit_data / "cosmos_hst_hsc.fits") as hdus:
        wcs = {name: WCS(hdus[f"{name}_OBS"].header, naxis=2) for name in ("HST", "HSC")}
        catalog = SkyCoord(hdus["CATALOG"].data["RA"] * u.deg, hdus["CATALOG"].data["DEC"] * u.deg, frame="fk5")
    hst = make_observation((250, 250), wcs=wcs["HST"], name="HST")
    hsc = make_observation((50, 50), wcs=wcs["HSC"], name="HSC", channels=("i",), psf=GaussianPSF(1.5))
    frame = Frame.from_observations([hst, hsc])
    position = frame.to_pixel(catalog[0])
    model = np.zeros(frame.shape)
    model[1] = gaussian_image(frame.box.shape, position, 2.0)
    image = hsc.match(frame).render(model)[0]
    expected = np.array(wcs["HSC"].world_to_pixel(catalog[0]))[::-1]
    # 1e-3 of a pixel: single precision, weighted by the distance across 50 pixels.
    np.testing.assert_allclose(centroid(image), expected, atol=1e-3)
    assert proj_plane_pixel_area(wcs["HSC"]) > proj_plane_pixel_area(frame.wcs)
