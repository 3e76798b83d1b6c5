"""Injection against images drawn from the analytic formula, and recovery with a least-squares measurement."""

from __future__ import annotations

import astropy.units as u
import equinox as eqx
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.table import QTable, Table, vstack

from scenefit.data.correlated import CorrelatedNoise
from scenefit.data.noise import PoissonNoise, WhiteNoise
from scenefit.data.nuisances import Astrometry, Calibration
from scenefit.data.observation import Observation
from scenefit.model.morphology import GaussianMorphology, PointMorphology
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.inject import inject, recover, truth_table
from tests import blends
from tests.correlations import CORRELATIONS
from tests.helpers import gaussian_image, tangent_wcs

SHAPE, SCALE, PSF_SIGMA, SIGMA = (120, 120), 0.2, 1.5, 2.0
"""Pixels, arcsec a pixel, and noise of the images of isolated sources, in nJy."""
SOURCE_SIGMA = 1.8
"""Standard deviation of an isolated source in pixels, before the PSF."""
WCS = tangent_wcs(SHAPE, SCALE)
FRAME = Frame(SHAPE, channels=("g",), wcs=WCS)


def fluxes_of(table, name="flux_g"):
    return np.asarray(table[name].to_value(u.nJy))


def noisy(data=None, **options) -> Observation:
    """Return an image of noise, or the data given."""
    data = SIGMA * np.random.default_rng(8).normal(size=(1, *SHAPE)) if data is None else data
    options = options if "noise" in options else {"sigma": SIGMA} | options
    return Observation(
        data, psf=GaussianPSF(PSF_SIGMA), wcs=WCS, channels=("g",), name="image", zeropoint=31.4, **options
    )


def isolated(centers, fluxes) -> Scene:
    """Return round Gaussians."""
    radius = SOURCE_SIGMA * np.sqrt(2 * np.log(2))
    sources = [Source(c, np.array([f]), GaussianMorphology(radius)) for c, f in zip(centers, fluxes, strict=True)]
    return Scene(FRAME, sources)


class Pipeline:
    """Draws nine sources far from one another, and measures them by least squares around where they were drawn."""

    def __init__(self, lost=()):
        self.centers, self.lost, self.calls = np.zeros((0, 2)), lost, 0

    def draw(self, rng) -> Scene:
        grid = np.stack(np.meshgrid([20, 60, 100], [20, 60, 100], indexing="ij"), axis=-1).reshape(-1, 2)
        self.centers = grid + rng.uniform(-8, 8, grid.shape)
        return isolated(self.centers, 10 ** rng.uniform(2.2, 3.2, 9))

    def measure(self, observations) -> QTable:
        (obs,) = observations
        step, table = 1e-3, QTable()
        values, errors = [], []
        for center in self.centers:
            # Flux and displacement are linear in the image near the truth; pixels are those of the analytic profile.
            planes = [gaussian_image(SHAPE, center + d, np.hypot(SOURCE_SIGMA, PSF_SIGMA)) for d in offsets(step)]
            along = [(planes[1] - planes[2]) / (2 * step), (planes[3] - planes[4]) / (2 * step)]
            design = np.stack([planes[0], *along]).reshape(3, -1) / SIGMA
            covariance = np.linalg.inv(design @ design.T)
            solution = covariance @ design @ (obs.data[0].ravel() / SIGMA)
            flux, shift = solution[0], solution[1:] / solution[0]
            values.append([flux, *(center + shift)])
            errors.append(np.sqrt(np.diag(covariance)) / [1, flux, flux])
        values, errors = np.array(values), np.array(errors)
        sky = FRAME.to_sky(values[:, 1:])
        table["ra"], table["dec"] = sky.ra, sky.dec
        table["flux_g"], table["flux_err_g"] = values[:, 0] * u.nJy, errors[:, 0] * u.nJy
        # North is up and east is left: declination follows y, right ascension x.
        table["dec_err"], table["ra_err"] = (errors[:, n] * SCALE * u.arcsec for n in (1, 2))
        self.calls += 1
        return table[:0] if self.calls - 1 in self.lost else table


def offsets(step):
    """Return no displacement, and those along y and x by a step."""
    return np.array([[0, 0], [step, 0], [-step, 0], [0, step], [0, -step]])


@pytest.fixture(scope="module")
def injected():
    """Two instruments, one turned, displaced, of four times the brightness scale, with galaxies in empty images."""
    empty = blends.observe({}, noise=False, zeropoint=31.4, background=2.0)
    empty[1] = eqx.tree_at(
        lambda o: (o.astrometry, o.calibration, o.background),
        empty[1],
        (Astrometry(blends.DISPLACEMENT), Calibration(np.full(2, 4.0), np.zeros(2)), np.full(2, 2.0)),
    )
    scene = blends.true_scene(blends.frame_of(empty))
    return empty, scene, *inject(empty, scene)


