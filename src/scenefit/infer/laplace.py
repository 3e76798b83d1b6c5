"""Covariances at the best fit: the inverse of the Gauss-Newton Hessian J^T J plus the curvature of the priors.

`vector_covariance` holds free-pixel images fixed and inverts the information matrix of fluxes, shapes, offsets and
backgrounds, neighbours included. `marginal_covariance` gives a few coordinates with everything else marginalised, the
pixels of all images included, by conjugate gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from scipy.sparse.csgraph import connected_components

from scenefit.arrays.compilation import as_integers, compiled
from scenefit.arrays.progress import with_progress
from scenefit.data.observation import Observation
from scenefit.infer.inverse import SINGULAR, covariance_of
from scenefit.infer.jacobian import information_matrix
from scenefit.infer.posterior import Layout
from scenefit.infer.problem import Problem, State
from scenefit.infer.quadratic import (
    ConjugateIterate,
    above_zero,
    conjugate_step,
    curvature_probes,
    dot,
    image_curvature,
    on_face,
    prior_terms,
)
from scenefit.infer.slopes import StampSlopes
from scenefit.model.scene import Scene

MAX_ITERATIONS = 400
"""Conjugate-gradient iterations at most for a column of the inverse Hessian."""
TOLERANCE = 1e-6
"""Reduction of the preconditioned squared residual at which a column is done: errors good to about a permille."""
CHECK_EVERY, GROWTH_TOLERANCE = 25, 5e-3
"""A column is done, too, when so many iterations have added less than this fraction to the variance asked for: the
standard error is then about a percent short of its value."""
NEARLY_SINGULAR = 10 * SINGULAR
"""Reciprocal condition number below which the eigenvalues of a matrix are looked at."""


def vector_covariance(
    problem: Problem,
    state: State,
    layout: Layout,
    scene: Scene,
    observations: Sequence[Observation],
    slopes: Sequence[StampSlopes] | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, scipy.sparse.csr_matrix]:
    """Return the covariance of the free vector coordinates, the images held fixed: the inverse of `information_matrix`.

    Parameters are those of `information_matrix`.

    Returns
    -------
    index : array of int, shape (m,)
        The free coordinates about which the data or a prior say something.
    covariance : sparse matrix, shape (m, m)
        Block-diagonal where sources or channels don't share pixels.
    """
    index, information = information_matrix(problem, state, layout, scene, observations, slopes, progress)
    known = information.diagonal() > 0
    index, information = index[known], information[known][:, known]
    _, block = connected_components(information, directed=False)
    order = np.argsort(block, kind="stable")
    starts = np.concatenate([[0], np.nonzero(np.diff(block[order]))[0] + 1, [len(order)]])
    blocks = []
    for first, last in itertools.pairwise(starts):
        members = order[first:last]
        blocks.append(scipy.sparse.coo_matrix(_inverse(information[members][:, members].toarray())))
    inverse = scipy.sparse.block_diag(blocks, format="csr") if blocks else scipy.sparse.csr_matrix((0, 0))
    place = np.argsort(order)
    return index, inverse[place][:, place]


def _inverse(information: np.ndarray) -> np.ndarray:
    """Return `covariance_of` a matrix with a positive diagonal, by its Cholesky factor if it is far from singular."""
    if not len(information):
        return information
    scale = 1 / np.sqrt(np.diag(information))
    scaled = information * scale[:, None] * scale
    factor, failed = scipy.linalg.lapack.dpotrf(scaled, lower=1)
    if failed or scipy.linalg.lapack.dpocon(factor, np.abs(scaled).sum(axis=0).max(), uplo="L")[0] < NEARLY_SINGULAR:
        return covariance_of(information)
    inverse = np.tril(scipy.linalg.lapack.dpotri(factor, lower=1)[0])
    inverse += np.tril(inverse, -1).T
    return inverse * scale[:, None] * scale


def marginal_covariance(
    problem: Problem, state: State, index: Sequence[int] | np.ndarray, progress: bool = False
) -> np.ndarray:
    """Return the covariance of the vector coordinates `index`, everything else marginalised over.

    Pixels and fluxes at a bound count as known; all other free coordinates vary.

    Returns
    -------
    array, shape (len(index), len(index))
    """
    probes = curvature_probes(problem)
    numbers = [int(i) for i in index]
    columns = [
        np.asarray(_inverse_column(problem, state, as_integers(i), probes))[numbers]
        for i in with_progress(numbers, "errors of observations", progress)
    ]
    covariance = np.array(columns, dtype=float).reshape(len(columns), len(columns))
    return 0.5 * (covariance + covariance.T)


class _Column(eqx.Module):
    """Carry of the loop over products with the Hessian: first probes of its diagonal, then conjugate gradients."""

    count: Int[Array, ""]
    diagonal: State
    iterate: ConjugateIterate
    first_energy: Float[Array, ""]
    variance: Float[Array, ""]
    earlier_variance: Float[Array, ""]
    is_done: Bool[Array, ""]


@compiled
def _inverse_column(problem: Problem, state: State, number, probes):
    """Return the vector part of column `number` of the inverse Hessian on the face of coordinates within bounds.

    The diagonal element that is asked for grows with every iteration towards its value (Strakos & Tichy 2002, ETNA 13,
    56, eq. 3.5): when it has all but stopped growing, the column is done.
    """
    _, forward = jax.linearize(lambda at: problem.residuals(at, "fisher"), state)
    transpose = jax.linear_transpose(forward, state)
    curvature = prior_terms(problem, state)[2]
    face = jax.tree.map(
        lambda x, free, low, high: free & (x > low) & (x < high), state, problem.free, problem.lowest, problem.highest
    )
    nothing = jax.tree.map(jnp.zeros_like, state)
    unit = eqx.tree_at(lambda s: s.vector, nothing, nothing.vector.at[number].set(1.0))
    pixels = image_curvature(problem, state)
    num_probes = len(probes)

    def probe(loop: _Column, image: State) -> _Column:
        """Take in a probe; after the last one, begin the conjugate gradients."""
        total = loop.diagonal.vector + jnp.abs(probes[loop.count] * image.vector)
        loop = eqx.tree_at(lambda q: q.diagonal.vector, loop, total)

        def begin(loop: _Column) -> _Column:
            diagonal = State(above_zero(total), pixels)
            direction = jax.tree.map(jnp.divide, unit, diagonal)
            energy = dot(unit, direction)
            return eqx.tree_at(
                lambda q: (q.diagonal, q.iterate.direction, q.iterate.energy, q.first_energy),
                loop,
                (diagonal, direction, energy, energy),
            )

        return lax.cond(loop.count + 1 == num_probes, begin, lambda q: q, loop)

    def iterate(loop: _Column, image: State) -> _Column:
        """Take one conjugate-gradient iteration."""
        following, gain = conjugate_step(loop.iterate, image, loop.diagonal)
        variance = loop.variance + 2 * gain
        checked = (loop.count - num_probes) % CHECK_EVERY == CHECK_EVERY - 1
        settled = checked & (variance - loop.earlier_variance < GROWTH_TOLERANCE * variance)
        return _Column(
            count=loop.count,
            diagonal=loop.diagonal,
            iterate=following,
            first_energy=loop.first_energy,
            variance=variance,
            earlier_variance=jnp.where(checked, variance, loop.earlier_variance),
            is_done=settled | (following.energy <= TOLERANCE * loop.first_energy),
        )

    def body(loop: _Column) -> _Column:
        probing = loop.count < num_probes
        vector = jnp.where(probing, probes[jnp.minimum(loop.count, num_probes - 1)], loop.iterate.direction.vector)
        direction = State(vector, tuple(jnp.where(probing, 0.0, d) for d in loop.iterate.direction.images))
        (image,) = transpose(forward(direction))
        image = on_face(face, State(image.vector + curvature * vector, image.images))
        loop = lax.cond(probing, probe, iterate, loop, image)
        return eqx.tree_at(lambda q: q.count, loop, loop.count + 1)

    zero = jnp.zeros((), state.vector.dtype)
    first = ConjugateIterate(step=nothing, remainder=unit, direction=nothing, energy=zero)
    start = _Column(jnp.zeros((), jnp.int32), nothing, first, zero, zero, zero, jnp.asarray(False))
    loop = lax.while_loop(lambda q: (q.count < MAX_ITERATIONS + num_probes) & ~q.is_done, body, start)
    return loop.iterate.step.vector
