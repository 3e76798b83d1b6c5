import gzip
import os
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from astropy.io import fits
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from scenefit.app import datasets
from tests.helpers import tangent_header

FOLDER = os.environ.get("SCENEFIT_DATA")
DEMO = Path(datasets.__file__).parent / "data" / "demo_field.fits"
needs_folder = pytest.mark.skipif(not FOLDER, reason="SCENEFIT_DATA names no folder with example data")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Let every download fail as it does without a network."""

    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection to the Hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)


@pytest.fixture
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SCENEFIT_DATA", str(tmp_path))
    return tmp_path


def test_names():
    assert datasets.names() == ["demo", "cosmos", "decals"]


def test_unknown_name():
    with pytest.raises(ValueError, match=r"one of \['demo', 'cosmos', 'decals'\]; got 'moon'"):
        datasets.load("moon")


def test_demo():
    demo = datasets.load("demo")
    hst, hsc = demo.observations
    assert (hst.name, hsc.name) == ("HST", "HSC")
    assert (hst.channels, hsc.channels) == (("F814W",), ("g", "r", "i", "z", "y"))
    assert {hst.flux_unit, hsc.flux_unit} == {"nJy"}
    assert demo.path == DEMO
    assert len(demo.catalog) == len(demo.truth) == 7
    # The catalogue has errors of 5 mas.
    offset = demo.catalog.ra.deg - demo.truth["ra"]
    assert np.abs(offset * 3600).max() < 0.03
    assert demo.description


def test_cosmos_is_downloaded(monkeypatch):
    monkeypatch.delenv("SCENEFIT_DATA", raising=False)
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(DEMO)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(datasets.load("cosmos").observations) == 2
    repository = ("astro-data-lab/scarlet-test-data", "multiresolution_tutorial/data.fits.gz")
    assert asked == [(repository, {"repo_type": "dataset"})]


@pytest.mark.parametrize(
    "name", ["cosmos_hst_hsc.fits", "cosmos_hst_hsc.fits.gz", "multiresolution_tutorial/data.fits.gz"]
)
def test_cosmos_from_a_folder(empty_folder, name):
    path = empty_folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(DEMO.read_bytes()) if name.endswith(".gz") else DEMO.read_bytes())
    cosmos = datasets.load("cosmos")
    assert cosmos.path == path
    assert len(cosmos.observations) == 2


def test_a_damaged_copy_is_named(empty_folder):
    (empty_folder / "cosmos_hst_hsc.fits").write_bytes(DEMO.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"cosmos_hst_hsc\.fits: the file is cut short"):
        datasets.load("cosmos")


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no connection to the Hub"),
        OfflineModeIsEnabled("no connection to the Hub"),
        RuntimeError("no connection to the Hub."),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("folder", [None, "somewhere"])
def test_cosmos_offline(monkeypatch, error, folder):
    if folder is None:
        monkeypatch.delenv("SCENEFIT_DATA", raising=False)
    else:
        monkeypatch.setenv("SCENEFIT_DATA", folder)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    now = "not set" if folder is None else "somewhere, which lacks it"
    message = (
        r"download of the data set 'cosmos' .* failed: no connection to the Hub\. "
        rf"Offline, set SCENEFIT_DATA to .*cosmos_hst_hsc\.fits.*\(now: {now}\)\."
    )
    with pytest.raises(ConnectionError, match=message):
        datasets.load("cosmos")


def legacy_files(folder, bands=("g", "r", "z")):
    """Write a cutout and its PSFs in the layout of the survey's service; return them by what their addresses hold."""
    cutout, psfs = fits.HDUList([fits.PrimaryHDU()]), fits.HDUList()
    header = tangent_header((40, 40), 0.262)
    for number, band in enumerate(bands):
        for kind, value in (("image", number), ("invvar", 4.0)):
            hdu = fits.ImageHDU(np.full((40, 40), value, ">f4"), header)
            hdu.header["BAND"], hdu.header["IMAGETYP"] = band, kind
            cutout.append(hdu)
        kernel = np.outer(*2 * [np.exp(-0.5 * (np.arange(-7, 8) / 1.5) ** 2)])
        psfs.append((fits.ImageHDU if number else fits.PrimaryHDU)(kernel.astype(">f4")))
        psfs[-1].header["BAND"] = band
    paths = {"cutout.fits?": folder / "cutout", "coadd-psf/?": folder / "psf"}
    for hdus, path in zip((cutout, psfs), paths.values(), strict=True):
        hdus.writeto(path)
    return paths