@pytest.fixture(scope="module")
def twenty():
    pipeline = Pipeline()
    return recover(noisy(), pipeline.draw, pipeline.measure, trials=20, seed=4, progress=False)


class TestInject:
    def test_light_is_that_of_the_formula(self, injected):
        before, _, after, _ = injected
        for old, new, name in zip(before, after, ("fine", "coarse"), strict=True):
            for plane, channel in zip(new.data - old.data, blends.CHANNELS[name], strict=True):
                options = (blends.FINE_SHAPE, blends.FINE_SCALE, blends.FINE_PSF)
                if name == "coarse":
                    geometry = blends.COARSE_SHAPE, blends.COARSE_SCALE, blends.COARSE_PSF
                    options = (*geometry, blends.COARSE_ROTATION, blends.DISPLACEMENT)
                expected = sum(blends.draw(g, channel, *options) for g in blends.GALAXIES.values())
                expected = expected * (4.0 if name == "coarse" else 1.0)
                inside = blends_inside(new, injected[1].frame)
                # Rendering in single precision, sampled Gaussians: 5e-5 of the peak in the tests of the renderer.
                np.testing.assert_allclose(plane[inside], expected[inside], atol=1e-4 * expected.max())

    def test_inputs_are_not_changed(self, injected):
        before, scene, after, _ = injected
        for old, new in zip(before, after, strict=True):
            # An empty image has nothing but its background.
            np.testing.assert_array_equal(old.data, 0.0 if old.name == "fine" else 2.0)
            assert old.renderer is None
            assert new.renderer is None
            assert new.data is not old.data
            np.testing.assert_array_equal(new.noise.weights, old.noise.weights)
        matched = [obs.match(scene.frame) for obs in before]
        again, _ = inject(matched, scene)
        assert all(new.renderer is not None for new in again)
        np.testing.assert_array_equal(again[0].data, after[0].data)

    def test_truth_table(self, injected):
        _, scene, _, truth = injected
        assert list(truth["id"]) == list(blends.GALAXIES)
        for row, galaxy in zip(truth, blends.GALAXIES.values(), strict=True):
            for channel, flux in galaxy.flux.items():
                assert row[f"flux_{channel}"] == flux * u.nJy
                assert row[f"mag_{channel}"].to_value(u.mag) == pytest.approx(31.4 - 2.5 * np.log10(flux))
        center = SkyCoord(truth["ra"], truth["dec"])
        expected = [blends.on_frame(scene.frame, galaxy) for galaxy in blends.GALAXIES.values()]
        np.testing.assert_allclose(scene.frame.to_pixel(center), expected, atol=1e-6)
        # Half of the light of a Gaussian of unequal axes, by quadrature over angle: that of a round one is known.
        for row, galaxy in zip(truth, blends.GALAXIES.values(), strict=True):
            variances = np.linalg.eigvalsh(galaxy.moments)
            radius = row["half_light_radius"].to_value(u.arcsec)
            angle = 2 * np.pi * (np.arange(400) + 0.5) / 400
            along = np.cos(angle) ** 2 / variances[0] + np.sin(angle) ** 2 / variances[1]
            inside = np.mean((1 - np.exp(-0.5 * along * radius**2)) / along) / np.sqrt(np.prod(variances))
            # Radii are good to 1e-4, at which the light inside falls off as fast as the radius.
            assert inside == pytest.approx(0.5, abs=1e-3)

    def test_flux_and_first_moments(self):
        center = np.array([61.23, 57.81])
        (obs,), _ = inject(noisy(np.zeros((1, *SHAPE))), isolated([center], [5e4]))
        image = obs.data[0]
        y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
        # All of a source that is 25 standard deviations from every edge, but for rounding.
        assert image.sum() == pytest.approx(5e4, rel=1e-4)
        np.testing.assert_allclose([(y * image).sum(), (x * image).sum()] / image.sum(), center, atol=1e-3)

    def test_masked_pixels_and_points(self):
        mask = np.zeros(SHAPE, bool)
        mask[59:62, 59:62] = True
        star = Source((60.0, 60.0), np.array([100.0]), PointMorphology())
        pair = CompositeSource({"a": star, "b": Source((60.0, 60.0), np.array([50.0]), PointMorphology())})
        (obs,), truth = inject(noisy(np.zeros((1, *SHAPE)), mask=mask), Scene(FRAME, {"star": star, "pair": pair}))
        np.testing.assert_array_equal(obs.data[0][mask], 0)
        assert (obs.data[0][~mask] > 0.1).any()
        np.testing.assert_array_equal(fluxes_of(truth), [100, 150])
        np.testing.assert_array_equal(truth["half_light_radius"], 0)

    def test_photon_noise(self):
        # Half a count per data unit, in a unit of 10 nJy, and weights that are half as large as they should be.
        scene = isolated([[60.0, 60.0]], [4e5])
        obs = Observation(
            np.zeros((1, *SHAPE)),
            noise=WhiteNoise(np.full((1, *SHAPE), 2.0), scale=np.sqrt(2.0)),
            psf=GaussianPSF(PSF_SIGMA),
            wcs=WCS,
            channels=("g",),
            name="image",
            zeropoint=28.9,
        )
        (mean,), _ = inject(obs, scene)
        (new,), _ = inject(obs, scene, gain=0.5, seed=3)
        light = mean.data[0]
        variance = light * 10 / 0.5
        np.testing.assert_allclose(2 / np.asarray(new.noise.weights[0]), 100 + np.clip(variance, 0, None), rtol=1e-5)
        bright = light > 600
        pull = (new.data[0] - light)[bright] / np.sqrt(variance[bright])
        # 30 counts or more a pixel, normal but for a few percent.
        assert bright.sum() > 100
        assert pull.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * bright.sum()))
        counts = new.data[0] / 10 * 0.5
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-6)
        (again,), _ = inject(obs, scene, gain={"image": 0.5}, seed=3)
        np.testing.assert_array_equal(again.data, new.data)
        (other,), _ = inject(obs, scene, gain=0.5, seed=4)
        assert (other.data != new.data).any()

    def test_counts_stay_counts(self):
        counts = np.random.default_rng(1).poisson(30.0, (1, *SHAPE)).astype(float)
        obs = noisy(counts / 2, noise=PoissonNoise(counts, 2.0), background=15.0)
        (new,), _ = inject(obs, isolated([[60.0, 60.0]], [1e4]), seed=1)
        np.testing.assert_allclose(new.noise.counts, 2 * new.data, atol=1e-9)
        added = 2 * (new.data - obs.data)
        assert (added >= 0).all()
        # Poisson: 2e4 counts, plus or minus 141.
        assert added.sum() == pytest.approx(2e4, abs=5 * 141)

    @pytest.mark.usefixtures("as_users_have_it")
    def test_errors(self):
        obs, scene = noisy(), isolated([[60.0, 60.0]], [1.0])
        with pytest.raises(TypeError, match="injected is a Scene, on a Frame; got a dict"):
            inject(obs, {})
        with pytest.raises(TypeError, match="injected into Observations; got a ndarray"):
            inject([obs.data], scene)
        with pytest.raises(ValueError, match="no observation to inject"):
            inject([], scene)
        with pytest.raises(ValueError, match=r"must lie on the scene's frame of \(120, 120\) pixels; sources.0 is at"):
            inject(obs, isolated([[60.0, 130.0]], [1.0]))
        with pytest.raises(ValueError, match=r"no observation is named \['HST'\]; there are \['image'\]"):
            inject(obs, scene, gain={"HST": 1.0})
        with pytest.raises(ValueError, match="image: the gain is one positive number, counts per data unit; got -1"):
            inject(obs, scene, gain=-1)
        correlated = obs.with_noise(CorrelatedNoise(obs.noise.weights, CORRELATIONS["hat"]))
        with pytest.raises(ValueError, match="image: photon noise is added to independent Gaussian noise only"):
            inject(correlated, scene, gain=1.0)


