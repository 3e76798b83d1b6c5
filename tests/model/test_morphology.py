import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special

from scenefit.model.clumpy import ClumpyMorphology
from scenefit.model.morphology import (
    CORE_FLUX_TOLERANCE,
    HALF_LIGHT_PER_SIGMA,
    STAMP_FLUX_TOLERANCE,
    AbstractImageMorphology,
    AbstractMorphology,
    DeVaucouleursMorphology,
    ExponentialMorphology,
    GaussianMorphology,
    MultiGaussianMorphology,
    PixelMorphology,
    PointMorphology,
    SersicMorphology,
)
from scenefit.model.parameters import unit_disk
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.model.starlet import StarletMorphology
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from tests.helpers import final_classes, make_observation, tangent_wcs

PSF_SIGMA = 0.7
# A PSF so wide that nothing is left beyond the Nyquist frequency: exp(-2 pi^2 1.8^2 / 4) = 1e-7.
WIDE_PSF_SIGMA = 1.8
# Pixels, far beyond the wings of all Gaussians, relative to a center off the pixel grid.
GRID = np.arange(-40, 41) + 0.3

PROFILES = {
    "point": PointMorphology(),
    "round Gaussian": GaussianMorphology(2.0),
    "Gaussian along x": GaussianMorphology(2.0, (0.5, 0.0)),
    "Gaussian along y": GaussianMorphology(1.5, (-0.6, 0.0)),
    "turned Gaussian": GaussianMorphology(2.5, (-0.2, 0.5)),
    "small Gaussian": GaussianMorphology(0.05, (0.1, 0.2)),
    "exponential": ExponentialMorphology(1.5, (0.0, -0.3)),
    "de Vaucouleurs": DeVaucouleursMorphology(1.0, (0.2, 0.2)),
    "flat Sersic": SersicMorphology(2.0, 0.8, (0.3, -0.2)),
    "cuspy Sersic": SersicMorphology(1.5, 3.2, (-0.1, 0.4)),
    "small Sersic": SersicMorphology(0.1, 1.7),
    "rings": MultiGaussianMorphology([0.3, 1.0, 2.5], [0.2, 0.5, 0.3], (0.3, 0.2)),
}
EXAMPLES = PROFILES | {
    "clumps": ClumpyMorphology(2.0, 1.2, (0.3, -0.2), [[1.5, -2.2], [-3.1, 0.4]], [0.2, 0.1]),
    "pixels": PixelMorphology(np.arange(12.0).reshape(3, 4)),
    "starlets": StarletMorphology(np.arange(24.0).reshape(2, 3, 4)),
}
KINDS = {type(example): example for example in EXAMPLES.values()}
"""An example of every class."""


@pytest.fixture(params=EXAMPLES)
def morphology(request):
    return EXAMPLES[request.param]


@pytest.fixture(params=[name for name in PROFILES if name != "point"])
def profile(request):
    return PROFILES[request.param]


_evaluate = eqx.filter_jit(lambda morphology, y, x, psf_sigma: morphology.evaluate(y, x, psf_sigma))


def evaluate(morphology, y=GRID, x=GRID, psf_sigma=PSF_SIGMA):
    return np.asarray(_evaluate(morphology, jnp.asarray(y), jnp.asarray(x), jnp.asarray(psf_sigma)), float)


def shape_of(morphology):
    """Axis ratio and angle."""
    e = morphology.ellipticity
    norm, theta = np.hypot(*e), 0.5 * np.arctan2(e[1], e[0])
    return np.sqrt((1 - norm) / (1 + norm)), theta


def sersic_index(morphology):
    if isinstance(morphology, SersicMorphology | ClumpyMorphology):
        return float(morphology.sersic_index)
    return {GaussianMorphology: 0.5, ExponentialMorphology: 1.0, DeVaucouleursMorphology: 4.0}[type(morphology)]


