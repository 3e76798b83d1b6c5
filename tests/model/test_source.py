import astropy.units as u
import numpy as np
import pytest
from astropy.coordinates import SkyCoord

from scenefit.model.morphology import PointMorphology
from scenefit.model.source import AbstractSource, CompositeSource, Source
from scenefit.model.spectrum import ArraySpectrum
from scenefit.sky.frame import Frame
from tests.helpers import final_classes, tangent_wcs


def star(*center):
    return Source(center, [1.0, 2.0], PointMorphology())


def test_every_source_yields_its_components_by_path():
    pair = CompositeSource({"host": star(1, 2), "inner": CompositeSource({"knot": star(3, 4)})})
    examples = [(star(5, 6), ["s"]), (pair, ["s.parts.host", "s.parts.inner.parts.knot"])]
    assert final_classes(AbstractSource) == {type(source) for source, _ in examples}
    for source, expected in examples:
        components = dict(source.components("s"))
        assert list(components) == expected
        assert all(isinstance(component, Source) for component in components.values())
    np.testing.assert_array_equal(dict(pair.components("s"))["s.parts.inner.parts.knot"].center, [3, 4])


def test_an_array_stands_for_a_spectrum():
    source = star(1, 2)
    assert isinstance(source.spectrum, ArraySpectrum)
    np.testing.assert_array_equal(source.spectrum.flux, [1, 2])


@pytest.mark.parametrize(
    "center", [1.0, (1.0, 2.0, 3.0), [[1.0, 2.0]], (1.0, np.nan), SkyCoord([1, 2] * u.deg, [3, 4] * u.deg)]
)
def test_a_center_is_one_position(center):
    with pytest.raises(ValueError, match=r"center is finite \(y, x\) in model pixels or one SkyCoord; got"):
        Source(center, [1.0], PointMorphology())


def test_a_center_in_pixels_may_say_so():
    np.testing.assert_array_equal(Source((3, 4) * u.pix, [1.0], PointMorphology()).center, [3, 4])
    with pytest.raises(ValueError, match="A source's center must be in pix"):
        Source((3, 4) * u.arcsec, [1.0], PointMorphology())


@pytest.mark.usefixtures("as_users_have_it")
def test_a_source_wants_a_morphology():
    with pytest.raises(TypeError, match=r"wants a morphology such as PointMorphology\(\); got 'sersic'"):
        Source((3, 4), [1.0], "sersic")


def test_sky_coordinates_are_placed_on_a_frame():
    frame = Frame((20, 30), channels="g", wcs=tangent_wcs((20, 30)))
    sky = frame.to_sky((7.0, 8.5))
    pair = CompositeSource({"host": Source(sky, [1.0], PointMorphology()), "knot": star(3, 4)})
    placed = dict(pair.placed(frame).components("s"))
    # 1e-6 pixels: rounding of degrees in float64.
    np.testing.assert_allclose(placed["s.parts.host"].center, [7.0, 8.5], atol=1e-6)
    np.testing.assert_array_equal(placed["s.parts.knot"].center, [3, 4])
    assert star(1, 2).placed(frame).center.tolist() == [1, 2]


def test_a_composite_wants_parts():
    with pytest.raises(ValueError, match="at least one part; got none"):
        CompositeSource({})


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("name", ["a.b", "a*", "", 3])
def test_parts_have_names_that_paths_can_hold(name):
    with pytest.raises(ValueError, match=r"Source names are strings without '\.' and '\*'; got"):
        CompositeSource({name: star(1, 2)})


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("parts", "got"), [([1, 2], "list"), ({"a": 3}, r"\{'a': 'int'\}")])
def test_parts_are_named_sources(parts, got):
    with pytest.raises(TypeError, match=f"a mapping of names to Source or CompositeSource; got {got}"):
        CompositeSource(parts)
