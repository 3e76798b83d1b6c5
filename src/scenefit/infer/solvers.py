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
GAIN_MEMORY = 0.9
"""The recent gain of conjugate gradients is the largest of the last ones, each counted this much less than the next."""
MAX_ROUNDS, CLIPPED = 4, 0.05
"""Conjugate gradients go on from where the bounds cut their step, so many times in all, as long as what was cut off is more
than this fraction of the decrease."""
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


class _Descent(eqx.Module):
    """Conjugate gradients on their way: what one phase hands to the next."""

    phase: Int[Array, ""]
    round: Int[Array, ""]
    face: State
    step: State
    remainder: State
    direction: State
    energy: Float[Array, ""]
    iterations: Int[Array, ""]
    decrement: Float[Array, ""]
    gain: Float[Array, ""]


class _Loop(eqx.Module):
    """Carry of the loop over products with J^T J: first the gradient, then the probes, then rounds of conjugate gradients."""

    count: Int[Array, ""]
    gradient: State
    curvature: Float[Array, " n"]
    descent: _Descent


_SET_UP, _RESTART, _ITERATE, _DONE = range(4)


def start(problem: Problem, state: State) -> SolverState:
    """Return the solver state to begin with."""
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
    )


def probe_signs(free: Bool[Array, " n"]) -> Float[Array, "p n"]:
    """Return random signs, shape (NUM_PROBES, n), for the coordinates that are free, the same every time."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(NUM_PROBES, len(free)))
    return as_floats(signs * np.asarray(free))


def gauss_newton_step(
    problem: Problem,
    carry: SolverState,
    signs: Float[Array, "p n"],
    max_products: Int[Array, ""],
    settled: Float[Array, ""],
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
    settled : float
        Conjugate gradients end when going on as long again as they went, at their recent gain, would lower the quadratic
        model by less than this fraction of what they have (Nash & Sofer 1990, Oper. Res. Lett. 9, 219,
        doi:10.1016/0167-6377(90)90067-C).

    Returns
    -------
    SolverState, StepReport
    """
    state = carry.trial
    residual, forward = jax.linearize(problem.residuals, state)
    transpose = jax.linear_transpose(forward, state)
    log_prior, prior_gradient, prior_curvature = prior_terms(problem, state.vector)
    loss = 0.5 * dot(residual, residual) - log_prior
    # A decrease below the rounding of the loss can't be seen in it: such a step is taken as the model has it.
    rounding = ROUNDING * jnp.finfo(loss.dtype).eps * jnp.abs(carry.loss)
    is_tiny = jnp.isfinite(carry.loss) & (carry.promise < rounding)
    accepted = loss <= carry.loss + jnp.where(is_tiny, rounding, 0.0)
    ratio = jnp.where(jnp.isfinite(carry.loss), (carry.loss - loss) / jnp.maximum(carry.promise, 1e-30), 1.0)
    factor = jnp.where(ratio > GOOD_RATIO, 0.3, jnp.where(ratio < POOR_RATIO, 10.0, 1.0))
    factor = jnp.where(is_tiny, 1.0, factor)
    damping = jnp.clip(carry.damping * jnp.where(accepted, factor, 1.0), MIN_DAMPING, MAX_DAMPING)

    def product(direction: State, weight) -> State:
        """Return J^T (J direction + weight residual) and the same of the priors on the vector."""
        images = forward(direction)
        (result,) = transpose(jax.tree.map(lambda i, r: i + weight * r, images, residual))
        return State(result.vector + prior_curvature * direction.vector + weight * prior_gradient, result.images)

    count, gradient, diagonal, descent = _solve(
        problem,
        state,
        product,
        damping,
        carry.curvature,
        signs,
        accepted,
        max_products,
        settled,
    )
    full = problem.project(combine(state, 1.0, descent.step))
    rejections = jnp.where(accepted, 0, carry.rejections + 1)
    restart = rejections > MAX_REJECTIONS
    length = jnp.where(restart, 0.0, 0.25**rejections)
    best, target = _select(accepted, (state, full), (carry.best, carry.target))
    trial = problem.project(jax.tree.map(lambda b, t: b + length * (t - b), best, target))
    determined = _num_determined(problem, descent.face, diagonal)
    report = StepReport(
        loss=jnp.where(accepted, loss, carry.loss),
        accepted=accepted,
        decrement=descent.decrement + descent.iterations * descent.gain,
        num_determined=determined,
        projected_gradient=_scaled_gradient(problem, state, gradient, diagonal)
        / jnp.sqrt(jnp.maximum(determined, 1.0)),
        num_products=count + 1,
    )
    following = SolverState(
        best=best,
        loss=report.loss,
        residuals=_select(accepted, residual[0], carry.residuals),
        trial=trial,
        target=target,
        promise=jnp.where(accepted, descent.decrement, carry.promise),
        curvature=jnp.where(accepted, diagonal.vector, carry.curvature),
        damping=jnp.where(restart, jnp.minimum(damping * 30, MAX_DAMPING), damping),
        rejections=jnp.where(restart, 0, rejections),
    )
    return following, report


