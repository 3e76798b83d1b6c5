"""The command line, on a field so small that a fit takes no time beside its compilation.

Two kinds of problem are compiled, therefore, and no more: one with default settings, one with all others.
"""

import contextlib
import io
import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import astropy.units as u
import jax
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import QTable, Table
from typer.testing import CliRunner

import scenefit as sf
from scenefit.app import cli, datasets, pipeline, serialization
from scenefit.app.pipeline import FILES
from tests.helpers import CENTER_DEG, gaussian_image, tangent_header

CENTER = SkyCoord(*CENTER_DEG, unit="deg")
OFFSET_ARCSEC = (0.03, -0.02)
"""True displacement of the HSC image, east and north."""
ZEROPOINTS = {"HST": 26.0, "HSC": 27.0}
CHANNELS = {"HST": ("F814W",), "HSC": ("g", "i")}
SIGMA = {"HST": 0.02, "HSC": 0.1}
"""Noise of a pixel, in data units."""
PSF_SIGMA = {"HST": 1.2, "HSC": 1.5}
GAUSSIANS = (
    *("--model", "gaussian", "--coverage", "intersection"),
    *("--free-shift", "HST", "--free-rotation", "HST", "--free-background", "HSC"),
)
"""Options of the second kind of problem."""
SOURCES = (
    # East and north in arcsec, Gaussian sigma in arcsec, flux in nJy in F814W, g and i.
    ((0.3, 0.25), 0.10, (900.0, 400.0, 1000.0)),
    ((-0.4, 0.05), 0.06, (600.0, 500.0, 650.0)),
    ((0.1, -0.45), 0.08, (500.0, 200.0, 600.0)),
)


def sky(east, north):
    """Return a position by its offset from the field's centre in arcsec."""
    return CENTER.spherical_offsets_by(east * u.arcsec, north * u.arcsec)


def draw(name, header, shape, rng):
    """Return the images of all sources in the channels of one instrument, with noise."""
    wcs = sf.Frame(shape, channels=("any",), wcs=header)
    per_pixel = sf.Frame(shape, channels=("any",), wcs=header).pixel_scale
    moved = OFFSET_ARCSEC if name == "HSC" else (0.0, 0.0)
    image = np.zeros((len(CHANNELS[name]), *shape))
    for (east, north), sigma, fluxes in SOURCES:
        center = wcs.to_pixel(sky(east + moved[0], north + moved[1]))
        profile = gaussian_image(shape, center, np.hypot(sigma / per_pixel, PSF_SIGMA[name]))
        flux = np.array(fluxes[:1] if name == "HST" else fluxes[1:])
        image += (flux * 10 ** (0.4 * (ZEROPOINTS[name] - 31.4)))[:, None, None] * profile
    return image + rng.normal(0, SIGMA[name], image.shape)


