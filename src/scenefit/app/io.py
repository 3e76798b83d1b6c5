"""Files in and out: multi-instrument FITS files, catalogues, result images and the folder they go to."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS

from scenefit.app.fitsfile import extension_name, extension_names, find_hdu, find_image, is_fits, open_fits
from scenefit.app.serialization import atomic_path, package_version
from scenefit.arrays.box import Box
from scenefit.data.observation import Observation, naming
from scenefit.model.packing import component_box
from scenefit.sky import units
from scenefit.sky.frame import Channel, as_wcs
from scenefit.sky.psf import ImagePSF

ZEROPOINT_KEYS = ("MAGZERO", "PHOTZP", "ZEROPT", "ZP", "MAGZPT")
"""Header keywords with the AB magnitude of one data unit; a number after them names the plane, from 1."""
CHANNELS_BY_NAME = {("HSC", 5): ("g", "r", "i", "z", "y"), ("HST", 1): ("F814W",)}
"""Channels of images that don't name them, by name and number of planes (the public COSMOS file)."""
NANOMAGGY_ZEROPOINT = 22.5
MAX_SOURCE_BYTES = 512e6
"""Images of single sources span the frame if all together take no more; else each is cut to its source."""
_POSITION_NAMES = (
    ("ra", "dec"),
    ("ra_deg", "dec_deg"),
    ("radeg", "dedeg"),
    ("raj2000", "dej2000"),
    ("_raj2000", "_dej2000"),
    ("alpha_j2000", "delta_j2000"),
    ("alphawin_j2000", "deltawin_j2000"),
    ("x_world", "y_world"),
    ("ra_icrs", "de_icrs"),
    ("ra_icrs", "dec_icrs"),
)
"""Pairs of columns with right ascension and declination, in any capitals."""
_TABLE_FORMATS = {
    ".ecsv": "ascii.ecsv",
    ".csv": "ascii.csv",
    ".parquet": "parquet",
    ".xml": "votable",
    ".vot": "votable",
    ".votable": "votable",
}


def read_observations(
    path: str | os.PathLike,
    *,
    names: Sequence[str] | None = None,
    zeropoints: Mapping | None = None,
) -> list[Observation]:
    """Read the observations of a multi-instrument FITS file.

    Each has image HDUs NAME_OBS (flux, with the WCS), NAME_WEIGHTS (inverse variance) and NAME_PSF (pixel
    response included), of shape (channel, y, x) or (y, x), and optionally NAME_MASK (non-zero: bad).

    Parameters
    ----------
    path : path
        `.fits` or `.fits.gz`.
    names : str or sequence of str, optional
        Which observations, in this order; by default all as they stand in the file.
    zeropoints : mapping of name to float or array, optional
        AB magnitude of one data unit, instead of what the header says.

    Returns
    -------
    list of Observation
        Channels are named by CHANNELS = 'g,r,i' or CHANNEL1, CHANNEL2, ... in the header of NAME_OBS, by a
        table HDU NAME_CHANNELS (its column CHANNEL or first; a column EPOCH makes them (band, epoch)), or by
        FILTER or BAND; else an only channel is named after the observation, several NAME_0, NAME_1, ...
        Zeropoints come from `ZEROPOINT_KEYS`, ZP_NAME in the primary header, PHOTFLAM and PHOTPLAM, or BUNIT;
        without any the data keep their units. OVERSAMP in the header of NAME_PSF: PSF samples per pixel.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it isn't FITS, is truncated, lacks an HDU or has it twice, or holds what makes no Observation.
    """
    with open_fits(path) as hdus:
        found = _observation_names(hdus, path)
        if not found:
            raise ValueError(
                f"{path}: expected image HDUs NAME_OBS, NAME_WEIGHTS, NAME_PSF of at least one observation; "
                f"found HDUs {extension_names(hdus)}."
            )
        names = [names] if isinstance(names, str) else names
        zeropoints = {} if zeropoints is None else dict(zeropoints)
        unknown = [name for name in (*(names or ()), *zeropoints) if name not in found]
        if unknown:
            raise ValueError(f"{path}: no observation is named {', '.join(map(repr, unknown))}; it holds {found}.")
        try:
            return [_read_observation(hdus, name, zeropoints.get(name)) for name in names or found]
        except (ValueError, TypeError) as exc:
            raise ValueError(f"{path}: {exc}") from exc