def _solve(problem, state, product, damping, curvature, signs, accepted, max_products, settled):
    """Minimise the quadratic model over the face of free coordinates; does nothing unless `accepted`.

    Returns
    -------
    count : int
        Products.
    gradient, diagonal : State
        Gradient of the loss, and diagonal of its Hessian.
    descent : _Descent
    """
    num_probes = jnp.where(jnp.max(curvature, initial=0.0) == 0, NUM_PROBES, 0)
    pixel_curvature = image_curvature(problem, state)
    nothing = jax.tree.map(jnp.zeros_like, state)

    def diagonal(loop: _Loop) -> State:
        estimate = jnp.where(num_probes > 0, loop.curvature / NUM_PROBES, curvature)
        return State(estimate + 1e-9 * jnp.max(estimate, initial=1e-20), pixel_curvature)

    def damped(result: State, loop: _Loop, direction: State) -> State:
        return jax.tree.map(lambda r, d, v: r + damping * d * v, result, diagonal(loop), direction)

    def precondition(remainder: State, loop: _Loop) -> State:
        return jax.tree.map(lambda r, d: r / (d * (1 + damping)), remainder, diagonal(loop))

    def iterate(loop: _Loop, result: State) -> _Descent:
        """Take one conjugate-gradient iteration; does nothing in other phases."""
        descent = loop.descent
        iterating = descent.phase == _ITERATE
        image = on_face(descent.face, damped(result, loop, descent.direction))
        length = jnp.where(iterating, descent.energy / jnp.maximum(dot(descent.direction, image), 1e-30), 0.0)
        remainder = combine(descent.remainder, -length, image)
        preconditioned = precondition(remainder, loop)
        energy = dot(remainder, preconditioned)
        gain = 0.5 * length * descent.energy
        iterations, decrement = descent.iterations + iterating, descent.decrement + gain
        recent = jnp.maximum(gain, GAIN_MEMORY * descent.gain)
        return _Descent(
            phase=descent.phase,
            round=descent.round,
            face=descent.face,
            step=combine(descent.step, length, descent.direction),
            remainder=remainder,
            direction=combine(preconditioned, energy / jnp.maximum(descent.energy, 1e-30), descent.direction),
            energy=energy,
            iterations=iterations,
            decrement=decrement,
            gain=recent,
        )

    def bound(loop: _Loop, descent: _Descent, _) -> _Descent:
        """Choose the face from a diagonal step, or end the step at the bounds and leave those it met out of the face.

        What isn't on the face goes to its bound, or the way of the diagonal step.
        """
        # Images count up to a factor: the part of their step that only scales them is left out.
        pairs = zip(descent.step.images, state.images, strict=True)
        shaped = tuple(move - image * jnp.sum(move, axis=(1, 2), keepdims=True) for move, image in pairs)
        first = descent.phase == _SET_UP
        wanted = _select(
            first, precondition(on_face(problem.free, loop.gradient), loop), State(descent.step.vector, shaped)
        )
        end = combine(state, jnp.where(first, -1.0, 1.0), wanted)
        inside = jax.tree.map(lambda e, low, high: (e > low) & (e < high), end, problem.lowest, problem.highest)
        step = jax.tree.map(
            lambda e, i, x, low, high: jnp.where(first & i, 0.0, jnp.clip(e, low, high) - x),
            end,
            inside,
            state,
            problem.lowest,
            problem.highest,
        )
        excess = on_face(jax.tree.map(jnp.logical_not, inside), combine(wanted, -1.0, step))
        lost = 0.5 * dot(excess, jax.tree.map(jnp.multiply, diagonal(loop), excess))
        again = first | ((lost > CLIPPED * descent.decrement) & (descent.round < MAX_ROUNDS))
        return eqx.tree_at(
            lambda q: (q.phase, q.round, q.face, q.step),
            descent,
            (
                jnp.where(again, _RESTART, _DONE).astype(jnp.int32),
                descent.round + 1,
                jax.tree.map(lambda f, i: f & (i | ~again), descent.face, inside),
                step,
            ),
        )

    def restart(loop: _Loop, descent: _Descent, result: State) -> _Descent:
        """Begin conjugate gradients with the gradient of the quadratic model at the present step."""
        slope = damped(result, loop, descent.step)
        remainder = on_face(descent.face, jax.tree.map(jnp.negative, slope))
        direction = precondition(remainder, loop)
        energy = dot(remainder, direction)
        return _Descent(
            phase=jnp.asarray(_ITERATE, jnp.int32),
            round=descent.round,
            face=descent.face,
            step=descent.step,
            remainder=remainder,
            direction=direction,
            energy=energy,
            iterations=jnp.zeros((), jnp.int32),
            decrement=-0.5 * dot(descent.step, combine(slope, 1.0, loop.gradient)),
            gain=energy,
        )

    def body(loop: _Loop) -> _Loop:
        descent = loop.descent
        first, setting_up, restarting = loop.count == 0, loop.count <= num_probes, descent.phase == _RESTART
        probe = jnp.where(first, 0.0, signs[loop.count - 1])
        inner = _select(restarting, descent.step, descent.direction)
        vector = jnp.where(setting_up, probe, inner.vector)
        images = tuple(jnp.where(setting_up, 0.0, d) for d in inner.images)
        result = product(State(vector, images), jnp.where(first | restarting, 1.0, 0.0))
        # Absolute values: an estimate near zero by chance would let one coordinate rule the conjugate gradients.
        sample = jnp.where(setting_up & ~first, jnp.abs(probe * result.vector), 0.0)
        loop = _Loop(
            loop.count + 1, _select(first, result, loop.gradient), loop.curvature + sample, iterate(loop, result)
        )
        descent = loop.descent
        settling = descent.iterations * descent.gain < settled * descent.decrement
        ended = jnp.where(setting_up, loop.count > num_probes, settling | (loop.count > max_products + num_probes + 1))
        number = jnp.where(restarting, 2, jnp.where(ended, 1, 0))
        turns = (lambda _, descent, __: descent, bound, restart)
        return eqx.tree_at(lambda q: q.descent, loop, lax.switch(number, turns, loop, descent, result))

    zero, none = jnp.zeros((), state.vector.dtype), jnp.zeros((), jnp.int32)
    phase = jnp.where(accepted, _SET_UP, _DONE).astype(jnp.int32)
    empty = _Descent(phase, none, problem.free, nothing, nothing, nothing, zero, none, zero, zero)
    loop = _Loop(none, nothing, jnp.zeros_like(curvature), empty)
    loop = lax.while_loop(lambda loop: loop.descent.phase != _DONE, body, loop)
    return loop.count, loop.gradient, diagonal(loop), loop.descent


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


def _scaled_gradient(problem, state: State, gradient: State, diagonal: State):
    """Return the length of the projected diagonal Newton step in conditional standard deviations."""
    moves = jax.tree.map(
        lambda x, g, d, free, low, high: jnp.where(free, (jnp.clip(x - g / d, low, high) - x) * jnp.sqrt(d), 0.0),
        state,
        gradient,
        diagonal,
        problem.free,
        problem.lowest,
        problem.highest,
    )
    return jnp.sqrt(dot(moves, moves))


def _num_determined(problem: Problem, face: State, diagonal: State) -> Float[Array, ""]:
    """Return how many coordinates of the face the data determine."""
    stacks = zip(face.images, problem.image_priors, diagonal.images, strict=True)
    shares = [jnp.sum(jnp.where(on, 1 - weight / total, 0.0)) for on, (_, weight), total in stacks]
    return sum(shares, jnp.sum(face.vector, dtype=float))


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
