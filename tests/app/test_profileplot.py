"""Figures of profiles and posteriors show the values, quantiles and labels that they say."""

import sys

import astropy.units as u
import numpy as np
import pytest

from scenefit.app import plot
from scenefit.model import link
from scenefit.model.morphology import ExponentialMorphology, PointMorphology, SersicMorphology
from scenefit.model.source import CompositeSource, Source
from scenefit.survey.profile import profile
from tests.helpers import make_observation
from tests.survey.test_profile import BANDS, CENTER, as_posterior, as_result, ellipticity

SIZE = "sources.host.morphology.half_light_radius"
SHAPE = "sources.host.morphology.ellipticity"


def axes_of(fig):
    return {ax.get_label(): ax for ax in fig.axes if ax.get_label()}


def drawn(fig):
    """Draw a figure (which raises where anything can't be drawn) and return it."""
    fig.draw_without_rendering()
    return fig


def lines_of(ax):
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


@pytest.fixture
def composite():
    parts = {
        "disk": Source(CENTER, [50.0, 70.0], ExponentialMorphology(4.0, ellipticity(0.6))),
        "nu$cleus": Source(CENTER, [10.0, 10.0], PointMorphology()),
    }
    return as_result(CompositeSource(parts), ("g", "r"))


@pytest.fixture
def sampled(rng):
    """Return a posterior of one source, with a size that depends on wavelength and a shape that doesn't."""
    size = link.Polynomial.constant(4.0, 1, BANDS)
    source = Source(CENTER, [50.0, 60.0, 70.0], SersicMorphology(size, 1.0, ellipticity(0.6)))
    draws = {
        SIZE: np.array([4.5, 3.5]) + rng.normal(0, 0.1, (400, 2)),
        SHAPE: ellipticity(0.6) + rng.normal(0, 0.01, (400, 2)),
        "sources.host.spectrum.flux": rng.normal(50, 2, (400, 3)),
    }
    return as_posterior(as_result(source, tuple(BANDS)), draws)


