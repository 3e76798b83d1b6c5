"""Profiles and sizes against analytic Sersic profiles, quadrature, brute-force sums over pixels and GalSim."""

import dataclasses

import astropy.units as u
import jax
import numpy as np
import pytest
import scipy.integrate
import scipy.ndimage
import scipy.optimize
import scipy.special
from astropy.table import QTable

from scenefit.infer.diagnostics import Diagnostics, PosteriorStatus
from scenefit.infer.fit import FitResult, Status
from scenefit.infer.sample import Posterior
from scenefit.model import link
from scenefit.model.morphology import (
    AbstractRingMorphology,
    DeVaucouleursMorphology,
    ExponentialMorphology,
    GaussianMorphology,
    MultiGaussianMorphology,
    PixelMorphology,
    PointMorphology,
    SersicMorphology,
)
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.spectrum import TransientSpectrum
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey import ellipses
from scenefit.survey.profile import Profile, profile, quantiles
from tests.helpers import final_classes, make_observation, tangent_wcs

CENTER = (40.0, 41.0)
BANDS = {"g": 0.48, "r": 0.62, "i": 0.75}
INDICES = (0.6, 1.0, 1.5, 4.0, 6.0)
# Of index 1.5, half-light semi-major axis 6 and axis ratio 0.7: r20, r50, r80, r90, C80_20, C90_50.
REFERENCE = (2.610, 6.0, 12.145, 16.848, 4.654, 2.808)


def ellipticity(axis_ratio, angle=0.4):
    """Ellipticity (1 - q^2) / (1 + q^2) (cos 2 theta, sin 2 theta)."""
    norm = (1 - axis_ratio**2) / (1 + axis_ratio**2)
    return np.array([norm * np.cos(2 * angle), norm * np.sin(2 * angle)])


def as_result(source, channels=("g",), observations=(), wcs=None) -> FitResult:
    """Return a source as if it had been fitted."""
    scene = Scene(Frame((81, 83), channels=channels, wcs=wcs), {"host": source})
    parameters = Parameters.default(scene, observations)
    return FitResult(scene, tuple(observations), parameters, Status.CONVERGED, 0.0, {}, 0, {})


