"""Gauss-Newton steps for few parameters: the exact Jacobian of all residuals, and a small quadratic programme within bounds."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scenefit.arrays.compilation import as_integers
from scenefit.infer.descent import Descent
from scenefit.infer.problem import Leaf, Problem, State
from scenefit.infer.quadratic import spread_curvature

MAX_COORDINATES = 96
"""Free coordinates up to which the Jacobian is computed as a whole."""
MAX_TURNS = 30
"""Changes of the set of coordinates at bounds at most, in the solution of a quadratic programme."""
LONGEST_MOVE = 1.0
"""Logarithms and logits of parameters change by at most this much in a step: where the maps saturate, the model wouldn't know
the way back."""
SINGULAR = 1e-6
"""Added to the unit diagonal of the scaled Hessian: directions that nothing determines stay where they are."""


class Coordinates(eqx.Module):
    """The free coordinates of a problem's vector.

    Attributes
    ----------
    shapes : array of int, shape (p,)
        Those that the components' images depend on.
    others : array of int, shape (q,)
        Those of fluxes, backgrounds and shifts alone: along these no image is transformed again.
    """

    shapes: Int[Array, " p"]
    others: Int[Array, " q"]

    @property
    def index(self) -> Int[Array, " m"]:
        """All of them."""
        return jnp.concatenate([self.shapes, self.others])

    def __len__(self):
        return len(self.shapes) + len(self.others)


def free_coordinates(problem: Problem) -> Coordinates | None:
    """Return the free coordinates; None if they are too many for a Jacobian, or there are free images."""
    index, free = np.asarray(problem.index), np.asarray(problem.free.vector)
    of_shapes = np.zeros(len(free), bool)
    for leaf in problem.leaves:
        if _shapes_images(leaf):
            of_shapes[index[leaf.start : leaf.stop]] = True
    chosen = np.unique(index)
    chosen = chosen[free[chosen]]
    if not 0 < len(chosen) <= MAX_COORDINATES or any(np.any(image) for image in problem.free.images):
        return None
    return Coordinates(as_integers(chosen[of_shapes[chosen]]), as_integers(chosen[~of_shapes[chosen]]))


def is_mapped(problem: Problem) -> np.ndarray:
    """Return which coordinates are mapped to their parameters: logarithms, logits, ellipticities."""
    mapped = np.zeros(len(problem.lowest.vector), bool)
    for leaf in problem.leaves:
        mapped[leaf.start : leaf.stop] = leaf.map != "identity"
    return mapped


def _shapes_images(leaf: Leaf) -> bool:
    """Return whether the images of components depend on a leaf."""
    return leaf.kind == "stack" and leaf.name != "flux"


def jacobian(problem: Problem, state: State, coordinates: Coordinates) -> Float[Array, "m pixel"]:
    """Return the derivatives of all residuals along the coordinates."""
    stacks, images = problem.fill(state)
    size = sum(part.size for part in jax.tree.leaves(jax.eval_shape(problem.residuals, state)))
    rows = []
    for group, index in ((True, coordinates.shapes), (False, coordinates.others)):
        if len(index) == 0:
            continue
        # The leaves of the other group are constants here, but for coordinates that both have (ties).
        leaves = tuple(leaf for leaf in problem.leaves if group or not _shapes_images(leaf))
        part = eqx.tree_at(lambda p: (p.stacks, p.images, p.leaves), problem, (tuple(stacks), tuple(images), leaves))
        _, forward = jax.linearize(part.residuals, state)

        def along(number, forward=forward):
            direction = jnp.zeros_like(state.vector).at[number].set(1.0)
            images = tuple(jnp.zeros_like(image) for image in state.images)
            return jnp.concatenate([plane.ravel() for plane in jax.tree.leaves(forward(State(direction, images)))])

        part_rows = jax.vmap(along)(index)
        # Where no leaf is an amplitude, the residuals of amplitudes are missing; they come last.
        rows.append(jnp.pad(part_rows, ((0, 0), (0, size - part_rows.shape[1]))))
    return jnp.concatenate(rows)


def potential_hessian(problem: Problem, state: State, index: Int[Array, " m"]) -> Float[Array, "m m"]:
    """Return the Hessian of `Problem.potential` for the coordinates `index`, as far as it is positive."""
    own = jnp.diag(spread_curvature(problem, state)[index])
    if not problem.priors:
        return own
    part = -jax.jacfwd(jax.grad(problem.log_prior))(state.vector)[index][:, index]
    values, vectors = jnp.linalg.eigh(0.5 * (part + part.T))
    return own + (vectors * jnp.maximum(values, 0.0)) @ vectors.T


def hessian(problem: Problem, state: State, coordinates: Coordinates):
    """Return Jacobian, shape (m, pixel), and Gauss-Newton Hessian of the loss, shape (m, m)."""
    derivatives = jacobian(problem, state, coordinates)
    product = jnp.matmul(derivatives, derivatives.T, precision=lax.Precision.HIGHEST)
    return derivatives, product + potential_hessian(problem, state, coordinates.index)


def dense_descent(
    problem: Problem,
    state: State,
    residual,
    prior_gradient: Float[Array, " n"],
    damping: Float[Array, ""],
    coordinates: Coordinates,
) -> Descent:
    """Minimise the quadratic model of the loss about a state within bounds, exactly.

    Parameters
    ----------
    problem : Problem
    state : State
    residual : tree of arrays
        `problem.residuals(state)`.
    prior_gradient : array
        Of the negative log-prior.
    damping : float
        Of the Hessian, relative to its diagonal.
    coordinates : Coordinates
        `free_coordinates` of the problem.
    """
    derivatives, matrix = hessian(problem, state, coordinates)
    index = coordinates.index
    flat = jnp.concatenate([part.ravel() for part in jax.tree.leaves(residual)])
    counts = problem.free.vector[index]
    slope = jnp.where(counts, derivatives @ flat + prior_gradient[index], 0.0)
    diagonal = jnp.diagonal(matrix)
    counts &= diagonal > 0
    # In units of the conditional standard deviations.
    unit = jnp.where(counts, 1 / jnp.sqrt(jnp.where(counts, diagonal, 1.0)), 0.0)
    scaled = matrix * unit[:, None] * unit + jnp.diag(jnp.where(counts, damping + SINGULAR, 1.0))
    safe = jnp.where(counts, unit, 1.0)
    farthest = jnp.where(jnp.asarray(is_mapped(problem))[index], LONGEST_MOVE, jnp.inf)
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
    )


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
