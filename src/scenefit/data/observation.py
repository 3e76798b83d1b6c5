"""Observations: images of one instrument with all that is needed to predict them."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence

import astropy.units as u
import equinox as eqx
import numpy as np

from scenefit.arrays.compilation import as_floats, compiled
from scenefit.data.abstractnoise import AbstractNoise
from scenefit.data.noise import WhiteNoise
from scenefit.data.nuisances import NUISANCES, Astrometry, Calibration
from scenefit.data.renderer import Renderer
from scenefit.sky import units
from scenefit.sky.frame import Channel, Frame, as_wcs, check_channels, is_same_frame, pixel_map
from scenefit.sky.psf import AbstractPSF, as_psf


class Observation(eqx.Module):
    """Images of one instrument in one or more channels on one pixel grid.

    Parameters
    ----------
    data : array or Quantity, shape (channel, y, x) or (y, x)
        Flux per pixel, any number type and byte order. NaN means no information, as does what a masked array masks.
    weights, variance, sigma : array, float or Quantity
        Inverse variance, variance or standard deviation per pixel: exactly one of them, unless `noise` is given.
        Any shape that broadcasts to `data`, or one number per channel. Weight 0 and infinite variance or sigma mean
        no information. Plain numbers are in the unit of the data.
    psf : AbstractPSF or array
        One for all channels or one per channel, at most as large as the image.
    wcs : WCS or FITS header, optional
        In any dialect; only the celestial part is used.
    channels : sequence of str or (band, epoch)
        Distinct names, one per plane. A name stands for the same light in every observation that has it.
    name : str
        Name in tables, paths and files; without "." and "*".
    zeropoint : float or array, shape (channel,), optional
        AB magnitude of one data unit: fluxes are then in nJy.
    unit : str or astropy unit, optional
        Flux unit of the data, instead of `zeropoint`. Data with a unit of flux density need neither.
    mask : array of bool, shape (y, x) or that of data, optional
        True where a pixel must not be used.
    background : float, array of shape (channel,) or Quantity, optional
        Flux per pixel, in data units, that the model adds to every pixel; 0 by default. Can be fitted.
    background_slope : array, shape (2,) or (channel, 2), or Quantity, optional
        Its change per pixel along (y, x), with `background` the value in the middle of the image: a tilted plane; 0 by
        default. Can be fitted.
    astrometry : Astrometry, or its shift, optional
        Known offset and rotation of the image; can be fitted.
    calibration : Calibration, optional
        Known corrections of fluxes and of the PSF; can be fitted.
    noise : AbstractNoise, optional
        Instead of weights, in data units.

    Attributes
    ----------
    data : array, shape (channel, y, x)
        In nJy per pixel if `zeropoint` or `unit` was given, else in the units handed in; 0 where there is no
        information.
    flux_unit : str
        "nJy", or "data units".
    nanojansky : array, shape (channel,)
        What `data` and `noise` were multiplied with.
    renderer : Renderer or None
        How model images get onto the observation's pixels, once it is matched to a frame.
    frame : Frame or None
        That frame.

    Raises
    ------
    ValueError
        For shapes that don't match, negative or NaN weights, no valid pixel at all, a bad PSF, units that don't convert or
        channel names that repeat.
    TypeError
        For things that aren't numbers, a WCS, a PSF or names.
    """

    data: np.ndarray
    noise: AbstractNoise
    psf: AbstractPSF
    background: np.ndarray
    background_slope: np.ndarray
    astrometry: Astrometry
    calibration: Calibration
    nanojansky: np.ndarray
    renderer: Renderer | None
    frame: Frame | None
    wcs: object = eqx.field(static=True)
    channels: tuple[Channel, ...] = eqx.field(static=True)
    name: str = eqx.field(static=True)
    flux_unit: str = eqx.field(static=True)

    def __init__(
        self,
        data,
        *,
        weights=None,
        variance=None,
        sigma=None,
        psf: AbstractPSF | np.ndarray,
        wcs=None,
        channels: Sequence[Channel | list],
        name: str = "observation",
        zeropoint=None,
        unit=None,
        mask=None,
        background=None,
        background_slope=None,
        astrometry=None,
        calibration: Calibration | None = None,
        noise: AbstractNoise | None = None,
    ):
        self.name = _check_name(name)
        with naming(name):
            data, data_unit, factor = _without_unit(data, zeropoint, unit)
            data = _as_planes(data)
            self.channels = check_channels(channels)
            if len(self.channels) != len(data):
                raise ValueError(
                    f"data of shape {data.shape} has {len(data)} channel(s), but {len(self.channels)} channel name(s) "
                    f"were given: {list(self.channels)}."
                )
            self.psf = _check_psf(as_psf(psf), data.shape)
            self.wcs = as_wcs(wcs)
            noise = _as_noise(noise, data.shape, data_unit, weights=weights, variance=variance, sigma=sigma)
            usable = np.isfinite(data)
            if mask is not None:
                usable &= ~_as_mask(mask, data.shape)
            noise = noise.restricted(usable, (slice(None), slice(None)))
            if not noise.valid.any():
                raise ValueError("no pixel has a positive weight, finite data and isn't masked; nothing to fit.")
            self.flux_unit = "data units" if factor is None else "nJy"
            self.nanojansky = _per_channel(1.0 if factor is None else factor, len(data), "zeropoint")
            self.data = np.where(noise.valid, data, 0.0) * self.nanojansky[:, None, None]
            self.noise = noise.scaled(1 / self.nanojansky)
            background = 0.0 if background is None else units.to_unit(background, data_unit, "background")
            self.background = _per_channel(background, len(data), "background") * self.nanojansky
            slope = np.zeros(2) if background_slope is None else background_slope
            slope = _as_slope(units.to_unit(slope, data_unit, "background_slope"), len(data))
            self.background_slope = slope * self.nanojansky[:, None]
            given = () if astrometry is None else (astrometry,)
            self.astrometry = astrometry if isinstance(astrometry, Astrometry) else Astrometry(*given)
            calibration = Calibration() if calibration is None else calibration
            self.calibration = Calibration(
                _per_channel(calibration.flux_scale, len(data), "flux_scale"),
                _per_channel(calibration.psf_variance, len(data), "psf_variance"),
            )
            self._check_psf_variance()
        self.renderer, self.frame = None, None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channel, y, x)."""
        return self.data.shape

    @property
    def matched_renderer(self) -> Renderer:
        """The renderer; raises ValueError if the observation isn't matched to a frame."""
        if self.renderer is None:
            raise ValueError(f"{self.name} has no renderer yet: use obs.match(frame) before rendering a model image.")
        return self.renderer

    def match(self, frame: Frame, *, turning: bool = False) -> Observation:
        """Return the observation with its `renderer` from that frame, which can turn it if asked for or if it is turned.

        Raises
        ------
        ValueError
            If frame and observation don't go together (see `Renderer.match`), or a pixel would look beyond the padding of the
            frame because of the rotation.
        """
        if not isinstance(frame, Frame):
            raise TypeError(f"{self.name}: match() wants a Frame; got a {type(frame).__name__}.")
        turning = turning or bool(self.astrometry.rotation)
        is_ready = self.renderer is not None and (self.renderer.turn is not None or not turning)
        if is_ready and self.frame is not None and is_same_frame(self.frame, frame):
            return self
        renderer = Renderer.match(
            frame,
            psf=self.psf,
            wcs=self.wcs,
            shape=self.data.shape[-2:],
            channels=self.channels,
            name=self.name,
            turning=turning,
        )
        return self.with_renderer(renderer, frame)

    def match_like(self, other: Observation) -> Observation:
        """Return the observation with the renderer and frame of another one that has its PSF, WCS, shape and channels."""
        return self.with_renderer(other.renderer, other.frame)

    def with_renderer(self, renderer: Renderer | None, frame: Frame | None) -> Observation:
        """Return the observation with that renderer, or with one that can turn it if it is turned and that one can't."""
        matched = eqx.tree_at(
            lambda o: (o.renderer, o.frame), self, (renderer, frame), is_leaf=lambda leaf: leaf is None
        )
        return matched._able_to_turn()

    def _able_to_turn(self) -> Observation:
        """Return the observation with a renderer that can turn it, if it has one and is turned, and not by too much."""
        rotation = float(self.astrometry.rotation)
        if not rotation or self.renderer is None or self.frame is None:
            return self
        if self.renderer.turn is None:
            return self.match(self.frame)
        largest = float(self.renderer.turn.largest)
        # A thousandth: room for rounding of a fitted angle.
        if abs(rotation) > 1.001 * largest:
            raise ValueError(
                f"{self.name}: turned by {rotation:g} degrees, pixels on the frame would look so far beyond it that light from "
                f"its opposite edge wraps into them; at most {largest:.3g} degrees are possible here. Use a Frame with more "
                "padding, or correct the WCS."
            )
        return self

    def with_shift(self, shift) -> Observation:
        """Return the observation with another astrometric shift (east, north), in arcsec or a Quantity."""
        return eqx.tree_at(lambda o: o.astrometry, self, Astrometry(shift, self.astrometry.rotation))

    def with_rotation(self, rotation) -> Observation:
        """Return the observation with another rotation (north to east), in degrees or a Quantity; see `Astrometry`."""
        turned = eqx.tree_at(lambda o: o.astrometry, self, Astrometry(self.astrometry.shift, rotation))
        return turned._able_to_turn()

    def apparent_positions(self, positions: np.ndarray, frame: Frame) -> np.ndarray:
        """Return where on the frame sources at some positions appear in this observation, turned and displaced.

        Parameters
        ----------
        positions : array, shape (..., 2)
            (y, x) on the frame.
        frame : Frame

        Returns
        -------
        array, shape (..., 2)
            (y, x) on the frame of those places that the observation's WCS says show them.
        """
        middle = pixel_map(self.wcs, frame.wcs, *(np.array((n - 1) / 2) for n in self.shape[1:]))
        jacobian, angle = frame.sky_jacobian(), np.deg2rad(self.astrometry.rotation)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        matrix = jacobian @ turn @ np.linalg.inv(jacobian)
        return middle + (np.asarray(positions, float) - middle) @ matrix.T + jacobian @ self.astrometry.shift

    def with_background(self, background, slope=None) -> Observation:
        """Return the observation with another background per channel, and another slope, in the units of `data`."""
        unit = u.nJy if self.flux_unit == "nJy" else u.dimensionless_unscaled
        with naming(self.name):
            background = _per_channel(units.to_unit(background, unit, "background"), len(self.data), "background")
            given = self.background_slope if slope is None else units.to_unit(slope, unit, "background_slope")
            slope = _as_slope(given, len(self.data))
        return eqx.tree_at(lambda o: (o.background, o.background_slope), self, (background, slope))

    def nuisances(self) -> dict[str, np.ndarray]:
        """Return the values of all `NUISANCES`, by path below the observation."""
        return {path: getter(self) for path, getter in _GETTERS.items()}

    def with_nuisances(self, values: Mapping[str, np.ndarray]) -> Observation:
        """Return the observation with other values of some of its `NUISANCES`, in the units of `data`."""
        if not values:
            return self
        new = [np.asarray(value, float) for value in values.values()]
        changed = eqx.tree_at(lambda o: [_GETTERS[path](o) for path in values], self, new)
        changed._check_psf_variance()
        return changed._able_to_turn()

    def _check_psf_variance(self):
        """Raise ValueError if no light would be left of the PSF."""
        lowest = -(self.psf.effective_sigma**2)
        if (self.calibration.psf_variance <= lowest).any():
            raise ValueError(
                f"{self.name}: psf_variance {self.calibration.psf_variance} takes away all of the PSF, whose variance is about "
                f"{-lowest} pixels squared."
            )

    def with_noise(self, noise: AbstractNoise) -> Observation:
        """Return the observation with another noise, in the units of `data`; pixels without information stay so."""
        with naming(self.name):
            noise = _as_noise(noise, self.shape, u.dimensionless_unscaled)
        noise = noise.restricted(self.noise.valid, (slice(None), slice(None)))
        return eqx.tree_at(lambda o: o.noise, self, noise)

    def background_image(self) -> np.ndarray:
        """Return the background, shape (channel, y, x)."""
        y, x = (np.arange(n) - (n - 1) / 2 for n in self.shape[1:])
        slope_y, slope_x = self.background_slope.T[..., None, None]
        return self.background[:, None, None] + slope_y * y[:, None] + slope_x * x

    def render(self, scene) -> np.ndarray:
        """Predict the data of a scene, background included.

        Parameters
        ----------
        scene : Scene, or array of shape (model channel, y, x) if the observation is matched
            The model, or its image on that frame (or on the frame and its margin, `Frame.outer_box`).

        Returns
        -------
        array, shape (channel, y, x)
            In the units of `data`; background alone outside the frame.
        """
        if hasattr(scene, "evaluate"):
            return self.match(scene.frame)._render_model(scene.evaluate(outer=True))
        return self._render_model(scene)

    def _render_model(self, model):
        """Render a model image and place it on the whole observation."""
        renderer = self.matched_renderer
        # The model is brought to order one: fluxes of any unit then pass through float32.
        model = np.asarray(model, dtype=float)
        is_outer = self.frame is not None and model.shape == (self.frame.shape[0], *self.frame.outer_box.shape)
        if self.frame is not None and not is_outer and model.shape != self.frame.shape:
            raise ValueError(
                f"{self.name}: a model image wants the shape (channel, y, x) = {self.frame.shape} of the frame that the "
                f"observation is matched to; got {model.shape}."
            )
        scale = float(np.abs(model).max()) or 1.0
        shift, *others = as_floats(self.astrometry.shift), self.calibration.psf_variance, self.astrometry.rotation
        # A blur and a rotation cost something: not where there are none.
        others = [as_floats(value) if value.any() else None for value in others]
        window = np.asarray(_render_window(renderer, as_floats(model / scale), is_outer, shift, *others), dtype=float)
        window = window * self.calibration.flux_scale[:, None, None]
        image = np.zeros(self.data.shape)
        image[(slice(None), *renderer.window.slices)] = np.where(renderer.inside, window * scale, 0.0)
        return image + self.background_image()

    def residual(self, scene) -> np.ndarray:
        """Return data minus `render(scene)`; 0 at pixels without information."""
        return np.where(self.noise.valid, self.data - self.render(scene), 0.0)

    @property
    def covered(self) -> np.ndarray:
        """Which pixels (y, x) lie on the frame that the observation is matched to."""
        inside = np.zeros(self.shape[1:], bool)
        inside[self.matched_renderer.window.slices] = self.matched_renderer.inside
        return inside

    @property
    def compared(self) -> np.ndarray:
        """Which pixels (channel, y, x) a model on the frame is compared with: those on it that have information."""
        return self.noise.valid & self.covered

    def on_frame(self) -> Observation:
        """Return the observation without information outside the frame that it is matched to: as fits see it."""
        return self.with_noise(self.noise.restricted(self.covered, (slice(None), slice(None))))

    def chi_square(self, scene) -> np.ndarray:
        """Return the chi-square of each channel; pixels outside the frame count (see `on_frame`)."""
        unit = self.noise.level()
        residual = as_floats(self.residual(scene) / unit[:, None, None])
        return np.asarray(self.noise.scaled(unit).chi_square(residual))

    def log_likelihood(self, scene) -> float:
        """Return the log-likelihood of a scene, normalised over the valid pixels (data in units of `data`)."""
        unit = self.noise.level()
        residual = as_floats(-self.residual(scene) / unit[:, None, None])
        deviance = np.asarray(self.noise.scaled(unit).deviance_residual(residual), dtype=float)
        return self.noise.log_normalization() - 0.5 * float((deviance**2).sum())


