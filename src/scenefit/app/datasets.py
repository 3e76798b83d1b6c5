"""Example fields by name: packaged, downloaded once, or from a local folder.

The environment variable SCENEFIT_DATA names a folder with copies of the files that aren't packaged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import Table
from astropy.utils.data import download_file

from scenefit.app.fitsfile import find_hdu, open_fits
from scenefit.app.io import catalog_in, read_observations
from scenefit.data.observation import Observation

FOLDER_VARIABLE = "SCENEFIT_DATA"
"""Environment variable with the folder of local copies."""
COSMOS_REPOSITORY = "astro-data-lab/scarlet-test-data"
COSMOS_REMOTE_FILE = "multiresolution_tutorial/data.fits.gz"
COSMOS_FILE = "cosmos_hst_hsc.fits"
DECALS_FILE = "decals_59.1067_-30.4848_cutout.fits"
DECALS_PSF_FILE = "decals_59.1067_-30.4848_psf.fits"
DECALS_BANDS = ("g", "r", "z")
DECALS_SERVICE, DECALS_LAYER = "https://www.legacysurvey.org/viewer", "ls-dr9"
DECALS_POSITION, DECALS_SIZE = (59.1067, -30.4848), 256
TIMEOUT = 20.0
"""Seconds to wait for an answer of a server."""
DECALS_ZEROPOINT = 22.5
"""AB magnitude of one nanomaggy, the unit of Legacy Survey images (Dey et al. 2019)."""


@dataclass(frozen=True)
class Dataset:
    """An example field.

    Attributes
    ----------
    observations : tuple of Observation
    catalog : SkyCoord
        Positions of its sources.
    truth : Table or None
        True positions and fluxes, where the field is simulated.
    path : Path
        File with the images.
    description : str
    """

    observations: tuple[Observation, ...]
    catalog: SkyCoord
    truth: Table | None
    path: Path
    description: str


def names() -> list[str]:
    """Return the names that `load` knows."""
    return list(_LOADERS)


def load(name: str) -> Dataset:
    """Load an example field.

    Parameters
    ----------
    name : str
        "demo": a simulated blend of seven sources seen by HST and HSC, packaged. "cosmos": a real blend in
        the COSMOS field, HST F814W and HSC grizy; downloaded from Hugging Face once, then cached, unless the
        folder SCENEFIT_DATA has it. "decals": a real galaxy in Legacy Survey g, r, z images, in that folder or downloaded
        from the survey's cutout service once.

    Raises
    ------
    ValueError
        If the name is unknown.
    ConnectionError
        If the file isn't there and can't be downloaded.
    """
    if name not in _LOADERS:
        raise ValueError(f"Expected the name of a data set, one of {names()}; got {name!r}.")
    return _LOADERS[name]()


def _local_file(name: str) -> Path | None:
    """Return a file in the folder of local copies, or None."""
    folder = os.environ.get(FOLDER_VARIABLE)
    path = Path(folder, name) if folder else None
    return path if path is not None and path.is_file() else None


def _folder_now() -> str:
    """Say what the folder of local copies is, for messages."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return f"now: {folder}, which lacks it" if folder else "now: not set"


def _load_demo() -> Dataset:
    """Load the packaged field."""
    return _from_file(
        Path(__file__).parent / "data" / "demo_field.fits",
        "simulated blend of seven sources, HST F814W and HSC grizy",
    )


