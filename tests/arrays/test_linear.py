import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scenefit.arrays import fourier
from scenefit.arrays.linear import linear_map
from scenefit.arrays.stamps import add_stamps

# ---- a small map: two arguments, two results, nonlinear in its constants


def forward(constants, arguments):
    (matrix, factor), (u, v) = constants, arguments
    return u @ matrix.T + factor * v, jnp.cumsum(v * factor**2, axis=-1)


def transpose(constants, results):
    (matrix, factor), (first, second) = constants, results
    tail = jnp.flip(jnp.cumsum(jnp.flip(second, -1), -1), -1)
    return first @ matrix, factor * first + factor**2 * tail


def mapped(matrix, factor, u, v):
    return linear_map(forward, transpose, (matrix, factor), (u, v))


def plain(matrix, factor, u, v):
    return forward((matrix, factor), (u, v))


NAMES = ("matrix", "factor", "u", "v")
SHAPES = ((3, 4), (3,), (4,), (3,))
SUBSETS = [(0,), (1,), (2,), (3,), (0, 2), (2, 3), (0, 1, 2, 3)]


def draw(rng, *shapes):
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.result_type(float)) for shape in shapes)


@pytest.fixture
def operands(rng):
    return draw(rng, *SHAPES)


@pytest.fixture
def close(eps):
    """Compare trees of arrays. 50 eps: sums of some ten products of order one, in another order."""

    def compare(actual, expected):
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=50 * eps, atol=50 * eps)

    return compare


def partial(function, operands, subset):
    """Return the function of the operands in `subset` alone."""

    def of_some(*some):
        full = list(operands)
        for n, value in zip(subset, some, strict=True):
            full[n] = value
        return function(*full)

    return of_some


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_value(operands, transform, close):
    close(transform(mapped)(*operands), plain(*operands))


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(NAMES[n] for n in subset))
def test_forward_derivatives_along_arguments_and_constants(operands, rng, subset, close):
    some = tuple(operands[n] for n in subset)
    directions = draw(rng, *(SHAPES[n] for n in subset))
    ours, expected = (jax.jvp(partial(f, operands, subset), some, directions) for f in (mapped, plain))
    close(ours, expected)


def test_the_derivative_backwards_is_the_transpose(operands, rng, close):
    cotangents = draw(rng, (3,), (3,))
    ours, expected = (jax.vjp(partial(f, operands, (2, 3)), *operands[2:])[1](cotangents) for f in (mapped, plain))
    close(ours, expected)
    # And the transpose of the transpose is the map.
    matrix, factor, u, v = operands
    pull = jax.linear_transpose(lambda *x: tuple(mapped(matrix, factor, *x)), u, v)
    push = jax.linear_transpose(lambda *x: tuple(pull(x)), *cotangents)
    close(push((u, v)), plain(*operands))


def test_a_result_that_is_not_used_has_no_part_in_the_gradient(operands, close):
    ours, expected = (
        jax.grad(lambda u, v, f=f: jnp.sum(f(*operands[:2], u, v)[1] ** 2), argnums=(0, 1))(*operands[2:])
        for f in (mapped, plain)
    )
    close(ours, expected)
    assert not np.asarray(ours[0]).any()


def test_transposed_in_one_argument_only(operands, close):
    ours, expected = (
        jax.grad(lambda u, f=f: sum(jnp.sum(r**2) for r in f(*operands[:2], u, operands[3])))(operands[2])
        for f in (mapped, plain)
    )
    close(ours, expected)


# Which operand is batched, along which axis.
BATCHES = [
    (None, None, 0, 0),
    (None, None, 0, None),
    (None, None, None, -1),
    (0, 0, 0, 0),
    (None, 1, 0, None),
    (2, None, None, None),
]


@functools.cache
def jitted(function, *axes):
    """Return the function vectorised along axes, innermost first, and compiled."""
    for each in axes:
        function = jax.vmap(function, in_axes=each)
    return jax.jit(function)


def batched(rng, axes, size=5):
    shapes = [list(shape) for shape in SHAPES]
    for shape, axis in zip(shapes, axes, strict=True):
        if axis is not None:
            shape.insert(axis % (len(shape) + 1), size)
    return draw(rng, *shapes)


def test_vmap_is_a_loop(rng, close):
    for axes in BATCHES:
        operands = batched(rng, axes)
        rows = [
            plain(
                *(
                    x if axis is None else np.take(np.asarray(x), n, axis)
                    for x, axis in zip(operands, axes, strict=True)
                )
            )
            for n in range(5)
        ]
        close(jitted(mapped, axes)(*operands), tuple(np.stack(each) for each in zip(*rows, strict=True)))


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ((None, None, 0, 0), (None, None, 0, None)),
        ((None, None, 0, None), (None, None, None, 1)),
        ((None, None, 0, 0), (0, 0, None, 0)),
        ((0, None, None, 0), (None, None, 0, 0)),
        ((0, None, None, 0), (0, 0, None, 0)),
    ],
)
def test_nested_vmap_is_a_nested_loop(rng, inner, outer, close):
    operands = []
    for shape, axes in zip(SHAPES, zip(inner, outer, strict=True), strict=True):
        shape = list(shape)
        for axis, size in zip(axes, (2, 6), strict=True):
            if axis is not None:
                shape.insert(axis, size)
        operands += draw(rng, shape)
    close(jitted(mapped, inner, outer)(*operands), jitted(plain, inner, outer)(*operands))