def as_posterior(result, draws) -> Posterior:
    """Return draws, by path and of shape (draw, ...), as a posterior of two chains."""
    count = len(next(iter(draws.values())))
    chains = {path: values.reshape(2, count // 2, *values.shape[1:]) for path, values in draws.items()}
    nothing = Diagnostics({}, {}, float("nan"), 0.0)
    return Posterior(chains, np.zeros((2, count // 2)), "nuts", PosteriorStatus.GOOD, "by hand", nothing, result, {})


def profile_of(morphology, flux=10.0, **options) -> Profile:
    return profile(as_result(Source(CENTER, [flux], morphology)), "host", **options)


def sersic_b(index):
    return scipy.optimize.brentq(lambda b: scipy.special.gammainc(2 * index, b) - 0.5, 1e-3, 30)


def sersic_brightness(index, radius, half_light_radius):
    """Surface brightness of unit flux: Graham & Driver 2005, equations 2 and 4."""
    b = sersic_b(index)
    total = 2 * np.pi * index * half_light_radius**2 * b ** (-2 * index) * scipy.special.gamma(2 * index)
    return np.exp(-b * (radius / half_light_radius) ** (1 / index)) / total


def sersic_fraction(index, fraction):
    """Radius with a fraction of the light, in half-light radii."""
    return (scipy.special.gammaincinv(2 * index, fraction) / sersic_b(index)) ** index


def own_radius(y, x, shape):
    """Circularised radius of the ellipse of a shape through a position relative to its centre."""
    e1, e2 = shape
    square = (1 - e1) * x**2 - 2 * e2 * x * y + (1 + e1) * y**2
    return np.sqrt(square / np.sqrt(1 - e1**2 - e2**2))


def along_ellipse(radius, shape, count=400):
    """Positions (y, x), evenly spaced in area, on the ellipse of a circularised radius."""
    norm = np.hypot(*shape)
    q, theta = np.sqrt((1 - norm) / (1 + norm)), 0.5 * np.arctan2(shape[1], shape[0])
    angle = 2 * np.pi * np.arange(count) / count
    major, minor = radius / np.sqrt(q) * np.cos(angle), radius * np.sqrt(q) * np.sin(angle)
    return major * np.sin(theta) + minor * np.cos(theta), major * np.cos(theta) - minor * np.sin(theta)


# ---- a single Sersic profile


def test_sizes_of_the_reference():
    q = 0.7
    found = profile_of(SersicMorphology(6 * np.sqrt(q), 1.5, ellipticity(q)))
    sizes = [found.r20, found.r50, found.r80, found.r90, found.c80_20, found.c90_50]
    # 1e-3: the digits that are given.
    np.testing.assert_allclose(np.ravel(sizes), REFERENCE, atol=1e-3)


@pytest.mark.parametrize("index", INDICES)
def test_sizes_of_a_sersic_profile(index):
    q = 0.5
    found = profile_of(SersicMorphology(3.0, index, ellipticity(q)))
    fractions = (0.05, 0.2, 0.5, 0.8, 0.9, 0.97)
    expected = 3.0 / np.sqrt(q) * np.array([sersic_fraction(index, fraction) for fraction in fractions])
    # 1e-4: tables are good to 2e-5 of the light for low indices, of which 3 % are outside the last radius.
    np.testing.assert_allclose([found.fraction_radius(f)[0, 0] for f in fractions], expected, rtol=1e-4)
    assert found.c80_20[0, 0] == pytest.approx(expected[3] / expected[1], rel=1e-4)
    assert found.c90_50[0, 0] == pytest.approx(expected[4] / expected[2], rel=1e-4)


@pytest.mark.parametrize("index", INDICES)
def test_surface_brightness_and_growth_of_a_sersic_profile(index):
    q, flux = 0.5, 10.0
    found = profile_of(SersicMorphology(3.0, index, ellipticity(q)), flux)
    major = 3.0 / np.sqrt(q)

    def brightness(radius):
        return flux * sersic_brightness(index, radius, major) / q

    np.testing.assert_allclose(found.total.surface_brightness[0, 0], brightness(found.radius), rtol=6e-4)
    for number in (5, 20, 35, 50):
        # In the variable in which the light is an ordinary gamma integral, so that quadrature has no cusp to deal with.
        end = found.radius[number] ** (1 / index)
        growth, _ = scipy.integrate.quad(
            lambda s: 2 * np.pi * q * s**index * brightness(s**index) * index * s ** (index - 1), 0, end
        )
        # 2e-5 of the flux: cubic interpolation between radii that differ by 15 %.
        assert found.total.curve_of_growth[0, 0, number] == pytest.approx(growth, abs=2e-5 * flux)


def test_default_radii_hold_the_profile():
    found = profile_of(ExponentialMorphology(3.0, ellipticity(0.5)))
    assert found.radius[0] < 0.05 * found.r50[0, 0]
    assert found.radius[-1] > 6 * found.r50[0, 0]


@pytest.mark.parametrize("radii", [[0.001, 3.0, 5000.0], [2.0]])
def test_radii_may_be_chosen(radii):
    found = profile_of(DeVaucouleursMorphology(3.0), radii=radii)
    np.testing.assert_array_equal(found.radius, radii)
    expected = 10.0 * sersic_brightness(4.0, np.array(radii), 3.0)
    # 1e-6: cubic interpolation of a slowly changing slope.
    np.testing.assert_allclose(found.total.surface_brightness[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("eta", [0.2, 0.5])
def test_petrosian_radius_of_an_exponential(eta):
    q, major = 0.6, 5.0
    found = profile_of(ExponentialMorphology(major * np.sqrt(q), ellipticity(q)))
    scale = major / sersic_b(1.0)

    def growth(radius):
        return 1 - np.exp(-radius / scale) * (1 + radius / scale)

    def ratio(radius):
        annulus = (growth(1.25 * radius) - growth(0.8 * radius)) / (1.25**2 - 0.8**2)
        return annulus / growth(radius)

    expected = scipy.optimize.brentq(lambda radius: ratio(radius) - eta, 0.1, 50)
    # 1e-4: 4e-6 of the flux, in annuli that hold a tenth of it.
    np.testing.assert_allclose(found.petrosian_radius(eta), expected, rtol=1e-4)


@pytest.mark.parametrize("index", [1.0, 4.0])
def test_isophotal_radius(index):
    q, major, flux = 0.6, 5.0, 7.0
    found = profile_of(SersicMorphology(major * np.sqrt(q), index, ellipticity(q)), flux)
    level = flux / q * sersic_brightness(index, 9.0, major)
    # 1e-5: interpolation of the logarithm.
    np.testing.assert_allclose(found.isophotal_radius(surface_brightness=level), 9.0, rtol=1e-5)


def test_levels_that_are_never_reached():
    found = profile_of(ExponentialMorphology(3.0))
    assert np.isnan(found.isophotal_radius(surface_brightness=1e4)).all()
    point = profile_of(PointMorphology(), psf_sigma=1.0)
    assert np.isnan(point.petrosian_radius()).all()
    np.testing.assert_array_equal(point.r50, 0.0)
    assert np.isnan(point.c90_50).all()


def test_a_channel_without_light_has_no_sizes():
    channels = (("g", 1), ("g", 2))
    spectrum = TransientSpectrum([3.0, 5.0], epochs=[2])
    found = profile(as_result(Source(CENTER, spectrum, ExponentialMorphology(3.0)), channels), "host")
    np.testing.assert_array_equal(found.flux, [[0.0, 5.0]])
    np.testing.assert_array_equal(np.isnan(found.r50), [[True, False]])
    np.testing.assert_array_equal(found.total.curve_of_growth[:, 0], 0.0)
    assert list(found.summary()["channel"]) == ["g 1", "g 2"]


# ---- the model PSF


EXAMPLES = {
    PointMorphology: PointMorphology(),
    GaussianMorphology: GaussianMorphology(4.0, ellipticity(0.4)),
    SersicMorphology: SersicMorphology(3.0, 2.0, ellipticity(0.5)),
    ExponentialMorphology: ExponentialMorphology(4.0, ellipticity(0.3)),
    DeVaucouleursMorphology: DeVaucouleursMorphology(2.0, ellipticity(0.8)),
    MultiGaussianMorphology: MultiGaussianMorphology([0.3, 1.0, 3.0, 7.0], [0.1, 0.3, 0.4, 0.2], ellipticity(0.6)),
}


def test_every_radial_morphology_has_an_example():
    assert final_classes(AbstractRingMorphology) == EXAMPLES.keys()


def image_profile(image, step, shape, radii, order):
    """Mean surface brightness on, and flux inside, ellipses of circularised radii, interpolated in an image."""
    middle = (np.array(image.shape)[:, None] - 1) / 2

    def mean(radius):
        return scipy.ndimage.map_coordinates(
            image, np.array(along_ellipse(radius, shape)) / step + middle, order=order
        ).mean()

    nodes, weights = np.polynomial.legendre.leggauss(16)
    rings = [[2 * np.pi * r * mean(r) for r in 0.5 * radius * (1 + nodes)] for radius in radii]
    return [mean(radius) for radius in radii], [0.5 * r * weights @ ring for r, ring in zip(radii, rings, strict=True)]


@pytest.mark.parametrize("morphology", EXAMPLES.values(), ids=lambda each: type(each).__name__)
def test_convolved_profiles_are_those_of_the_rendered_model(morphology):
    sigma, shape = 1.7, np.asarray(morphology.shape)
    axis = np.arange(-40.0, 41.0)
    image = np.asarray(jax.jit(lambda: morphology.evaluate(axis, axis, sigma))(), dtype=float)
    found = profile_of(morphology, 1.0, psf_sigma=sigma, radii=[0.5, 1.0, 2.0, 4.0, 8.0])
    circular = found.radius * np.sqrt(found.axis_ratio[0, 0])
    mean, inside = image_profile(image, 1.0, shape, circular, order=5)
    # 5e-4 of the peak and of the flux: what the rendering of compact light, and interpolation of pixels, are good for.
    np.testing.assert_allclose(found.total.convolved_surface_brightness[0, 0], mean, atol=5e-4 * image.max())
    np.testing.assert_allclose(found.total.convolved_curve_of_growth[0, 0], inside, atol=5e-4)


@pytest.mark.parametrize("index", [1.0, 4.0])
def test_convolved_profiles_against_galsim(index):
    galsim = pytest.importorskip("galsim")
    q, angle, size, sigma, step = 0.5, 0.4, 4.0, 2.0, 0.25
    radii = [1.0, 3.0, 6.0, 12.0]
    found = profile_of(SersicMorphology(size, index, ellipticity(q, angle)), 1.0, psf_sigma=sigma, radii=radii)
    light = galsim.Sersic(index, half_light_radius=size).shear(q=q, beta=angle * galsim.radians)
    seen = galsim.Convolve(light, galsim.Gaussian(sigma=sigma), gsparams=galsim.GSParams(folding_threshold=1e-3))
    image = seen.drawImage(nx=201, ny=201, scale=step, method="no_pixel", dtype=float).array / step**2
    mean, inside = image_profile(image, step, ellipticity(q, angle), found.radius * np.sqrt(q), order=3)
    # 5e-4 of the peak and of the flux: light that GalSim folds over.
    np.testing.assert_allclose(found.total.convolved_surface_brightness[0, 0], mean, atol=5e-4 * image.max())
    np.testing.assert_allclose(found.total.convolved_curve_of_growth[0, 0], inside, atol=5e-4)


def test_convolution_makes_gaussians_wider():
    sigma, psf = 3.0, np.array([1.0, 2.5])
    source = Source(CENTER, [1.0, 4.0], GaussianMorphology(sigma * np.sqrt(2 * np.log(2))))
    found = profile(as_result(source, ("g", "r")), "host", psf_sigma=psf)
    variance = (sigma**2 + psf**2)[:, None]
    gaussian = np.exp(-(found.radius**2) / (2 * variance))
    flux = found.flux[0, :, None]
    # 1e-5: single precision.
    expected = flux * gaussian / (2 * np.pi * variance)
    np.testing.assert_allclose(found.total.convolved_surface_brightness[0], expected, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(found.total.convolved_curve_of_growth[0], flux * (1 - gaussian), atol=1e-5)


def test_the_psf_of_an_observation():
    shape, channels = (20, 20), ("g", "r")
    coarse = make_observation(shape, scale_arcsec=0.3, channels=channels, psf=GaussianPSF([1.1, 1.4]), name="coarse")
    scene = Scene(Frame(shape, channels=("g", "r", "i"), wcs=tangent_wcs(shape, 0.1)), {})
    scene = scene.with_sources(host=Source((9, 9), [1.0, 1.0, 1.0], ExponentialMorphology(3.0)))
    result = FitResult(scene, (coarse,), Parameters.default(scene, [coarse]), Status.CONVERGED, 0.0, {}, 0, {})
    found = profile(result, "host", observation="coarse")
    # 1e-6: pixels of a tangent plane differ in size.
    np.testing.assert_allclose(found.psf_sigma, [3.3, 4.2, np.nan], rtol=1e-6)
    same = profile(result, "host", psf_sigma=0.33 * u.arcsec)
    values = found.total.convolved_curve_of_growth
    np.testing.assert_allclose(values[0, 0], same.total.convolved_curve_of_growth[0, 0], atol=1e-6)
    assert np.isnan(values[0, 2]).all()
    np.testing.assert_allclose(same.radius_arcsec, 0.1 * same.radius, rtol=1e-6)
    chosen = profile(result, "host", radii=[0.2, 0.4] * u.arcsec)
    np.testing.assert_allclose(chosen.radius, [2.0, 4.0], rtol=1e-6)


# ---- composite sources


def bulge_and_disk(offset=(0.0, 0.0), flux=(3.0, 5.0)):
    """Return an exponential disk and a rounder Gaussian bulge at an offset from it."""
    bulge = Source(np.add(CENTER, offset), [flux[0]], GaussianMorphology(2.0, ellipticity(0.9, 1.2)))
    disk = Source(CENTER, [flux[1]], ExponentialMorphology(5.0, ellipticity(0.45)))
    return CompositeSource({"disk": disk, "bulge": bulge})


def brute_force(source, center, shape, radii, step=0.1, half=60.0):
    """Flux inside ellipses of circularised radii, summed over small pixels of the parts' analytic profiles."""
    axis = np.arange(-half, half, step) + 0.5 * step
    total = np.zeros((len(axis), len(axis)))
    for part in source.parts.values():
        dy, dx = axis[:, None] + center[0] - part.center[0], axis + center[1] - part.center[1]
        index = 0.5 if isinstance(part.morphology, GaussianMorphology) else 1.0
        own = own_radius(dy, dx, np.asarray(part.morphology.ellipticity))
        total += part.spectrum.flux[0] * sersic_brightness(index, own, float(part.morphology.half_light_radius))
    own = own_radius(axis[:, None], axis, shape)
    return np.array([total[own < radius].sum() * step**2 for radius in radii])


@pytest.mark.parametrize("offset", [(0.0, 0.0), (1.5, -2.0), (6.0, 9.0)])
def test_composite_sources_against_sums_over_pixels(offset):
    source = bulge_and_disk(offset)
    found = profile(as_result(source), "host", radii=[1.0, 2.0, 4.0, 8.0, 16.0, 30.0])
    share = np.array([5.0, 3.0]) / 8
    center = np.add(CENTER, share[1] * np.array(offset))
    shape = share[0] * ellipticity(0.45) + share[1] * ellipticity(0.9, 1.2)
    # 1e-12: rounding.
    np.testing.assert_allclose(found.center[0], center, rtol=1e-12)
    np.testing.assert_allclose(found.ellipticity[0, 0], shape, rtol=1e-12)
    radii = found.radius * np.sqrt(found.axis_ratio[0, 0])
    expected = brute_force(source, center, shape, radii)
    # 2e-3 of the flux: pixels of 0.1 on the rim; and far from the centre, radii are told apart in steps of 15 %.
    np.testing.assert_allclose(found.total.curve_of_growth[0, 0], expected, atol=2e-3 * 8)
    rim = brute_force(source, center, shape, np.concatenate([radii * 0.95, radii * 1.05]))
    mean = (rim[6:] - rim[:6]) / (np.pi * radii**2 * (1.05**2 - 0.95**2))
    # 2 %: an annulus that wide isn't the ellipse.
    np.testing.assert_allclose(found.total.surface_brightness[0, 0], mean, rtol=2e-2, atol=1e-4)
    half_light = found.r50[0, 0] * np.sqrt(found.axis_ratio[0, 0])
    assert brute_force(source, center, shape, [half_light])[0] == pytest.approx(4.0, abs=2e-3 * 8)


@pytest.mark.parametrize("offset", [(0.0, 0.0), (1.5, -2.0), (12.0, 9.0)])
def test_convolved_composite_sources_against_sums_over_pixels(offset):
    sigma = 1.5
    source = bulge_and_disk(offset)
    # A Gaussian through a Gaussian is another one; the disk is tested by itself.
    bulge = source.parts["bulge"]
    source = CompositeSource({"bulge": bulge, "round": Source(CENTER, [5.0], GaussianMorphology(5.0))})
    found = profile(as_result(source), "host", psf_sigma=sigma, radii=[1.0, 3.0, 6.0, 12.0, 24.0])
    center, shape = found.center[0], found.ellipticity[0, 0]
    step = 0.1
    axis = np.arange(-50, 50, step) + 0.5 * step
    total = 0.0
    for part in source.parts.values():
        own = ellipses.shape_matrix(np.asarray(part.morphology.ellipticity, float))
        width = float(part.morphology.half_light_radius) / np.sqrt(2 * np.log(2))
        moments = width**2 * own + sigma**2 * np.eye(2)
        dy, dx = axis[:, None] + center[0] - part.center[0], axis + center[1] - part.center[1]
        (yy, yx), (_, xx) = np.linalg.inv(moments)
        gaussian = np.exp(-0.5 * (yy * dy**2 + 2 * yx * dy * dx + xx * dx**2))
        total = total + part.spectrum.flux[0] * gaussian / (2 * np.pi * np.sqrt(np.linalg.det(moments)))
    own = own_radius(axis[:, None], axis, shape)
    circular = found.radius * np.sqrt(found.axis_ratio[0, 0])
    inside = [total[own < radius].sum() * step**2 for radius in circular]
    # 1e-3 of the flux, and of the peak: pixels of 0.1 on the rim.
    np.testing.assert_allclose(found.total.convolved_curve_of_growth[0, 0], inside, atol=1e-3 * 8)
    for number, radius in enumerate(circular):
        on = (np.array(along_ellipse(radius, shape)) - axis[0]) / step
        mean = scipy.ndimage.map_coordinates(total, on, order=3).mean()
        assert found.total.convolved_surface_brightness[0, 0, number] == pytest.approx(mean, abs=1e-4 * total.max())


def test_components_add_up_and_have_profiles_of_their_own():
    result = as_result(bulge_and_disk())
    whole = profile(result, "host", psf_sigma=1.5)
    assert list(whole.components) == ["disk", "bulge"]
    for name in ("surface_brightness", "curve_of_growth", "convolved_surface_brightness", "convolved_curve_of_growth"):
        parts = sum(getattr(part, name) for part in whole.components.values())
        np.testing.assert_allclose(getattr(whole.total, name), parts, rtol=1e-12)
    disk = profile(result, "host.parts.disk")
    assert list(disk.components) == ["disk"]
    # 1e-5: the table.
    np.testing.assert_allclose(disk.r50, 5.0 / np.sqrt(0.45), rtol=1e-5)
    np.testing.assert_allclose(profile(result, "sources.host").r50, whole.r50)
    # Operations on trees sort names.
    np.testing.assert_allclose(jax.tree.map(lambda each: each, whole).r80, whole.r80)


def test_concentric_parts_of_one_shape_are_summed_exactly():
    shape = ellipticity(0.5)
    bulge, disk = (Source(CENTER, [f], SersicMorphology(r, n, shape)) for f, r, n in ((2.0, 1.0, 4.0), (6.0, 5.0, 1.0)))
    found = profile(as_result(CompositeSource({"bulge": bulge, "disk": disk})), "host")

    def growth(radius):
        inside = [scipy.special.gammainc(2 * n, sersic_b(n) * (radius / r) ** (1 / n)) for n, r in ((4, 1.0), (1, 5.0))]
        return 2.0 * inside[0] + 6.0 * inside[1]

    expected = scipy.optimize.brentq(lambda radius: growth(radius) - 0.8 * 8, 0.1, 100) / np.sqrt(0.5)
    # 1e-5: the table.
    np.testing.assert_allclose(found.r80, expected, rtol=1e-5)


def test_points_hold_light_but_no_area():
    disk = Source(CENTER, [6.0], ExponentialMorphology(5.0, ellipticity(0.5)))
    nucleus = Source(CENTER, [4.0], PointMorphology())
    found = profile(as_result(CompositeSource({"nucleus": nucleus, "disk": disk})), "host", psf_sigma=1.2)
    np.testing.assert_array_equal(found.r20, 0.0)
    assert np.isnan(found.c80_20).all()
    # A sixth of the disk's light; 1e-5: the table.
    np.testing.assert_allclose(found.r50, 5.0 / np.sqrt(0.5) * sersic_fraction(1.0, 1 / 6), rtol=1e-5)
    np.testing.assert_allclose(found.ellipticity[0, 0], ellipticity(0.5), rtol=1e-12)
    np.testing.assert_array_equal(found.components["nucleus"].surface_brightness, 0.0)
    np.testing.assert_array_equal(found.components["nucleus"].curve_of_growth, 4.0)
    # What a Gaussian of the PSF's width has inside the largest ellipse: all.
    np.testing.assert_allclose(found.components["nucleus"].convolved_curve_of_growth[0, 0, -1], 4.0, rtol=1e-5)


def test_points_beside_the_centre_count_where_they_are():
    disk = Source(CENTER, [6.0], ExponentialMorphology(5.0))
    star = Source(np.add(CENTER, (3.0, 4.0)), [4.0], PointMorphology())
    found = profile(as_result(CompositeSource({"disk": disk, "star": star})), "host", radii=[3.5, 6.5])
    np.testing.assert_allclose(found.center[0], CENTER)
    # 1e-6: a table that is constant on both sides.
    np.testing.assert_allclose(found.components["star"].curve_of_growth[0, 0], [0.0, 4.0], atol=1e-6)


# ---- posteriors


@pytest.fixture
def sampled(rng):
    """Return a posterior of a composite source whose parts have links and free centres."""
    channels = tuple(BANDS)
    curve = link.Polynomial.constant
    disk = SersicMorphology(
        curve(5.0, 1, BANDS), curve(1.2, 1, BANDS), link.PerBand({band: ellipticity(0.5) for band in BANDS})
    )
    bulge = MultiGaussianMorphology([0.5, 1.0, 2.0], [0.2, 0.3, 0.5], ellipticity(0.8, 1.0))
    source = CompositeSource(
        {"disk": Source(CENTER, [5.0, 6.0, 7.0], disk), "bulge": Source(CENTER, [1.0, 2.0, 3.0], bulge)}
    )
    count, base = 6, "sources.host.parts"
    draws = {
        f"{base}.disk.spectrum.flux": rng.uniform(4, 8, (count, 3)),
        f"{base}.disk.morphology.half_light_radius": rng.uniform(4, 6, (count, 2)),
        f"{base}.disk.morphology.sersic_index": rng.uniform(1, 1.5, (count, 2)),
        f"{base}.disk.morphology.ellipticity": ellipticity(0.5) + rng.normal(0, 0.05, (count, 3, 2)),
        f"{base}.bulge.morphology.amplitudes": rng.uniform(0, 1, (count, 3)),
        f"{base}.bulge.center": np.array(CENTER) + rng.normal(0, 0.5, (count, 2)),
        "observations.obs.background": np.zeros((count, 1)),
    }
    return as_posterior(as_result(source, channels), draws)


def test_each_draw_is_the_profile_of_its_scene(sampled):
    radii = [0.5, 2.0, 8.0]
    together = profile(sampled, "host", radii=radii, psf_sigma=1.3)
    scenes = {path: values for path, values in sampled.draws.items() if path.startswith("sources.")}
    alone = dataclasses.replace(sampled, draws=scenes)
    for number in (0, 5):
        scene, _ = alone.model(number)
        single = profile(dataclasses.replace(sampled.result, scene=scene), "host", radii=radii, psf_sigma=1.3)
        # 5e-4: a table of other radii, where ellipses pass through the bulge's centre; 1e-3 in annuli.
        for name in (
            "surface_brightness",
            "curve_of_growth",
            "convolved_surface_brightness",
            "convolved_curve_of_growth",
        ):
            one, same = getattr(single.total, name)[0], getattr(together.total, name)[number]
            np.testing.assert_allclose(same, one, rtol=5e-4, atol=5e-4 * np.abs(one).max(), err_msg=name)
        np.testing.assert_allclose(together.r50[number], single.r50[0], rtol=5e-4)
        np.testing.assert_allclose(together.petrosian_radius()[number], single.petrosian_radius()[0], rtol=1e-3)
        np.testing.assert_allclose(together.ellipticity[number], single.ellipticity[0], rtol=1e-6)


def test_linked_parameters_are_those_of_the_posterior(sampled):
    disk = profile(sampled, "host.parts.disk")
    path = "sources.host.parts.disk.morphology"
    sizes, shapes = sampled.in_channels(f"{path}.half_light_radius"), sampled.in_channels(f"{path}.ellipticity")
    norm = np.hypot(shapes[..., 0], shapes[..., 1])
    ratio = np.sqrt((1 - norm) / (1 + norm))
    # 3e-5: the table.
    np.testing.assert_allclose(disk.r50, sizes / np.sqrt(ratio), rtol=3e-5)
    np.testing.assert_allclose(disk.axis_ratio, ratio, rtol=1e-6)


def test_errors_are_quantiles_of_the_draws(rng):
    q, count = 0.6, 400
    source = Source(CENTER, [10.0], ExponentialMorphology(4.0, ellipticity(q)))
    size, flux = rng.lognormal(np.log(4.0), 0.1, count), rng.uniform(5, 15, (count, 1))
    posterior = as_posterior(
        as_result(source), {"sources.host.morphology.half_light_radius": size, "sources.host.spectrum.flux": flux}
    )
    found = profile(posterior, "host", radii=[2.0, 4.0])
    assert found.is_sampled
    assert found.r50.shape == (count, 1)
    table = found.summary()
    assert isinstance(table, QTable)
    for name, values in (("r50", size / np.sqrt(q)), ("flux", flux[:, 0])):
        low, middle, high = np.quantile(values, [0.16, 0.5, 0.84])
        given = [table[name + suffix][0] for suffix in ("", "_minus", "_plus")]
        # 1e-4: the table, in differences that are a tenth of the radius.
        np.testing.assert_allclose(
            [float(np.asarray(each)) for each in map(plain, given)], [middle, middle - low, high - middle], rtol=2e-4
        )
    profiles = found.table("g")
    radius = 4.0
    b = sersic_b(1.0)
    x = radius * np.sqrt(q) / size
    growth = flux[:, 0] * scipy.special.gammainc(2, b * x)
    low, middle, high = np.quantile(growth, [0.16, 0.5, 0.84])
    given = [plain(profiles["curve_of_growth" + suffix][1]) for suffix in ("", "_minus", "_plus")]
    np.testing.assert_allclose(given, [middle, middle - low, high - middle], rtol=2e-4)
    # The same for all draws: no error.
    assert plain(table["C80_20_plus"][0]) == pytest.approx(0.0, abs=1e-3)


def plain(value) -> float:
    return float(getattr(value, "value", value))


def test_quantiles_leave_nan_out():
    values = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.nan], [2.0, np.nan]])
    low, middle, high = quantiles(values)
    np.testing.assert_allclose([low[0], middle[0], high[0]], np.quantile([1.0, 2.0, 3.0], [0.16, 0.5, 0.84]))
    assert np.isnan([low[1], middle[1], high[1]]).all()


# ---- tables and units


def test_with_zeropoints_and_wcs_there_are_magnitudes_and_arcsec():
    scale, flux, size = 0.2, 1000.0, 5.0
    observation = make_observation((81, 83), scale_arcsec=scale, zeropoint=27.0)
    source = Source(CENTER, [flux], ExponentialMorphology(size))
    found = profile(as_result(source, observations=[observation], wcs=observation.wcs), "host", psf_sigma=1.5)
    table = found.summary(25.0)
    assert table["r50"].unit == u.arcsec
    # 1e-5: the table, and pixels of a tangent plane.
    np.testing.assert_allclose(table["r50"].value, size * scale, rtol=1e-5)
    np.testing.assert_allclose(table["mag"].value, 31.4 - 2.5 * np.log10(flux), rtol=1e-12)
    assert table["flux"].unit == u.nJy
    level = 10 ** (-0.4 * (25.0 - 31.4)) * scale**2
    expected = scipy.optimize.brentq(lambda r: flux * sersic_brightness(1.0, r, size) - level, 0.01, 100)
    np.testing.assert_allclose(table["isophotal_radius"].value, expected * scale, rtol=2e-5)
    assert not any(name.endswith(("_minus", "_plus")) for name in table.colnames)
    profiles = found.table("g")
    assert profiles["surface_brightness"].unit == u.mag / u.arcsec**2
    bright = flux * sersic_brightness(1.0, found.radius, size) / scale**2
    # 1e-3 mag: the table.
    np.testing.assert_allclose(profiles["surface_brightness"].value, 31.4 - 2.5 * np.log10(bright), atol=1e-3)
    assert {"convolved_surface_brightness", "convolved_curve_of_growth"} < set(profiles.colnames)


def test_without_zeropoints_and_wcs_there_are_pixels():
    found = profile_of(ExponentialMorphology(5.0))
    table = found.summary()
    assert table["r50"].unit == u.pix
    assert np.isnan(table["mag"].value).all() == (not found.is_calibrated)
    assert not found.has_magnitudes
    assert np.isnan(found.radius_arcsec).all()
    profiles = found.table("g")
    assert profiles["radius"].unit == u.pix
    assert profiles.colnames == ["radius", "surface_brightness", "curve_of_growth"]
    with pytest.raises(ValueError, match="zeropoints and a WCS"):
        found.isophotal_radius(mag_per_arcsec2=25.0)


# ---- errors


def test_unknown_names_come_with_the_nearest():
    result = as_result(bulge_and_disk())
    with pytest.raises(KeyError, match=r"no source 'hots'\. Nearest: host"):
        profile(result, "hots")
    with pytest.raises(KeyError, match=r"Nearest: host\.parts\.bulge"):
        profile(result, "host.parts.bulgy")


def test_images_have_no_profile():
    source = Source(CENTER, [1.0], PixelMorphology(np.ones((5, 5))))
    with pytest.raises(ValueError, match=r"sources\.host is a PixelMorphology.*measure_shapes"):
        profile(as_result(source), "host")


@pytest.mark.usefixtures("as_users_have_it")
def test_only_fits_and_posteriors_have_profiles():
    with pytest.raises(TypeError, match="FitResult or a Posterior; got a Scene"):
        profile(as_result(bulge_and_disk()).scene, "host")


@pytest.mark.parametrize("radii", [[0.0, 1.0], [2.0, 1.0], [1.0, np.nan], [[1.0, 2.0]]])
def test_radii_must_be_positive_and_increase(radii):
    with pytest.raises(ValueError, match="positive and increase"):
        profile_of(ExponentialMorphology(3.0), radii=radii)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"psf_sigma": 0.0}, ValueError, "one positive width"),
        ({"psf_sigma": [1.0, 2.0]}, ValueError, "one positive width, or one for each of 1 channels"),
        ({"psf_sigma": 1.0, "observation": "HST"}, ValueError, "not both"),
        ({"psf_sigma": 1 * u.arcsec}, ValueError, "no WCS"),
        ({"radii": [1, 2] * u.arcsec}, ValueError, "no WCS"),
        ({"radii": [1, 2] * u.s}, ValueError, "pix"),
        ({"observation": "HST"}, KeyError, "no observation 'HST'"),
    ],
)
def test_widths_of_the_psf_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        profile_of(ExponentialMorphology(3.0), **options)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda found: found.fraction_radius(1.0), "between 0 and 1"),
        (lambda found: found.petrosian_radius(0.0), "between 0 and 1"),
        (lambda found: found.isophotal_radius(), "either"),
        (lambda found: found.isophotal_radius(mag_per_arcsec2=25.0, surface_brightness=1.0), "either"),
        (lambda found: found.isophotal_radius(surface_brightness=0.0), "must be positive"),
        (lambda found: found.table("z"), "not 'z'"),
    ],
)
def test_questions_are_checked(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(profile_of(ExponentialMorphology(3.0)))