def _load_cosmos() -> Dataset:
    """Load the COSMOS field, downloading it if need be."""
    path = next(filter(None, map(_local_file, (COSMOS_FILE, f"{COSMOS_FILE}.gz", COSMOS_REMOTE_FILE))), None)
    if path is None:
        try:
            path = Path(huggingface_hub.hf_hub_download(COSMOS_REPOSITORY, COSMOS_REMOTE_FILE, repo_type="dataset"))
        # The transport raises errors of many kinds.
        except Exception as exc:
            raise ConnectionError(
                f"The download of the data set 'cosmos' ({COSMOS_REMOTE_FILE} from "
                f"https://huggingface.co/datasets/{COSMOS_REPOSITORY}) failed: {str(exc).rstrip('.')}. "
                f"Offline, set {FOLDER_VARIABLE} to a folder that has that file as {COSMOS_FILE}, {COSMOS_FILE}.gz or "
                f"{COSMOS_REMOTE_FILE} ({_folder_now()})."
            ) from exc
    return _from_file(path, "real blend in the COSMOS field, HST F814W and HSC grizy")


def _load_decals() -> Dataset:
    """Load the Legacy Survey galaxy, downloading it if need be."""
    path, psf_path = _local_file(DECALS_FILE), _local_file(DECALS_PSF_FILE)
    if path is None or psf_path is None:
        position = (
            f"ra={DECALS_POSITION[0]}&dec={DECALS_POSITION[1]}&layer={DECALS_LAYER}&bands={''.join(DECALS_BANDS)}"
        )
        path = _downloaded(f"{DECALS_SERVICE}/cutout.fits?{position}&size={DECALS_SIZE}&subimage")
        psf_path = _downloaded(f"{DECALS_SERVICE}/coadd-psf/?{position}")
    with open_fits(path) as images, open_fits(psf_path) as psfs:
        planes = {(_card(hdu, "BAND"), _card(hdu, "IMAGETYP")): hdu for hdu in reversed(images) if hdu.data is not None}
        kernels = {_card(hdu, "BAND"): hdu.data for hdu in psfs}
        wanted = [(band, kind) for band in DECALS_BANDS for kind in ("image", "invvar")]
        if missing := [key for key in wanted if key not in planes or key[0] not in kernels]:
            raise ValueError(
                f"{path}, {psf_path}: expected images, inverse variances and PSFs by BAND; {missing} not there."
            )
        observation = Observation(
            np.stack([planes[band, "image"].data for band in DECALS_BANDS]),
            weights=np.stack([planes[band, "invvar"].data for band in DECALS_BANDS]),
            psf=np.stack([kernels[band] for band in DECALS_BANDS]),
            wcs=planes[DECALS_BANDS[0], "image"].header,
            channels=DECALS_BANDS,
            name="DECaLS",
            zeropoint=DECALS_ZEROPOINT,
        )
    catalog = SkyCoord(*([value] for value in DECALS_POSITION), unit="deg")
    return Dataset((observation,), catalog, None, path, "real galaxy in Legacy Survey g, r, z images")


def _card(hdu, name: str) -> str:
    """Return the value of a header card as a string without blanks; empty without it."""
    return str(hdu.header.get(name, "")).strip()


def _downloaded(url: str) -> Path:
    """Return the file at an address, downloaded once and then cached."""
    try:
        return Path(download_file(url, cache=True, show_progress=False, timeout=TIMEOUT, pkgname="scenefit"))
    # The transport raises errors of many kinds.
    except Exception as exc:
        raise ConnectionError(
            f"The download of the data set 'decals' from {url} failed: {str(exc).rstrip('.')}. Offline, set {FOLDER_VARIABLE} "
            f"to a folder that has {DECALS_FILE} and {DECALS_PSF_FILE} ({_folder_now()})."
        ) from exc


def _from_file(path: Path, description: str) -> Dataset:
    """Load a multi-instrument FITS file with its catalogue and, if it has one, its truth."""
    with open_fits(path) as hdus:
        truth = find_hdu(hdus, "TRUTH")
        truth = None if truth is None else Table.read(truth)
    found = catalog_in(path)
    if found is None:
        raise ValueError(f"{path}: expected an HDU CATALOG.")
    return Dataset(tuple(read_observations(path)), found[0], truth, path, description)


_LOADERS: dict[str, Callable[[], Dataset]] = {
    "demo": _load_demo,
    "cosmos": _load_cosmos,
    "decals": _load_decals,
}
