"""Solver: minimise the loss of a packed problem by projected Gauss-Newton steps.

A step minimises the quadratic model `1/2 |r + J d|^2` by conjugate gradients over the coordinates that aren't held by a
bound; each product with J^T J is one forward and one adjoint rendering. Fluxes, pixels, shapes, centers and offsets move
together, so that their covariance never slows the fit down. The end of the step is evaluated where the next one begins:
if the loss has grown, the step is shortened instead of continued.

(Two-metric projection: Bertsekas 1982, SIAM J. Control Optim. 20, 221, doi:10.1137/0320018.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scenefit.arrays.compilation import as_floats, as_integers
from scenefit.infer.dense import dense_descent, potential_hessian, stretched
from scenefit.infer.descent import Descent, QuadraticModel, Secant
from scenefit.infer.footprints import Footprints
from scenefit.infer.gradient import residuals_and_gradient
from scenefit.infer.problem import Problem, State
from scenefit.infer.quadratic import combine, dot, image_curvature, prior_terms, select
from scenefit.infer.slopes import StampSlopes

MAX_REJECTIONS = 4
"""Shortenings of a step, by 4 each, before it is computed anew with more damping."""
FIRST_DAMPING, MIN_DAMPING, MAX_DAMPING = 1e-3, 1e-8, 1e4
"""Levenberg-Marquardt damping relative to the diagonal of J^T J; beyond the largest the solver has stalled."""
ROUNDING = 4.0
"""Rounding of the loss in units of the machine's precision."""
GOOD_RATIO, POOR_RATIO = 0.7, 0.3
"""Actual over promised decrease of the loss above which there is less damping in the next step, below which there is more."""


class SolverState(eqx.Module):
    """What is carried from step to step.

    Attributes
    ----------
    best : State
        Lowest loss so far.
    loss : float
        Its loss.
    residuals : tuple of arrays, shape (channel, y, x)
        Its whitened residuals (model minus data), one array an observation.
    trial : State
        To be evaluated next.
    target : State
        End of the full step from `best`.
    promise : float
        Decrease of the loss that the quadratic model expects of the full step.
    curvature : array, shape (n,)
        Diagonal of J^T J for the vector coordinates; 0 until estimated.
    damping : float
    rejections : int
        How often the present step has been shortened.
    secant : Secant or None
        Of the full step from `best`; None for conjugate gradients.
    """

    best: State
    loss: Float[Array, ""]
    residuals: tuple[Float[Array, "_ _ _"], ...]
    trial: State
    target: State
    promise: Float[Array, ""]
    curvature: Float[Array, " n"]
    damping: Float[Array, ""]
    rejections: Int[Array, ""]
    secant: Secant | None


class StepReport(eqx.Module):
    """What one step did.

    Attributes
    ----------
    loss : float
        Of the best state so far.
    accepted : bool
        Whether the last step's end was better than its beginning.
    remaining : float
        Distance to the minimum of the quadratic model in standard deviations, root mean square over the coordinates not held by
        a bound that the data determine (a pixel counts by the data's share in its curvature). From the decrease of the loss:
        what the next step reaches of it, and what the conjugate gradients would still have found at their recent gain.
        Infinite, since unknown, if the step leads upwards.
    is_settled : bool
        Whether the conjugate gradients ended because little was left, not by their number.
    projected_gradient : float
        Root mean square, over these coordinates, of the projected gradient in units of the conditional standard
        deviations: the distance of a diagonal Newton step.
    num_products : int
        Products with J^T J: pairs of a forward and an adjoint rendering.
    """

    loss: Float[Array, ""]
    accepted: Bool[Array, ""]
    remaining: Float[Array, ""]
    is_settled: Bool[Array, ""]
    projected_gradient: Float[Array, ""]
    num_products: Int[Array, ""]


def start(problem: Problem, state: State, *, dense: bool = False) -> SolverState:
    """Return the solver state to begin with: for `dense_step`, or else for `gauss_newton_step`."""
    nothing, ones = (as_floats(np.full(state.vector.shape, value)) for value in (0.0, 1.0))
    return SolverState(
        best=state,
        loss=as_floats(np.inf),
        residuals=tuple(as_floats(np.zeros(image.data.shape)) for image in problem.images),
        trial=state,
        target=state,
        promise=as_floats(0.0),
        curvature=as_floats(np.zeros(state.vector.shape)),
        damping=as_floats(FIRST_DAMPING),
        rejections=as_integers(0),
        secant=Secant(nothing, nothing, nothing, nothing, ones) if dense else None,
    )


def gauss_newton_step(
    problem: Problem,
    carry: SolverState,
    probes: Float[Array, "p n"],
    max_iterations: Int[Array, ""],
    settled: Float[Array, ""],
) -> tuple[SolverState, StepReport]:
    """Evaluate the trial state; go on from it by a Gauss-Newton step if it is better, else shorten the last step.

    The step is found by conjugate gradients: for many coordinates, free-pixel images among them.

    Parameters
    ----------
    problem : Problem
    carry : SolverState
    probes : array
        `curvature_probes` of the problem.
    max_iterations : int
        Iterations of a round of conjugate gradients at most.
    settled : float
        When conjugate gradients end: see `QuadraticModel.descend`.

    Returns
    -------
    SolverState, StepReport
    """
    state = carry.trial
    residual, forward = jax.linearize(problem.residuals, state)
    deviance = residual if problem.is_gaussian else problem.residuals(state, "deviance")
    potential, prior_gradient, prior_curvature = prior_terms(problem, state)

    def descend(accepted, damping) -> Descent:
        transpose = jax.linear_transpose(forward, state)

        def product(direction: State, weight) -> State:
            """Return J^T (J direction + weight residual) and the same of the priors on the vector."""
            images = forward(direction)
            (result,) = transpose(jax.tree.map(lambda i, r: i + weight * r, images, residual))
            vector = prior_curvature * direction.vector + weight * prior_gradient
            return State(result.vector + vector, result.images)

        pixels = image_curvature(problem, state)
        model = QuadraticModel(problem, state, product, damping, carry.curvature, probes, pixels)
        return model.descend(accepted, max_iterations, settled)

    return _step(problem, carry, 0.5 * dot(deviance, deviance) + potential, residual[0], descend)


