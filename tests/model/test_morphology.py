import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from scenefit.data.observation import Observation
from scenefit.model.morphology import (
    STAMP_FLUX_TOLERANCE,
    AbstractMorphology,
    GaussianMorphology,
    PixelMorphology,
    PointMorphology,
)
from scenefit.model.parameters import unit_disk
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from tests.helpers import final_classes

PSF_SIGMA = 0.7
# Pixels, far beyond the wings of all examples, relative to a center off the pixel grid.
GRID = np.arange(-40, 41) + 0.3

PROFILES = {
    "point": PointMorphology(),
    "round Gaussian": GaussianMorphology(2.0),
    "Gaussian along x": GaussianMorphology(2.0, (0.5, 0.0)),
    "Gaussian along y": GaussianMorphology(1.5, (-0.6, 0.0)),
    "turned Gaussian": GaussianMorphology(2.5, (-0.2, 0.5)),
    "small Gaussian": GaussianMorphology(0.05, (0.1, 0.2)),
}
EXAMPLES = PROFILES | {"pixels": PixelMorphology(np.arange(12.0).reshape(3, 4))}


@pytest.fixture(params=EXAMPLES)
def morphology(request):
    return EXAMPLES[request.param]


@pytest.fixture(params=PROFILES)
def profile(request):
    return PROFILES[request.param]


def evaluate(morphology, y=GRID, x=GRID, psf_sigma=PSF_SIGMA):
    return np.asarray(morphology.evaluate(jnp.asarray(y), jnp.asarray(x), jnp.asarray(psf_sigma)), float)


def intrinsic_moments(morphology):
    """Second moments (xx, yy, xy) before the PSF, from semi-axes and angle."""
    e = morphology.ellipticity
    norm, theta = np.hypot(*e), 0.5 * np.arctan2(e[1], e[0])
    ratio = np.sqrt((1 - norm) / (1 + norm))
    sigma = morphology.half_light_radius / np.sqrt(2 * np.log(2))
    major, minor = sigma / np.sqrt(ratio), sigma * np.sqrt(ratio)
    c, s = np.cos(theta), np.sin(theta)
    return np.array(
        [major**2 * c**2 + minor**2 * s**2, major**2 * s**2 + minor**2 * c**2, (major**2 - minor**2) * c * s]
    )


def test_every_morphology_is_covered():
    assert final_classes(AbstractMorphology) == {type(morphology) for morphology in EXAMPLES.values()}


def test_unit_sum_over_a_large_grid(morphology, eps):
    # 1e-4: the PSF leaves exp(-2 pi^2 0.7^2) = 6e-5 of the profile at the sampling frequency; with the phase of this
    # grid that is 2 cos(2 pi 0.3) 6e-5 = -4e-5 of the sum on either axis. 20 eps: rounding of the sum.
    assert evaluate(morphology).sum() == pytest.approx(1, abs=1e-4 + 20 * eps)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "point"])
def test_no_negative_light(name):
    assert evaluate(EXAMPLES[name]).min() >= 0


@pytest.mark.parametrize("psf_sigma", [0.7, 1.5])
@pytest.mark.parametrize("profile", [p for n, p in PROFILES.items() if n != "point"])
def test_moments_add_under_convolution_with_the_psf(profile, psf_sigma):
    image = evaluate(profile, psf_sigma=psf_sigma)
    y, x = GRID[:, None], GRID
    measured = [
        (image * y).sum(),
        (image * x).sum(),
        (image * x * x).sum(),
        (image * y * y).sum(),
        (image * y * x).sum(),
    ]
    xx, yy, xy = intrinsic_moments(profile)
    # 2e-3: aliasing of second moments at PSF sigma 0.7, 4 pi^2 sigma^4 times 6e-5 = 6e-4 a harmonic, four harmonics.
    np.testing.assert_allclose(measured, [0, 0, xx + psf_sigma**2, yy + psf_sigma**2, xy], atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "point"])
