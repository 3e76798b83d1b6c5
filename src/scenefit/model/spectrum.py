"""Spectra: the total flux of a component in each channel of the model frame."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import astropy.units as u
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scenefit.sky import units
from scenefit.sky.frame import Channel, band_of, check_channels


class AbstractSpectrum(eqx.Module):
    """Total flux per channel, linear in the numbers `flux`: channel c holds `flux[index[c]]`, or nothing."""

    flux: eqx.AbstractVar[np.ndarray | Array]

    @abstractmethod
    def layout(self, channels: tuple[Channel, ...]) -> np.ndarray:
        """Return which entry of `flux` each channel shows, -1 for none; int, shape (channel,).

        Raises
        ------
        ValueError
            If `flux` doesn't fit these channels.
        """

    def evaluate(self, channels: tuple[Channel, ...]) -> Float[np.ndarray | Array, " channel"]:
        """Return the total flux in each channel."""
        index = self.layout(channels)
        arrays = jnp if isinstance(self.flux, Array) else np
        return arrays.where(index >= 0, self.flux[np.maximum(index, 0)], 0.0)


class ArraySpectrum(AbstractSpectrum):
    """A free flux in every channel.

    Parameters
    ----------
    flux : array, shape (channel,)
        Total flux, in the unit of the observations: nJy, to which a Quantity is converted, if they have zeropoints.
    """

    flux: np.ndarray | Array

    def __init__(self, flux):
        self.flux = _check_flux(flux)

    def layout(self, channels):  # noqa: D102
        if len(self.flux) != len(channels):
            raise ValueError(
                f"ArraySpectrum has {len(self.flux)} flux(es) for {len(channels)} channels {list(channels)}."
            )
        return np.arange(len(channels))


class StaticSpectrum(AbstractSpectrum):
    """One flux per band, the same in all its epochs: a host galaxy, a constant star.

    Parameters
    ----------
    flux : array, shape (band,)
        Total flux.
    bands : sequence of str
        Band names; a channel belongs to the band that it is named after, or to that of its name (band, epoch).
    """

    flux: np.ndarray | Array
    bands: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, flux, bands: Sequence[str]):
        self.flux = _check_flux(flux)
        self.bands = tuple(str(band) for band in check_channels(bands))
        if len(self.bands) != len(self.flux):
            raise ValueError(
                f"StaticSpectrum has {len(self.flux)} flux(es) for {len(self.bands)} band(s) {self.bands}."
            )

    def layout(self, channels):  # noqa: D102
        unknown = [c for c in channels if band_of(c) not in self.bands]
        if unknown:
            raise ValueError(f"StaticSpectrum has bands {list(self.bands)}, which don't include channel(s) {unknown}.")
        return np.array([self.bands.index(band_of(c)) for c in channels])


class TransientSpectrum(AbstractSpectrum):
    """A free flux per channel during given epochs, none outside them: a supernova, a variable star.

    Parameters
    ----------
    flux : array, shape (channel,)
        Total flux; entries outside the epochs are ignored.
    epochs : sequence, optional
        Epochs, as in the channel names (band, epoch), in which the source shines; all if not given.
    """

    flux: np.ndarray | Array
    epochs: tuple | None = eqx.field(static=True)

    def __init__(self, flux, epochs: Sequence | None = None):
        self.flux = _check_flux(flux)
        if isinstance(epochs, str) or not isinstance(epochs, Iterable | None):
            raise TypeError(f"TransientSpectrum wants a sequence of epochs; got {epochs!r}.")
        self.epochs = None if epochs is None else tuple(epochs)

    def layout(self, channels):  # noqa: D102
        if len(self.flux) != len(channels):
            raise ValueError(f"TransientSpectrum has {len(self.flux)} flux(es) for {len(channels)} channels.")
        plain = [c for c in channels if not isinstance(c, tuple)]
        if plain:
            raise ValueError(f"TransientSpectrum needs channels named (band, epoch); got {plain}.")
        unknown = sorted(set(self.epochs or ()) - {c[1] for c in channels}, key=str)
        if unknown:
            raise ValueError(f"TransientSpectrum has epochs {unknown}, which no channel has.")
        shines = np.array([self.epochs is None or c[1] in self.epochs for c in channels])
        return np.where(shines, np.arange(len(channels)), -1)


def _check_flux(flux):
    """Return a flux array of shape (n,)."""
    flux = flux if isinstance(flux, Array) else np.atleast_1d(units.to_unit(flux, u.nJy, "The flux of a spectrum"))
    if flux.ndim != 1 or len(flux) == 0:
        raise ValueError(f"A spectrum wants fluxes of shape (n,), n > 0; got shape {flux.shape}.")
    return flux
