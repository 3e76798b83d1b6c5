"""Figures hold the right panels, pixels and labels, and colors that keep the ratios of the data."""

import sys
from types import SimpleNamespace

import astropy.units as u
import equinox as eqx
import jax
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS
from matplotlib.collections import LineCollection

from scenefit.app import plot
from scenefit.app.color import MISSING, balanced_options, default_stretch
from scenefit.app.panels import round_length
from scenefit.data.correlated import CorrelatedNoise
from scenefit.data.observation import Observation
from scenefit.model.morphology import GaussianMorphology, PointMorphology
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import Frame, pixel_map
from scenefit.sky.psf import GaussianPSF, ImagePSF
from tests.correlations import CORRELATIONS

CENTER = SkyCoord(150.0, 2.0, unit="deg")


def make_wcs(shape, scale_arcsec, angle_deg=0.0):
    """Return a tangent plane around CENTER with north up and east left, turned by an angle."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [CENTER.ra.deg, CENTER.dec.deg]
    wcs.wcs.crpix = [(shape[1] + 1) / 2, (shape[0] + 1) / 2]
    c, s = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    wcs.wcs.cd = scale_arcsec / 3600 * np.array([[-c, s], [s, c]])
    wcs.wcs.set()
    return wcs


def make_observation(name, shape, scale, channels, *, angle=0.0, seed=0, psf_sigma=1.6, **options):
    """Return an observation of noise of standard deviation 0.5."""
    data = np.random.default_rng(seed).normal(0, 0.5, (len(channels), *shape))
    psf = GaussianPSF(np.full(len(channels), psf_sigma))
    wcs = make_wcs(shape, scale, angle)
    return Observation(data, sigma=0.5, psf=psf, wcs=wcs, channels=channels, name=name, **options)


@pytest.fixture(scope="module")
def field():
    """Return a scene and two observations of it, one turned by 20 degrees and displaced."""
    sharp = make_observation("sharp", (48, 60), 0.1, ["F814W"])
    mask = np.zeros((20, 24), bool)
    mask[:3, :4] = True
    deep = make_observation(
        "deep", (20, 24), 0.25, ["g", "r", "i"], angle=20, seed=1, mask=mask, background=[1.0, 2.0, 3.0]
    ).with_shift([0.2, -0.1])
    frame = Frame.from_observations([sharp, deep])
    flux = np.array([200.0, 50.0, 100.0, 200.0])
    middle = np.array(frame.center)
    nucleus = CompositeSource(
        {
            "bulge": Source(middle + np.array([4, 10]), flux, GaussianMorphology(2.0)),
            "point": Source(middle + np.array([6, 10]), flux / 4, PointMorphology()),
        }
    )
    blue = Source(middle - [5, 6], flux[::-1], GaussianMorphology(3.0))
    scene = Scene(frame, {"blue": blue, "no$de": nucleus})
    return scene, [sharp, deep]


def axes_of(fig):
    """Return the labelled axes of a figure."""
    return {ax.get_label(): ax for ax in fig.axes if ax.get_label() not in ("", "<colorbar>")}


def pixels(ax):
    """Return the one image of an axes, checking its orientation."""
    (image,) = ax.get_images()
    assert image.origin == "lower"
    assert ax.get_aspect() == 1
    return np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)


def scale_label(ax):
    """Return what is written at the color scale of an axes."""
    (bar,) = ax.child_axes
    return bar.get_ylabel()


def correlated(obs, scene):
    """Return noise of correlated neighbours, of uneven depth and larger than its weights say, and a scene seen through it."""
    rng = np.random.default_rng(4)
    weights = 4 * rng.uniform(0.3, 1.0, obs.shape)
    weights[:, 8:11, 9:12] = 0.0
    noise = CorrelatedNoise(weights, CORRELATIONS["hat"], scale=1.5)
    drawn = np.asarray(noise.sample(jax.random.key(3)), float)
    return noise, eqx.tree_at(lambda o: (o.noise, o.data), obs, (noise, obs.render(scene) + drawn))


def label_positions(ax):
    """Return the (x, y) to which each text of an axes is attached."""
    return {text.get_text(): text.xy for text in ax.texts if hasattr(text, "xy")}


def drawn(fig):
    """Draw a figure (which raises where anything can't be drawn) and return it."""
    fig.draw_without_rendering()
    return fig


class TestColors:
    def test_ratios_are_kept(self):
        rng = np.random.default_rng(3)
        image = 10 ** rng.uniform(-2, 4, (3, 20, 30))
        rgb = plot.asinh_rgb(image, noise=0.1)
        assert rgb.shape == (20, 30, 3)
        assert rgb.min() >= 0
        assert rgb.max() <= 1
        # Channels run from blue to red; nothing is rounded, so only floating point limits the agreement.
        np.testing.assert_allclose(rgb[..., 0] * image[0], rgb[..., 2] * image[2], rtol=1e-10)
        np.testing.assert_allclose(rgb[..., 1] * image[2], rgb[..., 0] * image[1], rtol=1e-10)

    def test_formula(self):
        image = np.array([[[0.3]], [[0.2]], [[0.1]]])
        rgb = plot.asinh_rgb(image, stretch=0.5, q=4.0)
        expected = image[::-1, 0, 0] / 0.2 * np.arcsinh(4 * 0.2 / 0.5) / 4
        np.testing.assert_allclose(rgb[0, 0], expected, rtol=1e-12)
        slope = plot.asinh_rgb(np.full((1, 1, 1), 1e-9), stretch=0.5, q=4.0)
        np.testing.assert_allclose(slope, 1e-9 / 0.5, rtol=1e-6)

    def test_brightness_grows_with_flux(self):
        flux = np.geomspace(1e-3, 1e3, 50)[None, None]
        grey = plot.asinh_rgb(flux, noise=0.1)[0, :, 0]
        assert (np.diff(grey) > 0).sum() >= 48  # the brightest pixel may be saturated
        assert grey[-1] == pytest.approx(1)

    @pytest.mark.parametrize("factor", [1e-20, 1e10])
    def test_scale_of_the_data_does_not_matter(self, factor):
        image = np.random.default_rng(0).normal(1, 1, (4, 9, 9))
        for options in ({}, {"noise": 0.3}, {"q": 5.0}):
            scaled = {**options, **({"noise": 0.3 * factor} if "noise" in options else {})}
            result = plot.asinh_rgb(image * factor, **scaled)
            np.testing.assert_allclose(result, plot.asinh_rgb(image, **options), rtol=1e-9)
        look, scaled = (
            balanced_options(image, noise=0.3),
            balanced_options(image * factor, noise=0.3 * factor),
        )
        np.testing.assert_allclose(look["channel_map"], scaled["channel_map"], rtol=1e-9)

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9])
    def test_channel_map(self, count):
        weights = plot.default_channel_map(count)
        assert weights.shape == (3, count)
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        assert (weights.sum(axis=0) > 0).all()
        mean = weights @ np.arange(count)
        assert (np.diff(mean) < 0).all() if count > 1 else (mean == 0).all()

    def test_wavelengths_order_known_bands(self):
        weights = plot.default_channel_map(3, ["F160W", "F435W", ("i", 3)])
        np.testing.assert_array_equal(weights, [[1, 0, 0], [0, 0, 1], [0, 1, 0]])
        unknown = plot.default_channel_map(3, ["z", "mystery", "g"])
        np.testing.assert_array_equal(unknown, plot.default_channel_map(3))

    def test_missing_pixels_are_grey(self):
        image = np.ones((3, 4, 4))
        image[1, 2, 3] = np.nan
        image[0] = np.nan  # a channel that is lacking altogether doesn't make everything grey
        rgb = plot.asinh_rgb(image, noise=0.1)
        np.testing.assert_array_equal(rgb[2, 3], MISSING)
        assert (rgb[0, 0] != MISSING).all()
        np.testing.assert_array_equal(plot.asinh_rgb(np.full((2, 3, 3), np.nan)), MISSING)

    def test_constant_image(self):
        assert np.isfinite(plot.asinh_rgb(np.zeros((2, 3, 3)))).all()
        assert np.isfinite(plot.asinh_rgb(np.ones((3, 3)))).all()

    def test_balance_makes_the_field_neutral(self):
        y, x = np.mgrid[:40, :40] - 20
        image = np.exp(-(y**2 + x**2) / 50) * np.array([1.0, 30.0, 400.0])[:, None, None]
        rgb = plot.asinh_rgb(image, **balanced_options(image, noise=[0.01, 0.01, 0.01]))
        # Balanced in total over bright pixels: here every pixel has the same color.
        np.testing.assert_allclose(rgb[20, 20], rgb[20, 20].mean(), rtol=1e-6)

    def test_a_channel_without_light_is_not_amplified(self):
        y, x = np.mgrid[:40, :40] - 20
        image = np.exp(-(y**2 + x**2) / 50) * np.array([0.0, 30.0, 30.0])[:, None, None]
        noisy = image + np.random.default_rng(0).normal(0, 0.1, image.shape)
        rgb = plot.asinh_rgb(noisy, **balanced_options(noisy, noise=0.1))
        light = image[1] > 3
        blue, green, red = rgb[light].T[::-1]
        # Its noise is at most a third of the mean light of the others; half of it is negative and thus black.
        assert blue.mean() < 0.2 * red.mean()
        np.testing.assert_allclose(green, red, atol=0.1)

    @pytest.mark.parametrize(
        ("image", "options", "message"),
        [
            (np.ones(4), {}, r"shape \(channel, y, x\) or \(y, x\); got \(4,\)"),
            (np.ones((2, 3, 3)), {"channels": ["a"]}, "2 channel.* as many names"),
            (np.ones((2, 3, 3)), {"channel_map": np.ones((2, 3))}, r"shape \(3, 2\)"),
            (np.ones((2, 3, 3)), {"noise": [1.0, 2.0, 3.0]}, "one per channel"),
            (np.ones((2, 3, 3)), {"noise": -1.0}, ">= 0"),
            (np.ones((2, 3, 3)), {"stretch": -1.0}, "positive"),
            (np.ones((2, 3, 3)), {"stretch": 1.0, "q": 0.0}, "positive"),
        ],
    )
    def test_bad_input(self, image, options, message):
        with pytest.raises(ValueError, match=message):
            plot.asinh_rgb(image, **options)

    def test_given_stretch_and_q_are_used(self):
        image = np.ones((1, 2, 2))
        assert default_stretch(image, np.ones((3, 1)), np.array([0.1]), 3.0, 2.0) == (3.0, 2.0)
        assert default_stretch(image, np.ones((3, 1)), np.array([0.1]), None, 2.0)[1] == 2.0
        assert default_stretch(image, np.ones((3, 1)), np.array([0.1]), 3.0, None)[0] == 3.0


