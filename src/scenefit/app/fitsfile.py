"""FITS files opened with care: whole, or refused with the reason."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning


@contextlib.contextmanager
def open_fits(path) -> Iterator[fits.HDUList]:
    """Open a FITS file after checking that all of it is there; astropy's warnings are silenced meanwhile."""
    path = Path(path)
    if not is_fits(path):
        with path.open("rb") as file:
            start = file.read(8)
        raise ValueError(f"{path}: expected a FITS file, which starts with 'SIMPLE'; this one starts with {start!r}.")
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", AstropyWarning)
        file = stack.enter_context(io.BytesIO(_gunzip(path)) if compressed else path.open("rb"))
        try:
            hdus = stack.enter_context(fits.open(file, memmap=False, lazy_load_hdus=False))
        except (OSError, ValueError) as exc:
            raise ValueError(
                f"{path}: expected a FITS file; its first header is damaged or cut short ({exc})."
            ) from exc
        size = file.seek(0, os.SEEK_END)
        for hdu in hdus:
            info = hdu.fileinfo()
            if info["datLoc"] + hdu.size > size:
                raise ValueError(
                    f"{path}: the file is cut short: HDU {extension_name(hdu) or 'PRIMARY'} ends at byte "
                    f"{info['datLoc'] + hdu.size}, the file at {size}."
                )
        file.seek(min(size, info["datLoc"] + info["datSpan"]))
        if file.read(8) == b"XTENSION":
            raise ValueError(
                f"{path}: the file is cut short or damaged in the header after HDU {extension_names(hdus)[-1]}."
            )
        yield hdus


def is_fits(path: Path) -> bool:
    """Whether a file starts like FITS, perhaps gzipped."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: expected a file; there is {kind}.")
    with path.open("rb") as file:
        start = file.read(6)
        if start[:2] == b"\x1f\x8b":
            file.seek(0)
            try:
                start = gzip.GzipFile(fileobj=file).read(6)
            except (EOFError, OSError, zlib.error) as exc:
                raise ValueError(f"{path}: the gzipped file is cut short or damaged ({exc}).") from exc
    return start == b"SIMPLE"


def _gunzip(path: Path) -> bytes:
    """Return the content of a gzipped file."""
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
        raise ValueError(f"{path}: the gzipped file is cut short or damaged ({exc}).") from exc


def extension_name(hdu) -> str:
    """Return the name of an HDU as it is written, "" if it has none."""
    return str(hdu.header.get("EXTNAME", "")).strip()


def extension_names(hdus) -> list[str]:
    """Return the names of all HDUs, for messages."""
    return [extension_name(hdu) or ("PRIMARY" if n == 0 else f"(unnamed {n})") for n, hdu in enumerate(hdus)]


def find_hdu(hdus, name: str):
    """Return the first HDU of that name in any capitals, or None."""
    return next((hdu for hdu in hdus if extension_name(hdu).upper() == name.upper()), None)


def find_image(hdus, name: str):
    """Return the image HDU of that name; raise ValueError unless it has shape (y, x) or (channel, y, x)."""
    hdu = find_hdu(hdus, name)
    if hdu is None:
        raise ValueError(f"expected an image HDU {name}; found HDUs {extension_names(hdus)}.")
    if not hdu.is_image or hdu.data is None:
        raise ValueError(f"expected an image in HDU {name}; it holds {'no data' if hdu.is_image else 'a table'}.")
    if hdu.data.ndim not in (2, 3):
        raise ValueError(f"expected shape (y, x) or (channel, y, x) in HDU {name}; got {hdu.data.shape}.")
    return hdu
