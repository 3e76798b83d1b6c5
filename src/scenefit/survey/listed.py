"""Positions that a user knows beforehand: rows of a catalogue that can be used."""

from __future__ import annotations

import warnings

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import Table

from scenefit.arrays.peaks import keep_apart
from scenefit.sky.frame import Frame

DUPLICATE_RADIUS = 0.5
"""Distance within which two rows are the same, in standard deviations of the sharpest PSF."""


def catalog_positions(frame: Frame, catalog: SkyCoord | np.ndarray | Table) -> np.ndarray:
    """Return the positions (n, 2) of the rows of a catalogue on the frame.

    Raises
    ------
    ValueError
        If a table has no columns RA and DEC, or rows have no finite position.
    """
    if isinstance(catalog, Table):
        columns = Table(catalog).colnames
        names = {name.lower(): name for name in columns}
        if not {"ra", "dec"} <= names.keys():
            raise ValueError(f"catalog= wants a table with columns RA and DEC; got {columns}.")
        angles = [np.ma.filled(u.Quantity(catalog[names[n]], u.deg).value, np.nan) for n in ("ra", "dec")]
        positions = np.full((len(catalog), 2), np.nan)
        finite = np.isfinite(angles).all(axis=0)
        positions[finite] = frame.to_pixel(SkyCoord(*(column[finite] for column in angles), unit=u.deg))
    else:
        positions = np.reshape(frame.to_pixel(catalog), (-1, 2))
    if bad := [int(n) for n in np.flatnonzero(~np.isfinite(positions).all(axis=1))]:
        raise ValueError(f"Catalogue positions must be finite and visible from the frame; rows {bad} aren't.")
    return positions


def usable_rows(frame: Frame, positions: np.ndarray, psf_sigma: float) -> np.ndarray:
    """Return the rows of positions (n, 2) on the frame that can be used.

    Warns
    -----
    UserWarning
        Of rows outside the frame, and at the place of one before them.
    """
    inside = np.array([frame.box.contains(tuple(position)) for position in positions], dtype=bool)
    if not inside.all():
        outside = np.flatnonzero(~inside).tolist()
        warnings.warn(
            f"{len(outside)} catalogue source(s) outside the model frame left out: rows {outside}.", stacklevel=3
        )
    rows = np.flatnonzero(inside)
    kept = rows[keep_apart(positions[rows], np.full(len(rows), DUPLICATE_RADIUS * psf_sigma))]
    if len(kept) < len(rows):
        doubled = sorted(set(rows.tolist()) - set(kept.tolist()))
        warnings.warn(
            f"{len(doubled)} catalogue source(s) at the place of one before them left out: rows {doubled}.",
            stacklevel=3,
        )
    return kept