class TestObservation:
    def test_panels_and_marks(self, field):
        _, (_, deep) = field
        positions = deep.wcs.pixel_to_world([3.0, 20.0, 500.0], [4.0, 15.0, 0.0])
        axes = axes_of(drawn(plot.observation(deep, catalog=positions)))
        assert list(axes) == ["deep data", "deep PSF g", "deep PSF r", "deep PSF i"]
        rgb = pixels(axes["deep data"])
        assert rgb.shape == (20, 24, 3)
        np.testing.assert_array_equal(rgb[1, 2], MISSING)
        labels = label_positions(axes["deep data"])
        np.testing.assert_allclose(labels["0"], (3, 4), atol=1e-6)
        np.testing.assert_allclose(labels["1"], (20, 15), atol=1e-6)
        assert "2" not in labels  # outside the image
        assert axes["deep data"].get_xlim() == (-0.5, 23.5)

    def test_compass_and_scale_bar(self, field):
        _, (sharp, _) = field
        ax = axes_of(plot.observation(sharp))["sharp data"]
        arrows = [text for text in ax.texts if text.get_text() == ""]
        names = {text.get_text(): text.get_position() for text in ax.texts}
        origin = np.array(arrows[0].get_position())
        assert (np.array(names["N"]) - origin)[1] > 1  # north is up and east to the left on this image
        assert (np.array(names["E"]) - origin)[0] < -1
        assert abs((np.array(names["N"]) - origin)[0]) < 1e-3
        bars = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
        assert np.ptp(bars[0]) * 0.1 == pytest.approx(1.0)  # of a field 6 arcsec wide
        assert '1"' in names

    def test_psf_is_the_recentered_image(self):
        y, x = np.mgrid[:11, :11]
        image = np.exp(-((y - 5.0) ** 2 + (x - 5.0) ** 2) / (2 * 0.9**2))
        obs = Observation(np.zeros((16, 16)), sigma=1.0, psf=ImagePSF(image), channels=["a"], name="o")
        shown = pixels(axes_of(plot.observation(obs))["o PSF a"])
        edge = (11 - shown.shape[0]) // 2
        expected = image[edge : 11 - edge, edge : 11 - edge]
        np.testing.assert_allclose(shown, expected / expected.max(), atol=1e-6)

    @pytest.mark.parametrize("sigma", [0.6, 2.0])
    def test_analytic_psf(self, sigma):
        obs = Observation(np.zeros((2, 16, 16)), sigma=1.0, psf=GaussianPSF(sigma), channels=["a", "b"], name="o")
        axes = axes_of(drawn(plot.observation(obs)))
        shown = pixels(axes["o PSF all channels"])
        half = shown.shape[0] // 2
        y, x = np.mgrid[-half : half + 1, -half : half + 1]
        # The transfer function is cut where it falls to 1e-8, and the stamp where the PSF falls to 1e-4.
        np.testing.assert_allclose(shown, np.exp(-(y**2 + x**2) / (2 * sigma**2)), atol=2e-4)
        assert not axes["o data"].texts  # neither scale bar nor compass without a WCS

    def test_bad_input(self, field):
        _, (sharp, _) = field
        with pytest.raises(TypeError, match="Expected an Observation; got ndarray"):
            plot.observation(sharp.data)
        with pytest.raises(TypeError, match="SkyCoord"):
            plot.observation(sharp, catalog=[(1.0, 2.0)])
        pixels_only = Observation(np.ones((9, 9)), sigma=1.0, psf=GaussianPSF(1.0), channels=["a"])
        with pytest.raises(ValueError, match="no WCS"):
            plot.observation(pixels_only, catalog=CENTER)


