import types
import warnings

import astropy.units as u
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.table import Table

from scenefit.data.observation import Observation
from scenefit.infer.fit import fit
from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.packing import component_box
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.catalog import catalog as make_catalog
from scenefit.survey.envelopes import detection_image, fit_rings
from scenefit.survey.initialize import initialize
from tests.blends import FINE_SCALE, GALAXIES, frame_of, gaussian_density, observe, on_frame
from tests.helpers import make_observation

PSF_SIGMA = 1.2


@pytest.fixture(scope="module")
def observations():
    return observe(seed=7)


@pytest.fixture(scope="module")
def frame(observations):
    return frame_of(observations)


@pytest.fixture(scope="module")
def positions(frame):
    return np.array([on_frame(frame, galaxy) for galaxy in GALAXIES.values()])


def moments_of(sigma, ellipticity):
    """Second moments ((yy, xy), (xy, xx)) of an ellipse, PSF included."""
    e1, e2 = ellipticity
    shape = np.array([[1 - e1, e2], [e2, 1 + e1]])
    return sigma**2 * shape / np.sqrt(np.linalg.det(shape)) + PSF_SIGMA**2 * np.eye(2)


# ---- rings


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("ellipticity", [(0.0, 0.0), (0.4, 0.0), (-0.2, 0.35)])
def test_rings_recover_a_gaussian_galaxy(rng, noise, ellipticity):
    y, x = np.mgrid[:61, :65]
    image = 5000 * gaussian_density(y - 30.3, x - 31.8, moments_of(3.0, ellipticity)) + noise * rng.normal(size=y.shape)
    amplitudes, shapes = fit_rings(image, np.array([[30.3, 31.8]]), PSF_SIGMA)
    # 10 %: rings a factor 2 apart match a Gaussian between two of them roughly, the wide one with light off the image.
    assert amplitudes.sum() == pytest.approx(5000, rel=0.1)
    np.testing.assert_allclose(shapes[0], ellipticity, atol=0.06)
    assert (amplitudes >= 0).all()


@pytest.mark.parametrize(("index", "ratio"), [(1.0, 0.6), (2.5, 0.8)])
def test_rings_recover_a_sersic_galaxy(index, ratio):
    galsim = pytest.importorskip("galsim")
    theta = 0.6
    profile = galsim.Sersic(index, half_light_radius=4.0, flux=3000.0, trunc=20.0).shear(
        q=ratio, beta=theta * galsim.radians
    )
    profile = galsim.Convolve(profile, galsim.Gaussian(sigma=PSF_SIGMA))
    image = profile.drawImage(nx=91, ny=91, scale=1.0, method="no_pixel").array.astype(float)
    amplitudes, shapes = fit_rings(image, np.array([[45.0, 45.0]]), PSF_SIGMA)
    norm = (1 - ratio**2) / (1 + ratio**2)
    # 3 % and 0.06: seven rings for a profile with a cusp, and the ellipticity of a weighted moment.
    assert amplitudes.sum() == pytest.approx(3000, rel=0.03)
    np.testing.assert_allclose(shapes[0], norm * np.array([np.cos(2 * theta), np.sin(2 * theta)]), atol=0.06)


def test_rings_share_the_light_of_a_blend(rng):
    y, x = np.mgrid[:60, :60]
    centers, fluxes = np.array([[28.0, 26.0], [31.0, 36.0]]), (4000, 2000)
    image = rng.normal(size=y.shape)
    for center, flux, sigma in zip(centers, fluxes, (3.0, 2.0), strict=True):
        image = image + flux * gaussian_density(y - center[0], x - center[1], moments_of(sigma, (0.0, 0.0)))
    image[:, 40:44] = np.nan
    amplitudes, _ = fit_rings(image, centers, PSF_SIGMA)
    # 10 %: each source has a ring of the right size to within 40 %, and neighbours trade what doesn't fit.
    np.testing.assert_allclose(amplitudes.sum(axis=1), fluxes, rtol=0.1)


@pytest.mark.parametrize("scale", [1e-20, 1e10])
def test_rings_know_no_unit(scale):
    y, x = np.mgrid[:41, :41]
    image = 3000 * gaussian_density(y - 20, x - 20, moments_of(2.5, (0.2, 0.1)))
    image = image + np.random.default_rng(1).normal(size=image.shape)
    expected, shape = fit_rings(image, np.array([[20.0, 20.0]]), PSF_SIGMA)
    amplitudes, scaled_shape = fit_rings(scale * image, np.array([[20.0, 20.0]]), PSF_SIGMA)
    # 1e-6: a linear problem, solved in float64.
    np.testing.assert_allclose(amplitudes / scale, expected, rtol=1e-6, atol=1e-6 * expected.max())
    np.testing.assert_allclose(scaled_shape, shape, atol=1e-6)