def test_gaussian_against_galsim(name):
    galsim = pytest.importorskip("galsim")
    morphology = PROFILES[name]
    accuracy = galsim.GSParams(maxk_threshold=1e-6, kvalue_accuracy=1e-7, folding_threshold=1e-4)
    profile = galsim.Gaussian(half_light_radius=float(morphology.half_light_radius))
    profile = profile.shear(e1=morphology.ellipticity[0], e2=morphology.ellipticity[1])
    profile = galsim.Convolve(profile, galsim.Gaussian(sigma=PSF_SIGMA), gsparams=accuracy).shift(0.2, -0.4)
    image = galsim.Image(41, 41)
    profile.drawImage(image, scale=1.0, method="no_pixel")
    ours = evaluate(morphology, np.arange(41) - 20 + 0.4, np.arange(41) - 20 - 0.2)
    # 3e-6 of the peak: rounding in float32, in which GalSim draws too, and the accuracy asked of it.
    np.testing.assert_allclose(ours, image.array, atol=3e-6 * image.array.max())


def band_limited(offsets, sigma):
    """A Gaussian of unit integral without frequencies beyond 1/2, by quadrature."""

    def value(at):
        def wave(k):
            return 2 * np.exp(-2 * (np.pi * sigma * k) ** 2) * np.cos(2 * np.pi * k * at)

        return scipy.integrate.quad(wave, 0, 0.5, epsabs=1e-12, limit=400)[0]

    return np.array([value(at) for at in offsets])


@pytest.mark.parametrize("psf_sigma", [0.7, 1.0, 2.0, 3.0])
def test_point_is_the_psf_without_frequencies_beyond_nyquist(psf_sigma):
    y, x = np.arange(-4, 5) - 0.3, np.arange(-4, 5) + 0.4
    image = evaluate(PointMorphology(), y, x, psf_sigma)
    expected = np.outer(band_limited(y, psf_sigma), band_limited(x, psf_sigma))
    # 1e-4 of the peak: the ringing that is cut far out, spread over all pixels by the scaling to unit sum.
    np.testing.assert_allclose(image, expected, atol=1e-4 * expected.max())


@pytest.mark.parametrize("fraction", [(0.0, 0.0), (0.5, 0.5), (0.3, -0.2)])
@pytest.mark.parametrize(("sigma", "tolerance"), [(0.8, 4e-3), (1.0, 1.2e-3), (1.2, 4e-4), (1.5, 3e-4), (2.5, 3e-4)])
def test_point_through_a_psf_is_that_psf(sigma, tolerance, fraction):
    """A Gaussian PSF of `sigma` pixels on the same grid, as far as that grid can hold it.

    Samples of the model PSF as they are would be off by 3.7e-2, 1.5e-2, 6e-3, 2e-3 and 5e-4 of the peak.
    """
    shape, center = (41, 41), np.array([20.0, 20.0]) + fraction
    frame = Frame(shape, channels="g", padding=20)
    obs = Observation(np.zeros(shape), sigma=1.0, psf=GaussianPSF(sigma), channels="g", name="one")
    image = np.asarray(obs.match(frame).render(Scene(frame, [Source(center, [1.0], PointMorphology())]))[0])
    expected = np.outer(*(band_limited(np.arange(41) - at, sigma) for at in center))
    # The tolerances: ringing beyond the stamp.
    np.testing.assert_allclose(image, expected, atol=tolerance * expected.max())
    # But for what rings beyond the edge of the image.
    assert image.sum() == pytest.approx(1.0, abs=0.5 * tolerance)


@pytest.mark.parametrize(("radius", "smallest", "largest"), [(1.0, 4e-4, 8e-4), (0.5, 8e-3, 1.6e-2)])
def test_small_gaussians_are_off_by_what_the_documentation_says(radius, smallest, largest):
    """Their samples are not band-limited: half of a known defect's size would be news, and twice its size as well."""
    shape, sigma = (41, 41), 0.78
    frame = Frame(shape, channels="g", padding=20)
    obs = Observation(np.zeros(shape), sigma=1.0, psf=GaussianPSF(sigma), channels="g", name="one").match(frame)
    worst = 0.0
    for fraction in ((0.0, 0.0), (0.5, 0.5), (0.3, -0.2)):
        center = np.array([20.0, 20.0]) + fraction
        image = np.asarray(obs.render(Scene(frame, [Source(center, [1.0], GaussianMorphology(radius))]))[0])
        total = np.hypot(radius / np.sqrt(2 * np.log(2)), sigma)
        expected = np.outer(*(band_limited(np.arange(41) - at, total) for at in center))
        worst = max(worst, np.abs(image - expected).max() / expected.max())
    assert smallest < worst < largest