class TestScene:
    def test_panels(self, field):
        scene, observations = field
        axes = axes_of(drawn(plot.scene(scene, observations)))
        rows = [f"{name} {what}" for name in ("sharp", "deep") for what in ("observed", "rendered", "residual")]
        assert list(axes) == ["model", *rows]
        assert pixels(axes["model"]).shape == (*scene.frame.box.shape, 3)
        assert pixels(axes["deep rendered"]).shape == (20, 24, 3)

    def test_residual_is_in_units_of_sigma(self, field):
        scene, observations = field
        axes = axes_of(plot.scene(scene, observations))
        matched = [obs.match(scene.frame) for obs in observations]
        chi = [np.sqrt(np.asarray(obs.noise.weights)) * obs.residual(scene) for obs in matched]
        # Rendering and whitening run in single precision where the tests do.
        np.testing.assert_allclose(pixels(axes["sharp residual"]), chi[0][0], atol=1e-3)
        shown = pixels(axes["deep residual"])
        assert np.isnan(shown[:3, :4]).all()
        valid = np.isfinite(shown)
        assert valid.sum() == 20 * 24 - 12
        np.testing.assert_allclose(shown[valid], (chi[1].sum(axis=0) / np.sqrt(3))[valid], atol=1e-3)
        chi_square = matched[1].chi_square(scene).sum() / matched[1].noise.valid.sum()
        assert f"χ²/pixel {chi_square:.2f}" in axes["deep residual"].get_title()
        norm = axes["deep residual"].get_images()[0].norm
        assert norm.vmin == -norm.vmax

    def test_residual_of_white_noise_is_the_whitened_one(self, field):
        scene, (sharp, _) = field
        sharp = eqx.tree_at(lambda o: o.noise.scale, sharp.match(scene.frame), np.array([1.4]))
        ax = axes_of(plot.scene(scene, sharp))["sharp residual"]
        level = sharp.noise.level()
        residual = (sharp.data - sharp.render(scene)) / level
        np.testing.assert_array_equal(pixels(ax), np.asarray(sharp.noise.scaled(level).whiten(residual))[0])
        assert scale_label(ax) == "residual / σ"

    def test_residual_of_correlated_noise_is_in_units_of_the_sigma_of_each_pixel(self, field):
        """A map of whitened pixels would show in which order they were whitened."""
        scene, (sharp, _) = field
        noise, obs = correlated(sharp.match(scene.frame), scene)
        ax = axes_of(drawn(plot.scene(scene, obs)))["sharp residual"]
        shown, used = pixels(ax), np.asarray(noise.weights)[0] > 0
        sigma = 1.5 / np.sqrt(np.asarray(noise.weights)[0][used])
        assert np.isnan(shown[~used]).all()
        # 1e-5 of the largest, about 4: single precision.
        np.testing.assert_allclose(shown[used], (obs.data - obs.render(scene))[0][used] / sigma, atol=4e-5)
        assert scale_label(ax) == "residual / σ (pixels correlated)"
        # Neighbours are correlated as the noise is; 0.06: four times the scatter of 2800 pairs by Bartlett's formula.
        pairs = used[:, 1:] & used[:, :-1]
        found = np.mean((shown[:, 1:] * shown[:, :-1])[pairs]) / np.mean(shown[used] ** 2)
        assert found == pytest.approx(CORRELATIONS["hat"][2, 3], abs=0.06)
        # The number is that of independent ones.
        expected = float(obs.chi_square(scene)[0] / noise.num_modes()[0])
        assert f"χ²/pixel {expected:.2f}" in ax.get_title()

    def test_chi_square_of_correlated_noise_inside_the_frame(self, field):
        """That of the pixels on the frame by the inverse of their covariance; what lies outside isn't known to be 0."""
        _, (_, deep) = field
        frame = Frame((13, 60), channels=deep.channels, wcs=make_wcs((13, 60), 0.25, 20), padding=8)
        scene = Scene(frame, {"a": Source(frame.center, np.ones(3), GaussianMorphology(1.0))})
        noise, obs = correlated(deep.match(frame), scene)
        fig = plot.scene(scene, obs, channel="r")
        ax = axes_of(fig)["deep residual"]
        inside = np.zeros((20, 24), bool)
        inside[obs.renderer.window.slices] = obs.renderer.inside
        used = inside & (np.asarray(noise.weights)[1] > 0)
        assert 100 < used.sum() < 0.8 * inside.size
        np.testing.assert_array_equal(np.isfinite(pixels(ax)), used)
        y, x = np.nonzero(used)
        lags = y[:, None] - y, x[:, None] - x
        near = (np.abs(lags[0]) <= 2) & (np.abs(lags[1]) <= 2)
        matrix = np.where(near, CORRELATIONS["hat"][tuple(np.clip(lag + 2, 0, 4) for lag in lags)], 0.0)
        scaled = (obs.data - obs.render(scene))[1][used] * np.sqrt(np.asarray(noise.weights)[1][used]) / 1.5
        expected = scaled @ np.linalg.solve(matrix, scaled) / used.sum()
        found = float(ax.get_title().partition("χ²/pixel ")[2])
        # 0.006: written with two digits, and single precision.
        assert found == pytest.approx(expected, abs=0.006)
        # Not the mean square of what is shown, which scatters by more.
        assert abs(np.mean(scaled**2) - expected) > 0.02

    def test_single_channel(self, field):
        scene, observations = field
        axes = axes_of(plot.scene(scene, observations, channel="r"))
        deep = observations[1].match(scene.frame)
        shown = pixels(axes["deep residual"])
        valid = np.isfinite(shown)
        np.testing.assert_allclose(shown[valid], (deep.residual(scene)[1] / 0.5)[valid], atol=1e-3)
        assert axes["deep residual"].get_title().startswith("residual r,")
        assert axes["sharp residual"].get_title().startswith("residual,")

    def test_labels_and_boxes(self, field):
        scene, observations = field
        axes = axes_of(plot.scene(scene, observations))
        center = np.asarray(scene.sources["blue"].center)
        assert label_positions(axes["model"])["blue"] == pytest.approx(tuple(center[::-1]))
        # In the displaced image the source appears 0.2 arcsec to the east and 0.1 to the south.
        sky = scene.frame.to_sky(center)
        seen = sky.spherical_offsets_by(0.2 * u.arcsec, -0.1 * u.arcsec)
        expected = observations[1].wcs.world_to_pixel(seen)
        np.testing.assert_allclose(label_positions(axes["deep observed"])["blue"], expected, atol=1e-4)
        (outlines,) = [c for c in axes["model"].collections if isinstance(c, LineCollection)]
        assert len(outlines.get_segments()) == 3  # one for each component
        first = outlines.get_segments()[0]
        np.testing.assert_allclose(first[:4].mean(axis=0), center[::-1], atol=0.51)  # whole pixels
        (turned,) = [c for c in axes["sharp observed"].collections if isinstance(c, LineCollection)]
        expected = pixel_map(scene.frame.wcs, observations[0].wcs, first[:, 1], first[:, 0])
        np.testing.assert_allclose(turned.get_segments()[0], expected[:, ::-1], atol=1e-6)

    def test_without_labels_and_boxes(self, field):
        scene, observations = field
        axes = axes_of(plot.scene(scene, observations[0], labels=False, boxes=False))
        assert list(axes) == ["model", "sharp observed", "sharp rendered", "sharp residual"]
        assert "blue" not in label_positions(axes["model"])
        assert not axes["sharp observed"].collections

    def test_observed_and_rendered_share_the_stretch(self, field):
        scene, observations = field
        deep = observations[1].match(scene.frame)
        perfect = Observation(
            deep.render(scene), sigma=0.5, psf=deep.psf, wcs=deep.wcs, channels=deep.channels, name="deep",
            background=deep.background, astrometry=deep.astrometry,
        )  # fmt: skip
        axes = axes_of(plot.scene(scene, perfect))
        # Up to the precision of rendering twice.
        np.testing.assert_allclose(pixels(axes["deep observed"]), pixels(axes["deep rendered"]), atol=1e-4)

    def test_pixels_outside_the_frame_do_not_count(self, field):
        _, observations = field
        frame = Frame.from_observations(observations, coverage="intersection")
        source = Source(frame.center, np.ones(4), GaussianMorphology(1.0))
        axes = axes_of(drawn(plot.scene(Scene(frame, {"a": source}), observations)))
        deep = observations[1].match(frame)
        assert np.isfinite(pixels(axes["deep residual"])).sum() < deep.noise.valid[0].sum()
        np.testing.assert_array_equal(pixels(axes["deep rendered"])[0, 0], MISSING)

    def test_channel_without_information(self, field):
        scene, observations = field
        deep = observations[1]
        mask = np.zeros(deep.shape, bool)
        mask[1] = True
        dead = Observation(
            deep.data, sigma=0.5, psf=deep.psf, wcs=deep.wcs, channels=deep.channels, name="deep", mask=mask
        )
        axes = axes_of(drawn(plot.scene(scene, dead)))
        assert np.isfinite(pixels(axes["deep residual"])).all()
        assert "r\xa0–" in axes["deep residual"].get_xlabel()

    @pytest.mark.parametrize("factor", [1e-20, 1e10])
    def test_units_do_not_matter(self, field, factor):
        _, observations = field
        deep = observations[1]
        shown = []
        for unit in (1.0, factor):
            obs = Observation(
                deep.data * unit,
                sigma=0.5 * unit,
                psf=deep.psf,
                wcs=deep.wcs,
                channels=deep.channels,
                name="o",
            )
            flux = np.array([50.0, 100.0, 200.0]) * unit
            frame = Frame.from_observations([obs])
            axes = axes_of(plot.scene(Scene(frame, [Source(frame.center, flux, GaussianMorphology(2.0))]), obs))
            shown.append([pixels(axes[label]) for label in ("model", "o observed", "o residual")])
        for one, other in zip(*shown, strict=True):
            np.testing.assert_allclose(other, one, atol=1e-3)  # single precision of the rendering

    def test_bad_input(self, field):
        scene, observations = field
        with pytest.raises(ValueError, match="at least one"):
            plot.scene(scene, [])
        with pytest.raises(TypeError, match="Expected an Observation; got str"):
            plot.scene(scene, ["sharp"])
        with pytest.raises(ValueError, match=r"No observation has a channel 'u'; there are \['F814W', 'g', 'i', 'r'\]"):
            plot.scene(scene, observations, channel="u")