def intrinsic_moments(morphology):
    """Second moments (xx, yy, xy) before the PSF, from semi-axes and angle."""
    if isinstance(morphology, MultiGaussianMorphology):
        variance = np.sum(morphology.amplitudes * morphology.sigmas**2) / np.sum(morphology.amplitudes)
    else:
        n = sersic_index(morphology)
        b = scipy.special.gammaincinv(2 * n, 0.5)
        # Half the mean square radius: Gamma(4 n) / Gamma(2 n) b^(-2 n) half-light radii squared, over the two axes.
        variance = 0.5 * morphology.half_light_radius**2 * b ** (-2 * n)
        variance *= scipy.special.gamma(4 * n) / scipy.special.gamma(2 * n)
    ratio, theta = shape_of(morphology)
    major, minor = np.sqrt(variance / ratio), np.sqrt(variance * ratio)
    c, s = np.cos(theta), np.sin(theta)
    return np.array(
        [major**2 * c**2 + minor**2 * s**2, major**2 * s**2 + minor**2 * c**2, (major**2 - minor**2) * c * s]
    )


def light_outside(morphology, low, high):
    """Fraction of a profile's light, before the PSF, that falls outside a square from `low` to `high` along both axes."""
    if isinstance(morphology, PointMorphology | AbstractImageMorphology):
        return 0.0
    ratio, theta = shape_of(morphology)
    angle = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    along, across = np.cos(angle) / np.sqrt(ratio), np.sin(angle) * np.sqrt(ratio)
    ray = np.stack([along * np.sin(theta) + across * np.cos(theta), along * np.cos(theta) - across * np.sin(theta)])
    # Where the ray from the center leaves the square, in units of the ellipse whose mean semi-axis is 1.
    with np.errstate(divide="ignore"):
        leaves = np.min(np.where(ray > 0, high / ray, low / ray), axis=0)
    if isinstance(morphology, MultiGaussianMorphology):
        outside = np.exp(-0.5 * (leaves[:, None] / morphology.sigmas) ** 2) @ morphology.amplitudes
        return np.mean(outside) / np.sum(morphology.amplitudes)
    n = sersic_index(morphology)
    b = scipy.special.gammaincinv(2 * n, 0.5)
    return np.mean(scipy.special.gammaincc(2 * n, b * (leaves / morphology.half_light_radius) ** (1 / n)))


def test_every_morphology_is_covered():
    assert final_classes(AbstractMorphology) == set(KINDS)


def test_unit_flux_with_what_falls_outside(morphology, eps):
    total = evaluate(morphology).sum() + light_outside(morphology, GRID[0] - 0.5, GRID[-1] + 0.5)
    # 1e-4: the PSF leaves exp(-2 pi^2 0.7^2) = 6e-5 of the profile at the sampling frequency; with the phase of this
    # grid that is 2 cos(2 pi 0.3) 6e-5 = -4e-5 of the sum on either axis. 20 eps: rounding of the sum.
    assert total == pytest.approx(1, abs=1e-4 + 20 * eps)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "Gaussian" in name and "small" not in name] + ["pixels"])
def test_no_negative_light(name):
    assert evaluate(EXAMPLES[name]).min() >= 0


def test_negative_light_is_ringing_alone(profile):
    """It vanishes behind a PSF that passes no frequency beyond Nyquist."""
    image = evaluate(profile, psf_sigma=WIDE_PSF_SIGMA)
    # 1e-5: ripples of the rings of flat profiles, whose weights are of both signs.
    assert image.min() >= -1e-5 * image.max()


@pytest.mark.parametrize("psf_sigma", [0.7, 1.5])
@pytest.mark.parametrize("name", [name for name in PROFILES if name not in ("point", "de Vaucouleurs", "cuspy Sersic")])
def test_moments_add_under_convolution_with_the_psf(name, psf_sigma):
    image = evaluate(PROFILES[name], psf_sigma=psf_sigma)
    y, x = GRID[:, None], GRID
    measured = [
        (image * y).sum(),
        (image * x).sum(),
        (image * x * x).sum(),
        (image * y * y).sum(),
        (image * y * x).sum(),
    ]
    xx, yy, xy = intrinsic_moments(PROFILES[name])
    # 5e-3: a fade of the ringing 8 pixels away, where it holds 4e-5 of the light; through the wide PSF 1e-5: rounding. 1e-3:
    # for an index below 1, the curve of growth is good to 6e-4.
    atol = 1e-3 if name == "flat Sersic" else 5e-3 if psf_sigma < 1 else 1e-5
    np.testing.assert_allclose(measured, [0, 0, xx + psf_sigma**2, yy + psf_sigma**2, xy], atol=atol, rtol=2e-5)