@compiled
def _render_window(renderer: Renderer, model, is_outer: bool, shift, psf_variance, rotation):
    """Render a model image onto the pixels of the renderer's window."""
    return renderer(renderer.transform(model, outer=is_outer), shift, psf_variance, rotation)


_GETTERS = {path: operator.attrgetter(path) for path in NUISANCES}


@contextlib.contextmanager
def naming(name: str):
    """Put the name of an observation in front of the messages of ValueError and TypeError."""
    try:
        yield
    except TypeError as exc:
        raise TypeError(f"{name}: {exc}") from exc
    except ValueError as exc:
        raise ValueError(f"{name}: {exc}") from exc


def _check_name(name) -> str:
    """Return the name if paths can hold it."""
    if not isinstance(name, str) or not name or "." in name or "*" in name:
        raise ValueError(f"Observation names are strings without '.' and '*'; got {name!r}.")
    return str(name)


def _without_unit(data, zeropoint, unit):
    """Return the data as plain numbers, their unit, and what makes nJy of them (None: they aren't calibrated)."""
    factor = units.nanojansky_per_unit(zeropoint, unit)
    if not isinstance(data, u.Quantity):
        return data, u.dimensionless_unscaled if unit is None else u.Unit(unit), factor
    if unit is not None:
        return units.to_unit(data, unit, "data"), u.Unit(unit), factor
    if factor is None and units.is_flux_density(data.unit):
        factor = units.nanojansky_per_unit(unit=data.unit)
    return data.value, data.unit, factor