class TestSources:
    def test_panels(self, field):
        scene, observations = field
        axes = axes_of(drawn(plot.sources(scene, observations)))
        panels = [f"{o} {what}" for o in ("sharp", "deep") for what in ("rendered", "data - others")]
        assert list(axes) == [f"{name} {column}" for name in scene.sources for column in ("model", *panels)]
        assert [ax.get_ylabel() for label, ax in axes.items() if label.endswith("model")] == ["blue", "no$de"]

    def test_data_minus_others_is_the_source_where_the_model_is_right(self, field):
        scene, observations = field
        sharp = observations[0].match(scene.frame)
        perfect = Observation(
            sharp.render(scene),
            sigma=0.5,
            psf=sharp.psf,
            wcs=sharp.wcs,
            channels=sharp.channels,
            name="sharp",
        )
        axes = axes_of(plot.sources(scene, perfect, names=["no$de"]))
        assert list(axes) == ["no$de model", "no$de sharp rendered", "no$de sharp data - others"]
        alone, rest = (pixels(axes[f"no$de sharp {what}"]) for what in ("rendered", "data - others"))
        np.testing.assert_allclose(rest, alone, atol=1e-3)  # single precision of the rendering
        assert alone.max() > 0.5

    def test_shows_the_stamp(self, field):
        scene, observations = field
        ax = axes_of(plot.sources(scene, observations, names=["blue"]))["blue sharp rendered"]
        center = pixel_map(scene.frame.wcs, observations[0].wcs, *scene.sources["blue"].center)
        rgb, (x0, x1, y0, y1) = pixels(ax), ax.get_images()[0].get_extent()
        assert rgb.shape[:2] == (y1 - y0, x1 - x0)
        peak = np.array(np.unravel_index(rgb[..., 0].argmax(), rgb.shape[:2])) + np.array([y0, x0]) + 0.5
        np.testing.assert_allclose(peak, center, atol=1)

    def test_first_twenty(self, field):
        scene, observations = field
        many = Scene(scene.frame, [scene.sources["blue"]] * 23)
        axes = axes_of(plot.sources(many, observations[0]))
        assert len(axes) == 20 * 3

    def test_bad_input(self, field):
        scene, observations = field
        with pytest.raises(KeyError, match="no source"):
            plot.sources(scene, observations, names=["red"])
        with pytest.raises(ValueError, match="no source to show"):
            plot.sources(scene, observations, names=[])
        lost = scene.with_sources(lost=Source((-99.0, 0.0), np.ones(4), PointMorphology()))
        with pytest.raises(ValueError, match="lost"):
            plot.sources(lost, observations)


