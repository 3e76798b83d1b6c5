"""Stamps on a canvas: add many small images to a large one.

One loop over the stamps, each step a block of memory; neither compile time nor memory grows with their number.
"""

from __future__ import annotations

import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from scenefit.arrays.linear import linear_map

BUCKET_RATIO = 2**0.5
"""Ratio of successive padded sizes: few distinct shapes to compile, at most so many times too many pixels a side."""


def bucket_size(size: int, smallest: int = 11) -> int:
    """Return the padded, odd stamp side for a stamp of `size` pixels: 11, 15, 21, 31, 43, 61, 87, 123, ..."""
    bucket, number = smallest, 0
    while bucket < size:
        number += 1
        bucket = int(smallest * BUCKET_RATIO**number + 1e-9) - 1 | 1
    return bucket


def rounded_up(number: int, digits: int) -> int:
    """Return the smallest integer >= `number` whose binary digits after the first `digits` are zeros."""
    step = 1 << max(0, (int(number) - 1).bit_length() - digits)
    return -(-int(number) // step) * step


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
    stamps: Float[Array, "stamp plane h w"],
    origins: Int[Array, "stamp 2"],
) -> Float[Array, "channel y x"]:
    """Return the canvas plus `spectra[n, c] * stamps[n, c]` at rows and columns `origins[n]` onwards, for all n.

    Stamps have one plane for all channels, or one per channel. Every stamp must lie on the canvas entirely. Differentiable
    (forwards and backwards) in all but `origins`.
    """

    def add(n, image):
        start = first_indices(origins[n])
        block = lax.dynamic_slice(image, start, (image.shape[0], *stamps.shape[2:]))
        return lax.dynamic_update_slice(image, block + spectra[n][:, None, None] * stamps[n], start)

    return lax.fori_loop(0, stamps.shape[0], add, canvas)


@partial(add_stamps.defjvp, symbolic_zeros=True)
def _add_stamps_jvp(primals, tangents):
    canvas, spectra, stamps, origins = primals
    value = add_stamps(canvas, spectra, stamps, origins)
    # A linear map can only be transposed if all its arguments are unknown: leave out those known to be zero.
    given = tuple(not isinstance(tangent, SymbolicZero) for tangent in tangents[:3])
    if not any(given):
        return value, jnp.zeros_like(value)
    linear = tuple(tangent for tangent, present in zip(tangents[:3], given, strict=True) if present)
    constants = (spectra, stamps, origins)
    return value, linear_map(_forward(given, canvas.shape), _backward(given, canvas.shape), constants, linear)[0]


def first_indices(origin, *leading):
    """Return the first indices of a stamp on a canvas of shape (*leading, channel, y, x)."""
    zero = jnp.zeros_like(origin[0])
    return (*leading, zero, origin[0], origin[1])


# `linear_map` wants the same function for the same shape.
@functools.cache
def _forward(given, shape):
    """Return the derivative of `add_stamps` along those tangents of (canvas, spectra, stamps) that are `given`."""

    def forward(constants, tangents):
        spectra, stamps, origins = constants
        remaining = iter(tangents)
        canvas_dot, spectra_dot, stamps_dot = (next(remaining) if present else None for present in given)
        leading = tangents[0].shape[: tangents[0].ndim - _NDIM[given.index(True)]]
        image = jnp.zeros((*leading, *shape), stamps.dtype) if canvas_dot is None else canvas_dot
        if spectra_dot is None and stamps_dot is None:
            return (image,)

        def add(n, image):
            start = first_indices(origins[n], *[jnp.zeros_like(origins[n, 0])] * len(leading))
            block = lax.dynamic_slice(image, start, (*leading, shape[0], *stamps.shape[2:]))
            if stamps_dot is not None:
                block = block + spectra[n][:, None, None] * stamps_dot[..., n, :, :, :]
            if spectra_dot is not None:
                block = block + spectra_dot[..., n, :, None, None] * stamps[n]
            return lax.dynamic_update_slice(image, block, start)

        return (lax.fori_loop(0, stamps.shape[0], add, image),)

    return forward


_NDIM = (3, 2, 4)
"""Axes of canvas, spectra and stamps."""


@functools.cache
def _backward(given, shape):
    """Return the transpose of `_forward`: the cotangents of those arguments that are `given`."""

    def backward(constants, cotangents):
        spectra, stamps, origins = constants
        (cotangent,) = cotangents
        leading = cotangent.shape[: cotangent.ndim - 3]
        if not (given[1] or given[2]):
            return (cotangent,)

        def gather(_, row):
            spectrum, stamp, origin = row
            start = first_indices(origin, *[jnp.zeros_like(origin[0])] * len(leading))
            block = lax.dynamic_slice(cotangent, start, (*leading, shape[0], *stamp.shape[1:]))
            if len(stamp) > 1:
                return None, (
                    jnp.sum(block * stamp, axis=(-2, -1)) if given[1] else (),
                    block * spectrum[:, None, None] if given[2] else (),
                )
            block = block.reshape(*leading, shape[0], -1)
            return None, (
                block @ stamp.ravel() if given[1] else (),
                (spectrum @ block).reshape(*leading, *stamp.shape) if given[2] else (),
            )

        _, gathered = lax.scan(gather, None, (spectra, stamps, origins))
        found = [g for g, present in zip(gathered, given[1:], strict=True) if present]
        moved = tuple(jnp.moveaxis(jnp.asarray(g), 0, len(leading)) for g in found)
        return ((cotangent,) if given[0] else ()) + moved

    return backward