def _as_planes(data) -> np.ndarray:
    """Return the data as (channel, y, x) in native floats; NaN where they are masked."""
    data = np.ma.asanyarray(data)
    if data.dtype.kind not in "fiu":
        raise TypeError(f"data must be real numbers; got an array of type {data.dtype}.")
    if data.ndim == 2:
        data = data[None]
    if data.ndim != 3 or 0 in data.shape:
        raise ValueError(f"data wants shape (y, x) or (channel, y, x) with at least one pixel; got {data.shape}.")
    return data.astype(float).filled(np.nan)


def _as_noise(noise, shape, unit, **given) -> AbstractNoise:
    """Return the noise, made from weights, variance or sigma if need be."""
    given = {kind: value for kind, value in given.items() if value is not None}
    if noise is None:
        return WhiteNoise(_as_weights(shape, unit, given))
    if given:
        raise ValueError("give either noise= or one of weights=, variance=, sigma=, not both.")
    if not isinstance(noise, AbstractNoise):
        raise TypeError(f"noise= wants a noise model such as WhiteNoise; got {noise!r}. Use sigma= for numbers.")
    if noise.valid.shape != shape:
        raise ValueError(f"the noise has shape {noise.valid.shape}, the data {shape}.")
    return noise


_POWERS = {"weights": -2, "variance": 2, "sigma": 1}
"""Powers of the unit of the data."""


