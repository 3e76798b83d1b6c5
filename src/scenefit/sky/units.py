"""Units at the border: fluxes to nJy, lengths and positions from astropy objects to plain numbers."""

from __future__ import annotations

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord

ZEROPOINT_NJY = 31.4
"""AB magnitude of 1 nJy."""


def nanojansky_per_unit(zeropoint=None, unit=None) -> np.ndarray | None:
    """Return the factor from data units to nJy, or None if neither zeropoint nor unit is given.

    Parameters
    ----------
    zeropoint : float or array, shape (channel,)
        AB magnitude of one data unit.
    unit : astropy unit or str
        A flux density per pixel, such as "nJy" or "uJy".

    Raises
    ------
    ValueError
        If both are given, the zeropoint isn't finite, or the unit isn't a flux density.
    """
    if zeropoint is not None and unit is not None:
        raise ValueError("Give either zeropoint= (AB magnitude of one data unit) or unit=, not both.")
    if zeropoint is not None:
        if isinstance(zeropoint, u.Quantity):
            zeropoint = zeropoint.value
        zeropoint = np.asarray(zeropoint, dtype=float)
        if not np.isfinite(zeropoint).all():
            raise ValueError(f"The zeropoint must be a finite AB magnitude; got {zeropoint}.")
        return np.asarray(10 ** (-0.4 * (zeropoint - ZEROPOINT_NJY)))
    if unit is not None:
        try:
            return np.asarray(u.Unit(unit).to(u.nJy))
        except (u.UnitConversionError, ValueError, TypeError) as exc:
            raise ValueError(f"unit= wants a flux density such as 'nJy' or 'uJy'; got {unit!r}.") from exc
    return None


def ab_magnitude(flux_njy):
    """Return the AB magnitude of a flux in nJy; NaN where the flux isn't positive."""
    flux = np.asarray(flux_njy, dtype=float)
    return ZEROPOINT_NJY - 2.5 * np.log10(np.where(flux > 0, flux, np.nan))


def ab_magnitude_error(flux_njy, flux_error_njy):
    """Return the first-order error of the AB magnitude; NaN where the flux isn't positive."""
    flux = np.asarray(flux_njy, dtype=float)
    return 2.5 / np.log(10) * np.asarray(flux_error_njy) / np.where(flux > 0, flux, np.nan)


def to_arcsec(angle) -> np.ndarray:
    """Return an angle (Quantity, or a plain number of arcsec) in arcsec."""
    return np.asarray(angle.to_value(u.arcsec) if isinstance(angle, u.Quantity) else angle, dtype=float)


def as_skycoord(position) -> SkyCoord | None:
    """Return `position` if it is a SkyCoord, else None."""
    return position if isinstance(position, SkyCoord) else None