def read_catalog(path_or_table: str | os.PathLike | Table) -> tuple[SkyCoord, Table]:
    """Read a catalogue of positions.

    Parameters
    ----------
    path_or_table : path or Table
        The HDU CATALOG, or else the only table, of a FITS file; ECSV, CSV, VOTable, or another text table.
        Columns RA and DEC in any capitals, or under another usual name; in degrees unless they have a unit. Else an
        only column of SkyCoord. RADESYS (or RADECSYS) in the header or metadata: ICRS (default), FK5 or FK4.

    Returns
    -------
    SkyCoord
        Positions of all rows.
    Table
        The rows.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it can't be read, columns are missing, or a position isn't a finite number.
    """
    if isinstance(path_or_table, Table):
        return _positions(path_or_table, "The catalogue"), path_or_table
    path = Path(path_or_table)
    if is_fits(path):
        with open_fits(path) as hdus:
            tables = [hdu for hdu in hdus if isinstance(hdu, fits.BinTableHDU | fits.TableHDU)]
            hdu = find_hdu(hdus, "CATALOG")
            if hdu is None and len(tables) == 1:
                (hdu,) = tables
            if hdu not in tables:
                raise ValueError(
                    f"{path}: expected a table HDU CATALOG, or one table; found HDUs {extension_names(hdus)}."
                )
            table = Table.read(hdu)
    else:
        try:
            table = Table.read(path, format=_TABLE_FORMATS.get(path.suffix.lower(), "ascii"))
        # The readers raise errors of many kinds.
        except Exception as exc:
            raise ValueError(
                f"{path}: expected a table (FITS, ECSV, CSV, VOTable); reading it failed: {_first_line(exc)}"
            ) from exc
    return _positions(table, f"{path}: the catalogue"), table


def catalog_in(path: str | os.PathLike) -> tuple[SkyCoord, Table] | None:
    """Return what `read_catalog` makes of the HDU CATALOG of a FITS file; None if there is no such HDU."""
    with open_fits(path) as hdus:
        if find_hdu(hdus, "CATALOG") is None:
            return None
    return read_catalog(path)


def write_images(path: str | os.PathLike, scene, observations: Sequence[Observation]) -> None:
    """Write the model, as a FITS file of images (channel, y, x).

    Parameters
    ----------
    path : path
        `.fits` or `.fits.gz`; replaced if it exists.
    scene : Scene
        HDUs SRC_NAME hold every source alone on the model frame, convolved with the model PSF; cut to the
        source (X0, Y0: first pixel on the frame) where together they would take more than `MAX_SOURCE_BYTES`.
    observations : sequence of Observation
        HDUs NAME_MODEL hold the scene as seen by each, background included, and NAME_RESIDUAL the data minus
        that, 0 at pixels without information.
    """
    hdus = fits.HDUList([fits.PrimaryHDU()])
    hdus[0].header["CREATOR"] = f"scenefit {package_version()}"
    for obs in observations:
        model = obs.render(scene)
        residual = np.where(obs.noise.valid, obs.data - model, 0.0)
        for kind, image in {"MODEL": model, "RESIDUAL": residual}.items():
            hdus.append(_image_hdu(f"{obs.name}_{kind}", image, obs.wcs, obs.channels, obs.flux_unit))
    unit = "nJy" if all(obs.flux_unit == "nJy" for obs in observations) else "data units"
    whole = 4 * np.prod(scene.frame.shape) * len(scene.sources) <= MAX_SOURCE_BYTES
    for name, source in scene.sources.items():
        window = scene.frame.box if whole else _source_box(source, scene.frame)
        image = scene.evaluate([name])[(slice(None), *window.slices)]
        wcs = None if scene.frame.wcs is None else scene.frame.wcs[window.slices]
        hdu = _image_hdu(f"SRC_{name}", image, wcs, scene.frame.channels, unit)
        hdu.header["SOURCE"] = (name, "path: sources.NAME")
        hdu.header["X0"], hdu.header["Y0"] = window.origin[1], window.origin[0]
        hdus.append(hdu)
    with atomic_path(path) as temporary:
        hdus.writeto(temporary)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    """Write a JSON file, whole or not at all; arrays become lists, NaN and infinities null."""
    write_text(path, json.dumps(_as_json(content), indent=2, allow_nan=False) + "\n")


