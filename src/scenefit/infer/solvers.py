"""Solver: minimise the loss of a packed problem by projected Gauss-Newton steps.

A step minimises the quadratic model `1/2 |r + J d|^2` by conjugate gradients over the coordinates that aren't held by a
bound; each product with J^T J is one forward and one adjoint rendering. Fluxes, pixels, shapes, centers and offsets move
together, so that their covariance never slows the fit down. The end of the step is evaluated where the next one begins:
if the loss has grown, the step is shortened instead of continued.

(Two-metric projection: Bertsekas 1982, SIAM J. Control Optim. 20, 221, doi:10.1137/0320018. Alternating active-set
choice and conjugate gradients: More & Toraldo 1991, SIAM J. Optim. 1, 93, doi:10.1137/0801008.)
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scenefit.arrays.compilation import as_floats, as_integers
from scenefit.arrays.stamps import add_stamps
from scenefit.infer.problem import Problem, State
from scenefit.model.morphology import PixelMorphology

NUM_PROBES = 4
"""Random probes for the diagonal of J^T J of the vector coordinates."""
MAX_REJECTIONS = 4
"""Shortenings of a step, by 4 each, before it is computed anew with more damping."""
FIRST_DAMPING, MIN_DAMPING, MAX_DAMPING = 1e-3, 1e-8, 1e4
"""Levenberg-Marquardt damping relative to the diagonal of J^T J; beyond the largest the solver has stalled."""
SETTLED, GAIN_MEMORY = 0.8, 0.9
"""Conjugate gradients end when going on as long again as they went, at their recent gain, would lower the quadratic model
by less than this fraction of what they have (Nash & Sofer 1990, Oper. Res. Lett. 9, 219, doi:10.1016/0167-6377(90)90067-C);
the recent gain is the largest of the last ones, each counted this much less than the next."""


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
    curvature : array, shape (n,)
        Diagonal of J^T J for the vector coordinates; 0 until estimated.
    damping : float
    rejections : int
        How often the present step has been shortened.
    """

    best: State
    loss: Float[Array, ""]
    residuals: tuple[Float[Array, "_ _ _"], ...]
    trial: State
    target: State
    curvature: Float[Array, " n"]
    damping: Float[Array, ""]
    rejections: Int[Array, ""]


class StepReport(eqx.Module):
    """What one step did.

    Attributes
    ----------
    loss : float
        Of the best state so far.
    accepted : bool
        Whether the last step's end was better than its beginning.
    decrement : float
        Decrease of the loss, by the quadratic model, from here to its minimum: what the next step reaches of it, and what
        the conjugate gradients would still have found at their recent gain.
    num_determined : float
        Coordinates not held by a bound that the data determine; a pixel counts by the data's share in its curvature.
    projected_gradient : float
        Root mean square, over these coordinates, of the projected gradient in units of the conditional standard
        deviations: the distance of a diagonal Newton step.
    num_products : int
        Products with J^T J: pairs of a forward and an adjoint rendering.
    """

    loss: Float[Array, ""]
    accepted: Bool[Array, ""]
    decrement: Float[Array, ""]
    num_determined: Float[Array, ""]
    projected_gradient: Float[Array, ""]
    num_products: Int[Array, ""]


class _Loop(eqx.Module):
    """Carry of the loop over products with J^T J: first the gradient, then the probes, then conjugate gradients."""

    count: Int[Array, ""]
    gradient: State
    curvature: Float[Array, " n"]
    face: State
    diagonal: State
    step: State
    remainder: State
    direction: State
    energy: Float[Array, ""]
    iterations: Int[Array, ""]
    decrement: Float[Array, ""]
    gain: Float[Array, ""]


def start(problem: Problem, state: State) -> SolverState:
    """Return the solver state to begin with."""
    return SolverState(
        best=state,
        loss=as_floats(np.inf),
        residuals=tuple(as_floats(np.zeros(image.data.shape)) for image in problem.images),
        trial=state,
        target=state,
        curvature=as_floats(np.zeros(state.vector.shape)),
        damping=as_floats(FIRST_DAMPING),
        rejections=as_integers(0),
    )


