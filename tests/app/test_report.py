"""The page about a fit: whole, alone, escaped, and sorted by its own script; and what reads folders of results."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import equinox as eqx
import matplotlib.image
import numpy as np
import pytest
from astropy.table import QTable

from scenefit.app import pipeline, report
from scenefit.app.results import read_model, read_results
from scenefit.app.serialization import save
from scenefit.data.observation import Observation
from scenefit.infer.fit import FitResult, Status
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.survey.catalog import catalog
from scenefit.survey.flags import Flag
from tests import blends
from tests.app.test_cli import scenefit
from tests.helpers import tangent_wcs

NAMES = ("10", '<b id="x">&amp;</b>', "</script><script>alert('$title')</script>")
"""Sources; the names are allowed, and would do harm where they aren't escaped."""
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Reads a page: elements with attributes, rows of tables, text outside scripts; raises where tags don't match."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.rows, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append((dict(attrs).get("data-value"), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            value, text = self.rows[-1][-1]
            self.rows[-1][-1] = value, text + data
        if "script" not in self.open and "style" not in self.open:
            self.texts.append(data)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs[name] for each, attrs in self.elements if each == tag and name in attrs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a fit leaves in a folder, without the fit: three galaxies in two images, one of a name that isn't harmless."""
    fine, coarse = blends.observe(zeropoint=31.4)
    renamed = Observation(
        coarse.data,
        noise=coarse.noise,
        psf=coarse.psf,
        wcs=tangent_wcs(blends.COARSE_SHAPE, blends.COARSE_SCALE, rotation_deg=blends.COARSE_ROTATION),
        channels=("<g>", "r"),
        name="<i>&coarse",
        unit="nJy",
    )
    frame = blends.frame_of([fine, renamed])
    galaxies = blends.true_scene(blends.frame_of([fine, coarse])).sources.values()
    scene = Scene(frame, dict(zip(NAMES, galaxies, strict=True)))
    observations = tuple(obs.match(frame) for obs in (fine, renamed))
    parameters = Parameters.default(scene, observations)
    history = {"loss": np.array([90.0, 70.0, 60.0, 60.0]), "projected_gradient": np.array([3.0, 1.0, 0.1, 0.0])}
    result = FitResult(scene, observations, parameters, Status.MAX_STEPS, 60.0, history, 4, {})
    directory = tmp_path_factory.mktemp("<results> & more")
    save(directory / "model.asdf", result)
    catalog(result, progress=False).write(directory / "catalog.ecsv")
    seconds = {"read": 0.1, "fit": 2.0}
    pipeline.io.write_json(directory / "summary.json", pipeline.summary(result, {}, seconds))
    return directory


@pytest.fixture(scope="module")
def text(folder):
    path = report.write_report(folder, progress=False)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def table(folder):
    return QTable.read(folder / "catalog.ecsv")


@pytest.fixture
def copied(folder, tmp_path):
    """A folder with the results that a test may damage."""
    for name in ("model.asdf", "catalog.ecsv", "summary.json"):
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path


