"""`scenefit validate`: tables of many kinds in, numbers and a figure out."""

from __future__ import annotations

import json

import astropy.units as u
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable, Table
from matplotlib.figure import Figure
from typer.testing import CliRunner

from scenefit.app import cli, comparison, datasets
from scenefit.survey.validate import validate
from tests.app.test_cli import scenefit

NUMBER = 40
OFFSET = 0.1
"""By what measured magnitudes are too faint, and positions too far north in arcsec."""


def tables(**changes) -> tuple[QTable, Table]:
    """Return a catalogue that is off by a constant, and the truth, one row of which it lacks."""
    truth = Table({"id": np.arange(NUMBER), "ra": 150 + 3 * np.arange(NUMBER) / 3600, "dec": np.full(NUMBER, 0.5)})
    truth["mag_g"], truth["mag_i"] = np.linspace(20, 24, NUMBER), np.linspace(19.5, 23.0, NUMBER)
    catalog = QTable({"ra": truth["ra"] * u.deg, "dec": (truth["dec"] + OFFSET / 3600) * u.deg})
    for band in ("g", "i"):
        catalog[f"mag_{band}"] = (truth[f"mag_{band}"] + OFFSET) * u.mag
        catalog[f"flux_{band}"] = 10 ** (-0.4 * (catalog[f"mag_{band}"].value - 31.4)) * u.nJy
        catalog[f"flux_err_{band}"] = 0.1 * catalog[f"flux_{band}"]
    return catalog[1:], truth


@pytest.fixture
def files(tmp_path):
    """Catalogue and truth as files."""
    catalog, truth = tables()
    paths = tmp_path / "catalog.ecsv", tmp_path / "truth.csv"
    catalog.write(paths[0])
    truth.write(paths[1])
    return paths


@pytest.fixture
def no_figure(monkeypatch):
    """Draw something that takes less time."""
    monkeypatch.setattr(comparison, "draw_validation", lambda validation: Figure((1, 1)))


def run(files, directory, *options):
    return scenefit("validate", *files, "--out", directory, *options, directory=directory)


class TestValidate:
    def test_what_is_written(self, files, tmp_path):
        result = run(files, tmp_path / "out")
        assert (result.code, result.err) == (0, "")
        assert result.files == set(comparison.FILES)
        assert all(str(tmp_path / "out" / name) in result.out for name in comparison.FILES)
        assert (tmp_path / "out" / "validation.png").read_bytes().startswith(b"\x89PNG")
        written = json.loads((tmp_path / "out" / "validation.json").read_text())
        assert written == json.loads(json.dumps(validate(*tables()).summary()))
        assert (written["num_matched"], written["channel"]) == (NUMBER - 1, "g")
        statistics = {row["quantity"]: row for row in written["statistics"]}
        assert statistics["mag_i"]["median"] == pytest.approx(OFFSET)
        assert statistics["dec"]["median"] == pytest.approx(OFFSET)
        assert (
            "40 true sources, 39 rows in the catalogue, 39 matched; completeness 97.5 %, purity 100.0 %" in result.out
        )
        assert [line.split()[0] for line in result.out.splitlines()[3:8]] == ["mag_g", "mag_i", "g-i", "ra", "dec"]

    @pytest.mark.usefixtures("no_figure")
    @pytest.mark.parametrize(
        ("options", "changed"),
        [
            (["--channel", "i"], lambda s: s["channel"] == "i"),
            (["--radius", "0.05"], lambda s: s["num_matched"] == 0),
            (["--magnitude-tolerance", "0.05"], lambda s: s["num_matched"] == 0),
            (["--magnitude-tolerance", "inf"], lambda s: s["num_matched"] == NUMBER - 1),
            (["--outlier", "0.05"], lambda s: s["statistics"][0]["outlier_fraction"] == 1.0),
        ],
    )
    def test_options_change_the_run(self, files, tmp_path, options, changed):
        result = run(files, tmp_path / "out", *options)
        assert result.code == 0
        assert changed(json.loads((tmp_path / "out" / "validation.json").read_text()))

    @pytest.mark.usefixtures("no_figure")
    def test_overwrite(self, files, tmp_path):
        assert run(files, tmp_path / "out").code == 0
        (tmp_path / "out" / "notes.txt").write_text("mine")
        again = run(files, tmp_path / "out", "--channel", "i")
        assert again.code == 2
        assert "--overwrite" in again.err
        again = run(files, tmp_path / "out", "--channel", "i", "--overwrite")
        assert again.code == 0
        assert json.loads((tmp_path / "out" / "validation.json").read_text())["channel"] == "i"
        assert again.files == {*comparison.FILES, "notes.txt"}

    @pytest.mark.usefixtures("no_figure")
    def test_nothing_half_written(self, files, tmp_path, monkeypatch):
        assert run(files, tmp_path / "out").code == 0
        before = (tmp_path / "out" / "validation.json").read_bytes()

        def fail(validation):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(comparison, "draw_validation", fail)
        assert run(files, tmp_path / "out", "--channel", "i", "--overwrite").code == 2
        assert (tmp_path / "out" / "validation.json").read_bytes() == before
        assert run(files, tmp_path / "new").code == 2
        assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_figure")
