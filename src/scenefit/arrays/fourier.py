"""Fourier transforms of images: frequencies, direct sums and non-uniform sampling.

Conventions: `M(k) = sum_p m(p) exp(-2 pi i k.p)` with p in pixels (y, x) and k in cycles per pixel, as in
`numpy.fft`. Images are (..., y, x); spectra of real images are stored for `kx >= 0` only.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
import scipy.special
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Complex, Float, Int

from scenefit.arrays.linear import linear_map

WINDOW_WIDTH = 6
"""Grid points a side of the Kaiser-Bessel window; with a grid twice oversampled its error is at most 1.5e-5
in each direction."""
OVERSAMPLING = 2.0
"""Grid points per Nyquist sample in non-uniform sampling."""
WINDOW_DEGREE = 7
"""Degree of the polynomials that stand for the window between two grid points; they miss it by less than 1e-7 of its peak."""


def fast_length(length: int) -> int:
    """Return the smallest length >= `length` whose real Fourier transform is fast."""
    return int(scipy.fft.next_fast_len(max(1, int(length)), real=True))


def coarse_fast_length(length: int) -> int:
    """Return the smallest fast multiple of 8 that is >= `length`.

    There are fewer of them than there are fast lengths, and on average they take no more time: transforms of odd lengths
    are slow for their size.
    """
    return 8 * fast_length(-(-int(length) // 8))


def half_plane_weights(width: int) -> np.ndarray:
    """Return how often each stored `kx >= 0` mode of a real image of `width` columns counts: 1 or 2."""
    weights = np.full(width // 2 + 1, 2.0)
    weights[0] = 1.0
    if width % 2 == 0:
        weights[-1] = 1.0
    return weights


def transform(image: Float[Array, "... y x"]) -> Complex[Array, "... k l"]:
    """Return the Fourier transform of real images, `kx >= 0`: `numpy.fft.rfft2`, with a transpose that is as fast.

    (The transpose that JAX derives takes a complex transform of twice the size.)
    """
    shape = image.shape[-2:]
    return linear_map(_forwards, _forwards_transposed(shape), (), (image,))[0]


def inverse_transform(modes: Complex[Array, "... k l"], shape: tuple[int, int]) -> Float[Array, "... y x"]:
    """Return `sum_k modes(k) exp(2 pi i k.p)` over both half planes on the pixels of `shape`, with a fast transpose."""
    return linear_map(_backwards(shape), _backwards_transposed(shape), (), (modes,))[0]


def _forwards(_, images):
    return (jnp.fft.rfft2(images[0]),)


# `linear_map` wants the same function for the same shape.
@functools.cache
def _forwards_transposed(shape):
    def transpose(_, modes):
        weights = jnp.asarray(1 / half_plane_weights(shape[1]), modes[0].real.dtype)
        return (jnp.fft.irfft2(jnp.conj(modes[0]) * weights, s=shape, norm="forward"),)

    return transpose


@functools.cache
def _backwards(shape):
    return lambda _, modes: (jnp.fft.irfft2(modes[0], s=shape, norm="forward"),)


@functools.cache
def _backwards_transposed(shape):
    def transpose(_, images):
        return (jnp.conj(jnp.fft.rfft2(images[0])) * jnp.asarray(half_plane_weights(shape[1]), images[0].dtype),)

    return transpose


def sample_spectrum(image: np.ndarray, ky: np.ndarray, kx: np.ndarray, origin=(0.0, 0.0), spacing: float = 1.0):
    """Evaluate the Fourier transform of an image's samples on a rectangle of frequencies, exactly.

    Parameters
    ----------
    image : array, shape (..., y, x)
        Samples at pixels n = 0, 1, ...
    ky, kx : arrays, shape (K,) and (L,)
        Frequencies, cycles per unit length.
    origin : (float, float)
        Pixel position (y, x) taken as zero phase.
    spacing : float
        Length of a pixel, in the unit of 1/ky.

    Returns
    -------
    array, shape (..., K, L), complex
        `sum_n image(n) exp(-2 pi i (ky y_n + kx x_n))` with `y_n = (n_y - origin_y) spacing`.
    """
    y = (np.arange(image.shape[-2]) - origin[0]) * spacing
    x = (np.arange(image.shape[-1]) - origin[1]) * spacing
    left = np.exp(-2j * np.pi * np.outer(ky, y))
    right = np.exp(-2j * np.pi * np.outer(x, kx))
    return left @ image @ right


def window_beta(width: int = WINDOW_WIDTH, oversampling: float = OVERSAMPLING) -> float:
    """Return the shape parameter of the Kaiser-Bessel window.

    Beatty et al. 2005, eq. 5, doi:10.1109/TMI.2005.848376.
    """
    return float(np.pi * np.sqrt((width / oversampling) ** 2 * (oversampling - 0.5) ** 2 - 0.8))


def window_transform(frequency: np.ndarray) -> np.ndarray:
    """Return the Fourier transform of the Kaiser-Bessel window at `frequency` (cycles per grid point)."""
    root = np.emath.sqrt(window_beta() ** 2 - (np.pi * WINDOW_WIDTH * np.asarray(frequency)) ** 2)
    small = np.abs(root) < 1e-8
    root = np.where(small, 1.0, root)
    return WINDOW_WIDTH * np.real(np.where(small, 1.0, np.sinh(root) / root)) / scipy.special.i0(window_beta())


def window_weights(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the grid points under the window and its values there.

    Parameters
    ----------
    position : array, shape (...)
        Coordinates in grid points.

    Returns
    -------
    first : array of int, shape (...)
        First of the `WINDOW_WIDTH` neighbouring grid points (may be negative: wrap around).
    weights : array, shape (..., WINDOW_WIDTH)
        The window at each.
    """
    first = np.floor(position).astype(int) - WINDOW_WIDTH // 2 + 1
    distance = first[..., None] + np.arange(WINDOW_WIDTH) - position[..., None]
    inside = np.maximum(0.0, 1 - (2 * distance / WINDOW_WIDTH) ** 2)
    beta = window_beta()
    return first, scipy.special.i0(beta * np.sqrt(inside)) / scipy.special.i0(beta) * (inside > 0)


