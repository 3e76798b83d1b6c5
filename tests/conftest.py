"""Precision, keys and data shared by all tests. Functions that build small inputs are in `tests/helpers.py`."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest


def pytest_addoption(parser):
    parser.addoption("--x64", action="store_true", help="run JAX in double precision (default: single)")


def pytest_configure(config):
    if config.getoption("--x64"):
        jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """Let SIGINT raise KeyboardInterrupt, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Drop compiled programs before their parts of memory become too many for the operating system (65530 in Linux)."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def _compilation_events():
    """Everything that JAX compiles in this process."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event) if event.endswith("backend_compile_duration") else None
    )
    return events


@pytest.fixture
def compilations(_compilation_events):
    """What JAX compiles during a test, one entry each."""
    _compilation_events.clear()
    return _compilation_events


@pytest.fixture
def key():
    """Random key of JAX, the same in every run."""
    return jax.random.key(2025)


@pytest.fixture
def rng():
    """Random generator of NumPy, the same in every run."""
    return np.random.default_rng(2025)


@pytest.fixture
def eps() -> float:
    """Rounding error of JAX's default floating-point type in this run."""
    return float(jnp.finfo(jnp.result_type(float)).eps)


@pytest.fixture
def as_users_have_it():
    """Switch off the type checks that the tests run under, which come before the package's own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def scenefit_data() -> Path:
    """Folder with the public data files, from the environment variable SCENEFIT_DATA; skips without it."""
    folder = os.environ.get("SCENEFIT_DATA")
    if not folder:
        pytest.skip("SCENEFIT_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def rendering_benchmark():
    """Return the module benchmarks/rendering.py, whose comparison with GalSim the tests assert."""
    pytest.importorskip("galsim")
    path = Path(__file__).parents[1] / "benchmarks" / "rendering.py"
    spec = importlib.util.spec_from_file_location("rendering_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
