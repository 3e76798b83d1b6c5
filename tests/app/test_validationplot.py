"""The figure of a comparison shows every residual, what is typical of them, and fractions as they are."""

from __future__ import annotations

import astropy.units as u
import numpy as np
import pytest
from astropy.table import QTable, Table, vstack

from scenefit.app import plot
from scenefit.app.validationplot import PULL_RANGE
from scenefit.survey.validate import Validation, validate

SIGMA_FLUX, SIGMA_POSITION = 30.0, 0.02


def compared(number: int, *, seed=0, errors=True, junk=0, bands=("g", "i")) -> Validation:
    """Return the comparison of sources 3 arcsec apart, one in five of them blended, with a catalogue of known errors."""
    rng = np.random.default_rng(seed)
    north = 3.0 * np.arange(number)
    north[4::5] = north[3::5][: len(north[4::5])] + 0.8
    magnitude = rng.uniform(20, 24, number)
    truth = Table({"ra": np.full(number, 150.0), "dec": north / 3600, "hlr_arcsec": np.full(number, 0.5)})
    table = QTable({"ra": truth["ra"] * u.deg})
    table["dec"] = (north + SIGMA_POSITION * rng.normal(size=number)) / 3600 * u.deg
    for n, band in enumerate(bands):
        truth[f"mag_{band}"] = magnitude - n
        flux = 10 ** (-0.4 * (truth[f"mag_{band}"] - 31.4)) + SIGMA_FLUX * rng.normal(size=number)
        table[f"flux_{band}"] = flux * u.nJy
        table[f"flux_err_{band}"] = np.full(number, SIGMA_FLUX if errors else np.nan) * u.nJy
    table["half_light_radius"] = 0.5 * np.exp(0.1 * rng.normal(size=number)) * u.arcsec
    false = table[:junk].copy()
    false["ra"] += 1.5 * u.arcsec
    return validate(vstack([table, false]), truth)


def axes_of(fig):
    """Return the labelled axes of all parts of a figure."""
    return {ax.get_label(): ax for ax in fig.axes}


def points(ax, marker):
    """Return the (x, y) of all points of an axes with some marker but those of the running median, sorted by x."""
    lines = [line for line in ax.lines if line.get_marker() == marker and line.get_linestyle() == "None"]
    found = np.concatenate([np.reshape(line.get_xydata(), (-1, 2)) for line in lines])
    return found[np.argsort(found[:, 0])]


def drawn(fig):
    """Draw a figure, which raises where anything can't be drawn."""
    fig.draw_without_rendering()
    return fig


@pytest.fixture(scope="module")
def sample():
    validation = compared(400, junk=40)
    return validation, axes_of(drawn(plot.validation(validation)))


