import jax.numpy as jnp
import numpy as np
import pytest

from scenefit.arrays import compilation
from scenefit.arrays.compilation import compiled, make_room


def num_mappings() -> int:
    return compilation.MAPPINGS.read_bytes().count(b"\n")


@pytest.mark.skipif(not compilation.MAPPINGS.exists(), reason="memory mappings are listed on Linux only")
def test_compiled_programs_are_dropped_where_mappings_run_short():
    calls = []

    @compiled
    def sine(x):
        calls.append(x.shape)
        return jnp.sin(x) @ jnp.cos(x)

    for size in range(2, 22):
        sine(np.ones(size))
    full = num_mappings()
    make_room()
    # One beside them comes and goes: far from half of all.
    sine(np.ones(2))
    assert len(calls) == 20
    make_room(share=0.0)
    # Two mappings a program at least.
    assert num_mappings() < full - 40
    assert sine(np.ones(2)) == pytest.approx(2 * np.sin(1) * np.cos(1))
    assert len(calls) == 21


def test_a_system_without_such_a_list(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation, "MAPPINGS", tmp_path / "none")
    make_room(share=0.0)
