import importlib.util
import sys

import astropy.units as u
import numpy as np
import pytest
from astropy.io import fits
from astropy.io.votable.ucd import check_ucd
from astropy.table import QTable, Table

import scenefit as sf
from scenefit.infer.fit import FitResult, Status
from tests.helpers import tangent_wcs

HAS_PARQUET = importlib.util.find_spec("pyarrow") is not None


def table_of(channels, zeropoint=None):
    """Return the catalogue of two Gaussians as if they had been fitted."""
    shape = (len(channels), 25, 27)
    wcs = tangent_wcs(shape[1:], 0.2)
    obs = sf.Observation(
        np.zeros(shape), weights=1.0, psf=sf.GaussianPSF(1.5), wcs=wcs, channels=channels, zeropoint=zeropoint
    )
    frame = sf.Frame.from_observations([obs])
    flux = np.full(shape[0], 500.0)
    sources = {"a": sf.Source((11.0, 9.0), flux, sf.GaussianMorphology(2.0, (0.2, 0.1)))}
    sources["10"] = sf.Source((12.0, 17.0), flux, sf.GaussianMorphology(2.0, (0.0, 0.1)))
    scene, matched = sf.Scene(frame, sources), (obs.match(frame),)
    parameters = sf.Parameters.default(scene, matched)
    return sf.catalog(FitResult(scene, matched, parameters, Status.CONVERGED, 0.0, {}, 0, {}), progress=False)


@pytest.fixture(scope="module")
def table():
    return table_of([("F814W", 1), ("r", 2)], zeropoint=27.0)


def test_all_columns_say_what_they_are(table):
    for name in table.colnames:
        info = table[name].info
        assert info.description, name
        assert check_ucd(info.meta["ucd"], check_controlled_vocabulary=True), name
    ucds = {name: table[name].info.meta["ucd"] for name in table.colnames}
    assert ucds["ra"] == "pos.eq.ra;meta.main"
    assert ucds["flux_F814W_1"] == "phot.flux.density;em.opt.I"
    assert ucds["mag_err_r_2"] == "stat.error;phot.mag;em.opt.R"
    # In data units it isn't a flux density; a name that says nothing has no part of the spectrum.
    plain = table_of([("F814W", 1), ("VIS", 2)])
    assert plain["flux_err_VIS_2"].info.meta["ucd"] == "stat.error;phot.flux"


def assert_same(found, table):
    """Raise AssertionError unless two tables agree, what describes their columns included."""
    assert found.colnames == table.colnames
    for name in table.colnames:
        first, second = table[name], found[name]
        assert second.info.description == first.info.description
        assert second.info.meta["ucd"] == first.info.meta["ucd"]
        assert u.Unit(second.info.unit or "") == u.Unit(first.info.unit or "")
        # FITS knows characters of one byte.
        second = second.astype(str) if name == "id" else second
        np.testing.assert_array_equal(
            np.asarray(getattr(second, "value", second)), np.asarray(getattr(first, "value", first))
        )


@pytest.mark.parametrize("name", ["t.ecsv", "t.fits", "t.fits.gz", "t.parquet"])
def test_files_give_the_table_back(table, tmp_path, name):
    if name.endswith("parquet") and not HAS_PARQUET:
        pytest.skip("pyarrow isn't installed")
    sf.write_catalog(tmp_path / name, table)
    found = QTable.read(tmp_path / name, **({"hdu": 1} if "fits" in name else {}))
    assert_same(found, table)
    if "fits" not in name:
        assert found.meta["flags"] == table.meta["flags"]
    positions, _ = sf.read_catalog(tmp_path / name)
    np.testing.assert_array_equal(positions.ra.deg, table["ra"].value)


def test_a_fits_file_says_it_in_its_header(table, tmp_path):
    sf.write_catalog(tmp_path / "t.fits", table)
    header = fits.getheader(tmp_path / "t.fits", "CATALOG")
    number = table.colnames.index("flux_r_2") + 1
    assert header[f"TTYPE{number}"] == "flux_r_2"
    assert header[f"TUCD{number}"] == "phot.flux.density;em.opt.R"
    assert header[f"TUNIT{number}"] == "nJy"
    assert (header["FLAG1"], header["FLAG64"], header["STATUS"]) == ("EDGE", "MASKED", "CONVERGED")


def test_a_votable_has_units_and_ucds(table, tmp_path):
    sf.write_catalog(tmp_path / "t.vot", table)
    found = Table.read(tmp_path / "t.vot", format="votable")
    assert found["flux_r_2"].unit == u.nJy
    assert found["flux_r_2"].meta["ucd"] == "phot.flux.density;em.opt.R"


def test_files_that_cannot_be_written(table, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"t\.txt: expected a name that ends in one of \.ecsv, \.fits"):
        sf.write_catalog(tmp_path / "t.txt", table)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'scenefit\[parquet\]'"):
        sf.write_catalog(tmp_path / "t.parquet", table)
    assert list(tmp_path.iterdir()) == []
