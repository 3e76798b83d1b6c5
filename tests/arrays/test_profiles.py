import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from scenefit.arrays.profiles import (
    COMPACT_RINGS,
    RING_SPACING,
    RINGING_FADE,
    SERSIC_RANGE,
    SMALLEST_RING,
    evaluate_rings,
    num_rings,
    ring_sigmas,
    ringing_radius,
    sersic_b,
    sersic_weights,
)

# The widest of so many rings has 4e10 pixels, beyond all light.
ALL_RINGS = 75
INDICES = (0.5, 0.8, 1.0, 2.3, 4.0, 6.0)
RADII = (0.05, 0.3, 1.0, 3.0, 10.0, 50.0)
PSF_SIGMA = 0.7

weights_of = jax.jit(sersic_weights, static_argnums=2)


def curve_of_growth(index, half_light_radius, radius):
    """Fraction of a Sersic profile's light inside a radius: Graham & Driver 2005, eq. 2."""
    return scipy.special.gammainc(2 * index, bn(index) * (radius / half_light_radius) ** (1 / index))


def bn(index):
    return scipy.optimize.brentq(lambda b: scipy.special.gammainc(2 * index, b) - 0.5, 1e-3, 30)


def surface_brightness(index, half_light_radius, radius):
    b = bn(index)
    total = 2 * np.pi * index * half_light_radius**2 * b ** (-2 * index) * scipy.special.gamma(2 * index)
    return np.exp(-b * (radius / half_light_radius) ** (1 / index)) / total


def rings_inside(weights, radius, psf_sigma=0.0):
    """Fraction of the light of rings inside a radius, seen through a Gaussian PSF."""
    variance = ring_sigmas(ALL_RINGS) ** 2 + psf_sigma**2
    with np.errstate(divide="ignore"):
        return np.sum(np.asarray(weights, float) * -np.expm1(-0.5 * np.asarray(radius)[..., None] ** 2 / variance), -1)


def growth_tolerance(index):
    """Accuracy of the curve of growth that the documentation states, and less where the index is below 0.5."""
    return 2e-3 if index < 0.5 else 6e-4 if index < 1 else 2e-5


@pytest.mark.parametrize("index", [*INDICES, *SERSIC_RANGE])
def test_b_is_where_half_the_light_is(index):
    # 1e-12: tolerance of the root finder.
    assert sersic_b(index) == pytest.approx(bn(index), rel=1e-12)


def test_ring_widths():
    sigmas = ring_sigmas(9)
    assert sigmas[:2].tolist() == [0, SMALLEST_RING]
    # 1e-12: rounding of an exponential.
    np.testing.assert_allclose(np.diff(np.log(sigmas[1:])), RING_SPACING, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 11, 200])
def test_rings_reach_over_the_image_and_not_far_beyond(size):
    widest = ring_sigmas(num_rings(size))[-1]
    assert size <= widest
    assert num_rings(size) == 2 or widest < size * np.exp(RING_SPACING)


# ---- weights


@pytest.mark.parametrize("index", [*INDICES, *SERSIC_RANGE])
def test_total_flux(index, eps):
    for radius in RADII:
        # 2e-5: light of n = 8 beyond exp(8) half-light radii, where the table ends. 20 eps: rounding.
        assert np.sum(weights_of(index, radius, ALL_RINGS)) == pytest.approx(1, abs=2e-5 + 20 * eps)


@pytest.mark.parametrize("radius", RADII[2:])
@pytest.mark.parametrize("index", [*INDICES, *SERSIC_RANGE])
def test_curve_of_growth(index, radius, eps):
    inside = np.maximum(radius * np.geomspace(0.2, 10, 30), 1.0)
    ours = rings_inside(weights_of(index, radius, ALL_RINGS), inside)
    # 20 eps: rounding.
    np.testing.assert_allclose(ours, curve_of_growth(index, radius, inside), atol=growth_tolerance(index) + 20 * eps)
    # The radius that holds half the light is right to 1e-3.
    below, above = rings_inside(weights_of(index, radius, ALL_RINGS), radius * np.array([0.999, 1.001]))
    assert below < 0.5 < above