class TestProfile:
    def test_lines_are_those_of_the_profile(self, composite):
        shown = profile(composite, "host", psf_sigma=1.5)
        fig = drawn(plot.profile(shown))
        axes = axes_of(fig)
        assert set(axes) == {f"{c} {what}" for c in "gr" for what in ("surface brightness", "curve of growth")}
        lines = lines_of(axes["r curve of growth"])
        names = {"total", "disk", "nu$cleus"}
        assert set(lines) == names | {f"{name}, convolved" for name in names}
        np.testing.assert_array_equal(lines["disk"].get_xdata(), shown.radius)
        np.testing.assert_array_equal(lines["disk"].get_ydata(), shown.components["disk"].curve_of_growth[0, 1])
        convolved = shown.total.convolved_curve_of_growth[0, 1]
        np.testing.assert_array_equal(lines["total, convolved"].get_ydata(), convolved)
        assert lines["total, convolved"].get_linestyle() == "--"
        # A fit has no errors to shade.
        assert not any(ax.collections for ax in axes.values())
        half_light = [line for line in axes["r curve of growth"].get_lines() if line.get_linestyle() == ":"]
        np.testing.assert_allclose(half_light[0].get_xdata(), shown.r50[0, 1])

    def test_channels_and_components_may_be_chosen(self, composite):
        fig = drawn(plot.profile(profile(composite, "host"), ["r"], components=False))
        axes = axes_of(fig)
        assert set(axes) == {"r surface brightness", "r curve of growth"}
        assert set(lines_of(axes["r curve of growth"])) == {"total"}

    def test_units_without_zeropoints_and_wcs(self, composite):
        axes = axes_of(drawn(plot.profile(profile(composite, "host"))))
        assert axes["g curve of growth"].get_xlabel() == "semi-major axis [pix]"
        assert axes["g surface brightness"].get_yscale() == "log"
        assert "pix²" in axes["g surface brightness"].get_ylabel()

    def test_magnitudes_and_arcsec(self):
        observation = make_observation((81, 83), scale_arcsec=0.2, zeropoint=27.0)
        source = Source(CENTER, [500.0], ExponentialMorphology(4.0))
        shown = profile(as_result(source, observations=[observation], wcs=observation.wcs), "host")
        axes = axes_of(drawn(plot.profile(shown)))
        top, bottom = axes["g surface brightness"], axes["g curve of growth"]
        assert bottom.get_xlabel() == "semi-major axis [arcsec]"
        assert top.get_ylabel() == "surface brightness [mag / arcsec²]"
        # Bright above faint, and no more of it than the eye can use.
        faintest, brightest = top.get_ylim()
        assert 10 < faintest - brightest < 15
        line = lines_of(top)["total"]
        np.testing.assert_allclose(line.get_xdata(), shown.radius_arcsec)
        np.testing.assert_array_equal(
            line.get_ydata(), shown.table("g")["surface_brightness"].to_value(u.mag / u.arcsec**2)
        )

    def test_shades_are_quantiles(self, sampled):
        shown = profile(sampled, "host")
        axes = axes_of(drawn(plot.profile(shown)))
        ax = axes["i curve of growth"]
        low, middle, high = np.quantile(shown.total.curve_of_growth[:, 2], [0.16, 0.5, 0.84], axis=0)
        np.testing.assert_allclose(lines_of(ax)["total"].get_ydata(), middle)
        (shade,) = ax.collections
        outline = shade.get_paths()[0].vertices
        middle_radius = np.isclose(outline[:, 0], shown.radius[30])
        np.testing.assert_allclose(np.unique(outline[middle_radius, 1])[[0, -1]], [low[30], high[30]])

    def test_a_point_can_be_shown(self):
        shown = profile(as_result(Source(CENTER, [3.0], PointMorphology())), "host", psf_sigma=1.0)
        axes = axes_of(drawn(plot.profile(shown)))
        low, high = axes["g surface brightness"].get_ylim()
        assert low < shown.total.convolved_surface_brightness.max() < high

    def test_errors(self, composite):
        shown = profile(composite, "host")
        with pytest.raises(ValueError, match=r"channels \['g', 'r'\], not \['z'\]"):
            plot.profile(shown, ["g", "z"])
        with pytest.raises(ValueError, match="no channel"):
            plot.profile(shown, [])