def test_three_levels_of_vmap(rng, close):
    axes = (None, None, 0, 0)
    operands = draw(rng, *SHAPES[:2], (2, 3, 5, *SHAPES[2]), (2, 3, 5, *SHAPES[3]))
    close(jitted(mapped, axes, axes, axes)(*operands), jitted(plain, axes, axes, axes)(*operands))


@pytest.mark.parametrize("axes", [(None, None, 0, 0), (0, 0, 0, 0)], ids=["arguments", "all"])
@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_vmap_of_jacobians(rng, axes, jacobian, close):
    operands = batched(rng, axes)
    ours, expected = (jitted(jacobian(f, argnums=(2, 3)), axes)(*operands) for f in (mapped, plain))
    close(ours, expected)


def test_jacobians_of_vmap(rng, close):
    axes = (None, None, 0, 0)
    matrix, factor, u, v = batched(rng, axes, 2)
    for jacobian in (jax.jacfwd, jax.jacrev):
        ours = jax.jit(jacobian(jax.vmap(mapped, in_axes=axes), argnums=(2, 3)))(matrix, factor, u, v)
        close(ours, jax.jit(jax.jacfwd(jax.vmap(plain, in_axes=axes), argnums=(2, 3)))(matrix, factor, u, v))


def test_hessian_through_constants_forwards_over_backwards(operands, rng, close):
    """Derivatives of the transposed map along what its constants depend on."""
    (weights,) = draw(rng, (3,))

    def gradient(function, parameters):
        shift, u, v = parameters
        matrix, factor = operands[0] * (1 + shift), operands[1] + shift**2

        def loss(u, v):
            first, second = function(matrix, factor, u, v)
            return jnp.sum(weights * first**2) + jnp.sum(jnp.sin(second))

        return jax.grad(loss, argnums=(0, 1))(u, v)

    point = (jnp.asarray(0.3), *operands[2:])
    ours, expected = (jax.jit(jax.jacfwd(functools.partial(gradient, f)))(point) for f in (mapped, plain))
    close(ours, expected)
    assert np.abs(ours[0][0]).min() > 1e-3


def test_the_same_shape_is_compiled_once(rng, close, compilations):
    def slope(matrix, factor, u, v):
        moved = jax.jvp(functools.partial(mapped, matrix, factor), (u, v), (v @ matrix, u @ matrix.T))[1]
        gradient = jax.vjp(functools.partial(mapped, matrix, factor), u, v)[1](moved)
        several = jax.vmap(mapped, in_axes=(None, None, 0, 0))(matrix, factor, matrix, matrix.T[:3])
        return moved, gradient, several

    def once():
        matrix, factor, u, v = draw(rng, (3, 3), (3,), (3,), (3,))
        return slope(matrix, factor, u, v)

    once()
    assert compilations
    compilations.clear()
    once()
    # Without any outer jit: the map is its own compiled unit.
    assert compilations == []


def test_another_function_is_compiled_again(operands, close):
    """Equality of the functions, not their names, decides."""

    def double(constants, arguments):
        return tuple(2 * x for x in forward(constants, arguments))

    mapped(*operands)
    ours = linear_map(double, transpose, operands[:2], operands[2:])
    close(ours, tuple(2 * x for x in plain(*operands)))


# ---- the maps of the package


IMAGE = (6, 8)


def spectrum(image):
    return fourier.transform(image)


def image_of(modes):
    return fourier.inverse_transform(modes, IMAGE)


def plain_image_of(modes):
    return jnp.fft.irfft2(modes, s=IMAGE, norm="forward")


def real_modes(rng, *leading):
    """Modes of real images."""
    (image,) = draw(rng, (*leading, *IMAGE))
    return jnp.fft.rfft2(image)


@pytest.mark.parametrize("leading", [(), (3,)])
def test_transforms_of_a_batch(rng, leading, eps):
    (images,) = draw(rng, (4, 2, *leading, *IMAGE))
    modes = real_modes(rng, 4, 2, *leading)
    twice = functools.partial(jax.vmap, in_axes=1)
    for ours, plain_one, given in ((spectrum, jnp.fft.rfft2, images), (image_of, plain_image_of, modes)):
        value = jax.jit(jax.vmap(twice(ours)))(given[:, None])
        # 100 eps: rounding in transforms of 48 values of order one, whose sums are of order 10.
        np.testing.assert_allclose(value, jax.vmap(twice(plain_one))(given[:, None]), atol=100 * eps)