def dense_step(
    problem: Problem,
    carry: SolverState,
    where: Footprints,
    slopes: Sequence[StampSlopes],
    matrix: Float[Array, "m m"],
) -> tuple[SolverState, StepReport]:
    """Do as `gauss_newton_step`, with the Hessian matrix of all free coordinates.

    Parameters
    ----------
    problem : Problem
    carry : SolverState
        Of `start(..., dense=True)`.
    where : Footprints
        `dense.dense_footprints` of the problem.
    slopes : list of StampSlopes
        `stamp_slopes` of the problem at the trial state.
    matrix : array
        `information` there.

    Returns
    -------
    SolverState, StepReport
    """
    secant, state = carry.secant, carry.trial
    if secant is None:
        raise ValueError("dense_step wants the solver state of start(..., dense=True).")
    residual, deviance, gradient = residuals_and_gradient(problem, state, slopes)
    potential, prior_gradient, _ = prior_terms(problem, state)
    gradient = gradient + prior_gradient

    def descend(_, damping) -> Descent:
        stretch = stretched(secant, gradient, 0.25**carry.rejections, where)
        expected = matrix + potential_hessian(problem, state, where.index)
        return dense_descent(problem, state, expected, gradient, damping, where, stretch)

    return _step(problem, carry, 0.5 * dot(deviance, deviance) + potential, residual[0], descend)


def _step(problem: Problem, carry: SolverState, loss, residuals, descend: Callable) -> tuple[SolverState, StepReport]:
    """Go on from the trial state, whose loss and residuals are known, by `descend`; or shorten the last step."""
    state = carry.trial
    # A decrease below the rounding of the loss can't be seen in it: such a step is taken as the model has it.
    rounding = ROUNDING * jnp.finfo(loss.dtype).eps * jnp.abs(carry.loss)
    is_tiny = jnp.isfinite(carry.loss) & (jnp.abs(carry.promise) < rounding)
    accepted = loss <= carry.loss + jnp.where(is_tiny, rounding, 0.0)
    ratio = jnp.where(jnp.isfinite(carry.loss), (carry.loss - loss) / jnp.maximum(carry.promise, 1e-30), 1.0)
    factor = jnp.where(ratio > GOOD_RATIO, 0.3, jnp.where(ratio < POOR_RATIO, 10.0, 1.0))
    factor = jnp.where(is_tiny, 1.0, factor)
    damping = jnp.clip(carry.damping * jnp.where(accepted, factor, 1.0), MIN_DAMPING, MAX_DAMPING)
    descent = descend(accepted, damping)
    full = problem.project(combine(state, 1.0, descent.step))
    rejections = jnp.where(accepted, 0, carry.rejections + 1)
    restart = rejections > MAX_REJECTIONS
    length = jnp.where(restart, 0.0, 0.25**rejections)
    best, target = select(accepted, (state, full), (carry.best, carry.target))
    trial = problem.project(jax.tree.map(lambda b, t: b + length * (t - b), best, target))
    determined = jnp.maximum(_num_determined(problem, descent), 1.0)
    squared = 2 * (descent.decrement + descent.outstanding) / determined
    report = StepReport(
        loss=jnp.where(accepted, loss, carry.loss),
        accepted=accepted,
        remaining=jnp.where(squared >= 0, jnp.sqrt(jnp.maximum(squared, 0.0)), jnp.inf),
        is_settled=descent.is_settled,
        projected_gradient=_scaled_gradient(problem, state, descent) / jnp.sqrt(determined),
        num_products=descent.num_products + 1,
    )
    following = SolverState(
        best=best,
        loss=report.loss,
        residuals=select(accepted, residuals, carry.residuals),
        trial=trial,
        target=target,
        promise=jnp.where(accepted, descent.decrement, carry.promise),
        curvature=jnp.where(accepted, descent.diagonal.vector, carry.curvature),
        damping=jnp.where(restart, jnp.minimum(damping * 30, MAX_DAMPING), damping),
        rejections=jnp.where(restart, 0, rejections),
        secant=select(accepted, descent.secant, carry.secant),
    )
    return following, report


def _scaled_gradient(problem: Problem, state: State, descent: Descent) -> Float[Array, ""]:
    """Return the length of the projected diagonal Newton step in conditional standard deviations."""
    moves = jax.tree.map(
        lambda x, g, d, free, low, high: jnp.where(free, (jnp.clip(x - g / d, low, high) - x) * jnp.sqrt(d), 0.0),
        state,
        descent.gradient,
        descent.diagonal,
        problem.free,
        problem.lowest,
        problem.highest,
    )
    return jnp.sqrt(dot(moves, moves))


def _num_determined(problem: Problem, descent: Descent) -> Float[Array, ""]:
    """Return how many coordinates of the face the data determine."""
    stacks = zip(descent.face.images, problem.image_priors, descent.diagonal.images, strict=True)
    shares = [jnp.sum(jnp.where(on, 1 - weight / total, 0.0)) for on, (_, weight), total in stacks]
    return sum(shares, jnp.sum(descent.face.vector, dtype=float))