def test_the_detection_image_weighs_channels_by_their_depth(frame):
    shape = (40, 40)
    data = np.stack([np.full(shape, 3.0), np.full(shape, 7.0)])
    weights = np.ones((2, *shape))
    weights[1] = 0.25
    weights[1, :5] = 0
    weights[:, :, 0] = 0
    obs = Observation(
        data, weights=weights, psf=np.ones((3, 3)), wcs=frame.wcs, channels=("a", "b"), background=[1.0, 2.0]
    )
    image, sigma = detection_image(frame, obs)
    # 1e-6: the WCS there and back moves pixels by 1e-8.
    np.testing.assert_allclose(image[6:-1, 2:-1], (2 + 0.25 * 5) / 1.25, rtol=1e-6)
    np.testing.assert_allclose(image[1:4, 2:-1], 2.0, rtol=1e-6)
    assert np.isnan(image[:, 0]).all()
    assert sigma == pytest.approx(1 / np.sqrt(1.25))


# ---- scenes


@pytest.mark.parametrize(
    ("model", "kind"), [("pixel", PixelMorphology), ("gaussian", GaussianMorphology), ("point", PointMorphology)]
)
def test_sources_start_at_their_positions(frame, observations, positions, model, kind):
    scene = initialize(frame, observations, positions, model=model)
    assert list(scene.sources) == ["0", "1", "2"]
    for source, position, galaxy in zip(scene.sources.values(), positions, GALAXIES.values(), strict=True):
        assert isinstance(source.morphology, kind)
        np.testing.assert_array_equal(source.center, position)
        expected = np.array([galaxy.flux[c] for c in frame.channels])
        # A start: within a factor of 3, blending included.
        assert (np.abs(np.log(source.spectrum.flux / expected)) < np.log(3)).all()
    assert np.isfinite(scene.evaluate()).all()


def test_images_start_from_smooth_envelopes(frame, observations, positions):
    scene = initialize(frame, observations, positions, model="pixel")
    for source in scene.sources.values():
        image, anchor = source.morphology.image, source.morphology.anchor
        np.testing.assert_array_equal(image, source.morphology.envelope)
        # It peaks where the source is.
        peak = np.unravel_index(np.argmax(image), image.shape)
        np.testing.assert_allclose(peak, anchor, atol=1)


def test_stamps_lie_within_the_frame(frame, observations):
    edges = np.array([[0.0, 0.0], [-0.4, 20.0], [39.4, 39.4], [20.0, 0.6], [17.0, 22.0]])
    scene = initialize(frame, observations, edges, model="pixel")
    assert len(scene.sources) == 5
    for _, component in scene.components():
        box = component_box(component, frame)
        assert box.intersection(frame.box) == box
        assert component.morphology.image.shape == box.shape
        nearest = np.rint(component.center).astype(int)
        assert (nearest >= box.origin).all()
        assert (nearest < box.stop).all()
    assert np.isfinite(scene.evaluate()).all()


@pytest.mark.parametrize("half_size", [6, 0.55 * u.arcsec])
def test_stamp_sizes_on_request(frame, observations, half_size):
    scene = initialize(frame, observations, np.array([[20.0, 20.0], [2.0, 3.0]]), half_size=half_size, model="pixel")
    shapes = [source.morphology.image.shape for source in scene.sources.values()]
    assert shapes == [(13, 13), (9, 10)]


def test_bright_sources_get_larger_stamps(frame):
    stamps = []
    for flux in (100.0, 10000.0):
        y, x = np.mgrid[:40, :40]
        data = flux * gaussian_density(y - 20, x - 20, moments_of(3.0, (0.0, 0.0)))
        obs = make_observation((40, 40), data=data[None], scale_arcsec=FINE_SCALE, channels=("v",))
        one = frame_of([obs])
        stamps.append(
            initialize(one, obs, np.array([[20.0, 20.0]]), model="pixel").sources["0"].morphology.image.shape[0]
        )
    assert 17 <= stamps[0] < stamps[1] <= 41


def test_positions_on_the_sky(frame, observations, positions):
    sky = frame.to_sky(positions)
    by_sky, by_pixel = (initialize(frame, observations, where, model="pixel") for where in (sky.galactic, positions))
    for a, b in zip(by_sky.sources.values(), by_pixel.sources.values(), strict=True):
        # 1e-5 pixels: coordinates in degrees, turned twice in float64.
        np.testing.assert_allclose(a.center, b.center, atol=1e-5)
        np.testing.assert_allclose(a.morphology.image, b.morphology.image, atol=1e-5)


