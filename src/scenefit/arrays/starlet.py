"""Starlets: the isotropic undecimated wavelet transform of images ("a trous") with the cubic B-spline.

An image c_0 is smoothed again and again, with a kernel (1, 4, 6, 4, 1) / 16 along both axes whose taps lie 1, 2, 4, ... pixels
apart: c_{j+1} = h_j c_j. Each plane of the transform holds what a smoothing takes away, the last one what is left:

- first generation: w_j = c_j - h_j c_j, and the image is the sum of the planes;
- second generation: w_j = c_j - h_j h_j c_j, and the image is w_0 + h_0 (w_1 + h_1 (w_2 + ...)): a sum of B-splines, which are
  positive, and have unit sum. Non-negative planes thus make a non-negative image of the same sum, smooth where its coarse planes
  are all that it has.

Beyond its edges an image goes on as its mirror image, the pixel at the edge repeated: smoothing preserves constants and sums.

References
----------
Starck & Murtagh 2006, Astronomical Image and Data Analysis, doi:10.1007/978-3-540-33025-7; Starck, Fadili & Murtagh 2007, IEEE
Trans. Image Process. 16, 297, doi:10.1109/TIP.2006.887733 (second generation); Starck, Murtagh & Bertero 2011, Handbook of
Mathematical Methods in Imaging, 1489, doi:10.1007/978-0-387-92920-0_34.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KERNEL = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
"""Taps of the smoothing: the cubic B-spline at the integers, convolved to be twice as wide."""
GENERATIONS = (1, 2)


def transform(
    image: Float[Array, "*batch h w"], num_scales: int, generation: int = 1
) -> Float[Array, "*batch scale h w"]:
    """Return the starlet transform of images.

    Parameters
    ----------
    image : array, shape (..., h, w)
    num_scales : int
        Planes, at least 1: the last one is the smooth image, those before it hold structure of about 1, 2, 4, ... pixels.
    generation : 1 or 2
        The first for detection, as its planes have no mean; the second for images made of positive parts.

    Returns
    -------
    array, shape (..., scale, h, w)
        Finest plane first. `inverse` returns the image, exactly but for rounding.

    Raises
    ------
    ValueError
        If the number of scales or the generation isn't one, or an image isn't two-dimensional.
    """
    _check(num_scales, generation)
    image = jnp.asarray(image)
    if image.ndim < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"transform wants images of shape (..., y, x); got shape {image.shape}.")
    planes = []
    for scale in range(num_scales - 1):
        smooth = _smoothed(image, scale)
        planes.append(image - (smooth if generation == 1 else _smoothed(smooth, scale)))
        image = smooth
    return jnp.stack([*planes, image], axis=-3)


def inverse(planes: Float[Array, "*batch scale h w"], generation: int = 1) -> Float[Array, "*batch h w"]:
    """Return the images of which these are the starlet transforms, or the sum of B-splines with any coefficients.

    Parameters
    ----------
    planes : array, shape (..., scale, h, w)
        Finest first. Of the second generation, plane j holds coefficients of B-splines that are about 2^j pixels wide: their
        variance along each axis is (4^j - 1) / 3 pixels squared. (Plane 0 holds single pixels.)
    generation : 1 or 2

    Returns
    -------
    array, shape (..., h, w)
        Of the second generation, with the sum of all planes.

    Raises
    ------
    ValueError
        If the planes aren't three-dimensional, or there is no such generation.
    """
    planes = jnp.asarray(planes)
    if planes.ndim < 3 or 0 in planes.shape[-3:]:
        raise ValueError(f"inverse wants planes of shape (..., scale, y, x); got shape {planes.shape}.")
    num_scales = planes.shape[-3]
    _check(num_scales, generation)
    if generation == 1:
        return jnp.sum(planes, axis=-3)
    image = planes[..., -1, :, :]
    for scale in reversed(range(num_scales - 1)):
        image = planes[..., scale, :, :] + _smoothed(image, scale)
    return image


def scale_noise(num_scales: int, generation: int = 1) -> np.ndarray:
    """Return the standard deviation of every plane of `transform` for an image of white noise of unit variance.

    That is the norm of the filter between image and plane; computed for pixels further from the edges than it reaches.

    Parameters
    ----------
    num_scales : int
        Planes.
    generation : 1 or 2

    Returns
    -------
    array, shape (scale,)
        Finest plane first.

    Raises
    ------
    ValueError
        If the number of scales or the generation isn't one.
    """
    _check(num_scales, generation)
    # All filters are differences of products of two one-dimensional ones, so that norms follow from inner products of these.
    spline, variances = np.ones(1), []
    for scale in range(num_scales - 1):
        step = np.zeros(4 * 2**scale + 1)
        step[:: 2**scale] = KERNEL
        following = np.convolve(spline, step)
        smoother = following if generation == 1 else np.convolve(following, step)
        before = np.pad(spline, (len(smoother) - len(spline)) // 2)
        variances.append((before @ before) ** 2 - 2 * (before @ smoother) ** 2 + (smoother @ smoother) ** 2)
        spline = following
    return np.sqrt([*variances, (spline @ spline) ** 2])


def spline_matrices(size: int, num_scales: int) -> np.ndarray:
    """Return the B-splines along an axis: row i, column k of plane j is what a unit coefficient k puts on pixel i.

    `inverse(planes, generation=2)` is the sum over j of `rows[j] @ planes[j] @ columns[j].T` with the matrices of both axes.

    Returns
    -------
    array, shape (scale, size, size)
        Symmetric, each row and each column of unit sum.
    """
    _check(num_scales, 2)
    matrices = [np.eye(size)]
    pixel = np.arange(size)
    for scale in range(num_scales - 1):
        step = np.zeros((size, size))
        for tap, weight in zip(range(-2, 3), KERNEL, strict=True):
            np.add.at(step, (pixel, _mirrored(pixel + tap * 2**scale, size)), weight)
        matrices.append(matrices[-1] @ step)
    return np.stack(matrices)


def _check(num_scales, generation):
    """Raise ValueError if there are no such planes."""
    if not num_scales >= 1 or generation not in GENERATIONS:
        raise ValueError(
            f"Starlets have at least one scale and generation 1 or 2; got {num_scales} scales, generation {generation}."
        )


def _mirrored(index, size):
    """Return the pixel that each index stands for, on the axis or beyond its ends."""
    index = index % (2 * size)
    return np.where(index < size, index, 2 * size - 1 - index)


def _smoothed(image, scale):
    """Return the images smoothed by h_j."""
    step = 2**scale
    for axis in (-2, -1):
        size = image.shape[axis]
        margins = [(0, 0)] * image.ndim
        margins[axis] = (2 * step, 2 * step)
        wide = jnp.pad(image, margins, mode="symmetric")
        moved = [_window(wide, axis, tap * step, size) for tap in range(5)]
        outer, inner, middle = KERNEL[0], KERNEL[1], KERNEL[2]
        image = outer * (moved[0] + moved[4]) + inner * (moved[1] + moved[3]) + middle * moved[2]
    return image


def _window(image, axis, start, size):
    """Return so many pixels along an axis."""
    index = [slice(None)] * image.ndim
    index[axis] = slice(start, start + size)
    return image[tuple(index)]
