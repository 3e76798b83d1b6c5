import jax.numpy as jnp
import numpy as np
import pytest

from scenefit.arrays import compilation
from scenefit.arrays.compilation import as_floats, compile_together, compiled, make_room


def num_mappings() -> int:
    return compilation.MAPPINGS.read_bytes().count(b"\n")


@pytest.fixture
def sine():
    """A compiled function, and the shapes that it has been traced for."""
    traced = []

    @compiled
    def function(x):
        traced.append(x.shape)
        return jnp.sin(x) @ jnp.cos(x)

    return function, traced


def test_what_is_compiled_together_is_there_when_it_is_called(sine, compilations):
    function, traced = sine
    product = compiled(lambda x, y: jnp.cumsum(x * y))
    x, y = as_floats(np.arange(30)), as_floats(np.ones(30))
    compile_together((function, (x,)), (product, (x, y)))
    assert compilations
    compilations.clear()
    np.testing.assert_allclose(function(x), np.sin(x) @ np.cos(x), rtol=1e-4)
    np.testing.assert_allclose(product(x, y), np.cumsum(np.arange(30.0)))
    assert compilations == []
    assert traced == [(30,)]


@pytest.mark.skipif(not compilation.MAPPINGS.exists(), reason="memory mappings are listed on Linux only")
def test_compiled_programs_are_dropped_where_mappings_run_short(sine, monkeypatch):
    function, traced = sine
    for size in range(2, 22):
        function(np.ones(size))
    full = num_mappings()
    make_room()
    # Far from half of all.
    function(np.ones(2))
    assert len(traced) == 20
    monkeypatch.setattr(compilation, "SHARE_OF_MAPPINGS", 0.0)
    make_room()
    # Two mappings a program at least.
    assert num_mappings() < full - 40
    assert function(np.ones(2)) == pytest.approx(2 * np.sin(1) * np.cos(1))
    assert len(traced) == 21


def test_a_system_without_such_a_list_keeps_them(sine, monkeypatch, tmp_path):
    function, traced = sine
    monkeypatch.setattr(compilation, "MAPPINGS", tmp_path / "none")
    monkeypatch.setattr(compilation, "SHARE_OF_MAPPINGS", 0.0)
    function(np.ones(3))
    make_room()
    function(np.ones(3))
    assert len(traced) == 1