class TestTables:
    def test_columns_under_other_names(self, files, tmp_path):
        catalog, _ = tables()
        catalog.rename_columns(["ra", "dec"], ["ALPHA_J2000", "DELTA_J2000"])
        catalog.write(tmp_path / "other.fits")
        assert run((tmp_path / "other.fits", files[1]), tmp_path / "out").code == 0
        read = comparison.read_sources(tmp_path / "other.fits")
        np.testing.assert_array_equal(read["ra"], catalog["ALPHA_J2000"].value)

    def test_truth_beside_a_catalogue(self, tmp_path):
        catalog, truth = tables()
        truth.rename_columns(["ra", "dec"], ["RA", "DEC"])
        hdus = [fits.BinTableHDU(Table(each), name=name) for each, name in ((catalog, "CATALOG"), (truth, "TRUTH"))]
        fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(tmp_path / "both.fits")
        assert len(comparison.read_sources(tmp_path / "both.fits")) == NUMBER - 1
        found = comparison.read_sources(tmp_path / "both.fits", "TRUTH")
        assert len(found) == NUMBER
        assert [name for name in found.colnames if name.lower() in ("ra", "dec")] == ["ra", "dec"]
        assert run([tmp_path / "both.fits"] * 2, tmp_path / "out").code == 0

    def test_packaged_field_against_itself(self, tmp_path):
        field = datasets.load("demo")
        field.truth.write(tmp_path / "truth.ecsv")
        result = run((tmp_path / "truth.ecsv", field.path), tmp_path / "out")
        assert result.code == 0
        rows = {
            row["quantity"]: row for row in json.loads((tmp_path / "out" / "validation.json").read_text())["statistics"]
        }
        assert rows["log_size"]["median_absolute"] == 0.0
        # One of the seven is a star.
        assert rows["log_size"]["number"] == 6


class TestBadInput:
    """One message, exit code 2, nothing written."""

    def check(self, result, *words):
        assert result.code == 2
        assert result.err.startswith("scenefit: ")
        assert result.err.count("\n") == 1
        assert all(word in result.err for word in words)
        assert not result.directory.exists()

    def test_no_such_file(self, files, tmp_path):
        for paths in ((tmp_path / "none.ecsv", files[1]), (files[0], tmp_path / "none.fits")):
            self.check(run(paths, tmp_path / "out"), "none.")

    def test_no_table(self, files, tmp_path):
        (tmp_path / "bad.ecsv").write_text("{")
        self.check(run((tmp_path / "bad.ecsv", files[1]), tmp_path / "out"), "bad.ecsv: expected a table")

    def test_no_positions(self, files, tmp_path):
        Table({"x": [1.0], "mag_g": [20.0]}).write(tmp_path / "bad.csv")
        self.check(run((files[0], tmp_path / "bad.csv"), tmp_path / "out"), "bad.csv", "needs columns RA and DEC")
        hdu = fits.BinTableHDU(Table({"x": [1.0]}), name="TRUTH")
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "bad.fits")
        self.check(run((files[0], tmp_path / "bad.fits"), tmp_path / "out"), "bad.fits", "needs columns RA and DEC")

    def test_no_common_channel(self, files, tmp_path):
        Table({"ra": [150.0], "dec": [0.5], "mag_z": [20.0]}).write(tmp_path / "z.csv")
        self.check(run((files[0], tmp_path / "z.csv"), tmp_path / "out"), "want a channel in common")
        self.check(run(files, tmp_path / "out", "--channel", "z"), "z was asked for, common are ['g', 'i']")

    @pytest.mark.parametrize("option", ["--radius", "--magnitude-tolerance", "--outlier"])
    def test_values(self, files, tmp_path, option):
        self.check(run(files, tmp_path / "out", option, "0"), f"{option} must be positive; got 0.0")
        self.check(run(files, tmp_path / "out", option, "nan"), f"{option} must be positive; got nan")


def test_help_names_commands_and_options():
    text = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(command in text for command in ("validate", "inspect", "report"))
    text = CliRunner().invoke(cli.app, ["validate", "--help"], env={"COLUMNS": "200"}).output
    options = ("out", "channel", "radius", "magnitude-tolerance", "outlier", "overwrite")
    assert all(f"--{option}" in text for option in options)
