import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import Frame
from scenefit.survey.measure import measure_shapes

FRAME = Frame((61, 63), channels=("g", "r"))
CENTER = (30.3, 31.2)


def circular_half_light_radius(major, minor):
    """Radius of the circle with half the light of an elliptical Gaussian of these standard deviations."""

    def outside(radius):
        def integrand(angle):
            slope = 0.5 * ((np.cos(angle) / major) ** 2 + (np.sin(angle) / minor) ** 2)
            return np.exp(-slope * radius**2) / (4 * np.pi * major * minor * slope)

        return scipy.integrate.quad(integrand, 0, 2 * np.pi)[0]

    return scipy.optimize.brentq(lambda r: outside(r) - 0.5, 0.1 * minor, 3 * major)


def measure(source):
    return measure_shapes(Scene(FRAME, {"s": source}))[0]


@pytest.mark.parametrize("ellipticity", [(0.0, 0.0), (0.4, 0.0), (-0.2, 0.35)])
@pytest.mark.parametrize("radius", [1.0, 4.0])
def test_shape_of_a_gaussian(radius, ellipticity):
    shape = measure(Source(CENTER, [3.0, 9.0], GaussianMorphology(radius, ellipticity)))
    sigma, e = radius / np.sqrt(2 * np.log(2)), np.array(ellipticity)
    expected = np.array([[1 - e[0], e[1]], [e[1], 1 + e[0]]])
    expected = sigma**2 * expected / np.sqrt(np.linalg.det(expected))
    # 1e-3: adaptive moments iterate to 1e-5 of their sum, the stamp ends at 1e-5 of the flux.
    np.testing.assert_allclose(shape.moments, expected, atol=1e-3 * np.trace(expected) + 1e-3)
    np.testing.assert_array_equal(shape.center, CENTER)
    values = np.linalg.eigvalsh(expected)
    truth = circular_half_light_radius(np.sqrt(values[1]), np.sqrt(values[0]))
    # 3 %, or 0.06 pixels: the PSF is taken out as if the light were round, and the growth curve comes from pixels.
    assert shape.half_light_radius == pytest.approx(truth, rel=0.03, abs=0.06)


@pytest.mark.parametrize("center", [(30.0, 31.0), (30.5, 31.5), CENTER, (30.1, 31.4)])
def test_a_point_has_no_size(center):
    shape = measure(Source(center, [3.0, 9.0], PointMorphology()))
    # 0.6 and 0.15, of the PSF's 0.82 and 0.49: a PSF of 0.7 pixels is hardly resolved by the pixels it is measured on.
    assert shape.half_light_radius < 0.6
    np.testing.assert_allclose(shape.moments, 0, atol=0.15)


def test_the_center_of_an_image_is_that_of_its_light():
    y, x = np.mgrid[:21, :21]
    image = np.exp(-0.5 * ((y - 12.3) ** 2 + (x - 9.4) ** 2) / 3.0**2)
    shape = measure(Source((30, 31), [1.0, 1.0], PixelMorphology(image)))
    # 0.02 pixels: the stamp cuts the wings at 2.5 standard deviations.
    np.testing.assert_allclose(shape.center, [30 + 2.3, 31 - 0.6], atol=0.02)


def test_a_composite_is_measured_as_a_whole():
    parts = {
        "wide": Source(CENTER, [3.0, 3.0], GaussianMorphology(5.0)),
        "narrow": Source(CENTER, [1.0, 1.0], GaussianMorphology(1.0)),
    }
    shape = measure(CompositeSource(parts))
    # Half of all light: 3/4 of (1 - 2^-(r/5)^2) and 1/4 of (1 - 2^-(r/1)^2).
    truth = scipy.optimize.brentq(lambda r: 0.75 * 2 ** -((r / 5) ** 2) + 0.25 * 2 ** -(r**2) - 0.5, 0.5, 9)
    # 3 %: radii from pixels.
    assert shape.half_light_radius == pytest.approx(truth, rel=0.03)


def test_the_unit_of_a_channel_does_not_matter():
    """Bulge and disk of different colour, with one channel's flux in another unit."""
    shapes = []
    for scale in (1.0, 1e-20, 1e10):
        parts = {
            "disk": Source(CENTER, [3.0, 1.0 * scale], GaussianMorphology(5.0)),
            "bulge": Source(CENTER, [1.0, 6.0 * scale], GaussianMorphology(1.0)),
        }
        shapes.append(measure(CompositeSource(parts)).half_light_radius)
    # 1e-3: rounding in float32.
    np.testing.assert_allclose(shapes, shapes[0], rtol=1e-3)


def test_a_source_without_light_has_no_shape():
    shape = measure(Source(CENTER, [0.0, 0.0], GaussianMorphology(3.0)))
    assert np.isnan(shape.half_light_radius)
    assert np.isnan(shape.moments).all()
    np.testing.assert_array_equal(shape.center, CENTER)