class TestConvergence:
    def test_panels(self):
        history = {
            "loss": np.array([100.0, 10.0, 1.0, 2.0]),
            "step": np.array([0, 10, 20, 30]),
            "seconds": np.array([0.1, 0.2, 0.3, 0.4]),
            "projected_gradient": np.array([5.0, 3.0, 1.0, 0.0]),
        }
        axes = axes_of(drawn(plot.convergence(SimpleNamespace(history=history))))
        assert list(axes) == ["loss by step", "loss by seconds", "projected gradient"]
        assert all(ax.get_yscale() == "log" for ax in axes.values())
        x, y = axes["loss by step"].lines[0].get_data()
        np.testing.assert_array_equal(x, history["step"])
        np.testing.assert_array_equal(y, [99, 9, np.nan, 1])
        np.testing.assert_array_equal(axes["loss by seconds"].lines[0].get_xdata(), history["seconds"])
        np.testing.assert_array_equal(axes["projected gradient"].lines[0].get_ydata(), [5, 3, 1, np.nan])

    def test_loss_alone(self):
        axes = axes_of(drawn(plot.convergence(SimpleNamespace(history={"loss": [3.0, 2.0]}))))
        assert list(axes) == ["loss by step"]

    def test_constant_loss(self):
        axes = axes_of(drawn(plot.convergence(SimpleNamespace(history={"loss": [2.0]}))))
        assert axes["loss by step"].get_yscale() == "linear"

    def test_bad_input(self):
        with pytest.raises(ValueError, match="no 'loss'"):
            plot.convergence(SimpleNamespace(history={"step": [1.0]}))
        with pytest.raises(ValueError, match="equally long"):
            plot.convergence(SimpleNamespace(history={"loss": [1.0, 2.0], "step": [1.0]}))


def test_figures_leave_pyplot_alone_and_show_themselves():
    fig = plot.convergence(SimpleNamespace(history={"loss": [3.0, 2.0]}))
    assert fig._repr_png_().startswith(b"\x89PNG")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize(("length", "expected"), [(1.0, 1.0), (0.9, 0.5), (4.9, 2.0), (60.0, 50.0), (0.031, 0.02)])
def test_round_length(length, expected):
    assert round_length(length) == pytest.approx(expected)
