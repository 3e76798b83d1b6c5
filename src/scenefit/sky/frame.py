"""The model frame: the pixel grid, channels and narrow PSF on which a scene is evaluated."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import astropy.units as u
import equinox as eqx
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_area

from scenefit.arrays.box import Box
from scenefit.arrays.fourier import coarse_fast_length
from scenefit.arrays.profiles import WIDEST_PSF
from scenefit.arrays.stamps import rounded_up
from scenefit.sky import units
from scenefit.sky.psf import GaussianPSF

MODEL_PSF_SIGMA = 0.7
"""Standard deviation, in model pixels, of the PSF already in the model image: wide enough to make it band-limited."""
MODEL_PSF_MARGIN = 0.9
"""The model PSF stays below this fraction of the sharpest observed one; else the model pixels are made smaller."""

DISTORTED_PROJECTIONS = ("TPV", "TPD", "TPU", "TNX", "ZPX", "ZPN")
"""Projection codes of FITS that hold a distortion polynomial, which astropy doesn't count as one."""

MARGIN_WIDTHS, MARGIN_DIGITS, LEAST_MARGIN = 1.25, 2, 4
"""The light of sources is modelled beyond the frame, too: so many standard deviations of the widest PSF at least, rounded up to
so many binary digits (frames of one size and similar PSFs share compiled programs), and so many pixels at least, the reach of
the model PSF of a point on the edge."""
EDGE_TOLERANCE = 1e-3
"""Model pixels by which an observation may reach over the edge of the frame without getting another row of them."""

Channel = str | tuple


def band_of(channel: Channel) -> str:
    """Return the band of a channel: its name, or the first of (band, epoch)."""
    return str(channel[0]) if isinstance(channel, tuple) else channel