def _as_weights(shape, unit, given) -> np.ndarray:
    """Return inverse variances of the shape of the data from weights, variance or sigma."""
    if len(given) != 1:
        raise ValueError(f"give exactly one of weights=, variance=, sigma= (or noise=); got {sorted(given) or None}.")
    ((kind, value),) = given.items()
    if np.ma.is_masked(value):
        value = np.ma.filled(np.ma.asanyarray(value).astype(float), 0.0 if kind == "weights" else np.inf)
    value = units.to_unit(value, unit ** _POWERS[kind], kind)
    if value.ndim == 1 and len(value) == shape[0]:
        value = value[:, None, None]
    try:
        value = np.broadcast_to(value, shape)
    except ValueError as exc:
        raise ValueError(f"{kind} of shape {value.shape} doesn't match data of shape {shape}.") from exc
    if kind == "weights":
        return value
    if np.isnan(value).any() or (value <= 0).any():
        raise ValueError(f"{kind} must be positive (infinite for pixels without information); got NaN or <= 0.")
    return 1 / (value if kind == "variance" else value**2)


def _as_mask(mask, shape) -> np.ndarray:
    """Return the mask as booleans of the shape of the data."""
    mask = np.asarray(mask)
    if mask.shape not in (shape, shape[1:]):
        raise ValueError(f"mask of shape {mask.shape} doesn't match data of shape {shape}.")
    if mask.dtype.kind not in "biu":
        raise TypeError(f"mask must be boolean or integer (True or non-zero: bad); got type {mask.dtype}.")
    return np.broadcast_to(mask.astype(bool), shape)