@functools.cache
def _window_polynomials() -> np.ndarray:
    """Return the window at each grid point under it as a polynomial in 2 f - 1, shape (power, WINDOW_WIDTH), lowest first.

    f is how far the position is beyond the grid point before it. Interpolated at the nodes of Chebyshev.
    """
    nodes = np.cos(np.pi * (np.arange(WINDOW_DEGREE + 1) + 0.5) / (WINDOW_DEGREE + 1))
    values = window_weights((nodes + 1) / 2)[1]
    fitted = np.polynomial.chebyshev.chebfit(nodes, values, WINDOW_DEGREE)
    return np.stack([np.polynomial.chebyshev.cheb2poly(column) for column in fitted.T], axis=-1)


def _windows(fraction: Float[Array, " j"]) -> tuple[Float[Array, "j a"], Float[Array, "j a"]]:
    """Return the window at the grid points under it, and its derivative along `fraction`, which is within [0, 1]."""
    coefficients = _window_polynomials()
    at = (2 * fraction - 1)[:, None]
    value, slope = jnp.zeros_like(at), jnp.zeros_like(at)
    for row in jnp.asarray(coefficients[::-1], fraction.dtype):
        value, slope = row + at * value, value + at * slope
    return value, 2 * slope


def window_sum(
    grid: Float[Array, "*plane h w"],
    first: Int[Array, "j 2"],
    weight_y: Float[Array, "j a"],
    weight_x: Float[Array, "j b"],
) -> Float[Array, "*plane j"]:
    """Return the sums of periodic grids under windows, from their first grid points and their values there."""
    shape = grid.shape[-2:]
    offsets = jnp.arange(WINDOW_WIDTH, dtype=first.dtype)
    rows = (first[:, 0, None] + offsets) % shape[0] * shape[1]
    columns = (first[:, 1, None] + offsets) % shape[1]
    constants = rows, columns, weight_y, weight_x
    return linear_map(_sum_windows, _spread_windows(shape), constants, (grid,))[0]


# Loops over the rows of the windows: several times as fast as all at once. What goes in and comes out of a loop is worked out
# once; otherwise the compiler may do so again for every grid point that it serves.


def _sum_windows(constants, grids):
    """Add up what lies under windows, row by row."""
    rows, columns, weight_y, weight_x = constants
    flat = grids[0].reshape(*grids[0].shape[:-2], -1)

    def add_row(a, total):
        line = jnp.zeros((), flat.dtype)
        for b in range(WINDOW_WIDTH):
            line = line + flat.at[..., rows[:, a] + columns[:, b]].get(mode="promise_in_bounds") * weight_x[:, b]
        return total + line * weight_y[:, a]

    empty = jnp.zeros((*flat.shape[:-1], len(rows)), flat.dtype)
    return (lax.fori_loop(0, WINDOW_WIDTH, add_row, empty),)