def test_one_position_and_one_observation(observations, positions):
    fine = observations[0]
    scene = initialize(frame_of([fine]), fine, positions[0], model="pixel")
    assert list(scene.sources) == ["0"]


def test_sources_outside_are_left_out_with_a_warning(frame, observations, positions):
    everywhere = np.concatenate([[[-30.0, 5.0]], positions, [[5.0, 41.0]]])
    with pytest.warns(UserWarning, match=r"2 catalogue source\(s\) outside the model frame left out: rows \[0, 4\]"):
        scene = initialize(frame, observations, everywhere, model="pixel")
    # Named by their place in the catalogue.
    assert list(scene.sources) == ["1", "2", "3"]


def test_all_inside_warns_not(frame, observations, positions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(initialize(frame, observations, positions, model="pixel").sources) == 3


@pytest.mark.parametrize(
    ("catalog", "message"),
    [
        (
            np.array([[100.0, 3.0], [-20.0, 4.0]]),
            r"None of the 2 catalogue sources lies in the model frame of \(40, 40\)",
        ),
        (np.array([[20.0, 20.0], [np.nan, 3.0]]), r"must be finite and visible from the frame; rows \[1\] aren't"),
        (SkyCoord([150.3, 330.3] * u.deg, [2.05, -2.05] * u.deg), r"finite and visible from the frame; rows \[1\]"),
        (np.zeros((0, 2)), "catalogue is empty"),
        (np.zeros((3, 3)), r"A position is a SkyCoord or \(y, x\) in pixels"),
    ],
    ids=["outside", "nan", "behind", "empty", "shape"],
)
def test_catalogues_without_use(frame, observations, catalog, message):
    with pytest.raises(ValueError, match=message):
        initialize(frame, observations, catalog, model="pixel")


def test_an_unknown_model(frame, observations, positions):
    with pytest.raises(ValueError, match="model is one of 'auto', 'pixel', 'gaussian', 'point'; got 'sersic'"):
        initialize(frame, observations, positions, model="sersic")


@pytest.mark.parametrize("model", ["pixel", "gaussian"])
def test_fluxes_start_near_the_truth(frame, observations, positions, model):
    """In both images, one of them turned, and for overlapping galaxies."""
    scene = initialize(frame, observations, positions, model=model)
    for source, galaxy in zip(scene.sources.values(), GALAXIES.values(), strict=True):
        # 15 %: rings for a Gaussian, and noise.
        np.testing.assert_allclose(source.spectrum.flux, [galaxy.flux[c] for c in frame.channels], rtol=0.15)


def test_points_start_with_their_fluxes(frame):
    """Where the PSF is a Gaussian and the model right, the first solution is the weighted least-squares one."""
    rng = np.random.default_rng(3)
    center, fluxes = np.array([[20.3, 19.6], [22.1, 24.4]]), np.array([4000.0, 1500.0])
    y, x = np.mgrid[:40, :44]
    clean = sum(
        f * gaussian_density(y - c[0], x - c[1], 1.5**2 * np.eye(2)) for f, c in zip(fluxes, center, strict=True)
    )
    obs = make_observation((40, 44), data=(clean + rng.normal(size=clean.shape))[None], wcs=None, psf=GaussianPSF(1.5))
    scene = initialize(Frame((40, 44), channels="g"), obs, center, model="point")
    started = [float(source.spectrum.flux[0]) for source in scene.sources.values()]
    # Five standard errors of sqrt(4 pi) sigma_psf, with the neighbour a third more.
    np.testing.assert_allclose(started, fluxes, atol=5 * 1.3 * np.sqrt(4 * np.pi) * 1.5)


@pytest.mark.parametrize("scale", [1e-20, 1e10])
def test_the_unit_of_an_instrument_does_not_matter(frame, observations, positions, scale):
    fine, coarse = observations
    other = Observation(
        fine.data * scale,
        weights=fine.noise.weights / scale**2,
        psf=fine.psf,
        wcs=fine.wcs,
        channels=("v",),
        name="fine",
    )
    plain, scaled = (
        initialize(frame, observations, positions, model="pixel"),
        initialize(frame, [other, coarse], positions, model="pixel"),
    )
    for a, b in zip(plain.sources.values(), scaled.sources.values(), strict=True):
        # 1e-6: linear in the data, float64.
        np.testing.assert_allclose(b.spectrum.flux / [scale, 1, 1], a.spectrum.flux, rtol=1e-6)
        assert b.morphology.image.shape == a.morphology.image.shape
        np.testing.assert_allclose(b.morphology.image, a.morphology.image, atol=1e-6 * a.morphology.image.max())


def assert_sound(scene):
    """Whether a scene is something that a fit can start from."""
    for source in scene.sources.values():
        assert np.isfinite(source.spectrum.flux).all()
        assert (source.spectrum.flux > 0).all()
        assert np.isfinite(source.morphology.image).all()
    assert np.isfinite(scene.evaluate()).all()


def test_a_source_in_a_hole_of_the_sharp_image_has_a_start(frame, observations):
    fine, coarse = observations
    hole = np.zeros((40, 40), bool)
    hole[:, :22] = True
    holed = Observation(
        fine.data, weights=fine.noise.weights, psf=fine.psf, wcs=fine.wcs, channels=("v",), name="fine", mask=hole
    )
    assert_sound(initialize(frame, [holed, coarse], np.array([[16.0, 5.0], [20.0, 30.0]]), model="pixel"))


def test_a_source_twice_in_the_catalogue_counts_once(frame, observations):
    positions = np.array([[16.0, 5.0], [20.0, 30.0], [20.0, 30.1], [22.0, 30.0]])
    with pytest.warns(
        UserWarning, match=r"1 catalogue source\(s\) at the place of one before them left out: rows \[2\]"
    ):
        scene = initialize(frame, observations, positions, model="pixel")
    assert list(scene.sources) == ["0", "1", "3"]
    assert_sound(scene)


def test_a_table_of_positions(frame, observations, positions):
    sky = frame.to_sky(positions)
    table = Table({"ra": sky.ra, "Dec": sky.dec})
    one, other = (initialize(frame, observations, each, model="pixel") for each in (table, sky))
    np.testing.assert_array_equal([s.center for s in one.sources.values()], [s.center for s in other.sources.values()])


def test_a_fit_from_the_start_recovers_the_blend(frame, observations, positions):
    """Free pixels, end to end."""
    scene = initialize(frame, observations, positions, model="pixel")
    result = fit(scene, observations, progress=False, max_steps=200)
    assert result.is_converged
    table = make_catalog(result)
    for row, galaxy in zip(table, GALAXIES.values(), strict=True):
        measured = [row[f"flux_{c}"] for c in frame.channels]
        # 10 %: neighbours trade light within the scatter that the envelopes allow.
        np.testing.assert_allclose(measured, [galaxy.flux[c] for c in frame.channels], rtol=0.1)
    # Chi-square of 2088 pixels on the frame at most, fewer than that by what the pixels take up.
    assert 0.75 * 1900 < 2 * result.loss < 1.1 * 2112


def test_a_detection_without_light_is_left_out(monkeypatch):
    """Two sources, one that only the blurrier camera sees, and a place where there is nothing, as if all had been detected."""
    shape, places = (80, 90), np.array([[25.0, 22.0], [50.0, 60.0], [20.0, 66.0], [60.0, 20.0]])
    rng = np.random.default_rng(11)

    def camera(name, sigma, fluxes):
        y, x = np.mgrid[: shape[0], : shape[1]]
        data = rng.normal(size=shape)
        for (row, column), flux in zip(places, fluxes, strict=True):
            data += flux / (2 * np.pi * sigma**2) * np.exp(-0.5 * ((y - row) ** 2 + (x - column) ** 2) / sigma**2)
        return Observation(data, sigma=1.0, psf=GaussianPSF(sigma), channels=name, name=name)

    observations = [camera("i", 1.5, [900.0, 600.0, 0.0, 0.0]), camera("y", 3.0, [900.0, 600.0, 400.0, 0.0])]
    frame = Frame.from_observations(observations)

    def found(positions, observations):
        detections = types.SimpleNamespace(positions=positions)
        monkeypatch.setattr("scenefit.survey.initialize.detect", lambda *args, **kwargs: detections)
        return initialize(frame, observations, progress=False)

    with pytest.warns(UserWarning, match=r"1 of 4 detected sources had no significant light"):
        scene = found(places, observations)
    centers = np.array([source.center for source in scene.sources.values()])
    np.testing.assert_allclose(centers, places[:3], atol=1.0)
    assert list(scene.sources) == ["0", "1", "2"]
    # Positions that are given stay.
    assert len(initialize(frame, observations, places, progress=False).sources) == 4
    dark = [camera("i", 1.5, np.zeros(4)), camera("y", 3.0, np.zeros(4))]
    with pytest.warns(UserWarning, match=r"2 of 2 detected"):
        assert len(found(places[:2], dark).sources) == 0
