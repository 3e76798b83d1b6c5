import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scenefit.arrays import vecchia
from scenefit.arrays.vecchia import (
    JITTER,
    NOT_POSITIVE,
    DenseWhitening,
    Order,
    SparseWhitening,
    choose_order,
    lattice_number,
    lattices,
    neighbors,
    whitening,
)
from tests.correlations import (
    CORRELATIONS,
    autocorrelation,
    bands_of,
    covariance_of,
    gaussian_kernel,
    holes,
    matrix_of,
    propagated,
)

LARGE = (35, 34)
"""Above the limit for dense matrices, neither side a multiple of the strides of 4."""
SUPPORT = 5e-4
GRIDS = [
    (1, 2, (13, 11)),
    (1, 4, (1, 30)),
    (1, 8, (13, 11)),
    (1, 8, (5, 6)),
    (2, 2, (23, 1)),
    (2, 4, (13, 11)),
    (3, 4, (13, 11)),
    (3, 2, (1, 30)),
]
"""Step, stride and shape: sides that aren't multiples of strides, an image smaller than a stride, rows, a column."""


@pytest.fixture(autouse=True)
def double():
    """All in double precision: single precision has tests of its own."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def never_dense(monkeypatch):
    monkeypatch.setattr(vecchia, "MAX_DENSE", 0)


@dataclass
class Study:
    """What a whitening does to noise of a known covariance.

    Attributes
    ----------
    valid, kept : array of bool, shape (y * x,)
        Pixels with information, and those that are whitened.
    matrix, diagonal : arrays, shape (y * x, y * x) and (y * x,)
        The whitening, and what it says its diagonal is.
    covariance, whitened : arrays
        Of pixels, shape (y * x, y * x); of whitened values, those kept alone.
    """

    valid: np.ndarray
    kept: np.ndarray
    matrix: np.ndarray
    diagonal: np.ndarray
    covariance: np.ndarray
    whitened: np.ndarray

    @property
    def divergence(self):
        """Kullback-Leibler divergence of the likelihood from the true one, per pixel."""
        count = len(self.whitened)
        return 0.5 * (np.trace(self.whitened) - count - np.linalg.slogdet(self.whitened)[1]) / count

    def error_ratio(self, shape, sigma):
        """Ratio of the scatter of the flux of a Gaussian profile in the middle to its error, both as the whitening has it."""
        square = sum(
            ((n - (size - 1) / 2) ** 2 for n, size in zip(np.indices(shape), shape, strict=True)), np.zeros(())
        )
        profile = np.exp(-square.ravel() / (2 * sigma**2))
        pull = self.matrix.T @ (self.matrix @ profile)
        return np.sqrt(pull @ self.covariance @ pull / (pull @ profile))


def study(whiten, covariance, valid):
    """Return what there is to know of a whitening of one channel."""
    matrix, diagonal = matrix_of(whiten, valid.shape), whiten.diagonal().ravel()
    kept = diagonal > 0
    return Study(
        valid.ravel(), kept, matrix, diagonal, covariance, (matrix @ covariance @ matrix.T)[np.ix_(kept, kept)]
    )


@functools.cache
def study_of(name, fraction):
    """Study a large image with some correlation, and some fraction of pixels masked."""
    function, valid = CORRELATIONS[name], holes(LARGE, fraction)
    size = max(function.shape)
    square = np.pad(function, [((size - n) // 2, (size - n) // 2) for n in function.shape])
    whiten = whitening(bands_of(function), valid[None], choose_order(square, SUPPORT))
    assert isinstance(whiten, SparseWhitening)
    return study(whiten, covariance_of(function, LARGE), valid)


def random_image(shape, *, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


# ---- orders


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_every_pixel_is_on_one_lattice(stride):
    order = Order(1, stride, 24, 8.0, SUPPORT)
    covered = np.zeros((19, 21), int)
    for step, (y, x) in lattices(order):
        covered[y::step, x::step] += 1
    assert (covered == 1).all()
    y, x = np.indices(covered.shape)
    number = lattice_number(order, y - 8, x - 8)
    assert set(np.unique(number)) == set(range(len(lattices(order))))
    # Finer lattices come later, and each triple of them halves the spacing of the pixels so far.
    for halving in range(int(np.log2(stride)) + 1):
        before = number <= 3 * halving
        assert before.sum() == ((y % (stride >> halving) == 0) & (x % (stride >> halving) == 0)).sum()


@pytest.mark.parametrize(("stride", "number"), [(2, 24), (4, 96), (8, 48)])
def test_neighbors_are_the_nearest_of_those_before(stride, number):
    order = Order(1, stride, number, 9.0, SUPPORT)
    y, x = np.indices((65, 65)) - 32
    rank = np.argsort(np.lexsort((x.ravel(), y.ravel(), lattice_number(order, y, x).ravel()))).reshape(65, 65)
    for (_, first), offsets in zip(lattices(order), neighbors(order), strict=True):
        assert (offsets[-1] == 0).all()
        own, others = (
            rank[first[0] + 32, first[1] + 32],
            rank[first[0] + offsets[:-1, 0] + 32, first[1] + offsets[:-1, 1] + 32],
        )
        assert (others < own).all()
        distance = np.hypot(y - first[0], x - first[1])
        possible = np.sort(distance[(rank < own) & (distance <= order.radius)])
        np.testing.assert_array_equal(np.hypot(*offsets[:-1].T), possible[:number])


def test_harder_kernels_take_more_neighbors():
    numbers = [
        choose_order(autocorrelation(np.outer(row, row)), SUPPORT).number
        for row in (np.ones(1), np.array([0.25, 1, 0.25]), np.array([0.4, 1, 0.4]), np.array([0.5, 1, 0.5]))
    ]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (24, 96)


def test_wider_correlations_take_coarser_lattices_and_more_room():
    narrow, wide = (choose_order(autocorrelation(gaussian_kernel(s, int(4 * s))), SUPPORT) for s in (0.5, 1.0))
    assert narrow.step == wide.step == 1
    assert narrow.stride < wide.stride
    assert narrow.radius < wide.radius


@pytest.mark.parametrize(("sigma", "step"), [(0.5, 1), (1.5, 2), (3.0, 3)])
def test_oversampled_noise_is_decimated(sigma, step):
    """Pixels closer than about a sigma follow from one another."""
    order = choose_order(autocorrelation(gaussian_kernel(sigma, int(4 * sigma))), SUPPORT)
    assert order.step == step
    assert choose_order(autocorrelation(gaussian_kernel(0.5, 2)), SUPPORT, 2).step == 2


def test_beyond_its_reach_a_correlation_leaves_nothing():
    """Whatever it is: averages of correlations that differ from place to place need not be those of any noise."""
    impossible = np.full((3, 3), 0.9)
    impossible[1, 1] = 1
    order = choose_order(impossible, SUPPORT)
    assert order.step == 2


# ---- large images


@pytest.mark.parametrize("fraction", [0.0, 0.2])
@pytest.mark.parametrize("name", CORRELATIONS)
def test_whitened_pixels_have_unit_variance(name, fraction):
    """Exactly, whatever is masked: chi-square has the right mean."""
    found = study_of(name, fraction)
    np.testing.assert_array_equal(found.kept, found.valid)
    # What is added to the diagonal is missing in the whitened variance, times the squares of a row: 1e-11 beside that is
    # rounding, of up to 3e4 such squares.
    missing = JITTER * (found.matrix[found.kept] ** 2).sum(axis=1)
    np.testing.assert_allclose(np.diag(found.whitened) + missing, 1.0, rtol=0, atol=1e-11)
    assert missing.max() < 3e-4
    # Nothing comes from pixels without information, nor goes there.
    assert (found.matrix[:, ~found.valid] == 0).all()
    assert (found.matrix[~found.valid] == 0).all()


@pytest.mark.parametrize("fraction", [0.0, 0.2])
@pytest.mark.parametrize("name", CORRELATIONS)
def test_the_determinant_is_that_of_the_diagonal(name, fraction):
    found = study_of(name, fraction)
    kept = np.ix_(found.kept, found.kept)
    np.testing.assert_array_equal(np.diag(found.matrix), found.diagonal)
    whole = np.linalg.slogdet(found.whitened)[1] - np.linalg.slogdet(found.covariance[kept])[1]
    # 1e-8: rounding of determinants of up to 1190 pixels, condition numbers of up to 1e9.
    assert np.log(found.diagonal[found.kept]).sum() == pytest.approx(0.5 * whole, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "correlation", "divergence"),
    # Where power vanishes (hat and shift), predictions from far away would still help. Twice what there is.
    [
        ("white", 0.0, 0.0),
        ("drizzled", 0.13, 3e-3),
        ("shift", 0.5, 0.06),
        ("gaussian", 0.3, 0.02),
        ("hat", 0.7, 0.2),
    ],
)
@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_whitened_pixels_are_nearly_independent(name, fraction, correlation, divergence):
    found = study_of(name, fraction)
    beside = found.whitened - np.diag(np.diag(found.whitened))
    assert np.sqrt((beside**2).sum(axis=1).mean()) <= correlation
    # 1e-12: rounding of a sum of logarithms.
    assert found.divergence <= divergence + 1e-12


@pytest.mark.parametrize(
    ("name", "tolerance"), [("drizzled", 0.02), ("shift", 0.02), ("gaussian", 0.02), ("hat", 0.08)]
)
@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_errors_of_fluxes_are_their_scatter(name, fraction, tolerance):
    """Of Gaussian profiles, from one hardly sampled to one that fills the image."""
    ratios = [study_of(name, fraction).error_ratio(LARGE, sigma) for sigma in (1.2, 2.0, 4.0)]
    # 2 per cent: less than any error is known to. Where power vanishes as that of a hat does, profiles of single pixels take
    # what the predictions leave.
    np.testing.assert_allclose(ratios, 1.0, rtol=0, atol=tolerance)


def test_oversampled_noise_is_whitened_on_every_third_pixel():
    function = autocorrelation(gaussian_kernel(3.0, 12))
    order = choose_order(function, SUPPORT)
    valid = holes(LARGE, 0.05)
    found = study(whitening(bands_of(function), valid[None], order), covariance_of(function, LARGE), valid)
    assert order.step == 3
    every_third = np.zeros(LARGE, bool)
    every_third[::3, ::3] = True
    assert not (found.kept & ~every_third.ravel()).any()
    # Those left out follow from the others.
    assert found.kept.sum() > 0.9 * (every_third & valid).sum()
    missing = JITTER * (found.matrix[found.kept] ** 2).sum(axis=1)
    # As above.
    np.testing.assert_allclose(np.diag(found.whitened) + missing, 1.0, rtol=0, atol=1e-9)
    assert missing.max() < 5e-3
    # See above. Of a profile that the noise is as smooth as, all frequencies say the same, those that are left out, too.
    assert found.error_ratio(LARGE, 3.0) == pytest.approx(1, abs=0.08)
    assert found.error_ratio(LARGE, 5.0) == pytest.approx(1, abs=0.02)


# ---- against predictions pixel by pixel


def predicted(covariance, valid, order):
    """Return the whitening matrix by its definition: predictions of pixels from all valid ones before, within the radius."""
    y, x = np.indices(valid.shape).reshape(2, -1)
    on_grid = (y % order.step == 0) & (x % order.step == 0)
    places = np.stack([y, x]) // order.step
    rank = np.argsort(np.lexsort((x, y, lattice_number(order, *places))))
    result = np.zeros((valid.size, valid.size))
    for n in np.flatnonzero(valid.ravel() & on_grid):
        distance = np.hypot(*(places - places[:, n : n + 1]))
        near = np.flatnonzero(valid.ravel() & on_grid & (rank < rank[n]) & (distance <= order.radius))
        weight = np.linalg.solve(covariance[np.ix_(near, near)], covariance[near, n])
        spread = np.sqrt(covariance[n, n] - weight @ covariance[near, n])
        result[n, near], result[n, n] = -weight / spread, 1 / spread
    return result


@pytest.mark.parametrize(("step", "stride", "shape"), GRIDS)
def test_rows_are_predictions_from_pixels_before(never_dense, step, stride, shape):
    order = Order(step, stride, 1000, 3.5, 1e-9)
    function = CORRELATIONS["drizzled"]
    covariance = covariance_of(function, shape)
    for fraction in (0.0, 0.2):
        valid = holes(shape, fraction)
        whiten = whitening(bands_of(function), valid[None], order)
        expected = predicted(covariance, valid, order)
        # 1e-6: what is added to the diagonal, 1e-8, times the inverse of variances of 0.25, squared.
        np.testing.assert_allclose(matrix_of(whiten, shape), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(whiten.diagonal().ravel(), np.diag(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stride", [2, 4])
def test_rows_follow_correlations_that_differ_from_place_to_place(never_dense, stride):
    shape, order = (14, 11), Order(1, stride, 1000, 3.5, 1e-9)
    correlation, (to_pixels,) = propagated(shape, 0.9)
    valid = holes(shape, 0.1)
    whiten = whitening(correlation.bands, valid[None], order)
    # As above; some pixels have variances of 0.02.
    expected = predicted(to_pixels @ to_pixels.T, valid, order)
    np.testing.assert_allclose(matrix_of(whiten, shape), expected, rtol=1e-5, atol=1e-5)


def test_channels_have_their_own_masks_and_correlations(never_dense):
    shape, order = (13, 11), Order(1, 4, 1000, 3.5, 1e-9)
    functions = [CORRELATIONS["drizzled"], CORRELATIONS["shift"]]
    valid = np.stack([holes(shape, 0.2), holes(shape, 0.1)])
    image = random_image((2, *shape))
    whitened = whitening(bands_of(*functions), valid, order)(jnp.where(valid, image, 0.0))
    shared = whitening(bands_of(functions[0]), valid, order)(jnp.where(valid, image, 0.0))
    for channel, function in enumerate(functions):
        plane = np.where(valid[channel], image[channel], 0.0).ravel()
        expected = predicted(covariance_of(function, shape), valid[channel], order) @ plane
        # 1e-5: as above, of sums of up to 40 terms.
        np.testing.assert_allclose(whitened[channel].ravel(), expected, rtol=0, atol=1e-5)
        again = predicted(covariance_of(functions[0], shape), valid[channel], order) @ plane
        np.testing.assert_allclose(shared[channel].ravel(), again, rtol=0, atol=1e-5)


def test_pixels_that_say_nothing_new_are_left_out(never_dense):
    """A smooth image with fine lattices: those kept have unit variance, those left out follow from what is kept."""
    shape, support = (16, 15), 0.01
    function = autocorrelation(gaussian_kernel(1.5, 6))
    covariance = covariance_of(function, shape)
    found = study(
        whitening(bands_of(function), np.ones((1, *shape), bool), Order(1, 4, 24, 8.0, support)),
        covariance,
        np.ones(shape, bool),
    )
    assert 0.1 < found.kept.mean() < 0.6
    assert (1 / found.diagonal[found.kept] ** 2 >= support).all()
    # 1e-6: what is added to the diagonal, times squares of up to 100.
    np.testing.assert_allclose(np.diag(found.whitened), 1.0, rtol=0, atol=1e-5)
    within, across = covariance[np.ix_(found.kept, found.kept)], covariance[np.ix_(found.kept, ~found.kept)]
    left = 1 - (across * np.linalg.solve(within, across)).sum(axis=0)
    # Twice: from what each of them follows may be left out in its turn.
    assert left.max() < 2 * support


def test_impossible_correlations_are_refused(never_dense):
    impossible = np.full((3, 3), 0.9)
    impossible[1, 1] = 1
    with pytest.raises(ValueError, match=NOT_POSITIVE):
        whitening(bands_of(impossible), np.ones((1, 12, 12), bool), Order(1, 2, 24, 8.0, SUPPORT))


# ---- small images


@pytest.mark.parametrize("name", CORRELATIONS)
def test_small_images_are_whitened_exactly(name):
    shape, valid = (9, 12), holes((9, 12), 0.2)
    whiten = whitening(bands_of(CORRELATIONS[name]), valid[None], Order(1, 4, 24, 8.0, SUPPORT))
    assert isinstance(whiten, DenseWhitening)
    found = study(whiten, covariance_of(CORRELATIONS[name], shape), valid)
    np.testing.assert_array_equal(found.kept, found.valid)
    # 1e-9: rounding, times a condition number of up to 1e6.
    np.testing.assert_allclose(found.whitened, np.eye(valid.sum()), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(np.diag(found.matrix), found.diagonal)
    assert (found.matrix[:, ~found.valid] == 0).all()


@pytest.mark.parametrize("kind", ["smooth", "fewer numbers than pixels", "pixels of nothing"])
def test_singular_correlations_are_whitened_as_far_as_they_go(kind):
    shape, support = (10, 11), 1e-3
    if kind == "smooth":
        function = autocorrelation(gaussian_kernel(2.0, 8))
        bands, covariance = bands_of(function), covariance_of(function, shape)
    elif kind == "fewer numbers than pixels":
        correlation, (to_pixels,) = propagated(shape, 2.0)
        bands, covariance = correlation.bands, to_pixels @ to_pixels.T
    else:
        covariance = np.diag(np.arange(110) % 7 > 0).astype(float)

        def bands(step):
            return [np.diag(covariance).reshape(1, 1, *shape)]

    found = study(
        whitening(bands, np.ones((1, *shape), bool), Order(1, 4, 24, 8.0, support)), covariance, np.ones(shape, bool)
    )
    kept = found.kept
    assert 5 < kept.sum() < 110
    # 1e-9: rounding, over variances of 1e-3.
    np.testing.assert_allclose(found.whitened, np.eye(kept.sum()), rtol=0, atol=1e-9)
    within, across = covariance[np.ix_(kept, kept)], covariance[np.ix_(kept, ~kept)]
    left = np.diag(covariance)[~kept] - (across * np.linalg.solve(within, across)).sum(axis=0)
    assert left.max() < support


# ---- the map itself


@pytest.fixture(params=["dense", "sparse", "every second"])
def whiten(request, monkeypatch):
    """Two channels of different masks."""
    monkeypatch.setattr(vecchia, "MAX_DENSE", 1000 if request.param == "dense" else 0)
    order = Order(2 if request.param == "every second" else 1, 2, 24, 5.0, SUPPORT)
    valid = np.stack([holes((13, 11), 0.2), holes((13, 11), 0.05)])
    return whitening(bands_of(CORRELATIONS["drizzled"]), valid, order)


def test_the_transpose_is_the_adjoint(whiten):
    image, other = random_image((2, 13, 11)), random_image((2, 13, 11), seed=1)
    value, pull = jax.vjp(whiten, image)
    # 1e-12: rounding.
    assert jnp.vdot(other, value) == pytest.approx(float(jnp.vdot(pull(other)[0], image)), rel=1e-12)
    (transposed,) = jax.linear_transpose(whiten, image)(other)
    np.testing.assert_allclose(pull(other)[0], transposed, rtol=0, atol=1e-12)


def test_the_whitening_is_linear_and_its_own_derivative(whiten):
    image, other = random_image((2, 13, 11)), random_image((2, 13, 11), seed=1)
    # 1e-12: rounding.
    np.testing.assert_allclose(whiten(2 * image - other), 2 * whiten(image) - whiten(other), rtol=0, atol=1e-12)
    value, slope = jax.jvp(whiten, (image,), (other,))
    np.testing.assert_allclose(value, whiten(image), rtol=0, atol=1e-12)
    np.testing.assert_allclose(slope, whiten(other), rtol=0, atol=1e-12)


def test_compiled_and_batched_whitenings_are_the_same(whiten):
    images = random_image((2, 2, 2, 13, 11))
    expected = np.stack([[whiten(each) for each in row] for row in images])
    # 1e-12: rounding.
    np.testing.assert_allclose(jax.jit(lambda image: whiten(image))(images[0, 0]), expected[0, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(jax.vmap(whiten))(images), expected, rtol=0, atol=1e-12)
    # Many whitenings at a time, too.
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), whiten)
    batched = jax.vmap(lambda w, image: w(image))(both, images[0, :2])
    np.testing.assert_allclose(batched, expected[0, :2] * np.array([1, 2])[:, None, None, None], rtol=0, atol=1e-12)


def test_other_masks_compile_nothing(never_dense):
    traces = []

    @jax.jit
    def apply(whiten, image):
        traces.append(image.shape)
        return whiten(image)

    order = Order(1, 4, 24, 5.0, SUPPORT)
    results = []
    for seed in (1, 2):
        valid = np.stack([holes((13, 11), 0.2, seed=seed), holes((13, 11), 0.2, seed=seed + 10)])
        results.append(apply(whitening(bands_of(CORRELATIONS["drizzled"]), valid, order), random_image((2, 13, 11))))
    assert len(traces) == 1
    assert (np.asarray(results[0]) != np.asarray(results[1])).any()


def test_whitened_pixels_depend_on_what_is_within_reach(whiten):
    pixel = jnp.zeros((2, 13, 11)).at[:, 6, 4].set(1.0)
    reached = np.argwhere(np.asarray(whiten(pixel)) != 0)
    assert len(reached) > 2
    assert np.abs(reached[:, 1:] - [6, 4]).max() <= whiten.reach


def test_nothing_is_made_of_nothing(whiten):
    """An image without information has a whitening, too."""
    order = Order(1, 4, 24, 5.0, SUPPORT)
    nothing = whitening(bands_of(CORRELATIONS["drizzled"]), np.zeros((1, 13, 11), bool), order)
    assert not np.asarray(nothing(random_image((1, 13, 11)))).any()
    assert not nothing.diagonal().any()


@pytest.mark.parametrize(("name", "tolerance"), [("drizzled", 1e-5), ("hat", 3e-4)])
def test_single_precision_is_enough(name, tolerance):
    """Coefficients are rounded: the whitened values by as much as the sum of their squares is large."""
    function, valid = CORRELATIONS[name], holes((13, 11), 0.1)[None]
    order = Order(1, 4, 96, 9.0, SUPPORT)
    image = np.where(valid, np.random.default_rng(0).normal(size=valid.shape), 0.0)
    values = {}
    for x64 in (False, True):
        with jax.enable_x64(x64):
            whiten = whitening(bands_of(function), valid, order)
            values[x64] = np.asarray(whiten(jnp.asarray(image, jnp.result_type(float))))
            assert values[x64].dtype == (np.float64 if x64 else np.float32)
    # 6e-8 of rows whose norm is up to 5, or 500, of values that are as large.
    np.testing.assert_allclose(values[False], values[True], rtol=0, atol=tolerance)
