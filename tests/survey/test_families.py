"""What sources are made of, on an image drawn by GalSim."""

import numpy as np
import pytest

from scenefit.data.observation import Observation
from scenefit.infer.fit import fit
from scenefit.model.clumpy import ClumpyMorphology
from scenefit.model.morphology import PointMorphology, SersicMorphology
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF, ImagePSF
from scenefit.survey.clumps import clump_hosts
from scenefit.survey.families import IRREGULAR, LEAST_SHARE, TYPICAL_SHARE, bulge_share
from scenefit.survey.initialize import initialize

SHAPE, SIGMA = (150, 190), 1.0
FLUXES = {"star": 600.0, "disk": 6000.0, "bulge": 8000.0, "clumpy": 9000.0}
CENTERS = {"star": (30.2, 30.4), "disk": (38.3, 95.6), "bulge": (110.7, 45.2), "clumpy": (95.4, 140.3)}
CLUMPS = np.array([[11.0, -6.0], [-9.0, 8.0], [4.0, 14.0], [-13.0, -7.0], [15.0, 6.0], [-5.0, -15.0]])
CLUMP_FLUX = 450.0


@pytest.fixture(scope="module")
def observation():
    """A star, a disk, a disk with a bulge and a clumpy disk, through a PSF with wings, with white noise."""
    galsim = pytest.importorskip("galsim")
    psf = galsim.Moffat(beta=3.0, fwhm=2.6)
    disk = galsim.Exponential(half_light_radius=6.0).shear(g1=0.1, g2=-0.15).withFlux(FLUXES["disk"])
    smooth = galsim.Exponential(half_light_radius=10.0).shear(g1=-0.1, g2=0.1)
    clumps = [galsim.DeltaFunction(flux=CLUMP_FLUX).shift(x, y) for y, x in CLUMPS]
    kinds = {
        "star": galsim.DeltaFunction(flux=FLUXES["star"]),
        "disk": disk,
        "bulge": galsim.Add(
            galsim.Exponential(half_light_radius=9.0).shear(g1=0.2).withFlux(0.5 * FLUXES["bulge"]),
            galsim.Sersic(3.0, half_light_radius=3.5).withFlux(0.5 * FLUXES["bulge"]),
        ),
        "clumpy": galsim.Add(smooth.withFlux(FLUXES["clumpy"] - len(CLUMPS) * CLUMP_FLUX), *clumps),
    }
    image = galsim.Image(SHAPE[1], SHAPE[0], dtype=float, xmin=0, ymin=0)
    for name, profile in kinds.items():
        y, x = CENTERS[name]
        galsim.Convolve(profile, psf).drawImage(image, scale=1, center=galsim.PositionD(x, y), add_to_image=True)
    data = image.array + np.random.default_rng(5).normal(0, SIGMA, SHAPE)
    stamp = psf.drawImage(nx=41, ny=41, scale=1).array
    return Observation(data, sigma=np.full(SHAPE, SIGMA), psf=ImagePSF(stamp), channels="i", name="HST")


@pytest.fixture(scope="module")
def scene(observation):
    return initialize(Frame(SHAPE, channels="i"), observation, np.array(list(CENTERS.values())), progress=False)


def test_every_source_is_of_its_family(scene):
    star, disk, bulge, clumpy = scene.sources.values()
    assert isinstance(star.morphology, PointMorphology)
    assert isinstance(disk, Source)
    assert isinstance(disk.morphology, SersicMorphology)
    assert isinstance(bulge, CompositeSource)
    assert bulge.concentric
    assert list(bulge.parts) == ["disk", "bulge"]
    assert isinstance(clumpy, Source)
    assert isinstance(clumpy.morphology, ClumpyMorphology)


def test_clumps_are_found_with_their_light(scene):
    clumpy = scene.sources["3"]
    found, fractions = clumpy.morphology.offsets, clumpy.morphology.fractions
    places = found + clumpy.center - CENTERS["clumpy"]
    for clump in CLUMPS:
        near = np.hypot(*(places - clump).T) < 0.7
        # 30 %: what of a clump the profile that was fitted first has taken.
        light = fractions[near & (fractions > 0)].sum() * FLUXES["clumpy"]
        assert light == pytest.approx(CLUMP_FLUX, rel=0.3)
    assert fractions.sum() > IRREGULAR
    # Hardly anything elsewhere: the light of one clump.
    assert fractions.sum() * FLUXES["clumpy"] < (len(CLUMPS) + 1) * CLUMP_FLUX