def seen_inside(index, half_light_radius, radius):
    """Fraction of the light inside a radius through the PSF: of each shell of the profile, a non-central chi-square."""
    nodes, node_weights = np.polynomial.legendre.leggauss(120)
    fraction = 0.5 + 0.5 * nodes
    shell = half_light_radius * (scipy.special.gammaincinv(2 * index, fraction) / bn(index)) ** index
    inside = scipy.stats.ncx2.cdf(np.atleast_1d(radius)[:, None] ** 2 / PSF_SIGMA**2, 2, (shell / PSF_SIGMA) ** 2)
    return inside @ node_weights / 2


@pytest.mark.parametrize("radius", RADII[:3])
@pytest.mark.parametrize("index", [0.5, 1.0, 4.0])
def test_compact_profiles_seen_through_the_psf(index, radius):
    """Light within the smallest ring is told from a point by its second moment only."""
    weights = weights_of(index, radius, ALL_RINGS)
    inside = np.hypot(radius, PSF_SIGMA) * np.geomspace(0.3, 6, 12)
    # 1.2e-4: a fourth moment, (SMALLEST_RING / PSF_SIGMA)^4 / 8 = 8e-4 of the light that is so compact, less than a sixth.
    tolerance = max(growth_tolerance(index), 1.2e-4)
    np.testing.assert_allclose(
        rings_inside(weights, inside, PSF_SIGMA), seen_inside(index, radius, inside), atol=tolerance
    )
    half = scipy.optimize.brentq(lambda at: rings_inside(weights, at, PSF_SIGMA) - 0.5, 0.1, 10)
    below, above = seen_inside(index, radius, half * np.array([0.999, 1.001]))
    assert below < 0.5 < above


@pytest.mark.parametrize("radius", RADII[2:])
@pytest.mark.parametrize("index", INDICES)
def test_surface_brightness(index, radius):
    reach = radius * (scipy.special.gammaincinv(2 * index, 0.99) / bn(index)) ** index
    at = np.geomspace(max(1.0, 0.2 * radius), reach, 30)
    sigmas, weights = ring_sigmas(ALL_RINGS)[1:], np.asarray(weights_of(index, radius, ALL_RINGS), float)[1:]
    ours = np.sum(weights / (2 * np.pi * sigmas**2) * np.exp(-0.5 * (at[:, None] / sigmas) ** 2), axis=-1)
    expected = surface_brightness(index, radius, at)
    # In units of that at the half-light radius: ripples at the spacing of the rings, which fall with the index; above n = 1
    # they are 2e-4 of the brightness itself (cubic splines of the table).
    atol = {0.5: 3e-3, 0.8: 3e-4, 1.0: 3e-5}.get(index, 0.0) * surface_brightness(index, radius, radius)
    np.testing.assert_allclose(ours, expected, atol=atol, rtol=3e-4)


def test_few_rings_keep_the_brightness_of_the_middle():
    """Of light in rings wider than the widest, what it adds near the centre is kept."""
    at = np.arange(11.0)
    for index, radius in ((1.0, 20.0), (4.0, 8.0), (6.0, 50.0)):
        profiles = []
        for count in (num_rings(21), ALL_RINGS):
            sigmas, weights = ring_sigmas(count), np.asarray(weights_of(index, radius, count), float)
            variance = sigmas**2 + PSF_SIGMA**2
            profiles.append(np.sum(weights / variance * np.exp(-0.5 * at[:, None] ** 2 / variance), axis=-1))
        # 3e-4: at 10 of its 27 pixels the widest ring has fallen by 7 %, and wider ones, which it stands for, by less: of a
        # light of 0.6 % of the middle's, for the exponential, the most of these.
        np.testing.assert_allclose(profiles[0], profiles[1], atol=3e-4 * profiles[1].max())


@functools.cache
def weights_and_slopes():
    """Return a compiled function of (index, radius): weights, and their derivatives along the logarithm of each."""

    def function(index, radius):
        return sersic_weights(index, radius, 40)

    def both(index, radius):
        along_index = jax.jvp(lambda n: function(n, radius), (index,), (index,))[1]
        along_radius = jax.jvp(lambda r: function(index, r), (radius,), (radius,))[1]
        return function(index, radius), along_index, along_radius

    return jax.jit(jax.vmap(both))


