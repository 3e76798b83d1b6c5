"""Catalogues into files, with their units, descriptions, UCDs and flags."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from astropy.io import fits
from astropy.table import QTable, Table

from scenefit.app.serialization import atomic_path

FORMATS = {
    ".ecsv": "ascii.ecsv",
    ".fits": "fits",
    ".fits.gz": "fits",
    ".parquet": "parquet",
    ".xml": "votable",
    ".vot": "votable",
    ".votable": "votable",
}
"""What endings of names stand for."""


def write_catalog(path: str | os.PathLike, table: QTable) -> None:
    """Write a catalogue to a file, whole or not at all; one of the same name is replaced.

    `astropy.table.QTable.read` gives it back with units, descriptions and UCDs; a FITS file has the flags as header cards such as
    `FLAG64 = 'MASKED'` and UCDs and descriptions as `TUCDn` and `TCOMMn`, too.

    Parameters
    ----------
    path : path
        The ending says which format: .ecsv, .fits, .fits.gz, .parquet, or .xml, .vot and .votable for a VOTable.
    table : QTable
        Such as `catalog` returns.

    Raises
    ------
    ValueError
        If the ending is none of these.
    ModuleNotFoundError
        If a Parquet file is asked for, and pyarrow isn't installed.
    """
    path = Path(path)
    ending = next((each for each in FORMATS if path.name.lower().endswith(each)), None)
    if ending is None:
        raise ValueError(f"{path}: expected a name that ends in one of {', '.join(FORMATS)}.")
    kind = FORMATS[ending]
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ModuleNotFoundError(
            f"{path}: Parquet files want pyarrow, which isn't installed: pip install 'scenefit[parquet]', or choose .ecsv or "
            ".fits."
        )
    with atomic_path(path) as temporary:
        if kind == "fits":
            _write_fits(temporary, table)
        else:
            # VOTables take their UCDs from columns, which quantities are not.
            (Table(table) if kind == "votable" else table).write(temporary, format=kind)


def _write_fits(path: Path, table: QTable):
    """Write a catalogue as the table CATALOG of a FITS file."""
    plain = table.copy(copy_data=False)
    plain.meta = {key: value for key, value in table.meta.items() if not isinstance(value, Mapping)}
    plain.meta["EXTNAME"] = "CATALOG"
    plain.write(path, format="fits")
    with fits.open(path, mode="update") as hdus:
        header = hdus["CATALOG"].header
        for name, bit in table.meta.get("flags", {}).items():
            header[f"FLAG{bit}"] = name
        for number, name in enumerate(table.colnames, 1):
            info = table[name].info
            if info.meta and "ucd" in info.meta:
                header[f"TUCD{number}"] = info.meta["ucd"]
            if info.description:
                header[f"TCOMM{number}"] = info.description
