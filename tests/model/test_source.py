import astropy.units as u
import numpy as np
import numpyro.distributions as dist
import pytest
from astropy.coordinates import SkyCoord

from scenefit.model.morphology import PointMorphology, SersicMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
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


def disk(**options):
    return Source((8.0, 9.0), [1.0, 2.0], SersicMorphology(2.0, 1.0), **options)


def test_priors_of_a_source_are_those_of_its_parameters():
    frame = Frame((20, 30), channels="gr", wcs=tangent_wcs((20, 30), 0.1))
    index, radius = dist.TruncatedNormal(1.1, 0.3, low=0.4, high=8.0), dist.Normal(0.3 * u.arcsec, 0.1 * u.arcsec)
    priors = {"morphology.sersic_index": index, "morphology.half_light_radius": radius}
    parameters = Parameters.default(Scene(frame, {"a": disk(priors=priors), "b": disk()}), [])
    own = parameters["sources.a.morphology.sersic_index"].prior
    assert own.log_prob(1.3) == index.log_prob(1.3)
    in_pixels = parameters["sources.a.morphology.half_light_radius"].prior
    # 1e-4: of the scale of the tangent plane.
    assert (in_pixels.loc, in_pixels.scale) == pytest.approx((3.0, 1.0), rel=1e-4)
    assert parameters["sources.a.center"].prior is None
    assert parameters["sources.b.morphology.sersic_index"].prior is None


def test_priors_stay_with_a_changed_copy():
    frame = Frame((20, 30), channels="gr", wcs=tangent_wcs((20, 30)))
    priors = {"center": dist.Normal(8.0, 1.0)}
    source = Source(frame.to_sky((8.0, 9.0)), [1.0, 2.0], PointMorphology(), priors)
    assert source.placed(frame).priors == priors
    moved = source.replace(center=(1.0, 2.0))
    assert moved.priors == priors
    np.testing.assert_array_equal(moved.center, [1.0, 2.0])


@pytest.mark.usefixtures("as_users_have_it")
def test_a_prior_of_what_is_no_parameter():
    with pytest.raises(ValueError, match=r"Priors of a source are of center, spectrum.flux, .*; got 'sersic_index'"):
        disk(priors={"sersic_index": dist.Normal(0.0, 1.0)})
    with pytest.raises(TypeError, match=r"The prior of center is a distribution .*; got 3"):
        disk(priors={"center": 3})


def test_parts_about_one_center_share_it():
    frame = Frame((20, 30), channels="gr")
    inner = CompositeSource({"bulge": disk(), "nucleus": star(8, 9)})
    scene = Scene(frame, {"a": CompositeSource({"disk": disk(), "inner": inner}, concentric=True), "b": inner})
    table = Parameters.default(scene, []).table
    tied = {path: parameter.tied_to for path, parameter in table.items() if parameter.tied_to}
    first = "sources.a.parts.disk.center"
    assert tied == {f"sources.a.parts.inner.parts.{name}.center": first for name in ("bulge", "nucleus")}
    assert scene.sources["a"].with_parts(scene.sources["a"].parts).concentric
