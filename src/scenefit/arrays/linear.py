"""Linear maps with a transpose of their own, which JAX can differentiate, transpose and vectorise.

The transpose that JAX derives for a Fourier transform, or for a loop that adds up stamps, costs several times the map itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_linear_map = Primitive("scenefit_linear_map")
_linear_map.multiple_results = True


def linear_map(forward: Callable, transpose: Callable, constants: Sequence, arguments: Sequence) -> tuple:
    """Apply a map that is linear in its arguments together, with a known transpose.

    Parameters
    ----------
    forward : callable
        `forward(constants, arguments)` returns a tuple of arrays. Arguments may have one more leading axis, over which
        the map is then repeated. Hashable and the same object (or equal) from call to call, or it is compiled again.
    transpose : callable
        `transpose(constants, results)` returns a tuple shaped as the arguments.
    constants : sequence of arrays
        What else the map depends on. Derivatives along them are taken through `forward`, forwards only.
    arguments : sequence of arrays

    Returns
    -------
    tuple of arrays
    """
    return tuple(_bind(forward, transpose, constants, arguments))


def _bind(forward, transpose, constants, arguments):
    return _linear_map.bind(*constants, *arguments, forward=forward, transpose=transpose, num_constants=len(constants))


def _apply(*operands, forward, transpose, num_constants):
    return tuple(forward(operands[:num_constants], operands[num_constants:]))


def _abstract(*operands, **parameters):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    results = jax.eval_shape(lambda *x: _apply(*x, **parameters), *shapes)
    return [jax.typeof(result) for result in results]


def _jvp(primals, tangents, *, forward, transpose, num_constants):
    constants, arguments = primals[:num_constants], primals[num_constants:]
    values = _bind(forward, transpose, constants, arguments)
    moves, turns = tangents[num_constants:], tangents[:num_constants]
    result = None
    if any(type(t) is not ad.Zero for t in moves):
        result = _bind(forward, transpose, constants, [ad.instantiate_zeros(t) for t in moves])
    if varying := [n for n, t in enumerate(turns) if type(t) is not ad.Zero]:

        def of_constants(*some):
            full = list(constants)
            for n, value in zip(varying, some, strict=True):
                full[n] = value
            return tuple(forward(tuple(full), arguments))

        more = jax.jvp(of_constants, [constants[n] for n in varying], [turns[n] for n in varying])[1]
        result = more if result is None else [a + b for a, b in zip(result, more, strict=True)]
    if result is None:
        result = [jnp.zeros_like(value) for value in values]
    return values, result


def _transposed(cotangents, *operands, forward, transpose, num_constants):
    constants = operands[:num_constants]
    linear = operands[num_constants:]
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    results = _bind(transpose, forward, constants, cotangents)
    # Arguments that are known here are the zeros that stand for no tangent.
    found = [r if ad.is_undefined_primal(x) else None for r, x in zip(results, linear, strict=True)]
    return [None] * num_constants + found


def _batched(operands, axes, *, forward, transpose, num_constants):
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    constants = list(zip(operands[:num_constants], axes[:num_constants], strict=True))
    arguments = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands[num_constants:], axes[num_constants:], strict=True)
    ]
    if all(axis is None for _, axis in constants):
        # Any further leading axes are folded into one.
        results = _bind(_Repeated(forward), _Repeated(transpose), [x for x, _ in constants], arguments)
        return results, [0] * len(results)
    mapped = [n for n, (_, axis) in enumerate(constants) if axis is not None]
    moved = [jnp.moveaxis(constants[n][0], constants[n][1], 0) for n in mapped]

    def one(row):
        values, some = row
        full = [x for x, _ in constants]
        for n, value in zip(mapped, some, strict=True):
            full[n] = value
        return tuple(_bind(forward, transpose, full, values))

    results = lax.map(one, (tuple(arguments), tuple(moved)))
    return list(results), [0] * len(results)


class _Repeated:
    """A map repeated over a leading axis of its arguments; twice repeated, the axes are folded into one."""

    def __init__(self, function):
        self.function = function.function if isinstance(function, _Repeated) else function
        self.depth = function.depth + 1 if isinstance(function, _Repeated) else 1

    def __call__(self, constants, arguments):
        leading = arguments[0].shape[: self.depth]
        flat = tuple(x.reshape(-1, *x.shape[self.depth :]) for x in arguments)
        return tuple(x.reshape(*leading, *x.shape[1:]) for x in self.function(constants, flat))

    def __eq__(self, other):
        return isinstance(other, _Repeated) and (self.function, self.depth) == (other.function, other.depth)

    def __hash__(self):
        return hash((self.function, self.depth))


_linear_map.def_impl(jax.jit(_apply, static_argnames=("forward", "transpose", "num_constants")))
_linear_map.def_abstract_eval(_abstract)
ad.primitive_jvps[_linear_map] = _jvp
ad.primitive_transposes[_linear_map] = _transposed
batching.primitive_batchers[_linear_map] = _batched
mlir.register_lowering(_linear_map, mlir.lower_fun(_apply, multiple_results=True))
