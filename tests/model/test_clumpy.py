import numpy as np
import pytest

from scenefit.data.observation import Observation
from scenefit.infer.errors import parameter_errors
from scenefit.infer.fit import fit
from scenefit.model.clumpy import ClumpyMorphology
from scenefit.model.link import PerBand
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from tests.helpers import make_observation

OFFSETS, FRACTIONS = [[2.3, -4.1], [-3.2, 1.7], [0.4, 5.6]], [0.1, 0.05, 0.15]


def test_a_disk_and_points_against_galsim():
    galsim = pytest.importorskip("galsim")
    center, sigma, e = np.array([30.3, 29.6]), 1.3, (0.3, -0.2)
    frame = Frame((61, 61), channels="i", padding=24)
    shift = np.array([1.7, -0.8])
    morphology = ClumpyMorphology(4.0, 1.1, e, np.array(OFFSETS) - shift, FRACTIONS, shift)
    scene = Scene(frame, [Source(center, [1.0], morphology)])
    obs = make_observation((61, 61), channels="i", psf=GaussianPSF(sigma, integrate_pixel=True), wcs=None)
    image = obs.match(frame).render(scene)[0]
    accuracy = galsim.GSParams(
        folding_threshold=1e-4, maxk_threshold=1e-5, kvalue_accuracy=1e-7, maximum_fft_size=20000
    )
    smooth = galsim.Sersic(1.1, half_light_radius=4.0, gsparams=accuracy).shear(e1=e[0], e2=e[1]).withFlux(0.7)
    points = [galsim.DeltaFunction(flux=f).shift(x, y) for f, (y, x) in zip(FRACTIONS, OFFSETS, strict=True)]
    psf = galsim.Gaussian(sigma=sigma, gsparams=accuracy)
    truth = galsim.Image(61, 61, dtype=float)
    both = galsim.Convolve(galsim.Add([smooth, *points]), psf, gsparams=accuracy)
    both.shift(center[1] - 30, center[0] - 30).drawImage(truth, scale=1)
    # 4e-4 of the peak of a point through this PSF, and of the profile's: ringing, aliases in GalSim's samples.
    np.testing.assert_allclose(image, truth.array, atol=5e-4 * truth.array.max())


def test_all_of_it_is_free():
    scene = Scene(
        Frame((61, 61), channels="i"),
        {"a": Source((30.0, 30.0), [1.0], ClumpyMorphology(4.0, 1.0, (0, 0), OFFSETS, FRACTIONS))},
    )
    assert all(parameter.free for parameter in Parameters.default(scene, []))


def test_the_center_is_that_of_the_smooth_light(rng):
    """However far from it the clumps put it that were found about a wrong one."""
    frame = Frame((61, 61), channels="i", padding=24)
    lopsided, center, wrong = (
        np.array([[6.0, 2.0], [5.0, -3.0], [9.0, 0.0]]),
        np.array([30.0, 30.0]),
        np.array([32.5, 30.0]),
    )
    truth = Source(center, [1000.0], ClumpyMorphology(6.0, 1.0, (0.1, 0.0), lopsided, FRACTIONS))
    obs = make_observation((61, 61), channels="i", psf=GaussianPSF(1.3, integrate_pixel=True), wcs=None)
    data = obs.match(frame).render(Scene(frame, [truth])) + 0.1 * rng.normal(size=obs.shape)
    obs = Observation(data, sigma=np.full(obs.shape, 0.1), psf=obs.psf, channels="i")
    start = Source(wrong, [900.0], ClumpyMorphology(6.0, 1.0, (0.1, 0.0), center + lopsided - wrong, FRACTIONS))
    result = fit(Scene(frame, {"a": start}), obs, progress=False)
    source, errors = result.scene.sources["a"], parameter_errors(result)
    assert np.all(np.abs(source.center - center) < 4 * errors["sources.a.center"])
    assert np.all(errors["sources.a.center"] < 0.1)
    shift = source.center + source.morphology.shift - wrong
    assert np.all(np.abs(shift) < 4 * errors["sources.a.morphology.shift"])


def test_padding_adds_no_light():
    morphology = ClumpyMorphology(4.0, 1.1, (0.1, 0.2), OFFSETS, FRACTIONS)
    y = x = np.arange(-20.0, 21.0)
    images = [np.asarray(each.evaluate(y, x, 0.7)) for each in (morphology, morphology.padded(8))]
    # 1e-7: rounding of sums in another order.
    np.testing.assert_allclose(images[1], images[0], atol=1e-7)


def test_the_stamp_holds_all_clumps():
    morphology = ClumpyMorphology(1.0, 1.0, (0, 0), [[25.0, 0.0]], [0.1])
    assert morphology.radius(0.7) > 25 + 4.8 * 0.7


def test_clumps_never_have_more_than_all_light():
    y = x = np.arange(-30.0, 31.0)
    image = np.asarray(ClumpyMorphology(4.0, 1.0, (0.0, 0.0), OFFSETS, [1.0, 0.5, 0.5]).evaluate(y, x, 0.7))
    assert image.sum() == pytest.approx(1.0, abs=1e-4)
    # No smooth light: as bright as the points alone.
    alone = np.asarray(ClumpyMorphology(4.0, 1.0, (0.0, 0.0), OFFSETS, [0.5, 0.25, 0.25]).evaluate(y, x, 0.7))
    np.testing.assert_allclose(image, alone, atol=1e-7)


def test_shares_may_be_linked():
    """In every band its own, padded in the packing: as one source a band."""
    channels, shares = ("g", "i"), np.array([[0.1, 0.05, 0.15], [0.3, 0.0, 0.1]])
    frame = Frame((61, 61), channels=channels)
    linked = ClumpyMorphology(4.0, 1.0, (0.1, 0.2), OFFSETS, PerBand(shares, channels))
    image = Scene(frame, [Source((30.0, 30.0), [2.0, 3.0], linked)]).evaluate()
    for plane, share, flux in zip(image, shares, (2.0, 3.0), strict=True):
        own = ClumpyMorphology(4.0, 1.0, (0.1, 0.2), OFFSETS, share)
        alone = Scene(Frame((61, 61), channels="i"), [Source((30.0, 30.0), [flux], own)]).evaluate()[0]
        # 1e-6 of the flux: rounding of sums in another order.
        np.testing.assert_allclose(plane, alone, atol=1e-6 * flux)


@pytest.mark.parametrize(
    ("offsets", "fractions", "message"),
    [
        ([1.0, 2.0], [0.1], r"finite offsets \(y, x\), shape \(clump, 2\); got \[1.0, 2.0\]"),
        ([[1.0, np.nan]], [0.1], r"finite offsets \(y, x\)"),
        ([[1.0, 2.0]], [-0.1], "fractions of clumps aren't negative; got"),
        ([[1.0, 2.0]], [np.nan], "fractions of clumps aren't negative; got"),
        ([[1.0, 2.0]], [0.1, 0.2], r"Expected a parameter of shape \(1,\); got \(2,\)"),
    ],
)
def test_what_are_no_clumps(offsets, fractions, message):
    with pytest.raises(ValueError, match=message):
        ClumpyMorphology(4.0, 1.0, (0, 0), offsets, fractions)