def test_decals_is_downloaded(monkeypatch, tmp_path):
    """Planes are told by their headers."""
    monkeypatch.delenv("SCENEFIT_DATA", raising=False)
    paths = legacy_files(tmp_path, bands=("z", "g", "r"))
    asked = []

    def download(url, **options):
        asked.append(url)
        assert options["cache"]
        return str(next(path for part, path in paths.items() if part in url))

    monkeypatch.setattr(datasets, "download_file", download)
    (observation,) = datasets.load("decals").observations
    assert len(asked) == 2
    assert all("ra=59.1067&dec=-30.4848" in url and "bands=grz" in url for url in asked)
    assert observation.channels == ("g", "r", "z")
    np.testing.assert_allclose(
        (observation.data / observation.nanojansky[:, None, None])[:, 0, 0], [1, 2, 0], rtol=1e-6
    )
    np.testing.assert_allclose(observation.noise.weights * 3630.78**2, 4.0, rtol=1e-5)


def test_decals_without_a_band(monkeypatch, tmp_path):
    monkeypatch.delenv("SCENEFIT_DATA", raising=False)
    paths = legacy_files(tmp_path, bands=("g", "r"))
    monkeypatch.setattr(
        datasets, "download_file", lambda url, **_: str(next(path for part, path in paths.items() if part in url))
    )
    with pytest.raises(ValueError, match=r"by BAND; \[\('z', 'image'\), \('z', 'invvar'\)\] not there"):
        datasets.load("decals")


@pytest.mark.parametrize("folder", [None, "somewhere"])
def test_decals_offline(monkeypatch, folder):
    if folder is None:
        monkeypatch.delenv("SCENEFIT_DATA", raising=False)
    else:
        monkeypatch.setenv("SCENEFIT_DATA", folder)

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "download_file", fail)
    message = (
        r"download of the data set 'decals' from https://www\.legacysurvey\.org.* failed: no route to host\. "
        rf"Offline, set SCENEFIT_DATA to .*cutout\.fits .*now: {folder or 'not set'}.*\)"
    )
    with pytest.raises(ConnectionError, match=message):
        datasets.load("decals")


@needs_folder
def test_real_cosmos():
    cosmos = datasets.load("cosmos")
    hst, hsc = cosmos.observations
    assert (hst.channels, hsc.channels) == (("F814W",), ("g", "r", "i", "z", "y"))
    assert (hst.shape, hsc.shape) == ((1, 250, 250), (5, 50, 50))
    assert cosmos.catalog.frame.name == "fk5"
    # All catalogue positions lie on the HST image.
    x, y = hst.wcs.world_to_pixel(cosmos.catalog)
    assert ((x > 0) & (x < 249) & (y > 0) & (y < 249)).all()
    assert cosmos.truth is None


@needs_folder
def test_real_decals():
    decals = datasets.load("decals")
    (observation,) = decals.observations
    assert observation.channels == ("g", "r", "z")
    assert observation.shape == (3, 256, 256)
    np.testing.assert_allclose(observation.nanojansky, 3630.78, rtol=1e-5)
    # The galaxy lies in the middle of the cutout.
    x, y = observation.wcs.world_to_pixel(decals.catalog[0])
    assert np.hypot(x - 127.5, y - 127.5) < 5
