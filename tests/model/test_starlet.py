"""Images of starlets against direct convolutions, GalSim and dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import ndimage

from scenefit.model.link import Polynomial
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.model.starlet import BARE_SCATTER, FINENESS, NUM_SCALES, SCATTER, StarletMorphology
from scenefit.sky.frame import Frame
from tests.helpers import gaussian_image, make_observation

galsim = pytest.importorskip("galsim")


def image_of(coefficients):
    """The sum of B-splines by convolutions of SciPy, in float64."""
    image = coefficients[-1]
    for scale in reversed(range(len(coefficients) - 1)):
        taps = np.zeros(4 * 2**scale + 1)
        taps[:: 2**scale] = np.array([1, 4, 6, 4, 1]) / 16
        image = coefficients[scale] + ndimage.convolve(image, np.outer(taps, taps), mode="reflect")
    return image


def galaxy(size=41):
    """A disk with three knots through a PSF, drawn by GalSim."""
    knots = [galsim.Gaussian(sigma=0.5, flux=0.06).shift(*at) for at in ((4, 3), (-5, 1), (0, -6))]
    disk = galsim.Exponential(half_light_radius=4.0, flux=0.8).shear(g1=0.2, g2=0.1)
    seen = galsim.Convolve(galsim.Sum([disk, *knots]), galsim.Gaussian(sigma=0.8))
    return seen.drawImage(nx=size, ny=size, scale=1.0).array.astype(float)


@pytest.fixture
def morphology(rng):
    return StarletMorphology(rng.uniform(size=(3, 9, 12)), anchor=(2, 5))


def test_the_image_is_the_sum_of_splines(morphology):
    expected = image_of(morphology.coefficients)
    with jax.enable_x64(True):
        image = np.asarray(morphology.evaluate(None, None, None))
    # 1e-15: rounding in float64 of values of 1e-2.
    np.testing.assert_allclose(image, expected, atol=1e-15)
    assert image.sum() == pytest.approx(1, abs=1e-13)
    assert morphology.image.shape == (9, 12)


def test_constant_coefficients_make_a_constant_image(eps):
    """Up to the edges, where splines are folded back."""
    morphology = StarletMorphology(np.ones((4, 9, 12)))
    # 10 eps: rounding of sums of weights.
    np.testing.assert_allclose(morphology.image, 1 / 108, rtol=10 * eps)
    assert morphology.anchor == (4, 6)


@pytest.mark.parametrize(
    ("image", "accuracy"),
    [
        # After 50 steps: a few hundredths of the peak for a single pixel and what a sharp PSF leaves, and a fifth for noise,
        # which wide splines to begin with can't describe.
        (galaxy(), 0.025),
        (np.eye(1, 31 * 31, 480).reshape(31, 31), 0.025),
        (np.random.default_rng(0).uniform(size=(31, 31)), 0.2),
    ],
    ids=["galaxy", "pixel", "noise"],
)
def test_coefficients_of_an_image(image, accuracy):
    morphology = StarletMorphology.from_image(image)
    assert morphology.coefficients.shape == (NUM_SCALES, *image.shape)
    assert morphology.coefficients.min() >= 0
    image = np.maximum(image, 0) / np.maximum(image, 0).sum()
    np.testing.assert_allclose(morphology.image, image, atol=accuracy * image.max())


def test_a_smooth_image_hardly_needs_single_pixels():
    smooth = StarletMorphology.from_image(gaussian_image((31, 31), (15, 15), 4.0))
    point = StarletMorphology.from_image(np.eye(1, 31 * 31, 480).reshape(31, 31))
    # Splines of sigma 4.6 and 9.2 have wider wings than a Gaussian of sigma 4: some of its middle is left to the narrowest two.
    assert smooth.coefficients[:2].sum() < 0.25
    assert point.coefficients[0].sum() > 0.95


def test_envelopes_are_images_too():
    image, guess = galaxy(21), gaussian_image((21, 21), (10, 10), 4.0)
    morphology = StarletMorphology.from_image(image, 3, anchor=(1, 2), envelope=guess)
    alone = StarletMorphology.from_image(guess, 3)
    np.testing.assert_array_equal(morphology.envelope, alone.coefficients)
    assert morphology.anchor == (1, 2)
    same = StarletMorphology.from_image(image, 3, envelope=image)
    np.testing.assert_array_equal(same.envelope, same.coefficients)


def test_a_padded_stamp_shows_the_same_image(morphology, eps):
    padded = morphology.padded((16, 17), (4, 3))
    image = np.zeros((16, 17))
    image[4:13, 3:15] = morphology.image
    # 10 eps: rounding.
    np.testing.assert_allclose(padded.image, image, atol=10 * eps * image.max())
    assert padded.envelope is None


def test_a_grown_stamp_lets_light_out_at_its_edges():
    inner = StarletMorphology.from_image(gaussian_image((15, 15), (7, 7), 4.0), 4)
    inner = StarletMorphology(inner.coefficients, inner.anchor, inner.coefficients)
    grown = inner.grown((25, 23), (6, 5))
    assert grown.anchor == (13, 12)
    assert grown.coefficients.shape == grown.envelope.shape == (4, 25, 23)
    np.testing.assert_allclose(grown.coefficients[:, 6:21, 5:20], inner.coefficients, rtol=1e-14)
    # 1e-5: unit sum in float32.
    assert grown.image.sum() == pytest.approx(1, abs=1e-5)
    assert 0.03 < 1 - grown.image[6:21, 5:20].sum() < 0.5


def test_the_prior_is_wide_where_the_envelope_is_bright_and_for_wide_splines():
    guess = gaussian_image((21, 21), (10, 10), 3.0)
    morphology = StarletMorphology.from_image(guess, envelope=guess)
    prior = morphology.prior()
    np.testing.assert_array_equal(prior.loc, morphology.envelope)
    image = image_of(morphology.envelope)
    expected = SCATTER * FINENESS ** np.arange(NUM_SCALES)[::-1][:, None, None] * image
    # 1e-5: an image in float32.
    np.testing.assert_allclose(prior.scale, expected, rtol=1e-5)
    bare = StarletMorphology.from_image(guess, 2).prior()
    assert not bare.loc.any()
    np.testing.assert_allclose(np.ravel(bare.scale), BARE_SCATTER / (2 * 441) * np.array([FINENESS, 1]))


def test_the_curvature_is_a_bound(rng):
    """The largest eigenvalue of the true curvature over the bound is at most 1, for curvatures of pixels of any kind."""
    shape, count = (5, 6), 3
    morphology = StarletMorphology(np.ones((count, *shape)))
    columns = [image_of(unit.reshape(count, *shape)).ravel() for unit in np.eye(count * 30)]
    splines = np.array(columns).T
    for pixels in (np.ones(shape), rng.uniform(size=shape), np.eye(*shape)):
        bound = np.asarray(morphology.curvature(jnp.asarray(pixels)), float).ravel()
        exact = splines.T @ (pixels.ravel()[:, None] * splines)
        # 1e-12: where an eigenvalue is the bound itself; float32 of the bound is 1e-6.
        root = 1 / np.sqrt(bound + 1e-7)
        largest = np.linalg.eigvalsh(exact * root[:, None] * root).max()
        assert 0.2 < largest < 1 + 1e-5


def test_scenes_paste_images_whatever_their_stamps(rng, eps):
    """Stamps of several sizes and numbers of scales, at the edge of the frame too, share padded stacks."""
    frame = Frame((40, 44), channels=("g", "r"))
    expected, sources = np.zeros((2, 40, 44)), {}
    for n, (scales, height, width, y, x) in enumerate([(3, 9, 12, 0, 32), (3, 15, 11, 25, 3), (2, 8, 8, 13, 14)]):
        morphology = StarletMorphology(rng.uniform(size=(scales, height, width)))
        flux = rng.uniform(1, 3, 2)
        center = np.array([y, x]) + morphology.anchor
        expected[:, y : y + height, x : x + width] += flux[:, None, None] * image_of(morphology.coefficients)
        sources[str(n)] = Source(center, flux, morphology)
    # 20 eps: products of matrices and a sum.
    np.testing.assert_allclose(Scene(frame, sources).evaluate(), expected, atol=20 * eps * expected.max())


def test_parameters():
    observation, frame = make_observation(name="camera"), Frame((40, 40), channels=("g",))
    sources = {name: Source((20, 20), [1.0], StarletMorphology(np.ones((2, 7, 9)))) for name in "ab"}
    parameters = Parameters.default(Scene(frame, sources), [observation])
    path = "sources.a.morphology.coefficients"
    assert parameters[path].shape == (2, 7, 9)
    assert parameters[path].free
    assert isinstance(parameters[path].prior, dist.Normal)
    assert not parameters["sources.a.center"].free
    with pytest.raises(ValueError, match="Images can't be tied"):
        parameters.tie(path, "sources.b.morphology.coefficients")


@pytest.mark.parametrize(
    "coefficients",
    [np.ones((4, 4)), np.zeros((2, 3, 3)), np.full((1, 3, 3), np.nan), -np.ones((2, 2, 2))],
    ids=["2d", "zero", "nan", "negative"],
)
def test_coefficients_that_hold_no_light(coefficients):
    with pytest.raises(ValueError, match=r"finite coefficients \(scale, y, x\) with a positive sum.*got shape"):
        StarletMorphology(coefficients)


def test_bad_images():
    with pytest.raises(
        ValueError, match=r"from_image wants finite images \(y, x\) with a positive sum; got shape \(3,\)"
    ):
        StarletMorphology.from_image(np.ones(3))
    with pytest.raises(ValueError, match=r"An envelope is .* with the shape \(5, 4, 4\)"):
        StarletMorphology.from_image(np.ones((4, 4)), envelope=np.ones((5, 4)))
    with pytest.raises(ValueError, match="at least one scale"):
        StarletMorphology.from_image(np.ones((4, 4)), 0)
    with pytest.raises(TypeError, match="can't be a link"):
        StarletMorphology(Polynomial([1.0, 2.0], {"g": 500.0, "r": 700.0}))