@pytest.mark.parametrize("argument", [0, 1], ids=["index", "radius"])
def test_derivatives_of_the_weights(argument):
    points = np.array([(n, r) for n in (*INDICES, *SERSIC_RANGE) for r in RADII]).T
    step = 1e-4
    ahead, behind = points.copy(), points.copy()
    ahead[argument] *= np.exp(step)
    behind[argument] *= np.exp(-step)
    with jax.enable_x64(True):
        slopes = np.asarray(weights_and_slopes()(*points)[1 + argument])
        values = [np.asarray(weights_and_slopes()(*each)[0]) for each in (ahead, behind)]
    scale = np.abs(slopes).max(axis=1, keepdims=True)
    assert scale.min() > 1e-3
    # 1e-5: third derivatives, up to (2 pi / RING_SPACING)^2 = 300 times the first, and step^2 / 6.
    assert (np.abs(slopes - (values[0] - values[1]) / (2 * step)) <= 1e-5 * scale).all()
    # Flux goes from one ring to another; 3e-3: light of n = 8 beyond the widest of 40 rings and the end of the table.
    assert (np.abs(slopes.sum(axis=1)) <= 3e-3 * scale[:, 0]).all()


@pytest.mark.parametrize("argument", [0, 1], ids=["index", "radius"])
def test_weights_have_no_kinks(argument):
    """Second differences fall with the square of the step: a kink would make them fall with the step, a jump not at all."""

    def largest(count):
        index, radius = np.full(count, 1.5), np.full(count, 2.0)
        if argument == 0:
            index = np.geomspace(*SERSIC_RANGE, count)
        else:
            radius = np.geomspace(RADII[0], RADII[-1], count)
        with jax.enable_x64(True):
            weights = np.asarray(weights_and_slopes()(index, radius)[0])
        return np.abs(np.diff(weights, n=2, axis=0)).max()

    # 3.5 instead of 4: what is left of the third order.
    assert largest(1001) > 3.5 * largest(2001)


# ---- evaluation on pixels


evaluate = jax.jit(evaluate_rings)
Y, X = np.arange(-14, 15) + 0.3, np.arange(-16, 17) - 0.2


def moments(sigma, ellipticity, psf_sigma):
    """((yy, xy), (xy, xx)) from the semi-axes and the angle."""
    norm, theta = np.hypot(*ellipticity), 0.5 * np.arctan2(ellipticity[1], ellipticity[0])
    ratio = np.sqrt((1 - norm) / (1 + norm))
    turn = np.array([[np.sin(theta), np.cos(theta)], [np.cos(theta), -np.sin(theta)]])
    return turn @ np.diag([sigma**2 / ratio, sigma**2 * ratio]) @ turn.T + psf_sigma**2 * np.eye(2)


def sampled(y, x, covariance):
    inverse = np.linalg.inv(covariance)
    exponent = inverse[0, 0] * y[:, None] ** 2 + 2 * inverse[0, 1] * y[:, None] * x + inverse[1, 1] * x**2
    return np.exp(-0.5 * exponent) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))


def band_limited(y, x, covariance):
    """A Gaussian without frequencies beyond 1/2 in either direction, by quadrature over the square of them."""
    nodes, node_weights = np.polynomial.legendre.leggauss(100)
    k = 0.5 * nodes
    power = covariance[0, 0] * k[:, None] ** 2 + 2 * covariance[0, 1] * k[:, None] * k + covariance[1, 1] * k**2
    modes = np.exp(-2 * np.pi**2 * power) * np.outer(node_weights, node_weights) / 4
    return (np.exp(2j * np.pi * np.outer(y, k)) @ modes @ np.exp(2j * np.pi * np.outer(k, x))).real


def core(y, x, covariance):
    """Pixels as near as the ringing of the frequency cut is kept, in units of the largest distance along an axis."""
    flat = ringing_radius(np.sqrt(np.diag(covariance).max()))
    return np.ix_(np.abs(y) <= flat, np.abs(x) <= flat)