class Frame(eqx.Module):
    """A pixel grid on the sky with named channels.

    Parameters
    ----------
    shape : (int, int)
        Height and width in pixels.
    channels : sequence of str or (band, epoch)
        Names of the channels, each once.
    wcs : astropy.wcs.WCS or FITS header, optional
        Celestial coordinates of the pixels; without it positions are pixels only.
    psf : GaussianPSF
        PSF of the model image, pixel response included: a round Gaussian, of 0.7 pixels unless given. (Morphologies are
        evaluated as they appear through it.)
    padding : int
        Pixels beyond the frame that light must not wrap around in a convolution: half the extent of the widest
        observed PSF, in model pixels, and the margin. `Frame.from_observations` sets it.
    margin : int, optional
        Pixels around the frame, at most half the padding, in which the light of profiles is modelled, too (`outer_box`), since
        PSFs bring part of it onto the frame: none unless given. `Frame.from_observations` sets it to 1.25 standard deviations
        of the widest PSF or somewhat more.

    Raises
    ------
    ValueError
        If the shape isn't two positive integers, a channel repeats, the WCS isn't celestial, the PSF has more
        than one channel or is wider than 5 pixels, the padding is negative, or the margin isn't between 0 and half of it.
    TypeError
        If the PSF isn't a round Gaussian.
    """

    box: Box
    channels: tuple[Channel, ...] = eqx.field(static=True)
    wcs: WCS | None = eqx.field(static=True)
    psf: GaussianPSF
    padding: int = eqx.field(static=True)
    margin: int = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        channels: Sequence[Channel | list],
        wcs: WCS | fits.Header | None = None,
        psf: GaussianPSF | None = None,
        padding: int = 32,
        margin: int = 0,
    ):
        if np.shape(shape) != (2,) or min(shape) < 1 or any(n != int(n) for n in shape):
            raise ValueError(f"A Frame wants shape (height, width) of at least one pixel each; got {shape}.")
        self.box = Box(shape)
        self.channels = check_channels(channels)
        self.wcs = as_wcs(wcs)
        self.psf = GaussianPSF(MODEL_PSF_SIGMA) if psf is None else psf
        if not isinstance(self.psf, GaussianPSF) or self.psf.integrate_pixel:
            raise TypeError(
                "The psf of a Frame is that of the model image, a GaussianPSF(sigma) in model pixels without "
                f"integrate_pixel; got {self.psf!r}. The PSFs of images belong to their observations."
            )
        if (count := self.psf.num_channels) != 1:
            raise ValueError(f"A Frame wants one model PSF for all channels; got one of {count} channels.")
        if (sigma := float(self.psf.effective_sigma[0])) > WIDEST_PSF:
            raise ValueError(
                f"A Frame wants a model PSF of at most {WIDEST_PSF:g} pixels standard deviation, narrower than those of all "
                f"images; got {sigma:g}. Make the model's pixels larger."
            )
        if padding < 0:
            raise ValueError(f"A Frame wants a padding of at least 0 pixels; got {padding}.")
        if not 0 <= margin <= padding / 2:
            raise ValueError(f"A Frame wants a margin of 0 pixels to half the padding of {padding}; got {margin}.")
        self.padding, self.margin = int(padding), int(margin)

    @classmethod
    def from_observations(
        cls,
        observations,
        coverage: str = "union",
        *,
        pixel_scale=None,
        psf: GaussianPSF | None = None,
    ) -> Frame:
        """Build the frame that covers all observations with the pixels of the finest one.

        The grid continues that of the observation with the smallest pixels (an undistorted tangent plane at its
        centre if it is distorted), subdivided where its PSF is too narrow for the model PSF. The channels are the
        ordered union of those of the observations.

        Parameters
        ----------
        observations : Observation or sequence of them
            All with a WCS, or all without (then all on one pixel grid).
        coverage : "union" or "intersection"
            Cover every pixel of every observation, or only what all of them see.
        pixel_scale : Quantity or float, optional
            Model pixel in arcsec, instead of that of the finest observation.
        psf : GaussianPSF, optional
            Model PSF, in model pixels.

        Raises
        ------
        ValueError
            If there is no observation, some have a WCS and others don't, `coverage` is unknown, the pixel scale
            isn't positive, or the intersection is empty.

        Warns
        -----
        UserWarning
            If the union holds an observation that overlaps no other one.
        """
        observations = list(observations) if isinstance(observations, Iterable) else [observations]
        if wrong := [obs for obs in observations if not hasattr(obs, "psf")]:
            raise TypeError(f"A frame is made from Observations; got {wrong[0]!r}.")
        if not observations:
            raise ValueError("A frame wants at least one observation; got none.")
        if coverage not in ("union", "intersection"):
            raise ValueError(f"coverage is 'union' or 'intersection'; got {coverage!r}.")
        without = [obs.name for obs in observations if obs.wcs is None]
        if without and len(without) < len(observations):
            having = [obs.name for obs in observations if obs.wcs is not None]
            raise ValueError(f"Either all observations have a WCS or none; {having} have one, {without} don't.")
        channels = tuple(dict.fromkeys(channel for obs in observations for channel in obs.channels))
        if without and pixel_scale is not None:
            raise ValueError("pixel_scale= needs observations with a WCS; without one, model pixels are theirs.")
        grid = None if without else _finest_grid(observations, pixel_scale)
        boxes = [_footprint(obs, grid, outwards=coverage == "union") for obs in observations]
        if coverage == "union":
            _warn_of_gaps(observations, boxes)
        box = boxes[0]
        for other in boxes[1:]:
            box = box.union(other) if coverage == "union" else box.intersection(other)
        if box.is_empty:
            raise ValueError(
                "The observations don't overlap, so coverage='intersection' is empty: "
                + "; ".join(f"{obs.name} covers {_sky_extent(obs)}" for obs in observations)
                + ". Check their WCS or use coverage='union'."
            )
        scales = [1.0 if grid is None else pixel_scale_of(obs.wcs) / pixel_scale_of(grid) for obs in observations]
        reach = max(obs.psf.extent * scale for obs, scale in zip(observations, scales, strict=True))
        width = max(obs.psf.effective_sigma.max() * scale for obs, scale in zip(observations, scales, strict=True))
        margin = rounded_up(max(int(np.ceil(MARGIN_WIDTHS * width)), LEAST_MARGIN), MARGIN_DIGITS)
        padding = int(np.ceil(reach)) + margin
        wcs = None
        if grid is not None:
            wcs = grid.deepcopy()
            wcs.wcs.crpix -= np.array(box.origin[::-1])
            wcs.array_shape = box.shape
        return cls(box.shape, channels=channels, wcs=wcs, psf=psf, padding=padding, margin=min(margin, padding // 2))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channel, y, x)."""
        return (len(self.channels), *self.box.shape)

    @property
    def outer_box(self) -> Box:
        """The frame and its margin."""
        return self.box.grow(self.margin)

    @property
    def inner_box(self) -> Box:
        """Where the frame lies on an image of `outer_box`, and on the padded grid, which begins with the margin."""
        return self.box.shift((self.margin, self.margin))

    @property
    def fft_shape(self) -> tuple[int, int]:
        """Height and width of the zero-padded grid on which the model is convolved; coarse, so that many frames share it."""
        height, width = self.box.shape
        return coarse_fast_length(height + self.padding), coarse_fast_length(width + self.padding)

    @property
    def pixel_scale(self) -> float:
        """Pixel side in arcsec (geometric mean); NaN without a WCS."""
        return float("nan") if self.wcs is None else pixel_scale_of(self.wcs)

    @property
    def center(self) -> tuple[float, float]:
        """Position (y, x) of the middle of the frame."""
        return (self.box.shape[0] - 1) / 2, (self.box.shape[1] - 1) / 2

    def channel_index(self, channels: Sequence[Channel]) -> tuple[int, ...]:
        """Return where each of `channels` stands in the frame.

        Raises
        ------
        ValueError
            If one isn't a channel of the frame.
        """
        missing = [channel for channel in channels if channel not in self.channels]
        if missing:
            raise ValueError(f"The frame has channels {list(self.channels)}, not {missing}.")
        return tuple(self.channels.index(channel) for channel in channels)

    def to_pixel(self, position) -> np.ndarray:
        """Return positions as (y, x) in pixels.

        Parameters
        ----------
        position : SkyCoord, sequence of SkyCoord, or array, shape (..., 2)
            Sky coordinates (any frame) or pixel positions, which are passed through.

        Returns
        -------
        array, shape (..., 2)
        """
        if isinstance(position, list | tuple) and any(isinstance(each, SkyCoord) for each in position):
            position = SkyCoord(position)
        if not isinstance(position, SkyCoord):
            position = units.to_pixels(position, "A position that isn't a SkyCoord")
            if position.shape[-1:] != (2,):
                raise ValueError(f"A position is a SkyCoord or (y, x) in pixels; got an array of {position.shape}.")
            return position
        if self.wcs is None:
            raise ValueError("This frame has no WCS: positions must be (y, x) in pixels, not SkyCoord.")
        x, y = self.wcs.world_to_pixel(position)
        return np.stack([y, x], axis=-1)

    def to_sky(self, position) -> SkyCoord:
        """Return pixel positions (y, x), shape (..., 2), as sky coordinates in the frame of the WCS."""
        if self.wcs is None:
            raise ValueError("This frame has no WCS: it knows pixel positions only.")
        position = units.to_pixels(position, "A position on the frame")
        return self.wcs.pixel_to_world(position[..., 1], position[..., 0])

    def sky_jacobian(self) -> np.ndarray:
        """Return d(y, x) [pixels] / d(ICRS east, north) [arcsec] at the frame's centre.

        Without a WCS, east and north stand for x and y in pixels.
        """
        if self.wcs is None:
            return np.array([[0.0, 1.0], [1.0, 0.0]])
        center = self.to_sky(self.center).icrs
        ahead, behind = (
            self.to_pixel(center.directional_offset_by([90, 0] * u.deg, side * u.arcsec)) for side in (0.5, -0.5)
        )
        return (ahead - behind).T


def with_channels(frame: Frame, channels: Sequence[Channel | list]) -> Frame:
    """Return a frame of the same pixels with other channels."""
    return Frame(
        frame.box.shape, channels=channels, wcs=frame.wcs, psf=frame.psf, padding=frame.padding, margin=frame.margin
    )


def is_same_frame(first: Frame, second: Frame) -> bool:
    """Return whether two frames have the same pixels, channels, PSF and padding, so that one may stand for the other.

    Frames whose WCS has distortion tables count as different unless it is one WCS.
    """
    if first is second:
        return True
    one, other = first.wcs, second.wcs
    if one is None or other is None or one is other:
        same_grid = one is other
    else:
        same_grid = not (one.has_distortion or other.has_distortion) and one.wcs == other.wcs
    names = "box", "channels", "padding", "margin"
    return (
        same_grid
        and all(getattr(first, name) == getattr(second, name) for name in names)
        and bool(eqx.tree_equal(first.psf, second.psf))
    )


def check_channels(channels: Sequence[Channel | list]) -> tuple[Channel, ...]:
    """Return the channel names as a tuple.

    Raises
    ------
    TypeError
        If one is neither a string nor a pair (band, epoch).
    ValueError
        If there is none or one repeats.
    """
    if isinstance(channels, str):
        channels = (channels,)
    wanted = "Channels are a sequence of names, each a string or (band, epoch), such as ['g', 'r'] or [('i', 1)]"
    if not isinstance(channels, Iterable) or isinstance(channels, Mapping):
        raise TypeError(f"{wanted}; got {channels!r}.")
    channels = tuple(tuple(c) if isinstance(c, list) else c for c in channels)
    pairs = [c for c in channels if isinstance(c, tuple) and len(c) == 2 and isinstance(c[0], str)]
    if wrong := [c for c in channels if not (isinstance(c, str) and c) and c not in pairs]:
        raise TypeError(f"{wanted}; got {list(channels)}, of which {wrong} is neither.")
    repeated = sorted({str(c) for c in channels if channels.count(c) > 1})
    if not channels or repeated:
        advice = f", where {', '.join(repeated)} repeat(s). Epochs of one band are named (band, epoch)"
        raise ValueError(
            f"Channel names must be distinct and at least one; got {list(channels)}{advice if repeated else ''}."
        )
    return channels


def as_wcs(wcs: WCS | fits.Header | None) -> WCS | None:
    """Return the celestial part of a WCS or FITS header in any dialect; None for None.

    Raises
    ------
    TypeError
        If it is neither.
    ValueError
        If it holds no pair of celestial axes, or makes no sense.
    """
    if wcs is None:
        return None
    if not isinstance(wcs, WCS | fits.Header):
        raise TypeError(f"A WCS is an astropy.wcs.WCS or a FITS header; got a {type(wcs).__name__}.")
    try:
        given = _read_wcs(wcs) if isinstance(wcs, fits.Header) else wcs
        given.wcs.set()
    except ValueError as exc:
        reason = str(exc).strip().splitlines()[-1]
        raise ValueError(f"The WCS can't be understood: {reason}") from exc
    if not given.has_celestial:
        raise ValueError(f"The WCS must have two celestial axes; got axis types {list(given.wcs.ctype)}.")
    return given.celestial if given.naxis != 2 else given


def _read_wcs(header: fits.Header) -> WCS:
    """Return the WCS of a header: of its first two axes, if they are the sky."""
    # SIP and a 2 x 2 CD matrix are understood only in two dimensions; in a cube the first two axes are mostly the sky.
    plane = WCS(header, naxis=2)
    return plane if plane.has_celestial else WCS(header)


def pixel_scale_of(wcs: WCS) -> float:
    """Return the side of a pixel at the reference point in arcsec: the square root of its area."""
    return float(np.sqrt(proj_plane_pixel_area(wcs)) * 3600)


def pixel_map(source: WCS | None, target: WCS | None, y, x) -> np.ndarray:
    """Return where pixel positions on one grid lie on another, as (..., 2) in (y, x); identity without WCS."""
    if source is None or target is None:
        return np.stack(np.broadcast_arrays(y, x), axis=-1).astype(float)
    column, row = target.world_to_pixel(source.pixel_to_world(np.asarray(x, float), np.asarray(y, float)))
    return np.stack([row, column], axis=-1)


def _finest_grid(observations, pixel_scale):
    """Return the WCS of the model grid: through the finest observation, subdivided where a PSF is too narrow for it."""
    reference = min(observations, key=lambda obs: pixel_scale_of(obs.wcs))
    scale = pixel_scale_of(reference.wcs)
    if pixel_scale is not None:
        wanted = units.to_arcsec(pixel_scale, "pixel_scale")
        if wanted.shape != () or not (np.isfinite(wanted) and wanted > 0):
            raise ValueError(f"pixel_scale must be a positive angle (a plain number: arcsec); got {pixel_scale}.")
        factor = scale / float(wanted)
    else:
        sharpest = min(obs.psf.effective_sigma.min() * pixel_scale_of(obs.wcs) for obs in observations) / scale
        factor = float(max(1, np.ceil(MODEL_PSF_SIGMA / (MODEL_PSF_MARGIN * sharpest) - 1e-6)))
    grid = _tangent_plane(reference) if _is_distorted(reference.wcs) else reference.wcs
    if factor != 1:
        grid = grid.deepcopy()
        grid.wcs.crpix = (grid.wcs.crpix - 0.5) * factor + 0.5
        if grid.wcs.has_cd():
            grid.wcs.cd = grid.wcs.cd / factor
        else:
            grid.wcs.cdelt = grid.wcs.cdelt / factor
    return grid


def _is_distorted(wcs: WCS) -> bool:
    """Return whether a WCS bends straight lines: by SIP, tables, or a polynomial inside its projection (as TPV has)."""
    return wcs.has_distortion or any(ctype[5:8] in DISTORTED_PROJECTIONS for ctype in wcs.wcs.ctype)


def _tangent_plane(obs) -> WCS:
    """Return the undistorted tangent plane at the centre of an observation, with its local scale and orientation."""
    height, width = obs.data.shape[-2:]
    center = obs.wcs.pixel_to_world((width - 1) / 2, (height - 1) / 2)
    plane = WCS(naxis=2)
    plane.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    plane.wcs.crval = [center.icrs.ra.deg, center.icrs.dec.deg]
    plane.wcs.crpix = [(width + 1) / 2, (height + 1) / 2]
    plane.wcs.radesys = "ICRS"
    plane.wcs.cd = np.eye(2) / 3600
    plane.wcs.set()
    step = 1.0
    middle = np.array([(height - 1) / 2, (width - 1) / 2])
    columns = []
    for dy, dx in ((0, step), (step, 0)):
        ends = pixel_map(obs.wcs, plane, middle[0] + np.array([dy, -dy]) / 2, middle[1] + np.array([dx, -dx]) / 2)
        columns.append((ends[0] - ends[1])[::-1] / step)
    plane.wcs.cd = np.stack(columns, axis=-1) / 3600
    plane.wcs.set()
    return plane


def _footprint(obs, grid, *, outwards: bool) -> Box:
    """Return the box of the model pixels that an observation's pixels touch (`outwards`), or that they cover."""
    height, width = obs.data.shape[-2:]
    y, x = np.mgrid[0 : height - 1 : 33j, 0 : width - 1 : 33j]
    position = pixel_map(obs.wcs, grid, y, x).reshape(-1, 2)
    if not np.isfinite(position).all():
        raise ValueError(
            f"The pixels of observation {obs.name!r} have no place on the model frame: its WCS and that of the finest "
            "observation don't see the same part of the sky."
        )
    margin = 0.0 if grid is None or obs.wcs is None else 0.5 * pixel_scale_of(obs.wcs) / pixel_scale_of(grid) - 0.5
    low, high = position.min(axis=0) - margin, position.max(axis=0) + margin
    if outwards:
        (y0, x0), (y1, x1) = np.floor(low + EDGE_TOLERANCE), np.ceil(high - EDGE_TOLERANCE) + 1
    else:
        (y0, x0), (y1, x1) = np.ceil(low - EDGE_TOLERANCE), np.floor(high + EDGE_TOLERANCE) + 1
    return Box.from_bounds((int(y0), int(y1)), (int(x0), int(x1)))


def _warn_of_gaps(observations, boxes):
    """Warn of observations that overlap no other one."""
    for obs, box in zip(observations, boxes, strict=True):
        others = [other for other in boxes if other is not box]
        if others and all(box.intersection(other).is_empty for other in others):
            warnings.warn(
                f"{obs.name} covers {_sky_extent(obs)} and overlaps no other observation; the model frame spans the gap. "
                "Check the WCS if that isn't meant.",
                stacklevel=3,
            )


def _sky_extent(obs) -> str:
    """Return where an observation lies, for error messages."""
    height, width = obs.data.shape[-2:]
    if obs.wcs is None:
        return f"{height} x {width} pixels"
    center = obs.wcs.pixel_to_world((width - 1) / 2, (height - 1) / 2).icrs
    size = pixel_scale_of(obs.wcs) * np.array([height, width])
    return f"{size[0]:.1f} x {size[1]:.1f} arcsec around ({center.ra.deg:.5f}, {center.dec.deg:.5f})"
