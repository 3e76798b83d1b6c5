"""How a band-limited image, given by its Fourier modes, is evaluated at an observation's pixels.

Four routes: an inverse FFT where the grids agree, two matrix products where they are parallel, a non-uniform FFT in general, and
one whose positions turn by an angle that is known only when the model is rendered.
"""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from scenefit.arrays import fourier
from scenefit.arrays.compilation import as_complexes, as_floats, as_integers

POSITION_TOLERANCE = 1e-3
"""Observed pixels by which a position may be misplaced to use a faster route; at most 6e-4 of the peak of a point
source with a PSF of sigma 1 pixel."""


class AbstractSampling(eqx.Module):
    """Evaluates a band-limited image, given by its Fourier modes, at an observation's pixels."""

    @abstractmethod
    def __call__(self, modes: Complex[Array, "channel k l"]) -> Float[Array, "channel y x"]:
        """Return `sum_k modes(k) exp(2 pi i k.p_j)` over both half planes (without 1/F^2)."""


class GridSampling(AbstractSampling):
    """Inverse FFT and crop: the observation's pixels are model pixels, up to flips, a transpose and a shift.

    The shift is in the modes already.
    """

    fft_shape: tuple[int, int] = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)
    flip: tuple[bool, bool] = eqx.field(static=True)
    transpose: bool = eqx.field(static=True)

    def __call__(self, modes):  # noqa: D102
        image = fourier.inverse_transform(modes, self.fft_shape)
        image = image[..., : self.shape[0], : self.shape[1]]
        axes = tuple(axis - 2 for axis in (0, 1) if self.flip[axis])
        image = jnp.flip(image, axes) if axes else image
        return jnp.swapaxes(image, -1, -2) if self.transpose else image


class SeparableSampling(AbstractSampling):
    """Two matrix products: the observation's axes are parallel to the model's."""

    left: Complex[Array, "y k"]
    right: Complex[Array, "l x"]
    transpose: bool = eqx.field(static=True)

    def __call__(self, modes):  # noqa: D102
        # Re(rows @ right) as real products: complex matrix products are several times slower on CPUs.
        rows = jnp.einsum("yk,ckl->cyl", self.left, modes)
        image = rows.real @ self.right.real - rows.imag @ self.right.imag
        return jnp.swapaxes(image, -1, -2) if self.transpose else image


class NonuniformSampling(AbstractSampling):
    """Type-2 non-uniform FFT: inverse FFT on a finer grid, then a weighted sum under a window around each position."""

    first: Array
    weight_y: Float[Array, "j a"]
    weight_x: Float[Array, "j b"]
    fine_shape: tuple[int, int] = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)

    def __call__(self, modes):  # noqa: D102
        grid = _fine_grid(modes, self.fine_shape)
        image = fourier.window_sum(grid, self.first, self.weight_y, self.weight_x)
        return image.reshape(-1, *self.shape)


class TurningSampling(eqx.Module):
    """Type-2 non-uniform FFT at positions that move linearly about a point, by a matrix known when the model is rendered.

    The windows are found then, from what doesn't change: positions are kept as grid points and small remainders, so that single
    precision does on large images, too.

    Attributes
    ----------
    first : array of int, shape (j, 2)
        First fine grid point under the window of each position, unmoved.
    fraction : array, shape (j, 2)
        How far the position is beyond the grid point before it.
    offset : array, shape (j, 2)
        Position (y, x) from the point about which all move, in model pixels.
    fine_shape, fft_shape, shape : (int, int)
        Of the fine grid, the model canvas and the image.
    """

    first: Int[Array, "j 2"]
    fraction: Float[Array, "j 2"]
    offset: Float[Array, "j 2"]
    fine_shape: tuple[int, int] = eqx.field(static=True)
    fft_shape: tuple[int, int] = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)

    def __call__(
        self, modes: Complex[Array, "channel k l"], move: Float[Array, "2 2"] | None = None
    ) -> Float[Array, "channel y x"]:
        """Return `sum_k modes(k) exp(2 pi i k.(p_j + move o_j))` over both half planes (without 1/F^2), o the offsets."""
        place = self.fraction
        if move is not None:
            # Not a matrix product, which accelerators round.
            moved = self.offset[:, :1] * move[:, 0] + self.offset[:, 1:] * move[:, 1]
            place = place + moved * (np.array(self.fine_shape) / np.array(self.fft_shape))
        cell = jax.lax.stop_gradient(jnp.floor(place))
        first = self.first + cell.astype(self.first.dtype)
        return fourier.interpolate(_fine_grid(modes, self.fine_shape), first, place - cell).reshape(-1, *self.shape)