COMPACT = [(0.0, 0.7), (0.2, 0.7), (0.5, 0.5), (0.9, 1.0)]
SHAPES = [(0.0, 0.0), (0.5, 0.3), (-0.2, 0.85)]


@pytest.mark.parametrize(("sigma", "psf_sigma"), COMPACT)
def test_compact_rings_are_band_limited(sigma, psf_sigma, eps):
    for ellipticity in SHAPES:
        covariance = moments(sigma, ellipticity, psf_sigma)
        expected = band_limited(Y, X, covariance)
        image = np.asarray(evaluate(Y, X, np.array([sigma]), np.ones(1), np.array(ellipticity), psf_sigma))
        near = core(Y, X, covariance)
        # 1e-6: the quadrature's own error where the ellipse is long. 20 eps: rounding of sums over 32 frequencies.
        np.testing.assert_allclose(image[near], expected[near], atol=(1e-6 + 20 * eps) * expected.max())
        # Beyond, it never rings more than it should.
        assert (np.abs(image) <= np.abs(expected) + (1e-6 + 20 * eps) * expected.max()).all()


def test_ringing_ends():
    image = np.asarray(evaluate(Y, X, np.array([0.3]), np.ones(1), np.zeros(2), 0.5))
    end = ringing_radius(np.hypot(0.3, 0.5)) + RINGING_FADE
    outside = (np.abs(Y)[:, None] > end) | (np.abs(X) > end)
    assert outside.any()
    # 1e-12: a cosine that is zero but for rounding, squared.
    assert np.abs(image[outside]).max() < 1e-12
    assert np.abs(image[~outside]).min() > 1e-12


def test_wide_rings_are_sampled(eps):
    sigmas = np.array([1.2, 2.0, 6.0, 40.0])
    weights = np.array([0.3, -0.1, 0.5, 0.3])
    for ellipticity in SHAPES:
        image = evaluate(Y, X, sigmas, weights, np.array(ellipticity), 0.7)
        parts = [w * sampled(Y, X, moments(s, ellipticity, 0.7)) for s, w in zip(sigmas, weights, strict=True)]
        # 100 eps: rounding of exponents up to some ten.
        np.testing.assert_allclose(image, sum(parts), atol=100 * eps * np.max(parts))


def test_a_sum_of_rings_is_the_sum_of_each(eps):
    """Whether the widths are known beforehand or traced."""
    sigmas = np.array([0.0, 0.3, 0.85, 0.95, 1.1, 1.3, 5.0])
    weights = np.array([0.1, 0.2, 0.3, -0.1, 0.2, 0.2, 0.1])
    ellipticity = np.array([0.3, -0.4])
    each = jax.jit(jax.vmap(lambda s, w: evaluate_rings(Y, X, s[None], w[None], ellipticity, 1.5)))
    parts = np.asarray(each(jnp.asarray(sigmas), jnp.asarray(weights)))
    known = jax.jit(lambda w: evaluate_rings(Y, X, sigmas, w, ellipticity, 1.5))
    for image in (known(weights), evaluate(Y, X, sigmas, weights, ellipticity, 1.5)):
        # 2e-6: what narrow rings ring with, 1e-6 for this PSF, fades out farther away beside wider ones. 20 eps: rounding.
        np.testing.assert_allclose(image, parts.sum(axis=0), atol=(2e-6 + 20 * eps) * np.max(image))


@functools.partial(jax.jit, static_argnums=(1, 2))
def image_and_derivatives(corner, height, width, shape, cotangent):
    """Rings of given center, ellipticity and PSF on part of a grid, their derivatives, and the product of these with an image."""
    sigmas, weights = np.array([0.0, 0.5, 1.0, 2.0, 9.0]), np.array([0.2, 0.3, 0.2, 0.1, 0.2])

    def image(shape):
        y, x = (jnp.arange(n) + first - at for n, first, at in zip((height, width), corner, shape[:2], strict=True))
        return evaluate_rings(y, x, sigmas, weights, shape[2:4], shape[4])

    value, along = jax.linearize(image, shape)
    (against,) = jax.linear_transpose(along, shape)(cotangent)
    return jnp.concatenate([value[None], jax.vmap(along)(jnp.eye(len(shape)))]), against


