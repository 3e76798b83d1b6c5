"""How the model image gets onto an observation's own pixels: convolve, shift, sample.

The model image `m` (flux per model pixel, already convolved with the model PSF G) is Fourier-transformed once per
channel. An observation with PSF P, whose pixel j lies at `p_j` on the model grid, predicts

    d_j = |det A| / F^2 * sum_k M(k) P(A^T k) / G(k) exp(2 pi i k.(p_j - shift))

with A = dp/dj at its centre. `data/sampling.py` evaluates the sum at the `p_j`.

If the observation is turned by the angle t about its middle c, its pixels see the sky at `c + T (p_j - shift - c)` instead, with
T the inverse of the rotation, and T A stands for A. T is known when the model is rendered, so the angle can be fitted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from scenefit.arrays import fourier
from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_complexes, as_floats
from scenefit.arrays.stamps import rounded_up
from scenefit.data.nuisances import LARGEST_ROTATION
from scenefit.data.sampling import (
    POSITION_TOLERANCE,
    AbstractSampling,
    GridSampling,
    NonuniformSampling,
    SeparableSampling,
    TurningSampling,
    choose_sampling,
    turning_sampling,
)
from scenefit.sky.frame import Frame, pixel_map
from scenefit.sky.psf import AbstractPSF, GaussianPSF

__all__ = ["AbstractSampling", "GridSampling", "NonuniformSampling", "Renderer", "SeparableSampling"]

MAX_GAIN = 1.5
"""Largest |P/G| accepted: beyond it the model PSF is broader than the observed one."""
MODE_DIGITS, WINDOW_DIGITS = 3, 4
"""Leading binary digits of the numbers of modes and of the sides of windows: at most 1/4 and 1/8 more than need be, so
that images turned by different angles have few distinct shapes. More modes cost little (they carry no light), pixels more."""
ROUND = 1e-5
"""A Gaussian's transfer function that changes by less on a turned image is taken as that of a round PSF."""


class Turn(eqx.Module):
    """What a rotation changes besides the positions of pixels.

    Attributes
    ----------
    generator : array, shape (2, 2)
        Change of where a pixel looks, (y, x) on the model, per radian and offset from the middle of the observation.
    slope, bend : arrays, shape (psf_channel, k, l), or None
        Coefficients of the angle, in units of `LARGEST_ROTATION`, and of its square in the parabola through the transfer
        functions at 0 and plus and minus 1; None if the PSF is round.
    largest : array, shape ()
        Angle in degrees up to which no pixel looks further beyond the frame than half the padding, where light from the opposite
        edge of the frame would be as near as that from its own.
    """

    generator: Float[Array, "2 2"]
    slope: Complex[Array, "psf_channel k l"] | None
    bend: Complex[Array, "psf_channel k l"] | None
    largest: np.ndarray

    def move(self, rotation: Float[Array, ""]) -> Float[Array, "2 2"]:
        """Return the matrix that makes of an offset from the middle how far away its pixel looks at another place."""
        return _move(self.generator, rotation, jnp)

    def transfer(self, unturned: Complex[Array, "psf_channel k l"], rotation: Float[Array, ""]):
        """Return the transfer function of the turned observation."""
        if self.slope is None or self.bend is None:
            return unturned
        part = rotation / LARGEST_ROTATION
        return unturned + part * (self.slope + part * self.bend)


def _move(generator, rotation, xp):
    """Return the inverse of a rotation by so many degrees, minus 1; of full precision for small angles."""
    half = rotation * (np.pi / 360)
    return xp.sin(2 * half) * generator - 2 * xp.sin(half) ** 2 * np.eye(2)


