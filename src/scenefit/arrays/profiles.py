"""Radial profiles as sums of Gaussians of log-spaced widths ("rings"), and how such sums look on pixels.

A Sersic profile is a sum of Gaussians, whose weights follow from its moments. With `u = ln(sigma / r)` for half-light radius r,
the distribution of light over u has the characteristic function (moments of the profile over those of a Gaussian)

    phi(w) = b^(-i n w) Gamma(2n + i n w) / Gamma(2n) / [2^(i w / 2) Gamma(1 + i w / 2)]

and rings at a spacing h in u stand for all widths if each takes the light around it, spread by a function whose Fourier
transform is 1 near 0 and 0 beyond `2 pi / h`. No weight is fitted: the only errors are the spacing's. (A mixture of positive
weights for n >= 1/2; the interpolation makes some of them slightly negative.)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
import scipy.special
from jax import lax
from jaxtyping import Array, Float, Shaped

from scenefit.arrays.linear import linear_map

RING_SPACING = 0.35
"""Logarithm of the ratio of successive widths: the curve of growth is good to 2e-3 of the flux for n = 0.4, 6e-4
for n = 0.5, 2e-5 for n >= 1."""
ROLL_OFF = 0.2
"""Width of the roll-off of the interpolating function in units of pi / h."""
SERSIC_RANGE = (0.4, 8.0)
"""Sersic indices for which there are weights."""
SMALLEST_RING = 0.2
"""Width, in pixels, of the smallest ring: light that is more compact counts as a point and a ring of this width, with the
right second moment."""
COMPACT_RINGS = (0.9, 1.2)
"""Rings narrower than the first, in pixels, are evaluated in Fourier space, since samples of such narrow Gaussians hold
aliases; wider ones than the second are sampled. In between, both count."""
ROWS_AT_A_TIME = 32
"""Rows of an image that are computed at a time, at most: all rings on them fit into a processor's cache."""
COMPACT_WINDOW = 128
"""Pixels a side on which narrow rings are evaluated, around their centre: enough for a model PSF of `WIDEST_PSF`."""
WIDEST_PSF = 5.0
"""Standard deviation of the model PSF at most, in pixels."""
_TABLE_RANGE, _NUM_INDICES = (0.36, 9.0), 81
_STEPS, _LOWEST, _HIGHEST = 10, -16.0, 8.0


def sersic_b(index):
    """Return b(n), with which half the light of `exp(-b r^(1/n))` lies within r = 1 (numpy)."""
    return scipy.special.gammaincinv(2 * np.asarray(index, dtype=float), 0.5)


def num_rings(size: int) -> int:
    """Return how many rings of `ring_sigmas` describe an image of that many pixels a side."""
    return max(2, int(np.ceil(np.log(size / SMALLEST_RING) / RING_SPACING)) + 1)


def ring_sigmas(count: int) -> np.ndarray:
    """Return the widths, in pixels, of a point (0) and the `count` smallest rings."""
    return np.concatenate([[0.0], SMALLEST_RING * np.exp(RING_SPACING * np.arange(count))])


def sersic_weights(index, half_light_radius, count: int) -> Float[Array, " ring"]:
    """Return which fraction of a Sersic profile's flux is in each width of `ring_sigmas(count)`.

    Parameters
    ----------
    index : float
        Sersic index, within `SERSIC_RANGE`.
    half_light_radius : float
        In pixels.
    count : int

    Returns
    -------
    array, shape (1 + count,)
        They sum to 1, but for light in rings wider than the widest: of these, only what they add to the surface brightness
        near the centre is kept.

    References
    ----------
    Sersic 1963; Graham & Driver 2005, PASA 22, 118, doi:10.1071/AS05001.
    """
    x = jnp.asarray(np.log(ring_sigmas(count)[1:]), jnp.result_type(float)) - jnp.log(half_light_radius)
    planes = np.concatenate([np.zeros(count, int), [1, 2, 3]])
    ring = _interpolate(index, jnp.concatenate([x, x[:1], x[:1], x[-1:]]), planes)
    below, square, above = ring[count:]
    weights = ring[:count].at[0].add(square).at[count - 1].add(above)
    return jnp.concatenate([(below - square)[None], weights])


