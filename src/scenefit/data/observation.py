"""Observations: images of one instrument with all that is needed to predict them."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import numpy as np

from scenefit.arrays.compilation import as_floats, compiled
from scenefit.data.noise import AbstractNoise, WhiteNoise
from scenefit.data.renderer import Renderer, transform_model
from scenefit.sky import units
from scenefit.sky.frame import Channel, Frame, as_wcs, check_channels
from scenefit.sky.psf import AbstractPSF, as_psf


class Astrometry(eqx.Module):
    """Where an observation's WCS is wrong.

    Parameters
    ----------
    shift : array, shape (2,), or Quantity
        Arcsec (east, north) by which sources at given sky coordinates appear displaced in the image from where its
        WCS puts them. Model pixels (x, y) where there is no WCS.
    """

    shift: np.ndarray

    def __init__(self, shift=(0.0, 0.0)):
        shift = units.to_arcsec(shift)
        if shift.shape != (2,) or not np.isfinite(shift).all():
            raise ValueError(f"Astrometry wants a finite shift (east, north) in arcsec; got {shift}.")
        self.shift = shift


class Observation(eqx.Module):
    """Images of one instrument in one or more channels on one pixel grid.

    Parameters
    ----------
    data : array, shape (channel, y, x) or (y, x)
        Flux per pixel, any number type and byte order. NaN means no information.
    weights, variance, sigma : array or float
        Inverse variance, variance or standard deviation per pixel: exactly one of them, unless `noise` is given.
        Any shape that broadcasts to `data`, or one number per channel. Weight 0 and infinite variance or sigma mean
        no information.
    psf : AbstractPSF or array
        One for all channels or one per channel, at most as large as the image.
    wcs : WCS or FITS header, optional
        In any dialect; only the celestial part is used.
    channels : sequence of str or (band, epoch)
        Distinct names, one per plane.
    name : str
        Name in tables, paths and files.
    zeropoint : float or array, shape (channel,), optional
        AB magnitude of one data unit: fluxes are then in nJy.
    unit : str or astropy unit, optional
        Flux unit of the data, instead of `zeropoint`.
    mask : array of bool, shape (y, x) or that of data, optional
        True where a pixel must not be used.
    background : float or array, shape (channel,), optional
        Flux per pixel, in data units, that the model adds to every pixel; 0 by default. Can be fitted.
    astrometry : Astrometry, optional
        Known offset of the image; can be fitted.
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

    Raises
    ------
    ValueError
        For shapes that don't match, negative or NaN weights, no valid pixel at all, a bad PSF or channel names
        that repeat.
    """

    data: np.ndarray
    noise: AbstractNoise
    psf: AbstractPSF
    background: np.ndarray
    astrometry: Astrometry
    nanojansky: np.ndarray
    renderer: Renderer | None
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
        channels: Sequence[Channel],
        name: str = "observation",
        zeropoint=None,
        unit=None,
        mask=None,
        background=None,
        astrometry: Astrometry | None = None,
        noise: AbstractNoise | None = None,
    ):
        data = _as_planes(data, name)
        self.name = name
        self.channels = check_channels(channels)
        if len(self.channels) != len(data):
            raise ValueError(
                f"{name}: data of shape {data.shape} has {len(data)} channel(s), but {len(self.channels)} channel "
                f"name(s) were given: {list(self.channels)}."
            )
        self.psf = _check_psf(as_psf(psf), data.shape, name)
        self.wcs = as_wcs(wcs)
        if noise is None:
            noise = WhiteNoise(_as_weights(data.shape, name, weights=weights, variance=variance, sigma=sigma))
        elif any(value is not None for value in (weights, variance, sigma)):
            raise ValueError(f"{name}: give either noise= or one of weights=, variance=, sigma=, not both.")
        usable = np.isfinite(data)
        if mask is not None:
            usable &= ~_as_mask(mask, data.shape, name)
        if noise.valid.shape != data.shape:
            raise ValueError(f"{name}: the noise has shape {noise.valid.shape}, the data {data.shape}.")
        noise = noise.restricted(usable, (slice(None), slice(None)))
        if not noise.valid.any():
            raise ValueError(f"{name}: no pixel has a positive weight, finite data and isn't masked; nothing to fit.")
        factor = units.nanojansky_per_unit(zeropoint, unit)
        self.flux_unit = "data units" if factor is None else "nJy"
        self.nanojansky = _per_channel(1.0 if factor is None else factor, len(data), "zeropoint", name)
        self.data = np.where(noise.valid, data, 0.0) * self.nanojansky[:, None, None]
        self.noise = noise.scaled(1 / self.nanojansky)
        self.background = _per_channel(0.0 if background is None else background, len(data), "background", name)
        self.background = self.background * self.nanojansky
        self.astrometry = Astrometry() if astrometry is None else astrometry
        self.renderer = None

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

    def match(self, frame: Frame) -> Observation:
        """Return the observation with its `renderer` from that frame."""
        renderer = Renderer.match(
            frame, psf=self.psf, wcs=self.wcs, shape=self.data.shape[-2:], channels=self.channels, name=self.name
        )
        return eqx.tree_at(lambda o: o.renderer, self, renderer, is_leaf=lambda leaf: leaf is None)

    def with_shift(self, shift) -> Observation:
        """Return the observation with another astrometric shift (east, north), in arcsec or a Quantity."""
        return eqx.tree_at(lambda o: o.astrometry, self, Astrometry(shift))

    def with_background(self, background) -> Observation:
        """Return the observation with another background per channel, in the units of `data`."""
        return eqx.tree_at(
            lambda o: o.background, self, _per_channel(background, len(self.data), "background", self.name)
        )

    def render(self, scene) -> np.ndarray:
        """Predict the data of a scene, background included.

        Parameters
        ----------
        scene : Scene, or array of shape (model channel, y, x) if the observation is matched
            The model, or its image on the frame.

        Returns
        -------
        array, shape (channel, y, x)
            In the units of `data`; background alone outside the frame.
        """
        if hasattr(scene, "evaluate"):
            matched = self if self.renderer is not None else self.match(scene.frame)
            return matched._render_model(scene.evaluate())
        return self._render_model(scene)

    def _render_model(self, model):
        """Render a model image and place it on the whole observation."""
        renderer = self.matched_renderer
        # The model is brought to order one: fluxes of any unit then pass through float32.
        model = np.asarray(model, dtype=float)
        scale = float(np.abs(model).max()) or 1.0
        shift = as_floats(self.astrometry.shift)
        window = np.asarray(_render_window(renderer, as_floats(model / scale), shift), dtype=float)
        image = np.zeros(self.data.shape)
        image[(slice(None), *renderer.window.slices)] = np.where(renderer.inside, window * scale, 0.0)
        return image + self.background[:, None, None]

    def residual(self, scene) -> np.ndarray:
        """Return data minus `render(scene)`; 0 at pixels without information."""
        return np.where(self.noise.valid, self.data - self.render(scene), 0.0)

    def chi_square(self, scene) -> np.ndarray:
        """Return the chi-square of each channel."""
        unit = self.noise.level()
        residual = as_floats(self.residual(scene) / unit[:, None, None])
        return np.asarray(self.noise.scaled(unit).chi_square(residual))

    def log_likelihood(self, scene) -> float:
        """Return the log-likelihood of a scene, normalised over the valid pixels (data in units of `data`)."""
        return self.noise.log_normalization() - 0.5 * float(self.chi_square(scene).sum())


@compiled
def _render_window(renderer: Renderer, model, shift):
    """Render a model image onto the pixels of the renderer's window."""
    return renderer(transform_model(model, renderer.fft_shape), shift)