def make_hdus():
    """Return the HDUs of the field: 40 x 40 pixels of 0.05 arcsec, 14 x 14 of 0.15 in two bands, three positions."""
    rng = np.random.default_rng(42)
    hdus = [fits.PrimaryHDU()]
    geometry = {"HST": ((40, 40), 0.05, 10.0, 21), "HSC": ((14, 14), 0.15, 0.0, 13)}
    for name, (shape, scale, rotation, stamp) in geometry.items():
        header = tangent_header(shape, scale, rotation_deg=rotation)
        image = draw(name, header, shape, rng)
        header["CHANNELS"], header["MAGZERO"] = ",".join(CHANNELS[name]), ZEROPOINTS[name]
        psf = gaussian_image((stamp, stamp), (stamp // 2, stamp // 2), PSF_SIGMA[name])
        hdus.append(fits.ImageHDU(image.astype(np.float32), header, f"{name}_OBS"))
        hdus.append(fits.ImageHDU(np.full(image.shape, SIGMA[name] ** -2, np.float32), name=f"{name}_WEIGHTS"))
        hdus.append(fits.ImageHDU(psf.astype(np.float32), name=f"{name}_PSF"))
    positions = [sky(*position) for position, _, _ in SOURCES]
    columns = {"RA": [p.ra.deg for p in positions], "DEC": [p.dec.deg for p in positions]}
    return fits.HDUList([*hdus, fits.BinTableHDU(Table(columns), name="CATALOG")])


def write_positions(path, offsets):
    """Write a table of positions, given as (east, north) in arcsec from the field's centre."""
    positions = [sky(*offset) for offset in offsets]
    Table({"ra": [p.ra.deg for p in positions], "dec": [p.dec.deg for p in positions]}).write(path)


@dataclass
class Run:
    """What the command line did."""

    code: int
    out: str
    err: str
    directory: Path | None

    @property
    def files(self):
        """Names of all files in the output folder, hidden ones too."""
        return {path.name for path in self.directory.rglob("*")} if self.directory.is_dir() else set()

    @property
    def summary(self):
        return json.loads((self.directory / "summary.json").read_text())

    @property
    def table(self):
        return QTable.read(self.directory / "catalog.ecsv")

    @property
    def model(self):
        return sf.load(self.directory / "model.asdf")


def scenefit(*arguments, directory=None) -> Run:
    """Run `scenefit` with some arguments, as from a shell."""
    out, err = io.StringIO(), io.StringIO()
    arguments = ["scenefit", *map(str, arguments)]
    with mock.patch("sys.argv", arguments), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        # The process of the tests keeps no compiled programs.
        with mock.patch.object(cli, "keep_compiled_programs"), pytest.raises(SystemExit) as info:
            cli.main()
    return Run(info.value.code or 0, out.getvalue(), err.getvalue(), directory)


def fit(directory, source, *options) -> Run:
    """Run `scenefit fit`."""
    return scenefit("fit", source, "--out", directory, *options, directory=directory)


CACHE = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs")


@pytest.mark.parametrize("own", [None, "elsewhere"])
def test_compiled_programs_are_kept(tmp_path, monkeypatch, own):
    """In the user's cache, unless JAX has been told where."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {name: getattr(jax.config, name) for name in CACHE}
    try:
        jax.config.update("jax_compilation_cache_dir", own)
        cli.keep_compiled_programs()
        folder = jax.config.jax_compilation_cache_dir
        assert Path(folder).is_relative_to(tmp_path / "scenefit") if own is None else folder == own
        assert (jax.config.jax_compilation_cache_max_size == cli.COMPILED_BYTES) == (own is None)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """The multi-instrument file."""
    path = tmp_path_factory.mktemp("field") / "field.fits"
    make_hdus().writeto(path)
    return path


@pytest.fixture(scope="module")
def free_pixels(field, tmp_path_factory):
    """A run with free-pixel images and a free HSC offset."""
    return fit(tmp_path_factory.mktemp("pixels"), field, "--model", "pixel", "--free-shift", "HSC")


@pytest.fixture(scope="module")
def reversed_catalog(tmp_path_factory):
    """A table with the positions of the sources, last first."""
    path = tmp_path_factory.mktemp("catalog") / "reversed.csv"
    write_positions(path, [position for position, _, _ in reversed(SOURCES)])
    return path


@pytest.fixture(scope="module")
def gaussians(field, reversed_catalog, tmp_path_factory):
    """A run in which every option that describes the model isn't the default."""
    options = [*GAUSSIANS, "--catalog", reversed_catalog, "--quiet"]
    return fit(tmp_path_factory.mktemp("gaussians"), field, *options)


@pytest.fixture
def fit_gaussians(field, tmp_path):
    """Run `scenefit fit` with these and further options."""

    def run(*options):
        return fit(tmp_path / "out", field, *GAUSSIANS, "--quiet", *options)

    return run


@pytest.fixture
def no_fit(monkeypatch):
    """Make sure that no fit begins."""
    monkeypatch.setattr(pipeline, "fit", mock.Mock(side_effect=AssertionError("a fit began")))


class TestFilesOfAFit:
    def test_exit_code_and_names(self, free_pixels):
        assert free_pixels.code == 0
        assert free_pixels.files == set(FILES)
        for name in FILES:
            assert str(free_pixels.directory / name) in free_pixels.out
        assert "3 sources" in free_pixels.out
        assert "fit converged" in free_pixels.out

    def test_summary(self, free_pixels):
        summary = free_pixels.summary
        assert {"scenefit", "jax", "numpy", "astropy", "python"} <= summary["versions"].keys()
        stages = ("read", "initialize", "fit", "measure", "write")
        assert all(summary["seconds"][stage] >= 0 for stage in stages)
        assert summary["status"] == "CONVERGED"
        assert summary["num_sources"] == 3
        assert 1 <= summary["num_steps"] <= 100
        assert math.isfinite(summary["loss"])
        assert summary["peak_memory_mb"] > 50
        assert set(summary["observations"]) == {"HST", "HSC"}
        for name, values in summary["observations"].items():
            offset = {"offset_arcsec", "offset_error_arcsec"}
            assert set(values) == {"noise", "num_modes", "chi_square_per_pixel", *offset}
            assert set(values["chi_square_per_pixel"]) == set(CHANNELS[name])
            assert values["noise"] == "WhiteNoise"
            assert values["num_modes"] == {label: 1600 if name == "HST" else 196 for label in CHANNELS[name]}
        # 1600 pixels of which free ones take some hundred degrees of freedom, and twice 196.
        (hst,) = summary["observations"]["HST"]["chi_square_per_pixel"].values()
        assert 0.7 < hst < 1.1
        assert all(0.6 < value < 1.4 for value in summary["observations"]["HSC"]["chi_square_per_pixel"].values())

    def test_offset_is_the_true_one(self, free_pixels):
        observations = free_pixels.summary["observations"]
        offset, error = (np.array(observations["HSC"][key]) for key in ("offset_arcsec", "offset_error_arcsec"))
        assert np.all((error > 1e-4) & (error < 0.02))
        # Two numbers exceed 4 standard errors once in eight thousand runs.
        assert np.all(np.abs(offset - OFFSET_ARCSEC) < 4 * error)

    def test_catalog(self, free_pixels):
        table = free_pixels.table
        columns = [f"{kind}_{c}" for kind in ("flux", "flux_err", "mag", "mag_err") for c in ("F814W", "g", "i")]
        shape = ["half_light_radius", "axis_ratio", "position_angle", "snr", "flags"]
        assert {"id", "ra", "dec", *columns, *shape} <= set(table.colnames)
        assert list(table["id"]) == ["0", "1", "2"]
        assert (table["ra"].unit, table["half_light_radius"].unit) == (u.deg, u.arcsec)
        found = SkyCoord(table["ra"], table["dec"])
        for position, ((east, north), _, fluxes) in zip(found, SOURCES, strict=True):
            # The centroid of free pixels; 5 mas is a tenth of a pixel.
            assert position.separation(sky(east, north)) < 20 * u.mas
            row = table[[position.ra == ra for ra in table["ra"]].index(True)]
            for channel, flux in zip(("F814W", "g", "i"), fluxes, strict=True):
                # S/N is 20 to 100; free pixels add noise in the outskirts.
                assert abs(row[f"flux_{channel}"].to_value(u.nJy) / flux - 1) < 0.15
                assert row[f"flux_err_{channel}"].unit == u.nJy
                magnitude = -2.5 * np.log10(row[f"flux_{channel}"].value) + 31.4
                assert row[f"mag_{channel}"].to_value(u.mag) == pytest.approx(magnitude)
        assert table.meta["status"] == "CONVERGED"

    def test_model_can_be_refitted(self, free_pixels):
        result = free_pixels.model
        assert isinstance(result, sf.FitResult)
        assert result.parameters["observations.HSC.astrometry.shift"].free
        again = sf.fit(result.scene, result.observations, result.parameters, progress=False, max_steps=3)
        # Nothing to be gained any more, but for what the tolerance of the first fit left.
        assert again.loss == pytest.approx(result.loss, rel=0.02)

    def test_images(self, free_pixels, field):
        with fits.open(free_pixels.directory / "images.fits") as hdus:
            names = [hdu.name for hdu in hdus[1:]]
            kinds = [f"{name}_{kind}" for name in CHANNELS for kind in ("MODEL", "RESIDUAL")]
            assert names == [*kinds, "SRC_0", "SRC_1", "SRC_2"]
            for obs in sf.read_observations(field):
                total = hdus[f"{obs.name}_MODEL"].data + hdus[f"{obs.name}_RESIDUAL"].data
                # float32 images of some hundred nJy a pixel at most
                np.testing.assert_allclose(total, obs.data, atol=1e-3)

    def test_picture(self, free_pixels):
        assert (free_pixels.directory / "scene.png").read_bytes().startswith(b"\x89PNG")

    def test_progress_goes_to_standard_error(self, free_pixels, gaussians):
        assert "fit:" in free_pixels.err
        assert "fit:" not in free_pixels.out
        assert gaussians.err == ""


class TestOptions:
    """Each changes the run."""

    def test_model(self, free_pixels, gaussians):
        for run, kind in ((free_pixels, sf.PixelMorphology), (gaussians, sf.GaussianMorphology)):
            assert run.code == 0
            assert {type(source.morphology) for source in run.model.scene.sources.values()} == {kind}

    def test_free_shift(self, free_pixels, gaussians):
        values = free_pixels.summary["observations"]
        assert values["HST"]["offset_arcsec"] == [0.0, 0.0]
        # Fixed: no error; JSON knows no NaN.
        assert values["HST"]["offset_error_arcsec"] == [None, None]
        # With the HSC image as the anchor, the HST image is displaced the other way.
        values = gaussians.summary["observations"]
        assert values["HSC"]["offset_arcsec"] == [0.0, 0.0]
        assert values["HSC"]["offset_error_arcsec"] == [None, None]
        error = np.array(values["HST"]["offset_error_arcsec"])
        assert np.all(np.abs(np.array(values["HST"]["offset_arcsec"]) + OFFSET_ARCSEC) < 4 * error)

    def test_free_rotation(self, free_pixels, gaussians):
        for values in free_pixels.summary["observations"].values():
            assert not {"rotation_deg", "rotation_error_deg"} & values.keys()
        values = gaussians.summary["observations"]
        assert "rotation_deg" not in values["HSC"]
        angle, error = (values["HST"][key] for key in ("rotation_deg", "rotation_error_deg"))
        hst, hsc = gaussians.model.observations
        assert (float(hst.astrometry.rotation), float(hsc.astrometry.rotation)) == (angle, 0.0)
        assert angle != 0
        # Positions known to a few mas in the HSC image, 0.4 arcsec from the middle.
        assert 0.1 < error < 1.5
        # The WCS are right.
        assert abs(angle) < 4 * error

    def test_correlated(self, tmp_path, monkeypatch):
        """Of two instruments, the noise of one is measured, and the fit gets it."""

        def start(scene, observations, parameters, **options):
            matched = tuple(obs.match(scene.frame) for obs in observations)
            return sf.FitResult(scene, matched, parameters, sf.Status.MAX_STEPS, 0.0, {}, 0, {})

        # Fits with such noise are tested elsewhere; here they would take most of the time.
        monkeypatch.setattr(pipeline, "fit", start)
        hdus, rng = make_hdus(), np.random.default_rng(2)
        header = tangent_header((96, 96), 0.05, rotation_deg=10.0)
        header["CHANNELS"], header["MAGZERO"] = "F814W", ZEROPOINTS["HST"]
        quiet = draw("HST", header, (96, 96), SimpleNamespace(normal=lambda mean, sigma, shape: np.zeros(shape)))
        noise = rng.normal(0, SIGMA["HST"], (1, 97, 97))
        # Every pixel is the mean of four, times 2: neighbours are correlated by one half.
        smooth = (noise[:, 1:, 1:] + noise[:, 1:, :-1] + noise[:, :-1, 1:] + noise[:, :-1, :-1]) / 2
        hdus["HST_OBS"] = fits.ImageHDU((quiet + smooth).astype(np.float32), header, "HST_OBS")
        hdus["HST_WEIGHTS"].data = np.full((1, 96, 96), SIGMA["HST"] ** -2, np.float32)
        hdus.writeto(tmp_path / "drizzled.fits")
        run = fit(tmp_path / "out", tmp_path / "drizzled.fits", "--correlated", "HST", "--model", "point", "--quiet")
        assert run.code == 0
        hst, hsc = run.model.observations
        assert isinstance(hst.noise, sf.CorrelatedNoise)
        assert isinstance(hsc.noise, sf.WhiteNoise)
        function = hst.noise.correlation.function[0]
        middle = len(function) // 2
        # 0.1: five times what 7000 clean pixels leave open.
        np.testing.assert_allclose(function[middle, [middle - 1, middle + 1, middle + 2]], [0.5, 0.5, 0], atol=0.1)
        values = run.summary["observations"]
        assert (values["HST"]["noise"], values["HSC"]["noise"]) == ("CorrelatedNoise", "WhiteNoise")
        assert values["HST"]["num_modes"] == {"F814W": int(hst.noise.num_modes()[0])}
        assert 0.5 * 96**2 < values["HST"]["num_modes"]["F814W"] <= 96**2

    def test_free_background(self, free_pixels, gaussians):
        for obs in free_pixels.model.observations:
            np.testing.assert_array_equal(obs.background, 0)
        hst, hsc = gaussians.model.observations
        np.testing.assert_array_equal(hst.background, 0)
        assert np.all(hsc.background != 0)
        # 196 pixels, of which the sources leave about half to the sky
        assert np.all(np.abs(hsc.background) < 0.5 * hsc.noise.level())

    def test_catalog(self, free_pixels, gaussians):
        # Sources are named by their place in the catalogue. Between the two runs lie the errors of centroids, and the
        # offset of the anchor, but not the 0.4 arcsec from source to source.
        dec, reverse = (run.table["dec"].to_value("arcsec") for run in (free_pixels, gaussians))
        np.testing.assert_allclose(reverse[::-1], dec, rtol=0, atol=0.1)
        assert np.abs(reverse - dec).max() > 0.5

    def test_coverage(self, free_pixels, gaussians):
        union, inner = (run.model.scene.frame.box.shape for run in (free_pixels, gaussians))
        assert inner[0] < union[0]
        assert inner[1] < union[1]

    def test_rtol(self, fit_gaussians, gaussians):
        run = fit_gaussians("--rtol", "1")
        assert run.summary["status"] == "CONVERGED"
        assert run.summary["num_steps"] < gaussians.summary["num_steps"]

    def test_max_steps(self, fit_gaussians):
        run = fit_gaussians("--max-steps", "1")
        assert run.code == 0
        assert run.summary["num_steps"] == 1
        assert run.summary["status"] == "MAX_STEPS"
        assert "reached max_steps" in run.out
        assert run.table.meta["status"] == "MAX_STEPS"

    def test_overwrite(self, fit_gaussians):
        first = fit_gaussians("--max-steps", "1")
        (first.directory / "notes.txt").write_text("mine")
        assert fit_gaussians("--max-steps", "2").code == 2
        assert first.summary["num_steps"] == 1
        second = fit_gaussians("--max-steps", "2", "--overwrite")
        assert second.code == 0
        assert second.summary["num_steps"] == 2
        assert second.files == {*FILES, "notes.txt"}

    def test_unknown_option_and_value(self, fit_gaussians, no_fit):
        for options in (["--rtool", "1"], ["--rtol", "small"], ["--max-steps", "1.5"]):
            run = fit_gaussians(*options)
            assert run.code == 2
            assert options[0] in run.err
            assert run.files == set()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--model", "sersics"], "model is one of auto, pixel, gaussian, point; got 'sersics'"),
            (["--coverage", "all"], "coverage is one of union, intersection; got 'all'"),
            (["--rtol", "-1"], "rtol must be positive"),
            (["--max-steps", "0"], "max_steps at least 1"),
        ],
    )
    def test_bad_value(self, fit_gaussians, no_fit, options, message):
        run = fit_gaussians(*options)
        assert run.code == 2
        assert run.err.startswith("scenefit: ")
        assert message in run.err
        assert not run.directory.exists()