@functools.cache
def _sersic_table() -> np.ndarray:
    """Return spline coefficients (4, index, x): of a ring, of all narrower ones (their flux and second moment), of all wider."""
    step = RING_SPACING / _STEPS
    x = np.arange(_LOWEST / step, _HIGHEST / step) * step
    indices = np.geomspace(_TABLE_RANGE[0], _TABLE_RANGE[1], _NUM_INDICES)
    # Twice the Nyquist frequency of the rings is where the interpolating function has long ended.
    frequency = np.linspace(0, 2 * np.pi / RING_SPACING, 2001)
    limit = np.pi / RING_SPACING
    roll_off = 0.5 * (1 - scipy.special.erf((frequency - limit) / (ROLL_OFF * limit)))
    waves = np.exp(-1j * np.outer(frequency, x)) * (frequency[1] * roll_off)[:, None]
    waves[[0, -1]] /= 2
    n, gamma = indices[:, None], scipy.special.loggamma
    exponent = gamma(2 * n + 1j * n * frequency) - gamma(2 * n) - gamma(1 + 0.5j * frequency)
    moments = np.exp(exponent - 1j * frequency * (n * np.log(sersic_b(n)) + 0.5 * np.log(2)))
    ring = RING_SPACING / np.pi * np.real(moments @ waves)
    # Nothing is left of the profile at the ends of the table.
    below, square, above = np.zeros_like(ring), np.zeros_like(ring), np.zeros_like(ring)
    for k in range(1, len(x) // _STEPS + 1):
        lag = k * _STEPS
        below[:, lag:] += ring[:, :-lag]
        square[:, lag:] += ring[:, :-lag] * np.exp(-2 * k * RING_SPACING)
        above[:, :-lag] += ring[:, lag:] * np.exp(-2 * k * RING_SPACING)
    planes = (ring, below, square, above)
    return np.stack([scipy.ndimage.spline_filter(plane, order=3, mode="mirror") for plane in planes])


def _interpolate(index, x, planes):
    """Return the entries of `planes` of the table at a Sersic index and positions x, shape (m,), by cubic splines."""
    table = _sersic_table()
    row = (jnp.log(index) - np.log(_TABLE_RANGE[0])) / (np.log(_TABLE_RANGE[1] / _TABLE_RANGE[0]) / (_NUM_INDICES - 1))
    column = (x - _LOWEST) * (_STEPS / RING_SPACING)
    first_row, row_weights = _cubic(row, table.shape[1])
    first_column, column_weights = _cubic(column, table.shape[2])
    offsets = np.arange(4)
    rows = first_row + offsets[:, None]
    columns = first_column[:, None, None] + offsets
    values = jnp.asarray(table, x.dtype)[planes[:, None, None], rows, columns]
    return jnp.einsum("mab,a,mb->m", values, row_weights, column_weights)


def _cubic(position, length):
    """Return the first of four neighbouring grid points, and the weights of a cubic B-spline at all four, shape (..., 4)."""
    inside = jnp.clip(position, 1.0, length - 2.001)
    below = jnp.floor(inside)
    t = inside - below
    weights = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    return below.astype(jnp.int32) - 1, jnp.stack(weights, axis=-1) / 6


def evaluate_rings(
    y: Shaped[Array | np.ndarray, " h"],
    x: Shaped[Array | np.ndarray, " w"],
    sigmas: Shaped[Array | np.ndarray, " ring"],
    weights: Shaped[Array | np.ndarray, " ring"],
    ellipticity: Shaped[Array | np.ndarray, " 2"],
    psf_sigma: Float[Array, ""] | float,
) -> Float[Array, "h w"]:
    """Evaluate elliptical Gaussians of one centre and shape, convolved with a round Gaussian, on a grid of pixels.

    Parameters
    ----------
    y, x : arrays, shape (h,) and (w,)
        Coordinates of successive pixels relative to the centre, 1 apart.
    sigmas : array, shape (ring,)
        Geometric mean of the semi-axes, pixels. If it is a NumPy array, narrow rings are told from wide ones beforehand.
    weights : array, shape (ring,)
        Flux of each.
    ellipticity : array, shape (2,)
        `(1 - q^2) / (1 + q^2) (cos 2 theta, sin 2 theta)`.
    psf_sigma : float
        Width of the round Gaussian, pixels.

    Returns
    -------
    array, shape (h, w)
        Flux per pixel, sampled; frequencies that pixels can't hold are cut off from narrow rings (`COMPACT_RINGS`), and the
        ringing that follows from the cut fades out over `RINGING_FADE` pixels.

    Raises
    ------
    ValueError
        If coordinates that are NumPy arrays aren't 1 apart.
    """
    weights, ellipticity = jnp.asarray(weights), jnp.asarray(ellipticity)
    e1, e2 = ellipticity[0], ellipticity[1]
    mean = 1 / jnp.sqrt(1 - e1**2 - e2**2)
    moments = mean * (1 - e1), mean * (1 + e1), mean * e2
    arrays = np if isinstance(sigmas, np.ndarray) else jnp
    share = arrays.clip((COMPACT_RINGS[1] - sigmas) / (COMPACT_RINGS[1] - COMPACT_RINGS[0]), 0.0, 1.0)
    share = share**2 * (3 - 2 * share)
    # Where the widths are known beforehand, only those that take part are evaluated.
    narrow, wide = (np.nonzero(part)[0] if arrays is np else np.arange(len(sigmas)) for part in (share > 0, share < 1))
    image = jnp.zeros((len(y), len(x)), weights.dtype)
    if len(wide):
        # A ring of no flux may have no width.
        sizes = arrays.maximum(sigmas[wide], 0.5 * COMPACT_RINGS[0])
        image += _wide_rings(y, x, sizes, (weights * (1 - share))[wide], moments, psf_sigma)
    if len(narrow):
        (first_row, y), (first_column, x) = _window(y), _window(x)
        window = _compact_rings(y, x, sigmas[narrow], (weights * share)[narrow], moments, psf_sigma)
        if window.shape == image.shape:
            return image + window
        image = lax.scatter_add(image, jnp.stack([first_row, first_column]), window, _WINDOW_AT, mode="clip")
    return image


_WINDOW_AT = lax.ScatterDimensionNumbers(
    update_window_dims=(0, 1), inserted_window_dims=(), scatter_dims_to_operand_dims=(0, 1)
)


def _window(at):
    """Return the first of at most `COMPACT_WINDOW` pixels around the centre, and their coordinates relative to it."""
    size = min(len(at), COMPACT_WINDOW)
    if isinstance(at, np.ndarray) and not np.allclose(np.diff(at), 1.0):
        raise ValueError(f"Profiles are evaluated on pixels that are 1 apart; got coordinates {at}.")
    middle = jnp.round(-lax.stop_gradient(at[0])).astype(jnp.int32)
    first = jnp.clip(middle - size // 2, 0, len(at) - size)
    return first, at[0] + (first + jnp.arange(size))


def _wide_rings(y, x, sigmas, weights, moments, psf_sigma):
    """Evaluate Gaussians at the pixel centres."""
    yy, xx, xy = moments
    variance = jnp.asarray(sigmas, weights.dtype) ** 2
    determinant = variance**2 + psf_sigma**2 * variance * (xx + yy) + psf_sigma**4
    heights = weights / (2 * jnp.pi * jnp.sqrt(determinant))
    forms = [
        0.5 * (variance * of_oval + psf_sigma**2 * of_circle) for of_oval, of_circle in ((xx, 1), (-xy, 0), (yy, 1))
    ]
    y, x = (jnp.asarray(at, weights.dtype) for at in (y, x))
    return _sum_of_gaussians(y, x, heights, *(form / determinant for form in forms))


@jax.custom_jvp
def _sum_of_gaussians(y, x, heights, a, b, c):
    """Return `sum_g heights[g] exp(-(a[g] y^2 + 2 b[g] y x + c[g] x^2))` on the grid y x x."""

    def block(y):
        return jnp.einsum("g,gyx->yx", heights, _gaussians(y, x, a, b, c))

    return lax.map(block, _row_blocks(y)).reshape(-1, len(x))[: len(y)]


@_sum_of_gaussians.defjvp
def _sum_of_gaussians_jvp(primals, tangents):
    return _sum_of_gaussians(*primals), linear_map(_gaussians_along, _gaussians_against, primals, tangents)[0]


def _squares(y, x):
    """Return y^2, y x and x^2 on the grid."""
    return (y**2)[:, None], y[:, None] * x, (x**2)[None, :]


def _gaussians(y, x, a, b, c):
    """Return `exp(-(a[g] y^2 + 2 b[g] y x + c[g] x^2))` on the grid y x x, shape (ring, h, w)."""
    forms, squares = (each[:, None, None] for each in (a, 2 * b, c)), _squares(y, x)
    return jnp.exp(-sum(form * at for form, at in zip(forms, squares, strict=True)))


def _gaussians_along(constants, tangents):
    """Return the derivative of `_sum_of_gaussians` along tangents, which may have a leading axis.

    The derivative is a sum of Gaussians times 1, y^2, y x and x^2: a product of matrices, for some rows of the image at a time.
    """
    y, x, heights, a, b, c = constants
    y_dot, x_dot, height_dot, a_dot, b_dot, c_dot = tangents
    leading = y_dot.shape[:-1]
    along_form = jnp.stack([height_dot, -heights * a_dot, -2 * heights * b_dot, -heights * c_dot], axis=-2)
    factors = jnp.concatenate([along_form.reshape(-1, len(heights)), -2 * heights * jnp.stack([a, b, c])])

    def block(part):
        y, y_dot = part
        y_square, product, x_square = _squares(y, x)
        sums = jnp.einsum("fg,gyx->fyx", factors, _gaussians(y, x, a, b, c))
        of_height, of_a, of_b, of_c = jnp.moveaxis(sums[:-3].reshape(*leading, 4, *product.shape), -3, 0)
        moved = of_height + y_square * of_a + product * of_b + x_square * of_c
        along_y, along_x = sums[-3] * y[:, None] + sums[-2] * x, sums[-2] * y[:, None] + sums[-1] * x
        return moved + along_y * y_dot[..., :, None] + along_x * x_dot[..., None, :]

    blocks = jnp.moveaxis(lax.map(block, (_row_blocks(y), _row_blocks(y_dot))), 0, len(leading))
    return (blocks.reshape(*leading, -1, len(x))[..., : len(y), :],)


def _row_blocks(values: Float[Array, "*leading h"]) -> Float[Array, "block *leading row"]:
    """Return values of all rows of an image as those of blocks of rows, which begin with the first; zeros fill up the last."""
    *leading, height = values.shape
    count = -(-height // ROWS_AT_A_TIME)
    size = -(-height // count)
    padded = jnp.pad(values, [(0, 0)] * len(leading) + [(0, count * size - height)])
    return jnp.moveaxis(padded.reshape(*leading, count, size), -2, 0)


def _gaussians_against(constants, cotangents):
    """Return the transpose of `_gaussians_along`: from moments of the cotangent image times each Gaussian."""
    y, x, heights, a, b, c = constants
    (image,) = cotangents
    y_square, product, x_square = _squares(y, x)
    powers_y, powers_x = (jnp.stack([jnp.ones_like(at), at, at**2]) for at in (y, x))

    def add(positions, ring):
        height, a, b, c = ring
        part = image * jnp.exp(-(a * y_square + 2 * b * product + c * x_square))
        rows = jnp.einsum("...yx,kx->...yk", part, powers_x)
        columns = jnp.einsum("ky,...yx->...kx", powers_y[:2], part)
        moments = jnp.einsum("jy,...yk->...jk", powers_y, rows)
        of_y, of_x = positions
        of_y = of_y - 2 * height * (a * y * rows[..., 0] + b * rows[..., 1])
        of_x = of_x - 2 * height * (c * x * columns[..., 0, :] + b * columns[..., 1, :])
        return (of_y, of_x), (
            moments[..., 0, 0],
            -height * moments[..., 2, 0],
            -2 * height * moments[..., 1, 1],
            -height * moments[..., 0, 2],
        )

    start = (jnp.zeros((*image.shape[:-2], n), image.dtype) for n in image.shape[-2:])
    positions, rest = lax.scan(add, tuple(start), (heights, a, b, c))
    return (*positions, *(jnp.moveaxis(values, 0, -1) for values in rest))


def evaluate_points(
    y: Shaped[Array | np.ndarray, " h"],
    x: Shaped[Array | np.ndarray, " w"],
    positions: Shaped[Array | np.ndarray, "point 2"],
    weights: Shaped[Array | np.ndarray, " point"],
    psf_sigma: Float[Array, ""] | float,
) -> Float[Array, "h w"]:
    """Evaluate points convolved with a round Gaussian on a grid of pixels, frequencies that pixels can't hold cut off.

    Parameters
    ----------
    y, x : arrays, shape (h,) and (w,)
        Pixel coordinates.
    positions : array, shape (point, 2)
        (y, x) in the same coordinates.
    weights : array, shape (point,)
        Flux of each.
    psf_sigma : float
        Width of the Gaussian, pixels.

    Returns
    -------
    array, shape (h, w)
        Flux per pixel, as `evaluate_rings` gives it for a ring without width.
    """
    flat = ringing_radius(psf_sigma)
    k = _NODES / 4 + 0.25
    spectrum = 0.5 * _NODE_WEIGHTS * jnp.exp(-2 * jnp.pi**2 * psf_sigma**2 * k**2)

    def along(at, places):
        distance = jnp.asarray(at)[:, None] - jnp.asarray(places)[None, :]
        fade = jnp.cos(0.5 * jnp.pi * jnp.clip((jnp.abs(distance) - flat) / RINGING_FADE, 0.0, 1.0)) ** 2
        return (jnp.cos(2 * jnp.pi * distance[..., None] * k) @ spectrum) * fade

    positions = jnp.asarray(positions)
    return (along(y, positions[:, 0]) * jnp.asarray(weights)) @ along(x, positions[:, 1]).T


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(32)
CORE_EXTENT = 4.8
"""Standard deviations within which all but 1e-5 of a Gaussian lies."""
RINGING_EXTENT, RINGING_FADE = 1.6, 5.0
"""Pixels over which the ringing of a frequency cut is kept beyond the core, and then fades: with an observed PSF of sigma 1
pixel and more a point is drawn to 1e-3 of its peak."""


def ringing_radius(sigma):
    """Return the distance, in pixels, up to which the ringing of a Gaussian of that width is kept."""
    return sigma * CORE_EXTENT + RINGING_EXTENT


def _compact_rings(y, x, sigmas, weights, moments, psf_sigma):
    """Evaluate narrow Gaussians without frequencies beyond Nyquist, by quadrature over the frequencies below it."""
    yy, xx, xy = moments
    k = _NODES / 4 + 0.25
    ky, kx = jnp.asarray(k)[:, None], jnp.asarray(k)[None, :]
    variance = sigmas[:, None, None] ** 2
    even = variance * (yy * ky**2 + xx * kx**2) + psf_sigma**2 * (ky**2 + kx**2)
    odd = variance * (2 * xy) * (ky * kx)
    quadrature = np.outer(_NODE_WEIGHTS, _NODE_WEIGHTS) / 8
    both = [jnp.einsum("g,gab->ab", weights, jnp.exp(-2 * jnp.pi**2 * (even + sign * odd))) for sign in (1, -1)]
    same, opposite = (both[0] + both[1]) * quadrature, (both[0] - both[1]) * quadrature
    # The width that the light has: rings without any must not carry the ringing beyond the stamp of a compact profile.
    light = jnp.abs(weights)
    typical = (jnp.sum(light * sigmas**4) / jnp.maximum(jnp.sum(light), 1e-9) + 1e-12) ** 0.25
    widest = jnp.minimum(typical, COMPACT_RINGS[1])
    flat = ringing_radius(jnp.sqrt(psf_sigma**2 + widest**2 * jnp.maximum(yy, xx)))
    # Of ovals that are as thin as a line the ends count for little.
    flat = jnp.minimum(flat, 0.5 * COMPACT_WINDOW - 1 - RINGING_FADE)

    def waves(at):
        fade = jnp.cos(0.5 * jnp.pi * jnp.clip((jnp.abs(at) - flat) / RINGING_FADE, 0.0, 1.0)) ** 2
        phase = 2 * jnp.pi * at[:, None] * k
        return jnp.cos(phase) * fade[:, None], jnp.sin(phase) * fade[:, None]

    (cos_y, sin_y), (cos_x, sin_x) = waves(jnp.asarray(y)), waves(jnp.asarray(x))
    return cos_y @ same @ cos_x.T - sin_y @ opposite @ sin_x.T
