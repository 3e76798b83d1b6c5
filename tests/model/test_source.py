import numpy as np
import pytest

from scenefit.model.morphology import PointMorphology
from scenefit.model.source import AbstractSource, CompositeSource, Source
from scenefit.model.spectrum import ArraySpectrum
from tests.helpers import final_classes


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


@pytest.mark.parametrize("center", [1.0, (1.0, 2.0, 3.0), [[1.0, 2.0]]])
def test_a_center_is_a_pair(center):
    with pytest.raises(ValueError, match=r"center is \(y, x\) in model pixels; got shape"):
        Source(center, [1.0], PointMorphology())


def test_a_composite_wants_parts():
    with pytest.raises(ValueError, match="at least one part; got none"):
        CompositeSource({})
