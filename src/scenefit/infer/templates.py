"""Sources of known shape and place in one image: their templates, and the normal equations of their fluxes.

A template is the image of a component of unit flux. It is made on a small window around the component, from the Fourier transform
of its stamp, which no observation changes:

    t(j) = sum_q M(B^T q) P(q) / G(B^T q) exp(2 pi i q.(j - u)) / L^2

with q the frequencies of a periodic window of L observed pixels, P and G the transfer functions of the observation and the model
frame, u where the component lies in the observation, and B = d(observed)/d(model pixel). In the observation's own pixels P is
sampled where it is given, and windows of all components share the same few matrices, whatever the WCS.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scenefit.arrays import fourier
from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_floats
from scenefit.arrays.stamps import bucket_size, rounded_up
from scenefit.data.abstractnoise import AbstractNoise
from scenefit.data.observation import Observation
from scenefit.data.renderer import MAX_GAIN
from scenefit.infer.pointing import Geometry
from scenefit.model.packing import merged_buckets
from scenefit.sky.frame import Frame

MARGIN = 1.5
"""Observed pixels around what holds a component's light, for rounding of its position."""
SIZE_STEP, REACH_STEPS = 4, 20
"""Windows have sides that are multiples of the one, and so many distinct numbers of modes per side: few shapes to compile."""
SPARE = 0.5
"""Fraction of all pixels of stamps by which these may be padded to have fewer distinct sizes."""
NEGLIGIBLE = 1e-7
"""Fraction of a component's light below which rows and columns at the edges of its stamp are left out."""
COUNT_DIGITS = 4
"""Leading binary digits of the number of stamps in a group: few shapes to compile."""
TABLE = 1024
"""Places at which the window of interpolation is tabulated: lines between them miss it by 1e-7 of its peak."""


class Stamps(eqx.Module):
    """Stamps of components of like size, as seen from every observation.

    Attributes
    ----------
    members : array of int, shape (n,)
        Numbers of the components.
    places : array, shape (n, 2)
        (y, x) of the middle of the padded stamps on the model frame.
    side : int
        Of the padded stamps, model pixels.
    fine : int
        Side of the grid of frequencies.
    modes : array, shape (plane, fine * fine, 2 n)
        Fourier transforms on that grid, prepared for interpolation: real parts of all components, then imaginary parts, so that
        what is interpolated together lies together. Padded with zeros to few distinct n.
    """

    members: np.ndarray
    places: np.ndarray
    side: int = eqx.field(static=True)
    fine: int = eqx.field(static=True)
    modes: Float[Array, "plane frequency _"]


def stamp_groups(stamps: Sequence[tuple[Box, np.ndarray]]) -> list[Stamps]:
    """Return the stamps (box on the model frame, image of shape (plane, h, w)) of all components by their size."""
    stamps = [_trimmed(*stamp) for stamp in stamps]
    sides = [bucket_size(max(box.shape)) for box, _ in stamps]
    sides = merged_buckets(sides, int(SPARE * sum(side * side for side in sides)))
    planes = max(len(image) for _, image in stamps)
    return [
        _stamp_group([n for n, each in enumerate(sides) if each == side], stamps, side, planes)
        for side in sorted(set(sides))
    ]


def _trimmed(box: Box, image: np.ndarray) -> tuple[Box, np.ndarray]:
    """Return a stamp without rows and columns at its edges that hold next to nothing."""
    bounds = []
    for axis in (0, 1):
        light = np.abs(image).sum(axis=(0, 2 - axis))
        (used,) = np.nonzero(light > NEGLIGIBLE * light.sum())
        bounds.append((int(used[0]), int(used[-1]) + 1) if len(used) else (0, box.shape[axis]))
    part = Box.from_bounds(*bounds)
    return part.shift(box.origin), image[(slice(None), *part.slices)]