def prepare_output(directory: str | os.PathLike, overwrite: bool = False) -> Path:
    """Make the output folder and make sure that files can be written into it, before any work is done.

    Parameters
    ----------
    directory : path
        Made, with the folders above it, if it doesn't exist.
    overwrite : bool
        Whether it may hold files already; those of the same name are replaced later, the others stay.

    Raises
    ------
    FileExistsError
        If it holds files and `overwrite` is False.
    NotADirectoryError
        If it, or a folder above it, is a file.
    PermissionError
        If it can't be made or written.
    """
    directory = Path(directory)
    try:
        in_the_way = next((p for p in (directory, *directory.parents) if p.exists() and not p.is_dir()), None)
        if in_the_way is not None:
            raise NotADirectoryError(f"{directory}: expected a folder to write into; {in_the_way} is a file.")
        directory.mkdir(parents=True, exist_ok=True)
        count = sum(1 for _ in directory.iterdir())
        if count and not overwrite:
            raise FileExistsError(
                f"{directory}: expected a new or empty folder; it holds {count} file(s). "
                "Choose another one, or overwrite (--overwrite)."
            )
        trial = directory / f".{secrets.token_hex(4)}"
        trial.touch()
        trial.unlink()
    except (FileExistsError, NotADirectoryError):
        raise
    except OSError as exc:
        raise PermissionError(f"{directory}: can't write into this folder: {exc.strerror or exc}.") from exc
    return directory


