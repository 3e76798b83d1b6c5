import numpy as np
import pytest

from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import Frame
from tests.helpers import tangent_wcs

CHANNELS = ("g", "r")


@pytest.fixture(scope="module")
def scene():
    pair = CompositeSource(
        {
            "host": Source((22.3, 18.0), [30.0, 40.0], GaussianMorphology(2.0, (0.2, 0.1))),
            "nucleus": Source((22.3, 18.0), [5.0, 6.0], PointMorphology()),
        }
    )
    image = np.random.default_rng(1).random((7, 7))
    frame = Frame((40, 44), channels=CHANNELS)
    return Scene(frame, {"pair": pair, "clumpy": Source((10, 30), [3.0, 2e-20], PixelMorphology(image))})


def test_a_sequence_of_sources_is_numbered():
    star = Source((5, 5), [1.0], PointMorphology())
    assert list(Scene(Frame((12, 12), channels="g"), [star, star]).sources) == ["0", "1"]


@pytest.mark.parametrize("name", ["a.b", "a*", ""])
def test_names_that_paths_can_not_hold(name):
    with pytest.raises(ValueError, match=r"Source names are strings without '\.' and '\*'; got"):
        Scene(Frame((12, 12), channels="g"), {name: Source((5, 5), [1.0], PointMorphology())})


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("sources", "got"), [(3, "int"), ([3], r"\{'0': 'int'\}"), (None, "NoneType")])
def test_what_is_no_source(sources, got):
    with pytest.raises(TypeError, match=f"a mapping of names to Source or CompositeSource; got {got}"):
        Scene(Frame((12, 12), channels="g"), sources)


@pytest.mark.usefixtures("as_users_have_it")
def test_what_is_no_frame():
    with pytest.raises(TypeError, match="A Scene lies on a Frame; got a tuple"):
        Scene((12, 12), {})


def test_sources_may_be_given_on_the_sky():
    frame = Frame((12, 14), channels="g", wcs=tangent_wcs((12, 14)))
    star = Source(frame.to_sky((5.0, 6.5)).galactic, [1.0], PointMorphology())
    # 1e-6 pixels: rounding of degrees in float64, there and back.
    np.testing.assert_allclose(Scene(frame, [star]).sources["0"].center, [5.0, 6.5], atol=1e-6)
    with pytest.raises(ValueError, match="This frame has no WCS: positions must be"):
        Scene(Frame((12, 14), channels="g"), [star])


def test_components_come_in_order(scene):
    assert [path for path, _ in scene.components()] == [
        "sources.pair.parts.host",
        "sources.pair.parts.nucleus",
        "sources.clumpy",
    ]


def test_evaluate_sums_the_sources(scene, eps):
    whole = scene.evaluate()
    assert whole.shape == (2, 40, 44)
    pieces = scene.evaluate(["pair"]) + scene.evaluate(["clumpy"])
    # 10 eps: rounding of the sum of both.
    np.testing.assert_allclose(whole, pieces, atol=10 * eps * whole.max())


def test_total_flux_and_faint_channels(scene, eps):
    # 1e-4: flux outside the stamps and aliasing of the point, see the tests of the morphologies.
    np.testing.assert_allclose(scene.evaluate(["pair"]).sum(axis=(1, 2)), [35, 46], rtol=1e-4)
    # 100 eps: rounding of 49 pixels. A flux of 1e-20 is no less accurate.
    np.testing.assert_allclose(scene.evaluate(["clumpy"]).sum(axis=(1, 2)), [3.0, 2e-20], rtol=100 * eps)


def test_nothing_is_dark(scene):
    assert not scene.evaluate([]).any()
    empty = Scene(scene.frame, {})
    assert empty.evaluate().shape == (2, 40, 44)
    assert not empty.evaluate().any()
    faint = Scene(scene.frame, [Source((5, 5), [0.0, 0.0], PointMorphology())])
    assert not faint.evaluate().any()


def test_sources_are_added_replaced_and_removed_in_copies(scene):
    star = Source((5, 5), [1.0, 1.0], PointMorphology())
    more = scene.with_sources(star=star, clumpy=star)
    assert list(more.sources) == ["pair", "clumpy", "star"]
    assert more.sources["clumpy"] is star
    assert list(more.without("star", "pair").sources) == ["clumpy"]
    assert list(scene.sources) == ["pair", "clumpy"]
    with pytest.raises(KeyError, match="no source"):
        scene.without("nobody")


def test_an_unknown_source_is_not_evaluated(scene):
    with pytest.raises(KeyError, match="nobody"):
        scene.evaluate(["nobody"])
