"""From tables to figures: what `scenefit validate` does."""

from __future__ import annotations

import os
from pathlib import Path

import astropy.units as u
import numpy as np
from astropy.table import Table

from scenefit.app import io
from scenefit.app.fitsfile import find_hdu, is_fits, open_fits
from scenefit.app.pipeline import write_figure
from scenefit.app.validationplot import validation as draw_validation
from scenefit.survey.validate import Validation

FILES = ("validation.json", "validation.png")
"""What a comparison writes."""
UNITS = {"log_size": "", "ra": " [arcsec]", "dec": " [arcsec]"}
"""Units of residuals that aren't in magnitudes."""
SIZE_NAMES = ("half_light_radius_arcsec",)
"""Columns that hold a half-light radius in arcsec under a name that `validate` doesn't know, that of the packaged field."""


def read_sources(path: str | os.PathLike, hdu: str | None = None) -> Table:
    """Read a table of sources for `validate`, positions under any name that `io.read_catalog` knows.

    Parameters
    ----------
    path : path
        As for `io.read_catalog`.
    hdu : str, optional
        Name of the HDU that is read if a FITS file has it.

    Returns
    -------
    Table
        With ra and dec in degrees, ICRS; other columns as they are.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it can't be read or has no positions.
    """
    found = None
    if hdu is not None and is_fits(Path(path)):
        with open_fits(Path(path)) as hdus:
            extension = find_hdu(hdus, hdu)
            found = None if extension is None else Table.read(extension)
    try:
        positions, table = io.read_catalog(path if found is None else found)
    except ValueError as exc:
        raise (exc if found is None else ValueError(f"{path}: {exc}")) from exc
    table = table.copy()
    table.remove_columns([name for name in table.colnames if name.lower() in ("ra", "dec")])
    table["ra"], table["dec"] = positions.icrs.ra.deg * u.deg, positions.icrs.dec.deg * u.deg
    for name in SIZE_NAMES:
        if name in table.colnames and "half_light_radius" not in table.colnames:
            table.rename_column(name, "half_light_radius")
    return table


def write_validation(directory: Path, validation: Validation) -> list[Path]:
    """Write the numbers of a comparison as JSON and its figure as PNG, each whole or not at all; return their paths."""
    paths = [directory / name for name in FILES]
    figure = draw_validation(validation)
    for path in paths:
        path.unlink(missing_ok=True)
    io.write_json(paths[0], validation.summary())
    write_figure(paths[1], figure)
    return paths


def statistics_text(validation: Validation) -> str:
    """Return what a comparison comes to as text: numbers of sources, then a line a quantity."""
    counts = {"true sources": validation.detections, "rows in the catalogue": validation.entries}
    parts = [f"{len(table)} {what}" for what, table in counts.items()]
    shares = [f"{name} {_percent(getattr(validation, name))}" for name in ("completeness", "purity")]
    table = validation.statistics()
    table["quantity"] = [f"{name}{UNITS.get(name, ' [mag]')}" for name in table["quantity"]]
    for name in table.colnames:
        if table[name].dtype.kind == "f":
            table[name].info.format = ".4f"
    lines = table.pformat(max_lines=-1, max_width=-1, align=["<", *[">"] * (len(table.colnames) - 1)])
    return "\n".join([f"{', '.join(parts)}, {len(validation.pairs)} matched; {', '.join(shares)}", *lines])


def _percent(fraction: float) -> str:
    """Return a fraction in percent."""
    return f"{100 * fraction:.1f} %" if np.isfinite(fraction) else "unknown"