@contextlib.contextmanager
def output_folder(directory: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield the folder from `prepare_output`; remove it again, with those above it, if it was made for nothing."""
    new = [path for path in (Path(directory), *Path(directory).parents) if not path.exists()]
    try:
        yield prepare_output(directory, overwrite)
    finally:
        # The folder first; what isn't empty, and so all above it, stays.
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()


def _observation_names(hdus, path) -> list[str]:
    """Return the names of the observations in a file, each of which must have one HDU of a kind."""
    names: dict[str, list[str]] = {kind: [] for kind in ("_OBS", "_WEIGHTS", "_PSF")}
    for name in map(extension_name, hdus):
        for kind, having in names.items():
            if name.upper().endswith(kind):
                having.append(name[: -len(kind)])
    found = names["_OBS"]
    for kind, having in names.items():
        known = [name.upper() for name in having]
        if twice := sorted({name for name in having if known.count(name.upper()) > 1}):
            raise ValueError(f"{path}: expected one HDU {twice[0]}{kind}; found HDUs {extension_names(hdus)}.")
        if without := [name for name in having if name.upper() not in (other.upper() for other in found)]:
            raise ValueError(f"{path}: expected an image HDU {without[0]}_OBS; found HDUs {extension_names(hdus)}.")
    return found


def _read_observation(hdus, name: str, zeropoint) -> Observation:
    """Return one observation."""
    image, weights, psf = (find_image(hdus, f"{name}_{kind}") for kind in ("OBS", "WEIGHTS", "PSF"))
    num_planes = 1 if image.data.ndim == 2 else len(image.data)
    mask = None
    if find_hdu(hdus, f"{name}_MASK") is not None:
        mask = find_image(hdus, f"{name}_MASK").data != 0
    with naming(name):
        if zeropoint is None:
            zeropoint = _zeropoint(image.header, hdus[0].header, name, num_planes)
        psf_image, wcs = _psf(psf.data, psf.header), _wcs(image.header, image.data.shape)
        channels = _channels(hdus, image.header, name, num_planes)
    return Observation(
        image.data,
        weights=weights.data,
        psf=psf_image,
        wcs=wcs,
        channels=channels,
        name=name,
        mask=mask,
        zeropoint=zeropoint,
        unit=_unit(image.header) if zeropoint is None else None,
    )


def _psf(image: np.ndarray, header) -> ImagePSF:
    """Return the PSF, recentred on its peak if the image is even-sized or has it off the middle."""
    oversampling = _number(header, "OVERSAMP") or 1.0
    planes = image[None] if image.ndim == 2 else image
    middle = [(n - 1) / 2 for n in image.shape[-2:]]
    peaks = [np.unravel_index(np.argmax(plane), plane.shape) for plane in planes]
    centered = all(n % 2 for n in image.shape[-2:]) and np.abs(np.array(peaks) - middle).max() <= 1
    return ImagePSF(image, oversampling=oversampling, center=None if centered else "peak")


def _wcs(header, shape) -> WCS | None:
    """Return the WCS of the image planes; None if the header has none."""
    if not str(header.get("CTYPE1", "")).strip():
        return None
    wcs = as_wcs(header)
    if wcs is not None:
        wcs.array_shape = shape[-2:]
    return wcs


def _channels(hdus, header, name: str, count: int) -> Sequence[Channel]:
    """Return the channel names of an observation of `count` planes."""
    if "CHANNELS" in header or "CHANNEL1" in header:
        numbered = [str(name) for name in header["CHANNEL[0-9]*"].values()]
        channels = [part.strip() for part in str(header.get("CHANNELS", ",".join(numbered))).split(",")]
    elif (table := find_hdu(hdus, f"{name}_CHANNELS")) is not None:
        channels = _table_channels(Table.read(table))
    else:
        for key in ("FILTER", "BAND"):
            channels = [part.strip() for part in str(header.get(key, "")).split(",")]
            if len(channels) == count and all(channels):
                return channels
        several = [name] if count == 1 else [f"{name}_{n}" for n in range(count)]
        return CHANNELS_BY_NAME.get((name.upper(), count), several)
    if len(channels) != count:
        raise ValueError(f"its data have {count} plane(s); the file names {len(channels)} channel(s): {channels}.")
    return channels


def _table_channels(table: Table) -> Sequence[Channel]:
    """Return the channels listed in a table."""
    columns = {column.upper(): column for column in table.colnames}
    bands = [str(band).strip() for band in table[columns.get("CHANNEL", table.colnames[0])]]
    if "EPOCH" not in columns:
        return bands
    epochs = [epoch.item() if isinstance(epoch, np.generic) else epoch for epoch in table[columns["EPOCH"]]]
    return list(zip(bands, epochs, strict=True))


def _number(header, key: str) -> float | None:
    """Return a header value as a number; None if it is missing or empty."""
    value = header.get(key)
    if value is None or isinstance(value, fits.card.Undefined) or not str(value).strip():
        return None
    try:
        return float(value)
    except ValueError as exc:
        raise ValueError(f"expected a number in header keyword {key}; got {value!r}.") from exc


def _zeropoint(header, primary, name: str, count: int) -> float | list | None:
    """Return the AB magnitude of one data unit that the headers give, for all planes or for each."""
    for key in ZEROPOINT_KEYS:
        each = [_number(header, f"{key}{n + 1}") for n in range(count)]
        if (value := _number(header, key)) is not None:
            return value
        if all(number is not None for number in each):
            return each
    if (value := _number(primary, f"ZP_{name}")) is not None:
        return value
    flam, pivot = _number(header, "PHOTFLAM"), _number(header, "PHOTPLAM")
    if flam and pivot:
        # f_nu = f_lambda lambda^2 / c in cgs units, lambda in Angstrom; AB = -2.5 log10 f_nu - 48.6
        return -2.5 * np.log10(flam * pivot**2 / 2.99792458e18) - 48.6
    if str(header.get("BUNIT", "")).strip().lower() in ("nanomaggy", "nanomaggies", "nmgy"):
        return NANOMAGGY_ZEROPOINT
    return None


def _unit(header) -> u.UnitBase | None:
    """Return the unit of the data if it is a flux density (per pixel)."""
    text = str(header.get("BUNIT", "")).strip()
    unit = u.Unit(text, parse_strict="silent") if text else None
    return unit if unit is not None and units.is_flux_density(unit) else None


def _positions(table: Table, what: str) -> SkyCoord:
    """Return the positions of all rows of a catalogue."""
    columns = {column.lower(): column for column in reversed(table.colnames)}
    pair = next((pair for pair in _POSITION_NAMES if columns.keys() >= set(pair)), None)
    coordinates = [table[column] for column in table.colnames if isinstance(table[column], SkyCoord)]
    if pair is None and len(coordinates) == 1:
        _check_angles([coordinates[0].icrs.ra.deg, coordinates[0].icrs.dec.deg], what)
        return coordinates[0]
    if pair is None:
        raise ValueError(f"{what} needs columns RA and DEC (deg); found {table.colnames}.")
    angles = [_degrees(table[columns[name]], what) for name in pair]
    _check_angles(angles, what)
    meta = {str(key).upper(): value for key, value in table.meta.items()}
    system = str(meta.get("RADESYS", meta.get("RADECSYS", "ICRS"))).strip().upper()
    if system not in ("ICRS", "FK5", "FK4"):
        raise ValueError(f"{what} needs RADESYS ICRS, FK5 or FK4; got {system!r}.")
    options = {}
    if system != "ICRS" and meta.get("EQUINOX") is not None:
        options["equinox"] = f"{'J' if system == 'FK5' else 'B'}{float(meta['EQUINOX'])}"
    return SkyCoord(*angles, unit="deg", frame=system.lower(), **options)


def _check_angles(angles, what: str):
    """Raise ValueError unless all right ascensions and declinations (deg) make sense."""
    bad = np.nonzero(~np.isfinite(angles).all(axis=0) | (np.abs(angles[1]) > 90))[0]
    if len(bad):
        rows = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise ValueError(
            f"{what} needs finite positions with DEC in [-90, 90] deg; {len(bad)} of {len(angles[0])} rows have "
            f"none: {rows} (counted from 0)."
        )


def _degrees(column, what: str) -> np.ndarray:
    """Return a column of angles in degrees; NaN where they are missing."""
    try:
        values = np.ma.filled(np.ma.asarray(column, dtype=float), np.nan)
        return u.Quantity(values, column.unit or u.deg).to_value(u.deg)
    except (ValueError, TypeError, u.UnitConversionError) as exc:
        raise ValueError(f"{what} needs angles as numbers in column {column.name}; {exc}") from exc


def _image_hdu(name: str, image: np.ndarray, wcs, channels, unit: str) -> fits.ImageHDU:
    """Return an image HDU with WCS, channel names and unit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)
        header = fits.Header() if wcs is None else wcs.to_header(relax=True)
    header["CHANNELS"] = ",".join(" ".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in channels)
    if unit == "nJy":
        header["BUNIT"] = unit
    # Data in odd units may lie outside the range of float32.
    peak = np.abs(image).max(initial=0.0)
    dtype = np.float32 if peak == 0 or 1e-30 < peak < 1e30 else np.float64
    return fits.ImageHDU(image.astype(dtype), header, name)


def _source_box(source, frame) -> Box:
    """Return the part of the frame where a source shines."""
    boxes = [component_box(component, frame) for _, component in source.components("")]
    box = boxes[0]
    for other in boxes[1:]:
        box = box.union(other)
    return box.intersection(frame.box)


def _as_json(value):
    """Return a value as JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _first_line(exc: Exception) -> str:
    """Return the first line of an error message; astropy goes on to list all formats that it knows."""
    return str(exc).partition("\n")[0]
