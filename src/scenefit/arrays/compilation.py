"""Compilation and transfer: what keeps the time before the first result short."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

CPU_OPTIONS: dict[str, bool | int] = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 2}
"""XLA options that halve the compile time of a solver step on CPUs and leave its run time as it is."""

MAPPINGS, MAX_MAPPINGS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
"""Where Linux lists the memory mappings of a process, and says how many it may have."""
SHARE_OF_MAPPINGS = 0.5
"""Share of these from which on compiled programs are dropped."""


def make_room() -> None:
    """Drop all compiled programs of the process if memory mappings run short: they are compiled again when they are called.

    Every program of XLA takes several on CPUs, and Linux grants 65530 by default: after many fits of different structures the
    compiler would fail. Call it where nothing is being traced.
    """
    try:
        with MAPPINGS.open("rb") as file:
            count = sum(1 for _ in file)
        limit = int(MAX_MAPPINGS.read_text())
    except OSError:  # Not Linux.
        return
    if count > SHARE_OF_MAPPINGS * limit:
        jax.clear_caches()


class compiled:  # noqa: N801
    """The function compiled by `equinox.filter_jit`, on CPUs with `CPU_OPTIONS`.

    Nothing is asked of the backend before the first call.

    Parameters
    ----------
    function : callable
    """

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        self._jitted = functools.cache(
            lambda: eqx.filter_jit(function, compiler_options=_options())  # pyright: ignore[reportCallIssue]
        )

    def __call__(self, *args, **kwargs):
        """Call the compiled function."""
        return self._jitted()(*args, **kwargs)

    def lower(self, *args):
        """Return what `compile()` makes the program of that `__call__` runs with such arguments."""
        return self._jitted().lower(*args)


def compile_together(*calls: tuple[compiled, Sequence]) -> None:
    """Compile functions for their arguments, all at the same time, so that the first calls needn't one after the other.

    Compilers work on one core each.
    """
    with ThreadPoolExecutor(max(len(calls), 1)) as pool:
        # Tracing takes the interpreter's lock, compilation doesn't.
        for program in [pool.submit(function.lower(*args).compile) for function, args in calls]:
            program.result()


def as_floats(values: Any) -> Array:
    """Return a copy of values as a JAX array of the default float type."""
    return _on_device(values, jnp.result_type(float))


def as_complexes(values: Any) -> Array:
    """Return a copy of values as a JAX array of the default complex type."""
    return _on_device(values, jnp.result_type(complex))


def as_integers(values: Any) -> Array:
    """Return a copy of values as a JAX array of 32-bit integers."""
    return _on_device(values, np.dtype(np.int32))


def as_booleans(values: Any) -> Array:
    """Return a copy of values as a JAX array of booleans."""
    return _on_device(values, np.dtype(bool))


def _on_device(values, dtype) -> Array:
    """Convert on the host and transfer: JAX would compile a conversion for every shape."""
    return jax.device_put(np.array(values, dtype=dtype))


@functools.cache
def _options() -> dict[str, bool | int] | None:
    """Return the options, if this version of XLA knows them."""
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=CPU_OPTIONS).lower().compile()
    except RuntimeError:
        return None
    return CPU_OPTIONS