def test_clumps_belong_to_galaxies_that_have_many():
    """A large smooth galaxy beside a small one whose clumps lie as its light does: all are those of the small one."""
    rng = np.random.default_rng(3)
    large = Source((50.0, 50.0), [10000.0], SersicMorphology(20.0, 1.0))
    small = Source((50.0, 85.0), [8000.0], SersicMorphology(7.0, 1.0))
    # Radii of an exponential disk, in two dimensions: the sum of two exponential numbers.
    radius = 7.0 / 1.678 * rng.exponential(size=(2, 15)).sum(axis=0)
    angle = rng.uniform(0, 2 * np.pi, 15)
    between = np.array([[50.0, 66.0]])
    strewn = np.array([50.0, 85.0]) + np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=-1)
    hosts = clump_hosts([large, small], np.concatenate([strewn, between]), np.full(16, 150.0))
    np.testing.assert_array_equal(hosts, 1)
    # Alone, that between the two would be the large one's, as it is without a small galaxy that has any.
    assert clump_hosts([large, small], between, np.full(1, 150.0))[0] == 0
    assert len(clump_hosts([large, small], np.zeros((0, 2)), np.zeros(0))) == 0


def test_one_channel_without_data(observation):
    """What the sharpest image shows in its other channels decides."""
    blank = np.zeros_like(observation.data[0])
    both = Observation(
        np.stack([blank, observation.data[0]]),
        weights=np.stack([blank, blank + SIGMA**-2]),
        psf=observation.psf,
        channels=["g", "i"],
        name="HST",
    )
    scene = initialize(Frame(SHAPE, channels=["g", "i"]), both, np.array(list(CENTERS.values())), progress=False)
    star, _, bulge, clumpy = scene.sources.values()
    assert isinstance(star.morphology, PointMorphology)
    assert isinstance(bulge, CompositeSource)
    assert len(clumpy.morphology.offsets) >= len(CLUMPS) - 1


def test_a_row_without_light_stays_in_the_frame():
    """Beside a bright star that isn't listed, a source that is drawn away."""
    y, x = np.mgrid[:72, :72]
    star = 4e4 * np.exp(-0.5 * ((y - 36.0) ** 2 + (x - 36.0) ** 2) / 1.7**2) / (2 * np.pi * 1.7**2)
    data = star + np.random.default_rng(2025).normal(size=(72, 72))
    obs = Observation(data, sigma=1.0, psf=GaussianPSF(1.7), channels="i", name="HST")
    scene = initialize(Frame((72, 72), channels="i"), obs, np.array([[36.0, 24.0], [14.0, 50.0]]), progress=False)
    result = fit(scene, [obs], progress=False)
    for _, part in result.scene.components():
        assert (np.abs(np.asarray(part.center) - 35.5) <= 36.0).all()


def test_fluxes_of_a_fit(scene, observation):
    result = fit(scene, [observation], progress=False)
    assert result.is_converged
    for name, source in zip(CENTERS, result.scene.sources.values(), strict=True):
        flux = sum(float(part.spectrum.flux[0]) for _, part in source.components(""))
        # 3 %: two standard errors of a galaxy of unknown shape.
        assert flux == pytest.approx(FLUXES[name], rel=0.03), name


def test_the_share_of_a_bulge():
    bright, faint = 1e4, 0.1
    assert bulge_share(1.0, bright) == 0.0
    shares = [bulge_share(index, bright) for index in (1.5, 2.0, 3.0, 4.0)]
    assert (np.diff(shares) > 0).all()
    assert shares[0] > LEAST_SHARE
    assert bulge_share(8.0, bright) == pytest.approx(0.8, abs=1e-3)
    assert [bulge_share(index, faint) for index in (1.0, 8.0)] == pytest.approx([TYPICAL_SHARE] * 2, abs=1e-2)


def test_without_data_in_the_sharpest_image(observation):
    """A profile of any size, whatever the image looks like where it isn't known."""
    hidden = np.zeros(SHAPE, bool)
    hidden[70:] = True
    masked = Observation(
        np.where(hidden, np.nan, observation.data[0]),
        sigma=SIGMA,
        psf=observation.psf,
        channels="i",
        name="HST",
        mask=hidden,
    )
    scene = initialize(Frame(SHAPE, channels="i"), masked, np.array(list(CENTERS.values())), progress=False)
    star, disk, bulge, clumpy = scene.sources.values()
    assert isinstance(star.morphology, PointMorphology)
    assert "morphology.half_light_radius" in disk.priors
    for source in (bulge, clumpy):
        assert isinstance(source.morphology, SersicMorphology)
        assert "morphology.half_light_radius" not in source.priors