@functools.cache
def _spread_windows(shape):
    def transpose(constants, sums):
        """Add windows to grids, row by row; the planes of a grid point are together in memory then."""
        rows, columns, weight_y, weight_x = constants
        planes = sums[0].reshape(-1, sums[0].shape[-1]).T

        def add_row(a, flat):
            spread = planes[:, None, :] * (weight_y[:, a, None] * weight_x)[..., None]
            return flat.at[rows[:, a, None] + columns].add(spread, mode="promise_in_bounds")

        empty = jnp.zeros((shape[0] * shape[1], planes.shape[1]), planes.dtype)
        flat = lax.fori_loop(0, WINDOW_WIDTH, add_row, empty)
        return (flat.T.reshape(*sums[0].shape[:-1], *shape),)

    return transpose


@jax.custom_jvp
def interpolate(
    grid: Float[Array, "*plane h w"], first: Int[Array, "j 2"], fraction: Float[Array, "j 2"]
) -> Float[Array, "*plane j"]:
    """Return the sums of periodic grids under the Kaiser-Bessel window around positions that may be differentiated along.

    Parameters
    ----------
    grid : array, shape (..., y, x)
    first : array of int, shape (j, 2)
        First grid point (y, x) under the window of each position, as of `window_weights`.
    fraction : array, shape (j, 2)
        How far the position is beyond the grid point before it, within [0, 1].

    Returns
    -------
    array, shape (..., j)
    """
    (weight_y, _), (weight_x, _) = _windows(fraction[:, 0]), _windows(fraction[:, 1])
    return window_sum(grid, first, weight_y, weight_x)


def _interpolate_jvp(primals, tangents):
    """Differentiate along positions by the slopes of the image, which take less room than all that lies under the windows."""
    (grid, first, fraction), (along_grid, _, moves) = primals, tangents
    (weight_y, slope_y), (weight_x, slope_x) = _windows(fraction[:, 0]), _windows(fraction[:, 1])
    image = interpolate(grid, first, fraction)
    change = jnp.zeros_like(image)
    if not isinstance(along_grid, SymbolicZero):
        change = window_sum(along_grid, first, weight_y, weight_x)
    if not isinstance(moves, SymbolicZero):
        change = change + window_sum(grid, first, slope_y, weight_x) * moves[:, 0]
        change = change + window_sum(grid, first, weight_y, slope_x) * moves[:, 1]
    return image, change


interpolate.defjvp(_interpolate_jvp, symbolic_zeros=True)


def sample_spectrum_nonuniform(image: np.ndarray, ky: np.ndarray, kx: np.ndarray, origin=(0.0, 0.0), spacing=1.0):
    """Evaluate the Fourier transform of an image's samples at scattered frequencies (type-2 non-uniform FFT).

    As `sample_spectrum`, but `ky` and `kx` have one shape (...,) and the result has shape (leading of image, ...).
    Accurate to 3e-5 of the sum of the absolute samples in the worst case; the cost doesn't grow with image size times
    number of frequencies.
    """
    shape = tuple(fast_length(int(np.ceil(OVERSAMPLING * n))) for n in image.shape[-2:])
    middle = tuple(n // 2 for n in image.shape[-2:])
    padded = np.zeros((*image.shape[:-2], *shape))
    correction = [
        window_transform((np.arange(n) - m) / s) for n, m, s in zip(image.shape[-2:], middle, shape, strict=True)
    ]
    padded[..., : image.shape[-2], : image.shape[-1]] = image / np.outer(*correction)
    grid = scipy.fft.fft2(np.roll(padded, (-middle[0], -middle[1]), axis=(-2, -1)))
    (first_y, weight_y), (first_x, weight_x) = (
        window_weights(k * spacing * s) for k, s in ((ky, shape[0]), (kx, shape[1]))
    )
    offsets = np.arange(WINDOW_WIDTH)
    rows = (first_y[..., None] + offsets) % shape[0]
    columns = (first_x[..., None] + offsets) % shape[1]
    values = grid[..., rows[..., :, None], columns[..., None, :]]
    sampled = np.einsum("...ab,...a,...b->...", values, weight_y, weight_x)
    phase = (ky * (origin[0] - middle[0]) + kx * (origin[1] - middle[1])) * spacing
    return sampled * np.exp(2j * np.pi * phase)