class TestPanels:
    def test_every_quantity_has_its_panels_with_units(self, sample):
        validation, axes = sample
        panels = {f"{name} {kind}" for name in validation.quantities for kind in ("residual", "pull")}
        counts = {"completeness numbers", "purity numbers"}
        assert set(axes) == panels | {"completeness", "purity"} | counts
        labels = {
            "mag_g": "Δg [mag]",
            "mag_i": "Δi [mag]",
            "g-i": "Δ(g − i) [mag]",
            "log_size": "Δ ln(half-light radius)",
            "ra": "ΔRA cos(Dec) [mas]",
            "dec": "ΔDec [mas]",
        }
        assert {name: axes[f"{name} residual"].get_ylabel() for name in validation.quantities} == labels
        # The lowest panel of each column has the label for those above.
        assert {axes[f"{name} residual"].get_xlabel() for name in ("g-i", "dec")} == {"true g [AB mag]"}
        assert {axes[f"{name} pull"].get_xlabel() for name in ("g-i", "dec")} == {"residual / error"}
        assert axes["completeness"].get_xlabel() == "true g [AB mag]"
        assert axes["purity"].get_xlabel() == "measured g [AB mag]"

    def test_every_residual_is_there(self, sample):
        validation, axes = sample
        magnitude = np.asarray(validation.pairs["magnitude"])
        for name, scale in (("mag_g", 1), ("dec", 1000)):
            ax = axes[f"{name} residual"]
            residual = scale * np.asarray(validation.pairs[f"residual_{name}"])
            low, high = ax.get_ylim()
            inside, above, below = (points(ax, marker) for marker in ("o", "^", "v"))
            assert len(inside) + len(above) + len(below) == len(residual)
            is_inside = np.isin(magnitude, inside[:, 0])
            np.testing.assert_array_equal(inside[:, 1], residual[is_inside][np.argsort(magnitude[is_inside])])
            assert ((residual[is_inside] > low) & (residual[is_inside] < high)).all()
            # What is off is at the edge it is beyond.
            assert (residual[np.isin(magnitude, above[:, 0])] > above[:, 1]).all()
            assert (residual[np.isin(magnitude, below[:, 0])] < below[:, 1]).all()

    def test_blended_sources_have_their_color(self, sample):
        validation, axes = sample
        colors = {}
        for line in axes["mag_g residual"].lines:
            if line.get_linestyle() == "None" and line.get_marker() in "o^v":
                colors[line.get_color()] = colors.get(line.get_color(), 0) + len(line.get_xdata())
        blended = int(np.sum(validation.pairs["blended"]))
        assert blended == 160
        assert sorted(n for n in colors.values() if n) == sorted([blended, 400 - blended])

    def test_running_median_and_spread(self, sample):
        validation, axes = sample
        running = validation.running("mag_i", bins=10)
        ax = axes["mag_i residual"]
        ((line, _, _),) = ax.containers
        np.testing.assert_allclose(line.get_xdata(), running["magnitude"])
        np.testing.assert_allclose(line.get_ydata(), running["median"])
        edges = [each.get_ydata() for each in ax.lines if each.get_linestyle() == "--"]
        np.testing.assert_allclose((edges[1] - edges[0]) / 2, running["mad_sigma"])

    def test_pulls(self, sample):
        validation, axes = sample
        ax = axes["mag_g pull"]
        heights = np.array([patch.get_height() * patch.get_width() for patch in ax.patches])
        # A density: those beyond the range are in the outermost bins.
        assert heights.sum() == pytest.approx(1.0)
        pulls = np.clip(np.asarray(validation.pairs["pull_mag_g"]), -PULL_RANGE, PULL_RANGE)
        counts, _ = np.histogram(pulls, len(ax.patches), (-PULL_RANGE, PULL_RANGE))
        np.testing.assert_allclose(heights, counts / len(pulls))
        (normal,) = ax.lines
        x, y = normal.get_data()
        np.testing.assert_allclose(y, np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi))
        # Known errors: 1 within what 400 pulls and the median absolute deviation leave open, 6 %, three times.
        assert float(ax.get_title(loc="left").rpartition(" ")[2]) == pytest.approx(1.0, abs=0.18)
        assert "no errors" in [text.get_text() for text in axes["ra pull"].texts]

    def test_fractions(self, sample):
        validation, axes = sample
        for kind in ("completeness", "purity"):
            table = validation.fractions(kind)
            ((line, _, (bars,)),) = axes[kind].containers
            np.testing.assert_allclose(line.get_xdata(), table["magnitude"])
            np.testing.assert_allclose(line.get_ydata(), table["fraction"])
            ends = np.array([segment[:, 1] for segment in bars.get_segments()])
            np.testing.assert_allclose(ends[:, 0], np.minimum(table["low"], table["fraction"]))
            np.testing.assert_allclose(ends[:, 1], np.maximum(table["high"], table["fraction"]))
        assert axes["purity"].get_title(loc="left") == "purity: 400 of 440 (90.9 %)"
        numbers = sum(patch.get_height() for patch in axes["completeness numbers"].patches)
        assert numbers == 400


class TestOddInput:
    def test_few_sources(self):
        axes = axes_of(drawn(plot.validation(compared(6))))
        ax = axes["mag_g residual"]
        assert sum(len(points(ax, marker)) for marker in ("o", "^", "v")) == 6
        # One bin, whose bar is the spread.
        ((line, _, _),) = ax.containers
        assert len(line.get_xdata()) == 1

    def test_one_source(self):
        axes = axes_of(drawn(plot.validation(compared(1))))
        assert len(points(axes["mag_g residual"], "o")) == 1

    def test_many_sources(self):
        axes = axes_of(drawn(plot.validation(compared(5000), ["mag_g"])))
        assert set(axes) >= {"mag_g residual", "mag_g pull"}
        assert "mag_i residual" not in axes
        lines = [line for line in axes["mag_g residual"].lines if line.get_marker() in ("o", "^", "v")]
        assert [line.get_rasterized() for line in lines if line.get_linestyle() == "None"] == [True] * 6

    def test_no_match(self):
        truth = Table({"ra": [150.0, 150.1], "dec": [2.0, 2.0], "mag_g": [21.0, 22.0]})
        axes = axes_of(drawn(plot.validation(validate(truth[:0], truth))))
        assert axes["mag_g residual"].get_title(loc="left") == "no matched source"
        assert axes["completeness"].get_title(loc="left") == "completeness: 0 of 2 (0.0 %)"
        assert axes["purity"].get_title(loc="left") == "purity: 0 of 0"
        assert axes_of(drawn(plot.validation(validate(truth[:0], truth[:0]))))["completeness"]

    def test_no_errors(self):
        axes = axes_of(drawn(plot.validation(compared(30, errors=False))))
        assert "no errors" in [text.get_text() for text in axes["mag_g pull"].texts]
        assert len(axes["mag_g pull"].patches) == 0

    def test_no_spread(self):
        truth = Table({"ra": 150 + np.arange(12) / 600, "dec": np.full(12, 2.0), "mag_g": np.linspace(20, 22, 12)})
        axes = axes_of(drawn(plot.validation(validate(truth, truth))))
        assert len(points(axes["mag_g residual"], "o")) == 12

    def test_names_are_text(self):
        axes = axes_of(drawn(plot.validation(compared(20, bands=("$g", "i$^")))))
        assert axes["mag_$g residual"].get_ylabel() == "Δ$g [mag]"

    def test_unknown_quantity(self):
        with pytest.raises(KeyError, match="no quantity 'mag_z'; there are"):
            plot.validation(compared(6), ["mag_z"])