def _as_planes(data, name) -> np.ndarray:
    """Return the data as (channel, y, x) in native floats."""
    data = np.asarray(data)
    if data.dtype.kind not in "fiu":
        raise TypeError(f"{name}: data must be real numbers; got an array of type {data.dtype}.")
    if data.ndim == 2:
        data = data[None]
    if data.ndim != 3 or 0 in data.shape:
        raise ValueError(
            f"{name}: data wants shape (y, x) or (channel, y, x) with at least one pixel; got {data.shape}."
        )
    return data.astype(float)


def _as_weights(shape, name, **given) -> np.ndarray:
    """Return inverse variances of the shape of the data from weights, variance or sigma."""
    given = {kind: np.asarray(value, dtype=float) for kind, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"{name}: give exactly one of weights=, variance=, sigma= (or noise=); got {sorted(given) or None}."
        )
    ((kind, value),) = given.items()
    if value.ndim == 1 and len(value) == shape[0]:
        value = value[:, None, None]
    try:
        value = np.broadcast_to(value, shape)
    except ValueError as exc:
        raise ValueError(f"{name}: {kind} of shape {value.shape} doesn't match data of shape {shape}.") from exc
    if kind == "weights":
        return value
    if np.isnan(value).any() or (value <= 0).any():
        raise ValueError(f"{name}: {kind} must be positive (infinite for pixels without information); got NaN or <= 0.")
    return 1 / (value if kind == "variance" else value**2)


def _as_mask(mask, shape, name) -> np.ndarray:
    """Return the mask as booleans of the shape of the data."""
    mask = np.asarray(mask)
    if mask.shape not in (shape, shape[1:]):
        raise ValueError(f"{name}: mask of shape {mask.shape} doesn't match data of shape {shape}.")
    if mask.dtype.kind not in "biu":
        raise TypeError(f"{name}: mask must be boolean or integer (True or non-zero: bad); got type {mask.dtype}.")
    return np.broadcast_to(mask.astype(bool), shape)


def _per_channel(value, count, what, name) -> np.ndarray:
    """Return a number or one per channel as an array of one per channel."""
    value = np.asarray(value, dtype=float)
    if value.shape not in ((), (1,), (count,)) or not np.isfinite(value).all():
        raise ValueError(f"{name}: {what} wants one finite number or one per channel ({count}); got {value}.")
    return np.broadcast_to(value, (count,)).copy()


def _check_psf(psf, shape, name) -> AbstractPSF:
    """Return the PSF if it fits data of that shape."""
    if psf.num_channels not in (1, shape[0]):
        raise ValueError(f"{name}: the PSF has {psf.num_channels} channels, the data {shape[0]}.")
    if psf.size > min(shape[1:]):
        raise ValueError(
            f"{name}: the PSF image spans {psf.size:g} pixels, more than the data of {shape[1]} x {shape[2]} pixels; "
            "cut it to the part that matters."
        )
    return psf
