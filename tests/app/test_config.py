import dataclasses
import re

import pytest

from scenefit.app.config import COVERAGES, MODELS, Settings, read_settings

# One value of each setting, none of them the default.
TOML = """
input = "field.fits"
catalog = "lists/positions.ecsv"
model = "gaussian"
free_shift = ["HSC", "VIS"]
free_rotation = ["VIS"]
free_background = ["HSC"]
correlated = ["HST"]
coverage = "intersection"
rtol = 0.1
max_steps = 7

[zeropoints]
HST = 25.94
HSC = 27
"""
OPTIONS = {
    "model": "point",
    "free_shift": ("A",),
    "free_rotation": ("B",),
    "free_background": ("B", "C"),
    "correlated": ("A",),
    "coverage": "intersection",
    "rtol": 0.5,
    "max_steps": 3,
}


@pytest.fixture
def toml(tmp_path):
    """Write settings into a TOML file and return its path."""

    def write(content):
        path = tmp_path / "fit.toml"
        path.write_text(content, encoding="utf-8")
        return path

    return write


@pytest.fixture
def field(tmp_path):
    """A file to be fitted; nothing here reads it."""
    path = tmp_path / "field.fits"
    path.touch()
    return path


class TestSettings:
    def test_defaults_are_a_plain_fit(self, field):
        settings = Settings(field)
        assert (settings.model, settings.coverage) == ("auto", "union")
        assert (settings.catalog, settings.free_shift, settings.free_background) == (None, (), ())
        assert (settings.free_rotation, settings.correlated) == ((), ())
        assert settings.noise == "measured"
        assert dict(settings.zeropoints) == {}
        assert settings.rtol > 0
        assert settings.max_steps >= 1

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("coverage", COVERAGES)
    def test_known_choices(self, field, model, coverage):
        settings = Settings(field, model=model, coverage=coverage)
        assert (settings.model, settings.coverage) == (model, coverage)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model": "sersics"}, r"model is one of auto, pixel, gaussian, point; got 'sersics'"),
            ({"coverage": "all"}, r"coverage is one of union, intersection; got 'all'"),
            ({"rtol": 0.0}, r"rtol must be positive .*; got 0\.0 and 100"),
            ({"rtol": -1.0}, r"rtol must be positive"),
            ({"rtol": float("nan")}, r"rtol must be positive .*; got nan"),
            ({"rtol": float("inf")}, r"rtol must be positive and finite, .*; got inf"),
            ({"max_steps": 0}, r"max_steps at least 1; got 0\.02 and 0"),
        ],
    )
    def test_bad_values(self, field, options, message):
        with pytest.raises(ValueError, match=message):
            Settings(field, **options)


class TestReadSettings:
    def test_fits_file_is_the_input(self, field):
        assert read_settings(field) == Settings(field)
        assert read_settings(str(field)) == Settings(field)

    @pytest.mark.parametrize("name", OPTIONS)
    def test_options_are_taken_over(self, field, name):
        settings = read_settings(field, **{name: OPTIONS[name]})
        assert settings == dataclasses.replace(Settings(field), **{name: OPTIONS[name]})
        assert settings != Settings(field)

    def test_none_leaves_the_default(self, field):
        assert read_settings(field, **dict.fromkeys(OPTIONS)) == Settings(field)

    def test_all_settings_in_toml(self, toml):
        path = toml(TOML)
        assert read_settings(path) == Settings(
            input=path.parent / "field.fits",
            catalog=path.parent / "lists" / "positions.ecsv",
            model="gaussian",
            free_shift=("HSC", "VIS"),
            free_rotation=("VIS",),
            free_background=("HSC",),
            correlated=("HST",),
            coverage="intersection",
            zeropoints={"HST": 25.94, "HSC": 27.0},
            rtol=0.1,
            max_steps=7,
        )

    def test_capitals_in_the_suffix(self, toml):
        path = toml(TOML)
        other = path.rename(path.with_suffix(".TOML"))
        assert read_settings(other).model == "gaussian"

    def test_absolute_paths_stay(self, toml, tmp_path):
        other = tmp_path / "elsewhere" / "field.fits"
        settings = read_settings(toml(f'input = "{other.as_posix()}"'))
        assert settings.input == other

    def test_whole_numbers_are_numbers(self, toml):
        assert read_settings(toml('input = "a.fits"\nrtol = 1')).rtol == 1.0

    @pytest.mark.parametrize("name", OPTIONS)
    def test_options_override_toml(self, toml, name):
        path = toml(TOML)
        assert getattr(read_settings(path, **{name: OPTIONS[name]}), name) == OPTIONS[name]

    def test_missing_file(self, tmp_path):
        message = r"nowhere\.fits: expected a FITS file or a TOML file with settings; there is no such file"
        with pytest.raises(FileNotFoundError, match=message):
            read_settings(tmp_path / "nowhere.fits")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("input = ", r"fit\.toml: not a valid TOML file: "),
            ('model = "pixel"', r"fit\.toml: expected a setting 'input', the FITS file to fit"),
            ('input = "a"\nfree_shfit = ["HSC"]', r"unknown setting 'free_shfit'; did you mean 'free_shift'\?"),
            ('input = "a"\nquux = 1', r"unknown setting 'quux'; known are input, catalog, model, "),
            ('input = "a"\nfree_shift = "HSC"', r"setting 'free_shift' wants a list; got 'HSC'"),
            ('input = "a"\nmax_steps = 1.5', r"setting 'max_steps' wants a int; got 1\.5"),
            ('input = "a"\nmax_steps = true', r"setting 'max_steps' wants a int; got True"),
            ('input = "a"\nrtol = true', r"setting 'rtol' wants a float; got True"),
            ('input = "a"\nrtol = "small"', r"setting 'rtol' wants a float; got 'small'"),
            ('input = "a"\nzeropoints = 25.0', r"setting 'zeropoints' wants a dict; got 25\.0"),
            (
                'input = "a"\nzeropoints = {HST = true}',
                r"zeropoints wants AB magnitudes by observation; got \{'HST': True\}",
            ),
            ('input = "a"\nfree_shift = [1]', r"setting 'free_shift' wants names of observations; got \[1\]"),
            ("input = 3", r"setting 'input' wants a str; got 3"),
            ('input = "a"\nmodel = "sersics"', r"model is one of"),
        ],
    )
    def test_bad_toml(self, toml, content, message):
        with pytest.raises(ValueError, match=message):
            read_settings(toml(content))

    def test_not_text(self, tmp_path):
        path = tmp_path / "fit.toml"
        path.write_bytes(b"\xff\xfe\x00input")
        with pytest.raises(ValueError, match=re.escape(str(path)) + r": not a valid TOML file"):
            read_settings(path)