class TestPage:
    def test_asks_for_nothing(self, text, page):
        without_images = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
        assert not re.search(r"https?:|[\"'=(]//|url\(|@import|<link|<iframe|fetch|XMLHttp", without_images)
        for tag, name in (("img", "src"), ("script", "src"), ("a", "href")):
            assert all(value.startswith(("data:image/png;base64,", "#")) for value in page.attributes(tag, name))
        (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
        assert policy.startswith("default-src 'none'; img-src data:;")
        assert "connect-src" not in policy

    def test_links_lead_somewhere(self, page):
        ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {value[1:] for value in page.attributes("a", "href")} <= set(ids)

    def test_images_are_whole(self, page):
        images = page.attributes("img", "src")
        # The scene, three sources, the convergence.
        assert len(images) == 5
        for image in images:
            pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(image.partition(",")[2], validate=True)))
            assert min(pixels.shape[:2]) > 100
            assert np.ptp(pixels) > 0.5
        assert all(page.attributes("img", "alt"))
        assert set(page.attributes("img", "loading")) == {"lazy"}

    def test_catalogue(self, page, table):
        heads = [text for _, text in page.rows[0]]
        rows = page.rows[1 : 1 + len(table)]
        assert [row[0][1] for row in rows] == list(NAMES)
        assert {len(row) for row in rows} == {len(heads)}
        # Errors are in the cells of what they belong to if units agree.
        assert "mag_v [mag]" in heads
        assert not any(head.startswith(("flux_err", "mag_err", "half_light_radius_err")) for head in heads)
        assert "ra_err [arcsec]" in heads
        for name, head in (("flux_v", "flux_v [nJy]"), ("ra", "ra [deg]"), ("flags", "flags")):
            values = [float(row[heads.index(head)][0]) for row in rows]
            np.testing.assert_array_equal(values, [getattr(value, "value", value) for value in table[name]])
        value, error = (np.array([row[heads.index("mag_<g> [mag]")][1].split(" ± ") for row in rows]).astype(float)).T
        # Two digits of the error.
        np.testing.assert_allclose(error, table["mag_err_<g>"].value, rtol=0.06)
        assert (np.abs(value - table["mag_<g>"].value) <= 0.06 * error).all()

    def test_names_are_text(self, page, folder):
        assert [tag for tag, _ in page.elements].count("script") == 1
        assert "x" not in [attrs.get("id") for _, attrs in page.elements]
        assert not {"b", "i"} & {tag for tag, attrs in page.elements if attrs}
        text = "".join(page.texts)
        assert all(text.count(name) >= 2 for name in NAMES)
        assert "<i>&coarse" in text
        assert f"scenefit: {folder.name}" in text

    def test_fit_and_flags(self, page):
        rows = {row[0][1]: [text for _, text in row[1:]] for row in page.rows}
        assert rows["status"] == [Status.MAX_STEPS.value]
        assert rows["steps"] == ["4"]
        assert rows["loss"] == ["60"]
        assert rows["fit"] == ["2"]
        assert set(rows) >= {"scenefit", "jax", "numpy", "astropy", "python"}
        assert rows["<i>&coarse"][0] == "<g>, r"
        for flag in Flag:
            bit, count, meaning = rows[flag.name]
            assert (int(bit), meaning) == (int(flag), flag.__doc__)
            # The fit that never was hasn't converged.
            assert int(count) == 3 or flag is not Flag.NOT_CONVERGED

    def test_first_sources_are_shown_one_by_one(self, folder, page):
        assert len([tag for tag, _ in page.elements if tag == "details"]) == 3
        few = Page(report.compose(read_results(folder), title="few", num_stamps=1, progress=False))
        assert len([tag for tag, _ in few.elements if tag == "details"]) == 1
        assert len(few.attributes("img", "src")) == 3
        assert "2 further sources aren't shown" in "".join(few.texts)
        # Without images there is nothing that a name could lead to.
        assert [value for value in few.attributes("a", "href") if "source-" in value] == ["#source-0"]

    def test_values_that_are_none(self):
        table = QTable({"id": ["a", "b"], "snr": [np.nan, 3.0], "axis_ratio": [-0.5, 1e-9]})
        table["axis_ratio_err"] = [np.inf, 0.0]
        rows = Page(report.catalog_table(table, report.catalog_cells(table), {})).rows
        assert [text for _, text in rows[0]] == ["id", "snr", "axis_ratio"]
        assert rows[1] == [("a", "a"), ("", "–"), ("-0.5", "−0.5 ± ∞")]
        assert rows[2] == [("b", "b"), ("3.0", "3.0"), ("1e-09", "1e−09")]

    def test_nothing_half_written(self, copied, monkeypatch):
        (copied / "report.html").write_text("the one before")
        monkeypatch.setattr(report.io, "atomic_path", None)
        with pytest.raises(TypeError):
            report.write_report(copied, num_stamps=0, progress=False)
        assert (copied / "report.html").read_text() == "the one before"

    def test_script_sorts_in_a_browser(self, text, tmp_path):
        browsers = ("chromium", "chromium-browser", "google-chrome", "chrome")
        browser = next(filter(None, map(shutil.which, browsers)), None)
        if browser is None:
            pytest.skip("no Chromium on PATH")
        click = "document.querySelectorAll('.sortable th button')[{}].click();"
        column = [head for _, head in Page(text).rows[0]].index("flux_v [nJy]")
        clicks = {"once": click.format(column), "twice": 2 * click.format(column), "names": click.format(0)}
        orders = {"once": NAMES[::-1], "twice": NAMES, "names": None}
        # The script of the page is the last thing in it.
        for name, script in clicks.items():
            path = tmp_path / f"{name}.html"
            path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
            options = [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path}/{name}",
                "--dump-dom",
            ]
            done = subprocess.run([browser, *options, path.as_uri()], capture_output=True, text=True, timeout=60)
            dumped = Page(done.stdout)
            found = tuple(row[0][1] for row in dumped.rows[1:4])
            assert sorted(found) == sorted(NAMES)
            # True fluxes fall from source to source; numbers come before text or after, whatever the language.
            assert orders[name] in (found, None)
            assert (found[0] == "10" or found[-1] == "10") or name != "names"
            directions = {"once": "ascending", "twice": "descending", "names": "ascending"}
            assert dumped.attributes("th", "aria-sort") == [directions[name]]


