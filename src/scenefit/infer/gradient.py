"""The residuals of all data, and the gradient of half their square, from the derivatives of the components' stamps."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from scenefit.arrays import fourier
from scenefit.arrays.stamps import first_indices
from scenefit.infer.problem import Problem, State
from scenefit.infer.slopes import StampSlopes, model_canvas, slot_of_elements, untied


def residuals_and_gradient(problem: Problem, state: State, slopes: Sequence[StampSlopes]):
    """Return the residuals at a state, and their products with the derivatives: stamps are neither evaluated nor differentiated.

    Parameters
    ----------
    problem : Problem
    state : State
    slopes : list of StampSlopes
        Those at the state.

    Returns
    -------
    residuals : tuple
        As `Problem.residuals` has them.
    deviance : tuple
        The same for the kind "deviance".
    gradient : array, shape (n,)
        Of half the square of the first along the vector.
    """
    canvas = model_canvas(problem, state, slopes)
    images = problem.image_residuals(state)
    own, at = untied(problem, state)

    def residuals(elements, canvas, kind="score"):
        spectrum = fourier.transform(canvas)
        filled = own.fill(State(elements, state.images))[1]
        return tuple(image.residual(spectrum, kind) for image in filled), own.scales(elements)

    (data, scales), transpose = jax.vjp(residuals, at.vector, canvas)
    of_elements, of_canvas = transpose((data, scales))
    deviance = data if problem.is_gaussian else residuals(at.vector, canvas, "deviance")[0]
    slot, _ = slot_of_elements(problem)
    products = [_products(each, of_canvas) * each.gains for each in slopes]
    parts = [of_elements[leaf.start : leaf.stop] for leaf in problem.leaves]
    for number, leaf in enumerate(problem.leaves):
        if leaf.kind != "stack":
            continue
        product, elements = products[leaf.number], leaf.elements()
        if leaf.name == "flux":
            entries = problem.stacks[leaf.number].flux_index[:, None] == np.arange(elements.shape[1])[:, None]
            value = jnp.sum(jnp.where(entries, product[0][:, None], 0.0), axis=-1)
        else:
            value = jnp.sum(product[slot[elements[0]]], axis=-1).T
        parts[number] = parts[number] + value.ravel()
    gradient = jnp.zeros_like(state.vector).at[problem.index].add(jnp.concatenate(parts))
    return (data, images + scales), (deviance, images + scales), gradient


def _products(slopes: StampSlopes, canvas: Float[Array, "channel y x"]) -> Float[Array, "slot n channel"]:
    """Return the sums over pixels of all stamps times each channel of an image."""
    _, count, num_planes, height, width = slopes.stamps.shape

    def one(number):
        window = lax.dynamic_slice(canvas, first_indices(slopes.origin[number]), (len(canvas), height, width))
        stamps = lax.dynamic_index_in_dim(slopes.stamps, number, axis=1, keepdims=False)
        channels = "p" if num_planes > 1 else "c"
        return jnp.einsum(f"spyx,{channels}yx->s{channels}", stamps, window, precision="highest")

    return jnp.moveaxis(lax.map(one, jnp.arange(count)), 0, 1)