class TestCorner:
    def test_panels_show_the_draws(self, sampled):
        fig = drawn(plot.corner(sampled, [SHAPE, "sources.*.half_light_radius"]))
        axes = axes_of(fig)
        names = [f"{SHAPE}[0]", f"{SHAPE}[1]", f"{SIZE}[0]", f"{SIZE}[1]"]
        pairs = {f"{y} {x}" for n, y in enumerate(names) for x in names[:n]}
        assert set(axes) == {*names, *pairs}
        ax = axes[f"{SIZE}[1]"]
        low, middle, high = np.quantile(sampled[SIZE][:, 1], [0.16, 0.5, 0.84])
        np.testing.assert_allclose([line.get_xdata()[0] for line in ax.get_lines()], [low, middle, high])
        assert f"{middle:.2f}" in ax.get_title()
        assert axes[f"{SIZE}[1] {SHAPE}[0]"].get_xlabel() == "host\nellipticity[0]"
        assert axes[f"{SIZE}[1] {SHAPE}[0]"].get_ylabel() == "host\nhalf_light_radius[1] [pix]"

    def test_contours_hold_their_fractions(self, rng):
        source = Source(CENTER, [10.0], ExponentialMorphology(4.0))
        result = as_result(source)
        posterior = as_posterior(result, {"sources.host.center": rng.normal(0, [1.0, 2.0], (20000, 2))})
        fig = drawn(plot.corner(posterior, "sources.host.center"))
        ax = axes_of(fig)["sources.host.center[1] sources.host.center[0]"]
        (contours,) = [each for each in ax.collections if not np.size(each.get_facecolor())]
        # Two and one standard deviations of two numbers; a tenth: bins and smoothing.
        sizes = [np.abs(path.vertices).max(axis=0) for path in contours.get_paths()]
        np.testing.assert_allclose(sizes, [[2.0, 4.0], [1.0, 2.0]], rtol=0.1)

    def test_truths_are_marked(self, sampled):
        fig = drawn(plot.corner(sampled, [SIZE], truths={SIZE: [4.4, 9.0]}))
        axes = axes_of(fig)
        ax = axes[f"{SIZE}[1] {SIZE}[0]"]
        marks = [line for line in ax.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
        assert {tuple(line.get_xdata()) for line in marks} == {(4.4, 4.4), (0, 1)}
        # Also where no draw is.
        assert ax.get_ylim()[1] > 9.0

    def test_draws_that_never_move_can_be_shown(self):
        source = Source(CENTER, [10.0], ExponentialMorphology(4.0))
        posterior = as_posterior(as_result(source), {"sources.host.center": np.ones((8, 2))})
        assert len(drawn(plot.corner(posterior)).axes) == 3

    def test_errors(self, sampled):
        with pytest.raises(KeyError, match=r"No parameter matches 'sources\.hots'"):
            plot.corner(sampled, ["sources.hots"])
        with pytest.raises(KeyError, match=r"No draws of 'sources\.host\.center'"):
            plot.corner(sampled, ["sources.host.center"])
        with pytest.raises(ValueError, match=r"must have shape \(2,\); got \(\)"):
            plot.corner(sampled, truths={SIZE: 4.0})
        many = as_posterior(sampled.result, {"sources.host.center": np.zeros((4, 21))})
        with pytest.raises(ValueError, match="at most 20 numbers, not 21"):
            plot.corner(many)


class TestLinkCurves:
    def test_curve_and_points(self, sampled):
        fig = drawn(plot.link_curves(sampled, SIZE, truth={"g": 4.5}))
        ax = axes_of(fig)[SIZE]
        curve, *_ = ax.get_lines()
        expected = np.median(sampled.curve(SIZE, curve.get_xdata()), axis=0)
        np.testing.assert_allclose(curve.get_ydata(), expected)
        (points,) = ax.containers
        np.testing.assert_allclose(points[0].get_xdata(), list(BANDS.values()))
        np.testing.assert_allclose(points[0].get_ydata(), np.median(sampled.in_channels(SIZE), axis=0))
        (truth,) = [line for line in ax.get_lines() if line.get_marker() == "x"]
        assert truth.get_xydata().tolist() == [[BANDS["g"], 4.5]]
        assert ax.get_ylabel() == "host\nhalf_light_radius [pix]"
        assert ax.get_xlabel() == "wavelength [micron]"

    def test_values_in_every_band_have_no_curve(self, rng):
        shapes = link.PerBand({"g": ellipticity(0.6), "r": ellipticity(0.7)})
        # Two epochs of one band are one point.
        channels = (("g", 1), ("r", 1), ("g", 2))
        source = Source(CENTER, [1.0, 1.0, 1.0], ExponentialMorphology(4.0, shapes))
        draws = {SHAPE: np.stack([ellipticity(0.6), ellipticity(0.7)]) + rng.normal(0, 0.01, (50, 2, 2))}
        posterior = as_posterior(as_result(source, channels), draws)
        axes = axes_of(drawn(plot.link_curves(posterior, SHAPE)))
        assert list(axes) == [f"{SHAPE}[0]", f"{SHAPE}[1]"]
        last = axes[f"{SHAPE}[1]"]
        assert [label.get_text() for label in last.get_xticklabels()] == ["g", "r"]
        (points,) = last.containers
        np.testing.assert_allclose(points[0].get_ydata(), np.median(posterior[SHAPE][:, :, 1], axis=0))

    def test_errors(self, sampled):
        with pytest.raises(ValueError, match="isn't a linked parameter"):
            plot.link_curves(sampled, SHAPE)
        with pytest.raises(ValueError, match=r"bands \['g', 'r', 'i'\], not \['z'\]"):
            plot.link_curves(sampled, SIZE, truth={"z": 1.0})


def test_pyplot_knows_nothing_of_the_figures(sampled):
    plot.corner(sampled, SIZE)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