@pytest.mark.parametrize("ellipticity", [(0.0, 0.0), (0.5, 0.0), (-0.2, 0.5)])
def test_half_the_light_inside_the_half_light_radius(ellipticity):
    morphology = GaussianMorphology(2.0, ellipticity)
    norm, theta = np.hypot(*ellipticity), 0.5 * np.arctan2(ellipticity[1], ellipticity[0])
    ratio = np.sqrt((1 - norm) / (1 + norm))
    point = jax.jit(lambda y, x: morphology.evaluate(y[None], x[None], jnp.zeros(()))[0, 0])

    def on_ellipse(angle, radius):
        along, across = radius / np.sqrt(ratio) * np.cos(angle), radius * np.sqrt(ratio) * np.sin(angle)
        y, x = along * np.sin(theta) + across * np.cos(theta), along * np.cos(theta) - across * np.sin(theta)
        return radius * float(point(jnp.asarray(y), jnp.asarray(x)))

    inside, _ = scipy.integrate.dblquad(on_ellipse, 0, 2.0, 0, 2 * np.pi, epsabs=1e-4, epsrel=1e-4)
    # 1e-4: tolerance of the quadrature.
    assert inside == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("profile", [p for n, p in PROFILES.items() if n != "point"])
def test_the_stamp_holds_the_light(profile):
    half = int(np.ceil(profile.radius(PSF_SIGMA)))
    axis = np.arange(-half, half + 1.0)
    outside = evaluate(profile).sum() - evaluate(profile, axis, axis).sum()
    # 1e-4: as for the unit sum.
    assert outside < STAMP_FLUX_TOLERANCE + 1e-4
    xx, yy, xy = intrinsic_moments(profile)
    major = np.sqrt(np.linalg.eigvalsh([[xx, xy], [xy, yy]]).max() + PSF_SIGMA**2)
    # Not needlessly large: 1e-5 of a Gaussian lies beyond 4.8 standard deviations.
    assert profile.radius(PSF_SIGMA) < 4.81 * major


def test_parameters_are_fields_within_their_constraints(morphology):
    for name, constraint in morphology.constraints.items():
        assert np.all(constraint(jnp.asarray(getattr(morphology, name))))


def test_derivatives_equal_finite_differences(morphology):
    names = list(morphology.constraints)
    y, x, psf_sigma = jnp.asarray(GRID[30:50]), jnp.asarray(GRID[28:50]), jnp.asarray(PSF_SIGMA)

    def image(values):
        return eqx.tree_at(lambda m: [getattr(m, n) for n in names], morphology, values).evaluate(y, x, psf_sigma)

    values = [jnp.asarray(getattr(morphology, name)) for name in names]
    for number, value in enumerate(values):
        for index in np.ndindex(value.shape):
            step = 1e-2 * max(1.0, abs(float(value[index]))) * (0.1 if value[index] < 0.1 else 1.0)
            direction = [jnp.zeros_like(v) for v in values]
            direction[number] = direction[number].at[index].set(1.0)
            _, slope = jax.jvp(image, (values,), (direction,))
            ahead, behind = (
                image([v + sign * step * d for v, d in zip(values, direction, strict=True)]) for sign in (1, -1)
            )
            expected = np.asarray(ahead - behind, float) / (2 * step)
            # 2e-3: truncation, a third of (step / scale)^2 times the third derivative, and rounding over the step.
            np.testing.assert_allclose(slope, expected, atol=2e-3 * max(np.abs(expected).max(), 0.05))


def test_derivative_along_the_position(profile):
    y, x = jnp.asarray(GRID[30:50]), jnp.asarray(GRID[28:50])
    step = 1e-2
    for axis in (0, 1):
        offset = np.eye(2)[axis]

        def image(t, offset=offset):
            return profile.evaluate(y - t * offset[0], x - t * offset[1], jnp.asarray(PSF_SIGMA))

        slope = jax.jvp(image, (jnp.zeros(()),), (jnp.ones(()),))[1]
        expected = np.asarray(image(step) - image(-step), float) / (2 * step)
        # 1e-3: truncation of a Gaussian of sigma 0.7, step^2 / (6 sigma^2) times 3, and rounding over the step.
        np.testing.assert_allclose(slope, expected, atol=1e-3 * np.abs(expected).max())