@pytest.mark.parametrize("center", [(71.3, 60.8), (2.2, 145.1), (-20.4, 80.0), (152.0, 170.3)])
def test_narrow_rings_on_a_large_grid(center, eps):
    """What is seen of a profile doesn't depend on how large the grid is, nor do its derivatives; wherever its center is."""
    size, tile = 150, 50
    shape, cotangent = jnp.array([*center, 0.3, -0.4, 1.2]), np.random.default_rng(0).normal(size=(size, size))
    whole, slope = image_and_derivatives(jnp.zeros(2), size, size, shape, jnp.asarray(cotangent))
    tiled, total = np.zeros(whole.shape), 0.0
    for y in range(0, size, tile):
        for x in range(0, size, tile):
            part = (slice(y, y + tile), slice(x, x + tile))
            tiled[:, *part], own = image_and_derivatives(
                jnp.array([y, x]), tile, tile, shape, jnp.asarray(cotangent[part])
            )
            total = total + own
    largest = np.abs(tiled).max(axis=(1, 2), keepdims=True)
    # 1e3 eps: rounding of phases of up to 2 pi 100.
    np.testing.assert_allclose(whole / largest, tiled / largest, atol=1e3 * eps)
    np.testing.assert_allclose(slope, total, atol=1e3 * eps * np.abs(total).max())


def test_pixels_are_one_apart():
    with pytest.raises(ValueError, match="on pixels that are 1 apart; got coordinates"):
        evaluate_rings(0.5 * Y, X, np.array([0.5]), np.ones(1), np.zeros(2), PSF_SIGMA)


def test_the_blend_between_compact_and_wide_rings():
    """Neither value nor slope jumps while a width passes from one to the other."""
    low, high = COMPACT_RINGS

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def images_and_slopes(sigma, ellipticity):
        def image(sigma):
            return evaluate_rings(Y, X, sigma[None], jnp.ones(1), ellipticity, PSF_SIGMA)

        return jax.jvp(image, (sigma,), (jnp.ones(()),))

    step = 0.0025
    widths = np.arange(low - 0.1, high + 0.1, step)
    for ellipticity in SHAPES[:2]:
        with jax.enable_x64(True):
            images, slopes = (np.asarray(each) for each in images_and_slopes(widths, np.array(ellipticity)))
        # As for the weights: second differences at twice the step are nearly four times as large.
        fine, coarse = (np.abs(np.diff(each, n=2, axis=0)).max() for each in (images, images[::2]))
        assert coarse > 3.5 * fine
        expected = (images[2:] - images[:-2]) / (2 * step)
        # 1e-4: third derivative times step^2 / 6, with a blend over 0.3 pixels.
        np.testing.assert_allclose(slopes[1:-1], expected, atol=1e-4 * np.abs(expected).max())
        for sigma, image in zip(widths[::20], images[::20], strict=True):
            covariance = moments(sigma, ellipticity, PSF_SIGMA)
            ends = [function(Y, X, covariance) for function in (band_limited, sampled)]
            # Between both, which differ by what lies beyond Nyquist along the narrow axis; 1e-6: the quadrature.
            room = np.abs(ends[1] - ends[0]) + 1e-6 * ends[0].max()
            near = core(Y, X, covariance)
            assert (np.abs(image - ends[0])[near] <= room[near]).all()


# ---- derivatives


NAMES = ("y", "x", "sigmas", "weights", "ellipticity", "psf_sigma")
POINT = (
    np.arange(-5, 6) + 0.3,
    np.arange(-6, 7) - 0.2,
    np.array([0.5, 1.1, 3.0]),
    np.array([0.2, 0.5, 0.3]),
    np.array([0.2, 0.3]),
    np.array(0.7),
)
SUBSETS = [(1,), (2,), (3,), (4,), (5,), (0, 1, 3), (0, 1, 2, 3, 4, 5)]


