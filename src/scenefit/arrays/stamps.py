"""Stamps on a canvas: add many small images to a large one, and gather them back.

One loop over the stamps, each step a block of memory; neither compile time nor memory grows with their number.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero, linear_call
from jaxtyping import Array, Float, Int

BUCKET_RATIO = 2**0.5
"""Ratio of successive padded sizes: few distinct shapes to compile, at most so many times too many pixels a side."""


def bucket_size(size: int, smallest: int = 11) -> int:
    """Return the padded, odd stamp side for a stamp of `size` pixels: 11, 15, 21, 31, 43, 61, 87, 123, ..."""
    bucket, number = smallest, 0
    while bucket < size:
        number += 1
        bucket = int(smallest * BUCKET_RATIO**number + 1e-9) - 1 | 1
    return bucket


def bucket_count(count: int) -> int:
    """Return the padded number of stamps for `count` of them: 1, 2, 3, 4, 6, 8, 11, ..."""
    bucket = 1
    while bucket < count:
        bucket = max(bucket + 1, round(bucket * BUCKET_RATIO))
    return bucket


@jax.custom_jvp
def add_stamps(
    canvas: Float[Array, "channel y x"],
    spectra: Float[Array, "stamp channel"],
    stamps: Float[Array, "stamp h w"],
    origins: Int[Array, "stamp 2"],
) -> Float[Array, "channel y x"]:
    """Return the canvas plus `spectra[n, c] * stamps[n]` at rows and columns `origins[n]` onwards, for all n.

    Every stamp must lie on the canvas entirely. Differentiable (forwards and backwards) in all but `origins`.
    """

    def add(n, image):
        start = (jnp.zeros_like(origins[n, 0]), origins[n, 0], origins[n, 1])
        block = lax.dynamic_slice(image, start, (image.shape[0], *stamps.shape[1:]))
        return lax.dynamic_update_slice(image, block + spectra[n][:, None, None] * stamps[n], start)

    return lax.fori_loop(0, stamps.shape[0], add, canvas)


@partial(add_stamps.defjvp, symbolic_zeros=True)
def _add_stamps_jvp(primals, tangents):
    canvas, spectra, stamps, origins = primals
    value = add_stamps(canvas, spectra, stamps, origins)
    # linear_call can only be transposed if all its linear arguments are unknown: leave out those known to be zero.
    given = tuple(not isinstance(tangent, SymbolicZero) for tangent in tangents[:3])
    if not any(given):
        return value, jnp.zeros_like(value)
    linear = tuple(tangent for tangent, present in zip(tangents[:3], given, strict=True) if present)
    forward, backward = partial(_add_tangents, given, canvas.shape), partial(_gather_cotangents, given)
    return value, linear_call(forward, backward, (spectra, stamps, origins), linear)


def _add_tangents(given, shape, residuals, tangents):
    """Return the derivative of `add_stamps` along those tangents of (canvas, spectra, stamps) that are `given`."""
    spectra, stamps, origins = residuals
    remaining = iter(tangents)
    canvas_dot, spectra_dot, stamps_dot = (next(remaining) if present else None for present in given)
    start_image = jnp.zeros(shape, stamps.dtype) if canvas_dot is None else canvas_dot
    if spectra_dot is None and stamps_dot is None:
        return start_image

    def add(n, image):
        start = (jnp.zeros_like(origins[n, 0]), origins[n, 0], origins[n, 1])
        block = lax.dynamic_slice(image, start, (image.shape[0], *stamps.shape[1:]))
        if stamps_dot is not None:
            block = block + spectra[n][:, None, None] * stamps_dot[n]
        if spectra_dot is not None:
            block = block + spectra_dot[n][:, None, None] * stamps[n]
        return lax.dynamic_update_slice(image, block, start)

    return lax.fori_loop(0, stamps.shape[0], add, start_image)


def _gather_cotangents(given, residuals, cotangent):
    """Return the transpose of `_add_tangents`: the cotangents of those arguments that are `given`."""
    spectra, stamps, origins = residuals
    num_channels, shape = cotangent.shape[0], stamps.shape[1:]
    if not (given[1] or given[2]):
        return (cotangent,)

    def gather(_, row):
        spectrum, stamp, origin = row
        start = (jnp.zeros_like(origin[0]), origin[0], origin[1])
        block = lax.dynamic_slice(cotangent, start, (num_channels, *shape))
        block = block.reshape(num_channels, -1)
        return None, (
            block @ stamp.ravel() if given[1] else (),
            (spectrum @ block).reshape(shape) if given[2] else (),
        )

    _, gathered = lax.scan(gather, None, (spectra, stamps, origins))
    everything = (cotangent, *gathered)
    return tuple(value for value, present in zip(everything, given, strict=True) if present)


def gather_stamps(
    canvas: Float[Array, "y x"], origins: Int[Array, "stamp 2"], shape: tuple[int, int]
) -> Float[Array, "stamp h w"]:
    """Return the windows of `shape` of the canvas that start at `origins`."""
    return jax.vmap(lambda origin: lax.dynamic_slice(canvas, (origin[0], origin[1]), shape))(origins)