class TestTOML:
    def test_settings_of_the_file(self, field, tmp_path):
        (tmp_path / "fit.toml").write_text(
            f"""
            input = "{field.as_posix()}"
            model = "gaussian"
            free_shift = ["HST"]
            free_rotation = ["HST"]
            free_background = ["HSC"]
            coverage = "intersection"
            max_steps = 2
            zeropoints = {{HST = 28.5}}
            """
        )
        run = fit(tmp_path / "out", tmp_path / "fit.toml", "--quiet")
        assert run.code == 0
        assert run.summary["num_steps"] == 2
        hst, hsc = run.model.observations
        np.testing.assert_allclose(-2.5 * np.log10(hst.nanojansky) + 31.4, 28.5)
        np.testing.assert_allclose(-2.5 * np.log10(hsc.nanojansky) + 31.4, ZEROPOINTS["HSC"])
        assert isinstance(run.model.scene.sources["0"].morphology, sf.GaussianMorphology)
        assert "rotation_deg" in run.summary["observations"]["HST"]

    def test_options_go_first(self, field, tmp_path):
        (tmp_path / "fit.toml").write_text(f'input = "{field.as_posix()}"\nmodel = "pixel"\nmax_steps = 50')
        run = fit(tmp_path / "out", tmp_path / "fit.toml", *GAUSSIANS, "--max-steps", "1", "--quiet")
        assert run.summary["num_steps"] == 1
        assert isinstance(run.model.scene.sources["0"].morphology, sf.GaussianMorphology)

    def test_unknown_setting(self, field, tmp_path, no_fit):
        (tmp_path / "fit.toml").write_text(f'input = "{field.as_posix()}"\nmax_step = 50')
        run = fit(tmp_path / "out", tmp_path / "fit.toml")
        assert run.code == 2
        assert "unknown setting 'max_step'; did you mean 'max_steps'?" in run.err

    def test_unknown_observation(self, field, tmp_path, no_fit):
        (tmp_path / "fit.toml").write_text(f'input = "{field.as_posix()}"\n[zeropoints]\nACS = 25')
        run = fit(tmp_path / "out", tmp_path / "fit.toml")
        assert run.code == 2
        assert "no observation is named 'ACS'; it holds ['HST', 'HSC']" in run.err

    def test_zeropoint_that_is_no_number(self, field, tmp_path, no_fit):
        (tmp_path / "fit.toml").write_text(f'input = "{field.as_posix()}"\n[zeropoints]\nHST = "bright"')
        run = fit(tmp_path / "out", tmp_path / "fit.toml")
        assert run.code == 2
        assert "zeropoints wants AB magnitudes by observation; got {'HST': 'bright'}" in run.err