def test_gradients_through_both_transforms_of_a_batch(rng, eps):
    images, filters = draw(rng, (3, 2, *IMAGE), (2, *IMAGE))
    factor = jnp.fft.rfft2(filters)

    def loss(image, there, back):
        return jnp.sum(jnp.sin(back(there(image) * factor) / 48))

    ours = jax.jit(jax.vmap(jax.grad(functools.partial(loss, there=spectrum, back=image_of))))(images)
    expected = jax.jit(jax.vmap(jax.grad(functools.partial(loss, there=jnp.fft.rfft2, back=plain_image_of))))(images)
    # 200 eps: rounding in two transforms of 48 values.
    np.testing.assert_allclose(ours, expected, atol=200 * eps)


def test_transforms_of_the_same_shape_compile_once(rng, compilations):
    def both():
        (image,) = draw(rng, (2, 5, 7))
        value, pull = jax.vjp(fourier.transform, image)
        (back,) = pull(value)
        return jax.vjp(lambda modes: fourier.inverse_transform(modes, (5, 7)), value)[1](back)

    both()
    compilations.clear()
    both()
    assert compilations == []


CANVAS = (3, 7, 8)


def plain_add(canvas, spectra, stamps, origins):
    """The same sum with matrices that place every stamp."""
    rows, columns = (
        (jnp.arange(CANVAS[1 + axis])[:, None] == origins[:, axis, None, None] + jnp.arange(stamps.shape[2 + axis]))
        for axis in (0, 1)
    )
    planes = jnp.broadcast_to(stamps, (len(stamps), len(canvas), *stamps.shape[2:]))
    return canvas + jnp.einsum("nc,nchw,nyh,nxw->cyx", spectra, planes, rows * 1.0, columns * 1.0)


def stamp_operands(rng, planes, *leading):
    """Canvas, spectra, stamps (they overlap and touch the edges) and origins."""
    canvas, spectra, stamps = draw(rng, (*leading, *CANVAS), (*leading, 2, 3), (*leading, 2, planes, 3, 4))
    return canvas, spectra, stamps, jnp.array([[0, 0], [4, 3]])


@pytest.mark.parametrize("subset", [(1,), (2,), (0, 1, 2)])
def test_stamps_with_one_plane_a_channel(rng, subset, close):
    operands = stamp_operands(rng, 3)
    some = tuple(operands[n] for n in subset)
    directions, cotangent = draw(rng, *(x.shape for x in some)), draw(rng, CANVAS)[0]

    def derivatives(function):
        of_some = partial(function, operands, subset)
        value, push = jax.jvp(of_some, some, directions)
        return value, push, jax.vjp(of_some, *some)[1](cotangent)

    ours, expected = (jax.jit(functools.partial(derivatives, f))() for f in (add_stamps, plain_add))
    close(ours, expected)


@pytest.mark.parametrize(("planes", "shared"), [(1, True), (3, False)])
def test_batches_of_canvases(rng, planes, shared, close):
    canvas, spectra, stamps, origins = stamp_operands(rng, planes, 3)
    origins = origins if shared else jnp.stack([origins, origins[::-1], origins // 2])
    directions = draw(rng, canvas.shape, spectra.shape, stamps.shape)
    axes = (0, 0, 0, None if shared else 0)

    def derivatives(function):
        def one(canvas, spectra, stamps, origins, *directions):
            primals = canvas, spectra, stamps
            value, push = jax.jvp(lambda *x: function(*x, origins), primals, directions)
            return value, push, jax.vjp(lambda *x: function(*x, origins), *primals)[1](value)

        return jax.jit(jax.vmap(one, in_axes=(*axes, 0, 0, 0)))(canvas, spectra, stamps, origins, *directions)

    ours, expected = (derivatives(f) for f in (add_stamps, plain_add))
    close(ours, expected)


@pytest.mark.parametrize("planes", [1, 3], ids=["one plane", "planes"])
def test_hessian_of_stamps_that_depend_on_parameters(rng, planes, eps):
    """Spectra and stamps are arguments and constants of the map at once."""
    canvas, spectra, stamps, origins = stamp_operands(rng, planes)

    def loss(parameters, function):
        image = function(canvas, parameters["flux"][:, None] * spectra, parameters["width"] ** 2 * stamps, origins)
        return 0.1 * jnp.sum(jnp.cos(image))

    point = {"flux": jnp.asarray([0.7, -0.4]), "width": jnp.asarray(1.2)}
    direction = {"flux": jnp.asarray([0.3, 0.9]), "width": jnp.asarray(-0.5)}

    @functools.partial(jax.jit, static_argnums=0)
    def product(function):
        return jax.jvp(jax.grad(functools.partial(loss, function=function)), (point,), (direction,))

    ours, expected = product(add_stamps), product(plain_add)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        # 1000 eps: sums of a hundred products of order one.
        np.testing.assert_allclose(a, b, atol=1000 * eps)