def _fine_grid(modes, fine_shape: tuple[int, int]) -> Float[Array, "channel h w"]:
    """Return the image of the modes on a finer grid."""
    channels, num_rows, num_columns = modes.shape
    positive = num_rows // 2 + 1
    spectrum = jnp.zeros((channels, fine_shape[0], fine_shape[1] // 2 + 1), modes.dtype)
    spectrum = spectrum.at[:, :positive, :num_columns].set(modes[:, :positive])
    spectrum = spectrum.at[:, fine_shape[0] - (num_rows - positive) :, :num_columns].set(modes[:, positive:])
    return fourier.inverse_transform(spectrum, fine_shape)


def choose_sampling(fft_shape, ky, kx, position, is_affine, affine):
    """Return the sampling for the pixel positions, and what the modes must be multiplied by for it."""
    transposed = abs(affine[0, 1]) + abs(affine[1, 0]) > abs(affine[0, 0]) + abs(affine[1, 1])
    along = position.swapaxes(0, 1) if transposed else position
    rows, columns = along[:, :, 0].mean(axis=1), along[:, :, 1].mean(axis=0)
    spread = np.stack([along[:, :, 0] - rows[:, None], along[:, :, 1] - columns], axis=-1)
    pixel = np.sqrt(abs(np.linalg.det(affine)))
    if not is_affine or np.abs(spread).max() > POSITION_TOLERANCE * pixel:
        return _nonuniform_sampling(fft_shape, ky, kx, position)
    steps = [np.diff(axis) if len(axis) > 1 else np.ones(1) for axis in (rows, columns)]
    full = len(ky) == fft_shape[0] and len(kx) == fft_shape[1] // 2 + 1
    on_grid = all(np.abs(np.abs(step) - 1).max() * len(step) < POSITION_TOLERANCE for step in steps)
    if full and on_grid and all(n <= f for n, f in zip(along.shape[:2], fft_shape, strict=True)):
        flip = (bool(steps[0][0] < 0), bool(steps[1][0] < 0))
        first = rows.min(), columns.min()
        phase = np.exp(2j * np.pi * (ky[:, None] * first[0] + kx * first[1]))
        return GridSampling(fft_shape, along.shape[:2], flip, bool(transposed)), phase
    left = np.exp(2j * np.pi * np.outer(rows, ky))
    right = np.exp(2j * np.pi * np.outer(kx, columns)) * fourier.half_plane_weights(fft_shape[1])[: len(kx), None]
    return SeparableSampling(as_complexes(left), as_complexes(right), bool(transposed)), 1.0


def _nonuniform_sampling(fft_shape, ky, kx, position):
    """Return the non-uniform sampling at any positions; the padded model grid repeats beyond its edges."""
    fine, coordinate, factor = _fine_coordinates(fft_shape, ky, kx, position)
    (first_y, weight_y), (first_x, weight_x) = (fourier.window_weights(c) for c in coordinate)
    sampling = NonuniformSampling(
        first=as_integers(np.stack([first_y, first_x], axis=-1)),
        weight_y=as_floats(weight_y),
        weight_x=as_floats(weight_x),
        fine_shape=fine,
        shape=position.shape[:2],
    )
    return sampling, factor


def turning_sampling(fft_shape, ky, kx, position, pivot) -> tuple[TurningSampling, np.ndarray]:
    """Return the sampling at positions that move about `pivot`, and what the modes must be multiplied by for it."""
    fine, coordinate, factor = _fine_coordinates(fft_shape, ky, kx, position)
    place = np.stack(coordinate, axis=-1)
    cell = np.floor(place)
    sampling = TurningSampling(
        first=as_integers(cell - fourier.WINDOW_WIDTH // 2 + 1),
        fraction=as_floats(place - cell),
        offset=as_floats(position.reshape(-1, 2) - pivot),
        fine_shape=fine,
        fft_shape=fft_shape,
        shape=position.shape[:2],
    )
    return sampling, factor


def _fine_coordinates(fft_shape, ky, kx, position):
    """Return the shape of the finer grid, the positions (y, x) on it, and what corrects the modes for the window."""
    counts = len(ky), min(2 * len(kx) - 1, fft_shape[1])
    fine_y, fine_x = (fourier.fast_length(int(np.ceil(fourier.OVERSAMPLING * n))) for n in counts)
    fine = fine_y, fine_x
    coordinate = [position[..., a].ravel() * fine[a] / fft_shape[a] for a in (0, 1)]
    mode_y, mode_x = ky * fft_shape[0] / fine[0], kx * fft_shape[1] / fine[1]
    correction = np.outer(fourier.window_transform(mode_y), fourier.window_transform(mode_x))
    return fine, coordinate, 1 / correction