def without(name):
    def change(hdus):
        del hdus[name]

    return change


def replaced(name, change_data):
    def change(hdus):
        hdus[name].data = change_data(hdus[name].data.copy())

    return change


def with_value(value):
    def change_data(data):
        data[..., 3, 4] = value
        return data

    return change_data


def without_wcs(hdus):
    for key in ("CTYPE1", "CTYPE2"):
        del hdus["HSC_OBS"].header[key]


def with_header(name, **cards):
    return lambda hdus: hdus[name].header.update(cards)


BAD_FILES = {
    "no weights": (without("HSC_WEIGHTS"), "expected an image HDU HSC_WEIGHTS; found HDUs"),
    "no PSF": (without("HST_PSF"), "expected an image HDU HST_PSF"),
    "no image": (without("HSC_OBS"), "expected an image HDU HSC_OBS; found HDUs"),
    "shapes differ": (replaced("HSC_WEIGHTS", lambda w: w[:, :-1]), "doesn't match data of shape (2, 14, 14)"),
    "negative weights": (replaced("HST_WEIGHTS", with_value(-1)), "HST_WEIGHTS|weights|negative"),
    "NaN weights": (replaced("HST_WEIGHTS", with_value(np.nan)), "weights|NaN"),
    "no valid pixel": (replaced("HSC_WEIGHTS", np.zeros_like), "HSC: no pixel has a positive weight"),
    "NaN in the PSF": (replaced("HST_PSF", with_value(np.nan)), "PSF"),
    "PSF without light": (replaced("HST_PSF", np.zeros_like), "PSF"),
    "PSF larger than the image": (replaced("HSC_PSF", lambda p: np.pad(p, 4)), "more than the data of 14 x 14 pixels"),
    "WCS on one only": (without_wcs, "Either all observations have a WCS or none; ['HST'] have one, ['HSC'] don't"),
    "channels repeat": (with_header("HSC_OBS", CHANNELS="g,g"), "Channel names must be distinct"),
    "too many channels": (with_header("HSC_OBS", CHANNELS="g,r,i"), "the file names 3 channel(s)"),
}


