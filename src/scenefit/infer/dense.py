"""Gauss-Newton steps by the Hessian matrix: for scenes without free images, a quadratic programme within bounds."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scenefit.data.observation import Observation
from scenefit.infer.descent import Descent, Secant
from scenefit.infer.footprints import Footprints, footprints
from scenefit.infer.information import information
from scenefit.infer.posterior import Layout
from scenefit.infer.problem import Problem, State
from scenefit.infer.quadratic import spread_curvature
from scenefit.model.scene import Scene

MAX_COORDINATES, MAX_SIZE = 1000, 3 * 10**8
"""Free coordinates, and entries of the derivatives that are there at a time, up to which steps are computed by a matrix."""
MAX_TURNS = 30
"""Changes of the set of coordinates at bounds at most, in the solution of a quadratic programme."""
LONGEST_MOVE = 1.0
"""Logarithms and logits of parameters change by at most this much in a step, coordinates of ellipticities by this or this part of
themselves: where the maps saturate, the model wouldn't know the way back."""
LARGEST_STRETCH, SMALLEST_STEP = 4.0, 0.01
"""Of a source's curvature, from its last step; and how long, in standard deviations, that must have been to say anything."""
SINGULAR = 1e-6
"""Added to the unit diagonal of the scaled Hessian: directions that nothing determines stay where they are."""


def dense_footprints(
    problem: Problem,
    layout: Layout,
    scene: Scene,
    observations: Sequence[Observation],
    *,
    quick: bool = False,
) -> Footprints | None:
    """Return the footprints of the free coordinates; None if they are too many for a matrix, or there are free images.

    Parameters are those of `footprints`.
    """
    index, free = np.unique(np.asarray(problem.index)), np.asarray(problem.free.vector)
    if not 0 < free[index].sum() <= MAX_COORDINATES or any(np.any(image) for image in problem.free.images):
        return None
    where = footprints(problem, layout, scene, observations, quick=quick)
    num_slots = where.places.shape[1]
    size = where.room * num_slots * sum(image.data.size for image in problem.images)
    of_stamps = num_slots * sum(stack.mask.size * (problem.canvas[0] if stack.bases else 1) for stack in problem.stacks)
    return where if max(size, of_stamps) <= MAX_SIZE else None


def coordinate_maps(problem: Problem) -> np.ndarray:
    """Return how each coordinate is mapped to its parameter: see `Leaf.map`."""
    maps = np.full(len(problem.lowest.vector), "identity")
    for leaf in problem.leaves:
        maps[leaf.start : leaf.stop] = leaf.map
    return maps


def potential_hessian(problem: Problem, state: State, index: Int[Array, " m"]) -> Float[Array, "m m"]:
    """Return the Hessian of `Problem.potential` for the coordinates `index`, as far as it is positive."""
    own = jnp.diag(spread_curvature(problem, state)[index])
    if not problem.priors:
        return own
    part = -jax.jacfwd(jax.grad(problem.log_prior))(state.vector)[index][:, index]
    values, vectors = jnp.linalg.eigh(0.5 * (part + part.T))
    return own + (vectors * jnp.maximum(values, 0.0)) @ vectors.T


def hessian(problem: Problem, state: State, where: Footprints) -> Float[Array, "m m"]:
    """Return the Gauss-Newton Hessian of the loss along the coordinates `where.index`."""
    return information(problem, state, where) + potential_hessian(problem, state, where.index)


def dense_descent(
    problem: Problem,
    state: State,
    expected: Float[Array, "m m"],
    gradient: Float[Array, " n"],
    damping: Float[Array, ""],
    where: Footprints,
    stretch: Float[Array, " n"],
) -> Descent:
    """Minimise the quadratic model of the loss about a state within bounds, exactly.

    Parameters
    ----------
    problem : Problem
    state : State
    expected : array
        `hessian` at the state.
    gradient : array
        Of the loss along the vector.
    damping : float
        Of the Hessian, relative to its diagonal.
    where : Footprints
        `dense_footprints` of the problem.
    stretch : array
        `stretched` from the last step.
    """
    index = where.index
    same = where.group[:, None] == where.group
    matrix = jnp.where(same, expected * stretch[index], expected)
    counts = problem.free.vector[index]
    slope = jnp.where(counts, gradient[index], 0.0)
    diagonal = jnp.diagonal(matrix)
    counts &= diagonal > 0
    # In units of the conditional standard deviations.
    unit = jnp.where(counts, 1 / jnp.sqrt(jnp.where(counts, diagonal, 1.0)), 0.0)
    scaled = matrix * unit[:, None] * unit + jnp.diag(jnp.where(counts, damping + SINGULAR, 1.0))
    safe = jnp.where(counts, unit, 1.0)
    farthest = _longest_moves(problem, state)[index]
    low = jnp.maximum(problem.lowest.vector[index] - state.vector[index], -farthest) / safe
    high = jnp.minimum(problem.highest.vector[index] - state.vector[index], farthest) / safe
    step, on_face = quadratic_program(scaled, slope * unit, jnp.where(counts, low, 0.0), jnp.where(counts, high, 0.0))
    decrement = -(0.5 * step @ (scaled @ step) + (slope * unit) @ step)
    nothing = jax.tree.map(jnp.zeros_like, state)

    def scatter(values, fill):
        return jnp.full(len(state.vector), fill, values.dtype).at[index].set(values)

    no_images = tuple(jnp.zeros(image.shape, bool) for image in state.images)
    ones = tuple(jnp.ones_like(image) for image in state.images)
    return Descent(
        step=State(scatter(step * unit, 0.0), nothing.images),
        face=State(scatter(on_face & counts, False), no_images),
        gradient=State(scatter(slope, 0.0), nothing.images),
        diagonal=State(scatter(jnp.where(counts, diagonal, 1.0), 1.0), ones),
        decrement=decrement,
        outstanding=jnp.zeros_like(decrement),
        is_settled=jnp.asarray(True),
        num_products=jnp.asarray(len(index), jnp.int32),
        secant=Secant(
            gradient=scatter(slope, 0.0),
            step=scatter(step * unit, 0.0),
            change=scatter(expected @ (step * unit), 0.0),
            own=scatter(jnp.where(same, expected, 0.0) @ (step * unit), 0.0),
            stretch=stretch,
        ),
    )