def probe_signs(free: Bool[Array, " n"]) -> Float[Array, "p n"]:
    """Return random signs, shape (NUM_PROBES, n), for the coordinates that are free, the same every time."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(NUM_PROBES, len(free)))
    return as_floats(signs * np.asarray(free))


def gauss_newton_step(
    problem: Problem, carry: SolverState, signs: Float[Array, "p n"], max_products: Int[Array, ""]
) -> tuple[SolverState, StepReport]:
    """Evaluate the trial state; go on from it by a Gauss-Newton step if it is better, else shorten the last step.

    Parameters
    ----------
    problem : Problem
    carry : SolverState
    signs : array
        `probe_signs` of the free vector coordinates.
    max_products : int
        Conjugate-gradient iterations at most.

    Returns
    -------
    SolverState, StepReport
    """
    state = carry.trial
    residual, forward = jax.linearize(problem.residuals, state)
    transpose = jax.linear_transpose(forward, state)
    log_prior, prior_gradient, prior_curvature = prior_terms(problem, state.vector)
    loss = 0.5 * dot(residual, residual) - log_prior
    accepted = loss <= carry.loss
    damping = jnp.clip(carry.damping * jnp.where(carry.rejections == 0, 0.3, 1.0), MIN_DAMPING, MAX_DAMPING)
    damping = jnp.where(accepted, damping, carry.damping)

    def product(direction: State, weight) -> State:
        """Return J^T (J direction + weight residual) and the same of the priors on the vector."""
        images = forward(direction)
        (result,) = transpose(jax.tree.map(lambda i, r: i + weight * r, images, residual))
        return State(result.vector + prior_curvature * direction.vector + weight * prior_gradient, result.images)

    loop = _solve(
        problem,
        state,
        product,
        damping,
        carry.curvature,
        signs,
        accepted,
        max_products,
    )
    step = jax.tree.map(
        lambda f, s, free, g, d: jnp.where(f, s, jnp.where(free, -g / (d * (1 + damping)), 0.0)),
        loop.face,
        loop.step,
        problem.free,
        loop.gradient,
        loop.diagonal,
    )
    # Images count up to a factor: the part of their step that only scales them is left out.
    shaped = tuple(
        move - image * jnp.sum(move, axis=(1, 2), keepdims=True)
        for move, image in zip(step.images, state.images, strict=True)
    )
    full = problem.project(combine(state, 1.0, State(step.vector, shaped)))
    rejections = jnp.where(accepted, 0, carry.rejections + 1)
    restart = rejections > MAX_REJECTIONS
    length = jnp.where(restart, 0.0, 0.25**rejections)
    best, target = _select(accepted, (state, full), (carry.best, carry.target))
    trial = problem.project(jax.tree.map(lambda b, t: b + length * (t - b), best, target))
    determined = _num_determined(problem, loop)
    report = StepReport(
        loss=jnp.where(accepted, loss, carry.loss),
        accepted=accepted,
        decrement=loop.decrement + loop.iterations * loop.gain,
        num_determined=determined,
        projected_gradient=_scaled_gradient(problem, state, loop) / jnp.sqrt(jnp.maximum(determined, 1.0)),
        num_products=loop.count + 1,
    )
    following = SolverState(
        best=best,
        loss=report.loss,
        residuals=_select(accepted, residual[0], carry.residuals),
        trial=trial,
        target=target,
        curvature=jnp.where(accepted, loop.curvature, carry.curvature),
        damping=jnp.where(restart, jnp.minimum(damping * 30, MAX_DAMPING), damping),
        rejections=jnp.where(restart, 0, rejections),
    )
    return following, report


def _solve(problem, state, product, damping, curvature, signs, accepted, max_products) -> _Loop:
    """Minimise the quadratic model over the face of free coordinates; does nothing unless `accepted`."""
    num_probes = jnp.where(jnp.max(curvature, initial=0.0) == 0, NUM_PROBES, 0)
    pixel_curvature = image_curvature(problem, state)
    nothing = jax.tree.map(jnp.zeros_like, state)

    def precondition(remainder, diagonal):
        return jax.tree.map(lambda r, d: r / (d * (1 + damping)), remainder, diagonal)

    def begin(loop: _Loop) -> _Loop:
        """Choose the face and the preconditioner; begin the conjugate gradients."""
        estimate = jnp.where(num_probes > 0, loop.curvature / NUM_PROBES, curvature)
        diagonal = State(estimate + 1e-9 * jnp.max(estimate, initial=1e-20), pixel_curvature)
        face = jax.tree.map(
            lambda x, g, d, free, low, high: free & (x - g / d > low) & (x - g / d < high),
            state,
            loop.gradient,
            diagonal,
            problem.free,
            problem.lowest,
            problem.highest,
        )
        remainder = on_face(face, jax.tree.map(jnp.negative, loop.gradient))
        direction = precondition(remainder, diagonal)
        energy = dot(remainder, direction)
        loop = eqx.tree_at(lambda q: (q.curvature, q.face, q.diagonal), loop, (estimate, face, diagonal))
        return eqx.tree_at(
            lambda q: (q.remainder, q.direction, q.energy, q.gain), loop, (remainder, direction, energy, energy)
        )

    def set_up(loop: _Loop, result: State) -> _Loop:
        """Take in the gradient (first product) or a probe."""
        first = loop.count == 0
        gradient = jax.tree.map(lambda r, g: jnp.where(first, r, g), result, loop.gradient)
        # Absolute values: an estimate near zero by chance would let one coordinate rule the conjugate gradients.
        sample = jnp.where(first, 0.0, jnp.abs(signs[loop.count - 1] * result.vector))
        loop = eqx.tree_at(lambda q: (q.gradient, q.curvature), loop, (gradient, loop.curvature + sample))
        return lax.cond(loop.count == num_probes, begin, lambda q: q, loop)

    def iterate(loop: _Loop, result: State) -> _Loop:
        """Take one conjugate-gradient iteration."""
        damped = jax.tree.map(lambda r, d, v: r + damping * d * v, result, loop.diagonal, loop.direction)
        damped = on_face(loop.face, damped)
        length = loop.energy / jnp.maximum(dot(loop.direction, damped), 1e-30)
        remainder = combine(loop.remainder, -length, damped)
        preconditioned = precondition(remainder, loop.diagonal)
        energy = dot(remainder, preconditioned)
        following = combine(preconditioned, energy / jnp.maximum(loop.energy, 1e-30), loop.direction)
        step = combine(loop.step, length, loop.direction)
        gain = 0.5 * length * loop.energy
        return eqx.tree_at(
            lambda q: (q.step, q.remainder, q.direction, q.energy, q.iterations, q.decrement, q.gain),
            loop,
            (
                step,
                remainder,
                following,
                energy,
                loop.iterations + 1,
                loop.decrement + gain,
                jnp.maximum(gain, GAIN_MEMORY * loop.gain),
            ),
        )

    def body(loop: _Loop) -> _Loop:
        first, setting_up = loop.count == 0, loop.count <= num_probes
        probe = jnp.where(first, 0.0, signs[loop.count - 1])
        vector = jnp.where(setting_up, probe, loop.direction.vector)
        images = tuple(jnp.where(setting_up, 0.0, d) for d in loop.direction.images)
        result = product(State(vector, images), jnp.where(first, 1.0, 0.0))
        loop = lax.cond(setting_up, set_up, iterate, loop, result)
        return eqx.tree_at(lambda q: q.count, loop, loop.count + 1)

    def unfinished(loop: _Loop):
        ended = loop.iterations * loop.gain < SETTLED * loop.decrement
        return accepted & ((loop.count <= num_probes) | ((loop.iterations < max_products) & ~ended))

    zero = jnp.zeros((), state.vector.dtype)
    empty = _Loop(
        count=jnp.zeros((), jnp.int32),
        gradient=nothing,
        curvature=jnp.zeros_like(curvature),
        face=problem.free,
        diagonal=jax.tree.map(jnp.ones_like, state),
        step=nothing,
        remainder=nothing,
        direction=nothing,
        energy=zero,
        iterations=jnp.zeros((), jnp.int32),
        decrement=zero,
        gain=zero,
    )
    return lax.while_loop(unfinished, body, empty)


def image_curvature(problem: Problem, state: State) -> tuple[Float[Array, "m h w"], ...]:
    """Return a diagonal that bounds J^T J for the pixels of all images from above (but for their scaling to unit sum).

    With `u_c = sum_s f_sc m_s` and `|R u|^2 <= lambda_c |u|^2`, the Cauchy-Schwarz inequality with weights f gives
    `D_s(p) = sum_c lambda_c f_sc sum_s' f_s'c` over the sources s' that cover pixel p.
    """
    stacks, _ = problem.fill(state)
    norm = jnp.zeros(problem.canvas[0], state.vector.dtype)
    for image in problem.images:
        heaviest = jnp.max(image.noise.whiten(jnp.ones_like(image.data)) ** 2, axis=(1, 2))
        norm = norm.at[np.array(image.renderer.channels)].add(image.renderer.norm * image.gain**2 * heaviest)
    cover = jnp.zeros(problem.canvas, state.vector.dtype)
    for stack in stacks:
        cover = add_stamps(cover, jnp.abs(stack.spectra), stack.mask.astype(cover.dtype), stack.origin)

    def one(row):
        origin, spectrum, mask = row
        start = (jnp.zeros_like(origin[0]), origin[0], origin[1])
        window = lax.dynamic_slice(cover, start, (cover.shape[0], *mask.shape))
        return jnp.einsum("c,cyx->yx", norm * jnp.abs(spectrum), window) + 1e-20

    images = [stack for stack in stacks if isinstance(stack.morphology, PixelMorphology)]
    data = [lax.map(one, (stack.origin, stack.spectra, stack.mask)) for stack in images]
    return tuple(value + weight for value, (_, weight) in zip(data, problem.image_priors, strict=True))


def prior_terms(problem: Problem, vector: Float[Array, " n"]):
    """Return the log-prior of the vector, and gradient and diagonal Hessian (where positive) of its negative."""
    if not problem.priors:
        return jnp.zeros((), vector.dtype), jnp.zeros_like(vector), jnp.zeros_like(vector)
    value, slope = jax.value_and_grad(problem.log_prior)(vector)
    bend = jax.jvp(jax.grad(problem.log_prior), (vector,), (jnp.ones_like(vector),))[1]
    return value, -slope, jnp.maximum(-bend, 0.0)


def _scaled_gradient(problem, state, loop: _Loop):
    """Return the length of the projected diagonal Newton step in conditional standard deviations."""
    moves = jax.tree.map(
        lambda x, g, d, free, low, high: jnp.where(free, (jnp.clip(x - g / d, low, high) - x) * jnp.sqrt(d), 0.0),
        state,
        loop.gradient,
        loop.diagonal,
        problem.free,
        problem.lowest,
        problem.highest,
    )
    return jnp.sqrt(dot(moves, moves))


def _num_determined(problem: Problem, loop: _Loop) -> Float[Array, ""]:
    """Return how many coordinates of the face the data determine."""
    shares = [
        jnp.where(f, 1 - w / d, 0.0)
        for f, (_, w), d in zip(loop.face.images, problem.image_priors, loop.diagonal.images, strict=True)
    ]
    return sum((jnp.sum(share) for share in shares), jnp.sum(loop.face.vector, dtype=float))


def dot(a, b) -> Float[Array, ""]:
    """Return the inner product of two trees of arrays."""
    products = [jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return jnp.sum(jnp.stack(products))


def combine(a: State, factor, b: State) -> State:
    """Return a + factor * b."""
    return jax.tree.map(lambda x, y: x + factor * y, a, b)


def on_face(face: State, direction: State) -> State:
    """Return the direction with the coordinates off the face set to zero."""
    return jax.tree.map(lambda f, d: jnp.where(f, d, 0.0), face, direction)


def _select(condition, yes, no):
    """Return `yes` or `no`, trees of arrays."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