@pytest.mark.parametrize("name", [name for name in PROFILES if "Gaussian" in name and "small" not in name])
def test_wide_gaussians_are_samples_of_gaussians(name):
    """Compared with GalSim."""
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

    def wave(k):
        return 2 * np.exp(-2 * (np.pi * sigma * k) ** 2) * np.cos(2 * np.pi * k * np.asarray(offsets))

    return scipy.integrate.quad_vec(wave, 0, 0.5, epsabs=1e-12)[0]


@pytest.mark.parametrize("psf_sigma", [0.7, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(
    "morphology",
    [PointMorphology(), GaussianMorphology(0.8), MultiGaussianMorphology([0.5])],
    ids=lambda m: type(m).__name__,
)
def test_compact_profiles_have_no_frequencies_beyond_nyquist(morphology, psf_sigma):
    y, x = np.arange(-4, 5) - 0.3, np.arange(-4, 5) + 0.4
    image = evaluate(morphology, y, x, psf_sigma)
    sigma = np.hypot(
        psf_sigma,
        {GaussianMorphology: 0.8 / HALF_LIGHT_PER_SIGMA, MultiGaussianMorphology: 0.5}.get(type(morphology), 0),
    )
    expected = np.outer(band_limited(y, sigma), band_limited(x, sigma))
    # 3e-6 of the peak: rounding of sums over 32 frequencies in float32.
    np.testing.assert_allclose(image, expected, atol=3e-6 * expected.max())


def images_through(morphologies, center, shape, psf, *, scale=1, fine_shape=None):
    """Return the images of sources of unit flux, each in a channel of its own, rendered by one observation.

    `scale` is the side of the observed pixel in model pixels; the middles of frame and image coincide.
    """
    channels = [f"c{n}" for n in range(len(morphologies))]
    wcs = {"wcs": None} if scale == 1 else {"scale_arcsec": 0.1 * scale}
    frame = Frame(
        fine_shape or shape,
        channels=channels,
        padding=24,
        wcs=None if scale == 1 else tangent_wcs(fine_shape, 0.1),
    )
    data = np.zeros((len(channels), *shape))
    obs = make_observation(shape, channels=channels, psf=psf, data=data, **wcs).match(frame)
    fluxes = np.eye(len(channels))
    sources = [Source(center, flux, each) for flux, each in zip(fluxes, morphologies, strict=True)]
    # A crowded scene, in which stamps have no room to spare.
    sources += [Source(center, np.zeros(len(channels)), PointMorphology())] * 20
    return np.asarray(obs.render(Scene(frame, sources)), float)


COMPACT = {
    "points and Gaussians": [
        (PointMorphology(), 0.0),
        *((GaussianMorphology(r), r) for r in (0.05, 0.5, 1.0)),
        *((MultiGaussianMorphology([r / HALF_LIGHT_PER_SIGMA]), r) for r in (0.05, 0.5, 1.0)),
    ],
    # A Sersic profile of index 0.5 is a Gaussian.
    "Sersic": [(SersicMorphology(r, 0.5), r) for r in (0.05, 0.3, 0.5, 1.0)],
}


@pytest.mark.parametrize("fraction", [(0.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize(("sigma", "tolerance"), [(0.8, 4e-3), (1.0, 1.2e-3), (1.2, 4e-4), (1.5, 3e-4), (2.5, 3e-4)])
@pytest.mark.parametrize("kind", COMPACT)
def test_compact_sources_through_a_psf_are_as_broad_as_both(kind, sigma, tolerance, fraction):
    """Gaussians through a Gaussian PSF of `sigma` pixels on the same grid, as far as that grid can hold it.

    Samples of a point through the model PSF as they are would be off by 3.7e-2, 1.5e-2, 6e-3, 2e-3 and 5e-4 of the peak.
    """
    center = np.array([20.0, 20.0]) + fraction
    images = images_through([m for m, _ in COMPACT[kind]], center, (41, 41), GaussianPSF(sigma))
    for (_, radius), image in zip(COMPACT[kind], images, strict=True):
        width = np.hypot(sigma, radius / HALF_LIGHT_PER_SIGMA)
        expected = np.outer(*(band_limited(np.arange(41) - at, width) for at in center))
        error = np.abs(image - expected).max() / expected.max()
        # The tolerances: ringing beyond the stamp; for the flux, beyond the edge of the image.
        assert error < tolerance, radius
        assert image.sum() == pytest.approx(1.0, abs=0.5 * tolerance), radius


NAMED = {1.0: ExponentialMorphology, 4.0: DeVaucouleursMorphology}
SERSICS = [
    *((n, e) for n in (0.5, 1.0, 2.3, 4.0, 6.0) for e in ((0.0, 0.0), (0.3, -0.4))),
    (1.0, (0.0, 0.7)),
    (2.3, (0.8, 0.0)),
]


@pytest.mark.parametrize(("radius", "scale"), [(0.05, 1), (0.5, 1), (2.0, 1), (8.0, 1), (0.5, 2), (2.0, 2)])
def test_sersic_profiles_through_a_psf_against_galsim(radius, scale):
    """Of radius 0.05 to 8 model pixels, on the model's pixels and on pixels twice as large, integrated over the pixel."""
    galsim = pytest.importorskip("galsim")
    fine, shape = (62, 62), (62 // scale, 62 // scale)
    center, sigma = np.array([31.1, 30.3]), 1.3 / scale
    morphologies = [SersicMorphology(radius, n, e) for n, e in SERSICS]
    if radius == 2.0 and scale == 1:
        morphologies = [NAMED[n](radius, e) if n in NAMED else SersicMorphology(radius, n, e) for n, e in SERSICS]
    psf = GaussianPSF(sigma, integrate_pixel=True)
    images = images_through(morphologies, center, shape, psf, scale=scale, fine_shape=fine)
    place = (center - (fine[0] - 1) / 2) / scale
    y, x = (np.abs(np.arange(n) - (n - 1) / 2 - at) for n, at in zip(shape, place, strict=True))
    for (n, e), morphology, image in zip(SERSICS, morphologies, images, strict=True):
        accuracy = galsim.GSParams(
            # Light folded in from outside is spread over a large area: 3e-3 of the flux over (500 pixels)^2 for n = 6.
            folding_threshold={4.0: 1e-3, 6.0: 3e-3}.get(n, 1e-4),
            maxk_threshold=1e-5,
            kvalue_accuracy=1e-7,
            maximum_fft_size=20000,
        )
        profile = galsim.Sersic(n, half_light_radius=radius / scale, gsparams=accuracy).shear(e1=e[0], e2=e[1])
        both = galsim.Convolve(profile, galsim.Gaussian(sigma=sigma, gsparams=accuracy), gsparams=accuracy)
        truth = galsim.Image(*shape, dtype=float)
        both.shift(place[1], place[0]).drawImage(truth, scale=1)
        truth, peak = truth.array, truth.array.max()
        error = np.abs(image - truth)
        # Five standard deviations of the PSF within the stamp.
        reach = min(morphology.radius(PSF_SIGMA), 31 - 1) / scale - 5 * np.hypot(sigma, 0.3)
        middle = np.ix_(y < reach, x < reach)
        # 3e-4: the curve of growth of n = 0.5 is good to 6e-4. 1.5e-4: aliases in GalSim's samples.
        tolerance = 3e-4 if n == 0.5 else 1.5e-4
        assert error[middle].max() < tolerance * peak, (n, e)
        # Beyond, at most the light that is there is lost, and the ringing of a point: 4e-4, as above for this PSF.
        assert (error <= 4e-4 * peak + truth).all(), (n, e)


@pytest.mark.parametrize("radius", [0.3, 2.0])
def test_rings_against_galsim(radius):
    galsim = pytest.importorskip("galsim")
    sigmas, amplitudes, e = radius * np.array([0.4, 1.0, 2.5]), np.array([2.0, 5.0, 1.0]), (0.3, -0.4)
    center, sigma = np.array([20.3, 19.6]), 1.3
    morphology = MultiGaussianMorphology(sigmas, amplitudes, e)
    (image,) = images_through([morphology], center, (41, 41), GaussianPSF(sigma, integrate_pixel=True))
    accuracy = galsim.GSParams(folding_threshold=1e-5, maxk_threshold=1e-6, kvalue_accuracy=1e-8)
    rings = [galsim.Gaussian(sigma=s, flux=a / 8, gsparams=accuracy) for s, a in zip(sigmas, amplitudes, strict=True)]
    both = galsim.Convolve(galsim.Add(rings).shear(e1=e[0], e2=e[1]), galsim.Gaussian(sigma=sigma), gsparams=accuracy)
    truth = galsim.Image(41, 41, dtype=float)
    both.shift(center[1] - 20, center[0] - 20).drawImage(truth, scale=1)
    # 2e-4: aliases in GalSim's samples, exp(-2 pi^2 1.3^2 / 4) sinc(1/2) = 1.5e-4 of a point's spectrum at Nyquist.
    np.testing.assert_allclose(image, truth.array, atol=2e-4 * truth.array.max())


@pytest.mark.parametrize("ellipticity", [(0.0, 0.0), (0.5, 0.0), (-0.2, 0.5)])
@pytest.mark.parametrize("index", [None, 0.6, 1.0, 3.1, 4.0])
def test_half_the_light_inside_the_half_light_radius(index, ellipticity):
    radius, at = 66.0, np.arange(-100.0, 101.0)
    morphology = (
        GaussianMorphology(radius, ellipticity) if index is None else SersicMorphology(radius, index, ellipticity)
    )
    image = evaluate(morphology, at, at)
    ratio, theta = shape_of(morphology)
    along = at * np.cos(theta) + at[:, None] * np.sin(theta)
    across = at[:, None] * np.cos(theta) - at * np.sin(theta)
    inside = along**2 * ratio + across**2 / ratio < radius**2
    # 1e-3: 6e-4, the accuracy of the rings for indices below 1; (0.7 / 66)^2 / 2 = 6e-5 of what the PSF takes out of the
    # ellipse; and counting the pixels in it, of which there are 14000.
    assert image[inside].sum() == pytest.approx(0.5, abs=1e-3)


def test_named_profiles_are_sersic_profiles(eps):
    for n, named in NAMED.items():
        images = [evaluate(m) for m in (named(1.7, (0.1, 0.3)), SersicMorphology(1.7, n, (0.1, 0.3)))]
        # 20 eps: the compiler may reorder operations.
        np.testing.assert_allclose(*images, atol=20 * eps * images[0].max())


LARGE = {
    "Gaussian": GaussianMorphology(6.0, (0.3, -0.2)),
    "flat Sersic": SersicMorphology(7.0, 0.6),
    "exponential": ExponentialMorphology(5.0, (0.0, 0.5)),
    "de Vaucouleurs": DeVaucouleursMorphology(1.0, (0.3, 0.3)),
    "cuspy Sersic": SersicMorphology(0.5, 6.0),
    "rings": MultiGaussianMorphology([1.0, 6.0], [0.3, 0.7], (0.3, 0.2)),
}


@pytest.mark.parametrize("name", [*PROFILES, *LARGE])
def test_the_stamp_holds_the_light(name):
    profile = (PROFILES | LARGE)[name]
    half = int(np.ceil(profile.radius(PSF_SIGMA)))
    axis = np.round(GRID)
    assert half <= axis.max()
    image = evaluate(profile, axis, axis)[np.ix_(np.abs(axis) <= half, np.abs(axis) <= half)]
    tolerance = CORE_FLUX_TOLERANCE if type(profile) in (PointMorphology, GaussianMorphology) else STAMP_FLUX_TOLERANCE
    # 1e-4: as for the unit sum.
    assert 1 - image.sum() < tolerance + 1e-4


@pytest.mark.parametrize("name", LARGE)
def test_stamps_of_large_profiles_are_not_needlessly_large(name):
    """The isophote that touches a stamp smaller by a fifth doesn't hold the light."""
    profile = LARGE[name]
    touching = 0.8 * profile.radius(PSF_SIGMA) * np.sqrt(shape_of(profile)[0])
    if isinstance(profile, MultiGaussianMorphology):
        # The stamp is that of its widest ring.
        outside = np.exp(-0.5 * (touching / profile.sigmas[-1]) ** 2)
    else:
        n = sersic_index(profile)
        b = scipy.special.gammaincinv(2 * n, 0.5)
        outside = scipy.special.gammaincc(2 * n, b * (touching / profile.half_light_radius) ** (1 / n))
    assert outside > (CORE_FLUX_TOLERANCE if name == "Gaussian" else STAMP_FLUX_TOLERANCE)


def test_parameters_are_fields_within_their_constraints(morphology):
    for name, constraint in morphology.constraints.items():
        assert np.all(constraint(jnp.asarray(getattr(morphology, name))))


@eqx.filter_jit
def along(morphology, values, directions):
    """Return the image with changed parameters, at an offset, and its derivative along a direction in them."""

    def image(values):
        names = list(morphology.constraints)
        changed = eqx.tree_at(lambda m: [getattr(m, n) for n in names], morphology, [values[n] for n in names])
        y, x = jnp.asarray(GRID[33:48]) - values["offset"][0], jnp.asarray(GRID[30:50]) - values["offset"][1]
        return changed.evaluate(y, x, jnp.asarray(PSF_SIGMA))

    return jax.jvp(image, (values,), (directions,))


def values_of(morphology):
    values = {name: np.asarray(getattr(morphology, name), float) for name in morphology.constraints}
    return values | {"offset": np.zeros(2)}


# Those named after an index are the same functions, see above.
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ("exponential", "de Vaucouleurs")])
def test_derivatives_equal_finite_differences(name):
    morphology = EXAMPLES[name]
    values = values_of(morphology)
    for parameter, value in values.items():
        if isinstance(morphology, AbstractImageMorphology) and parameter == "offset":
            continue
        for index in np.ndindex(value.shape):
            direction = {n: np.zeros_like(v) for n, v in values.items()}
            direction[parameter][index] = step = 1e-3 * max(0.1, abs(value[index]))
            with jax.enable_x64(True):
                slope = np.asarray(along(morphology, values, direction)[1])
                ahead, behind = (
                    np.asarray(along(morphology, {n: v + sign * direction[n] for n, v in values.items()}, direction)[0])
                    for sign in (1, -1)
                )
            assert np.abs(slope).max() > 1e-4 * step
            # 1e-4: truncation, a sixth of the square of 1e-3 (1e-2 of small values) times the third derivative.
            np.testing.assert_allclose(slope, (ahead - behind) / 2, atol=1e-4 * np.abs(slope).max())


def test_no_singularity_where_round(eps):
    """The quadratic response to an ellipticity is the same in all directions and smooth at zero."""

    def image(e, radius):
        return GaussianMorphology(radius, e).evaluate(jnp.arange(-6.0, 7), jnp.arange(-6.0, 7), jnp.asarray(PSF_SIGMA))

    def along_direction(e, radius, direction):
        """First and second derivative."""

        def slope(e):
            return jax.jvp(lambda e: image(e, radius), (e,), (direction,))[1]

        return jax.jvp(slope, (e,), (direction,))

    derivatives = jax.jit(along_direction)
    # A compact one and a wide one.
    for radius in (1.0, 2.0):
        slopes = []
        for direction in np.array([[1, 0], [0, 1], [np.sqrt(0.5), np.sqrt(0.5)]]):
            slope, second = (np.asarray(each) for each in derivatives(jnp.zeros(2), jnp.asarray(radius), direction))
            assert np.abs(slope).max() > 1e-3
            assert np.isfinite(second).all()
            slopes.append(slope)
        # 100 eps: a round profile looks the same from x and y, up to the rounding of a few operations; the derivative along a
        # direction between both axes is the sum of theirs.
        np.testing.assert_allclose(slopes[0], -slopes[0].T, atol=100 * eps)
        np.testing.assert_allclose(slopes[2], np.sqrt(0.5) * (slopes[0] + slopes[1]), atol=100 * eps)


def test_extreme_ellipticities_stay_finite():
    norm = 0.999
    morphology = PROFILES["round Gaussian"]
    values = values_of(morphology)
    directions = {n: np.full_like(v, 0.1) for n, v in values.items()}
    for e in ([norm, 0.0], [0.0, -norm]):
        for radius in (0.5, 2.0):
            extreme = {"ellipticity": np.array(e), "half_light_radius": np.array(radius)}
            image, slope = along(morphology, values | extreme, directions)
            assert np.isfinite(image).all()
            assert np.isfinite(slope).all()
    for kind in (GaussianMorphology, ExponentialMorphology, DeVaucouleursMorphology):
        assert np.isfinite(kind(2.0, (norm, 0.0)).radius(0.7))
    assert not unit_disk(jnp.asarray([0.8, 0.7]))


def test_jit_and_vmap_change_nothing(eps):
    centers = np.array([0.0, 0.4, -2.3])
    profile, x = PROFILES["turned Gaussian"], jnp.asarray(GRID[30:50])

    def image(center):
        return profile.evaluate(x - center, x, jnp.asarray(PSF_SIGMA))

    loop = np.stack([image(c) for c in centers])
    # 20 eps: the compiler may reorder operations.
    np.testing.assert_allclose(jax.jit(jax.vmap(image))(jnp.asarray(centers)), loop, atol=20 * eps)


# ---- rings of free amplitudes


def test_only_ratios_of_amplitudes_count(eps):
    example = PROFILES["rings"]
    scaled = MultiGaussianMorphology(example.sigmas, 7 * example.amplitudes, example.ellipticity)
    # 20 eps: rounding of the normalisation.
    np.testing.assert_allclose(evaluate(scaled), evaluate(example), atol=20 * eps)


def test_no_amplitude_is_no_light():
    rings = PROFILES["rings"]
    values = values_of(rings) | {"amplitudes": np.zeros(3)}
    direction = {name: np.zeros_like(value) for name, value in values.items()} | {"amplitudes": np.ones(3)}
    with jax.enable_x64(True):
        image, slope = along(rings, values, direction)
    assert not np.asarray(image).any()
    assert np.isfinite(slope).all()


def test_spacings_of_rings():
    rings = MultiGaussianMorphology.log_spaced(0.5, 8.0, 5, (0.1, 0.2))
    # 1e-12: rounding of logarithms.
    np.testing.assert_allclose(rings.sigmas, [0.5, 1, 2, 4, 8], rtol=1e-12)
    np.testing.assert_allclose(rings.amplitudes, 0.2, rtol=1e-12)
    np.testing.assert_array_equal(rings.ellipticity, [0.1, 0.2])
    rings = MultiGaussianMorphology.asinh_spaced(0.01, 30.0, 40, scale=2.0)
    np.testing.assert_allclose(rings.sigmas[[0, -1]], [0.01, 30.0], rtol=1e-12)
    steps = np.diff(rings.sigmas)
    # Linear within the scale, by a constant ratio far beyond it; 2 %: (sigma / scale)^2 / 2 at 0.4, (scale / sigma)^2 / 2 at 15.
    small, large = rings.sigmas < 0.4, rings.sigmas > 15.0
    np.testing.assert_allclose(steps[small[1:]], steps[0], rtol=0.02)
    ratios = rings.sigmas[large][1:] / rings.sigmas[large][:-1]
    np.testing.assert_allclose(ratios, ratios[-1], rtol=0.02)


@pytest.mark.parametrize(
    "sigmas", [[2.0, 1.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 1.0], [], [np.nan, 1.0], 3.0, [[1.0, 2.0]]]
)
def test_widths_of_rings_that_make_no_sense(sigmas):
    with pytest.raises(ValueError, match=r"positive, increasing widths, shape \(ring,\); got"):
        MultiGaussianMorphology(sigmas)


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
    with pytest.raises(ValueError, match=r"shape \(\); got \(1,\)"):
        SersicMorphology(1.0, [2.0])
    with pytest.raises(ValueError, match=r"shape \(\); got \(2,\)"):
        ExponentialMorphology([1.0, 2.0])
    with pytest.raises(ValueError, match=r"shape \(2,\); got \(\)"):
        DeVaucouleursMorphology(1.0, 0.3)
    with pytest.raises(ValueError, match=r"shape \(2,\); got \(3,\)"):
        MultiGaussianMorphology([1.0, 2.0], [1.0, 1.0, 1.0])