def loss(*arguments):
    """A number that depends on all pixels, not linearly."""
    return jnp.sum(jnp.sin(20 * evaluate_rings(*arguments)))


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(NAMES[n] for n in subset))
def test_gradients_along_some_arguments(subset, rng):
    directions = [rng.normal(size=POINT[n].shape) for n in subset]

    def at(t):
        changed = list(POINT)
        for n, direction in zip(subset, directions, strict=True):
            changed[n] = POINT[n] + t * direction
        return float(jitted_loss(*changed))

    with jax.enable_x64(True):
        gradients = jax.jit(jax.grad(loss, argnums=subset))(*POINT)
        slope = sum(float(np.sum(g * d)) for g, d in zip(gradients, directions, strict=True))
        step = 1e-4
        # 1e-6: third derivatives of order 100 times step^2 / 6.
        assert slope == pytest.approx((at(step) - at(-step)) / (2 * step), rel=1e-6, abs=1e-6)


jitted_loss = jax.jit(loss)


def test_second_derivatives_forwards_over_backwards(rng):
    """Of all arguments together, along a direction; vectorised over two points."""
    points = [np.stack([each, each + 0.05]) for each in POINT]
    directions = [0.3 * rng.normal(size=each.shape) for each in points]

    @jax.jit
    @jax.vmap
    def product(point, direction):
        return jax.jvp(jax.grad(lambda p: loss(*p)), (point,), (direction,))

    with jax.enable_x64(True):
        slopes = product(points, directions)[1]
        step = 1e-4
        ahead, behind = (
            product([p + sign * step * d for p, d in zip(points, directions, strict=True)], directions)[0]
            for sign in (1, -1)
        )
        for slope, a, b in zip(slopes, ahead, behind, strict=True):
            # 1e-5: third derivatives and step^2 / 6.
            np.testing.assert_allclose(slope, (a - b) / (2 * step), atol=1e-5 * np.abs(slope).max())


# ---- against GalSim


SIZE = 61


@jax.jit
def sersic(y, x, index, radius, ellipticity, psf_sigma):
    count = num_rings(2 * SIZE)
    return evaluate_rings(y, x, ring_sigmas(count), sersic_weights(index, radius, count), ellipticity, psf_sigma)


@pytest.mark.parametrize("radius", [0.05, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("index", [0.5, 1.0, 2.3, 4.0, 6.0])
def test_sersic_against_galsim(index, radius, eps):
    galsim = pytest.importorskip("galsim")
    # A PSF wide enough for its samples to hold no aliases: exp(-2 pi^2 1.8^2 / 4) = 1e-7 is left at Nyquist.
    psf_sigma = 1.8
    accuracy = galsim.GSParams(
        # Light folded in from outside is spread over a large area: 2e-3 of the flux over (600 pixels)^2 for n = 6.
        folding_threshold={4.0: 1e-3, 6.0: 2e-3}.get(index, 1e-5),
        maxk_threshold=1e-5,
        kvalue_accuracy=1e-7,
        maximum_fft_size=20000,
    )
    y, x = np.arange(SIZE) - 30 + 0.4, np.arange(SIZE) - 30 - 0.2
    profile = galsim.Sersic(index, half_light_radius=radius, gsparams=accuracy)
    psf = galsim.Gaussian(sigma=psf_sigma, gsparams=accuracy)
    for ellipticity in ((0.0, 0.0), (0.3, -0.4), (0.0, 0.8)):
        sheared = profile.shear(e1=ellipticity[0], e2=ellipticity[1])
        image = galsim.Image(SIZE, SIZE, dtype=float)
        galsim.Convolve(sheared, psf, gsparams=accuracy).shift(0.2, -0.4).drawImage(image, scale=1, method="no_pixel")
        ours = sersic(y, x, index, radius, np.array(ellipticity), psf_sigma)
        # 3e-4 for n = 0.5: its curve of growth is good to 6e-4; else 3e-5: the accuracy asked of GalSim; twice that for light
        # within the smallest ring, of which only the second moment is right.
        tolerance = 3e-4 if index == 0.5 else 6e-5 if radius < SMALLEST_RING else 3e-5
        np.testing.assert_allclose(ours, image.array, atol=tolerance * image.array.max())