class Renderer(eqx.Module):
    """The chain from a model image to one observation's pixels; made by `Renderer.match`.

    `window`, from `origin`, is the part of the observation that is rendered. Its shape follows from scale and rotation, not
    from where the frame lies, and is rounded up, so it may hold pixels beside the frame; `inside` says which of its pixels
    are on it. `num_modes` is rounded up as well: the transfer function is 0 for those that the PSF can't pass.
    `norm` is the largest eigenvalue of rendering followed by its transpose, per channel, for a wide image without
    aliasing: the squared gain of the transfer function times the observed pixel's area in model pixels.
    `affine` is the slope of the positions of pixels on the model.
    The padded grid of shape `fft_shape` begins `margin` pixels before the frame.
    `turn` is None unless the observation may be turned: the faster samplings serve then.

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
    affine: Float[Array, "2 2"]
    sampling: AbstractSampling | TurningSampling
    turn: Turn | None
    origin: np.ndarray
    inside: np.ndarray
    fft_shape: tuple[int, int] = eqx.field(static=True)
    margin: int = eqx.field(static=True)

    @classmethod
    def match(
        cls,
        frame: Frame,
        *,
        psf: AbstractPSF,
        wcs,
        shape: tuple[int, int],
        channels,
        name: str = "observation",
        turning: bool = False,
    ):
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
        turning : bool
            Whether the observation may be turned about its middle when it is rendered.

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
        jacobian = frame.sky_jacobian()
        generator = _generator(jacobian)
        # The PSF turns with the image.
        angles = (0.0, LARGEST_ROTATION, -LARGEST_ROTATION) if turning else (0.0,)
        affines = [affine + _move(generator, angle, np) @ affine for angle in angles]
        ky, kx, num_modes = _modes(frame.fft_shape, psf.band_limit, affines)
        transfer, *turned = (_transfer(frame, psf, ky, kx, each) for each in affines)
        if (gain := np.abs(transfer).max()) > MAX_GAIN:
            raise ValueError(
                f"The PSF of {name} is narrower than the model PSF (gain {gain:.3g} in Fourier space, at most "
                f"{MAX_GAIN}): use a Frame with smaller pixels (pixel_scale=) or a narrower psf."
            )
        norm = np.broadcast_to((np.abs(transfer) ** 2).max(axis=(1, 2)) * abs(np.linalg.det(affine)), len(channels))
        turn = None
        if turning:
            pivot = pixel_map(wcs, frame.wcs, *(np.array((n - 1) / 2) for n in shape))
            sampling, factor = turning_sampling(frame.fft_shape, ky, kx, position + frame.margin, pivot + frame.margin)
            largest = _largest_rotation(frame, generator, position[inside], pivot)
            turn = _turn(generator, largest, psf, transfer, turned, factor / np.prod(frame.fft_shape))
        else:
            sampling, factor = choose_sampling(frame.fft_shape, ky, kx, position + frame.margin, is_affine, affine)
        return cls(
            channels=frame.channel_index(channels),
            num_modes=num_modes,
            transfer=as_complexes(transfer * factor / np.prod(frame.fft_shape)),
            ky=as_floats(ky),
            kx=as_floats(kx),
            area=as_floats(area),
            norm=as_floats(norm),
            sky_jacobian=as_floats(jacobian),
            affine=as_floats(affine),
            sampling=sampling,
            turn=turn,
            origin=np.array(window.origin, np.int32),
            inside=inside,
            fft_shape=frame.fft_shape,
            margin=frame.margin,
        )

    @property
    def window(self) -> Box:
        """The part of the observation that is rendered."""
        return Box(self.inside.shape, (int(self.origin[0]), int(self.origin[1])))

    def transform(self, model: Float[Array, "channel y x"], *, outer: bool = False) -> Complex[Array, "channel k l"]:
        """Return the Fourier transform of a zero-padded model image: of the frame, or of its `outer_box`."""
        before = 0 if outer else self.margin
        sides = [(before, n - before - used) for n, used in zip(self.fft_shape, model.shape[-2:], strict=True)]
        return fourier.transform(jnp.pad(model, ((0, 0), *sides)))

    def __call__(
        self,
        model_spectrum: Complex[Array, "model_channel k l"],
        shift: Float[Array, " 2"],
        psf_variance: Float[Array, " channel"] | None = None,
        rotation: Float[Array, ""] | None = None,
    ) -> Float[Array, "channel y x"]:
        """Render the model onto the pixels of `window`.

        Parameters
        ----------
        model_spectrum : array
            `transform` of the model image of all channels of the frame.
        shift : array, shape (2,)
            Arcsec (east, north) by which sources appear displaced in this observation.
        psf_variance : array, shape (channel,), optional
            Of a round Gaussian that the PSF is convolved with, in the observation's pixels squared.
        rotation : array, shape (), optional
            Degrees, north to east, by which sources appear turned about the middle of the observation, before they are displaced.
            Wants a renderer that was matched with `turning=True`.

        Returns
        -------
        array, shape (channel, y, x)
            Flux per observed pixel, in the model's flux unit; the flux of a source well inside is conserved.

        Raises
        ------
        ValueError
            If a rotation is given to a renderer that wasn't matched for it.
        """
        if self.turn is None and rotation is not None:
            raise ValueError("This renderer can't turn its observation: use match(..., turning=True).")
        transfer, affine, displaced = self.transfer, self.affine, self.sky_jacobian @ shift
        sampling: Callable = self.sampling
        if self.turn is not None and rotation is not None:
            move = self.turn.move(rotation)
            transfer = self.turn.transfer(transfer, rotation)
            displaced = displaced + jnp.matmul(move, displaced, precision="highest")
            inverse = move + jnp.eye(2, dtype=move.dtype)
            affine = jnp.matmul(inverse, affine, precision="highest")
            sampling = functools.partial(self.sampling, move=move)
        modes = _select_modes(_select_channels(model_spectrum, self.channels), self.num_modes)
        dy, dx = displaced
        phase_y, phase_x = (jnp.exp(-2j * jnp.pi * k * d) for k, d in ((self.ky, dy), (self.kx, dx)))
        modes = modes * transfer * (phase_y[:, None] * phase_x)
        if psf_variance is not None:
            # The squared frequency in cycles per observed pixel.
            (yy, yx), (_, xx) = jnp.matmul(affine, affine.T, precision="highest")
            square = yy * self.ky[:, None] ** 2 + 2 * yx * self.ky[:, None] * self.kx + xx * self.kx**2
            modes = modes * jnp.exp(-2 * jnp.pi**2 * psf_variance[:, None, None] * square)
        return sampling(modes) * self.area


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
        rounded = min(rounded_up(needed, WINDOW_DIGITS), int(limit + 1e-3))
        size = min(max(needed, rounded), count)
        first = min(max(used[0] - (size - num_used) // 2, 0), count - size)
        bounds.append((int(first), int(first + size)))
    return Box.from_bounds(*bounds)


def _pixel_areas(position):
    """Return the area of every pixel in model pixels, from the (y, x, 2) positions of their centres."""
    order = 2 if min(position.shape[:2]) > 2 else 1
    dy, dx = np.gradient(position, axis=(0, 1), edge_order=order)
    return np.abs(dy[..., 0] * dx[..., 1] - dy[..., 1] * dx[..., 0])


def _generator(jacobian) -> np.ndarray:
    """Return the derivative of where a pixel looks, (y, x) on the model, by the angle, per offset from the middle.

    The inverse of the rotation (north to east) of what the sky's tangent plane shows.
    """
    return jacobian @ np.array([[0.0, -1.0], [1.0, 0.0]]) @ np.linalg.inv(jacobian)


def _transfer(frame, psf, ky, kx, affine) -> np.ndarray:
    """Return P(A^T k) / G(k), shape (psf_channel, k, l); 0 at and beyond the Nyquist frequency of the model."""
    transfer = _ratio(psf.transfer(ky, kx, affine), frame.psf.transfer(ky, kx, np.eye(2)))
    transfer[:, np.abs(ky) > 0.5 - 1e-9] = 0
    transfer[:, :, np.abs(kx) > 0.5 - 1e-9] = 0
    return transfer


def _turn(generator, largest, psf, transfer, turned, unit) -> Turn:
    """Return what rotations need; `turned` are the transfer functions at plus and minus `LARGEST_ROTATION`."""
    after, before = turned
    slope, bend = 0.5 * (after - before), 0.5 * (after + before) - transfer
    # By the kind of PSF first: blends whose PSFs differ a little share a compilation.
    is_round = isinstance(psf, GaussianPSF) and not psf.integrate_pixel
    if is_round and max(np.abs(slope).max(), np.abs(bend).max()) < ROUND:
        return Turn(as_floats(generator), None, None, np.array(largest))
    return Turn(as_floats(generator), as_complexes(slope * unit), as_complexes(bend * unit), np.array(largest))


def _largest_rotation(frame, generator, position, pivot) -> float:
    """Return the angle in degrees up to which pixels at `position` look no further beyond the frame than half the padding."""
    offset, away = position - pivot, position - frame.center
    room = np.array(frame.fft_shape) / 2 - np.abs(away)
    # To second order in the angle t, pixels look at t g o - t^2 o / 2 from where they did; what leads inwards does no harm.
    speed, bend = np.abs(offset @ generator.T), np.maximum(-offset * np.sign(away), 0)
    angle = 2 * room / np.maximum(speed + np.sqrt(speed**2 + 2 * bend * room), 1e-9)
    return float(min(np.rad2deg(angle.min()), LARGEST_ROTATION))


def _modes(fft_shape, band_limit, affines):
    """Return the frequencies (cycles per model pixel) that a PSF of that band limit can pass and some more, in rfft order."""
    reach = np.max([np.abs(np.linalg.inv(affine).T).sum(axis=1) for affine in affines], axis=0)
    reach = np.minimum(0.5, band_limit * reach)
    needed = [int(np.ceil(r * n)) + 1 for r, n in zip(reach, fft_shape, strict=True)]
    rows, columns = (
        min(rounded_up(count, MODE_DIGITS), n // 2 + 1) for count, n in zip(needed, fft_shape, strict=True)
    )
    if 2 * rows - 1 >= fft_shape[0]:
        ky = np.fft.fftfreq(fft_shape[0])
    else:
        ky = np.concatenate([np.arange(rows), np.arange(1 - rows, 0)]) / fft_shape[0]
    kx = np.arange(columns) / fft_shape[1]
    return ky, kx, (len(ky), len(kx))