def _stamp_group(members, stamps, side, planes) -> Stamps:
    """Return the stamps of some components, padded to one size."""
    fine = fourier.fast_length(int(np.ceil(fourier.OVERSAMPLING * side)))
    middle = side // 2
    padded, places = np.zeros((planes, len(members), fine, fine)), []
    for row, number in enumerate(members):
        box, image = stamps[number]
        corner = [(side - n) // 2 for n in box.shape]
        padded[:, row, corner[0] : corner[0] + box.shape[0], corner[1] : corner[1] + box.shape[1]] = image
        places.append([o - c + middle for o, c in zip(box.origin, corner, strict=True)])
    correction = fourier.window_transform((np.arange(side) - middle) / fine)
    padded[..., :side, :side] /= np.outer(correction, correction)
    modes = scipy.fft.fft2(np.roll(padded, (-middle, -middle), axis=(-2, -1))).reshape(planes, len(members), -1)
    modes = np.pad(modes, ((0, 0), (0, rounded_up(len(members), COUNT_DIGITS) - len(members)), (0, 0)))
    modes = np.concatenate([np.real(modes), np.imag(modes)], axis=1).swapaxes(1, 2)
    return Stamps(np.array(members), np.array(places, float), side, fine, as_floats(modes))


class Windows(eqx.Module):
    """Sizes of the windows of one group of stamps, common to many observations.

    Attributes
    ----------
    period : int
        Pixels after which a window repeats.
    shape : (int, int)
        Its rows and columns: as many, or those of the image if it is smaller.
    highest : int
        Number of the highest mode along y and x.
    """

    period: int = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)
    highest: int = eqx.field(static=True)

    def frequencies(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the frequencies along y (in FFT order) and x (from 0), in cycles per pixel."""
        number = np.arange(self.highest + 1)
        return np.concatenate([number, number[:0:-1] * -1]) / self.period, number / self.period

    @property
    def oversampling(self) -> int:
        """Samples per pixel that the highest mode needs."""
        return -(-(2 * self.highest + 1) // self.period)


def half_size(stamps: Stamps, obs: Observation, jacobian: np.ndarray) -> np.ndarray:
    """Return how far, in observed pixels along y and x, the light of a component reaches."""
    return np.abs(jacobian).sum(axis=1) * stamps.side / 2 + obs.psf.extent + MARGIN


def highest_frequency(obs: Observation, jacobian: np.ndarray) -> np.ndarray:
    """Return the highest frequencies, in cycles per observed pixel along y and x, in images of the model."""
    return np.minimum(obs.psf.band_limit, 0.5 * np.abs(np.linalg.inv(jacobian)).sum(axis=0))


def choose_windows(half: float, frequency: float, shape: tuple[int, int]) -> Windows:
    """Return windows for light that reaches so far, with modes below that frequency, in an image of that shape."""
    period = -(-int(2 * np.ceil(half) + 2) // SIZE_STEP) * SIZE_STEP
    rounded = np.ceil(frequency * REACH_STEPS - 1e-6) / REACH_STEPS
    return Windows(period, (min(period, shape[0]), min(period, shape[1])), int(np.ceil(rounded * period)) - 1)


class Placement(eqx.Module):
    """What an observation makes of one group of stamps.

    Attributes
    ----------
    first : array of int, shape (frequency, 2)
        First point of the grid of modes around each frequency.
    fraction : array, shape (frequency, 2)
        How far the frequency is beyond the grid point before it.
    transfer : arrays, shape (psf_channel, frequency)
        Real and imaginary part of the transfer function from the stamp to the image.
    start : array of int, shape (n, 2)
        First pixel of the window of each component.
    offset : array, shape (n, 2)
        From the component to the first pixel of its window.
    half : array, shape (2,)
        How far the light reaches.
    """

    first: Int[np.ndarray | Array, "frequency 2"]
    fraction: Float[np.ndarray | Array, "frequency 2"]
    transfer: tuple[
        Float[np.ndarray | Array, "psf_channel frequency"], Float[np.ndarray | Array, "psf_channel frequency"]
    ]
    start: Int[np.ndarray | Array, "n 2"]
    offset: Float[np.ndarray | Array, "n 2"]
    half: Float[np.ndarray | Array, " 2"]


class Exposure(eqx.Module):
    """One observation as the solver sees it, in units of the noise level of each channel.

    Attributes
    ----------
    placements : tuple of Placement
        One a group of stamps.
    data : array, shape (channel, y, x)
        The known background subtracted.
    valid : array of bool, shape (channel, y, x)
    noise : AbstractNoise
    scale : array, shape (channel,)
        What the image shows of every flux.
    plane : array of int, shape (channel,)
        Which plane of the stamps each channel shows.
    """

    placements: tuple[Placement, ...]
    data: Float[np.ndarray | Array, "channel y x"]
    valid: Bool[np.ndarray | Array, "channel y x"]
    noise: AbstractNoise
    scale: Float[np.ndarray | Array, " channel"]
    plane: Int[np.ndarray | Array, " channel"]


def as_exposure(
    frame: Frame,
    obs: Observation,
    groups: Sequence[Stamps],
    windows: Sequence[Windows],
    where: Geometry,
    plane: Sequence[int],
) -> Exposure:
    """Return an observation as the solver sees it."""
    level, window = obs.noise.level(), where.window.slices
    noise = obs.noise.scaled(level)
    if where.inside is not None:
        noise = noise.restricted(where.inside, window)
    data = (obs.data - obs.background_image())[(slice(None), *window)]
    placements = [_place(frame, obs, stamps, sizes, where) for stamps, sizes in zip(groups, windows, strict=True)]
    # Handed over in one go, which takes less time than one by one.
    floats, integers = (
        functools.partial(np.asarray, dtype=jnp.result_type(float)),
        functools.partial(np.asarray, dtype=np.int32),
    )
    return Exposure(
        placements=jax.tree.map(lambda part: (integers if part.dtype.kind == "i" else floats)(part), tuple(placements)),
        data=floats(data / level[:, None, None]),
        valid=noise.valid,
        noise=noise.on_device(),
        scale=floats(obs.calibration.flux_scale),
        plane=integers(plane),
    )


def _place(frame: Frame, obs: Observation, stamps: Stamps, windows: Windows, where: Geometry) -> Placement:
    """Return what an observation makes of a group of stamps."""
    ky, kx = windows.frequencies()
    jacobian = where.jacobian
    wave_y, wave_x = (jacobian[0, i] * ky[:, None] + jacobian[1, i] * kx for i in (0, 1))
    observed = obs.psf.transfer(ky, kx, np.eye(2))
    with np.errstate(divide="ignore", invalid="ignore"):
        transfer = np.where(observed == 0, 0, observed / frame.psf.transfer(ky, kx, jacobian))
    transfer[:, np.maximum(np.abs(wave_y), np.abs(wave_x)) > 0.5 - 1e-9] = 0
    if (gain := np.abs(transfer).max()) > MAX_GAIN:
        raise ValueError(
            f"The PSF of {obs.name} is narrower than the model PSF (gain {gain:.3g} in Fourier space, at most "
            f"{MAX_GAIN}): use a Frame with smaller pixels (pixel_scale=) or a narrower psf."
        )
    if obs.calibration.psf_variance.any():
        square = ky[:, None] ** 2 + kx**2
        transfer = transfer * np.exp(-2 * np.pi**2 * obs.calibration.psf_variance[:, None, None] * square)
    transfer = transfer.reshape(len(transfer), -1) / windows.period**2
    coordinate = np.stack([wave_y.ravel(), wave_x.ravel()], axis=-1) * stamps.fine
    cell = np.floor(coordinate)
    middle = (np.array(windows.shape) - 1) / 2
    shape = np.array(where.window.shape)
    at = where.places[stamps.members] - where.window.origin
    count = stamps.modes.shape[-1] // 2 - len(at)
    at = np.pad(np.nan_to_num(at, nan=-1e6), ((0, count), (0, 0)), constant_values=-1e6)
    start = np.clip(np.rint(at - middle), 0, shape - windows.shape)
    return Placement(
        first=(cell.astype(int) - fourier.WINDOW_WIDTH // 2 + 1) % stamps.fine,
        fraction=coordinate - cell,
        transfer=(transfer.real, transfer.imag),
        start=start.astype(int),
        offset=np.clip(start - at, -1e4, 1e4),
        half=half_size(stamps, obs, jacobian),
    )


@functools.cache
def _window_table() -> np.ndarray:
    """Return the window of interpolation at so many fractions from 0 to 1, shape (TABLE + 1, a)."""
    return fourier.window_weights(np.minimum(np.arange(TABLE + 1) / TABLE, 1 - 1e-12))[1]


def _window_weights(fraction: Float[Array, " frequency"]) -> Float[Array, "frequency a"]:
    """Return the window of interpolation, from its table."""
    table = jnp.asarray(_window_table(), fraction.dtype)
    place = fraction * TABLE
    row = jnp.clip(jnp.floor(place), 0, TABLE - 1)
    beyond, row = (place - row)[:, None], row.astype(jnp.int32)
    return table[row] * (1 - beyond) + table[row + 1] * beyond


def _interpolated(modes: Float[Array, "frequency m"], placement: Placement, fine: int) -> Float[Array, "q m"]:
    """Return the modes of all components at the observation's frequencies."""
    offsets = jnp.arange(fourier.WINDOW_WIDTH)
    rows = (placement.first[:, 0, None] + offsets) % fine * fine
    columns = (placement.first[:, 1, None] + offsets) % fine
    weight_y, weight_x = (_window_weights(jnp.asarray(placement.fraction)[:, axis]) for axis in (0, 1))

    def add_row(a, total):
        line = jnp.zeros_like(total)
        for b in range(fourier.WINDOW_WIDTH):
            part = modes.at[rows[:, a] + columns[:, b]].get(mode="promise_in_bounds")
            line = line + part * weight_x[:, b, None]
        return total + line * weight_y[:, a, None]

    empty = jnp.zeros((len(placement.first), modes.shape[1]), modes.dtype)
    return lax.fori_loop(0, fourier.WINDOW_WIDTH, add_row, empty)


def _window_images(
    at_frequencies: Float[Array, "q m"], placement: Placement, windows: Windows, channel: Int[Array, ""]
) -> Float[Array, "n h w"]:
    """Return the templates of one channel on their windows."""
    count, (ky, kx) = at_frequencies.shape[1] // 2, windows.frequencies()
    real, imaginary = (part.T.reshape(count, len(ky), len(kx)) for part in jnp.split(at_frequencies, 2, axis=1))
    number = jnp.minimum(channel, len(placement.transfer[0]) - 1)
    transfer = lax.complex(*(part[number] for part in placement.transfer)).reshape(len(ky), len(kx))
    # The phase of an axis is taken before they are multiplied, modulo a turn: full precision, few sines.
    turns = [placement.offset[:, axis, None] * jnp.asarray(k, real.dtype) for axis, k in enumerate((ky, kx))]
    phase_y, phase_x = (jnp.exp(2j * jnp.pi * (turn - jnp.round(turn))) for turn in turns)
    modes = lax.complex(real, imaginary) * transfer * phase_y[:, :, None] * phase_x[:, None, :]
    step = windows.oversampling
    size, highest = step * windows.period, windows.highest
    spectrum = jnp.zeros((count, size, size // 2 + 1), modes.dtype)
    spectrum = spectrum.at[:, : highest + 1, : highest + 1].set(modes[:, : highest + 1])
    if highest:
        spectrum = spectrum.at[:, -highest:, : highest + 1].set(modes[:, highest + 1 :])
    images = fourier.inverse_transform(spectrum, (size, size))
    images = images[:, : windows.shape[0] * step : step, : windows.shape[1] * step : step]
    reach = [
        jnp.abs(np.arange(n) + placement.offset[:, axis, None]) <= placement.half[axis]
        for axis, n in enumerate(windows.shape)
    ]
    return jnp.where(reach[0][:, :, None] & reach[1][:, None, :], images, 0.0)


def templates(
    modes: Sequence[Float[Array, "_ _ _"]],
    windows: Sequence[Windows],
    exposure: Exposure,
    extra: int = 0,
) -> Float[Array, "channel n y x"]:
    """Return what every component of unit flux adds to all channels: by group, with those of the padding; then `extra` ones."""
    shape, dtype = exposure.data.shape[1:], exposure.data.dtype
    groups = list(zip(modes, windows, exposure.placements, strict=True))
    count = sum(each.shape[-1] // 2 for each in modes)
    # Components whose shape is the same in all channels are looked up once.
    common = [
        _interpolated(each[0], placement, int(np.sqrt(each.shape[1]))) if len(each) == 1 else None
        for each, _, placement in groups
    ]

    def one(channel):
        canvas = jnp.ones((count + extra, *shape), dtype).at[:count].set(0.0)
        first = 0
        for (each, sizes, placement), known in zip(groups, common, strict=True):
            if known is None:
                known = _interpolated(each[exposure.plane[channel]], placement, int(np.sqrt(each.shape[1])))
            images = _window_images(known, placement, sizes, channel) * exposure.scale[channel]

            corners = jnp.asarray(placement.start)

            def put(n, canvas, images=images, corners=corners, first=first):
                start = (jnp.asarray(first + n, corners.dtype), corners[n, 0], corners[n, 1])
                return lax.dynamic_update_slice(canvas, images[n][None], start)

            canvas = lax.fori_loop(0, len(images), put, canvas)
            first += len(images)
        return canvas

    if len(exposure.data) == 1:
        return one(jnp.asarray(0))[None]
    return lax.map(one, jnp.arange(len(exposure.data)))