def test_no_singularity_where_round(eps):
    """The quadratic response to an ellipticity is the same in all directions and smooth at zero."""

    def image(e):
        return GaussianMorphology(jnp.asarray(2.0), e).evaluate(
            jnp.arange(-8.0, 9), jnp.arange(-8.0, 9), jnp.asarray(PSF_SIGMA)
        )

    jacobian = np.asarray(jax.jit(jax.jacfwd(image))(jnp.zeros(2)))
    hessian = np.asarray(jax.jit(jax.jacfwd(jax.jacfwd(image)))(jnp.zeros(2)))
    assert np.isfinite(jacobian).all()
    assert np.isfinite(hessian).all()
    assert np.abs(jacobian).max(axis=(0, 1)).min() > 1e-3
    # 100 eps: a round profile looks the same from x and y, up to the rounding of a few operations.
    np.testing.assert_allclose(jacobian[..., 0], -jacobian[..., 0].T, atol=100 * eps)


def test_extreme_ellipticities_stay_finite():
    norm = 0.999
    for e in ([norm, 0.0], [0.0, -norm]):
        image, slope = jax.jvp(
            lambda v: GaussianMorphology(jnp.asarray(2.0), v).evaluate(
                jnp.asarray(GRID), jnp.asarray(GRID), jnp.asarray(0.7)
            ),
            (jnp.asarray(e),),
            (jnp.ones(2),),
        )
        assert np.isfinite(image).all()
        assert np.isfinite(slope).all()
    assert np.isfinite(GaussianMorphology(2.0, (norm, 0.0)).radius(0.7))
    assert not unit_disk(jnp.asarray([0.8, 0.7]))


def test_jit_and_vmap_change_nothing(profile, eps):
    centers = np.array([0.0, 0.4, -2.3])

    def image(center):
        return profile.evaluate(jnp.asarray(GRID) - center, jnp.asarray(GRID), jnp.asarray(PSF_SIGMA))

    loop = np.stack([image(c) for c in centers])
    # 20 eps: the compiler may reorder operations.
    np.testing.assert_allclose(jax.jit(jax.vmap(image))(jnp.asarray(centers)), loop, atol=20 * eps)


# ---- pixels


def test_an_image_is_scaled_to_unit_sum():
    image = np.arange(12.0).reshape(3, 4)
    morphology = PixelMorphology(5 * image)
    # 1e-15: rounding in float64.
    np.testing.assert_allclose(morphology.image, image / 66, rtol=1e-15)
    assert morphology.anchor == (1, 2)


def test_an_image_can_be_placed_on_a_larger_stamp():
    morphology = PixelMorphology(np.arange(12.0).reshape(3, 4))
    padded = morphology.padded((7, 8), (2, 3))
    np.testing.assert_array_equal(padded.image[2:5, 3:7], morphology.image)
    # 1e-15: rounding in float64.
    assert padded.image.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    "image",
    [np.ones(4), np.zeros((3, 3)), np.full((3, 3), np.nan), -np.ones((2, 2))],
    ids=["1d", "zero", "nan", "negative"],
)
def test_images_that_hold_no_light(image):
    with pytest.raises(ValueError, match=r"finite image \(y, x\) with a positive sum; got shape"):
        PixelMorphology(image)


@pytest.mark.parametrize("envelope", [np.ones((2, 2)), -np.ones((3, 3)), np.zeros((3, 3)), np.full((3, 3), np.inf)])
def test_envelopes_that_hold_no_light(envelope):
    with pytest.raises(ValueError, match=r"envelope is finite, non-negative and not zero, with the shape \(3, 3\)"):
        PixelMorphology(np.ones((3, 3)), envelope=envelope)


def test_an_envelope_is_scaled_to_unit_sum():
    morphology = PixelMorphology(np.ones((3, 3)), envelope=np.full((3, 3), 4.0))
    # 1e-15: rounding in float64.
    np.testing.assert_allclose(morphology.envelope, 1 / 9, rtol=1e-15)


def test_parameters_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"shape \(\); got \(2,\)"):
        GaussianMorphology([1.0, 2.0])
    with pytest.raises(ValueError, match=r"shape \(2,\); got \(3,\)"):
        GaussianMorphology(1.0, (0.0, 0.0, 0.0))