def stretched(
    secant: Secant, gradient: Float[Array, " n"], length: Float[Array, ""], where: Footprints
) -> Float[Array, " n"]:
    """Return `Secant.stretch` after a step.

    For faint sources the second derivatives of the model, which Gauss and Newton leave out, make up much of the curvature:
    their steps would go too far, to and fro. How the gradient along a source's own step has changed says by how much.

    Parameters
    ----------
    secant : Secant
        Of the step.
    gradient : array
        Of the loss at its end.
    length : float
        Fraction of the step that was gone.
    where : Footprints
    """
    index = where.index
    missing = (gradient - secant.gradient) / length - secant.change

    def by_group(values):
        return jax.ops.segment_sum(values[index], where.group, len(where.places) + 1)[where.group]

    squared = by_group(secant.step * secant.own)
    found = 1 + by_group(secant.step * missing) / jnp.maximum(squared, SMALLEST_STEP**2)
    known = squared * length**2 > SMALLEST_STEP**2
    return secant.stretch.at[index].set(jnp.where(known, jnp.clip(found, 1.0, LARGEST_STRETCH), secant.stretch[index]))


def _longest_moves(problem: Problem, state: State) -> Float[Array, " n"]:
    """Return by how much each coordinate may change in a step."""
    maps = coordinate_maps(problem)
    # Far out on the plane of ellipticities, the axis ratio goes with the inverse of the coordinates.
    length = jnp.where(maps == "disk", jnp.maximum(jnp.abs(state.vector), 1.0), 1.0)
    return jnp.where(maps == "identity", jnp.inf, LONGEST_MOVE * length)


class _Turn(eqx.Module):
    """Carry of `quadratic_program`."""

    step: Float[Array, " m"]
    is_done: Bool[Array, ""]
    count: Int[Array, ""]


def quadratic_program(
    matrix: Float[Array, "m m"], slope: Float[Array, " m"], low: Float[Array, " m"], high: Float[Array, " m"]
) -> tuple[Float[Array, " m"], Bool[Array, " m"]]:
    """Minimise `1/2 d.H d + g.d` over low <= d <= high, where 0 is allowed; also return which d aren't held by a bound.

    Projected Newton steps over the coordinates that aren't held by a bound (Bertsekas 1982, SIAM J. Control Optim. 20, 221,
    doi:10.1137/0320018), shortened until they lower the function.
    """

    def value(step):
        return 0.5 * step @ (matrix @ step) + slope @ step

    def free_at(step):
        gradient = matrix @ step + slope
        return ~((step <= low) & (gradient > 0)) & ~((step >= high) & (gradient < 0)), gradient

    def body(turn: _Turn) -> _Turn:
        free, gradient = free_at(turn.step)
        block = jnp.where(free[:, None] & free, matrix, jnp.eye(len(slope), dtype=matrix.dtype))
        newton = -jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(block), True), jnp.where(free, gradient, 0.0))
        lengths = 0.5 ** jnp.arange(12.0, dtype=slope.dtype)
        ends = jnp.clip(turn.step + lengths[:, None] * newton, low, high)
        values = jax.vmap(value)(ends)
        best = ends[jnp.argmin(values)]
        inside = jnp.all(jnp.where(free, (turn.step + newton > low) & (turn.step + newton < high), True))
        better = jnp.min(values) < value(turn.step)
        step = jnp.where(better, best, turn.step)
        is_done = ~better | (inside & jnp.all(free_at(step)[0] == free))
        return _Turn(step, is_done, turn.count + 1)

    start = _Turn(jnp.zeros_like(slope), jnp.asarray(False), jnp.zeros((), jnp.int32))
    end = lax.while_loop(lambda turn: ~turn.is_done & (turn.count < MAX_TURNS), body, start)
    return end.step, free_at(end.step)[0] & (end.step > low) & (end.step < high)