class TestCommands:
    def test_report(self, copied):
        run = scenefit("report", copied, "--stamps", "0", "--quiet", directory=copied)
        assert (run.code, run.err) == (0, "")
        assert run.out == f"{copied / 'report.html'}\n"
        assert run.files == {"model.asdf", "catalog.ecsv", "summary.json", "report.html"}
        assert [tag for tag, _ in Page((copied / "report.html").read_text()).elements].count("details") == 0

    def test_inspect(self, copied):
        run = scenefit("inspect", copied, directory=copied)
        assert (run.code, run.out) == (0, f"{copied / 'inspect.png'}\n")
        assert (copied / "inspect.png").read_bytes().startswith(b"\x89PNG")

    def test_inspect_a_source(self, copied):
        run = scenefit("inspect", copied, "--source", NAMES[1], "--source", "10", directory=copied)
        assert run.code == 0
        (path,) = [name for name in run.files if name.startswith("inspect_")]
        # Nothing in it that a file system or a shell would stumble over.
        assert re.fullmatch(r"[\w.-]+", path)
        assert (copied / path).read_bytes().startswith(b"\x89PNG")
        assert run.out.count("half_light_radius ") == 2
        other = copied / "one.png"
        assert scenefit("inspect", copied, "--source", "10", "--out", other).code == 0
        assert other.read_bytes() != (copied / path).read_bytes()

    def test_bad_options(self, copied):
        before = {path.name for path in copied.iterdir()}
        for options, message in {
            ("report", "--stamps", "-1"): "The number of stamps is at least 0; got -1",
            ("inspect", "--source", "11"): "no source is called '11'; there are 3: 10, <b",
            ("inspect", "--out", copied / "one.jpeg"): "expected a file name that ends in .png",
            ("inspect", "--out", copied / "nowhere" / "one.png"): "to write into; there is none",
        }.items():
            run = scenefit(options[0], copied, *options[1:], directory=copied)
            assert run.code == 2
            assert run.err.startswith("scenefit: ")
            assert message in run.err
            assert run.err.count("\n") == 1
            assert run.files == before

    @pytest.mark.parametrize("command", ["report", "inspect", "show"])
    def test_no_results(self, tmp_path, command):
        (tmp_path / "file").write_text("")
        (tmp_path / "empty").mkdir()
        for name, message in {
            "nowhere": "expected the results of `scenefit fit`; there is no such folder",
            "empty": "not there",
            "file": "this is a file",
        }.items():
            run = scenefit(command, tmp_path / name)
            assert run.code == 2
            assert run.err.startswith(f"scenefit: {tmp_path / name}: ")
            assert message in run.err
            assert run.err.count("\n") == 1
        assert list((tmp_path / "empty").iterdir()) == []

    @pytest.mark.parametrize("name", ["model.asdf", "catalog.ecsv", "summary.json"])
    def test_damaged_results(self, copied, name):
        (copied / name).write_text("{")
        run = scenefit("report", copied, directory=copied)
        assert run.code == 2
        assert name in run.err
        assert "report.html" not in run.files

    def test_results_of_something_else(self, copied, folder):
        save(copied / "model.asdf", read_model(folder).scene)
        run = scenefit("inspect", copied)
        assert run.code == 2
        assert "model.asdf: expected the result of a fit; it holds a Scene" in run.err
        (copied / "model.asdf").write_bytes((folder / "model.asdf").read_bytes())
        (copied / "summary.json").write_text("[]")
        assert "summary.json: expected the summary of a fit; it holds a list" in scenefit("report", copied).err


def test_saved_results_are_those_that_are_read(folder):
    results = read_results(folder)
    assert list(results.fit.scene.sources) == list(NAMES)
    assert results.summary["num_steps"] == 4
    assert eqx.is_array_like(results.catalog["snr"][0])