def _per_channel(value, count, what) -> np.ndarray:
    """Return a number or one per channel as an array of one per channel."""
    value = np.asarray(value, dtype=float)
    if value.shape not in ((), (1,), (count,)) or not np.isfinite(value).all():
        raise ValueError(f"{what} wants one finite number or one per channel ({count}); got {value}.")
    return np.broadcast_to(value, (count,)).copy()


def _as_slope(value, count) -> np.ndarray:
    """Return a slope (y, x), or one per channel, as an array of one per channel."""
    value = np.asarray(value, dtype=float)
    if value.shape not in ((2,), (count, 2)) or not np.isfinite(value).all():
        raise ValueError(f"background_slope wants finite (y, x), or (y, x) for each of {count} channels; got {value}.")
    return np.broadcast_to(value, (count, 2)).copy()


def _check_psf(psf, shape) -> AbstractPSF:
    """Return the PSF if it fits data of that shape."""
    if psf.num_channels not in (1, shape[0]):
        raise ValueError(f"the PSF has {psf.num_channels} channels, the data {shape[0]}.")
    if psf.size > min(shape[1:]):
        raise ValueError(
            f"the PSF image spans {psf.size:g} pixels, more than the data of {shape[1]} x {shape[2]} pixels; cut it to the "
            "part that matters."
        )
    return psf