class TestBadInput:
    """Each is refused with exit code 2 and a message, before a fit begins, and no file is written."""

    @pytest.fixture(autouse=True)
    def _no_fit(self, no_fit):
        pass

    def check(self, run, *messages):
        assert run.code == 2
        assert run.err.startswith("scenefit: ")
        assert "Traceback" not in run.err
        for message in messages:
            assert any(part in run.err for part in message.split("|")), run.err
        assert run.files == set()
        assert not run.directory.is_dir()

    @pytest.mark.parametrize("case", BAD_FILES)
    def test_content_of_the_file(self, tmp_path, case):
        change, message = BAD_FILES[case]
        hdus = make_hdus()
        change(hdus)
        hdus.writeto(tmp_path / "bad.fits")
        self.check(fit(tmp_path / "out", tmp_path / "bad.fits"), message)

    def test_no_such_file(self, tmp_path):
        run = fit(tmp_path / "out", tmp_path / "nowhere.fits")
        self.check(run, "nowhere.fits: expected a FITS file or a TOML file with settings; there is no such file")
        assert not run.directory.exists()

    def test_not_fits(self, tmp_path):
        (tmp_path / "notes.fits").write_text("not an image")
        self.check(fit(tmp_path / "out", tmp_path / "notes.fits"), "notes.fits: expected a FITS file")

    @pytest.mark.parametrize("fraction", [0.02, 0.3, 0.93])
    def test_truncated(self, field, tmp_path, fraction):
        content = field.read_bytes()
        (tmp_path / "half.fits").write_bytes(content[: int(fraction * len(content))])
        self.check(fit(tmp_path / "out", tmp_path / "half.fits"), "half.fits: ", "cut short")

    def test_no_overlap(self, tmp_path):
        hdus = make_hdus()
        hdus["HSC_OBS"].header["CRVAL1"] += 0.01
        hdus.writeto(tmp_path / "apart.fits")
        run = fit(tmp_path / "out", tmp_path / "apart.fits", "--coverage", "intersection")
        self.check(run, "The observations don't overlap, so coverage='intersection' is empty")

    def test_unknown_observation(self, field, tmp_path):
        run = fit(tmp_path / "out", field, "--free-shift", "HSSC")
        self.check(run, "free_shift: no observation is named 'HSSC'; there are ['HST', 'HSC']")
        run = fit(tmp_path / "out", field, "--free-rotation", "WFC")
        self.check(run, "free_rotation: no observation is named 'WFC'; there are ['HST', 'HSC']")
        run = fit(tmp_path / "out", field, "--free-background", "ACS")
        self.check(run, "free_background: no observation is named 'ACS'; there are ['HST', 'HSC']")
        run = fit(tmp_path / "out", field, "--correlated", "VIS")
        self.check(run, "correlated: no observation is named 'VIS'; there are ['HST', 'HSC']")

    def test_noise_that_cannot_be_measured(self, field, tmp_path):
        """Sources cover all of the small image."""
        run = fit(tmp_path / "out", field, "--correlated", "HST")
        self.check(run, "HST: Only", "of 1600 valid pixels of channel 0 are free of sources")

    def test_all_shifts_free(self, field, tmp_path):
        run = fit(tmp_path / "out", field, "--free-shift", "HSC", "--free-shift", "HST")
        self.check(run, "All observations' astrometry.shift are free", "as the anchor")

    def test_all_rotations_free(self, field, tmp_path):
        run = fit(tmp_path / "out", field, "--free-rotation", "HSC", "--free-rotation", "HST")
        self.check(run, "All observations' astrometry.rotation are free")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"RA": [151.0], "DEC": [2.0]}, "None of the 1 catalogue sources lies in the model frame"),
            ({"RA": [], "DEC": []}, "The catalogue is empty"),
            ({"RA": [150.3, math.nan], "DEC": [2.05, 2.05]}, "1 of 2 rows have none: 1"),
            ({"x": [1.0], "y": [2.0]}, "needs columns RA and DEC (deg); found ['x', 'y']"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["ecsv", "fits"])
    def test_catalog(self, field, tmp_path, columns, message, suffix):
        Table(columns).write(tmp_path / f"list.{suffix}")
        self.check(fit(tmp_path / "out", field, "--catalog", tmp_path / f"list.{suffix}"), message)

    def test_no_such_catalog(self, field, tmp_path):
        run = fit(tmp_path / "out", field, "--catalog", tmp_path / "list.ecsv")
        self.check(run, "list.ecsv")

    def test_folder_with_files(self, field, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        run = fit(tmp_path / "out", field)
        assert run.code == 2
        assert "expected a new or empty folder; it holds 1 file(s)" in run.err
        assert "--overwrite" in run.err
        assert run.files == {"notes.txt"}

    def test_folder_is_a_file(self, field, tmp_path):
        (tmp_path / "out").write_text("mine")
        self.check(fit(tmp_path / "out" / "run1", field), "expected a folder to write into")
        assert (tmp_path / "out").read_text() == "mine"

    def test_folder_that_cannot_be_written(self, field, tmp_path, monkeypatch):
        def refuse(path, *args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "touch", refuse)
        self.check(fit(tmp_path / "out", field), "can't write into this folder: Permission denied")


class TestDetection:
    """Files without a catalogue."""

    def test_sources_are_found(self, tmp_path):
        hdus = make_hdus()
        del hdus["CATALOG"]
        hdus.writeto(tmp_path / "field.fits")
        run = fit(tmp_path / "out", tmp_path / "field.fits", "--model", "gaussian", "--free-shift", "HSC", "--quiet")
        assert run.code == 0
        assert run.files == set(FILES)
        found = SkyCoord(run.table["ra"], run.table["dec"])
        for position, _, (flux, *_) in SOURCES:
            # A third of the PSF's width, 0.06 arcsec; four standard errors of the flux.
            nearest = int(sky(*position).separation(found).argmin())
            assert sky(*position).separation(found[nearest]) < 0.02 * u.arcsec
            error = 4 * run.table["flux_err_F814W"][nearest].to_value(u.nJy)
            assert run.table["flux_F814W"][nearest].to_value(u.nJy) == pytest.approx(flux, abs=error)
        assert len(found) == len(SOURCES)

    def test_nothing_to_find(self, tmp_path):
        hdus = make_hdus()
        del hdus["CATALOG"]
        rng = np.random.default_rng(3)
        for name, sigma in SIGMA.items():
            image = hdus[f"{name}_OBS"]
            image.data = rng.normal(0, sigma, image.data.shape).astype(np.float32)
        hdus.writeto(tmp_path / "field.fits")
        with pytest.warns(UserWarning, match="No source was detected: the scene is empty"):
            run = fit(tmp_path / "out", tmp_path / "field.fits")
        assert run.code == 0
        assert run.files == set(FILES)
        assert len(run.table) == 0
        assert run.summary["num_sources"] == 0
        assert "flux_F814W" in run.table.colnames


class TestNothingHalfWritten:
    def test_sources_outside_the_frame_are_left_out(self, fit_gaussians, tmp_path):
        write_positions(tmp_path / "four.csv", [(0, 60), *(position for position, _, _ in SOURCES)])
        with pytest.warns(UserWarning, match=r"1 catalogue source\(s\) outside the model frame left out: rows \[0\]"):
            run = fit_gaussians("--catalog", tmp_path / "four.csv")
        assert run.code == 0
        # Named by their place in the catalogue.
        assert list(run.table["id"]) == ["1", "2", "3"]

    def test_disk_full(self, fit_gaussians, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pipeline.plot, "scene", full)
        run = fit_gaussians()
        assert run.code == 2
        assert "No space left on device" in run.err
        # What was written before is whole, and no temporary file is left.
        assert run.files == {"catalog.ecsv", "model.asdf", "images.fits"}
        assert len(run.table) == len(run.model.scene.sources) == 3

    @pytest.mark.parametrize("stage", ["fit", "catalog"])
    def test_interrupted_elsewhere(self, fit_gaussians, monkeypatch, stage):
        monkeypatch.setattr(pipeline, stage, lambda *args, **options: signal.raise_signal(signal.SIGINT))
        run = fit_gaussians("--max-steps", "1")
        assert run.code == 130
        assert not run.directory.exists()

    def test_nothing_is_left_of_the_run_before(self, fit_gaussians, monkeypatch):
        """After an error on the way the folder doesn't hold a mixture of two runs."""
        first = fit_gaussians("--max-steps", "1")
        assert first.files == set(FILES)
        monkeypatch.setattr(pipeline.plot, "scene", mock.Mock(side_effect=OSError(28, "No space left on device")))
        second = fit_gaussians("--max-steps", "2", "--overwrite")
        assert second.code == 2
        assert second.files == {"catalog.ecsv", "model.asdf", "images.fits"}
        assert second.model.num_steps == 2

    def test_interrupted_fit_is_saved(self, fit_gaussians, monkeypatch):
        def press_ctrl_c(step, row):
            if step == 2:
                signal.raise_signal(signal.SIGINT)

        real = pipeline.fit
        monkeypatch.setattr(pipeline, "fit", lambda *args, **options: real(*args, callback=press_ctrl_c, **options))
        run = fit_gaussians()
        assert run.code == 130
        assert "fit interrupted" in run.out
        assert run.err == "Interrupted: the best state so far is measured and saved. Ctrl-C once more ends without.\n"
        assert run.files == set(FILES)
        assert run.summary["status"] == "INTERRUPTED"
        assert run.summary["num_steps"] == 3
        assert run.model.status is sf.Status.INTERRUPTED


class TestOtherCommands:
    def test_demo(self, field, tmp_path, monkeypatch):
        # On the small field instead of the packaged one, whose fit takes longer.
        monkeypatch.setattr(datasets, "load", {"demo": SimpleNamespace(path=field)}.__getitem__)
        run = scenefit("demo", "--out", tmp_path / "out", "--quiet", directory=tmp_path / "out")
        assert run.code == 0
        assert run.files == set(FILES)
        for name in FILES:
            assert str(run.directory / name) in run.out
        assert run.err == ""
        assert None not in run.summary["observations"]["HSC"]["offset_error_arcsec"]

    def test_demo_refuses_a_folder_with_files(self, free_pixels, no_fit):
        run = scenefit("demo", "--out", free_pixels.directory)
        assert run.code == 2
        assert "it holds 5 file(s)" in run.err

    def test_show(self, gaussians):
        before = gaussians.files
        try:
            run = scenefit("show", gaussians.directory, directory=gaussians.directory)
            assert run.code == 0
            assert '"num_sources": 3' in run.out
            assert "flux_F814W" in run.out
            assert run.files == {*FILES, "sources.png", "convergence.png"}
            for name in ("scene.png", "sources.png", "convergence.png"):
                assert (run.directory / name).read_bytes().startswith(b"\x89PNG")
                assert str(run.directory / name) in run.out
        finally:
            for name in gaussians.files - before:
                (gaussians.directory / name).unlink()

    def test_show_without_results(self, tmp_path):
        run = scenefit("show", tmp_path)
        assert run.code == 2
        assert list(tmp_path.iterdir()) == []
        assert "expected the results of `scenefit fit`; model.asdf, catalog.ecsv, summary.json not there" in run.err

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("model.asdf", "model.asdf: expected an ASDF file written by scenefit.save"),
            ("summary.json", "summary.json: expected the summary of a fit; reading it failed"),
            ("catalog.ecsv", "catalog.ecsv: expected the catalogue of a fit; reading it failed"),
        ],
    )
    def test_show_damaged_results(self, gaussians, tmp_path, name, message):
        for each in ("model.asdf", "summary.json", "catalog.ecsv"):
            (tmp_path / each).write_bytes((gaussians.directory / each).read_bytes())
        (tmp_path / name).write_text("{")
        run = scenefit("show", tmp_path, directory=tmp_path)
        assert run.code == 2
        assert run.err.startswith("scenefit: ")
        assert message in run.err
        assert run.files == {"model.asdf", "summary.json", "catalog.ecsv"}

    def test_newer_schema(self, gaussians, tmp_path, monkeypatch):
        for each in ("summary.json", "catalog.ecsv"):
            (tmp_path / each).write_bytes((gaussians.directory / each).read_bytes())
        scene = gaussians.model.scene
        with monkeypatch.context() as patch:
            patch.setattr(serialization, "SCHEMA_VERSION", 7)
            sf.save(tmp_path / "model.asdf", scene)
        for command in (["info", tmp_path / "model.asdf"], ["show", tmp_path]):
            run = scenefit(*command)
            assert run.code == 2
            assert "with schema version 7; scenefit" in run.err
            assert "Upgrade: pip install --upgrade scenefit" in run.err

    def test_info_of_images(self, field):
        run = scenefit("info", field)
        assert run.code == 0
        assert "2 observation(s)" in run.out
        assert 'HST: 1 x 40 x 40, F814W; 0.05"/pixel; nJy' in run.out
        assert 'HSC: 2 x 14 x 14, g, i; 0.15"/pixel; nJy' in run.out
        assert "catalogue of 3 sources" in run.out

    def test_info_of_a_model(self, gaussians):
        run = scenefit("info", gaussians.directory / "model.asdf")
        assert run.code == 0
        assert "FitResult" in run.out
        assert "converged, 3 sources" in run.out
        assert "HSC: 2 x 14 x 14" in run.out

    def test_info_of_parts_of_a_result(self, gaussians, tmp_path):
        result = gaussians.model
        contents = {"scene": result.scene, "several": result.observations, "one": result.observations[0]}
        for name, content in contents.items():
            sf.save(tmp_path / f"{name}.asdf", content)
            run = scenefit("info", tmp_path / f"{name}.asdf")
            assert run.code == 0
            assert ("3 sources on a frame of 3 x 40 x 40" in run.out) == (name == "scene")
            assert ("HST: 1 x 40 x 40" in run.out) == (name != "scene")
            assert ("HSC: 2 x 14 x 14" in run.out) == (name == "several")

    def test_info_of_a_folder(self, gaussians):
        run = scenefit("info", gaussians.directory)
        assert run.code == 2
        assert f"this is a folder. Results of a fit: scenefit show {gaussians.directory}" in run.err

    def test_info_of_something_else(self, tmp_path):
        (tmp_path / "notes.txt").write_text("nothing of ours")
        for name, message in {"notes.txt": "notes.txt", "nowhere.fits": "there is no such file"}.items():
            run = scenefit("info", tmp_path / name)
            assert run.code == 2
            assert run.err.startswith("scenefit: ")
            assert message in run.err

    def test_version(self):
        run = scenefit("--version")
        assert run.code == 0
        assert run.out.startswith("scenefit ")

    def test_help_names_commands_and_options(self):
        text = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "200"}).output
        assert all(command in text for command in ("demo", "fit", "show", "info"))
        text = CliRunner().invoke(cli.app, ["fit", "--help"], env={"COLUMNS": "200"}).output
        options = (
            "out",
            "catalog",
            "model",
            "free-shift",
            "free-rotation",
            "free-background",
            "correlated",
            "coverage",
            "rtol",
            "max-steps",
        )
        assert all(f"--{option}" in text for option in (*options, "overwrite", "quiet"))

    def test_no_command_shows_the_help(self):
        result = CliRunner().invoke(cli.app, [])
        assert result.exit_code == 2
        assert "Usage" in result.output