def blends_inside(obs, frame):
    """Return the pixels on the frame."""
    renderer = obs.match(frame).renderer
    inside = np.zeros(obs.shape[1:], bool)
    inside[renderer.window.slices] = renderer.inside
    return inside


class TestRecover:
    def test_pulls_have_unit_width(self, twenty):
        assert twenty.completeness == 1.0
        assert twenty.purity == 1.0
        assert len(twenty.pairs) == 180
        for name in ("mag_g", "ra", "dec"):
            pull = np.asarray(twenty.pairs[f"pull_{name}"])
            # Footprints of 180 sources overlap in one noise map, so that there are fewer independent ones: four standard
            # errors of half as many.
            assert pull.std() == pytest.approx(1.0, abs=4 / np.sqrt(180)), name
            assert pull.mean() == pytest.approx(0.0, abs=4 / np.sqrt(90)), name

    def test_numbering(self, twenty):
        np.testing.assert_array_equal(np.bincount(twenty.pairs["trial"]), 9)
        for name in ("catalog_row", "truth_row"):
            np.testing.assert_array_equal(np.sort(twenty.pairs[name]), np.arange(180))
        np.testing.assert_array_equal(
            twenty.detections["catalog_row"][twenty.pairs["truth_row"]], twenty.pairs["catalog_row"]
        )
        np.testing.assert_array_equal(
            twenty.entries["truth_row"][twenty.pairs["catalog_row"]], twenty.pairs["truth_row"]
        )
        assert twenty.summary()["num_matched"] == 180

    def test_trials_are_reproducible(self, twenty):
        pipeline = Pipeline()
        three = recover(noisy(), pipeline.draw, pipeline.measure, trials=3, seed=4, progress=False)
        for name in ("residual_mag_g", "pull_ra"):
            np.testing.assert_array_equal(three.pairs[name], twenty.pairs[name][:27])

    def test_what_is_lost_counts(self):
        pipeline = Pipeline(lost=(0, 2))
        result = recover(noisy(), pipeline.draw, pipeline.measure, trials=4, progress=False)
        assert result.completeness == 0.5
        np.testing.assert_array_equal(np.unique(result.pairs["trial"]), [1, 3])
        np.testing.assert_array_equal(result.detections["catalog_row"][18:27], -1)
        np.testing.assert_array_equal(result.detections["catalog_row"][27:], np.arange(9, 18))

    def test_all_lost(self):
        pipeline = Pipeline()
        result = recover(noisy(), pipeline.draw, lambda observations: Table(), trials=2, progress=False)
        assert result.completeness == 0.0
        assert len(result.pairs) == 0
        assert len(result.detections) == 18

    def test_existing_sources_are_left_out(self):
        """A real source of the image is neither found nor false, also where an injected one lies beside it."""
        pipeline = Pipeline()
        there = FRAME.to_sky(np.array([[40.0, 40.0], [80.0, 80.0]]))
        real = QTable({"ra": there.ra, "dec": there.dec, "flux_g": [300.0, 500.0] * u.nJy})

        def draw(rng):
            scene = pipeline.draw(rng)
            # Within the matching radius of a real source, and of its brightness.
            beside = Source((40.0, 41.0), np.array([250.0]), GaussianMorphology(2.0))
            pipeline.centers = np.concatenate([pipeline.centers, [[40.0, 41.0]]])
            return scene.with_sources(beside=beside)

        def measure(observations):
            found = pipeline.measure(observations)["ra", "dec", "flux_g"]
            return vstack([found[:-1], real]) if pipeline.calls % 2 else vstack([found, real])

        options = {"trials": 2, "progress": False, "radius": 0.5 * u.arcsec}
        without = recover(noisy(), draw, measure, **options)
        assert without.purity == pytest.approx((10 + 10) / (11 + 12))
        result = recover(noisy(), draw, measure, existing=real, **options)
        assert result.purity == 1.0
        # The two real ones are 8 arcsec from one another: sources within 3 arcsec of either.
        wide = recover(noisy(), draw, measure, existing=real, isolation=3 * u.arcsec, **options)
        centers = FRAME.to_pixel(SkyCoord(real["ra"], real["dec"]))
        assert not np.any(recover(noisy(), draw, measure, **options).pairs["blended"])
        assert 0 < np.sum(wide.pairs["blended"]) < len(wide.pairs)
        assert len(centers) == 2
        # The source beside the real one is missed where there is one row for both.
        assert result.completeness == 0.95

    @pytest.mark.usefixtures("as_users_have_it")
    def test_errors(self):
        pipeline = Pipeline()
        with pytest.raises(ValueError, match="at least one trial; got 0"):
            recover(noisy(), pipeline.draw, pipeline.measure, trials=0)
        with pytest.raises(TypeError, match="injected is a Scene"):
            recover(noisy(), lambda rng: None, pipeline.measure, trials=1)
        with pytest.raises(TypeError, match=r"measure must return a table, such as that of catalog.*got NoneType"):
            recover(noisy(), pipeline.draw, lambda observations: None, trials=1)


def test_truth_table_without_wcs():
    frame = Frame((40, 40), channels=("g",))
    scene = Scene(frame, [Source((20.0, 21.0), np.array([10.0]), GaussianMorphology(4.0))])
    table = truth_table(scene, unit=u.dimensionless_unscaled)
    assert np.isnan(table["ra"][0])
    assert np.isnan(table["mag_g"][0])
    assert table["flux_g"][0] == 10.0
    # Half of a round Gaussian by definition, good to 1e-4.
    assert table["half_light_radius"][0].to_value(u.pix) == pytest.approx(4.0, rel=1e-3)
    assert len(truth_table(Scene(frame, {}))) == 0
