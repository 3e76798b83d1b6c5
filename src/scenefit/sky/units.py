"""Units at the border: fluxes to nJy, lengths and positions from astropy objects to plain numbers."""

from __future__ import annotations

import reprlib

import astropy.units as u
import numpy as np

ZEROPOINT_NJY = 31.4
"""AB magnitude of 1 nJy."""


def nanojansky_per_unit(zeropoint=None, unit=None) -> np.ndarray | None:
    """Return the factor from data units to nJy, or None if neither zeropoint nor unit is given.

    Parameters
    ----------
    zeropoint : float, array of shape (channel,), or Quantity in mag or AB mag
        AB magnitude of one data unit.
    unit : astropy unit or str
        A flux density (per pixel), such as "nJy" or "uJy/pix".

    Raises
    ------
    ValueError
        If both are given, the zeropoint isn't a finite AB magnitude, or the unit isn't a flux density.
    """
    if zeropoint is not None and unit is not None:
        raise ValueError("Give either zeropoint= (AB magnitude of one data unit) or unit=, not both.")
    if zeropoint is not None:
        is_ab = getattr(zeropoint, "unit", u.mag) in (u.mag, u.ABmag)
        values = as_numbers(getattr(zeropoint, "value", zeropoint), "zeropoint")
        if not is_ab or not np.isfinite(values).all():
            raise ValueError(f"The zeropoint must be a finite AB magnitude; got {zeropoint}.")
        return np.asarray(10 ** (-0.4 * (values - ZEROPOINT_NJY)))
    if unit is not None:
        try:
            unit_of_data = u.Unit(unit)
            per_pixel = not unit_of_data.is_equivalent(u.nJy)
            return np.asarray((unit_of_data * u.pix if per_pixel else unit_of_data).to(u.nJy))
        except (u.UnitConversionError, ValueError, TypeError) as exc:
            raise ValueError(f"unit= wants a flux density such as 'nJy' or 'uJy'; got {unit!r}.") from exc
    return None


def is_flux_density(unit: u.UnitBase) -> bool:
    """Return whether a unit is one of flux density, or of flux density per pixel."""
    if isinstance(unit, u.UnrecognizedUnit):
        return False
    return any(each.is_equivalent(u.nJy) for each in (unit, unit * u.pix))


def ab_magnitude(flux_njy):
    """Return the AB magnitude of a flux in nJy; NaN where the flux isn't positive."""
    flux = np.asarray(flux_njy, dtype=float)
    return ZEROPOINT_NJY - 2.5 * np.log10(np.where(flux > 0, flux, np.nan))


def ab_magnitude_error(flux_njy, flux_error_njy):
    """Return the first-order error of the AB magnitude; NaN where the flux isn't positive."""
    flux = np.asarray(flux_njy, dtype=float)
    return 2.5 / np.log(10) * np.asarray(flux_error_njy) / np.where(flux > 0, flux, np.nan)


def as_numbers(values, what: str) -> np.ndarray:
    """Return values as an array of floats; masked entries become NaN.

    Raises
    ------
    TypeError
        If they aren't real numbers, or have a unit; `what` names them in the message.
    """
    try:
        if values is None or np.iscomplexobj(values) or isinstance(values, u.Quantity):
            raise TypeError
        return np.ma.filled(np.ma.asanyarray(values).astype(float), np.nan)
    except (TypeError, ValueError) as exc:
        raise TypeError(f"{what} must be real numbers without a unit; got {reprlib.repr(values)}.") from exc


def to_unit(values, unit: u.UnitBase | str, what: str) -> np.ndarray:
    """Return values in `unit` as an array of floats; plain numbers are taken to be in it.

    Parameters
    ----------
    values : Quantity, numbers, or sequence of either
    unit : astropy unit
    what : str
        Name in messages.

    Raises
    ------
    ValueError
        If a Quantity has a unit that doesn't convert to `unit`.
    TypeError
        If they aren't real numbers.
    """
    if isinstance(values, u.Quantity):
        try:
            return np.asarray(values.to_value(unit), dtype=float)
        except u.UnitConversionError as exc:
            wanted = (
                "without a unit" if unit == u.dimensionless_unscaled else f"in {unit} or a unit that converts to it"
            )
            raise ValueError(f"{what} must be {wanted}; got {reprlib.repr(values)}.") from exc
    if isinstance(values, list | tuple) and any(isinstance(value, u.Quantity) for value in values):
        return np.array([to_unit(value, unit, what) for value in values])
    return as_numbers(values, what)


def to_arcsec(angle, what: str = "An angle") -> np.ndarray:
    """Return an angle (Quantity, or a plain number of arcsec) in arcsec."""
    return to_unit(angle, u.arcsec, what)


def to_pixels(length, what: str) -> np.ndarray:
    """Return a length or position in pixels (Quantity in pixels, or plain numbers) as plain numbers."""
    return to_unit(length, u.pix, what)


def to_microns(length, what: str) -> np.ndarray:
    """Return a wavelength in microns; plain numbers are taken as such."""
    return to_unit(length, u.micron, what)
