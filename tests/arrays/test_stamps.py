import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scenefit.arrays.stamps import BUCKET_RATIO, add_stamps, bucket_count, bucket_size

ARGUMENTS = ("canvas", "spectra", "stamps")
SUBSETS = [subset for count in (1, 2, 3) for subset in itertools.combinations(range(3), count)]


@pytest.fixture
def arguments(rng):
    """Canvas, spectra, stamps (they overlap, two lie on the edges) and origins."""
    canvas, spectra, stamps = rng.normal(size=(2, 9, 11)), rng.normal(size=(4, 2)), rng.normal(size=(4, 1, 3, 5))
    return canvas, spectra, stamps, np.array([[0, 0], [2, 3], [3, 4], [6, 6]])


def dense(canvas, spectra, stamps, origins):
    image = canvas.copy()
    for spectrum, stamp, (y, x) in zip(spectra, stamps, origins, strict=True):
        image[:, y : y + stamp.shape[1], x : x + stamp.shape[2]] += spectrum[:, None, None] * stamp
    return image


def dense_tangent(primals, tangents):
    """The function is bilinear in (spectra, stamps) and linear in the canvas."""
    (_, spectra, stamps, origins), (canvas_dot, spectra_dot, stamps_dot) = primals, tangents
    nothing = np.zeros_like(canvas_dot)
    moved = dense(nothing, spectra_dot, stamps, origins) + dense(nothing, spectra, stamps_dot, origins)
    return canvas_dot + moved


def as_jax(arrays):
    return tuple(jnp.asarray(array, jnp.result_type(float)) for array in arrays)


def split(arguments, subset):
    """Return add_stamps as a function of the arguments in `subset` alone, and these."""
    *given, origins = arguments
    given = as_jax(given)

    def function(*free):
        everything = list(given)
        for index, value in zip(subset, free, strict=True):
            everything[index] = value
        return add_stamps(*everything, jnp.asarray(origins))

    return function, tuple(given[index] for index in subset)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_add_stamps_is_the_sum_of_the_stamps(arguments, transform, eps):
    *given, origins = arguments
    image = transform(add_stamps)(*as_jax(given), jnp.asarray(origins))
    # 10 eps: sums of at most four terms of order one.
    np.testing.assert_allclose(image, dense(*arguments), rtol=10 * eps, atol=10 * eps)


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(ARGUMENTS[i] for i in subset))
def test_jvp_is_the_dense_derivative(arguments, rng, subset, eps):
    tangents = [rng.normal(size=a.shape) if i in subset else np.zeros(a.shape) for i, a in enumerate(arguments[:3])]
    function, primals = split(arguments, subset)
    value, derivative = jax.jvp(function, primals, as_jax(tangents[i] for i in subset))
    # 20 eps: sums of at most nine products of order one.
    np.testing.assert_allclose(value, dense(*arguments), rtol=20 * eps, atol=20 * eps)
    np.testing.assert_allclose(derivative, dense_tangent(arguments, tangents), rtol=20 * eps, atol=20 * eps)


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(ARGUMENTS[i] for i in subset))
def test_vjp_is_the_transposed_dense_derivative(arguments, rng, subset, eps):
    cotangent = rng.normal(size=arguments[0].shape)
    function, primals = split(arguments, subset)
    gradients = jax.vjp(function, *primals)[1](*as_jax([cotangent]))
    for index, gradient in zip(subset, gradients, strict=True):
        expected = np.zeros(arguments[index].shape)
        for place in np.ndindex(expected.shape):
            tangents = [np.zeros(a.shape) for a in arguments[:3]]
            tangents[index][place] = 1.0
            expected[place] = (cotangent * dense_tangent(arguments, tangents)).sum()
        # 50 eps: sums of at most 30 products of order one.
        np.testing.assert_allclose(gradient, expected, rtol=50 * eps, atol=50 * eps)


def test_derivatives_agree_with_finite_differences(arguments, rng, eps):
    function, primals = split(arguments, (0, 1, 2))
    directions = as_jax(rng.normal(size=primal.shape) for primal in primals)
    step = 0.1

    def moved(sign):
        return function(*(p + sign * step * d for p, d in zip(primals, directions, strict=True)))

    difference = (moved(1) - moved(-1)) / (2 * step)
    # A quadratic function has no truncation error; 100 eps: rounding divided by the step.
    np.testing.assert_allclose(jax.jvp(function, primals, directions)[1], difference, atol=100 * eps)


def test_padded_members_add_nothing(arguments):
    canvas, spectra, stamps, origins = arguments
    given = as_jax((canvas, spectra, stamps * 0))
    np.testing.assert_array_equal(add_stamps(*given, jnp.asarray(origins)), given[0])


def test_the_program_does_not_grow_with_the_number_of_stamps():
    def program(count):
        shapes = ((2, 30, 30), (count, 2), (count, 1, 5, 5))
        given = (*(jnp.zeros(shape) for shape in shapes), jnp.zeros((count, 2), int))
        gradient = jax.grad(lambda *args: add_stamps(*args).sum(), argnums=(0, 1, 2))
        return len(str(jax.make_jaxpr(gradient)(*given)).splitlines())

    assert program(3) == program(64)


def test_bucket_sizes_are_odd_large_enough_and_not_wasteful():
    smallest, sizes = 11, range(1, 400)
    buckets = [bucket_size(size, smallest) for size in sizes]
    assert all(bucket % 2 == 1 and bucket >= size for bucket, size in zip(buckets, sizes, strict=True))
    assert buckets == sorted(buckets)
    distinct = sorted(set(buckets))
    assert distinct[0] == smallest
    # Making a size odd may take two pixels from it.
    assert all(b <= BUCKET_RATIO * (a + 2) for a, b in itertools.pairwise(distinct))
    assert all(bucket_size(bucket, smallest) == bucket for bucket in distinct)


def test_bucket_counts_follow_the_documented_sequence():
    assert sorted({bucket_count(count) for count in range(1, 12)}) == [1, 2, 3, 4, 6, 8, 11]
    assert all(bucket_count(count) >= count for count in range(1, 500))
