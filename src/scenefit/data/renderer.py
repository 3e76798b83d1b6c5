"""How the model image gets onto an observation's own pixels: convolve, shift, sample.

The model image `m` (flux per model pixel, already convolved with the model PSF G) is Fourier-transformed once per
channel. An observation with PSF P, whose pixel j lies at `p_j` on the model grid, predicts

    d_j = |det A| / F^2 * sum_k M(k) P(A^T k) / G(k) exp(2 pi i k.(p_j - shift))

with A = dp/dj at its centre. Three routes evaluate the sum at the `p_j`: an inverse FFT where the grids agree, two
matrix products where they are parallel, a non-uniform FFT in general.
"""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from scenefit.arrays import fourier
from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_complexes, as_floats, as_integers
from scenefit.sky.frame import Frame, pixel_map
from scenefit.sky.psf import AbstractPSF

POSITION_TOLERANCE = 1e-3
"""Observed pixels by which a position may be misplaced to use a faster route; at most 6e-4 of the peak of a point
source with a PSF of sigma 1 pixel."""
MAX_GAIN = 1.5
"""Largest |P/G| accepted: beyond it the model PSF is broader than the observed one."""
MODE_DIGITS, WINDOW_DIGITS = 3, 4
"""Leading binary digits of the numbers of modes and of the sides of windows: at most 1/4 and 1/8 more than need be, so
that images turned by different angles have few distinct shapes. More modes cost little (they carry no light), pixels more."""


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
        channels, num_rows, num_columns = modes.shape
        positive = num_rows // 2 + 1
        spectrum = jnp.zeros((channels, self.fine_shape[0], self.fine_shape[1] // 2 + 1), modes.dtype)
        spectrum = spectrum.at[:, :positive, :num_columns].set(modes[:, :positive])
        spectrum = spectrum.at[:, self.fine_shape[0] - (num_rows - positive) :, :num_columns].set(modes[:, positive:])
        grid = jnp.moveaxis(fourier.inverse_transform(spectrum, self.fine_shape), 0, -1)
        offsets = jnp.arange(fourier.WINDOW_WIDTH)
        rows = (self.first[:, 0, None] + offsets) % self.fine_shape[0]
        columns = (self.first[:, 1, None] + offsets) % self.fine_shape[1]
        values = grid.at[rows[:, :, None], columns[:, None, :]].get(mode="promise_in_bounds")
        image = jnp.einsum("jabc,ja,jb->cj", values, self.weight_y, self.weight_x)
        return image.reshape(channels, *self.shape)


class Renderer(eqx.Module):
    """The chain from a model image to one observation's pixels; made by `Renderer.match`.

    `window`, from `origin`, is the part of the observation that is rendered. Its shape follows from scale and rotation, not
    from where the frame lies, and is rounded up, so it may hold pixels beside the frame; `inside` says which of its pixels
    are on it. `num_modes` is rounded up as well: the transfer function is 0 for those that the PSF can't pass.
    `norm` is the largest eigenvalue of rendering followed by its transpose, per channel, for a wide image without
    aliasing: the squared gain of the transfer function times the observed pixel's area in model pixels.

    Everything that differs between two observations of the same shape is an array, so that rendering the second
    one compiles nothing.
    """

    channels: tuple[int, ...] = eqx.field(static=True)
    num_modes: tuple[int, int] = eqx.field(static=True)
    transfer: Complex[Array, "psf_channel k l"]
    ky: Float[Array, " k"]
    kx: Float[Array, " l"]
    area: Float[Array, "..."]
    norm: Float[Array, " channel"]
    sky_jacobian: Float[Array, "2 2"]
    metric: Float[Array, "2 2"]
    sampling: AbstractSampling
    origin: np.ndarray
    inside: np.ndarray
    fft_shape: tuple[int, int] = eqx.field(static=True)

    @classmethod
    def match(cls, frame: Frame, *, psf: AbstractPSF, wcs, shape: tuple[int, int], channels, name="observation"):
        """Choose and prepare the rendering of an observation.

        Parameters
        ----------
        frame : Frame
            The model frame.
        psf : AbstractPSF
            PSF on the observation's pixels.
        wcs : WCS or None
            Both this and `frame.wcs`, or neither.
        shape : (int, int)
            Height and width of the observation.
        channels : sequence of channel names
            All among those of the frame.
        name : str
            For error messages.

        Raises
        ------
        ValueError
            If only one of frame and observation has a WCS, the frame holds none of the pixels, or the model PSF is
            broader than the observed one.
        """
        if (frame.wcs is None) != (wcs is None):
            having, lacking = (name, "the frame") if frame.wcs is None else ("the frame", name)
            raise ValueError(f"{having} has a WCS and {lacking} doesn't: give both one, or neither.")
        position, is_affine, affine = _pixel_positions(frame, wcs, shape)
        (height, width) = frame.box.shape
        middle = np.array(frame.center)
        inside: np.ndarray = np.all(np.abs(position - middle) < np.array([height, width]) / 2 + 1e-6, axis=-1)
        if not inside.any():
            raise ValueError(f"No pixel of {name} lies on the model frame of {height} x {width} pixels.")
        window = _window(inside, affine, frame)
        if not is_affine:
            middle = [o + (n - 1) / 2 for o, n in zip(window.origin, window.shape, strict=True)]
            affine = _local_affine(frame, wcs, middle)
        constant = is_affine or min(shape) == 1
        area = np.full((1, 1), abs(np.linalg.det(affine))) if constant else _pixel_areas(position)[window.slices]
        position, inside = position[window.slices], inside[window.slices]
        ky, kx, num_modes = _modes(frame.fft_shape, psf.band_limit, affine)
        transfer = _ratio(psf.transfer(ky, kx, affine), frame.psf.transfer(ky, kx, np.eye(2)))
        transfer[:, np.abs(ky) > 0.5 - 1e-9] = 0
        transfer[:, :, np.abs(kx) > 0.5 - 1e-9] = 0
        if (gain := np.abs(transfer).max()) > MAX_GAIN:
            raise ValueError(
                f"The PSF of {name} is narrower than the model PSF (gain {gain:.3g} in Fourier space, at most "
                f"{MAX_GAIN}): use a Frame with smaller pixels (pixel_scale=) or a narrower psf."
            )
        norm = np.broadcast_to((np.abs(transfer) ** 2).max(axis=(1, 2)) * abs(np.linalg.det(affine)), len(channels))
        transfer = transfer / np.prod(frame.fft_shape)
        sampling, factor = _choose_sampling(frame.fft_shape, ky, kx, position, is_affine, affine)
        return cls(
            channels=frame.channel_index(channels),
            num_modes=num_modes,
            transfer=as_complexes(transfer * factor),
            ky=as_floats(ky),
            kx=as_floats(kx),
            area=as_floats(area),
            norm=as_floats(norm),
            sky_jacobian=as_floats(frame.sky_jacobian()),
            metric=as_floats(affine @ affine.T),
            sampling=sampling,
            origin=np.array(window.origin, np.int32),
            inside=inside,
            fft_shape=frame.fft_shape,
        )

    @property
    def window(self) -> Box:
        """The part of the observation that is rendered."""
        return Box(self.inside.shape, (int(self.origin[0]), int(self.origin[1])))

    def __call__(
        self,
        model_spectrum: Complex[Array, "model_channel k l"],
        shift: Float[Array, " 2"],
        psf_variance: Float[Array, " channel"] | None = None,
    ) -> Float[Array, "channel y x"]:
        """Render the model onto the pixels of `window`.

        Parameters
        ----------
        model_spectrum : array
            `transform_model` of the model image of all channels of the frame.
        shift : array, shape (2,)
            Arcsec (east, north) by which sources appear displaced in this observation.
        psf_variance : array, shape (channel,), optional
            Of a round Gaussian that the PSF is convolved with, in the observation's pixels squared.

        Returns
        -------
        array, shape (channel, y, x)
            Flux per observed pixel, in the model's flux unit; the flux of a source well inside is conserved.
        """
        modes = _select_modes(_select_channels(model_spectrum, self.channels), self.num_modes)
        dy, dx = self.sky_jacobian @ shift
        phase_y, phase_x = (jnp.exp(-2j * jnp.pi * k * d) for k, d in ((self.ky, dy), (self.kx, dx)))
        modes = modes * self.transfer * (phase_y[:, None] * phase_x)
        if psf_variance is not None:
            # The squared frequency in cycles per observed pixel.
            (yy, yx), (_, xx) = self.metric
            square = yy * self.ky[:, None] ** 2 + 2 * yx * self.ky[:, None] * self.kx + xx * self.kx**2
            modes = modes * jnp.exp(-2 * jnp.pi**2 * psf_variance[:, None, None] * square)
        return self.sampling(modes) * self.area


def transform_model(model: Float[Array, "channel y x"], fft_shape: tuple[int, int]) -> Complex[Array, "channel k l"]:
    """Return the Fourier transform of a model image, zero-padded to `fft_shape`."""
    height, width = model.shape[-2:]
    return fourier.transform(jnp.pad(model, ((0, 0), (0, fft_shape[0] - height), (0, fft_shape[1] - width))))


def _select_channels(spectrum, channels: tuple[int, ...]):
    """Return the planes `channels`, by a slice where they are contiguous (no copy)."""
    first, count = channels[0], len(channels)
    if channels == tuple(range(first, first + count)):
        return spectrum[first : first + count]
    return spectrum[np.array(channels)]


def _select_modes(spectrum, num_modes: tuple[int, int]):
    """Return the `num_modes` lowest modes of each plane, in rfft order."""
    rows, columns = num_modes
    if rows == spectrum.shape[1]:
        return spectrum[:, :, :columns]
    positive = rows // 2 + 1
    return jnp.concatenate([spectrum[:, :positive, :columns], spectrum[:, positive - rows :, :columns]], axis=1)


def _ratio(observed, model):
    """Return `observed / model`: 0 where both are 0, infinite where only the model is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(observed == 0, 0, observed / model)


def _pixel_positions(frame, wcs, shape):
    """Return where all pixels lie on the model, (y, x, 2), whether that is affine in their index, and the slope."""
    nodes = [np.unique(np.linspace(0, n - 1, min(n, 17)).round()) for n in shape]
    y, x = np.meshgrid(*nodes, indexing="ij")
    at_nodes = pixel_map(wcs, frame.wcs, y, x)
    middle = [(n - 1) / 2 for n in shape]
    design = np.stack([np.ones(y.size), y.ravel() - middle[0], x.ravel() - middle[1]], axis=-1)
    solution = np.linalg.lstsq(design, at_nodes.reshape(-1, 2), rcond=None)[0]
    affine = solution[1:].T
    if shape[0] == 1 or shape[1] == 1:
        affine = _local_affine(frame, wcs, middle)
    deviation = np.abs(np.linalg.solve(affine, (design @ solution - at_nodes.reshape(-1, 2)).T)).max()
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    if deviation < POSITION_TOLERANCE:
        offset = np.stack([rows - middle[0], columns - middle[1]], axis=-1)
        return solution[0] + offset @ affine.T, True, affine
    return pixel_map(wcs, frame.wcs, rows, columns), False, _local_affine(frame, wcs, middle)


def _local_affine(frame, wcs, middle):
    """Return d(model position)/d(pixel index) at the pixel position `middle`, by central differences."""
    steps = np.array([[0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5]])
    ends = pixel_map(wcs, frame.wcs, middle[0] + steps[:, 0], middle[1] + steps[:, 1])
    return np.stack([ends[0] - ends[1], ends[2] - ends[3]], axis=-1)


def _window(inside, affine, frame) -> Box:
    """Return a box of pixels around those inside the frame, of a shape that follows from scale and rotation alone."""
    lengths, limits = (np.abs(np.linalg.inv(affine)) @ np.array(shape) for shape in (frame.box.shape, frame.fft_shape))
    bounds = []
    for axis, (length, limit, count) in enumerate(zip(lengths, limits, inside.shape, strict=True)):
        (used,) = np.nonzero(inside.any(axis=1 - axis))
        num_used = used[-1] - used[0] + 1
        # An interval of length L holds at most floor(L) + 1 integers; 1e-3: rounding of L must not matter.
        needed = max(int(length + 1e-3) + 1, num_used)
        # No larger than the canvas, from which it is cut where the grids agree.
        rounded = min(_rounded_up(needed, WINDOW_DIGITS), int(limit + 1e-3))
        size = min(max(needed, rounded), count)
        first = min(max(used[0] - (size - num_used) // 2, 0), count - size)
        bounds.append((int(first), int(first + size)))
    return Box.from_bounds(*bounds)


def _pixel_areas(position):
    """Return the area of every pixel in model pixels, from the (y, x, 2) positions of their centres."""
    order = 2 if min(position.shape[:2]) > 2 else 1
    dy, dx = np.gradient(position, axis=(0, 1), edge_order=order)
    return np.abs(dy[..., 0] * dx[..., 1] - dy[..., 1] * dx[..., 0])


def _modes(fft_shape, band_limit, affine):
    """Return the frequencies (cycles per model pixel) that a PSF of that band limit can pass and some more, in rfft order."""
    reach = np.minimum(0.5, band_limit * np.abs(np.linalg.inv(affine).T).sum(axis=1))
    needed = [int(np.ceil(r * n)) + 1 for r, n in zip(reach, fft_shape, strict=True)]
    rows, columns = (
        min(_rounded_up(count, MODE_DIGITS), n // 2 + 1) for count, n in zip(needed, fft_shape, strict=True)
    )
    if 2 * rows - 1 >= fft_shape[0]:
        ky = np.fft.fftfreq(fft_shape[0])
    else:
        ky = np.concatenate([np.arange(rows), np.arange(1 - rows, 0)]) / fft_shape[0]
    kx = np.arange(columns) / fft_shape[1]
    return ky, kx, (len(ky), len(kx))


def _rounded_up(number: int, digits: int) -> int:
    """Return the smallest integer >= `number` whose binary digits after the first `digits` are zeros."""
    step = 1 << max(0, (int(number) - 1).bit_length() - digits)
    return -(-int(number) // step) * step


def _choose_sampling(fft_shape, ky, kx, position, is_affine, affine):
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
    counts = len(ky), min(2 * len(kx) - 1, fft_shape[1])
    fine_y, fine_x = (fourier.fast_length(int(np.ceil(fourier.OVERSAMPLING * n))) for n in counts)
    fine = fine_y, fine_x
    coordinate = [position[..., a].ravel() * fine[a] / fft_shape[a] for a in (0, 1)]
    (first_y, weight_y), (first_x, weight_x) = (fourier.window_weights(c) for c in coordinate)
    mode_y, mode_x = ky * fft_shape[0] / fine[0], kx * fft_shape[1] / fine[1]
    correction = np.outer(fourier.window_transform(mode_y), fourier.window_transform(mode_x))
    sampling = NonuniformSampling(
        first=as_integers(np.stack([first_y, first_x], axis=-1)),
        weight_y=as_floats(weight_y),
        weight_x=as_floats(weight_x),
        fine_shape=fine,
        shape=position.shape[:2],
    )
    return sampling, 1 / correction
